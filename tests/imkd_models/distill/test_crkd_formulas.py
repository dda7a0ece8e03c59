"""CSRD, MSFD, RelD and RespD of CRKD against slow NumPy twins written from the formulas, with the released weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distill_fakes import FUSION, GRID, STUDENT, fake_batch, fake_head, fake_outputs, generator, one_box
from distill_twins import Array, array, bilinear, box_maps, cells_in, conv, cross_entropy, parameters_of, sigmoid, smooth_l1

from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.distill import METHODS
from imkd_models.distill.crkd import Crkd, RelationAdapter, response_terms
from imkd_models.distill.terms import grown_sizes, head_targets
from imkd_models.outputs import Outputs

# The batch-size-free form of the released weights, and the names of the class groups with theirs.
PAPER: dict[str, Any] = {
    "lambda_resp": 1.0,
    "lambda_csrd": 100.0,
    "lambda_fused": 5.0,
    "lambda_cam": 5.0,
    "lambda_rel": 1.0,
    "csrd_target": "class_mean",
    "csrd_activation": "relu",
    "mask": "scaled",
    "camera": "bev_camera_gated",
    "relation": "cosine",
    "relation_sizes": (32, 16, 8, 4),
    "relation_adapters": True,
    "velocity_weight": 1.0,
    "group_weights": "dynamic",
    "group_weight_by_name": {},
    "defects": (),
}
BASE = {"cosine": 1.0, "gram": 0.125}
DYNAMIC = {
    "car": 2.0,
    "truck+construction_vehicle": 2.0,
    "bus+trailer": 2.0,
    "barrier": 1.0,
    "motorcycle+bicycle": 2.0,
    "pedestrian+traffic_cone": 1.0,
}
WEIGHTS = {"dynamic": DYNAMIC, "static": {k: 3 - v for k, v in DYNAMIC.items()}, "uniform": dict.fromkeys(DYNAMIC, 1.0)}
OWN_WEIGHTS = {name: 0.5 + i for i, name in enumerate(DYNAMIC)}


def _options(**values: Any) -> Any:
    return METHODS["crkd"].make_options(values)


def _distiller(student: Any = STUDENT, teacher: Any = FUSION, **values: Any) -> Crkd:
    torch.manual_seed(0)
    return Crkd(_options(**values), student, teacher, GRID)


def _bev_from_ego() -> torch.Tensor:
    """Turn, scale, flip and shift, another one a sample: objects lie 5 to 50 m from the ego origin."""
    out = torch.eye(4).repeat(2, 1, 1)
    for matrix, angle, scale, flip, shift in zip(
        out, (0.4, -1.1), (1.06, 0.93), (1.0, -1.0), ((-12.0, 9.0), (25.0, 3.0)), strict=True
    ):
        c, s = scale * math.cos(angle), scale * math.sin(angle)
        matrix[:2, :2] = torch.tensor([[c, -s * flip], [s, c * flip]])
        matrix[2, 2] = scale
        matrix[:2, 3] = torch.tensor(shift)
    return out


def _batch() -> Batch:
    """Slow objects, so that both thresholds of speed matter; every third velocity is unknown."""
    batch = fake_batch(boxes=6)
    boxes = replace(batch.boxes, velocity_mps_BM2=0.2 * batch.boxes.velocity_mps_BM2)
    return replace(batch, boxes=boxes, bev_from_ego_B44=_bev_from_ego())


def _teacher(shapes: Any = FUSION) -> Outputs:
    """Half of the cells hold no evidence: every channel is 0 there."""
    outputs = fake_outputs(shapes, 7)
    seen = torch.rand(2, 1, *GRID.shape, generator=generator(2)) > 0.5
    return replace(outputs, features={k: v * seen for k, v in outputs.features.items()})


# ------------------------------------------------------------------------------------------------------------------ twins


def _fraction_by_range(r: float) -> float:
    return 0.0 if r <= 20 else 0.25 if r < 30 else 0.5


def _fraction_by_speed(u: float) -> float:
    return 0.0 if math.isnan(u) or u <= 0.3 else 0.25 if u < 0.8 else 0.5


def _grown(boxes: BoxBatch, b: int, m: int, bev_from_ego: Array, by_axes: bool = False) -> tuple[float, float]:
    """l + clip((G(r) + Q(u_l)) l, 0.5, 4) and the same for w; range and speed in ego, speed along the body axes."""
    ego_from_bev = np.linalg.inv(bev_from_ego)
    length, width = boxes.size_lwh_m_BM3[b, m, :2].tolist()
    position = ego_from_bev @ np.array([*boxes.centre_m_BM3[b, m].tolist(), 1.0])
    linear, yaw = ego_from_bev[:2, :2], float(boxes.yaw_rad_BM[b, m])
    velocity = linear @ array(boxes.velocity_mps_BM2[b, m])
    heading = linear @ np.array([math.cos(yaw), math.sin(yaw)])
    heading /= np.linalg.norm(heading)
    left = np.array([-heading[1], heading[0]])
    u_l, u_w = (abs(velocity[0]), abs(velocity[1])) if by_axes else (abs(velocity @ heading), abs(velocity @ left))
    g = _fraction_by_range(math.hypot(position[0], position[1]))
    grow_l, grow_w = (np.clip((g + _fraction_by_speed(u)) * x, 0.5, 4.0) for u, x in ((u_l, length), (u_w, width)))
    return length + grow_l, width + grow_w


def _mask(batch: Batch, student: Outputs, o: Mapping[str, Any]) -> Array:
    """(B, Y, X): cell centres in the rectangles, and the cell that holds the box centre."""
    boxes = batch.boxes
    if o["mask"] == "gaussian":
        return array(head_targets(boxes, GRID, student.head).heatmap_BKYX).max(1) > 0
    out = np.zeros((len(boxes.valid_BM), *GRID.shape), dtype=bool)
    for b, m in boxes.valid_BM.nonzero().tolist():
        (x, y, _), (length, width, _) = boxes.centre_m_BM3[b, m].tolist(), boxes.size_lwh_m_BM3[b, m].tolist()
        if o["mask"] == "scaled":
            length, width = _grown(boxes, b, m, array(batch.bev_from_ego_B44[b]), "grid_axis_speed" in o["defects"])
        out[b] |= cells_in(GRID, x, y, length, width, float(boxes.yaw_rad_BM[b, m]))
        row, column = math.floor((y - GRID.y_min_m) / GRID.cell_m), math.floor((x - GRID.x_min_m) / GRID.cell_m)
        if 0 <= row < GRID.ny and 0 <= column < GRID.nx:
            out[b, row, column] = True
    return out


def _msfd(s: Array, t: Array, mask: Array) -> float:
    """1/n sum over masked cells with teacher evidence of the channel mean of half the squared difference."""
    use = mask & (t != 0).any(1)
    return (0.5 * (s - t) ** 2).mean(1)[use].sum() / max(use.sum(), 1)


def _similarity(x_BCYX: Array, cosine: bool) -> Array:
    x = x_BCYX.reshape(*x_BCYX.shape[:2], -1)
    if cosine:
        x = x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-6)
    return x.transpose(0, 2, 1) @ x


def _relation(s: Array, t: Array, distiller: Crkd, o: Mapping[str, Any]) -> float:
    """sum over k of mean |R_S - R_T| after resize to k x k and, on the student's side, conv 3x3, ReLU, conv 1x1."""
    total = 0.0
    for k in o["relation_sizes"]:
        own, theirs = bilinear(s, (k, k), False), bilinear(t, (k, k), False)
        if o["relation_adapters"]:
            assert list(distiller.relation) == [str(size) for size in o["relation_sizes"]]
            p = parameters_of(distiller.relation[str(k)])
            own = conv(np.maximum(conv(own, p["0.weight"], p["0.bias"]), 0), p["2.weight"], p["2.bias"])
        cosine = o["relation"] == "cosine"
        total += np.abs(_similarity(own, cosine) - _similarity(theirs, cosine)).mean()
    return total


