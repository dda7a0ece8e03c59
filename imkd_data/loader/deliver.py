"""Packed tensors -> Batch, on the device: normalised images, depth maps, the moved intensity map.

Images and depth maps take one compiled pass on a CPU and torch operations on a GPU; the rest is the same torch code on
both. Cells follow the one rule of ``BevGrid``: floor to millimetres in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch, PointBatch
from imkd_data.loader.read import Packed
from imkd_data.loader.request import PARTS, PLANES, StreamRequest

__all__ = ["Delivery", "depth_maps", "move_planes", "normalised", "pool_planes"]

MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, 0..255
STD = (58.395, 57.12, 57.375)


def normalised(images_BTVCHW: Tensor) -> Tensor:
    """u8 RGB (..., 3, H, W) -> f32 of the same shape, ImageNet mean and deviation."""
    out = images_BTVCHW.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    scale, shift = (torch.tensor(v, device=out.device)[:, None, None] for v in _scale_and_shift())
    return torch.addcmul(shift, out, scale, out=out)


def _scale_and_shift() -> tuple[list[float], list[float]]:
    return [1 / s for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]


def _normalised_here(images_BTVCHW: Tensor) -> Tensor:
    """``normalised`` on a CPU, in one pass. NumPy allocates, because it asks for large pages: first touches of ordinary
    ones take longer than the arithmetic."""
    from imkd_data.kernels.dense import scaled_planes

    planes = images_BTVCHW.reshape(-1, images_BTVCHW.shape[-2] * images_BTVCHW.shape[-1]).numpy()
    scale, shift = (np.array(v, dtype=np.float32) for v in _scale_and_shift())
    out = np.empty(planes.shape, dtype=np.float32)
    scaled_planes(planes, scale, shift, out)
    return torch.from_numpy(out).view(images_BTVCHW.shape)


def depth_maps(
    uvd: Tensor, batch: Tensor, view: Tensor, *, shape_BVHW: tuple[int, int, int, int], last_wins: bool = False
) -> Tensor:
    """Points (N, 3) u, v, depth -> (B, V, H, W) metres, 0 = none; the pixel whose centre is nearest, the nearest point wins.
    last_wins: the last point of a pixel instead (CRN's released loader)."""
    num_batch, num_views, height, width = shape_BVHW
    if uvd.device.type == "cpu" and not last_wins:
        from imkd_data.kernels.dense import nearest_depth

        host = np.zeros(shape_BVHW, dtype=np.float32)
        nearest_depth(uvd.numpy(), batch.numpy(), view.numpy(), host)
        return torch.from_numpy(host)
    column, row = (uvd[:, 0].double() + 0.5).floor().long(), (uvd[:, 1].double() + 0.5).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    flat = (((batch * num_views + view) * height + row) * width + column)[inside]
    depth, pixels = uvd[:, 2][inside].float(), num_batch * num_views * height * width
    if last_wins:
        last = torch.full((pixels,), -1, device=uvd.device)
        last.scatter_reduce_(0, flat, torch.arange(len(flat), device=uvd.device), "amax")
        return torch.cat([depth, depth.new_zeros(1)])[last].view(shape_BVHW)
    out = torch.full((pixels,), torch.inf, device=uvd.device)
    out.scatter_reduce_(0, flat, depth, "amin")
    return out.nan_to_num_(posinf=0.0).view(shape_BVHW)


def move_planes(
    planes: Mapping[str, Tensor], bev_from_ego_B44: Tensor, *, source: BevGrid, target: BevGrid
) -> dict[str, Tensor]:
    """Integer planes (B, Y, X) on ``source`` in ego -> on ``target`` (same cell size) in bev, nearest-neighbour lookup.

    Exact for the identity and, on symmetric grids, for flips; else within half a cell. Outside the source: 0.
    """
    device = next(iter(planes.values())).device
    centres = target.centres()
    x = torch.from_numpy(centres[0, :, 0].copy()).to(device)[None, None, :]
    y = torch.from_numpy(centres[:, 0, 1].copy()).to(device)[None, :, None]
    m = torch.linalg.inv(bev_from_ego_B44.double())[:, :, :, None, None]  # ego_from_bev
    mm_x = ((m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 3]) * 1000).floor_()
    mm_y = ((m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 3]) * 1000).floor_()
    column = ((mm_x - source.x_min_mm) / source.cell_mm).floor_().long()
    row = ((mm_y - source.y_min_mm) / source.cell_mm).floor_().long()
    inside = (row >= 0) & (row < source.ny) & (column >= 0) & (column < source.nx)
    flat = torch.where(inside, row * source.nx + column, 0).flatten(1)
    return {
        name: torch.where(inside, plane.reshape(len(plane), -1).gather(1, flat).view_as(inside), 0)
        for name, plane in planes.items()
    }


