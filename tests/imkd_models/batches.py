"""A synthetic Batch without cache or loader: boxes on the ground, LiDAR and radar returns on them, six cameras that see
coloured patches where the boxes are. Deterministic in the seed; grids may be non-square and off-centre."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch, PointBatch

ODD_GRID = BevGrid(x_min_m=-6.4, y_min_m=-14.4, cell_m=0.8, nx=32, ny=24)
SIZES_LWH = torch.tensor(
    [
        [4.6, 1.9, 1.7],
        [7.0, 2.5, 2.8],
        [6.5, 2.8, 3.2],
        [11.0, 2.9, 3.5],
        [12.0, 2.9, 3.8],
        [0.5, 2.5, 1.0],
        [2.1, 0.8, 1.5],
        [1.7, 0.6, 1.3],
        [0.7, 0.7, 1.8],
        [0.4, 0.4, 1.1],
    ]
)


def _cameras(count: int, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Intrinsics (V, 3, 3) with about 65 degrees and poses bev_from_camera (V, 4, 4), turned evenly, 1.5 m above ground."""
    h, w = hw
    focal = w / (2 * math.tan(math.radians(36)))
    intrinsic = torch.tensor([[focal, 0, (w - 1) / 2], [0, focal, 0.45 * h], [0, 0, 1]])
    pose = torch.zeros(count, 4, 4)
    for i in range(count):
        yaw = -2 * math.pi * i / count
        forward = torch.tensor([math.cos(yaw), math.sin(yaw), 0.0])
        right = torch.tensor([math.sin(yaw), -math.cos(yaw), 0.0])
        down = torch.tensor([0.0, 0.0, -1.0])
        pose[i, :3, :3] = torch.stack([right, down, forward], dim=1)
        pose[i, :3, 3] = 0.8 * forward + torch.tensor([0.0, 0.0, 1.5])
        pose[i, 3, 3] = 1
    return intrinsic.expand(count, 3, 3).clone(), pose


def make_boxes(generator: torch.Generator, grid: BevGrid, batch: int, count: int, padding: int = 2) -> BoxBatch:
    """Boxes of cycling classes at random places of the grid; every third velocity unknown; ``padding`` invalid rows."""
    total = count + padding
    label = torch.arange(total).remainder(10).expand(batch, total).clone()
    span = torch.tensor([grid.x_max_m - grid.x_min_m, grid.y_max_m - grid.y_min_m]) * 0.9
    low = torch.tensor([grid.x_min_m, grid.y_min_m]) + span / 18
    size = SIZES_LWH[label] * (0.9 + 0.2 * torch.rand(batch, total, 3, generator=generator))
    xy = low + span * torch.rand(batch, total, 2, generator=generator)
    yaw = (torch.rand(batch, total, generator=generator) * 2 - 1) * math.pi
    velocity = torch.randn(batch, total, 2, generator=generator) * 3
    velocity[:, ::3] = torch.nan
    valid = torch.ones(batch, total, dtype=torch.bool)
    valid[:, count:] = False
    return BoxBatch(
        centre_m_BM3=torch.cat([xy, size[..., 2:] / 2], dim=-1),
        size_lwh_m_BM3=size,
        yaw_rad_BM=yaw,
        velocity_mps_BM2=velocity,
        label_BM=label,
        valid_BM=valid,
    )


