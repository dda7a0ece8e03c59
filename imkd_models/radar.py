"""Radar branch: pillars in the cameras' perspective (crn: section 3.1), pillars on the BEV grid, CRKD's calibration block.

Positions are moved by compensated velocity times age to the key time of their history slot before anything else. Without
any return every output is finite: pillars of nothing are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imkd_data.errors import MissingFeatureError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import PointBatch
from imkd_models.blocks import PointNorm, SecondBackbone, StageNeck, cell_index, conv_norm_relu, inverse44
from imkd_models.config import StudentConfig
from imkd_models.pooling import pillar_max

__all__ = ["BevRadarEncoder", "CalibrationBlock", "PerspectiveRadarEncoder", "PillarNet"]

RCS_MEAN_DBSM, RCS_STD_DBSM = 4.783, 7.576  # CRN, statistics of its training set
SPEED_MEAN_MPS, SPEED_STD_MPS = 0.677, 1.976
# CRKD's one-hot blocks: raw column, number of values.
STATE_COLUMNS = (("dyn_prop", 8), ("ambig_state", 5), ("invalid_state", 18))
PDH0_BITS = 7


class PillarNet(nn.Module):
    """Two PointNet layers: Linear-norm-ReLU to a quarter of the width, joined with its maximum over the pillar, then
    Linear-norm-ReLU to the full width and the maximum."""

    def __init__(self, in_channels: int, channels: int, momentum: float = 0.01) -> None:
        super().__init__()
        quarter = channels // 4
        self.linear1 = nn.Linear(in_channels, quarter, bias=False)
        self.norm1 = PointNorm(quarter, eps=1e-3, momentum=momentum)
        self.linear2 = nn.Linear(2 * quarter, channels, bias=False)
        self.norm2 = PointNorm(channels, eps=1e-3, momentum=momentum)

    def forward(self, features_NF: Tensor, pillar_N: Tensor, num_pillars: int) -> Tensor:
        """(N, F) points and their pillars -> (num_pillars, C)."""
        x = torch.relu(self.norm1(self.linear1(features_NF)))
        x = torch.cat([x, pillar_max(x, pillar_N, num_pillars)[pillar_N]], dim=1)
        x = torch.relu(self.norm2(self.linear2(x)))
        return pillar_max(x, pillar_N, num_pillars)

    def padded(self, features_PKF: Tensor) -> Tensor:
        """CRN's form: every pillar holds K slots and the zero rows of empty slots enter norm and maximum -> (P, C)."""
        if not len(features_PKF):
            return features_PKF.new_zeros(0, self.norm2.num_features)
        p, k, _ = features_PKF.shape
        x = torch.relu(self.norm1(self.linear1(features_PKF).flatten(0, 1))).view(p, k, -1)
        x = torch.cat([x, x.amax(1, keepdim=True).expand_as(x)], dim=-1)
        x = torch.relu(self.norm2(self.linear2(x).flatten(0, 1))).view(p, k, -1)
        return x.amax(1)


def at_key_time(points: PointBatch, slot: int) -> dict[str, Tensor]:
    """All points, moved by velocity times age: xyz (N, 3), velocity (N, 2), rcs, age, sample, features, and ``use``: finite
    and of this history slot. Rows that are not used hold finite numbers, so that they may be masked later."""
    xyz, age = torch.nan_to_num(points.xyz_m.float(), 0, 0, 0), points.age_s.float()
    velocity = torch.zeros_like(xyz[:, :2])
    if points.velocity_mps is not None:
        velocity = torch.nan_to_num(points.velocity_mps.float(), 0, 0, 0)
    rcs = torch.zeros_like(age)
    if "rcs_dbsm" in points.feature_names:
        rcs = torch.nan_to_num(points.column("rcs_dbsm").float(), 0, 0, 0)
    return {
        "xyz": torch.cat([xyz[:, :2] + velocity * age[:, None], xyz[:, 2:]], dim=1),
        "velocity": velocity,
        "rcs": rcs,
        "age": age,
        "sample": points.batch_index,
        "features": points.features_NF,
        "use": (points.time_index == slot) & points.xyz_m.isfinite().all(-1),
    }


