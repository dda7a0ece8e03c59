"""Several micro-batches equal one large batch: loss and gradients to 1e-5 relative, however uneven their boxes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_training import toy_cache, toy_run

from imkd_data.loader.stream import stream
from imkd_models.blocks import StepCounts, count_per_rank
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
