"""The counted memory of a step beside that of the same step really run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_training import toy_cache, toy_run

from imkd_data.errors import UsageError
from imkd_data.loader.stream import stream
from pipelines.forecast import plan_run, plan_text
from pipelines.guard import batch_tensors
from pipelines.measure import loader_values
from pipelines.memory import LiveBytes, forecast_memory
from pipelines.networks import TrainUnit, build_networks
from pipelines.optimise import Ema, make_optimiser
from pipelines.run import Run
from pipelines.train import train

TOLERANCE = 0.15  # of the measured peak, to either side; README states it


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("memory")
    cache = toy_cache(root)
    lidar = train(toy_run("lidar", max_steps=1), cache, root / "lidar", accelerator="cpu", progress=None).checkpoint
    label = train(toy_run("label", max_steps=1), cache, root / "label", {"lidar": lidar}, accelerator="cpu").checkpoint
    return cache, {"lidar": lidar, "label": label}


def batch_of(cache: Any, run: Run, networks: Any, size: int) -> Any:
    return next(iter(stream(cache, size, **{**loader_values(run, networks, cache), "workers": 0})))


def measured(run: Run, cache: Any, teachers: Any) -> int:
    """Bytes alive at most in a real second step (moments exist), with its backward pass and optimiser."""
    networks = build_networks(run, teachers, pretrained=False)
    batch = batch_of(cache, run, networks, run.batch_size)
    unit = TrainUnit(networks).train()
    optimiser = make_optimiser(unit.model, unit.distiller, run.optim)
    ema = Ema(unit.model, run.optim.ema)
    standing = [*unit.parameters(), *unit.buffers(), *ema.shadow.values(), *batch_tensors(batch).values()]
    standing += [t for f in networks.teachers.values() for t in (*f.network.parameters(), *f.network.buffers())]
    with LiveBytes() as live:
        for step in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.precision != "32-true"):
                terms = unit(batch)
            sum(terms.values()).backward()  # type: ignore[union-attr]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.update(unit.model, step)
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in standing}
    return live.peak + sum(sizes.values())


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("lidar", {}),
        ("student", {}),
        ("student", {"precision": "bf16-mixed", "batch_size": 3}),
        ("student", {"method": "imkd", "batch_size": 3}),
        ("student", {"method": "imkd", "precision": "bf16-mixed"}),
    ],
)
def test_forecast_is_near_a_measured_step(world: Any, kind: str, values: dict[str, Any]) -> None:
    cache, teachers = world
    run = toy_run(kind, **values)
    given = teachers if run.method else {}
    networks = build_networks(run, given, pretrained=False)
    forecast = forecast_memory(networks, run, batch_of(cache, run, networks, 1))
    real = measured(run, cache, given)
    above = (
        TOLERANCE if run.precision == "32-true" else 0.25
    )  # gradients are counted beside all that is saved: on the safe side
    assert (1 - TOLERANCE) * real <= forecast.counted <= (1 + above) * real


@pytest.mark.parametrize("control", [{"teacher_sample": "other"}, {"intensity_control": "other_sample"}])
def test_a_control_that_looks_at_a_neighbour_is_counted_with_one(world: Any, control: dict[str, Any]) -> None:
    """Its memory is the method's; with batches of one it is refused before any step."""
    cache, teachers = world
    run = toy_run("student", method="imkd", options=control)
    facts, plain = (plan_run(r, cache, teachers, steps=0)["memory"] for r in (run, run.with_values(options={})))
    assert facts["counted"] == pytest.approx(plain["counted"], rel=0.02)
    with pytest.raises(UsageError, match="batch of at least 2") as error:
        plan_run(run.with_values(batch_size=1), cache, teachers, steps=0)
    assert next(iter(control)) in str(error.value)


def test_the_plan_refuses_before_any_step_and_the_advice_fits(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, teachers = world
    run = toy_run("student", method="imkd", batch_size=3)
    facts = plan_run(run, cache, teachers, accelerator="cpu", memory_limit="1GiB", steps=0)
    need, one = facts["memory"]["bytes"], plan_run(run.with_values(batch_size=1), cache, teachers, steps=0)["memory"]["bytes"]
    assert facts["memory_limit"] == 2**30 and "hours" not in facts and "fits 1.00 GiB" in plan_text(facts)
    monkeypatch.setattr("pipelines.forecast.measure_steps", lambda *_, **__: pytest.fail("a step was run"))
    with pytest.raises(UsageError, match="more memory") as error:
        plan_run(run, cache, teachers, accelerator="cpu", memory_limit=f"{need - 1}")
    assert error.value.code == 2 and "batch_size=2 --global-batch" in error.value.details["next"]
    assert "precision=bf16-mixed" in error.value.details["next"]
    plan_run(run.with_values(batch_size=2), cache, teachers, accelerator="cpu", memory_limit=f"{need - 1}", steps=0)
    with pytest.raises(UsageError, match="more memory") as error:
        plan_run(run, cache, teachers, accelerator="cpu", memory_limit=f"{one - 1000}")
    assert "no batch size fits" in error.value.details["next"]


def test_frozen_teachers_count(world: Any) -> None:
    """Their weights are fixed; the distiller keeps more for the backward pass than the plain student."""
    cache, teachers = world
    plain, taught = (
        plan_run(toy_run("student", method=m), cache, teachers if m else None, accelerator="cpu", steps=0)["memory"]
        for m in (None, "imkd")
    )
    assert taught["fixed"] > plain["fixed"] and taught["saved"] > plain["saved"] and taught["batch"] > plain["batch"]