def _response(student: Outputs, teacher: Outputs, o: Mapping[str, Any]) -> tuple[float, float]:
    """sum over groups of w_t QFL_t, and of w_t SBB_t."""
    cells, boxes = 0.0, 0.0
    for ours, theirs in zip(student.head, teacher.head, strict=True):
        weight = (o["group_weight_by_name"] or WEIGHTS[o["group_weights"]])["+".join(ours.classes)]
        z, p = array(ours.heatmap_logits_BKYX), sigmoid(array(theirs.heatmap_logits_BKYX))
        cells += weight * (cross_entropy(z, p) * np.abs(sigmoid(z) - p) ** 2).sum() / max((p > 0.3).sum(), 1)
        q, difference = p.sum(1), smooth_l1(box_maps(ours) - box_maps(theirs))
        difference[:, 8:] *= o["velocity_weight"]
        use = q > 0.1
        if use.any():
            boxes += weight * 4 / use.sum() * (q * difference.sum(1))[use].sum()
    return cells, boxes


def _heat(teacher: Outputs, form: str) -> Array:
    logits = [array(m.heatmap_logits_BKYX) for m in teacher.head]
    if form == "task_logit_mean":
        return sum(sigmoid(z.mean(1)) for z in logits) / len(logits)
    p = sigmoid(np.concatenate(logits, axis=1))
    return p.mean(1) if form == "class_mean" else p.max(1)


