"""CRKD: invariants I1 to I13 and the defect tests T2 to T16 that concern the distiller."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distill_fakes import FUSION, GRID, STUDENT, fake_batch, fake_head, fake_outputs, one_box, same_head, without_boxes

from imkd_data.classes import CLASS_GROUPS
from imkd_data.errors import MismatchError, RecipeError
from imkd_models.distill import METHODS
from imkd_models.distill.crkd import (
    Crkd,
    RelationAdapter,
    group_weight,
    heatmap_target,
    object_mask,
    relation_loss,
    response_terms,
)
from imkd_models.outputs import HeadMaps, Outputs

TERMS = ["resp_class", "resp_box", "csrd", "msfd_fused", "msfd_camera", "reld"]


def _options(**values):
    return METHODS["crkd"].make_options(values)


def _distiller(student=STUDENT, teacher=FUSION, **values) -> Crkd:
    torch.manual_seed(0)
    return Crkd(_options(**values), student, teacher, GRID)


def _teacher(seed: int = 7) -> dict[str, Outputs]:
    return {"fusion": fake_outputs(FUSION, seed)}


def _run(distiller: Crkd, student=None, teachers=None, batch=None) -> dict[str, torch.Tensor]:
    return distiller(student or fake_outputs(STUDENT, 1, grad=True), teachers or _teacher(), batch or fake_batch())


def _imitating(teacher: Outputs) -> Outputs:
    """A student that gives the teacher's maps and answers, and wants gradient."""
    own = fake_outputs(STUDENT, 1, grad=True)
    features = {**own.features}
    for name in ("bev_fused", "bev_camera_gated", "bev_camera"):
        features[name] = teacher.features[name].clone().requires_grad_()
    return replace(own, features=features, head=same_head(teacher.head))


def test_all_terms_are_there_finite_and_positive() -> None:
    out = _run(_distiller())
    assert list(out) == TERMS and all(torch.isfinite(v) and v > 0 for v in out.values())


def test_student_equal_to_teacher_gives_zero_with_zero_gradient() -> None:
    teacher = _teacher()
    student = _imitating(teacher["fusion"])
    out = _run(_distiller(lambda_csrd=0), student, teacher)
    for term in ("resp_class", "resp_box", "msfd_fused", "msfd_camera"):
        assert out[term] == 0
    assert out["reld"] < 1e-6
    sum(v for k, v in out.items() if k != "reld").backward()
    tensors = [student.features["bev_camera_gated"], student.features["bev_fused"]]
    tensors += [m.heatmap_logits_BKYX for m in student.head]
    assert all(t.grad is None or t.grad.abs().max() == 0 for t in tensors)


def test_csrd_is_zero_when_the_activation_is_the_target() -> None:
    distiller, teacher = _distiller(), _teacher()
    target = heatmap_target(teacher["fusion"].head, "class_mean")
    radar = torch.zeros(2, *STUDENT["bev_radar"])
    radar[:, :1] = target
    with torch.no_grad():
        distiller.activation.weight.zero_()
        distiller.activation.weight[0, 0] = 1
    student = fake_outputs(STUDENT, 1)
    out = _run(distiller, replace(student, features={**student.features, "bev_radar": radar}), teacher)
    assert out["csrd"] == 0


def _constant_head(cls: str) -> list[HeadMaps]:
    out = []
    for maps in fake_head(0, 1):
        logits = torch.full_like(maps.heatmap_logits_BKYX, -4.5)
        if cls in maps.classes:
            logits[:, maps.classes.index(cls)] = 3.0
        out.append(replace(maps, heatmap_logits_BKYX=logits))
    return out


@pytest.mark.parametrize(
    ("form", "cls", "value"),
    [
        ("task_logit_mean", "car", 0.168),
        ("task_logit_mean", "truck", 0.063),
        ("class_mean", "car", 0.105),
        ("class_mean", "truck", 0.105),
        ("class_max", "car", 0.953),
    ],
)
def test_csrd_targets_have_the_values_of_the_table(form: str, cls: str, value: float) -> None:
    target = heatmap_target(_constant_head(cls), form)
    assert target.shape == (1, 1, *GRID.shape)
    assert float(target.mean()) == pytest.approx(value, abs=5e-4)


def test_csrd_gradient_reaches_only_the_radar_map_and_the_activation_starts_alive() -> None:
    distiller, student = _distiller(), fake_outputs(STUDENT, 1, grad=True)
    assert (distiller.radar_activation(student.features["bev_radar"]) > 0).any()
    _run(distiller, student)["csrd"].backward()
    assert {n for n, v in student.features.items() if v.grad is not None} == {"bev_radar"}
    assert student.features["bev_radar"].grad.abs().sum() > 0 and distiller.activation.weight.grad is not None


