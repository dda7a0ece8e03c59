"""Pure loss terms and masks that several methods use. Tensors in, tensors out; float32; frame ``bev``.

Normalisers are averages over all devices, so that two devices with unequal numbers of objects give the loss of one
device with the joined batch. Masks have no Python loop over boxes: boxes of all samples are tested against all cell
centres in chunks of bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from imkd_data.errors import MismatchError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import BoxBatch
from imkd_models.blocks import inverse44
from imkd_models.head import Targets, centre_targets
from imkd_models.outputs import HeadMaps

__all__ = [
    "all_mean",
    "all_sum",
    "bernoulli_kl",
    "box_areas_m2",
    "first_box_map",
    "gaussian_focal",
    "grown_sizes",
    "half_square_on_mask",
    "head_targets",
    "heatmaps_at",
    "normaliser",
    "quality_focal",
    "released_rectangle_mask",
    "require_all_finite",
    "require_finite",
    "rotated_mask",
    "similarity",
    "smooth_l1",
    "stage_grid",
    "weighted_square",
]

MAX_ELEMENTS = 1 << 23  # box x cell tests at a time: 32 MiB for each float32 intermediate


def all_sum(value: Tensor) -> Tensor:
    """Sum over all devices, without gradient; the value itself on one device. Every device must call it."""
    value = value.detach()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value


def all_mean(value: Tensor) -> Tensor:
    """Device average of a global sum."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return all_sum(value) / torch.distributed.get_world_size()
    return value.detach()


