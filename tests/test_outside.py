"""A package from outside adds a field, a view, a method, a run and a reader as values: no fork, no registration."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "docs" / "examples" / "mylab"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package in a folder of its own, importable here and by worker processes."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(PACKAGE, folder / "mylab", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", f"{folder}:{REPO}")
        yield folder
        for name in [n for n in sys.modules if n.split(".")[0] == "mylab"]:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["fields", "views", "methods", "runs", "readers"])
def test_thirty_lines_each(name: str) -> None:
    text = (PACKAGE / f"{name}.py").read_text()
    after = ast.parse(text).body[0].end_lineno
    assert 10 <= len([line for line in text.splitlines()[after:] if line.strip()]) <= 30
    assert not any(word in text for word in ("FIELDS[", "VIEWS[", "METHODS[", "RUNS[", "READERS[", "register", "setattr"))


@pytest.fixture(scope="module")
def built(home: Path, synthetic_world: Path) -> Any:
    """The profile's fields and one of ours, built in worker processes."""
    from mylab.fields import RADAR_HITS

    from imkd_data import open_cache
    from imkd_data.fields import PROFILES
    from pipelines.build import build

    out = home / "cache"
    build(
        dataroot=synthetic_world,
        version="v1.0-mini",
        splits=("mini_train", "mini_val"),
        out=out,
        fields=[*PROFILES["standard"], RADAR_HITS],
        recipe_overrides={"rows_per_shard": 8, "image_hw_px": (128, 352)},
        executor="processes",
        workers=1,
    )
    return open_cache(out, fields=[RADAR_HITS])


def test_field(built: Any) -> None:
    """Against the cache's own radar points, which went another way."""
    row = int(built.rows("mini_train")[2])
    hits, radar = built.decode("radar_hits", row), built.decode("radar_points", row)
    assert hits.shape == (3, *built.recipe.view_grid.shape) and hits.dtype == np.uint8 and hits.sum() > 200
    for sweep in range(3):
        _, _, inside = built.recipe.view_grid.cells(radar["xyz_m"][radar["sweep"] == sweep, :2])
        assert abs(int(hits[sweep].sum()) - int(inside.sum())) <= 2
    assert built.attributes("radar_hits")["field"] == "radar_hits"


def test_a_cache_with_a_field_of_ours_is_readable_by_anybody(built: Any) -> None:
    from imkd_data import open_cache
    from imkd_data.cache.verify import verify

    stranger = open_cache(built.path)  # nothing of ours is handed over: stored values, no meaning
    np.testing.assert_array_equal(stranger.read("radar_hits", 0), built.read("radar_hits", 0))
    assert verify(built.path, level="full") == []


def test_view(built: Any) -> None:
    from mylab.views import PolarRadar

    row = int(built.rows("mini_train")[2])
    polar = built.view(PolarRadar, sweeps=1).sample(row)["radar"]
    radar = built.decode("radar_points", row)
    newest = radar["sweep"] == 0
    x, y = polar[:, 0] * np.cos(polar[:, 1]), polar[:, 0] * np.sin(polar[:, 1])
    np.testing.assert_allclose(np.stack([x, y], 1), radar["xyz_m"][newest, :2], atol=1e-4)
    np.testing.assert_allclose(polar[:, 4], radar["age"][newest], atol=1e-6)
    assert built.view(PolarRadar).sample(row)["radar"][:, 4].max() > 0  # past scans have positive ages
    assert len(built.view(PolarRadar).dataset("mini_val")) == 4


def test_method_and_run(built: Any, home: Path) -> None:
    import torch
    from mylab.runs import hinted

    from imkd_data.errors import RecipeError
    from imkd_models.checkpoint import load_checkpoint, save_checkpoint
    from imkd_models.presets import build_model, tiny_lidar_config
    from pipelines.run import Run
    from pipelines.train import train

    torch.set_num_threads(1)
    grid = built.recipe.view_grid
    config = tiny_lidar_config(grid=grid)
    save_checkpoint(home / "lidar", 1, build_model(config), meta={"name": "lidar", "model": config.as_dict()})
    run = hinted(grid, (64, 128))
    result = train(run, built, home / "run", teachers={"lidar": home / "lidar" / "last.ckpt"}, accelerator="cpu")
    assert result.step == 2 and np.isfinite(result.losses["hint"]) and result.losses["hint"] > 0
    # Grown by one step: resuming wants the value again, a name alone is not enough.
    longer = hinted(grid, (64, 128), steps=3)
    again = train(longer, built, home / "run", teachers={"lidar": home / "lidar" / "last.ckpt"}, resume=True, accelerator="cpu")
    assert again.step == 3
    saved = load_checkpoint(home / "run" / "last.ckpt")
    assert saved.meta["method"] == "hint" and Run.from_dict(longer.as_dict()).method == "hint"
    with pytest.raises(RecipeError, match="no distillation method 'hint'"):
        Run.from_dict(longer.as_dict()).with_method("hint")


def logs(root: Path) -> Path:
    """Three logs in our own format: a car that drives a curve, a random scan every half second."""
    rng = np.random.default_rng(0)
    for name in ("train-a", "train-b", "val-c"):
        (root / name).mkdir(parents=True)
        k = np.arange(4)
        poses = np.stack([1e15 + 5e5 * k, 4.0 * k, 0.1 * k**2, 0.05 * k], axis=1)
        np.save(root / name / "poses.npy", poses)
        for t in poses[:, 0]:
            scan = rng.uniform([0, -20, 0, -5], [60, 20, 1, 30], (int(rng.integers(5, 40)), 4)).astype(np.float32)
            np.save(root / name / f"{t:.0f}.npy", scan)
    return root


def test_reader(home: Path) -> None:
    from mylab.readers import LogReader
    from mylab.views import PolarRadar

    from imkd_data import open_cache
    from imkd_data.errors import MismatchError
    from pipelines.build import build

    root = logs(home / "logs")
    arguments: dict[str, Any] = {
        "dataroot": root,
        "version": "1",
        "splits": ("train", "val"),
        "out": home / "logs_cache",
        "reader": LogReader,
        "dataset": "logs",
        "fields": ("radar_points", "radar_pose", "sample_pose"),
        "executor": "processes",
        "workers": 1,
    }

    first = build(**arguments)
    assert first.samples == 12 and build(**arguments).rebuilt == ()
    cache = open_cache(home / "logs_cache")
    assert cache.recipe.reference_channel == "FRONT" and len(cache.rows("val")) == 4
    for row in map(int, cache.rows()):
        scene, _, time = cache.token(row).rpartition("-")
        raw = np.load(root / scene / f"{time}.npy")
        stored = cache.decode("radar_points", row)
        np.testing.assert_allclose(stored["xyz_m"], raw[:, :3], atol=0.00501)
        np.testing.assert_allclose(stored["rcs"], raw[:, 3], atol=0.2501)
    assert cache.view("raw").sample(0)["radar_points"]["xyz_m"].shape[1] == 3
    with pytest.raises(MismatchError, match="needs a LiDAR as the reference"):
        cache.view("crn")
    with pytest.raises(KeyError):
        cache.view(PolarRadar).sample(0)  # its radar knows no speed


def test_it_is_outside(home: Path) -> None:
    """Another process, another folder: the package is found by its own path only."""
    code = "import mylab.fields, mylab.views, mylab.runs, mylab.readers; print(mylab.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(home) in done.stdout
