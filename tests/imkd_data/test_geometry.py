"""Poses, cameras and grids against independent references: pyquaternion, slow Python, hand values."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from pyquaternion import Quaternion

from imkd_data.errors import FrameMismatchError, RecipeError
from imkd_data.geometry import (
    BevGrid,
    Camera,
    Pose,
    quaternion_from_rotation,
    rotation_from_quaternion,
    rotation_from_yaw,
)

RNG = np.random.default_rng(0)


def random_pose(dst: str, src: str) -> Pose:
    return Pose.from_quaternion(dst, src, RNG.normal(size=4), RNG.normal(size=3) * 10)


def test_rotation_equals_pyquaternion() -> None:
    for _ in range(50):
        q = RNG.normal(size=4)
        assert_allclose(rotation_from_quaternion(q), Quaternion(q).normalised.rotation_matrix, atol=1e-14)


@pytest.mark.parametrize("q", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (-0.5, 0.5, -0.5, 0.5)])
def test_quaternion_round_trip_at_the_corners(q: tuple[float, ...]) -> None:
    rotation = rotation_from_quaternion(q)
    assert_allclose(rotation_from_quaternion(quaternion_from_rotation(rotation)), rotation, atol=1e-15)


def test_quaternion_round_trip_random() -> None:
    for _ in range(200):
        q = RNG.normal(size=4)
        q *= math.copysign(1 / np.linalg.norm(q), q[0])
        assert_allclose(quaternion_from_rotation(rotation_from_quaternion(q)), q, atol=1e-12)


def test_pose_chain_and_inverse() -> None:
    global_from_ego, ego_from_lidar = random_pose("global", "ego"), random_pose("ego", "lidar")
    xyz = RNG.normal(size=(7, 3))
    chained = global_from_ego @ ego_from_lidar
    assert (chained.dst, chained.src) == ("global", "lidar")
    assert_allclose(chained.points(xyz), global_from_ego.points(ego_from_lidar.points(xyz)), atol=1e-12)
    assert_allclose(chained.inverse().points(chained.points(xyz)), xyz, atol=1e-12)
    assert_allclose(chained.matrix() @ chained.inverse().matrix(), np.eye(4), atol=1e-12)
    assert_allclose(Pose.from_matrix34("global", "lidar", chained.matrix34()).matrix(), chained.matrix(), atol=0)


def test_vectors_are_not_translated() -> None:
    pose = Pose(dst="a", src="b", rotation=rotation_from_yaw(math.pi / 2), translation_m=np.array([5.0, 6.0, 7.0]))
    assert_allclose(pose.vectors([[1.0, 0.0, 0.0]]), [[0.0, 1.0, 0.0]], atol=1e-15)
    assert_allclose(pose.points([[1.0, 0.0, 0.0]]), [[5.0, 7.0, 7.0]], atol=1e-15)


def test_a_broken_chain_is_refused() -> None:
    with pytest.raises(FrameMismatchError, match="ego@5"):
        _ = random_pose("global", "ego") @ random_pose("ego@5", "lidar")


def test_values_are_frozen_and_travel() -> None:
    pose = random_pose("a", "b")
    with pytest.raises(ValueError, match="read-only"):
        pose.rotation[0, 0] = 2.0
    with pytest.raises(AttributeError):
        pose.dst = "c"  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(pose))
    assert again.dst == "a" and np.array_equal(again.rotation, pose.rotation)


def a_camera() -> Camera:
    k = np.array([[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]])
    return Camera(
        name="C", image_from_camera=k, ego_from_camera=random_pose("ego", "C"), width_px=1600, height_px=900, timestamp_us=0
    )


def test_resize_moves_pixel_edges_not_centres() -> None:
    camera = a_camera()
    xyz = np.array([[1.0, 0.5, 10.0], [-3.0, 0.2, 20.0]])
    uv, depth = camera.project(xyz)
    small, depth_small = camera.resized(800, 300).project(xyz)
    # The left edge of the image, u = -0.5, stays at -0.5.
    assert_allclose(small[:, 0] + 0.5, (uv[:, 0] + 0.5) / 2)
    assert_allclose(small[:, 1] + 0.5, (uv[:, 1] + 0.5) / 3)
    assert_allclose(depth, depth_small)


def test_crop_and_flip_match_an_image_of_numbers() -> None:
    """A pixel seen at (u, v) holds the same number after cropping and flipping camera and image alike."""
    camera = a_camera()
    image = np.arange(900 * 1600).reshape(900, 1600)
    u, v = 700, 500
    xyz = np.linalg.inv(camera.image_from_camera) @ np.array([u, v, 1.0]) * 12.0
    changed = camera.cropped(300, 200, 640, 400).flipped()
    (u2, v2), _ = (a[0] for a in changed.project(xyz[None]))
    assert image[200:600, 300:940][:, ::-1][round(v2), round(u2)] == image[v, u]


def test_points_behind_the_camera_have_no_pixel() -> None:
    uv, depth = a_camera().project(np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))
    assert np.isnan(uv).all() and (depth <= 0).all()


GRID = BevGrid(x_min_m=-7.2, y_min_m=3.4, cell_m=0.2, nx=40, ny=24)


def test_cells_at_edges() -> None:
    xy = np.array([[-7.2, 3.4], [-7.2001, 3.4], [0.7999, 8.1999], [0.8, 8.0], [0.7, 8.2], [0.0, 4.0], [-0.0001, 3.9999]])
    row, column, inside = GRID.cells(xy)
    assert inside.tolist() == [True, False, True, False, False, True, True]
    assert (row[0], column[0]) == (0, 0) and column[1] == -1  # floor, never truncation towards cell 0
    assert (row[2], column[2]) == (23, 39)
    assert (row[5], column[5]) == (3, 36) and (row[6], column[6]) == (2, 35)


@settings(max_examples=200, deadline=None)
@given(st.floats(-60, 60), st.floats(-60, 60), st.sampled_from([2, 4, 8]))
def test_pooling_commutes_with_cells(x: float, y: float, k: int) -> None:
    """The coarse cell of a point is its fine cell divided by k: the rule behind exact pooling."""
    row, column, inside = GRID.cells(np.array([[x, y]]))
    row_k, column_k, inside_k = GRID.coarser(k).cells(np.array([[x, y]]))
    assert inside == inside_k and row_k == row // k and column_k == column // k


def test_centres_lie_in_their_cells() -> None:
    centres = GRID.centres()
    assert centres.shape == (24, 40, 2)
    row, column, inside = GRID.cells(centres.reshape(-1, 2))
    assert inside.all()
    assert np.array_equal(row.reshape(24, 40), np.arange(24)[:, None].repeat(40, 1))
    assert np.array_equal(column.reshape(24, 40), np.arange(40)[None].repeat(24, 0))


@pytest.mark.parametrize("bad", [{"cell_m": 0.12345}, {"x_min_m": 0.0001}, {"nx": 0}, {"cell_m": -0.2}])
def test_grids_that_cannot_pool_exactly_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        BevGrid(**{**GRID.as_dict(), **bad})  # type: ignore[arg-type]


def test_coarser_needs_a_divisor() -> None:
    with pytest.raises(RecipeError, match="pool by 16"):
        GRID.coarser(16)
