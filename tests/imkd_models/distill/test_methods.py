"""What holds for every method: frozen teachers, finite corner cases, falling terms, a student that keeps no trace."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from batches import make_batch
from distill_fakes import FUSION, GRID, LABEL, LIDAR, STUDENT, FakeNet, fake_batch, planes, without_boxes
from torch import nn

from imkd_data.errors import MismatchError
from imkd_data.loader.batch import Batch
from imkd_models.distill import METHODS, Distiller, FrozenTeacher, check_needs, gradient_norms, make_method
from imkd_models.outputs import Outputs
from imkd_models.presets import LabelEncoder, build_model, tiny, tiny_config, tiny_fusion, tiny_label, tiny_lidar

SHAPES = {"lidar": LIDAR, "label": LABEL, "fusion": FUSION}


def _teachers(names: tuple[str, ...]) -> dict[str, FrozenTeacher]:
    return {n: FrozenTeacher(FakeNet(SHAPES[n], seed=i + 5), name=n) for i, n in enumerate(names)}


class TrainStep(nn.Module):
    """Student and distiller together, as the trainer wraps them."""

    def __init__(self, student: nn.Module, distiller: Distiller, teachers: dict[str, FrozenTeacher]) -> None:
        super().__init__()
        self.student, self.distiller = student, distiller
        self.teachers = nn.ModuleDict(teachers)

    def forward(self, batch: Batch) -> tuple[Outputs, dict[str, torch.Tensor]]:
        outputs = self.student(batch)
        return outputs, self.distiller(outputs, {n: t(batch) for n, t in self.teachers.items()}, batch)


def _fake_step(name: str, **values) -> TrainStep:
    torch.manual_seed(0)
    method = METHODS[name]
    options = method.make_options(values)
    student, teachers = FakeNet(STUDENT, seed=1), _teachers(method.teachers_for(options))
    check_needs(method.needs_for(options), student, teachers)
    if method.prepare:
        method.prepare(options, student, teachers)
    return TrainStep(student, method.build(options, student, teachers, GRID), teachers)


@pytest.mark.parametrize("name", METHODS)
def test_teachers_are_bit_identical_after_ten_steps_and_get_no_gradient(name: str) -> None:
    step = _fake_step(name).train()
    before = {n: t.fingerprint() for n, t in step.teachers.items()}
    optimiser = torch.optim.AdamW(step.parameters(), lr=1e-3, weight_decay=0.01)
    for i in range(10):
        _, terms = step.train()(fake_batch(seed=i % 2))
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
    for n, teacher in step.teachers.items():
        assert teacher.fingerprint() == before[n]
        assert not teacher.training and not any(m.training for m in teacher.network.modules())
        assert all(p.grad is None for p in teacher.network.parameters())
    assert not any("teacher" in key for key in step.state_dict())
    copy = _fake_step(name)
    copy.load_state_dict(step.state_dict())


def _every_term_falls(name: str, steps: int) -> None:
    # Teachers are untrained here: take their answers where they are, however unsure.
    values = {"adaptive_smooth": {"quality": "conf"}, "dual_distill": {"tau": 1.0, "nms": "circle"}}.get(name, {})
    step, batch = _fake_step(name, **values).train(), fake_batch()
    groups = [{"params": step.student.parameters()}, *step.distiller.parameter_groups(0.0)]
    optimiser = torch.optim.AdamW(groups, lr=4e-3, weight_decay=0.0)
    history = []
    for _ in range(steps):
        _, terms = step(batch)
        assert all(torch.isfinite(v) for v in terms.values())
        history.append({k: float(v.detach()) for k, v in terms.items()})
        optimiser.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(step.parameters(), 5.0)
        optimiser.step()
    for term in history[0]:
        start = sum(h[term] for h in history[:3]) / 3
        end = sum(h[term] for h in history[-3:]) / 3
        assert end < start, (term, start, end)


@pytest.mark.parametrize("name", METHODS)
def test_every_term_falls_on_two_samples_without_nan(name: str) -> None:
    _every_term_falls(name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_term_falls_over_200_steps(name: str) -> None:
    _every_term_falls(name, 200)


@pytest.mark.parametrize("name", METHODS)
def test_float64_inputs_of_losses_and_autocast_give_float32_terms(name: str) -> None:
    step = _fake_step(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, terms = step(fake_batch())
    assert all(v.dtype == torch.float32 for v in terms.values())


@pytest.mark.parametrize("name", METHODS)
def test_control_of_a_teacher_shown_the_wrong_sample_changes_the_terms(name: str) -> None:
    right, wrong = _fake_step(name).eval(), _fake_step(name, teacher_sample="other").eval()
    a, b = right(fake_batch())[1], wrong(fake_batch())[1]
    assert a.keys() == b.keys() and any(not torch.allclose(a[k], b[k]) for k in a)
    with pytest.raises(MismatchError, match="two samples"):
        wrong(fake_batch(batch=1))


@pytest.mark.parametrize("name", METHODS)
def test_terms_end_with_their_gradients_at_end_step(name: str) -> None:
    endless, ending = _fake_step(name).train(), _fake_step(name, end_step=2).train()
    batch = fake_batch()
    outputs = endless.student(batch)
    theirs = {n: t(batch) for n, t in endless.teachers.items()}
    for _ in range(2):
        wanted, terms = endless.distiller(outputs, theirs, batch), ending.distiller(outputs, theirs, batch)
        assert all(torch.allclose(terms[k], wanted[k]) for k in wanted) and any(v > 0 for v in wanted.values())
    ended = ending.distiller(outputs, theirs, batch)
    assert ended.keys() == terms.keys() and not any(bool(v) for v in ended.values())
    sum(ended.values()).backward()
    given = [p.grad for p in (*endless.student.parameters(), *ending.distiller.parameters()) if p.grad is not None]
    assert given and not any(bool(g.any()) for g in given)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_several_micro_batches_counts_once(name: str) -> None:
    """Schedules run in optimiser steps, however a global batch is divided."""
    step = _fake_step(name, end_step=2).train()
    step.distiller.micro_batches = 3
    outputs = step.student(batch := fake_batch())
    theirs = {n: t(batch) for n, t in step.teachers.items()}
    acts = []
    for _ in range(8):
        acts.append(any(bool(v) for v in step.distiller(outputs, theirs, batch).values()))
    assert acts == [True] * 6 + [False] * 2 and int(step.distiller.step) == 2


def test_joined_methods_hand_the_micro_batches_on() -> None:
    method = make_method("adaptive_smooth+dual_distill")
    options = method.make_options({"dual_distill": {"head_from_teacher": False}})
    student, teachers = FakeNet(STUDENT, seed=1), _teachers(method.teachers_for(options))
    distiller = method.build(options, student, teachers, GRID).train()
    distiller.micro_batches = 2
    outputs = student(batch := fake_batch())
    theirs = {n: t(batch) for n, t in teachers.items()}
    for _ in range(4):
        distiller(outputs, theirs, batch)
    assert {int(part.step) for part in distiller.parts.values()} == {2}


def test_gradient_norms_are_those_of_autograd() -> None:
    step = _fake_step("crkd")
    outputs, terms = step(fake_batch())
    fused, radar = outputs.features["bev_fused"], outputs.features["bev_radar"]
    norms = gradient_norms(terms, {"fused": [fused], "radar": [radar], "both": [radar, fused]})
    assert norms["csrd"]["fused"] == 0 and norms["csrd"]["radar"] == norms["csrd"]["both"] > 0
    assert norms["msfd_fused"]["fused"] > 0 and norms["reld"]["fused"] > 0 and norms["msfd_camera"]["both"] == 0
    (wanted,) = torch.autograd.grad(terms["reld"], fused, retain_graph=True)
    assert norms["reld"]["fused"] == pytest.approx(float(wanted.norm()), rel=1e-6)


def test_joined_methods_give_the_terms_of_both_and_keep_the_projector_out_of_decay() -> None:
    method = make_method("imkd+dual_distill")
    options = method.make_options({"imkd": {"stage1": False}, "dual_distill": {"lambda_crd": 0, "head_from_teacher": False}})
    student, teachers = FakeNet(STUDENT, seed=1), _teachers(method.teachers_for(options))
    distiller = method.build(options, student, teachers, GRID)
    step = TrainStep(student, distiller, teachers)
    _, terms = step(fake_batch())
    assert {k.split("/")[0] for k in terms} == {"imkd", "dual_distill"} and "imkd/l2m" in terms
    assert len(distiller.parameter_groups(0.1)[1]["params"]) == 2
    assert options.neighbours == ()
    other = method.make_options({"imkd": {"intensity_control": "other_sample"}, "dual_distill.teacher_sample": "other"})
    assert other.neighbours == ("imkd.intensity_control=other_sample", "dual_distill.teacher_sample=other")
    without = method.make_options(method.twin_options)
    assert method.build(without, student, teachers, GRID)(step(fake_batch())[0], {}, fake_batch()) == {}


# -------------------------------------------------------------------------------------------------- the project's networks

IMAGE = (64, 96)


@cache
def _real_teachers() -> dict[str, FrozenTeacher]:
    torch.manual_seed(3)
    lidar = tiny_lidar(grid=GRID)
    fusion_config = tiny_fusion(grid=GRID, **_branches()).config
    out = {"lidar": lidar, "label": tiny_label(lidar), "fusion": build_model(fusion_config, pretrained=False)}
    return {n: FrozenTeacher(m, name=n) for n, m in out.items()}


def _branches():
    from imkd_models.presets import tiny_lidar_config

    student = tiny_config(radar=False, depth_input=True, grid=GRID, image_hw_px=IMAGE)
    return {"lidar": tiny_lidar_config(grid=GRID), "student": student}


def _real_student(**changes):
    torch.manual_seed(11)
    return tiny(grid=GRID, image_hw_px=IMAGE, **changes)


@cache
def _real_batch() -> Batch:
    batch = make_batch(GRID, boxes=10, image_hw_px=IMAGE)
    return replace(batch, bev_maps={**batch.bev_maps, "intensity_planes": planes()}, timestamp_us_B=torch.tensor([5, 6]))


def _real_step(name: str, **values) -> TrainStep:
    method = METHODS[name]
    options = method.make_options(values)
    student = _real_student(**method.changes(options))
    teachers = {n: _real_teachers()[n] for n in method.teachers_for(options)}
    check_needs(method.needs_for(options), student, teachers, batch=("boxes", "intensity_planes"))
    if method.prepare:
        assert method.prepare(options, student, teachers) or not teachers
    return TrainStep(student, method.build(options, student, teachers, GRID), teachers)


def _touched(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in METHODS), ("dual_distill", {"teacher": "fusion"})], ids=str
)
def test_methods_run_on_the_projects_networks(name: str, options: dict[str, str]) -> None:
    step = _real_step(name, **options).train()
    before = {n: t.fingerprint() for n, t in step.teachers.items()}
    outputs, terms = step(_real_batch())
    loss = sum(step.student.loss(outputs, _real_batch()).values()) + sum(terms.values())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) for v in terms.values())
    assert {n: t.fingerprint() for n, t in step.teachers.items()} == before
    assert _touched(step.student.radar) and _touched(step.student.camera.image)
    assert all(p.grad is not None for p in step.distiller.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_exported_student_has_no_trace_of_the_method(name: str) -> None:
    """Same parameters as the undistilled twin, no key of teacher or distiller, same outputs when loaded alone."""
    step = _real_step(name).train()
    step(_real_batch())
    method = METHODS[name]
    twin = _real_student(**method.student_changes)
    state = {k.removeprefix("student."): v for k, v in step.state_dict().items() if k.startswith("student.")}
    assert state.keys() == twin.state_dict().keys()
    assert sum(p.numel() for p in step.student.parameters()) == sum(p.numel() for p in twin.parameters())
    twin.load_state_dict(state)
    blind = replace(_real_batch(), lidar=None, bev_maps={}, image_maps={}, boxes=None)
    a, b = step.student.eval()(_real_batch()), twin.eval()(blind)
    for x, y in zip(a.head, b.head, strict=True):
        assert torch.equal(x.heatmap_logits_BKYX, y.heatmap_logits_BKYX)
        assert torch.equal(x.velocity_mps_B2YX, y.velocity_mps_B2YX)


def _flops(student: nn.Module) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        student.eval()(_real_batch())  # tables that are made once
        with FlopCounterMode(display=False) as counter:
            student(_real_batch())
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_added_at_inference_but_what_the_method_says(name: str) -> None:
    """FLOPs of the distilled student are the twin's; without student changes they are the plain student's."""
    step = _real_step(name)
    flops = _flops(step.student)
    assert flops == _flops(_real_student(**METHODS[name].student_changes)) > 0
    assert (flops == _flops(_real_student())) == (METHODS[name].student_changes == {})


@pytest.mark.parametrize("name", METHODS)
def test_empty_truth_and_empty_radar_stay_finite_on_the_projects_networks(name: str) -> None:
    batch = without_boxes(_real_batch())
    radar = batch.radar
    none = torch.zeros(len(radar.xyz_m), dtype=torch.bool)
    empty = replace(
        radar,
        **{n: getattr(radar, n)[none] for n in ("xyz_m", "features_NF", "batch_index", "time_index", "age_s", "velocity_mps")},
    )
    step = _real_step(name).train()
    outputs, terms = step(replace(batch, radar=empty))
    loss = sum(terms.values()) + sum(step.student.loss(outputs, batch).values())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in step.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_undistilled_twin_is_the_same_network_with_the_same_start_and_no_terms(name: str) -> None:
    method, step, twin = METHODS[name], _real_step(name), _real_step(name, **METHODS[name].twin_options)
    for (a, p), (b, q) in zip(step.student.state_dict().items(), twin.student.state_dict().items(), strict=True):
        assert a == b and torch.equal(p, q)
    assert twin(_real_batch())[1] == {} and not list(twin.distiller.parameters())
    assert set(twin.teachers) <= {"lidar"} and (name == "dual_distill") == bool(twin.teachers), method.twin


def test_stage_one_teaches_the_radar_encoder_and_not_the_images() -> None:
    off = {"stage2_lidar": False, "stage2_label": False, "response": "off", "stage3_supervision": False}
    step = _real_step("imkd", **off)
    _, terms = step(_real_batch())
    sum(terms.values()).backward()
    assert list(terms) == ["l2r"]
    assert _touched(step.student.radar) and not _touched(step.student.camera)
    both = _real_step("imkd", stage1=False)
    _, terms = both(_real_batch())
    (terms["l2m"] + terms["lab2m"]).backward()
    assert _touched(both.student.radar) and _touched(both.student.camera)


def test_csrd_teaches_calibration_and_pillars_and_not_the_camera() -> None:
    step = _real_step("crkd", lambda_resp=0, lambda_fused=0, lambda_cam=0, lambda_rel=0)
    _, terms = step(_real_batch())
    terms["csrd"].backward()
    assert _touched(step.student.calibration) and _touched(step.student.radar) and not _touched(step.student.camera)


def _fusion_teacher() -> FrozenTeacher:
    torch.manual_seed(3)
    return FrozenTeacher(build_model(tiny_fusion(grid=GRID, **_branches()).config, pretrained=False), name="fusion")


def _crkd_teacher(*defects: str) -> FrozenTeacher:
    """The LiDAR-camera teacher as CRKD has it once it is built with these defects."""
    teacher, method = _fusion_teacher(), METHODS["crkd"]
    options = method.make_options({"defects": defects})
    method.build(options, _real_student(**method.changes(options)), {"fusion": teacher}, GRID)
    return teacher


def test_the_defect_of_initialising_last_resets_the_teachers_image_backbone_and_nothing_else() -> None:
    right, reset, again = _crkd_teacher(), _crkd_teacher("teacher_backbone_reset"), _crkd_teacher("teacher_backbone_reset")
    assert right.fingerprint() == _fusion_teacher().fingerprint() and not right.altered and reset.altered
    states = [t.network.state_dict() for t in (right, reset)]
    changed = {k for k in states[0] if not torch.equal(states[0][k], states[1][k])}
    backbone = {k for k, p in right.network.named_parameters() if k.startswith("camera.image.backbone.") and p.dim() > 1}
    assert backbone and changed == backbone, "weights; scales and shifts of norms start alike in every network"
    assert reset.fingerprint() == again.fingerprint()
    assert not any(p.requires_grad for p in reset.network.parameters()) and not reset.network.training


def test_the_defect_of_half_points_rounds_what_the_teacher_sees_and_not_the_batch() -> None:
    right, halved = _crkd_teacher(), _crkd_teacher("half_points")
    assert halved.altered and halved.fingerprint() == right.fingerprint()
    batch = _real_batch()
    xyz = batch.lidar.xyz_m.clone()
    found = halved(batch)
    assert torch.equal(batch.lidar.xyz_m, xyz), "the batch keeps its points"
    names = ("xyz_m", "features_NF", "age_s")
    rounded = replace(batch.lidar, **{n: getattr(batch.lidar, n).half().float() for n in names})
    wanted, other = right(replace(batch, lidar=rounded)), right(batch)
    assert not torch.equal(rounded.xyz_m, xyz)
    assert torch.equal(found.features["bev_fused"], wanted.features["bev_fused"])
    assert not torch.equal(found.features["bev_fused"], other.features["bev_fused"])


def test_all_switches_off_is_the_plain_student_bit_for_bit() -> None:
    """IMKD without any stage: same names, same loss, same gradient as the student alone."""
    off = {"stage1": False, "stage2_lidar": False, "stage2_label": False, "response": "off"}
    step = _real_step("imkd", **off, stage3=False, stage3_supervision=False).train()
    plain = _real_student().train()
    assert [n for n, _ in step.student.named_parameters()] == [n for n, _ in plain.named_parameters()]
    outputs, terms = step(_real_batch())
    assert terms == {}
    losses = []
    for model, out in ((step.student, outputs), (plain, plain(_real_batch()))):
        loss = sum(model.loss(out, _real_batch()).values())
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for a, b in zip(step.student.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


def test_label_teacher_gives_the_lidar_teachers_stages() -> None:
    label = _real_teachers()["label"]
    assert isinstance(label.network, LabelEncoder)
    outputs = label(_real_batch())
    for name in ("bev_stage1", "bev_stage2"):
        assert outputs.features[name].shape[1:] == _real_teachers()["lidar"].feature_shapes[name]
