"""Tensors that look like networks' outputs, on a grid that is neither square nor centred; and small networks around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from batches import ODD_GRID, make_batch
from torch import Tensor, nn

from imkd_data.classes import CLASS_GROUPS
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.head import CentreHead
from imkd_models.outputs import HeadMaps, Outputs

GRID = ODD_GRID  # 24 rows, 32 columns, off-centre
Shapes = dict[str, tuple[int, int, int]]
Y, X = GRID.shape

STUDENT: Shapes = {
    "bev_camera": (12, Y, X),
    "bev_camera_gated": (12, Y, X),
    "bev_radar": (12, Y, X),
    "bev_sim": (12, Y, X),
    "bev_intensity_camera": (1, Y, X),
    "bev_intensity_radar": (1, Y, X),
    "bev_fused": (15, Y, X),
    "bev_stage0": (18, Y // 2, X // 2),
    "bev_stage1": (16, Y // 4, X // 4),
    "bev_stage2": (24, Y // 8, X // 8),
    "bev_neck": (20, Y, X),
}
LIDAR: Shapes = {
    "bev_lidar": (14, Y, X),
    "bev_stage0": (6, 2 * Y, 2 * X),
    "bev_stage1": (8, Y, X),
    "bev_stage2": (10, Y // 2, X // 2),
    "bev_neck": (22, Y, X),
}
LABEL: Shapes = {k: LIDAR[k] for k in ("bev_stage1", "bev_stage2")}
FUSION: Shapes = {
    "bev_camera": (12, Y, X),
    "bev_camera_gated": (12, Y, X),
    "bev_lidar": (14, Y, X),
    "bev_fused": (15, Y, X),
    "bev_neck": (20, Y, X),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fake_head(seed: int, batch: int = 2, grid: BevGrid = GRID, mean: float = -2.0) -> tuple[HeadMaps, ...]:
    g = generator(seed)

    def maps(channels: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return scale * torch.randn(batch, channels, *grid.shape, generator=g) + shift

    return tuple(
        HeadMaps(
            classes=group,
            heatmap_logits_BKYX=maps(len(group), 1.5, mean),
            offset_cells_B2YX=torch.rand(batch, 2, *grid.shape, generator=g),
            height_m_B1YX=maps(1),
            log_size_m_B3YX=maps(3, 0.3),
            yaw_sincos_B2YX=maps(2),
            velocity_mps_B2YX=maps(2),
        )
        for group in CLASS_GROUPS
    )


def fake_outputs(shapes: Mapping[str, tuple[int, int, int]], seed: int, *, batch: int = 2, grad: bool = False) -> Outputs:
    """ReLU-like features (0 or positive); intensity maps are logits."""
    g = generator(seed)
    features = {}
    for name, shape in shapes.items():
        value = torch.randn(batch, *shape, generator=g)
        features[name] = value if "intensity" in name else value.relu()
    head = fake_head(seed + 1000, batch)
    if grad:
        features = {k: v.requires_grad_() for k, v in features.items()}
        head = tuple(
            replace(m, **{n: getattr(m, n).requires_grad_() for n in type(m).__dataclass_fields__ if n != "classes"})
            for m in head
        )
    return Outputs(features=features, head=head, grid=GRID)


def planes(batch: int = 2, factor: int = 4, seed: int = 3, grid: BevGrid = GRID) -> Tensor:
    """(B, 4, Yf, Xf) whole-number sum, count, maximum, z of fine cells; most cells empty."""
    g = generator(seed)
    shape = (batch, grid.ny * factor, grid.nx * factor)
    count = torch.randint(0, 4, shape, generator=g) * (torch.rand(shape, generator=g) < 0.2)
    maximum = torch.where(count > 0, torch.randint(0, 256, shape, generator=g), 0)
    others = torch.where(count > 1, torch.floor(maximum * torch.rand(shape, generator=g)), 0) * (count - 1).clamp(min=0)
    return torch.stack([maximum + others, count, maximum, torch.zeros(shape)], dim=1).float()


def fake_batch(batch: int = 2, boxes: int = 8, **changes: Any) -> Batch:
    maps = {"intensity_planes": planes(batch)}
    values: dict[str, Any] = {"bev_maps": maps, "timestamp_us_B": torch.arange(batch) * 500_000 + 17}
    return make_batch(GRID, batch=batch, boxes=boxes, ground=50, image_hw_px=(8, 12), **{**values, **changes})


def without_boxes(batch: Batch, samples: Sequence[int] | None = None) -> Batch:
    valid = batch.boxes.valid_BM.clone()
    valid[list(samples) if samples is not None else slice(None)] = False
    return replace(batch, boxes=replace(batch.boxes, valid_BM=valid))


def one_box(
    x: float, y: float, l: float, w: float, yaw: float, *, velocity: tuple[float, float] = (0.0, 0.0), label: int = 0
) -> BoxBatch:
    return BoxBatch(
        centre_m_BM3=torch.tensor([[[x, y, 0.0]]]),
        size_lwh_m_BM3=torch.tensor([[[l, w, 1.5]]]),
        yaw_rad_BM=torch.tensor([[yaw]]),
        velocity_mps_BM2=torch.tensor([[velocity]]),
        label_BM=torch.tensor([[label]]),
        valid_BM=torch.ones(1, 1, dtype=torch.bool),
    )


def same_head(head: Sequence[HeadMaps]) -> tuple[HeadMaps, ...]:
    """Equal values in new tensors that want gradient."""
    out = []
    for m in head:
        names = [n for n in type(m).__dataclass_fields__ if n != "classes"]
        out.append(replace(m, **{n: getattr(m, n).detach().clone().requires_grad_() for n in names}))
    return tuple(out)


class FakeNet(nn.Module):
    """Maps of the given shapes from a picture of the batch, with BatchNorm, dropout and a real centre head."""

    sensors = ("lidar",)

    def __init__(self, shapes: Shapes, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.feature_shapes = dict(shapes)
        self.grid = GRID
        self.convs = nn.ModuleDict(
            {
                n: nn.Sequential(nn.Conv2d(4, c, 3, padding=1), nn.BatchNorm2d(c), nn.Dropout(0.1), nn.ReLU())
                for n, (c, _, _) in shapes.items()
            }
        )
        self.head = CentreHead(shapes["bev_neck"][0], shared_channels=8, branch_channels=0) if "bev_neck" in shapes else None

    def forward(self, batch: Batch) -> Outputs:
        picture = nn.functional.avg_pool2d(batch.bev_maps["intensity_planes"], 4) / 50
        features = {}
        for name, (_, y, x) in self.feature_shapes.items():
            value = self.convs[name](nn.functional.interpolate(picture, size=(y, x), mode="bilinear"))
            features[name] = value - 4 if "intensity" in name else value
        head = self.head.maps(features["bev_neck"]) if self.head is not None else ()
        return Outputs(features=features, head=head, grid=self.grid)
