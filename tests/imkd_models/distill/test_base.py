"""Options, needs and frozen teachers."""

from __future__ import annotations

import pytest
import torch
from distill_fakes import FUSION, LABEL, LIDAR, STUDENT, FakeNet, fake_batch
from torch import nn

from imkd_data.errors import MissingFeatureError, RecipeError
from imkd_models.distill import METHODS, FrozenTeacher, Needs, check_needs, make_method


@pytest.mark.parametrize("name", METHODS)
def test_options_round_trip_and_every_option_is_documented(name: str) -> None:
    method = METHODS[name]
    options = method.make_options()
    assert method.options.from_dict(options.as_dict()) == options
    assert all(o["doc"] for o in method.options.describe())
    for preset in method.presets:
        method.make_options({"preset": preset})


def test_unknown_wrong_and_out_of_range_options_are_refused_by_name() -> None:
    imkd = METHODS["imkd"]
    with pytest.raises(RecipeError, match="lambda_l2x"):
        imkd.make_options({"lambda_l2x": 1})
    with pytest.raises(RecipeError, match="intensity_source"):
        imkd.make_options({"intensity_source": "brightness"})
    with pytest.raises(RecipeError, match="lambda_l2r"):
        imkd.make_options({"lambda_l2r": -1})
    with pytest.raises(RecipeError, match="lambda_l2r"):
        imkd.make_options({"lambda_l2r": "much"})
    with pytest.raises(RecipeError, match="preset"):
        imkd.make_options({"preset": "imkd_r101"})


def test_command_line_strings_become_the_type_of_the_default() -> None:
    options = METHODS["imkd"].make_options({"stage2_label": "off", "lambda_l2r": "0.1", "response": False, "warmup_steps": "5"})
    assert options.stage2_label is False and options.lambda_l2r == 0.1
    assert options.response == "off" and options.warmup_steps == 5
    crkd = METHODS["crkd"].make_options({"relation_sizes": "8,4", "defects": ["three_corner_mask"]})
    assert crkd.relation_sizes == (8, 4) and crkd.defects == ("three_corner_mask",)


def test_methods_say_what_they_need() -> None:
    assert METHODS["imkd"].teachers == ("lidar", "label")
    assert METHODS["imkd"].teachers_for(METHODS["imkd"].make_options({"stage2_label": False})) == ("lidar",)
    assert METHODS["crkd"].teachers == ("fusion",)
    assert METHODS["imkd"].needs.batch == ("boxes", "intensity_planes")
    view = METHODS["imkd"].make_options({"intensity_from": "view"})
    assert METHODS["imkd"].needs_for(view).batch == ("boxes", "lidar_intensity")
    none = METHODS["imkd"].make_options({"intensity_source": "none"})
    assert METHODS["imkd"].needs_for(none).batch == ("boxes",)


def test_missing_student_feature_names_what_is_offered() -> None:
    shapes = {k: v for k, v in STUDENT.items() if not k.startswith("bev_intensity")}
    with pytest.raises(MissingFeatureError) as caught:
        check_needs(METHODS["imkd"].needs, shapes, {"lidar": LIDAR, "label": LABEL})
    text = str(caught.value)
    assert "bev_intensity_camera" in text and "bev_fused" in text and caught.value.code == 9


def test_lidar_only_teacher_is_refused_for_crkd_with_advice() -> None:
    with pytest.raises(MissingFeatureError, match="bev_camera_gated") as caught:
        check_needs(METHODS["crkd"].needs, STUDENT, {"fusion": LIDAR})
    assert "LiDAR-camera teacher" in str(caught.value)
    with pytest.raises(MissingFeatureError, match="'fusion'") as caught:
        check_needs(METHODS["crkd"].needs, STUDENT, {"lidar": LIDAR})
    assert "--teacher fusion=CKPT" in str(caught.value)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(MissingFeatureError) as caught:
        check_needs(METHODS["imkd"].needs, {"bev_fused": STUDENT["bev_fused"]}, {}, batch=("boxes",))
    assert len(caught.value.problems) == 3  # two teachers and the planes, behind the student's own


def test_head_as_a_function_needs_a_frozen_teacher() -> None:
    needs = Needs(teachers={"lidar": ("head",)}, heads_of=("lidar",))
    with pytest.raises(MissingFeatureError, match="called"):
        check_needs(needs, STUDENT, {"lidar": LIDAR})
    check_needs(needs, STUDENT, {"lidar": FrozenTeacher(FakeNet(LIDAR))})


