"""Masks, grids and elementwise terms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from distill_fakes import GRID, fake_batch, fake_head, generator, one_box, without_boxes

from imkd_data.errors import MismatchError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import BoxBatch
from imkd_models.distill import terms

ANGLES = [math.radians(a) for a in range(0, 180, 15)]


def _slow_mask(boxes: BoxBatch, grid: BevGrid, size: torch.Tensor) -> torch.Tensor:
    """One box and one cell at a time."""
    out = torch.zeros(len(boxes.valid_BM), grid.ny, grid.nx, dtype=torch.bool)
    for b, m in boxes.valid_BM.nonzero().tolist():
        x, y, yaw = *boxes.centre_m_BM3[b, m, :2].tolist(), float(boxes.yaw_rad_BM[b, m])
        l, w = size[b, m].tolist()
        for row in range(grid.ny):
            for column in range(grid.nx):
                px = grid.x_min_m + (column + 0.5) * grid.cell_m - x
                py = grid.y_min_m + (row + 0.5) * grid.cell_m - y
                a, c = math.cos(yaw) * px + math.sin(yaw) * py, math.cos(yaw) * py - math.sin(yaw) * px
                out[b, row, column] |= abs(a) <= l / 2 and abs(c) <= w / 2
        (row,), (column,), (inside,) = grid.cells([[x, y]])
        if inside:
            out[b, row, column] = True
    return out


def test_rotated_mask_equals_a_slow_loop() -> None:
    boxes = fake_batch(boxes=10).boxes
    size = boxes.size_lwh_m_BM3[..., :2]
    assert torch.equal(terms.rotated_mask(boxes, GRID), _slow_mask(boxes, GRID, size))


def test_mask_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = fake_batch(boxes=10).boxes
    whole, first = terms.rotated_mask(boxes, GRID), terms.first_box_map(boxes, GRID)
    monkeypatch.setattr(terms, "MAX_ELEMENTS", 1)
    assert torch.equal(whole, terms.rotated_mask(boxes, GRID))
    assert torch.equal(first, terms.first_box_map(boxes, GRID))


@pytest.mark.parametrize("yaw", ANGLES)
def test_mask_area_is_right_at_every_yaw(yaw: float) -> None:
    """Mean over sub-cell shifts of cells x cell area = length x width within 3 %; yaw + pi gives the same mask."""
    g, grid = generator(1), BevGrid(x_min_m=-3.0, y_min_m=2.0, cell_m=0.5, nx=40, ny=36)
    count = 400
    centre = torch.tensor([7.0, 11.0]) + torch.rand(1, count, 2, generator=g)
    boxes = BoxBatch(
        centre_m_BM3=torch.cat([centre, torch.zeros(1, count, 1)], -1).transpose(0, 1),
        size_lwh_m_BM3=torch.tensor([4.6, 2.0, 1.5]).expand(count, 1, 3),
        yaw_rad_BM=torch.full((count, 1), yaw),
        velocity_mps_BM2=torch.zeros(count, 1, 2),
        label_BM=torch.zeros(count, 1, dtype=torch.long),
        valid_BM=torch.ones(count, 1, dtype=torch.bool),
    )
    mask = terms.rotated_mask(boxes, grid)
    assert mask.sum((1, 2)).float().mean() * grid.cell_m**2 == pytest.approx(9.2, rel=0.03)
    turned = replace(boxes, yaw_rad_BM=boxes.yaw_rad_BM + math.pi)
    assert (terms.rotated_mask(turned, grid) != mask).float().mean() < 1e-4  # cells exactly on an edge


def test_small_objects_keep_their_centre_cell_and_edges_count() -> None:
    cone = one_box(GRID.x_min_m + 0.05, GRID.y_min_m + 0.05, 0.4, 0.4, 0.3)
    assert terms.rotated_mask(cone, GRID)[0].nonzero().tolist() == [[0, 0]]
    last = one_box(GRID.x_max_m - 0.01, GRID.y_max_m - 0.01, 0.4, 0.4, 0.3)
    assert terms.rotated_mask(last, GRID)[0].nonzero().tolist() == [[GRID.ny - 1, GRID.nx - 1]]
    outside = one_box(GRID.x_max_m + 0.01, GRID.y_max_m - 0.01, 0.4, 0.4, 0.3)
    assert not terms.rotated_mask(outside, GRID).any()
    border = one_box(GRID.x_min_m + 1.6, GRID.y_min_m + 0.8, 0.2, 0.2, 0.0)  # on a corner of four cells: one owner
    assert terms.rotated_mask(border, GRID)[0].sum() == 1


def test_released_mask_loses_a_car_that_is_turned() -> None:
    grid = BevGrid(x_min_m=-54, y_min_m=-54, cell_m=0.6, nx=180, ny=180)
    for yaw, cells in ((0.0, 24), (math.pi / 2, 0)):
        car = one_box(-53.9 + 20.0, 10.05, 4.6, 2.0, yaw)
        mask = terms.released_rectangle_mask(car, grid, car.size_lwh_m_BM3[..., :2])
        assert abs(int(mask.sum()) - cells) <= 4 * (cells > 0)
        assert terms.rotated_mask(car, grid).sum() > 20
    edge = one_box(53.9, 53.9, 4.6, 2.0, 0.0)
    mask = terms.released_rectangle_mask(edge, grid, edge.size_lwh_m_BM3[..., :2])
    assert not mask[0, -1].any() and not mask[0, :, -1].any()


def test_first_box_wins_and_its_area_is_read() -> None:
    boxes = fake_batch(boxes=3).boxes
    centre = boxes.centre_m_BM3.clone()
    centre[:, 1] = centre[:, 0]
    size = boxes.size_lwh_m_BM3.clone()
    size[:, 0, :2], size[:, 1, :2] = torch.tensor([4.0, 4.0]), torch.tensor([8.0, 8.0])
    boxes = replace(boxes, centre_m_BM3=centre, size_lwh_m_BM3=size)
    first = terms.first_box_map(boxes, GRID)
    assert (first == 0).any() and (first == 1).any() and first.min() == -1
    area = terms.box_areas_m2(boxes, first)
    assert (area[first == 0] == 16).all() and (area[first == 1] == 64).all() and (area[first == -1] == 1).all()


def _grown(
    x: float, y: float, yaw: float, velocity: tuple[float, float], bev_from_ego: torch.Tensor | None = None
) -> list[float]:
    box = one_box(x, y, 4.0, 2.0, yaw, velocity=velocity)
    matrix = torch.eye(4)[None] if bev_from_ego is None else bev_from_ego[None]
    return (terms.grown_sizes(box, matrix)[0, 0] - torch.tensor([4.0, 2.0])).tolist()


def test_growth_thresholds_clip_and_unknown_velocity() -> None:
    nan = float("nan")
    assert _grown(20.0, 0, 0, (0, 0)) == [0.5, 0.5]  # clipped from below
    assert _grown(20.01, 0, 0, (0, 0)) == [1.0, 0.5]
    assert _grown(30.0, 0, 0, (0, 0)) == [2.0, 1.0]
    assert _grown(30.0, 0, 0, (0.3, 0)) == [2.0, 1.0]
    assert _grown(30.0, 0, 0, (0.31, 0)) == [3.0, 1.0]
    assert _grown(30.0, 0, 0, (0.8, 0)) == [4.0, 1.0]
    assert _grown(30.0, 0, 0, (0, -5.0)) == [2.0, 2.0]
    assert _grown(30.0, 0, 0, (nan, nan)) == [2.0, 1.0]


def test_growth_is_monotone_and_within_limits() -> None:
    last = torch.zeros(2)
    for distance, speed in ((1, 0), (10, 0.1), (21, 0.2), (25, 0.5), (29.9, 0.79), (30, 0.8), (80, 30)):
        now = torch.tensor(_grown(distance, 0, 0.0, (speed, speed)))
        assert (now >= last).all() and (now >= 0.5).all() and (now <= 4.0).all()
        last = now


@pytest.mark.parametrize("side", [0, 1])
def test_growth_is_monotone_in_length_and_in_width(side: int) -> None:
    """At 25 m a quarter of the side, within [0.5, 4] m; the other side grows as before."""
    last = 0.0
    for value in (0.3, 1.0, 1.99, 2.0, 2.01, 6.0, 15.9, 16.0, 16.1, 40.0):
        size = [3.0, 3.0]
        size[side] = value
        box = one_box(25.0, 0, *size, 0.0)
        grown = (terms.grown_sizes(box, torch.eye(4)[None])[0, 0] - torch.tensor(size)).tolist()
        assert grown[side] == pytest.approx(min(max(value / 4, 0.5), 4.0), abs=1e-5) and grown[side] > last - 1e-5
        assert grown[1 - side] == pytest.approx(0.75, abs=1e-6)
        last = grown[side]


def test_growth_follows_the_body_and_not_the_grid() -> None:
    for yaw in ANGLES:
        along = (3 * math.cos(yaw), 3 * math.sin(yaw))
        assert _grown(30.0, 0, yaw, along) == pytest.approx([4.0, 1.0], abs=1e-5)
    box = one_box(30.0, 0, 4.0, 2.0, math.pi / 2, velocity=(0.0, 3.0))
    released = terms.grown_sizes(box, torch.eye(4)[None], grid_axis_speed=True)[0, 0] - torch.tensor([4.0, 2.0])
    assert released.tolist() == [2.0, 2.0]  # the defect: forward speed of a crossing car widens it


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_growth_fractions_do_not_depend_on_augmentation(flip: float) -> None:
    """The scaled and turned box grows by the same fraction: range and speed are those of the ego frame."""
    angle, scale = 0.4, 1.08
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    matrix = torch.eye(4)
    matrix[:2, :2] = torch.diag(torch.tensor([1.0, flip])) @ torch.tensor([[c, -s], [s, c]])
    matrix[2, 2] = scale
    matrix[:2, 3] = torch.tensor([7.0, -3.0])
    position, velocity, yaw = torch.tensor([28.5, 0.0]), torch.tensor([0.5, 0.2]), 0.7
    moved = matrix[:2, :2] @ position + matrix[:2, 3]
    v = matrix[:2, :2] @ velocity
    h = matrix[:2, :2] @ torch.tensor([math.cos(yaw), math.sin(yaw)])
    box = one_box(float(moved[0]), float(moved[1]), 4 * scale, 2 * scale, math.atan2(h[1], h[0]), velocity=tuple(v.tolist()))
    grown = terms.grown_sizes(box, matrix[None])[0, 0] / torch.tensor([4 * scale, 2 * scale])
    plain = one_box(28.5, 0.0, 4.0, 2.0, yaw, velocity=tuple(velocity.tolist()))
    reference = terms.grown_sizes(plain, torch.eye(4)[None])[0, 0] / torch.tensor([4.0, 2.0])
    assert torch.allclose(grown, reference, atol=1e-5)


def test_stage_grid_keeps_metres_or_refuses() -> None:
    coarse, fine = terms.stage_grid(GRID, (1, 5, 12, 16)), terms.stage_grid(GRID, (48, 64))
    assert coarse.cell_m == 1.6 and fine.cell_m == 0.4
    assert (coarse.x_min_m, coarse.y_max_m) == (GRID.x_min_m, GRID.y_max_m) == (fine.x_min_m, fine.y_max_m)
    with pytest.raises(MismatchError):
        terms.stage_grid(GRID, (12, 32))


def test_quality_focal_is_zero_with_zero_gradient_where_equal_even_when_saturated() -> None:
    z = torch.tensor([-30.0, -3.0, 0.0, 2.0, 40.0], requires_grad=True)
    loss = terms.quality_focal(z, torch.sigmoid(z.detach())).sum()
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()
    assert terms.quality_focal(torch.tensor(0.0), torch.tensor(0.9)) > 0


def test_bernoulli_kl_vanishes_only_where_equal_and_has_the_gradient_of_bce() -> None:
    p = torch.tensor([0.0, 0.2, 0.5, 0.97, 1.0])
    z = torch.logit(p, eps=1e-6).requires_grad_()
    assert terms.bernoulli_kl(p, z).abs().max() < 1e-5
    z2 = torch.zeros(5, requires_grad=True)
    terms.bernoulli_kl(p, z2).sum().backward()
    assert torch.allclose(z2.grad, 0.5 - p, atol=1e-6)


def test_weighted_square_normalises_by_the_weight_and_survives_none() -> None:
    x, t = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    assert terms.weighted_square(x, t, torch.full((1, 1, 2, 2), 2.0)) == 3.0
    assert terms.weighted_square(x, t, torch.full((1, 1, 2, 2), 0.1)) == pytest.approx(1.2)  # divided by 1, not by 0.4
    assert terms.weighted_square(x, t, torch.zeros(1, 1, 2, 2)) == 0.0


def test_half_square_ignores_empty_targets_and_unmasked_cells() -> None:
    x = torch.randn(1, 4, 3, 5, requires_grad=True)
    target = torch.randn(1, 4, 3, 5)
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    mask[0, 1, 2] = mask[0, 0, 0] = True
    target[0, :, 0, 0] = 0
    loss = terms.half_square_on_mask(x, target, mask)
    assert torch.isclose(loss, 0.5 * (x - target).square()[0, :, 1, 2].mean())
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.abs().sum((0, 1)).nonzero().tolist() == [[1, 2]]
    empty = terms.half_square_on_mask(x, target, torch.zeros_like(mask))
    empty.backward()
    assert empty == 0


def test_non_finite_teacher_is_an_error_that_names_the_map() -> None:
    value = torch.zeros(1, 2, 3, 3)
    value[0, 0, 0, 0] = torch.nan
    with pytest.raises(MismatchError, match="bev_fused"):
        terms.require_finite(value, "bev_fused")


def test_ground_truth_maps_of_an_empty_batch_are_zero() -> None:
    batch = without_boxes(fake_batch())
    targets = terms.head_targets(batch.boxes, GRID, fake_head(0))
    assert targets.heatmap_BKYX.shape[1] == 10 and targets.heatmap_BKYX.max() == 0
    full = terms.head_targets(fake_batch().boxes, GRID, fake_head(0)).heatmap_BKYX
    assert terms.heatmaps_at(full, (12, 16)).shape[-2:] == (12, 16)
