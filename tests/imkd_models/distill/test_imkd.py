"""IMKD: invariants of section 12 of its specification (terms, weights, gradient, switches)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distill_fakes import GRID, LABEL, LIDAR, STUDENT, fake_batch, fake_outputs, same_head, without_boxes
from torch import nn

from imkd_data.errors import MismatchError, MissingFeatureError, RecipeError
from imkd_models.distill import METHODS
from imkd_models.distill.imkd import Adaptor, Imkd, response_loss
from imkd_models.distill.intensity import IntensityRule, intensity_maps
from imkd_models.distill.terms import head_targets
from imkd_models.outputs import HeadMaps, Outputs

OFF = {"stage1": False, "stage2_lidar": False, "stage2_label": False, "response": "off", "stage3_supervision": False}


def _distiller(**values) -> Imkd:
    torch.manual_seed(0)
    options = METHODS["imkd"].make_options(values)
    teachers = {n: s for n, s in (("lidar", LIDAR), ("label", LABEL)) if n in METHODS["imkd"].teachers_for(options)}
    return Imkd(options, STUDENT, teachers, GRID)


def _teachers(seed: int = 7) -> dict[str, Outputs]:
    return {"lidar": fake_outputs(LIDAR, seed), "label": fake_outputs(LABEL, seed + 1)}


def _run(distiller: Imkd, student: Outputs | None = None, batch=None, teachers=None) -> dict[str, torch.Tensor]:
    return distiller(student or fake_outputs(STUDENT, 1, grad=True), teachers or _teachers(), batch or fake_batch())


def test_all_terms_are_there_finite_and_positive() -> None:
    out = _run(_distiller())
    assert list(out) == ["l2r", "l2m", "lab2m", "resp", "int"]
    assert all(torch.isfinite(v) and v > 0 for v in out.values())


def test_adaptor_sizes_are_those_of_the_specification() -> None:
    count = {pair: sum(p.numel() for p in Adaptor(*pair).parameters()) for pair in ((40, 128), (80, 128), (42, 128), (53, 256))}
    assert count[40, 128] == 341_888 and count[80, 128] == 387_968
    assert count[42, 128] + count[53, 256] == 1_647_744


def test_published_channel_partition() -> None:
    real = {
        **STUDENT,
        "bev_radar": (80, *GRID.shape),
        "bev_fused": (128, *GRID.shape),
        "bev_stage0": (160, *STUDENT["bev_stage0"][1:]),
    }
    distiller = Imkd(METHODS["imkd"].make_options(), real, {"lidar": LIDAR, "label": LABEL}, GRID)
    widths = {k: (p.start, p.stop) for k, p in distiller.parts.items()}
    assert widths == {
        "l2r": (0, 40),
        "lab2m_bev_fused": (0, 42),
        "l2m_bev_fused": (42, 84),
        "lab2m_bev_stage0": (0, 53),
        "l2m_bev_stage0": (53, 106),
    }
    narrow = Imkd(METHODS["imkd"].make_options({"receiver": "radar"}), real, {"lidar": LIDAR, "label": LABEL}, GRID)
    assert narrow.parts["l2m_bev_radar"] == slice(26, 52) and set(narrow.parts) == {"l2r", "lab2m_bev_radar", "l2m_bev_radar"}


class _Fixed(nn.Module):
    """An adaptor that answers with a given map."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value + 0 * x.sum()


def test_adapted_equal_features_give_exactly_zero() -> None:
    distiller, teachers = _distiller(), _teachers()
    for key in distiller.adaptors:
        teacher = "label" if key.startswith("lab2m") else "lidar"
        stage = "bev_stage2" if key.endswith("bev_stage0") else "bev_stage1"
        distiller.adaptors[key] = _Fixed(teachers[teacher].features[stage])
    out = _run(distiller, teachers=teachers)
    assert out["l2r"] == 0 and out["l2m"] == 0 and out["lab2m"] == 0 and out["resp"] > 0


