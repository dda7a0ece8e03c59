"""Networks of a few thousand parameters and runs of a few steps on the toy cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from imkd_data.geometry import BevGrid
from imkd_models.presets import tiny_config, tiny_fusion_config, tiny_label_config, tiny_lidar_config
from pipelines.run import LoaderConfig, OptimConfig, Run

if str(Path(__file__).parents[1]) not in sys.path:  # also run as a script by kill tests
    sys.path.insert(0, str(Path(__file__).parents[1]))
from memory_cache import MemoryCache

GRID = BevGrid(x_min_m=-12.8, y_min_m=-6.4, cell_m=0.2, nx=128, ny=64)
VIEW = GRID.coarser(4)
IMAGE = (32, 64)


def toy_cache(root: Path, **values: Any) -> MemoryCache:
    return MemoryCache(root, grid=GRID, **values)


def toy_run(kind: str = "lidar", **changes: Any) -> Run:
    models = {
        "lidar": tiny_lidar_config(grid=VIEW),
        "label": tiny_label_config(grid=VIEW, hidden=16),
        "student": tiny_config(grid=VIEW, image_hw_px=IMAGE, history=(0, -1)),
        "fusion": tiny_fusion_config(
            grid=VIEW,
            lidar=tiny_lidar_config(grid=VIEW),
            student=tiny_config(grid=VIEW, image_hw_px=IMAGE, history=(0,), radar=False, depth_input=True),
        ),
    }
    values: dict[str, Any] = {
        "name": f"toy_{kind}",
        "model": models[kind].as_dict(),
        "max_steps": 6,
        "batch_size": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "tensorboard": False,
        "optim": OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=2, ema=0.9),
        "loader": LoaderConfig(workers=0),
    }
    return Run(**{**values, **changes})


def toy_teachers(cache: MemoryCache, out: Path) -> dict[str, Path]:
    """A checkpoint of every kind of teacher, one step old: lidar, label (of that one), fusion."""
    from pipelines.train import train

    made: dict[str, Path] = {}
    for kind in ("lidar", "label", "fusion"):
        needed = {"lidar": made["lidar"]} if kind == "label" else {}
        made[kind] = train(toy_run(kind, max_steps=1), cache, out / kind, needed, accelerator="cpu").checkpoint
    return made


if __name__ == "__main__":  # python toy_training.py CACHE OUT: train the LiDAR toy, resuming what is there
    import torch

    from pipelines.train import train

    torch.set_num_threads(1)
    train(toy_run(), toy_cache(Path(sys.argv[1])), Path(sys.argv[2]), resume="auto", accelerator="cpu")
