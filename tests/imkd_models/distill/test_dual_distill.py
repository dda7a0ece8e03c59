"""DualDistill: invariants of section 9 of its specification that concern the distiller."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from distill_fakes import (
    GRID,
    LIDAR,
    STUDENT,
    FakeNet,
    fake_batch,
    fake_head,
    fake_outputs,
    generator,
    one_box,
    same_head,
    without_boxes,
)

from imkd_data.errors import MismatchError
from imkd_data.geometry import BevGrid
from imkd_models.distill import METHODS, FrozenTeacher
from imkd_models.distill.align import ALIGNERS, Aoa, Projector
from imkd_models.distill.dual_distill import (
    DualDistill,
    acceptance_score,
    agreement,
    cell_attention,
    channel_attention,
    hallucinations,
    heads_from_teacher,
    pseudo_boxes,
    regions,
)
from imkd_models.distill.terms import head_targets
from imkd_models.head import LossOptions, detection_loss
from imkd_models.outputs import HeadMaps, Outputs

TERMS = ["mfd_fg", "mfd_bg", "mfd_fp", "mfd_sp", "crd_heatmap", "crd_box"]
TEACHER = FrozenTeacher(FakeNet(LIDAR))


def _options(**values):
    return METHODS["dual_distill"].make_options(values)


def _distiller(student=STUDENT, teacher=LIDAR, **values) -> DualDistill:
    torch.manual_seed(0)
    return DualDistill(_options(**values), student, teacher, TEACHER.heads)


def _teachers(seed: int = 7, mean: float = -2.0) -> dict[str, Outputs]:
    out = fake_outputs(LIDAR, seed)
    return {"lidar": replace(out, head=fake_head(seed, mean=mean))}


def _run(distiller: DualDistill, student=None, teachers=None, batch=None) -> dict[str, torch.Tensor]:
    return distiller(student or fake_outputs(STUDENT, 1, grad=True), teachers or _teachers(), batch or fake_batch())


def test_all_terms_are_there_finite_and_positive() -> None:
    out = _run(_distiller())
    assert list(out) == TERMS and all(torch.isfinite(v) and v > 0 for v in out.values())


def test_equal_maps_after_alignment_give_zero_but_the_spatial_term_only_with_an_identity_kernel() -> None:
    distiller, teachers = _distiller(lambda_crd=0), _teachers()
    t = teachers["lidar"].features["bev_neck"]
    r = regions(fake_batch().boxes, GRID, torch.rand(2, *GRID.shape) > 0.5)
    s = t.clone().requires_grad_()
    level = distiller._level("bev_neck", s, t, r, GRID.cell_m)
    assert level["mfd_fg"] == 0 and level["mfd_bg"] == 0 and level["mfd_fp"] == 0 and level["mfd_sp"] > 0
    with torch.no_grad():
        torch.nn.init.dirac_(distiller.spatial["bev_neck"].weight)
        distiller.spatial["bev_neck"].bias.zero_()
    assert distiller._level("bev_neck", s, t, r, GRID.cell_m)["mfd_sp"] < 1e-9


def test_crd_with_an_identity_aligner_runs_the_teachers_head_on_the_students_neck() -> None:
    """With S_neck = T_neck the distiller's answer is the teacher's, exactly, and the loss is that answer's."""
    answers = []

    def heads(neck: torch.Tensor) -> tuple[HeadMaps, ...]:
        answers.append(TEACHER.heads(neck))
        return answers[-1]

    options = _options(lambda_mfd=0, tau=1.0)
    distiller = DualDistill(options, {**STUDENT, "bev_neck": LIDAR["bev_neck"]}, LIDAR, heads)
    with torch.no_grad():
        torch.nn.init.dirac_(distiller.neck.weight)
        distiller.neck.bias.zero_()
    neck = fake_outputs(LIDAR, 7).features["bev_neck"]
    expected = TEACHER.heads(neck)
    student = fake_outputs(STUDENT, 1)
    student = replace(student, features={**student.features, "bev_neck": neck})
    out = distiller(student, {"lidar": replace(fake_outputs(LIDAR, 7), head=expected)}, fake_batch())
    for a, b in zip(answers[0], expected, strict=True):
        assert torch.equal(a.heatmap_logits_BKYX, b.heatmap_logits_BKYX)
        assert torch.equal(a.velocity_mps_B2YX, b.velocity_mps_B2YX)
    target = pseudo_boxes(expected, GRID, options)
    loss = detection_loss(expected, target, GRID, LossOptions(box_weight=0.25, velocity_weight=0.2))
    assert target.valid_BM.sum() > 10 and loss["det_heatmap"] > 0
    assert torch.equal(out["crd_heatmap"], loss["det_heatmap"]) and torch.equal(out["crd_box"], loss["det_box"])


