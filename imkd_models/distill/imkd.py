"""IMKD: intensity-aware LiDAR-to-radar, intensity-guided LiDAR(+label)-to-fused and intensity-guided fusion.

An IMKD-style reimplementation: the paper's equations were not public (imkd, section 0). Stage 3's fuser runs at inference
and is model code (``fusion.py``); here is everything that exists only in training. Stage names:
the teachers' maps on the student's own grid G0 are their ``bev_stage1``, on the twice coarser G1 ``bev_stage2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imkd_data.errors import MismatchError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch
from imkd_models.blocks import BasicBlock, cell_index, conv_norm_relu
from imkd_models.distill.base import Distiller, FrozenTeacher, Method
from imkd_models.distill.intensity import CONTROLS, FROM, NORMALISE, PART_OF, SOURCES, IntensityRule, intensity_maps
from imkd_models.distill.needs import HEAD, Needs
from imkd_models.distill.options import MethodOptions, option
from imkd_models.distill.terms import (
    all_mean,
    bernoulli_kl,
    gaussian_focal,
    head_targets,
    heatmaps_at,
    normaliser,
    quality_focal,
    weighted_square,
)
from imkd_models.head import Targets, box_values_at, stacked_box_maps
from imkd_models.outputs import HeadMaps, Outputs
from imkd_models.radar import at_key_time

__all__ = ["METHOD", "Adaptor", "Imkd", "ImkdOptions", "response_loss"]

# Student map -> teachers' map on the same grid, by receiver. Equal names do not mean equal grids.
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "merged": (("bev_fused", "bev_stage1"), ("bev_stage0", "bev_stage2")),
    "radar": (("bev_radar", "bev_stage1"),),
    "camera": (("bev_camera", "bev_stage1"),),
}


@dataclass(frozen=True, kw_only=True)
class ImkdOptions(MethodOptions):
    """Every switch and weight of IMKD. Weights are constant unless ``warmup_steps`` or ``end_step`` is set."""

    stage1: bool = option(True, "LiDAR to radar feature distillation")
    lambda_l2r: float = option(0.3, "weight of stage 1", low=0)
    stage1_partition: str = option(
        "half", "channels of bev_radar that stage 1 shapes; the rest stay free", choices=("half", "all")
    )
    stage1_evidence: bool = option(False, "halve the weight where no radar return lies within two cells")
    beta: float = option(1.0, "extra weight of stage 1 on objects", low=0)
    stage2_lidar: bool = option(True, "LiDAR to merged feature distillation")
    lambda_l2m: float = option(0.3, "weight of the LiDAR part of stage 2", low=0)
    stage2_label: bool = option(True, "label to merged feature distillation; needs a label teacher")
    lambda_lab2m: float = option(0.3, "weight of the label part of stage 2", low=0)
    eta: float = option(0.1, "weight of intensity outside objects in stage 2", low=0)
    receiver: str = option("merged", "student map that stage 2 shapes", choices=("merged", "radar", "camera"))
    partition: str = option("thirds", "thirds: label, LiDAR, free; all: both terms on all channels", choices=("thirds", "all"))
    response: str = option(
        "soft",
        "response term; labeldistill: its focal form, which only pushes scores down",
        choices=("soft", "labeldistill", "off"),
    )
    lambda_resp: float = option(1.0, "weight of the response term", low=0)
    response_box_weight: float = option(0.25, "weight of the box part inside the response term", low=0)
    response_velocity_weight: float = option(1.0, "factor of the two velocity values in that box part", low=0)
    stage3: bool = option(True, "intensity-guided fuser in the student (runs at inference)")
    stage3_supervision: bool = option(True, "teach the fuser's intensity maps from LiDAR")
    lambda_int: float = option(0.1, "weight of the intensity supervision", low=0)
    gate_gain: float = option(1.0, "gamma of the fuser's value gates", low=0)
    camera_gate: str = option("radar", "intensity that gates the camera values", choices=("radar", "camera"))
    intensity_source: str = option("reflectance", "what I_L is made of", choices=SOURCES)
    intensity_control: str = option("off", "controls that stand beside every intensity result", choices=CONTROLS)
    intensity_from: str = option("planes", "exact fine planes, the stored view, or LiDAR points", choices=FROM)
    rho: float = option(0.2, "I_L of an occupied cell without reflectance", low=0, high=1)
    intensity_max_share: float = option(0.5, "share of the maximum against the mean reflectance", low=0, high=1)
    intensity_full_scale: float = option(255.0, "planes: reflectance of the sensor that counts as 1", low=1e-6)
    intensity_normalise: str = option("none", "max: divide I_L by its maximum in each sample", choices=NORMALISE)
    intensity_threshold: float = option(0.0, "set I_L below this to 0", low=0, high=1)
    intensity_top_fraction: float = option(1.0, "keep only this share of the occupied cells", low=0, high=1)
    warmup_steps: int = option(0, "optimiser steps of a linear warm-up of all terms but the intensity supervision", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage3_supervision and not self.stage3 and self.lambda_int > 0:
            raise RecipeError(
                "stage3_supervision teaches the stage 3 fuser", found="stage3 off", next="set stage3_supervision=off"
            )
        if self.intensity_control != "off" and self.intensity_source == "none":
            raise RecipeError(
                "there is no intensity map to control", found="intensity_source=none", next="set intensity_control=off"
            )
        if self.intensity_control == "occupancy" and self.intensity_source not in ("reflectance", "mix"):
            raise RecipeError(
                "intensity_control=occupancy replaces reflectance values",
                expected="intensity_source=reflectance or mix",
                found=f"intensity_source={self.intensity_source}",
            )

    @property
    def rule(self) -> IntensityRule:
        """How I_L is made."""
        return IntensityRule(
            source=self.intensity_source,
            control=self.intensity_control,
            taken_from=self.intensity_from,
            rho=self.rho,
            max_share=self.intensity_max_share,
            full_scale=self.intensity_full_scale,
            normalise=self.intensity_normalise,
            threshold=self.intensity_threshold,
            top_fraction=self.intensity_top_fraction,
        )

    @property
    def neighbours(self) -> tuple[str, ...]:
        """``teacher_sample=other`` and ``intensity_control=other_sample``."""
        own = ("intensity_control=other_sample",) if self.intensity_control == "other_sample" else ()
        return (*super().neighbours, *own)

    @property
    def active(self) -> tuple[str, ...]:
        """Terms that are on, by log name."""
        on = {
            "l2r": self.stage1 and self.lambda_l2r > 0,
            "l2m": self.stage2_lidar and self.lambda_l2m > 0,
            "lab2m": self.stage2_label and self.lambda_lab2m > 0,
            "resp": self.response != "off" and self.lambda_resp > 0,
            "int": self.stage3_supervision and self.lambda_int > 0 and self.intensity_source != "none",
        }
        return tuple(name for name, value in on.items() if value)

    @property
    def intensity_maps_of(self) -> tuple[str, ...]:
        """LiDAR teacher maps whose grids I_L is wanted on."""
        names = ["bev_stage1"] if {"l2r", "int"} & set(self.active) else []
        if "l2m" in self.active:
            names += [teacher for _, teacher in PAIRS[self.receiver]]
        return tuple(dict.fromkeys(names)) if self.intensity_source != "none" else ()


def needs_for(options: ImkdOptions) -> Needs:
    """What the active terms read."""
    needs = Needs(batch=("boxes",))
    pairs = PAIRS[options.receiver]
    own, theirs = tuple(s for s, _ in pairs), tuple(t for _, t in pairs)
    for term in options.active:
        if term == "l2r":
            needs += Needs(student=("bev_radar",), teachers={"lidar": ("bev_stage1",)})
            if options.stage1_evidence:
                needs += Needs(batch=("radar_points",))
        elif term == "l2m":
            needs += Needs(student=own, teachers={"lidar": theirs})
        elif term == "lab2m":
            needs += Needs(student=own, teachers={"label": theirs})
        elif term == "resp":
            needs += Needs(student=(HEAD,), teachers={"lidar": (HEAD,)})
        else:
            needs += Needs(student=("bev_intensity_camera", "bev_intensity_radar"))
    wanted = options.intensity_maps_of
    if wanted:
        if options.rule.reads_lidar:
            needs += Needs(batch=(PART_OF[options.intensity_from],))
        extra = (HEAD,) if options.intensity_source == "heatmap" else ()
        needs += Needs(teachers={"lidar": (*wanted, *extra)})
    if needs.student and HEAD not in needs.student and set(options.active) & {"l2r", "l2m", "lab2m"}:
        needs += Needs(student=(HEAD,))  # the class groups of the ground-truth heat maps
    return needs


class Adaptor(nn.Sequential):
    """3x3 convolution with replicated border -> BatchNorm -> ReLU -> residual block; lives in the distiller only."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            *conv_norm_relu(in_channels, out_channels, bias=True, padding_mode="replicate"),
            BasicBlock(out_channels, out_channels),
        )


