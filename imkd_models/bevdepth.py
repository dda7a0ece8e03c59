"""BEVDepth's parts for camera-only baselines and public weights (crn: section 3.7): camera-aware depth net with ASPP and
a deformable convolution, the optional depth aggregation, and pooling in which every frustum cell has a place of its own.

Formulas: github.com/Megvii-BaseDetection/BEVDepth. No compiled operation: deformable sampling by grid_sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imkd_models.attention import sampled_at
from imkd_models.blocks import BasicBlock, conv_norm_relu, inverse44
from imkd_models.config import StudentConfig
from imkd_models.pooling import bev_pool

__all__ = ["CameraAwareDepthNet", "DeformConv", "FrustumView", "LinearDepthNet", "camera_values", "pool_frustum"]

CAMERA_VALUES = 27  # 4 intrinsics, 6 image augmentation, 5 BEV augmentation, 12 camera pose


class DeformConv(nn.Module):
    """3x3 deformable convolution (version 1: offsets only), groups of channels, no bias. Outside the map is zero."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.offset = nn.Conv2d(channels, 18, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        offset = self.offset(x).float().view(n, 9, 2, height, width)  # (dy, dx) of tap k = 3 row + column
        tap = torch.arange(9, device=x.device)
        rows = torch.arange(height, device=x.device)[:, None] + (tap // 3 - 1)[:, None, None] + offset[:, :, 0]
        columns = torch.arange(width, device=x.device) + (tap % 3 - 1)[:, None, None] + offset[:, :, 1]
        place = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)  # (N, 9, H, W, 2)
        taps = sampled_at(x, place.flatten(1, 2))
        taps = taps.view(n, self.groups, channels // self.groups, 9, height * width)
        weight = self.weight.view(self.groups, -1, channels // self.groups, 9).to(taps.dtype)
        return torch.einsum("ngckp,gock->ngop", taps, weight).reshape(n, channels, height, width)


class Aspp(nn.Module):
    """Dilated convolutions (1x1, then 3x3 with rates 6, 12, 18) beside the map's mean; joined by a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernels = ((1, 1), (3, 6), (3, 12), (3, 18))
        self.branches = nn.ModuleList(conv_norm_relu(channels, channels, k, dilation=d) for k, d in kernels)
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(channels, channels, 1))
        self.mix = nn.Sequential(*conv_norm_relu(5 * channels, channels, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        return self.mix(torch.cat([*maps, self.mean(x).expand_as(maps[0])], dim=1))


def _mlp(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(CAMERA_VALUES, channels), nn.ReLU(), nn.Linear(channels, channels))


def _gate(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.Sigmoid())


class CameraAwareDepthNet(nn.Module):
    """Image features and the numbers of their camera -> context (N, C, H, W) and depth logits (N, D, H, W)."""

    def __init__(self, in_channels: int, channels: int, context: int, bins: int, blocks: int) -> None:
        super().__init__()
        self.reduce = conv_norm_relu(in_channels, channels, bias=True)
        self.norm = nn.BatchNorm1d(CAMERA_VALUES)
        self.context_mlp, self.context_gate = _mlp(channels), _gate(channels)
        self.depth_mlp, self.depth_gate = _mlp(channels), _gate(channels)
        self.context = nn.Conv2d(channels, context, 1)
        residual = [BasicBlock(channels, channels) for _ in range(blocks)]
        self.depth = nn.Sequential(*residual, Aspp(channels), DeformConv(channels), nn.Conv2d(channels, bins, 1))

    def forward(self, x: Tensor, camera_N27: Tensor) -> tuple[Tensor, Tensor]:
        values = self.norm(camera_N27)
        x = self.reduce(x)
        context = x * self.context_gate(self.context_mlp(values)[..., None, None])
        depth = x * self.depth_gate(self.depth_mlp(values)[..., None, None])
        return self.context(context), self.depth(depth)


class LinearDepthNet(nn.Module):
    """One 1x1 convolution to depth logits and context (the plain lift of BEVFusion, which CRKD's student uses)."""

    def __init__(self, in_channels: int, context: int, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.both = nn.Conv2d(in_channels, bins + context, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        depth, context = self.both(x).split([self.bins, self.both.out_channels - self.bins], dim=1)
        return context, depth


def camera_values(
    image_from_camera_BV33: Tensor, bev_from_camera_BV44: Tensor, bev_from_ego_B44: Tensor, config: StudentConfig
) -> Tensor:
    """(B*V, 27) numbers of the current keyframe's cameras in BEVDepth's order.

    A batch holds intrinsics after the image augmentation only, so the augmentation is stated as that of evaluation (resize,
    crop at the lower edge) and the intrinsics hold the rest; in evaluation both are exactly the public ones.
    """
    (height, width), (full_h, full_w) = config.image_hw_px, config.source_hw_px
    scale = max(height / full_h, width / full_w)
    left, top = max(0, int(full_w * scale) - width) // 2, int(full_h * scale) - height
    with torch.autocast(bev_from_camera_BV44.device.type, enabled=False):
        image33, augment = image_from_camera_BV33.float(), bev_from_ego_B44.float()
        u, v, last = image33.unbind(-2)
        k = torch.stack([(u + left * last) / scale, (v + top * last) / scale, last], dim=-2)
        pose = inverse44(augment)[:, None] @ bev_from_camera_BV44.float()
        views = pose.shape[1]
        intrinsics = torch.stack([k[..., 0, 0], k[..., 1, 1], k[..., 0, 2], k[..., 1, 2]], dim=-1)
        image = torch.stack([k.new_full(k.shape[:2], x) for x in (scale, 0, -left, 0, scale, -top)], dim=-1)
        bev = torch.stack([augment[:, i, j] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2))], dim=-1)
        parts = [intrinsics, image, bev[:, None].expand(-1, views, -1), pose[..., :3, :].flatten(2)]
        return torch.cat(parts, dim=-1).flatten(0, 1)


class FrustumView(nn.Module):
    """Context times depth probability at every frustum cell (N, C, D, H, W); with ``aggregate`` BEVDepth's depth
    aggregation: residual 3x3 convolutions on the (depth, column) plane of each feature row."""

    def __init__(self, channels: int, *, aggregate: bool) -> None:
        super().__init__()
        self.aggregate = aggregate
        if aggregate:
            self.reduce = conv_norm_relu(channels, channels)
            self.convs = nn.Sequential(conv_norm_relu(channels, channels), conv_norm_relu(channels, channels))
            self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, context: Tensor, depth: Tensor) -> Tensor:
        with torch.autocast(context.device.type, enabled=False):
            volume = torch.einsum("nchw,ndhw->nhcdw", context.float(), depth.float())
            if self.aggregate:
                n, h = volume.shape[:2]
                plane = self.reduce(volume.flatten(0, 1))
                volume = self.out(self.convs(plane) + plane).unflatten(0, (n, h))
            return volume.permute(0, 2, 3, 1, 4)


def pool_frustum(volume_NCDHW: Tensor, cell_NDHW: Tensor, shape: Sequence[int], batch: int) -> Tensor:
    """Sum of the frustum cells in each BEV cell (negative = outside) -> (B, C, Y, X)."""
    ny, nx = shape
    values = volume_NCDHW.permute(0, 2, 3, 4, 1).flatten(0, 3)
    flat = bev_pool(values, cell_NDHW.flatten(), batch * ny * nx, reduce="sum")
    return flat.view(batch, ny, nx, -1).permute(0, 3, 1, 2)
