"""Camera branch: image backbone, depth net, frustum geometry and the view transform (crn: sections 3.2 and 3.3).

Letters: V views, D depth bins, H W rows and columns of the feature map. Geometry and pooling run in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imkd_data.errors import InputDataError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_models.bevfusion import LevelNeck
from imkd_models.blocks import BasicBlock, StageNeck, cell_index, conv_norm_relu, count_per_rank, inverse44
from imkd_models.config import StudentConfig
from imkd_models.keymap import public_key, read_public, resnet_rules
from imkd_models.pooling import bev_pool

__all__ = ["BACKBONES", "DepthNet", "Frustum", "ImageEncoder", "ViewTransform", "depth_loss", "depth_targets", "frustum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """An AutoBackbone: transformers config class and its arguments, channels at strides 4, 8, 16, 32, published weights."""

    config: str
    arguments: dict[str, Any]
    channels: tuple[int, int, int, int]
    published: str


def _resnet(block: str, depths: tuple[int, ...], widths: tuple[int, ...], published: str, stem: int = 64) -> Backbone:
    arguments = {"layer_type": block, "depths": list(depths), "hidden_sizes": list(widths), "embedding_size": stem}
    return Backbone(config="ResNetConfig", arguments=arguments, channels=tuple(widths), published=published)


_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
BACKBONES: dict[str, Backbone] = {
    "resnet18": _resnet("basic", (2, 2, 2, 2), _BASIC, "microsoft/resnet-18"),
    "resnet50": _resnet("bottleneck", (3, 4, 6, 3), _BOTTLENECK, "microsoft/resnet-50"),
    "resnet101": _resnet("bottleneck", (3, 4, 23, 3), _BOTTLENECK, "microsoft/resnet-101"),
    "resnet_tiny": _resnet("basic", (1, 1, 1, 1), (16, 32, 64, 96), "", stem=16),
    "convnext_base": Backbone(
        config="ConvNextConfig",
        arguments={"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]},
        channels=(128, 256, 512, 1024),
        published="facebook/convnext-base-224",
    ),
    "swin_tiny": Backbone(
        config="SwinConfig",
        arguments={"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
        channels=(96, 192, 384, 768),
        published="microsoft/swin-tiny-patch4-window7-224",
    ),
}


def build_backbone(name: str, weights: str | None, levels: int = 4) -> nn.Module:
    """The named image backbone, its last ``levels`` maps. weights: ``published``, a published name or local folder for
    transformers, a ``.pth`` file of torchvision's ResNet (what CRN starts from), None = random."""
    if name not in BACKBONES:
        raise RecipeError("unknown image backbone", expected=", ".join(BACKBONES), found=name)
    import transformers  # seconds to import: only where a camera branch is built

    spec, features = BACKBONES[name], ["stage1", "stage2", "stage3", "stage4"][-levels:]
    if weights is not None and weights.endswith((".pth", ".pt")):
        return _torchvision_resnet(build_backbone(name, None, levels), Path(weights))
    if weights is not None:
        source = spec.published if weights == "published" else weights
        backbone = transformers.AutoBackbone.from_pretrained(source, out_features=features)
    else:
        config = getattr(transformers, spec.config)(out_features=features, **spec.arguments)
        backbone = transformers.AutoBackbone.from_config(config)
    if hasattr(backbone, "swin"):
        backbone.swin.layernorm = nn.Identity()  # of the classifier: no map passes through it, so it would never learn
    return backbone


def _torchvision_resnet(backbone: nn.Module, file: Path) -> nn.Module:
    """Load torchvision's names; its classifier is the only part that may be left over."""
    state, own = read_public(file), backbone.state_dict()
    names = {key: public_key(resnet_rules("", ""), f".{key}")[0].removeprefix(".") for key in own}
    missing = [theirs for theirs in names.values() if theirs not in state and not theirs.endswith("num_batches_tracked")]
    unused = sorted(set(state) - set(names.values()) - {"fc.weight", "fc.bias"})
    if missing or unused:
        raise InputDataError(
            "the file is no torchvision ResNet of this depth",
            file=str(file),
            expected=f"missing: {', '.join(missing[:5]) or 'none'}",
            found=f"unused: {', '.join(unused[:5]) or 'none'}",
        )
    backbone.load_state_dict({key: state.get(theirs, own[key]) for key, theirs in names.items()})
    return backbone


