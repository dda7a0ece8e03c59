"""Scenes that are asked for and not there are named; none is left out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imkd_data.errors import SourceMissingError, UsageError
from imkd_models.checkpoint import load_model
from pipelines.predict import open_tree, predict_split


def test_unknown_scenes_are_named(line: Any, tmp_path: Path) -> None:
    model, meta = load_model(line.students["student0"])
    everything = open_tree(model, meta, line.tree, "v1.0-mini", ("mini_train", "mini_val"))
    scenes = sorted(set(everything.index["scene"].to_pylist()))
    train = sorted(set(open_tree(model, meta, line.tree, "v1.0-mini", ("mini_train",)).index["scene"].to_pylist()))
    (val,) = set(scenes) - set(train)
    for split, asked, unknown in (
        ("mini_val", (val, "scene-9999"), "scene-9999"),
        ("mini_val", ("scene-9999", val, "scene-0"), "scene-0, scene-9999"),
        ("mini_val", tuple(train), train[0]),  # of another split
    ):
        with pytest.raises(UsageError, match=f"no scene {unknown} in mini_val") as caught:
            predict_split(line.students["student0"], line.tree, "", split, tmp_path / "out", scenes=asked)
        assert caught.value.code == 2 and caught.value.details["expected"] == val
    assert not (tmp_path / "out").exists()
    both = open_tree(model, meta, line.tree, "v1.0-mini", ("mini_train", "mini_val"), (val, train[0]))
    assert sorted(set(both.index["scene"].to_pylist())) == sorted([val, train[0]])  # one of each split
    with pytest.raises(SourceMissingError, match="no scene of this split"):
        open_tree(model, meta, line.tree, "v1.0-mini", ("test",), ("scene-9999",))


def test_rows_of_an_unknown_scene_or_split_are_refused_as_in_a_written_cache(line: Any) -> None:
    model, meta = load_model(line.students["student0"])
    cache = open_tree(model, meta, line.tree, "v1.0-mini", ("mini_train", "mini_val"))
    assert len(cache.rows("mini_val")) == 3 and len(cache.rows(["mini_train", "mini_val"])) == 6
    for given in ({"split": "test"}, {"scenes": ["scene-9999"]}):
        with pytest.raises(UsageError, match=r"the cache holds no (split test|scene scene-9999)"):
            cache.rows(**given)
