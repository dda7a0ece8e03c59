"""On a real cache and under augmentation, everything that distillation compares lies in the same cells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imkd_data import open_cache
from imkd_data.geometry import BevGrid
from imkd_data.loader.augment import IDENTITY, AugmentConfig
from imkd_data.loader.batch import Batch
from imkd_data.loader.stream import stream
from imkd_models.distill.intensity import IntensityRule, pooled_reflectance
from imkd_models.distill.terms import rotated_mask
from imkd_models.head import centre_targets
from imkd_models.label import label_maps

GRID = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=0.8, nx=128, ny=128)


def _batch(cache: Path, augment: AugmentConfig, seed: int) -> Batch:
    wanted = ("boxes", "lidar_points", "intensity_planes", "lidar_intensity")
    opened = open_cache(cache)
    return next(iter(stream(opened, 2, split="mini_train", fields=wanted, grid=GRID, augment=augment, seed=seed, workers=0)))


def _points_in_boxes(batch: Batch) -> torch.Tensor:
    """(B, M) number of LiDAR points inside each box, enlarged by 10 cm for moving objects and rounding."""
    boxes, count = batch.boxes, []
    for b in range(len(batch)):
        xyz = batch.lidar.xyz_m[batch.lidar.batch_index == b]
        d = xyz[None] - boxes.centre_m_BM3[b, :, None].float()
        yaw = boxes.yaw_rad_BM[b].float()[:, None]
        local = torch.stack(
            [yaw.cos() * d[..., 0] + yaw.sin() * d[..., 1], yaw.cos() * d[..., 1] - yaw.sin() * d[..., 0], d[..., 2]], -1
        )
        count.append((local.abs() <= boxes.size_lwh_m_BM3[b, :, None].float() / 2 + 0.1).all(-1).sum(1))
    return torch.stack(count)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_box_points_label_rectangle_and_peak_share_cells(synthetic_cache: Path, seed: int) -> None:
    batch = _batch(synthetic_cache, AugmentConfig(), seed)
    boxes = batch.boxes
    assert not torch.equal(batch.bev_from_ego_B44[0], torch.eye(4))
    targets = centre_targets(boxes, GRID)
    b, m = targets.valid_BM.nonzero(as_tuple=True)
    row, column = targets.row_BM[b, m], targets.column_BM[b, m]
    assert len(b) > 10
    assert (targets.heatmap_BKYX[b, targets.channel_BM[b, m], row, column] == 1).all()
    _, one_hot = label_maps(boxes, GRID, 10, 0.5)
    assert (one_hot[b, :, row, column].sum(1) == 1).all()
    assert rotated_mask(boxes, GRID)[b, row, column].all()
    seen = _points_in_boxes(batch)[b, m]
    assert (seen > 0).float().mean() > 0.9  # a box may be valid by a radar return alone


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intensity_from_planes_follows_the_points_under_rotation_and_scale(synthetic_cache: Path, seed: int) -> None:
    """Planes are moved by nearest lookup, within half a fine cell: nearly all occupied cells are the points' own, and the
    maximum of a cell differs only where a return sits at a border. Returns of the own car are not in the planes."""
    batch = _batch(synthetic_cache, AugmentConfig(), seed)
    planes = pooled_reflectance(batch, GRID.shape, IntensityRule())
    points = pooled_reflectance(batch, GRID.shape, IntensityRule(taken_from="points"))
    a, b = planes[0] > 0, points[0] > 0
    centre = torch.zeros_like(a)
    centre[:, 58:70, 58:70] = True  # the own car
    both = (a & b & ~centre).sum() / ((a | b) & ~centre).sum()
    assert both > 0.85
    use = a & b & ~centre
    assert (planes[1] - points[1])[use].abs().mean() < 0.05


def test_intensity_from_planes_equals_points_without_augmentation(synthetic_cache: Path) -> None:
    batch = _batch(synthetic_cache, IDENTITY, 0)
    planes = pooled_reflectance(batch, GRID.shape, IntensityRule())
    points = pooled_reflectance(batch, GRID.shape, IntensityRule(taken_from="points"))
    view = pooled_reflectance(batch, GRID.shape, IntensityRule(taken_from="view"))
    away = torch.ones_like(planes[0], dtype=torch.bool)
    away[:, 58:70, 58:70] = False
    # Stored points are rounded to whole centimetres, so about 1 % of them change sides at the edges of each axis.
    assert (planes[0] - points[0])[away].abs().sum() / planes[0].sum() < 0.06
    assert (planes[1] - points[1])[away].abs().mean() < 2e-3
    assert torch.equal(view[0].clamp(max=255), planes[0].clamp(max=255))
    assert (view[2] - planes[2]).abs().max() <= 0.5 / 255 + 1e-6
