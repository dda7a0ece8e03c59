"""DualDistill: attention-and-orthogonal alignment (AOA), multi-scale feature (MFD) and cross-head response (CRD) distillation.

Formulas, weights and thresholds: Gaeun-Kimm/DualDistill as read in dual_distill, sections 3 to 5. Everything here exists
only in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imkd_data.classes import LABEL_FROM_CLASS
from imkd_data.errors import MismatchError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.distill.align import ALIGNERS, Aoa, resized
from imkd_models.distill.base import Distiller, FrozenTeacher, Method
from imkd_models.distill.needs import HEAD, Needs
from imkd_models.distill.options import MethodOptions, option
from imkd_models.distill.terms import (
    all_mean,
    box_areas_m2,
    first_box_map,
    head_targets,
    heatmaps_at,
    normaliser,
    quality_focal,
    smooth_l1,
    stage_grid,
)
from imkd_models.head import DecodeOptions, Detections, LossOptions, decode, detection_loss, stacked_box_maps
from imkd_models.outputs import HeadMaps, Outputs

__all__ = [
    "METHOD",
    "DualDistill",
    "DualDistillOptions",
    "Regions",
    "acceptance_score",
    "cell_attention",
    "channel_attention",
    "pseudo_boxes",
    "regions",
]

NECK = "bev_neck"
# Cells and cell size of the published teacher grids, for the two size corrections of section 4.
PUBLISHED = {"bev_stage0": (65536, 0.4), "bev_stage1": (16384, 0.8), "bev_stage2": (4096, 1.6), NECK: (16384, 0.8)}
# Mean square of a unit normal after ReLU: what a normalised post-ReLU map has. The public teacher was not at hand.
REFERENCE_MEAN_SQUARE = 0.5
TEMPERATURE = 0.5
LOGIT_OF_TENTH = math.log(0.1 / 0.9)


@dataclass(frozen=True, kw_only=True)
class DualDistillOptions(MethodOptions):
    """Every switch and weight of DualDistill."""

    teacher: str = option("lidar", "who teaches: the LiDAR network, or the LiDAR-camera network", choices=("lidar", "fusion"))
    levels: tuple[str, ...] = option(
        ("bev_stage1", "bev_stage2", NECK), "maps of MFD", choices=("bev_stage0", "bev_stage1", "bev_stage2", NECK)
    )
    aligner: str = option(
        "aoa",
        "how student stages reach the teacher's grid and width",
        choices=("aoa", "attn_only", "ortho_only", "up3conv", "conv1"),
    )
    lambda_mfd: float = option(1.0, "factor on all feature terms", low=0)
    weight_fg: float = option(6e-3, "foreground", low=0)
    weight_bg: float = option(4e-2, "background", low=0)
    weight_fp: float = option(6e-2, "cells where the teacher sees objects that are not there, neck only", low=0)
    weight_sp: float = option(2.5e-3, "spatial attention, L1 of channel means", low=0)
    attention: bool = option(True, "weight cells by the attention of teacher and student")
    rescale: bool = option(True, "adapt the weights to this teacher's feature size, which the published ones do not fit")
    rescale_samples: int = option(200, "samples over which the teacher's mean square is measured, then frozen", low=1)
    lambda_crd: float = option(1.0, "weight of cross-head response distillation", low=0)
    crd_target: str = option(
        "teacher", "pseudo boxes, true boxes, or dense maps of the teacher", choices=("teacher", "gt", "dense")
    )
    tau: float = option(0.1, "temperature of pseudo box acceptance: p > sigmoid(-2.1972 tau)", low=0, high=10)
    nms: str = option("rotated", "suppression of pseudo boxes", choices=("rotated", "circle", "none"))
    nms_iou: float = option(0.2, "rotated overlap above which the weaker box falls", low=0, high=1)
    crd_box_weight: float = option(0.25, "box part of the centre-head loss", low=0)
    crd_velocity_weight: float = option(0.2, "velocity values in that box part", low=0)
    head_from_teacher: bool = option(True, "start the student's task heads from the teacher's")
    attention_heads: int = option(8, "heads of the aligner; lowered to a divisor of the width", low=1)
    softmax_scale: float = option(1.0, "factor on the attention logits (5 in ScaleKD)", low=0)
    max_tokens: int = option(2048, "grids with more cells are pooled before attention", low=1)
    skip: bool = option(False, "add the projected, up-sampled input to the aligner's output")
    norm_teacher: bool = option(False, "standardise the teacher's stage maps per channel (VkD)")
    align_corners: bool = option(True, "of the aligner's up-sampling, as published")

    @property
    def stages(self) -> tuple[str, ...]:
        """Levels that go through an aligner."""
        return tuple(n for n in self.levels if n != NECK)


def needs_for(options: DualDistillOptions) -> Needs:
    """What the active terms read."""
    needs = Needs(batch=("boxes",))
    if options.lambda_mfd > 0:
        names = (*options.levels, HEAD)
        needs += Needs(student=names, teachers={options.teacher: names})
    if options.lambda_crd > 0:
        needs += Needs(student=(NECK, HEAD), teachers={options.teacher: (NECK, HEAD)}, heads_of=(options.teacher,))
    if options.head_from_teacher:
        needs += Needs(student=(HEAD,), at_start={options.teacher: (HEAD,)})
    if options.lambda_mfd > 0 and not options.levels:
        raise RecipeError("DualDistill has no level to distil", found="levels=()", next="name levels, or set lambda_mfd=0")
    return needs


# --------------------------------------------------------------------------------------------------- multi-scale features


@dataclass(frozen=True)
class Regions:
    """Masks and cell weights of one level, all (B, 1, Y, X), float: fg, bg, fp and their a_fg, a_bg, a_fp."""

    fg: Tensor
    bg: Tensor
    fp: Tensor
    a_fg: Tensor
    a_bg: Tensor
    a_fp: Tensor


@torch.no_grad()
def regions(boxes: BoxBatch, grid: BevGrid, hallucinated_BYX: Tensor | None = None) -> Regions:
    """Foreground = cell centres in boxes; fp = hallucinated and not foreground; background = the rest (section 4)."""
    first = first_box_map(boxes, grid)
    fg = first >= 0
    fp = torch.zeros_like(fg) if hallucinated_BYX is None else hallucinated_BYX & ~fg
    bg = ~fg & ~fp
    a_fg = (grid.cell_m**2 / box_areas_m2(boxes, first).clamp(min=1e-6)).sqrt() * fg

    def share(mask: Tensor) -> Tensor:
        return mask.float() / mask.sum(dim=(1, 2), keepdim=True).clamp(min=1)

    maps = [m.float()[:, None] for m in (fg, bg, fp, a_fg, share(bg), share(fp))]
    return Regions(*maps)


def cell_attention(x_BCYX: Tensor, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """(B, 1, Y, X) softmax over cells of the mean absolute value, times the number of cells: its mean is 1."""
    a = x_BCYX.abs().mean(1).flatten(1) / temperature
    return (a.shape[1] * torch.softmax(a, dim=1)).view(len(a), 1, *x_BCYX.shape[-2:])


def channel_attention(x_BCYX: Tensor, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """(B, C, 1, 1) softmax over channels of the mean absolute value, times the number of channels."""
    a = x_BCYX.abs().mean(dim=(2, 3)) / temperature
    return (a.shape[1] * torch.softmax(a, dim=1))[..., None, None]


@torch.no_grad()
def hallucinations(head: Sequence[HeadMaps], heatmap_BKYX: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, Y, X) bool: the teacher's best score above 0.1 where the best true Gaussian is below 0.1."""
    best = torch.stack([torch.sigmoid(m.heatmap_logits_BKYX).amax(1, keepdim=True) for m in head]).amax(0)
    truth = heatmaps_at(heatmap_BKYX.amax(1, keepdim=True), shape)
    return ((heatmaps_at(best, shape) > 0.1) & (truth < 0.1))[:, 0]


