"""Memory of a training step, counted without a GPU and without running its convolutions.

Method. One sample of the cache (two where a control looks at a neighbour) goes through the run's own forward pass on the CPU:
student, losses, frozen teachers, distiller, under the run's autocast, with convolutions and matrix products replaced by zeros
of their shape. Two sums are taken: ``saved``, the distinct storages that autograd keeps for the backward pass, and
``working``, the most bytes that live at once beside them, teachers' feature maps included; backward needs about as much for
the gradients of maps. Both grow with the batch. To them are added parameters, buffers, gradients, AdamW's two moments, the
averaged copy, teachers, low-precision copies of weights, and the batch. Not counted: the CUDA context, cuDNN's workspaces and
fragmentation; ``bytes`` holds ``MARGIN`` on top for the last two.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imkd_data.errors import UsageError
from imkd_data.loader.batch import Batch
from pipelines.counting import MacCounter
from pipelines.guard import batch_tensors
from pipelines.networks import Networks, TrainUnit
from pipelines.run import Run

__all__ = ["LiveBytes", "MemoryForecast", "forecast_memory", "refuse_above"]

MARGIN = 1.1  # cuDNN's workspaces and the allocator's fragments


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryForecast:
    """Bytes on one device at ``batch_size``: fixed (weights, gradients, optimiser, averages, teachers), the batch's tensors,
    saved for backward, working beside them."""

    batch_size: int
    precision: str
    fixed: int
    batch: int
    saved: int
    working: int

    @property
    def counted(self) -> int:
        """The sum of the parts."""
        return self.fixed + self.batch + self.saved + self.working

    @property
    def bytes(self) -> int:
        """What a device should have: the sum and a margin."""
        return round(self.counted * MARGIN)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "counted": self.counted, "bytes": self.bytes}


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that operations make, alive now (``live``) and at most (``peak``). ``ours``: storages that are not
    counted, and whose copies in another precision count as ``copies`` (autocast keeps one of each weight)."""

    def __init__(self, ours: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.copies = 0
        self.known = {t.untyped_storage()._cdata for t in ours}
        self.weights = set(self.known)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copied = func.overloadpacket.__name__ == "_to_copy" and args[0].untyped_storage()._cdata in self.weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage(), copied)
        return out

    def _see(self, storage: torch.UntypedStorage, copied: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        if copied:
            self.copies += size
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class _Saved:
    """Hook of ``saved_tensors_hooks``: sums distinct storages and lets them go."""

    def __init__(self, live: LiveBytes, ours: set[int]) -> None:
        self.live, self.ours, self.bytes = live, ours, 0
        self.seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.ours or key in self.seen or key not in self.live.known:
            return
        self.seen.add(key)
        weakref.finalize(storage, self.seen.discard, key)
        self.bytes += storage.nbytes()


def _nothing(_: Any) -> Tensor:
    raise RuntimeError("a counted pass has no backward pass")


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def forecast_memory(networks: Networks, run: Run, small: Batch) -> MemoryForecast:
    """The memory of a step of ``run`` at its batch size and precision (see the module's text). small: a batch on the CPU, of
    one sample unless the method needs more. The networks' running statistics change: build them for this alone."""
    unit = TrainUnit(networks).train()
    teachers = [t for teacher in networks.teachers.values() for t in _own(teacher.network)]
    teachers += [t for network in networks.kept.values() for t in _own(network)]
    ours = [*_own(unit), *teachers]
    batch = list(batch_tensors(small).values())
    live = LiveBytes([*ours, *batch])
    live.weights = {t.untyped_storage()._cdata for t in ours}
    saved = _Saved(live, set(live.known))
    low = nullcontext() if run.precision == "32-true" else torch.autocast("cpu", dtype=torch.bfloat16)
    with live, MacCounter(), torch.autograd.graph.saved_tensors_hooks(saved.pack, _nothing), low:
        terms = unit(small)
    del terms
    trained = _size(p for p in unit.parameters() if p.requires_grad)
    averaged = _size(networks.model.state_dict().values()) if run.optim.ema else 0
    fixed = _size(_own(unit)) + 3 * trained + averaged + _size(teachers) + live.copies
    n, of = run.batch_size, len(small)
    return MemoryForecast(
        batch_size=n,
        precision=run.precision,
        fixed=fixed,
        batch=n * _size(batch) // of,
        saved=n * saved.bytes // of,
        working=n * live.peak // of,
    )


def refuse_above(forecast: MemoryForecast, limit: int) -> None:
    """Errors: UsageError (exit 2) where the forecast exceeds ``limit`` bytes, with the largest batch size that fits."""
    if forecast.bytes <= limit:
        return
    each = MARGIN * (forecast.counted - forecast.fixed) / forecast.batch_size
    fits = int((limit - MARGIN * forecast.fixed) / each) if each else 0
    lower = f"--set batch_size={fits} --global-batch {{k * {fits}}}" if fits >= 1 else "no batch size fits: a smaller network"
    if forecast.precision == "32-true":
        lower += ", or --set precision=bf16-mixed"
    raise UsageError(
        "the run needs more memory than allowed",
        rule="plan.memory",
        expected=f"at most {limit / 2**30:.2f} GiB",
        found=f"forecast {forecast.bytes / 2**30:.2f} GiB at batch {forecast.batch_size} in {forecast.precision}",
        next=lower,
    )
