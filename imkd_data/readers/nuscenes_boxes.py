"""Annotation rows of the nuScenes tables -> truth boxes of whole scenes, and the raw values they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import ATTRIBUTES, CLASS_FROM_CATEGORY, LABEL_FROM_CLASS
from imkd_data.errors import InputDataError
from imkd_data.geometry import EGO, F64, matmul3, rotation_from_quaternion, yaw_from_rotation
from imkd_data.readers.nuscenes_tables import NuScenesTables
from imkd_data.sample import Boxes

__all__ = ["SceneBoxes", "annotation_velocities"]

_MAX_VELOCITY_GAP_S = 1.5  # the devkit's limit for velocities by difference
_NORM_BAD = 0.1
_LEVELS = {"v0-40": 1, "v40-60": 2, "v60-80": 3, "v80-100": 4}  # names of visibility.json, whatever their order and tokens


def annotation_velocities(tables: NuScenesTables, rows: NDArray[Any]) -> F64:
    """(M, 3) global velocities by the devkit's rule: central difference where both neighbours exist, else one-sided; NaN for a
    single annotation or a gap above 1.5 s (3 s for the central one)."""
    previous, following = tables.ann_prev[rows], tables.ann_next[rows]
    first = np.where(previous >= 0, previous, rows)
    last = np.where(following >= 0, following, rows)
    dt = 1e-6 * tables.sample_timestamp[tables.ann_sample[last]] - 1e-6 * tables.sample_timestamp[tables.ann_sample[first]]
    limit = np.where((previous >= 0) & (following >= 0), 2 * _MAX_VELOCITY_GAP_S, _MAX_VELOCITY_GAP_S)
    known = (first != last) & (dt <= limit) & (dt > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        velocity = (tables.ann_translation[last] - tables.ann_translation[first]) / dt[:, None]
    return np.where(known[:, None], velocity, np.nan)


class SceneBoxes:
    """The annotations of some samples, their columns taken from the tables once.

    samples: rows of the sample table; a sample is named by its place in this list. ``check`` comes before ``move``, and
    ``move`` before ``boxes``.
    """

    def __init__(self, tables: NuScenesTables, samples: list[int]) -> None:
        t = self.t = tables
        parts = [t.ann_order[t.ann_start[s] : t.ann_start[s + 1]] for s in samples]
        self.rows: NDArray[Any] = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum([len(p) for p in parts], dtype=np.int64)])
        rows = self.rows
        self.instance = t.ann_instance[rows]
        self.translation, self.size = t.ann_translation[rows], t.ann_size[rows]
        self.quaternion, self.points = t.ann_quaternion[rows], t.ann_points[rows]
        self.visibility_row, self.attribute = t.ann_visibility[rows], t.ann_attribute[rows]
        levels = np.array([*(_LEVELS.get(name, 0) for name in t.visibility_level), 0], dtype=np.int32)
        self.visibility = levels[np.maximum(self.visibility_row, -1)]  # 1..4, 0 = unknown
        self.velocity = annotation_velocities(t, rows)
        self.token: list[str] = t.ann_token.take(rows).to_pylist()
        self.track_token: list[str] = t.ann_instance_token.take(rows).to_pylist()

    def check(self, scene: str, tokens: list[str]) -> list[InputDataError]:
        """F22, F25. An empty visibility or attribute means unknown; a token that points nowhere is broken. tokens: of the
        samples."""
        t, rows, instance = self.t, self.rows, self.instance
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.abs(np.sqrt((self.quaternion * self.quaternion).sum(axis=1)) - 1)
        category = np.where(instance >= 0, t.instance_category[np.maximum(instance, 0)], -2)
        rules: list[tuple[str, str, NDArray[np.bool_]]] = [
            ("annotation.instance", "an instance with a category", (instance < 0) | (category < 0)),
            ("annotation.visibility", "an empty or known visibility_token", self.visibility_row == -2),
            ("annotation.attribute", "no or known attribute_tokens", self.attribute == -2),
            ("annotation.chain", "prev and next in sample_annotation", (t.ann_prev[rows] == -2) | (t.ann_next[rows] == -2)),
            ("annotation.centre", "a finite centre", ~np.isfinite(self.translation).all(axis=1)),
            ("annotation.size", "a size above 0", ~((self.size > 0) & np.isfinite(self.size)).all(axis=1)),
            ("annotation.rotation", "a quaternion of length 1", ~(off <= _NORM_BAD)),
        ]
        problems = []
        for rule, expected, wrong in rules:
            for i in np.flatnonzero(wrong).tolist():
                found = f"annotation {self.token[i]}: centre {self.translation[i].tolist()}, size {self.size[i].tolist()}"
                problems.append(
                    InputDataError(
                        "annotation is broken",
                        rule=rule,
                        scene=scene,
                        expected=expected,
                        found=found,
                        token=tokens[int(np.searchsorted(self.starts, i, side="right")) - 1],
                        file="sample_annotation.json",
                    )
                )
        return problems

    def move(self, rotation: F64, translation_m: F64) -> int:
        """Into ego, by ego_from_global of every sample (S, 3, 3), (S, 3). Returns how many boxes are of ignored categories."""
        t = self.t
        labels = np.array([LABEL_FROM_CLASS.get(CLASS_FROM_CATEGORY.get(n, ""), -1) for n in t.category_name], dtype=np.int64)
        attributes = np.array([ATTRIBUTES.index(n) if n in ATTRIBUTES else -1 for n in t.attribute_name], dtype=np.int64)
        sample = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        turn, shift = rotation[sample], translation_m[sample]
        yaw = yaw_from_rotation(matmul3(turn, rotation_from_quaternion(self.quaternion)))
        label = labels[t.instance_category[self.instance]]
        attribute = np.append(attributes, -1)[np.maximum(self.attribute, -1)]
        tracks: dict[int, int] = {}
        track = np.array([tracks.setdefault(i, len(tracks)) for i in self.instance.tolist()], dtype=np.int64)
        self.columns: dict[str, NDArray[Any]] = {
            "centre_m": matmul3(turn, self.translation[..., None])[..., 0] + shift,
            "size_lwh_m": self.size[:, [1, 0, 2]],  # the tables give width, length, height
            "yaw_rad": yaw,
            "velocity_mps": matmul3(turn, self.velocity[..., None])[:, :2, 0],
            "label": label,
            "score": np.ones(len(label)),
            "num_lidar": self.points[:, 0],
            "num_radar": self.points[:, 1],
            "attribute": attribute,
            "visibility": self.visibility.astype(np.int64),
            "track": track,
        }
        for column in self.columns.values():
            column.flags.writeable = False  # slices of it then need no copies
        return int((label < 0).sum())

    def boxes(self, place: int) -> Boxes:
        """Truth of one sample, frame ego."""
        start, stop = self.starts[place], self.starts[place + 1]
        if start == stop:
            return Boxes.empty(EGO)
        columns = {name: column[start:stop] for name, column in self.columns.items()}
        return Boxes(frame=EGO, token=tuple(self.token[start:stop]), instance=tuple(self.track_token[start:stop]), **columns)

    def values(self, place: int) -> list[Any]:
        """Everything of the tables that the boxes of a sample are made of, as raw values: for hashing."""
        t, start, stop = self.t, self.starts[place], self.starts[place + 1]
        of = slice(start, stop)
        category = [t.category_name[c] if c >= 0 else "" for c in t.instance_category[self.instance[of]].tolist()]
        attribute = [t.attribute_name[a] if a >= 0 else "" for a in self.attribute[of].tolist()]
        names = [self.token[of], self.track_token[of], category, attribute]
        level = self.visibility - np.int32(1)  # the row of it in the usual table: so keys of older caches stay as they are
        arrays = [self.translation, self.size, self.quaternion, self.points, level, self.velocity]
        return [*names, *(a[of] for a in arrays)]
