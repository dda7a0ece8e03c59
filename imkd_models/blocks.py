"""Layers that several networks share: convolution blocks, residual blocks, the two-dimensional trunk and its neck.

Widths and normalisation follow CRN (github.com/youngskkim/CRN) and mmdetection3d's SECOND / SECONDFPN, so that parameter
counts and public weights fit; all tensors are (B, C, Y, X).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from imkd_data.geometry import BevGrid

__all__ = [
    "BasicBlock",
    "LayerNorm2d",
    "PointNorm",
    "ResNetTrunk",
    "SecondBackbone",
    "StageNeck",
    "StepCounts",
    "cell_index",
    "conv_norm_relu",
    "count_per_rank",
    "first_points",
    "frozen_copy",
    "inverse44",
]


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    bias: bool = False,
    padding_mode: str = "zeros",
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> nn.Sequential:
    """Convolution that keeps the size (up to the stride), BatchNorm, ReLU."""
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        bias=bias,
        padding_mode=padding_mode,
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum), nn.ReLU())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual; a strided or widening block gets a 1x1 shortcut with BatchNorm."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, Y, X) map, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float().movedim(1, -1)).movedim(-1, 1)


class PointNorm(nn.BatchNorm1d):
    """BatchNorm over points (N, C). Fewer than two points have no variance: the running statistics are used and kept, so
    a batch without radar or LiDAR returns stays finite."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.shape[0] > 1:
            return super().forward(x)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class SecondBackbone(nn.Module):
    """SECOND: per stage one strided convolution and ``layers[i]`` further ones. Returns every stage's map."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        layers: Sequence[int],
        strides: Sequence[int],
        *,
        bias: bool = False,
        padding_mode: str = "zeros",
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        options = {"bias": bias, "padding_mode": padding_mode, "eps": 1e-3, "momentum": momentum}
        stages = []
        for out, depth, stride in zip(channels, layers, strides, strict=True):
            blocks = [conv_norm_relu(in_channels, out, stride=stride, **options)]
            blocks += [conv_norm_relu(out, out, **options) for _ in range(depth)]
            stages.append(nn.Sequential(*blocks))
            in_channels = out
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class StageNeck(nn.Module):
    """SECONDFPN: bring maps of several strides to one grid and concatenate them.

    ``factors[i]`` is the up-sampling of map i: above 1 a transposed convolution, 1 a 1x1 convolution, 1/k a strided one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        factors: Sequence[float],
        *,
        eps: float = 1e-3,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        branches = []
        for cin, cout, factor in zip(in_channels, out_channels, factors, strict=True):
            if factor > 1:
                k = round(factor)
                scale: nn.Module = nn.ConvTranspose2d(cin, cout, k, stride=k, bias=False)
            else:
                k = round(1 / factor)
                scale = nn.Conv2d(cin, cout, k, stride=k, bias=False)
            branches.append(nn.Sequential(scale, nn.BatchNorm2d(cout, eps=eps, momentum=momentum), nn.ReLU()))
        self.branches = nn.ModuleList(branches)
        self.out_channels = sum(out_channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat([branch(x) for branch, x in zip(self.branches, maps, strict=True)], dim=1)


class ResNetTrunk(nn.Module):
    """ResNet-18 layout on the BEV map: 7x7 stride-2 stem without max-pooling, three stages with strides 1, 2, 2."""

    def __init__(self, in_channels: int, base: int, blocks: Sequence[int] = (2, 2, 2)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, base, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(base), nn.ReLU()
        )
        self.channels = tuple(base * 2**i for i in range(len(blocks)))
        stages, width = [], base
        for i, (channels, depth) in enumerate(zip(self.channels, blocks, strict=True)):
            first = BasicBlock(width, channels, 1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *[BasicBlock(channels, channels) for _ in range(depth - 1)]))
            width = channels
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def cell_index(xy_m: Tensor, grid: BevGrid, *, truncate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(..., 2) metres -> row, column (i64) and inside, by the one rule of ``BevGrid.cells`` (floor, half-open).

    truncate: CRN's ``cell_index: trunc``, which folds points up to one cell below the lower edge into cell 0.
    Non-finite points are outside.
    """
    xy = torch.nan_to_num(xy_m.double(), nan=1e9, posinf=1e9, neginf=-1e9)
    if truncate:
        column = torch.trunc((xy[..., 0] - grid.x_min_m) / grid.cell_m).long()
        row = torch.trunc((xy[..., 1] - grid.y_min_m) / grid.cell_m).long()
    else:
        mm = torch.floor(xy * 1000).long()
        column = torch.div(mm[..., 0] - grid.x_min_mm, grid.cell_mm, rounding_mode="floor")
        row = torch.div(mm[..., 1] - grid.y_min_mm, grid.cell_mm, rounding_mode="floor")
    inside = (row >= 0) & (row < grid.ny) & (column >= 0) & (column < grid.nx)
    return row, column, inside


def first_points(values: Tensor, cell: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most ``most`` rows of every cell, the first ones, in their order: rows (N, F) and their cells (N,)."""
    order = cell.argsort(stable=True)
    ordered = cell[order]
    position = torch.arange(len(cell), device=cell.device)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    start = torch.cummax(torch.where(begins, position, 0), 0).values if len(cell) else position
    kept = order[position - start < most].sort().values
    return values[kept], cell[kept]


def inverse44(matrix: Tensor) -> Tensor:
    """Inverse of (..., 4, 4) or (..., 3, 3) transforms in float32, also under autocast. Does not wait for the device, so it
    can be part of a CUDA graph."""
    with torch.autocast(matrix.device.type, enabled=False):
        return torch.linalg.inv_ex(matrix.float())[0]


class StepCounts:
    """Normalisers of one optimiser step of several micro-batches, so that their losses add up to that of the joined batch.

    ``with counts.gathering():`` around a loss adds its counts up (call after call of ``count_per_rank``) and changes nothing
    else; ``with counts.given():`` makes the same calls return the gathered totals, shared out over the micro-batches. Counts
    of truth alone are exact with any stand-in for the network's output.
    """

    active: ClassVar[StepCounts | None] = None

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.batches = 0
        self.call = 0
        self.giving = False

    @contextmanager
    def _used(self, giving: bool) -> Iterator[None]:
        self.call, self.giving, before = 0, giving, StepCounts.active
        StepCounts.active = self
        try:
            yield
        finally:
            StepCounts.active = before

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """One micro-batch's counts are added."""
        with self._used(False):
            yield
        self.batches += 1

    @contextmanager
    def given(self) -> Iterator[None]:
        """Counts are those of the whole step."""
        with self._used(True):
            yield

    def step_count(self, count: Tensor) -> Tensor:
        """The count of this call: its own while gathering, else the step's total."""
        call, self.call = self.call, self.call + 1
        if self.giving:
            return self.totals[call]
        if call == len(self.totals):
            self.totals.append(torch.zeros_like(count))
        self.totals[call] = self.totals[call] + count
        return count


def count_per_rank(count: Tensor, at_least: float) -> Tensor:
    """A loss's normaliser: the total over ranks (and over the micro-batches of a step, see ``StepCounts``), at least
    ``at_least``, divided by the number of ranks (and micro-batches).

    Each one's sum over it, averaged over all of them, is the loss of the whole global batch, however uneven they are.
    """
    step = StepCounts.active
    shares = 1
    if step is not None:
        count = step.step_count(count)
        if not step.giving:
            return count.clamp(min=at_least)
        shares = step.batches
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.clone()
        torch.distributed.all_reduce(count)
        shares *= torch.distributed.get_world_size()
    return count.clamp(min=at_least) / shares


def frozen_copy(module: nn.Module) -> nn.Module:
    """Switch a module to evaluation for good: no gradient, eval mode. Returns the same module."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
