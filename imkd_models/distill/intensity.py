"""The intensity map I_L of IMKD: from cached LiDAR reflectance to one weight a cell (imkd, section 3).

Exact planes (sum, count, maximum of reflectance on fine cells) are pooled to each grid, put on a log scale after
pooling and combined with occupancy. Other sources and the controls (occupancy, permuted, other sample) are switches of
the same function, because on real data the reflectance map is close to an occupancy mask until shown otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from imkd_data.errors import MismatchError, MissingFeatureError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, PointBatch
from imkd_models.blocks import cell_index
from imkd_models.distill.terms import stage_grid
from imkd_models.outputs import HeadMaps

__all__ = ["CONTROLS", "FROM", "NORMALISE", "SOURCES", "IntensityRule", "intensity_maps", "log_scale", "pooled_reflectance"]

SOURCES: tuple[str, ...] = ("reflectance", "activation", "heatmap", "mix", "none")
CONTROLS: tuple[str, ...] = ("off", "occupancy", "permuted", "other_sample")
FROM: tuple[str, ...] = ("planes", "view", "points")
NORMALISE: tuple[str, ...] = ("none", "max")

# Batch parts that each way of getting reflectance needs.
PART_OF = {"planes": "intensity_planes", "view": "lidar_intensity", "points": "lidar_points"}


@dataclass(frozen=True, kw_only=True)
class IntensityRule:
    """source, control, taken_from, normalise: the switches above. rho: floor of an occupied cell. max_share: share of
    the maximum against the mean. full_scale: reflectance that counts as 1. threshold, top_fraction: ablations, last."""

    source: str = "reflectance"
    control: str = "off"
    taken_from: str = "planes"
    rho: float = 0.2
    max_share: float = 0.5
    full_scale: float = 255.0
    normalise: str = "none"
    threshold: float = 0.0
    top_fraction: float = 1.0

    @property
    def reads_lidar(self) -> bool:
        """True where cached reflectance is needed."""
        return self.source in ("reflectance", "mix")


def log_scale(r: Tensor) -> Tensor:
    """g(r) = log(1 + 255 r) / log 256: maps [0, 1] to [0, 1], spreading dark surfaces."""
    return torch.log1p(255 * r) / math.log(256)


def _factor(fine: Sequence[int], shape: Sequence[int], what: str) -> int:
    fy, fx, y, x = fine[-2], fine[-1], shape[-2], shape[-1]
    if fy % y or fx % x or fy // y != fx // x:
        raise MismatchError(f"{what} do not pool to the feature grid", expected=f"a multiple of {y}x{x}", found=f"{fy}x{fx}")
    return fy // y


def _block_sum(x_BYX: Tensor, k: int) -> Tensor:
    b, ny, nx = x_BYX.shape
    return x_BYX.view(b, ny // k, k, nx // k, k).sum(dim=(2, 4))


def _block_max(x_BYX: Tensor, k: int) -> Tensor:
    return F.max_pool2d(x_BYX[:, None], k)[:, 0]


def pooled_reflectance(batch: Batch, shape: Sequence[int], rule: IntensityRule) -> tuple[Tensor, Tensor, Tensor]:
    """(count, maximum, mean) on a (Y, X) grid, each (B, Y, X); maximum and mean in 0..1, 0 where no return fell.

    planes: sums, counts and maxima of the fine planes pooled k x k; never a mean of means, never bilinear.
    view: the G0 view; coarser grids weight its means by the saturated count, so they are approximate.
    points: LiDAR points of the batch, rasterised here; the reference in tests.

    Raises:
        MissingFeatureError: the batch lacks the part. MismatchError: grids that do not pool.
    """
    if rule.taken_from == "points":
        if batch.lidar is None:
            raise MissingFeatureError("intensity from points needs LiDAR points in the batch", expected="lidar_points")
        return _from_points(batch.lidar, len(batch), stage_grid(batch.grid, shape))
    name = PART_OF[rule.taken_from]
    if name not in batch.bev_maps:
        raise MissingFeatureError(
            f"the batch has no {name}",
            expected=name,
            found=", ".join(batch.bev_maps) or "no BEV maps",
            next="build the cache with the lidar_bev fields, or choose another intensity_from",
        )
    maps = batch.bev_maps[name].float()
    k = _factor(maps.shape, shape, name)
    if rule.taken_from == "planes":
        count = _block_sum(maps[:, 1], k)
        maximum = _block_max(maps[:, 2], k) / rule.full_scale
        total = _block_sum(maps[:, 0], k) / rule.full_scale
    else:
        count = _block_sum(maps[:, 2], k)
        maximum = _block_max(maps[:, 1], k)
        total = _block_sum(maps[:, 0] * maps[:, 2], k)
    occupied = count > 0
    mean = torch.where(occupied, total / count.clamp(min=1), 0.0)
    return count, torch.where(occupied, maximum, 0.0).clamp(0, 1), mean.clamp(0, 1)


def _from_points(lidar: PointBatch, batch_size: int, grid: BevGrid) -> tuple[Tensor, Tensor, Tensor]:
    row, column, inside = cell_index(lidar.xyz_m[:, :2], grid)
    value = lidar.column("intensity").float()[inside]
    index = ((lidar.batch_index * grid.ny + row) * grid.nx + column)[inside]
    zero = torch.zeros(batch_size * grid.ny * grid.nx, device=value.device)
    count = zero.index_add(0, index, torch.ones_like(value))
    total = zero.index_add(0, index, value)
    maximum = zero.scatter_reduce(0, index, value, "amax")
    mean = torch.where(count > 0, total / count.clamp(min=1), 0.0)
    shape = (batch_size, grid.ny, grid.nx)
    return count.view(shape), maximum.view(shape), mean.view(shape)


def _reflectance(batch: Batch, shape: Sequence[int], rule: IntensityRule) -> Tensor:
    count, maximum, mean = pooled_reflectance(batch, shape, rule)
    rho = 1.0 if rule.control == "occupancy" else rule.rho
    value = rule.max_share * log_scale(maximum) + (1 - rule.max_share) * log_scale(mean)
    return (count > 0).float() * (rho + (1 - rho) * value)


def _activation(feature_BCYX: Tensor) -> Tensor:
    a = feature_BCYX.abs().mean(1)
    return a / (a.amax(dim=(1, 2), keepdim=True) + 1e-6)


def _heatmap(head: Sequence[HeadMaps], shape: Sequence[int]) -> Tensor:
    best = torch.stack([torch.sigmoid(m.heatmap_logits_BKYX.float()).amax(1) for m in head]).amax(0)
    return _block_max(best, _factor(best.shape, shape, "the teacher's heat maps"))


def _permuted(value_BYX: Tensor, batch: Batch) -> Tensor:
    """Values shuffled among a sample's occupied cells, by an order that depends on the sample and not on the step."""
    flat = value_BYX.flatten(1)
    out = flat.clone()
    for b, stamp in enumerate(batch.timestamp_us_B.tolist()):
        occupied = (flat[b] > 0).nonzero()[:, 0]
        order = torch.randperm(len(occupied), generator=torch.Generator().manual_seed(int(stamp) & 0x7FFFFFFF))
        out[b, occupied] = flat[b, occupied[order.to(occupied.device)]]
    return out.view_as(value_BYX)


