"""Errors carry code, place and next step across processes; recipes round-trip and refuse what they do not know."""

from __future__ import annotations

import json
import pickle

import pytest

import imkd_data.errors as errors
from imkd_data.errors import ImkdError, InputDataError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.recipe import Recipe, canonical_json


def test_every_error_class_has_its_documented_code() -> None:
    codes = {name: getattr(errors, name).code for name in errors.__all__}
    assert codes == {
        "ImkdError": 1,
        "FrameMismatchError": 1,
        "InterruptedBuildError": 1,
        "UsageError": 2,
        "RecipeError": 2,
        "InputDataError": 3,
        "UnsafePathError": 3,
        "CacheDamageError": 4,
        "StorageError": 5,
        "DiskFullError": 5,
        "NoProgressError": 6,
        "LockedError": 7,
        "SourceMissingError": 8,
        "MismatchError": 9,
        "MissingFeatureError": 9,
    }


def test_an_error_survives_pickling_with_its_details() -> None:
    error = InputDataError("short file", rule="lidar.size", file="a.pcd.bin", token="t", found=7, problems=(ImkdError("x"),))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InputDataError and again.details == error.details and again.rule == "lidar.size"
    assert again.problems[0].what == "x"
    assert json.loads(json.dumps(again.as_json()))["found"] == 7
    assert "a.pcd.bin" in str(again)


def test_unknown_error_details_are_a_bug() -> None:
    with pytest.raises(TypeError, match="colour"):
        ImkdError("x", colour="red")


def a_recipe(**changes: object) -> Recipe:
    values: dict[str, object] = {
        "version": "v1.0-mini",
        "splits": ("mini_train", "mini_val"),
        "sensors": ("LIDAR_TOP", "CAM_FRONT"),
        "reference_channel": "LIDAR_TOP",
        "fields": ("boxes",),
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def test_recipe_round_trips_through_canonical_json() -> None:
    recipe = a_recipe(grid=BevGrid(x_min_m=-10.4, y_min_m=0.8, cell_m=0.2, nx=96, ny=48), options={"mine": 1})
    text = canonical_json(recipe.as_dict())
    again = Recipe.from_dict(json.loads(text))
    assert again == recipe and canonical_json(again.as_dict()) == text


def test_recipe_refuses_unknown_and_missing_keys() -> None:
    value = a_recipe().as_dict()
    with pytest.raises(RecipeError, match="unknown keys") as caught:
        Recipe.from_dict({**value, "gird": 1})
    assert caught.value.details["found"] == "gird"
    del value["version"]
    with pytest.raises(RecipeError, match="version"):
        Recipe.from_dict(value)


def test_recipe_refuses_a_view_that_does_not_pool() -> None:
    with pytest.raises(RecipeError, match="pool by 5"):
        a_recipe(view_cells=5)


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "ü"]}) == '{"a":[1.5,"ü"],"b":1}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
