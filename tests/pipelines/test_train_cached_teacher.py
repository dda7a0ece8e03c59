"""Stored teacher maps: written through the cache's writer, resumable, and as good as the teacher itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from disk_cache import disk_cache
from toy_training import toy_run

from imkd_data import open_cache
from imkd_data.cache import extend
from imkd_data.cache.verify import verify
from imkd_data.errors import MismatchError, MissingFeatureError, UsageError
from imkd_data.loader.augment import IDENTITY
from imkd_data.loader.stream import stream
from imkd_models.checkpoint import load_model
from pipelines.cache_teacher import CachedTeacher, cache_features
from pipelines.networks import build_networks, use_cached_teachers
from pipelines.run import LoaderConfig
from pipelines.train import train

FEATURES = ("bev_stage1", "bev_stage2", "bev_neck")
STILL = LoaderConfig(workers=0, augment=IDENTITY)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("stored")
    cache = open_cache(disk_cache(root))
    train(toy_run(max_steps=4), cache, root / "lidar", accelerator="cpu")
    train(toy_run("label", max_steps=2), cache, root / "label", {"lidar": root / "lidar"}, accelerator="cpu")
    shutil.copytree(root / "cache", root / "plain")
    return root


@pytest.fixture(scope="module")
def stored(world: Path) -> tuple[str, ...]:
    return cache_features(world / "lidar", world / "cache", FEATURES)


def bytes_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and "logs" not in p.parts}


def test_the_maps_are_the_teachers(world: Path, stored: tuple[str, ...]) -> None:
    cache, (model, meta) = open_cache(world / "cache"), load_model(world / "lidar")
    assert stored == tuple(f"teacher_{meta['weights_sha256'][:8]}_{f}" for f in FEATURES)
    row = int(cache.rows("val")[3])
    s = stream(cache, 1, rows=[row], shuffle="none", fields=("lidar_points", *stored), grid=model.grid)
    batch = next(iter(s))
    with torch.no_grad():
        online = model(batch).features
    for feature, name in zip(FEATURES, stored, strict=True):
        assert batch.bev_maps[name].dtype == torch.float32
        assert torch.equal(batch.bev_maps[name], online[feature].half().float())
        assert cache.attributes(name)["teacher_sha256"] == meta["weights_sha256"]

        assert np.array_equal(
            zarr.open_array(str(world / "cache" / "arrays.zarr" / name), mode="r")[row], cache.read(name, row)
        )


def test_other_fields_keep_their_bytes_and_the_cache_verifies(world: Path, stored: tuple[str, ...]) -> None:
    before, after = bytes_of(world / "plain"), bytes_of(world / "cache")
    changed = {n for n in before if before[n] != after.get(n)}
    assert changed == {"manifest.json", "recipe.json", "index.parquet"}
    assert [p for p in verify(world / "cache", level="full") if getattr(p, "severity", "error") == "error"] == []
    old, new = open_cache(world / "plain"), open_cache(world / "cache")
    for column in old.index.column_names:
        assert old.index[column].equals(new.index[column]), column


def test_it_continues_and_changes_nothing_when_done(world: Path, stored: tuple[str, ...], monkeypatch: Any) -> None:
    done = bytes_of(world / "cache")
    monkeypatch.setattr(extend, "_commit", None)  # would fail if anything were written again
    assert cache_features(world / "lidar", world / "cache", FEATURES) == stored
    assert bytes_of(world / "cache") == done


@pytest.mark.parametrize("point", ["shard", "pending", "swap"])
def test_a_crash_anywhere_is_finished_by_the_same_command(
    world: Path, stored: tuple[str, ...], tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "plain", tmp_path / "cache")
    real_commit, real_bytes, seen = extend._commit, extend.commit_bytes, []

    def commit(*a: Any) -> Any:
        seen.append(1)
        if point == "shard" and len(seen) == 5:
            raise KeyboardInterrupt
        return real_commit(*a)

    def put(path: Path, *a: Any, **k: Any) -> Any:
        stop = {"pending": path.name == "manifest.json", "swap": path == tmp_path / "cache" / "index.parquet"}
        if stop.get(point):
            raise KeyboardInterrupt
        return real_bytes(path, *a, **k)

    monkeypatch.setattr(extend, "_commit", commit)
    monkeypatch.setattr(extend, "commit_bytes", put)
    with pytest.raises(KeyboardInterrupt):
        cache_features(world / "lidar", tmp_path / "cache", FEATURES)
    if point != "swap":
        open_cache(tmp_path / "cache")  # the old manifest is still valid
    monkeypatch.setattr(extend, "commit_bytes", real_bytes)
    monkeypatch.setattr(extend, "_commit", real_commit)
    assert cache_features(world / "lidar", tmp_path / "cache", FEATURES) == stored
    assert bytes_of(tmp_path / "cache") == bytes_of(world / "cache")


def test_training_equals_the_online_teacher(world: Path, stored: tuple[str, ...], tmp_path: Path) -> None:
    cache = open_cache(world / "cache")
    teachers = {"lidar": world / "lidar", "label": world / "label"}
    run = toy_run("student", method="imkd", max_steps=3, loader=STILL)
    online = train(run, cache, tmp_path / "a", teachers, accelerator="cpu")
    kept = run.with_settings({"cached_teachers": "on"})
    assert kept.loader.cached_teachers
    read = train(kept, cache, tmp_path / "b", teachers, accelerator="cpu")
    for name, value in online.losses.items():
        assert read.losses[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_a_teacher_with_batch_statistics_is_never_replaced(world: Path, stored: tuple[str, ...]) -> None:
    """Its answer depends on the rest of the batch, which no stored map can hold; nor is one that is altered the checkpoint
    they were made from."""
    teachers = {"lidar": world / "lidar", "label": world / "label"}
    for switch in ("", "batch_statistics", "altered"):
        networks = build_networks(toy_run("student", method="imkd", loader=STILL), teachers)
        if switch:
            assert getattr(networks.teachers["lidar"], switch) is False
            setattr(networks.teachers["lidar"], switch, True)
        use_cached_teachers(networks, open_cache(world / "cache"))
        assert isinstance(networks.teachers["lidar"], CachedTeacher) != bool(switch)
        assert not isinstance(networks.teachers["label"], CachedTeacher)


def test_augmentation_and_missing_maps_are_refused(world: Path, stored: tuple[str, ...], tmp_path: Path) -> None:
    teachers = {"lidar": world / "lidar", "label": world / "label"}
    moving = toy_run("student", method="imkd", loader=LoaderConfig(workers=0, cached_teachers=True))
    with pytest.raises(MismatchError, match="unaugmented"):
        train(moving, open_cache(world / "cache"), tmp_path / "a", teachers, accelerator="cpu")
    still = toy_run("student", method="imkd", loader=LoaderConfig(workers=0, augment=IDENTITY, cached_teachers=True))
    with pytest.raises(MissingFeatureError, match="imkd cache-teacher"):
        train(still, open_cache(world / "plain"), tmp_path / "b", teachers, accelerator="cpu")
    with pytest.raises(UsageError, match="label encoder"):  # its maps depend on the boxes, and training never reads them
        cache_features(world / "label", world / "plain", ("bev_stage1",))
    with pytest.raises(MissingFeatureError, match="bev_stage9"):
        cache_features(world / "lidar", world / "cache", ("bev_stage9",))


def test_a_stopped_run_continues_after_maps_of_another_teacher_were_stored(
    world: Path, stored: tuple[str, ...], tmp_path: Path
) -> None:
    """Another field makes another cache id; what this run reads is the same."""
    shutil.copytree(world / "cache", tmp_path / "cache")
    teachers = {"lidar": world / "lidar", "label": world / "label"}
    still = LoaderConfig(workers=0, augment=IDENTITY, cached_teachers=True)
    run = toy_run("student", method="imkd", max_steps=1, loader=still)
    train(run, open_cache(tmp_path / "cache"), tmp_path / "run", teachers, accelerator="cpu")
    train(toy_run(max_steps=1, seed=5), open_cache(world / "plain"), tmp_path / "other", accelerator="cpu")
    before = open_cache(tmp_path / "cache").id
    cache_features(tmp_path / "other", tmp_path / "cache", ("bev_neck",))
    more = open_cache(tmp_path / "cache")
    assert more.id != before
    longer = run.with_values(max_steps=2)
    assert train(longer, more, tmp_path / "run", teachers, resume=True, accelerator="cpu").step == 2
    with pytest.raises(MismatchError, match="other data"):  # the same rows, but other bytes of a field that it reads
        more.manifest["fields"]["boxes"]["shards"][0][1] = "0" * 64
        train(longer.with_values(max_steps=3), more, tmp_path / "run", teachers, resume=True, accelerator="cpu")
