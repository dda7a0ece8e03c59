"""Each kernel against a slow NumPy twin, on grids that are neither square nor centred, with points on edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imkd_data.geometry import BevGrid, rotation_from_yaw
from imkd_data.kernels.boxes import points_in_boxes
from imkd_data.kernels.project import order_by_ring, project
from imkd_data.kernels.quantise import quantise
from imkd_data.kernels.radar import radar_codes
from imkd_data.kernels.rasterize import add_sweep, pool_view, unpack_planes
from imkd_data.kernels.scan import KINDS, pcd_columns, split_scan
from tests.imkd_data.readers.tiny_tree import tilted

GRID = BevGrid(x_min_m=-6.4, y_min_m=1.6, cell_m=0.2, nx=48, ny=32)
OWN_M = (-1.0, 2.0, 2.0, 3.1, -0.5, 1.5)
Z_M = (-1.5, 4.0)


def mm(*values: float) -> np.ndarray:
    return np.array([round(1000 * v) for v in values])


def planes(grid: BevGrid, trace: bool = True) -> tuple[np.ndarray, ...]:
    shape = grid.shape
    kinds = (np.uint32, np.uint16, np.uint8, np.uint8)
    return (
        *(np.zeros(shape, k) for k in kinds),
        np.zeros((3, *shape) if trace else (3, 0, 0), np.uint8),
        np.zeros(4, np.int64),
    )


def rasterise(grid: BevGrid, sweeps: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    cells, (provenance, dropped) = np.zeros(grid.shape, np.uint64), planes(grid)[4:]
    grid_mm = np.array([grid.x_min_mm, grid.y_min_mm, grid.cell_mm])
    for i, (xyz, intensity, rotation, translation) in enumerate(sweeps):
        rows = np.ascontiguousarray(xyz.T)
        add_sweep(rows, intensity, rotation, translation, grid_mm, mm(*Z_M), mm(*OWN_M), i, cells, provenance, dropped)
    return *unpack_planes(cells), provenance, dropped


def rasterise_slowly(
    grid: BevGrid, sweeps: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, ...]:
    """Point by point, Python integers, the rules as sentences."""
    total, count, strongest, z_code, provenance, dropped = planes(grid)
    for number, (xyz, intensity, r, t) in enumerate(sweeps):
        for p, value in zip(xyz.astype(np.float64), intensity, strict=True):
            ego = [r[k, 0] * p[0] + r[k, 1] * p[1] + r[k, 2] * p[2] + t[k] for k in range(3)]
            x, y, z = (int(np.floor(1000.0 * v)) for v in ego)
            row, column, inside = grid.cells(np.array([ego[:2]]))
            if not inside[0]:
                dropped[1] += 1
                continue
            own = mm(*OWN_M)
            if own[0] <= x < own[1] and own[2] <= y < own[3] and own[4] <= z < own[5]:
                dropped[0] += 1
                continue
            low, span = mm(*Z_M)
            if not low <= z < low + span:
                dropped[2] += 1
                continue
            code, v, at = (z - low) * 255 // span, int(value), (row[0], column[0])
            better = (v, code) > (int(strongest[at]), int(z_code[at])) or count[at] == 0
            total[at] += v
            count[at] += 1
            if better:
                strongest[at], z_code[at] = v, code
                rest = (x - grid.x_min_mm) % grid.cell_mm, (y - grid.y_min_mm) % grid.cell_mm
                provenance[(slice(None), *at)] = (rest[0] * 256 // grid.cell_mm, rest[1] * 256 // grid.cell_mm, number)
    return total, count, strongest, z_code, provenance, dropped


def cloud(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    xyz = rng.uniform([-9, -3, -3], [6, 12, 4], (n, 3))
    xyz[::3] = np.round(xyz[::3] * 5) / 5  # exactly on cell edges
    xyz[0] = (3.3, 5.1, 0.4)
    xyz[1::7] = xyz[0]  # many returns in one cell
    rotation = tilted(0.2 * seed, 0.01, -0.02) if seed else np.eye(3)
    return xyz.astype(np.float32), rng.integers(0, 9, n).astype(np.float32), rotation, rng.normal(0, 0.3 * bool(seed), 3)


def test_planes_equal_the_slow_twin_cell_for_cell() -> None:
    sweeps = [cloud(seed, 700) for seed in range(4)]
    for name, ours, slow in zip(
        ("sum", "count", "max", "z", "provenance", "dropped"),
        rasterise(GRID, sweeps),
        rasterise_slowly(GRID, sweeps),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, slow, err_msg=name)
    assert rasterise(GRID, sweeps)[5][:3].min() > 0  # each reason to leave a point out occurs


@settings(max_examples=40, deadline=None)
@given(st.integers(-40, 40), st.integers(-40, 40), st.sampled_from([0.0, 1e-9, -1e-9]))
def test_edges_are_half_open(ix: int, iy: int, nudge: float) -> None:
    """A float64 position on an edge belongs to the upper cell; the last edge to none. Through the translation, so exactly."""
    position = np.array([ix * 0.2 + nudge, iy * 0.2 + nudge, 0.0])
    origin = np.zeros((1, 3), np.float32)
    out = rasterise(GRID, [(origin, np.ones(1, np.float32), np.eye(3), position)])
    row, column, inside = GRID.cells(position[None, :2])
    own = mm(*OWN_M)
    x, y = np.floor(1000 * position[:2])
    expected = np.zeros(GRID.shape)
    if inside[0] and not (own[0] <= x < own[1] and own[2] <= y < own[3]):
        expected[row[0], column[0]] = 1
    np.testing.assert_array_equal(out[1], expected)


def test_strongest_does_not_depend_on_order() -> None:
    xyz, intensity, rotation, translation = cloud(2, 900)
    back = slice(None, None, -1)
    one = rasterise(GRID, [(xyz, intensity, rotation, translation)])
    other = rasterise(GRID, [(xyz[back].copy(), intensity[back].copy(), rotation, translation)])
    for a, b in zip(one[:4], other[:4], strict=True):
        np.testing.assert_array_equal(a, b)


def test_planes_pool_exactly() -> None:
    """Pooling the fine planes by 2 and 4 equals rasterising on the coarse grid: sum, count, max, z of max."""
    sweeps = [cloud(seed, 800) for seed in range(3)]
    fine = rasterise(GRID, sweeps)
    for k in (2, 4):
        direct = rasterise(GRID.coarser(k), sweeps)
        view = pool_view(*fine[:4], k)
        total, count = direct[0].astype(np.int64), direct[1].astype(np.int64)
        mean = np.where(count > 0, (2 * total + count) // np.maximum(2 * count, 1), 0)
        np.testing.assert_array_equal(view, np.stack([mean, direct[2], np.minimum(count, 255), direct[3]]))
        assert view.shape == (4, 32 // k, 48 // k) and view[2].max() > 3


def test_empty_cell_differs_from_zero_intensity() -> None:
    xyz = np.array([[-6.3, 1.7, -1.5], [-6.3, 1.9, 2.0]], np.float32)
    total, count, strongest, z_code, _, _ = rasterise(GRID, [(xyz, np.zeros(2, np.float32), np.eye(3), np.zeros(3))])
    assert count[0, 0] == 1 and total[0, 0] == strongest[0, 0] == 0 and count[1, 0] == 1
    assert (z_code[0, 0], z_code[1, 0]) == (0, 3500 * 255 // 4000)


def test_mean_is_rounded() -> None:
    xyz = np.tile(np.array([[-6.3, 1.7, 0.0]], np.float32), (2, 1))
    out = rasterise(GRID, [(xyz, np.array([4, 5], np.float32), np.eye(3), np.zeros(3))])
    assert pool_view(*out[:4], 1)[:3, 0, 0].tolist() == [5, 5, 2]  # 4.5 -> 5


def test_count_saturates_in_the_view_only() -> None:
    xyz = np.tile(np.array([[-6.3, 1.7, 0.0]], np.float32), (300, 1))
    out = rasterise(GRID, [(xyz, np.full(300, 7, np.float32), np.eye(3), np.zeros(3))])
    assert out[1][0, 0] == 300 and out[0][0, 0] == 2100
    assert pool_view(*out[:4], 2)[:, 0, 0].tolist()[:3] == [7, 7, 255]


# ---- projection ---------------------------------------------------------------------------------------------------------


def test_order_by_ring_is_stable() -> None:
    ring = np.random.default_rng(0).integers(0, 7, 500).astype(np.float32)
    np.testing.assert_array_equal(order_by_ring(ring, 7), np.argsort(ring, kind="stable"))
    assert len(order_by_ring(np.zeros(0, np.float32), 1)) == 0


def camera_row(rotation: np.ndarray, translation: np.ndarray, k: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.concatenate([np.c_[rotation, translation].reshape(12), k[:2].reshape(6), [width, height]])


def project_one(
    xyz: np.ndarray, order: np.ndarray, camera: np.ndarray, intensity: np.ndarray | None = None, width: int | None = None
) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Points kept and beyond the codes, (3, W) codes, (W,) intensity of one camera."""
    out = np.zeros((1, 3, len(xyz) if width is None else width), np.uint16), np.zeros((1, width or len(xyz)), np.uint8)
    given = np.zeros(len(xyz), np.float32) if intensity is None else intensity
    ((n, far),) = project(np.ascontiguousarray(xyz.T), given, order, camera[None], *out).tolist()
    return n, far, out[0][0], out[1][0]