# ------------------------------------------------------------------------------------------------------ cross-head response


def acceptance_score(tau: float) -> float:
    """p_min: a tempered score above 0.1 is the same as an untempered one above sigmoid(-2.1972 tau)."""
    return 1 / (1 + math.exp(-LOGIT_OF_TENTH * tau))


def _padded(detections: Sequence[Detections]) -> BoxBatch:
    def pad(name: str) -> Tensor:
        return nn.utils.rnn.pad_sequence([getattr(d, name) for d in detections], batch_first=True)

    count = torch.tensor([len(d) for d in detections], device=detections[0].score.device)
    label = pad("label").long()
    valid = torch.arange(label.shape[1], device=label.device)[None] < count[:, None]
    return BoxBatch(
        centre_m_BM3=pad("centre_m"),
        size_lwh_m_BM3=pad("size_lwh_m").clamp(0.05, 30.0),
        yaw_rad_BM=pad("yaw_rad"),
        velocity_mps_BM2=pad("velocity_mps"),
        label_BM=label,
        valid_BM=valid,
    )


@torch.no_grad()
def pseudo_boxes(head: Sequence[HeadMaps], grid: BevGrid, options: DualDistillOptions) -> BoxBatch:
    """The teacher's own detections above the acceptance score, suppressed on untempered scores; scores are dropped."""
    rule = DecodeOptions(
        nms=options.nms,
        iou=options.nms_iou,
        score_min=acceptance_score(options.tau),
        candidates=500,
        per_group=83,
        per_sample=83 * len(head),
    )
    return _padded(decode(head, grid, rule))


