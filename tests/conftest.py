"""Shared fixtures: threads pinned, the genuine nuScenes files (skipped where absent)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

REPO = Path(__file__).resolve().parents[1]


def _real_root() -> Path | None:
    for candidate in (os.environ.get("IMKD_REAL_DATA"), REPO.parent / "shared" / "data"):
        if candidate and (Path(candidate) / "nuscenes_keyframe" / "v1.0-mini").is_dir():
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def real_keyframe() -> Path:
    """Root of the genuine v1.0-mini keyframe (LIDAR_TOP, six cameras, RADAR_FRONT, 69 boxes)."""
    root = _real_root()
    if root is None:
        pytest.skip("real_data: no genuine nuScenes files; set IMKD_REAL_DATA")
    return root / "nuscenes_keyframe"


@pytest.fixture(scope="session")
def real_radar() -> Path:
    """Root of the genuine mini_val front-radar scans (scene-0103, scene-0916)."""
    root = _real_root()
    if root is None:
        pytest.skip("real_data: no genuine nuScenes files; set IMKD_REAL_DATA")
    return root / "nuscenes_mini_val_radar"
