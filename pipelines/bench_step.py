"""``imkd bench step``: where a training step's time goes, and what share of the machine's measured ceilings it reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from imkd_data.errors import UsageError
from imkd_data.loader.stream import stream
from imkd_data.recipe import canonical_json
from pipelines.machine import Machine
from pipelines.measure import loader_values
from pipelines.run import Run

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["PARTS", "copy_rate", "matmul_flops", "run_step_bench", "step_table"]


class _Spans:
    """Time inside named modules, forward only, by hooks; nested ones count for the inner."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.total: dict[str, float] = {}
        self.stack: list[tuple[str, float]] = []

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(self, name: str) -> None:
        now = self.now()
        if self.stack:
            outer, since = self.stack[-1]
            self.total[outer] = self.total.get(outer, 0.0) + now - since
        self.stack.append((name, now))

    def leave(self) -> None:
        now = self.now()
        name, since = self.stack.pop()
        self.total[name] = self.total.get(name, 0.0) + now - since
        if self.stack:
            self.stack[-1] = (self.stack[-1][0], now)

    def watch(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave())


PARTS: Mapping[str, tuple[str, ...]] = {
    "image": ("camera.image", "camera.depth", "camera.sparse_depth"),
    "view": ("camera.view",),
    "radar": ("radar", "calibration"),
    "lidar": ("lidar",),
    "fusion": ("fuser", "time", "sim"),
    "trunk": ("trunk",),
    "head": ("head",),
}


def run_step_bench(
    run: Run,
    cache: Cache | Path | str,
    teachers: Mapping[str, Path | str] | None = None,
    *,
    steps: int = 10,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Seconds of a training step by part: modules of the forward pass, the rest of it (pooling, losses), backward, optimiser,
    data; and what share of the measured matmul ceiling the whole step reaches."""
    from imkd_data import open_cache
    from pipelines.counting import counted
    from pipelines.machine import make_fabric
    from pipelines.networks import Sealed, build_networks, place, use_cached_teachers
    from pipelines.optimise import make_optimiser

    if run.stages:
        raise UsageError("name a run of one network", found=run.name, expected="for example tiny_student")
    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    fabric = make_fabric(run, Machine(accelerator=accelerator))
    networks = build_networks(run, teachers, pretrained=False)
    if run.loader.cached_teachers:
        use_cached_teachers(networks, opened)
    plain = place(networks, fabric.device)
    on_gpu = fabric.device.type == "cuda"
    spans = _Spans(on_gpu)
    for part, names in PARTS.items():
        for name, module in networks.model.named_modules():
            if name in names:
                spans.watch(module, part)
    for name, teacher in networks.teachers.items():
        spans.watch(teacher, f"teacher {name}")
    if networks.distiller is not None:
        spans.watch(networks.distiller, "distillation")
    unit, optimiser = fabric.setup(plain, make_optimiser(plain.model, plain.distiller, run.optim))
    unit.train()
    source = stream(opened, run.batch_size, device=fabric.device, **loader_values(run, networks))
    batches = source.forever(len(source.order) // run.batch_size * run.batch_size)
    for step in range(steps + 3):
        if step == 3:
            spans.total.clear()
        spans.enter("data")
        batch = next(batches)
        spans.leave()
        spans.enter("forward, rest")
        terms = unit(Sealed(batch))
        spans.leave()
        spans.enter("backward")
        fabric.backward(sum(terms.values()))
        spans.leave()
        spans.enter("optimiser")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        spans.leave()
    batches.close()  # type: ignore[attr-defined]
    parts = {k: v / steps for k, v in sorted(spans.total.items(), key=lambda i: -i[1])}
    total = sum(parts.values())
    macs = counted(run)["macs"]
    ceiling = matmul_flops(fabric.device, run.precision)
    useful = None if macs is None else 6.0 * macs * run.batch_size  # forward and twice that backward, 2 FLOP each
    return {
        "v": 1,
        "run": run.name,
        "method": run.method,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "precision": run.precision,
        "batch_size": run.batch_size,
        "steps": steps,
        "step_s": total,
        "samples_per_s": run.batch_size / total,
        "parts_s": parts,
        "matmul_flops": ceiling,
        "share_of_matmul_ceiling": None if useful is None else useful / total / ceiling,
        "copy_bytes_per_s": copy_rate(fabric.device),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "identity": canonical_json(run.as_dict()).decode().strip(),
    }


def matmul_flops(device: torch.device, precision: str, size: int = 1024) -> float:
    """Measured matmul rate of this device in the run's precision, FLOP/s."""
    if device.type == "cuda":
        size = 8192
    dtype = torch.bfloat16 if precision != "32-true" and device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: a @ a, device)


def copy_rate(device: torch.device, size: int = 1 << 26) -> float:
    """Measured memory copy on the device, bytes read and written per second."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2.0 * size / _seconds(lambda: b.copy_(a), device)


def _seconds(work: Callable[[], object], device: torch.device, count: int = 5) -> float:
    """Seconds of one call, after a first one that is not counted."""

    def wait() -> None:  # a GPU works on after the call has returned
        if device.type == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    begun = time.perf_counter()
    for _ in range(count):
        work()
    wait()
    return (time.perf_counter() - begun) / count


def step_table(facts: Mapping[str, Any]) -> str:
    """The step bench for people."""
    lines = [
        f"{facts['run']}{' + ' + facts['method'] if facts['method'] else ''}, {facts['device']}, {facts['precision']}, "
        f"batch {facts['batch_size']}: {1e3 * facts['step_s']:.1f} ms a step, {facts['samples_per_s']:.2f} samples/s"
    ]
    for name, seconds in facts["parts_s"].items():
        lines.append(f"  {name:<24}{1e3 * seconds:9.1f} ms {100 * seconds / facts['step_s']:6.1f} %")
    share = facts["share_of_matmul_ceiling"]
    if share is not None:
        lines.append(f"  {100 * share:.1f} % of the measured matmul ceiling ({facts['matmul_flops'] / 1e12:.2f} TFLOP/s)")
    return "\n".join(lines)