class PerspectiveRadarEncoder(nn.Module):
    """Radar pillars on each camera's (depth, column) plane -> context (B*V, C, D, W) and occupancy logits (B*V, 1, D, W).

    Pillars are half a depth bin by half a feature column. The camera poses undo the BEV augmentation, so perspective
    radar is the same for every draw; speeds are divided by the augmentation's scale for the same reason.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        momentum = config.norm_momentum
        self.pillars = PillarNet(8, config.pillar_channels, momentum)
        options = {"bias": True, "padding_mode": "reflect"}
        widths, neck = config.radar_widths, [config.radar_neck_channels] * 3
        self.backbone = SecondBackbone(
            config.pillar_channels, widths, config.radar_layers, (1, 2, 2), momentum=momentum, **options
        )
        self.neck = StageNeck(widths, neck, (0.5, 1, 2), eps=1e-3, momentum=momentum)
        head, total = config.radar_head_channels, sum(neck)
        self.context = nn.Sequential(*conv_norm_relu(total, head, **options), nn.Conv2d(head, config.radar_channels, 1))
        self.occupancy = nn.Sequential(*conv_norm_relu(total, head, **options), nn.Conv2d(head, 1, 1))
        nn.init.constant_(self.occupancy[-1].bias, -4.595)  # prior probability 0.01

    def forward(
        self,
        radar: PointBatch,
        slot: int,
        image_from_camera_BV33: Tensor,
        bev_from_camera_BV44: Tensor,
        bev_from_ego_B44: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch, views = bev_from_camera_BV44.shape[:2]
        canvas = self._canvas(radar, slot, image_from_camera_BV33, bev_from_camera_BV44, bev_from_ego_B44)
        rows, columns = self._plane()
        x = canvas.view(batch * views, rows, columns, -1).permute(0, 3, 1, 2)
        x = self.neck(self.backbone(x))
        return self.context(x), self.occupancy(x)

    def _plane(self) -> tuple[int, int]:
        c = self.config
        return 2 * c.depth_bins, 2 * c.image_hw_px[1] // c.stride_px

    def _canvas(self, radar: PointBatch, slot: int, image33: Tensor, pose44: Tensor, augment44: Tensor) -> Tensor:
        """(B*V*rows*columns, C) pillar features, zero where there is no return; float32."""
        with torch.autocast(pose44.device.type, enabled=False):
            rows, columns = self._plane()
            num = pose44.shape[0] * pose44.shape[1] * rows * columns
            seen, values = self._rows(radar, slot, image33, pose44.float(), augment44.float())
            if not self.training and not self.config.parity & {"radar_caps:crn", "radar_empty:dummy"}:
                # Static shapes, for compilation and CUDA graphs: what no view sees falls into one more pillar.
                features, plane_cell, view = self._features(**values)
                cell = torch.where(seen, view * rows * columns + plane_cell, num)
                return self.pillars(features, cell, num + 1)[:-1]
            features, plane_cell, view = self._seen_points(seen, values, pose44.shape[0] * pose44.shape[1])
            cell = view * rows * columns + plane_cell
            if "radar_caps:crn" in self.config.parity:
                return self._capped(features, cell, num)
            return self.pillars(features, cell, num)

    def _rows(
        self, radar: PointBatch, slot: int, image33: Tensor, pose44: Tensor, augment44: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Every point in every view, flat (N * V,): seen by it or not, and u, depth, rcs, speed, along, age, view."""
        c, parity, views = self.config, self.config.parity, pose44.shape[1]
        points = at_key_time(radar, slot)
        use, sample = points["use"], points["sample"]
        camera44 = inverse44(pose44)[sample]  # (N, V, 4, 4)
        xyz = torch.einsum("nvij,nj->nvi", camera44[..., :3, :3], points["xyz"]) + camera44[..., :3, 3]
        uvw = torch.einsum("nvij,nvj->nvi", image33.float()[sample], xyz)
        depth = xyz[..., 2]
        u, v = (uvw[..., i] / depth.clamp(min=1e-3) for i in (0, 1))
        (height, width), edge = c.image_hw_px, self._edge()
        far = c.depth_min_m + c.depth_bins * c.depth_step_m
        seen = (depth >= c.depth_min_m) & (depth < far) & (u >= edge) & (u < width + edge) & use[:, None]
        if "radar_cull:image_rows" in parity:
            seen = seen & (v >= 0) & (v < height)
        # The z axis of the camera in bev is the viewing direction; speeds are those before augmentation.
        along = torch.einsum("nvi,ni->nv", camera44[:, :, 2, :2], points["velocity"])
        scale = torch.linalg.det(augment44[:, :3, :3]).abs().pow(1 / 3)[sample]
        per_point = {
            "rcs": (points["rcs"] - RCS_MEAN_DBSM) / RCS_STD_DBSM,
            "speed": points["velocity"].norm(dim=-1) / scale,
            "age": points["age"],
        }
        values = {"u": u, "depth": depth, "along": along}
        values |= {name: value[:, None].expand(-1, views) for name, value in per_point.items()}
        values["view"] = sample[:, None] * views + torch.arange(views, device=sample.device)
        return seen.flatten(), {name: value.flatten() for name, value in values.items()}

    def _seen_points(self, seen: Tensor, values: dict[str, Tensor], views: int) -> tuple[Tensor, Tensor, Tensor]:
        """Only the rows that a view sees, with CRN's invented returns where asked for."""
        kept = seen.nonzero()[:, 0]  # once: every mask would make the host wait for the device
        values = {name: value[kept] for name, value in values.items()}
        if "radar_empty:dummy" in self.config.parity:
            values = self._with_dummies(values, views)
        return self._features(**values)

    def _edge(self) -> float:
        """Left edge of the first column in pixels: pixel centres lie at integers, but not in CRN."""
        return 0.0 if "pillar_features:legacy" in self.config.parity else -0.5

    def _features(
        self, u: Tensor, depth: Tensor, rcs: Tensor, speed: Tensor, along: Tensor, age: Tensor, view: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Point features (P, 8), cell on the view's plane (P,), view (P,)."""
        c, edge = self.config, self._edge()
        step_u, step_d = c.stride_px / 2, c.depth_step_m / 2
        rows, columns = self._plane()
        column = torch.floor((u - edge) / step_u).clamp(0, columns - 1)
        row = torch.floor((depth - c.depth_min_m) / step_d).clamp(0, rows - 1)
        du = u - edge - (column + 0.5) * step_u
        dd = depth - c.depth_min_m - (row + 0.5) * step_d
        speed = (speed - SPEED_MEAN_MPS) / SPEED_STD_MPS
        if "pillar_features:legacy" in c.parity:
            zero = torch.zeros_like(u)  # the dummy axis: a constant 1 minus its centre 1
            listed = [du, dd, zero, rcs, speed, du, dd, zero]
        else:
            listed = [u / c.image_hw_px[1], depth / 50, rcs, speed, along / 10, age, du / step_u, dd / step_d]
        return torch.stack(listed, dim=1), (row * columns + column).long(), view

    @staticmethod
    def _with_dummies(values: dict[str, Tensor], views: int) -> dict[str, Tensor]:
        """CRN invents one return at u 0.1 px, depth 57 m, rcs and speed at their means, in every image without any."""
        view = values["view"]
        present = torch.zeros(views, dtype=torch.bool, device=view.device).index_fill(0, view, True)
        empty = (~present).nonzero()[:, 0]
        invented = {"u": 0.1, "depth": 57.0, "rcs": 0.0, "speed": SPEED_MEAN_MPS, "along": 0.0, "age": 0.0}
        joined = {k: torch.cat([values[k], values[k].new_full((len(empty),), x)]) for k, x in invented.items()}
        return {**joined, "view": torch.cat([view, empty])}

    def _capped(self, features: Tensor, cell: Tensor, num: int) -> Tensor:
        """CRN's hard voxelisation: the first 8 points of the first 768 (training) or 1024 pillars of each view."""
        per_pillar, pillars = 8, 768 if self.training else 1024
        ids, inverse = torch.unique(cell, return_inverse=True)
        if not len(ids):
            return features.new_zeros(num, self.pillars.norm2.num_features)
        order = torch.arange(len(cell), device=cell.device)
        first = torch.full_like(ids, len(cell)).scatter_reduce(0, inverse, order, "amin")
        rows, columns = self._plane()
        pillar_view = ids // (rows * columns)
        rank_of_pillar = _rank_within(pillar_view, first)
        slot = _rank_within(inverse, order)
        use = (slot < per_pillar) & (rank_of_pillar[inverse] < pillars)
        kept = rank_of_pillar < pillars
        number = torch.cumsum(kept, 0) - 1
        table = features.new_zeros(int(kept.sum()), per_pillar, features.shape[1])
        table[number[inverse[use]], slot[use]] = features[use]
        canvas = features.new_zeros(num, self.pillars.norm2.num_features)
        return canvas.index_put((ids[kept],), self.pillars.padded(table))


def _rank_within(group: Tensor, key: Tensor) -> Tensor:
    """Rank of each entry among those of its group, by rising key."""
    order = key.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sorted_group = group[order]
    position = torch.arange(len(group), device=group.device)
    begins = torch.ones_like(sorted_group, dtype=torch.bool)
    begins[1:] = sorted_group[1:] != sorted_group[:-1]
    start = torch.cummax(torch.where(begins, position, 0), 0).values if len(group) else position
    rank = torch.empty_like(position)
    rank[order] = position - start
    return rank


class BevRadarEncoder(nn.Module):
    """Pillars of one BEV cell -> (B, C, Y, X). Point values: x, y, z scaled to 0..1 over the range, rcs, velocity, age,
    offset from the cell centre; with ``radar_states`` CRKD's one-hot state columns as well (crkd: section 2.5)."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        states = sum(n for _, n in STATE_COLUMNS) + PDH0_BITS if config.radar_states else 0
        self.pillars = PillarNet(9 + states, config.pillar_channels, config.norm_momentum)
        layers = [conv_norm_relu(config.pillar_channels, config.radar_channels)]
        layers += [conv_norm_relu(config.radar_channels, config.radar_channels) for _ in range(config.radar_layers[0])]
        self.convs = nn.Sequential(*layers)

    def forward(self, radar: PointBatch, slot: int, batch: int) -> Tensor:
        grid = self.config.grid
        with torch.autocast(radar.xyz_m.device.type, enabled=False):
            canvas = self._canvas(radar, slot, batch, grid)
        return self.convs(canvas.view(batch, grid.ny, grid.nx, -1).permute(0, 3, 1, 2))

    def _canvas(self, radar: PointBatch, slot: int, batch: int, grid: BevGrid) -> Tensor:
        points = at_key_time(radar, slot)
        row, column, inside = cell_index(points["xyz"][:, :2], grid)
        inside = inside & points["use"]
        if self.training:  # the norms must not see what is left out; in evaluation shapes stay static
            kept = inside.nonzero()[:, 0]
            points = {key: value[kept] for key, value in points.items()}
            row, column, inside = row[kept], column[kept], inside[kept]
        xyz = points["xyz"]
        spans = ((grid.x_min_m, grid.x_max_m), (grid.y_min_m, grid.y_max_m), self.config.z_range_m)
        shares = torch.stack([(xyz[:, i] - low) / (high - low) for i, (low, high) in enumerate(spans)], dim=1)
        along_x = (xyz[:, 0] - grid.x_min_m) / grid.cell_m - column - 0.5
        along_y = (xyz[:, 1] - grid.y_min_m) / grid.cell_m - row - 0.5
        rcs = (points["rcs"] - RCS_MEAN_DBSM) / RCS_STD_DBSM
        offset = torch.stack([along_x, along_y], dim=1)
        parts = [shares, rcs[:, None], points["velocity"] / 10, points["age"][:, None], offset]
        if self.config.radar_states:
            parts.append(_states(points["features"], radar.feature_names))
        num = batch * grid.ny * grid.nx
        cell = torch.where(inside, (points["sample"] * grid.ny + row) * grid.nx + column, num)
        return self.pillars(torch.cat(parts, dim=1), cell, num + 1)[:-1]


def _states(features: Tensor, names: tuple[str, ...]) -> Tensor:
    """One-hot dyn_prop, ambig_state, invalid_state and the ordinal bits of pdh0 (bit i = pdh0 > i)."""
    missing = [name for name in (*[n for n, _ in STATE_COLUMNS], "pdh0") if name not in names]
    if missing:
        raise MissingFeatureError(
            "radar_states needs radar columns that the batch lacks",
            expected=", ".join(missing),
            found=", ".join(names),
            next="ask the stream for these columns or set radar_states=false",
        )
    parts = []
    for name, count in STATE_COLUMNS:
        value = torch.nan_to_num(features[:, names.index(name)]).long().clamp(0, count - 1)
        parts.append((value[:, None] == torch.arange(count, device=value.device)).float())  # one_hot would wait for the device
    bits = torch.arange(PDH0_BITS, device=features.device)
    parts.append((features[:, names.index("pdh0"), None] > bits).float())
    return torch.cat(parts, dim=1)


class CalibrationBlock(nn.Module):
    """CRKD: three dilated 3x3 convolutions that move and spread radar evidence; receptive field 13 cells.

    init ``kaiming`` is the released one. ``residual``: ReLU(x + block(x)) with the last norm's weight 0, so that a trained
    student is unchanged at first.
    """

    def __init__(self, channels: int, init: str = "kaiming") -> None:
        super().__init__()
        self.residual = init == "residual"
        self.blocks = nn.Sequential(*[conv_norm_relu(channels, channels, dilation=2, bias=True) for _ in range(3)])
        for block in self.blocks:
            nn.init.kaiming_normal_(block[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(block[0].bias)
        if self.residual:
            nn.init.zeros_(self.blocks[-1][1].weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.blocks(x)
        inner = self.blocks[:-1](x)
        conv, norm, _ = self.blocks[-1]
        return torch.relu(x + norm(conv(inner)))
