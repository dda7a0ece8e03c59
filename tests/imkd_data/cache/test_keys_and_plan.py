"""Identity and incremental rebuild: what changes queues exactly what depends on it, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY_COUNT, TOY_FIELDS, TOY_PICTURES, TOY_POSE, TOY_VIEW, open_toy, write_toy
from toy_build import GRID, build_toy, open_toy_cache, stored

from imkd_data.cache import keys
from imkd_data.cache.layout import extend_shards
from imkd_data.errors import MismatchError, RecipeError, UsageError
from imkd_data.recipe import Recipe


def inodes(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: a freed inode may be given out again at once."""
    return {
        str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in out.rglob("*")
        if p.is_file() and "logs" not in p.parts
    }


def data_files(names: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in names.items() if "/c/" in n or n.endswith(".tar")}


def test_shards_are_packed_in_order_and_never_mix_splits() -> None:
    scenes = [("train", "a", 5), ("train", "b", 4), ("train", "c", 16), ("val", "d", 2), ("val", "e", 3)]
    shards = extend_shards((), scenes, 7)
    told = [(s.number, s.split, [(c.scene, c.start, c.stop) for c in s.clips]) for s in shards]
    assert told == [
        (0, "train", [("a", 0, 5)]),
        (1, "train", [("b", 0, 4)]),
        (2, "train", [("c", 0, 7)]),
        (3, "train", [("c", 7, 14)]),
        (4, "train", [("c", 14, 16)]),
        (5, "val", [("d", 0, 2), ("e", 0, 3)]),
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.lists(st.integers(1, 30), max_size=6), st.integers(1, 12))
def test_added_scenes_get_new_numbers(first: list[int], later: list[int], rows: int) -> None:
    old = [("train", f"s{i:02d}", n) for i, n in enumerate(first)]
    new = [("train", f"r{i:02d}", n) for i, n in enumerate(later)]
    before = extend_shards((), old, rows)
    after = extend_shards(before, sorted(old + new), rows)
    assert after[: len(before)] == before
    assert sum(map(len, after)) == sum(first) + sum(later) and all(0 < len(s) <= rows for s in after)
    seen = [(c.scene, i) for s in after for c in s.clips for i in range(c.start, c.stop)]
    assert len(set(seen)) == len(seen)


def test_a_scene_that_changed_length_is_refused() -> None:
    shards = extend_shards((), [("train", "a", 5)], 7)
    with pytest.raises(MismatchError, match="number of samples"):
        extend_shards(shards, [("train", "a", 6)], 7)


def recipe(**changes: Any) -> Recipe:
    base = {"version": "v", "splits": ("train",), "sensors": ("SPINNER",), "reference_channel": "SPINNER", "fields": ("a",)}
    return Recipe(**{**base, **changes})


def test_keys_hold_what_a_field_uses_and_nothing_else() -> None:
    fields = {f.name: f for f in TOY_FIELDS}
    parts = keys.recipe_parts(recipe(), fields)
    assert keys.recipe_parts(recipe(splits=("val",), rows_per_shard=64, fields=("b",)), fields) == parts
    bigger = keys.recipe_parts(recipe(image_hw_px=(10, 20)), fields)
    assert {n for n in parts if parts[n] != bigger[n]} == {"toy_pictures"}
    sweeps = keys.recipe_parts(recipe(lidar_sweeps=3), fields)
    assert {n for n in parts if parts[n] != sweeps[n]} == {"toy_count", "toy_view"}  # and what is downstream
    newer = keys.recipe_parts(recipe(), {**fields, "toy_count": replace(TOY_COUNT, version=2)})
    assert {n for n in parts if parts[n] != newer[n]} == {"toy_count", "toy_view"}
    other = keys.recipe_parts(recipe(dataset="other"), fields)
    assert not set(parts.values()) & set(other.values())


def test_new_optional_entries_do_not_change_old_keys() -> None:
    uses = replace(TOY_POSE, uses=("options.threshold",))
    assert keys.recipe_entries(uses, recipe()) == {} == keys.recipe_entries(TOY_POSE, recipe())
    assert keys.recipe_entries(uses, recipe(options={"threshold": 3, "x": 1})) == {"options.threshold": 3}
    with pytest.raises(RecipeError, match="unknown recipe entry"):
        keys.recipe_entries(replace(TOY_POSE, uses=("nothing",)), recipe())


