"""Bytes of point files -> columns, checked on the way. numba, no fast-math."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "pcd_columns", "split_scan"]

KINDS = ("f4", "f8", "i1", "i2", "i4", "u1", "u2", "u4")  # what ``pcd_columns`` reads, by number


@numba.njit(cache=True, nogil=True, error_model="numpy")
def split_scan(
    raw: NDArray[np.float32], out: NDArray[np.float32], max_abs_m: float, intensity_max: float, ring_max: float
) -> tuple[np.int64, np.int64]:
    """(N * 5,) x, y, z, intensity, ring of every point -> rows of out (5, N).

    Returns how many points have a position at or beyond ``max_abs_m``, a number that is not finite, or an intensity or ring
    that is not whole, negative or above its limit; and how many have another intensity than the first.
    """
    xs, ys, zs, values, rings = out[0], out[1], out[2], out[3], out[4]
    limit, top, last = np.float32(max_abs_m), np.float32(intensity_max), np.float32(ring_max)
    first = raw[3]
    odd = other = np.int64(0)
    for i in range(len(xs)):
        x, y, z, value, ring = raw[5 * i], raw[5 * i + 1], raw[5 * i + 2], raw[5 * i + 3], raw[5 * i + 4]
        xs[i], ys[i], zs[i], values[i], rings[i] = x, y, z, value, ring
        near = (abs(x) < limit) & (abs(y) < limit) & (abs(z) < limit)
        whole = (np.floor(value) == value) & (np.floor(ring) == ring)
        inside = (value >= 0) & (value <= top) & (ring >= 0) & (ring <= last)
        odd += np.int64(not (near & whole & inside))
        other += np.int64(value != first)
    return odd, other


@numba.njit(cache=True, nogil=True, error_model="numpy")
def pcd_columns(
    body: NDArray[np.uint8], itemsize: int, offsets: NDArray[np.int64], kinds: NDArray[np.int64], out: NDArray[np.float32]
) -> np.int64:
    """Packed little-endian points -> out (P, C): of every point the value at each offset, by its kind (index into ``KINDS``).

    Returns how many points have a value that is not finite.
    """
    bits32, bits64 = np.zeros(1, dtype=np.uint32), np.zeros(1, dtype=np.uint64)
    single, double = bits32.view(np.float32), bits64.view(np.float64)
    broken = np.int64(0)
    for p in range(out.shape[0]):
        finite = True
        for c in range(len(offsets)):
            at, kind = p * itemsize + offsets[c], kinds[c]
            low = np.uint32(body[at])
            if kind == 2:
                out[p, c] = np.int8(low)
            elif kind == 5:
                out[p, c] = low
            elif kind == 3 or kind == 6:
                low |= np.uint32(body[at + 1]) << np.uint32(8)
                out[p, c] = np.float32(np.int16(low)) if kind == 3 else np.float32(low)
            else:
                for k in range(1, 4):
                    low |= np.uint32(body[at + k]) << np.uint32(8 * k)
                bits32[0] = low
                if kind == 0:
                    out[p, c] = single[0]
                elif kind == 1:
                    high = np.uint64(0)
                    for k in range(4, 8):
                        high |= np.uint64(body[at + k]) << np.uint64(8 * k)
                    bits64[0] = high | np.uint64(low)
                    out[p, c] = double[0]
                elif kind == 4:
                    out[p, c] = np.int32(low)
                else:
                    out[p, c] = low
            finite &= bool(np.isfinite(out[p, c]))
        broken += np.int64(not finite)
    return broken