def test_a_radar_activation_that_shrinks_to_nothing_dies_as_relu_and_lives_as_sigmoid() -> None:
    """From scratch the released form learns 0 everywhere within a few dozen steps, and then neither weight nor radar map gets
    a gradient again; csrd stays at lambda times the target's mean."""
    g = torch.Generator().manual_seed(3)
    radar = torch.rand(2, STUDENT["bev_radar"][0], *GRID.shape, generator=g)
    target = (torch.rand(2, 1, *GRID.shape, generator=g) > 0.99).float()
    alive = {}
    for kind in ("relu", "sigmoid"):
        distiller = _distiller(csrd_activation=kind)
        optimiser = torch.optim.AdamW(distiller.activation.parameters(), lr=0.1)
        for _ in range(100):
            optimiser.zero_grad()
            (distiller.radar_activation(radar) - target).abs().mean().backward()
            optimiser.step()
        student = fake_outputs(STUDENT, 1, grad=True)
        seen = replace(student, features={**student.features, "bev_radar": radar.clone().requires_grad_()})
        csrd = _run(distiller, seen)["csrd"]
        csrd.backward()
        alive[kind] = bool(seen.features["bev_radar"].grad.any())
        notes = distiller.diagnostic_values()
        assert (notes["csrd_alive"] > 0) is alive[kind]
        if kind == "relu":
            assert float(csrd.detach()) == pytest.approx(100 * notes["csrd_target"], rel=1e-5)
    assert alive == {"relu": False, "sigmoid": True}
    start = _run(_distiller(csrd_activation="sigmoid"), fake_outputs(STUDENT, 1))["csrd"]
    other = _run(_distiller(), fake_outputs(STUDENT, 1))["csrd"]
    assert 0 < float(start.detach()) < float(other.detach())


def test_features_are_compared_on_objects_only() -> None:
    batch, student = fake_batch(), fake_outputs(STUDENT, 1, grad=True)
    mask = object_mask(batch.boxes, batch.bev_from_ego_B44, GRID, _options())
    out = _run(_distiller(), student, batch=batch)
    (out["msfd_fused"] + out["msfd_camera"]).backward()
    for name in ("bev_fused", "bev_camera_gated"):
        touched = student.features[name].grad.abs().sum(1) > 0
        assert not touched[~mask].any() and touched.any()
    changed = fake_outputs(STUDENT, 1)
    noise = torch.randn_like(changed.features["bev_fused"]) * ~mask[:, None]
    changed = replace(changed, features={**changed.features, "bev_fused": changed.features["bev_fused"] + noise})
    assert torch.allclose(_run(_distiller(), changed, batch=batch)["msfd_fused"], out["msfd_fused"])


def test_scaled_mask_is_larger_than_the_box_mask_and_partly_outside_objects_count() -> None:
    batch = fake_batch()
    plain = object_mask(batch.boxes, batch.bev_from_ego_B44, GRID, _options(mask="box"))
    scaled = object_mask(batch.boxes, batch.bev_from_ego_B44, GRID, _options())
    assert (scaled | ~plain).all() and scaled.sum() > plain.sum()
    edge = one_box(GRID.x_max_m - 0.5, GRID.y_min_m + 0.5, 6.0, 3.0, 0.5)
    mask = object_mask(edge, torch.eye(4)[None], GRID, _options(mask="box"))
    assert 0 < mask.sum() < 18 / GRID.cell_m**2 and mask[0, 0, -1]
    huge = one_box(5, -5, 100, 100, 0.5)
    assert object_mask(huge, torch.eye(4)[None], GRID, _options(mask="box")).all()


def test_gaussian_mask_covers_every_centre() -> None:
    batch = fake_batch()
    distiller = _distiller(mask="gaussian")
    mask = distiller._mask(fake_outputs(STUDENT, 1), batch)
    assert mask.any() and torch.isfinite(_run(distiller, batch=batch)["msfd_fused"])


def test_camera_map_before_the_gate_is_a_switch() -> None:
    student = fake_outputs(STUDENT, 1, grad=True)
    _run(_distiller(camera="bev_camera"), student)["msfd_camera"].backward()
    assert student.features["bev_camera"].grad is not None and student.features["bev_camera_gated"].grad is None


def test_other_widths_get_an_orthogonal_adapter_on_the_student_side_only() -> None:
    teacher = {**FUSION, "bev_fused": (21, *GRID.shape), "bev_camera_gated": (9, *GRID.shape)}
    distiller = _distiller(teacher=teacher)
    assert set(distiller.widen) == {"bev_fused", "bev_camera_gated"}
    w = distiller.widen["bev_fused"].weight.flatten(1)
    assert torch.allclose(w.T @ w, torch.eye(15), atol=1e-5)
    out = _run(distiller, teachers={"fusion": fake_outputs(teacher, 7)})
    assert all(torch.isfinite(v) for v in out.values())
    assert not _distiller().widen


