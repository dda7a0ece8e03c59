"""LiDAR points -> exact integer BEV planes. Arrays in, arrays out; numba, no fast-math, so the result is one of bits.

The one rule of cells is that of ``BevGrid.cells``: floor to whole millimetres in float64, then integer floor division.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["add_sweep", "pool_view", "unpack_planes"]

_BLOCK = 1024
# A cell while it is filled, in one number: sum in the upper 32 bits, count 16, strongest 8, its z code 8.
_COUNT, _KEY, _ONE = np.uint64(0xFFFF_0000), np.uint64(0xFFFF), np.uint64(0x1_0000)


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
    cells: NDArray[np.uint64],
    provenance: NDArray[np.uint8],
    dropped: NDArray[np.int64],
) -> None:
    """Add one sweep to the cells (Y, X), in place; ``unpack_planes`` makes planes of them.

    xyz_m (3, N), intensity (N,): sensor frame, whole intensities 0..255. rotation, translation_m: ego_from_sensor.
    grid_mm: x_min, y_min, cell. z_mm: lower end and span. own_car_mm: x0, x1, y0, y1, z0, z1, half open, left out.
    A cell keeps the largest (intensity, z code). provenance (3, Y, X), or (3, 0, 0) to leave it out: x and y of
    that return inside its cell in 1/256 cell, and ``sweep``; of equal returns the first. dropped (4,) counts as
    ``fields.lidar.DROPPED`` says, last the points inside whose intensity is no whole number 0..255: they are not counted, and
    the caller must refuse them.
    A count stops at 65,535, which the caller must refuse.

    Millimetres are whole numbers of float64 here, so comparing and dividing them is exact: half a millimetre is added before a
    product with 1 / cell, which keeps its rounding away from the next cell. The first loop has no branches, so that the
    compiler can take several points at a time.
    """
    ny, nx = cells.shape
    flat = cells.reshape(-1)
    trace = provenance.shape[1] > 0
    cell = grid_mm[2]
    x_min, y_min, per_cell = float(grid_mm[0]), float(grid_mm[1]), 1.0 / float(cell)
    x_max, y_max = x_min + float(nx * cell), y_min + float(ny * cell)
    z_min, z_max, per_span = float(z_mm[0]), float(z_mm[0] + z_mm[1]), 1.0 / float(z_mm[1])
    o0, o1, o2 = float(own_car_mm[0]), float(own_car_mm[1]), float(own_car_mm[2])
    o3, o4, o5 = float(own_car_mm[3]), float(own_car_mm[4]), float(own_car_mm[5])
    r00, r01, r02 = rotation[0, 0], rotation[0, 1], rotation[0, 2]
    r10, r11, r12 = rotation[1, 0], rotation[1, 1], rotation[1, 2]
    r20, r21, r22 = rotation[2, 0], rotation[2, 1], rotation[2, 2]
    t0, t1, t2 = translation_m[0], translation_m[1], translation_m[2]
    columns = float(nx)
    inside, others, seen, kept = 0, 0, 0, 0
    places = np.empty(_BLOCK, dtype=np.int64)  # cell * 65536 + intensity * 256 + z code, or -1
    n = xyz_m.shape[1]
    for start in range(0, n, _BLOCK):
        m = min(_BLOCK, n - start)
        xs, ys, zs = xyz_m[0, start : start + m], xyz_m[1, start : start + m], xyz_m[2, start : start + m]
        values = intensity[start : start + m]
        for j in range(m):
            x, y, z, value = float(xs[j]), float(ys[j]), float(zs[j]), float(values[j])
            ex = np.floor(1000.0 * (r00 * x + r01 * y + r02 * z + t0))
            ey = np.floor(1000.0 * (r10 * x + r11 * y + r12 * z + t1))
            ez = np.floor(1000.0 * (r20 * x + r21 * y + r22 * z + t2))
            in_grid = (ex >= x_min) & (ex < x_max) & (ey >= y_min) & (ey < y_max)
            own = (ex >= o0) & (ex < o1) & (ey >= o2) & (ey < o3) & (ez >= o4) & (ez < o5)
            in_span = (ez >= z_min) & (ez < z_max)
            whole = (value >= 0.0) & (value <= 255.0) & (value == np.floor(value))
            not_own = in_grid & (not own)
            visible = not_own & in_span
            good = visible & whole
            inside += np.int64(in_grid)
            others += np.int64(not_own)
            seen += np.int64(visible)
            kept += np.int64(good)
            column, row = np.floor((ex - x_min + 0.5) * per_cell), np.floor((ey - y_min + 0.5) * per_cell)
            code = np.floor(((ez - z_min) * 255.0 + 0.5) * per_span)
            places[j] = np.int64((row * columns + column) * 65536.0 + value * 256.0 + code if good else -1.0)
        for j in range(m):
            place = places[j]
            if place < 0:
                continue
            at, key = place >> 16, np.uint64(place & 0xFFFF)
            before = flat[at]
            best = before & _KEY
            after = before - best + max(best, key) + (np.uint64(place & 0xFF00) << np.uint64(24))
            flat[at] = after if before & _COUNT == _COUNT else after + _ONE
            if trace and (key > best or before & _COUNT == 0):
                x, y, z = float(xs[j]), float(ys[j]), float(zs[j])
                dx = np.int64(np.floor(1000.0 * (r00 * x + r01 * y + r02 * z + t0)) - x_min)
                dy = np.int64(np.floor(1000.0 * (r10 * x + r11 * y + r12 * z + t1)) - y_min)
                provenance[0, at // nx, at % nx] = (dx % cell) * 256 // cell
                provenance[1, at // nx, at % nx] = (dy % cell) * 256 // cell
                provenance[2, at // nx, at % nx] = sweep
    dropped[0] += inside - others
    dropped[1] += n - inside
    dropped[2] += others - seen
    dropped[3] += seen - kept


@numba.njit(cache=True, nogil=True, error_model="numpy")
def unpack_planes(
    cells: NDArray[np.uint64],
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.uint8], NDArray[np.uint8]]:
    """Cells (Y, X) of ``add_sweep`` -> sum, count, strongest intensity and its z code, (Y, X) each; empty is 0 in all."""
    total, count = np.empty(cells.shape, dtype=np.uint32), np.empty(cells.shape, dtype=np.uint16)
    strongest, z_code = np.empty(cells.shape, dtype=np.uint8), np.empty(cells.shape, dtype=np.uint8)
    flat, a, b, c, d = cells.reshape(-1), total.reshape(-1), count.reshape(-1), strongest.reshape(-1), z_code.reshape(-1)
    for i in range(len(flat)):
        cell = flat[i]
        a[i], b[i] = np.uint32(cell >> np.uint64(32)), np.uint16(cell >> np.uint64(16))
        c[i], d[i] = np.uint8(cell >> np.uint64(8)), np.uint8(cell)
    return total, count, strongest, z_code


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