@torch.no_grad()
def agreement(found: BoxBatch, truth: BoxBatch, groups: Sequence[Sequence[str]] = ()) -> dict[str, Tensor]:
    """Number of pseudo boxes, and their precision and recall against truth of the same class within 2 m: of all, and of
    every group of classes, as ``pseudo_car``, ``pseudo_truck_construction_vehicle``, ... NaN: no such box to judge."""
    distance = (found.centre_m_BM3[:, :, None, :2] - truth.centre_m_BM3[:, None, :, :2].float()).norm(dim=-1)
    same = found.label_BM[:, :, None] == truth.label_BM[:, None]
    match = (distance < 2.0) & same & found.valid_BM[:, :, None] & truth.valid_BM[:, None]
    hit = match.any(2) if match.numel() else torch.zeros_like(found.valid_BM)
    caught = match.any(1) if match.numel() else torch.zeros_like(truth.valid_BM)

    def member(label_BM: Tensor, group: Sequence[str]) -> Tensor:  # numbers, no tensor of labels: a GPU would wait for its copy
        return torch.stack([label_BM == LABEL_FROM_CLASS[name] for name in group]).any(0)

    out = {}
    for group in ((), *groups):
        ours, theirs = found.valid_BM, truth.valid_BM
        if group:
            ours, theirs = ours & member(found.label_BM, group), theirs & member(truth.label_BM, group)
        count, real = ours.sum(), theirs.sum()
        end = "_".join(("", *group))
        out[f"pseudo{end}"] = count.float()
        out[f"precision{end}"] = (hit & ours).sum() / count.float()
        out[f"recall{end}"] = (caught & theirs).sum() / real.float()
    return out


def dense_response(student: Sequence[HeadMaps], teacher: Sequence[HeadMaps]) -> tuple[Tensor, Tensor]:
    """(class, box): imitation of every cell, weighted by the teacher's confidence (in the manner of CrossKD)."""
    cells, boxes = [], []
    for ours, theirs in zip(student, teacher, strict=True):
        p = torch.sigmoid(theirs.heatmap_logits_BKYX)
        weight = p.amax(1, keepdim=True)
        norm = normaliser(weight.sum())
        cells.append(quality_focal(ours.heatmap_logits_BKYX, p, exponent=1.0).sum() / norm)
        difference = smooth_l1(stacked_box_maps(ours) - stacked_box_maps(theirs), 1.0)
        boxes.append((weight * difference).sum() / norm)
    return torch.stack(cells).sum(), torch.stack(boxes).sum()


# ----------------------------------------------------------------------------------------------------------------- method


