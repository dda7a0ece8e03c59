"""CenterPoint head: maps, targets, loss. Decoding lies in decode.py and is re-exported here.

Everything is in frame bev on the head grid. Heat maps stay logits and nothing is changed in place. Targets, losses and
decoding have no Python loop over boxes. Formulas: CRN / mmdetection3d CenterHead (crn: sections 3.5 and 3.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from imkd_data.classes import CLASS_GROUPS, DETECTION_CLASSES, LABEL_FROM_CLASS
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import BoxBatch
from imkd_models.blocks import cell_index, conv_norm_relu, count_per_rank
from imkd_models.decode import DecodeOptions, Detections, attributes_from, box_values_at, circle_nms, decode, rotated_iou
from imkd_models.outputs import HeadMaps

__all__ = [
    "BOX_VALUES",
    "CentreHead",
    "DecodeOptions",
    "Detections",
    "LossOptions",
    "Targets",
    "attributes_from",
    "box_values_at",
    "centre_targets",
    "circle_nms",
    "decode",
    "detection_loss",
    "gaussian_radius",
    "rotated_iou",
    "stacked_box_maps",
]

# Name, channels of the regression maps, in the order of Targets.values.
BOX_VALUES: tuple[tuple[str, int], ...] = (
    ("offset_cells_B2YX", 2),
    ("height_m_B1YX", 1),
    ("log_size_m_B3YX", 3),
    ("yaw_sincos_B2YX", 2),
    ("velocity_mps_B2YX", 2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """heatmap_weight, box_weight: factors of the two terms. velocity_weight: code weight of vx, vy (the rest has 1).
    min_overlap, min_radius_cells: Gaussian targets. zero_unknown_velocity: CRN's ``nan_velocity: zero``; otherwise an
    unknown velocity (NaN) is masked out. truncate_cells: CRN's ``cell_index: trunc``."""

    heatmap_weight: float = 1.0
    box_weight: float = 0.25
    velocity_weight: float = 1.0
    min_overlap: float = 0.1
    min_radius_cells: int = 2
    zero_unknown_velocity: bool = False
    truncate_cells: bool = False


_LOSS = LossOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """heatmap_BKYX: Gaussians of all classes, in the order of ``classes``. row, column (B, M) i64: cell of each box
    (0 where not valid). valid_BM: a box of these classes whose centre lies in the grid. channel_BM: its class channel.
    values_BMD: the ten box values (dx, dy, z, log l, log w, log h, sin, cos, vx, vy); velocity NaN = unknown."""

    classes: tuple[str, ...]
    heatmap_BKYX: Tensor
    row_BM: Tensor
    column_BM: Tensor
    valid_BM: Tensor
    channel_BM: Tensor
    values_BMD: Tensor


