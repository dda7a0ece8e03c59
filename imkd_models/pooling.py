"""Pooling of scattered cells into the BEV grid: one function, several equal ways to compute it.

``plain`` index_add (reference, any device, deterministic on CPU), ``sorted`` sort + segment reduce, ``triton`` one program
per BEV cell over sorted points (CUDA with Triton only). All give sum or mean; empty cells are exactly 0.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

__all__ = ["bev_pool", "pillar_max", "pillar_mean"]


@cache
def _has_triton() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def bev_pool(
    values_NC: Tensor,
    index_N: Tensor,
    num_cells: int,
    *,
    reduce: str = "mean",
    method: str = "auto",
    uncounted_gradient: bool = False,
) -> Tensor:
    """Pool N rows of C values into cells -> (num_cells, C), float32 (float64 stays).

    index_N: cell of each row, negative = outside, dropped. reduce: mean | sum. method: plain | sorted | triton | auto
    (triton on a GPU, else plain). uncounted_gradient: CRN's ``pool_grad: uncounted``, whose backward pass forgets to
    divide by the count.
    """
    if method == "auto":
        method = "triton" if values_NC.is_cuda and _has_triton() else "plain"
    with torch.autocast(values_NC.device.type, enabled=False):
        values = values_NC if values_NC.dtype == torch.float64 else values_NC.float()
        index = torch.where(index_N >= 0, index_N, num_cells)  # one more cell collects what is outside
        total = _SUMS[method](values, index, num_cells)
        if reduce == "sum":
            return total
        ones = values.new_ones(len(index))
        count = values.new_zeros(num_cells + 1).index_add(0, index, ones)[:-1]
        mean = total / count.clamp(min=1)[:, None]
        return total + (mean - total).detach() if uncounted_gradient else mean


def _sum_plain(values: Tensor, index: Tensor, num_cells: int) -> Tensor:
    out = values.new_zeros(num_cells + 1, values.shape[1])
    return out.index_add(0, index, values)[:-1]


def _sum_sorted(values: Tensor, index: Tensor, num_cells: int) -> Tensor:
    order = index.argsort(stable=True)
    lengths = torch.bincount(index, minlength=num_cells + 1)
    return torch.segment_reduce(values[order], "sum", lengths=lengths, initial=0.0)[:-1]


class _TritonSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, num_cells: int) -> Tensor:
        from imkd_models.pooling_triton import sorted_sum

        ctx.save_for_backward(index)
        order = index.argsort(stable=True)
        cells = torch.arange(num_cells + 1, device=index.device)
        starts = torch.searchsorted(index[order], cells)
        return sorted_sum(values, order, starts, num_cells)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        padded = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        return padded[index], None, None


_SUMS = {"plain": _sum_plain, "sorted": _sum_sorted, "triton": _TritonSum.apply}


def pillar_max(values_NC: Tensor, pillar_N: Tensor, num_pillars: int) -> Tensor:
    """Maximum of non-negative rows per pillar -> (num_pillars, C); empty pillars are 0."""
    out = values_NC.new_zeros(num_pillars, values_NC.shape[1])
    return out.scatter_reduce(0, pillar_N[:, None].expand_as(values_NC), values_NC, "amax")


def pillar_mean(values_NC: Tensor, pillar_N: Tensor, num_pillars: int) -> Tensor:
    """Mean of rows per pillar -> (num_pillars, C); empty pillars are 0."""
    return bev_pool(values_NC, pillar_N, num_pillars, method="plain")