def _twin(distiller: Crkd, student: Outputs, teacher: Outputs, batch: Batch, **o: Any) -> dict[str, float]:
    o = {**PAPER, **o}

    def own(name: str) -> Array:
        value = array(student.features[name])
        return conv(value, array(distiller.widen[name].weight)) if name in distiller.widen else value

    cells, boxes = _response(student, teacher, o)
    z = conv(array(student.features["bev_radar"]), *map(array, distiller.activation.parameters()))[:, 0]
    activation = np.maximum(z, 0) if o["csrd_activation"] == "relu" else sigmoid(z)
    scale = 2 / len(batch) if "divide_by_batch" in o["defects"] else 1.0
    mask, theirs = _mask(batch, student, o), {k: array(v) for k, v in teacher.features.items()}
    relation = _relation(array(student.features["bev_fused"]), theirs["bev_fused"], distiller, o)
    return {
        "resp_class": o["lambda_resp"] * cells,
        "resp_box": o["lambda_resp"] * boxes,
        "csrd": o["lambda_csrd"] * np.abs(activation - _heat(teacher, o["csrd_target"])).mean(),
        "msfd_fused": scale * o["lambda_fused"] * _msfd(own("bev_fused"), theirs["bev_fused"], mask),
        "msfd_camera": scale * o["lambda_cam"] * _msfd(own(o["camera"]), theirs[o["camera"]], mask),
        "reld": scale * o["lambda_rel"] * BASE[o["relation"]] * relation,
    }


def _close(ours: Mapping[str, torch.Tensor], twin: Mapping[str, float]) -> None:
    assert list(ours) == list(twin)
    for name, value in twin.items():
        assert ours[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, ()),
        ({"lambda_resp": 0.3}, ("resp_class", "resp_box")),
        ({"group_weights": "static"}, ("resp_class", "resp_box")),
        ({"group_weights": "uniform"}, ("resp_class", "resp_box")),
        ({"group_weight_by_name": OWN_WEIGHTS}, ("resp_class", "resp_box")),
        ({"velocity_weight": 0.3}, ("resp_box",)),
        ({"lambda_csrd": 7.0}, ("csrd",)),
        ({"csrd_target": "task_logit_mean"}, ("csrd",)),
        ({"csrd_target": "class_max"}, ("csrd",)),
        ({"lambda_fused": 0.7}, ("msfd_fused",)),
        ({"lambda_cam": 0.7}, ("msfd_camera",)),
        ({"mask": "box"}, ("msfd_fused", "msfd_camera")),
        ({"mask": "gaussian"}, ("msfd_fused", "msfd_camera")),
        ({"camera": "bev_camera"}, ("msfd_camera",)),
        ({"defects": ("grid_axis_speed",)}, ("msfd_fused", "msfd_camera")),
        ({"lambda_rel": 0.3}, ("reld",)),
        ({"relation": "gram"}, ("reld",)),
        ({"relation_sizes": (8, 5)}, ("reld",)),
        ({"relation_sizes": (8, 5), "relation": "gram"}, ("reld",)),
    ],
    ids=str,
)
def test_terms_equal_their_formulas_under_every_option(options: dict[str, Any], changed: tuple[str, ...]) -> None:
    base = {} if "relation" in options or not options else {"relation_sizes": (16, 4)}  # 32 x 32 is slow
    student, teacher, batch = fake_outputs(STUDENT, 1), _teacher(), _batch()
    distiller, default = _distiller(**{**base, **options}), _distiller(**base)(student, {"fusion": teacher}, batch)
    ours = distiller(student, {"fusion": teacher}, batch)
    _close(ours, _twin(distiller, student, teacher, batch, **{**base, **options}))
    assert tuple(k for k in ours if (ours[k] / default[k] - 1).abs() > 1e-4) == changed