def test_upstream_order_and_circles() -> None:
    a, b = replace(TOY_VIEW, name="a", upstream=("b",)), replace(TOY_VIEW, name="b", upstream=())
    assert keys.ordered({"a": a, "b": b}) == ("b", "a")
    with pytest.raises(RecipeError, match="circle"):
        keys.ordered({"a": a, "b": replace(b, upstream=("a",))})
    with pytest.raises(RecipeError, match="needs field b"):
        keys.ordered({"a": a})


def test_content_hash_ignores_reading_order() -> None:
    files = [("a", 1, 2), ("b", 3, 4), ("a", 1, 2)]
    assert keys.content_hash("m", files) == keys.content_hash("m", files[::-1]) != keys.content_hash("n", files)


CHANGES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("image_hw_px", {"overrides": {"image_hw_px": (20, 30)}}, {"toy_pictures"}),
    ("grid.nx", {"overrides": {"grid.nx": 16}}, {"toy_count", "toy_view"}),
    ("view_cells", {"overrides": {"view_cells": 2}}, {"toy_view"}),
    ("lidar_sweeps", {"overrides": {"lidar_sweeps": 1}}, {"toy_count", "toy_view"}),
    ("version", {"fields": [replace(TOY_PICTURES, version=2), *TOY_FIELDS[:3]]}, {"toy_pictures"}),
]


@pytest.mark.parametrize(("name", "change", "rebuilt"), CHANGES, ids=[c[0] for c in CHANGES])
def test_one_change_rebuilds_what_depends_on_it(
    toy_root: Path, damaged: Callable[[], Path], name: str, change: dict[str, Any], rebuilt: set[str]
) -> None:
    out = damaged()
    before = inodes(out)
    with pytest.raises(MismatchError) as caught:  # F47, F48: never silently
        build_toy(toy_root, out, **change)
    assert caught.value.code == 9 and "--update" in str(caught.value)
    assert inodes(out) == before
    result = build_toy(toy_root, out, update=True, **change)
    assert {f for f, _ in result.rebuilt} == rebuilt and len(result.rebuilt) == 4 * len(rebuilt)
    after = inodes(out)
    for path, inode in data_files(before).items():
        assert (after[path] != inode) == (path.split("/")[1] in rebuilt), path
    fresh = out.parent / "fresh"
    build_toy(toy_root, fresh, **change)
    ours, theirs = open_toy_cache(out), open_toy_cache(fresh)
    for row in ours.rows():
        for field in ours.fields:
            if ours.fields[field].kind == "array":
                np.testing.assert_array_equal(ours.read(field, int(row)), theirs.read(field, int(row)))
    assert ours.id == theirs.id and stored(out) == stored(fresh)


