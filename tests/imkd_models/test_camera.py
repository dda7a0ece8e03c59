"""Frustum geometry against the Camera and BevGrid values of imkd_data; depth targets; the camera's parity options."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from batches import ODD_GRID, make_batch, small_student

from imkd_data.errors import RecipeError
from imkd_models.camera import (
    ImageEncoder,
    ViewTransform,
    bin_centres_m,
    build_backbone,
    depth_loss,
    depth_targets,
    feature_pixels,
    frustum,
    pool_views,
)
from imkd_models.config import MODEL_GRID


def cells_of(config, batch, slot=0):
    return frustum(batch.image_from_camera_BTV33[:, slot], batch.bev_from_camera_BTV44[:, slot], batch.bev_from_ego_B44, config)


def augmented(batch, yaw=0.3, scale=1.07, flip_y=True):
    """The batch after a BEV augmentation: cameras and the matrix move together."""
    c, s = math.cos(yaw), math.sin(yaw)
    move = torch.eye(4)
    move[:3, :3] = scale * torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    if flip_y:
        move[1] *= -1
    return dataclasses.replace(
        batch, bev_from_ego_B44=move.expand(len(batch), 4, 4), bev_from_camera_BTV44=move @ batch.bev_from_camera_BTV44
    ), move


@pytest.mark.parametrize("rows", ["top", "mean"])
def test_cells_equal_a_slow_walk_through_every_pixel(rows):
    config, batch = small_student(geometry_rows=rows), make_batch(batch=2)
    batch, _ = augmented(batch)
    got = cells_of(config, batch)
    h, w = (n // 16 for n in config.image_hw_px)
    for b in range(2):
        for view in (0, 4):
            k = batch.image_from_camera_BTV33[b, 0, view].double().numpy()
            pose = batch.bev_from_camera_BTV44[b, 0, view].double().numpy()
            for bin_index in range(config.depth_bins):
                d = config.depth_min_m + (bin_index + 0.5) * config.depth_step_m
                for column in range(w):
                    xyz = []
                    for row in range(h):
                        pixel = np.array([16 * column + 7.5, 16 * row + 7.5, 1.0])
                        xyz.append(pose[:3, :3] @ (np.linalg.inv(k) @ (pixel * d)) + pose[:3, 3])
                    xyz = np.array(xyz)
                    valid = (xyz[:, 2] > -5) & (xyz[:, 2] < 3)
                    n = b * 6 + view
                    assert got.valid_NDHW[n, bin_index, :, column].tolist() == valid.tolist()
                    placed = rows == "top" or valid.any()
                    place = xyz[0] if rows == "top" or not placed else xyz[valid].mean(0)
                    r, c, inside = ODD_GRID.cells(place[None, :2])
                    expected = (b * ODD_GRID.ny + r[0]) * ODD_GRID.nx + c[0] if inside[0] and placed else -1
                    assert int(got.cell_NDW[n, bin_index, column]) == expected


def test_pixels_and_bins_are_centres_unless_crn_edges_are_asked_for():
    config = small_student()
    u, v = feature_pixels(config, torch.device("cpu"))
    assert u[:3].tolist() == [7.5, 23.5, 39.5] and v[-1] == 55.5
    assert bin_centres_m(config, torch.device("cpu"))[:2].tolist() == [2.75, 4.25]
    edges = small_student(parity={"frustum:linspace_edges"})
    u, v = feature_pixels(edges, torch.device("cpu"))
    assert (u[0], u[-1], v[-1]) == (0, 95, 63) and bin_centres_m(edges, torch.device("cpu"))[0] == 2.0


def test_half_geometry_moves_cells_a_little_and_only_near_borders():
    batch, _ = augmented(make_batch())
    far = {"depth_bins": 100, "depth_step_m": 0.5, "grid": MODEL_GRID}
    right = cells_of(small_student(**far), batch)
    half = cells_of(small_student(parity={"geometry:top_row_half"}, **far), batch)
    changed = (right.cell_NDW != half.cell_NDW).float().mean()
    assert 0 < changed < 0.1 and (right.valid_NDHW == half.valid_NDHW).float().mean() > 0.99


def test_truncation_pulls_cells_below_the_edge_in():
    batch = make_batch()
    right, folded = cells_of(small_student(), batch), cells_of(small_student(parity={"cell_index:trunc"}), batch)
    more = (folded.cell_NDW >= 0) & (right.cell_NDW < 0)
    assert more.any() and torch.equal(right.cell_NDW[~more], folded.cell_NDW[~more])


def test_swapped_channels_equal_raw_bgr_with_rgb_statistics():
    torch.manual_seed(0)
    encoder = ImageEncoder(small_student(parity={"image_channels:swapped"})).eval()
    raw = torch.rand(1, 3, 64, 96) * 255
    rgb = (raw - encoder.channel_mean) / encoder.channel_std
    bgr = (raw.flip(1) - encoder.channel_mean) / encoder.channel_std
    swapped = encoder(rgb)
    encoder.swapped = False
    torch.testing.assert_close(swapped, encoder(bgr), atol=1e-4, rtol=1e-4)


def test_view_transform_equals_outer_product_then_sum_over_rows():
    torch.manual_seed(0)
    view = ViewTransform(4, 0, radar=True)
    seen = {}
    view.aggregate.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    context, depth = torch.randn(2, 4, 3, 5), torch.rand(2, 6, 3, 5).softmax(1)
    valid, occupancy = torch.rand(2, 6, 3, 5) > 0.3, torch.rand(2, 1, 6, 5)
    view(context, depth, valid, occupancy)
    outer = context[:, :, None] * depth[:, None] * valid[:, None]
    collapsed = (context * valid.any(1)[:, None]).sum(2)
    torch.testing.assert_close(seen["x"][:, :4], outer.sum(3))
    torch.testing.assert_close(seen["x"][:, 4:], collapsed[:, :, None] * occupancy)


def test_pooled_views_are_means_of_what_falls_in_each_cell():
    config, batch = small_student(), make_batch()
    cells = cells_of(config, batch)
    plane = torch.randn(12, 3, config.depth_bins, 6)
    pooled = pool_views([plane], cells, ODD_GRID, 2, parity=frozenset())
    cell = int(cells.cell_NDW[cells.cell_NDW >= 0].mode().values)
    expected = plane.permute(0, 2, 3, 1)[cells.cell_NDW == cell].mean(0)
    b, row, column = cell // (24 * 32), cell // 32 % 24, cell % 32
    torch.testing.assert_close(pooled[b, :, row, column], expected)
    assert (pooled != 0).any(1).sum() == cells.cell_NDW[cells.cell_NDW >= 0].unique().numel()


def test_depth_target_is_the_nearest_return_of_a_block_in_half_open_bins():
    config = small_student()
    depth = torch.zeros(1, 1, 64, 96)
    depth[0, 0, 3, 5], depth[0, 0, 9, 2] = 9.0, 6.4  # one block: the nearer wins
    depth[0, 0, 16, 0] = 2.0 + 1.5 * 3  # exactly on the edge of bins 2 and 3
    depth[0, 0, 33, 20] = 1.9  # before the first bin
    depth[0, 0, 50, 90] = 2.0 + 1.5 * 12  # at the end of the last bin
    index, valid = depth_targets(depth, config)
    assert valid.nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    assert index[0, 0, 0, 0] == 2 and index[0, 0, 1, 0] == 3


def test_depth_loss_is_zero_for_certainty_and_without_returns():
    config = small_student()
    depth = torch.zeros(1, 1, 64, 96)
    p = torch.full((1, 1, 12, 4, 6), 1 / 12, requires_grad=True)
    empty = depth_loss(p, depth, config)
    empty.backward()
    assert float(empty.detach()) == 0 and p.grad.abs().sum() == 0
    depth[0, 0, 3, 5] = 6.4
    sure = torch.nn.functional.one_hot(torch.full((1, 1, 4, 6), 2), 12).movedim(-1, 2).float()
    assert float(depth_loss(sure, depth, config)) < 1e-6
    expected = -math.log(1 / 12) - 11 * math.log(11 / 12)
    assert float(depth_loss(p.detach(), depth, config)) == pytest.approx(expected, rel=1e-5)


def test_unknown_backbone_is_refused():
    with pytest.raises(RecipeError, match="backbone"):
        build_backbone("vgg", None)