def response_loss(
    student: tuple[HeadMaps, ...],
    teacher: tuple[HeadMaps, ...],
    truth: Targets,
    *,
    form: str = "soft",
    box_weight: float = 0.25,
    velocity_weight: float = 1.0,
) -> Tensor:
    """Response term at and around ground truth (imkd, section 5): t = sigmoid(teacher) x Gaussian.

    soft: |t - p|^2 BCE(p, t) over the number of peaks. labeldistill: Gaussian focal with target t, which is never 1.
    Plus L1 between the ten box values of student and teacher at the true centres, velocity times velocity_weight.
    """
    total, first = [], 0
    scale = truth.values_BMD.new_ones(10)
    scale[8:] = velocity_weight
    for ours, theirs in zip(student, teacher, strict=True):
        count = len(ours.classes)
        gaussian = truth.heatmap_BKYX[:, first : first + count]
        target = torch.sigmoid(theirs.heatmap_logits_BKYX) * gaussian
        if form == "soft":
            cells = quality_focal(ours.heatmap_logits_BKYX, target)
        else:
            cells = gaussian_focal(ours.heatmap_logits_BKYX, target.clamp(1e-4, 1 - 1e-4))
        peaks = normaliser((gaussian == 1).sum().float())
        mine = truth.valid_BM & (truth.channel_BM >= first) & (truth.channel_BM < first + count)
        a = box_values_at(stacked_box_maps(ours), truth.row_BM, truth.column_BM)
        b = box_values_at(stacked_box_maps(theirs), truth.row_BM, truth.column_BM)
        box = torch.where(mine[..., None], (a - b).abs() * scale, 0.0).sum() / normaliser(mine.sum().float())
        total.append(cells.sum() / peaks + box_weight * box)
        first += count
    return torch.stack(total).sum()


