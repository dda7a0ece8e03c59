"""How things move: speed profiles and sampled tracks that are read at any instant by linear interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import F64
from imkd_data.world.road import Road

RATE_HZ = 100.0
LEAD_S = 0.4  # tracks begin this long before the first key time, and end this long after the last


def time_grid(duration_s: float) -> F64:
    """Sample times of all tracks, seconds from the first key time."""
    return np.arange(-LEAD_S, duration_s + LEAD_S + 1.0 / RATE_HZ, 1.0 / RATE_HZ)


def make_speed(rng: np.random.Generator, grid_s: F64, kind: str, cruise_mps: float) -> F64:
    """Speed over time, never negative: ``cruise`` (waving), ``stop`` (brake, wait, drive on), ``start`` (from rest)."""
    wave = 1.0 + 0.12 * np.sin(2 * np.pi * grid_s / rng.uniform(5.0, 11.0) + rng.uniform(0, 2 * np.pi))
    first, wait = float(rng.uniform(1.0, 4.0)), float(rng.uniform(2.0, 4.0))
    brake, drive = float(rng.uniform(2.0, 3.2)), float(rng.uniform(1.4, 2.4))
    if kind == "cruise":
        return np.asarray(cruise_mps * wave)
    if kind == "start":
        return np.asarray(np.clip((grid_s - first) * drive, 0.0, cruise_mps) * wave)
    halt = first + cruise_mps / brake
    down, up = cruise_mps - (grid_s - first) * brake, (grid_s - halt - wait) * drive
    return np.where(grid_s < halt + wait, np.clip(down, 0.0, cruise_mps), np.clip(up, 0.0, cruise_mps))


def distance_from_speed(grid_s: F64, speed_mps: F64) -> F64:
    """Distance driven since t = 0 (negative before)."""
    path = np.concatenate([[0.0], np.cumsum(0.5 * (speed_mps[1:] + speed_mps[:-1]) * np.diff(grid_s))])
    return np.asarray(path - np.interp(0.0, grid_s, path))


def drive(road: Road, grid_s: F64, s_m: F64, d_m: F64, direction: int) -> F64:
    """(T, 3) x, y, heading of something that follows the road (+1) or drives against s (-1); lane changes turn it."""
    x, y, heading = road.pose(s_m, d_m)
    ds, dd = np.gradient(s_m, grid_s), np.gradient(d_m, grid_s)
    slip = np.where(np.abs(ds) > 0.3, np.arctan2(dd * direction, np.maximum(np.abs(ds), 0.3)), 0.0)
    turned = heading + slip + (0.0 if direction > 0 else np.pi)
    return np.stack([x, y, turned], axis=1)


def stand(road: Road, grid_s: F64, s_m: float, d_m: float, yaw_rad: float) -> F64:
    """(T, 3) track of something that stands; ``yaw_rad`` is relative to the road."""
    x, y, heading = road.pose(np.asarray(s_m), np.asarray(d_m))
    return np.broadcast_to(np.array([float(x), float(y), float(heading) + yaw_rad]), (len(grid_s), 3))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tracks:
    """(A, T, 3) x, y, yaw (unwrapped) of A movers on one time grid, global frame."""

    xy_yaw: NDArray[np.float64]
    start_s: float

    def at(self, t_s: float) -> tuple[F64, F64]:
        """State (A, 3) and its rate of change (A, 3) per second at one instant."""
        u = (t_s - self.start_s) * RATE_HZ
        k = min(max(int(np.floor(u)), 0), self.xy_yaw.shape[1] - 2)
        a, b = self.xy_yaw[:, k], self.xy_yaw[:, k + 1]
        return a + (u - k) * (b - a), (b - a) * RATE_HZ


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EgoTrack:
    """The ego on its time grid: (T, 5) x, y, yaw, pitch, roll; the frame's origin is on the ground (z = 0)."""

    grid_s: F64
    state: F64

    def poses(self, t_s: F64) -> tuple[F64, F64]:
        """Times (N,) -> rotations (N, 3, 3) and translations (N, 3), ``global_from_ego``."""
        t = np.atleast_1d(np.asarray(t_s, dtype=np.float64))
        x, y, yaw, pitch, roll = (np.interp(t, self.grid_s, self.state[:, k]) for k in range(5))
        cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
        rotation = np.stack(
            [
                np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr], axis=-1),
                np.stack([sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr], axis=-1),
                np.stack([-sp, cp * sr, cp * cr], axis=-1),
            ],
            axis=-2,
        )
        return rotation, np.stack([x, y, np.zeros_like(x)], axis=-1)

    def speed(self, t_s: float) -> F64:
        """(2,) velocity in the global frame, m/s."""
        _, at = self.poses(np.array([t_s - 0.01, t_s + 0.01]))
        return (at[1, :2] - at[0, :2]) / 0.02


def make_ego(road: Road, rng: np.random.Generator, grid_s: F64, s_m: F64) -> EgoTrack:
    """The ego on the road's inner right lane, weaving a little, with small pitch and roll."""
    d = -1.75 + 0.12 * np.sin(s_m / rng.uniform(9.0, 15.0) + rng.uniform(0, 6))
    track = drive(road, grid_s, s_m, d, 1)
    speed = np.gradient(s_m, grid_s)
    acceleration = np.gradient(np.convolve(np.pad(speed, 25, mode="edge"), np.ones(51) / 51, mode="valid"), grid_s)
    bounce = np.sin(grid_s * 2 * np.pi * 1.3 + rng.uniform(0, 6)) * np.clip(speed / 10.0, 0, 1)
    pitch = np.radians(0.15 + 0.1 * bounce) - 0.0035 * acceleration
    roll = np.radians(0.25) * np.sin(grid_s * 2 * np.pi * 0.31 + rng.uniform(0, 6)) * np.clip(speed / 5.0, 0, 1)
    return EgoTrack(grid_s=grid_s, state=np.column_stack([track, pitch, roll]))
