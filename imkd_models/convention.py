"""Imported LiDAR networks keep their own input convention: points are turned into it, the network runs unchanged, and its
feature and head maps are turned back into bev.

mmdetection3d's nuScenes networks live in LiDAR axes: x right, y forward, z from the sensor. The turn is exactly 90 degrees
(x_L = -y, y_L = x) and z is shifted by the mounting height, so cells map onto cells and nothing is resampled. ``lwh`` networks
(mmdetection3d 1.0 and later) give length, width, height and the yaw of the heading; ``wlh`` networks (before 1.0) give width,
length, height and -yaw - pi/2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import PointBatch
from imkd_models.config import LidarConfig
from imkd_models.head import CentreHead
from imkd_models.outputs import HeadMaps

__all__ = [
    "CONVENTIONS",
    "TurnedHead",
    "map_from_network",
    "map_to_network",
    "near_sensor",
    "network_grid",
    "points_to_network",
]

CONVENTIONS = ("bev", "mmdet3d_lwh", "mmdet3d_wlh")


def network_grid(grid: BevGrid) -> BevGrid:
    """The same cells in LiDAR axes."""
    return BevGrid(x_min_m=-grid.y_max_m, y_min_m=grid.x_min_m, cell_m=grid.cell_m, nx=grid.ny, ny=grid.nx)


def points_to_network(lidar: PointBatch, height_m: float) -> PointBatch:
    """Points in LiDAR axes, z measured from the sensor at ``height_m`` above the bev origin."""
    x, y, z = lidar.xyz_m.unbind(-1)
    return replace(lidar, xyz_m=torch.stack([-y, x, z - height_m], dim=-1))


def near_sensor(lidar: PointBatch, config: LidarConfig) -> Tensor:
    """(N,) points of past sweeps within ``near_removed_m`` of the sensor in x and y; points are in the network's axes."""
    if not config.near_removed_m:
        return torch.zeros_like(lidar.age_s, dtype=torch.bool)
    x, y, _ = config.mount_m
    sensor = lidar.xyz_m.new_tensor([x, y] if config.convention == "bev" else [-y, x])
    return (lidar.age_s > 0) & ((lidar.xyz_m[:, :2] - sensor).abs() < config.near_removed_m).all(-1)


def map_from_network(x: Tensor) -> Tensor:
    """(..., Y_L, X_L) map of the network -> (..., Y, X) in bev."""
    return x.transpose(-1, -2).flip(-2)


def map_to_network(x: Tensor) -> Tensor:
    """(..., Y, X) bev map -> (..., Y_L, X_L)."""
    return x.flip(-2).transpose(-1, -2)


class TurnedHead(CentreHead):
    """A CentreHead whose convolutions run in LiDAR axes; takes and gives bev maps."""

    def __init__(self, in_channels: int, *, convention: str, height_m: float, **options) -> None:
        super().__init__(in_channels, **options)
        self.convention, self.height_m = convention, height_m

    def maps(self, neck: Tensor) -> tuple[HeadMaps, ...]:
        return tuple(self._to_bev(maps) for maps in super().maps(map_to_network(neck)))

    forward = maps

    def _to_bev(self, maps: HeadMaps) -> HeadMaps:
        dx, dy = map_from_network(maps.offset_cells_B2YX).split(1, dim=1)
        vx, vy = map_from_network(maps.velocity_mps_B2YX).split(1, dim=1)
        sin, cos = map_from_network(maps.yaw_sincos_B2YX).split(1, dim=1)
        size = map_from_network(maps.log_size_m_B3YX)
        if self.convention == "mmdet3d_wlh":
            size = size[:, [1, 0, 2]]
            sin, cos = -cos, -sin  # the heading's own sine and cosine in LiDAR axes
        return HeadMaps(
            classes=maps.classes,
            heatmap_logits_BKYX=map_from_network(maps.heatmap_logits_BKYX),
            # x = y_L; y = -x_L, so the distance from the lower corner becomes that from the upper one.
            offset_cells_B2YX=torch.cat([dy, 1 - dx], dim=1),
            height_m_B1YX=map_from_network(maps.height_m_B1YX) + self.height_m,
            log_size_m_B3YX=size,
            yaw_sincos_B2YX=torch.cat([-cos, sin], dim=1),
            velocity_mps_B2YX=torch.cat([vy, -vx], dim=1),
        )
