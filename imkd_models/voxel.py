"""Sparse voxel encoder of CenterPoint (0.1 x 0.1 x 0.2 m): the stronger LiDAR teacher where spconv is installed.

Layers as mmdetection3d's SparseEncoder with basic blocks: 16, 32, 64, 128 channels, the grid halved three times, then the
height folded into channels. spconv is an optional extra and is imported only here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imkd_data.errors import UsageError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import PointBatch
from imkd_models.blocks import PointNorm, cell_index, first_points
from imkd_models.config import LidarConfig
from imkd_models.convention import near_sensor
from imkd_models.pooling import pillar_mean

__all__ = ["VoxelEncoder"]

VOXEL_HEIGHT_M = 0.2


def _spconv() -> Any:
    try:
        import spconv.pytorch as spconv
    except ImportError as error:
        raise UsageError(
            "the voxel teacher needs spconv",
            next="pip install the spconv build of your CUDA version (spconv-cu120, ...), or use pillar_r34",
        ) from error
    return spconv


class _Block(nn.Module):
    """Two submanifold convolutions with a residual on the active voxels."""

    def __init__(self, spconv: Any, channels: int, key: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            spconv.SubMConv3d(channels, channels, 3, padding=1, bias=False, indice_key=key) for _ in range(2)
        )
        self.norms = nn.ModuleList(PointNorm(channels, eps=1e-3, momentum=0.01) for _ in range(2))

    def forward(self, x: Any) -> Any:
        y = self.convs[0](x)
        y = y.replace_feature(torch.relu(self.norms[0](y.features)))
        y = self.convs[1](y)
        return y.replace_feature(torch.relu(self.norms[1](y.features) + x.features))


class _Convolution(nn.Module):
    """Sparse convolution, norm, ReLU."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, PointNorm(channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Any) -> Any:
        y = self.layer(x)
        return y.replace_feature(torch.relu(self.norm(y.features)))


class VoxelEncoder(nn.Module):
    """Points -> (B, 256, Y, X) on the head grid. A voxel's input is the mean of x, y, z, intensity, age of its points.

    grid: of the voxels, in the network's own axes. ``points_per_pillar`` caps the points of a voxel (imported networks).
    """

    def __init__(self, config: LidarConfig, grid: BevGrid) -> None:
        super().__init__()
        sp = self.spconv = _spconv()
        self.config, self.grid = config, grid
        self.levels = round((config.z_range_m[1] - config.z_range_m[0]) / VOXEL_HEIGHT_M)
        widths = (16, 32, 64, 128)
        layers: list[nn.Module] = [_Convolution(sp.SubMConv3d(5, 16, 3, padding=1, bias=False, indice_key="in"), 16)]
        for i, width in enumerate(widths):
            layers += [_Block(sp, width, f"stage{i}") for _ in range(2)]
            if i < 3:
                padding = (0, 1, 1) if i == 2 else 1
                down = sp.SparseConv3d(width, widths[i + 1], 3, stride=2, padding=padding, bias=False)
                layers.append(_Convolution(down, widths[i + 1]))
        fold = sp.SparseConv3d(128, 128, (3, 1, 1), stride=(2, 1, 1), bias=False)
        self.layers = nn.Sequential(*layers, _Convolution(fold, 128))
        self.out_channels = 256

    def forward(self, lidar: PointBatch, batch: int) -> Tensor:
        low, grid = self.config.z_range_m[0], self.grid
        with torch.autocast(lidar.xyz_m.device.type, enabled=False):
            xyz = lidar.xyz_m.float()
            row, column, inside = cell_index(xyz[:, :2], grid)
            level = torch.floor((xyz[:, 2] - low) / VOXEL_HEIGHT_M).long()
            inside = inside & (level >= 0) & (level < self.levels)
            intensity = lidar.column("intensity").float() * self.config.intensity_scale
            values = torch.cat([xyz, intensity[:, None], lidar.age_s.float()[:, None]], dim=1)
            inside = inside & ~near_sensor(lidar, self.config)
            flat = ((lidar.batch_index * self.levels + level) * grid.ny + row) * grid.nx + column
            values, flat = values[inside], flat[inside]
            if self.config.points_per_pillar:
                values, flat = first_points(values, flat, self.config.points_per_pillar)
            if not len(flat):  # spconv refuses an empty cloud; the parameters keep a gradient of zero
                still = torch.stack([p.sum() for p in self.parameters()]).sum() * 0
                return still.expand(batch, self.out_channels, *(n // 8 for n in grid.shape))
            cells, voxel = torch.unique(flat, return_inverse=True)
            features = pillar_mean(values, voxel, len(cells))
        parts = []
        for size in (grid.nx, grid.ny, self.levels):
            parts.append(cells % size)
            cells = cells // size
        index = torch.stack([cells, *reversed(parts)], dim=1).int()
        x = self.spconv.SparseConvTensor(features, index, [self.levels + 1, grid.ny, grid.nx], batch)
        return self.layers(x).dense().flatten(1, 2)