def test_response_is_zero_for_equal_answers_on_the_gaussian() -> None:
    """p = t and equal boxes: t is the teacher's score times the Gaussian, so the student that says so gets 0."""
    batch, teacher = fake_batch(), _teachers()["lidar"]
    truth = head_targets(batch.boxes, GRID, teacher.head)
    student, first = [], 0
    for maps in same_head(teacher.head):
        count = len(maps.classes)
        t = torch.sigmoid(maps.heatmap_logits_BKYX.detach()) * truth.heatmap_BKYX[:, first : first + count]
        student.append(replace(maps, heatmap_logits_BKYX=torch.logit(t.double(), eps=1e-12).float().clamp(min=-80)))
        first += count
    assert response_loss(tuple(student), teacher.head, truth) < 1e-8
    assert response_loss(same_head(teacher.head), teacher.head, truth) > 1e-3  # background is pushed to 0


def test_velocity_weight_scales_only_velocity_in_the_response() -> None:
    batch, teacher = fake_batch(), _teachers()["lidar"]
    truth = head_targets(batch.boxes, GRID, teacher.head)
    faster = tuple(replace(m, velocity_mps_B2YX=m.velocity_mps_B2YX + 3) for m in teacher.head)
    equal, one, half, none = (
        response_loss(head, teacher.head, truth, velocity_weight=w)
        for head, w in ((teacher.head, 1.0), (faster, 1.0), (faster, 0.5), (faster, 0.0))
    )
    assert torch.isclose(none, equal) and torch.isclose(half - none, (one - none) / 2) and one > none + 1
    groups = sum(int(((truth.channel_BM >= lo) & (truth.channel_BM < hi)).any()) for lo, hi in _spans(teacher.head))
    assert torch.isclose(one - none, torch.tensor(0.25 * 6.0 * groups), rtol=1e-5)  # 3 m/s in both axes at every box
    with_it, without = (_run(_distiller(response_velocity_weight=w))["resp"] for w in (1.0, 0.0))
    assert with_it > without


