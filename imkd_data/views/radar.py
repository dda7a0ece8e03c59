"""Cached radar points for views: chosen sweeps and states, exact ages, full velocity vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.fields.radar import radar_filter_mask

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["RadarCloud", "radar_cloud"]

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RadarCloud:
    """Points of all radars in ego, order sensor, sweep, file. xyz_m (P, 3); comp_mps, raw_mps (P, 3) full vectors in ego;
    age_s (P,) exact; columns: every stored column by name."""

    xyz_m: F64
    comp_mps: F64
    raw_mps: F64
    age_s: F64
    sensor: NDArray[np.int64]
    sweep: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]


def radar_cloud(cache: Cache, row: int, *, sweeps: int, keep: str = "none") -> RadarCloud:
    """The newest ``sweeps`` scans of every radar that pass the named filter.

    The cache stores velocities as the x and y of a vector that had no z in the radar's frame; with the radar's pose the z in
    ego follows from them, so that turning it into a third frame loses nothing.
    """
    columns = cache.decode("radar_points", row)
    pose = cache.read("radar_pose", row)
    mask = (columns["sweep"] < sweeps) & radar_filter_mask(columns, keep)
    columns = {name: values[mask] for name, values in columns.items()}
    sensor, sweep = columns["sensor"], columns["sweep"]
    matrices = pose[sensor, sweep, :12].reshape(-1, 3, 4)[:, :, :3]

    def vectors(x: str, y: str) -> F64:
        if x not in columns or y not in columns:
            return np.zeros((len(sensor), 3))
        flat = np.stack([columns[x], columns[y]], axis=1).astype(np.float64)
        own = np.linalg.solve(matrices[:, :2, :2], flat[..., None]) if len(flat) else flat[..., None]
        z = (matrices[:, 2:3, :2] @ own)[:, 0, 0]
        return np.column_stack([flat, z])

    return RadarCloud(
        xyz_m=columns["xyz_m"].astype(np.float64),
        comp_mps=vectors("vx_comp", "vy_comp"),
        raw_mps=vectors("vx", "vy"),
        age_s=pose[sensor, sweep, 12],
        sensor=sensor,
        sweep=sweep,
        columns=columns,
    )