class CentreHead(nn.Module):
    """Shared 3x3 convolution, then per class group the branches offset, height, size, yaw, velocity and heat map.

    branch_channels > 0: every branch is conv-norm-ReLU-conv (CRN: 64). 0: one convolution makes all maps, for small CPU
    models.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        groups: Sequence[Sequence[str]] = CLASS_GROUPS,
        shared_channels: int = 64,
        branch_channels: int = 64,
        float32: bool = False,
    ) -> None:
        super().__init__()
        self.groups = tuple(tuple(group) for group in groups)
        self.classes = tuple(name for group in self.groups for name in group)
        self.float32 = float32
        self.shared = conv_norm_relu(in_channels, shared_channels)
        self.sizes = tuple((*[n for _, n in BOX_VALUES], len(group)) for group in self.groups)
        if branch_channels:
            self.branches = nn.ModuleList(
                nn.ModuleDict(
                    {
                        name.rsplit("_", 1)[0]: nn.Sequential(
                            *conv_norm_relu(shared_channels, branch_channels), nn.Conv2d(branch_channels, n, 3, padding=1)
                        )
                        for name, n in (*BOX_VALUES, ("heatmap_logits_BKYX", len(group)))
                    }
                )
                for group in self.groups
            )
            heatmap_biases = [branch["heatmap_logits"][-1].bias for branch in self.branches]
        else:
            self.branches = nn.ModuleList()
            self.output = nn.Conv2d(shared_channels, sum(map(sum, self.sizes)), 3, padding=1)
            per_group = self.output.bias.detach().split([sum(s) for s in self.sizes])
            heatmap_biases = [bias[-s[-1] :] for bias, s in zip(per_group, self.sizes, strict=True)]
        with torch.no_grad():
            for bias in heatmap_biases:
                bias.fill_(-2.19)

    def maps(self, neck: Tensor) -> tuple[HeadMaps, ...]:
        """(B, C, Y, X) neck features -> one HeadMaps per class group."""
        if self.float32:
            with torch.autocast(neck.device.type, enabled=False):
                return self._maps(neck.float())
        return self._maps(neck)

    def _maps(self, neck: Tensor) -> tuple[HeadMaps, ...]:
        shared = self.shared(neck)
        if len(self.branches):
            parts = [[branch(shared) for branch in group.values()] for group in self.branches]
        else:
            flat = self.output(shared).split([n for sizes in self.sizes for n in sizes], dim=1)
            step = len(BOX_VALUES) + 1
            parts = [flat[i * step : (i + 1) * step] for i in range(len(self.groups))]
        names = [name for name, _ in BOX_VALUES]
        return tuple(
            HeadMaps(classes=group, heatmap_logits_BKYX=maps[-1], **dict(zip(names, maps, strict=False)))
            for group, maps in zip(self.groups, parts, strict=True)
        )

    forward = maps


def gaussian_radius(length_cells: Tensor, width_cells: Tensor, min_overlap: float) -> Tensor:
    """Largest centre shift (cells) that keeps the IoU of two boxes above min_overlap, as CornerNet and CenterPoint."""
    total, area = length_cells + width_cells, length_cells * width_cells
    o = min_overlap
    r1 = (total + (total**2 - 4 * area * (1 - o) / (1 + o)).clamp(min=0).sqrt()) / 2
    r2 = (2 * total + (4 * total**2 - 16 * (1 - o) * area).clamp(min=0).sqrt()) / 2
    r3 = (-2 * o * total + (4 * o**2 * total**2 + 16 * o * (1 - o) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(r1, r2), r3)


def _channel_table(classes: Sequence[str], device: torch.device) -> Tensor:
    """Label (index into DETECTION_CLASSES, last entry for -1) -> channel in ``classes`` or -1."""
    table = torch.full((len(DETECTION_CLASSES) + 1,), -1, dtype=torch.long)
    table[[LABEL_FROM_CLASS[name] for name in classes]] = torch.arange(len(classes))
    return table.to(device)


def centre_targets(
    boxes: BoxBatch,
    grid: BevGrid,
    options: LossOptions = _LOSS,
    *,
    groups: Sequence[Sequence[str]] = CLASS_GROUPS,
) -> Targets:
    """Targets of padded boxes (frame bev) on the head grid. Boxes outside the grid, padding and ignored labels are left
    out. A peak is exactly 1 at the cell that holds the centre; overlapping Gaussians combine by maximum."""
    classes = tuple(name for group in groups for name in group)
    channel = _channel_table(classes, boxes.label_BM.device)[boxes.label_BM]
    centre = boxes.centre_m_BM3.float()
    row, column, inside = cell_index(boxes.centre_m_BM3[..., :2], grid, truncate=options.truncate_cells)
    valid = boxes.valid_BM & inside & (channel >= 0)
    row, column = torch.where(valid, row, 0), torch.where(valid, column, 0)
    low = torch.tensor([grid.x_min_m, grid.y_min_m], device=centre.device)
    corner = torch.stack([column, row], dim=-1)
    offset = (boxes.centre_m_BM3[..., :2].double() - low.double()) / grid.cell_m - corner
    size = boxes.size_lwh_m_BM3.float().clamp(min=1e-2)
    yaw = boxes.yaw_rad_BM.float()
    values = torch.cat(
        [
            offset.float(),
            centre[..., 2:],
            size.log(),
            torch.stack([yaw.sin(), yaw.cos()], dim=-1),
            boxes.velocity_mps_BM2.float(),
        ],
        dim=-1,
    )
    heatmap = _gaussians(row, column, valid, channel.clamp(min=0), size / grid.cell_m, len(classes), grid, options)
    return Targets(
        classes=classes,
        heatmap_BKYX=heatmap,
        row_BM=row,
        column_BM=column,
        valid_BM=valid,
        channel_BM=torch.where(valid, channel, -1),
        values_BMD=values,
    )


def _gaussians(
    row: Tensor,
    column: Tensor,
    valid: Tensor,
    channel: Tensor,
    size_cells: Tensor,
    num_classes: int,
    grid: BevGrid,
    options: LossOptions,
) -> Tensor:
    """(B, K, Y, X) maximum of all boxes' Gaussians, drawn as square windows of one common size by scatter-maximum."""
    batch, _ = row.shape
    heatmap = torch.zeros(batch * num_classes * grid.ny * grid.nx, device=row.device)
    if row.shape[1] == 0:
        return heatmap.view(batch, num_classes, grid.ny, grid.nx)
    radius = gaussian_radius(size_cells[..., 0], size_cells[..., 1], options.min_overlap).floor()
    radius = torch.where(valid, radius.clamp(min=options.min_radius_cells), 0)
    reach = min(int(radius.max()), max(grid.ny, grid.nx))
    delta = torch.arange(-reach, reach + 1, device=row.device)
    sigma = (2 * radius + 1) / 6
    profile = torch.exp(-(delta**2) / (2 * sigma[..., None] ** 2))
    profile = torch.where(delta.abs() <= radius[..., None], profile, 0)
    window = profile[..., :, None] * profile[..., None, :]  # (B, M, y, x)
    rows, columns = row[..., None] + delta, column[..., None] + delta
    ok_y, ok_x = (rows >= 0) & (rows < grid.ny), (columns >= 0) & (columns < grid.nx)
    keep = valid[..., None, None] & ok_y[..., :, None] & ok_x[..., None, :]
    plane = torch.arange(batch, device=row.device)[:, None] * num_classes + channel
    index = (plane[..., None] * grid.ny + rows)[..., :, None] * grid.nx + columns[..., None, :]
    index = torch.where(keep, index, 0)
    heatmap = heatmap.scatter_reduce(0, index.flatten(), torch.where(keep, window, 0).flatten(), "amax")
    return heatmap.view(batch, num_classes, grid.ny, grid.nx)


