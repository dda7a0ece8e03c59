"""Several micro-batches equal one large batch: loss and gradients to 1e-5 relative, however uneven their boxes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_training import toy_cache, toy_run

from imkd_data.loader.stream import stream
from imkd_models.blocks import StepCounts, count_per_rank
from imkd_models.checkpoint import load_checkpoint
from pipelines.networks import TrainUnit, build_networks, stream_values
from pipelines.train import train


def test_counts_of_a_step_are_shared_out() -> None:
    counts, values = StepCounts(), [(torch.tensor(5.0), torch.tensor(0.0)), (torch.tensor(1.0), torch.tensor(0.0))]
    for pair in values:
        with counts.gathering():
            assert [float(count_per_rank(v, 1.0)) for v in pair] == [max(float(pair[0]), 1.0), 1.0]
    with counts.given():
        assert [float(count_per_rank(v, 1.0)) for v in values[1]] == [3.0, 0.5]  # 6 over two, at least 1 over two
    assert float(count_per_rank(torch.tensor(4.0), 1.0)) == 4.0 and StepCounts.active is None


def gradients(kind: str, cache: Any, micro: int, expect: bool) -> tuple[float, dict[str, Tensor], list[int]]:
    torch.manual_seed(0)
    networks = build_networks(toy_run(kind))
    unit = TrainUnit(networks).train()
    for module in unit.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = list(stream(cache, micro, rows=[1, 2, 0, 4], shuffle="none", **stream_values(networks)))
    if expect:
        unit.expect(batches)
    total = 0.0
    for batch in batches:
        loss: Any = sum(unit(batch).values()) / len(batches)
        loss.backward()
        total += float(loss.detach())
    boxes = [int(b.boxes.valid_BM.sum()) for b in batches]
    return total, {n: p.grad for n, p in unit.named_parameters() if p.grad is not None}, boxes


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    largest = max(float(g.abs().max()) for g in a.values())
    return max(float((a[n] - b[n]).abs().max()) / max(float(a[n].abs().max()), 1e-4 * largest) for n in a)


@pytest.mark.parametrize("kind", ["lidar", "student"])
def test_four_micro_batches_equal_one_batch(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cache = toy_cache(tmp_path)
    loss, one, boxes = gradients(kind, cache, 4, True)
    summed, four, uneven = gradients(kind, cache, 1, True)
    assert sum(uneven) == boxes[0] and len(set(uneven)) > 1
    assert abs(summed - loss) <= 1e-5 * abs(loss)
    assert distance(one, four) <= 1e-5
    _, own, _ = gradients(kind, cache, 1, False)
    assert distance(one, own) > 1e-3  # without the step's counts it is another loss


def test_the_trainer_tells_the_unit_every_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    expect = TrainUnit.expect
    monkeypatch.setattr(TrainUnit, "expect", lambda self, batches: (told.append(len(batches)), expect(self, batches))[1])
    run = toy_run(max_steps=2, batch_size=1, global_batch=4)
    result = train(run, toy_cache(tmp_path / "world"), tmp_path / "run", accelerator="cpu")
    assert told == [4, 4] and result.step == 2


def test_the_log_says_how_hard_a_methods_terms_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the first step and at a later one, by autograd at the fused map; measuring changes no weight."""
    cache = toy_cache(tmp_path / "world")
    fusion = train(toy_run("fusion", max_steps=1), cache, tmp_path / "fusion", accelerator="cpu").checkpoint
    options = {"lambda_resp": 1e4, "lambda_csrd": 1e3}
    run = toy_run("student", max_steps=3, batch_size=1, global_batch=2, method="crkd", options=options, log_every=100)
    monkeypatch.setattr("pipelines.trainlog.PULL_STEPS", (0, 1))
    seen: list[dict[str, float]] = []

    def measured(unit: TrainUnit, task: Any, method: Any, outputs: Any) -> None:
        fused = outputs.features["bev_fused"]
        (base,) = torch.autograd.grad(sum(task.values()), fused, retain_graph=True)
        (mine,) = torch.autograd.grad(method["resp_class"], fused, retain_graph=True)
        measure(unit, task, method, outputs)
        seen.append({"own": float(mine.norm() / base.norm()), **unit.pull})

    measure = TrainUnit._measure
    monkeypatch.setattr(TrainUnit, "_measure", measured)
    with_pull = train(run, cache, tmp_path / "a", {"fusion": fusion}, accelerator="cpu").checkpoint
    assert len(seen) == 2, "of the first micro-batch of two steps"
    assert all(one["resp_class"] == pytest.approx(one["own"], rel=1e-4) and one["csrd"] == 0 for one in seen)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "pull" in line] == [1, 2] and "pull" not in lines[-1]
    told = [line["warning"] for line in lines if "warning" in line and "pulls" in line["warning"]]
    assert [line.split()[0] for line in told] == ["resp_class", "resp_box"] and told[0] in capsys.readouterr().err
    monkeypatch.setattr("pipelines.trainlog.PULL_STEPS", (-1,))
    without = train(run, cache, tmp_path / "b", {"fusion": fusion}, accelerator="cpu").checkpoint
    assert load_checkpoint(with_pull).meta["weights_sha256"] == load_checkpoint(without).meta["weights_sha256"]


def test_a_methods_clock_runs_in_optimiser_steps(tmp_path: Path) -> None:
    """A warm-up of 500 steps is 500 steps on one GPU that accumulates as on eight that do not."""
    cache = toy_cache(tmp_path / "world")
    fusion = train(toy_run("fusion", max_steps=1), cache, tmp_path / "fusion", accelerator="cpu").checkpoint
    run = toy_run("student", max_steps=3, batch_size=1, global_batch=2, method="crkd")
    last = train(run, cache, tmp_path / "run", {"fusion": fusion}, accelerator="cpu").checkpoint
    saved = load_checkpoint(last).distiller or {}
    assert int(saved["step"]) == 3
