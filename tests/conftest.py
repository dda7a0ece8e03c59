"""Shared fixtures: threads pinned, the genuine nuScenes files (skipped where absent)."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
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


@pytest.fixture(autouse=True)
def own_child_signal() -> Iterator[None]:
    """A plain DataLoader with workers leaves a SIGCHLD handler behind that raises a child's death in whatever runs then; no
    later test may meet it."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


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


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all pytest workers of this run share; the first one makes it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / f"{name}.made").exists():
            make(base / name)
            (base / f"{name}.made").touch()
    return base / name


@pytest.fixture(scope="session")
def synthetic_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic nuScenes tree: v1.0-mini names, two train scenes and one val scene of four keyframes, 128x352 images."""
    from pipelines.synth import run_synth

    def make(out: Path) -> None:
        run_synth(out=out, scenes=3, keyframes=4, seed=7, image_size=(128, 352))

    return made_once(tmp_path_factory, "synthetic_world", make)


@pytest.fixture(scope="session")
def synthetic_cache(synthetic_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard cache of ``synthetic_world``, both splits; treat it as read-only."""
    from pipelines.build import build

    def make(out: Path) -> None:
        build(
            dataroot=synthetic_world,
            version="v1.0-mini",
            splits=("mini_train", "mini_val"),
            out=out,
            recipe_overrides={"rows_per_shard": 8, "image_hw_px": (128, 352)},
            executor="sync",
        )

    return made_once(tmp_path_factory, "synthetic_cache", make)
