"""Points -> whole steps in ego. numba, no fast-math."""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["quantise"]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def quantise(
    xyz_m: NDArray[np.float32],
    rotation: NDArray[np.float64],
    translation_m: NDArray[np.float64],
    steps_per_m: float,
    out: NDArray[np.int16],
    index: NDArray[np.int32],
) -> int:
    """Move (N, 3) sensor points by ego_from_sensor and round to steps: out (3, >= N), index (>= N,) of the points kept.

    A point with a coordinate beyond +-32,767 steps is left out. Returns how many are kept.
    """
    r, t = rotation, translation_m
    kept = 0
    for i in range(len(xyz_m)):
        x, y, z = float(xyz_m[i, 0]), float(xyz_m[i, 1]), float(xyz_m[i, 2])
        a = math.floor((r[0, 0] * x + r[0, 1] * y + r[0, 2] * z + t[0]) * steps_per_m + 0.5)
        b = math.floor((r[1, 0] * x + r[1, 1] * y + r[1, 2] * z + t[1]) * steps_per_m + 0.5)
        c = math.floor((r[2, 0] * x + r[2, 1] * y + r[2, 2] * z + t[2]) * steps_per_m + 0.5)
        if -32767 <= a <= 32767 and -32767 <= b <= 32767 and -32767 <= c <= 32767:
            out[0, kept], out[1, kept], out[2, kept] = a, b, c
            index[kept] = i
            kept += 1
    return kept
