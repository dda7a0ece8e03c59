"""Fusers: named BEV maps of one keyframe in, ``bev_fused`` (and what a method reads besides) out. All run at inference.

concat, gated (crkd: 2.4), deformable (CRN's MFA, crn: 3.4), intensity (imkd: 6), heterogeneous (adaptive_smooth: 2.2).
Also the simulated point-cloud branch of Adaptive-Smooth and the reduction over time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from imkd_models.attention import DeformableSelfAttention, cell_reference, deformable_sample, direction_bias
from imkd_models.blocks import LayerNorm2d, conv_norm_relu
from imkd_models.config import StudentConfig

__all__ = [
    "ConcatFuser",
    "DeformableFuser",
    "GatedFuser",
    "HeterogeneousFuser",
    "SimulatedRefinement",
    "SingleFuser",
    "TimeReduction",
    "build_fuser",
]

Maps = Mapping[str, Tensor]


class SingleFuser(nn.Module):
    """One branch only: 3x3 conv, norm, ReLU; or nothing at all (``plain``)."""

    def __init__(self, name: str, in_channels: int, channels: int, *, plain: bool = False) -> None:
        super().__init__()
        self.name = name
        self.mix: nn.Module = nn.Identity() if plain else conv_norm_relu(in_channels, channels)

    def forward(self, maps: Maps) -> dict[str, Tensor]:
        return {"bev_fused": self.mix(maps[self.name])}


class ConcatFuser(nn.Module):
    """Concatenation, 3x3 conv, norm, ReLU."""

    def __init__(self, names: tuple[str, str], in_channels: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.names = names
        self.mix = conv_norm_relu(sum(in_channels), channels)

    def forward(self, maps: Maps) -> dict[str, Tensor]:
        return {"bev_fused": self.mix(torch.cat([maps[name] for name in self.names], dim=1))}


class GatedFuser(nn.Module):
    """CRKD: each map times a sigmoid gate per channel and cell made from both; the gated camera map is an output."""

    def __init__(self, names: tuple[str, str], in_channels: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.names, total = names, sum(in_channels)
        self.gates = nn.ModuleList(nn.Conv2d(total, c, 3, padding=1) for c in in_channels)
        self.mix = conv_norm_relu(total, channels)

    def forward(self, maps: Maps) -> dict[str, Tensor]:
        both = [maps[name] for name in self.names]
        joined = torch.cat(both, dim=1)
        gated = [x * torch.sigmoid(gate(joined)) for x, gate in zip(both, self.gates, strict=True)]
        return {"bev_camera_gated": gated[0], "bev_fused": self.mix(torch.cat(gated, dim=1))}


class FusionAttention(nn.Module):
    """CRN's cross-attention: queries sample all maps (CRN: both modalities) at offset + reference; weights jointly over the
    maps; no output projection."""

    def __init__(self, value_channels: tuple[int, ...], channels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, len(value_channels), points
        self.values = nn.ModuleList(nn.Linear(c, channels) for c in value_channels)
        self.offsets = nn.Linear(channels, heads * self.levels * points * 2)
        self.weights = nn.Linear(channels, heads * self.levels * points)
        for value in self.values:
            nn.init.xavier_uniform_(value.weight)
            nn.init.zeros_(value.bias)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(direction_bias(heads, self.levels, points))
        self.dropout = nn.Dropout(dropout)

    def forward(self, query_BQC: Tensor, maps: tuple[Tensor, ...], gains: tuple[Tensor, ...] | None) -> Tensor:
        batch, queries, _ = query_BQC.shape
        shape = (batch, queries, self.heads, self.levels, self.points)
        weights = self.weights(query_BQC).view(batch, queries, self.heads, -1).softmax(-1).view(shape)
        ny, nx = maps[0].shape[-2:]
        reference = cell_reference(ny, nx, query_BQC.device)[None, :, None, None, None]
        locations = reference + self.offsets(query_BQC).float().view(*shape, 2)
        values = [linear(x.movedim(1, -1)).movedim(-1, 1) for linear, x in zip(self.values, maps, strict=True)]
        if gains is not None:
            values = [value * gain for value, gain in zip(values, gains, strict=True)]
        return self.dropout(deformable_sample(values, locations, weights))


class FusionLayer(nn.Module):
    """Post-norm attention and feed-forward layer."""

    def __init__(self, config: StudentConfig, value_channels: tuple[int, int]) -> None:
        super().__init__()
        c, hidden, drop = config.fused_channels, config.fuser_hidden, config.fuser_dropout
        self.attention = FusionAttention(value_channels, c, config.fuser_heads, config.fuser_points, drop)
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.expand, self.contract = nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.dropout = nn.Dropout(drop)
        for layer in (self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, query: Tensor, position: Tensor, maps: tuple[Tensor, Tensor], gains: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        query = self.norm1(query + self.attention(query + position, maps, gains))
        hidden = self.dropout(torch.relu(self.expand(query)))
        return self.norm2(query + self.dropout(self.contract(hidden)))


class DeformableFuser(nn.Module):
    """CRN's multi-modal feature aggregation; with ``intensity`` IMKD's stage 3 in front of it.

    Stage 3 predicts an intensity map from each modality (logits ``bev_intensity_camera``, ``bev_intensity_radar``), adds
    both to the query through U (zero at first) and scales the values by 1 + gate_gain * I.
    """

    def __init__(self, config: StudentConfig, in_channels: tuple[int, int], *, intensity: bool) -> None:
        super().__init__()
        c, (ny, nx) = config.fused_channels, config.grid.shape
        self.stride, self.gain, self.camera_gate = config.fuser_stride, config.gate_gain, config.camera_gate
        ny, nx = ny // self.stride, nx // self.stride
        self.norms = nn.ModuleList(LayerNorm2d(n) for n in in_channels)
        self.query = nn.Linear(sum(in_channels), c)
        nn.init.xavier_uniform_(self.query.weight)
        self.rows, self.columns = nn.Embedding(ny, c // 2), nn.Embedding(nx, c - c // 2)
        self.layers = nn.ModuleList(FusionLayer(config, in_channels) for _ in range(config.fuser_layers))
        for embedding in (self.rows, self.columns):
            nn.init.xavier_uniform_(embedding.weight)
        self.intensity = intensity
        if intensity:
            camera, radar = in_channels
            self.intensity_camera = _intensity_head(camera)
            self.intensity_radar = _intensity_head(camera + radar)
            self.intensity_query = nn.Linear(2, c, bias=False)
            nn.init.zeros_(self.intensity_query.weight)

    def forward(self, maps: Maps) -> dict[str, Tensor]:
        full = (maps["bev_camera"], maps["bev_radar"])
        if self.stride > 1:
            full = tuple(nn.functional.avg_pool2d(x, self.stride) for x in full)
        camera, radar = (norm(x) for norm, x in zip(self.norms, full, strict=True))
        batch, _, ny, nx = camera.shape
        query = self.query(torch.cat([camera, radar], dim=1).flatten(2).transpose(1, 2))
        out, gains = {}, None
        if self.intensity:
            logits = [self.intensity_camera(camera), self.intensity_radar(torch.cat([radar, camera], dim=1))]
            out = {"bev_intensity_camera": self._up(logits[0]), "bev_intensity_radar": self._up(logits[1])}
            camera_i, radar_i = (torch.sigmoid(x) for x in logits)
            query = query + self.intensity_query(torch.cat([camera_i, radar_i], dim=1).flatten(2).transpose(1, 2))
            chosen = radar_i if self.camera_gate == "radar" else camera_i
            gains = (1 + self.gain * chosen, 1 + self.gain * radar_i)
        position = self._position(ny, nx)
        for layer in self.layers:
            query = layer(query, position, (camera, radar), gains)
        return {**out, "bev_fused": self._up(query.transpose(1, 2).reshape(batch, -1, ny, nx))}

    def _position(self, ny: int, nx: int) -> Tensor:
        columns = self.columns.weight[None].expand(ny, -1, -1)
        rows = self.rows.weight[:, None].expand(-1, nx, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]

    def _up(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        return nn.functional.interpolate(x, scale_factor=self.stride, mode="bilinear", align_corners=False)


def _intensity_head(channels: int) -> nn.Sequential:
    """3x3 conv to half of the camera's 80 channels, norm, ReLU, 1x1 conv; starts at sigmoid(-4), about 0.018."""
    hidden = 40 if channels >= 80 else max(channels // 2, 8)
    head = nn.Sequential(*conv_norm_relu(channels, hidden), nn.Conv2d(hidden, 1, 1))
    nn.init.constant_(head[-1].bias, -4.0)
    return head


class HeterogeneousFuser(nn.Module):
    """Adaptive-Smooth's module: the camera map is the identity path, other evidence is only added to it.

    The evidence is the simulated map times a gate, or what deformable cross-attention with the camera map as query reads
    from the simulated map. Settings: ``sim_*`` of StudentConfig.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        channels = config.fused_channels
        self.camera = conv_norm_relu(config.camera_channels, channels)
        self.sim = conv_norm_relu(config.camera_channels, channels)
        self.attended = config.sim_added == "attended"
        if self.attended:
            self.attention = FusionAttention((channels,), channels, config.fuser_heads, config.fuser_points, 0.0)
        else:
            self.gate = nn.Conv2d(3 * channels, channels, 3, padding=1)
            nn.init.constant_(self.gate.bias, config.sim_gate_bias)
        self.add = nn.Conv2d(channels, channels, 1, bias=False)
        with torch.no_grad():
            self.add.weight.mul_(0.1)
        self.norm = nn.BatchNorm2d(channels)
        self.sim_drop = config.sim_drop

    def forward(self, maps: Maps) -> dict[str, Tensor]:
        c, p = self.camera(maps["bev_camera"]), self.sim(maps["bev_sim"])
        if self.attended:
            query = c.flatten(2).transpose(1, 2)
            added = self.attention(query, (p,), None).transpose(1, 2).reshape(c.shape)
        else:
            added = torch.sigmoid(self.gate(torch.cat([c, p, (c - p).abs()], dim=1))) * p
        if self.training and self.sim_drop:
            kept = torch.rand(len(added), 1, 1, 1, device=added.device) >= self.sim_drop
            added = added * kept
        return {"bev_fused": torch.relu(self.norm(c + self.add(added)))}


class SimulatedRefinement(nn.Module):
    """x + A(x): A is one deformable self-attention layer, or two 3x3 convolutions (the light variant)."""

    def __init__(self, channels: int, attention: str, points: int) -> None:
        super().__init__()
        if attention == "deformable":
            heads = 8 if channels % 8 == 0 else 1
            self.body: nn.Module = DeformableSelfAttention(channels, heads, points)
        else:
            self.body = nn.Sequential(conv_norm_relu(channels, channels), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TimeReduction(nn.Module):
    """Fused maps of T keyframes, newest first -> one map; with one keyframe it does not exist."""

    def __init__(self, channels: int, keyframes: int) -> None:
        super().__init__()
        self.mix = conv_norm_relu(channels * keyframes, channels)
        nn.init.xavier_uniform_(self.mix[0].weight)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.mix(torch.cat(maps, dim=1))


def build_fuser(config: StudentConfig) -> nn.Module:
    """The student's fuser; a student with one branch only needs none and gets a single 3x3 convolution."""
    camera, radar, out = config.camera_channels, config.radar_channels, config.fused_channels
    names = ("bev_camera", "bev_radar")
    if config.fuser == "heterogeneous":
        return HeterogeneousFuser(config)
    if config.sim_branch:  # plain rivals of the heterogeneous fuser read the simulated map, which holds the radar
        names, radar = ("bev_camera", "bev_sim"), camera
    elif not config.radar:
        return SingleFuser("bev_camera", camera, out, plain=config.fuser == "none")
    elif not config.camera:
        return SingleFuser("bev_radar", radar, out, plain=config.fuser == "none")
    if config.fuser == "concat":
        return ConcatFuser(names, (camera, radar), out)
    if config.fuser == "gated":
        return GatedFuser(names, (camera, radar), out)
    return DeformableFuser(config, (camera, radar), intensity=config.fuser == "intensity")
