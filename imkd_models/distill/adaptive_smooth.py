"""Adaptive-Smooth: discrepancy-driven smooth alignment (ASD) and soft-weighted response distillation (SRD).

Only the paper's abstract is public, so every equation here is our reading of it (adaptive_smooth, section 10). The
simulated branch and the heterogeneous fusion module run at inference and are model code; here are the alignment
layers, the running statistics of the discrepancy and the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imkd_data.classes import LABEL_FROM_CLASS
from imkd_data.errors import MismatchError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.blocks import conv_norm_relu
from imkd_models.distill.base import Distiller, FrozenTeacher, Method
from imkd_models.distill.needs import HEAD, Needs
from imkd_models.distill.options import MethodOptions, option
from imkd_models.distill.terms import all_sum, head_targets, heatmaps_at, normaliser, quality_focal, smooth_l1
from imkd_models.head import stacked_box_maps
from imkd_models.outputs import HeadMaps, Outputs

__all__ = [
    "METHOD",
    "AdaptiveSmooth",
    "AdaptiveSmoothOptions",
    "Alignment",
    "lose_simulated",
    "response_weights",
    "soft_response",
]

EPSILON = 1e-6
NEAR_M = 2.0


@dataclass(frozen=True, kw_only=True)
class AdaptiveSmoothOptions(MethodOptions):
    """Every switch and weight of our reading of Adaptive-Smooth."""

    lambda_l2c: float = option(1.0, "weight of LiDAR to camera alignment", low=0)
    l2c: str = option("sim", "student map of that alignment: simulated or plain camera map", choices=("sim", "camera"))
    lambda_m2m: float = option(1.0, "weight of fusion to fusion alignment", low=0)
    m2m_mask: str = option(
        "soft", "cells of that alignment: 0.1 + 0.9 objects, all, objects", choices=("soft", "ones", "objects")
    )
    pixel_loss: str = option(
        "asd", "adaptive smooth L1, plain smooth L1 (beta 1), or squared error", choices=("asd", "smooth_l1", "mse")
    )
    granularity: bool = option(False, "reading R2: choose a smoothing window a cell instead of a knee")
    eta: float = option(0.5, "how far the knee follows a cell's discrepancy; 0 gives one knee a level", low=0, high=1)
    beta_min: float = option(1e-2, "smallest knee: the pressure fades once maps agree this well", low=0)
    beta_max: float = option(1.0, "largest knee", low=1e-6)
    beta_rule: str = option("tanh", "variance: beta = mean minus variance of the discrepancy", choices=("tanh", "variance"))
    huber: bool = option(False, "multiply the loss by the knee")
    momentum: float = option(0.9, "of the running scale, mean and spread, an optimiser step", low=0, high=0.999999)
    lambda_srd: float = option(0.25, "weight of soft-weighted response distillation", low=0)
    quality: str = option("conf_gt", "what makes a teacher cell worth imitating", choices=("conf_gt", "conf", "label", "none"))
    alpha: float = option(0.5, "share of confidence against nearness to truth", low=0, high=1)
    q_min: float = option(0.1, "teacher cells below this confidence are ignored", low=0, high=1)
    fp_tail: float = option(0.0, "extra weight on confident student cells without any truth", low=0)
    velocity_weight: float = option(0.2, "factor of the two velocity values", low=0)
    simulated_branch: bool = option(True, "simulated point branch in the student (runs at inference)")
    fuser: str = option("heterogeneous", "fusion of camera and simulated maps", choices=("heterogeneous", "concat", "gated"))
    teacher: str = option(
        "fusion", "lidar: a LiDAR-only teacher, whose neck l2c reads; only with lambda_m2m 0", choices=("fusion", "lidar")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_min > self.beta_max:
            raise RecipeError("beta_min above beta_max", expected=f"at most {self.beta_max}", found=str(self.beta_min))
        if self.teacher == "lidar" and self.lambda_m2m > 0:
            raise RecipeError(
                "fusion to fusion alignment needs a LiDAR-camera teacher",
                found="teacher=lidar",
                next="set lambda_m2m=0 or teacher=fusion",
            )

    @property
    def lidar_map(self) -> str:
        """The teacher's LiDAR map that ``l2c`` aligns with."""
        return "bev_lidar" if self.teacher == "fusion" else "bev_neck"


def needs_for(options: AdaptiveSmoothOptions) -> Needs:
    """What the active terms read."""
    needs, name = Needs(batch=("boxes",)), options.teacher
    if options.lambda_l2c > 0:
        needs += Needs(student=(f"bev_{options.l2c}", HEAD), teachers={name: (options.lidar_map,)})
    if options.lambda_m2m > 0:
        needs += Needs(student=("bev_fused", HEAD), teachers={name: ("bev_fused",)})
    if options.lambda_srd > 0:
        needs += Needs(student=(HEAD,), teachers={name: (HEAD,)})
    return needs


