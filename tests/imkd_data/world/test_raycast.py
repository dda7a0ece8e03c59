"""The ray caster against a slow twin that knows no hierarchy, no columns and no shortcuts."""

from __future__ import annotations

import numpy as np
import pytest

from imkd_data.geometry import rotation_from_yaw
from imkd_data.kernels import raycast, render

SHAPES = (raycast.BOX, raycast.CYLINDER, raycast.ELLIPSOID)


def random_primitives(rng: np.random.Generator, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    prims, kinds = np.zeros((count, raycast.PRIM_COLUMNS)), np.zeros((count, 3), np.int64)
    kinds[:, 0], kinds[:, 1] = rng.integers(0, 3, count), np.arange(count)
    prims[:, :2] = rng.uniform(-40, 40, (count, 2)) + np.array([100.0, -30.0])
    prims[:, 3:6] = rng.uniform(0.2, 3.0, (count, 3))
    round_ones = kinds[:, 0] == raycast.CYLINDER
    prims[round_ones, 4] = prims[round_ones, 3]
    prims[:, 2] = prims[:, 5] * rng.uniform(0.5, 1.5, count)
    yaw = rng.uniform(-np.pi, np.pi, count)
    prims[:, 6], prims[:, 7] = np.cos(yaw), np.sin(yaw)
    prims[:, 8:10] = rng.uniform(-20, 20, (count, 2)) * (rng.random(count) < 0.5)[:, None]
    prims[:, 13] = np.hypot(prims[:, 3], prims[:, 4])
    return prims, kinds


def slow_hit(p: np.ndarray, shape: int, origin: np.ndarray, direction: np.ndarray) -> float:
    """Distance to one primitive by plane and quadric equations in its own frame; inf if missed or begun inside."""
    turn = np.array([[p[6], p[7], 0], [-p[7], p[6], 0], [0, 0, 1]])
    o, d = turn @ (origin - p[:3]), turn @ direction
    inside, hits = [], []

    def test(t: float) -> None:
        x = o + t * d
        slack = 1e-9
        on_box = bool((np.abs(x) <= p[3:6] + slack).all())
        on_tube = abs(x[2]) <= p[5] + slack and np.hypot(x[0], x[1]) <= p[3] + slack
        if {0: on_box, 1: on_tube, 2: True}[shape] and t > 0:
            hits.append(t)

    if shape == 2:
        m = np.diag(1 / p[3:6] ** 2)
        roots = np.roots([d @ m @ d, 2 * o @ m @ d, o @ m @ o - 1])
        inside.append(o @ m @ o < 1)
        for root in roots[np.isreal(roots)].real if np.isreal(roots).all() else []:
            test(float(root))
    else:
        for axis in range(3) if shape == 0 else (2,):
            for side in (-1, 1):
                test(float((side * p[3 + axis] - o[axis]) / d[axis]))
        if shape == 1:
            roots = np.roots([d[:2] @ d[:2], 2 * o[:2] @ d[:2], o[:2] @ o[:2] - p[3] ** 2])
            for root in roots.real if np.isreal(roots).all() else []:
                test(float(root))
            inside.append(abs(o[2]) < p[5] and np.hypot(o[0], o[1]) < p[3])
        else:
            inside.append(bool((np.abs(o) < p[3:6]).all()))
    return min(hits) if hits and not inside[0] else np.inf


def test_columns_equal_the_slow_twin() -> None:
    rng = np.random.default_rng(5)
    prims, kinds = random_primitives(rng)
    columns, rings = 37, 5
    dt = np.linspace(-0.025, 0.025, columns)
    origins = np.array([96.0, -27.0, 1.9]) + np.outer(dt, [14.0, -6.0, 0.0])
    tilt = np.array([[1, 0, 0.02], [0, 1, -0.015], [-0.02, 0.015, 1]])
    tilt, _ = np.linalg.qr(tilt)
    tilt *= np.sign(np.diag(tilt))
    rotations = np.stack([rotation_from_yaw(0.3 * t) @ tilt for t in dt])
    azimuth, elevation = np.linspace(3.1, -3.1, columns), np.radians([-30.0, -9.0, -1.0, 4.0, 10.0])
    tree = raycast.build_tree(prims, 0.025)
    distance, which, cosine, direction = raycast.cast_columns(
        prims, kinds, *tree, origins, rotations, azimuth, elevation, dt, np.full((columns, rings), np.inf), 60.0, 1
    )
    actors = 0
    for c in range(columns):
        for k in range(rings):
            ray = np.array(
                [np.cos(azimuth[c]) * np.cos(elevation[k]), np.sin(azimuth[c]) * np.cos(elevation[k]), np.sin(elevation[k])]
            )
            ray = rotations[c] @ ray
            np.testing.assert_allclose(direction[c, k], ray, atol=1e-12)
            moved = prims.copy()
            moved[:, :2] += prims[:, 8:10] * dt[c]
            far = [slow_hit(p, kind[0], origins[c], ray) for p, kind in zip(moved, kinds, strict=True)]
            far.append(-origins[c, 2] / ray[2] if ray[2] < 0 else np.inf)
            best = int(np.argmin(far))
            if far[best] >= 60.0:
                assert which[c, k] == raycast.NOTHING
                continue
            assert which[c, k] == (raycast.GROUND if best == len(prims) else best)
            assert distance[c, k] == pytest.approx(far[best], abs=1e-8)
            assert 0.0 <= cosine[c, k] <= 1.0 + 1e-9
            actors += best < len(prims)
    assert actors > 50  # the test has hit things


def test_first_hits_equal_the_slow_twin_and_ignore_foliage() -> None:
    rng = np.random.default_rng(8)
    prims, kinds = random_primitives(rng)
    leaves = rng.random(len(prims)) < 0.2
    prims[leaves, 10] = 1.0
    origins = np.array([97.0, -33.0, 1.2]) + rng.normal(0, 1, (80, 3))
    directions = rng.normal(0, 1, (80, 3)) * (1, 1, 0.1)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    distance, which = raycast.first_hits(prims, kinds, *raycast.build_tree(prims, 0.0), origins, directions, 70.0)
    for k in range(80):
        far = [
            np.inf if leaf else slow_hit(p, s, origins[k], directions[k])
            for p, s, leaf in zip(prims, kinds[:, 0], leaves, strict=True)
        ]
        best = int(np.argmin(far))
        assert which[k] == (best if far[best] < 70.0 else -1)
        assert distance[k] == pytest.approx(far[best] if far[best] < 70.0 else np.inf)


def test_foliage_lets_some_rays_through() -> None:
    prims, kinds = np.zeros((1, raycast.PRIM_COLUMNS)), np.zeros((1, 3), np.int64)
    prims[0, [0, 2, 3, 4, 5, 6, 10, 13]] = 10.0, 2.0, 1.0, 3.0, 2.0, 1.0, 0.5, 3.2
    columns = 2000
    origin, rotation = np.tile([0.0, 0.0, 2.0], (columns, 1)), np.tile(np.eye(3), (columns, 1, 1))
    distance, which, _, _ = raycast.cast_columns(
        prims, kinds, *raycast.build_tree(prims, 0.0), origin, rotation, np.zeros(columns), np.array([0.01]), np.zeros(columns),
        np.full((columns, 1), np.inf), 50.0, 3,
    )  # fmt: skip
    hit = which[:, 0] == 0
    assert hit.mean() == pytest.approx(1 - np.exp(-0.5 * 2.0), abs=0.03)  # 2 m of leaves at 0.5 per metre
    assert distance[hit].min() >= 9.0 and distance[hit].max() <= 11.01


def test_own_car_hides_the_world() -> None:
    prims, kinds = random_primitives(np.random.default_rng(0), 3)
    own = np.full((1, 2), np.inf)
    own[0, 1] = 0.7
    distance, which, _, _ = raycast.cast_columns(
        prims, kinds, *raycast.build_tree(prims, 0.0), np.array([[0.0, 0.0, 1.8]]), np.eye(3)[None], np.zeros(1),
        np.radians([-20.0, -30.0]), np.zeros(1), own, 50.0, 0,
    )  # fmt: skip
    assert which[0].tolist() == [raycast.GROUND, raycast.OWN_CAR]
    assert distance[0, 1] == 0.7


def test_rendered_depth_equals_rays_through_the_pixels() -> None:
    rng = np.random.default_rng(4)
    prims, kinds = random_primitives(rng)
    prims[:, 8:10] = 0.0
    rotation = rotation_from_yaw(0.4) @ np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    origin, width, height = np.array([95.0, -31.0, 1.6]), 61, 34
    matrix = np.array([[40.0, 0, 28.3], [0, 41.0, 18.9], [0, 0, 1]])
    depth, which = render.render_depth(prims, kinds, rotation, origin, matrix, width, height, 100.0, 0)
    v, u = np.mgrid[:height, :width]
    rays = np.stack([(u - 28.3) / 40.0, (v - 18.9) / 41.0, np.ones_like(u)], axis=-1).reshape(-1, 3) @ rotation.T
    length = np.linalg.norm(rays, axis=1)
    start = np.tile(origin, (len(rays), 1))
    distance, expected = raycast.first_hits(prims, kinds, *raycast.build_tree(prims, 0.0), start, rays / length[:, None], 150.0)
    distance = distance / length
    ground = np.where(rays[:, 2] < 0, -origin[2] / np.where(rays[:, 2] < 0, rays[:, 2], -1.0), np.inf)
    nearer = ground < distance
    distance, expected = np.where(nearer, ground, distance), np.where(nearer, raycast.GROUND, expected)
    expected = np.where(np.isfinite(distance), expected, raycast.NOTHING)
    near = np.isfinite(distance) & (distance < 0.31)  # the near plane
    assert (which.ravel()[~near] == expected[~near]).mean() > 0.999
    same = ~near & (which.ravel() == expected) & np.isfinite(distance)
    np.testing.assert_allclose(depth.ravel()[same], distance[same], rtol=1e-5)
    assert (which >= 0).mean() > 0.1