def _shaped(value_BYX: Tensor, rule: IntensityRule) -> Tensor:
    """Normalisation, threshold and top fraction, in this order."""
    if rule.normalise == "max":
        value_BYX = value_BYX / (value_BYX.amax(dim=(1, 2), keepdim=True) + 1e-6)
    if rule.threshold > 0:
        value_BYX = torch.where(value_BYX >= rule.threshold, value_BYX, 0.0)
    if rule.top_fraction < 1:
        occupied = torch.where(value_BYX > 0, value_BYX, torch.nan).flatten(1)
        limit = torch.nanquantile(occupied, 1 - rule.top_fraction, dim=1)[:, None, None]
        value_BYX = torch.where(value_BYX >= torch.nan_to_num(limit), value_BYX, 0.0)
    return value_BYX


@torch.no_grad()
def intensity_maps(
    batch: Batch,
    features: Mapping[str, Tensor],
    head: Sequence[HeadMaps],
    rule: IntensityRule,
) -> dict[str, Tensor]:
    """I_L (B, 1, Y, X) on the grid of each named teacher map, without gradient, in [0, 1].

    Args:
        features: teacher maps by name; their grids are the grids wanted, and ``activation`` reads their values.
        head: the teacher's head maps, read by the source ``heatmap``.

    Raises:
        MismatchError: ``other_sample`` with a batch of one, or grids that do not pool.
    """
    out = {}
    for name, feature in features.items():
        shape = feature.shape[-2:]
        if rule.source == "reflectance":
            value = _reflectance(batch, shape, rule)
        elif rule.source == "activation":
            value = _activation(feature.float())
        elif rule.source == "heatmap":
            value = _heatmap(head, shape)
        elif rule.source == "mix":
            value = _activation(feature.float()) * (1 + _reflectance(batch, shape, rule)) / 2
        else:
            value = torch.zeros(len(feature), *shape, device=feature.device)
        if rule.control == "permuted":
            value = _permuted(value, batch)
        elif rule.control == "other_sample":
            if len(value) < 2:
                raise MismatchError("intensity_control other_sample needs at least two samples in a batch", found="1")
            value = value.roll(1, 0)
        out[name] = _shaped(value, rule)[:, None]
    return out