def test_adaptive_smooth_refuses_a_lidar_teacher_unless_asked() -> None:
    smooth = METHODS["adaptive_smooth"]
    with pytest.raises(RecipeError, match="LiDAR-camera"):
        smooth.make_options({"teacher": "lidar"})
    options = smooth.make_options({"teacher": "lidar", "lambda_m2m": 0})
    check_needs(smooth.needs_for(options), STUDENT, {"lidar": LIDAR})


class _Parent(nn.Module):
    def __init__(self, teacher: FrozenTeacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.own = nn.Linear(2, 2)


def test_frozen_teacher_stays_out_of_everything() -> None:
    net = FakeNet(FUSION)
    teacher = FrozenTeacher(net, name="fusion")
    parent = _Parent(teacher)
    before = teacher.fingerprint()
    parent.train()
    assert not teacher.training and not any(m.training for m in net.modules())
    assert set(parent.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(parent.parameters())) == 2 and not any(p.requires_grad for p in net.parameters())
    batch = fake_batch()
    first, second = teacher(batch), teacher(batch)
    for name, value in first.features.items():
        assert not value.requires_grad and torch.equal(value, second.features[name])
    assert teacher.fingerprint() == before
    parent.to(torch.float64)
    assert next(net.parameters()).dtype == torch.float64


def test_frozen_teacher_comes_back_to_eval_even_if_someone_trains_the_network() -> None:
    net = FakeNet(FUSION)
    teacher = FrozenTeacher(net)
    before = teacher.fingerprint()
    net.train()
    teacher(fake_batch())
    assert not net.training and teacher.fingerprint() == before


def test_defect_batch_statistics_really_drifts() -> None:
    teacher = FrozenTeacher(FakeNet(FUSION))
    teacher.batch_statistics = True
    before = teacher.fingerprint()
    teacher(fake_batch())
    assert teacher.fingerprint() != before


def test_frozen_heads_pass_gradient_to_the_map_only() -> None:
    net = FakeNet(LIDAR)
    teacher = FrozenTeacher(net)
    neck = torch.randn(1, *LIDAR["bev_neck"], requires_grad=True)
    sum(m.heatmap_logits_BKYX.sum() for m in teacher.heads(neck)).backward()
    assert neck.grad is not None and neck.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_joined_methods_prefix_terms_merge_needs_and_refuse_contradictions() -> None:
    joined = make_method("dual_distill+imkd")
    options = joined.make_options({"imkd": {"stage2_label": "off"}})
    needs = joined.needs_for(options)
    assert set(needs.teachers) == {"lidar"} and "bev_neck" in needs.teachers["lidar"]
    assert joined.changes(options)["fuser"] == "intensity"
    clash = make_method("crkd+imkd")
    with pytest.raises(RecipeError, match="fuser"):
        clash.changes(clash.make_options())
    with pytest.raises(RecipeError, match="imkd, crkd"):
        make_method("imkd+nothing")


def test_joined_options_are_nested_or_dotted() -> None:
    joined = make_method("imkd+dual_distill")
    dotted = joined.make_options({"imkd.stage1": "off", "dual_distill.tau": "1", "imkd": {"lambda_l2m": 1.0}})
    assert dotted.imkd == {"stage1": "off", "lambda_l2m": 1.0} and dotted.dual_distill == {"tau": "1"}
    assert joined.make_options({"imkd": '{"stage1": false}'}).imkd == {"stage1": False}
    with pytest.raises(RecipeError, match="stage9"):
        joined.needs_for(joined.make_options({"imkd.stage9": 1}))
    with pytest.raises(RecipeError, match="JSON"):
        joined.make_options({"imkd": "stage1"})


def test_joined_options_reach_a_run_from_the_command_line() -> None:
    from pipelines.runs import get_run

    run = (
        get_run("tiny_student").with_method("imkd+dual_distill").with_settings({"imkd.stage2_label": "off", "optim.lr": "1e-3"})
    )
    method = make_method("imkd+dual_distill")
    assert method.teachers_for(method.make_options(run.options)) == ("lidar",) and run.optim.lr == 1e-3