def _on_boxes(generator: torch.Generator, boxes: BoxBatch, per_box: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points inside the valid boxes: xyz (N, 3), sample (N,), box (N,)."""
    sample, box = boxes.valid_BM.nonzero(as_tuple=True)
    sample, box = sample.repeat_interleave(per_box), box.repeat_interleave(per_box)
    local = (torch.rand(len(box), 3, generator=generator) - 0.5) * boxes.size_lwh_m_BM3[sample, box]
    yaw = boxes.yaw_rad_BM[sample, box]
    c, s = yaw.cos(), yaw.sin()
    turned = torch.stack([c * local[:, 0] - s * local[:, 1], s * local[:, 0] + c * local[:, 1], local[:, 2]], dim=1)
    return turned + boxes.centre_m_BM3[sample, box], sample, box


def _lidar(generator: torch.Generator, grid: BevGrid, boxes: BoxBatch, batch: int, ground: int) -> PointBatch:
    on, sample, _ = _on_boxes(generator, boxes, 40)
    span = torch.tensor([grid.x_max_m - grid.x_min_m, grid.y_max_m - grid.y_min_m, 0.0])
    low = torch.tensor([grid.x_min_m, grid.y_min_m, 0.0])
    floor = low + span * torch.rand(batch * ground, 3, generator=generator)
    xyz = torch.cat([on, floor])
    count = len(xyz)
    features = torch.rand(count, 2, generator=generator)
    return PointBatch(
        xyz_m=xyz,
        features_NF=features,
        feature_names=("intensity", "ring"),
        batch_index=torch.cat([sample, torch.arange(batch).repeat_interleave(ground)]),
        time_index=torch.zeros(count, dtype=torch.long),
        age_s=torch.randint(0, 3, (count,), generator=generator) * 0.05,
    )


def _radar(generator: torch.Generator, boxes: BoxBatch, slots: int) -> PointBatch:
    parts = []
    for slot in range(slots):
        xyz, sample, box = _on_boxes(generator, boxes, 3)
        velocity = torch.nan_to_num(boxes.velocity_mps_BM2[sample, box])
        parts.append((xyz, sample, torch.full_like(sample, slot), velocity))
    xyz, sample, slot, velocity = (torch.cat(part) for part in zip(*parts, strict=True))
    count = len(xyz)
    states = torch.stack([torch.randint(0, n, (count,), generator=generator).float() for n in (8, 5, 18, 8)], dim=1)
    rcs = 5 + 5 * torch.randn(count, 1, generator=generator)
    return PointBatch(
        xyz_m=xyz,
        features_NF=torch.cat([rcs, states], dim=1),
        feature_names=("rcs_dbsm", "dyn_prop", "ambig_state", "invalid_state", "pdh0"),
        batch_index=sample,
        time_index=slot,
        age_s=torch.randint(0, 6, (count,), generator=generator) * 0.07,
        velocity_mps=velocity,
    )


def _images(generator: torch.Generator, boxes: BoxBatch, image33: Tensor, pose44: Tensor, hw: tuple[int, int]) -> Tensor:
    """(B, V, 3, H, W): faint noise, and a patch of its class's colour where each box centre is seen."""
    h, w = hw
    batch, views = pose44.shape[:2]
    images = 0.1 * torch.randn(batch, views, 3, h, w, generator=generator)
    colours = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    for b, m in boxes.valid_BM.nonzero().tolist():
        for view in range(views):
            camera = torch.linalg.inv(pose44[b, view]) @ torch.cat([boxes.centre_m_BM3[b, m], torch.ones(1)])
            if camera[2] < 1:
                continue
            u, v = ((image33[b, view] @ camera[:3])[:2] / camera[2]).tolist()
            half = max(2, int(float(image33[b, view, 0, 0]) / float(camera[2])))
            if 0 <= u < w and 0 <= v < h:
                rows = slice(max(0, int(v) - half), int(v) + half)
                columns = slice(max(0, int(u) - half), int(u) + half)
                images[b, view, :, rows, columns] += 2 * colours[int(boxes.label_BM[b, m])][:, None, None]
    return images


def _depth(generator: torch.Generator, lidar: PointBatch, image33: Tensor, pose44: Tensor, hw: tuple[int, int]) -> Tensor:
    """(B, V, H, W) nearest LiDAR depth per pixel, 0 = none."""
    (h, w), (batch, views) = hw, pose44.shape[:2]
    depth = torch.full((batch * views * h * w,), torch.inf)
    camera44 = torch.linalg.inv(pose44)[lidar.batch_index]
    xyz = torch.einsum("nvij,nj->nvi", camera44[..., :3, :3], lidar.xyz_m) + camera44[..., :3, 3]
    uvw = torch.einsum("nvij,nvj->nvi", image33[lidar.batch_index], xyz)
    u, v = (torch.floor(uvw[..., i] / xyz[..., 2].clamp(min=1e-3) + 0.5).long() for i in (0, 1))
    seen = (xyz[..., 2] > 0.5) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
    view = lidar.batch_index[:, None] * views + torch.arange(views)
    index = ((view * h + v) * w + u)[seen]
    depth = depth.scatter_reduce(0, index, xyz[..., 2][seen], "amin")
    return torch.where(depth.isinf(), 0, depth).view(batch, views, h, w)


def make_batch(
    grid: BevGrid = ODD_GRID,
    *,
    batch: int = 2,
    slots: int = 1,
    views: int = 6,
    image_hw_px: tuple[int, int] = (64, 96),
    boxes: int = 12,
    ground: int = 400,
    seed: int = 0,
    **changes: Any,
) -> Batch:
    """A complete Batch; ``changes`` replace fields (None removes a sensor)."""
    g = torch.Generator().manual_seed(seed)
    truth = make_boxes(g, grid, batch, boxes)
    image33, pose = _cameras(views, image_hw_px)
    image33, pose = image33.expand(batch, views, 3, 3), pose.expand(batch, views, 4, 4)
    lidar = _lidar(g, grid, truth, batch, ground)
    now = _images(g, truth, image33, pose, image_hw_px)
    poses = torch.stack([pose.clone() for _ in range(slots)], dim=1)
    poses[:, :, :, 0, 3] -= 2.0 * torch.arange(slots)[None, :, None]
    images = torch.stack([now + 0.05 * slot for slot in range(slots)], dim=1)
    identity = torch.eye(4).expand(batch, 4, 4).clone()
    fields: dict[str, Any] = {
        "tokens": tuple(f"sample{i}" for i in range(batch)),
        "timestamp_us_B": torch.zeros(batch, dtype=torch.long),
        "global_from_ego_B44": identity.double(),
        "bev_from_ego_B44": identity,
        "grid": grid,
        "images_BTVCHW": images,
        "image_from_camera_BTV33": image33[:, None].expand(batch, slots, views, 3, 3).clone(),
        "bev_from_camera_BTV44": poses,
        "history_valid_BT": torch.ones(batch, slots, dtype=torch.bool),
        "lidar": lidar,
        "radar": _radar(g, truth, slots),
        "bev_maps": {"lidar_intensity": torch.rand(batch, 4, *grid.shape, generator=g)},
        "image_maps": {"depth_BVHW": _depth(g, lidar, image33, pose, image_hw_px)},
        "boxes": truth,
    }
    return Batch(**{**fields, **changes})


def with_near(batch: Batch) -> Batch:
    """The batch with the column ``near_m``, as the loader gives it: finite for past sweeps, under 1 m for a third of them."""
    lidar = batch.lidar
    near = torch.rand(len(lidar.age_s), generator=torch.Generator().manual_seed(7)) * 3
    near = torch.where(lidar.age_s > 0, near, torch.inf)
    features = torch.cat([lidar.features_NF, near[:, None]], dim=1)
    return replace(batch, lidar=replace(lidar, features_NF=features, feature_names=(*lidar.feature_names, "near_m")))


def small_student(**changes: Any) -> Any:
    """Configuration of a very small student that fits ``make_batch``'s defaults."""
    from imkd_models.presets import tiny_config

    values = {"grid": ODD_GRID, "image_hw_px": (64, 96), "depth_bins": 12, "depth_step_m": 1.5}
    return tiny_config(**{**values, **changes})


def small_lidar(**changes: Any) -> Any:
    """Configuration of a very small LiDAR teacher on ODD_GRID."""
    from imkd_models.presets import tiny_lidar_config

    return tiny_lidar_config(**{"grid": ODD_GRID, **changes})


def small_fusion(**changes: Any) -> Any:
    """Configuration of a very small LiDAR-camera teacher on ODD_GRID."""
    from imkd_models.presets import tiny_fusion_config

    parts = {"grid": ODD_GRID, "lidar": small_lidar(), "student": small_student(radar=False, depth_input=True)}
    return tiny_fusion_config(**{**parts, **changes})
