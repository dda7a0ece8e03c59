"""Boxes in ``ego`` -> a nuScenes detection submission: frame global, (w, x, y, z), never NaN, at most 500 boxes a sample."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import ATTRIBUTES, DETECTION_CLASSES, LABEL_FROM_CLASS
from imkd_data.errors import FrameMismatchError
from imkd_data.geometry import EGO, GLOBAL, Pose, rotation_from_quaternion
from imkd_data.sample import Boxes

__all__ = [
    "MAX_BOXES_PER_SAMPLE",
    "RESULTS_FILE",
    "boxes_to_results",
    "guess_attributes",
    "headings_to_global",
    "results_to_boxes",
    "submission_meta",
    "write_results",
]

MAX_BOXES_PER_SAMPLE = 500
RESULTS_FILE = "results.json"
MOVING_MPS = 0.2  # slower boxes count as standing, as in the public CenterPoint code

# Class -> (attribute when moving, attribute when standing); classes that are not listed have no attributes.
_ATTRIBUTE_RULE = {
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
}


def _index(name: str) -> int:
    return ATTRIBUTES.index(name) if name else -1


# (classes, 2) attribute index when moving, when standing; -1 = the class has none.
_RULE_TABLE = np.array(
    [[_index(n) for n in _ATTRIBUTE_RULE[c]] if c in _ATTRIBUTE_RULE else [-1, -1] for c in DETECTION_CLASSES]
)
_FAMILY = np.array([{"vehicle": 0, "cycle": 1, "pedestrian": 2}[a.split(".")[0]] for a in ATTRIBUTES])


def guess_attributes(label: NDArray[np.int64], speed_mps: NDArray[np.float64]) -> NDArray[np.int64]:
    """(M,) class labels and speeds -> (M,) attribute indices; -1 for classes without attributes. NaN speed = standing."""
    moving = np.nan_to_num(speed_mps, nan=0.0) > MOVING_MPS
    return np.where(moving, _RULE_TABLE[label, 0], _RULE_TABLE[label, 1])


def _attributes(boxes: Boxes) -> NDArray[np.int64]:
    """The boxes' own attributes where they fit the class, else the guess from speed."""
    guess = guess_attributes(boxes.label, np.hypot(boxes.velocity_mps[:, 0], boxes.velocity_mps[:, 1]))
    own = boxes.attribute
    fits = (own >= 0) & (guess >= 0)
    fits[fits] = _FAMILY[own[fits]] == _FAMILY[guess[fits]]
    return np.where(fits, own, guess)


def headings_to_global(direction_xy: NDArray[np.float64], global_from_ego: Pose) -> NDArray[np.float64]:
    """(M, 2) level directions as seen in the x-y plane of ego -> (M, 2) level directions in global.

    Boxes and their motion are level in global while the car pitches and rolls; the reader keeps the x-y part of the
    rotated vector. This inverts that projection exactly (a plain rotation is wrong by the tilt squared).
    """
    ego_xy_from_level = global_from_ego.rotation.T[:2, :2]
    return np.asarray(np.linalg.solve(ego_xy_from_level, np.asarray(direction_xy, dtype=np.float64).T).T)


def _usable(boxes: Boxes) -> NDArray[np.bool_]:
    finite = np.isfinite(boxes.centre_m).all(1) & np.isfinite(boxes.size_lwh_m).all(1)
    finite &= np.isfinite(boxes.yaw_rad) & np.isfinite(boxes.score)
    with np.errstate(invalid="ignore"):
        return np.asarray(finite & (boxes.size_lwh_m > 0).all(1) & (boxes.label >= 0))


