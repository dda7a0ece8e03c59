"""Ray casting over upright primitives with a hierarchy of bounding circles. Arrays in, arrays out; used by the synthetic world.

Primitives are two arrays of equal length:

``prims`` (N, 14) f64, one frame, metres: 0-2 centre, 3-5 half sizes (cylinder: radius, radius, half height), 6-7 cosine and
sine of the yaw, 8-9 velocity x, y (m/s) about the reference instant, 10 density (1/m; > 0 lets rays pass partly, foliage),
11 diffuse reflectivity 0..100, 12 retro-reflective strength 0..1, 13 radius of the bounding circle in x-y.

``kinds`` (N, 3) i64: 0 shape (``BOX``, ``CYLINDER``, ``ELLIPSOID``), 1 object number, 2 texture.

The hierarchy (``build_tree``) is a median split over x-y. A node is a circle (x, y, radius) and either two children or a run of
``order``. Circles are enlarged by what a primitive moves within ``reach_s``, so a tree stays valid for rays of that time span.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

BOX, CYLINDER, ELLIPSOID = 0, 1, 2
GROUND, STATIC, OWN_CAR, NOTHING = -1, -2, -3, -4  # object numbers that are not actors
PRIM_COLUMNS = 14
LEAF = 4
_FAR = 1e30
_STACK = 96
_MAX_CANDIDATES = 2048

Tree = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


@njit(cache=True, inline="always")
def _hash(a: int, b: int) -> Any:
    """64 mixed bits from two integers (splitmix64); the same on every machine."""
    z = (
        np.uint64(a) * np.uint64(0x9E3779B97F4A7C15)
        + np.uint64(b) * np.uint64(0xD1B54A32D192ED03)
        + np.uint64(0x2545F4914F6CDD1D)
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, inline="always")
def hash_uniform(a: int, b: int) -> float:
    """Uniform number in [0, 1) from two integers."""
    return float(_hash(a, b) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True, inline="always")
def hash_normal(a: int, b: int) -> float:
    """Bounded bell curve (sum of four uniforms): mean 0, deviation 1, |value| < 3.47."""
    z = _hash(a, b)
    low = np.uint64(0xFFFF)
    total = float(z & low) + float((z >> np.uint64(16)) & low) + float((z >> np.uint64(32)) & low) + float(z >> np.uint64(48))
    return (total / 65536.0 - 2.0) * 1.7320508075688772


@njit(cache=True)
def build_tree(prims: Any, reach_s: float) -> Any:
    """Median-split tree over x-y.

    Returns nodes (M, 3) f64 circles, links (M, 2) i64 (children, or -1 - first and count for a leaf), order (N,) i64.
    """
    n = prims.shape[0]
    nodes = np.empty((2 * n + 1, 3), np.float64)
    links = np.empty((2 * n + 1, 2), np.int64)
    order = np.arange(n)
    stack = np.empty((_STACK, 3), np.int64)
    used, top = 1, 1
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, 0, n
    while top > 0:
        top -= 1
        node, first, last = stack[top]
        x0, x1, y0, y1 = _FAR, -_FAR, _FAR, -_FAR
        for k in range(first, last):
            p = prims[order[k]]
            x0, x1 = min(x0, p[0]), max(x1, p[0])
            y0, y1 = min(y0, p[1]), max(y1, p[1])
        cx, cy = 0.5 * (x0 + x1), 0.5 * (y0 + y1)
        radius = 0.0
        for k in range(first, last):
            p = prims[order[k]]
            far = math.hypot(p[0] - cx, p[1] - cy) + p[13] + math.hypot(p[8], p[9]) * reach_s
            radius = max(radius, far)
        nodes[node, 0], nodes[node, 1], nodes[node, 2] = cx, cy, radius
        if last - first <= LEAF:
            links[node, 0], links[node, 1] = -1 - first, last - first
            continue
        axis = 0 if x1 - x0 >= y1 - y0 else 1
        segment = order[first:last].copy()
        keys = np.empty(last - first)
        for k in range(last - first):
            keys[k] = prims[segment[k], axis]
        order[first:last] = segment[np.argsort(keys)]
        middle = (first + last) // 2
        links[node, 0], links[node, 1] = used, used + 1
        stack[top, 0], stack[top, 1], stack[top, 2] = used, first, middle
        stack[top + 1, 0], stack[top + 1, 1], stack[top + 1, 2] = used + 1, middle, last
        top, used = top + 2, used + 2
    return nodes[:used], links[:used], order


@njit(cache=True, inline="always")
def hit_span(p: Any, shape: int, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float) -> Any:
    """Entry and exit distance of a ray (in units of the direction's length) through one primitive; (1e30, -1e30) if missed."""
    rx, ry, rz = ox - p[0], oy - p[1], oz - p[2]
    lx, ly = p[6] * rx + p[7] * ry, p[6] * ry - p[7] * rx
    ux, uy = p[6] * dx + p[7] * dy, p[6] * dy - p[7] * dx
    if shape == 2:
        sx, sy, sz = lx / p[3], ly / p[4], rz / p[5]
        vx, vy, vz = ux / p[3], uy / p[4], dz / p[5]
        a = vx * vx + vy * vy + vz * vz
        b = sx * vx + sy * vy + sz * vz
        c = sx * sx + sy * sy + sz * sz - 1.0
        disc = b * b - a * c
        if disc <= 0.0:
            return _FAR, -_FAR
        root = math.sqrt(disc)
        return (-b - root) / a, (-b + root) / a
    t0, t1 = -_FAR, _FAR
    if shape == 0:
        if abs(ux) < 1e-12:
            if abs(lx) > p[3]:
                return _FAR, -_FAR
        else:
            inv = 1.0 / ux
            a, b = (-p[3] - lx) * inv, (p[3] - lx) * inv
            t0, t1 = max(t0, min(a, b)), min(t1, max(a, b))
        if abs(uy) < 1e-12:
            if abs(ly) > p[4]:
                return _FAR, -_FAR
        else:
            inv = 1.0 / uy
            a, b = (-p[4] - ly) * inv, (p[4] - ly) * inv
            t0, t1 = max(t0, min(a, b)), min(t1, max(a, b))
    else:
        a = ux * ux + uy * uy
        c = lx * lx + ly * ly - p[3] * p[3]
        if a < 1e-14:
            if c > 0.0:
                return _FAR, -_FAR
        else:
            b = lx * ux + ly * uy
            disc = b * b - a * c
            if disc <= 0.0:
                return _FAR, -_FAR
            root = math.sqrt(disc)
            t0, t1 = (-b - root) / a, (-b + root) / a
    if abs(dz) < 1e-12:
        if abs(rz) > p[5]:
            return _FAR, -_FAR
    else:
        inv = 1.0 / dz
        a, b = (-p[5] - rz) * inv, (p[5] - rz) * inv
        t0, t1 = max(t0, min(a, b)), min(t1, max(a, b))
    if t0 >= t1:
        return _FAR, -_FAR
    return t0, t1


@njit(cache=True, inline="always")
def surface_normal(p: Any, shape: int, x: float, y: float, z: float) -> Any:
    """Outward unit normal (3 numbers, same frame as the primitive) at a point on or near the surface."""
    rx, ry, rz = x - p[0], y - p[1], z - p[2]
    lx, ly = p[6] * rx + p[7] * ry, p[6] * ry - p[7] * rx
    nx, ny, nz = 0.0, 0.0, 0.0
    if shape == 2:
        nx, ny, nz = lx / (p[3] * p[3]), ly / (p[4] * p[4]), rz / (p[5] * p[5])
    elif shape == 1:
        if p[5] - abs(rz) < p[3] - math.hypot(lx, ly):
            nz = 1.0 if rz > 0 else -1.0
        else:
            nx, ny = lx, ly
    else:
        gx, gy, gz = p[3] - abs(lx), p[4] - abs(ly), p[5] - abs(rz)
        if gx <= gy and gx <= gz:
            nx = 1.0 if lx > 0 else -1.0
        elif gy <= gz:
            ny = 1.0 if ly > 0 else -1.0
        else:
            nz = 1.0 if rz > 0 else -1.0
    norm = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12
    nx, ny, nz = nx / norm, ny / norm, nz / norm
    return p[6] * nx - p[7] * ny, p[7] * nx + p[6] * ny, nz


@njit(cache=True)
def _candidates(
    prims: Any, nodes: Any, links: Any, order: Any, ray: Any, spread: float, reach: float, out: Any, near: Any
) -> int:
    """Primitives whose circle meets the wedge of half angle ``spread`` about the 2D ray (ox, oy, ux, uy); nearest first."""
    ox, oy, ux, uy = ray
    stack = np.empty(_STACK, np.int64)
    stack[0] = 0
    top, count = 1, 0
    while top > 0:
        top -= 1
        node = stack[top]
        x, y = nodes[node, 0] - ox, nodes[node, 1] - oy
        radius, along, across = nodes[node, 2], x * ux + y * uy, abs(x * uy - y * ux)
        if along < -radius or along - radius > reach or across > radius + spread * max(along + radius, 0.0):
            continue
        if links[node, 0] >= 0:
            stack[top], stack[top + 1] = links[node, 0], links[node, 1]
            top += 2
            continue
        first = -1 - links[node, 0]
        for k in range(first, first + links[node, 1]):
            index = order[k]
            p = prims[index]
            x, y = p[0] - ox, p[1] - oy
            radius = p[13] + math.hypot(p[8], p[9]) * 0.06
            along, across = x * ux + y * uy, abs(x * uy - y * ux)
            if along < -radius or along - radius > reach or across > radius + spread * max(along + radius, 0.0):
                continue
            if count < _MAX_CANDIDATES:
                low, at = along - radius, count
                while at > 0 and near[at - 1] > low:
                    near[at], out[at] = near[at - 1], out[at - 1]
                    at -= 1
                near[at], out[at] = low, index
                count += 1
    return count


@njit(cache=True)
def first_hits(
    prims: Any, kinds: Any, nodes: Any, links: Any, order: Any, origins: Any, directions: Any, reach_m: float
) -> Any:
    """Nearest primitive along each ray at the reference instant; foliage is ignored.

    Args:
        origins (R, 3), directions (R, 3): unit directions, same frame as the primitives.

    Returns:
        distance (R,) f64 metres (inf: nothing within ``reach_m``), primitive (R,) i64 (-1: nothing). No ground here.
    """
    count = origins.shape[0]
    distance, primitive = np.full(count, np.inf), np.full(count, -1, np.int64)
    found, near = np.empty(_MAX_CANDIDATES, np.int64), np.empty(_MAX_CANDIDATES)
    for r in range(count):
        ox, oy, oz = origins[r, 0], origins[r, 1], origins[r, 2]
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        flat = math.hypot(dx, dy) + 1e-12
        total = _candidates(prims, nodes, links, order, (ox, oy, dx / flat, dy / flat), 1e-6, reach_m, found, near)
        best = reach_m
        for k in range(total):
            if near[k] > best * flat:
                break
            p = prims[found[k]]
            if p[10] > 0.0:
                continue
            t0, _ = hit_span(p, kinds[found[k], 0], ox, oy, oz, dx, dy, dz)
            if 0.0 < t0 < best:
                best = t0
                distance[r], primitive[r] = t0, found[k]
    return distance, primitive


@njit(cache=True)
def cast_columns(
    prims: Any, kinds: Any, nodes: Any, links: Any, order: Any, origins: Any, rotations: Any,
    azimuth_rad: Any, elevation_rad: Any, dt_s: Any, own_m: Any, reach_m: float, seed: int,
) -> Any:  # fmt: skip
    """One turn of a spinning LiDAR: every column has its own origin, rotation and instant; primitives move linearly.

    Args:
        origins (C, 3), rotations (C, 3, 3): sensor pose in the primitives' frame at each column; dt_s (C,) seconds relative to
            the instant of ``prims``; azimuth_rad (C,) and elevation_rad (K,) in the sensor frame (x right, y forward, z up).
        own_m (C, K): distance to the own car along each ray (inf: none). The ground is the plane z = 0.

    Returns:
        distance (C, K) f64 (inf: nothing), primitive (C, K) i64 (-1 ground, -3 own car, -4 nothing), cosine (C, K) f64 of the
        angle of incidence, direction (C, K, 3) f64 in the primitives' frame.
    """
    columns, rings = azimuth_rad.shape[0], elevation_rad.shape[0]
    distance, primitive = np.full((columns, rings), np.inf), np.full((columns, rings), NOTHING, np.int64)
    cosine, direction = np.ones((columns, rings)), np.empty((columns, rings, 3))
    found, near = np.empty(_MAX_CANDIDATES, np.int64), np.empty(_MAX_CANDIDATES)
    sine, cos_el = np.sin(elevation_rad), np.cos(elevation_rad)
    for c in range(columns):
        rot = rotations[c]
        ca, sa = math.cos(azimuth_rad[c]), math.sin(azimuth_rad[c])
        ux, uy = rot[0, 0] * ca + rot[0, 1] * sa, rot[1, 0] * ca + rot[1, 1] * sa
        norm = math.hypot(ux, uy)
        ox, oy, oz = origins[c, 0], origins[c, 1], origins[c, 2]
        # A tilted sensor's column is not a vertical plane: widen the wedge by the tilt times the steepest beam.
        spread = (abs(rot[0, 2]) + abs(rot[1, 2])) * 0.65 + 1e-4
        total = _candidates(prims, nodes, links, order, (ox, oy, ux / norm, uy / norm), spread, reach_m, found, near)
        for k in range(rings):
            x, y, z = ca * cos_el[k], sa * cos_el[k], sine[k]
            dx = rot[0, 0] * x + rot[0, 1] * y + rot[0, 2] * z
            dy = rot[1, 0] * x + rot[1, 1] * y + rot[1, 2] * z
            dz = rot[2, 0] * x + rot[2, 1] * y + rot[2, 2] * z
            direction[c, k, 0], direction[c, k, 1], direction[c, k, 2] = dx, dy, dz
            if own_m[c, k] < reach_m:
                distance[c, k], primitive[c, k] = own_m[c, k], OWN_CAR
                continue
            best, which = reach_m, NOTHING
            if dz < -1e-6 and -oz / dz < best:
                best, which = -oz / dz, GROUND
            flat = math.hypot(dx, dy)
            for j in range(total):
                if near[j] > best * flat:
                    break
                index = found[j]
                p = prims[index]
                # Same as moving the primitive: shift the ray back by the primitive's own motion.
                sx, sy = ox - p[8] * dt_s[c], oy - p[9] * dt_s[c]
                t0, t1 = hit_span(p, kinds[index, 0], sx, sy, oz, dx, dy, dz)
                if t0 >= best or t1 <= 0.0:
                    continue
                if p[10] > 0.0:
                    u = hash_uniform(seed + index * 7919, c * 64 + k)
                    t0 = max(t0, 0.0) - math.log(1.0 - u) / p[10]
                    if t0 >= t1 or t0 >= best:
                        continue
                elif t0 <= 0.0:
                    continue
                best, which = t0, index
            if which == NOTHING:
                continue
            distance[c, k], primitive[c, k] = best, which
            if which == GROUND:
                cosine[c, k] = -dz
            elif which >= 0 and prims[which, 10] == 0.0:
                p = prims[which]
                hx, hy = ox - p[8] * dt_s[c] + dx * best, oy - p[9] * dt_s[c] + dy * best
                nx, ny, nz = surface_normal(p, kinds[which, 0], hx, hy, oz + dz * best)
                cosine[c, k] = abs(nx * dx + ny * dy + nz * dz)
    return distance, primitive, cosine, direction
