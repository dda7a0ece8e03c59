"""Networks by name: functions that return a configuration's module. ``PRESETS`` lists them; no work at import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from imkd_data.errors import RecipeError
from imkd_data.geometry import BevGrid
from imkd_models.config import CRN_PARITY, FusionConfig, LabelConfig, LidarConfig, ModelConfig, StudentConfig
from imkd_models.detector import Detector, FusionDetector, LidarDetector, StudentDetector
from imkd_models.label import LabelEncoder
from imkd_models.presets_crkd import crkd_r50_config, crkd_swin_t_config, crkd_teacher_config

__all__ = [
    "CONFIGS",
    "CRN_PARITY",
    "PRESETS",
    "FusionConfig",
    "LabelConfig",
    "LidarConfig",
    "ModelConfig",
    "StudentConfig",
    "build_model",
    "config_from_dict",
    "label_config_for",
    "model_from_dict",
    "preset_config",
]

CONFIGS: dict[str, type[ModelConfig]] = {c.kind: c for c in (StudentConfig, LidarConfig, LabelConfig, FusionConfig)}


def config_from_dict(value: Mapping[str, Any]) -> ModelConfig:
    """Configuration from its JSON form ({"kind": "student" | "lidar" | "label" | "fusion", ...})."""
    kind = value.get("kind")
    if kind not in CONFIGS:
        raise RecipeError("unknown kind of model", expected=", ".join(CONFIGS), found=str(kind))
    return CONFIGS[kind].from_dict(value)


def build_model(config: ModelConfig, *, pretrained: bool = True, teacher: Detector | None = None) -> Detector | LabelEncoder:
    """The module of a configuration. pretrained=False never looks for published image weights (a checkpoint follows).
    teacher: LiDAR teacher of a label encoder."""
    if isinstance(config, StudentConfig):
        return StudentDetector(config, pretrained=pretrained)
    if isinstance(config, LidarConfig):
        return LidarDetector(config)
    if isinstance(config, FusionConfig):
        return FusionDetector(config, pretrained=pretrained)
    if isinstance(config, LabelConfig):
        return LabelEncoder(config, teacher)
    raise RecipeError("unknown kind of model", found=type(config).__name__)


def model_from_dict(value: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """The module of a configuration's JSON form, without published image weights."""
    return build_model(config_from_dict(value), pretrained=pretrained)


def label_config_for(teacher: Detector, *, name: str = "label", hidden: int = 256, **changes: Any) -> LabelConfig:
    """Label encoder with one branch for each stage that this teacher's neck reads."""
    stages = tuple((key, *shape) for key, shape in teacher.feature_shapes.items() if key.startswith("bev_stage"))
    return LabelConfig(name=name, grid=teacher.grid, groups=teacher.config.groups, stages=stages, hidden=hidden, **changes)


# Students -----------------------------------------------------------------------------------------------------------


def crn_r50_config(**changes: Any) -> StudentConfig:
    """CRN, ResNet-50, 256x704, four keyframes: 61,435,037 parameters."""
    return StudentConfig(name="crn_r50").with_values(**changes)


def crn_r18_config(**changes: Any) -> StudentConfig:
    """CRN, ResNet-18, with the narrower necks, radar encoder and trunk of its public configuration (37.2 M)."""
    base = StudentConfig(
        name="crn_r18",
        backbone="resnet18",
        fpn_channels=64,
        radar_layers=(2, 3, 3),
        radar_neck_channels=64,
        radar_head_channels=96,
        trunk_base=128,
    )
    return base.with_values(**changes)


def crn_r101_config(**changes: Any) -> StudentConfig:
    """CRN, ResNet-101, 512x1408."""
    return StudentConfig(name="crn_r101", backbone="resnet101", image_hw_px=(512, 1408)).with_values(**changes)


def convnext_b_config(**changes: Any) -> StudentConfig:
    """CRN with ConvNeXt-B."""
    return StudentConfig(name="convnext_b", backbone="convnext_base").with_values(**changes)


def swin_t_config(**changes: Any) -> StudentConfig:
    """CRN with Swin-T."""
    return StudentConfig(name="swin_t", backbone="swin_tiny").with_values(**changes)


def bevdepth_r50_config(**changes: Any) -> StudentConfig:
    """BEVDepth, ResNet-50, 256x704, four keyframes, camera only: 77.6 M parameters."""
    base = StudentConfig(
        name="bevdepth_r50",
        radar=False,
        depth_net="camera_aware",
        view="frustum",
        depth_step_m=0.5,
        depth_bins=112,
        depth_channels=512,
        fuser="none",
        fused_channels=80,
        time_fusion="concat",
    )
    return base.with_values(**changes)


