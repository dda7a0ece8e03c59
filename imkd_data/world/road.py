"""The road: a smooth centre line with a crossing, path coordinates (s along, d to the left), and a raster of the ground."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import F64

LANE_M, EDGE_M, PAVEMENT_M = 3.5, 9.4, 13.0  # lane width; |d| of the kerb and of the pavement's outer edge
RUN_UP_M, RUN_OUT_M = 170.0, 190.0  # road behind the ego's start and beyond its end
CROSS_HALF_M, CROSS_LENGTH_M = 5.25, 90.0
CELL_M = 0.1  # ground raster; also the resolution of nuScenes map masks
_STEP_M = 0.05

# Ground materials; the raster holds these numbers.
GRASS, ASPHALT, MARKING, PAVEMENT, CONCRETE, KERB = range(6)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """Raster of ground materials: cells (ny, nx) uint8, row = y, cell (0, 0) at the global origin, ``CELL_M`` cells."""

    cells: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Road:
    """Centre line samples every 5 cm from s = ``s_min_m``; all in the global frame, metres and radians."""

    s_min_m: float
    length_m: float
    xy_m: F64
    heading_rad: F64
    cross_s_m: float

    def pose(self, s_m: F64, d_m: F64) -> tuple[F64, F64, F64]:
        """Path coordinates (any equal shapes) -> global x, y and the road's heading there."""
        u = (np.asarray(s_m, dtype=np.float64) - self.s_min_m) / _STEP_M
        at = np.arange(len(self.heading_rad))
        x, y = np.interp(u, at, self.xy_m[:, 0]), np.interp(u, at, self.xy_m[:, 1])
        heading = np.interp(u, at, self.heading_rad)
        past = (u - np.clip(u, 0.0, at[-1])) * _STEP_M  # straight on beyond both ends
        return x + np.cos(heading) * past - np.sin(heading) * d_m, y + np.sin(heading) * past + np.cos(heading) * d_m, heading


def make_road(rng: np.random.Generator, run_m: float) -> Road:
    """A road for an ego that drives ``run_m``: straights and bends of 55 to 90 m radius that alternate in sign."""
    length = RUN_UP_M + run_m + RUN_OUT_M
    count = int(length / _STEP_M) + 1
    curvature = np.zeros(count)
    s, sign = float(rng.uniform(0.0, 60.0)), float(rng.choice((-1.0, 1.0)))
    while s < length:
        s += float(rng.uniform(30.0, 90.0))
        radius, angle = float(rng.uniform(55.0, 90.0)), float(np.radians(rng.uniform(15.0, 75.0)))
        first, last = int(s / _STEP_M), int((s + radius * angle) / _STEP_M)
        curvature[first:last] = sign / radius
        s, sign = s + radius * angle, -sign
    window = np.hanning(int(24.0 / _STEP_M) | 1)
    curvature = np.convolve(np.pad(curvature, len(window) // 2, mode="edge"), window / window.sum(), mode="valid")
    heading = float(rng.uniform(-np.pi, np.pi)) + np.concatenate([[0.0], np.cumsum(curvature[:-1])]) * _STEP_M
    middle = 0.5 * (heading[1:] + heading[:-1])
    step = np.stack([np.cos(middle), np.sin(middle)], axis=1) * _STEP_M
    xy = np.concatenate([np.zeros((1, 2)), np.cumsum(step, axis=0)])
    xy += 130.0 - xy.min(axis=0)  # map coordinates are positive, with room for what stands beside the road
    cross = float(rng.uniform(64.0, 84.0))
    return Road(s_min_m=-RUN_UP_M, length_m=length, xy_m=xy, heading_rad=heading, cross_s_m=cross)


def _material_across(d_m: F64, s_m: F64, cross_s_m: float) -> NDArray[np.uint8]:
    """Ground material on the road at path coordinates (equal shapes)."""
    side = np.abs(d_m)
    out = np.full(d_m.shape, PAVEMENT, np.uint8)
    out[side <= EDGE_M + 0.15] = KERB
    out[side <= EDGE_M] = ASPHALT
    dashed = (s_m % 9.0) < 3.0
    out[(np.abs(side - LANE_M) < 0.09) & dashed] = MARKING
    out[(np.abs(side - 2 * LANE_M) < 0.09) | (np.abs(side - 0.14) < 0.07)] = MARKING
    near = np.abs(s_m - cross_s_m)
    out[(near < CROSS_HALF_M) & (side <= PAVEMENT_M)] = ASPHALT
    zebra = (near > CROSS_HALF_M + 1.0) & (near < CROSS_HALF_M + 4.0) & (side < EDGE_M)
    out[zebra] = np.where(d_m[zebra] % 1.0 < 0.5, MARKING, ASPHALT)
    stop = (near > CROSS_HALF_M + 4.6) & (near < CROSS_HALF_M + 5.0) & (side < 2 * LANE_M)
    out[stop & ((s_m < cross_s_m) == (d_m < 0))] = MARKING
    return out


def make_ground(road: Road, surroundings: int) -> Ground:
    """Paint the road, its markings, the pavement and the crossing; elsewhere ``surroundings`` (GRASS or CONCRETE)."""
    x1, y1 = road.xy_m.max(axis=0) + 130.0
    cells = np.full((int(y1 / CELL_M), int(x1 / CELL_M)), surroundings, np.uint8)

    def paint(s: F64, d: F64, material: NDArray[np.uint8]) -> None:
        x, y, _ = road.pose(s, d)
        row, column = (y / CELL_M).astype(np.int64), (x / CELL_M).astype(np.int64)
        inside = (row >= 0) & (row < cells.shape[0]) & (column >= 0) & (column < cells.shape[1])
        cells[row[inside], column[inside]] = material[inside]

    across = np.arange(-PAVEMENT_M, PAVEMENT_M, 0.07)
    along = np.arange(road.s_min_m, road.s_min_m + road.length_m, 0.07)
    for block in np.array_split(along, max(1, len(along) // 2000)):
        s, d = np.meshgrid(block, across, indexing="ij")
        paint(s.ravel(), d.ravel(), _material_across(d, s, road.cross_s_m).ravel())
    away = np.arange(PAVEMENT_M, CROSS_LENGTH_M, 0.07)
    s, d = np.meshgrid(road.cross_s_m + np.arange(-CROSS_HALF_M, CROSS_HALF_M, 0.07), away, indexing="ij")
    lines = (np.abs(s - road.cross_s_m) < 0.08) & (d % 6.0 < 3.0)
    material = np.where(lines, MARKING, ASPHALT).astype(np.uint8).ravel()
    for sign in (-1.0, 1.0):
        paint(s.ravel(), sign * d.ravel(), material)
    return Ground(cells=cells)