def _spans(head: tuple[HeadMaps, ...]) -> list[tuple[int, int]]:
    ends = [sum(len(m.classes) for m in head[: i + 1]) for i in range(len(head))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_labeldistill_response_can_only_push_scores_down() -> None:
    batch, teacher = fake_batch(), _teachers()["lidar"]
    truth = head_targets(batch.boxes, GRID, teacher.head)
    gradients = {}
    for form in ("soft", "labeldistill"):
        student = same_head(fake_outputs(STUDENT, 2).head)
        response_loss(student, teacher.head, truth, form=form, box_weight=0).backward()
        gradients[form] = torch.cat([m.heatmap_logits_BKYX.grad for m in student], dim=1)
    assert (gradients["labeldistill"] >= 0).all() and (gradients["soft"] < 0).any()


def test_intensity_supervision_is_zero_where_the_maps_agree() -> None:
    distiller, batch, teachers = _distiller(**{**OFF, "stage3_supervision": True}), fake_batch(), _teachers()
    wanted = {"bev_stage1": teachers["lidar"].features["bev_stage1"]}
    target = intensity_maps(batch, wanted, (), IntensityRule())["bev_stage1"]
    logits = torch.logit(target.double(), eps=1e-12).float()
    student = fake_outputs(STUDENT, 1)
    features = {**student.features, "bev_intensity_camera": logits, "bev_intensity_radar": logits}
    equal = distiller(replace(student, features=features), teachers, batch)["int"]
    assert abs(float(equal)) < 1e-6 and _run(distiller)["int"] > 1e-3


def test_stage2_without_intensity_equals_an_independent_labeldistill() -> None:
    """I_L = 0 and eta = 0: the two feature terms are LabelDistill's, on merged features; written again from its code."""
    distiller = _distiller(preset="labeldistill_on_merged").eval()
    student, teachers, batch = fake_outputs(STUDENT, 1), _teachers(), fake_batch()
    out = distiller(student, teachers, batch)
    heatmap = head_targets(batch.boxes, GRID, student.head).heatmap_BKYX
    expected = {"lab2m": 0.0, "l2m": 0.0}
    for feature, stage in (("bev_fused", "bev_stage1"), ("bev_stage0", "bev_stage2")):
        scale = heatmap.sum(1, keepdim=True)
        if stage == "bev_stage2":
            scale = F.interpolate(scale, (12, 16), mode="bilinear", align_corners=True)
        third = STUDENT[feature][0] // 3
        for term, part, teacher in (("lab2m", slice(0, third), "label"), ("l2m", slice(third, 2 * third), "lidar")):
            x = distiller.adaptors[f"{term}_{feature}"](student.features[feature][:, part])
            weight = (scale > 0).float() if term == "lab2m" else scale
            squared = F.mse_loss(x, teachers[teacher].features[stage], reduction="none") * weight
            expected[term] += 0.3 * squared.sum() / max(1.0, float(weight.sum()))
    assert torch.allclose(out["lab2m"], expected["lab2m"], rtol=1e-6)
    assert torch.allclose(out["l2m"], expected["l2m"], rtol=1e-6)
    assert list(out) == ["l2m", "lab2m", "resp"]


def test_stage1_without_intensity_is_mse_weighted_by_objects() -> None:
    distiller = _distiller(**{**OFF, "stage1": True, "intensity_source": "none"}).eval()
    student, teachers, batch = fake_outputs(STUDENT, 1), _teachers(), fake_batch()
    out = distiller(student, teachers, batch)["l2r"]
    weight = 1 + head_targets(batch.boxes, GRID, student.head).heatmap_BKYX.amax(1, keepdim=True)
    x = distiller.adaptors["l2r"](student.features["bev_radar"][:, :6])
    squared = (x - teachers["lidar"].features["bev_stage1"]).square().sum(1, keepdim=True)
    assert torch.allclose(out, 0.3 * (weight * squared).sum() / weight.sum())


def test_stage1_weight_follows_the_intensity() -> None:
    batch = fake_batch()
    bright = batch.bev_maps["intensity_planes"].clone()
    bright[..., : GRID.nx * 2] = 0  # the left half of the grid has no return
    batch = replace(batch, bev_maps={"intensity_planes": bright})
    student = fake_outputs(STUDENT, 1, grad=True)
    distiller = _distiller(**{**OFF, "stage1": True}).eval()
    distiller.adaptors["l2r"] = nn.Conv2d(6, 8, 1)
    _run(distiller, student, batch)["l2r"].backward()
    gradient = student.features["bev_radar"].grad.abs().sum((0, 1))
    assert gradient[:, : GRID.nx // 2].sum() == 0 and gradient[:, GRID.nx // 2 :].sum() > 0


def test_partition_leaves_the_other_channels_free() -> None:
    student = fake_outputs(STUDENT, 1, grad=True)
    sum(_run(_distiller(), student).values()).backward()
    radar, fused = student.features["bev_radar"].grad, student.features["bev_fused"].grad
    assert radar[:, :6].abs().sum() > 0 and radar[:, 6:].abs().sum() == 0
    assert fused[:, :10].abs().sum() > 0 and fused[:, 10:].abs().sum() == 0
    student = fake_outputs(STUDENT, 1, grad=True)
    sum(_run(_distiller(partition="all", stage1_partition="all"), student).values()).backward()
    assert (student.features["bev_fused"].grad.abs().sum((0, 2, 3)) > 0).all()
    assert (student.features["bev_radar"].grad.abs().sum((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("receiver", ["radar", "camera"])
def test_other_receivers_touch_only_their_map(receiver: str) -> None:
    values = {**OFF, "stage2_lidar": True, "stage2_label": True, "receiver": receiver}
    student = fake_outputs(STUDENT, 1, grad=True)
    sum(_run(_distiller(**values), student).values()).backward()
    touched = {n for n, v in student.features.items() if v.grad is not None}
    assert touched == {f"bev_{receiver}"}


@pytest.mark.parametrize("term", ["l2r", "l2m", "lab2m", "resp", "int"])
def test_each_weight_scales_only_its_own_term(term: str) -> None:
    base = _run(_distiller())
    default = METHODS["imkd"].options.defaults()[f"lambda_{term}"]
    changed = _run(_distiller(**{f"lambda_{term}": 3 * default}))
    for name, value in base.items():
        assert torch.allclose(changed[name], (3 if name == term else 1) * value, rtol=1e-5)
    assert term not in _run(_distiller(**{f"lambda_{term}": 0}))


def test_evidence_halves_cells_far_from_radar_and_survives_no_radar() -> None:
    batch = fake_batch()
    distiller = _distiller(stage1_evidence=True)
    near = distiller._evidence(batch, torch.Size(GRID.shape))
    assert set(near.unique().tolist()) == {0.5, 1.0}
    radar = batch.radar
    empty = replace(
        radar,
        xyz_m=radar.xyz_m[:0],
        features_NF=radar.features_NF[:0],
        batch_index=radar.batch_index[:0],
        time_index=radar.time_index[:0],
        age_s=radar.age_s[:0],
        velocity_mps=radar.velocity_mps[:0],
    )
    assert (distiller._evidence(replace(batch, radar=empty), torch.Size(GRID.shape)) == 0.5).all()
    old = replace(radar, xyz_m=torch.zeros(1, 3), features_NF=radar.features_NF[:1], batch_index=radar.batch_index[:1] * 0)
    old = replace(old, time_index=radar.time_index[:1] * 0, age_s=torch.tensor([0.5]), velocity_mps=torch.tensor([[16.0, 0.0]]))
    (cells,) = (distiller._evidence(replace(batch, radar=old), torch.Size(GRID.shape))[0, 0] == 1).nonzero().unbind(1)[1:]
    x_m = GRID.x_min_m + (cells + 0.5) * GRID.cell_m
    assert abs(float(x_m.mean()) - 8.0) <= GRID.cell_m, "a return is where its velocity took it, as in the encoders"
    past = replace(radar, time_index=torch.ones_like(radar.time_index))
    assert (distiller._evidence(replace(batch, radar=past), torch.Size(GRID.shape)) == 0.5).all()
    assert all(torch.isfinite(v) for v in _run(distiller, batch=replace(batch, radar=empty)).values())


def test_empty_truth_and_empty_lidar_stay_finite() -> None:
    batch = without_boxes(fake_batch())
    empty = replace(batch, bev_maps={"intensity_planes": torch.zeros_like(batch.bev_maps["intensity_planes"])})
    for case in (batch, empty, without_boxes(fake_batch(), [0])):
        student = fake_outputs(STUDENT, 1, grad=True)
        out = _run(_distiller(), student, case)
        sum(out.values()).backward()
        assert all(torch.isfinite(v) for v in out.values())
    out = _run(_distiller(), batch=empty)
    assert out["l2r"] == 0 and out["l2m"] == 0 and out["lab2m"] == 0


def test_warm_up_covers_all_terms_but_the_intensity_supervision() -> None:
    base, warm = _run(_distiller()), _distiller(warmup_steps=4)
    first, second = _run(warm), _run(warm)
    for name, value in base.items():
        if name == "int":
            assert torch.allclose(first[name], value)
        else:
            assert torch.allclose(first[name], value / 4, rtol=1e-5) and torch.allclose(second[name], value / 2, rtol=1e-4)
    assert int(warm.state_dict()["step"]) == 2


def test_grids_must_match_and_teachers_must_be_there() -> None:
    wrong = {**LIDAR, "bev_stage1": (8, GRID.ny // 2, GRID.nx // 2)}
    with pytest.raises(MismatchError, match="bev_stage1"):
        Imkd(METHODS["imkd"].make_options({"stage2_label": False}), STUDENT, {"lidar": wrong}, GRID)
    with pytest.raises(MissingFeatureError, match="label"):
        _distiller()(fake_outputs(STUDENT, 1), {"lidar": fake_outputs(LIDAR, 2)}, fake_batch())
    student = fake_outputs({k: v for k, v in STUDENT.items() if k != "bev_radar"}, 1)
    with pytest.raises(MissingFeatureError, match="bev_radar"):
        _distiller()(student, _teachers(), fake_batch())
    moved = replace(GRID, x_min_m=GRID.x_min_m + 0.8)
    with pytest.raises(MismatchError, match="metres"):
        _distiller()(replace(fake_outputs(STUDENT, 1), grid=moved), _teachers(), fake_batch())


def test_contradictory_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="occupancy"):
        METHODS["imkd"].make_options({"intensity_control": "occupancy", "intensity_source": "heatmap"})
    with pytest.raises(RecipeError, match="stage3"):
        METHODS["imkd"].make_options({"stage3": False})
    assert METHODS["imkd"].changes(METHODS["imkd"].make_options({"stage3": False, "stage3_supervision": False})) == {}
    for control in ("permuted", "other_sample", "occupancy"):
        with pytest.raises(RecipeError, match="no intensity map"):
            METHODS["imkd"].make_options({"intensity_control": control, "intensity_source": "none"})