def test_relation_cosine_ignores_the_teachers_scale_and_gram_squares_it() -> None:
    t = torch.rand(2, 8, *GRID.shape) + 0.1
    zero = torch.zeros(2, 8, *GRID.shape)
    cosine, gram = _options(relation_sizes=(4, 8)), _options(relation="gram", relation_sizes=(4, 8))
    s = torch.rand(2, 8, *GRID.shape) + 0.1
    assert torch.allclose(relation_loss(s, t, {}, cosine), relation_loss(s, 7 * t, {}, cosine), rtol=1e-4)
    assert torch.allclose(49 * relation_loss(zero, t, {}, gram), relation_loss(zero, 7 * t, {}, gram), rtol=1e-4)
    assert _options(relation="gram").weight_of_relation == 0.125 and _options().weight_of_relation == 1.0


def test_relation_adapter_starts_as_the_identity_and_random_does_not() -> None:
    x = torch.rand(1, 6, 5, 7)
    assert torch.equal(RelationAdapter(6, "dirac")(x), x)
    assert not torch.allclose(RelationAdapter(6, "random")(x), x, atol=1e-3)
    assert _distiller(relation_adapters=False).relation == {} or len(_distiller(relation_adapters=False).relation) == 0


def test_response_equals_a_slow_reference() -> None:
    ours, theirs = fake_head(1)[1], fake_head(2)[1]
    cells, box = response_terms(ours, theirs, velocity_weight=1.0, lower=False)
    p, q = torch.sigmoid(theirs.heatmap_logits_BKYX), torch.sigmoid(ours.heatmap_logits_BKYX)
    bce = -(p * q.log() + (1 - p) * (1 - q).log())
    assert torch.allclose(cells, (bce * (p - q) ** 2).sum() / (p > 0.3).sum(), rtol=1e-4)
    names = ("offset_cells_B2YX", "height_m_B1YX", "log_size_m_B3YX", "yaw_sincos_B2YX", "velocity_mps_B2YX")
    d = torch.cat([getattr(ours, n) - getattr(theirs, n) for n in names], 1).abs()
    smooth = torch.where(d < 1, 0.5 * d**2, d - 0.5).sum(1)
    total = p.sum(1)
    expected = 4 * (total * smooth)[total > 0.1].sum() / (total > 0.1).sum()
    assert torch.allclose(box, expected, rtol=1e-4)
    _, without = response_terms(ours, theirs, velocity_weight=0.0, lower=False)
    assert without < box


def test_unconfident_teacher_gives_no_box_loss_and_the_defect_searches_downwards() -> None:
    ours, theirs = fake_head(1)[0], fake_head(2)[0]
    faint = replace(theirs, heatmap_logits_BKYX=torch.full_like(theirs.heatmap_logits_BKYX, -2.7))  # 0.063
    assert response_terms(ours, faint, velocity_weight=1.0, lower=False)[1] == 0
    assert response_terms(ours, faint, velocity_weight=1.0, lower=True)[1] > 0


def test_group_weights_follow_names_and_not_positions() -> None:
    weights = [group_weight(g, _options()) for g in CLASS_GROUPS]
    assert weights == [2, 2, 2, 1, 2, 1]
    assert [group_weight(g, _options(group_weights="static")) for g in CLASS_GROUPS] == [1, 1, 1, 2, 1, 2]
    assert group_weight(("tram",), _options()) == 2 and group_weight(("barrier", "tram"), _options()) == 1
    explicit = _options(group_weight_by_name={"car": 3})
    assert group_weight(("car",), explicit) == 3
    with pytest.raises(RecipeError, match="motorcycle"):
        group_weight(("motorcycle", "bicycle"), explicit)


@pytest.mark.parametrize("index", range(6))
def test_a_group_that_differs_changes_only_its_own_part_in_the_ratio_of_the_table(index: int) -> None:
    teacher, other = _teacher()["fusion"], fake_head(99)
    student = list(same_head(teacher.head))
    student[index] = other[index]
    own = replace(fake_outputs(STUDENT, 1), head=tuple(student))
    one, uniform = _distiller(), _distiller(group_weights="uniform")
    a, b = _run(one, own, {"fusion": teacher}), _run(uniform, own, {"fusion": teacher})
    weight = group_weight(CLASS_GROUPS[index], _options())
    assert torch.allclose(a["resp_class"], weight * b["resp_class"]) and a["resp_class"] > 0
    parts = [float(v) for k, v in one.diagnostics.items() if k.startswith("resp_")]
    assert [i for i, v in enumerate(parts) if v > 0] == [index]