def pool_planes(planes: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """k x k cells to one: sum and count add, the strongest return wins, then the higher one."""
    if k == 1:
        return dict(planes)
    out = {name: _blocks(planes[name].int(), k).sum(-1, dtype=torch.int32) for name in PLANES[:2]}
    strongest = planes["lidar_bev_max"].int() * 256 + planes["lidar_bev_z_of_max"].int()
    strongest = _blocks(torch.where(planes["lidar_bev_count"] > 0, strongest, -1), k).amax(-1)
    out["lidar_bev_max"] = torch.where(strongest >= 0, strongest >> 8, 0)
    out["lidar_bev_z_of_max"] = torch.where(strongest >= 0, strongest & 255, 0)
    return out


def _blocks(plane: Tensor, k: int) -> Tensor:
    b, ny, nx = plane.shape
    return plane.view(b, ny // k, k, nx // k, k).permute(0, 1, 3, 2, 4).reshape(b, ny // k, nx // k, k * k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What turning packed tensors into a Batch needs to know about the cache. z_of_code: metres of the 256 height codes."""

    request: StreamRequest
    plane_grid: BevGrid
    view_grid: BevGrid
    z_of_code: tuple[float, ...]

    def get_ready(self, device: torch.device | str = "cpu") -> None:
        """Load what the first batch needs, meant for while workers start: half a second for numba's compiled loops."""
        if torch.device(device).type == "cpu":
            nothing = torch.zeros(0, dtype=torch.int64)
            _normalised_here(torch.zeros((1, 3, 1, 1), dtype=torch.uint8))
            depth_maps(torch.zeros((0, 3)), nothing, nothing, shape_BVHW=(1, 1, 1, 1))

    def batch(self, packed: Packed, device: torch.device | str = "cpu") -> Batch:
        """The batch on ``device``."""
        t = {k: v.to(device, non_blocking=True) for k, v in packed.tensors.items()}
        size = len(packed.tokens)
        depth, images = None, None
        if "images" in t:
            images = _normalised_here(t["images"]) if t["images"].device.type == "cpu" else normalised(t["images"])
        if "depth.uvd" in t:
            views = int(packed.tensors["depth_views"][0])
            shape = (size, views, *self.request.image_hw_px)
            last_wins = "depth_collision:last" in self.request.parity
            depth = depth_maps(t["depth.uvd"], t["depth.batch"], t["depth.view"], shape_BVHW=shape, last_wins=last_wins)
        return Batch(
            tokens=packed.tokens,
            timestamp_us_B=t["timestamp_us"],
            global_from_ego_B44=t["global_from_ego"],
            bev_from_ego_B44=t["bev_from_ego"].float(),
            grid=self.request.grid,
            images_BTVCHW=images,
            image_from_camera_BTV33=t.get("image_from_camera"),
            bev_from_camera_BTV44=t.get("bev_from_camera"),
            history_valid_BT=t["history_valid"],
            lidar=_points(t, "lidar", self.request.lidar_features),
            radar=_points(t, "radar", self.request.radar_features),
            bev_maps=self._bev_maps(t),
            image_maps={} if depth is None else {"depth_BVHW": depth},
            boxes=_boxes(t),
            padding_B=t.get("padding"),
            position_B=t["position"],
        )

    def _bev_maps(self, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        request = self.request
        out = {n: t[n] for n in request.parts if n not in PARTS}
        if "lidar_intensity" in t:
            out["lidar_intensity"] = self._moved_view(t["lidar_intensity"], t["bev_from_ego"])
        if PLANES[0] not in t:
            return out
        k = request.grid.cell_mm // self.plane_grid.cell_mm
        g = request.grid
        fine = BevGrid(x_min_m=g.x_min_m, y_min_m=g.y_min_m, cell_m=self.plane_grid.cell_m, nx=g.nx * k, ny=g.ny * k)
        planes = {n: t[n] for n in PLANES}
        if request.augment.enabled or fine != self.plane_grid:
            planes = move_planes(planes, t["bev_from_ego"], source=self.plane_grid, target=fine)
        if "intensity_planes" in request.parts:
            z = self._height(planes, t["bev_from_ego"])
            stacked = [planes[n].float() for n in PLANES[:3]]
            out["intensity_planes"] = torch.stack([*stacked, z], dim=1)
        if "lidar_intensity" in request.parts:
            pooled = pool_planes(planes, k)
            count = pooled["lidar_bev_count"].float()
            mean = pooled["lidar_bev_sum"].float() / (255 * count.clamp(min=1))
            peak = pooled["lidar_bev_max"].float() / 255
            out["lidar_intensity"] = torch.stack([mean, peak, count, self._height(pooled, t["bev_from_ego"])], dim=1)
        return out

    def _height(self, planes: Mapping[str, Tensor], bev_from_ego_B44: Tensor) -> Tensor:
        """Height of the strongest return in bev (the BEV draw scales z too), 0 where the cell is empty."""
        code = planes["lidar_bev_z_of_max"].long()
        z = torch.tensor(self.z_of_code, device=code.device)[code] * bev_from_ego_B44[:, 2, 2].float()[:, None, None]
        return torch.where(planes["lidar_bev_count"] > 0, z, 0)

    def _moved_view(self, view_B4YX: Tensor, bev_from_ego_B44: Tensor) -> Tensor:
        if not self.request.augment.enabled:
            return view_B4YX
        channels = {str(c): view_B4YX[:, c] for c in range(4)}
        moved = move_planes(channels, bev_from_ego_B44, source=self.view_grid, target=self.request.grid)
        out = torch.stack([moved[str(c)] for c in range(4)], dim=1)
        out[:, 3] = out[:, 3] * bev_from_ego_B44[:, 2, 2].float()[:, None, None]
        return out


def _points(t: Mapping[str, Any], group: str, names: tuple[str, ...]) -> PointBatch | None:
    if f"{group}.xyz" not in t:
        return None
    batch = t[f"{group}.batch"]
    return PointBatch(
        xyz_m=t[f"{group}.xyz"],
        features_NF=t[f"{group}.features"],
        feature_names=names,
        batch_index=batch,
        time_index=t.get(f"{group}.time", torch.zeros_like(batch)),
        age_s=t[f"{group}.age"],
        velocity_mps=t.get(f"{group}.velocity"),
    )


def _boxes(t: Mapping[str, Any]) -> BoxBatch | None:
    if "boxes.yaw" not in t:
        return None
    return BoxBatch(
        centre_m_BM3=t["boxes.centre"],
        size_lwh_m_BM3=t["boxes.size"],
        yaw_rad_BM=t["boxes.yaw"],
        velocity_mps_BM2=t["boxes.velocity"],
        label_BM=t["boxes.label"],
        valid_BM=t["boxes.valid"],
    )
