"""The batch: everything in frame ``bev`` (ego after augmentation); models never see ego, global or an augmentation flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imkd_data.geometry import BevGrid

__all__ = ["Batch", "BoxBatch", "PointBatch"]


def _to(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, Mapping):
        return {k: _to(v, device, non_blocking) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, BevGrid):
        changes = {f.name: _to(getattr(value, f.name), device, non_blocking) for f in fields(value)}
        return replace(value, **changes)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class PointBatch:
    """Points of all samples in one list, frame ``bev``.

    xyz_m (N, 3) f32; features_NF (N, F) f32, columns feature_names; batch_index (N,) i64 in 0..B-1; time_index (N,) i64
    history slot (0 = current keyframe; always 0 for LiDAR); age_s (N,) f32 >= 0 for the past (key time of its history
    slot minus scan time); velocity_mps (N, 2) f32 compensated, in bev axes, or None.
    LiDAR features: intensity (reflectance / suite maximum, 0..1), ring; where the stream was asked for it near_m: max(|x|, |y|)
    of a past sweep's point in its own sensor's frame, infinite for points that nobody removes (key scan, pasted objects).
    Radar features: rcs_dbsm and the raw state columns that the stream was asked for.
    """

    xyz_m: Tensor
    features_NF: Tensor
    feature_names: tuple[str, ...]
    batch_index: Tensor
    time_index: Tensor
    age_s: Tensor
    velocity_mps: Tensor | None = None

    def column(self, name: str) -> Tensor:
        """One feature column (N,)."""
        return self.features_NF[:, self.feature_names.index(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxBatch:
    """Truth boxes padded to M, frame ``bev``; ``valid_BM`` is false on padding, ignored categories and boxes without a
    LiDAR or radar point. velocity NaN = unknown. ``label_BM`` indexes the detection classes."""

    centre_m_BM3: Tensor
    size_lwh_m_BM3: Tensor
    yaw_rad_BM: Tensor
    velocity_mps_BM2: Tensor
    label_BM: Tensor
    valid_BM: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples, T history keyframes (index 0 = current, then older), V cameras.

    images_BTVCHW: f32, ImageNet-normalised RGB. image_from_camera_BTV33: after resize, crop, flip. bev_from_camera_BTV44:
    past cameras composed through global into the *current* bev. bev_from_ego_B44: the BEV augmentation (identity in
    evaluation). bev_maps: {"lidar_intensity": (B, 4, Y, X) f32 = mean/255, max/255, count, z in metres on ``grid``, moved
    by the augmentation, ...; "intensity_planes": (B, 4, Yf, Xf) sum, count, max, z of the fine planes when asked for}.
    image_maps: {"depth_BVHW": metres at current keyframe, 0 = none}. history_valid_BT: false where the slot repeats
    a newer keyframe because the clip starts there. padding_B: rows added only to equalise ranks.
    """

    tokens: tuple[str, ...]
    timestamp_us_B: Tensor
    global_from_ego_B44: Tensor
    bev_from_ego_B44: Tensor
    grid: BevGrid
    images_BTVCHW: Tensor | None = None
    image_from_camera_BTV33: Tensor | None = None
    bev_from_camera_BTV44: Tensor | None = None
    history_valid_BT: Tensor | None = None
    lidar: PointBatch | None = None
    radar: PointBatch | None = None
    bev_maps: Mapping[str, Tensor] = field(default_factory=dict)
    image_maps: Mapping[str, Tensor] = field(default_factory=dict)
    boxes: BoxBatch | None = None
    padding_B: Tensor | None = None
    position_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return _to(self, device, non_blocking)  # type: ignore[no-any-return]
