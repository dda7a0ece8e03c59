"""Radar scans -> whole steps in ego. numba, no fast-math."""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["radar_codes"]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def radar_codes(
    xyz_m: NDArray[np.float32],
    features: NDArray[np.float32],
    starts: NDArray[np.int64],
    moves: NDArray[np.float64],
    extra: NDArray[np.float64],
    column: NDArray[np.int64],
    role: NDArray[np.int64],
    steps: NDArray[np.float64],
    out: NDArray[np.int16],
) -> int:
    """All scans of a sample, one after the other, into out (rows, >= P).

    xyz_m (P, 3), features (P, F): sensor frame; scan s has the points ``starts[s]`` to ``starts[s + 1]``. moves (S, 12):
    ego_from_sensor, row major. extra (S, 3): sensor, sweep, age. Of every row: role 0, 1, 2 = position along x, y, z; 3, 4 =
    x, y of a velocity whose other part is in the next row or the one before; 5 = the feature ``column`` as it is; 6 = entry
    ``column`` of extra. steps (rows,): physical size of a step. A point with a value beyond +-32,767 steps is left out.
    Returns how many are kept.
    """
    rows = len(role)
    codes = np.empty(rows)
    kept = 0
    for s in range(len(starts) - 1):
        m = moves[s]
        for i in range(starts[s], starts[s + 1]):
            x, y, z = float(xyz_m[i, 0]), float(xyz_m[i, 1]), float(xyz_m[i, 2])
            fits = True
            for k in range(rows):
                kind, c = role[k], column[k]
                if kind <= 2:
                    value = m[4 * kind] * x + m[4 * kind + 1] * y + m[4 * kind + 2] * z + m[4 * kind + 3]
                elif kind == 3:
                    value = m[0] * float(features[i, c]) + m[1] * float(features[i, column[k + 1]])
                elif kind == 4:
                    value = m[4] * float(features[i, column[k - 1]]) + m[5] * float(features[i, c])
                elif kind == 5:
                    value = float(features[i, c])
                else:
                    value = extra[s, c]
                code = math.floor(value / steps[k] + 0.5) * 1.0 if abs(value) < 1e15 else 1e15
                fits &= abs(code) <= 32767.0
                codes[k] = code
            if fits:
                for k in range(rows):
                    out[k, kept] = np.int16(codes[k])
                kept += 1
    return kept