def test_sigmoid_activation_equals_its_formula_and_starts_at_one_percent() -> None:
    options = {"csrd_activation": "sigmoid", "relation_sizes": (4,)}
    distiller, student, teacher, batch = _distiller(**options), fake_outputs(STUDENT, 1), _teacher(), _batch()
    assert torch.sigmoid(distiller.activation.bias).item() == pytest.approx(0.01, abs=1e-4)
    ours = distiller(student, {"fusion": teacher}, batch)
    _close(ours, _twin(distiller, student, teacher, batch, **options))


def test_radar_activation_starts_kaiming_fan_out_without_bias() -> None:
    """Standard deviation sqrt(2 / fan_out), fan_out 1."""
    distiller = _distiller(student={**STUDENT, "bev_radar": (8000, *GRID.shape)}, lambda_rel=0)
    assert distiller.activation.bias is None
    assert distiller.activation.weight.std().item() == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("relation", ["cosine", "gram"])
@pytest.mark.parametrize("adapters", [True, False])
def test_trained_relation_adapters_act_on_the_student_only(relation: str, adapters: bool) -> None:
    """Randomly started ones stand for trained ones: one pair a size."""
    options = {"relation": relation, "relation_adapters": adapters, "relation_sizes": (16, 8, 4)}
    distiller, student, teacher = _distiller(adapter_init="random", **options), fake_outputs(STUDENT, 1), _teacher()
    ours = distiller(student, {"fusion": teacher}, _batch())
    _close(ours, _twin(distiller, student, teacher, _batch(), **options))
    other = _distiller(**{**options, "relation_adapters": not adapters}, adapter_init="random")
    assert (other(student, {"fusion": teacher}, _batch())["reld"] / ours["reld"] - 1).abs() > 1e-2


def test_relation_adapters_keep_the_width_and_start_with_zero_bias() -> None:
    shapes = [tuple(p.shape) for p in RelationAdapter(6, "dirac").parameters()]
    assert shapes == [(6, 6, 3, 3), (6,), (6, 6, 1, 1), (6,)]
    assert list(_distiller().relation) == ["32", "16", "8", "4"]


def test_channel_adapters_equal_a_plain_product_and_leave_relation_alone() -> None:
    """bev_fused 15 -> 21, bev_camera_gated 12 -> 9."""
    shapes = {**FUSION, "bev_fused": (21, *GRID.shape), "bev_camera_gated": (9, *GRID.shape)}
    sizes = {"relation_sizes": (8, 4)}
    distiller, student, teacher = _distiller(teacher=shapes, **sizes), fake_outputs(STUDENT, 1), _teacher(shapes)
    _close(distiller(student, {"fusion": teacher}, _batch()), _twin(distiller, student, teacher, _batch(), **sizes))
    w = array(distiller.widen["bev_camera_gated"].weight)[:, :, 0, 0]
    np.testing.assert_allclose(w @ w.T, np.eye(9), atol=1e-5)


def test_division_by_batch_is_two_over_the_batch_on_features_and_relations() -> None:
    batch = fake_batch(batch=3)
    student, teacher = fake_outputs(STUDENT, 1, batch=3), fake_outputs(FUSION, 7, batch=3)
    options = {"relation_sizes": (8, 4), "defects": ("divide_by_batch",)}
    distiller = _distiller(**options)
    ours = distiller(student, {"fusion": teacher}, batch)
    _close(ours, _twin(distiller, student, teacher, batch, **options))
    plain = _distiller(relation_sizes=(8, 4))(student, {"fusion": teacher}, batch)
    assert [round((ours[k] / plain[k]).item(), 4) for k in ours] == [1, 1, 1, 0.6667, 0.6667, 0.6667]


def test_unconfident_teacher_is_divided_by_one() -> None:
    """No class score above 0.3: n_t = 1."""
    ours, faint = fake_head(1)[4], fake_head(2, mean=-9.0)[4]
    z, p = array(ours.heatmap_logits_BKYX), sigmoid(array(faint.heatmap_logits_BKYX))
    assert p.max() < 0.3
    cells, _ = response_terms(ours, faint, velocity_weight=1.0, lower=False)
    assert cells.item() == pytest.approx((cross_entropy(z, p) * (sigmoid(z) - p) ** 2).sum(), rel=1e-5)


