"""Radar fields: all points of all sweeps, unfiltered, in ego, and where each sensor was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import UsageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.fields.codec import array_from_part, part_from_array
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, SensorSuite

__all__ = ["RADAR_FIELDS", "RADAR_FILTERS", "radar_filter_mask", "radar_rows", "radar_steps"]

_FIRST = ("x", "y", "z", "vx", "vy", "vx_comp", "vy_comp", "rcs")
_PAIRS = (("vx", "vy"), ("vx_comp", "vy_comp"))
_STEP = {"x": 0.01, "y": 0.01, "z": 0.01, "rcs": 0.5} | {c: 1 / 256 for pair in _PAIRS for c in pair}
_ADDED = ("sensor", "sweep", "age")
PART = "radar_points.npy.zst"

# Filters at load time by name: column -> values that are kept. A data set without the column has nothing to filter by it.
RADAR_FILTERS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "none": {},
    "devkit": {"invalid_state": (0,), "dyn_prop": (0, 1, 2, 3, 4, 5, 6), "ambig_state": (3,)},
    "crn": {"invalid_state": (0, 4, 8, 9, 10, 11, 12, 15, 16, 17), "ambig_state": (3,)},
}


def radar_rows(suite: SensorSuite) -> tuple[str, ...]:
    """Names of the rows of ``radar_points``: geometry and rcs, the other raw columns in file order, sensor, sweep, age."""
    first = tuple(c for c in _FIRST if c in suite.radar_columns)
    return (*first, *(c for c in suite.radar_columns if c not in first), *_ADDED)


def radar_steps(suite: SensorSuite) -> NDArray[np.float64]:
    """(rows,) physical size of one stored step: metres, m/s, dB, raw states 1, age in seconds."""
    known = {**_STEP, "age": 0.001, **suite.radar_steps}
    return np.array([known.get(c, 1.0) for c in radar_rows(suite)])


def radar_filter_mask(columns: Mapping[str, NDArray[Any]], name: str) -> NDArray[np.bool_]:
    """(P,) true for points that the named filter keeps. A pure function of the columns: no global switch.

    Raises UsageError for an unknown name.
    """
    if name not in RADAR_FILTERS:
        raise UsageError("unknown radar filter", rule="radar.filter", expected=", ".join(RADAR_FILTERS), found=name)
    keep = np.ones(len(next(iter(columns.values()))), dtype=bool)
    for column, values in RADAR_FILTERS[name].items():
        if column in columns:
            keep &= np.isin(columns[column], values)
    return keep


def _physical(payload: Payload, suite: SensorSuite) -> NDArray[np.float64]:
    """(rows, P): positions and full velocity vectors rotated into ego, everything else raw."""
    rows = radar_rows(suite)
    raw = [c for c in rows if c not in _ADDED]
    at = {c: i for i, c in enumerate(rows)}
    blocks = [np.zeros((len(rows), 0))]
    for channel, scans in (payload.radar or {}).items():
        for k, (sweep, points) in enumerate(zip(payload.sample.radar[channel], scans, strict=True)):
            block = np.empty((len(rows), len(points)))
            columns = [points.feature_names.index(c) for c in raw]
            block[: len(raw)] = points.features[:, columns].T
            r, t = sweep.ego_from_sensor.rotation, sweep.ego_from_sensor.translation_m
            x, y, z = points.xyz_m.T.astype(np.float64)
            for i, c in enumerate("xyz"):
                block[at[c]] = r[i, 0] * x + r[i, 1] * y + r[i, 2] * z + t[i]
            for cx, cy in _PAIRS:
                if cx in at and cy in at:
                    vx, vy = block[at[cx]].copy(), block[at[cy]].copy()
                    block[at[cx]], block[at[cy]] = r[0, 0] * vx + r[0, 1] * vy, r[1, 0] * vx + r[1, 1] * vy
            block[at["sensor"]], block[at["sweep"]] = suite.radars.index(channel), k
            block[at["age"]] = (payload.sample.timestamp_us - sweep.timestamp_us) * 1e-6
            blocks.append(block)
    return np.concatenate(blocks, axis=1)


def _compute_points(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """One part: (rows, P) i16, order sensor, sweep, place in the file."""
    steps = np.floor(_physical(payload, suite) / radar_steps(suite)[:, None] + 0.5)
    fits = (np.abs(steps) <= 32767).all(axis=0)
    drops["out_of_range"] = drops.get("out_of_range", 0) + int(len(fits) - fits.sum())
    return {PART: part_from_array(steps[:, fits].astype(np.int16))}


def _unpack(parts: Mapping[str, bytes], suite: SensorSuite) -> NDArray[np.int16]:
    return array_from_part(parts[PART])


def _decode(value: NDArray[np.int16], recipe: Recipe, suite: SensorSuite) -> dict[str, NDArray[Any]]:
    """Every row by name, (P,) f32 in m, m/s, dB or raw (``age`` in seconds; sensor and sweep i64), and xyz_m (P, 3) f32."""
    physical = value * radar_steps(suite)[:, None]
    out: dict[str, NDArray[Any]] = {c: physical[i].astype(np.float32) for i, c in enumerate(radar_rows(suite))}
    out["sensor"], out["sweep"] = (out[c].astype(np.int64) for c in ("sensor", "sweep"))
    out["xyz_m"] = np.stack([out["x"], out["y"], out["z"]], axis=1)
    return out


def _compute_pose(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """(radars, sweeps, 13): ego_from_radar row major, age in s; NaN where there is no sweep or no such radar."""
    out = np.full((len(suite.radars), recipe.radar_sweeps, 13), np.nan)
    for channel, sweeps in payload.sample.radar.items():
        for k, sweep in enumerate(sweeps):
            age_s = (payload.sample.timestamp_us - sweep.timestamp_us) * 1e-6
            out[suite.radars.index(channel), k] = (*sweep.ego_from_sensor.matrix34(), age_s)
    return out


RADAR_FIELDS: tuple[CacheField, ...] = (
    CacheField(
        name="radar_points",
        version=1,
        kind="blob",
        space="none",
        uses=("radar_sweeps", "reference_channel"),
        compute=_compute_points,
        needs=("radar",),
        sensors=("radar",),
        codec="none",
        unpack=_unpack,
        decode=_decode,
        attributes=lambda recipe, suite: {
            "frame": "ego",
            "columns": list(radar_rows(suite)),
            "scale": radar_steps(suite).tolist(),
            "units": "m, m/s, dBsm, raw states, s",
            "radars": list(suite.radars),
            "order": "sensor, sweep (newest first), place in the file",
            "velocity": "full vector rotated to ego axes; positions are not moved by v dt",
        },
    ),
    CacheField(
        name="radar_pose",
        version=1,
        kind="array",
        space="none",
        uses=("radar_sweeps", "reference_channel"),
        compute=_compute_pose,
        needs=("radar",),
        sensors=("radar",),
        dtype=np.dtype("<f8"),
        shape=lambda recipe, suite: (len(suite.radars), recipe.radar_sweeps, 13),
        attributes=lambda recipe, suite: {
            "frame": "ego",
            "columns": ["ego_from_radar 3x4 row major", "age_s"],
            "units": "m, s",
            "radars": list(suite.radars),
            "missing": "NaN",
        },
    ),
)
