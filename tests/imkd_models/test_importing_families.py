"""BEVDepth and LabelDistill: state dicts of the public names and shapes at true size, and their parts against slow loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from batches import ODD_GRID, make_batch, small_student
from public_names import bevdepth, centerpoint_voxel, labeldistill
from torch import nn

from imkd_data.errors import InputDataError, MismatchError, UsageError
from imkd_models.bevdepth import DeformConv, FrustumView, camera_values
from imkd_models.camera import frustum
from imkd_models.detector import StudentDetector
from imkd_models.importing import BEVDEPTH_PARITY, SOURCES, import_public, import_state
from imkd_models.keyrules import CHANGES
from imkd_models.label import LabelEncoder
from imkd_models.presets import build_model


def on_meta(source: str, state: dict):
    config = SOURCES[source].config(state)
    with torch.device("meta"):
        model = build_model(config, pretrained=False)
    return config, model


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


@pytest.mark.parametrize(
    ("keyframes", "aggregate", "history"),
    [(1, False, (0,)), (2, True, (0, -1)), (4, False, (0, -2, -4, -6))],
)
def test_bevdepth_files_fit(keyframes, aggregate, history):
    state = bevdepth(keyframes, aggregate=aggregate)
    config, model = on_meta("bevdepth", state)
    assert config.history == history and config.depth_aggregation == aggregate and config.parity == BEVDEPTH_PARITY
    import_state("bevdepth", state, model)
    weights = sum(v.numel() for k, v in state.items() if k.startswith("model.") and "running" not in k and "tracked" not in k)
    buffers = 9 + 112 * 16 * 44 * 4
    assert count(model) == weights - buffers


def test_bevdepth_has_the_published_parameters():
    _, model = on_meta("bevdepth", bevdepth(4))
    million = {k: round(count(m) / 1e6, 1) for k, m in (("image", model.camera), ("depth net", model.camera.depth))}
    million |= {
        "head": round((count(model.trunk) + count(model.head)) / 1e6, 1),
        "trunk": round(count(model.trunk.stages) / 1e6, 1),
    }
    assert {**million, "all": round(count(model) / 1e6, 1)} == {
        "image": 53.3,
        "depth net": 27.8,
        "head": 24.4,
        "trunk": 19.8,
        "all": 77.6,
    }


def test_labeldistill_files_hold_three_networks():
    state = labeldistill()
    config, student = on_meta("labeldistill", state)
    assert config.camera_channels == 150 and config.trunk_base == 300 and len(config.history) == 5
    import_state("labeldistill", state, student)
    config, label = on_meta("labeldistill:label", state)
    assert isinstance(label, LabelEncoder) and label.feature_shapes == {
        "bev_stage1": (128, 128, 128),
        "bev_stage2": (256, 64, 64),
    }
    import_state("labeldistill:label", state, label)
    with pytest.raises(UsageError, match="no key map"):
        import_public("labeldistill", None, part="radar")


@pytest.mark.parametrize("source", ["bevdepth", "labeldistill", "labeldistill:label"])
@pytest.mark.parametrize("harm", ["missing", "renamed", "misshapen", "extra"])
def test_an_altered_key_is_one_line_that_names_it(source, harm):
    state = bevdepth(2) if source == "bevdepth" else labeldistill()
    key = "model.label_encoder.ln2.weight" if source.endswith("label") else "model.backbone.depth_net.depth_conv.4.weight"
    _, model = on_meta(source, state)
    value = state[key]
    if harm in ("missing", "renamed"):
        state.pop(key)
    if harm == "misshapen":
        state[key] = torch.empty(*value.shape[:-1], value.shape[-1] + 1, device="meta")
    if harm in ("renamed", "extra"):
        state[key + "_x"] = value
    with pytest.raises(MismatchError) as error:
        import_state(source, state, model)
    message = str(error.value)
    expected = {
        "missing": f"missing {key}",
        "renamed": f"unused {key}_x",
        "misshapen": f"shape of {key}",
        "extra": f"unused {key}_x",
    }
    # Keys outside the part's own prefix belong to other networks; these do not.
    assert expected[harm] in message and message.count("\n") <= 4


def test_a_file_of_another_family_is_refused(tmp_path):
    torch.save({"state_dict": {"model.head.trunk.conv1.weight": torch.zeros(4, 4, 7, 7)}}, tmp_path / "x.pth")
    for source, part in (
        ("bevdepth", "student"),
        ("labeldistill", "student"),
        ("labeldistill", "label"),
        ("labeldistill", "lidar"),
    ):
        with pytest.raises(InputDataError, match="this is no"):
            import_public(source, tmp_path / "x.pth", part=part)


def test_layouts_of_sparse_weights_agree():
    torch.manual_seed(0)
    for kernel in ((3, 3, 3), (3, 1, 1)):
        weight = torch.randn(32, *kernel, 16)
        assert torch.equal(CHANGES["sparse"](weight), weight)
        assert torch.equal(CHANGES["sparse"](weight.permute(1, 2, 3, 4, 0)), weight)
    assert len(centerpoint_voxel()) == len(centerpoint_voxel("model.centerpoint.", kernel_first=True))


# ------------------------------------------------------------------------------------------- the parts against slow loops


def test_deformable_convolution_equals_a_loop():
    torch.manual_seed(0)
    conv = DeformConv(8, groups=2).double()
    nn.init.normal_(conv.offset.weight, std=0.4)
    nn.init.normal_(conv.offset.bias, std=1.0)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    offset = conv.offset(x)
    expected = torch.zeros_like(x)
    for n in range(2):
        for row in range(5):
            for column in range(7):
                for tap in range(9):
                    y = row + tap // 3 - 1 + float(offset[n, 2 * tap, row, column].detach())
                    u = column + tap % 3 - 1 + float(offset[n, 2 * tap + 1, row, column].detach())
                    y0, u0 = math.floor(y), math.floor(u)
                    sample = torch.zeros(8, dtype=torch.float64)
                    for yy, uu in ((y0, u0), (y0, u0 + 1), (y0 + 1, u0), (y0 + 1, u0 + 1)):
                        if 0 <= yy < 5 and 0 <= uu < 7:
                            sample += (1 - abs(y - yy)) * (1 - abs(u - uu)) * x[n, :, yy, uu]
                    for group in range(2):
                        part = slice(4 * group, 4 * group + 4)
                        expected[n, part, row, column] += conv.weight[part, :, tap // 3, tap % 3].detach() @ sample[part]
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)  # offsets are applied in float32
    plain = nn.functional.conv2d(x, conv.weight, padding=1, groups=2)
    nn.init.zeros_(conv.offset.weight)
    nn.init.zeros_(conv.offset.bias)
    torch.testing.assert_close(conv(x), plain, atol=1e-5, rtol=1e-5)


def test_camera_values_are_the_public_matrices():
    batch = make_batch(slots=1)
    config = small_student(radar=False, fuser="none", fused_channels=32, view="frustum", depth_net="camera_aware")
    height, width = config.image_hw_px
    scale = max(height / 900, width / 1600)
    left, top = (int(1600 * scale) - width) // 2, int(900 * scale) - height
    ida = torch.tensor([[scale, 0, -left], [0, scale, -top], [0, 0, 1.0]])
    intrinsic = torch.tensor([[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]])
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[0.0, -1.05], [1.05, 0.0]])
    turn[2, 2] = 1.05
    pose = batch.bev_from_camera_BTV44[:, 0]
    got = camera_values((ida @ intrinsic).expand(2, 6, 3, 3), turn @ pose, turn.expand(2, 4, 4), config).view(2, 6, 27)
    head = [1266.4, 1266.4, 816.3, 491.5, scale, 0, float(ida[0, 2]), 0, scale, float(ida[1, 2]), 0, -1.05, 1.05, 0, 1.05]
    torch.testing.assert_close(got[1, 3, :15], torch.tensor(head), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(got[1, 3, 15:], pose[1, 3, :3].flatten(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("truncate", [False, True])
def test_every_frustum_cell_falls_where_its_own_pixel_and_depth_say(truncate):
    parity = frozenset({"cell_index:trunc", "frustum:linspace_edges"}) if truncate else frozenset()
    config = small_student(radar=False, fuser="none", fused_channels=32, view="frustum", z_range_m=(-0.5, 1.5), parity=parity)
    batch = make_batch(slots=1)
    image33, pose44 = batch.image_from_camera_BTV33[:, 0], batch.bev_from_camera_BTV44[:, 0]
    cells = frustum(image33, pose44, batch.bev_from_ego_B44, config)
    h, w = 4, 6
    inside = 0
    for view in (0, 4):
        for d in range(config.depth_bins):
            for row in range(h):
                for column in range(w):
                    depth = config.depth_min_m + config.depth_step_m * (d + (0 if truncate else 0.5))
                    u = 95 * column / 5 if truncate else 16 * column + 7.5
                    v = 63 * row / 3 if truncate else 16 * row + 7.5
                    pixel = torch.tensor([u, v, 1.0], dtype=torch.float64)
                    ray = torch.linalg.inv(image33[1, view].double()) @ pixel * depth
                    x, y, z, _ = (pose44[1, view].double() @ torch.cat([ray, ray.new_ones(1)])).tolist()
                    place = [(x - ODD_GRID.x_min_m) / 0.8, (y - ODD_GRID.y_min_m) / 0.8, (z + 0.5) / 2]
                    if min(abs(p - round(p)) for p in place) < 1e-4:
                        continue
                    i, j, k = (int(p) if truncate else math.floor(p) for p in place)
                    good = 0 <= i < 32 and 0 <= j < 24 and k == 0
                    expected = (24 + j) * 32 + i if good else -1
                    assert int(cells.cell_NDW[6 + view, d, row, column]) == expected
                    inside += good
    assert inside > 20


def test_aggregation_works_on_depth_and_column_planes_of_each_row():
    torch.manual_seed(0)
    view = FrustumView(4, aggregate=True).eval()
    context, depth = torch.randn(2, 4, 3, 5), torch.rand(2, 6, 3, 5)
    out = view(context, depth)
    assert out.shape == (2, 4, 6, 3, 5)
    changed = context.clone()
    changed[:, :, 1] += 1
    difference = (view(changed, depth) - out).abs().amax(dim=(0, 1, 2, 4))
    assert difference[1] > 0 and difference[0] == 0 and difference[2] == 0
    plain = FrustumView(4, aggregate=False)(context, depth)
    torch.testing.assert_close(plain[1, 2, 3, 1, 4], context[1, 2, 1, 4] * depth[1, 3, 1, 4])


@pytest.mark.parametrize("aggregate", [False, True])
def test_a_small_bevdepth_trains_and_keeps_the_past_out_of_the_gradient(aggregate):
    torch.manual_seed(0)
    changes = {"radar": False, "fuser": "none", "fused_channels": 32, "view": "frustum", "depth_net": "camera_aware"}
    model = StudentDetector(
        small_student(**changes, history=(0, -1), time_fusion="concat", depth_aggregation=aggregate, parity=BEVDEPTH_PARITY)
    )
    batch = make_batch(slots=2)
    images = batch.images_BTVCHW.clone().requires_grad_()
    out = model(dataclasses.replace(batch, images_BTVCHW=images))
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    assert model.feature_shapes["bev_fused"] == (64, 24, 32)
    sum(model.loss(out, batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert images.grad[:, 0].abs().sum() > 0 and images.grad[:, 1].abs().sum() == 0
    model.eval()
    with torch.no_grad():
        past = [model.fused_keyframe(batch, 1)[0]["bev_fused"]]
        torch.testing.assert_close(model(batch).features["bev_neck"], model(batch, past=past).features["bev_neck"])


def test_the_command_reads_a_whole_file_at_true_size(tmp_path):
    from click.testing import CliRunner

    from cli.model import group
    from imkd_models.checkpoint import load_model

    state = {k: torch.full(v.shape, 0.01) for k, v in bevdepth(1).items()}
    torch.save({"state_dict": state, "epoch": 23}, tmp_path / "23.pth")
    arguments = ["import", "--from", "bevdepth", str(tmp_path / "23.pth"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model, meta = load_model(tmp_path / "out")
    record = meta["imported"]
    assert record["keys_of_other_networks"] == 4 and record["convention"] == "bev" and len(record["file_sha256"]) == 64
    assert record["loader"] == {} and meta["run"]["name"] == "imported_bevdepth"
    assert record["parity"] == sorted(BEVDEPTH_PARITY) == sorted(model.config.parity)
    weight = model.state_dict()["camera.depth.depth.4.weight"]
    assert weight.shape == (512, 128, 3, 3) and torch.equal(weight, torch.full_like(weight, 0.01))
