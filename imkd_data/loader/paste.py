"""Object pasting for LiDAR teachers: boxes with their cached points, put into other samples where nothing stands.

The bank is made once from the training rows of a cache and kept as one file of the run. What is pasted into a sample is a pure
function of (seed, epoch, position). Objects keep their own place in ``ego``; counts per class and the rule "fill up to the
count" are those of the public CenterPoint configuration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import CacheDamageError
from imkd_data.loader.augment import generator
from imkd_data.loader.order import key64, permuted
from imkd_data.sample import Boxes

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["PASTE_COUNTS", "Pasted", "Paster", "rectangles_collide", "write_bank"]

F64 = NDArray[np.float64]
_PASTE_STREAM = 5
PASTE_COUNTS: Mapping[str, int] = {
    "car": 2,
    "truck": 3,
    "construction_vehicle": 7,
    "bus": 4,
    "trailer": 6,
    "barrier": 2,
    "motorcycle": 6,
    "bicycle": 6,
    "pedestrian": 2,
    "traffic_cone": 2,
}
_COLUMNS = 10  # of a bank box: centre, size, yaw, velocity, label


def rectangles_collide(a: F64, b: F64) -> NDArray[np.bool_]:
    """Rotated rectangles (N, 5) and (M, 5) x, y, length, width, yaw -> (N, M) whether they overlap; touching is none.

    Separating axes: two rectangles are apart exactly if one of their four side directions separates them.
    """

    def axes(r: F64) -> F64:
        c, s = np.cos(r[:, 4]), np.sin(r[:, 4])
        return np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], axis=1)  # (N, 2, xy)

    ea, eb = axes(a), axes(b)
    between = b[None, :, :2] - a[:, None, :2]
    apart = np.zeros((len(a), len(b)), dtype=bool)
    for direction in (ea[:, None].repeat(len(b), 1), eb[None].repeat(len(a), 0)):  # (N, M, 2, xy)
        gap = np.abs(np.einsum("nmkd,nmd->nmk", direction, between))
        reach = _reach(direction, ea[:, None], a[:, None]) + _reach(direction, eb[None], b[None])
        apart |= (gap >= reach).any(-1)
    return ~apart


def _reach(direction: F64, edges: F64, rectangle: F64) -> F64:
    """Half extent of rectangles along directions: (N, M, 2)."""
    half = rectangle[..., None, 2:4] / 2
    projected = np.abs(np.einsum("nmkd,nmjd->nmkj", direction, np.broadcast_to(edges, direction.shape)))
    out: F64 = (projected * half).sum(-1)
    return out


def _inside(xyz: NDArray[np.float32], box: F64) -> NDArray[np.bool_]:
    """(N, 3) points in one box (centre, size, yaw, ...); its faces belong to it."""
    d = xyz.astype(np.float64) - box[:3]
    c, s = np.cos(box[6]), np.sin(box[6])
    along, across = c * d[:, 0] + s * d[:, 1], -s * d[:, 0] + c * d[:, 1]
    out: NDArray[np.bool_] = (np.abs(along) <= box[3] / 2) & (np.abs(across) <= box[4] / 2) & (np.abs(d[:, 2]) <= box[5] / 2)
    return out


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pasted:
    """What goes into one sample, frame ego: boxes (K, 10), points (P, 3), features (P, F), age (P,)."""

    boxes: F64
    xyz: NDArray[np.float32]
    features: NDArray[np.float32]
    age: NDArray[np.float32]

    def into(self, xyz: Any, features: Any, age: Any) -> tuple[Any, Any, Any]:
        """The sample's points without those where the new objects stand, and the objects' points."""
        free = np.ones(len(xyz), dtype=bool)
        for box in self.boxes:
            free &= ~_inside(xyz, box)
        return (
            np.concatenate([xyz[free], self.xyz]),
            np.concatenate([features[free], self.features]),
            np.concatenate([age[free], self.age]),
        )

    def beside(self, boxes: Boxes) -> Boxes:
        """The sample's boxes and the new ones."""
        n, b = len(self.boxes), self.boxes
        whole = {name: np.zeros(n, dtype=np.int64) for name in ("attribute", "visibility", "num_radar")}

        def joined(name: str, value: Any) -> Any:
            return np.concatenate([getattr(boxes, name), value])

        return replace(
            boxes,
            centre_m=joined("centre_m", b[:, :3]),
            size_lwh_m=joined("size_lwh_m", b[:, 3:6]),
            yaw_rad=joined("yaw_rad", b[:, 6]),
            velocity_mps=joined("velocity_mps", b[:, 7:9]),
            label=joined("label", b[:, 9].astype(np.int64)),
            score=joined("score", np.ones(n)),
            num_lidar=joined("num_lidar", np.ones(n, dtype=np.int64)),
            **{name: joined(name, value) for name, value in whole.items()},
            track=None,
            token=(),
            instance=(),
        )


