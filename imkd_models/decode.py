"""From head maps to boxes: peaks, non-maximum suppression, attributes. Vectorised over boxes, groups and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imkd_data.classes import ATTRIBUTES, DETECTION_CLASSES, LABEL_FROM_CLASS
from imkd_data.geometry import BevGrid
from imkd_models.outputs import HeadMaps

__all__ = [
    "DecodeOptions",
    "Detections",
    "attributes_from",
    "box_values_at",
    "circle_nms",
    "decode",
    "greedy_keep",
    "rotated_iou",
    "rotated_nms",
]

# CRN compares [4, 12, 10, 1, .85, .175] with squared distances; these are the real radii, keyed by a group's first class.
CIRCLE_RADIUS_M = {
    "car": 2.0,
    "truck": 12**0.5,
    "bus": 10**0.5,
    "barrier": 1.0,
    "motorcycle": 0.85**0.5,
    "pedestrian": 0.175**0.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """nms: circle | rotated | none. iou: rotated NMS threshold. peaks_only: keep only 3x3 local maxima (off in CRN).
    range_m, height_m: largest |x|, |y| beyond the grid's own edge is ``margin_m``; |z| limit. Counts are per group and
    per sample."""

    nms: str = "circle"
    iou: float = 0.2
    peaks_only: bool = False
    score_min: float = 0.01
    candidates: int = 500
    per_group: int = 200
    per_sample: int = 500
    margin_m: float = 10.0
    height_m: float = 10.0


_DECODE = DecodeOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Boxes of one sample, best score first, frame bev. label indexes DETECTION_CLASSES."""

    centre_m: Tensor  # (N, 3) gravity centre
    size_lwh_m: Tensor  # (N, 3)
    yaw_rad: Tensor  # (N,)
    velocity_mps: Tensor  # (N, 2)
    label: Tensor  # (N,) i64
    score: Tensor  # (N,)

    def __len__(self) -> int:
        return len(self.score)


def box_values_at(maps_BDYX: Tensor, row_BM: Tensor, column_BM: Tensor) -> Tensor:
    """(B, D, Y, X) maps read at cells (B, M) -> (B, M, D)."""
    index = row_BM * maps_BDYX.shape[-1] + column_BM
    flat = maps_BDYX.flatten(2)
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


def greedy_keep(suppresses: Tensor) -> Tensor:
    """Greedy NMS from a relation: suppresses[..., i, j] = box i (better) removes box j, true only for i < j.

    Iterates keep[j] = no kept i removes j; the prefix that is right grows every round, so the fixed point is the greedy
    result. A handful of rounds is typical; each is one matrix operation.
    """
    relation = suppresses.triu(1).to(torch.float32)
    keep = torch.ones(relation.shape[:-1], device=relation.device)
    for _ in range(relation.shape[-1] + 1):
        new = ((keep[..., None, :] @ relation)[..., 0, :] == 0).to(torch.float32)
        if torch.equal(new, keep):
            break
        keep = new
    return keep > 0


def circle_nms(xy_m: Tensor, valid: Tensor, radius_m: Tensor | float) -> Tensor:
    """Keep mask (..., N) for centres (..., N, 2) sorted by falling score; a box closer than radius_m to a better kept one
    goes."""
    x, y = (xy_m[..., :, None, i] - xy_m[..., None, :, i] for i in (0, 1))  # a sum over an axis of two is slow
    radius = torch.as_tensor(radius_m, device=xy_m.device, dtype=xy_m.dtype)[..., None, None]
    close = x * x + y * y <= radius**2
    return greedy_keep(close & valid[..., :, None] & valid[..., None, :]) & valid


def _corners(box: Tensor) -> Tensor:
    """(N, 5) x, y, l, w, yaw -> (N, 4, 2), counter-clockwise."""
    half = box[:, 2:4] / 2
    unit = box.new_tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]])
    local = unit[None] * half[:, None]
    c, s = box[:, 4].cos()[:, None], box[:, 4].sin()[:, None]
    x = c * local[..., 0] - s * local[..., 1] + box[:, None, 0]
    y = s * local[..., 0] + c * local[..., 1] + box[:, None, 1]
    return torch.stack([x, y], dim=-1)


