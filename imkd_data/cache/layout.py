"""Which samples lie where: shards, rows, file names. A shard is a few whole scenes (or clips of one) of one split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imkd_data.errors import CacheDamageError, MismatchError, RecipeError
from imkd_data.fields.base import CacheField

__all__ = [
    "Clip",
    "Shard",
    "array_path",
    "blob_path",
    "check_name",
    "data_path",
    "extend_shards",
    "is_own_path",
    "receipt_path",
    "shards_from_json",
]

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Clip:
    """Samples start..stop of one scene, in time order. History never crosses its ends."""

    scene: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work, resume, verification, repair and streaming."""

    number: int
    split: str
    clips: tuple[Clip, ...]

    def __len__(self) -> int:
        return sum(map(len, self.clips))

    @property
    def label(self) -> str:
        """As messages name it: ``train 00017``."""
        return f"{self.split} {self.number:05d}"

    def as_json(self) -> list[Any]:
        """[split, [[scene, start, stop], ...]]."""
        return [self.split, [[c.scene, c.start, c.stop] for c in self.clips]]


def shards_from_json(value: Sequence[Any]) -> tuple[Shard, ...]:
    """Inverse of ``[s.as_json() for s in shards]``."""
    try:
        return tuple(
            Shard(i, str(split), tuple(Clip(str(s), int(a), int(b)) for s, a, b in clips))
            for i, (split, clips) in enumerate(value)
        )
    except (TypeError, ValueError) as error:
        raise CacheDamageError("the shard table cannot be read", rule="layout", next="imkd-data verify") from error


def _clips(scene: str, count: int, rows_per_shard: int) -> list[Clip]:
    return [Clip(scene, a, min(a + rows_per_shard, count)) for a in range(0, count, rows_per_shard)]


def extend_shards(old: Sequence[Shard], scenes: Iterable[tuple[str, str, int]], rows_per_shard: int) -> tuple[Shard, ...]:
    """Shards for (split, scene, number of samples), in that order; ``old`` shards keep their numbers and content.

    Scenes that old shards hold already are only compared: another length raises MismatchError.
    """
    known: dict[tuple[str, str], int] = {}
    for shard in old:
        for clip in shard.clips:
            key = shard.split, clip.scene
            known[key] = max(known.get(key, 0), clip.stop)
    out = list(old)
    pending: list[Clip] = []
    split_now = ""

    def close() -> None:
        if pending:
            out.append(Shard(len(out), split_now, tuple(pending)))
            pending.clear()

    for split, scene, count in scenes:
        if (split, scene) in known:
            if known[split, scene] != count:
                raise MismatchError(
                    "a scene has another number of samples than when the cache was planned",
                    scene=scene,
                    expected=f"{known[split, scene]} samples",
                    found=f"{count} samples",
                    next="build into another --out",
                )
            continue
        if split != split_now:
            close()
            split_now = split
        for clip in _clips(scene, count, rows_per_shard):
            if sum(map(len, pending)) + len(clip) > rows_per_shard:
                close()
            pending.append(clip)
    close()
    return tuple(out)


def array_path(name: str, shard: int, ndim: int) -> str:
    """Relative path of a Zarr shard; ``ndim`` counts the row axis."""
    return f"arrays.zarr/{name}/c/{shard}" + "/0" * (ndim - 1)


def blob_path(name: str, shard: int) -> str:
    """Relative path of a tar."""
    return f"blobs/{name}/{shard:05d}.tar"


def data_path(field: CacheField, shard: int, row_shape: Mapping[str, tuple[int, ...]]) -> str:
    """Relative path of a field's data file."""
    if field.kind == "blob":
        return blob_path(field.name, shard)
    return array_path(field.name, shard, 1 + len(row_shape[field.name]))


def check_name(name: str) -> str:
    """A field's name as part of paths: lower-case letters, digits and underscores. Raises RecipeError."""
    if not _NAME.fullmatch(name):
        raise RecipeError("a field name cannot be part of a path", field=repr(name), expected=_NAME.pattern)
    return name


def is_own_path(path: str, name: str, shard: int) -> bool:
    """Whether a receipt's path is the one of its field and shard; a receipt from a stranger may say anything."""
    head = f"arrays.zarr/{name}/c/{shard}"
    return path == blob_path(name, shard) or (path.startswith(head) and re.fullmatch("(/0)*", path[len(head) :]) is not None)


def receipt_path(out: Path, name: str, shard: int) -> Path:
    """Path of a receipt."""
    return out / "receipts" / name / f"{shard:05d}.json"
