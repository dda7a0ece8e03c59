"""LiDAR points -> quantised image points of one camera; sorting by ring. numba, no fast-math."""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["order_by_ring", "project"]


@numba.njit(cache=True, nogil=True)
def order_by_ring(ring: NDArray[np.float32], num_rings: int) -> NDArray[np.int32]:
    """(N,) whole ring numbers -> (N,) order: by ring, inside a ring as the file has them (its firing columns)."""
    start = np.zeros(num_rings + 1, dtype=np.int64)
    for i in range(len(ring)):
        start[int(ring[i]) + 1] += 1
    for r in range(num_rings):
        start[r + 1] += start[r]
    order = np.empty(len(ring), dtype=np.int32)
    for i in range(len(ring)):
        r = int(ring[i])
        order[start[r]] = i
        start[r] += 1
    return order


_BLOCK = 512


@numba.njit(cache=True, nogil=True, error_model="numpy")
def project(
    xyz_m: NDArray[np.float32],
    intensity: NDArray[np.float32],
    order: NDArray[np.int32],
    cameras: NDArray[np.float64],
    out: NDArray[np.uint16],
    out_intensity: NDArray[np.uint8],
) -> NDArray[np.int64]:
    """Points with depth > 0 inside the image of each camera, in ``order``.

    xyz_m (3, N), intensity (N,) whole numbers. cameras (V, 20): camera_from_sensor row major 12, rows 0 and 1 of
    image_from_camera 6, width and height in px: at most 2,048, or u and v would wrap; the caller must refuse more. out
    (V, 3, W): u, v in 1/32 px from the image's upper left *edge* (pixel centres at integers, so ``floor((u + 0.5) 32)``),
    depth = camera z in 1/256 m; out_intensity (V, W): the same points. Slots beyond the last point are left as they are, points
    beyond the last slot are counted only. Returns (V, 2): points inside, and points inside the image but beyond 65535/256 m.
    """
    n, width = len(order), out.shape[2]
    # In the order of the output once, so that every camera reads straight through; blocks stay in the first-level cache.
    xs, ys, zs, values = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.uint8)
    for j in range(n):
        i = order[j]
        xs[j], ys[j], zs[j], values[j] = xyz_m[0, i], xyz_m[1, i], xyz_m[2, i], np.uint8(intensity[i])
    us, vs, depths = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    found = np.zeros((len(cameras), 2), dtype=np.int64)
    for view in range(len(cameras)):
        c = cameras[view]
        r00, r01, r02, t0, r10, r11, r12, t1 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
        r20, r21, r22, t2 = c[8], c[9], c[10], c[11]
        k00, k01, k02, k10, k11, k12 = c[12], c[13], c[14], c[15], c[16], c[17]
        right, bottom = c[18] - 0.5, c[19] - 0.5
        kept, far = 0, 0
        for start in range(0, n, _BLOCK):
            m = min(_BLOCK, n - start)
            bx, by, bz = xs[start : start + m], ys[start : start + m], zs[start : start + m]
            for j in range(m):
                x, y, z = float(bx[j]), float(by[j]), float(bz[j])
                depth = r20 * x + r21 * y + r22 * z + t2
                cx = r00 * x + r01 * y + r02 * z + t0
                cy = r10 * x + r11 * y + r12 * z + t1
                us[j] = (k00 * cx + k01 * cy + k02 * depth) / depth
                vs[j] = (k10 * cx + k11 * cy + k12 * depth) / depth
                depths[j] = depth
            for j in range(m):
                depth, u, v = depths[j], us[j], vs[j]
                if not (depth > 0.0 and -0.5 <= u < right and -0.5 <= v < bottom):
                    continue
                step = math.floor(depth * 256.0)
                if step > 65535:
                    far += 1
                    continue
                if kept < width:
                    out[view, 0, kept] = math.floor((u + 0.5) * 32.0)
                    out[view, 1, kept] = math.floor((v + 0.5) * 32.0)
                    out[view, 2, kept] = step
                    out_intensity[view, kept] = values[start + j]
                kept += 1
        found[view, 0], found[view, 1] = kept, far
    return found
