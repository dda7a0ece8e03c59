"""The machine a run lives on: one process, ``--devices N``, torchrun or srun, all through Fabric."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from imkd_data.errors import UsageError
from imkd_data.loader.work import leave_if_started_by_a_stream
from pipelines.device import device_of
from pipelines.run import Run

__all__ = ["Machine", "accumulation", "bytes_from_text", "channels_last", "loss_scaler", "make_fabric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the command line says about the machine. memory_limit: text such as 22GiB, enforced on GPUs."""

    devices: int = 1
    accelerator: str = "auto"
    memory_limit: str | None = None

    def __post_init__(self) -> None:
        if self.memory_limit is not None:
            bytes_from_text(self.memory_limit)  # where there is no GPU nothing else reads it


_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def bytes_from_text(text: str) -> int:
    """``22GiB`` -> bytes. Errors: UsageError."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    size = float(match[1]) * _UNITS.get(match[2].lower(), math.inf) if match else math.inf
    if not math.isfinite(size):  # no number, no known unit, or more than a number can say
        raise UsageError("a size cannot be read", expected="a number with KiB, MiB, GiB, KB, MB or GB", found=text)
    return int(size)


def make_fabric(run: Run, machine: Machine) -> Any:
    """Fabric for one process, torchrun, srun or --devices N."""
    leave_if_started_by_a_stream()  # a training script without a main guard, imported again by a loader worker
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    devices, accelerator = machine.devices, device_of(machine.accelerator)
    nodes = max(1, _env_int("SLURM_JOB_NUM_NODES", 1)) if _env_int("SLURM_NTASKS", 1) > 1 else 1
    world = max(devices * nodes, _env_int("WORLD_SIZE", 1), _env_int("SLURM_NTASKS", 1))
    # A method may leave parts of the student without gradient (a partition, a switched-off term); plain networks do not.
    strategy: Any = DDPStrategy(find_unused_parameters=run.method is not None) if world > 1 else "auto"
    local = _env_int("LOCAL_WORLD_SIZE", 0) or devices
    how: dict[str, Any] = {"precision": run.precision}
    if run.precision == "16-mixed" and accelerator == "cpu":  # Fabric would train in bfloat16 instead, without a scaler
        from lightning.fabric.plugins import MixedPrecision

        how = {"plugins": MixedPrecision(precision="16-mixed", device="cpu")}
    fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=nodes, strategy=strategy, **how)
    fabric.launch()
    if fabric.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every convolution sees one shape for the whole run
    if machine.memory_limit is not None and fabric.device.type == "cuda":
        wanted = bytes_from_text(machine.memory_limit)
        total = torch.cuda.get_device_properties(fabric.device).total_memory
        if wanted < total:  # beyond it the allocator raises out-of-memory, whatever the card has
            torch.cuda.set_per_process_memory_fraction(wanted / total, fabric.device)
    return fabric


def loss_scaler(fabric: Any) -> Any:
    """The loss scaler (torch.amp.GradScaler) of 16-mixed; None in the other precisions."""
    return getattr(fabric._precision, "scaler", None)


def channels_last(module: nn.Module) -> nn.Module:
    """Convolution weights in the order that tensor cores read, in place; maps follow them through the network. Names, shapes
    and values stay, so checkpoints do not differ."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    return module


def _env_int(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default


def accumulation(run: Run, world: int) -> tuple[int, int]:
    """(global batch, micro-batches per step). Errors: UsageError where they do not divide."""
    at_once = run.batch_size * world
    wanted = run.global_batch or at_once
    if wanted % at_once:
        raise UsageError(
            "the global batch is no multiple of batch_size times devices",
            expected=f"k * {at_once}",
            found=str(wanted),
            next="change --global-batch, batch_size or --devices",
        )
    return wanted, wanted // at_once
