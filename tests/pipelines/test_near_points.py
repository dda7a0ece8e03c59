"""Close points of past sweeps: the stream gives their distance exactly where a network of the run leaves them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import VIEW, toy_cache, toy_run

from imkd_data.errors import MissingFeatureError
from imkd_data.geometry import Pose
from imkd_data.loader.stream import stream
from imkd_data.views.lidar import lidar_points
from imkd_models.checkpoint import load_model
from imkd_models.convention import near_sensor
from imkd_models.presets import tiny_fusion_config, tiny_lidar_config
from pipelines.networks import build_networks, stream_values
from pipelines.predict import stream_options
from pipelines.train import train

PLAIN = ("intensity", "ring")
NEAR = (*PLAIN, "near_m")
LIKE_IMPORTED = tiny_lidar_config(grid=VIEW, near_removed_m=1.0, points_per_pillar=20, convention="mmdet3d_lwh")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return toy_cache(tmp_path_factory.mktemp("near"))


def test_only_networks_that_leave_them_out_ask_for_the_distance(cache: Any, tmp_path: Path) -> None:
    for kind in ("lidar", "student", "fusion"):
        assert stream_values(build_networks(toy_run(kind), {}))["lidar_features"] == PLAIN
    run = toy_run("lidar", model=LIKE_IMPORTED.as_dict(), max_steps=1)
    assert stream_values(build_networks(run, {}))["lidar_features"] == NEAR
    camera = toy_run("fusion").model["student"]
    fusion = tiny_fusion_config(grid=VIEW, student=camera, lidar=tiny_lidar_config(grid=VIEW, near_removed_m=1.0))
    assert stream_values(build_networks(toy_run("fusion", model=fusion.as_dict()), {}))["lidar_features"] == NEAR
    made = train(run, cache, tmp_path / "lidar", accelerator="cpu").checkpoint  # the step itself runs on such a stream
    student = toy_run("student", method="dual_distill", max_steps=1)
    assert stream_values(build_networks(student, {"lidar": made}))["lidar_features"] == NEAR


def test_what_a_network_leaves_out_is_what_the_public_loader_drops(cache: Any) -> None:
    """Checked against the view for other code bases, which measures in the scan's own frame too (and drops of the key scan as
    well, as OpenPCDet does)."""
    removed, ego = 0, Pose(dst="ego", src="ego", rotation=np.eye(3), translation_m=np.zeros(3))
    config = LIKE_IMPORTED.with_values(near_removed_m=2.5)  # the toy world has few points within 1 m
    for row in (0, 4, 9):
        options = {"rows": [row], "shuffle": "none", "fields": ("lidar_points",), "grid": VIEW}
        lidar = next(iter(stream(cache, 1, lidar_features=NEAR, **options))).lidar
        near = near_sensor(lidar, config)
        old = lidar_points(cache, row, ego, close_m=2.5)
        kept = torch.from_numpy(old[old[:, 4] > 0])
        assert torch.equal(lidar.xyz_m[(lidar.age_s > 0) & ~near], kept[:, :3])
        assert not near[lidar.age_s == 0].any()
        removed += int(near.sum())
        with pytest.raises(MissingFeatureError, match="near_m"):
            near_sensor(next(iter(stream(cache, 1, **options))).lidar, config)
    assert removed > 10


def test_inference_asks_for_what_training_asked_for(cache: Any, tmp_path: Path) -> None:
    run = toy_run("lidar", model=LIKE_IMPORTED.as_dict(), max_steps=1)
    model, meta = load_model(train(run, cache, tmp_path / "lidar", accelerator="cpu").checkpoint)
    options = stream_options(model, meta)
    assert options["lidar_features"] == NEAR
    outputs = model(next(iter(stream(cache, 1, rows=[0], shuffle="none", **options))))
    assert all(torch.isfinite(maps.heatmap_logits_BKYX).all() for maps in outputs.head)