def test_crd_is_not_zero_for_a_perfect_student_and_falls_on_the_way_to_the_teacher() -> None:
    """Targets are hard boxes. Moving a wrong answer toward the teacher's logits lowers the loss."""
    teacher = fake_head(7, mean=-6.0)
    loud = list(teacher)
    logits = loud[0].heatmap_logits_BKYX.clone()
    logits[:, 0, 5, 6] = logits[:, 0, 15, 20] = 4.0
    loud[0] = replace(loud[0], heatmap_logits_BKYX=logits)
    target = pseudo_boxes(loud, GRID, _options())
    assert target.valid_BM.sum() == 4
    wrong, values = fake_head(8), []
    for share in (0.0, 0.3, 0.6, 0.9):
        mixed = [
            replace(w, heatmap_logits_BKYX=(1 - share) * w.heatmap_logits_BKYX + share * t.heatmap_logits_BKYX)
            for w, t in zip(wrong, loud, strict=True)
        ]
        distiller = DualDistill(_options(lambda_mfd=0), STUDENT, LIDAR, lambda neck, mixed=mixed: mixed)
        teachers = {"lidar": replace(fake_outputs(LIDAR, 7), head=tuple(loud))}
        values.append(_run(distiller, teachers=teachers)["crd_heatmap"].item())
    assert all(a > b for a, b in itertools.pairwise(values)) and values[-1] > 0


def test_projector_stays_orthogonal_under_weight_decay() -> None:
    """max |P Pt - 1| < 1e-5 at the start and after 50 AdamW steps with decay on every parameter."""
    for cin, cout in ((24, 10), (10, 24), (16, 16)):
        torch.manual_seed(0)
        projector = Projector(cin, cout)
        optimiser = torch.optim.AdamW(projector.parameters(), lr=2e-4, weight_decay=0.01)
        x = torch.randn(2, cin, 5, 7)
        start = projector.project.weight.detach().clone()
        for step in range(51):
            w = projector.project.weight
            gram = w @ w.T if cout <= cin else w.T @ w
            assert (gram - torch.eye(len(gram))).abs().max() < 1e-5, step
            optimiser.zero_grad()
            (projector(x) - 1).square().mean().backward()
            optimiser.step()
        assert not torch.allclose(start, projector.project.weight, atol=1e-4)  # it does learn


def test_projector_parameter_is_kept_out_of_weight_decay() -> None:
    distiller = _distiller()
    decayed, free = distiller.parameter_groups(0.01)
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0.0 and len(free["params"]) == 2
    names = [n for n, _ in distiller.named_parameters()]
    raw = [p for n, p in distiller.named_parameters() if n.endswith("parametrizations.weight.original")]
    assert {id(p) for p in raw} == {id(p) for p in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_aligners_give_the_teachers_shape_a_signal_and_gradient_everywhere(aligner: str) -> None:
    torch.manual_seed(0)
    for level in ("bev_stage1", "bev_stage2"):
        module = ALIGNERS[aligner](STUDENT[level], LIDAR[level], _options())
        x = torch.rand(2, *STUDENT[level], requires_grad=True)
        out = module(x)
        assert out.shape == (2, *LIDAR[level]) and out.std() > 1e-3
        (out.square().sum() + out.sum()).backward()
        assert x.grad.abs().sum() > 0
        for name, p in module.named_parameters():
            assert p.grad.isfinite().all()
            # A constant added to every key changes no softmax: the gradient of its bias is 0 but for rounding.
            assert name == "key.bias" or p.grad.abs().max() > 1e-3, name


def test_aligner_parameter_counts_are_those_counted_in_the_specification() -> None:
    small = Aoa((256, 32, 32), (128, 128, 128), _options())
    large = Aoa((512, 16, 16), (256, 64, 64), _options())
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (small, large)]
    assert count == pytest.approx([2.00, 6.17], abs=0.02)


