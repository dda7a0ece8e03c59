"""``imkd train RUN --plan``: the resolved run, its parameters, and a forecast from twenty real steps. Writes nothing.

Memory: with a GPU the allocator's peak over those steps; without one it is counted (``memory.py``), before any step is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imkd_data.errors import UsageError
from pipelines.counting import counted
from pipelines.machine import Machine, accumulation, bytes_from_text
from pipelines.measure import StepCost, loader_values, measure_steps
from pipelines.memory import MemoryForecast, forecast_memory, refuse_above
from pipelines.networks import Networks, build_networks, use_cached_teachers
from pipelines.run import Run

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from imkd_data.loader.stream import Stream

__all__ = ["plan_run", "plan_text"]

STEPS = 20


def plan_run(
    run: Run,
    cache: Cache | Path | str,
    teachers: Mapping[str, Path | str] | None = None,
    *,
    devices: int = 1,
    accelerator: str = "auto",
    memory_limit: str | None = None,
    steps: int = STEPS,
) -> dict[str, Any]:
    """What training would do and cost. A run of several networks is planned for its first stage, which needs no teacher.

    steps: real steps to time; 0 = none, the memory is counted alone.

    Raises:
        UsageError: the peak is above ``memory_limit``. Everything that ``train`` refuses is refused here too.
    """
    from imkd_data import open_cache
    from imkd_data.loader.stream import held_out_rows

    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    planned = run.stages[0] if run.stages else run
    global_batch, accumulate = accumulation(planned, devices)
    limit = bytes_from_text(memory_limit) if memory_limit else None
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    memory: MemoryForecast | None = None
    if steps == 0 or not on_gpu:
        memory, networks, source = counted_memory(planned, opened, teachers)
        if limit is not None:
            refuse_above(memory, limit)
    cost: StepCost | None = None
    if steps:
        machine = Machine(accelerator=accelerator, memory_limit=memory_limit)
        cost, networks, source = measure_steps(planned, opened, teachers, steps=steps, machine=machine)
    held = held_out_rows(opened, source.order.rows)
    if held and run.name != "overfit":
        raise UsageError("validation rows are not trained on", found=f"{len(held)} rows", next="leave loader.split at train")
    if limit is not None and on_gpu and cost is not None and cost.peak_bytes > limit:
        raise UsageError(
            "the run needs more memory than allowed",
            expected=memory_limit,
            found=f"{cost.peak_bytes / 2**30:.2f} GiB at batch {planned.batch_size}",
            next="lower batch_size and keep --global-batch, or use --set precision=bf16-mixed",
        )
    per_epoch = len(source.order) // global_batch
    total = planned.max_steps or planned.epochs * per_epoch
    return {
        "v": 1,
        "run": run.as_dict(),
        "planned": planned.name,
        "network": networks.config.as_dict(),
        **counted(planned, macs=False),
        "rows": len(source.order),
        "global_batch": global_batch,
        "accumulate": accumulate,
        "steps_per_epoch": per_epoch,
        "total_steps": total,
        "devices": devices,
        "memory_limit": limit,
        "memory": None if memory is None else memory.as_dict(),
        "measured_steps": steps,
        **({} if cost is None else _measured(cost, devices, accumulate, total)),
    }


def counted_memory(
    run: Run, cache: Cache, teachers: Mapping[str, Path | str] | None
) -> tuple[MemoryForecast, Networks, Stream]:
    """The forecast of a training step from one sample, or two where the method looks at a neighbour; the returned networks'
    statistics have moved."""
    from imkd_data.loader.stream import stream

    networks = build_networks(run, teachers, pretrained=False)
    if run.loader.cached_teachers:
        use_cached_teachers(networks, cache)
    counted_with = 2 if networks.distiller is not None and networks.distiller.options.neighbours else 1
    source = stream(cache, counted_with, **{**loader_values(run, networks, cache), "workers": 0})
    return forecast_memory(networks, run, next(iter(source))), networks, source


def _measured(cost: StepCost, devices: int, accumulate: int, total: int) -> dict[str, Any]:
    step_s = cost.step_s * accumulate
    return {
        "device": cost.device,
        "samples_per_s": cost.samples_per_s * devices,
        "step_s": step_s,
        "data_wait": cost.data_s / cost.step_s,
        "forward_s": cost.forward_s,
        "backward_s": cost.backward_s,
        "optimiser_s": cost.optimiser_s,
        "first_batch_s": cost.first_batch_s,
        "peak_bytes": cost.peak_bytes,
        "batch_bytes": cost.batch_bytes,
        "hours": total * step_s / 3600,
    }


def plan_text(facts: Mapping[str, Any]) -> str:
    """The plan for people."""
    import json

    modules = ", ".join(f"{k} {v:,}" for k, v in facts["modules"].items())
    lines = [
        ("run", json.dumps(facts["run"])),
        ("planned", f"{facts['planned']} on {facts.get('device', 'no device')}, {facts['devices']} device(s)"),
        ("parameters", f"{facts['parameters']:,} ({modules})"),
        ("rows", f"{facts['rows']:,}; {facts['steps_per_epoch']:,} steps of {facts['global_batch']} an epoch"),
        ("accumulate", f"{facts['accumulate']} micro-batches a step"),
        ("steps", f"{facts['total_steps']:,}"),
    ]
    if facts["memory"] is not None:
        lines.append(("GPU memory", _memory_text(facts["memory"], facts["memory_limit"])))
    if facts["measured_steps"]:
        parts = ", ".join(f"{n} {1e3 * facts[f'{n}_s']:.0f} ms" for n in ("forward", "backward", "optimiser"))
        lines += [
            ("measured", f"{facts['samples_per_s']:.2f} samples/s over {facts['measured_steps']} steps; {parts}"),
            ("data wait", f"{100 * facts['data_wait']:.1f} % of a step; first batch after {facts['first_batch_s']:.2f} s"),
            ("memory", f"peak {facts['peak_bytes'] / 2**30:.2f} GiB, one batch {facts['batch_bytes'] / 2**20:.1f} MiB"),
            ("forecast", f"{facts['hours']:.2f} hours"),
        ]
    return "\n".join(f"{name:<11} {value}" for name, value in lines)


def _memory_text(memory: Mapping[str, Any], limit: int | None) -> str:
    parts = ", ".join(f"{n} {memory[n] / 2**30:.2f}" for n in ("fixed", "batch", "saved", "working"))
    fits = "" if limit is None else f"; fits {limit / 2**30:.2f} GiB"
    where = f"at batch {memory['batch_size']} in {memory['precision']}"
    return f"{memory['bytes'] / 2**30:.2f} GiB forecast {where} ({parts}, and a tenth){fits}"
