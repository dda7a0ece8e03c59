"""The student: parameter counts of CRN, shapes, gradients, history, switches, empties, loading, precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import ODD_GRID, make_batch, small_fusion, small_lidar, small_student
from test_radar import keep

from imkd_data.errors import MismatchError, MissingFeatureError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_models.blocks import LayerNorm2d
from imkd_models.config import StudentConfig
from imkd_models.detector import FusionDetector, LidarDetector, StudentDetector
from imkd_models.fusion import FusionAttention, FusionLayer
from imkd_models.presets import crn_r50_config

VARIANTS = {
    "concat": {},
    "gated": {"fuser": "gated"},
    "deformable": {"fuser": "deformable"},
    "intensity": {"fuser": "intensity"},
    "coarse fuser": {"fuser": "intensity", "fuser_stride": 2},
    "crkd": {"fuser": "gated", "calibration": True, "radar_encoder": "bev", "radar_states": True},
    "calibrated": {"calibration": True, "calibration_init": "residual"},
    "smooth": {"fuser": "heterogeneous", "sim_branch": True, "sim_drop": 0.5},
    "smooth deformable": {"fuser": "concat", "sim_branch": True, "sim_attention": "deformable"},
    "camera only": {"radar": False},
    "camera only smooth": {"radar": False, "fuser": "heterogeneous", "sim_branch": True},
    "radar only": {"camera": False},
    "mean rows": {"geometry_rows": "mean"},
    "wide head": {"head_branch": 8},
    "bevdepth": {
        "radar": False,
        "fuser": "none",
        "fused_channels": 32,
        "view": "frustum",
        "depth_net": "camera_aware",
        "time_fusion": "concat",
    },
    "bevfusion": {
        "fuser": "gated",
        "view": "frustum",
        "depth_net": "linear",
        "radar_encoder": "points",
        "radar_states": True,
        "trunk": "bevfusion",
        "trunk_blocks": (1, 1, 1),
    },
    "crn parity": {
        "parity": frozenset(
            {
                "pool_grad:uncounted",
                "cell_index:trunc",
                "image_channels:swapped",
                "frustum:linspace_edges",
                "geometry:top_row_half",
                "radar_cull:image_rows",
                "radar_empty:dummy",
                "pillar_features:legacy",
                "radar_caps:crn",
                "nan_velocity:zero",
            }
        )
    },
}


def build(seed=0, **changes) -> StudentDetector:
    torch.manual_seed(seed)
    return StudentDetector(small_student(**changes))


def count(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_crn_r50_has_exactly_the_published_parameters():
    with torch.device("meta"):  # counts need no memory and no random numbers
        model = StudentDetector(crn_r50_config())
    image, radar, fuser, head = model.camera, model.radar, model.fuser, model.head
    layers = [m for m in fuser.modules() if isinstance(m, FusionLayer)]
    norms = [m for m in fuser.modules() if isinstance(m, torch.nn.LayerNorm)]
    table = {
        "ResNet-50": (count(image.image.backbone), 23_508_032),
        "image FPN": (count(image.image.neck), 1_967_104),
        "depth net": (count(image.depth), 5_351_574),
        "view aggregation": (count(image.view), 807_440),
        "image branch": (count(image), 31_634_150),
        "pillar net": (count(radar.pillars), 2_336),
        "radar SECOND": (count(radar.backbone), 4_210_176),
        "radar FPN": (count(radar.neck), 180_992),
        "context head": (count(radar.context), 679_568),
        "occupancy head": (count(radar.occupancy), 664_321),
        "radar branch": (count(radar), 5_737_393),
        "MFA input": (count(fuser.query), 20_608),
        "position": (count(fuser.rows, fuser.columns), 16_384),
        "FFN": (sum(count(x.expand, x.contract) for x in layers), 395_520),
        "attention": (count(*[m for m in fuser.modules() if isinstance(m, FusionAttention)]), 198_720),
        "LayerNorms": (count(*norms), 3_392),
        "time reduction": (count(model.time), 590_080),
        "fuser": (count(fuser, model.time), 1_224_704),
        "trunk": (count(model.trunk.stages), 18_320_320),
        "neck": (count(model.trunk.neck), 2_998_784),
        "shared conv": (count(head.shared), 147_584),
        "task heads": (count(head.branches), 1_372_102),
        "head": (count(model.trunk, head), 22_838_790),
        "total": (count(model), 61_435_037),
    }
    assert {k: v[0] for k, v in table.items()} == {k: v[1] for k, v in table.items()}
    assert sum(isinstance(m, LayerNorm2d) for m in norms) == 2
    expected = {
        "bev_camera": (80, 128, 128),
        "bev_radar": (80, 128, 128),
        "bev_fused": (128, 128, 128),
        "bev_stage0": (160, 64, 64),
        "bev_stage1": (320, 32, 32),
        "bev_stage2": (640, 16, 16),
        "bev_neck": (256, 128, 128),
    }
    assert model.feature_shapes == expected


def test_intensity_fusion_adds_the_stated_parameters():
    from imkd_models.fusion import build_fuser

    plain = build_fuser(crn_r50_config())
    guided = build_fuser(crn_r50_config(fuser="intensity"))
    assert count(guided.intensity_camera) == 28_921 and count(guided.intensity_radar) == 57_721
    assert count(guided) - count(plain) == 86_898


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_finite_loss_and_a_gradient_for_every_parameter(name):
    model, batch = build(**VARIANTS[name]), make_batch()
    if name == "calibrated":  # starts as the identity, so only its last norm would get gradient
        torch.nn.init.ones_(model.calibration.blocks[-1][1].weight)
    out = model(batch)
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    terms = model.loss(out, batch)
    assert set(terms) == {"det_heatmap", "det_box"} | ({"depth"} if model.config.camera else set())
    extra = sum(v.float().square().mean() for k, v in out.features.items() if k.startswith("bev_intensity"))
    (sum(terms.values()) + extra).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    zero = [n for n, p in model.named_parameters() if p.grad.abs().sum() == 0]
    # A ReLU may be dead at one seed; whole modules may not.
    assert len(zero) <= 0.03 * len(list(model.parameters())), zero


def test_past_keyframes_get_no_gradient_and_can_be_cached():
    model, batch = build(history=(0, -1, -2)), make_batch(slots=3)
    images = batch.images_BTVCHW.clone().requires_grad_()
    batch = dataclasses.replace(batch, images_BTVCHW=images)
    out = model(batch)
    out.features["bev_neck"].square().sum().backward()
    assert images.grad[:, 0].abs().sum() > 0 and images.grad[:, 1:].abs().sum() == 0
    model.eval()
    with torch.no_grad():
        whole = model(batch).head[0].heatmap_logits_BKYX
        past = [model.fused_keyframe(batch, slot)[0]["bev_fused"] for slot in (1, 2)]
        cached = model(batch, past=past).head[0].heatmap_logits_BKYX
        other = model(batch, past=past[::-1]).head[0].heatmap_logits_BKYX
    assert torch.equal(whole, cached) and not torch.equal(whole, other)


@pytest.mark.parametrize("name", ["concat", "intensity", "crkd", "smooth", "radar only", "crn parity", "bevdepth", "bevfusion"])
def test_no_radar_no_boxes_no_depth_returns_is_finite(name):
    model = build(**VARIANTS[name])
    batch = make_batch(boxes=0, slots=1)
    batch = dataclasses.replace(
        batch,
        radar=keep(batch.radar, torch.zeros(len(batch.radar.age_s), dtype=torch.bool)),
        image_maps={"depth_BVHW": torch.zeros(2, 6, 64, 96)},
    )
    terms = model.loss(model(batch), batch)
    sum(terms.values()).backward()
    assert all(t.isfinite() for t in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_only_declared_sensors_are_read():
    batch = make_batch()
    stripped = dataclasses.replace(batch, lidar=None, bev_maps={}, image_maps={}, boxes=None)
    for name in ("concat", "smooth"):
        model = build(**VARIANTS[name]).eval()
        with torch.no_grad():
            a, b = model(batch), model(stripped)
        assert all(torch.equal(a.features[k], b.features[k]) for k in a.features)
    camera_only = build(radar=False).eval()
    assert camera_only.sensors == ("camera",) and camera_only(dataclasses.replace(stripped, radar=None))
    radar_only = build(camera=False).eval()
    assert radar_only.sensors == ("radar",) and radar_only(dataclasses.replace(stripped, images_BTVCHW=None))


def test_same_seed_same_result_and_training_step():
    def run():
        model, batch = build(seed=3), make_batch()
        torch.manual_seed(1)
        terms = model.loss(model(batch), batch)
        sum(terms.values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.equal(run(), run())


def test_intensity_without_gain_and_query_equals_plain_attention_bitwise():
    plain = build(fuser="deformable").eval()
    guided = build(fuser="intensity", gate_gain=0.0).eval()
    missing, unexpected = guided.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and all("intensity" in key for key in missing)
    batch = make_batch()
    with torch.no_grad():
        a, b = plain(batch), guided(batch)
    assert torch.equal(a.features["bev_fused"], b.features["bev_fused"])
    start = torch.sigmoid(b.features["bev_intensity_radar"]).mean()
    assert 0.005 < float(start) < 0.05


def test_heterogeneous_fuser_is_camera_only_when_its_last_conv_is_zero():
    model = build(**VARIANTS["smooth"]).eval()
    fuser, maps = model.fuser, {"bev_camera": torch.randn(2, 32, 6, 7), "bev_sim": torch.randn(2, 32, 6, 7)}
    with torch.no_grad():
        fuser.add.weight.zero_()
        a = fuser(maps)["bev_fused"]
        b = fuser({**maps, "bev_sim": 100 * torch.randn(2, 32, 6, 7)})["bev_fused"]
    assert torch.equal(a, b)


def test_two_lifts_are_two():
    model, batch = build(**VARIANTS["smooth"]), make_batch()
    own = {id(p) for p in model.sim.depth.parameters()}
    assert own.isdisjoint(id(p) for p in model.camera.depth.parameters())
    model(batch).features["bev_sim"].sum().backward()
    assert all(p.grad is not None for p in model.sim.depth.parameters())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.camera.depth.parameters())


def test_wrong_batches_are_refused_with_what_to_do():
    model, batch = build(history=(0, -1)), make_batch(slots=2)
    other = BevGrid(x_min_m=0, y_min_m=0, cell_m=0.8, nx=32, ny=24)
    with pytest.raises(MismatchError, match="another grid"):
        model(dataclasses.replace(batch, grid=other))
    with pytest.raises(MismatchError, match="history"):
        model(make_batch(slots=1))
    with pytest.raises(MismatchError, match="another size"):
        model(make_batch(slots=2, image_hw_px=(32, 96)))
    with pytest.raises(MissingFeatureError, match="without radar"):
        model(dataclasses.replace(batch, radar=None))
    with pytest.raises(MissingFeatureError, match="depth"):
        model.loss(model(batch), dataclasses.replace(batch, image_maps={}))
    with pytest.raises(MissingFeatureError, match="boxes"):
        model.loss(model(batch), dataclasses.replace(batch, boxes=None))


@pytest.mark.parametrize(
    "changes",
    [
        {"fuser": "sum"},
        {"camera": False, "radar": False},
        {"fuser": "heterogeneous"},
        {"history": (-1, 0)},
        {"parity": {"pool_grad"}},
        {"camera": False, "sim_branch": True},
        {"fuser": "deformable", "sim_branch": True},
        {"fuser": "intensity", "sim_branch": True},
        {"radar_encoder": "polar"},
        {"image_hw_px": (100, 96)},
        {"grid": BevGrid(x_min_m=0, y_min_m=0, cell_m=0.8, nx=30, ny=24)},
    ],
)
def test_configurations_that_cannot_be_meant(changes):
    with pytest.raises(RecipeError):
        small_student(**changes)


def test_a_simulated_branch_that_no_fuser_reads_is_refused_and_those_that_do_are_named():
    with pytest.raises(RecipeError, match="simulated branch") as caught:
        small_student(fuser="intensity", sim_branch=True)
    named = caught.value.details["expected"].split(" | ")
    assert caught.value.details["found"] == "intensity"
    for fuser in named:  # each one reads it: no parameter is left without gradient
        model, batch = build(fuser=fuser, sim_branch=True), make_batch()
        sum(model.loss(model(batch), batch).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == [], fuser
    assert len(named) == 3


@pytest.mark.parametrize("grid", [{"foo": 1}, {**ODD_GRID.as_dict(), "rows": 3}, {**ODD_GRID.as_dict(), "nx": "many"}])
def test_a_grid_that_cannot_be_read_is_a_recipe_error(grid):
    value = {**small_student().as_dict(), "grid": grid}
    with pytest.raises(RecipeError, match="student model cannot be read"):
        StudentConfig.from_dict(value)


def test_strict_loading_names_what_is_missing():
    model = build()
    state = model.state_dict()
    state.pop("head.output.bias")
    with pytest.raises(RuntimeError, match=r"head\.output\.bias"):
        build().load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(fused_channels=40).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["concat", "intensity", "smooth", "bevdepth", "bevfusion"])
def test_bf16_autocast_stays_close_and_finite(name):
    model, batch = build(**VARIANTS[name]).eval(), make_batch()
    with torch.no_grad():
        exact = model(batch).head[0].heatmap_logits_BKYX
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(batch)
            terms = model.loss(mixed, batch)
    assert (mixed.head[0].heatmap_logits_BKYX.float() - exact).abs().mean() < 0.1
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values())


@pytest.mark.parametrize("name", ["concat", "deformable", "bevdepth", "bevfusion"])
def test_channels_last_gives_the_same(name):
    model, batch = build(**VARIANTS[name]).eval(), make_batch()
    with torch.no_grad():
        a = model(batch).features["bev_neck"]
        b = model.to(memory_format=torch.channels_last)(batch).features["bev_neck"]
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_compiled_forward_is_one_graph_and_equals_eager():
    batch = make_batch()
    for model in (build(fuser="intensity").eval(), LidarDetector(small_lidar()).eval()):
        with torch.no_grad():
            eager = model(batch)
            compiled = torch.compile(model, backend="eager", fullgraph=True)(batch)
        for name, value in eager.features.items():
            torch.testing.assert_close(value, compiled.features[name], atol=1e-5, rtol=1e-5)


def test_lidar_camera_teacher_shapes_gradients_and_names():
    torch.manual_seed(0)
    model, batch = FusionDetector(small_fusion()), make_batch()
    out = model(batch)
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    assert {"bev_lidar", "bev_camera_gated", "bev_fused", "bev_neck"} <= set(out.features)
    sum(model.loss(out, batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    with pytest.raises(MissingFeatureError, match="LiDAR depth"):
        model(dataclasses.replace(batch, image_maps={}))
    concat = FusionDetector(small_fusion(fuser="concat"))
    assert "bev_camera_gated" not in concat.feature_shapes and concat(batch).head


def test_odd_grid_is_what_the_tests_run_on():
    assert ODD_GRID.nx != ODD_GRID.ny and ODD_GRID.x_min_m != -ODD_GRID.x_max_m
