"""Deformable attention by grid_sample: no compiled operation, one path for CPU and GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["DeformableSelfAttention", "cell_reference", "deformable_sample", "direction_bias", "sampled_at"]


def cell_reference(ny: int, nx: int, device: torch.device) -> Tensor:
    """(Y*X, 2) x, y index of every cell, row major: the reference points, in cells."""
    y, x = torch.meshgrid(torch.arange(ny, device=device), torch.arange(nx, device=device), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float()


def sampled_at(x_NCYX: Tensor, place_NQP2: Tensor) -> Tensor:
    """``grid_sample`` of x at places in -1..1 -> (N, C, Q, P) in x's precision.

    bfloat16 has no digits for places (off by an eighth of a cell on a map of 128, a sixth on one of 180), so such maps are
    read in float32; float16 places are good to 0.02 cells."""
    if x_NCYX.dtype == torch.bfloat16:
        return nn.functional.grid_sample(x_NCYX.float(), place_NQP2.float(), align_corners=False).to(x_NCYX.dtype)
    return nn.functional.grid_sample(x_NCYX, place_NQP2.to(x_NCYX.dtype), align_corners=False)


def deformable_sample(values: Sequence[Tensor], locations_BQHLP2: Tensor, weights_BQHLP: Tensor) -> Tensor:
    """Weighted bilinear samples, zero outside the map -> (B, Q, C).

    values: L maps (B, C, Y, X), C split over H heads. locations: x, y in cells of that map, (0, 0) = centre of cell 0.
    weights: used as given.
    """
    batch, queries, heads, _, points, _ = locations_BQHLP2.shape
    total = None
    for level, value in enumerate(values):
        _, channels, ny, nx = value.shape
        per_head = value.reshape(batch * heads, channels // heads, ny, nx)
        u, v = (locations_BQHLP2[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 + 1).unbind(-1)
        place = torch.stack([u / nx - 1, v / ny - 1], dim=-1)  # (BH, Q, P, 2)
        sampled = sampled_at(per_head, place)
        weight = weights_BQHLP[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        part = (sampled * weight).sum(-1)
        total = part if total is None else total + part
    return total.reshape(batch, -1, queries).transpose(1, 2)


def direction_bias(heads: int, levels: int, points: int) -> Tensor:
    """Initial offsets: head h looks along its direction, point p at distance p + 1 cells; flat (heads*levels*points*2,)."""
    angle = torch.arange(heads, dtype=torch.float64) * (2 * math.pi / heads)
    unit = torch.stack([angle.cos(), angle.sin()], dim=-1)
    unit = unit / unit.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1, dtype=torch.float64)
    offsets = unit[:, None, None] * steps[None, None, :, None]
    return offsets.expand(heads, levels, points, 2).reshape(-1).float()


class DeformableSelfAttention(nn.Module):
    """One layer of deformable self-attention over a map (B, C, Y, X) -> same shape; no residual inside."""

    def __init__(self, channels: int, heads: int = 8, points: int = 10) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.value = nn.Conv2d(channels, channels, 1)
        self.offsets = nn.Linear(channels, heads * points * 2)
        self.weights = nn.Linear(channels, heads * points)
        self.output = nn.Linear(channels, channels)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(direction_bias(heads, 1, points))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, ny, nx = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        shape = (batch, ny * nx, self.heads, 1, self.points)
        weights = self.weights(tokens).view(batch, ny * nx, self.heads, -1).softmax(-1).view(shape)
        reference = cell_reference(ny, nx, x.device)[None, :, None, None, None]
        locations = reference + self.offsets(tokens).float().view(*shape, 2)
        out = self.output(deformable_sample([self.value(x)], locations, weights))
        return out.transpose(1, 2).reshape(x.shape)