def test_order_of_groups_does_not_matter() -> None:
    student, teacher = fake_outputs(STUDENT, 1), _teacher()["fusion"]
    turned_s, turned_t = replace(student, head=student.head[::-1]), replace(teacher, head=teacher.head[::-1])
    a, b = _run(_distiller(), student, {"fusion": teacher}), _run(_distiller(), turned_s, {"fusion": turned_t})
    for term in ("resp_class", "resp_box", "csrd"):
        assert torch.allclose(a[term], b[term], rtol=1e-5)


def test_other_groups_or_grids_are_refused() -> None:
    teacher = _teacher()["fusion"]
    with pytest.raises(MismatchError, match="class groups"):
        _run(_distiller(), teachers={"fusion": replace(teacher, head=teacher.head[::-1])})
    with pytest.raises(MismatchError, match="grid"):
        _run(_distiller(), teachers={"fusion": replace(teacher, grid=GRID.coarser(2))})
    with pytest.raises(MismatchError, match="resampling"):
        _distiller(teacher={**FUSION, "bev_fused": (15, 12, 16)})


def test_loss_does_not_depend_on_the_batch_size_unless_the_defect_is_on() -> None:
    def twice(outputs: Outputs) -> Outputs:
        features = {k: torch.cat([v, v]) for k, v in outputs.features.items()}
        names = [n for n in HeadMaps.__dataclass_fields__ if n != "classes"]
        head = tuple(replace(m, **{n: torch.cat([getattr(m, n)] * 2) for n in names}) for m in outputs.head)
        return replace(outputs, features=features, head=head)

    batch, student, teacher = fake_batch(), fake_outputs(STUDENT, 1), _teacher()["fusion"]
    boxes = {n: torch.cat([getattr(batch.boxes, n)] * 2) for n in type(batch.boxes).__dataclass_fields__}
    double = replace(
        batch,
        tokens=batch.tokens * 2,
        bev_from_ego_B44=torch.cat([batch.bev_from_ego_B44] * 2),
        boxes=replace(batch.boxes, **boxes),
    )
    one = _run(_distiller(), student, {"fusion": teacher}, batch)
    two = _run(_distiller(), twice(student), {"fusion": twice(teacher)}, double)
    for term in TERMS:
        assert torch.allclose(one[term], two[term], rtol=1e-4)
    defect = _run(_distiller(defects=("divide_by_batch",)), twice(student), {"fusion": twice(teacher)}, double)
    assert torch.allclose(defect["msfd_fused"], one["msfd_fused"] / 2, rtol=1e-4)


def test_no_boxes_and_no_confident_teacher_stay_finite_with_backward() -> None:
    for batch in (without_boxes(fake_batch()), without_boxes(fake_batch(), [1])):
        student = fake_outputs(STUDENT, 1, grad=True)
        out = _run(_distiller(), student, batch=batch)
        sum(out.values()).backward()
        assert all(torch.isfinite(v) for v in out.values())
    assert _run(_distiller(), batch=without_boxes(fake_batch()))["msfd_fused"] == 0


def test_nan_in_the_teacher_raises_and_the_defect_replaces_it() -> None:
    teacher = _teacher()["fusion"]
    bad = teacher.features["bev_fused"].clone()
    bad[0, 0, 0, 0] = torch.nan
    broken = {"fusion": replace(teacher, features={**teacher.features, "bev_fused": bad})}
    with pytest.raises(MismatchError, match="bev_fused"):
        _run(_distiller(), teachers=broken)
    assert torch.isfinite(_run(_distiller(defects=("nan_from_student",)), teachers=broken)["msfd_fused"])
    height = teacher.head[1].height_m_B1YX.clone()
    height[0, 0, 0, 0] = torch.nan  # also where no response reads it: its gradient would be NaN
    head = (teacher.head[0], replace(teacher.head[1], height_m_B1YX=height), *teacher.head[2:])
    with pytest.raises(MismatchError, match=r"box maps of truck\+construction_vehicle"):
        _run(_distiller(), teachers={"fusion": replace(teacher, head=head)})


def test_under_autocast_the_losses_are_those_of_float32_and_logits_are_untouched() -> None:
    student, teacher, batch = fake_outputs(STUDENT, 1), _teacher(), fake_batch()
    before = [m.heatmap_logits_BKYX.clone() for m in (*student.head, *teacher["fusion"].head)]
    plain = _run(_distiller(), student, teacher, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _run(_distiller(), student, teacher, batch)
    for term in TERMS:
        assert mixed[term].dtype == torch.float32 and torch.equal(mixed[term], plain[term])
    after = [m.heatmap_logits_BKYX for m in (*student.head, *teacher["fusion"].head)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_paper_preset() -> None:
    options = _options(preset="crkd_paper")
    assert (options.csrd_target, options.relation, options.adapter_init) == ("task_logit_mean", "gram", "random")
    assert METHODS["crkd"].changes(options) == {"fuser": "gated", "calibration": True}
