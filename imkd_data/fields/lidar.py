"""LiDAR fields: exact integer BEV planes, the trainer's view of them, where strongest returns came from, and the points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import InputDataError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.fields.codec import OnePayload, array_from_part, part_from_array, too_many
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, Points, SensorSuite

__all__ = ["LIDAR_FIELDS", "z_from_code"]

_PLANES = ("lidar_bev_sum", "lidar_bev_count", "lidar_bev_max", "lidar_bev_z_of_max")
_GRID_USES = ("grid", "lidar_sweeps", "own_car_box_m", "z_min_m", "z_span_m", "reference_channel")
Z_STEPS = 255
# What the counters of ``kernels.rasterize.add_sweep`` count, in order.
DROPPED = ("own_car", "outside_grid", "outside_z_span", "intensity_not_whole")


@dataclass(frozen=True, slots=True)
class _Planes:
    total: NDArray[np.uint32]
    count: NDArray[np.uint16]
    strongest: NDArray[np.uint8]
    z_code: NDArray[np.uint8]
    provenance: NDArray[np.uint8]
    dropped: dict[str, int]


def _mm(*values_m: float) -> NDArray[np.int64]:
    return np.array([round(v * 1000) for v in values_m], dtype=np.int64)


def _intensity(points: Points) -> NDArray[np.float32]:
    return points.column("intensity")


def _rasterise(payload: Payload, recipe: Recipe) -> _Planes:
    from imkd_data.kernels.rasterize import add_sweep, unpack_planes

    shape = recipe.grid.shape
    trace = "lidar_provenance" in recipe.fields
    cells = np.zeros(shape, dtype=np.uint64)
    provenance = np.zeros((3, *shape) if trace else (3, 0, 0), dtype=np.uint8)
    dropped = np.zeros(len(DROPPED), dtype=np.int64)
    grid_mm = np.array([recipe.grid.x_min_mm, recipe.grid.y_min_mm, recipe.grid.cell_mm])
    z_mm, own_car_mm = _mm(recipe.z_min_m, recipe.z_span_m), _mm(*recipe.own_car_box_m)
    for i, (sweep, points) in enumerate(zip(payload.sample.lidar, payload.lidar or (), strict=True)):
        xyz, intensity = np.ascontiguousarray(points.xyz_m.T), np.ascontiguousarray(_intensity(points))
        pose = sweep.ego_from_sensor
        add_sweep(
            *(xyz, intensity, pose.rotation, pose.translation_m, grid_mm, z_mm, own_car_mm, i, cells, provenance, dropped)
        )
    planes = _Planes(*unpack_planes(cells), provenance, {})
    if planes.count.size and int(planes.count.max()) == np.iinfo(np.uint16).max:
        raise too_many(
            *("a BEV cell holds more returns than it can count", "lidar.cell_overflow", 65_535, 65_534, payload),
            advice="use a smaller cell (--set grid.cell_m=...) or fewer sweeps",
            field="lidar_bev_count",
        )
    if dropped[3]:
        raise InputDataError(
            "LiDAR intensity is not whole numbers 0..255",
            rule="lidar.intensity",
            expected="a reader that gives intensities as 0..255",
            found=f"{int(dropped[3]):,} other values",
            token=payload.sample.token,
            scene=payload.sample.scene,
            field="lidar_bev_sum",
        )
    planes.dropped.update({k: int(v) for k, v in zip(DROPPED, dropped, strict=True) if v})
    return planes


_planes = OnePayload(_rasterise)


def _plane(name: str) -> Any:
    def compute(
        payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
    ) -> Stored:
        planes = _planes(payload, recipe)
        drops.update({k: drops.get(k, 0) + v for k, v in planes.dropped.items()})
        value: NDArray[Any] = getattr(planes, name)
        return value

    return compute


def _intensity_view(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    from imkd_data.kernels.rasterize import pool_view

    total, count, strongest, z_code = (np.ascontiguousarray(upstream[n]) for n in _PLANES)
    view: NDArray[np.uint8] = pool_view(total, count, strongest, z_code, recipe.view_cells)
    return view


def z_from_code(code: NDArray[Any], recipe: Recipe) -> NDArray[np.float32]:
    """Height code -> metres in ego, centre of the step."""
    return np.asarray(recipe.z_min_m + (code + 0.5) * (recipe.z_span_m / Z_STEPS), dtype=np.float32)


def _decode_view(value: NDArray[np.uint8], recipe: Recipe, suite: SensorSuite) -> NDArray[np.float32]:
    """(4, Y, X) f32: mean / 255, maximum / 255, count (saturated at 255), height of the maximum in metres (0 if empty)."""
    out = value.astype(np.float32)
    out[:2] /= np.float32(255)
    out[3] = np.where(value[2] > 0, z_from_code(value[3], recipe), np.float32(0))
    return out


def _decode_z(value: NDArray[np.uint8], recipe: Recipe, suite: SensorSuite) -> NDArray[np.float32]:
    """(Y, X) f32 metres; meaningless where the count is 0."""
    return z_from_code(value, recipe)


def _as_float(value: NDArray[Any], recipe: Recipe, suite: SensorSuite) -> NDArray[np.float32]:
    return value.astype(np.float32)


# ---- points -------------------------------------------------------------------------------------------------------------

_STEP_M = 0.01


def _points(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """Parts: xyz (3, N) i16 in 1 cm, state (3, N) u8 intensity, ring, sweep, pose (S, 13) f64 ego_from_lidar and age."""
    from imkd_data.kernels.quantise import quantise

    scans = payload.lidar or ()
    total = sum(map(len, scans))
    xyz, state = np.empty((3, total), dtype=np.int16), np.empty((3, total), dtype=np.uint8)
    index = np.empty(total, dtype=np.int32)
    pose = np.zeros((len(payload.sample.lidar), 13))
    start = 0
    for i, (sweep, points) in enumerate(zip(payload.sample.lidar, scans, strict=True)):
        move = sweep.ego_from_sensor
        n = quantise(points.xyz_m, move.rotation, move.translation_m, 1 / _STEP_M, xyz[:, start:], index)
        state[0, start : start + n] = _intensity(points)[index[:n]]
        state[1, start : start + n] = points.column("ring")[index[:n]] if "ring" in points.feature_names else 0
        state[2, start : start + n] = i
        pose[i] = (*move.matrix34(), (payload.sample.timestamp_us - sweep.timestamp_us) * 1e-6)
        start += n
    drops["out_of_range"] = drops.get("out_of_range", 0) + total - start
    return {
        "lidar_points_xyz.npy.zst": part_from_array(xyz[:, :start]),
        "lidar_points_state.npy.zst": part_from_array(state[:, :start]),
        "lidar_points_pose.npy.zst": part_from_array(pose),
    }


def _unpack_points(parts: Mapping[str, bytes], suite: SensorSuite) -> dict[str, NDArray[Any]]:
    state = array_from_part(parts["lidar_points_state.npy.zst"])
    return {
        "xyz": array_from_part(parts["lidar_points_xyz.npy.zst"]),
        "intensity": state[0],
        "ring": state[1],
        "sweep": state[2],
        "pose": array_from_part(parts["lidar_points_pose.npy.zst"]),
    }


def _decode_points(value: Mapping[str, NDArray[Any]], recipe: Recipe, suite: SensorSuite) -> dict[str, NDArray[Any]]:
    """xyz_m (N, 3) f32 in ego, intensity (N,) f32 raw 0..255, ring and sweep (N,) i64, age_s (N,) f32, pose (S, 13) f64
    (ego_from_lidar row major, age in s)."""
    sweep = value["sweep"].astype(np.int64)
    return {
        "xyz_m": np.ascontiguousarray(value["xyz"].T.astype(np.float32) * np.float32(_STEP_M)),
        "intensity": value["intensity"].astype(np.float32),
        "ring": value["ring"].astype(np.int64),
        "sweep": sweep,
        "age_s": value["pose"][sweep, 12].astype(np.float32),
        "pose": value["pose"],
    }


# ---- the list -----------------------------------------------------------------------------------------------------------


def _bev_attributes(units: str, extra: Mapping[str, Any] | None = None) -> Any:
    def attributes(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
        own: dict[str, Any] = {"frame": "ego", "units": units, "grid": recipe.grid.as_dict(), "empty": "count 0"}
        return own | dict(extra or {})

    return attributes


def _z_attributes(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
    scale = recipe.z_span_m / Z_STEPS
    return _bev_attributes("m", {"scale": scale, "offset": recipe.z_min_m + 0.5 * scale})(recipe, suite)  # type: ignore[no-any-return]


def _view_attributes(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
    scale = recipe.z_span_m / Z_STEPS
    return {
        "frame": "ego",
        "grid": recipe.view_grid.as_dict(),
        "columns": ["mean", "max", "count", "z_of_max"],
        "units": ["1/255", "1/255", "returns, saturated at 255", "m"],
        "scale": [1 / 255, 1 / 255, 1.0, scale],
        "offset": [0.0, 0.0, 0.0, recipe.z_min_m + 0.5 * scale],
        "empty": "count 0",
    }


def _bev(name: str, attribute: str, dtype: Any, **rest: Any) -> CacheField:
    return CacheField(
        name=name,
        version=1,
        kind="array",
        space="bev",
        uses=_GRID_USES,
        compute=_plane(attribute),
        needs=("lidar",),
        sensors=("lidar",),
        dtype=np.dtype(dtype),
        **rest,
    )


def _grid_shape(recipe: Recipe, suite: SensorSuite) -> tuple[int, ...]:
    return recipe.grid.shape


LIDAR_FIELDS: tuple[CacheField, ...] = (
    _bev("lidar_bev_sum", "total", "<u4", shape=_grid_shape, decode=_as_float, attributes=_bev_attributes("sum of 0..255")),
    _bev("lidar_bev_count", "count", "<u2", shape=_grid_shape, decode=_as_float, attributes=_bev_attributes("returns")),
    _bev("lidar_bev_max", "strongest", "u1", shape=_grid_shape, decode=_as_float, attributes=_bev_attributes("0..255")),
    _bev("lidar_bev_z_of_max", "z_code", "u1", shape=_grid_shape, decode=_decode_z, attributes=_z_attributes),
    CacheField(
        name="lidar_intensity",
        version=1,
        kind="array",
        space="bev",
        uses=("grid", "view_cells"),
        compute=_intensity_view,
        sensors=("lidar",),
        upstream=_PLANES,
        dtype=np.dtype("u1"),
        shape=lambda recipe, suite: (4, *recipe.view_grid.shape),
        decode=_decode_view,
        attributes=_view_attributes,
    ),
    _bev(
        "lidar_provenance",
        "provenance",
        "u1",
        shape=lambda recipe, suite: (3, *recipe.grid.shape),
        attributes=_bev_attributes(
            "1/256 cell, 1/256 cell, sweep number",
            {"columns": ["x_in_cell", "y_in_cell", "sweep"], "of": "the strongest return"},
        ),
    ),
    CacheField(
        name="lidar_points",
        version=1,
        kind="blob",
        space="none",
        uses=("lidar_sweeps", "reference_channel"),
        compute=_points,
        needs=("lidar",),
        sensors=("lidar",),
        codec="none",
        unpack=_unpack_points,
        decode=_decode_points,
        attributes=lambda recipe, suite: {
            "frame": "ego",
            "units": {"xyz": "m", "intensity": "0..255", "age": "s"},
            "scale": {"xyz": _STEP_M},
            "columns": {
                "lidar_points_xyz": ["x", "y", "z"],
                "lidar_points_state": ["intensity", "ring", "sweep"],
                "lidar_points_pose": ["ego_from_lidar 3x4 row major", "age_s"],
            },
            "order": "key sweep first, then newest first; inside a sweep as in its file",
        },
    ),
)