def test_large_grids_are_pooled_before_attention() -> None:
    options = _options(max_tokens=20)
    module = Aoa((8, 12, 16), (6, 24, 32), options)
    assert module.pool == 4 and module.tokens == (3, 4)
    assert module(torch.rand(1, 8, 12, 16)).shape == (1, 6, 24, 32)
    odd = Aoa((8, 5, 7), (6, 10, 14), _options(max_tokens=12, skip=True))
    assert odd.tokens == (3, 4) and odd(torch.rand(1, 8, 5, 7)).shape == (1, 6, 10, 14)


def test_query_depends_on_the_position_and_not_on_the_input() -> None:
    """A constant input gives a map that is not constant: each position asks its own question of all tokens."""
    torch.manual_seed(0)
    module = Aoa((8, 6, 8), (6, 12, 16), _options()).eval()
    with torch.no_grad():
        module.position.normal_()
    out = module(torch.ones(1, 8, 6, 8))
    assert out.std(dim=(2, 3)).min() > 1e-4


def test_checkpoint_of_another_grid_is_refused() -> None:
    other = {**STUDENT, "bev_stage1": (16, 9, 8)}
    with pytest.raises(MismatchError, match="grid"):
        _distiller().load_state_dict(_distiller(student=other).state_dict())
    state = _distiller(student=STUDENT).state_dict()
    _distiller().load_state_dict(state)


def test_regions_partition_the_grid_and_their_weights_sum_as_they_should() -> None:
    boxes = fake_batch().boxes
    ghosts = torch.rand(2, *GRID.shape, generator=generator(0)) > 0.9
    r = regions(boxes, GRID, ghosts)
    assert torch.equal(r.fg + r.bg + r.fp, torch.ones_like(r.fg))
    assert torch.allclose(r.a_bg.sum((1, 2, 3)), torch.ones(2)) and torch.allclose(r.a_fp.sum((1, 2, 3)), torch.ones(2))
    assert (r.a_bg[r.bg == 0] == 0).all() and (r.fp * ~ghosts[:, None]).sum() == 0


@pytest.mark.parametrize("degrees", range(0, 180, 15))
def test_foreground_area_and_weight_of_one_large_box(degrees: int) -> None:
    grid = BevGrid(x_min_m=-4, y_min_m=3, cell_m=0.2, nx=160, ny=120)
    box = one_box(11.13, 14.27, 12.0, 3.0, math.radians(degrees))
    r = regions(box, grid)
    assert float(r.fg.sum()) * grid.cell_m**2 == pytest.approx(36.0, rel=0.03)
    assert float(r.a_fg.sum()) == pytest.approx(math.sqrt(36 / grid.cell_m**2), rel=0.03)


def test_attention_has_mean_one() -> None:
    x = torch.randn(2, 7, 9, 11)
    assert torch.allclose(cell_attention(x).mean((1, 2, 3)), torch.ones(2), atol=1e-5)
    assert torch.allclose(channel_attention(x).mean((1, 2, 3)), torch.ones(2), atol=1e-5)
    assert cell_attention(x).shape == (2, 1, 9, 11) and channel_attention(x).shape == (2, 7, 1, 1)


def test_hallucinations_are_confident_cells_without_truth() -> None:
    batch, head = fake_batch(), fake_head(1, mean=-9.0)
    truth = head_targets(batch.boxes, GRID, head).heatmap_BKYX
    assert not hallucinations(head, truth, GRID.shape).any()
    all_on = [replace(m, heatmap_logits_BKYX=torch.zeros_like(m.heatmap_logits_BKYX)) for m in head]
    assert torch.equal(hallucinations(all_on, truth, GRID.shape), truth.amax(1) < 0.1)
    out = _run(_distiller(), teachers={"lidar": replace(fake_outputs(LIDAR, 7), head=head)}, batch=batch)
    assert out["mfd_fp"] == 0


