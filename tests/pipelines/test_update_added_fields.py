"""Fields that another command added to a cache (stored teacher maps) and later updates of that cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from toy import TOY_FIELDS, write_toy
from toy_build import build_toy, open_toy_cache, stored

from imkd_data.cache import extend
from imkd_data.cache.extend import add_fields
from imkd_data.cache.verify import verify
from imkd_data.errors import MismatchError, UsageError
from pipelines.build import Event
from pipelines.build.repair import repair
from pipelines.cache_teacher import _field

NAME = "teacher_0123abcd_bev_stage1"
SHA = "0123abcd" + 56 * "0"
TEACHER = _field(NAME, (2, 3, 4), {}, SHA, "bev_stage1")


def add_teacher(out: Path) -> None:
    cache = open_toy_cache(out)
    upstream = [f.name for f in TOY_FIELDS[:2]]
    add_fields(cache, [TEACHER], upstream, lambda row: {NAME: np.full((2, 3, 4), row, np.float16)})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/raw and ROOT/cache: two of six scenes, three of four fields and a teacher's map."""
    root = tmp_path_factory.mktemp("added")
    write_toy(root / "raw", scenes=6)
    build_toy(root / "raw", root / "cache", fields=TOY_FIELDS[:3], scenes=["toy-000", "toy-001", "toy-002"])
    add_teacher(root / "cache")
    return root


@pytest.fixture
def cache(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def whole(out: Path) -> bool:
    return verify(out, level="full") == []


def teacher_files(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: v for n, v in files.items() if NAME in n}


@pytest.mark.parametrize("update", [True, False])
def test_nothing_to_do_changes_nothing(world: Path, cache: Path, update: bool) -> None:
    before, events = stored(cache), list[Event]()
    scenes = None if update else ["toy-000", "toy-001", "toy-002"]
    result = build_toy(world / "raw", cache, fields=TOY_FIELDS[:3], scenes=scenes, update=update, progress=events.append)
    assert stored(cache) == before and not result.rebuilt and not result.dropped_fields
    assert [e for e in events if e.kind == "dropped"] == []


def test_another_field_leaves_the_map_alone(world: Path, cache: Path) -> None:
    before = stored(cache)
    result = build_toy(world / "raw", cache, fields=TOY_FIELDS, update=True)
    after = stored(cache)
    assert {n for n, _ in result.rebuilt} == {TOY_FIELDS[3].name} and not result.dropped_fields
    assert {n for n in before if before[n] != after.get(n)} == {"manifest.json", "recipe.json", "index.parquet"}
    opened = open_toy_cache(cache)
    assert set(opened.fields) == {*(f.name for f in TOY_FIELDS), NAME} and whole(cache)
    assert all((opened.read(NAME, int(r)) == r).all() for r in opened.rows("train"))
    assert json.loads((cache / "recipe.json").read_bytes())["fields"][-1] == NAME


def test_new_scenes_drop_the_map_and_say_how_to_make_it_again(world: Path, cache: Path) -> None:
    events = list[Event]()
    before = stored(cache)
    result = build_toy(world / "raw", cache, fields=TOY_FIELDS[:3], scenes=["toy-003"], update=True, progress=events.append)
    (line,) = [e.text for e in events if e.kind == "dropped"]
    assert NAME in line and f"imkd cache-teacher --checkpoint CKPT --cache {cache} --features bev_stage1" in line
    assert SHA[:8] in line and result.dropped_fields == {NAME: line}
    after = stored(cache)
    assert not teacher_files(after) and NAME not in open_toy_cache(cache).fields and whole(cache)
    rows = {
        n for n in before if n.startswith(("arrays.zarr/", "blobs/", "receipts/")) and NAME not in n and "zarr.json" not in n
    }
    assert rows and all(after[n] == before[n] for n in rows)
    add_teacher(cache)  # the command again: the field is whole
    assert whole(cache) and NAME in open_toy_cache(cache).fields


def test_a_changed_field_that_it_was_computed_from_drops_it(world: Path, cache: Path) -> None:
    events = list[Event]()
    build_toy(world / "raw", cache, fields=TOY_FIELDS[:3], overrides={"grid.cell_m": 0.25}, update=True, progress=events.append)
    dropped = [e for e in events if e.kind == "dropped"]
    assert len(dropped) == 1 and NAME not in open_toy_cache(cache).fields and whole(cache)
    again = build_toy(world / "raw", cache, fields=TOY_FIELDS[:3], overrides={"grid.cell_m": 0.25}, update=True)
    assert not again.rebuilt and not again.dropped_fields


def test_repair_keeps_a_good_map_and_drops_a_damaged_one(world: Path, cache: Path) -> None:
    from toy import open_toy

    before = stored(cache)
    name = TOY_FIELDS[0].name
    for path in sorted((cache / "receipts" / name).glob("*.json"))[:1]:
        path.unlink()
    repair(cache, dataroot=world / "raw", reader=open_toy, fields=TOY_FIELDS[:3], fsync=False)
    assert stored(cache) == before
    for path in [p for p in (cache / "arrays.zarr" / NAME / "c").rglob("0") if p.is_file()]:  # all: no receipt is left
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    done = repair(cache, dataroot=world / "raw", reader=open_toy, fields=TOY_FIELDS[:3], fsync=False)
    assert done.build is not None and set(done.build.dropped_fields) == {NAME} and not done.build.rebuilt
    assert whole(cache) and not teacher_files(stored(cache))


def test_damaged_metadata_of_the_map_drop_it(world: Path, cache: Path) -> None:
    (cache / "arrays.zarr" / NAME / "zarr.json").write_bytes(b"{}")
    result = build_toy(world / "raw", cache, fields=TOY_FIELDS[:3], update=True)
    assert set(result.dropped_fields) == {NAME} and whole(cache)


def test_a_half_swapped_addition_is_finished_before_an_update(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the adding command in its swap must not come back later and overwrite what the update wrote."""
    out = tmp_path / "cache"
    build_toy(world / "raw", out, fields=TOY_FIELDS[:3], scenes=["toy-000", "toy-001"])
    real = extend.commit_bytes

    def put(path: Path, *a: object, **k: object) -> object:
        if path == out / "index.parquet":
            raise KeyboardInterrupt
        return real(path, *a, **k)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extend, "commit_bytes", put)
        add_teacher(out)
    build_toy(world / "raw", out, fields=TOY_FIELDS, update=True)
    assert not (out / "logs" / "pending").exists() and whole(out)
    assert set(open_toy_cache(out).fields) == {*(f.name for f in TOY_FIELDS), NAME}


def test_a_field_of_the_users_own_is_still_asked_for(world: Path, cache: Path) -> None:
    from toy import open_toy

    from pipelines.build import build

    with pytest.raises(UsageError, match="unknown fields") as caught:
        build(dataroot=world / "raw", out=cache, reader=open_toy, update=True, executor="sync")
    assert NAME not in str(caught.value.details["found"])
    with pytest.raises(MismatchError, match="another recipe"):
        build_toy(world / "raw", cache, fields=TOY_FIELDS)
