"""Rates of the step bench."""

from __future__ import annotations

import pytest
import torch

from pipelines import bench_step


@pytest.mark.parametrize(("kind", "waits"), [("cuda", ["wait"]), ("cpu", [])])
def test_the_clock_starts_when_the_warm_up_is_over(monkeypatch: pytest.MonkeyPatch, kind: str, waits: list[str]) -> None:
    """A GPU still works on the warm-up when its call returns: without a wait six calls would be timed as five."""
    seen: list[str] = []
    clock = iter((10.0, 20.0))

    def now() -> float:
        seen.append("clock")
        return next(clock)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: seen.append("wait"))
    monkeypatch.setattr(bench_step.time, "perf_counter", now)
    assert bench_step._seconds(lambda: seen.append("work"), torch.device(kind), 5) == 2.0
    assert seen == ["work", *waits, "clock", *["work"] * 5, *waits, "clock"]


def test_rates_of_this_machine() -> None:
    cpu = torch.device("cpu")
    assert 1e7 < bench_step.matmul_flops(cpu, "32-true", size=64) < 1e15
    assert 1e6 < bench_step.copy_rate(cpu, size=1 << 20) < 1e15