def test_lowered_threshold_is_the_first_hundredth_below_that_leaves_a_cell() -> None:
    """q is 0.083 everywhere but one cell with 0.095: the defect stops at 0.09 and averages over that cell alone."""
    ours, theirs = fake_head(1, 1)[0], fake_head(2, 1)[0]
    logits = torch.full_like(theirs.heatmap_logits_BKYX, math.log(0.083 / 0.917))
    logits[0, 0, 3, 4] = math.log(0.095 / 0.905)
    faint = replace(theirs, heatmap_logits_BKYX=logits)
    _, box = response_terms(ours, faint, velocity_weight=1.0, lower=True)
    difference = smooth_l1(box_maps(ours) - box_maps(theirs)).sum(1)
    assert box.item() == pytest.approx(4 * 0.095 * difference[0, 3, 4], rel=1e-5)


def test_grown_sizes_equal_the_scalar_rule_on_random_objects() -> None:
    """Ranges around 20 and 30 m, speeds around 0.3 and 0.8 m/s, every third velocity unknown, under augmentation."""
    g, count = generator(4), 150
    bev_from_ego = _bev_from_ego()
    angle, distance = 6.3 * torch.rand(2, count, generator=g), 10 + 30 * torch.rand(2, count, generator=g)
    ego = torch.stack([distance * angle.cos(), distance * angle.sin(), torch.ones(2, count), torch.ones(2, count)], dim=-1)
    velocity = 0.7 * torch.randn(2, count, 2, generator=g)
    velocity[:, ::3] = torch.nan
    boxes = BoxBatch(
        centre_m_BM3=torch.einsum("bij,bmj->bmi", bev_from_ego, ego)[..., :3],
        size_lwh_m_BM3=0.3 + 9 * torch.rand(2, count, 3, generator=g),
        yaw_rad_BM=6.3 * torch.rand(2, count, generator=g),
        velocity_mps_BM2=velocity,
        label_BM=torch.zeros(2, count, dtype=torch.long),
        valid_BM=torch.ones(2, count, dtype=torch.bool),
    )
    for by_axes in (False, True):
        ours = array(grown_sizes(boxes, bev_from_ego, grid_axis_speed=by_axes))
        twin = [[_grown(boxes, b, m, array(bev_from_ego[b]), by_axes) for m in range(count)] for b in range(2)]
        np.testing.assert_allclose(ours, twin, rtol=1e-5)
    grown = array(grown_sizes(boxes, bev_from_ego) - boxes.size_lwh_m_BM3[..., :2])
    assert grown.min() == pytest.approx(0.5, abs=1e-5) and grown.max() == pytest.approx(4.0, abs=1e-5)


def _growth(
    distance: float = 25.0, along: float = 0.0, across: float = 0.0, l: float = 3.0, w: float = 3.0
) -> tuple[float, float]:
    """Delta l, Delta w of a box that looks to +y."""
    box = one_box(0.0, distance, l, w, math.pi / 2, velocity=(across, along))
    (length, width) = grown_sizes(box, torch.eye(4)[None])[0, 0].tolist()
    return length - l, width - w


@pytest.mark.parametrize(
    ("name", "values", "which"),
    [
        ("distance", np.linspace(1, 60, 60), (0, 1)),
        ("along", np.linspace(0, 2, 41), (0,)),
        ("across", np.linspace(0, 2, 41), (1,)),
        ("l", np.linspace(0.3, 40, 60), (0,)),
        ("w", np.linspace(0.3, 40, 60), (1,)),
    ],
)
def test_growth_never_falls_in_one_quantity_alone_and_touches_only_its_own_side(
    name: str, values: Array, which: tuple[int, ...]
) -> None:
    """Non-decreasing in range, forward and sideways speed, length and width, within [0.5, 4] m."""
    grown = np.array([_growth(**{name: float(v)}) for v in values])
    assert (np.diff(grown, axis=0) > -1e-5).all() and (grown > 0.5 - 1e-5).all() and (grown < 4 + 1e-5).all()
    assert tuple(i for i in (0, 1) if grown[-1, i] > grown[0, i] + 0.1) == which
