"""From ray hits to LiDAR points: reflectivity, drop-out, noise, ego-motion compensation. Used by the synthetic world."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from imkd_data.kernels.raycast import GROUND, NOTHING, OWN_CAR, hash_normal, hash_uniform

_RETRO_FLOOR = 101.0
# The sensor's range calibration is not perfect: genuine medians are low below 5 m, dip between 15 and 30 m, and rise again.
_CALIBRATION = np.interp(
    np.arange(512) * 0.25,
    [0.0, 3.5, 4.5, 5.5, 7.0, 11.0, 15.0, 20.0, 30.0, 40.0, 55.0, 70.0],
    [0.3, 0.33, 0.55, 1.05, 1.5, 1.1, 0.55, 0.36, 0.38, 0.6, 0.95, 1.1],
)


@njit(cache=True, inline="always")
def _stray(seed: int, ray: int) -> float:
    """The value a channel reports with no echo: mostly small, sometimes a full-scale spike."""
    u, v = hash_uniform(seed + 11, ray), hash_uniform(seed + 12, ray)
    if u < 0.026:
        return 100.0 + 155.0 * v * v * v
    if u < 0.09:
        return 30.0 + 70.0 * v
    return 1.0 + 24.0 * v * v


@njit(cache=True)
def lidar_points(
    distance: Any, primitive: Any, cosine: Any, direction: Any, origins: Any, ref_rotation: Any, ref_origin: Any,
    prims: Any, ground: Any, cell_m: float, ground_reflectivity: Any, noise_m: float,
    power_floor: float, rain: float, seed: int,
) -> Any:  # fmt: skip
    """Hits of ``raycast.cast_columns`` -> points as the file holds them.

    A point is expressed in the sensor frame at the reference pose (``ref_rotation`` (3, 3), ``ref_origin`` (3,)), so the
    ego's own motion is compensated and that of others is not. Intensity: whole numbers, 0..100 diffuse reflectivity, above
    for retro-reflectors. Power (reflectivity x cosine / distance^2) decides only whether there is an echo; without one the
    point is the sensor's origin at that instant, with a stray value, as in genuine files. ``rain`` 0..1 adds echoes of drops.

    Returns:
        points (C, K, 5) f32 x, y, z, intensity, ring; primitive (C, K) i64 with lost rays set to -4 (nothing), rain too.
    """
    columns, rings = distance.shape
    points, which = np.empty((columns, rings, 5), np.float32), primitive.copy()
    rows, width = ground.shape
    for c in range(columns):
        ox, oy, oz = origins[c, 0], origins[c, 1], origins[c, 2]
        for k in range(rings):
            ray = c * 64 + k
            hit, far, cos = primitive[c, k], distance[c, k], cosine[c, k]
            dx, dy, dz = direction[c, k, 0], direction[c, k, 1], direction[c, k, 2]
            value, shine = 0.0, 0.0
            if hit == OWN_CAR:
                value = 1.5 + 22.0 * hash_uniform(seed + 2, ray) ** 3
            elif hit == GROUND:
                gx, gy = ox + dx * far, oy + dy * far
                row, column = int(gy / cell_m), int(gx / cell_m)
                material = 0
                if 0 <= row < rows and 0 <= column < width:
                    material = ground[row, column]
                patch = hash_normal(77 + material, int(gx * 4.0) * 65536 + int(gy * 4.0))
                value = ground_reflectivity[material, 0] + ground_reflectivity[material, 1] * patch
                # Rough ground keeps most of its brightness at grazing incidence, and loses it slowly.
                value *= 1.0 + ground_reflectivity[material, 2] * (cos - 0.35)
                if rain > 0.0:
                    value *= 0.75
            elif hit >= 0:
                p = prims[hit]
                x, y, z = ox + dx * far, oy + dy * far, oz + dz * far
                patch = hash_normal(int(hit) + 991, int(x * 3.0) * 4194304 + int(y * 3.0) * 2048 + int(z * 4.0))
                value = p[11] * (0.62 + 0.38 * cos) * (1.0 + 0.22 * patch)
                shine = p[12] if cos > 0.45 else 0.0
            lost = hit == NOTHING
            if not lost and hit != OWN_CAR:
                power = max(value, 1.0) * max(cos, 0.02) / (far * far)
                if shine > 0.0:
                    power += 100.0 * shine / (far * far)
                lost = hash_uniform(seed + 3, ray) > 1.0 / (1.0 + (power_floor * (1.0 + 1.5 * rain) / power) ** 2)
                lost = lost or hash_uniform(seed + 4, ray) < 0.006
            drop = -1.0
            if rain > 0.0 and hit != OWN_CAR:
                path = -math.log(1.0 - hash_uniform(seed + 5, ray)) * 130.0 / rain
                if 1.2 < path < min(far, 18.0):
                    drop = path
            if drop > 0.0:
                far, value, shine, lost, which[c, k] = drop, 1.0 + 5.0 * hash_uniform(seed + 6, ray), 0.0, False, NOTHING
            if lost:
                which[c, k] = NOTHING
                far, value = 0.0, _stray(seed, ray)
            else:
                if hit != OWN_CAR:
                    value *= _CALIBRATION[min(int(far * 4.0), 511)]
                far += noise_m * max(-2.8, min(2.8, hash_normal(seed + 7, ray)))
                value += 1.6 * hash_normal(seed + 8, ray)
                value = min(max(value, 0.0), 100.0)
                if shine > 0.0 and hash_uniform(seed + 9, ray) < shine:
                    value = _RETRO_FLOOR + (255.0 - _RETRO_FLOOR) * shine * (0.35 + 0.65 * hash_uniform(seed + 10, ray))
            gx, gy, gz = ox + dx * far - ref_origin[0], oy + dy * far - ref_origin[1], oz + dz * far - ref_origin[2]
            for axis in range(3):
                points[c, k, axis] = ref_rotation[0, axis] * gx + ref_rotation[1, axis] * gy + ref_rotation[2, axis] * gz
            points[c, k, 3], points[c, k, 4] = math.floor(value + 0.5), k
    return points, which
