"""CRKD's radar encoder (crkd: section 2.5): a point network of equal layers on BEV cells, maximum over a cell's points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imkd_data.loader.batch import PointBatch
from imkd_models.blocks import PointNorm, cell_index, first_points
from imkd_models.config import StudentConfig
from imkd_models.pooling import pillar_max
from imkd_models.radar import PDH0_BITS, STATE_COLUMNS, _states, at_key_time

__all__ = ["PointRadarEncoder"]


class PointRadarEncoder(nn.Module):
    """Points -> (B, C, Y, X). Point values: x, y, z (scaled to 0..1 over the range), rcs, velocity, age, states, offsets from
    the cell's centre in metres; raw units, as published. Four Linear-norm-ReLU layers.

    In BEVFusion's convention x_L is the row coordinate, so the order is row, column. ``radar_points_per_cell`` reproduces
    imported networks: at most so many points, and the zero rows of cells with fewer points take part in the maximum.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        states = sum(n for _, n in STATE_COLUMNS) + PDH0_BITS
        width, momentum = config.radar_channels, config.norm_momentum
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"linear": nn.Linear(inner, width, bias=False), "norm": PointNorm(width, eps=1e-3, momentum=momentum)}
            )
            for inner in (7 + states + 2, width, width, width)
        )

    def _net(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer["norm"](layer["linear"](x)))
        return x

    def forward(self, radar: PointBatch, slot: int, batch: int) -> Tensor:
        c, grid = self.config, self.config.grid
        with torch.autocast(radar.xyz_m.device.type, enabled=False):
            points = at_key_time(radar, slot)
            xyz, velocity = points["xyz"], points["velocity"]
            row, column, inside = cell_index(xyz[:, :2], grid)
            low, high = (-5.0, 3.0) if c.convention == "bevfusion" else c.z_range_m
            inside = inside & points["use"] & (xyz[:, 2] >= low) & (xyz[:, 2] < high)
            x = (xyz[:, 0] - grid.x_min_m) / (grid.x_max_m - grid.x_min_m)
            y = (xyz[:, 1] - grid.y_min_m) / (grid.y_max_m - grid.y_min_m)
            z = (xyz[:, 2] - low) / (high - low)
            dx = xyz[:, 0] - grid.x_min_m - (column + 0.5) * grid.cell_m
            dy = xyz[:, 1] - grid.y_min_m - (row + 0.5) * grid.cell_m
            first, second, moved, centre = (x, y), z, velocity, (dx, dy)
            if c.convention == "bevfusion":
                first, moved, centre = (y, x), velocity.flip(-1), (dy, dx)
            parts = [*first, second, points["rcs"], *moved.unbind(-1), points["age"]]
            values = torch.stack(parts, dim=1)
            values = torch.cat([values, _states(points["features"], radar.feature_names), torch.stack(centre, dim=1)], dim=1)
            num = batch * grid.ny * grid.nx
            cell = torch.where(inside, (points["sample"] * grid.ny + row) * grid.nx + column, num)
            canvas = self._pooled(values, cell, inside, num)
        return canvas.view(batch, grid.ny, grid.nx, -1).permute(0, 3, 1, 2)

    def _pooled(self, values: Tensor, cell: Tensor, inside: Tensor, num: int) -> Tensor:
        cap = self.config.radar_points_per_cell
        if self.training or cap:  # the norms must not see what is left out; else shapes stay static
            kept = inside.nonzero()[:, 0]
            values, cell = values[kept], cell[kept]
        if cap:
            values, cell = first_points(values, cell, cap)
        canvas = pillar_max(self._net(values), cell, num + 1)[:-1]
        if not cap:
            return canvas
        # One row has no variance: in training too the norms use their running statistics and leave them as they are.
        empty = self._net(values.new_zeros(1, values.shape[1]))
        count = torch.bincount(cell, minlength=num)[:num]
        return torch.where(((count > 0) & (count < cap))[:, None], torch.maximum(canvas, empty), canvas)
