"""CRKD: cross-stage radar, mask-scaling feature, relation and response distillation from a LiDAR-camera teacher.

Formulas and released values: Song-Jingyu/CRKD as read in crkd, section 4. The gated fuser and the radar calibration block
run at inference and are model code; here are the activation convolution, the relation adapters and the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imkd_data.errors import MismatchError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.distill.base import Distiller, FrozenTeacher, Method
from imkd_models.distill.needs import HEAD, Needs
from imkd_models.distill.options import MethodOptions, option
from imkd_models.distill.terms import (
    grown_sizes,
    half_square_on_mask,
    head_targets,
    quality_focal,
    released_rectangle_mask,
    require_all_finite,
    rotated_mask,
    similarity,
    smooth_l1,
)
from imkd_models.head import stacked_box_maps
from imkd_models.outputs import HeadMaps, Outputs
from imkd_models.presets import build_model

__all__ = ["METHOD", "Crkd", "CrkdOptions", "RelationAdapter", "group_weight", "heatmap_target", "object_mask", "relation_loss"]

STATIC_CLASSES = frozenset({"barrier", "traffic_cone"})
ALTER_TEACHER = frozenset({"teacher_backbone_reset", "teacher_batch_statistics", "half_points"})  # so it has to run
DEFECTS: tuple[str, ...] = (
    "teacher_backbone_reset",
    "teacher_batch_statistics",
    "three_corner_mask",
    "grid_axis_speed",
    "divide_by_batch",
    "nan_from_student",
    "lowered_box_threshold",
    "half_points",
)


@dataclass(frozen=True, kw_only=True)
class CrkdOptions(MethodOptions):
    """Every switch and weight of CRKD. ``defects`` re-creates released behaviour, to measure what it costs."""

    lambda_resp: float = option(1.0, "weight of response distillation", low=0)
    group_weights: str = option(
        "dynamic",
        "class groups: 2 for dynamic and 1 for static ones, the reverse, or 1",
        choices=("dynamic", "static", "uniform"),
    )
    group_weight_by_name: Mapping[str, float] = option(
        {}, "explicit weights, e.g. {'truck+construction_vehicle': 2}; all groups", low=0
    )
    velocity_weight: float = option(1.0, "factor of the two velocity values in the response boxes", low=0)
    lambda_csrd: float = option(100.0, "weight of cross-stage radar distillation", low=0)
    csrd_target: str = option(
        "class_mean",
        "what the radar activation imitates; task_logit_mean is the released form",
        choices=("class_mean", "task_logit_mean", "class_max"),
    )
    csrd_activation: str = option(
        "relu",
        "of the radar map's 1x1 convolution: relu as released; sigmoid starts near 0.01, as heat maps do, and cannot die",
        choices=("relu", "sigmoid"),
    )
    calibration: bool = option(True, "radar calibration block in the student (runs at inference)")
    fuser: str = option(
        "gated",
        "of the student, runs at inference; own: what its configuration has, without bev_camera_gated",
        choices=("gated", "own"),
    )
    lambda_fused: float = option(5.0, "weight of mask-scaling feature distillation on bev_fused", low=0)
    lambda_cam: float = option(5.0, "weight of mask-scaling feature distillation on the camera map", low=0)
    mask: str = option("scaled", "foreground of the feature terms", choices=("scaled", "box", "gaussian"))
    camera: str = option(
        "bev_camera_gated", "camera map that is distilled, after or before the gate", choices=("bev_camera_gated", "bev_camera")
    )
    lambda_rel: float = option(1.0, "factor on the base weight of relation distillation: 1.0 cosine, 0.125 gram", low=0)
    relation: str = option("cosine", "similarity; gram is the released form", choices=("cosine", "gram"))
    relation_sizes: tuple[int, ...] = option((32, 16, 8, 4), "side lengths of the resized maps", low=1)
    relation_adapters: bool = option(True, "adapters on the student's resized maps")
    adapter_init: str = option("dirac", "identity, or the library's random init as released", choices=("dirac", "random"))
    defects: tuple[str, ...] = option((), "released defects to switch on", choices=DEFECTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_rel > 0 and not self.relation_sizes:
            raise RecipeError(
                "relation distillation needs a side length",
                expected="relation_sizes=32,16,8,4",
                found="relation_sizes is empty",
                next="set lambda_rel=0 to leave it out",
            )
        if self.fuser == "own" and self.lambda_cam > 0 and self.camera == "bev_camera_gated":
            raise RecipeError(
                "only the gated fuser makes bev_camera_gated",
                expected="camera=bev_camera",
                found="fuser=own, camera=bev_camera_gated",
                next="set camera=bev_camera (lambda_cam=0 leaves the camera map out)",
            )

    @property
    def weight_of_relation(self) -> float:
        """Weight of the relation term."""
        return self.lambda_rel * (1.0 if self.relation == "cosine" else 0.125)


def needs_for(options: CrkdOptions) -> Needs:
    """What the active terms read."""
    needs = Needs(batch=("boxes",))
    if options.lambda_resp > 0:
        needs += Needs(student=(HEAD,), teachers={"fusion": (HEAD,)})
    if options.lambda_csrd > 0:
        needs += Needs(student=("bev_radar",), teachers={"fusion": (HEAD,)})
    if options.lambda_fused > 0 or options.lambda_rel > 0:
        needs += Needs(student=("bev_fused",), teachers={"fusion": ("bev_fused",)})
    if options.lambda_cam > 0:
        needs += Needs(student=(options.camera,), teachers={"fusion": (options.camera,)})
    if options.mask == "gaussian":
        needs += Needs(student=(HEAD,))
    return needs


def group_weight(classes: Sequence[str], options: CrkdOptions) -> float:
    """Weight of a class group, by its classes and never by its position.

    Raises:
        RecipeError: explicit weights that leave this group out.
    """
    key = "+".join(classes)
    if options.group_weight_by_name:
        if key not in options.group_weight_by_name:
            raise RecipeError(f"no weight for class group {key}", expected=key, found=", ".join(options.group_weight_by_name))
        return float(options.group_weight_by_name[key])
    static = bool(STATIC_CLASSES & set(classes))
    if options.group_weights == "uniform":
        return 1.0
    return 2.0 if static == (options.group_weights == "static") else 1.0


def heatmap_target(head: Sequence[HeadMaps], form: str) -> Tensor:
    """The teacher's objectness (B, 1, Y, X) that the radar activation imitates (crkd, table in 4.1)."""
    logits = [maps.heatmap_logits_BKYX for maps in head]
    if form == "task_logit_mean":
        return torch.stack([torch.sigmoid(z.mean(1, keepdim=True)) for z in logits]).mean(0)
    p = torch.sigmoid(torch.cat(logits, dim=1))
    return p.mean(1, keepdim=True) if form == "class_mean" else p.amax(1, keepdim=True)


