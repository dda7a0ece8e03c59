"""Parts of BEVFusion's code base (github.com/mit-han-lab/bevfusion) that CRKD's networks use: the image neck over three levels,
the LiDAR-aided depth net with its sparse depth image, the refinement of a finely pooled map, the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import PointBatch
from imkd_models.blocks import BasicBlock, conv_norm_relu, inverse44
from imkd_models.config import StudentConfig

__all__ = ["BevfusionTrunk", "LevelNeck", "LidarDepthNet", "refinement", "sparse_depth"]


class LevelNeck(nn.Module):
    """GeneralizedLSSFPN over strides 8, 16, 32: each level joined with the enlarged one above it by a 1x1 and a 3x3
    convolution; the finest map is the output."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        above = [*[channels] * (len(in_channels) - 2), in_channels[-1]]
        joined = [own + up for own, up in zip(in_channels[:-1], above, strict=True)]
        self.lateral = nn.ModuleList(conv_norm_relu(width, channels, 1) for width in joined)
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels) for _ in joined)
        self.out_channels = channels

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for i in reversed(range(len(maps) - 1)):
            up = nn.functional.interpolate(x, size=maps[i].shape[-2:], mode="bilinear", align_corners=False)
            x = self.smooth[i](self.lateral[i](torch.cat([maps[i], up], dim=1)))
        return x


def _layer(cin: int, cout: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, kernel, stride=stride, padding=kernel // 2), nn.BatchNorm2d(cout), nn.ReLU()]


class LidarDepthNet(nn.Module):
    """Image features at stride 8 and a sparse depth image in metres -> context (N, C, H, W) and depth logits (N, D, H, W)."""

    def __init__(self, in_channels: int, context: int, bins: int) -> None:
        super().__init__()
        self.bins, self.context = bins, context
        self.points = nn.Sequential(*_layer(1, 8, 1), *_layer(8, 32, 5, 4), *_layer(32, 64, 5, 2))
        first, second = _layer(in_channels + 64, in_channels, 3), _layer(in_channels, in_channels, 3)
        self.both = nn.Sequential(*first, *second, nn.Conv2d(in_channels, bins + context, 1))

    def forward(self, x: Tensor, depth_N1HW: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.points(depth_N1HW.to(x.dtype))
        depth, context = self.both(torch.cat([seen, x], dim=1)).split([self.bins, self.context], dim=1)
        return context, depth


def sparse_depth(
    lidar: PointBatch, image_from_camera_BV33: Tensor, bev_from_camera_BV44: Tensor, config: StudentConfig
) -> Tensor:
    """(B*V, 1, H, W) metres of the nearest LiDAR point in each pixel, 0 = none. All sweeps, as published, within the grid
    and 5 m below to 3 m above the network's origin. (Where points share a pixel the public code keeps any one.)"""
    (height, width), grid = config.image_hw_px, config.grid
    batch, views = bev_from_camera_BV44.shape[:2]
    with torch.autocast(bev_from_camera_BV44.device.type, enabled=False):
        xyz = lidar.xyz_m.float()
        low = xyz.new_tensor([grid.x_min_m, grid.y_min_m, -5.0])
        high = xyz.new_tensor([grid.x_max_m, grid.y_max_m, 3.0])
        near = ((xyz > low) & (xyz < high)).all(-1)  # false for what is not finite
        xyz = torch.nan_to_num(xyz, 0, 0, 0)
        image_from_bev = image_from_camera_BV33.float() @ inverse44(bev_from_camera_BV44.float())[..., :3, :]
        canvas = xyz.new_full((batch * views * height * width + 1,), torch.inf)
        for view in range(views):
            projection = image_from_bev[:, view][lidar.batch_index]  # (N, 3, 4)
            uvd = torch.einsum("nij,nj->ni", projection[..., :3], xyz) + projection[..., 3]
            depth = uvd[:, 2]
            u, v = uvd[:, 0] / depth.clamp(min=1e-5), uvd[:, 1] / depth.clamp(min=1e-5)
            seen = near & (depth > 1e-5) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
            pixel = (lidar.batch_index * views + view) * height * width
            pixel = pixel + torch.where(seen, v, 0).long() * width + torch.where(seen, u, 0).long()
            cell = torch.where(seen, pixel, canvas.shape[0] - 1)
            canvas = canvas.scatter_reduce(0, cell, depth, "amin")
        image = torch.where(canvas.isinf(), 0, canvas)[:-1]
    return image.view(batch * views, 1, height, width)


def refinement(channels: int, factor: int) -> nn.Sequential:
    """Three convolutions that bring a map pooled on cells ``factor`` times finer to the grid."""
    layers: list[nn.Module] = []
    for stride in (1, factor, 1):
        layers += conv_norm_relu(channels, channels, stride=stride)
    return nn.Sequential(*layers)


class TopDownNeck(nn.Module):
    """BEVFusion's LSSFPN: the last map enlarged onto the first one, joined, convolved, enlarged twice and convolved."""

    def __init__(self, first: int, last: int, channels: int) -> None:
        super().__init__()
        joined = conv_norm_relu(first + last, channels, 1)
        self.fuse = nn.Sequential(*joined, *conv_norm_relu(channels, channels))
        self.up = conv_norm_relu(channels, channels)
        self.out_channels = channels

    def forward(self, first: Tensor, last: Tensor) -> Tensor:
        options = {"mode": "bilinear", "align_corners": True}
        last = nn.functional.interpolate(last, size=first.shape[-2:], **options)
        x = self.fuse(torch.cat([last, first], dim=1))
        return self.up(nn.functional.interpolate(x, scale_factor=2, **options))


class BevfusionTrunk(nn.Module):
    """BEVFusion's decoder: residual stages of strides 2, 2, 1 and widths base, 2 base, 4 base; a two-level neck."""

    strides = (2, 2, 1)

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        stages, width = [], config.trunk_channels
        self.channels = tuple(config.trunk_base * 2**i for i in range(3))
        for channels, depth, stride in zip(self.channels, config.trunk_blocks, self.strides, strict=True):
            first = BasicBlock(width, channels, stride)
            stages.append(nn.Sequential(first, *[BasicBlock(channels, channels) for _ in range(depth - 1)]))
            width = channels
        self.stages = nn.ModuleList(stages)
        self.neck = TopDownNeck(self.channels[0], self.channels[2], 4 * config.neck_channels)

    def feature_shapes(self, grid: BevGrid) -> dict[str, tuple[int, int, int]]:
        """(C, Y, X) of the delivered maps."""
        sizes = [(grid.ny // k, grid.nx // k) for k in (2, 4, 4)]
        stages = {f"bev_stage{i}": (c, *size) for i, (c, size) in enumerate(zip(self.channels, sizes, strict=True))}
        return {**stages, "bev_neck": (self.neck.out_channels, *grid.shape)}

    def forward(self, fused: Tensor) -> dict[str, Tensor]:
        maps, x = [], fused
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        named = {f"bev_stage{i}": x for i, x in enumerate(maps)}
        return {**named, "bev_neck": self.neck(maps[0], maps[2])}