def normaliser(value: Tensor) -> Tensor:
    """max(1, global sum) over the number of devices.

    The mean over devices of (own sum / normaliser) is then the loss of one device with the joined batch, also where one
    device has no object at all; the lower bound is applied to the global sum for that reason.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return all_sum(value).clamp(min=1) / torch.distributed.get_world_size()
    return value.detach().clamp(min=1)


def require_finite(value: Tensor, name: str) -> Tensor:
    """The value itself.

    Raises:
        MismatchError: a NaN or infinity in a teacher's map; it is never replaced silently.
    """
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise MismatchError(
            f"the teacher's {name} holds {bad} values that are not finite",
            rule="distill.teacher_finite",
            next="check the teacher's checkpoint and that it gets the inputs it was trained on (frame, scale, units)",
        )
    return value


def require_all_finite(values: Mapping[str, Tensor]) -> None:
    """``require_finite`` of several maps by name; the host waits for the device once."""
    if not values or bool(torch.stack([torch.isfinite(v).all() for v in values.values()]).all()):
        return
    for name, value in values.items():
        require_finite(value, name)


def stage_grid(grid: BevGrid, shape: Sequence[int]) -> BevGrid:
    """The grid of a (..., Y, X) map that covers the same metres as ``grid``; finer or coarser.

    Raises:
        MismatchError: cells would not be square or not a whole number of millimetres.
    """
    ny, nx = int(shape[-2]), int(shape[-1])
    if (ny, nx) == grid.shape:
        return grid
    x, y = grid.nx * grid.cell_mm, grid.ny * grid.cell_mm
    if x % nx or y % ny or x // nx != y // ny:
        raise MismatchError(f"a {ny}x{nx} map does not tile the grid", expected=str(grid), found=f"{ny} rows, {nx} columns")
    return BevGrid(x_min_m=grid.x_min_m, y_min_m=grid.y_min_m, cell_m=x // nx / 1000, nx=nx, ny=ny)


# ---------------------------------------------------------------------------------------------------------------- boxes


def _cell_centres(grid: BevGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.arange(grid.nx, device=device, dtype=torch.float32) * grid.cell_m + (grid.x_min_m + grid.cell_m / 2)
    y = torch.arange(grid.ny, device=device, dtype=torch.float32) * grid.cell_m + (grid.y_min_m + grid.cell_m / 2)
    return x, y


def _inside(boxes: BoxBatch, grid: BevGrid, size_lw_BM2: Tensor, centre_cell: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of (sample index (n,), box index (n,), cells inside (n, Y, X)) over all valid boxes."""
    sample, box = boxes.valid_BM.nonzero(as_tuple=True)
    x, y = _cell_centres(grid, boxes.centre_m_BM3.device)
    half_cell = grid.cell_m / 2
    step = max(1, MAX_ELEMENTS // (grid.nx * grid.ny))
    for start in range(0, len(sample), step):
        b, m = sample[start : start + step], box[start : start + step]
        centre = boxes.centre_m_BM3[b, m, :2].float()
        size = size_lw_BM2[b, m].float()
        yaw = boxes.yaw_rad_BM[b, m].float()
        c, s = yaw.cos()[:, None, None], yaw.sin()[:, None, None]
        dx = x[None, None, :] - centre[:, 0, None, None]
        dy = y[None, :, None] - centre[:, 1, None, None]
        along, across = c * dx + s * dy, c * dy - s * dx
        inside = (along.abs() <= size[:, 0, None, None] / 2) & (across.abs() <= size[:, 1, None, None] / 2)
        if centre_cell:  # half open, so that a centre on a cell border belongs to one cell
            inside |= (dx > -half_cell) & (dx <= half_cell) & (dy > -half_cell) & (dy <= half_cell)
        yield b, m, inside


def rotated_mask(boxes: BoxBatch, grid: BevGrid, *, size_lw_BM2: Tensor | None = None, centre_cell: bool = True) -> Tensor:
    """Cells (B, Y, X) bool whose centre lies in any valid rotated rectangle.

    Args:
        size_lw_BM2: length and width to use instead of the boxes' own, metres.
        centre_cell: also the cell that holds the box centre, so that no small object is lost.
    """
    size = boxes.size_lwh_m_BM3[..., :2] if size_lw_BM2 is None else size_lw_BM2
    hits = torch.zeros(len(boxes.valid_BM), grid.ny, grid.nx, device=size.device)
    for b, _, inside in _inside(boxes, grid, size, centre_cell):
        hits.index_add_(0, b, inside.float())
    return hits > 0


def first_box_map(boxes: BoxBatch, grid: BevGrid) -> Tensor:
    """(B, Y, X) i64: index of the first box in the list whose rectangle holds the cell centre, -1 for none."""
    none = boxes.valid_BM.shape[1]
    first = torch.full((len(boxes.valid_BM), grid.ny, grid.nx), float(none), device=boxes.centre_m_BM3.device)
    for b, m, inside in _inside(boxes, grid, boxes.size_lwh_m_BM3[..., :2], False):
        order = torch.where(inside, m[:, None, None].float(), float(none))
        first.scatter_reduce_(0, b[:, None, None].expand_as(order), order, "amin")
    return torch.where(first < none, first, -1.0).long()


def box_areas_m2(boxes: BoxBatch, index_BYX: Tensor) -> Tensor:
    """(B, Y, X) length x width of the box that ``first_box_map`` names; 1 where it names none."""
    area = boxes.size_lwh_m_BM3[..., 0] * boxes.size_lwh_m_BM3[..., 1]
    if area.shape[1] == 0:
        return torch.ones_like(index_BYX, dtype=torch.float32)
    picked = area.gather(1, index_BYX.clamp(min=0).flatten(1)).view(index_BYX.shape).float()
    return torch.where(index_BYX >= 0, picked, 1.0)


def grown_sizes(boxes: BoxBatch, bev_from_ego_B44: Tensor, *, grid_axis_speed: bool = False) -> Tensor:
    """(B, M, 2) length and width of CRKD's scaled boxes: larger far away and along the motion (crkd, section 4.2).

    Range and speed are measured in ``ego``, so augmentation changes no fraction; speed is taken along the body axes.
    ``grid_axis_speed``: the released behaviour, forward speed of the grid pairs with length and lateral with width.
    An unknown velocity (NaN) gives no growth by speed.
    """
    ego_from_bev = inverse44(bev_from_ego_B44)
    linear = ego_from_bev[:, :2, :2]
    centre = boxes.centre_m_BM3.float()
    position = torch.einsum("bij,bmj->bmi", ego_from_bev[:, :3, :3], centre) + ego_from_bev[:, None, :3, 3]
    distance = position[..., :2].norm(dim=-1)
    velocity = torch.einsum("bij,bmj->bmi", linear, boxes.velocity_mps_BM2.float())
    yaw = boxes.yaw_rad_BM.float()
    heading = torch.einsum("bij,bmj->bmi", linear, torch.stack([yaw.cos(), yaw.sin()], dim=-1))
    heading = F.normalize(heading, dim=-1)
    if grid_axis_speed:
        speed_l, speed_w = velocity[..., 0].abs(), velocity[..., 1].abs()
    else:
        speed_l = (velocity * heading).sum(-1).abs()
        speed_w = (velocity[..., 1] * heading[..., 0] - velocity[..., 0] * heading[..., 1]).abs()

    def by_speed(speed: Tensor) -> Tensor:  # NaN compares false: no growth
        return 0.25 * (speed > 0.3).float() + 0.25 * (speed >= 0.8).float()

    by_range = 0.25 * (distance > 20).float() + 0.25 * (distance >= 30).float()
    size = boxes.size_lwh_m_BM3[..., :2].float()
    fraction = torch.stack([by_range + by_speed(speed_l), by_range + by_speed(speed_w)], dim=-1)
    return size + (fraction * size).clamp(0.5, 4.0)


def released_rectangle_mask(boxes: BoxBatch, grid: BevGrid, size_lw_BM2: Tensor) -> Tensor:
    """The three-corner mask of CRKD's released code, only to measure what the defect costs (crkd, section 8, 3 and 5).

    An axis-aligned rectangle between three corners, indices truncated, clipped to the last cell and exclusive: an object
    turned by 90 degrees loses all its cells, and the last row and column are never foreground.
    """
    yaw = boxes.yaw_rad_BM.float()
    c, s = yaw.cos(), yaw.sin()
    l, w = size_lw_BM2[..., 0].float() / 2, size_lw_BM2[..., 1].float() / 2
    x, y = boxes.centre_m_BM3[..., 0].float(), boxes.centre_m_BM3[..., 1].float()
    # Corners in body axes: rear right, rear left, front left.
    y_right, y_left = y - s * l - c * w, y - s * l + c * w
    x_rear, x_front = x - c * l - s * w, x + c * l - s * w

    def cells(value: Tensor, low: float, count: int) -> Tensor:
        return torch.trunc((value - low) / grid.cell_m).clamp(0, count - 1)

    y0, y1 = cells(y_right, grid.y_min_m, grid.ny), cells(y_left, grid.y_min_m, grid.ny)
    x0, x1 = cells(x_rear, grid.x_min_m, grid.nx), cells(x_front, grid.x_min_m, grid.nx)
    row = torch.arange(grid.ny, device=x.device)
    column = torch.arange(grid.nx, device=x.device)
    rows = (row >= torch.minimum(y0, y1)[..., None]) & (row < torch.maximum(y0, y1)[..., None])
    columns = (column >= torch.minimum(x0, x1)[..., None]) & (column < torch.maximum(x0, x1)[..., None])
    use = boxes.valid_BM[..., None]
    return torch.einsum("bmy,bmx->byx", (rows & use).float(), columns.float()) > 0


# -------------------------------------------------------------------------------------------------------------- targets


def head_targets(boxes: BoxBatch, grid: BevGrid, head: Sequence[HeadMaps]) -> Targets:
    """Ground-truth Gaussians (all classes of the head) and peaks on the head grid, without gradient."""
    with torch.no_grad():
        return centre_targets(boxes, grid, groups=[maps.classes for maps in head])


def heatmaps_at(heatmap_BKYX: Tensor, shape: Sequence[int]) -> Tensor:
    """Heat maps on another grid of the same metres: bilinear with aligned corners (LabelDistill's rule)."""
    size = (int(shape[-2]), int(shape[-1]))
    if tuple(heatmap_BKYX.shape[-2:]) == size:
        return heatmap_BKYX
    return F.interpolate(heatmap_BKYX, size=size, mode="bilinear", align_corners=True)


# ---------------------------------------------------------------------------------------------------------------- terms


def smooth_l1(difference: Tensor, beta: float | Tensor) -> Tensor:
    """Elementwise: quadratic below beta, linear above; slope 1 in the linear part."""
    size = difference.abs()
    return torch.where(size < beta, size**2 / (2 * beta), size - beta / 2)


def weighted_square(x: Tensor, target: Tensor, weight_B1YX: Tensor) -> Tensor:
    """sum of weight x squared distance over channels / max(1, sum of weight over all devices)."""
    distance = (x - target).square().sum(1, keepdim=True)
    return (weight_B1YX * distance).sum() / normaliser(weight_B1YX.sum())


def half_square_on_mask(x: Tensor, target: Tensor, mask_BYX: Tensor) -> Tensor:
    """Mean over masked cells, where the target is not all zero, of the channel mean of half the squared difference.

    Counted on this device (crkd, section 4.2, step 3). No such cell gives exactly 0, with a graph.
    """
    use = mask_BYX & (target != 0).any(dim=1)
    loss = (0.5 * (x - target).square()).mean(1)
    return torch.where(use, loss, 0.0).sum() / use.sum().clamp(min=1)


def quality_focal(logits: Tensor, target: Tensor, *, exponent: float = 2.0) -> Tensor:
    """Elementwise BCE(logits, target) x |sigmoid(logits) - target|^exponent; 0 with zero gradient where equal."""
    difference = torch.sigmoid(logits) - target
    scale = difference.square() if exponent == 2.0 else difference.abs() ** exponent
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") * scale


def gaussian_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Elementwise CenterPoint focal loss: a cell is positive only where the target is exactly 1."""
    p = torch.sigmoid(logits).clamp(1e-4, 1 - 1e-4)
    positive = -torch.log(p) * (1 - p) ** 2
    negative = -torch.log(1 - p) * p**2 * (1 - target) ** 4
    return torch.where(target == 1, positive, negative)


def bernoulli_kl(target: Tensor, logits: Tensor) -> Tensor:
    """Elementwise KL(target || sigmoid(logits)) of Bernoulli variables; the gradient of BCE, but 0 where they agree."""
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy


def similarity(x_BCN: Tensor, *, cosine: bool) -> Tensor:
    """(B, N, N) inner products of columns, of unit columns if ``cosine``."""
    if cosine:
        x_BCN = x_BCN / (x_BCN.norm(dim=1, keepdim=True) + 1e-6)
    return x_BCN.transpose(1, 2) @ x_BCN