def test_a_field_is_added(toy_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    build_toy(toy_root, out, fields=[TOY_POSE, TOY_COUNT])
    before = inodes(out)
    with pytest.raises(UsageError, match="unknown fields"):  # a field of one's own must be given again
        build_toy(toy_root, out, fields=[TOY_COUNT, TOY_PICTURES], update=True)
    result = build_toy(toy_root, out, fields=[TOY_PICTURES, TOY_COUNT, TOY_POSE], update=True)
    assert {f for f, _ in result.rebuilt} == {"toy_pictures"}
    assert open_toy_cache(out).recipe.fields == ("toy_count", "toy_pictures", "toy_pose")  # nothing is dropped
    after = inodes(out)
    assert all(after[p] == i for p, i in data_files(before).items())


def test_a_view_is_added_from_the_cache_alone(toy_root: Path, tmp_path: Path) -> None:
    """The upstream rows are read from their shards, checked: a damaged upstream is found, not used."""
    out = tmp_path / "c"
    build_toy(toy_root, out, fields=[TOY_COUNT])
    broken = out / "arrays.zarr/toy_count/c/0/0/0"
    good = broken.read_bytes()
    broken.write_bytes(good[:50] + bytes([good[50] ^ 4]) + good[51:])
    from imkd_data.errors import CacheDamageError

    with pytest.raises(CacheDamageError, match="upstream"):
        build_toy(toy_root, out, fields=[TOY_COUNT, TOY_VIEW], update=True)
    broken.write_bytes(good)
    build_toy(toy_root, out, fields=[TOY_COUNT, TOY_VIEW], update=True)
    cache = open_toy_cache(out)
    for row in cache.rows():
        fine = cache.read("toy_count", int(row))
        np.testing.assert_array_equal(cache.read("toy_view", int(row)), fine.reshape(6, 4, 8, 4).sum((1, 3)))


def test_a_hole_of_a_blob_is_a_hole_downstream(tmp_path: Path) -> None:
    """Also where the blob was built before: a row without parts is a value, a hole is none."""
    count = lambda p, recipe, suite, up, drops: np.array([len(up["toy_pictures"])], "u1")  # noqa: E731
    parts = replace(
        TOY_POSE, name="toy_parts", upstream=("toy_pictures",), dtype=np.dtype("u1"), shape=lambda r, s: (1,), compute=count
    )
    root, bad = write_toy(tmp_path / "w", scenes=2), open_toy(tmp_path / "w").samples("toy-000")[2]
    (root / bad.cameras[0].path).unlink()
    quarantine: dict[str, Any] = {"on_error": "quarantine", "max_bad": 1}
    build_toy(root, tmp_path / "once", fields=[TOY_PICTURES, parts], **quarantine)
    build_toy(root, tmp_path / "twice", fields=[TOY_PICTURES], **quarantine)
    build_toy(root, tmp_path / "twice", fields=[TOY_PICTURES, parts], update=True, **quarantine)
    assert stored(tmp_path / "twice") == stored(tmp_path / "once")
    cache = open_toy_cache(tmp_path / "twice")
    assert cache.index["holes"][cache.line(cache.row(bad.token))].as_py() == ["toy_parts", "toy_pictures"]


def test_scenes_are_added(toy_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    build_toy(toy_root, out, scenes="toy-001,toy-002")
    before = inodes(out)
    assert open_toy_cache(out).recipe.scenes == ("toy-001", "toy-002")
    result = build_toy(toy_root, out, scenes="toy-00[03]", update=True)
    cache = open_toy_cache(out)
    assert [[c.scene for c in s.clips] for s in cache.shards] == [["toy-002"], ["toy-001"], ["toy-000"], ["toy-003"]]
    assert {s for _, s in result.rebuilt} == {2, 3}
    after = inodes(out)
    assert all(after[p] == i for p, i in data_files(before).items())
    assert len(cache.rows("train")) == 10 and len(cache.rows("val")) == 10


def test_moving_the_data_root_changes_nothing(toy_root: Path, damaged: Callable[[], Path], tmp_path: Path) -> None:
    out = damaged()
    before = inodes(out)
    elsewhere = tmp_path / "räw data"  # F27, F45: another path, all times new
    shutil.copytree(toy_root, elsewhere)
    for p in elsewhere.rglob("*"):
        os.utime(p, (1, 1))
    assert build_toy(elsewhere, out).rebuilt == ()
    assert inodes(out) == before


def test_f46_one_file_of_another_size_rebuilds_one_shard(tmp_path: Path) -> None:
    root, out = write_toy(tmp_path / "w", scenes=3), tmp_path / "c"
    build_toy(root, out)
    sample = open_toy(root).samples("toy-002")[1]
    path = root / sample.lidar[0].path
    np.save(path, np.load(path)[:-3])
    result = build_toy(root, out)
    assert set(result.rebuilt) == {("toy_count", 1), ("toy_view", 1)}


def test_f46_equal_size_is_found_by_hash_inputs(tmp_path: Path) -> None:
    from pipelines.build.planning import plan_only
    from pipelines.build.source import verify_source

    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    build_toy(root, out)
    path = root / open_toy(root).samples("toy-001")[2].lidar[0].path
    np.save(path, np.load(path)[::-1] * np.float32(0.5))
    request = {"dataroot": root, "out": out, "reader": open_toy, "fields": TOY_FIELDS}
    _, plan, _ = plan_only(request, update=True)
    assert plan.queue == ()
    _, plan, _ = plan_only(request, update=True, hash_inputs=True)
    assert {(q.field, q.shard, q.reason) for q in plan.queue} == {("toy_count", 1, "content of a source file changed")}
    problems = verify_source(out, root, 2, reader=open_toy, fields=TOY_FIELDS)
    assert {(p.rule, p.field, p.shard) for p in problems} == {
        ("source.differs", "toy_count", 1),
        ("source.differs", "toy_view", 1),
    }
    assert {p.token for p in problems} == {open_toy(root).samples("toy-001")[2].token}


def test_plan_says_why(toy_root: Path, damaged: Callable[[], Path]) -> None:
    from pipelines.build.planning import plan_only

    out = damaged()
    (out / "receipts/toy_pose/00002.json").unlink()
    (out / "arrays.zarr/toy_count/c/1/0/0").unlink()
    before = inodes(out)
    request = {
        "dataroot": toy_root,
        "out": out,
        "reader": open_toy,
        "fields": TOY_FIELDS,
        "recipe_overrides": {"image_hw_px": (20, 30)},
    }
    _, plan, _ = plan_only(request, update=True)
    assert {(f, r, n) for f, r, n in plan.reasons()} == {
        ("toy_pose", "not built yet", 1),
        ("toy_count", "data file is missing", 1),
        ("toy_pictures", "image_hw_px 495x880 -> 20x30", 4),
    }
    assert inodes(out) == before  # plan writes nothing


def test_recipe_of_a_cache_is_complete_and_has_no_path(toy_cache: Path, toy_root: Path) -> None:
    text = (toy_cache / "recipe.json").read_text()
    assert str(toy_root) not in text and set(json.loads(text)) == set(recipe().as_dict())
    everything = b"".join(v for n, v in stored(toy_cache).items() if n.endswith(".json"))
    assert str(toy_root).encode() not in everything and os.uname().nodename.encode() not in everything


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"scenes": "nothing-*"}, UsageError),
        ({"sensors": ["SPINNER", "NOSE"]}, UsageError),
        ({"splits": ("train", "moon")}, UsageError),
        ({"fields": ["no_such_field"]}, UsageError),
        ({"overrides": {"lidar_sweeps": "many"}}, RecipeError),
        ({"overrides": {"typo": 3}}, RecipeError),
        ({"overrides": {"grid.nz": 3}}, RecipeError),
        ({"overrides": {"grid.cell_m": 0.0005}}, RecipeError),
    ],
)
def test_requests_that_cannot_be_meant(toy_root: Path, tmp_path: Path, change: dict[str, Any], kind: type) -> None:
    with pytest.raises(kind) as caught:
        build_toy(toy_root, tmp_path / "c", **change)
    assert caught.value.code == 2 and not (tmp_path / "c").exists()


