"""LiDAR points in the camera images: position, depth and intensity of the key scan at each camera's own time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.fields.base import CacheField, Stored
from imkd_data.fields.codec import OnePayload, too_many
from imkd_data.kernels.project import DEPTH_STEPS_PER_M, UV_STEPS_PER_PX, order_by_ring, project
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, SensorSuite

__all__ = ["DEPTH_FIELDS", "decode_depth"]

# One camera's points: (3, n) u16 u, v, depth; (n,) intensity; how many lay beyond the codes.
_View = tuple[NDArray[np.uint16], NDArray[np.uint8], int]


def _project_all(payload: Payload, recipe: Recipe) -> dict[str, _View]:
    """Every point with depth > 0 inside the image, own car included, sorted by ring, then column (order in the file)."""
    if not payload.lidar:
        raise ValueError("depth fields need the LiDAR key scan in the payload")
    points, sweep = payload.lidar[0], payload.sample.lidar[0]
    ring = points.column("ring") if "ring" in points.feature_names else np.zeros(len(points), dtype=np.float32)
    order = order_by_ring(ring, int(ring.max()) + 1 if len(ring) else 1)
    scratch, index = np.empty((3, len(points)), dtype=np.uint16), np.empty(len(points), dtype=np.int32)
    intensity = points.column("intensity")
    out: dict[str, _View] = {}
    for frame in payload.sample.cameras:
        camera = frame.camera
        pose = camera.ego_from_camera.inverse() @ sweep.ego_from_sensor
        n, far = project(
            points.xyz_m,
            order,
            pose.rotation,
            pose.translation_m,
            camera.image_from_camera,
            camera.width_px,
            camera.height_px,
            scratch,
            index,
        )
        out[camera.name] = (scratch[:, :n].copy(), intensity[index[:n]].astype(np.uint8), far)
    return out


_views = OnePayload(_project_all)


def _fitted(payload: Payload, recipe: Recipe, suite: SensorSuite, drops: dict[str, int]) -> dict[str, _View]:
    """The views cut to the stored width: an error, or with on_overflow = drop-far without the farthest points."""
    width = recipe.depth_width
    out: dict[str, _View] = {}
    for name, (uvd, intensity, far) in _views(payload, recipe).items():
        drops["beyond_range"] = drops.get("beyond_range", 0) + far
        n = uvd.shape[1]
        if n > width:
            if recipe.options.get("on_overflow", "stop") != "drop-far":
                raise too_many(
                    *(f"more LiDAR points in {name} than depth_width", "depth.overflow", n, width, payload),
                    advice=f"--set depth_width={-(-n // 1024) * 1024} (rebuilds the depth fields), or --on-overflow drop-far",
                    field="depth_points",
                )
            keep = np.sort(np.argsort(uvd[2], kind="stable")[:width])
            uvd, intensity = uvd[:, keep], intensity[keep]
            drops["overflow"] = drops.get("overflow", 0) + n - width
        out[name] = (uvd, intensity, far)
    return out


def _compute_points(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    out = np.zeros((len(suite.cameras), 3, recipe.depth_width), dtype=np.uint16)
    for name, (uvd, _, _) in _fitted(payload, recipe, suite, drops).items():
        out[suite.cameras.index(name), :, : uvd.shape[1]] = uvd
    return out


def _compute_intensity(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    out = np.zeros((len(suite.cameras), recipe.depth_width), dtype=np.uint8)
    for name, (_, intensity, _) in _fitted(payload, recipe, suite, drops).items():
        out[suite.cameras.index(name), : len(intensity)] = intensity
    return out


def _compute_count(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    out = np.zeros(len(suite.cameras), dtype=np.uint16)
    for name, (uvd, _, _) in _fitted(payload, recipe, suite, drops).items():
        out[suite.cameras.index(name)] = uvd.shape[1]
    return out


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
        *("depth_points", _compute_points, "<u2", lambda recipe, suite: (len(suite.cameras), 3, recipe.depth_width)),
        codec="blosc3",
        decode=_decode_all,
        attributes=_attributes(["px", "px", "m"], ["u", "v", "depth"]),
    ),
    _field(
        *("depth_intensity", _compute_intensity, "u1", lambda recipe, suite: (len(suite.cameras), recipe.depth_width)),
        decode=lambda value, recipe, suite: value.astype(np.float32),
        attributes=_attributes("0..255"),
    ),
    _field("depth_count", _compute_count, "<u2", lambda recipe, suite: (len(suite.cameras),), attributes=_attributes("points")),
)