class Paster:
    """Draws objects from a bank file. until_epoch: first epoch without pasting. counts: objects of each class that a sample
    is filled up to. Travels to workers by its path; every process opens the file itself."""

    def __init__(self, bank: Path, *, until_epoch: int, counts: Mapping[str, int] = PASTE_COUNTS) -> None:
        self.bank, self.until_epoch, self.counts = Path(bank), until_epoch, dict(counts)
        self._data: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def _open(self) -> dict[str, Any]:
        if self._data is None:
            try:
                with np.load(self.bank, allow_pickle=False) as file:
                    self._data = {name: file[name] for name in file.files}
            except (OSError, ValueError, KeyError) as error:
                raise CacheDamageError(
                    "the bank of objects cannot be read",
                    file=str(self.bank),
                    next="delete it: training makes it anew, with equal content",
                ) from error
        return self._data

    def draw(self, boxes: Boxes, *, seed: int, epoch: int, position: int) -> Pasted | None:
        """Objects that fit beside ``boxes`` (frame ego, every kind of box is an obstacle); None where there are none."""
        data = self._open()
        rng = generator(seed, epoch, position, _PASTE_STREAM)
        chosen: list[int] = []
        obstacles = np.column_stack([boxes.centre_m[:, :2], boxes.size_lwh_m[:, :2], boxes.yaw_rad]).reshape(-1, 5)
        for label, name in enumerate(DETECTION_CLASSES):
            first, last = data["starts"][label], data["starts"][label + 1]
            wanted = self.counts.get(name, 0) - int((boxes.label == label).sum())
            tried = first + rng.permutation(int(last - first))[: max(0, wanted)] if last > first else []
            for index in tried:
                box = data["boxes"][index]
                rectangle = box[[0, 1, 3, 4, 6]][None]
                if rectangles_collide(rectangle, obstacles).any():
                    continue
                chosen.append(int(index))
                obstacles = np.concatenate([obstacles, rectangle])
        if not chosen:
            return None
        spans = [slice(data["offsets"][i], data["offsets"][i + 1]) for i in chosen]
        points = np.concatenate([data["points"][span] for span in spans])
        return Pasted(boxes=data["boxes"][chosen], xyz=points[:, :3], features=points[:, 3:5], age=points[:, 5])


def write_bank(
    cache: Cache,
    rows: Sequence[int],
    path: Path,
    *,
    min_points: int = 5,
    per_class: int = 1000,
    seed: int = 0,
    sweeps: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Collect objects of ``rows`` with at least ``min_points`` cached points into ``path``; returns how many.

    per_class: at most so many of a class, drawn by ``seed`` before any point is read. sweeps: newest scans used, 0 = all.
    The file appears whole or not at all.
    """
    picked: dict[int, list[tuple[int, F64]]] = {}
    for label, candidates in enumerate(_candidates(cache, rows, min_points)):
        if not candidates:
            continue
        order = permuted(np.arange(len(candidates)), len(candidates), key64("paste", seed, label))
        for at in order[:per_class].tolist():
            row, box = candidates[at]
            picked.setdefault(row, []).append((label, box))
    found: list[tuple[int, int, F64, NDArray[np.float32]]] = []
    for done, row in enumerate(sorted(picked)):
        points = cache.decode("lidar_points", row)
        keep = points["sweep"] < sweeps if sweeps else np.ones(len(points["age_s"]), dtype=bool)
        intensity = points["intensity"] / np.float32(cache.suite.reflectance_max)
        table = np.column_stack([points["xyz_m"], intensity, points["ring"], points["age_s"]]).astype(np.float32)[keep]
        for label, box in picked[row]:
            inside = table[_inside(table[:, :3], box)]
            if len(inside) >= min_points:
                found.append((label, row, box, inside))
        if progress is not None:
            progress(done + 1, len(picked))
    found.sort(key=lambda item: (item[0], item[1], *item[2][:3].tolist()))
    labels = np.array([item[0] for item in found], dtype=np.int64)
    sizes = [len(item[3]) for item in found]
    arrays = {
        "boxes": np.array([item[2] for item in found]).reshape(-1, _COLUMNS),
        "points": np.concatenate([item[3] for item in found]) if found else np.zeros((0, 6), np.float32),
        "offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        "starts": np.searchsorted(labels, np.arange(len(DETECTION_CLASSES) + 1)),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(partial, **arrays)
    os.replace(partial, path)
    return len(found)


def _candidates(cache: Cache, rows: Sequence[int], min_points: int) -> list[list[tuple[int, F64]]]:
    """Boxes per class that may hold enough points (the key scan's count, where the data set gives one)."""
    out: list[list[tuple[int, F64]]] = [[] for _ in DETECTION_CLASSES]
    for row in rows:
        boxes = cache.decode("boxes", int(row))
        for m in np.flatnonzero((boxes.label >= 0) & ((boxes.num_lidar < 0) | (boxes.num_lidar >= min_points))):
            values = np.concatenate(
                [boxes.centre_m[m], boxes.size_lwh_m[m], [boxes.yaw_rad[m]], boxes.velocity_mps[m], [boxes.label[m]]]
            )
            out[int(boxes.label[m])].append((int(row), values))
    return out
