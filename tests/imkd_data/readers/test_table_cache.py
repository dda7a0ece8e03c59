"""Resolved tables kept on disk: equal to fresh ones, found by content alone, never trusted when damaged."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import imkd_data.readers.nuscenes_tables as nuscenes_tables
import imkd_data.readers.table_cache as table_cache
from imkd_data.errors import InputDataError, StorageError
from imkd_data.readers.nuscenes_tables import NuScenesTables, load_tables
from tests.imkd_data.readers.tiny_tree import SCENES, Tree


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table_cache, "_MIN_BYTES", 0)
    monkeypatch.setenv("IMKD_TABLE_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were really parsed."""
    parsed: list[Path] = []
    real = nuscenes_tables._make
    monkeypatch.setattr(nuscenes_tables, "_make", lambda folder: (parsed.append(folder), real(folder))[1])
    return parsed


def same(a: NuScenesTables, b: NuScenesTables) -> None:
    for item in fields(NuScenesTables):
        x, y = getattr(a, item.name), getattr(b, item.name)
        assert type(x) is type(y), item.name
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, item.name
            np.testing.assert_array_equal(x, y)
        else:
            assert x.equals(y) if isinstance(x, pa.Array) else x == y, item.name


def test_mapped_tables_equal_fresh_ones(store: Path, tmp_path: Path, made: list[Path]) -> None:
    tree = Tree(tmp_path / "a")
    fresh = nuscenes_tables._make(tree.root / tree.version)
    made.clear()
    first, second = (load_tables(tree.root / tree.version) for _ in range(2))
    assert len(made) == 1
    same(first, fresh)
    same(second, fresh)
    assert [p.name[0] for p in store.iterdir()] != ["."] and len(list(store.iterdir())) == 1


def test_samples_are_the_same(store: Path, tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(tmp_path / "a")
    everything = frozenset({"boxes", "cameras", "lidar", "radar"})

    def manifests() -> list[Any]:
        reader = tree.open()
        return [reader.input_manifest(s, everything) for s in reader.samples(SCENES[0])]

    kept = [manifests(), manifests()]
    monkeypatch.setenv("IMKD_TABLE_CACHE", "off")
    assert kept[0] == kept[1] == manifests() and len(made) == 2


def test_found_by_content_not_by_place_or_time(store: Path, tmp_path: Path, made: list[Path]) -> None:
    import os

    one, other = Tree(tmp_path / "a"), Tree(tmp_path / "b")
    load_tables(one.root / one.version)
    load_tables(other.root / other.version)
    assert len(made) == 1
    path = one.root / one.version / "ego_pose.json"
    before = path.stat()
    text = path.read_text()
    path.write_text(text.replace("411.3", "411.4", 1))  # equal size, and the old time put back
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changed = load_tables(one.root / one.version)
    assert len(made) == 2 and len(list(store.iterdir())) == 2
    assert not np.array_equal(changed.pose_translation, load_tables(other.root / other.version).pose_translation)


@pytest.mark.parametrize("part", ["data_filename", "pose_quaternion.npy", "scene_name", "meta.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damaged_entries_are_made_again(store: Path, tmp_path: Path, made: list[Path], part: str, how: str) -> None:
    tree = Tree(tmp_path / "a")
    fresh = nuscenes_tables._make(tree.root / tree.version)
    load_tables(tree.root / tree.version)
    made.clear()
    path = next(store.iterdir()) / part
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if how == "flip" else bytes(data[:-5]))
    same(load_tables(tree.root / tree.version), fresh)
    assert len(made) == 1
    load_tables(tree.root / tree.version)
    assert len(made) == 1  # the good entry has taken the place


def test_a_disk_that_refuses_costs_only_time(tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "_MIN_BYTES", 0)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("IMKD_TABLE_CACHE", str(tmp_path / "file" / "store"))
    tree = Tree(tmp_path / "a")
    assert load_tables(tree.root / tree.version).scene_name == list(SCENES) and len(made) == 1


def test_a_table_that_cannot_be_opened_is_told_as_without_a_store(store: Path, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "a")
    path = tree.root / tree.version / "ego_pose.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot read table ego_pose") as caught:
        load_tables(tree.root / tree.version)
    assert caught.value.rule == "table.io" and not store.exists()


def test_an_entry_of_an_older_program_hides_no_broken_key(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables with rows that point nowhere were once resolved, and kept."""
    tree = Tree(tmp_path / "a")
    tree.tables["sample_annotation"][0]["sample_token"] = "nowhere"
    tree.write()
    with monkeypatch.context() as older:
        older.setattr(table_cache, "_FORMAT", 1)
        older.setattr(nuscenes_tables, "_nowhere", lambda *args: [])
        load_tables(tree.root / tree.version)
    assert len(list(store.iterdir())) == 1
    with pytest.raises(InputDataError, match="row 0"):
        load_tables(tree.root / tree.version)


def test_broken_tables_are_never_kept(store: Path, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "a")
    (tree.root / tree.version / "sample.json").write_text("[")
    with pytest.raises(InputDataError, match="table sample"):
        load_tables(tree.root / tree.version)
    assert not store.exists()


def test_small_data_sets_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("IMKD_TABLE_CACHE", raising=False)
    Tree(tmp_path / "a").open()
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(table_cache, "_MIN_BYTES", 0)
    Tree(tmp_path / "a").open()
    assert [p.name for p in (tmp_path / "cache" / "imkd").iterdir()] == ["tables"]
