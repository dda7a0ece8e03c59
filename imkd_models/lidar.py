"""LiDAR encoders: dense pillars to staged BEV maps. Stage names and shapes as the public CenterPoint pillar network:
``bev_stage1`` lies on the head grid, ``bev_stage0`` is twice as fine, ``bev_stage2`` twice as coarse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imkd_data.errors import RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import PointBatch
from imkd_models.blocks import BasicBlock, PointNorm, SecondBackbone, StageNeck, cell_index, conv_norm_relu, first_points
from imkd_models.config import LidarConfig
from imkd_models.convention import map_from_network, map_to_network, near_sensor, network_grid, points_to_network
from imkd_models.pooling import pillar_max, pillar_mean

__all__ = ["LidarStages", "PillarEncoder", "ResidualStages", "finer", "voxel_map"]


def finer(grid: BevGrid, k: int) -> BevGrid:
    """The grid whose cells are 1/k of this one's."""
    if grid.cell_mm % k:
        raise RecipeError(f"cells of {grid.cell_m} m do not divide by {k} into whole millimetres")
    return BevGrid(x_min_m=grid.x_min_m, y_min_m=grid.y_min_m, cell_m=grid.cell_mm / k / 1000, nx=grid.nx * k, ny=grid.ny * k)


class PillarEncoder(nn.Module):
    """Points -> (B, C, Yp, Xp): x, y, z, intensity, age, offsets to the pillar's mean point (3) and centre (2 or 3), one
    Linear-norm-ReLU layer, maximum. No cap on points; float32.

    ``points_per_pillar`` reproduces imported networks: at most so many points (in the given order), and the zero rows of
    pillars with fewer points take part in the maximum.
    """

    def __init__(self, config: LidarConfig, grid: BevGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.linear = nn.Linear(8 + config.pillar_centre_values, config.pillar_channels, bias=False)
        self.norm = PointNorm(config.pillar_channels, eps=1e-3, momentum=config.norm_momentum)

    def forward(self, lidar: PointBatch, batch: int) -> Tensor:
        grid = self.grid
        with torch.autocast(lidar.xyz_m.device.type, enabled=False):
            num = batch * grid.ny * grid.nx
            # In evaluation shapes stay static: points outside fall into one more pillar. The norm must not see them.
            features, cell = self._features(lidar, num, select=self.training or self.config.points_per_pillar > 0)
            x = torch.relu(self.norm(self.linear(features)))
            canvas = pillar_max(x, cell, num + 1)[:-1]
            if self.config.points_per_pillar:
                canvas = self._with_padding(canvas, cell, num)
        return canvas.view(batch, grid.ny, grid.nx, -1).permute(0, 3, 1, 2)

    def _features(self, lidar: PointBatch, num: int, *, select: bool = True) -> tuple[Tensor, Tensor]:
        """Point features and their pillar; points outside are left out (select) or get pillar ``num``. With a cap only the
        points that it keeps: the mean point is theirs."""
        c, grid = self.config, self.grid
        xyz, age = lidar.xyz_m.float(), lidar.age_s.float()
        row, column, inside = cell_index(xyz[:, :2], grid)
        inside = inside & (xyz[:, 2] >= c.z_range_m[0]) & (xyz[:, 2] < c.z_range_m[1])
        inside = inside & ~near_sensor(lidar, c)
        intensity = torch.nan_to_num(lidar.column("intensity").float()) * c.intensity_scale
        values = torch.cat([torch.nan_to_num(xyz, 0, 0, 0), intensity[:, None], age[:, None]], dim=1)
        cell = torch.where(inside, (lidar.batch_index * grid.ny + row) * grid.nx + column, num)
        if select:
            kept = inside.nonzero()[:, 0]  # once: every mask would make the host wait for the device
            values, cell, row, column = values[kept], cell[kept], row[kept], column[kept]
        if c.points_per_pillar:
            kept, cell = first_points(torch.arange(len(cell), device=cell.device), cell, c.points_per_pillar)
            values, row, column = values[kept], row[kept], column[kept]
        xyz = values[:, :3]
        mean = pillar_mean(xyz, cell, num + 1)[cell]
        x, y = (column + 0.5) * grid.cell_m + grid.x_min_m, (row + 0.5) * grid.cell_m + grid.y_min_m
        centre = torch.stack([x, y], dim=-1)
        middle = torch.full_like(xyz[:, :1], sum(c.z_range_m) / 2)
        to_centre = (xyz - torch.cat([centre, middle], dim=1))[:, : c.pillar_centre_values]
        features = torch.cat([values, xyz - mean, to_centre], dim=1)
        return features * self._scale(features) if c.scaled_inputs else features, cell

    def _scale(self, like: Tensor) -> Tensor:
        """x, y over the grid's half width, heights over 2 m, offsets over half a pillar: inputs of order one."""
        half, pillar = self.grid.cell_m * max(self.grid.nx, self.grid.ny) / 2, self.grid.cell_m / 2
        scale = [1 / half, 1 / half, 0.5, 1.0, 1.0, 1 / pillar, 1 / pillar, 1.0, 1 / pillar, 1 / pillar, 0.5]
        return like.new_tensor(scale[: like.shape[1]])

    def _with_padding(self, canvas: Tensor, cell: Tensor, num: int) -> Tensor:
        """In the public code an empty slot is a zero row: norm(0) takes part in the maximum."""
        zero = torch.zeros(1, self.norm.num_features, device=canvas.device)
        empty = torch.relu(
            nn.functional.batch_norm(
                zero, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, eps=self.norm.eps
            )
        )
        count = torch.bincount(cell, minlength=num)
        short = ((count > 0) & (count < self.config.points_per_pillar))[:, None]
        return torch.where(short, torch.maximum(canvas, empty), canvas)


class ResidualStages(nn.Module):
    """ResNet-34-like stages for 0.1 m pillars: two strided 3x3 convs to 0.4 m, then residual stages of the given widths,
    the first at that stride, the others halving the grid."""

    def __init__(
        self, in_channels: int, widths: tuple[int, int, int], blocks: tuple[int, int, int], checkpointed: bool
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_norm_relu(in_channels, in_channels, stride=2), conv_norm_relu(in_channels, widths[0], stride=2)
        )
        stages, width = [], widths[0]
        for i, (channels, depth) in enumerate(zip(widths, blocks, strict=True)):
            first = BasicBlock(width, channels, 1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *[BasicBlock(channels, channels) for _ in range(depth - 1)]))
            width = channels
        self.stages = nn.ModuleList(stages)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in (self.stem, *self.stages):
            use = self.checkpointed and self.training and torch.is_grad_enabled()
            again = partial(_recomputing, stage)
            x = checkpoint(stage, x, use_reentrant=False, context_fn=again) if use else stage(x)
            maps.append(x)
        return maps[1:]


