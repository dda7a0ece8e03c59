"""Adaptive-Smooth: invariants of section 8 of its specification that concern the distiller."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import make_batch
from distill_fakes import FUSION, GRID, STUDENT, fake_batch, fake_head, fake_outputs, generator, same_head, without_boxes

from imkd_data.errors import MismatchError, RecipeError
from imkd_models.distill import METHODS, check_needs
from imkd_models.distill.adaptive_smooth import AdaptiveSmooth, Alignment, lose_simulated, response_weights, soft_response
from imkd_models.distill.terms import head_targets, smooth_l1
from imkd_models.outputs import Outputs
from imkd_models.presets import tiny, tiny_lidar

TERMS = ["l2c", "m2m", "srd_class", "srd_box"]


def response(student, teacher, truth, boxes, grid, options):
    """``soft_response`` under its own weights."""
    return soft_response(student, teacher, truth, response_weights(teacher, truth, boxes, grid, options), options)


def _options(**values):
    return METHODS["adaptive_smooth"].make_options(values)


def _distiller(**values) -> AdaptiveSmooth:
    torch.manual_seed(0)
    return AdaptiveSmooth(_options(**values), STUDENT, FUSION)


def _teacher(seed: int = 7) -> dict[str, Outputs]:
    return {"fusion": fake_outputs(FUSION, seed)}


def _run(distiller: AdaptiveSmooth, student=None, teachers=None, batch=None) -> dict[str, torch.Tensor]:
    return distiller(student or fake_outputs(STUDENT, 1, grad=True), teachers or _teacher(), batch or fake_batch())


def _maps(noise: float, seed: int = 0, shape=(2, 16, 20, 24)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = generator(seed)
    teacher = torch.randn(shape, generator=g)
    student = (teacher + noise * torch.randn(shape, generator=g)).requires_grad_()
    return student, teacher, torch.ones(shape[0], 1, *shape[2:])


def test_all_terms_are_there_finite_and_positive() -> None:
    out = _run(_distiller())
    assert list(out) == TERMS and all(torch.isfinite(v) and v > 0 for v in out.values())


def test_momentum_is_meant_over_an_optimiser_step() -> None:
    """Three micro-batches of a step move the running values as far as one batch does."""
    whole, parts = Alignment(16, _options()), Alignment(16, _options())
    for align in (whole, parts):
        align(*_maps(0.3))  # started
    assert torch.equal(whole.mean, parts.mean)
    parts.micro_batches = 3
    other = _maps(0.9, seed=1)
    whole(*other)
    for _ in range(3):
        parts(*other)
    for name in ("scale", "mean", "spread"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), rtol=2e-3), name
    assert not torch.allclose(whole.mean, Alignment(16, _options()).mean)


@pytest.mark.parametrize(
    "values", [{}, {"granularity": True}, {"huber": True}, {"beta_rule": "variance"}, {"pixel_loss": "mse"}]
)
def test_equal_maps_give_zero_with_zero_gradient(values: dict) -> None:
    align = Alignment(16, _options(**values))
    for _ in range(2):
        student, teacher, mask = _maps(0.0)
        loss = align(student, teacher, mask)
        loss.backward()
        assert loss == 0 and student.grad.abs().max() == 0


def test_equal_answers_give_zero_response() -> None:
    batch, teacher = fake_batch(), _teacher()["fusion"]
    truth = head_targets(batch.boxes, GRID, teacher.head).heatmap_BKYX
    student = same_head(teacher.head)
    cells, box = response(student[5], teacher.head[5], truth[:, 8:], batch.boxes, GRID, _options(quality="conf"))
    assert cells == 0 and box == 0


def test_empty_mask_changes_no_buffer() -> None:
    align = Alignment(16, _options())
    before = {k: v.clone() for k, v in align.state_dict().items()}
    student, teacher, mask = _maps(1.0)
    assert align(student, teacher, 0 * mask) == 0
    assert all(torch.equal(v, before[k]) for k, v in align.state_dict().items())
    align(student, teacher, mask)
    assert bool(align.started) and not torch.equal(align.scale, before["scale"])


def test_first_call_sets_the_statistics_later_calls_follow_slowly_and_eval_does_not() -> None:
    align = Alignment(16, _options())
    student, teacher, mask = _maps(0.5)
    align(student, teacher, mask)
    scale = teacher.square().mean((0, 2, 3)).sqrt()
    assert torch.allclose(align.scale, scale, rtol=1e-5)
    d = ((student - teacher).abs() / scale[None, :, None, None]).mean(1)
    assert torch.allclose(align.mean, d.mean(), rtol=1e-5)
    align(student, 3 * teacher, mask)
    assert torch.allclose(align.scale, 0.9 * scale + 0.1 * 3 * scale, rtol=1e-5)
    align.eval()
    frozen = align.scale.clone()
    align(student, teacher, mask)
    assert torch.equal(align.scale, frozen)


def test_dead_teacher_channel_stays_bounded() -> None:
    align = Alignment(16, _options())
    student, teacher, mask = _maps(0.5)
    teacher[:, 3] = 0
    assert torch.isfinite(align(student, teacher, mask))
    assert align.used_scale().min() >= 0.049 * align.scale.mean()


def test_knee_lies_within_its_limits_grows_with_discrepancy_and_eta_zero_is_one_knee() -> None:
    align = Alignment(4, _options())
    align.mean, align.spread, align.started = torch.tensor(0.3), torch.tensor(0.1), torch.tensor(True)
    d = torch.linspace(0, 50, 4001).view(1, 1, 1, -1)
    beta = align.knee(d)
    assert beta.min() >= 1e-2 and beta.max() <= 1 and (beta.diff() >= 0).all() and beta.unique().numel() > 10
    align.o = _options(eta=0.0)
    assert align.knee(d).unique().tolist() == pytest.approx([0.3])
    align.o = _options(beta_rule="variance")
    assert align.knee(d).unique().tolist() == pytest.approx([0.3 - 0.01])


def test_loss_is_smooth_at_the_knee() -> None:
    beta = torch.tensor(0.4)
    x = torch.tensor([0.4 - 1e-4, 0.4 + 1e-4], requires_grad=True)
    value = smooth_l1(x, beta)
    (slope,) = torch.autograd.grad(value.sum(), x)
    value = value.detach()
    assert value[0] == pytest.approx(0.2, abs=2e-4) and value[1] == pytest.approx(0.2, abs=2e-4)
    assert slope[0] == pytest.approx(1.0, abs=1e-3) and slope[1] == 1.0


def _gradient_norm(noise: float, **values) -> float:
    align = Alignment(16, _options(**values))
    student, teacher, mask = _maps(noise)
    align(student, teacher, mask).backward()
    return float(student.grad.norm())


def test_the_floor_makes_pressure_fade_and_without_it_it_does_not() -> None:
    assert _gradient_norm(1e-2) > 5 * _gradient_norm(1e-3)
    ratio = _gradient_norm(1e-2, beta_min=0.0) / _gradient_norm(1e-3, beta_min=0.0)
    assert ratio == pytest.approx(1.0, abs=0.05)


def test_no_gradient_passes_through_the_knee() -> None:
    """With beta held fixed the gradient is the same: the student cannot lower the loss by raising the discrepancy."""
    align = Alignment(16, _options())
    student, teacher, mask = _maps(0.3)
    align(student, teacher, mask).backward()
    align.eval()
    again = student.detach().clone().requires_grad_()
    r = align.used_scale()
    difference = (again - teacher) / r
    beta = align.knee(difference.detach().abs().mean(1, keepdim=True))
    (smooth_l1(difference, beta).mean(1).sum() / mask.sum()).backward()
    assert torch.allclose(student.grad, again.grad, atol=1e-9)


def test_scale_of_both_maps_does_not_matter() -> None:
    a, b = Alignment(16, _options()), Alignment(16, _options())
    student, teacher, mask = _maps(0.4)
    assert torch.allclose(a(student, teacher, mask), b(10 * student, 10 * teacher, mask), rtol=1e-5)


def test_windows_with_all_weight_on_one_are_plain_smooth_l1(monkeypatch: pytest.MonkeyPatch) -> None:
    align = Alignment(16, _options(granularity=True))
    student, teacher, mask = _maps(0.8)
    fixed = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
    monkeypatch.setattr(align, "window_shares", lambda d: fixed.expand(len(d), 3, *d.shape[2:]))
    loss = align(student, teacher, mask)
    r = align.used_scale()
    expected = F.smooth_l1_loss(student / r, teacher / r, beta=1.0)
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_window_shares_sum_to_one_and_widen_with_discrepancy() -> None:
    align = Alignment(4, _options(granularity=True))
    align.mean, align.spread = torch.tensor(0.5), torch.tensor(0.1)
    shares = align.window_shares(torch.tensor([0.0, 0.5, 2.0]).view(1, 1, 1, 3))
    assert torch.allclose(shares.sum(1), torch.ones(1, 1, 3))
    assert shares[0, :, 0].argmax(0).tolist() == [0, 1, 2]


def test_empty_truth_leaves_only_the_background_alignment() -> None:
    out = _run(_distiller(), batch=without_boxes(fake_batch()))
    assert out["l2c"] == 0 and out["srd_class"] == 0 and out["srd_box"] == 0
    assert torch.isfinite(out["m2m"]) and out["m2m"] > 0
    assert all(torch.isfinite(v) for v in _run(_distiller(), batch=without_boxes(fake_batch(), [0])).values())


def _group(index: int = 0):
    batch, teacher = fake_batch(), _teacher()["fusion"].head[index]
    first = sum(len(g.classes) for g in _teacher()["fusion"].head[:index])
    truth = head_targets(batch.boxes, GRID, fake_head(0)).heatmap_BKYX[:, first : first + len(teacher.classes)]
    return batch, teacher, truth


def test_response_weight_is_zero_below_q_min_and_gives_no_gradient_there() -> None:
    batch, teacher, truth = _group()
    student = same_head(fake_head(3))[0]
    options = _options(quality="conf", q_min=0.4)
    weight = response_weights(teacher, truth, batch.boxes, GRID, options)
    confidence = torch.sigmoid(teacher.heatmap_logits_BKYX).amax(1, keepdim=True)
    assert ((weight == 0) == (confidence < 0.4)).all() and (weight > 0).any()
    cells, box = response(student, teacher, truth, batch.boxes, GRID, options)
    (cells + box).backward()
    ignored = (weight == 0).expand_as(student.heatmap_logits_BKYX)
    assert student.heatmap_logits_BKYX.grad[ignored].abs().max() == 0
    assert student.velocity_mps_B2YX.grad[(weight == 0).expand(-1, 2, -1, -1)].abs().max() == 0


def _slow_nearness(teacher, boxes, row: int, column: int, sample: int) -> float:
    x = (column + float(teacher.offset_cells_B2YX[sample, 0, row, column])) * GRID.cell_m + GRID.x_min_m
    y = (row + float(teacher.offset_cells_B2YX[sample, 1, row, column])) * GRID.cell_m + GRID.y_min_m
    best = float("inf")
    for m in boxes.valid_BM[sample].nonzero().flatten().tolist():
        if int(boxes.label_BM[sample, m]) == 0:
            cx, cy = boxes.centre_m_BM3[sample, m, :2].tolist()
            best = min(best, ((cx - x) ** 2 + (cy - y) ** 2) ** 0.5)
    return float(torch.tensor(-best / 2).exp()) if best < 2 else 0.0


def test_response_weight_falls_with_distance_and_false_positives_get_none() -> None:
    batch, teacher, truth = _group()
    loud = replace(teacher, heatmap_logits_BKYX=torch.full_like(teacher.heatmap_logits_BKYX, 1.0))
    weight = response_weights(loud, truth, batch.boxes, GRID, _options(alpha=0.0))
    for sample, row, column in ([[0, 0, 0], [1, 23, 31], *(weight > 0).nonzero()[::7, [0, 2, 3]].tolist()])[:12]:
        expected = _slow_nearness(loud, batch.boxes, row, column, sample)
        assert float(weight[sample, 0, row, column]) == pytest.approx(expected, abs=1e-5)
    assert (weight == 0).float().mean() > 0.8  # everywhere else the teacher's confidence is a false positive
    assert (response_weights(loud, truth, batch.boxes, GRID, _options(quality="conf")) > 0.7).all()
    assert (response_weights(loud, truth, batch.boxes, GRID, _options(quality="none")) == 1).all()
    labelled = response_weights(loud, truth, batch.boxes, GRID, _options(quality="label"))[:, 0]
    assert torch.allclose(labelled, truth.amax(1) * torch.sigmoid(torch.tensor(1.0)))
    full = response_weights(loud, truth, batch.boxes, GRID, _options(alpha=1.0))
    assert (full > 0.7).all()  # 0 to the power 0 is 1
    louder = replace(teacher, heatmap_logits_BKYX=torch.full_like(teacher.heatmap_logits_BKYX, 3.0))
    more = response_weights(louder, truth, batch.boxes, GRID, _options())
    assert (more >= response_weights(loud, truth, batch.boxes, GRID, _options())).all()


def test_the_log_says_how_much_is_imitated_and_how_much_of_it_is_true() -> None:
    distiller, batch, teachers = _distiller(quality="conf", lambda_l2c=0, lambda_m2m=0), fake_batch(), _teacher()
    _run(distiller, teachers=teachers, batch=batch)
    truth = head_targets(batch.boxes, GRID, teachers["fusion"].head).heatmap_BKYX
    total = on_objects = 0.0
    first = 0
    for maps in teachers["fusion"].head:
        confidence = torch.sigmoid(maps.heatmap_logits_BKYX).amax(1)
        confidence = confidence * (confidence >= distiller.o.q_min)
        own = truth[:, first : first + len(maps.classes)].amax(1) > 0
        total, on_objects = total + float(confidence.sum()), on_objects + float(confidence[own].sum())
        first += len(maps.classes)
    assert float(distiller.diagnostics["srd_weight"]) == pytest.approx(total, rel=1e-4)
    assert float(distiller.diagnostics["srd_precision"]) == pytest.approx(on_objects / total, rel=1e-4) and on_objects > 0
    silent = {"fusion": replace(teachers["fusion"], head=fake_head(3, mean=-30.0))}
    _run(distiller, teachers=silent, batch=batch)
    assert "srd_precision" not in distiller.diagnostic_values()


def test_false_positive_tail_acts_only_where_there_is_no_truth() -> None:
    batch, teacher, truth = _group()
    silent = replace(teacher, heatmap_logits_BKYX=torch.full_like(teacher.heatmap_logits_BKYX, -9.0))
    student = same_head(fake_head(3, mean=1.0))[0]
    cells, box = response(student, silent, truth, batch.boxes, GRID, _options(fp_tail=0.1))
    (cells + box).backward()
    gradient = student.heatmap_logits_BKYX.grad
    assert box == 0 and (gradient[truth > 0] == 0).all() and (gradient[truth == 0] > 0).any()
    assert response(student, silent, truth, batch.boxes, GRID, _options())[0] == 0


def test_places_and_masks_are_switches() -> None:
    student = fake_outputs(STUDENT, 1, grad=True)
    _run(_distiller(l2c="camera"), student)["l2c"].backward()
    assert student.features["bev_camera"].grad is not None and student.features["bev_sim"].grad is None
    values = {m: float(_run(_distiller(m2m_mask=m))["m2m"].detach()) for m in ("soft", "ones", "objects")}
    assert len(set(values.values())) == 3
    assert list(_run(_distiller(lambda_m2m=0, lambda_srd=0))) == ["l2c"]


def test_other_widths_get_a_convolution_equal_ones_none() -> None:
    assert isinstance(_distiller().bring["m2m"], torch.nn.Identity)
    wide = AdaptiveSmooth(_options(), STUDENT, {**FUSION, "bev_fused": (30, *GRID.shape)})
    assert wide.bring["m2m"].weight.shape == (30, 15, 1, 1)


def test_finer_teacher_maps_are_brought_to_the_students_grid() -> None:
    fine = {**FUSION, "bev_fused": (15, 48, 64), "bev_lidar": (14, 48, 64)}
    out = _run(AdaptiveSmooth(_options(), STUDENT, fine), teachers={"fusion": fake_outputs(fine, 3)})
    assert all(torch.isfinite(v) for v in out.values())
    teacher = _teacher()["fusion"]
    with pytest.raises(MismatchError, match="metres"):
        _run(_distiller(), teachers={"fusion": replace(teacher, grid=replace(GRID, y_min_m=GRID.y_min_m - 0.8))})


def test_a_lidar_teacher_alone_gives_its_neck() -> None:
    options = _options(teacher="lidar", lambda_m2m=0)
    lidar = tiny_lidar(grid=GRID)
    check_needs(METHODS["adaptive_smooth"].needs_for(options), STUDENT, {"lidar": lidar})
    out = _run(
        AdaptiveSmooth(options, STUDENT, lidar.feature_shapes), teachers={"lidar": fake_outputs(lidar.feature_shapes, 3)}
    )
    assert list(out) == ["l2c", "srd_class", "srd_box"] and all(torch.isfinite(v) and v > 0 for v in out.values())


def test_resuming_in_mid_run_equals_no_stop() -> None:
    straight, first, second = _distiller(), _distiller(), _distiller()
    batches = [fake_batch(seed=i) for i in range(3)]
    for i, batch in enumerate(batches):
        expected = _run(straight, fake_outputs(STUDENT, i), _teacher(i), batch)
    for i in range(2):
        _run(first, fake_outputs(STUDENT, i), _teacher(i), batches[i])
    second.load_state_dict(first.state_dict())
    resumed = _run(second, fake_outputs(STUDENT, 2), _teacher(2), batches[2])
    assert all(torch.equal(resumed[k], expected[k]) for k in TERMS)


def test_logits_are_bit_identical_afterwards() -> None:
    student, teacher = fake_outputs(STUDENT, 1), _teacher()
    before = [m.heatmap_logits_BKYX.clone() for m in (*student.head, *teacher["fusion"].head)]
    _run(_distiller(), student, teacher)
    after = [m.heatmap_logits_BKYX for m in (*student.head, *teacher["fusion"].head)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_contradictory_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="beta_min"):
        _options(beta_min=0.5, beta_max=0.1)


def test_what_a_simulated_map_becomes() -> None:
    """The map alone is another: 0, or noise with each channel's mean and spread, new in every call, the same in every run."""

    def maps(becomes: str | None, calls: int = 1) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = tiny(grid=GRID, sim_branch=True, fuser="heterogeneous", image_hw_px=(64, 96)).eval()
        if becomes is not None:
            lose_simulated(model, becomes)
        batch = make_batch(GRID, image_hw_px=(64, 96))
        with torch.inference_mode():
            return [model(batch).features for _ in range(calls)]

    (kept,), (zeros,), noise, again = maps(None), maps("zeros"), maps("noise", 2), maps("noise")
    assert bool(kept["bev_sim"].any()) and not bool(zeros["bev_sim"].any())
    for changed in (zeros, noise[0]):
        assert torch.equal(changed["bev_camera"], kept["bev_camera"]) and torch.equal(changed["bev_radar"], kept["bev_radar"])
        assert not torch.equal(changed["bev_fused"], kept["bev_fused"])
    assert torch.equal(noise[0]["bev_sim"], again[0]["bev_sim"]) and not torch.equal(noise[0]["bev_sim"], noise[1]["bev_sim"])
    wanted, found = (torch.std_mean(m["bev_sim"], dim=(0, 2, 3)) for m in (kept, noise[0]))
    assert torch.allclose(wanted[0], found[0], rtol=0.1) and torch.allclose(
        wanted[1], found[1], atol=0.1 * float(wanted[0].max())
    )
