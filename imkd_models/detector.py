"""Detectors: a Batch in, Outputs out. Frame bev throughout; what the method distils is named in ``feature_shapes``.

``StudentDetector`` camera and radar (CRN and its variants), ``LidarDetector`` the LiDAR teacher, ``FusionDetector`` the
LiDAR-camera teacher. A sensor that the config does not name is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from imkd_data.errors import MismatchError, MissingFeatureError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch
from imkd_models.blocks import conv_norm_relu
from imkd_models.branches import CameraBranch, SimulatedBranch, build_trunk
from imkd_models.camera import depth_loss, frustum
from imkd_models.config import FusionConfig, LidarConfig, ModelConfig, StudentConfig
from imkd_models.convention import TurnedHead, mirrored, without_near
from imkd_models.fusion import ConcatFuser, GatedFuser, TimeReduction, build_fuser
from imkd_models.head import CentreHead, LossOptions, detection_loss
from imkd_models.lidar import LidarStages, voxel_map
from imkd_models.outputs import Outputs
from imkd_models.radar import BevRadarEncoder, CalibrationBlock, PerspectiveRadarEncoder
from imkd_models.radar_points import PointRadarEncoder

__all__ = ["Detector", "FusionDetector", "LidarDetector", "StudentDetector", "check_grid"]


def build_head(config: StudentConfig | LidarConfig, channels: int) -> CentreHead:
    """The centre head of a configuration; that of imported weights works in their own axes."""
    options = {
        "groups": config.groups,
        "shared_channels": config.head_shared,
        "branch_channels": config.head_branch,
        "float32": config.head_float32,
    }
    if config.convention == "bev":
        return CentreHead(channels, **options)
    return TurnedHead(channels, convention=config.convention, height_m=config.mount_m[2], **options)


def check_grid(grid: BevGrid, batch: Batch) -> None:
    """Refuse a batch on another grid: there is no silent resampling."""
    a, b = batch.grid, grid
    same = a.nx == b.nx and a.ny == b.ny and a.cell_m == b.cell_m and a.x_min_m == b.x_min_m and a.y_min_m == b.y_min_m
    if not same:  # number by number: torch.compile holds sizes as symbols once it has seen two grids
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


class StudentDetector(Detector):
    """Camera and radar (either may be off) -> BEV -> centre head. With every method switch off it is CRN.

    forward runs past keyframes without gradient. ``past``: their fused maps from an earlier call of ``fused_keyframe``
    (newest first, already in the current frame) replace them; that is the cached-past inference mode.
    """

    config: StudentConfig

    def __init__(self, config: StudentConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        if c.depth_net == "lidar_points":
            raise RecipeError("depth_net lidar_points reads LiDAR, which a student never does", next="depth_net=linear")
        if c.depth_input:
            raise RecipeError("depth_input reads LiDAR depth, which a student never does", next="depth_input=false")
        self.sensors = tuple(name for name, on in (("camera", c.camera), ("radar", c.radar)) if on)
        self.perspective = c.assisted
        if c.camera:
            self.camera = CameraBranch(c, radar_assisted=self.perspective, pretrained=pretrained)
        if c.radar:
            encoders = {"bev": BevRadarEncoder, "points": PointRadarEncoder}
            kind = PerspectiveRadarEncoder if self.perspective else encoders.get(c.radar_encoder, BevRadarEncoder)
            self.radar: nn.Module = kind(c)
        self.calibration = CalibrationBlock(c.radar_channels, c.calibration_init) if c.radar and c.calibration else None
        self.sim = SimulatedBranch(c, self.camera.image.neck.out_channels) if c.sim_branch else None
        self.fuser = build_fuser(c)
        mixed = len(c.history) > 1 and c.time_fusion == "mix"
        self.time = TimeReduction(c.fused_channels, len(c.history)) if mixed else None
        self.trunk = build_trunk(c)
        self.head = build_head(c, self.trunk.neck.out_channels)
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
        turned = self.config.convention != "bev"
        maps, depth = self.fused_keyframe(mirrored(batch, self.config.mount_m[2]) if turned else batch, 0)
        if len(self.config.history) > 1:
            if past is None:
                with torch.no_grad():
                    past = [self.fused_keyframe(batch, slot)[0]["bev_fused"] for slot in range(1, len(self.config.history))]
            keyframes = [maps["bev_fused"], *past]
            maps["bev_fused"] = torch.cat(keyframes, dim=1) if self.time is None else self.time(keyframes)
        maps.update(self.trunk(maps["bev_fused"]))
        if turned:
            maps = {name: x.flip(-2) for name, x in maps.items()}
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
        self.head = build_head(c, self.lidar.neck.out_channels)

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
        self.lidar: nn.Module = LidarStages(c.lidar) if c.lidar_neck else voxel_map(c.lidar)
        self.lidar_map = conv_norm_relu(self.lidar.neck.out_channels, c.lidar_channels) if c.lidar_neck else None
        self.camera = CameraBranch(camera, radar_assisted=False, pretrained=pretrained)
        fuser = GatedFuser if c.fuser == "gated" else ConcatFuser
        self.fuser = fuser(("bev_camera", "bev_lidar"), (camera.camera_channels, c.lidar_channels), c.fused_channels)
        trunk = camera.with_values(fused_channels=c.fused_channels)
        self.trunk = build_trunk(trunk)
        self.head = build_head(camera.with_values(groups=c.groups), self.trunk.neck.out_channels)
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
        if self.config.lidar.near_removed_m:  # before the depth image is made: in the public code the loader does it
            batch = replace(batch, lidar=without_near(batch.lidar, self.config.lidar))
        turned = camera.convention != "bev"
        if turned:
            batch = mirrored(batch, camera.mount_m[2])
        cells = frustum(batch.image_from_camera_BTV33[:, 0], batch.bev_from_camera_BTV44[:, 0], batch.bev_from_ego_B44, camera)
        seen, depth = self.camera.pooled(batch, 0, self.camera.encode(batch, 0), cells)
        lidar = self.lidar(batch.lidar, count)
        maps = {"bev_lidar": lidar if self.lidar_map is None else self.lidar_map(lidar["bev_neck"]), "bev_camera": seen}
        maps.update(self.fuser(maps))
        maps.update(self.trunk(maps["bev_fused"]))
        if turned:
            maps = {name: x.flip(-2) for name, x in maps.items()}
        head = self.head(maps["bev_neck"])
        return Outputs(features=maps, head=head, grid=self.grid, depth_BVDHW=depth.unflatten(0, (count, -1)))
