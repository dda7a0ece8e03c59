"""Parts of the camera-radar and LiDAR-camera detectors: the camera branch, Adaptive-Smooth's simulated branch, the trunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imkd_data.errors import MissingFeatureError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch
from imkd_models.bevdepth import CameraAwareDepthNet, FrustumView, LinearDepthNet, camera_values, pool_frustum
from imkd_models.bevfusion import BevfusionTrunk, LidarDepthNet, refinement, sparse_depth
from imkd_models.blocks import ResNetTrunk, StageNeck, conv_norm_relu
from imkd_models.camera import DepthNet, Frustum, ImageEncoder, ViewTransform, pool_views
from imkd_models.config import StudentConfig
from imkd_models.fusion import SimulatedRefinement

__all__ = ["CameraBranch", "SimulatedBranch", "Trunk", "build_trunk"]


class Trunk(nn.Module):
    """bev_fused -> bev_stage0..2 and bev_neck: strided residual stages and a neck over them and the input."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.float32 = config.head_float32
        self.stages = ResNetTrunk(config.trunk_channels, config.trunk_base, config.trunk_blocks)
        widths = (config.trunk_channels, *self.stages.channels)
        factors = [2**i for i in range(len(widths))]
        self.neck = StageNeck(widths, [config.neck_channels] * len(widths), factors, momentum=config.norm_momentum)

    def feature_shapes(self, grid: BevGrid) -> dict[str, tuple[int, int, int]]:
        """(C, Y, X) of the delivered maps."""
        stages = {
            f"bev_stage{i}": (c, grid.ny // 2 ** (i + 1), grid.nx // 2 ** (i + 1)) for i, c in enumerate(self.stages.channels)
        }
        return {**stages, "bev_neck": (self.neck.out_channels, *grid.shape)}

    def forward(self, fused: Tensor) -> dict[str, Tensor]:
        if self.float32:
            with torch.autocast(fused.device.type, enabled=False):
                return self._forward(fused.float())
        return self._forward(fused)

    def _forward(self, fused: Tensor) -> dict[str, Tensor]:
        stages = self.stages(fused)
        named = {f"bev_stage{i}": x for i, x in enumerate(stages)}
        return {**named, "bev_neck": self.neck([fused, *stages])}


def build_trunk(config: StudentConfig) -> Trunk | BevfusionTrunk:
    """The student's trunk and neck."""
    return BevfusionTrunk(config) if config.trunk == "bevfusion" else Trunk(config)


class CameraBranch(nn.Module):
    """Images of one keyframe -> maps on the (bin, column) plane of each view, and depth probabilities.

    depth_input: sparse LiDAR depth joins the image features; only teachers have it. depth_net lidar_points: the same from the
    batch's LiDAR points, as BEVFusion does it.
    """

    def __init__(self, config: StudentConfig, *, radar_assisted: bool, pretrained: bool) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config, pretrained=pretrained)
        width = self.image.neck.out_channels
        if config.depth_input:
            extra = max(config.depth_channels // 4, 8)
            strides = _strides(config.stride_px)
            layers = [conv_norm_relu(1 if i == 0 else extra, extra, stride=s) for i, s in enumerate(strides)]
            self.sparse_depth = nn.Sequential(*layers)
            width += extra
        c = config
        if c.depth_net in ("linear", "lidar_points"):
            kind = LinearDepthNet if c.depth_net == "linear" else LidarDepthNet
            self.depth: nn.Module = kind(width, c.camera_channels, c.depth_bins)
        else:
            net = CameraAwareDepthNet if c.depth_net == "camera_aware" else DepthNet
            self.depth = net(width, c.depth_channels, c.camera_channels, c.depth_bins, c.depth_blocks)
        if c.view == "frustum":
            self.view: nn.Module = FrustumView(c.camera_channels, aggregate=c.depth_aggregation)
        else:
            self.view = ViewTransform(c.camera_channels, c.view_convs, radar=radar_assisted)
        self.refine = refinement(c.camera_channels, c.view_refine) if c.view_refine > 1 else None

    def encode(self, batch: Batch, slot: int) -> Tensor:
        """(B*V, C, h, w) image features of one history slot."""
        features = self.image(batch.images_BTVCHW[:, slot].flatten(0, 1))
        if self.config.depth_input:
            if "depth_BVHW" not in batch.image_maps:
                raise MissingFeatureError("this camera branch reads LiDAR depth", expected="image_maps['depth_BVHW']")
            depth = batch.image_maps["depth_BVHW"].flatten(0, 1)[:, None].to(features.dtype) / 50
            features = torch.cat([features, self.sparse_depth(depth)], dim=1)
        return features

    def lift(self, features: Tensor, cells: Frustum, occupancy: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image features -> plane map (N, C, D, W) and depth probabilities (N, D, h, w)."""
        context, logits = self.depth(features)
        depth = logits.float().softmax(1)
        return self.view(context, depth, cells.valid_NDHW, occupancy), depth

    def pooled(
        self,
        batch: Batch,
        slot: int,
        features: Tensor,
        cells: Frustum,
        radar: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image features of one slot -> BEV map (B, C, Y, X) and depth probabilities (N, D, h, w). radar: context and
        occupancy on the same planes; its channels follow those of the camera."""
        c, count = self.config, len(batch)
        if c.view == "collapsed":
            plane, depth = self.lift(features, cells, None if radar is None else radar[1])
            planes = [plane] if radar is None else [plane, radar[0]]
            return pool_views(planes, cells, c.grid, count, parity=c.parity), depth
        extra = ()
        if c.depth_net == "camera_aware":
            image33, pose44 = batch.image_from_camera_BTV33[:, 0], batch.bev_from_camera_BTV44[:, 0]
            extra = (camera_values(image33, pose44, batch.bev_from_ego_B44, c),)  # of the current keyframe, as published
        if c.depth_net == "lidar_points":
            image33, pose44 = batch.image_from_camera_BTV33[:, slot], batch.bev_from_camera_BTV44[:, slot]
            extra = (sparse_depth(batch.lidar, image33, pose44, c),)
        context, logits = self.depth(features, *extra)
        depth = logits.float().softmax(1)
        pooled = pool_frustum(self.view(context, depth), cells.cell_NDW, c.view_grid.shape, count)
        return pooled if self.refine is None else self.refine(pooled), depth


def _strides(total: int) -> list[int]:
    strides = []
    while total > 1:
        strides.append(4 if total % 4 == 0 else 2)
        total //= strides[-1]
    return strides


class SimulatedBranch(nn.Module):
    """Adaptive-Smooth's simulated point-cloud branch: refined image features, a lift of its own, refined BEV map, plus the
    radar map by a 1x1 convolution where there is radar. Reads images and radar only."""

    def __init__(self, config: StudentConfig, image_channels: int) -> None:
        super().__init__()
        c = self.config = config
        self.image = SimulatedRefinement(image_channels, c.sim_attention, 10)
        self.depth = DepthNet(image_channels, c.depth_channels, c.camera_channels, c.depth_bins, c.depth_blocks)
        self.bev = SimulatedRefinement(c.camera_channels, c.sim_attention, 20)
        self.radar = nn.Conv2d(c.radar_channels, c.camera_channels, 1) if c.radar else None

    def forward(self, features: Tensor, cells: Frustum, batch: int, radar: Tensor | None) -> Tensor:
        context, logits = self.depth(self.image(features))
        with torch.autocast(features.device.type, enabled=False):
            weight = logits.float().softmax(1) * cells.valid_NDHW.float()
            plane = torch.einsum("nchw,ndhw->ncdw", context.float(), weight)
            lifted = pool_views([plane], cells, self.config.grid, batch, parity=self.config.parity)
        out = self.bev(lifted)
        return out if self.radar is None else out + self.radar(radar)
