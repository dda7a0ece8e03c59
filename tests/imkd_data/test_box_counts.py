"""Boxes with a point inside: one rule for the stored column, the trainer and the views; unknown counts leave a box in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from imkd_data import open_cache
from imkd_data.fields.boxes import BOX_COLUMNS, BOX_FIELDS
from imkd_data.geometry import Pose
from imkd_data.loader.stream import stream
from imkd_data.sample import Boxes
from imkd_data.views.lidar import lidar_boxes

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "cache_v1"
COUNTS = [(3, 0), (0, 2), (0, 0), (-1, -1), (-1, 0), (0, -1), (-1, 5), (7, -1)]  # LiDAR, radar
USED = [True, True, False, True, False, False, True, True]


@pytest.fixture(scope="module")
def kept() -> Any:
    return open_cache(FIXTURE)


@pytest.fixture
def boxes(kept: Any, monkeypatch: pytest.MonkeyPatch) -> Boxes:
    """Boxes with every kind of counts, all of one class; the cache gives them for every row."""
    whole, n = kept.decode("boxes", 0), len(COUNTS)
    numbers = np.array(COUNTS, dtype=np.int64)
    columns = {k: getattr(whole, k)[:n] for k in ("centre_m", "size_lwh_m", "yaw_rad", "velocity_mps", "score", "track")}
    columns |= {k: getattr(whole, k)[:n] for k in ("attribute", "visibility")}
    given = replace(whole, label=np.zeros(n, np.int64), num_lidar=numbers[:, 0], num_radar=numbers[:, 1], **columns)
    decode = type(kept).decode
    monkeypatch.setattr(type(kept), "decode", lambda self, f, row: given if f == "boxes" else decode(self, f, row))
    return given


def test_the_rule(boxes: Boxes) -> None:
    assert boxes.has_point.tolist() == USED and Boxes.empty("ego").has_point.tolist() == []


def test_the_stored_column(kept: Any, boxes: Boxes) -> None:
    payload: Any = SimpleNamespace(sample=SimpleNamespace(boxes=boxes))
    stored = BOX_FIELDS[0].compute(payload, kept.recipe, kept.suite, {}, {})
    assert stored[: len(COUNTS), BOX_COLUMNS.index("valid")].astype(bool).tolist() == USED


def test_the_trainer(kept: Any, boxes: Boxes) -> None:
    batch = next(iter(stream(kept, 1, split="all", fields=("boxes",))))
    assert batch.boxes.valid_BM[0].tolist() == USED


def test_the_views(kept: Any, boxes: Boxes) -> None:
    table, labels = lidar_boxes(boxes, Pose.from_matrix34("lidar", "ego", np.eye(4)[:3].reshape(12)))
    assert len(table) == len(labels) == sum(USED)
    np.testing.assert_allclose(table[:, :3], boxes.centre_m[USED], atol=1e-5)
    view = kept.view("bevdepth").sample(0)
    assert len(view["gt_labels"]) == sum(USED)
    np.testing.assert_allclose(view["gt_boxes"][:, :3], boxes.centre_m[USED], atol=1e-5)
    for kind, key in (("openpcdet", "gt_boxes"), ("mmdet3d", "gt_bboxes_3d"), ("bevfusion", "gt_boxes"), ("crkd", "gt_boxes")):
        assert len(kept.view(kind).sample(0)[key]) == sum(USED), kind
