"""The genuine keyframe, memorised: teacher and student reach 0.5 mAP over the classes that occur. By hand: about five CPU
minutes; `pytest -m slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imkd_models.checkpoint import load_checkpoint

SENSORS = "LIDAR_TOP,CAM_FRONT,CAM_FRONT_LEFT,CAM_FRONT_RIGHT,CAM_BACK,CAM_BACK_LEFT,CAM_BACK_RIGHT,RADAR_FRONT"


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3000)
def test_overfit_scores_on_the_real_keyframe(real_keyframe: Path, tmp_path: Path) -> None:
    from pipelines.build import build
    from pipelines.evaluate import evaluate_checkpoint
    from pipelines.runs import get_run
    from pipelines.train import train

    build(
        dataroot=real_keyframe,
        version="v1.0-mini",
        splits=("mini_train",),
        sensors=SENSORS.split(","),
        out=tmp_path / "cache",
        executor="sync",
    )
    run = get_run("overfit")
    assert sum(s.max_steps for s in run.stages) <= 800 and not any(s.loader.augment.enabled for s in run.stages)
    train(run, tmp_path / "cache", tmp_path / "run", accelerator="cpu")
    for name in ("teacher", "student"):
        checkpoint = tmp_path / "run" / name / "last.ckpt"
        assert load_checkpoint(checkpoint).meta["name"] == f"overfit/{name}"
        summary = evaluate_checkpoint(checkpoint, tmp_path / "cache", real_keyframe, tmp_path / name)
        assert summary["mAP_occurring"] >= 0.5, name
        assert json.loads((tmp_path / name / "metrics_summary.json").read_text())["mAP_occurring"] >= 0.5