def _inside(points: Tensor, box: Tensor, tolerance: float = 1e-5) -> Tensor:
    """(N, P, 2) points against (N, 5) boxes."""
    d = points - box[:, None, :2]
    c, s = box[:, 4].cos()[:, None], box[:, 4].sin()[:, None]
    along, across = c * d[..., 0] + s * d[..., 1], -s * d[..., 0] + c * d[..., 1]
    return (along.abs() <= box[:, 2, None] / 2 + tolerance) & (across.abs() <= box[:, 3, None] / 2 + tolerance)


def rotated_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU in the plane of paired rectangles (N, 5) x, y, length, width, yaw. The intersection polygon has at most 24
    candidate points (corners inside the other, edge crossings), sorted by angle about their mean."""
    a, b = a.double(), b.double()
    origin = a[:, :2].clone()
    a, b = torch.cat([a[:, :2] - origin, a[:, 2:]], 1), torch.cat([b[:, :2] - origin, b[:, 2:]], 1)
    ca, cb = _corners(a), _corners(b)
    da, db = ca.roll(-1, 1) - ca, cb.roll(-1, 1) - cb
    start = cb[:, None] - ca[:, :, None]  # (N, 4, 4, 2)
    cross = da[:, :, None, 0] * db[:, None, :, 1] - da[:, :, None, 1] * db[:, None, :, 0]
    safe = torch.where(cross.abs() < 1e-12, 1.0, cross)
    t = (start[..., 0] * db[:, None, :, 1] - start[..., 1] * db[:, None, :, 0]) / safe
    u = (start[..., 0] * da[:, :, None, 1] - start[..., 1] * da[:, :, None, 0]) / safe
    crosses = (cross.abs() >= 1e-12) & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    crossing = ca[:, :, None] + t[..., None] * da[:, :, None]
    points = torch.cat([ca, cb, crossing.flatten(1, 2)], dim=1)
    used = torch.cat([_inside(ca, b), _inside(cb, a), crosses.flatten(1)], dim=1)
    count = used.sum(1)
    mean = (points * used[..., None]).sum(1) / count.clamp(min=1)[:, None]
    relative = torch.where(used[..., None], points - mean[:, None], 0)
    angle = torch.where(used, torch.atan2(relative[..., 1], relative[..., 0]), 10.0)
    order = angle.argsort(1)
    ring = relative.gather(1, order[..., None].expand(-1, -1, 2))
    # Unused slots repeat the first point, so that they add no area.
    filled = torch.where(used.gather(1, order)[..., None], ring, ring[:, :1])
    after = filled.roll(-1, 1)
    area = (filled[..., 0] * after[..., 1] - filled[..., 1] * after[..., 0]).sum(1).abs() / 2
    area = torch.where(count >= 3, area, 0)
    union = a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - area
    return area / union.clamp(min=1e-9)


def rotated_nms(boxes: Tensor, valid: Tensor, iou: float) -> Tensor:
    """Keep mask (..., N) for rectangles (..., N, 5) sorted by falling score."""
    lead, n = boxes.shape[:-2], boxes.shape[-2]
    flat, ok = boxes.reshape(-1, n, 5), valid.reshape(-1, n)
    reach = (flat[..., 2] ** 2 + flat[..., 3] ** 2).sqrt() / 2
    distance = torch.cdist(flat[..., :2], flat[..., :2])
    near = (distance < reach[..., :, None] + reach[..., None, :]) & ok[..., :, None] & ok[..., None, :]
    group, i, j = near.triu(1).nonzero(as_tuple=True)
    relation = torch.zeros_like(near)
    relation[group, i, j] = rotated_iou(flat[group, i], flat[group, j]) > iou
    return (greedy_keep(relation) & ok).reshape(*lead, n)


def decode(head: Sequence[HeadMaps], grid: BevGrid, options: DecodeOptions = _DECODE) -> list[Detections]:
    """Boxes of every sample in frame bev; at most ``per_sample`` each, best first.

    Per group the best cells over its classes, limits on score and place, suppression across the group's classes.
    """
    parts = [_group_boxes(maps, grid, options) for maps in head]
    values, label, score, valid = (torch.stack(list(part), dim=1) for part in zip(*parts, strict=True))  # (B, G, N, ...)
    if options.nms == "circle":
        radius = [CIRCLE_RADIUS_M.get(maps.classes[0], 1.0) for maps in head]
        keep = circle_nms(values[..., :2], valid, values.new_tensor(radius)[None])
    elif options.nms == "rotated":
        keep = rotated_nms(values[..., [0, 1, 3, 4, 6]], valid, options.iou)
    elif options.nms == "none":
        keep = valid
    else:
        raise ValueError(f"nms is circle, rotated or none, not {options.nms!r}")
    keep = keep & (keep.cumsum(-1) <= options.per_group)
    score = torch.where(keep, score, -1.0).flatten(1)
    best, order = score.sort(dim=1, descending=True, stable=True)
    best, order = best[:, : options.per_sample], order[:, : options.per_sample]
    values = values.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
    label = label.flatten(1).gather(1, order)
    result = []
    for sample in range(len(best)):
        n = int((best[sample] > 0).sum())
        v = values[sample, :n]
        result.append(
            Detections(
                centre_m=v[:, :3],
                size_lwh_m=v[:, 3:6],
                yaw_rad=v[:, 6],
                velocity_mps=v[:, 7:9],
                label=label[sample, :n],
                score=best[sample, :n],
            )
        )
    return result


def _group_boxes(maps: HeadMaps, grid: BevGrid, options: DecodeOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best cells of one group: values (B, N, 9) x y z l w h yaw vx vy, label, score, valid (B, N)."""
    score_map = torch.sigmoid(maps.heatmap_logits_BKYX.float())
    _, classes, ny, nx = score_map.shape
    if options.peaks_only:
        peak = torch.nn.functional.max_pool2d(score_map, 3, stride=1, padding=1)
        score_map = torch.where(score_map == peak, score_map, 0)
    count = min(options.candidates, classes * ny * nx)
    score, index = score_map.flatten(1).topk(count, dim=1)
    cell = index % (ny * nx)
    row, column = cell // nx, cell % nx

    def at(tensor: Tensor) -> Tensor:
        return box_values_at(tensor.float(), row, column)

    offset, sincos = at(maps.offset_cells_B2YX), at(maps.yaw_sincos_B2YX)
    low = offset.new_tensor([grid.x_min_m, grid.y_min_m])
    xy = (torch.stack([column, row], dim=-1) + offset) * grid.cell_m + low
    size = at(maps.log_size_m_B3YX).clamp(-6, 6).exp()
    yaw = torch.atan2(sincos[..., :1], sincos[..., 1:])
    values = torch.cat([xy, at(maps.height_m_B1YX), size, yaw, at(maps.velocity_mps_B2YX)], dim=-1)
    m = options.margin_m
    x, y, z = values[..., 0], values[..., 1], values[..., 2]
    near = (x >= grid.x_min_m - m) & (x <= grid.x_max_m + m) & (y >= grid.y_min_m - m) & (y <= grid.y_max_m + m)
    valid = (score > options.score_min) & near & (z.abs() <= options.height_m) & values.isfinite().all(-1)
    names = torch.tensor([LABEL_FROM_CLASS[name] for name in maps.classes], device=index.device)
    label = names[index // (ny * nx)]
    pad = options.candidates - count  # small grids: every group must give the same number
    return (
        torch.nn.functional.pad(torch.nan_to_num(values), (0, 0, 0, pad)),
        *(torch.nn.functional.pad(x, (0, pad)) for x in (label, score, valid)),
    )


# Attribute of a moving and of a slow object, -1 = the class has none.
_MOVING = {
    **dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), "vehicle.moving"),
    **dict.fromkeys(("bicycle", "motorcycle"), "cycle.with_rider"),
    "pedestrian": "pedestrian.moving",
}
_SLOW = {
    **dict.fromkeys(("car", "truck", "trailer", "construction_vehicle"), "vehicle.parked"),
    "bus": "vehicle.stopped",
    **dict.fromkeys(("bicycle", "motorcycle"), "cycle.without_rider"),
    "pedestrian": "pedestrian.standing",
}


def attributes_from(label: Tensor, velocity_mps: Tensor, *, moving_mps: float = 0.2) -> Tensor:
    """(N,) labels and (N, 2) velocities -> (N,) index into ATTRIBUTES, -1 for barrier and traffic cone (CRN's rule)."""
    table = torch.tensor(
        [[ATTRIBUTES.index(t[name]) if name in t else -1 for name in DETECTION_CLASSES] for t in (_SLOW, _MOVING)],
        device=label.device,
    )
    moving = velocity_mps.norm(dim=-1) > moving_mps
    return table[moving.long(), label]