def test_projection_equals_a_slow_twin() -> None:
    rng = np.random.default_rng(1)
    xyz = rng.uniform(-20, 20, (3000, 3)).astype(np.float32)
    xyz[:200] *= 15  # some beyond the depth code
    k = np.array([[60.3, 0.4, 47.0], [0, 61.0, 25.5], [0, 0, 1]])
    rotation, translation = tilted(0.4, -1.5, 0.2), np.array([0.3, -0.2, 0.5])
    order = order_by_ring(rng.integers(0, 5, 3000).astype(np.float32), 5)
    intensity = rng.integers(0, 256, 3000).astype(np.float32)
    camera_from = camera_row(rotation, translation, k, 96, 48)
    n, far, out, values = project_one(xyz, order, camera_from, intensity)
    camera = xyz[order].astype(np.float64) @ rotation.T + translation
    uvw = camera @ k.T
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = uvw[:, 0] / uvw[:, 2], uvw[:, 1] / uvw[:, 2]
    seen = (camera[:, 2] > 0) & (u >= -0.5) & (u < 95.5) & (v >= -0.5) & (v < 47.5)
    depth = np.floor(camera[:, 2] * 256)
    keep = seen & (depth <= 65535)
    assert n == keep.sum() > 100 and far == (seen & ~keep).sum() > 0
    np.testing.assert_array_equal(values[:n], intensity[order][keep])
    short = project_one(xyz, order, camera_from, intensity, width=50)  # fewer slots: counted, and the first ones kept
    assert short[:2] == (n, far)
    np.testing.assert_array_equal(short[2], out[:, :50])
    np.testing.assert_array_equal(short[3], values[:50])
    codes = np.stack([np.floor((u + 0.5) * 32), np.floor((v + 0.5) * 32), depth])[:, keep]
    assert (out[:, :n] != codes).mean() < 1e-3  # BLAS sums in another order; a code may differ at an edge
    assert np.abs(out[:, :n] - codes).max() <= 1