class DualDistill(Distiller):
    """Terms ``mfd_fg mfd_bg mfd_fp mfd_sp crd_heatmap crd_box``."""

    no_decay: ClassVar[tuple[str, ...]] = ("project.parametrizations.weight.original",)

    def __init__(
        self,
        options: DualDistillOptions,
        student: Mapping[str, tuple[int, int, int]],
        teacher: Mapping[str, tuple[int, int, int]],
        heads: Callable[[Tensor], tuple[HeadMaps, ...]] | None,
    ) -> None:
        super().__init__(options, needs_for(options))
        self.o = options
        object.__setattr__(self, "teacher_heads", heads)  # a bound method of a frozen teacher: never part of this module
        self.align = nn.ModuleDict()
        self.spatial = nn.ModuleDict()
        if options.lambda_mfd > 0:
            for name in options.stages:
                self.align[name] = ALIGNERS[options.aligner](student[name], teacher[name], options)
            for name in options.levels:
                self.spatial[name] = nn.Conv2d(1, 1, 3, padding=1)
                self.register_buffer(f"square_{name}", torch.zeros(()))
                self.register_buffer(f"seen_{name}", torch.zeros((), dtype=torch.long))
        if options.lambda_crd > 0 or (options.lambda_mfd > 0 and NECK in options.levels):
            self.neck = nn.Conv2d(student[NECK][0], teacher[NECK][0], 1)
            self.neck_size = teacher[NECK][1:]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, aligner in self.align.items():
            key = f"{prefix}align.{name}.position"
            if isinstance(aligner, Aoa) and key in state_dict and state_dict[key].shape != aligner.position.shape:
                raise MismatchError(
                    f"the aligner of {name} was trained on another grid; its positions do not carry over",
                    expected=str(tuple(aligner.position.shape)),
                    found=str(tuple(state_dict[key].shape)),
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def terms(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        if not (self.o.lambda_mfd > 0 or self.o.lambda_crd > 0):
            return {}
        o, teacher, out = self.o, teachers[self.o.teacher], {}
        neck = None
        if hasattr(self, "neck"):
            neck = resized(self.neck(student.features[NECK]), self.neck_size, False)
        if o.lambda_mfd > 0:
            out.update(self._features(student, teacher, neck, batch))
        if o.lambda_crd > 0:
            out.update(self._responses(neck, teacher, batch))
        return out

    def _root(self, name: str, value: Tensor) -> Tensor:
        """Square root of reference mean square / this teacher's, measured on the first samples and then frozen."""
        square, seen = getattr(self, f"square_{name}"), getattr(self, f"seen_{name}")
        if self.training and int(seen) < self.o.rescale_samples:
            count = len(value)
            fresh = all_mean(value.square().mean())
            setattr(self, f"square_{name}", (square * seen + fresh * count) / (seen + count))
            setattr(self, f"seen_{name}", seen + count)
        square = getattr(self, f"square_{name}")
        if not self.o.rescale or float(square) == 0:
            return torch.ones((), device=value.device)
        return (REFERENCE_MEAN_SQUARE / square.clamp(min=1e-8)).sqrt()

    def _target(self, name: str, value: Tensor) -> Tensor:
        if self.o.norm_teacher and name != NECK:
            mean = value.mean(dim=(0, 2, 3), keepdim=True)
            value = (value - mean) / (value.var(dim=(0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return value

    def _features(self, student: Outputs, teacher: Outputs, neck: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        o, sums = self.o, {"mfd_fg": [], "mfd_bg": [], "mfd_fp": [], "mfd_sp": []}
        truth = head_targets(batch.boxes, teacher.grid, teacher.head).heatmap_BKYX
        for name in o.levels:
            target = self._target(name, teacher.features[name])
            root = self._root(name, target)
            # Aligners of stages answer in the reference scale; the neck also feeds the teacher's head and keeps its own.
            t, s = root * target, root * neck if name == NECK else self.align[name](student.features[name])
            ghosts = hallucinations(teacher.head, truth, t.shape) if name == NECK else None
            grid = stage_grid(teacher.grid, t.shape)
            level = self._level(name, s, t, regions(batch.boxes, grid, ghosts), grid.cell_m)
            self.note(**{f"{name}_rho": root**2})
            for key, value in level.items():
                sums[key].append(value)
        return {key: o.lambda_mfd * torch.stack(values).sum() for key, values in sums.items() if values}

    def _level(self, name: str, s: Tensor, t: Tensor, r: Regions, cell_m: float) -> dict[str, Tensor]:
        o, batch = self.o, len(s)
        published_cells, published_cell_m = PUBLISHED[name]
        with torch.no_grad():
            ones = torch.ones_like(r.fg)
            attention = 0.5 * (cell_attention(t) + cell_attention(s)) if o.attention else ones
            channels = channel_attention(t)
        error = (s - t).square()
        per_cell = attention * error.sum(1, keepdim=True)
        size = cell_m / published_cell_m
        out = {
            "mfd_fg": o.weight_fg * size / batch * (r.fg * r.a_fg * per_cell).sum(),
            "mfd_bg": o.weight_bg / batch * (r.bg * r.a_bg * per_cell).sum(),
        }
        if name == NECK:
            hallucinated = attention * (channels * error).sum(1, keepdim=True)
            out["mfd_fp"] = o.weight_fp / batch * (r.fp * r.a_fp * hallucinated).sum()
        difference = t.mean(1, keepdim=True) - self.spatial[name](s.mean(1, keepdim=True))
        number = published_cells / (s.shape[-1] * s.shape[-2])
        out["mfd_sp"] = o.weight_sp * number / batch * difference.abs().sum()
        self.note(**{f"{name}_fg": r.fg.mean(), f"{name}_fp": r.fp.mean()})
        return out

    def _responses(self, neck: Tensor, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        o = self.o
        answer = self.teacher_heads(neck)
        if o.crd_target == "dense":
            cells, boxes = dense_response(answer, teacher.head)
            return {"crd_heatmap": o.lambda_crd * cells, "crd_box": o.lambda_crd * o.crd_box_weight * boxes}
        target = batch.boxes if o.crd_target == "gt" else pseudo_boxes(teacher.head, teacher.grid, o)
        if o.crd_target == "teacher":
            self.note(**agreement(target, batch.boxes, [maps.classes for maps in teacher.head]))
        rule = LossOptions(box_weight=o.crd_box_weight, velocity_weight=o.crd_velocity_weight)
        loss = detection_loss(answer, target, teacher.grid, rule)
        return {"crd_heatmap": o.lambda_crd * loss["det_heatmap"], "crd_box": o.lambda_crd * loss["det_box"]}


def heads_from_teacher(options: DualDistillOptions, student: Any, teachers: Mapping[str, FrozenTeacher]) -> list[str]:
    """Copy every task-head tensor whose name and shape match; the shared convolution is left alone.

    Raises:
        MismatchError: nothing matched.
    """
    if not options.head_from_teacher:
        return []
    theirs, ours = teachers[options.teacher].head.state_dict(), student.head.state_dict()
    names = [k for k, v in ours.items() if not k.startswith("shared") and k in theirs and theirs[k].shape == v.shape]
    if not names:
        raise MismatchError(
            "no task head of the teacher fits the student's",
            expected=", ".join(list(ours)[:4]),
            found=", ".join(list(theirs)[:4]),
            next="give both heads the same shared and branch widths, or set head_from_teacher=off",
        )
    with torch.no_grad():
        for k in names:
            ours[k].copy_(theirs[k])
    return names


def _build(options: DualDistillOptions, student: Any, teachers: Mapping[str, FrozenTeacher], grid: BevGrid) -> DualDistill:
    if options.teacher not in teachers:
        return DualDistill(options, student.feature_shapes, {}, None)
    teacher = teachers[options.teacher]
    return DualDistill(options, student.feature_shapes, teacher.feature_shapes, teacher.heads)


METHOD = Method(
    name="dual_distill",
    title="DualDistill: unified cross-modal distillation for BEV (BMVC 2025)",
    summary=(
        "A LiDAR teacher, or a LiDAR-camera one, teaches three map levels after a learned, orthogonal alignment, and its "
        "frozen head, run on the student's neck, must find the teacher's own boxes."
    ),
    options=DualDistillOptions,
    changes=lambda options: {},
    needs_for=needs_for,
    build=_build,
    twin="plain student with task heads started from the teacher, without distillation",
    twin_options={"lambda_mfd": 0.0, "lambda_crd": 0.0},
    prepare=heads_from_teacher,
    presets={
        "dual_distill": {},
        "dual_distill_published_scale": {"rescale": False},
        "mfd_only": {"lambda_crd": 0.0},
    },
)
