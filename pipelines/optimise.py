"""Optimiser groups, learning-rate schedules and the averaged copy of the weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imkd_data.errors import UsageError
from imkd_models.blocks import PointNorm
from pipelines.run import OptimConfig

__all__ = ["Ema", "in_layout", "lr_factor", "make_optimiser", "synchronised"]


def make_optimiser(model: nn.Module, distiller: nn.Module | None, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW: the network (its image backbone at ``backbone_factor``) and the distiller with its own no-decay names."""
    backbone: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if ".image.backbone." in f".{name}" else rest).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": rest, "factor": 1.0},
        {"params": backbone, "factor": config.backbone_factor},
    ]
    if distiller is not None:
        groups += [{**g, "factor": 1.0} for g in distiller.parameter_groups(config.weight_decay)]  # type: ignore[operator]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def in_layout(optimiser: torch.optim.Optimizer) -> None:
    """Moments that a checkpoint gave, in the memory layout of their parameters; else every step takes torch's slow way."""
    for parameter, moments in optimiser.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)


def lr_factor(config: OptimConfig, step: int, *, total_steps: int, steps_per_epoch: int) -> float:
    """Multiplier of lr for optimiser step ``step`` (from 0)."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    share = step / max(1, total_steps)
    if config.schedule == "step":
        epoch = step / max(1, steps_per_epoch)
        return warm * config.gamma ** sum(epoch >= m for m in config.milestones)
    if config.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "one_cycle":
        up = config.warmup_share
        if share < up:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * share / up))
        return 0.5 * (1 + math.cos(math.pi * (share - up) / max(1e-9, 1 - up)))
    return warm


def synchronised(unit: nn.Module, device: torch.device, world: int) -> None:
    """Turn every batch normalisation of maps into one over all ranks, in place; names in the state dict stay. Norms over points
    stay each rank's own: a rank without a single return could not take part.

    Raises:
        UsageError: on a CPU, where torch has none.
    """
    if device.type != "cuda":
        raise UsageError(
            "SyncBatchNorm needs GPUs",
            rule="train.sync_batchnorm",
            expected="--accelerator cuda",
            found=device.type,
            next="--set sync_batchnorm=off",
        )
    for parent in list(unit.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, PointNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
    layers = sum(isinstance(m, nn.SyncBatchNorm) for m in unit.modules())
    print(f"batch norm: {layers} layers synchronised over {world} device{'s' if world > 1 else ''}", file=sys.stderr)


class Ema:
    """Exponential moving average of a network's floating weights; buffers are copied. decay grows as (1 + t) / (10 + t)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimiser step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state, parameters = model.state_dict(), dict(model.named_parameters())
        averaged = [n for n, v in state.items() if n in parameters and v.is_floating_point()]
        copied = [n for n in state if n not in set(averaged)]
        # All tensors at once: on a GPU one by one they are hundreds of launches between two steps.
        if averaged:
            torch._foreach_lerp_([self.shadow[n] for n in averaged], [state[n] for n in averaged], 1 - decay)
        if copied:
            torch._foreach_copy_([self.shadow[n] for n in copied], [state[n] for n in copied])

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
