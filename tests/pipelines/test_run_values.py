"""Run settings of another type or outside their range are refused with key, range and value; what is meant is taken."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from imkd_data.errors import RecipeError, UsageError
from pipelines.machine import Machine
from pipelines.run import LoaderConfig, OptimConfig, Run, parse_settings
from pipelines.runs import RUNS, get_run

OUTSIDE = [
    ("optim.lr", ("-1", "1e300", "NaN", "Infinity", "-Infinity", "1" + 400 * "0")),
    ("optim.weight_decay", ("-1", "NaN", "1e300")),
    (
        "optim.betas",
        ("[2,3]", "[0.9]", "[0.9,1]", "[-0.1,0.9]", "[0.9,0.99,0.999]", "[]", "[NaN,0.9]", '["a",0.9]', "[true,0.9]"),
    ),
    ("optim.milestones", ("[-1]", '["a"]', "[NaN]", "[Infinity]", "[[1]]", "[null]")),
    ("optim.gamma", ("-1", "NaN", "1e300")),
    ("optim.warmup_share", ("-0.1", "1.1", "NaN")),
    ("optim.clip", ("-1", "NaN", "Infinity")),
    ("optim.ema", ("2", "-0.5", "1.0001", "NaN")),
    ("optim.backbone_factor", ("-1", "NaN", "Infinity")),
    ("augment.image_scale", ("[0,1]", "[1.2,1]", "[1]")),
    ("augment.image_flip", ("2", "-0.5")),
    ("augment.rotation_deg", ("[10,-10]", "[NaN,1]", "[-1e9,0]")),
    ("augment.bev_scale", ("[0,0]", "[-1,-1]", "[1.1,0.9]", "[NaN,1]", "[1]", '["a",1]')),
    ("augment.flip_x", ("2", "-1", "NaN")),
    ("augment.flip_y", ("1.5",)),
    ("augment.image_rotation_deg", ("[5,-5]", "[0,Infinity]")),
    ("augment.radar_drop", ("1.5", "-0.1")),
    ("augment.evaluation_scale", ("0", "-1", "Infinity", "1e300")),
]
INSIDE = [
    ("optim.lr", ("0", "1e-3", "1e30")),  # 0: statistics alone move
    ("optim.weight_decay", ("0", "0.5")),
    ("optim.betas", ("[0,0]", "0.9,0.99")),
    ("optim.milestones", ("[]", "[0,4.5]", "19,23")),
    ("optim.gamma", ("0", "1", "2")),
    ("optim.warmup_share", ("0", "1")),
    ("optim.clip", ("0", "1e9")),  # 0: none
    ("optim.ema", ("0", "1")),  # 0: none; 1: the mean over all steps, nearly
    ("optim.backbone_factor", ("0", "10")),  # 0: the backbone keeps its weights
    ("augment.image_scale", ("[1,1]", "0.5,2")),
    ("augment.rotation_deg", ("[0,0]", "[20,21]", "[-180,180]")),
    ("augment.bev_scale", ("1,1", "[0.9,1.1]")),
    ("augment.flip_x", ("0", "1")),
    ("augment.radar_drop", ("0", "1")),
    ("augment.evaluation_scale", ("1.0909",)),
    ("seed", ("0", str(2**63 - 1))),
]


def cases(table: list[tuple[str, tuple[str, ...]]]) -> list[Any]:
    return [pytest.param(key, text, id=f"{key}={text[:12]}") for key, texts in table for text in texts]


@pytest.mark.parametrize(("key", "text"), cases(OUTSIDE))
def test_numbers_outside_their_range(key: str, text: str) -> None:
    run = get_run("tiny_teacher")
    for name in (key, key.rpartition(".")[2]):
        with pytest.raises(RecipeError, match=f"setting {key}") as error:
            run.with_settings({name: text})
        assert " to " in error.value.details["expected"] and error.value.details["found"], error.value.details


@pytest.mark.parametrize(("key", "text"), cases(OUTSIDE))
def test_a_configuration_is_held_to_the_same(key: str, text: str) -> None:
    section, leaf = key.split(".")
    value = get_run("tiny_teacher").as_dict()
    (value["optim"] if section == "optim" else value["loader"]["augment"])[leaf] = json.loads(text)
    with pytest.raises(RecipeError, match=key):
        Run.from_dict(value)


@pytest.mark.parametrize(("key", "text"), cases(INSIDE))
def test_numbers_that_are_meant(key: str, text: str) -> None:
    run = get_run("tiny_teacher").with_settings({key: text})
    assert Run.from_dict(json.loads(json.dumps(run.as_dict()))) == run


def test_values_of_python_are_held_to_the_same() -> None:
    for optim in (OptimConfig(clip=-1.0), OptimConfig(betas=(0.9,)), OptimConfig(lr="1e-3"), OptimConfig(milestones=3.0)):  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match="run setting optim"):
            Run(name="mine", optim=optim)


def test_named_runs_are_unchanged_by_their_own_form() -> None:
    for make in RUNS.values():
        text = json.dumps(make().as_dict(), sort_keys=True)
        assert json.dumps(Run.from_dict(json.loads(text)).as_dict(), sort_keys=True) == text


@pytest.mark.parametrize("text", ["-1", str(2**63), 23 * "9", "a", "1.5", "true", "NaN", "[1]"])
def test_seeds(text: str) -> None:
    with pytest.raises(RecipeError, match="setting seed"):
        get_run("tiny_teacher").with_settings({"seed": text})
    with pytest.raises(RecipeError, match="setting seed"):
        get_run("overfit").with_settings({"seed": text})


def test_whole_numbers_have_a_largest_value() -> None:
    with pytest.raises(RecipeError, match="batch_size") as error:
        get_run("tiny_teacher").with_settings({"batch_size": 23 * "9"})
    assert error.value.details["expected"] == f"a whole number, 1 to {2**63 - 1}"


WRONG = [
    ("seed", "a"),
    ("seed", 1.5),
    ("seed", None),
    ("name", 5),
    ("summary", 5),
    ("batch_size", True),
    ("epochs", "a"),
    ("tensorboard", "maybe"),
    ("tensorboard", 1),
    ("sync_batchnorm", "on"),
    ("precision", 32),
    ("baseline", 5),
    ("start", ["a"]),
    ("model", [1]),
    ("method", 5),
    ("method", ["imkd"]),
    ("options", [1]),
    ("optim", [1]),
    ("loader", 5),
    ("stages", 5),
    ("stages", [5]),
    ("stages", {}),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_configuration_of_other_types(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"setting {key}") as error:
        Run.from_dict({**get_run("tiny_teacher").as_dict(), key: value})
    assert error.value.details["expected"] and error.value.details["found"]


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("loader", {"augment": [1]}, "augment"),
        ("loader", {"augment": {"flip_x": "a"}}, "augment.flip_x"),
        ("loader", {"augment": {"enabled": "maybe"}}, "augment.enabled"),
        ("loader", {"augment": {"radar_sweeps_kept": 1.5}}, "radar_sweeps_kept"),
        ("loader", {"workers": True}, "loader.workers"),
        ("loader", {"parity": [1]}, "loader.parity"),
        ("loader", {"parity": [["a"]]}, "loader.parity"),
        ("optim", {"betas": [1]}, "optim.betas"),
        ("optim", {"betas": 1}, "optim.betas"),
        ("optim", {"milestones": ["a"]}, "optim.milestones"),
        ("optim", {"warmup_steps": True}, "optim.warmup_steps"),
        ("optim", {"lr": True}, "optim.lr"),
    ],
)
def test_a_section_of_other_types(section: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Run.from_dict({**get_run("tiny_teacher").as_dict(), section: value})


def test_network_settings_are_finite() -> None:
    run = get_run("tiny_student")
    key = next(k for k, v in run.model.items() if type(v) is float)
    pairs = next(k for k, v in run.model.items() if isinstance(v, list) and v and type(v[0]) is float)
    for name, text in ((key, "NaN"), (key, "Infinity"), (key, "1" + 400 * "0"), (pairs, "[NaN,1]")):
        with pytest.raises(RecipeError, match=f"setting model.{name}"):
            run.with_settings({f"model.{name}": text})


def test_a_run_saved_by_an_older_version_is_read() -> None:
    """Whole numbers where floats are, settings that came later absent, a method of one's own by its name."""
    saved = {
        "name": "old",
        "method": "hinted",
        "options": {"weight": 2},
        "optim": {"lr": 1, "betas": [0, 0.99], "milestones": [19, 23], "clip": 0, "ema": 0},
        "loader": {"augment": {"rotation_deg": [0, 0], "flip_x": 0, "bev_scale": [1, 1]}},
        "macs": 5,
    }
    run = Run.from_dict(saved)
    assert (
        run.optim.betas == (0, 0.99)
        and run.loader.augment.flip_x == 0
        and run.loader == LoaderConfig(augment=run.loader.augment)
    )


def test_parse_settings_names_its_option() -> None:
    for items, option in ((["student"], "--steps"), (["=3"], "--set")):
        with pytest.raises(UsageError, match=f"{option} needs") as error:
            parse_settings(items, option)
        assert error.value.details["found"] == items[0]


def test_the_memory_limit_is_read_on_every_machine() -> None:
    assert Machine(memory_limit="22GiB").memory_limit == "22GiB" and Machine().memory_limit is None
    for text in ("foo", "", "GiB", "-1GiB", "nan"):
        with pytest.raises(UsageError, match="size"):
            Machine(accelerator="cpu", memory_limit=text)


def test_infinity_is_not_a_number_of_python_either() -> None:
    with pytest.raises(RecipeError, match="setting optim"):
        Run(name="mine", optim=OptimConfig(lr=math.inf))