def test_empty_truth_and_empty_regions_stay_finite() -> None:
    out = _run(_distiller(), batch=without_boxes(fake_batch()))
    assert out["mfd_fg"] == 0 and all(torch.isfinite(v) for v in out.values())
    everywhere = one_box(5, -5, 200, 200, 0.1)
    r = regions(everywhere, GRID)
    assert r.bg.sum() == 0 and r.a_bg.sum() == 0 and torch.isfinite(r.a_fg).all()
    silent = {"lidar": replace(fake_outputs(LIDAR, 7), head=fake_head(7, mean=-30.0))}
    student = fake_outputs(STUDENT, 1, grad=True)
    out = _run(_distiller(), student, silent)
    sum(out.values()).backward()
    assert out["crd_box"] == 0 and torch.isfinite(out["crd_heatmap"]) and student.features["bev_neck"].grad is not None


def _one_peak(p: float) -> list:
    head = fake_head(5, 1, mean=-40.0)
    logits = head[0].heatmap_logits_BKYX.clone().fill_(-20.0)
    logits[0, 0, 10, 12] = math.log(p / (1 - p))
    return [replace(head[0], heatmap_logits_BKYX=logits), *head[1:]]


@pytest.mark.parametrize(
    ("p", "tau", "count"), [(0.44, 0.1, 0), (0.45, 0.1, 1), (0.44, 1.0, 1), (0.45, 1.0, 1), (0.09, 1.0, 0)]
)
def test_acceptance_of_pseudo_boxes(p: float, tau: float, count: int) -> None:
    assert int(pseudo_boxes(_one_peak(p), GRID, _options(tau=tau)).valid_BM.sum()) == count


def test_acceptance_equals_the_tempered_threshold() -> None:
    z = 2 * torch.randn(5000, generator=generator(2), dtype=torch.float64)
    for tau in (0.1, 0.5, 1.0):
        tempered = torch.sigmoid(z / tau) > 0.1
        assert torch.equal(tempered, torch.sigmoid(z) > acceptance_score(tau))
    assert [round(acceptance_score(t), 3) for t in (1.0, 0.5, 0.1)] == [0.1, 0.25, 0.445]


def test_pseudo_boxes_are_suppressed_clamped_and_measured() -> None:
    head = _one_peak(0.9)
    logits = head[0].heatmap_logits_BKYX.clone()
    logits[0, 0, 10, 13] = 1.0  # a weaker neighbour under the same box
    size = head[0].log_size_m_B3YX.clone().fill_(1.2)
    size[0, 0, 10, 12] = 9.0
    offset = torch.full_like(head[0].offset_cells_B2YX, 0.5)
    head[0] = replace(head[0], heatmap_logits_BKYX=logits, log_size_m_B3YX=size, offset_cells_B2YX=offset)
    plain = pseudo_boxes(head, GRID, _options(nms="none"))
    found = pseudo_boxes([replace(head[0], log_size_m_B3YX=size.clamp(max=1.2)), *head[1:]], GRID, _options())
    assert int(plain.valid_BM.sum()) == 2 and int(found.valid_BM.sum()) == 1
    assert plain.size_lwh_m_BM3.max() == 30.0
    x, y = GRID.x_min_m + 12.5 * GRID.cell_m, GRID.y_min_m + 10.5 * GRID.cell_m
    near, far = one_box(x + 1.0, y, 4, 2, 0.0), one_box(x + 2.5, y, 4, 2, 0.0)
    assert agreement(found, near)["precision"] == 1 and agreement(found, near)["recall"] == 1
    assert agreement(found, far)["precision"] == 0
    assert agreement(found, one_box(x, y, 4, 2, 0.0, label=3))["precision"] == 0
    parts = agreement(found, near, [("car",), ("truck", "bus")])
    assert [float(parts[f"{n}_car"]) for n in ("pseudo", "precision", "recall")] == [1, 1, 1]
    assert parts["pseudo_truck_bus"] == 0 and parts["precision_truck_bus"].isnan() and parts["recall_truck_bus"].isnan()
    distiller = _distiller(lambda_mfd=0)
    distiller.note(**parts)
    logged = distiller.diagnostic_values()
    assert logged["precision_car"] == 1 and logged["pseudo_truck_bus"] == 0 and "recall_truck_bus" not in logged


