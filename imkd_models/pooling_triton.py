"""Triton kernel of the BEV pooling sum. Imported only where a CUDA device and Triton are present."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["sorted_sum"]


@triton.jit
def _sum_cells(values, order, starts, out, channels, BLOCK: tl.constexpr):
    cell = tl.program_id(0)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < channels
    first, last = tl.load(starts + cell), tl.load(starts + cell + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(first, last):
        row = tl.load(order + i)
        total += tl.load(values + row * channels + lane, mask=mask, other=0.0)
    tl.store(out + cell.to(tl.int64) * channels + lane, total, mask=mask)


def sorted_sum(values: Tensor, order: Tensor, starts: Tensor, num_cells: int) -> Tensor:
    """values (N, C) f32, order (N,) rows sorted by cell, starts (num_cells + 1,) first sorted row per cell -> (cells, C).
    Every cell is summed by one program in sorted order, so the result does not depend on timing."""
    values = values.contiguous()
    channels = values.shape[1]
    out = torch.empty(num_cells, channels, device=values.device, dtype=torch.float32)
    block = min(128, triton.next_power_of_2(channels))
    if num_cells:
        _sum_cells[(num_cells, triton.cdiv(channels, block))](values, order, starts, out, channels, BLOCK=block)
    return out