def boxes_to_results(
    token: str, boxes: Boxes, global_from_ego: Pose, max_boxes: int = MAX_BOXES_PER_SAMPLE
) -> list[dict[str, Any]]:
    """One sample's boxes (frame ego, gravity centres) -> its list of submission entries, best score first.

    Boxes with a non-finite number, a size that is not positive or an ignored label are left out; an unknown velocity
    becomes 0. Ties of the score keep their order.

    Raises:
        FrameMismatchError: boxes are not in ego, or the pose is not global_from_ego.
    """
    if boxes.frame != EGO or (global_from_ego.dst, global_from_ego.src) != (GLOBAL, EGO):
        raise FrameMismatchError(
            "a submission needs boxes in ego and the pose global_from_ego",
            expected="ego, global_from_ego",
            found=f"{boxes.frame}, {global_from_ego.dst}_from_{global_from_ego.src}",
            token=token,
        )
    usable = np.flatnonzero(_usable(boxes))
    order = usable[np.argsort(-boxes.score[usable], kind="stable")[:max_boxes]]
    centre = global_from_ego.points(boxes.centre_m[order])
    heading = headings_to_global(np.stack([np.cos(boxes.yaw_rad[order]), np.sin(boxes.yaw_rad[order])], 1), global_from_ego)
    half = np.arctan2(heading[:, 1], heading[:, 0]) / 2
    known = np.isfinite(boxes.velocity_mps[order]).all(1, keepdims=True)
    velocity = headings_to_global(np.where(known, boxes.velocity_mps[order], 0.0), global_from_ego)
    attribute = _attributes(boxes)[order] if len(order) else order
    return [
        {
            "sample_token": token,
            "translation": centre[k].tolist(),
            "size": boxes.size_lwh_m[i][[1, 0, 2]].tolist(),
            "rotation": [float(np.cos(half[k])), 0.0, 0.0, float(np.sin(half[k]))],
            "velocity": velocity[k].tolist(),
            "detection_name": DETECTION_CLASSES[boxes.label[i]],
            "detection_score": float(boxes.score[i]),
            "attribute_name": ATTRIBUTES[attribute[k]] if attribute[k] >= 0 else "",
        }
        for k, i in enumerate(order)
    ]


def results_to_boxes(entries: Sequence[Mapping[str, Any]], global_from_ego: Pose) -> Boxes:
    """One sample's submission entries (frame global) -> boxes in ego; the inverse of ``boxes_to_results``."""
    n = len(entries)
    if not n:
        return Boxes.empty(EGO)

    def column(name: str) -> NDArray[np.float64]:
        return np.array([e[name] for e in entries], dtype=np.float64).reshape(n, -1)

    ego_from_global = global_from_ego.inverse()
    axis = ego_from_global.vectors(rotation_from_quaternion(column("rotation"))[:, :, 0])
    velocity = column("velocity")
    names = [e["attribute_name"] for e in entries]
    unknown = np.full(n, -1, dtype=np.int64)
    return Boxes(
        frame=EGO,
        centre_m=ego_from_global.points(column("translation")),
        size_lwh_m=column("size")[:, [1, 0, 2]],
        yaw_rad=np.arctan2(axis[:, 1], axis[:, 0]),
        velocity_mps=ego_from_global.vectors(np.concatenate([velocity, np.zeros((n, 1))], 1))[:, :2],
        label=np.array([LABEL_FROM_CLASS[e["detection_name"]] for e in entries], dtype=np.int64),
        score=column("detection_score")[:, 0],
        num_lidar=unknown,
        num_radar=unknown,
        attribute=np.array([ATTRIBUTES.index(a) if a else -1 for a in names], dtype=np.int64),
        visibility=np.zeros(n, dtype=np.int64),
    )


def submission_meta(sensors: Iterable[str]) -> dict[str, bool]:
    """The submission's ``meta`` from a model's ``sensors`` (subset of camera, radar, lidar). Maps and outside data: none."""
    used = set(sensors)
    return {
        "use_camera": "camera" in used,
        "use_lidar": "lidar" in used,
        "use_radar": "radar" in used,
        "use_map": False,
        "use_external": False,
    }


def write_results(
    out: Path, results: Iterable[tuple[str, Sequence[Mapping[str, Any]]]], sensors: Iterable[str], name: str = RESULTS_FILE
) -> Path:
    """Stream (token, entries) pairs into ``out/results.json``; the file appears whole or not at all.

    Memory stays at one sample. Returns the path.

    Raises:
        ValueError: a number is NaN or infinite (a submission must never hold one), or a token comes twice.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, part = out / name, out / f".{name}.part"
    seen: set[str] = set()
    with part.open("w", encoding="utf-8") as file:
        file.write('{"meta": ' + json.dumps(submission_meta(sensors)) + ', "results": {')
        for token, entries in results:
            if token in seen:
                raise ValueError(f"sample {token} was predicted twice")
            file.write((", " if seen else "") + json.dumps(token) + ": " + json.dumps(list(entries), allow_nan=False))
            seen.add(token)
        file.write("}}\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return path
