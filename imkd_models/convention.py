"""Imported LiDAR networks keep their own input convention: points are turned into it, the network runs unchanged, and its
feature and head maps are turned back into bev.

mmdetection3d's nuScenes networks live in LiDAR axes: x right, y forward, z from the sensor. The turn is exactly 90 degrees
(x_L = -y, y_L = x) and z is shifted by the mounting height, so cells map onto cells and nothing is resampled. ``lwh`` networks
(mmdetection3d 1.0 and later) give length, width, height and the yaw of the heading; ``wlh`` networks (before 1.0) give width,
length, height and -yaw - pi/2.

``bevfusion``: camera-radar and LiDAR-camera networks of BEVFusion's code base live in the same axes with rows along x_L and
columns along y_L, so their maps are bev maps upside down. Their inputs are mirrored in y and lowered by the mounting height;
boxes are ``wlh``.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from imkd_data.errors import MissingFeatureError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, PointBatch
from imkd_data.loader.request import LIDAR_FEATURES
from imkd_models.config import FusionConfig, LidarConfig, ModelConfig
from imkd_models.head import CentreHead
from imkd_models.outputs import HeadMaps

__all__ = [
    "CONVENTIONS",
    "TurnedHead",
    "lidar_features",
    "map_from_network",
    "map_to_network",
    "mirrored",
    "near_sensor",
    "network_grid",
    "points_to_network",
    "without_near",
]

CONVENTIONS = ("bev", "mmdet3d_lwh", "mmdet3d_wlh", "bevfusion")


def network_grid(grid: BevGrid) -> BevGrid:
    """The same cells in LiDAR axes."""
    return BevGrid(x_min_m=-grid.y_max_m, y_min_m=grid.x_min_m, cell_m=grid.cell_m, nx=grid.ny, ny=grid.nx)


def points_to_network(lidar: PointBatch, height_m: float) -> PointBatch:
    """Points in LiDAR axes, z measured from the sensor at ``height_m`` above the bev origin."""
    x, y, z = lidar.xyz_m.unbind(-1)
    return replace(lidar, xyz_m=torch.stack([-y, x, z - height_m], dim=-1))


def mirrored(batch: Batch, height_m: float) -> Batch:
    """The batch whose x and y are BEVFusion's y_L and x_L: cameras, radar and LiDAR mirrored in y, z from the LiDAR."""
    change = torch.eye(4, device=batch.bev_from_ego_B44.device)
    change[1, 1], change[2, 3] = -1.0, -height_m
    radar, poses = batch.radar, batch.bev_from_camera_BTV44
    if radar is not None:
        x, y, z = radar.xyz_m.unbind(-1)
        velocity = radar.velocity_mps
        if velocity is not None:
            velocity = torch.stack([velocity[:, 0], -velocity[:, 1]], dim=1)
        radar = replace(radar, xyz_m=torch.stack([x, -y, z - height_m], dim=1), velocity_mps=velocity)
    lidar = batch.lidar
    if lidar is not None:
        lidar = replace(lidar, xyz_m=lidar.xyz_m * change.diagonal()[:3] + change[:3, 3])
    moved = None if poses is None else change.to(poses.dtype) @ poses
    return replace(batch, radar=radar, lidar=lidar, bev_from_camera_BTV44=moved)


def lidar_features(config: ModelConfig) -> tuple[str, ...]:
    """Columns of the LiDAR batch that a network reads: the stream's own, and ``near_m`` where it leaves close points out."""
    lidar = config.lidar if isinstance(config, FusionConfig) else config
    near = isinstance(lidar, LidarConfig) and lidar.near_removed_m > 0
    return (*LIDAR_FEATURES, "near_m") if near else LIDAR_FEATURES


def near_sensor(lidar: PointBatch, config: LidarConfig) -> Tensor:
    """(N,) points of past sweeps within ``near_removed_m`` of the sensor in x and y, measured where the sensor stood then
    (column ``near_m``): the car's own returns leave a trail behind a moving car."""
    if not config.near_removed_m or not len(lidar.age_s):
        return torch.zeros_like(lidar.age_s, dtype=torch.bool)
    if "near_m" not in lidar.feature_names:
        raise MissingFeatureError(
            "this network leaves out close points of past sweeps, and the batch does not say which these are",
            expected="the LiDAR column near_m",
            found=", ".join(lidar.feature_names),
            next="give the stream lidar_features=('intensity', 'ring', 'near_m')",
        )
    return lidar.column("near_m") < config.near_removed_m


def without_near(lidar: PointBatch, config: LidarConfig) -> PointBatch:
    """The points without those of ``near_sensor``."""
    kept = (~near_sensor(lidar, config)).nonzero()[:, 0]
    values = {f.name: getattr(lidar, f.name) for f in fields(lidar)}
    return replace(lidar, **{name: v[kept] for name, v in values.items() if isinstance(v, Tensor)})


def map_from_network(x: Tensor) -> Tensor:
    """(..., Y_L, X_L) map of the network -> (..., Y, X) in bev."""
    return x.transpose(-1, -2).flip(-2)


def map_to_network(x: Tensor) -> Tensor:
    """(..., Y, X) bev map -> (..., Y_L, X_L)."""
    return x.flip(-2).transpose(-1, -2)


def _unflipped(x: Tensor) -> Tensor:
    return x.flip(-2)


class TurnedHead(CentreHead):
    """A CentreHead whose convolutions run in LiDAR axes; takes and gives bev maps."""

    def __init__(self, in_channels: int, *, convention: str, height_m: float, **options) -> None:
        super().__init__(in_channels, **options)
        self.convention, self.height_m = convention, height_m

    def maps(self, neck: Tensor) -> tuple[HeadMaps, ...]:
        inner = neck.flip(-2) if self.convention == "bevfusion" else map_to_network(neck)
        return tuple(self._to_bev(maps) for maps in super().maps(inner))

    forward = maps

    def _to_bev(self, maps: HeadMaps) -> HeadMaps:
        back = _unflipped if self.convention == "bevfusion" else map_from_network
        dx, dy = back(maps.offset_cells_B2YX).split(1, dim=1)
        vx, vy = back(maps.velocity_mps_B2YX).split(1, dim=1)
        sin, cos = back(maps.yaw_sincos_B2YX).split(1, dim=1)
        size = back(maps.log_size_m_B3YX)
        if self.convention in ("mmdet3d_wlh", "bevfusion"):
            size = size[:, [1, 0, 2]]
            sin, cos = -cos, -sin  # the heading's own sine and cosine in LiDAR axes
        return HeadMaps(
            classes=maps.classes,
            heatmap_logits_BKYX=back(maps.heatmap_logits_BKYX),
            # x = y_L; y = -x_L, so the distance from the lower corner becomes that from the upper one.
            offset_cells_B2YX=torch.cat([dy, 1 - dx], dim=1),
            height_m_B1YX=back(maps.height_m_B1YX) + self.height_m,
            log_size_m_B3YX=size,
            yaw_sincos_B2YX=torch.cat([-cos, sin], dim=1),
            velocity_mps_B2YX=torch.cat([vy, -vx], dim=1),
        )
