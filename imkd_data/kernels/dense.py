"""Dense maps on a CPU: normalised images and depth maps in one pass over memory. A GPU does the same with torch.

``contract`` lets a product and a sum become one rounding, as torch's own kernels do; nothing else is relaxed.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["nearest_depth", "scaled_planes"]


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def scaled_planes(
    planes: NDArray[np.uint8], scale: NDArray[np.float32], shift: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """planes (P, N) of channels 0, 1, .., C-1, 0, 1, ... -> ``shift[c] + planes * scale[c]`` in out (P, N)."""
    for p in range(planes.shape[0]):
        c = p % len(scale)
        factor, offset = scale[c], shift[c]
        for k in range(planes.shape[1]):
            out[p, k] = offset + np.float32(planes[p, k]) * factor


@numba.njit(cache=True, nogil=True, error_model="numpy")
def nearest_depth(
    uvd: NDArray[np.float32], batch: NDArray[np.int64], view: NDArray[np.int64], out: NDArray[np.float32]
) -> None:
    """Points (N, 3) u, v, depth > 0 of (sample, camera) into out (B, V, H, W), zeros before: the pixel whose centre is
    nearest, the nearest point wins."""
    height, width = out.shape[2], out.shape[3]
    for i in range(len(uvd)):
        column = math.floor(np.float64(uvd[i, 0]) + 0.5)
        row = math.floor(np.float64(uvd[i, 1]) + 0.5)
        if 0 <= column < width and 0 <= row < height:
            b, v = batch[i], view[i]
            here = out[b, v, row, column]
            if here == 0.0 or uvd[i, 2] < here:
                out[b, v, row, column] = uvd[i, 2]
