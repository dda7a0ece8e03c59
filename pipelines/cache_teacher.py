"""``imkd cache-teacher``: a frozen teacher's maps as fields of the cache, and a teacher that reads them back.

Field names are ``teacher_<first 8 digits of the weights' sha256>_<feature>``, half precision, frame ego: they hold without
augmentation only, and a stream with augmentation refuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from imkd_data.errors import MismatchError, MissingFeatureError, UsageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.loader.batch import Batch
from imkd_data.loader.stream import stream
from imkd_models.checkpoint import load_model
from imkd_models.distill import FrozenTeacher
from imkd_models.distill.needs import HEAD
from imkd_models.outputs import Outputs

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["CachedTeacher", "cache_features", "field_name", "stored_maps"]

F16_MAX = 65504.0


def field_name(weights_sha256: str, feature: str) -> str:
    """Name of a stored map."""
    return f"teacher_{weights_sha256[:8]}_{feature}"


def stored_maps(wanted: Sequence[str]) -> tuple[str, ...]:
    """Maps to store for what a method reads of a teacher: its features, and the neck where it reads the head."""
    features = [f for f in wanted if f != HEAD]
    return tuple(dict.fromkeys([*features, *(["bev_neck"] if HEAD in wanted else [])]))


def _unused(*_: Any) -> Stored:
    raise UsageError("this field is computed by `imkd cache-teacher`, not by a build")


def _field(name: str, shape: tuple[int, int, int], grid: Mapping[str, Any], sha256: str, feature: str) -> CacheField:
    about = {"frame": "ego", "units": "teacher feature", "feature": feature, "teacher_sha256": sha256, "grid": dict(grid)}
    return CacheField(
        name=name,
        version=1,
        kind="array",
        space="bev",
        uses=(),
        compute=_unused,
        dtype=np.dtype("<f2"),
        shape=lambda recipe, suite: shape,
        codec="blosc3",
        attributes=lambda recipe, suite: about,
    )


def cache_features(
    checkpoint: Path | str,
    cache: Path | str,
    features: Sequence[str],
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Run a teacher over every row of a cache and store the named maps in it; the same call continues. Returns field names.

    Raises:
        UsageError: no feature, or a label encoder. MissingFeatureError: a feature that the teacher does not deliver, or a
        field that it reads and the cache lacks. LockedError: the cache is being built.
    """
    from imkd_data import open_cache
    from imkd_data.cache.extend import add_fields, finish_pending
    from pipelines.build.lock import build_lock
    from pipelines.predict import stream_options

    if not features:
        raise UsageError("name at least one feature", expected="--features bev_stage1,bev_stage2")
    model, meta = load_model(checkpoint, device)
    network: Any = model
    if getattr(network.config, "kind", "") == "label":  # training runs it anyway: it reads boxes alone and is cheap
        raise UsageError("a label encoder's maps are not stored", expected="a LiDAR or LiDAR-camera teacher", file=checkpoint)
    unknown = [f for f in features if f not in network.feature_shapes]
    if unknown:
        raise MissingFeatureError(
            f"the teacher does not deliver {', '.join(unknown)}",
            expected=", ".join(features),
            found=", ".join(network.feature_shapes),
        )
    digest = str(meta["weights_sha256"])
    names = {f: field_name(digest, f) for f in features}
    with build_lock(Path(cache)):
        finish_pending(Path(cache))
        opened = open_cache(cache)
        options = stream_options(model, meta)
        reader = stream(opened, 1, split="all", shuffle="none", device=device, **options)
        grid = network.grid.as_dict()
        fields = [_field(names[f], network.feature_shapes[f], grid, digest, f) for f in features]

        @torch.no_grad()
        def compute(row: int) -> dict[str, Stored]:
            one = stream(opened, 1, rows=[row], shuffle="none", device=device, **options)
            outputs = network(next(iter(one)))
            return {names[f]: _half(outputs.features[f][0], f, opened.token(row)) for f in features}

        add_fields(opened, fields, [n for n in reader.reader.fields if n in opened.fields], compute, progress=progress)
    return tuple(names.values())


def _half(value: Tensor, feature: str, token: str) -> Any:
    largest = float(value.abs().max())
    if not largest <= F16_MAX:  # NaN too
        raise MismatchError(
            "a teacher map does not fit half precision", field=feature, token=token, found=f"largest value {largest:g}"
        )
    return value.to("cpu", torch.float16).numpy()


class CachedTeacher(FrozenTeacher):
    """A frozen teacher whose maps come with the batch; its head runs on the stored neck where the method needs the head."""

    def __init__(self, teacher: FrozenTeacher, weights_sha256: str, wanted: Sequence[str]) -> None:
        super().__init__(teacher.network, name=teacher.name)
        self.stored = {f: field_name(weights_sha256, f) for f in stored_maps(wanted)}
        self.with_head = HEAD in wanted

    def check(self, cache: Cache) -> None:
        """Errors: MissingFeatureError naming the command that stores what is missing."""
        missing = [f for f, name in self.stored.items() if name not in cache.fields]
        if missing:
            raise MissingFeatureError(
                f"the cache has no stored maps of teacher {self.name!r}: {', '.join(missing)}",
                rule="train.cached_teacher",
                expected=", ".join(self.stored.values()),
                next=f"imkd cache-teacher --checkpoint CKPT --cache {cache.path} --features {','.join(self.stored)}",
            )

    def forward(self, batch: Batch) -> Outputs:
        """Stored maps as float32; the head's maps where they are needed."""
        features = {f: batch.bev_maps[name].float() for f, name in self.stored.items()}
        with torch.no_grad():
            head = self.heads(features["bev_neck"]) if self.with_head else ()
        return Outputs(features=features, head=head, grid=batch.grid)
