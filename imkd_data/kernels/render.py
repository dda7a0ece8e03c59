"""Z-buffered rendering of upright primitives and a textured ground into one pinhole image. Used by the synthetic world.

Two passes: ``render_depth`` keeps the nearest primitive per pixel (nearest primitives first, so that most tests end early);
``shade`` colours every pixel once. Pixel centres lie at integers. Frame of all geometry: as the primitives (global).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from imkd_data.kernels.raycast import GROUND, NOTHING, hash_normal, hash_uniform, hit_span, surface_normal

_NEAR_M = 0.3
_CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
_EDGES = np.array([(a, b) for a in range(8) for b in range(a + 1, 8) if bin(a ^ b).count("1") == 1], dtype=np.int64)


@njit(cache=True)
def _rectangle(p: Any, rotation: Any, origin: Any, matrix: Any, width: int, height: int) -> Any:
    """Pixel bounds (u0, v0, u1, v1, nearest depth) of a primitive's box, clipped at the near plane; u0 > u1: invisible."""
    cam = np.empty((8, 3))
    for k in range(8):
        lx, ly = _CORNERS[k, 0] * p[3], _CORNERS[k, 1] * p[4]
        gx = p[0] + p[6] * lx - p[7] * ly - origin[0]
        gy = p[1] + p[7] * lx + p[6] * ly - origin[1]
        gz = p[2] + _CORNERS[k, 2] * p[5] - origin[2]
        for a in range(3):
            cam[k, a] = rotation[0, a] * gx + rotation[1, a] * gy + rotation[2, a] * gz
    u0, v0, u1, v1, near = 1e30, 1e30, -1e30, -1e30, 1e30
    for e in range(_EDGES.shape[0]):
        a, b = _EDGES[e, 0], _EDGES[e, 1]
        za, zb = cam[a, 2], cam[b, 2]
        for end in range(2):
            x, y, z = (cam[a, 0], cam[a, 1], za) if end == 0 else (cam[b, 0], cam[b, 1], zb)
            other = b if end == 0 else a
            if z < _NEAR_M:
                if cam[other, 2] <= _NEAR_M:
                    continue
                f = (_NEAR_M - z) / (cam[other, 2] - z)
                x, y, z = x + f * (cam[other, 0] - x), y + f * (cam[other, 1] - y), _NEAR_M
            u, v = matrix[0, 0] * x / z + matrix[0, 2], matrix[1, 1] * y / z + matrix[1, 2]
            u0, u1, v0, v1, near = min(u0, u), max(u1, u), min(v0, v), max(v1, v), min(near, z)
    if u1 < 0.0 or v1 < 0.0 or u0 > width - 1 or v0 > height - 1:
        return 1, 1, 0, 0, 1e30
    return max(0, math.ceil(u0)), max(0, math.ceil(v0)), min(width - 1, math.floor(u1)), min(height - 1, math.floor(v1)), near