class ImageEncoder(nn.Module):
    """Images (N, 3, H, W) -> (N, C, H/stride, W/stride): C = 4 * fpn_channels of the stage neck, fpn_channels of the
    top-down one. With published weights a ResNet's stem stays frozen."""

    def __init__(self, config: StudentConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        weights = config.backbone_weights if pretrained else None
        widths = BACKBONES[config.backbone].channels
        if config.image_neck == "topdown":
            self.backbone = build_backbone(config.backbone, weights, levels=3)
            self.neck: nn.Module = LevelNeck(widths[1:], config.fpn_channels)
        else:
            self.backbone = build_backbone(config.backbone, weights)
            factors = [4 * 2**i / config.stride_px for i in range(4)]
            self.neck = StageNeck(widths, [config.fpn_channels] * 4, factors, momentum=config.norm_momentum)
        self.swapped = "image_channels:swapped" in config.parity
        self.stem = getattr(self.backbone, "embedder", None) if config.backbone_weights is not None else None
        if self.stem is not None:
            self.stem.requires_grad_(False)
        for key, values in (("mean", (123.675, 116.28, 103.53)), ("std", (58.395, 57.12, 57.375))):
            self.register_buffer(f"channel_{key}", torch.tensor(values).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode)
        if self.stem is not None:
            self.stem.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.swapped:  # the public code meets BGR values with RGB statistics
            raw = images * self.channel_std + self.channel_mean
            images = (raw.flip(1) - self.channel_mean) / self.channel_std
        return self.neck(self.backbone(images).feature_maps)


class DepthNet(nn.Module):
    """Image features -> context (N, C, H, W) and depth logits (N, D, H, W)."""

    def __init__(self, in_channels: int, channels: int, context: int, bins: int, blocks: int) -> None:
        super().__init__()
        self.reduce = conv_norm_relu(in_channels, channels, bias=True)
        self.context = nn.Sequential(*conv_norm_relu(channels, channels, bias=True), nn.Conv2d(channels, context, 1))
        self.depth = nn.Sequential(*[BasicBlock(channels, channels) for _ in range(blocks)], nn.Conv2d(channels, bins, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.reduce(x)
        return self.context(x), self.depth(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frustum:
    """Where the cells of one keyframe's cameras lie. cell_NDW: flat BEV cell of (view-of-batch, bin, column), negative =
    outside; (N, D, H, W) for the frustum view. valid_NDHW: height within z_range."""

    cell_NDW: Tensor
    valid_NDHW: Tensor


def bin_centres_m(config: StudentConfig, device: torch.device) -> Tensor:
    """(D,) depth of the bins: centres, or CRN's lower edges."""
    k = torch.arange(config.depth_bins, device=device, dtype=torch.float32)
    shift = 0.0 if "frustum:linspace_edges" in config.parity else 0.5
    return config.depth_min_m + config.depth_step_m * (k + shift)


def feature_pixels(config: StudentConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """u (W,) and v (H,) of the feature cells: centres of the stride, or CRN's linspace from edge to edge."""
    (h, w), s = config.image_hw_px, config.stride_px
    if "frustum:linspace_edges" in config.parity:
        return torch.linspace(0, w - 1, w // s, device=device), torch.linspace(0, h - 1, h // s, device=device)
    u = torch.arange(w // s, device=device, dtype=torch.float32) * s + (s - 1) / 2
    v = torch.arange(h // s, device=device, dtype=torch.float32) * s + (s - 1) / 2
    return u, v


def frustum(
    image_from_camera_BV33: Tensor, bev_from_camera_BV44: Tensor, bev_from_ego_B44: Tensor, config: StudentConfig
) -> Frustum:
    """Cells of all views. A cell (bin, column) is placed by the top feature row (CRN) or the mean of its valid rows; the
    view's height test uses every row. Flat index = ((sample * ny) + row) * nx + column, N = B * V."""
    with torch.autocast(bev_from_camera_BV44.device.type, enabled=False):
        pose = bev_from_camera_BV44.float()
        u, v = feature_pixels(config, pose.device)
        d = bin_centres_m(config, pose.device)
        vv, uu = torch.meshgrid(v, u, indexing="ij")
        pixel = torch.stack([uu, vv, torch.ones_like(uu)], dim=-1)
        bev_from_image = pose[..., :3, :3] @ inverse44(image_from_camera_BV33)
        ray = torch.einsum("bvij,hwj->bvhwi", bev_from_image, pixel)  # per metre of depth
        xyz = ray[:, :, None] * d[:, None, None, None] + pose[..., :3, 3][:, :, None, None, None]  # (B, V, D, H, W, 3)
        if "geometry:top_row_half" in config.parity:
            xyz = _half_before_augmentation(xyz, bev_from_ego_B44.float())
        low, high = config.z_range_m
        if config.view == "frustum":
            return _own_places(xyz, config)
        valid = (xyz[..., 2] > low) & (xyz[..., 2] < high)
        place, placed = xyz[:, :, :, 0], torch.ones_like(valid[:, :, :, 0])
        if config.geometry_rows == "mean":
            share, placed = valid[..., None].float(), valid.any(3)
            place = (xyz * share).sum(3) / share.sum(3).clamp(min=1)
        row, column, inside = cell_index(place[..., :2], config.grid, truncate="cell_index:trunc" in config.parity)
        sample = torch.arange(len(pose), device=pose.device).view(-1, 1, 1, 1)
        cell = (sample * config.grid.ny + row) * config.grid.nx + column
        cell = torch.where(inside & placed, cell, -1)
        return Frustum(cell_NDW=cell.flatten(0, 1), valid_NDHW=valid.flatten(0, 1))


def _own_places(xyz: Tensor, config: StudentConfig) -> Frustum:
    """Every cell (B, V, D, H, W, 3) at its own place. Truncation makes the one height cell twice as deep downwards."""
    low, high = config.z_range_m
    grid, truncate = config.view_grid, "cell_index:trunc" in config.parity
    z = xyz[..., 2]
    valid = (z > 2 * low - high) & (z < high) if truncate else (z >= low) & (z < high)
    row, column, inside = cell_index(xyz[..., :2], grid, truncate=truncate)
    sample = torch.arange(len(xyz), device=xyz.device).view(-1, 1, 1, 1, 1)
    cell = torch.where(inside & valid, (sample * grid.ny + row) * grid.nx + column, -1)
    return Frustum(cell_NDW=cell.flatten(0, 1), valid_NDHW=valid.flatten(0, 1))


def _half_before_augmentation(xyz: Tensor, bev_from_ego: Tensor) -> Tensor:
    """CRN rounds ego coordinates (B, V, D, H, W, 3) to 16 bit before it applies the augmentation."""

    def moved(matrix: Tensor, points: Tensor) -> Tensor:
        turned = torch.einsum("bij,bvdhwj->bvdhwi", matrix[:, :3, :3], points)
        return turned + matrix[:, :3, 3].view(-1, 1, 1, 1, 1, 3)

    return moved(bev_from_ego, moved(inverse44(bev_from_ego), xyz).half().float())


class ViewTransform(nn.Module):
    """Context, depth and radar occupancy -> features on the (bin, column) plane of each view (N, C, D, W)."""

    def __init__(self, channels: int, convs: int, *, radar: bool) -> None:
        super().__init__()
        self.radar = radar
        width = channels * (2 if radar else 1)
        layers: list[nn.Module] = [conv_norm_relu(width, width) for _ in range(convs)]
        self.aggregate = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, context: Tensor, depth: Tensor, valid_NDHW: Tensor, occupancy: Tensor | None) -> Tensor:
        with torch.autocast(context.device.type, enabled=False):
            context, depth = context.float(), depth.float()
            seen = valid_NDHW.float()
            planes = [torch.einsum("nchw,ndhw->ncdw", context, depth * seen)]
            if self.radar:
                collapsed = torch.einsum("nchw,nhw->ncw", context, seen.amax(1))
                planes.append(collapsed[:, :, None] * occupancy.float())
            return self.aggregate(torch.cat(planes, dim=1))


def pool_views(maps: list[Tensor], cells: Frustum, grid: BevGrid, batch: int, *, parity: frozenset[str]) -> Tensor:
    """Maps (N, C, D, W) of all views, concatenated over C and averaged per BEV cell -> (B, C, Y, X)."""
    values = torch.cat([m.float() for m in maps], dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    num_cells = batch * grid.ny * grid.nx
    flat = bev_pool(values, cells.cell_NDW.flatten(), num_cells, uncounted_gradient="pool_grad:uncounted" in parity)
    return flat.view(batch, grid.ny, grid.nx, -1).permute(0, 3, 1, 2)


def depth_targets(depth_BVHW: Tensor, config: StudentConfig) -> tuple[Tensor, Tensor]:
    """Sparse depth (metres, 0 = none) at image size -> bin (B, V, h, w) i64 and valid: per stride block the nearest
    return; bin k holds [min + k step, min + (k + 1) step)."""
    s = config.stride_px
    b, v, h, w = depth_BVHW.shape
    blocks = depth_BVHW.float().view(b, v, h // s, s, w // s, s)
    nearest = torch.where(blocks > 0, blocks, torch.inf).amin(dim=(3, 5))
    index = torch.floor((nearest - config.depth_min_m) / config.depth_step_m)
    valid = (index >= 0) & (index < config.depth_bins)
    return torch.where(valid, index, 0).long(), valid


def depth_loss(depth_BVDHW: Tensor, target_BVHW: Tensor, config: StudentConfig) -> Tensor:
    """Binary cross entropy of the softmax depth over the bins, averaged over blocks with a return; float32, unweighted."""
    with torch.autocast(depth_BVDHW.device.type, enabled=False):
        index, valid = depth_targets(target_BVHW, config)
        hot = nn.functional.one_hot(index, config.depth_bins).movedim(-1, 2).float()
        p = depth_BVDHW.float().clamp(0, 1)
        loss = nn.functional.binary_cross_entropy(p, hot, reduction="none").sum(2)
        return torch.where(valid, loss, 0).sum() / count_per_rank(valid.sum().float(), 1.0)
