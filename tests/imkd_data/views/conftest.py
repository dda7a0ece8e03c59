"""One small synthetic world with all twelve sensors, its cache, and the devkit over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes

from imkd_data import open_cache
from imkd_data.world import write_world
from pipelines.build import build

SCENES = ("scene-0103", "scene-0061")  # val before train in the tables: their order is not ours


@pytest.fixture(scope="session")
def raw_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("views") / "raw"
    write_world(root, scenes=2, keyframes=3, seed=5, scene_names=SCENES, image_hw_px=(180, 320), camera_sweeps=True)
    return root


@pytest.fixture(scope="session")
def cache(raw_root: Path) -> Any:
    out = raw_root.parent / "cache"
    build(
        dataroot=raw_root,
        version="v1.0-mini",
        splits=("mini_train", "mini_val"),
        out=out,
        executor="sync",
        fsync=False,
        recipe_overrides={"images_mode": "original", "rows_per_shard": 4},
    )
    return open_cache(out)


@pytest.fixture(scope="session")
def nusc(raw_root: Path) -> NuScenes:
    return NuScenes("v1.0-mini", str(raw_root), verbose=False)


@pytest.fixture(scope="session")
def row(cache: Any) -> int:
    """The last keyframe of the train scene: moving, with past sweeps."""
    return int(cache.rows("mini_train")[2])


@pytest.fixture(scope="session")
def record(cache: Any, nusc: NuScenes) -> Callable[[int], dict]:
    """The devkit's sample record of a row."""
    return lambda row: nusc.get("sample", cache.token(row))


def nearest(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Index in ``theirs`` of the nearest row of each row of ``ours`` (brute force; small arrays)."""
    return np.array([int(np.abs(theirs - o).sum(axis=1).argmin()) for o in ours])
