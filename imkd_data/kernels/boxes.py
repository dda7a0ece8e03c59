"""Points in upright boxes. numba; one frame for both."""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["points_in_boxes"]


@numba.njit(cache=True, nogil=True)
def points_in_boxes(
    xyz: NDArray[np.floating], centre: NDArray[np.float64], lwh: NDArray[np.float64], yaw: NDArray[np.float64]
) -> NDArray[np.int64]:
    """(N, 3) points, boxes (M, 3) gravity centres, (M, 3) length, width, height, (M,) yaw about z -> (M,) points inside.

    The faces belong to the box. A box in several places counts a point several times.
    """
    counts = np.zeros(len(centre), dtype=np.int64)
    for m in range(len(centre)):
        cx, cy, cz = centre[m, 0], centre[m, 1], centre[m, 2]
        hl, hw, hh = lwh[m, 0] / 2, lwh[m, 1] / 2, lwh[m, 2] / 2
        reach = math.sqrt(hl * hl + hw * hw)
        c, s = math.cos(yaw[m]), math.sin(yaw[m])
        n = 0
        for i in range(len(xyz)):
            dx = xyz[i, 0] - cx
            if abs(dx) > reach:
                continue
            dy = xyz[i, 1] - cy
            if abs(dy) > reach or abs(xyz[i, 2] - cz) > hh:
                continue
            if abs(c * dx + s * dy) <= hl and abs(-s * dx + c * dy) <= hw:
                n += 1
        counts[m] = n
    return counts