_TINY_STUDENT: dict[str, Any] = {
    "name": "tiny",
    "history": (0,),
    "image_hw_px": (128, 352),
    "backbone": "resnet_tiny",
    "fpn_channels": 24,
    "depth_step_m": 1.0,
    "depth_bins": 56,
    "depth_channels": 48,
    "depth_blocks": 1,
    "camera_channels": 32,
    "view_convs": 1,
    "radar_channels": 32,
    "pillar_channels": 16,
    "radar_widths": (16, 24, 32),
    "radar_layers": (0, 1, 1),
    "radar_neck_channels": 16,
    "radar_head_channels": 32,
    "norm_momentum": 0.1,
    "fuser": "concat",
    "fused_channels": 48,
    "fuser_layers": 1,
    "fuser_heads": 2,
    "fuser_points": 2,
    "fuser_hidden": 64,
    "fuser_dropout": 0.0,
    "sim_attention": "conv",
    "trunk_base": 32,
    "trunk_blocks": (1, 1, 1),
    "neck_channels": 16,
    "head_shared": 48,
    "head_branch": 0,
    "head_float32": False,
    "velocity_weight": 0.2,
}


def tiny_config(**changes: Any) -> StudentConfig:
    """Camera-radar student for CPUs: six 128x352 images, one keyframe, 128x128 cells of 0.8 m."""
    return StudentConfig(**{**_TINY_STUDENT, **changes})


# Teachers -----------------------------------------------------------------------------------------------------------


def centerpoint_pillar_config(**changes: Any) -> LidarConfig:
    """CenterPoint with 0.2 m pillars, as the public checkpoint: three-stage neck of 384 channels."""
    return LidarConfig(name="centerpoint_pillar").with_values(**changes)


def pillar_r34_config(**changes: Any) -> LidarConfig:
    """Dense 0.1 m pillars (1024x1024) with ResNet-34-like stages and gradient checkpointing: the stronger teacher."""
    base = LidarConfig(
        name="pillar_r34",
        encoder="resnet34",
        pillars_per_cell=8,
        pillar_channels=32,
        layers=(3, 6, 6),
        checkpoint_stages=True,
    )
    return base.with_values(**changes)


def voxel_config(**changes: Any) -> LidarConfig:
    """CenterPoint with 0.1 m voxels; needs spconv."""
    return LidarConfig(name="voxel", encoder="voxel", pillars_per_cell=8, neck_stages=2, neck_channels=256).with_values(
        **changes
    )


def tiny_lidar_config(**changes: Any) -> LidarConfig:
    """LiDAR teacher for CPUs: 0.4 m pillars, two-stage neck."""
    values: dict[str, Any] = {
        "name": "tiny_lidar",
        "pillars_per_cell": 2,
        "pillar_channels": 16,
        "scaled_inputs": True,
        "norm_momentum": 0.1,
        "widths": (16, 32, 64),
        "layers": (0, 2, 2),
        "neck_stages": 2,
        "neck_channels": 32,
        "head_shared": 48,
        "head_branch": 0,
    }
    return LidarConfig(**{**values, **changes})


