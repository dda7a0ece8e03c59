"""What a network returns: named BEV feature maps and head maps. Logits stay logits; nothing is changed in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from imkd_data.geometry import BevGrid

__all__ = ["FEATURES", "HeadMaps", "Outputs"]

# The only legal feature names; a model may add none elsewhere. Shapes (B, C, Y, X), frame bev.
FEATURES: tuple[str, ...] = (
    "bev_camera",
    "bev_camera_gated",
    "bev_radar",
    "bev_lidar",
    "bev_sim",
    "bev_fused",
    "bev_stage0",
    "bev_stage1",
    "bev_stage2",
    "bev_neck",
    "bev_intensity_camera",  # logits (B, 1, Y, X) of IMKD stage 3, current keyframe
    "bev_intensity_radar",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMaps:
    """Maps of one class group (K classes) on the head grid."""

    classes: tuple[str, ...]
    heatmap_logits_BKYX: Tensor
    offset_cells_B2YX: Tensor  # centre x, y minus the cell's lower corner, in cells, 0..1
    height_m_B1YX: Tensor  # gravity centre z
    log_size_m_B3YX: Tensor  # log length, width, height
    yaw_sincos_B2YX: Tensor
    velocity_mps_B2YX: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """features: names from FEATURES. head: one HeadMaps per class group. depth_BVDHW: softmax probabilities over the
    depth bins at feature stride, current keyframe, or None. grid: grid of the head maps and of ``bev_fused``."""

    features: Mapping[str, Tensor]
    head: tuple[HeadMaps, ...]
    grid: BevGrid
    depth_BVDHW: Tensor | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.features) - set(FEATURES))
        if unknown:
            raise ValueError(f"feature names {unknown} are not in FEATURES")