def object_mask(boxes: BoxBatch, bev_from_ego_B44: Tensor, grid: BevGrid, options: CrkdOptions) -> Tensor:
    """Foreground cells (B, Y, X) bool of the scaled or plain boxes."""
    size = boxes.size_lwh_m_BM3[..., :2]
    if options.mask == "scaled":
        size = grown_sizes(boxes, bev_from_ego_B44, grid_axis_speed="grid_axis_speed" in options.defects)
    if "three_corner_mask" in options.defects:
        return released_rectangle_mask(boxes, grid, size)
    return rotated_mask(boxes, grid, size_lw_BM2=size)


class RelationAdapter(nn.Sequential):
    """3x3 convolution, ReLU, 1x1 convolution; starts as the identity on maps that are not negative."""

    def __init__(self, channels: int, init: str) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1))
        if init == "dirac":
            for conv in (self[0], self[2]):
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)


def relation_loss(student: Tensor, teacher: Tensor, adapters: Mapping[str, nn.Module], options: CrkdOptions) -> Tensor:
    """Sum over sizes of the mean absolute difference of pairwise similarities inside one map (crkd, section 4.3)."""
    total = []
    for k in options.relation_sizes:
        s = F.interpolate(student, size=(k, k), mode="bilinear", align_corners=False)
        t = F.interpolate(teacher, size=(k, k), mode="bilinear", align_corners=False)
        if str(k) in adapters:
            s = adapters[str(k)](s)
        cosine = options.relation == "cosine"
        total.append((similarity(s.flatten(2), cosine=cosine) - similarity(t.flatten(2), cosine=cosine)).abs().mean())
    return torch.stack(total).sum()


def response_terms(student: HeadMaps, teacher: HeadMaps, *, velocity_weight: float, lower: bool) -> tuple[Tensor, Tensor]:
    """(class, box) response loss of one class group, dense and without ground truth (crkd, section 4.4)."""
    p = torch.sigmoid(teacher.heatmap_logits_BKYX)
    cells = quality_focal(student.heatmap_logits_BKYX, p).sum() / (p > 0.3).sum().clamp(min=1)
    q = p.sum(1)
    threshold = 0.1
    use = q > threshold
    while lower and threshold > 0 and not bool(use.any()):  # released: search downwards until a cell appears
        threshold -= 0.01
        use = q > threshold
    difference = smooth_l1(stacked_box_maps(student) - stacked_box_maps(teacher), 1.0)
    scale = difference.new_ones(10)
    scale[8:] = velocity_weight
    per_cell = (difference * scale[None, :, None, None]).sum(1)
    box = 4 * torch.where(use, q * per_cell, 0.0).sum() / use.sum().clamp(min=1)
    return cells, box


