"""CRKD's own networks (crkd: section 2): the shapes of its public weights. ``presets.py`` lists them with the others."""

from __future__ import annotations

from typing import Any

from imkd_data.geometry import BevGrid
from imkd_models.config import FusionConfig, LidarConfig, StudentConfig

__all__ = ["crkd_r50_config", "crkd_swin_t_config", "crkd_teacher_config"]

CRKD_GRID = BevGrid(x_min_m=-54.0, y_min_m=-54.0, cell_m=0.6, nx=180, ny=180)


def crkd_r50_config(**changes: Any) -> StudentConfig:
    """CRKD's camera-radar student, ResNet-50, 256x704, one keyframe, 180x180 cells of 0.6 m."""
    base = StudentConfig(
        name="crkd_r50",
        grid=CRKD_GRID,
        history=(0,),
        stride_px=8,
        depth_min_m=1.0,
        depth_step_m=1.0,
        depth_bins=59,
        depth_net="linear",
        view="frustum",
        z_range_m=(-10.0, 10.0),
        radar_encoder="points",
        radar_states=True,
        radar_channels=256,
        calibration=True,
        fuser="gated",
        fused_channels=256,
        trunk="bevfusion",
        trunk_base=128,
        head_float32=False,
        depth_weight=0.0,
    )
    return base.with_values(**changes)


def crkd_swin_t_config(**changes: Any) -> StudentConfig:
    """CRKD's camera-radar student with Swin-T."""
    return crkd_r50_config(
        **{"name": "crkd_swin_t", "backbone": "swin_tiny", "image_neck": "topdown", "fpn_channels": 512, **changes}
    )


def crkd_teacher_config(**changes: Any) -> FusionConfig:
    """CRKD's LiDAR-camera teacher, ResNet-50 or (backbone, image_neck, fpn_channels given) Swin-T, in BEVFusion's convention:
    0.075 m sparse voxels, LiDAR-aided lift pooled on 0.3 m cells. Needs spconv. changes: of the camera side, and ``grid``."""
    grid = changes.pop("grid", CRKD_GRID)
    camera: dict[str, Any] = {
        "name": "crkd_teacher",
        "grid": grid,
        "radar": False,
        "fpn_channels": 64,
        "depth_step_m": 0.5,
        "depth_bins": 118,
        "depth_net": "lidar_points",
        "view_refine": 2,
        "calibration": False,
        "convention": "bevfusion",
        "parity": frozenset({"cell_index:trunc", "frustum:linspace_edges"}),
    }
    student = crkd_r50_config(**{**camera, **changes})
    x, y, _ = student.mount_m
    lidar = LidarConfig(
        name="crkd_teacher",
        grid=grid,
        encoder="voxel",
        pillars_per_cell=8,
        points_per_pillar=10,
        intensity_scale=255.0,
        near_removed_m=1.0,
        mount_m=(x, -y, 0.0),  # in the axes of the mirrored points
    )
    return FusionConfig(
        name="crkd_teacher",
        grid=grid,
        lidar=lidar,
        student=student,
        lidar_neck=False,
        fused_channels=student.fused_channels,
    )