class Imkd(Distiller):
    """The training part of IMKD: adaptors, intensity weights, five terms ``l2r l2m lab2m resp int``."""

    def __init__(
        self,
        options: ImkdOptions,
        student: Mapping[str, tuple[int, int, int]],
        teachers: Mapping[str, Mapping[str, tuple[int, int, int]]],
        grid: BevGrid,
    ) -> None:
        super().__init__(options, needs_for(options), warmup_steps=options.warmup_steps)
        self.warmup_exempt = ("int",)
        self.o, self.grid = options, grid
        self.parts: dict[str, slice] = {}
        self.adaptors = nn.ModuleDict()
        if "l2r" in options.active:
            channels = student["bev_radar"][0]
            used = channels // 2 if options.stage1_partition == "half" else channels
            self._pair("l2r", student, "bev_radar", teachers["lidar"], "bev_stage1", slice(0, used))
        for mine, theirs in PAIRS[options.receiver]:
            for term, teacher, third in (("lab2m", "label", 0), ("l2m", "lidar", 1)):
                if term in options.active:
                    channels = student[mine][0]
                    part = slice(third * (channels // 3), (third + 1) * (channels // 3))
                    part = part if options.partition == "thirds" else slice(0, channels)
                    self._pair(f"{term}_{mine}", student, mine, teachers[teacher], theirs, part)

    def _pair(
        self,
        key: str,
        student: Mapping[str, tuple[int, int, int]],
        mine: str,
        teacher: Mapping[str, tuple[int, int, int]],
        theirs: str,
        part: slice,
    ) -> None:
        a, b = student[mine], teacher[theirs]
        if a[1:] != b[1:]:
            raise MismatchError(
                f"IMKD pairs student {mine} with teacher {theirs}, which must share a grid",
                expected=f"{a[1]}x{a[2]}",
                found=f"{b[1]}x{b[2]}",
                next="use a teacher with bev_stage1 on the student's grid and bev_stage2 twice as coarse",
            )
        self.parts[key] = part
        self.adaptors[key] = Adaptor(part.stop - part.start, b[0])

    def adapted(self, key: str, feature: Tensor) -> Tensor:
        """The partition of a student map, brought to the teacher's width."""
        return self.adaptors[key](feature[:, self.parts[key]])

    def terms(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        o, active, out = self.o, self.o.active, {}
        lidar = teachers.get("lidar")
        intensity: dict[str, Tensor] = {}
        if o.intensity_maps_of and lidar is not None:
            wanted = {n: lidar.features[n] for n in o.intensity_maps_of}
            intensity = intensity_maps(batch, wanted, lidar.head, o.rule)
            self.note(**{f"intensity_{n}": v.mean() for n, v in intensity.items()})
        truth = head_targets(batch.boxes, student.grid, student.head) if student.head else None
        if "l2r" in active:
            raw = self._stage1(student.features["bev_radar"], lidar.features["bev_stage1"], truth, intensity, batch)
            out["l2r"] = o.lambda_l2r * raw
        if "l2m" in active:
            out["l2m"] = o.lambda_l2m * self._stage2("l2m", student, lidar, truth, intensity)
        if "lab2m" in active:
            out["lab2m"] = o.lambda_lab2m * self._stage2("lab2m", student, teachers["label"], truth, intensity)
        if "resp" in active:
            weights = {"box_weight": o.response_box_weight, "velocity_weight": o.response_velocity_weight}
            out["resp"] = o.lambda_resp * response_loss(student.head, lidar.head, truth, form=o.response, **weights)
        if "int" in active:
            out["int"] = o.lambda_int * self._supervision(student, intensity["bev_stage1"])
        return out

    def _stage1(self, radar: Tensor, target: Tensor, truth: Targets, intensity: Mapping[str, Tensor], batch: Batch) -> Tensor:
        shape = target.shape[-2:]
        best = heatmaps_at(truth.heatmap_BKYX, shape).amax(1, keepdim=True)
        weight = intensity.get("bev_stage1", torch.ones_like(best)) * (1 + self.o.beta * best)
        if self.o.stage1_evidence:
            weight = weight * self._evidence(batch, shape)
        self.note(weight_l2r=weight.mean())
        return weighted_square(self.adapted("l2r", radar), target, weight)

    def _evidence(self, batch: Batch, shape: torch.Size) -> Tensor:
        """1 within two cells of a radar return of the current keyframe, moved to the key time as the encoders move it, else
        0.5; (B, 1, Y, X)."""
        grid = self.grid
        seen = torch.zeros(len(batch), grid.ny, grid.nx, device=batch.bev_from_ego_B44.device)
        if batch.radar is not None and len(batch.radar.xyz_m):
            radar = at_key_time(batch.radar, slot=0)
            row, column, inside = cell_index(radar["xyz"][:, :2], grid)
            use = inside & radar["use"]
            seen[radar["sample"][use], row[use], column[use]] = 1.0
        near = F.max_pool2d(seen[:, None], 5, stride=1, padding=2)
        return 0.5 + 0.5 * F.adaptive_max_pool2d(near, tuple(shape))

    def _stage2(self, term: str, student: Outputs, teacher: Outputs, truth: Targets, intensity: Mapping[str, Tensor]) -> Tensor:
        eta = 0.0 if self.o.intensity_source == "none" else self.o.eta
        total = []
        for mine, theirs in PAIRS[self.o.receiver]:
            target = teacher.features[theirs]
            objects = heatmaps_at(truth.heatmap_BKYX.sum(1, keepdim=True), target.shape)
            if term == "lab2m":
                weight = (objects > 0).float()
            else:
                strength = intensity.get(theirs, torch.zeros_like(objects))
                weight = objects * (1 + strength) + eta * strength
            self.note(**{f"weight_{term}_{mine}": weight.mean()})
            total.append(weighted_square(self.adapted(f"{term}_{mine}", student.features[mine]), target, weight))
        return torch.stack(total).sum()

    def _supervision(self, student: Outputs, target: Tensor) -> Tensor:
        weight = torch.where(target > 0.1, 1.0, 0.1)
        loss = torch.zeros_like(target)
        for name in ("bev_intensity_radar", "bev_intensity_camera"):
            logits = student.features[name]
            if logits.shape[-2:] != target.shape[-2:]:
                raise MismatchError(
                    f"{name} and I_L lie on different grids", expected=str(target.shape), found=str(logits.shape)
                )
            loss = loss + bernoulli_kl(target, logits)
        return (weight * loss).sum() / all_mean(weight.sum())


def _changes(options: ImkdOptions) -> dict[str, Any]:
    if not options.stage3:
        return {}
    return {"fuser": "intensity", "gate_gain": options.gate_gain, "camera_gate": options.camera_gate}


def _build(options: ImkdOptions, student: Any, teachers: Mapping[str, FrozenTeacher], grid: BevGrid) -> Imkd:
    return Imkd(options, student.feature_shapes, {n: t.feature_shapes for n, t in teachers.items()}, grid)


METHOD = Method(
    name="imkd",
    title="IMKD: intensity-aware multi-level knowledge distillation (WACV 2026), our reading",
    summary=(
        "LiDAR features teach the radar map, LiDAR and label features teach the fused map, cached LiDAR reflectance weights "
        "both and teaches the fuser where to look."
    ),
    options=ImkdOptions,
    changes=_changes,
    needs_for=needs_for,
    build=_build,
    twin="stage 3 student without supervision",
    twin_options={
        "lambda_l2r": 0.0,
        "lambda_l2m": 0.0,
        "lambda_lab2m": 0.0,
        "lambda_resp": 0.0,
        "lambda_int": 0.0,
    },
    presets={
        "imkd_r50": {},
        "labeldistill_on_merged": {
            "stage1": False,
            "stage3": False,
            "stage3_supervision": False,
            "intensity_source": "none",
            "eta": 0.0,
        },
    },
)
