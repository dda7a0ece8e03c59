"""Aligners of DualDistill: student stages to the teacher's grid and width; ``ALIGNERS`` is the whole list.

The orthogonal map is the Cayley map and its parameter is kept out of weight decay: the library's default map for matrices
that are not square loses orthogonality in one decayed step (dual_distill, section 8, item 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

__all__ = ["ALIGNERS", "Aoa", "OneConv", "OrthoOnly", "Projector", "UpThreeConv", "resized"]


class AlignerOptions(Protocol):
    """The options that aligners read."""

    attention_heads: int
    softmax_scale: float
    max_tokens: int
    skip: bool
    align_corners: bool


class Projector(nn.Module):
    """S = g * (P y) + b a cell, P with orthonormal rows (columns if it widens); always float32."""

    def __init__(self, in_channels: int, out_channels: int, *, orthogonal: bool = True) -> None:
        super().__init__()
        self.project = nn.Linear(in_channels, out_channels, bias=False)
        nn.init.orthogonal_(self.project.weight)
        if orthogonal:
            parametrizations.orthogonal(self.project, "weight", orthogonal_map="cayley")
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        with torch.autocast(x_BCYX.device.type, enabled=False):
            y = self.project(x_BCYX.float().movedim(1, -1))
            return (self.gain * y + self.bias).movedim(-1, 1)


class Aoa(nn.Module):
    """Attention with learned queries a position, feed-forward, up-sampling, orthogonal projection (section 3)."""

    def __init__(
        self,
        source: tuple[int, int, int],
        target: tuple[int, int, int],
        options: AlignerOptions,
        *,
        orthogonal: bool = True,
    ) -> None:
        super().__init__()
        channels, ny, nx = source
        self.o, self.size = options, target[1:]
        self.pool = 1
        while -(-ny // self.pool) * -(-nx // self.pool) > options.max_tokens:
            self.pool += 1
        self.tokens = (-(-ny // self.pool), -(-nx // self.pool))
        count = self.tokens[0] * self.tokens[1]
        self.heads = max(h for h in range(1, options.attention_heads + 1) if channels % h == 0)
        self.enter = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.position = nn.Parameter(torch.zeros(1, channels, *self.tokens))
        self.embedding = nn.Parameter(torch.randn(count, channels))
        self.to_query, self.query = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.key, self.value = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.contract = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.projector = Projector(channels, target[0], orthogonal=orthogonal)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False) if self.pool > 1 else x
        z = (self.enter(pooled) + self.position).flatten(2).transpose(1, 2)  # (B, N, C)
        batch, count, channels = z.shape
        query = self.query(torch.relu(self.to_query(self.embedding)))[None].expand(batch, -1, -1)

        def split(t: Tensor) -> Tensor:
            return t.view(batch, count, self.heads, channels // self.heads).transpose(1, 2)

        scale = self.o.softmax_scale / math.sqrt(channels // self.heads)
        y = F.scaled_dot_product_attention(split(query), split(self.key(z)), split(self.value(z)), scale=scale)
        y = self.norm(self.output(y.transpose(1, 2).reshape(batch, count, channels)))
        y = y + self.contract(torch.relu(self.expand(y)))
        y = y.transpose(1, 2).reshape(batch, channels, *self.tokens)
        y = resized(y, self.size, self.o.align_corners)
        if self.o.skip:
            y = y + resized(x, self.size, self.o.align_corners)
        return self.projector(y)


def resized(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    size = (int(size[0]), int(size[1]))
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class UpThreeConv(nn.Module):
    """DistillBEV's aligner: bilinear up-sampling, then three 1x1 conv-norm-ReLU."""

    def __init__(self, source: tuple[int, int, int], target: tuple[int, int, int], options: AlignerOptions) -> None:
        super().__init__()
        self.size, self.align_corners = target[1:], options.align_corners
        layers: list[nn.Module] = []
        for i in range(3):
            cin = source[0] if i == 0 else target[0]
            layers += [nn.Conv2d(cin, target[0], 1, bias=False), nn.BatchNorm2d(target[0]), nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(resized(x, self.size, self.align_corners))


class OneConv(nn.Module):
    """1x1 convolution with bias, then up-sampling."""

    def __init__(self, source: tuple[int, int, int], target: tuple[int, int, int], options: AlignerOptions) -> None:
        super().__init__()
        self.size, self.align_corners = target[1:], options.align_corners
        self.conv = nn.Conv2d(source[0], target[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        return resized(self.conv(x), self.size, self.align_corners)


class OrthoOnly(nn.Module):
    """Up-sampling and the orthogonal projection, without attention."""

    def __init__(self, source: tuple[int, int, int], target: tuple[int, int, int], options: AlignerOptions) -> None:
        super().__init__()
        self.size, self.align_corners = target[1:], options.align_corners
        self.projector = Projector(source[0], target[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(resized(x, self.size, self.align_corners))


def _attention_only(source: tuple[int, int, int], target: tuple[int, int, int], options: AlignerOptions) -> nn.Module:
    return Aoa(source, target, options, orthogonal=False)


ALIGNERS: dict[str, Callable[[tuple[int, int, int], tuple[int, int, int], AlignerOptions], nn.Module]] = {
    "aoa": Aoa,
    "attn_only": _attention_only,
    "ortho_only": OrthoOnly,
    "up3conv": UpThreeConv,
    "conv1": OneConv,
}
