"""A checkpoint's boxes: from a cache, or straight from a nuScenes tree with no file opened that its sensors do not need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.errors import MismatchError, UsageError
from imkd_data.geometry import EGO, GLOBAL, Pose
from imkd_data.recipe import Recipe
from imkd_data.sample import Boxes, SensorSuite
from pipelines.submission import boxes_to_results, write_results

if TYPE_CHECKING:
    from torch import nn

    from imkd_data.cache.memory import MemoryCache
    from imkd_data.cache.store import Cache
    from imkd_data.loader.batch import Batch
    from imkd_models.decode import DecodeOptions, Detections
    from imkd_models.outputs import Outputs

__all__ = [
    "Prediction",
    "detections_to_boxes",
    "predict_cache",
    "predict_rows",
    "predict_split",
    "predict_variants",
    "stream_options",
    "trained_sweeps",
]

Progress = Callable[[int, int], None]
# Fields that a sensor's branch reads; nothing else is computed or opened.
FIELDS_OF_SENSOR: Mapping[str, tuple[str, ...]] = {
    "camera": ("images", "camera_calibration"),
    "radar": ("radar_points",),
    "lidar": ("lidar_points",),
}
_PART_OF_SENSOR = {"camera": "images", "radar": "radar_points", "lidar": "lidar_points"}


def stream_options(model: nn.Module, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What ``imkd_data.stream`` must be asked for so that ``model`` sees what it was trained on, without augmentation.

    Radar filter, numbers of sweeps and image scale come from the run that made the checkpoint (``meta["run"]``); where it read
    all sweeps, their number comes from its cache (``meta["cache"]``).
    """
    from imkd_data.loader.augment import IDENTITY
    from imkd_models.convention import lidar_features
    from pipelines.networks import STATE_FEATURES

    sensors = model_sensors(model)
    parts = [_PART_OF_SENSOR[s] for s in sensors]
    config: Any = model.config
    camera = getattr(config, "student", config)  # a LiDAR-camera teacher keeps its camera side there
    if getattr(camera, "depth_input", False):
        parts.append("depth")
    if getattr(config, "kind", "") == "label":
        parts.append("boxes")  # the label encoder reads the truth itself
    loader = dict(dict(meta.get("run") or {}).get("loader") or {})
    options: dict[str, Any] = {"radar_filter": loader["radar_filter"]} if "radar_filter" in loader else {}
    for key in ("radar_sweeps", "lidar_sweeps"):
        if key in loader or trained_sweeps(meta, key):
            options[key] = trained_sweeps(meta, key)
    if loader.get("parity"):
        options["parity"] = tuple(loader["parity"])
    if getattr(config, "radar_states", False):
        options["radar_features"] = STATE_FEATURES
    if "camera" in sensors:
        options["image_hw_px"] = tuple(camera.image_hw_px)
    scale = float(dict(loader.get("augment") or {}).get("evaluation_scale", 1.0))
    return options | {
        "fields": tuple(dict.fromkeys(parts)),
        "history": tuple(getattr(config, "history", (0,))),
        "grid": config.grid,
        "lidar_features": lidar_features(config),
        "augment": replace(IDENTITY, evaluation_scale=scale),
    }


def trained_sweeps(meta: Mapping[str, Any], key: str) -> int:
    """How many of the newest sweeps a network was trained on. key: lidar_sweeps | radar_sweeps. 0: all that its cache held, and
    the checkpoint does not say how many those were."""
    asked = int(dict(dict(meta.get("run") or {}).get("loader") or {}).get(key) or 0)
    stored = int(dict(meta.get("cache") or {}).get(key) or 0)
    return min(asked, stored) if asked and stored else asked or stored


def model_sensors(model: nn.Module) -> tuple[str, ...]:
    """Subset of (camera, radar, lidar) that a forward pass reads; none for a label encoder, which reads the truth."""
    return tuple(s for s in ("camera", "radar", "lidar") if s in tuple(getattr(model, "sensors", ())))


