"""Intensity maps on other grids, frames and in images, against the points themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from imkd_data.errors import UsageError
from imkd_data.geometry import BevGrid
from imkd_data.views.intensity import intensity_map

STORED = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=0.2, nx=512, ny=512)
PART = BevGrid(x_min_m=-12.0, y_min_m=4.0, cell_m=0.8, nx=50, ny=20)  # off-centre, not square, aligned


def kept_points(cache: Any, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Points as the planes took them, from the stored points (1 cm)."""
    points, recipe = cache.decode("lidar_points", row), cache.recipe
    x, y, z = points["xyz_m"].T
    x0, x1, y0, y1, z0, z1 = recipe.own_car_box_m
    own = (x >= x0) & (x < x1) & (y >= y0) & (y < y1) & (z >= z0) & (z < z1)
    keep = ~own & (z >= recipe.z_min_m) & (z < recipe.z_min_m + recipe.z_span_m)
    return points["xyz_m"][keep].astype(np.float64), points["intensity"][keep]


def test_stored_grid_is_the_planes(cache: Any, row: int) -> None:
    for reduce, field in (("sum", "lidar_bev_sum"), ("count", "lidar_bev_count"), ("max", "lidar_bev_max")):
        found = cache.intensity(row, reduce=reduce)
        assert found.exact and found.note == "" and found.grid == STORED
        np.testing.assert_array_equal(found.values, cache.read(field, row))
    count, total = cache.read("lidar_bev_count", row), cache.read("lidar_bev_sum", row)
    np.testing.assert_allclose(cache.intensity(row, reduce="mean").values, total / np.maximum(count, 1), rtol=1e-6)
    z = cache.intensity(row, reduce="z").values
    np.testing.assert_array_equal(z[count > 0], cache.decode("lidar_bev_z_of_max", row)[count > 0])
    assert not z[count == 0].any()


