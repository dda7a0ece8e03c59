"""Errors carry code, place and next step across processes; recipes round-trip and refuse what they do not know."""

from __future__ import annotations

import json
import math
import pickle

import pytest

import imkd_data.errors as errors
from imkd_data.errors import ImkdError, InputDataError, InterruptedBuildError, RecipeError
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


def test_an_interrupted_build_keeps_its_exit_code_across_a_process_border() -> None:
    error = InterruptedBuildError("stopped by SIGTERM", signal_code=143, kept="3 shards")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InterruptedBuildError and again.exit_code == 143
    assert again.details == error.details and again.what == error.what


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


_BOX = (-1.5, 3.5, -1.2, 1.2, -0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (n, v)
            for n in ("rows_per_shard", "view_cells", "boxes_width", "depth_width")
            for v in (0, -1, 2.5, True, "4", None)
        ],
        *[("lidar_sweeps", v) for v in (0, 257, 2.0, True)],
        *[("radar_sweeps", v) for v in (0, 32_769, "many")],
        ("depth_width", 65_536),
        *[("jpeg_quality", v) for v in (0, 101, 1000, 90.0, "best")],
        *[("image_hw_px", v) for v in (5, (27,), (0, 48), (27, 48.0), (27, 65_501), (True, True), "27x48")],
        *[("z_span_m", v) for v in (0, -8.0, 0.0001, math.nan, math.inf, "abc", None, True)],
        *[("z_min_m", v) for v in (math.nan, -math.inf, 1e300, "low", None)],
        *[("own_car_box_m", v) for v in (3, _BOX, (*_BOX, math.nan), (*_BOX, "up"), (*_BOX, 1e300), "123456", None)],
        *[("options", v) for v in (5, "on_overflow", ["on_overflow"], {"mine": math.nan}, {"mine": {1}}, {1: 2}, None)],
        *[("splits", v) for v in ("mini_train", ("mini_train", 3), 7)],
        *[(n, v) for n in ("sensors", "fields", "scenes") for v in ("boxes", (1,), None)],
        *[(n, v) for n in ("version", "dataset", "reference_channel") for v in (3, None)],
        *[("grid", v) for v in (5, {"cell_m": 0.2}, None)],
    ],
)
def test_recipe_refuses_values_that_cannot_be_meant(name: str, value: object) -> None:
    """Before anything is read or built, and by the name of the entry."""
    with pytest.raises(RecipeError, match=name):
        a_recipe(**{name: value})


@pytest.mark.parametrize(
    "change",
    [
        *[{n: v} for n in ("x_min_m", "y_min_m", "cell_m") for v in (math.nan, math.inf, "0.2", None, [1], True)],
        {"cell_m": 1e-10},
        {"nx": 64.0},
        {"ny": "64"},
        {"nx": True},
        {"nz": 3},
    ],
)
def test_recipe_refuses_a_grid_that_cannot_be_meant(change: dict[str, object]) -> None:
    value = a_recipe(view_cells=1).as_dict()
    value["grid"] |= change
    with pytest.raises(RecipeError):
        Recipe.from_dict(value)


@pytest.mark.parametrize("value", [[], "recipe", None, 5])
def test_recipe_must_be_an_object(value: object) -> None:
    with pytest.raises(RecipeError, match="recipe"):
        Recipe.from_dict(value)  # type: ignore[arg-type]


def test_recipe_takes_the_largest_values_that_fit() -> None:
    recipe = a_recipe(
        lidar_sweeps=256,
        radar_sweeps=32_768,
        depth_width=65_535,
        jpeg_quality=100,
        z_span_m=8,  # a whole number is a number, and stays one: keys are hashes of the JSON form
        own_car_box_m=(0, 0, 0, 0, 0, 0),
        options={"on_overflow": "drop-far", "mine": [1, None, {"a": 2.5}]},
    )
    assert Recipe.from_dict(json.loads(canonical_json(recipe.as_dict()))) == a_recipe(
        **{n: getattr(recipe, n) for n in ("lidar_sweeps", "radar_sweeps", "depth_width", "jpeg_quality", "own_car_box_m")},
        z_span_m=8,
        options=recipe.options,
    )
    assert b'"z_span_m":8}' in canonical_json(recipe.as_dict())


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "ü"]}) == '{"a":[1.5,"ü"],"b":1}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
