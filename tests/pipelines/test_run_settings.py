"""Settings that a run cannot mean, and the steps that stages share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from imkd_data.errors import RecipeError, UsageError
from pipelines.run import Run
from pipelines.runs import RUNS, get_run

AT_LEAST_ONE = ("batch_size", "keep", "log_every")
AT_LEAST_ZERO = (
    "epochs",
    "max_steps",
    "global_batch",
    "checkpoint_every",
    "validate_every",
    "warmup_steps",
    "workers",
    "leave_out",
    "radar_sweeps",
    "lidar_sweeps",
    "paste_min_points",
    "paste_per_class",
    "paste_off_epochs",
    "radar_sweeps_kept",
)


@pytest.mark.parametrize(("key", "least"), [*((k, 1) for k in AT_LEAST_ONE), *((k, 0) for k in AT_LEAST_ZERO)])
def test_whole_numbers_have_a_least_value(key: str, least: int) -> None:
    run = get_run("tiny_teacher")
    run.with_settings({key: str(least)})
    for wrong in (least - 1, -7):
        with pytest.raises(RecipeError, match=key) as error:
            run.with_settings({key: str(wrong)})
        assert error.value.details == {"expected": f"a whole number, at least {least}", "found": str(wrong)}


def test_a_configuration_with_a_number_as_text_is_refused() -> None:
    for value in ("2", 2.5, None):
        with pytest.raises(RecipeError, match="log_every"):
            Run.from_dict({**get_run("tiny_teacher").as_dict(), "log_every": value})


def test_every_named_run_reads_its_own_form() -> None:
    for make in RUNS.values():
        assert Run.from_dict(json.loads(json.dumps(make().as_dict()))) == make()


def staged(*ends: dict[str, int]) -> Run:
    run = get_run("overfit")
    return replace(run, stages=tuple(replace(s, **end) for s, end in zip(run.stages, ends, strict=True)))


def test_stages_share_steps() -> None:
    def steps(run: Run) -> list[int]:
        return [s.max_steps for s in run.stages]

    assert steps(get_run("overfit").with_max_steps(75)) == [25, 10, 40]
    assert steps(get_run("overfit").with_max_steps(9000)) == [250, 100, 400]
    by_epochs = staged(*({"max_steps": 0, "epochs": n} for n in (6, 1, 3)))
    assert steps(by_epochs.with_max_steps(50)) == [30, 5, 15] and steps(by_epochs.with_max_steps(2)) == [1, 1, 1]
    mixed = staged({"max_steps": 0, "epochs": 2}, {"max_steps": 5}, {"max_steps": 5})
    with pytest.raises(UsageError, match="cannot be shared") as error:
        mixed.with_max_steps(10)
    assert error.value.details["found"] == "teacher 2 epochs, label 5 steps, student 5 steps"
