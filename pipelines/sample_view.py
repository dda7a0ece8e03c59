"""Everything that a picture of one sample shows, read from a cache; and boxes as lines in an image. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import EGO, GLOBAL, BevGrid, Camera, Pose, sensor_at
from imkd_data.sample import Boxes

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = [
    "CameraView",
    "SampleView",
    "box_corners",
    "box_lines",
    "calibration_lines",
    "is_synthetic",
    "match_boxes",
    "read_view",
]

F64 = NDArray[np.float64]
NEAR_M = 0.3  # edges are cut here: what is behind the camera has no place in the image

# Corner order: front-left-bottom, front-right-bottom, rear-right-bottom, rear-left-bottom, then the same at the top.
_UNIT = np.array([[1, 1, -1], [1, -1, -1], [-1, -1, -1], [-1, 1, -1], [1, 1, 1], [1, -1, 1], [-1, -1, 1], [-1, 1, 1]]) / 2
_EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CameraView:
    """One camera: image (H, W, 3) u8, its Camera at that size, LiDAR depth (n, 3) u, v px and depth m, or None."""

    camera: Camera
    image: NDArray[np.uint8]
    depth: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleView:
    """One sample, frame ego. intensity (Y, X) mean reflectance 0..1 and occupied (Y, X) on ``grid``; radar: named columns
    (P,) with xyz_m (P, 3); truth; found: name of a network -> its boxes."""

    token: str
    scene: str
    split: str
    description: str
    timestamp_us: int
    grid: BevGrid
    cameras: tuple[CameraView, ...]
    global_from_ego: Pose | None = None
    intensity: NDArray[np.float64] | None = None
    occupied: NDArray[np.bool_] | None = None
    radar: Mapping[str, NDArray[Any]] | None = None
    truth: Boxes | None = None
    found: Mapping[str, Boxes] = field(default_factory=dict)

    def with_found(self, **found: Boxes) -> SampleView:
        """The same sample with predicted boxes."""
        return replace(self, found={**self.found, **found})


def _cameras(cache: Cache, row: int) -> tuple[CameraView, ...]:
    if not {"images", "camera_calibration"} <= set(cache.fields) or cache.recipe.images_mode == "reference":
        return ()
    images, calibration = cache.decode("images", row), cache.decode("camera_calibration", row)
    depth = cache.decode("depth_points", row) if {"depth_points", "depth_count"} <= set(cache.fields) else None
    full_h, full_w = cache.suite.image_hw_px
    stamp = int(cache.index["timestamp_us"][cache.line(row)].as_py())
    declared = [c for c in cache.suite.cameras if c in cache.recipe.sensors]
    views = []
    for name, image in images.items():
        i = cache.suite.cameras.index(name)
        own_us = stamp - round(float(calibration["age_s"][i]) * 1e6)
        camera = Camera(
            name=name,
            image_from_camera=calibration["image_from_camera"][i],
            ego_from_camera=Pose.from_matrix34(EGO, sensor_at(name, own_us), calibration["ego_from_camera"][i]),
            width_px=full_w,
            height_px=full_h,
            timestamp_us=own_us,
        )
        h, w = image.shape[:2]
        points = None
        if depth is not None:
            at = declared.index(name) if len(depth) == len(declared) else i
            points = np.array(depth[at], dtype=np.float32)
            points[:, :2] = (points[:, :2] + 0.5) * np.array([w / full_w, h / full_h], dtype=np.float32) - 0.5
        views.append(CameraView(camera=camera.resized(w, h), image=image, depth=points))
    return tuple(views)


def read_view(cache: Cache, row: int) -> SampleView:
    """One row of a cache as a picture's content; parts that the cache does not hold are left out."""
    line = cache.line(row)
    intensity = occupied = None
    grid = cache.recipe.grid
    if {"lidar_bev_sum", "lidar_bev_count"} <= set(cache.fields):
        count = cache.read("lidar_bev_count", row).astype(np.float64)
        occupied = count > 0
        intensity = cache.read("lidar_bev_sum", row) / (np.maximum(count, 1) * cache.suite.reflectance_max)
    elif "lidar_intensity" in cache.fields:
        grid, planes = cache.recipe.view_grid, cache.decode("lidar_intensity", row)
        intensity, occupied = np.asarray(planes[0], dtype=np.float64), np.asarray(planes[2]) > 0
    return SampleView(
        token=cache.token(row),
        scene=str(cache.index["scene"][line].as_py()),
        split=str(cache.index["split"][line].as_py()),
        description=str(cache.index["description"][line].as_py() or ""),
        timestamp_us=int(cache.index["timestamp_us"][line].as_py()),
        grid=grid,
        cameras=_cameras(cache, row),
        global_from_ego=Pose.from_matrix34(GLOBAL, EGO, cache.index["global_from_ego"][line].as_py()),
        intensity=intensity,
        occupied=occupied,
        radar=cache.decode("radar_points", row) if "radar_points" in cache.fields else None,
        truth=cache.decode("boxes", row) if "boxes" in cache.fields else None,
    )