def label_config(**changes: Any) -> LabelConfig:
    """Label encoder of ``centerpoint_pillar``."""
    grid: BevGrid = changes.get("grid", StudentConfig(name="").grid)
    ny, nx = grid.shape
    stages = (("bev_stage0", 64, 2 * ny, 2 * nx), ("bev_stage1", 128, ny, nx), ("bev_stage2", 256, ny // 2, nx // 2))
    return LabelConfig(**{"name": "label", "stages": stages, **changes})


def tiny_label_config(**changes: Any) -> LabelConfig:
    """Label encoder of ``tiny_lidar``."""
    grid: BevGrid = changes.get("grid", StudentConfig(name="").grid)
    ny, nx = grid.shape
    stages = (("bev_stage1", 32, ny, nx), ("bev_stage2", 64, ny // 2, nx // 2))
    return LabelConfig(**{"name": "tiny_label", "stages": stages, "hidden": 32, **changes})


def fusion_config(**changes: Any) -> FusionConfig:
    """LiDAR-camera teacher with the pillar LiDAR encoder and a ResNet-50 camera branch with LiDAR depth input."""
    camera = crn_r50_config(history=(0,), radar=False, fuser="gated", depth_input=True)
    return FusionConfig(**{"name": "fusion", "lidar": centerpoint_pillar_config(), "student": camera, **changes})


def tiny_fusion_config(**changes: Any) -> FusionConfig:
    """LiDAR-camera teacher for CPUs."""
    values: dict[str, Any] = {
        "name": "tiny_fusion",
        "lidar": tiny_lidar_config(),
        "student": tiny_config(radar=False, depth_input=True),
        "lidar_channels": 48,
        "fused_channels": 48,
    }
    return FusionConfig(**{**values, **changes})


_FUNCTIONS: tuple[Callable[..., ModelConfig], ...] = (
    crn_r18_config,
    crn_r50_config,
    crn_r101_config,
    convnext_b_config,
    swin_t_config,
    bevdepth_r50_config,
    crkd_r50_config,
    crkd_swin_t_config,
    crkd_teacher_config,
    tiny_config,
    centerpoint_pillar_config,
    pillar_r34_config,
    voxel_config,
    tiny_lidar_config,
    label_config,
    tiny_label_config,
    fusion_config,
    tiny_fusion_config,
)
PRESETS: dict[str, Callable[..., ModelConfig]] = {f.__name__.removesuffix("_config"): f for f in _FUNCTIONS}


def preset_config(name: str, **changes: Any) -> ModelConfig:
    """Configuration of a preset; changes override single values, unknown ones are errors."""
    if name not in PRESETS:
        raise RecipeError("unknown model preset", expected=", ".join(PRESETS), found=name)
    return PRESETS[name]().with_values(**changes)


def crn_r18(**changes: Any) -> StudentDetector:
    """Module of ``crn_r18_config``."""
    return StudentDetector(crn_r18_config(**changes))


def crn_r50(**changes: Any) -> StudentDetector:
    """Module of ``crn_r50_config``."""
    return StudentDetector(crn_r50_config(**changes))


def crn_r101(**changes: Any) -> StudentDetector:
    """Module of ``crn_r101_config``."""
    return StudentDetector(crn_r101_config(**changes))


def convnext_b(**changes: Any) -> StudentDetector:
    """Module of ``convnext_b_config``."""
    return StudentDetector(convnext_b_config(**changes))


def swin_t(**changes: Any) -> StudentDetector:
    """Module of ``swin_t_config``."""
    return StudentDetector(swin_t_config(**changes))


def bevdepth_r50(**changes: Any) -> StudentDetector:
    """Module of ``bevdepth_r50_config``."""
    return StudentDetector(bevdepth_r50_config(**changes))


def crkd_r50(**changes: Any) -> StudentDetector:
    """Module of ``crkd_r50_config``."""
    return StudentDetector(crkd_r50_config(**changes))


def crkd_swin_t(**changes: Any) -> StudentDetector:
    """Module of ``crkd_swin_t_config``."""
    return StudentDetector(crkd_swin_t_config(**changes))


def crkd_teacher(**changes: Any) -> FusionDetector:
    """Module of ``crkd_teacher_config``; raises UsageError where spconv is not installed."""
    return FusionDetector(crkd_teacher_config(**changes))


def tiny(**changes: Any) -> StudentDetector:
    """Module of ``tiny_config``."""
    return StudentDetector(tiny_config(**changes))


def centerpoint_pillar(**changes: Any) -> LidarDetector:
    """Module of ``centerpoint_pillar_config``."""
    return LidarDetector(centerpoint_pillar_config(**changes))


def pillar_r34(**changes: Any) -> LidarDetector:
    """Module of ``pillar_r34_config``."""
    return LidarDetector(pillar_r34_config(**changes))


def voxel(**changes: Any) -> LidarDetector:
    """Module of ``voxel_config``; raises UsageError where spconv is not installed."""
    return LidarDetector(voxel_config(**changes))


def tiny_lidar(**changes: Any) -> LidarDetector:
    """Module of ``tiny_lidar_config``."""
    return LidarDetector(tiny_lidar_config(**changes))


def tiny_label(teacher: Detector | None = None, **changes: Any) -> LabelEncoder:
    """Module of ``tiny_label_config``, or of the encoder that fits ``teacher``."""
    config = tiny_label_config(**changes) if teacher is None else label_config_for(teacher, name="tiny_label", hidden=32)
    return LabelEncoder(config, teacher)


def fusion(**changes: Any) -> FusionDetector:
    """Module of ``fusion_config``."""
    return FusionDetector(fusion_config(**changes))


def tiny_fusion(**changes: Any) -> FusionDetector:
    """Module of ``tiny_fusion_config``."""
    return FusionDetector(tiny_fusion_config(**changes))