def test_a_field_whose_sensor_is_not_declared(toy_root: Path, tmp_path: Path) -> None:
    result = build_toy(toy_root, tmp_path / "c", sensors=["EYE_LEFT", "SPINNER"])
    assert result.left_out == {}
    result = build_toy(toy_root, tmp_path / "d", sensors=["EYE_LEFT"])
    assert set(result.left_out) == {"toy_count", "toy_view"}
    assert set(open_toy_cache(tmp_path / "d").fields) == {"toy_pose", "toy_pictures"}
    assert open_toy_cache(tmp_path / "d").recipe.reference_channel == "EYE_LEFT"
    with pytest.raises(RecipeError, match="asked for"):
        build_toy(toy_root, tmp_path / "e", sensors=["EYE_LEFT"], fields=["lidar_bev_sum"])


def test_a_split_without_annotations_has_no_boxes(toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy

    monkeypatch.setattr(toy, "_boxes", lambda rows: None)
    result = build_toy(toy_root, tmp_path / "c", fields=[TOY_POSE, replace(TOY_POSE, name="toy_boxes", needs=("boxes",))])
    assert result.left_out == {"toy_boxes": "the split has no annotations"}
    cache = open_toy_cache(tmp_path / "c")
    assert list(cache.fields) == ["toy_pose"] and set(cache.index["num_boxes"].to_pylist()) == {-1}
    with pytest.raises(RecipeError, match="no annotations"):
        build_toy(toy_root, tmp_path / "d", fields=["boxes"])


def test_grid_is_that_of_the_test() -> None:
    assert GRID["grid.nx"] != GRID["grid.ny"] and GRID["grid.x_min_m"] != -GRID["grid.nx"] * GRID["grid.cell_m"] / 3
