"""Values that a method option cannot mean are refused with the option's name; what a join suggests really ends the conflict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from imkd_data.errors import RecipeError
from imkd_models.distill import METHODS, make_method
from imkd_models.distill.crkd import CrkdOptions
from imkd_models.distill.imkd import ImkdOptions
from imkd_models.distill.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Nested(Options):
    """Numbers inside a tuple and a mapping, with limits and without."""

    sizes: tuple[int, ...] = option((4, 2), "whole numbers", low=1)
    shares: tuple[float, ...] = option((0.5,), "shares", low=0, high=1)
    weights: dict[str, float] = option({}, "by name", low=0)  # noqa: RUF009
    free: dict[str, Any] = option({}, "anything")  # noqa: RUF009


def refused(method: str, values: dict[str, Any], words: str) -> RecipeError:
    with pytest.raises(RecipeError, match=words) as error:
        METHODS[method].make_options(values)
    return error.value


@pytest.mark.parametrize(
    "value", ["nan", "NaN", "inf", "-inf", "Infinity", math.nan, math.inf, -math.inf, pytest.param(10**400, id="huge")]
)
@pytest.mark.parametrize(("method", "name"), [("imkd", "lambda_l2m"), ("imkd", "rho"), ("adaptive_smooth", "beta_min")])
def test_a_number_is_finite(method: str, name: str, value: Any) -> None:
    error = refused(method, {name: value}, f"option {name}")
    assert "finite number" in error.details["expected"] and error.code == 2


def test_every_number_of_every_method_is_finite() -> None:
    for name, method in METHODS.items():
        for one in method.options.describe():
            if type(one["default"]) in (int, float):
                refused(name, {one["name"]: "nan"}, f"option {one['name']}")


def test_numbers_inside_are_finite_too() -> None:
    for values in (
        {"sizes": [4, math.nan]},
        {"shares": "0.5,nan"},
        {"shares": (math.inf,)},
        {"weights": {"car": math.nan}},
        {"weights": '{"car": Infinity}'},
        {"free": {"a": {"b": [1, math.nan]}}},
    ):
        with pytest.raises(RecipeError, match=f"option {next(iter(values))}.*"):
            Nested.from_dict(values)
    with pytest.raises(RecipeError, match="lambda_l2m"):
        ImkdOptions(lambda_l2m=math.nan)  # a value of Python is held to the same
    with pytest.raises(RecipeError, match="lambda_l2m"):
        joined = make_method("imkd+dual_distill")
        joined.changes(joined.make_options({"imkd": {"lambda_l2m": math.nan}}))


def test_limits_hold_for_every_member() -> None:
    assert Nested.from_dict({"sizes": "8,1", "shares": [0, 1], "weights": {"car": 0}}).as_dict() == {
        "sizes": [8, 1],
        "shares": [0.0, 1.0],
        "weights": {"car": 0},
        "free": {},
    }
    for values in ({"sizes": "8,0"}, {"shares": [0.5, 1.5]}, {"weights": {"car": -1}}, {"weights": {"car": "a"}}):
        with pytest.raises(RecipeError, match=f"option {next(iter(values))}"):
            Nested.from_dict(values)


@pytest.mark.parametrize("value", ["1.5", 1.5, "inf", "nan", "a", None, True, [1], {}])
def test_a_whole_number_is_whole(value: Any) -> None:
    for name in ("warmup_steps", "end_step"):
        refused("imkd", {name: value}, f"option {name}")


def test_whole_numbers_in_other_words() -> None:
    for value in (3, 3.0, "3", "3.0"):
        steps = METHODS["imkd"].make_options({"warmup_steps": value}).warmup_steps
        assert steps == 3 and type(steps) is int
    assert type(METHODS["imkd"].make_options({"lambda_l2m": 1}).lambda_l2m) is float
    assert METHODS["crkd"].make_options({"relation_sizes": "16,4"}).relation_sizes == (16, 4)
    assert METHODS["crkd"].make_options({"relation_sizes": [16.0, "4"]}).relation_sizes == (16, 4)
    assert CrkdOptions(relation_sizes=(8,)).relation_sizes == (8,)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"relation_sizes": "a"}, "relation_sizes"),
        ({"relation_sizes": "32,0"}, "relation_sizes"),
        ({"relation_sizes": "32,-4"}, "relation_sizes"),
        ({"relation_sizes": [32.5]}, "relation_sizes"),
        ({"relation_sizes": 32.5}, "relation_sizes"),
        ({"relation_sizes": ""}, "relation_sizes"),
        ({"relation_sizes": []}, "relation_sizes"),
        ({"group_weight_by_name": {"car": "a"}}, "group_weight_by_name"),
        ({"group_weight_by_name": '{"car": null}'}, "group_weight_by_name"),
        ({"group_weight_by_name": {"car": -1}}, "group_weight_by_name"),
        ({"group_weight_by_name": {"car": math.nan}}, "group_weight_by_name"),
        ({"group_weight_by_name": "car"}, "group_weight_by_name"),
        ({"defects": 5}, "defects"),
    ],
)
def test_crkd_lists_and_weights(values: dict[str, Any], name: str) -> None:
    refused("crkd", values, name)


def test_crkd_values_that_are_meant() -> None:
    weights = METHODS["crkd"].make_options({"group_weight_by_name": '{"car": 0, "bus": 2.5}'}).group_weight_by_name
    assert weights == {"car": 0, "bus": 2.5}
    assert METHODS["crkd"].make_options({"relation_sizes": [], "lambda_rel": 0}).relation_sizes == ()  # nothing reads them
    assert METHODS["crkd"].make_options({"defects": []}).defects == ()


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        ("imkd", {"lambda_l2m": -1}, "at least 0"),
        ("imkd", {"rho": 2}, "0 to 1"),
        ("imkd", {"warmup_steps": -1}, "at least 0"),
    ],
)
def test_limits_in_words(method: str, values: dict[str, Any], expected: str) -> None:
    assert refused(method, values, "out of range").details["expected"] == expected


def test_a_highest_value_alone_in_words() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Low(Options):
        share: float = option(0.0, "a share", high=1)

    with pytest.raises(RecipeError, match="share") as error:
        Low(share=2.0)
    assert error.value.details["expected"] == "at most 1"


# ----------------------------------------------------------------------------------------------------------- joined advice


def advice(method: str, values: dict[str, Any]) -> list[str]:
    """The settings that the refusal names, without the words beside them."""
    joined = make_method(method)
    with pytest.raises(RecipeError, match="different students") as error:
        joined.changes(joined.make_options(values))
    return [part.split(" ")[0] for part in error.value.details["next"].removeprefix("set ").split(" or ")]


def test_the_advice_of_a_join_is_true() -> None:
    assert advice("crkd+adaptive_smooth", {}) == ["crkd.fuser=own", "adaptive_smooth.fuser=gated"]
    assert advice("adaptive_smooth+crkd", {}) == ["adaptive_smooth.fuser=gated", "crkd.fuser=own"]
    assert advice("crkd+imkd", {}) == ["crkd.fuser=own"]
    assert advice("imkd+adaptive_smooth", {}) == ["imkd.stage3=off", "adaptive_smooth.simulated_branch=off"]


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", METHODS)
def test_every_advice_ends_the_conflict(first: str, second: str) -> None:
    joined = make_method(f"{first}+{second}") if first != second else None
    if joined is None or not _conflict(joined, {}):
        return
    for setting in advice(joined.name, {}):
        name, _, value = setting.partition("=")
        values: dict[str, Any] = {name: value}
        if name == "imkd.stage3":  # the option's own rule, which the advice quotes
            values["imkd.stage3_supervision"] = "off"
        if name == "crkd.fuser":
            values["crkd.camera"] = "bev_camera"
        assert not _conflict(joined, values), setting


def _conflict(joined: Any, values: dict[str, Any]) -> bool:
    try:
        joined.changes(joined.make_options(values))
    except RecipeError as error:
        assert "different students" in error.what, error
        return True
    return False


def test_an_advice_quotes_the_rule_of_its_option() -> None:
    joined = make_method("imkd+crkd")
    with pytest.raises(RecipeError) as error:
        joined.changes(joined.make_options({}))
    camera = "set camera=bev_camera (lambda_cam=0 leaves the camera map out)"
    assert error.value.details["next"] == f"set crkd.fuser=own (and {camera})"
    joined = make_method("imkd+adaptive_smooth")
    with pytest.raises(RecipeError) as error:
        joined.changes(joined.make_options({}))
    assert error.value.details["next"].startswith("set imkd.stage3=off (and set stage3_supervision=off)")


def test_crkd_joins_a_student_that_keeps_its_own_fuser() -> None:
    joined = make_method("imkd+crkd")
    values = {"crkd.fuser": "own", "crkd.lambda_cam": 0, "crkd.calibration": False}
    options = joined.make_options(values)
    assert joined.changes(options) == {**METHODS["imkd"].student_changes, "calibration": False}
    alone = METHODS["crkd"].make_options({"fuser": "own", "camera": "bev_camera"})
    assert METHODS["crkd"].changes(alone) == {"calibration": True}
    assert "bev_camera_gated" not in METHODS["crkd"].needs_for(alone).student
    with pytest.raises(RecipeError, match="only the gated fuser makes bev_camera_gated"):
        METHODS["crkd"].make_options({"fuser": "own"})


def test_no_advice_where_no_option_decides() -> None:
    from dataclasses import replace

    fixed = [replace(METHODS["dual_distill"], name=n, changes=lambda o, n=n: {"fuser": n}) for n in ("a", "b")]
    joined = make_method("a+b", {m.name: m for m in fixed})
    with pytest.raises(RecipeError, match="a and b want different students") as error:
        joined.changes(joined.make_options({}))
    assert error.value.details["next"] == "train them apart: no option of a or b changes fuser"
