"""LiDAR points -> quantised image points of one camera; sorting by ring. numba, no fast-math."""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["DEPTH_STEPS_PER_M", "UV_STEPS_PER_PX", "order_by_ring", "project"]

UV_STEPS_PER_PX = 32
DEPTH_STEPS_PER_M = 256


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


@numba.njit(cache=True, nogil=True, error_model="numpy")
def project(
    xyz_m: NDArray[np.float32],
    order: NDArray[np.int32],
    rotation: NDArray[np.float64],
    translation_m: NDArray[np.float64],
    image_from_camera: NDArray[np.float64],
    width_px: int,
    height_px: int,
    out: NDArray[np.uint16],
    index: NDArray[np.int32],
) -> tuple[int, int]:
    """Points with depth > 0 inside the image, in ``order``.

    rotation, translation_m: camera_from_sensor. out (3, >= N): u, v in 1/32 px from the image's upper left *edge* (pixel
    centres at integers, so ``floor((u + 0.5) 32)``), depth = camera z in 1/256 m. index (>= N,): which point each one is.
    Returns (number kept, number inside the image but beyond 65535/256 m).
    """
    r00, r01, r02 = rotation[0, 0], rotation[0, 1], rotation[0, 2]
    r10, r11, r12 = rotation[1, 0], rotation[1, 1], rotation[1, 2]
    r20, r21, r22 = rotation[2, 0], rotation[2, 1], rotation[2, 2]
    t0, t1, t2 = translation_m[0], translation_m[1], translation_m[2]
    k00, k01, k02 = image_from_camera[0, 0], image_from_camera[0, 1], image_from_camera[0, 2]
    k10, k11, k12 = image_from_camera[1, 0], image_from_camera[1, 1], image_from_camera[1, 2]
    kept, far = 0, 0
    for j in range(len(order)):
        i = order[j]
        x, y, z = float(xyz_m[i, 0]), float(xyz_m[i, 1]), float(xyz_m[i, 2])
        depth = r20 * x + r21 * y + r22 * z + t2
        if not depth > 0.0:
            continue
        cx = r00 * x + r01 * y + r02 * z + t0
        cy = r10 * x + r11 * y + r12 * z + t1
        u = (k00 * cx + k01 * cy + k02 * depth) / depth
        v = (k10 * cx + k11 * cy + k12 * depth) / depth
        if not (-0.5 <= u < width_px - 0.5 and -0.5 <= v < height_px - 0.5):
            continue
        step = math.floor(depth * 256.0)
        if step > 65535:
            far += 1
            continue
        out[0, kept] = math.floor((u + 0.5) * 32.0)
        out[1, kept] = math.floor((v + 0.5) * 32.0)
        out[2, kept] = step
        index[kept] = i
        kept += 1
    return kept, far
