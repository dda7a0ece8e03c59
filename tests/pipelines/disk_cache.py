"""The toy data set as a cache on disk, with the fields that trainers read."""

from __future__ import annotations

from pathlib import Path

from memory_cache import _denser_scans
from toy import open_toy, write_toy

from imkd_data.geometry import BevGrid
from pipelines.build import build

GRID = BevGrid(x_min_m=-12.8, y_min_m=-6.4, cell_m=0.2, nx=128, ny=64)


def disk_cache(root: Path) -> Path:
    """ROOT/cache, built from ROOT/raw: four scenes of five keyframes, five rows per shard."""
    write_toy(root / "raw", scenes=4, keyframes=5)
    _denser_scans(root / "raw")
    overrides = {"grid": GRID.as_dict(), "view_cells": 4, "depth_width": 512, "boxes_width": 8, "image_hw_px": (48, 80)}
    build(
        dataroot=root / "raw",
        version="toy-1",
        splits=("train", "val"),
        out=root / "cache",
        dataset="toy",
        reader=open_toy,
        executor="sync",
        recipe_overrides={**overrides, "rows_per_shard": 5, "lidar_sweeps": 2, "radar_sweeps": 2},
    )
    return root / "cache"