@njit(cache=True)
def render_depth(
    prims: Any, kinds: Any, rotation: Any, origin: Any, matrix: Any, width: int, height: int, reach_m: float, seed: int
) -> Any:
    """Nearest surface per pixel.

    Args:
        rotation (3, 3), origin (3,): global_from_camera; matrix (3, 3): image_from_camera without skew.

    Returns:
        depth (H, W) f32 camera z in metres (inf: sky), which (H, W) i32 primitive index (-1 ground, -4 sky).
    """
    depth, which = np.full((height, width), np.inf, np.float32), np.full((height, width), NOTHING, np.int32)
    count = prims.shape[0]
    bounds, near = np.empty((count, 4), np.int64), np.empty(count)
    for n in range(count):
        bounds[n, 0], bounds[n, 1], bounds[n, 2], bounds[n, 3], near[n] = _rectangle(
            prims[n], rotation, origin, matrix, width, height
        )
    fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
    for n in np.argsort(near):
        if near[n] > reach_m:
            break
        p, shape = prims[n], kinds[n, 0]
        for v in range(bounds[n, 1], bounds[n, 3] + 1):
            y = (v - cy) / fy
            bx = rotation[0, 1] * y + rotation[0, 2]
            by = rotation[1, 1] * y + rotation[1, 2]
            bz = rotation[2, 1] * y + rotation[2, 2]
            for u in range(bounds[n, 0], bounds[n, 2] + 1):
                if depth[v, u] <= near[n]:
                    continue
                x = (u - cx) / fx
                dx, dy, dz = bx + rotation[0, 0] * x, by + rotation[1, 0] * x, bz + rotation[2, 0] * x
                t0, t1 = hit_span(p, shape, origin[0], origin[1], origin[2], dx, dy, dz)
                if t0 >= depth[v, u] or t0 <= _NEAR_M or t0 >= t1:
                    continue
                if p[10] > 0.0:  # foliage: solid in the middle, ragged at the edge
                    ragged = hash_uniform(seed + n, (u * 3 // 4) * 8192 + v * 3 // 4)
                    if (t1 - t0) * p[10] < ragged * 1.2:
                        continue
                depth[v, u], which[v, u] = t0, n
    for v in range(height):
        y = (v - cy) / fy
        for u in range(width):
            x = (u - cx) / fx
            dz = rotation[2, 0] * x + rotation[2, 1] * y + rotation[2, 2]
            if dz < -1e-9 and -origin[2] / dz < depth[v, u]:
                depth[v, u], which[v, u] = -origin[2] / dz, GROUND
    return depth, which


@njit(cache=True, inline="always")
def _texture(kind: int, p: Any, x: float, y: float, z: float) -> float:
    """Brightness factor of a surface point: windows, slanted stripes, leaves."""
    rx, ry, rz = x - p[0], y - p[1], z - p[2]
    lx, ly = p[6] * rx + p[7] * ry, p[6] * ry - p[7] * rx
    if kind == 1:
        along = lx if p[4] - abs(ly) < p[3] - abs(lx) else ly
        if rz < p[5] - 0.7 and (along % 2.6) > 1.1 and ((rz + p[5]) % 3.1) > 1.4:
            return 0.35
    elif kind == 2:
        return 1.15 if (lx + ly + 1.6 * rz) % 0.6 < 0.3 else 0.45
    elif kind == 3:
        return 0.55 + 0.9 * hash_uniform(int(x * 7.0) * 65536 + int(y * 7.0), int(z * 7.0))
    return 1.0


@njit(cache=True)
def paint_shadows(mask: Any, x0_m: float, y0_m: float, cell_m: float, prims: Any, kinds: Any, sun: Any) -> None:
    """Set the cells of ``mask`` (ny, nx) uint8 whose centres primitives hide from the sun (a unit vector towards it)."""
    rows, columns = mask.shape
    sx, sy = sun[0] / sun[2], sun[1] / sun[2]
    for n in range(prims.shape[0]):
        p = prims[n]
        low, high, reach = p[2] - p[5], p[2] + p[5], p[13]
        x1, x2 = p[0] - max(sx * low, sx * high) - reach, p[0] - min(sx * low, sx * high) + reach
        y1, y2 = p[1] - max(sy * low, sy * high) - reach, p[1] - min(sy * low, sy * high) + reach
        for row in range(max(0, int((y1 - y0_m) / cell_m)), min(rows, int((y2 - y0_m) / cell_m) + 1)):
            for column in range(max(0, int((x1 - x0_m) / cell_m)), min(columns, int((x2 - x0_m) / cell_m) + 1)):
                if mask[row, column]:
                    continue
                x, y = x0_m + (column + 0.5) * cell_m, y0_m + (row + 0.5) * cell_m
                t0, t1 = hit_span(p, kinds[n, 0], x, y, 0.0, sun[0], sun[1], sun[2])
                if t1 > max(t0, 0.0):
                    mask[row, column] = 1


@njit(cache=True)
def shade(
    depth: Any, which: Any, prims: Any, kinds: Any, colours: Any, rotation: Any, origin: Any, matrix: Any,
    ground: Any, cell_m: float, ground_colours: Any, shadow: Any, shadow_at: Any, light: Any, sky: Any, lamp: Any, seed: int,
) -> Any:  # fmt: skip
    """Colour of every pixel.

    Args:
        depth, which: from ``render_depth``. ground_colours (M, 3). sky (2, 3): colour at the horizon and above.
        shadow (ny, nx) uint8: ground hidden from the sun, lower corner ``shadow_at`` (2,), cells of ``cell_m``.
        light (8,): sun direction x, y, z, sun strength, ambient strength, haze per metre, noise, exposure.
        lamp (6,): headlight x, y, z, direction x, y, strength (0: none).

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = depth.shape
    image = np.empty((height, width, 3), np.uint8)
    fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
    rows, columns = ground.shape
    rgb, tone = np.empty(3), 255.0 * (np.arange(1024) / 512.0) ** 0.8
    for v in range(height):
        for u in range(width):
            x, y = (u - cx) / fx, (v - cy) / fy
            dx = rotation[0, 0] * x + rotation[0, 1] * y + rotation[0, 2]
            dy = rotation[1, 0] * x + rotation[1, 1] * y + rotation[1, 2]
            dz = rotation[2, 0] * x + rotation[2, 1] * y + rotation[2, 2]
            hit, far = which[v, u], depth[v, u]
            glow = 0.0
            if hit == NOTHING:
                up = min(max(3.0 * dz / math.sqrt(dx * dx + dy * dy + dz * dz), 0.0), 1.0)
                for a in range(3):
                    rgb[a] = sky[0, a] + up * (sky[1, a] - sky[0, a])
            else:
                gx, gy, gz = origin[0] + dx * far, origin[1] + dy * far, origin[2] + dz * far
                nx, ny, nz = 0.0, 0.0, 1.0
                factor, sun = 1.0, light[3]
                if hit == GROUND:
                    row, column = int(gy / cell_m), int(gx / cell_m)
                    material = 0
                    if 0 <= row < rows and 0 <= column < columns:
                        material = ground[row, column]
                    for a in range(3):
                        rgb[a] = ground_colours[material, a]
                    row, column = int((gy - shadow_at[1]) / cell_m), int((gx - shadow_at[0]) / cell_m)
                    if 0 <= row < shadow.shape[0] and 0 <= column < shadow.shape[1] and shadow[row, column]:
                        sun = 0.0
                    fine = hash_uniform(31, int(gx * 12.0) * 65536 + int(gy * 12.0)) - 0.5
                    factor = 1.0 + 0.14 * fine + 0.05 * hash_normal(32, int(gx * 0.7) * 65536 + int(gy * 0.7))
                else:
                    p, texture = prims[hit], kinds[hit, 2]
                    nx, ny, nz = surface_normal(p, kinds[hit, 0], gx, gy, gz)
                    for a in range(3):
                        rgb[a] = colours[hit, a]
                    factor = _texture(texture, p, gx, gy, gz)
                    if texture == 4 or texture == 6:
                        glow = 1.0 if texture == 4 else 0.6
                lit = light[4] * (0.75 + 0.25 * nz) + sun * max(0.0, nx * light[0] + ny * light[1] + nz * light[2])
                if lamp[5] > 0.0:
                    lx, ly, lz = gx - lamp[0], gy - lamp[1], gz - lamp[2]
                    reach = math.sqrt(lx * lx + ly * ly + lz * lz) + 0.1
                    ahead = (lx * lamp[3] + ly * lamp[4]) / reach
                    if ahead > 0.82:
                        facing = 0.35 + 0.65 * abs(nx * lx + ny * ly + nz * lz) / reach
                        lit += lamp[5] * facing * (ahead - 0.82) * 5.5 / (1.0 + (reach / 14.0) ** 2)
                haze = 1.0 - math.exp(-far * light[5])
                for a in range(3):
                    shown = rgb[a] * factor * max(lit, glow)
                    rgb[a] = shown + haze * (sky[0, a] - shown)
            grain = light[6] * hash_normal(seed, v * 4096 + u)
            for a in range(3):
                value = tone[min(int(max(rgb[a] * light[7], 0.0) * 512.0), 1023)] + grain
                image[v, u, a] = np.uint8(min(max(value, 0.0), 255.0))
    return image
