"""Inputs at the edge of what may come: every loss, map, gradient and box stays finite, in float32 and under bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from batches import ODD_GRID, make_batch, small_lidar, small_student, with_near
from test_student import VARIANTS

from imkd_data.loader.batch import Batch, PointBatch
from imkd_models.detector import Detector, LidarDetector, StudentDetector
from imkd_models.head import DecodeOptions, decode

NETWORKS: dict[str, Callable[[], Detector]] = {
    "crn parity": lambda: StudentDetector(small_student(**VARIANTS["crn parity"])),
    "crkd": lambda: StudentDetector(small_student(**VARIANTS["crkd"])),
    "lidar": lambda: LidarDetector(small_lidar(points_per_pillar=3, near_removed_m=1.0)),
}


def at(points: PointBatch, xyz: torch.Tensor) -> PointBatch:
    """Points of the first sample at these places, other columns from ``points``."""
    take = torch.arange(len(xyz)) % len(points.age_s)
    values = {f.name: getattr(points, f.name) for f in dataclasses.fields(points)}
    kept = {name: v[take] for name, v in values.items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(points, **{**kept, "xyz_m": xyz, "batch_index": torch.zeros(len(xyz), dtype=torch.long)})


def both(batch: Batch, xyz: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, radar=at(batch.radar, xyz), lidar=at(batch.lidar, xyz))


def one_cell(batch: Batch) -> Batch:
    return both(batch, torch.tensor([[1.0, 0.3, 0.5]]).repeat(400, 1))


def one_point(batch: Batch) -> Batch:
    return both(batch, torch.tensor([[1.0, 0.3, 0.5]]))


def on_edges(batch: Batch) -> Batch:
    grid = ODD_GRID
    low, high = torch.tensor([grid.x_min_m, grid.y_min_m, -5.0]), torch.tensor([grid.x_max_m, grid.y_max_m, 3.0])
    return both(batch, torch.stack([low, high, high - 1e-4, low - 1e-4, torch.zeros(3)]))


def not_numbers(batch: Batch) -> Batch:
    xyz = 3 * torch.randn(200, 3)
    xyz[::3], xyz[1::7] = torch.nan, torch.inf
    batch = both(batch, xyz)
    velocity, features = batch.radar.velocity_mps.clone(), batch.radar.features_NF.clone()
    velocity[::2], features[::5] = torch.nan, torch.nan
    return dataclasses.replace(batch, radar=dataclasses.replace(batch.radar, velocity_mps=velocity, features_NF=features))


def no_box_rows(batch: Batch) -> Batch:
    rows = {f.name: getattr(batch.boxes, f.name) for f in dataclasses.fields(batch.boxes)}
    none = {name: v[:, :0] for name, v in rows.items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(batch, boxes=dataclasses.replace(batch.boxes, **none))


def strange_boxes(batch: Batch) -> Batch:
    """Flat ones, ones larger than the grid, one nowhere; no velocity is known."""
    boxes = batch.boxes
    factor = torch.tensor([0.0, 100.0, 1.0])[torch.arange(boxes.size_lwh_m_BM3.shape[1]) % 3][None, :, None]
    centre = boxes.centre_m_BM3.clone()
    centre[:, 2] = torch.nan
    changed = {"size_lwh_m_BM3": boxes.size_lwh_m_BM3 * factor, "centre_m_BM3": centre}
    changed["velocity_mps_BM2"] = torch.full_like(boxes.velocity_mps_BM2, torch.nan)
    return dataclasses.replace(batch, boxes=dataclasses.replace(boxes, **changed))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_everything_stays_finite(name, training):
    torch.manual_seed(0)
    model = NETWORKS[name]().train(training)
    batch = with_near(make_batch(slots=len(getattr(model.config, "history", (0,)))))
    for i, change in enumerate((one_cell, one_point, on_edges, not_numbers, no_box_rows, strange_boxes)):
        changed, low_precision = change(batch), (i % 2 == 0) == training
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low_precision):
            outputs = model(changed)
            terms = model.loss(outputs, changed)
        assert all(x.isfinite().all() for x in (*terms.values(), *outputs.features.values())), change.__name__
        model.zero_grad()
        sum(terms.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), change.__name__
        for nms in ("circle", "rotated"):
            found = decode(outputs.head, ODD_GRID, DecodeOptions(nms=nms))
            assert len(found) == 2 and all(d.centre_m.isfinite().all() and d.size_lwh_m.isfinite().all() for d in found)
