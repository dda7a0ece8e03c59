"""What the documentation tells a holder of nuScenes to do with CRN's file, done on a synthetic tree with a small CRN."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from imkd_data.geometry import BevGrid
from imkd_models import importing
from imkd_models.config import CRN_PARITY
from imkd_models.detector import StudentDetector
from imkd_models.keyrules import CHANGES
from imkd_models.presets import StudentConfig, tiny_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "nuscenes.md"
GRID = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=3.2, nx=32, ny=32)


def small_crn(**changes: Any) -> StudentConfig:
    values: dict[str, Any] = {"grid": GRID, "image_hw_px": (64, 160), "fuser": "deformable"}
    values |= {"history": (0, -1), "head_branch": 8, "view_convs": 3, "depth_bins": 12, "depth_step_m": 4.0}
    return tiny_config(**{**values, **changes})


def the_commands() -> list[list[str]]:
    section = PAGE.read_text().split("CRN's published R50 result")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].replace("\\\n", " ").splitlines()]


def test_the_published_steps_run_from_the_file_to_the_score(
    synthetic_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli.data import group as data
    from cli.main import run_group
    from cli.model import group as model

    monkeypatch.setattr(importing, "crn_r18_config", small_crn)  # the file below has no third convolution: "R18"
    monkeypatch.setenv("IMKD_NUSCENES", str(synthetic_world))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = StudentDetector(small_crn(parity=CRN_PARITY))
    names = importing.public_keys("crn", network)
    state = {theirs: CHANGES[change](network.state_dict()[ours]).contiguous() for ours, (theirs, change) in names.items()}
    commands = the_commands()
    assert [words[:2] for words in commands] == [["imkd-data", "build"], ["imkd", "import"], ["imkd", "evaluate"]]
    torch.save({"state_dict": state}, next(word for word in commands[1] if word.endswith(".pth")))
    swap = {"trainval": "mini", "val": "mini_val", "cuda": "cpu", "$IMKD_NUSCENES": str(synthetic_world)}
    for words in commands:
        arguments = [swap.get(word, word) for word in words[1:]]
        arguments += ["--set", "rows_per_shard=8", "--executor", "sync"] if words[0] == "imkd-data" else []
        assert run_group(data if words[0] == "imkd-data" else model, words[0], arguments) == 0, words
    out = tmp_path / "runs" / "crn_public"
    summary = json.loads((out / "eval" / "metrics_summary.json").read_text())
    results = json.loads((out / "eval" / "results.json").read_text())
    assert summary["num_samples"] == len(results["results"]) == 4 and summary["engine"] == "devkit"
    assert results["meta"]["use_camera"] and results["meta"]["use_radar"] and not results["meta"]["use_lidar"]
    (record,) = json.loads((out / "scores.json").read_text()).values()
    assert record["map"] == summary["mean_ap"] and record["convention"] == "bev"