@pytest.mark.parametrize(
    ("u", "kept", "code"), [(-0.5, True, 0), (-0.5001, False, 0), (0.0, True, 16), (95.49, True, 3071), (95.5, False, 0)]
)
def test_image_edges(u: float, kept: bool, code: int) -> None:
    """Pixel centres at integers: the picture reaches from -0.5 to width - 0.5."""
    k = np.array([[64.0, 0, 0], [0, 64.0, 0], [0, 0, 1]])
    origin = np.zeros((1, 3), np.float32)
    camera = camera_row(np.eye(3), np.array([u / 64, 0.25, 1.0]), k, 96, 48)
    n, _, out, _ = project_one(origin, np.zeros(1, np.int32), camera)
    assert n == kept
    if kept:
        assert out[:, 0].tolist() == [code, 528, 256]


@pytest.mark.parametrize("z", [0.0, -1.0])
def test_nothing_from_behind(z: float) -> None:
    at = np.array([[0.0, 0.0, z]], np.float32)
    camera = camera_row(np.eye(3), np.zeros(3), np.eye(3), 96, 48)
    assert project_one(at, np.zeros(1, np.int32), camera)[:2] == (0, 0)


# ---- point files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", range(5))
def test_split_scan_gives_columns_and_counts_what_is_odd(column: int) -> None:
    rng = np.random.default_rng(7)
    scan = np.c_[rng.uniform(-90, 90, (300, 3)), rng.integers(0, 256, 300), rng.integers(0, 32, 300)].astype(np.float32)
    out = np.empty((5, 300), np.float32)
    odd, other = split_scan(scan.reshape(-1), out, 1e4, 255.0, 31.0)
    assert (odd, other) == (0, int((scan[:, 3] != scan[0, 3]).sum())) and other > 200
    np.testing.assert_array_equal(out, scan.T)
    wrong = [np.nan, np.inf, -1e4] if column < 3 else [np.nan, -1.0, 0.5, (256.0, 32.0)[column - 3]]
    scan[10 : 10 + len(wrong), column] = wrong
    assert split_scan(scan.reshape(-1), out, 1e4, 255.0, 31.0)[0] == len(wrong)


