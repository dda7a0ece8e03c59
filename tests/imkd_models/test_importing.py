"""Public weights: key maps, strictness, safe reading, and an imported LiDAR network in its own axes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from batches import ODD_GRID, make_batch, small_lidar, small_student, with_near
from torch import nn

from imkd_data.errors import InputDataError, MismatchError, UsageError
from imkd_models.convention import map_from_network, map_to_network, network_grid
from imkd_models.detector import LidarDetector, StudentDetector
from imkd_models.head import DecodeOptions, decode
from imkd_models.importing import SOURCES, import_public, import_state, public_keys
from imkd_models.keymap import read_public
from imkd_models.keyrules import CHANGES
from imkd_models.label import LabelEncoder
from imkd_models.presets import crn_r50_config, label_config_for


def public_state(source: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """What the public code would have stored for these weights."""
    return {
        their: CHANGES[change](value).contiguous()
        for value, (their, change) in zip(model.state_dict().values(), public_keys(source, model).values(), strict=True)
    }


def small_crn(seed=0) -> StudentDetector:
    torch.manual_seed(seed)
    options = {"fuser": "deformable", "history": (0, -1), "head_branch": 8, "view_convs": 3}
    return StudentDetector(small_student(**options))


def test_every_crn_key_has_its_public_name():
    with torch.device("meta"):  # names and shapes only
        model = StudentDetector(crn_r50_config())
    keys = {their: tuple(model.state_dict()[ours].shape) for ours, (their, _) in public_keys("crn", model).items()}
    expected = {
        "model.backbone_img.img_backbone.conv1.weight": (64, 3, 7, 7),
        "model.backbone_img.img_backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "model.backbone_img.img_backbone.layer3.5.conv3.weight": (1024, 256, 1, 1),
        "model.backbone_img.img_backbone.layer4.2.bn3.running_var": (2048,),
        "model.backbone_img.img_neck.deblocks.0.0.weight": (128, 256, 4, 4),
        "model.backbone_img.img_neck.deblocks.3.1.weight": (128,),
        "model.backbone_img.depth_net.reduce_conv.0.bias": (256,),
        "model.backbone_img.depth_net.context_conv.3.weight": (80, 256, 1, 1),
        "model.backbone_img.depth_net.depth_conv.2.conv2.weight": (256, 256, 3, 3),
        "model.backbone_img.depth_net.depth_conv.3.weight": (70, 256, 1, 1),
        "model.backbone_img.view_aggregation_net.conv.3.weight": (160, 160, 3, 3),
        "model.backbone_img.view_aggregation_net.out_conv.0.bias": (80,),
        "model.backbone_pts.pts_voxel_encoder.pfn_layers.0.linear.weight": (16, 8),
        "model.backbone_pts.pts_voxel_encoder.pfn_layers.1.norm.bias": (64,),
        "model.backbone_pts.pts_backbone.blocks.2.15.weight": (256, 256, 3, 3),
        "model.backbone_pts.pts_neck.deblocks.2.0.weight": (256, 128, 2, 2),
        "model.backbone_pts.pred_occupancy.3.bias": (1,),
        "model.fuser.norm_img.weight": (80,),
        "model.fuser.positional_encoding.col_embed.weight": (128, 64),
        "model.fuser.attn_layers.5.sampling_offsets.weight": (64, 128),
        "model.fuser.attn_layers.0.value_proj_pts.weight": (128, 80),
        "model.fuser.ffn_layers.3.layers.0.0.weight": (256, 128),
        "model.fuser.ffn_layers.3.layers.1.weight": (128, 256),
        "model.fuser.norm_layers2.4.bias": (128,),
        "model.fuser.reduce_conv.0.weight": (128, 512, 3, 3),
        "model.head.trunk.conv1.weight": (160, 128, 7, 7),
        "model.head.trunk.layer3.0.downsample.1.weight": (640,),
        "model.head.neck.deblocks.3.0.weight": (640, 64, 8, 8),
        "model.head.shared_conv.conv.weight": (64, 256, 3, 3),
        "model.head.task_heads.5.heatmap.1.weight": (2, 64, 3, 3),
        "model.head.task_heads.2.rot.0.bn.weight": (64,),
    }
    assert {k: keys.get(k) for k in expected} == expected
    assert len(keys) == len(model.state_dict())


def test_crn_weights_go_in_and_give_the_same_network():
    model, other = small_crn(0).eval(), small_crn(1).eval()
    state = public_state("crn", model)
    state["model.backbone_img.frustum"] = torch.zeros(3)
    state["model.fuser.ref_2d"] = torch.zeros(3)
    import_state("crn", state, other)
    batch = make_batch(slots=2)
    with torch.no_grad():
        assert torch.equal(model(batch).features["bev_neck"], other(batch).features["bev_neck"])


def test_changes_of_axes_equal_the_public_layers():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 7)
    deconv = nn.ConvTranspose2d(5, 3, 1, bias=False)
    torch.testing.assert_close(nn.functional.conv2d(x, CHANGES["deconv"](deconv.weight)), deconv(x))
    conv = nn.Conv2d(5, 3, 3, padding=1)
    public = conv(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(nn.functional.conv2d(x, CHANGES["plane"](conv.weight), conv.bias, padding=1), public)


def test_torchvision_backbone_weights_are_a_file(tmp_path):
    from imkd_models.camera import build_backbone
    from imkd_models.keymap import public_key, resnet_rules

    source = build_backbone("resnet_tiny", None)
    names = {k: public_key(resnet_rules("", ""), f".{k}")[0][1:] for k in source.state_dict()}
    assert {"conv1.weight", "bn1.bias", "layer2.0.downsample.1.weight", "layer4.0.conv2.weight"} <= set(names.values())
    state = {names[k]: v for k, v in source.state_dict().items()} | {"fc.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "resnet.pth")
    loaded = build_backbone("resnet_tiny", str(tmp_path / "resnet.pth"))
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), loaded.state_dict().values(), strict=True))
    encoder = StudentDetector(small_student(backbone_weights=str(tmp_path / "resnet.pth"))).camera.image
    assert not any(p.requires_grad for p in encoder.stem.parameters()) and not encoder.train().stem.training
    torch.save({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, tmp_path / "short.pth")
    with pytest.raises(InputDataError, match=r"layer1\.0\.conv1"):
        build_backbone("resnet_tiny", str(tmp_path / "short.pth"))


def test_missing_unused_and_misshapen_keys_are_named():
    model = small_crn()
    state = public_state("crn", model)
    state.pop("model.fuser.input_proj.bias")
    state["model.head.extra"] = torch.zeros(1)
    state["model.fuser.norm_img.weight"] = torch.zeros(3)
    with pytest.raises(MismatchError) as error:
        import_state("crn", state, small_crn(1))
    text = str(error.value)
    assert "missing model.fuser.input_proj.bias" in text and "unused model.head.extra" in text
    assert "shape of model.fuser.norm_img.weight: (3,)" in text


def test_counters_of_old_files_may_be_absent():
    model = small_crn()
    state = {k: v for k, v in public_state("crn", model).items() if not k.endswith("num_batches_tracked")}
    import_state("crn", state, small_crn(1))


def test_files_are_read_without_executing_them(tmp_path):
    class Surprise:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "good.pth")
    assert torch.equal(read_public(tmp_path / "good.pth")["a"], torch.ones(2))
    torch.save({"state_dict": Surprise()}, tmp_path / "bad.pth")
    for name, match in (("bad.pth", "plain weights"), ("none.pth", "no such")):
        with pytest.raises(InputDataError, match=match):
            read_public(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputDataError, match="no state dict"):
        read_public(tmp_path / "list.pth")
    with pytest.raises(UsageError, match="key map"):
        import_public("fastbev", tmp_path / "good.pth")
    with pytest.raises(InputDataError, match="no CenterPoint"):
        import_public("centerpoint_mmdet3d", tmp_path / "good.pth")


def imported(convention: str, **changes) -> LidarDetector:
    options = {"points_per_pillar": 4, "intensity_scale": 255.0, "pillar_centre_values": 3, "head_branch": 8}
    torch.manual_seed(0)
    config = small_lidar(neck_stages=3, convention=convention, near_removed_m=1.0, **options)
    model = LidarDetector(config.with_values(**changes)).eval()
    for module in model.modules():  # statistics that are not those of a fresh network
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("boxes", ["lwh", "wlh"])
def test_decoded_boxes_are_the_same_in_both_conventions(boxes):
    ours = imported(f"mmdet3d_{boxes}")
    height = ours.config.mount_m[2]
    # The network as its authors run it: LiDAR axes from the beginning to the boxes.
    grid = network_grid(ODD_GRID)
    assert grid.shape == (ODD_GRID.nx, ODD_GRID.ny) and grid.x_min_m == -ODD_GRID.y_max_m
    public = LidarDetector(ours.config.with_values(convention="bev", grid=grid)).eval()
    import_state("centerpoint_mmdet3d", public_state("centerpoint_mmdet3d", ours), public)
    batch = with_near(make_batch(ground=500))
    x, y, z = batch.lidar.xyz_m.unbind(-1)
    lidar = dataclasses.replace(batch.lidar, xyz_m=torch.stack([-y, x, z - height], dim=1))
    options = DecodeOptions(nms="none", per_sample=40, margin_m=100, candidates=40)
    with torch.no_grad():
        mine = decode(ours(batch).head, ODD_GRID, options)
        theirs = decode(public(dataclasses.replace(batch, lidar=lidar, grid=grid)).head, grid, options)
    for a, b in zip(mine, theirs, strict=True):
        centre = torch.stack([b.centre_m[:, 1], -b.centre_m[:, 0], b.centre_m[:, 2] + height], dim=1)
        yaw = b.yaw_rad if boxes == "lwh" else -b.yaw_rad - math.pi / 2
        size = b.size_lwh_m if boxes == "lwh" else b.size_lwh_m[:, [1, 0, 2]]
        velocity = torch.stack([b.velocity_mps[:, 1], -b.velocity_mps[:, 0]], dim=1)
        order, match = a.centre_m[:, 0].argsort(), centre[:, 0].argsort()
        assert len(a) == len(b) == 40
        torch.testing.assert_close(a.score[order], b.score[match], atol=1e-5, rtol=0)
        torch.testing.assert_close(a.centre_m[order], centre[match], atol=1e-3, rtol=0)
        torch.testing.assert_close(a.size_lwh_m[order], size[match], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.velocity_mps[order], velocity[match], atol=1e-4, rtol=0)
        turn = a.yaw_rad[order] - (yaw - math.pi / 2)[match]
        torch.testing.assert_close(torch.cos(turn), torch.ones_like(turn), atol=1e-5, rtol=0)


def test_turning_there_and_back_is_exact():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(map_from_network(map_to_network(x)), x) and map_to_network(x).shape == (2, 3, 5, 4)
    point = torch.zeros(1, 1, 24, 32)
    row, column, _ = ODD_GRID.cells([[3.0, -5.0]])
    point[0, 0, row[0], column[0]] = 1
    row, column, _ = network_grid(ODD_GRID).cells([[5.0, 3.0]])  # x_L = -y, y_L = x
    assert map_to_network(point)[0, 0, row[0], column[0]] == 1


def test_maps_features_and_neck_of_an_imported_teacher_lie_in_bev():
    model, batch = imported("mmdet3d_lwh"), with_near(make_batch())
    out = model(batch)
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    torch.testing.assert_close(model.read_neck(out.features), out.features["bev_neck"])
    again = model.head.maps(out.features["bev_neck"])
    torch.testing.assert_close(again[0].offset_cells_B2YX, out.head[0].offset_cells_B2YX)
    encoder = LabelEncoder(label_config_for(model, hidden=16), model)
    assert encoder(batch).features["bev_neck"].shape == out.features["bev_neck"].shape


def test_centerpoint_file_round_trip_records_its_convention(tmp_path):
    from imkd_models.presets import centerpoint_pillar_config

    for inputs, convention in ((3, "mmdet3d_lwh"), (2, "mmdet3d_wlh")):
        model = LidarDetector(centerpoint_pillar_config(pillar_centre_values=inputs))
        torch.save({"meta": {"epoch": 20}, "state_dict": public_state("centerpoint_mmdet3d", model)}, tmp_path / "c.pth")
        got, record = import_public("centerpoint_mmdet3d", tmp_path / "c.pth")
        assert record["convention"] == got.config.convention == convention and len(record["file_sha256"]) == 64
        assert got.config.points_per_pillar == 20 and got.config.intensity_scale == 255
        assert torch.equal(
            got.state_dict()["lidar.neck.branches.2.0.weight"], model.state_dict()["lidar.neck.branches.2.0.weight"]
        )
    assert import_public("centerpoint_mmdet3d", tmp_path / "c.pth", boxes="lwh")[1]["convention"] == "mmdet3d_lwh"
    assert all(source.summary for source in SOURCES.values())


def test_the_checkpoint_says_what_its_input_was_made_with(tmp_path):
    """CRN's network saw six sweeps behind CRN's filter; evaluation and prediction ask the stream for the same."""
    from click.testing import CliRunner

    from cli.model import group
    from imkd_models.checkpoint import load_model
    from imkd_models.presets import centerpoint_pillar_config
    from pipelines.predict import stream_options

    model = LidarDetector(centerpoint_pillar_config())
    torch.save({"state_dict": public_state("centerpoint_mmdet3d", model)}, tmp_path / "c.pth")
    arguments = ["import", "--from", "centerpoint_mmdet3d", str(tmp_path / "c.pth"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(group, arguments, catch_exceptions=False).exit_code == 0
    loaded, meta = load_model(tmp_path / "out")
    assert stream_options(loaded, meta)["lidar_sweeps"] == 10
    assert SOURCES["crn"].loader == {"radar_filter": "crn", "radar_sweeps": 6}
    assert SOURCES["crkd"].loader["radar_filter"] == "none" and SOURCES["crkd"].loader["radar_sweeps"] == 6
    assert SOURCES["crkd"].loader["augment"] == {"evaluation_scale": pytest.approx(0.48 / 0.44)}  # CRKD's own scale over ours
