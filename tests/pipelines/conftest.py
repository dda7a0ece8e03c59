"""A small whole line for tests of evaluation and pictures: world, cache, checkpoints of untrained networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Line:
    """tree: synthetic nuScenes folder (one dry train, one rainy night val scene, three keyframes each). cache: all fields.
    students: name -> checkpoint folder; they have seen nothing, but find boxes."""

    tree: Path
    cache: Path
    students: dict[str, Path]
    lidar: Path


def untrained(out: Path, name: str, seed: int, **changes: object) -> Path:
    """A checkpoint of random weights whose scores are lifted so that boxes come out."""
    import torch

    from imkd_models.checkpoint import save_checkpoint
    from imkd_models.presets import build_model, preset_config

    torch.manual_seed(seed)
    config = preset_config(name, **changes)
    model = build_model(config, pretrained=False)
    for key, value in model.head.named_parameters():
        if key.endswith("bias") and "heat" in key:
            value.data.fill_(-1.5)
    loader = {"radar_filter": "none", "radar_sweeps": 6, "lidar_sweeps": 0}
    meta = {"name": name, "run": {"name": name, "loader": loader}, "method": None, "options": {}, "model": config.as_dict()}
    save_checkpoint(out, 7, model, meta=meta)
    return out / "last.ckpt"


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Made once for all tests of this folder."""
    from pipelines.build import build
    from pipelines.synth import run_synth

    root = tmp_path_factory.mktemp("line")
    run_synth(out=root / "tree", scenes=2, keyframes=3, seed=2, image_size="90x160", weather="clear,rain", camera_sweeps=True)
    build(
        dataroot=root / "tree",
        version="v1.0-mini",
        splits=("mini_train", "mini_val"),
        out=root / "cache",
        recipe_overrides={"image_hw_px": (90, 160), "images_mode": "original"},
        executor="sync",
    )
    small = {"image_hw_px": (64, 128)}
    students = {f"student{seed}": untrained(root / f"student{seed}", "tiny", seed, **small) for seed in (0, 1)}
    return Line(tree=root / "tree", cache=root / "cache", students=students, lidar=untrained(root / "lidar", "tiny_lidar", 2))