def is_synthetic(cache: Cache) -> bool:
    """Whether the scenes come from `imkd-data synth`, whose logs say so."""
    return any(str(place or "").startswith("synthetic") for place in set(cache.index["location"].to_pylist()))


def calibration_lines(view: SampleView) -> list[str]:
    """A line per camera: focal lengths and principal point in px of the shown image, place and heading in ego, age."""
    lines = (
        [f"{'camera':<18} {'fx':>7} {'fy':>7} {'cx':>7} {'cy':>7}   x, y, z in ego m      heading   taken"]
        if view.cameras
        else []
    )
    for one in view.cameras:
        k, pose = one.camera.image_from_camera, one.camera.ego_from_camera
        ahead = pose.vectors([0.0, 0.0, 1.0])
        place = ", ".join(f"{v:6.2f}" for v in pose.translation_m)
        late_ms = (one.camera.timestamp_us - view.timestamp_us) / 1e3
        heading = np.degrees(np.arctan2(ahead[1], ahead[0]))
        numbers = " ".join(f"{v:7.1f}" for v in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))
        lines.append(f"{one.camera.name:<18} {numbers}  {place}  {heading:6.1f} deg  {late_ms:+.0f} ms")
    return lines


def box_corners(boxes: Boxes) -> F64:
    """(M, 8, 3) corners in the boxes' frame."""
    c, s = np.cos(boxes.yaw_rad), np.sin(boxes.yaw_rad)
    local = _UNIT[None] * boxes.size_lwh_m[:, None, :]
    x = c[:, None] * local[..., 0] - s[:, None] * local[..., 1]
    y = s[:, None] * local[..., 0] + c[:, None] * local[..., 1]
    corners: F64 = np.stack([x, y, local[..., 2]], axis=-1) + boxes.centre_m[:, None, :]
    return corners


def box_lines(boxes: Boxes, camera: Camera, max_depth_m: float = 80.0) -> list[tuple[int, F64]]:
    """Boxes that a camera sees as (box index, (E, 2, 2) line ends u, v px), the nearest box last.

    Edges that pass the camera plane are cut 0.3 m in front of it. Boxes wholly outside the image are left out.
    """
    camera_from_ego = camera.ego_from_camera.inverse()
    corners = camera_from_ego.points(box_corners(boxes)) if len(boxes) else np.zeros((0, 8, 3))
    out: list[tuple[float, int, F64]] = []
    for m, xyz in enumerate(corners):
        a, b = xyz[_EDGES[:, 0]], xyz[_EDGES[:, 1]]
        ahead = (a[:, 2] > NEAR_M) | (b[:, 2] > NEAR_M)
        if not ahead.any() or xyz[:, 2].min() > max_depth_m:
            continue
        a, b = _cut(a[ahead], b[ahead]), _cut(b[ahead], a[ahead])
        lines = np.stack([camera.project(a)[0], camera.project(b)[0]], axis=1)
        low, high = lines.min((0, 1)), lines.max((0, 1))
        if (high >= 0).all() and low[0] < camera.width_px and low[1] < camera.height_px:
            out.append((float(xyz[:, 2].mean()), m, lines))
    return [(m, lines) for _, m, lines in sorted(out, key=lambda item: -item[0])]


def _cut(a: F64, b: F64) -> F64:
    """Ends ``a`` moved along to b up to the near plane where they lie behind it."""
    step = b[:, 2] - a[:, 2]
    share = np.where(a[:, 2] < NEAR_M, (NEAR_M - a[:, 2]) / np.where(step == 0, 1, step), 0)
    return np.asarray(a + share[:, None] * (b - a), dtype=np.float64)


def match_boxes(truth: Boxes, found: Boxes, reach_m: float = 2.0) -> NDArray[np.int64]:
    """(M,) for each truth box the index of the best-scored free detection of its class within reach, -1 = missed."""
    out = np.full(len(truth), -1, dtype=np.int64)
    for d in np.argsort(-found.score, kind="stable").tolist():
        same = (truth.label == found.label[d]) & (out < 0)
        if same.any():
            distance = np.linalg.norm(truth.centre_m[:, :2] - found.centre_m[d, :2], axis=1)
            nearest = int(np.argmin(np.where(same, distance, np.inf)))
            if distance[nearest] < reach_m:
                out[nearest] = d
    return out