def detections_to_boxes(found: Detections, bev_from_ego: np.ndarray) -> Boxes:
    """One sample's detections, frame bev -> boxes in ego.

    bev_from_ego (4, 4): identity in evaluation; with a BEV draw (flip, turn, scale) the boxes are moved back.
    """
    from imkd_data.loader.augment import move_boxes

    centre, size, yaw, velocity, label, score = (
        np.asarray(value.detach().to("cpu").double().numpy())
        for value in (found.centre_m, found.size_lwh_m, found.yaw_rad, found.velocity_mps, found.label, found.score)
    )
    back = np.linalg.inv(np.asarray(bev_from_ego, dtype=np.float64))
    if not np.array_equal(back, np.eye(4)):
        centre, size, yaw, velocity = move_boxes(back, centre, size, yaw, velocity)
    n = len(score)
    unknown = np.full(n, -1, dtype=np.int64)
    return Boxes(
        frame=EGO,
        centre_m=centre.reshape(n, 3),
        size_lwh_m=size.reshape(n, 3),
        yaw_rad=yaw.reshape(n),
        velocity_mps=velocity.reshape(n, 2),
        label=label.astype(np.int64),
        score=score,
        num_lidar=unknown,
        num_radar=unknown,
        attribute=unknown,
        visibility=np.zeros(n, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One sample: its token, boxes in ego, pose, and, on request, the network's outputs for it (batch of one or more)."""

    token: str
    boxes: Boxes
    global_from_ego: Pose
    batch: Batch
    outputs: Outputs
    position: int  # in the batch


def _pose(matrix: np.ndarray) -> Pose:
    return Pose(dst=GLOBAL, src=EGO, rotation=matrix[:3, :3], translation_m=matrix[:3, 3])


def predict_rows(
    model: nn.Module,
    cache: Cache | MemoryCache,
    rows: Sequence[int] | np.ndarray,
    meta: Mapping[str, Any],
    *,
    device: str = "cpu",
    batch_size: int = 1,
    workers: int = 0,
    decode_options: DecodeOptions | None = None,
    change: Callable[[Batch], Batch] | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> Iterator[Prediction]:
    """Predictions of rows in the given order. ``change`` alters each batch before the network sees it; ``overrides``
    replace entries of ``stream_options``."""
    changes = (change or _unchanged,)
    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers, **overrides}
    for _, found in predict_variants(
        model, cache, rows, meta, changes, decode_options=decode_options, progress=progress, **options
    ):
        yield found


def _unchanged(batch: Batch) -> Batch:
    return batch


def predict_variants(
    model: nn.Module,
    cache: Cache | MemoryCache,
    rows: Sequence[int] | np.ndarray,
    meta: Mapping[str, Any],
    changes: Sequence[Callable[[Batch], Batch]],
    *,
    device: str = "cpu",
    batch_size: int = 1,
    workers: int = 0,
    decode_options: DecodeOptions | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> Iterator[tuple[int, Prediction]]:
    """(number of the change, prediction) under several changes of the same batches (robustness protocol): every batch is read
    and decoded once for all of them."""
    import torch

    from imkd_data.loader.stream import stream
    from imkd_models.head import DecodeOptions, decode

    options = {**stream_options(model, meta), **overrides}
    batches = stream(
        cache,  # type: ignore[arg-type]  # a MemoryCache has the interface that a stream reads
        batch_size,
        rows=[int(r) for r in rows],
        shuffle="none",
        drop_last=False,
        workers=workers,
        device=device,
        **options,
    )
    rule = decode_options or getattr(model, "decode_options", None) or DecodeOptions()
    done = 0
    model.eval()
    for plain in batches:
        real = [i for i in range(len(plain)) if plain.padding_B is None or not bool(plain.padding_B[i])]
        for number, change in enumerate(changes):
            batch = change(plain)
            with torch.inference_mode():
                outputs = model(batch)
                found = decode(outputs.head, outputs.grid, rule)
            bev_from_ego, poses = batch.bev_from_ego_B44.cpu().numpy(), batch.global_from_ego_B44.cpu().numpy()
            for i in real:
                boxes, pose = detections_to_boxes(found[i], bev_from_ego[i]), _pose(poses[i])
                yield (
                    number,
                    Prediction(
                        token=batch.tokens[i], boxes=boxes, global_from_ego=pose, batch=batch, outputs=outputs, position=i
                    ),
                )
        done += len(real)
        if progress is not None:
            progress(done, len(rows))


def _entries(predictions: Iterator[Prediction]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for p in predictions:
        yield p.token, boxes_to_results(p.token, p.boxes, p.global_from_ego)


def predict_cache(
    model: nn.Module,
    cache: Cache,
    rows: Sequence[int] | np.ndarray,
    out: Path,
    *,
    meta: Mapping[str, Any],
    device: str = "cpu",
    batch_size: int = 1,
    workers: int = 0,
    progress: Progress | None = None,
    **overrides: Any,
) -> Path:
    """Rows of a cache -> ``out/results.json``, a nuScenes submission. Returns its path.

    meta: of the checkpoint; without its run's loader settings the network would see other radar points than in training.
    """
    found = predict_rows(
        model, cache, rows, meta, device=device, batch_size=batch_size, workers=workers, progress=progress, **overrides
    )
    return write_results(Path(out), _entries(found), model_sensors(model))


def _channels(model: nn.Module, suite: SensorSuite, trained_with: Sequence[str] | None) -> tuple[str, ...]:
    """The channels that the model's sensors need: of those it was trained with, where the checkpoint says which."""
    trained = set(trained_with or suite.channels)
    groups = {"camera": suite.cameras, "radar": suite.radars, "lidar": (suite.lidar,) if suite.lidar else ()}
    chosen = {c for s in model_sensors(model) for c in groups[s] if c in trained}
    if not chosen:
        raise MismatchError("the checkpoint uses no sensor of this data set", found=", ".join(model_sensors(model)))
    return tuple(c for c in suite.channels if c in chosen)


def open_tree(
    model: nn.Module, meta: Mapping[str, Any], dataroot: Path, version: str, splits: Sequence[str], scenes: Sequence[str] = ()
) -> MemoryCache:
    """A nuScenes tree as an in-memory cache with exactly the fields and sensors that ``model`` reads.

    ``ego`` is the car at the reference sensor's key time, which is a row of the tables: no LiDAR file is needed for it.
    """
    from imkd_data.cache.memory import MemoryCache
    from imkd_data.readers import READERS

    if getattr(getattr(model, "config", None), "kind", "") == "label":
        raise UsageError(
            "a label encoder reads the truth, so it predicts nothing", next="give the student's or the teacher's checkpoint"
        )
    options, sensors = stream_options(model, meta), model_sensors(model)
    fields = [f for s in sensors for f in FIELDS_OF_SENSOR[s]]
    fields += ["depth_points", "depth_count"] if "depth" in options["fields"] else []
    trained = dict(meta.get("cache") or {})
    dataset = str(trained.get("dataset", "nuscenes"))
    sweeps: dict[str, Any] = {
        "lidar_sweeps": int(options.get("lidar_sweeps") or 10),
        "radar_sweeps": int(options.get("radar_sweeps") or 13),
    }
    opened = READERS[dataset](Path(dataroot), version, **sweeps)
    channels = _channels(model, opened.suite, trained.get("sensors"))
    reference = str(trained.get("reference_channel") or opened.suite.lidar or channels[0])
    reader = READERS[dataset](Path(dataroot), version, sensors=channels, reference_channel=reference, **sweeps)
    recipe = Recipe(
        dataset=dataset,
        version=version,
        splits=tuple(splits),
        scenes=tuple(scenes),
        sensors=channels,
        reference_channel=reference,
        fields=tuple(fields),
        images_mode="original",
        **sweeps,
    )
    return MemoryCache(reader, recipe, keep_rows=2 - min(options["history"]))


def predict_split(
    checkpoint: Path,
    dataroot: Path,
    version: str,
    split: str,
    out: Path,
    *,
    scenes: Sequence[str] = (),
    device: str = "cpu",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Path:
    """A checkpoint on a split of a nuScenes tree -> ``out/results.json``; works for ``test`` and without any LiDAR file.

    split: train, val, test, mini_train, mini_val, a union, or a comma-separated list. version "" follows from the split.

    Raises:
        SourceMissingError: no such tree, or a sensor file that the checkpoint needs. UsageError: unknown split, or a label
        encoder's checkpoint. InputDataError: a damaged sensor file.
    """
    from imkd_data.readers import expand_splits, version_from_split
    from imkd_models.checkpoint import load_model

    splits = expand_splits(split)
    model, meta = load_model(checkpoint, device)
    cache = open_tree(model, meta, Path(dataroot), version or version_from_split(split), splits, scenes)
    found = predict_rows(model, cache, cache.rows(), meta, device=device, batch_size=batch_size, progress=progress)
    return write_results(Path(out), _entries(found), model_sensors(model))