class Crkd(Distiller):
    """The training part of CRKD: terms ``resp_class resp_box csrd msfd_fused msfd_camera reld``."""

    def __init__(
        self,
        options: CrkdOptions,
        student: Mapping[str, tuple[int, int, int]],
        teacher: Mapping[str, tuple[int, int, int]],
        grid: BevGrid,
    ) -> None:
        super().__init__(options, needs_for(options))
        self.o, self.grid = options, grid
        self.activation: nn.Module = nn.Identity()
        self.relation = nn.ModuleDict()
        self.widen = nn.ModuleDict()
        if options.lambda_csrd > 0:
            self._same_grid("bev_radar", student["bev_radar"][1:], grid.shape)
            released = options.csrd_activation == "relu"
            self.activation = nn.Conv2d(student["bev_radar"][0], 1, 1, bias=not released)
            if released:
                nn.init.kaiming_normal_(self.activation.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.constant_(self.activation.bias, -4.6)  # type: ignore[arg-type]  # sigmoid 0.01
        if options.lambda_rel > 0 and options.relation_adapters:
            for k in options.relation_sizes:
                self.relation[str(k)] = RelationAdapter(student["bev_fused"][0], options.adapter_init)
        for name, weight in (("bev_fused", options.lambda_fused), (options.camera, options.lambda_cam)):
            if weight > 0:
                self._same_grid(name, student[name][1:], teacher[name][1:])
                if student[name][0] != teacher[name][0]:
                    conv = nn.Conv2d(student[name][0], teacher[name][0], 1, bias=False)
                    nn.init.orthogonal_(conv.weight)
                    self.widen[name] = conv

    @staticmethod
    def _same_grid(name: str, a: Sequence[int], b: Sequence[int]) -> None:
        if tuple(a) != tuple(b):
            raise MismatchError(
                f"CRKD compares {name} on one grid; there is no silent resampling",
                expected=f"{b[0]}x{b[1]}",
                found=f"{a[0]}x{a[1]}",
                next="train student and teacher on the same grid",
            )

    def radar_activation(self, radar: Tensor) -> Tensor:
        """A (B, 1, Y, X): what the early radar map says about objects."""
        value = self.activation(radar)
        return torch.relu(value) if self.o.csrd_activation == "relu" else torch.sigmoid(value)

    def check_layout(self, student: Outputs, teachers: Mapping[str, Outputs]) -> None:
        super().check_layout(student, teachers)
        for name, outputs in teachers.items():
            if outputs.grid != student.grid:
                raise MismatchError(f"teacher {name!r} has another grid", expected=str(student.grid), found=str(outputs.grid))

    def terms(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        o = self.o
        if not self.needs.teachers:
            return {}
        teacher = self._checked(teachers["fusion"], student)
        scale = 2.0 / len(batch) if "divide_by_batch" in o.defects else 1.0
        out: dict[str, Tensor] = {}
        if o.lambda_resp > 0:
            out.update(self._response(student, teacher))
        if o.lambda_csrd > 0:
            activation = self.radar_activation(student.features["bev_radar"])
            target = heatmap_target(teacher.head, o.csrd_target)
            out["csrd"] = o.lambda_csrd * (activation - target).abs().mean()
            # A ReLU that is 0 everywhere gives no gradient again: csrd then stays at lambda_csrd times the target's mean.
            self.note(csrd_alive=(activation > 0).float().mean(), csrd_mean=activation.mean(), csrd_target=target.mean())
        names = {"msfd_fused": ("bev_fused", o.lambda_fused), "msfd_camera": (o.camera, o.lambda_cam)}
        if any(weight > 0 for _, weight in names.values()):
            mask = self._mask(student, batch)
            self.note(mask_share=mask.float().mean())
            for term, (name, weight) in names.items():
                if weight > 0:
                    ours = student.features[name]
                    ours = self.widen[name](ours) if name in self.widen else ours
                    out[term] = weight * scale * half_square_on_mask(ours, teacher.features[name], mask)
        if o.lambda_rel > 0:
            loss = relation_loss(student.features["bev_fused"], teacher.features["bev_fused"], self.relation, o)
            out["reld"] = o.weight_of_relation * scale * loss
        return out

    def _checked(self, teacher: Outputs, student: Outputs) -> Outputs:
        """Refuse maps that are not finite; as released, NaN takes the student's value."""
        features, checked = dict(teacher.features), {}
        for name, value in features.items():
            if "nan_from_student" in self.o.defects and value.shape == student.features[name].shape:
                features[name] = torch.where(value.isnan(), student.features[name], value)
            else:
                checked[name] = value
        for maps in teacher.head:
            group = "+".join(maps.classes)
            checked |= {f"heat map of {group}": maps.heatmap_logits_BKYX, f"box maps of {group}": stacked_box_maps(maps)}
        require_all_finite(checked)
        return Outputs(features=features, head=teacher.head, grid=teacher.grid)

    def _mask(self, student: Outputs, batch: Batch) -> Tensor:
        with torch.no_grad():
            if self.o.mask == "gaussian":
                return head_targets(batch.boxes, student.grid, student.head).heatmap_BKYX.amax(1) > 0
            return object_mask(batch.boxes, batch.bev_from_ego_B44, student.grid, self.o)

    def _response(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        cells, boxes = [], []
        for ours, theirs in zip(student.head, teacher.head, strict=True):
            weight = group_weight(ours.classes, self.o)
            lower = "lowered_box_threshold" in self.o.defects
            cell, box = response_terms(ours, theirs, velocity_weight=self.o.velocity_weight, lower=lower)
            cells.append(weight * cell)
            boxes.append(weight * box)
            self.note(**{f"resp_{'+'.join(ours.classes)}": (weight * (cell + box)).detach()})
        weight = self.o.lambda_resp
        return {"resp_class": weight * torch.stack(cells).sum(), "resp_box": weight * torch.stack(boxes).sum()}


def _changes(options: CrkdOptions) -> dict[str, Any]:
    return {**({"fuser": "gated"} if options.fuser == "gated" else {}), "calibration": options.calibration}


def reset_backbone(teacher: FrozenTeacher) -> None:
    """Released, as far as its code and its libraries' versions tell: weights are initialised after the teacher's checkpoint was
    loaded, so its image backbone is a new network's, with the published image weights where the teacher's configuration names
    them. Where it names none, as in the benchmark's presets, the backbone is random, which the released one was not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = build_model(teacher.network.config)
    teacher.network.camera.image.backbone.load_state_dict(fresh.camera.image.backbone.state_dict())
    teacher.altered = True


def half_points(teacher: FrozenTeacher) -> None:
    """Released: the teacher's LiDAR points are cast to half precision before cells are made of them (3 cm at 32 m)."""

    def halved(module: nn.Module, inputs: tuple[Batch]) -> tuple[Batch]:
        (batch,) = inputs
        if batch.lidar is None:
            return inputs
        names = ("xyz_m", "features_NF", "age_s")
        lidar = replace(batch.lidar, **{n: getattr(batch.lidar, n).half().float() for n in names})
        return (replace(batch, lidar=lidar),)

    teacher.network.register_forward_pre_hook(halved)
    teacher.altered = True


def _build(options: CrkdOptions, student: Any, teachers: Mapping[str, FrozenTeacher], grid: BevGrid) -> Crkd:
    if "fusion" in teachers:
        if "teacher_backbone_reset" in options.defects:
            reset_backbone(teachers["fusion"])
        if "half_points" in options.defects:
            half_points(teachers["fusion"])
        teachers["fusion"].batch_statistics = "teacher_batch_statistics" in options.defects
    shapes = teachers["fusion"].feature_shapes if "fusion" in teachers else {}
    return Crkd(options, student.feature_shapes, shapes, grid)


METHOD = Method(
    name="crkd",
    title="CRKD: cross-modality distillation for camera-radar detection (CVPR 2024)",
    summary=(
        "A LiDAR-camera teacher with gated fusion teaches gated fusion of camera and radar: the radar map learns the teacher's "
        "heat maps, object regions learn its features, whole maps its relations, the head its answers."
    ),
    options=CrkdOptions,
    changes=_changes,
    needs_for=needs_for,
    build=_build,
    twin="gated student with calibration block, trained as long without distillation",
    twin_options={"lambda_resp": 0.0, "lambda_csrd": 0.0, "lambda_fused": 0.0, "lambda_cam": 0.0, "lambda_rel": 0.0},
    presets={
        "crkd": {},
        "crkd_paper": {"csrd_target": "task_logit_mean", "relation": "gram", "adapter_init": "random"},
    },
)
