"""Detectors: a Batch in, Outputs out. Frame bev throughout; what the method distils is named in ``feature_shapes``.

``StudentDetector`` camera and radar (CRN and its variants), ``LidarDetector`` the LiDAR teacher, ``FusionDetector`` the
LiDAR-camera teacher. A sensor that the config does not name is never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imkd_data.errors import MismatchError, MissingFeatureError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch
from imkd_models.bevdepth import CameraAwareDepthNet, FrustumView, LinearDepthNet, camera_values, pool_frustum
from imkd_models.blocks import ResNetTrunk, StageNeck, conv_norm_relu
from imkd_models.camera import DepthNet, Frustum, ImageEncoder, ViewTransform, depth_loss, frustum, pool_views
from imkd_models.config import FusionConfig, LidarConfig, ModelConfig, StudentConfig
from imkd_models.convention import TurnedHead
from imkd_models.fusion import ConcatFuser, GatedFuser, SimulatedRefinement, TimeReduction, build_fuser
from imkd_models.head import CentreHead, LossOptions, detection_loss
from imkd_models.lidar import LidarStages
from imkd_models.outputs import Outputs
from imkd_models.radar import BevRadarEncoder, CalibrationBlock, PerspectiveRadarEncoder

__all__ = ["Detector", "FusionDetector", "LidarDetector", "StudentDetector", "check_grid"]


def check_grid(grid: BevGrid, batch: Batch) -> None:
    """Refuse a batch on another grid: there is no silent resampling."""
    if batch.grid != grid:
        raise MismatchError(
            "the batch lies on another grid than the model",
            expected=str(grid.as_dict()),
            found=str(batch.grid.as_dict()),
            next="give the stream grid=model.grid",
        )


def need(batch: Batch, *names: str) -> None:
    """Refuse a batch that lacks what the model reads, naming it."""
    missing = [name for name in names if getattr(batch, name) is None]
    if missing:
        raise MissingFeatureError(
            "the batch lacks what this model reads",
            expected=", ".join(names),
            found="without " + ", ".join(missing),
            next="build the cache with these sensors and ask the stream for their fields",
        )


class Detector(nn.Module):
    """What every detector has.

    config; grid: of head maps and bev_fused; sensors: subset of (camera, radar, lidar) that forward reads; head:
    CentreHead; feature_shapes: {feature name: (C, Y, X)} that forward delivers.
    """

    sensors: tuple[str, ...] = ()
    head: CentreHead
    feature_shapes: dict[str, tuple[int, int, int]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid

    def loss_options(self) -> LossOptions:
        """Options of the detection loss that the config fixes."""
        c = self.config
        parity = getattr(c, "parity", frozenset())
        return LossOptions(
            box_weight=c.box_weight,
            velocity_weight=c.velocity_weight,
            zero_unknown_velocity="nan_velocity:zero" in parity,
            truncate_cells="cell_index:trunc" in parity,
        )

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms: det_heatmap, det_box, and depth where the model has depth supervision."""
        need(batch, "boxes")
        return detection_loss(outputs.head, batch.boxes, self.grid, self.loss_options())

    def read_neck(self, stages: dict[str, Tensor]) -> Tensor:
        """Neck over named stage maps."""
        raise TypeError(f"{type(self).__name__} has no neck over named stages alone")


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