class Alignment(nn.Module):
    """ASD(S, T; M) with its running statistics (adaptive_smooth, sections 3.2 and 3.3); one module a distilled pair.

    Buffers: scale (C,) r of the teacher, mean and spread of the discrepancy, started. They change only in training, are
    saved, and follow sums over all devices; every device takes part in the collectives in every call.
    """

    def __init__(self, channels: int, options: AdaptiveSmoothOptions) -> None:
        super().__init__()
        self.o = options
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("spread", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.diagnostics: dict[str, Tensor] = {}
        self.micro_batches = 1  # of an optimiser step, over which the momentum is meant

    def _follow(self, name: str, value: Tensor) -> None:
        old = getattr(self, name)
        m = torch.where(self.started, self.o.momentum ** (1 / self.micro_batches), 0.0)
        setattr(self, name, m * old + (1 - m) * value.detach())

    def used_scale(self) -> Tensor:
        """(1, C, 1, 1): dead teacher channels get a lower bound instead of dividing by nothing."""
        return torch.maximum(self.scale, 0.05 * self.scale.mean())[None, :, None, None].clamp(min=1e-12)

    def knee(self, d_B1YX: Tensor) -> Tensor:
        """beta (B, 1, Y, X) from the discrepancy, between beta_min and beta_max."""
        o = self.o
        if o.beta_rule == "variance":
            return (self.mean - self.spread**2).clamp(1e-3, o.beta_max).expand_as(d_B1YX)
        relative = torch.tanh((d_B1YX - self.mean) / (self.spread + EPSILON))
        return (self.mean * (1 + o.eta * relative)).clamp(max(o.beta_min, 1e-12), o.beta_max)

    def forward(self, student: Tensor, teacher: Tensor, mask_B1YX: Tensor) -> Tensor:
        """The loss; 0 with zero gradient where the maps are equal, 0 and no change of buffers where the mask is empty."""
        weight = all_sum(mask_B1YX.sum())
        live = bool(weight > 0)  # decided on the global sum, so that all devices agree
        if self.training:
            squares = all_sum(teacher.square().sum(dim=(0, 2, 3)))
            cells = all_sum(torch.tensor(float(teacher[:, 0].numel()), device=teacher.device))
            if live:
                self._follow("scale", (squares / cells).sqrt())
        r = self.used_scale()
        difference = (student - teacher) / r
        d = difference.detach().abs().mean(1, keepdim=True)
        if self.training:
            self._update(d, mask_B1YX, weight, live)
        if self.o.granularity:
            cell_loss = self._windows(student / r, teacher / r, d)
        else:
            cell_loss = self._pixel(difference, student - teacher, d)
        return (mask_B1YX * cell_loss).sum() / normaliser(mask_B1YX.sum())

    def _update(self, d: Tensor, mask: Tensor, weight: Tensor, live: bool) -> None:
        mean = all_sum((mask * d).sum()) / weight.clamp(min=EPSILON)
        variance = all_sum((mask * (d - mean) ** 2).sum()) / weight.clamp(min=EPSILON)
        if live:
            self._follow("mean", mean)
            self._follow("spread", variance.sqrt())
            self.started = torch.ones_like(self.started)

    def _pixel(self, difference: Tensor, raw: Tensor, d: Tensor) -> Tensor:
        if self.o.pixel_loss == "mse":
            return raw.square().mean(1, keepdim=True)
        beta = torch.ones_like(d) if self.o.pixel_loss == "smooth_l1" else self.knee(d)
        with torch.no_grad():
            clipped = (beta <= self.o.beta_min) | (beta >= self.o.beta_max)
            self.diagnostics = {
                "mean": self.mean,
                "spread": self.spread,
                "beta": beta.mean(),
                "clipped": clipped.float().mean(),
            }
        loss = smooth_l1(difference, beta)
        if self.o.huber:
            loss = loss * beta
        return loss.mean(1, keepdim=True)

    def window_shares(self, d: Tensor) -> Tensor:
        """(B, 3, Y, X) shares of the windows 1, 3, 5: fine where the maps agree, coarse where they differ."""
        delta = torch.sigmoid((d - self.mean) / (self.spread + EPSILON))
        centres = torch.tensor([0.0, 0.5, 1.0], device=d.device)[None, :, None, None]
        return torch.softmax(-((delta - centres) ** 2) / 0.05, dim=1)

    def _windows(self, student: Tensor, teacher: Tensor, d: Tensor) -> Tensor:
        shares = self.window_shares(d)
        losses = []
        for k in (1, 3, 5):
            difference = F.avg_pool2d(student - teacher, k, stride=1, padding=k // 2, count_include_pad=False)
            losses.append(smooth_l1(difference, 1.0).mean(1, keepdim=True))
        return (shares * torch.cat(losses, dim=1)).sum(1, keepdim=True)


def _nearness(teacher: HeadMaps, use_BYX: Tensor, boxes: BoxBatch, grid: BevGrid) -> Tensor:
    """kappa (B, Y, X): exp(-distance / 2 m) from a teacher cell's decoded centre to the nearest true box of the group,
    0 beyond 2 m, without boxes, and where not asked for."""
    out = torch.zeros(use_BYX.shape, device=use_BYX.device)
    labels = torch.tensor([LABEL_FROM_CLASS[name] for name in teacher.classes], device=use_BYX.device)
    mine = boxes.valid_BM & torch.isin(boxes.label_BM, labels)
    if mine.shape[1] == 0:
        return out
    truth = torch.where(mine[..., None], boxes.centre_m_BM3[..., :2].float(), torch.inf)
    b, row, column = use_BYX.nonzero(as_tuple=True)
    offset = teacher.offset_cells_B2YX[b, :, row, column]
    low = offset.new_tensor([grid.x_min_m, grid.y_min_m])
    centre = (torch.stack([column, row], dim=1) + offset) * grid.cell_m + low
    step = 1 << 16
    for i in range(0, len(b), step):
        part = slice(i, i + step)
        distance = (centre[part, None] - truth[b[part]]).norm(dim=-1).amin(1)
        value = torch.where(distance < NEAR_M, torch.exp(-distance / NEAR_M), 0.0)
        out[b[part], row[part], column[part]] = value
    return out


def response_weights(
    teacher: HeadMaps, gaussian_BKYX: Tensor, boxes: BoxBatch, grid: BevGrid, options: AdaptiveSmoothOptions
) -> Tensor:
    """w (B, 1, Y, X): quality of the teacher's answer; exactly 0 where its confidence is below q_min."""
    confidence = torch.sigmoid(teacher.heatmap_logits_BKYX).amax(1)
    use = confidence >= options.q_min
    if options.quality == "none":
        weight = torch.ones_like(confidence)
    elif options.quality == "conf":
        weight = confidence
    elif options.quality == "label":
        weight = gaussian_BKYX.amax(1) * confidence
    else:
        near = _nearness(teacher, use, boxes, grid)
        weight = confidence**options.alpha * near ** (1 - options.alpha)
    return torch.where(use, weight, 0.0)[:, None]


def soft_response(
    student: HeadMaps, teacher: HeadMaps, gaussian_BKYX: Tensor, weight_B1YX: Tensor, options: AdaptiveSmoothOptions
) -> tuple[Tensor, Tensor]:
    """(class, box) response loss of one class group under ``response_weights`` (adaptive_smooth, section 4)."""
    weight = weight_B1YX
    with torch.no_grad():
        norm = normaliser(weight.sum())
        q = torch.sigmoid(teacher.heatmap_logits_BKYX)
        q = q * gaussian_BKYX if options.quality == "label" else q
        p = torch.sigmoid(student.heatmap_logits_BKYX)
        tail = options.fp_tail * ((gaussian_BKYX == 0) & (p > 0.1)).float()
    cells = ((weight + tail) * quality_focal(student.heatmap_logits_BKYX, q)).sum() / norm
    difference = smooth_l1(stacked_box_maps(student) - stacked_box_maps(teacher), 1 / 9)
    scale = difference.new_ones(10)
    scale[8:] = options.velocity_weight
    box = (weight * (difference * scale[None, :, None, None]).mean(1, keepdim=True)).sum() / norm
    return cells, box


class AdaptiveSmooth(Distiller):
    """The training part of Adaptive-Smooth: terms ``l2c m2m srd_class srd_box``."""

    def __init__(
        self,
        options: AdaptiveSmoothOptions,
        student: Mapping[str, tuple[int, int, int]],
        teacher: Mapping[str, tuple[int, int, int]],
    ) -> None:
        super().__init__(options, needs_for(options))
        self.o = options
        self.align = nn.ModuleDict()
        self.bring = nn.ModuleDict()
        if options.lambda_l2c > 0:
            channels = teacher[options.lidar_map][0]
            self.bring["l2c"] = conv_norm_relu(student[f"bev_{options.l2c}"][0], channels)
            self.align["l2c"] = Alignment(channels, options)
        if options.lambda_m2m > 0:
            ours, theirs = student["bev_fused"][0], teacher["bev_fused"][0]
            self.bring["m2m"] = nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1)
            self.align["m2m"] = Alignment(theirs, options)

    def terms(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        if not self.needs.teachers:
            return {}
        o, teacher, out = self.o, teachers[self.o.teacher], {}
        truth = head_targets(batch.boxes, student.grid, student.head)
        objects = truth.heatmap_BKYX.sum(1, keepdim=True).clamp(max=1)
        if o.lambda_l2c > 0:
            theirs = teacher.features[o.lidar_map]
            out["l2c"] = o.lambda_l2c * self._aligned("l2c", student.features[f"bev_{o.l2c}"], theirs, objects)
        if o.lambda_m2m > 0:
            mask = {"soft": 0.1 + 0.9 * objects, "ones": torch.ones_like(objects), "objects": objects}[o.m2m_mask]
            out["m2m"] = o.lambda_m2m * self._aligned("m2m", student.features["bev_fused"], teacher.features["bev_fused"], mask)
        if o.lambda_srd > 0:
            out.update(self._response(student, teacher, truth.heatmap_BKYX, batch.boxes))
        return out

    def _aligned(self, key: str, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        if teacher.shape[-2:] != student.shape[-2:]:  # same metres (checked), other cells: the student's grid wins
            teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
        self.align[key].micro_batches = self.micro_batches
        loss = self.align[key](self.bring[key](student), teacher, heatmaps_at(mask, student.shape))
        self.note(**{f"{key}_{n}": v for n, v in self.align[key].diagnostics.items()})
        return loss

    def _response(self, student: Outputs, teacher: Outputs, heatmap: Tensor, boxes: BoxBatch) -> dict[str, Tensor]:
        cells, values, near, first = [], [], [], 0
        for ours, theirs in zip(student.head, teacher.head, strict=True):
            if ours.heatmap_logits_BKYX.shape != theirs.heatmap_logits_BKYX.shape:
                raise MismatchError(
                    "response distillation compares head maps cell by cell",
                    expected=str(tuple(ours.heatmap_logits_BKYX.shape)),
                    found=str(tuple(theirs.heatmap_logits_BKYX.shape)),
                )
            count = len(ours.classes)
            truth = heatmap[:, first : first + count]
            with torch.no_grad():
                weight = response_weights(theirs, truth, boxes, student.grid, self.o)
                near.append(torch.stack([weight.sum(), (weight * (truth.amax(1, keepdim=True) > 0)).sum()]))
            cell, box = soft_response(ours, theirs, truth, weight, self.o)
            cells.append(cell)
            values.append(box)
            first += count
        total, on_objects = torch.stack(near).sum(0)
        self.note(srd_weight=total, srd_precision=on_objects / total)  # NaN, and so not logged, where nothing is imitated
        w = self.o.lambda_srd
        return {"srd_class": w * torch.stack(cells).sum(), "srd_box": w * torch.stack(values).sum()}


def _changes(options: AdaptiveSmoothOptions) -> dict[str, Any]:
    return {"sim_branch": True, "fuser": options.fuser} if options.simulated_branch else {}


def _build(
    options: AdaptiveSmoothOptions, student: Any, teachers: Mapping[str, FrozenTeacher], grid: BevGrid
) -> AdaptiveSmooth:
    shapes = teachers[options.teacher].feature_shapes if options.teacher in teachers else {}
    return AdaptiveSmooth(options, student.feature_shapes, shapes)


def lose_simulated(model: nn.Module, becomes: str) -> None:
    """From now on the simulated map (B, C, Y, X) of this network is 0, or noise with each channel's mean and spread in the
    batch; drawn from a fixed seed, call by call."""
    noise = torch.Generator().manual_seed(0)

    def replaced(module: nn.Module, inputs: Any, sim_BCYX: Tensor) -> Tensor:
        if becomes == "zeros":
            return torch.zeros_like(sim_BCYX)
        spread, mean = torch.std_mean(sim_BCYX, dim=(0, 2, 3), keepdim=True)
        return mean + spread * torch.randn(sim_BCYX.shape, generator=noise).to(sim_BCYX)

    model.sim.register_forward_hook(replaced)  # type: ignore[union-attr]


METHOD = Method(
    name="adaptive_smooth",
    title="Adaptive-Smooth distillation (AAAI 2026), our reading of its abstract",
    summary=(
        "A LiDAR-camera teacher teaches a student with a simulated point branch: alignment is strict where the maps agree and "
        "tolerant where they differ, and only the teacher's confident answers near truth are imitated."
    ),
    options=AdaptiveSmoothOptions,
    changes=_changes,
    needs_for=needs_for,
    build=_build,
    twin="two-branch student with heterogeneous fusion, without distillation",
    twin_options={"lambda_l2c": 0.0, "lambda_m2m": 0.0, "lambda_srd": 0.0},
    presets={
        "adaptive_smooth": {},
        "simdistill_like": {"pixel_loss": "mse", "lambda_srd": 0.0},
    },
)