def voxel_map(config: LidarConfig) -> nn.Module:
    """The voxel encoder alone: points -> (B, 256, Y, X) on the head grid, in the axes of the points. Needs spconv."""
    from imkd_models.voxel import VoxelEncoder

    return VoxelEncoder(config, finer(config.grid, config.pillars_per_cell))


def _recomputing(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward pass and of its repetition in the backward pass."""
    return nullcontext(), _statistics_kept(stage)


@contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    """Running statistics saw the batch once already: batch norms inside leave them as they are."""
    norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.num_batches_tracked is not None]
    before = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked -= 1
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


class LidarStages(nn.Module):
    """Points -> the stage maps that the neck reads, and the neck: the LiDAR teacher without its head.

    neck_stages 3: bev_stage0, bev_stage1, bev_stage2. 2: stage0 stays internal and is not delivered.
    """

    def __init__(self, config: LidarConfig) -> None:
        super().__init__()
        self.config = config
        self.turned = config.convention != "bev"
        grid = finer(network_grid(config.grid) if self.turned else config.grid, config.pillars_per_cell)
        if config.encoder == "voxel":
            if config.neck_stages != 2:  # not in LidarConfig: networks without this neck take any
                raise RecipeError(
                    "neck_stages of encoder voxel", expected="2 (it has no stage0)", found=str(config.neck_stages)
                )
            from imkd_models.voxel import VoxelEncoder

            self.encoder: nn.Module = VoxelEncoder(config, grid)
            self.stages: nn.Module = SecondBackbone(
                self.encoder.out_channels, config.widths[1:], config.layers[1:], (1, 2), momentum=config.norm_momentum
            )
        else:
            self.encoder = PillarEncoder(config, grid)
            channels = config.pillar_channels
            if config.encoder == "resnet34":
                self.stages = ResidualStages(channels, config.widths, config.layers, config.checkpoint_stages)
            else:
                strides = (config.pillars_per_cell // 2, 2, 2)
                self.stages = SecondBackbone(channels, config.widths, config.layers, strides, momentum=config.norm_momentum)
        widths = config.widths[-config.neck_stages :]
        factors = (0.5, 1.0, 2.0)[-config.neck_stages :]
        self.neck = StageNeck(widths, [config.neck_channels] * len(widths), factors, eps=1e-3, momentum=config.norm_momentum)
        self.names = ("bev_stage0", "bev_stage1", "bev_stage2")[-config.neck_stages :]

    def feature_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, Y, X) of every delivered map."""
        c, (ny, nx) = self.config, self.config.grid.shape
        shapes = {"bev_stage0": (2 * ny, 2 * nx), "bev_stage1": (ny, nx), "bev_stage2": (ny // 2, nx // 2)}
        widths = dict(zip(shapes, c.widths, strict=True))
        out = {name: (widths[name], *shapes[name]) for name in self.names}
        return {**out, "bev_neck": (self.neck.out_channels, ny, nx)}

    def forward(self, lidar: PointBatch, batch: int) -> dict[str, Tensor]:
        if self.turned:
            lidar = points_to_network(lidar, self.config.mount_m[2])
        maps = self.stages(self.encoder(lidar, batch))[-self.config.neck_stages :]
        maps = [*maps, self.neck(maps)]
        if self.turned:
            maps = [map_from_network(x) for x in maps]
        return dict(zip((*self.names, "bev_neck"), maps, strict=True))

    def read_neck(self, stages: dict[str, Tensor]) -> Tensor:
        """Neck over named stage maps in bev, also those of the label encoder."""
        maps = [stages[name] for name in self.names]
        if self.turned:
            return map_from_network(self.neck([map_to_network(x) for x in maps]))
        return self.neck(maps)