class CameraBranch(nn.Module):
    """Images of one keyframe -> maps on the (bin, column) plane of each view, and depth probabilities.

    depth_input: sparse LiDAR depth joins the image features; only teachers have it.
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
        if c.depth_net == "linear":
            self.depth: nn.Module = LinearDepthNet(width, c.camera_channels, c.depth_bins)
        else:
            net = CameraAwareDepthNet if c.depth_net == "camera_aware" else DepthNet
            self.depth = net(width, c.depth_channels, c.camera_channels, c.depth_bins, c.depth_blocks)
        if c.view == "frustum":
            self.view: nn.Module = FrustumView(c.camera_channels, aggregate=c.depth_aggregation)
        else:
            self.view = ViewTransform(c.camera_channels, c.view_convs, radar=radar_assisted)

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
        context, logits = self.depth(features, *extra)
        depth = logits.float().softmax(1)
        return pool_frustum(self.view(context, depth), cells.cell_NDW, c.grid.shape, count), depth


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


class StudentDetector(Detector):
    """Camera and radar (either may be off) -> BEV -> centre head. With every method switch off it is CRN.

    forward runs past keyframes without gradient. ``past``: their fused maps from an earlier call of ``fused_keyframe``
    (newest first, already in the current frame) replace them; that is the cached-past inference mode.
    """

    config: StudentConfig

    def __init__(self, config: StudentConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        self.sensors = tuple(name for name, on in (("camera", c.camera), ("radar", c.radar)) if on)
        self.perspective = c.assisted
        if c.camera:
            self.camera = CameraBranch(c, radar_assisted=self.perspective, pretrained=pretrained)
        if c.radar:
            self.radar: nn.Module = PerspectiveRadarEncoder(c) if self.perspective else BevRadarEncoder(c)
        self.calibration = CalibrationBlock(c.radar_channels, c.calibration_init) if c.radar and c.calibration else None
        self.sim = SimulatedBranch(c, self.camera.image.neck.out_channels) if c.sim_branch else None
        self.fuser = build_fuser(c)
        mixed = len(c.history) > 1 and c.time_fusion == "mix"
        self.time = TimeReduction(c.fused_channels, len(c.history)) if mixed else None
        self.trunk = Trunk(c)
        self.head = CentreHead(
            self.trunk.neck.out_channels,
            groups=c.groups,
            shared_channels=c.head_shared,
            branch_channels=c.head_branch,
            float32=c.head_float32,
        )
        self.feature_shapes = self._shapes()

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        c, size = self.config, self.grid.shape
        shapes: dict[str, tuple[int, int, int]] = {}
        if c.camera:
            shapes["bev_camera"] = (c.camera_channels, *size)
        if c.radar:
            shapes["bev_radar"] = (c.radar_channels, *size)
        if c.sim_branch:
            shapes["bev_sim"] = (c.camera_channels, *size)
        if isinstance(self.fuser, GatedFuser):
            shapes["bev_camera_gated"] = (c.camera_channels, *size)
        if getattr(self.fuser, "intensity", False):
            shapes.update({"bev_intensity_camera": (1, *size), "bev_intensity_radar": (1, *size)})
        return {**shapes, "bev_fused": (c.trunk_channels, *size), **self.trunk.feature_shapes(self.grid)}

    def fused_keyframe(self, batch: Batch, slot: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Maps of one history slot up to the fuser, in the current bev frame, and depth probabilities (B, V, D, h, w)."""
        c, count = self.config, len(batch)
        maps, depth, cells, features, assisted = {}, None, None, None, None
        if c.camera:
            image33, pose44 = batch.image_from_camera_BTV33[:, slot], batch.bev_from_camera_BTV44[:, slot]
            cells = frustum(image33, pose44, batch.bev_from_ego_B44, c)
            if self.perspective:
                context, occupancy_logits = self.radar(batch.radar, slot, image33, pose44, batch.bev_from_ego_B44)
                assisted = (context, torch.sigmoid(occupancy_logits.float()))
            features = self.camera.encode(batch, slot)
            pooled, depth = self.camera.pooled(batch, slot, features, cells, assisted)
            maps["bev_camera"] = pooled[:, : c.camera_channels]
            depth = depth.unflatten(0, (count, -1))
        if c.radar:
            maps["bev_radar"] = pooled[:, c.camera_channels :] if self.perspective else self.radar(batch.radar, slot, count)
            if self.calibration is not None:
                maps["bev_radar"] = self.calibration(maps["bev_radar"])
        if self.sim is not None:
            maps["bev_sim"] = self.sim(features, cells, count, maps.get("bev_radar"))
        return {**maps, **self.fuser(maps)}, depth

    def _check(self, batch: Batch, past: Sequence[Tensor] | None) -> None:
        check_grid(self.grid, batch)
        if self.config.camera:
            need(batch, "images_BTVCHW", "image_from_camera_BTV33", "bev_from_camera_BTV44")
            if tuple(batch.images_BTVCHW.shape[-2:]) != self.config.image_hw_px:
                raise MismatchError(
                    "images have another size than the model",
                    expected=str(self.config.image_hw_px),
                    found=str(tuple(batch.images_BTVCHW.shape[-2:])),
                    next="give the stream image_hw_px=model.config.image_hw_px",
                )
            slots = 1 if past is not None else len(self.config.history)
            if batch.images_BTVCHW.shape[1] < slots:
                raise MismatchError(
                    "the batch holds too few history keyframes",
                    expected=f"{slots} (offsets {self.config.history})",
                    found=str(batch.images_BTVCHW.shape[1]),
                    next="give the stream history=model.config.history",
                )
        if self.config.radar:
            need(batch, "radar")

    def forward(self, batch: Batch, past: Sequence[Tensor] | None = None) -> Outputs:
        self._check(batch, past)
        maps, depth = self.fused_keyframe(batch, 0)
        if len(self.config.history) > 1:
            if past is None:
                with torch.no_grad():
                    past = [self.fused_keyframe(batch, slot)[0]["bev_fused"] for slot in range(1, len(self.config.history))]
            keyframes = [maps["bev_fused"], *past]
            maps["bev_fused"] = torch.cat(keyframes, dim=1) if self.time is None else self.time(keyframes)
        maps.update(self.trunk(maps["bev_fused"]))
        return Outputs(features=maps, head=self.head(maps["bev_neck"]), grid=self.grid, depth_BVDHW=depth)

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Detection terms and, with a camera branch and a weight above 0, the depth term."""
        terms = super().loss(outputs, batch)
        if outputs.depth_BVDHW is not None and self.config.depth_weight > 0:
            if "depth_BVHW" not in batch.image_maps:
                raise MissingFeatureError(
                    "depth supervision needs image_maps['depth_BVHW']",
                    next="build the cache with depth_points or set depth_weight=0",
                )
            unweighted = depth_loss(outputs.depth_BVDHW, batch.image_maps["depth_BVHW"], self.config)
            terms["depth"] = self.config.depth_weight * unweighted
        return terms


class LidarDetector(Detector):
    """LiDAR teacher: pillars (or voxels), staged maps, neck, centre head."""

    config: LidarConfig
    sensors = ("lidar",)

    def __init__(self, config: LidarConfig) -> None:
        super().__init__(config)
        c = config
        self.lidar = LidarStages(c)
        self.feature_shapes = self.lidar.feature_shapes()
        options = {
            "groups": c.groups,
            "shared_channels": c.head_shared,
            "branch_channels": c.head_branch,
            "float32": c.head_float32,
        }
        if c.convention == "bev":
            self.head = CentreHead(self.lidar.neck.out_channels, **options)
        else:
            turn = {"convention": c.convention, "height_m": c.mount_m[2]}
            self.head = TurnedHead(self.lidar.neck.out_channels, **turn, **options)

    def forward(self, batch: Batch) -> Outputs:
        check_grid(self.grid, batch)
        need(batch, "lidar")
        features = self.lidar(batch.lidar, len(batch))
        return Outputs(features=features, head=self.head(features["bev_neck"]), grid=self.grid)

    def read_neck(self, stages: dict[str, Tensor]) -> Tensor:
        return self.lidar.read_neck(stages)


class FusionDetector(Detector):
    """LiDAR-camera teacher of CRKD and Adaptive-Smooth: bev_lidar, bev_camera, gated fuser, trunk, head."""

    config: FusionConfig
    sensors = ("camera", "lidar")

    def __init__(self, config: FusionConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c, camera = config, config.student
        self.lidar = LidarStages(c.lidar)
        self.lidar_map = conv_norm_relu(self.lidar.neck.out_channels, c.lidar_channels)
        self.camera = CameraBranch(camera, radar_assisted=False, pretrained=pretrained)
        fuser = GatedFuser if c.fuser == "gated" else ConcatFuser
        self.fuser = fuser(("bev_camera", "bev_lidar"), (camera.camera_channels, c.lidar_channels), c.fused_channels)
        trunk = camera.with_values(fused_channels=c.fused_channels)
        self.trunk = Trunk(trunk)
        self.head = CentreHead(
            self.trunk.neck.out_channels,
            groups=c.groups,
            shared_channels=camera.head_shared,
            branch_channels=camera.head_branch,
            float32=camera.head_float32,
        )
        size = self.grid.shape
        shapes = {"bev_lidar": (c.lidar_channels, *size), "bev_camera": (camera.camera_channels, *size)}
        if c.fuser == "gated":
            shapes["bev_camera_gated"] = (camera.camera_channels, *size)
        shapes["bev_fused"] = (c.fused_channels, *size)
        self.feature_shapes = {**shapes, **self.trunk.feature_shapes(self.grid)}

    def forward(self, batch: Batch) -> Outputs:
        check_grid(self.grid, batch)
        need(batch, "lidar", "images_BTVCHW", "image_from_camera_BTV33", "bev_from_camera_BTV44")
        camera, count = self.config.student, len(batch)
        cells = frustum(batch.image_from_camera_BTV33[:, 0], batch.bev_from_camera_BTV44[:, 0], batch.bev_from_ego_B44, camera)
        seen, depth = self.camera.pooled(batch, 0, self.camera.encode(batch, 0), cells)
        maps = {"bev_lidar": self.lidar_map(self.lidar(batch.lidar, count)["bev_neck"]), "bev_camera": seen}
        maps.update(self.fuser(maps))
        maps.update(self.trunk(maps["bev_fused"]))
        head = self.head(maps["bev_neck"])
        return Outputs(features=maps, head=head, grid=self.grid, depth_BVDHW=depth.unflatten(0, (count, -1)))
