"""LiDAR points -> exact integer BEV planes. Arrays in, arrays out; numba, no fast-math, so the result is one of bits.

The one rule of cells is that of ``BevGrid.cells``: floor to whole millimetres in float64, then integer floor division.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["DROPPED", "add_sweep", "pool_view"]

# What the counters of ``add_sweep`` count, in order.
DROPPED = ("own_car", "outside_grid", "outside_z_span", "intensity_not_whole")


@numba.njit(cache=True, nogil=True, error_model="numpy")
def add_sweep(
    xyz_m: NDArray[np.float32],
    intensity: NDArray[np.float32],
    rotation: NDArray[np.float64],
    translation_m: NDArray[np.float64],
    grid_mm: NDArray[np.int64],
    z_mm: NDArray[np.int64],
    own_car_mm: NDArray[np.int64],
    sweep: int,
    total: NDArray[np.uint32],
    count: NDArray[np.uint16],
    strongest: NDArray[np.uint8],
    z_code: NDArray[np.uint8],
    provenance: NDArray[np.uint8],
    dropped: NDArray[np.int64],
) -> None:
    """Add one sweep to the planes (Y, X), in place.

    xyz_m (N, 3), intensity (N,): sensor frame, whole intensities 0..255. rotation, translation_m: ego_from_sensor.
    grid_mm: x_min, y_min, cell. z_mm: lower end and span. own_car_mm: x0, x1, y0, y1, z0, z1, half open, left out.
    strongest, z_code: largest (intensity, z code) of a cell. provenance (3, Y, X), or (3, 0, 0) to leave it out: x and y of
    that return inside its cell in 1/256 cell, and ``sweep``; of equal returns the first. dropped (4,) counts by ``DROPPED``,
    last the points inside whose intensity is no whole number 0..255: they are not counted, and the caller must refuse them.
    A count stops at 65,535, which the caller must refuse.
    """
    x_min, y_min, cell = grid_mm[0], grid_mm[1], grid_mm[2]
    ny, nx = count.shape
    trace = provenance.shape[1] > 0
    r00, r01, r02 = rotation[0, 0], rotation[0, 1], rotation[0, 2]
    r10, r11, r12 = rotation[1, 0], rotation[1, 1], rotation[1, 2]
    r20, r21, r22 = rotation[2, 0], rotation[2, 1], rotation[2, 2]
    t0, t1, t2 = translation_m[0], translation_m[1], translation_m[2]
    for i in range(len(xyz_m)):
        x, y, z = float(xyz_m[i, 0]), float(xyz_m[i, 1]), float(xyz_m[i, 2])
        ex = math.floor(1000.0 * (r00 * x + r01 * y + r02 * z + t0))
        ey = math.floor(1000.0 * (r10 * x + r11 * y + r12 * z + t1))
        ez = math.floor(1000.0 * (r20 * x + r21 * y + r22 * z + t2))
        dx, dy, dz = ex - x_min, ey - y_min, ez - z_mm[0]
        if dx < 0 or dy < 0:
            dropped[1] += 1
            continue
        column, row = dx // cell, dy // cell
        if column >= nx or row >= ny:
            dropped[1] += 1
            continue
        if own_car_mm[0] <= ex < own_car_mm[1] and own_car_mm[2] <= ey < own_car_mm[3] and own_car_mm[4] <= ez < own_car_mm[5]:
            dropped[0] += 1
            continue
        if dz < 0 or dz >= z_mm[1]:
            dropped[2] += 1
            continue
        code = dz * 255 // z_mm[1]
        value = int(intensity[i])
        if value < 0 or value > 255 or float(value) != float(intensity[i]):
            dropped[3] += 1
            continue
        first = count[row, column] == 0
        if count[row, column] < 65535:
            count[row, column] += np.uint16(1)
        total[row, column] += np.uint32(value)
        best = strongest[row, column]
        if first or value > best or (value == best and code > z_code[row, column]):
            strongest[row, column] = value
            z_code[row, column] = code
            if trace:
                provenance[0, row, column] = (dx - column * cell) * 256 // cell
                provenance[1, row, column] = (dy - row * cell) * 256 // cell
                provenance[2, row, column] = sweep


@numba.njit(cache=True, nogil=True, error_model="numpy")
def pool_view(
    total: NDArray[np.uint32], count: NDArray[np.uint16], strongest: NDArray[np.uint8], z_code: NDArray[np.uint8], k: int
) -> NDArray[np.uint8]:
    """Planes (Y k, X k) -> (4, Y, X) u8: rounded mean, maximum, count saturated at 255, z code of the maximum.

    Mean is ``(2 sum + count) // (2 count)`` of the pooled sum and count; of equal maxima the higher z code wins; empty is 0.
    """
    ny, nx = count.shape[0] // k, count.shape[1] // k
    out = np.zeros((4, ny, nx), dtype=np.uint8)
    for row in range(ny):
        for column in range(nx):
            s, n, best, code = np.int64(0), np.int64(0), np.int64(-1), np.int64(0)
            for y in range(row * k, row * k + k):
                for x in range(column * k, column * k + k):
                    c = np.int64(count[y, x])
                    if c == 0:
                        continue
                    n += c
                    s += np.int64(total[y, x])
                    v, z = np.int64(strongest[y, x]), np.int64(z_code[y, x])
                    if v > best or (v == best and z > code):
                        best, code = v, z
            if n > 0:
                out[0, row, column] = (2 * s + n) // (2 * n)
                out[1, row, column] = best
                out[2, row, column] = min(n, 255)
                out[3, row, column] = code
    return out