@pytest.mark.parametrize("target", ["teacher", "gt", "dense"])
def test_response_targets_are_switches_and_gradient_reaches_neck_and_aligner(target: str) -> None:
    distiller, student = _distiller(lambda_mfd=0, crd_target=target), fake_outputs(STUDENT, 1, grad=True)
    out = _run(distiller, student, _teachers(mean=-1.0))
    sum(out.values()).backward()
    assert student.features["bev_neck"].grad.abs().sum() > 0 and distiller.neck.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in TEACHER.network.parameters())
    assert list(out) == ["crd_heatmap", "crd_box"]


def test_dense_target_is_zero_for_equal_answers() -> None:
    from imkd_models.distill.dual_distill import dense_response

    head = fake_head(3)
    cells, box = dense_response(same_head(head), head)
    assert cells == 0 and box == 0


def test_rescale_follows_the_teachers_size_and_then_freezes() -> None:
    distiller = _distiller(rescale_samples=4, lambda_crd=0)
    for seed in (1, 2, 3):
        _run(distiller, teachers=_teachers(seed))
    assert int(distiller.seen_bev_stage1) == 4
    expected = torch.stack([fake_outputs(LIDAR, s).features["bev_stage1"].square().mean() for s in (1, 2)]).mean()
    assert torch.allclose(distiller.square_bev_stage1, expected, rtol=1e-5)
    root = distiller._root("bev_stage1", fake_outputs(LIDAR, 9).features["bev_stage1"])
    assert torch.allclose(root**2, 0.5 / expected)
    assert _distiller(rescale=False)._root("bev_stage1", torch.rand(1, 8, 4, 4)) == 1


def test_rescaled_terms_are_those_of_a_teacher_of_the_reference_size() -> None:
    """A teacher with features ten times smaller gives the same feature terms (stages, same aligners), not a hundredth."""
    values = {"lambda_crd": 0, "levels": ("bev_stage1", "bev_stage2")}
    teacher = _teachers()["lidar"]
    small = replace(teacher, features={k: v / 10 for k, v in teacher.features.items()})
    a = _run(_distiller(**values), teachers={"lidar": teacher})
    b = _run(_distiller(**values), teachers={"lidar": small})
    for term in a:
        assert torch.allclose(a[term], b[term], rtol=1e-4)
    neck = {"lambda_crd": 0, "levels": ("bev_neck",), "attention": False, "weight_sp": 0.0}
    distiller, student = _distiller(**neck), fake_outputs(STUDENT, 1)
    with torch.no_grad():
        distiller.neck.bias.zero_()
    plain = distiller(student, {"lidar": teacher}, fake_batch())["mfd_bg"]
    tenth = replace(student, features={**student.features, "bev_neck": student.features["bev_neck"] / 10})
    fresh = _distiller(**neck)
    with torch.no_grad():
        fresh.neck.bias.zero_()
    assert torch.allclose(fresh(tenth, {"lidar": small}, fake_batch())["mfd_bg"], plain, rtol=1e-3)


def test_size_corrections_are_one_on_the_published_grids() -> None:
    """A grid of the published size gives the published weights; half the cells in each direction changes the two terms."""
    grid = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=0.8, nx=128, ny=128)
    distiller = _distiller(attention=False, lambda_crd=0)
    box = one_box(3.3, 5.1, 12.0, 8.0, 0.4)
    level = {}
    for g in (grid, grid.coarser(2)):
        s, t = torch.zeros(1, 4, *g.shape), torch.ones(1, 4, *g.shape)
        level[g.nx] = distiller._level("bev_neck", s, t, regions(box, g), g.cell_m)
    r = regions(box, grid)
    assert torch.allclose(level[128]["mfd_fg"], 6e-3 * 4 * r.a_fg.sum())
    assert torch.allclose(level[64]["mfd_fg"], level[128]["mfd_fg"], rtol=0.1)
    assert torch.allclose(level[64]["mfd_bg"], level[128]["mfd_bg"])
    assert torch.allclose(level[64]["mfd_sp"], level[128]["mfd_sp"], rtol=0.1)


