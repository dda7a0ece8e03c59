"""Greedy matching of detections to truth by centre distance, as the nuScenes detection metric defines it."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["match_detections"]


@njit(cache=True, nogil=True)
def match_detections(
    detection_sample: NDArray[np.int64],
    detection_xy_m: NDArray[np.float64],
    truth_start: NDArray[np.int64],
    truth_xy_m: NDArray[np.float64],
    thresholds_m: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Match detections of one class, best score first, each to the nearest truth of its sample that is still free.

    Args:
        detection_sample: (P,) sample number of each detection, in matching order.
        detection_xy_m: (P, 2) centres.
        truth_start: (S + 1,) truth of sample s is rows ``truth_start[s]:truth_start[s + 1]``.
        truth_xy_m: (G, 2) centres.
        thresholds_m: (T,) a match needs a distance strictly below.

    Returns:
        (T, P) row of the matched truth, -1 where there is none.
    """
    num = detection_sample.shape[0]
    match = np.full((thresholds_m.shape[0], num), -1, dtype=np.int64)
    for t in range(thresholds_m.shape[0]):
        taken = np.zeros(truth_xy_m.shape[0], dtype=np.bool_)
        for p in range(num):
            sample = detection_sample[p]
            nearest_m, nearest = np.inf, -1
            for g in range(truth_start[sample], truth_start[sample + 1]):
                if not taken[g]:
                    dx = detection_xy_m[p, 0] - truth_xy_m[g, 0]
                    dy = detection_xy_m[p, 1] - truth_xy_m[g, 1]
                    distance_m = math.sqrt(dx * dx + dy * dy)
                    if distance_m < nearest_m:
                        nearest_m, nearest = distance_m, g
            if nearest >= 0 and nearest_m < thresholds_m[t]:
                taken[nearest] = True
                match[t, p] = nearest
    return match
