"""Truth at the key times: boxes, attributes, visibility, and the points inside each box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import F64
from imkd_data.kernels import raycast
from imkd_data.kernels.boxes import points_in_boxes
from imkd_data.world.scene import Primitives, Scene

ANNOTATION_REACH_M = 80.0
MAX_GAP = 3  # keyframes without a point inside a track that are still annotated
_VISIBILITY_RAYS = 18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyTruth:
    """Boxes of all actors near the ego at one key time (global frame; mm and 1e-9 roundings as they are written)."""

    actor: NDArray[np.int64]
    centre_m: F64
    yaw_rad: F64
    size_lwh_m: F64
    speed_mps: F64
    visibility: NDArray[np.int64]
    num_lidar: NDArray[np.int64]
    num_radar: NDArray[np.int64]


def _visible_share(
    scene: Scene, actors: NDArray[np.int64], state: F64, eye: F64, things: Primitives, tree: raycast.Tree
) -> F64:
    """Share of sight lines from the roof to points in each actor that nothing else cuts; (M,) 0..1."""
    k = np.arange(_VISIBILITY_RAYS)
    spots = np.stack([(k % 3 - 1) * 0.7, (k // 3 % 3 - 1) * 0.7, 0.25 + 0.55 * (k // 9)], axis=1)  # 3 x 3 x 2 lattice
    size = np.array([scene.actors[a].size_lwh_m for a in actors])
    local = spots[None] * np.stack([size[:, 0] / 2, size[:, 1] / 2, size[:, 2]], axis=1)[:, None]
    c, s = np.cos(state[:, 2])[:, None], np.sin(state[:, 2])[:, None]
    x = state[:, 0, None] + c * local[..., 0] - s * local[..., 1]
    y = state[:, 1, None] + s * local[..., 0] + c * local[..., 1]
    to = np.stack([x, y, local[..., 2]], axis=-1).reshape(-1, 3) - eye
    far = np.linalg.norm(to, axis=1)
    start = np.repeat(eye[None], len(to), axis=0)
    distance, which = raycast.first_hits(things.prims, things.kinds, *tree, start, to / far[:, None], 150.0)
    owner = np.where(which >= 0, things.kinds[np.maximum(which, 0), 1], raycast.NOTHING)
    clear = (distance >= far - 0.05) | (owner == np.repeat(actors, _VISIBILITY_RAYS))
    return np.asarray(clear.reshape(len(actors), -1).mean(axis=1))


def make_key_truth(scene: Scene, t_s: float, eye: F64, lidar_m: F64, radar_m: F64) -> KeyTruth:
    """Boxes at one key time. ``eye`` (3,): where visibility is judged from; points (N, 3) in the global frame."""
    state, rate = scene.tracks.at(t_s)
    gap = np.hypot(*(state[:, :2] - eye[:2]).T)
    actors = np.flatnonzero(gap < ANNOTATION_REACH_M)
    size = np.array([scene.actors[a].size_lwh_m for a in actors])
    centre: F64 = np.round(np.column_stack([state[actors, :2], size[:, 2] / 2]), 3).astype(np.float64)
    yaw = state[actors, 2]
    things = scene.primitives(t_s, eye[:2], ANNOTATION_REACH_M + 10.0)
    share = _visible_share(scene, actors, state[actors], eye, things, things.tree(0.0))
    return KeyTruth(
        actor=actors,
        centre_m=centre,
        yaw_rad=yaw,
        size_lwh_m=size,
        speed_mps=np.hypot(rate[actors, 0], rate[actors, 1]),
        visibility=1 + np.searchsorted([0.4, 0.6, 0.8], share, side="right"),
        num_lidar=points_in_boxes(lidar_m, centre, size, yaw),
        num_radar=points_in_boxes(radar_m, centre, size, yaw),
    )


def annotated(truths: list[KeyTruth], actor: int) -> list[int]:
    """Keyframes in which an actor is annotated: it holds points, or lies in a short gap between such keyframes."""
    held = []
    for k, truth in enumerate(truths):
        at = np.flatnonzero(truth.actor == actor)
        if len(at) and truth.num_lidar[at[0]] + truth.num_radar[at[0]] > 0:
            held.append(k)
    out: list[int] = []
    for k in held:
        if out and 1 < k - out[-1] <= MAX_GAP + 1:
            out.extend(range(out[-1] + 1, k))
        out.append(k)
    return [k for k in out if actor in truths[k].actor]


def attribute_name(category: str, role: str, speed_mps: float) -> str:
    """The nuScenes attribute, '' where the class has none."""
    if category.startswith("human."):
        return "pedestrian.moving" if speed_mps > 0.2 else "pedestrian.standing"
    if category in ("vehicle.bicycle", "vehicle.motorcycle"):
        return "cycle.with_rider" if role == "rider" else "cycle.without_rider"
    if category.startswith("vehicle."):
        return "vehicle.parked" if role == "parked" else ("vehicle.moving" if speed_mps > 0.2 else "vehicle.stopped")
    return ""
