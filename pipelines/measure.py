"""Real steps, timed: what a run costs on this machine, without writing anything."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imkd_data.loader.batch import Batch
from imkd_data.loader.stream import Stream, stream
from pipelines.machine import Machine, make_fabric
from pipelines.networks import Networks, Sealed, build_networks, place, stream_values, use_cached_teachers
from pipelines.optimise import Ema, make_optimiser
from pipelines.run import Run
from pipelines.sampling import is_listed, virtual_rows

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["StepCost", "loader_values", "measure_steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Medians over the timed steps, seconds: whole step, waiting for data, forward with losses, backward, optimiser.

    first_batch_s: from asking to having the first batch, imports apart. peak_bytes: GPU allocator's peak, or the process's
    resident peak on a CPU. batch_bytes: tensors of one batch. terms: losses of the last step.
    """

    device: str
    batch_size: int
    steps: int
    step_s: float
    data_s: float
    forward_s: float
    backward_s: float
    optimiser_s: float
    first_batch_s: float
    peak_bytes: int
    batch_bytes: int
    terms: dict[str, float]

    @property
    def samples_per_s(self) -> float:
        """One device."""
        return self.batch_size / self.step_s


def loader_values(run: Run, networks: Networks, cache: Cache | None = None) -> dict[str, Any]:
    """Arguments of ``stream`` for a run: what the networks need and what the loader section says."""
    loader = run.loader
    listed = cache is not None and is_listed(loader)
    return {
        **({"rows": virtual_rows(cache, loader, run.seed)} if listed else {"split": loader.split}),  # type: ignore[arg-type]
        "augment": loader.augment,
        "seed": run.seed,
        "shuffle": loader.shuffle,
        "workers": loader.workers,
        "radar_filter": loader.radar_filter,
        "radar_sweeps": loader.radar_sweeps,
        "lidar_sweeps": loader.lidar_sweeps,
        "intensity_from": loader.intensity_from,
        "parity": loader.parity,
        "on_bad_sample": loader.on_bad_sample,
        "drop_last": False,  # epochs end at whole optimiser steps, see Stream.forever
        **stream_values(networks),
    }


def _bytes(batch: Batch) -> int:
    from pipelines.guard import batch_tensors

    return sum(t.numel() * t.element_size() for t in batch_tensors(batch).values())


def measure_steps(
    run: Run,
    cache: Cache,
    teachers: Mapping[str, Path | str] | None = None,
    *,
    steps: int = 20,
    machine: Machine | None = None,
) -> tuple[StepCost, Networks, Stream]:
    """Run ``steps`` training steps (three more to warm up) and time them. Nothing is saved."""
    fabric = make_fabric(run, machine or Machine())
    networks = build_networks(run, teachers, pretrained=False)
    if run.loader.cached_teachers:
        use_cached_teachers(networks, cache)
    plain = place(networks, fabric.device)
    unit, optimiser = fabric.setup(plain, make_optimiser(plain.model, plain.distiller, run.optim))
    unit.train()
    ema = Ema(plain.model, run.optim.ema) if run.optim.ema else None
    source = stream(cache, run.batch_size, device=fabric.device, **loader_values(run, networks, cache))
    begun = time.perf_counter()
    batches = source.forever(len(source.order) // run.batch_size * run.batch_size)
    batch = next(batches)
    first_batch_s, batch_bytes = time.perf_counter() - begun, _bytes(batch)
    on_gpu = fabric.device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    rows: list[tuple[float, ...]] = []
    terms: dict[str, torch.Tensor] = {}
    for step in range(steps + 3):
        t0 = now()
        batch = next(batches)
        t1 = now()
        terms = unit(Sealed(batch))
        t2 = now()
        fabric.backward(sum(terms.values()))
        t3 = now()
        if run.optim.clip:
            fabric.clip_gradients(unit, optimiser, max_norm=run.optim.clip, error_if_nonfinite=False)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(plain.model, step)
        t4 = now()
        if step >= 3:
            rows.append((t4 - t0, t1 - t0, t2 - t1, t3 - t2, t4 - t3))
    batches.close()  # type: ignore[attr-defined]
    median = torch.tensor(rows, dtype=torch.float64).median(0).values.tolist()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cost = StepCost(
        device=torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        batch_size=run.batch_size,
        steps=steps,
        step_s=median[0],
        data_s=median[1],
        forward_s=median[2],
        backward_s=median[3],
        optimiser_s=median[4],
        first_batch_s=first_batch_s,
        peak_bytes=peak,
        batch_bytes=batch_bytes,
        terms={k: float(v.detach()) for k, v in terms.items()},
    )
    return cost, networks, source