def stacked_box_maps(maps: HeadMaps) -> Tensor:
    """(B, 10, Y, X) regression maps in the order of BOX_VALUES."""
    return torch.cat([getattr(maps, name) for name, _ in BOX_VALUES], dim=1)


def detection_loss(
    head: Sequence[HeadMaps],
    truth: BoxBatch | Targets,
    grid: BevGrid,
    options: LossOptions = _LOSS,
) -> dict[str, Tensor]:
    """Weighted ``det_heatmap`` (Gaussian focal, alpha 2, gamma 4, per group over its peaks) and ``det_box`` (L1 at the
    centres, per group over its boxes), each summed over the class groups; float32. Without boxes the box term is 0."""
    groups = [maps.classes for maps in head]
    targets = truth if isinstance(truth, Targets) else centre_targets(truth, grid, options, groups=groups)
    with torch.autocast(targets.heatmap_BKYX.device.type, enabled=False):
        heat, box, first = [], [], 0
        weight = targets.values_BMD.new_ones(10)
        weight[8:] = options.velocity_weight
        for maps in head:
            count = len(maps.classes)
            mine = targets.valid_BM & (targets.channel_BM >= first) & (targets.channel_BM < first + count)
            target = targets.heatmap_BKYX[:, first : first + count]
            heat.append(_focal(maps.heatmap_logits_BKYX.float(), target))
            box.append(_box_l1(maps, targets, mine, weight, options))
            first += count
        return {
            "det_heatmap": options.heatmap_weight * torch.stack(heat).sum(),
            "det_box": options.box_weight * torch.stack(box).sum(),
        }


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(logits).clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    positive = -torch.log(p) * (1 - p) ** 2
    negative = -torch.log(1 - p) * p**2 * (1 - target) ** 4
    loss = torch.where(peak, positive, negative).sum()
    return loss / count_per_rank(peak.sum().float(), 1.0)


def _box_l1(maps: HeadMaps, targets: Targets, mine: Tensor, weight: Tensor, options: LossOptions) -> Tensor:
    predicted = box_values_at(stacked_box_maps(maps).float(), targets.row_BM, targets.column_BM)
    known = ~targets.values_BMD.isnan()
    if options.zero_unknown_velocity:
        known = torch.ones_like(known)
    use = mine[..., None] & known
    difference = torch.where(use, predicted - torch.nan_to_num(targets.values_BMD), 0)
    return (difference.abs() * weight).sum() / count_per_rank(mine.sum().float(), 1e-4)


def loss_options_from(values: Mapping[str, object]) -> LossOptions:
    """LossOptions from a JSON object; unknown keys raise TypeError naming them."""
    unknown = sorted(set(values) - {f.name for f in fields(LossOptions)})
    if unknown:
        raise TypeError(f"unknown loss options {unknown}")
    return LossOptions(**values)