def test_levels_and_terms_are_switches() -> None:
    out = _run(_distiller(levels=("bev_stage2", "bev_neck"), lambda_crd=0))
    assert list(out) == ["mfd_fg", "mfd_bg", "mfd_fp", "mfd_sp"]
    assert "mfd_fp" not in _run(_distiller(levels=("bev_stage2",), lambda_crd=0))
    plain, without = _run(_distiller(lambda_crd=0)), _run(_distiller(lambda_crd=0, attention=False))
    assert not torch.allclose(plain["mfd_fg"], without["mfd_fg"])


def test_head_start_copies_matching_task_heads_only() -> None:
    student, teacher = FakeNet(STUDENT, seed=1), FrozenTeacher(FakeNet(LIDAR, seed=2))
    shared = student.head.shared[0].weight.clone()
    copied = heads_from_teacher(_options(), student, {"lidar": teacher})
    assert copied == ["output.weight", "output.bias"]
    assert torch.equal(student.head.output.weight, teacher.head.output.weight)
    assert torch.equal(student.head.shared[0].weight, shared)
    assert heads_from_teacher(_options(head_from_teacher=False), student, {"lidar": teacher}) == []
    from imkd_models.head import CentreHead

    student.head = CentreHead(STUDENT["bev_neck"][0], shared_channels=5, branch_channels=0, groups=(("car",),))
    with pytest.raises(MismatchError, match="fits"):
        heads_from_teacher(_options(), student, {"lidar": teacher})


def test_a_lidar_camera_teacher_is_asked_in_the_lidar_teachers_place() -> None:
    """Row 8 of the specification: all that is asked of one teacher is asked of the other, the head start too; the same maps
    under the other name give the same terms."""
    needs = METHODS["dual_distill"].needs_for(_options(teacher="fusion"))
    lidar = METHODS["dual_distill"].needs_for(_options())
    for ours, theirs in ((needs.teachers, lidar.teachers), (needs.at_start, lidar.at_start)):
        assert ours == {"fusion": theirs["lidar"]}
    assert needs.heads_of == ("fusion",) and needs.student == lidar.student
    maps = _teachers()["lidar"]
    torch.manual_seed(0)
    distiller = DualDistill(_options(teacher="fusion"), STUDENT, LIDAR, TEACHER.heads)
    found = _run(distiller, teachers={"fusion": maps, "lidar": _teachers(9)["lidar"]})
    wanted = _run(_distiller(), teachers={"lidar": maps})
    assert list(found) == TERMS and all(torch.equal(found[k], wanted[k]) for k in TERMS)
    student, teacher = FakeNet(STUDENT, seed=1), FrozenTeacher(FakeNet(LIDAR, seed=2))
    other = FrozenTeacher(FakeNet(LIDAR, seed=3))
    assert heads_from_teacher(_options(teacher="fusion"), student, {"fusion": teacher, "lidar": other})
    assert torch.equal(student.head.output.weight, teacher.head.output.weight)


def test_logits_are_bit_identical_afterwards() -> None:
    student, teacher = fake_outputs(STUDENT, 1), _teachers()
    before = [m.heatmap_logits_BKYX.clone() for m in (*student.head, *teacher["lidar"].head)]
    _run(_distiller(), student, teacher)
    after = [m.heatmap_logits_BKYX for m in (*student.head, *teacher["lidar"].head)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_distiller_holds_nothing_of_the_teacher() -> None:
    distiller = _distiller()
    names = {n for n, _ in distiller.named_modules()}
    assert not any("teacher" in n or "head" in n for n in names)
    ids = {id(p) for p in TEACHER.network.parameters()}
    assert not any(id(p) in ids for p in distiller.parameters())