@pytest.mark.parametrize("k", [2, 4])
def test_pooled_grid_is_exact(cache: Any, row: int, k: int) -> None:
    grid = STORED.coarser(k)
    for reduce, field, pool in (
        ("sum", "lidar_bev_sum", np.sum),
        ("count", "lidar_bev_count", np.sum),
        ("max", "lidar_bev_max", np.max),
    ):
        found = cache.intensity(row, grid, reduce)
        fine = cache.read(field, row).astype(np.int64).reshape(512 // k, k, 512 // k, k)
        assert found.exact
        np.testing.assert_array_equal(found.values, pool(fine, axis=(1, 3)))
    view = cache.decode("lidar_intensity", row)
    if k == 4:
        np.testing.assert_allclose(cache.intensity(row, grid, "max").values / 255, view[1], atol=1e-6)
        np.testing.assert_allclose(cache.intensity(row, grid, "z").values, view[3], atol=1e-5)
        assert np.abs(cache.intensity(row, grid, "mean").values / 255 - view[0]).max() <= 0.5 / 255 + 1e-6


def test_part_of_the_grid_equals_the_points(cache: Any, row: int) -> None:
    xyz, intensity = kept_points(cache, row)
    r, c, inside = PART.cells(xyz[:, :2])
    count, total = np.zeros(PART.shape), np.zeros(PART.shape)
    np.add.at(count, (r[inside], c[inside]), 1)
    np.add.at(total, (r[inside], c[inside]), intensity[inside])
    found = cache.intensity(row, PART, "count")
    assert found.exact and found.values.shape == (20, 50) and count.sum() > 1000
    assert np.abs(found.values - count).sum() <= 0.06 * count.sum()  # stored points are rounded to 1 cm: cells may differ
    assert abs(cache.intensity(row, PART, "sum").values.sum() / total.sum() - 1) < 0.02


def test_grids_that_do_not_pool_say_so(cache: Any, row: int) -> None:
    skew = BevGrid(x_min_m=-10.1, y_min_m=3.0, cell_m=0.7, nx=40, ny=30)
    found = cache.intensity(row, skew, "count")
    assert not found.exact and "edges" in found.note
    assert abs(found.values.sum() / cache.intensity(row, reduce="count").values.sum()) < 1
    beyond = BevGrid(x_min_m=-60.0, y_min_m=-60.0, cell_m=0.8, nx=150, ny=150)
    found = cache.intensity(row, beyond, "sum")
    assert not found.exact and "beyond" in found.note
    assert found.values.sum() == cache.intensity(row, reduce="sum").values.sum()


def test_finer_grid_looks_the_stored_cell_up(cache: Any, row: int) -> None:
    fine = BevGrid(x_min_m=-6.4, y_min_m=2.0, cell_m=0.1, nx=64, ny=80)
    found = cache.intensity(row, fine, "max")
    assert not found.exact
    c = round((-6.4 + 51.2) / 0.2)
    r = round((2.0 + 51.2) / 0.2)
    block = cache.read("lidar_bev_max", row)[r : r + 40, c : c + 32]
    np.testing.assert_array_equal(found.values, block.repeat(2, 0).repeat(2, 1))
    total = cache.intensity(row, fine, "sum").values.sum()
    assert total == pytest.approx(cache.read("lidar_bev_sum", row)[r : r + 40, c : c + 32].sum())


def test_lidar_frame_is_turned(cache: Any, row: int) -> None:
    """In the LiDAR's axes (turned by a right angle here) the same returns, by its own points."""
    grid = BevGrid(x_min_m=-40.0, y_min_m=-24.0, cell_m=0.8, nx=100, ny=60)
    found = cache.intensity(row, grid, "count", frame="lidar")
    assert not found.exact and "ego" in found.note and found.frame == "lidar"
    xyz, _ = kept_points(cache, row)
    pose = cache.decode("sample_pose", row)["ego_from_reference"]
    lidar = (xyz - pose[:, 3]) @ pose[:, :3]
    r, c, inside = grid.cells(lidar[:, :2])
    count = np.zeros(grid.shape)
    np.add.at(count, (r[inside], c[inside]), 1)
    assert abs(found.values.sum() / count.sum() - 1) < 0.02
    assert np.corrcoef(found.values.ravel(), count.ravel())[0, 1] > 0.9
    ego = cache.intensity(row, grid, "count").values
    assert np.corrcoef(ego.ravel(), count.ravel())[0, 1] < 0.8


def test_image_intensity_is_the_nearest_point(cache: Any, row: int) -> None:
    hw = (45, 80)
    intensity, depth = cache.intensity_image(row, "CAM_BACK_LEFT", hw)
    i = cache.suite.cameras.index("CAM_BACK_LEFT")
    uvd = cache.decode("depth_points", row)[i]
    values = cache.read("depth_intensity", row)[i]
    expected = np.full((*hw, 2), np.inf)
    height, width = cache.suite.image_hw_px
    for (u, v, d), value in zip(uvd, values[: len(uvd)], strict=True):
        at = int((v + 0.5) * hw[0] / height), int((u + 0.5) * hw[1] / width)
        if d < expected[at][1]:
            expected[at] = value, d
    empty = np.isinf(expected[..., 1])
    np.testing.assert_array_equal(depth == 0, empty)
    np.testing.assert_array_equal(intensity[~empty], expected[..., 0][~empty])
    np.testing.assert_array_equal(depth[~empty], expected[..., 1][~empty].astype(np.float32))
    assert (~empty).sum() > 100 and intensity.dtype == np.float32


def test_maps_are_arrays_and_refuse_nonsense(cache: Any, row: int) -> None:
    assert np.asarray(cache.intensity(row, PART)).shape == (20, 50)
    for wrong in ({"reduce": "median"}, {"frame": "global"}):
        with pytest.raises(UsageError, match="unknown reduce or frame"):
            intensity_map(cache, row, **wrong)
    with pytest.raises(UsageError, match="no such camera"):
        cache.intensity_image(row, "CAM_TOP", (10, 10))