def test_pcd_columns_equal_numpys_for_every_kind_of_number() -> None:
    rng = np.random.default_rng(8)
    dtype = np.dtype([(f"c{i}", f"<{kind}") for i, kind in enumerate(KINDS)])
    body = np.frombuffer(rng.bytes(dtype.itemsize * 400), np.uint8)
    table = body.view(dtype)
    names = [f"c{i}" for i in (5, 0, 7, 1, 3, 2, 6, 4)]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.stack([table[n].astype(np.float32) for n in names], axis=1)
    out = np.empty((400, len(names)), np.float32)
    offsets = np.array([dtype.fields[n][1] for n in names])  # type: ignore[index]
    broken = pcd_columns(body, dtype.itemsize, offsets, np.array([int(n[1:]) for n in names]), out)
    np.testing.assert_array_equal(out, expected)
    assert broken == (~np.isfinite(expected)).any(axis=1).sum() > 0


def test_radar_codes_equal_a_slow_twin() -> None:
    """Two scans with their own poses; positions and both velocity pairs moved, the rest as it is; one point does not fit."""
    rng = np.random.default_rng(9)
    names = ("x", "y", "z", "vx", "vy", "snr")
    features = rng.normal(0, 40, (30, 6)).astype(np.float32)
    features[4, 5] = 40_000
    poses = [(tilted(0.3, 0.1, -0.2), np.array([1.0, 2.0, 0.5])), (tilted(-2.0), np.array([-3.0, 0.0, 1.0]))]
    moves = np.array([np.c_[r, t].reshape(12) for r, t in poses])
    extra = np.array([[0, 0, 0.05], [1, 3, -0.02]])
    role, column = np.array([0, 1, 2, 3, 4, 5, 6, 6, 6]), np.array([0, 1, 2, 3, 4, 5, 0, 1, 2])
    steps = np.array([0.01, 0.01, 0.01, 1 / 256, 1 / 256, 1.0, 1, 1, 0.001])
    out = np.zeros((9, 30), np.int16)
    n = radar_codes(features[:, :3].copy(), features, np.array([0, 12, 30]), moves, extra, column, role, steps, out)
    slow = []
    for i, row in enumerate(features.astype(np.float64)):
        rotation, translation = poses[i >= 12]
        velocity = rotation[:2, :2] @ row[3:5]
        slow.append([*(rotation @ row[:3] + translation), *velocity, row[names.index("snr")], *extra[int(i >= 12)]] / steps)
    codes = np.floor(np.array(slow) + 0.5)
    assert n == 29
    np.testing.assert_array_equal(out[:, :n].T, np.delete(codes, 4, axis=0))


# ---- boxes --------------------------------------------------------------------------------------------------------------


def test_points_in_boxes_equal_a_slow_twin() -> None:
    rng = np.random.default_rng(3)
    xyz = rng.uniform(-5, 9, (2000, 3))
    centre, lwh, yaw = rng.uniform(-2, 6, (12, 3)), rng.uniform(0.5, 6, (12, 3)), rng.uniform(-4, 4, 12)
    expected = []
    for c, size, angle in zip(centre, lwh, yaw, strict=True):
        local = (xyz - c) @ rotation_from_yaw(angle)
        expected.append(int((np.abs(local) <= size / 2).all(axis=1).sum()))
    assert points_in_boxes(xyz, centre, lwh, yaw).tolist() == expected and max(expected) > 20


def test_faces_belong_to_the_box() -> None:
    faces = np.array([[1.5, 0, 0], [1.5, 0.5, 0.25], [1.5001, 0, 0], [0, -0.5, -0.25]], np.float32)
    one = points_in_boxes(faces, np.zeros((1, 3)), np.array([[3.0, 1.0, 0.5]]), np.zeros(1))
    assert one.tolist() == [3]
    assert len(points_in_boxes(faces, np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0))) == 0


# ---- steps --------------------------------------------------------------------------------------------------------------


def test_quantise_rounds_and_leaves_out_what_does_not_fit() -> None:
    rng = np.random.default_rng(5)
    xyz = rng.uniform(-400, 400, (500, 3)).astype(np.float32)
    rotation, translation = tilted(0.7, 0.1, -0.2), np.array([1.0, -2.0, 3.0])
    out, index = np.zeros((3, 500), np.int16), np.zeros(500, np.int32)
    n = quantise(xyz, rotation, translation, 100.0, out, index)
    exact = (xyz.astype(np.float64) @ rotation.T + translation) * 100
    kept = (np.abs(np.floor(exact + 0.5)) <= 32767).all(axis=1)
    assert 50 < n == kept.sum() < 450
    np.testing.assert_array_equal(index[:n], np.flatnonzero(kept))
    assert np.abs(out[:, :n].T - exact[kept]).max() <= 0.5 + 1e-6
