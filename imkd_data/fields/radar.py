"""Radar fields: all points of all sweeps, unfiltered, in ego, and where each sensor was."""

from __future__ import annotations

import functools
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


@functools.cache
def _roles(rows: tuple[str, ...], names: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How ``radar_codes`` makes each row, and from which feature column."""
    role, column = [], []
    pairs = {c: 3 + i for pair in _PAIRS if set(pair) <= set(rows) for i, c in enumerate(pair)}
    for name in rows:
        role.append("xyz".index(name) if name in ("x", "y", "z") else 6 if name in _ADDED else pairs.get(name, 5))
        column.append(_ADDED.index(name) if name in _ADDED else names.index(name) if name in names else -1)
    return np.array(role, dtype=np.int64), np.array(column, dtype=np.int64)


def _compute_points(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """One part: (rows, P) i16, order sensor, sweep, place in the file. Positions and full velocity vectors are moved into ego,
    everything else stays raw."""
    from imkd_data.kernels.radar import radar_codes

    rows, scans, moves, extra = radar_rows(suite), [], [], []
    for channel, points in (payload.radar or {}).items():
        for k, (sweep, scan) in enumerate(zip(payload.sample.radar[channel], points, strict=True)):
            scans.append(scan)
            moves.append(sweep.ego_from_sensor.matrix34())
            extra.append((suite.radars.index(channel), k, (payload.sample.timestamp_us - sweep.timestamp_us) * 1e-6))
    starts = np.concatenate([[0], np.cumsum([len(s) for s in scans], dtype=np.int64)])
    codes = np.empty((len(rows), int(starts[-1])), dtype=np.int16)
    kept = 0
    if scans:
        if len({s.feature_names for s in scans}) > 1:
            raise ValueError("radar scans of one sample have different columns")
        role, column = _roles(rows, scans[0].feature_names)
        kept = radar_codes(
            np.concatenate([s.xyz_m for s in scans]),
            np.concatenate([s.features for s in scans]),
            starts,
            np.array(moves),
            np.array(extra, dtype=np.float64),
            column,
            role,
            radar_steps(suite),
            codes,
        )
    drops["out_of_range"] = drops.get("out_of_range", 0) + codes.shape[1] - kept
    return {PART: part_from_array(codes[:, :kept])}


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
            row = out[suite.radars.index(channel), k]
            row[:12], row[12] = sweep.ego_from_sensor.matrix34(), age_s
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
