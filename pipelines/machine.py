"""The machine a run lives on: one process, ``--devices N``, torchrun or srun, all through Fabric."""

from __future__ import annotations

import os
from typing import Any

import torch

from imkd_data.errors import UsageError
from pipelines.run import Run

__all__ = ["accumulation", "make_fabric"]


def make_fabric(run: Run, devices: int, accelerator: str) -> Any:
    """Fabric for one process, torchrun, srun or --devices N."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    nodes = max(1, _env_int("SLURM_JOB_NUM_NODES", 1)) if _env_int("SLURM_NTASKS", 1) > 1 else 1
    world = max(devices * nodes, _env_int("WORLD_SIZE", 1), _env_int("SLURM_NTASKS", 1))
    strategy: Any = DDPStrategy(find_unused_parameters=True) if world > 1 else "auto"
    local = _env_int("LOCAL_WORLD_SIZE", 0) or devices
    fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=nodes, strategy=strategy, precision=run.precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


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
