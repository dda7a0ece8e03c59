"""Which scenes an update ends up with, and requests that lack scenes which the shard table holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import TOY_FIELDS, open_toy, write_toy
from toy_build import build_toy, open_toy_cache, stored

from imkd_data.cache import fault
from imkd_data.errors import MismatchError, SourceMissingError, UsageError
from pipelines.build.planning import plan_only

SCENES = ("toy-000", "toy-001", "toy-002", "toy-003")  # train, val, train, val


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "w", scenes=4)


def lose(root: Path, scene: str) -> str:
    """Remove one LiDAR file of a scene and name it."""
    path = open_toy(root).samples(scene)[2].lidar[0].path
    (root / path).unlink()
    return path


def test_naming_a_scene_of_a_cache_of_all_scenes_keeps_all(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    build_toy(world, out)
    before = stored(out)
    assert build_toy(world, out, update=True, scenes="toy-000").rebuilt == ()
    assert stored(out) == before and open_toy_cache(out).recipe.scenes == ()
    with pytest.raises(UsageError, match="no scene of the split matches") as caught:
        build_toy(world, out, update=True, scenes=["toy-000", "toy-9*"])
    assert caught.value.details["found"] == "toy-9*" and stored(out) == before


def test_scenes_of_a_new_split_join_all_of_the_old_one(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    build_toy(world, out, splits=("train",))
    result = build_toy(world, out, update=True, splits=("val",), scenes="toy-001")
    assert open_toy_cache(out).recipe.scenes == ("toy-000", "toy-001", "toy-002") and result.samples == 15


@pytest.mark.parametrize("begun", [None, "toy-000,toy-001"])
def test_available_scenes_join_those_that_are_built(world: Path, tmp_path: Path, begun: str | None) -> None:
    out = tmp_path / "c"
    build_toy(world, out, scenes=begun, splits=("train", "val") if begun else ("train",))
    lost = "toy-002" if begun else "toy-003"
    lose(world, lost)
    result = build_toy(world, out, update=True, scenes="available", splits=("val",))
    assert set(result.missing_scenes) == {lost} and result.samples == 15
    assert open_toy_cache(out).recipe.scenes == tuple(s for s in SCENES if s != lost)


@pytest.mark.parametrize("begun", [None, "toy-000,toy-001"])
def test_a_built_scene_that_lost_a_file_is_named_and_stays(world: Path, tmp_path: Path, begun: str | None) -> None:
    out = tmp_path / "c"
    build_toy(world, out, scenes=begun)
    before, path = stored(out), lose(world, "toy-000")
    with pytest.raises(SourceMissingError) as caught:
        build_toy(world, out, update=True, scenes="available")
    told = caught.value.details
    assert told["file"] == path and told["scene"] == "toy-000" and "--scenes available" not in told["next"]
    assert stored(out) == before and open_toy_cache(out)


def crash_before_recipe(monkeypatch: pytest.MonkeyPatch, world: Path, out: Path, **rest: object) -> None:
    """The group with its shard table is written, the recipe is not."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="injected"):
        patch.setattr(fault, "_COUNTS", {})
        patch.setenv("IMKD_FAULT", "recipe.begin:error")
        build_toy(world, out, **rest)


@pytest.mark.parametrize(
    "change", [{"splits": ("val",)}, {"overrides": {"rows_per_shard": 2}}], ids=["split", "rows_per_shard"]
)
def test_a_shard_table_without_a_recipe_binds_no_later_request(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    out = tmp_path / "c"
    crash_before_recipe(monkeypatch, world, out)
    assert (out / "arrays.zarr" / "zarr.json").is_file() and not (out / "recipe.json").exists()
    build_toy(world, out, **change)
    build_toy(world, tmp_path / "fresh", **change)
    assert stored(out) == stored(tmp_path / "fresh")


def test_scenes_of_a_crashed_update_are_named_and_the_same_command_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    build_toy(world, out, scenes="toy-000")
    crash_before_recipe(monkeypatch, world, out, update=True, scenes="toy-001")
    for other in ({"update": True, "scenes": "toy-002"}, {"scenes": "toy-000"}):
        with pytest.raises(MismatchError, match="scenes that the request lacks") as caught:
            build_toy(world, out, **other)
        assert "toy-001" in caught.value.details["found"] and "--update" in caught.value.details["next"]
    build_toy(world, out, update=True, scenes="toy-001")
    assert open_toy_cache(out).recipe.scenes == ("toy-000", "toy-001")


def test_a_plan_of_another_split_names_the_scenes_that_it_lacks(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    build_toy(world, out)
    request = {"dataroot": world, "out": out, "reader": open_toy, "fields": TOY_FIELDS, "version": "toy-1", "splits": ("val",)}
    with pytest.raises(MismatchError, match="scenes that the request lacks") as caught:
        plan_only(request)
    assert "toy-000" in caught.value.details["found"] and "toy-001" not in caught.value.details["found"]


def test_all_missing_files_of_a_scene_are_counted(world: Path, tmp_path: Path) -> None:
    first, second, *_ = open_toy(world).samples("toy-002")
    gone = [f.path for f in (*first.cameras, *first.lidar, *second.cameras)] + [first.radar["WAVE"][0].path]
    assert len(set(gone)) == 7
    for path in gone:
        (world / path).unlink()
    alone = lose(world, "toy-003")
    result = build_toy(world, tmp_path / "c", scenes="available")
    assert result.missing_scenes["toy-002"].startswith("7 files missing, first ")
    assert result.missing_scenes["toy-002"].rpartition(" ")[2] in gone
    assert result.missing_scenes["toy-003"] == f"1 file missing, first {alone}"
