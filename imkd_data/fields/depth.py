"""LiDAR points in the camera images: position, depth and intensity of the key scan at each camera's own time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import InputDataError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.fields.codec import OnePayload, too_many
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, SensorSuite

__all__ = ["DEPTH_FIELDS", "decode_depth"]

# The codes that ``kernels.project`` writes. Kernels are imported where they compute: loader workers start without numba.
UV_STEPS_PER_PX = 32
DEPTH_STEPS_PER_M = 256
MAX_SIDE_PX = (1 << 16) // UV_STEPS_PER_PX  # of an image: u and v are stored in 16 bits
_MAX_POINTS = (1 << 16) - 1  # of a camera: so are the counts


@dataclass(frozen=True, slots=True)
class _Views:
    """Points of the sample's cameras: (V, 3, W) u, v, depth; (V, W) intensity; (V,) how many. Of all cameras together: how many
    lay beyond the codes, and found no slot. ``widest``: the most points inside an image, and whose."""

    points: NDArray[np.uint16]
    intensity: NDArray[np.uint8]
    count: NDArray[np.uint16]
    far: int
    overflow: int
    widest: tuple[int, str]


def _check_size(height_px: int, width_px: int, **where: Any) -> None:
    """Codes of a larger image would wrap around, and say another place."""
    if max(height_px, width_px) > MAX_SIDE_PX:
        raise InputDataError(
            "camera image is too large for the depth fields",
            rule="depth.image_size",
            expected=f"at most {MAX_SIDE_PX:,} px a side",
            found=f"{width_px} x {height_px}",
            field="depth_points, depth_intensity, depth_count",
            next="leave the depth fields out (--fields without them)",
            **where,
        )


def _project_all(payload: Payload, recipe: Recipe) -> _Views:
    """Every point with depth > 0 inside the image, own car included, sorted by ring, then column (order in the file)."""
    from imkd_data.kernels.project import order_by_ring, project

    if not payload.lidar:
        raise ValueError("depth fields need the LiDAR key scan in the payload")
    points, sweep = payload.lidar[0], payload.sample.lidar[0]
    ring = points.column("ring") if "ring" in points.feature_names else np.zeros(len(points), dtype=np.float32)
    order = order_by_ring(np.ascontiguousarray(ring), int(ring.max()) + 1 if len(ring) else 1)
    table = np.empty((len(payload.sample.cameras), 20))
    for row, frame in zip(table, payload.sample.cameras, strict=True):
        camera = frame.camera
        where = {"file": frame.path, "token": payload.sample.token, "scene": payload.sample.scene, "channel": camera.name}
        _check_size(camera.height_px, camera.width_px, **where)
        row[:12] = (camera.ego_from_camera.inverse() @ sweep.ego_from_sensor).matrix34()
        row[12:18], row[18:] = camera.image_from_camera[:2].reshape(6), (camera.width_px, camera.height_px)
    given = np.ascontiguousarray(points.xyz_m.T), np.ascontiguousarray(points.column("intensity")), order, table
    cut = recipe.options.get("on_overflow", "stop") == "drop-far"

    def project_to(width: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.int64]]:
        out = np.zeros((len(table), 3, width), dtype=np.uint16), np.zeros((len(table), width), dtype=np.uint8)
        return (*out, project(*given, *out))

    uvd, intensity, found = project_to(recipe.depth_width)
    inside = found[:, 0]
    most = int(inside.argmax()) if len(inside) else 0
    widest = (int(inside[most]), payload.sample.cameras[most].camera.name) if len(inside) else (0, "")
    if cut and widest[0] > recipe.depth_width:
        every, values, _ = project_to(widest[0])
        for view in np.flatnonzero(inside > recipe.depth_width):
            n = inside[view]
            keep = np.sort(np.argsort(every[view, 2, :n], kind="stable")[: recipe.depth_width])
            uvd[view], intensity[view] = every[view][:, keep], values[view, keep]
    count = np.minimum(inside, recipe.depth_width)
    return _Views(uvd, intensity, count.astype(np.uint16), int(found[:, 1].sum()), int((inside - count).sum()), widest)


_views = OnePayload(_project_all)


def _fitted(payload: Payload, recipe: Recipe, drops: dict[str, int]) -> _Views:
    """The views cut to the stored width: an error, or with on_overflow = drop-far without the farthest points."""
    views = _views(payload, recipe)
    drops["beyond_range"] = drops.get("beyond_range", 0) + views.far
    if views.overflow:
        width, (n, name) = recipe.depth_width, views.widest
        if recipe.options.get("on_overflow", "stop") != "drop-far":
            raise too_many(
                *(f"more LiDAR points in {name} than depth_width", "depth.overflow", n, width, payload),
                advice=_overflow_advice(n),
                field="depth_points",
            )
        drops["overflow"] = drops.get("overflow", 0) + views.overflow
    return views


def _overflow_advice(points: int) -> str:
    width = min(-(-points // 1024) * 1024, _MAX_POINTS)
    drop = "--on-overflow drop-far"
    return f"--set depth_width={width} (rebuilds the depth fields), or {drop}" if points <= width else drop


def _in_suite_order(value: NDArray[Any], payload: Payload, suite: SensorSuite) -> NDArray[Any]:
    """Rows of the declared cameras at their places among all cameras of the suite."""
    names = tuple(f.camera.name for f in payload.sample.cameras)
    if names == suite.cameras:
        return value
    out = np.zeros((len(suite.cameras), *value.shape[1:]), dtype=value.dtype)
    out[[suite.cameras.index(n) for n in names]] = value
    return out


def _compute(what: str) -> Any:
    def compute(
        payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
    ) -> Stored:
        return _in_suite_order(getattr(_fitted(payload, recipe, drops), what), payload, suite)

    return compute


def decode_depth(points: NDArray[np.uint16], count: NDArray[np.uint16]) -> list[NDArray[np.float32]]:
    """Stored (V, 3, W) and (V,) -> per camera (n, 3) f32: u, v in pixels of the full image, depth in metres (bin centres)."""
    return [_decode_uvd(points[v, :, : int(n)]) for v, n in enumerate(count)]


def _decode_uvd(uvd: NDArray[np.uint16]) -> NDArray[np.float32]:
    # Codes have 16 bits and steps are powers of two: float32 is exact here.
    out = uvd.astype(np.float32)
    out += np.float32(0.5)
    out *= _STEP
    out[:2] -= np.float32(0.5)
    return np.ascontiguousarray(out.T)


_STEP = np.array([[1 / UV_STEPS_PER_PX], [1 / UV_STEPS_PER_PX], [1 / DEPTH_STEPS_PER_M]], dtype=np.float32)


def _decode_all(value: NDArray[np.uint16], recipe: Recipe, suite: SensorSuite) -> list[NDArray[np.float32]]:
    """All slots; only the first ``depth_count`` of a camera mean something (``Cache.decode`` cuts them)."""
    return [_decode_uvd(camera) for camera in value]


def _field(name: str, compute: Any, dtype: str, shape: Any, **rest: Any) -> CacheField:
    return CacheField(
        name=name,
        version=1,
        kind="array",
        space="image",
        uses=("depth_width", "reference_channel"),
        compute=compute,
        needs=("lidar_key", "cameras"),
        sensors=("lidar", "camera"),
        dtype=np.dtype(dtype),
        shape=shape,
        **rest,
    )


def _attributes(units: Any, columns: Any = None) -> Any:
    def attributes(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
        # A build asks for these before it touches the cache: the earliest place that knows both field and cameras. A cache
        # that was built before still opens, as that asks for shapes alone.
        _check_size(*suite.image_hw_px)
        out: dict[str, Any] = {"frame": "image, full size", "units": units, "cameras": list(suite.cameras)}
        if columns:
            steps = [1 / UV_STEPS_PER_PX, 1 / UV_STEPS_PER_PX, 1 / DEPTH_STEPS_PER_M]
            offset = [0.5 / UV_STEPS_PER_PX - 0.5] * 2 + [0.5 / DEPTH_STEPS_PER_M]
            out |= {"columns": columns, "scale": steps, "offset": offset, "order": "ring, then place in the file"}
        if units != "points":
            out["count_field"] = "depth_count"
        return out

    return attributes


DEPTH_FIELDS: tuple[CacheField, ...] = (
    _field(
        *("depth_points", _compute("points"), "<u2", lambda recipe, suite: (len(suite.cameras), 3, recipe.depth_width)),
        codec="blosc3",
        decode=_decode_all,
        attributes=_attributes(["px", "px", "m"], ["u", "v", "depth"]),
    ),
    _field(
        *("depth_intensity", _compute("intensity"), "u1", lambda recipe, suite: (len(suite.cameras), recipe.depth_width)),
        decode=lambda value, recipe, suite: value.astype(np.float32),
        attributes=_attributes("0..255"),
    ),
    _field(
        "depth_count", _compute("count"), "<u2", lambda recipe, suite: (len(suite.cameras),), attributes=_attributes("points")
    ),
)
