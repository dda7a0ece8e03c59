"""One batch is learned by heart by each family of networks at tiny size, and boxes come back from the decoded maps."""

from __future__ import annotations

import pytest
import torch
from batches import make_batch, small_fusion, small_lidar, small_student

from imkd_models.detector import LidarDetector
from imkd_models.head import DecodeOptions, decode
from imkd_models.presets import build_model, label_config_for

BEVDEPTH = {"radar": False, "fuser": "none", "fused_channels": 32, "view": "frustum", "depth_net": "camera_aware"}
BEVFUSION = {"fuser": "gated", "view": "frustum", "depth_net": "linear", "radar_encoder": "points", "trunk": "bevfusion"}
FAMILIES = {
    "student": lambda: build_model(small_student()),
    "imkd student": lambda: build_model(small_student(fuser="intensity")),
    "crkd student": lambda: build_model(small_student(fuser="gated", calibration=True, radar_encoder="bev")),
    "smooth student": lambda: build_model(small_student(fuser="heterogeneous", sim_branch=True)),
    "radar only": lambda: build_model(small_student(camera=False)),
    "camera only": lambda: build_model(small_student(radar=False)),
    "bevdepth": lambda: build_model(small_student(**BEVDEPTH)),
    "bevfusion student": lambda: build_model(small_student(**BEVFUSION)),
    "lidar": lambda: build_model(small_lidar()),
    "fusion": lambda: build_model(small_fusion()),
    "label": lambda: _label(),
}

STEPS = {"radar only": 90, "crkd student": 80}  # no perspective radar: its pillars learn more slowly


def _label():
    teacher = LidarDetector(small_lidar())
    return build_model(label_config_for(teacher, hidden=32), teacher=_fitted(teacher, 40))


def _fitted(model, steps):
    batch = make_batch(batch=1, boxes=6)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(model.loss(model(batch), batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimiser.step()
        schedule.step()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_one_batch_is_learned_by_heart(name):
    torch.manual_seed(0)
    model, batch = FAMILIES[name](), make_batch(batch=1, boxes=6)
    _fitted(model, STEPS.get(name, 45))
    model.eval()
    with torch.no_grad():
        found = decode(model(batch).head, model.grid, DecodeOptions(score_min=0.2))[0]
    truth = batch.boxes
    hits = 0
    for m in truth.valid_BM[0].nonzero()[:, 0].tolist():
        same = found.label == truth.label_BM[0, m]
        distance = (found.centre_m[same][:, :2] - truth.centre_m_BM3[0, m, :2]).norm(dim=1)
        hits += bool((distance < 0.8).any())
    assert hits >= 5, f"{hits} of 6 boxes found, {len(found)} detections"
