"""CRKD's student: public names and shapes, and the decoded boxes of a network run as its authors run it, in LiDAR axes."""

from __future__ import annotations

import math

import pytest
import torch
from batches import make_batch
from public_names import crkd_student, public_boxes
from torch import nn

from imkd_data.errors import InputDataError, MismatchError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.augment import draw_images
from imkd_models.detector import StudentDetector
from imkd_models.head import DecodeOptions, decode
from imkd_models.importing import SOURCES, import_state
from imkd_models.presets import build_model, crkd_r50_config
from pipelines.predict import stream_options

GRID = BevGrid(x_min_m=-6.15, y_min_m=-9.6, cell_m=0.6, nx=24, ny=32)  # x off-centre, y symmetric


def on_meta(state: dict):
    config = SOURCES["crkd"].config(state)
    with torch.device("meta"):
        return config, build_model(config, pretrained=False)


@pytest.mark.parametrize(("suffix", "calibrated", "swin"), [("", False, False), ("_student", True, False), ("", True, True)])
def test_crkd_files_fit(suffix, calibrated, swin):
    state = crkd_student(suffix, calibrated=calibrated, swin=swin)
    if suffix:  # the file of a distillation also holds the teacher and the relation adapters
        state |= {"encoders.lidar.backbone.conv_input.0.weight": torch.empty(16, 3, 3, 3, 5, device="meta")}
        state |= {"heads.object.shared_conv.conv.weight": torch.empty(64, 256, 3, 3, device="meta")}
        state |= {"fused_affinity_loss.adapt.0.weight": torch.empty(256, 256, 3, 3, device="meta")}
    config, model = on_meta(state)
    assert config.calibration == calibrated and config.convention == "bevfusion" and config.radar_points_per_cell == 20
    import_state("crkd", state, model)
    assert model.feature_shapes["bev_fused"] == (256, 180, 180) and model.feature_shapes["bev_neck"] == (256, 180, 180)
    assert model.feature_shapes["bev_stage2"] == (512, 45, 45)
    parts = [m for m in (model.fuser, model.calibration) if m is not None]
    million = [round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for m in parts]
    assert million == ([1.79, 1.77] if calibrated else [1.79])
    key = f"fuser{suffix}.input_conv_sensor_2.bias"
    state[f"{key}_old"] = state.pop(key)
    with pytest.raises(MismatchError) as error:
        import_state("crkd", state, model)
    assert f"missing {key}" in str(error.value) and (suffix or f"unused {key}_old" in str(error.value))


def test_what_is_not_imported_says_why():
    teacher = {"encoders.lidar.backbone.conv_input.0.weight": torch.zeros(1)}
    with pytest.raises(InputDataError, match="--part teacher"):
        SOURCES["crkd"].config(teacher)
    student = crkd_student(swin=True)
    with pytest.raises(InputDataError, match="no LiDAR-camera teacher of CRKD"):
        SOURCES["crkd:teacher"].config(student)
    student.pop("encoders.camera.neck.lateral_convs.0.conv.weight")
    with pytest.raises(InputDataError, match="GeneralizedLSSFPN"):
        SOURCES["crkd"].config(student)
    with pytest.raises(InputDataError, match="this is no CRKD student"):
        SOURCES["crkd"].config({"encoders.camera.backbone.conv1.weight": torch.zeros(1)})
    with pytest.raises(RecipeError, match="symmetric in y"):
        crkd_r50_config(convention="bevfusion", grid=BevGrid(x_min_m=-6.0, y_min_m=-9.0, cell_m=0.6, nx=24, ny=32))


def test_evaluation_scales_images_as_published():
    """0.48 of 900x1600, cut at the lower edge; everybody else's images just fill the width (0.44)."""
    model, size = small(), {"full_hw_px": (900, 1600), "image_hw_px": (256, 704), "cameras": 1}
    for loader, expected in ((SOURCES["crkd"].loader, (768, 432, 32, 176)), ({"radar_sweeps": 6}, (704, 396, 0, 140))):
        options = stream_options(model, {"run": {"loader": dict(loader)}})
        draw = draw_images(options["augment"], **size, seed=0, epoch=0, position=0)[0]
        assert (draw.resized_w_px, draw.resized_h_px, draw.left_px, draw.top_px) == expected
        assert options["radar_sweeps"] == 6 and not draw.flip
    assert SOURCES["crkd:teacher"].loader["augment"] == SOURCES["crkd"].loader["augment"]


def small() -> StudentDetector:
    torch.manual_seed(0)
    parity = frozenset({"cell_index:trunc", "frustum:linspace_edges"})
    config = crkd_r50_config(
        grid=GRID,
        image_hw_px=(64, 96),
        backbone="resnet_tiny",
        fpn_channels=8,
        depth_bins=11,
        camera_channels=8,
        radar_channels=12,
        fused_channels=16,
        trunk_base=8,
        neck_channels=8,
        head_shared=16,
        head_branch=8,
        radar_points_per_cell=3,
        convention="bevfusion",
        parity=parity,
    )
    model = StudentDetector(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def camera_map(model: StudentDetector, batch, height: float) -> torch.Tensor:
    """bev_camera as (B, C, X_L, Y_L): BEVFusion's geometry in LiDAR axes, one point at a time."""
    c = model.config
    features = model.camera.image(batch.images_BTVCHW[:, 0].flatten(0, 1))
    both = model.camera.depth.both(features)
    depth, context = both[:, : c.depth_bins].softmax(1), both[:, c.depth_bins :]
    turn = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, -height], [0, 0, 0, 1]])  # LiDAR from bev
    pose = (turn @ batch.bev_from_camera_BTV44[:, 0]).flatten(0, 1)
    inverse = torch.linalg.inv(batch.image_from_camera_BTV33[:, 0]).flatten(0, 1)
    n, _, h, w = context.shape
    u, v = torch.linspace(0, 95, w), torch.linspace(0, 63, h)
    pixels = torch.stack([u.expand(h, w), v[:, None].expand(h, w), torch.ones(h, w)], -1)
    out = torch.zeros(len(batch), c.camera_channels, GRID.ny, GRID.nx)
    low = torch.tensor([-GRID.y_max_m, GRID.x_min_m, -10.0])
    for view in range(n):
        for k in range(c.depth_bins):
            ray = pixels @ inverse[view].T * (1.0 + k)
            xyz = ray @ pose[view, :3, :3].T + pose[view, :3, 3]
            cell = ((xyz - low) / torch.tensor([0.6, 0.6, 20.0])).long()
            ok = (cell >= 0).all(-1) & (cell[..., 0] < GRID.ny) & (cell[..., 1] < GRID.nx) & (cell[..., 2] < 1)
            values = (context[view] * depth[view, k])[:, ok]
            flat = cell[ok][:, 0] * GRID.nx + cell[ok][:, 1]
            out[view // 6] += torch.zeros(c.camera_channels, GRID.ny * GRID.nx).index_add(1, flat, values).view(out.shape[1:])
    return out


def radar_map(model: StudentDetector, batch, height: float) -> torch.Tensor:
    """Radar canvas (B, C, X_L, Y_L): padded cells, point by point, columns as published."""
    radar, cap = batch.radar, model.config.radar_points_per_cell
    moved = radar.xyz_m.clone()
    moved[:, :2] += radar.velocity_mps * radar.age_s[:, None]
    x, y, z = -moved[:, 1], moved[:, 0], moved[:, 2] - height
    vx, vy = -radar.velocity_mps[:, 1], radar.velocity_mps[:, 0]
    cells: dict[tuple[int, int, int], list[torch.Tensor]] = {}
    x0, y0 = -GRID.y_max_m, GRID.x_min_m
    for i in range(len(x)):
        ix, iy = math.floor((float(x[i]) - x0) / 0.6), math.floor((float(y[i]) - y0) / 0.6)
        if not (0 <= ix < GRID.ny and 0 <= iy < GRID.nx and -5 <= z[i] < 3):
            continue
        rcs, dyn, ambig, invalid, pdh0 = radar.features_NF[i].tolist()
        hot = [float(k == dyn) for k in range(8)] + [float(k == ambig) for k in range(5)]
        hot += [float(k == invalid) for k in range(18)] + [float(pdh0 > k) for k in range(7)]
        scaled = [(float(x[i]) - x0) / 19.2, (float(y[i]) - y0) / 14.4, (float(z[i]) + 5) / 8]
        offset = [float(x[i]) - x0 - (ix + 0.5) * 0.6, float(y[i]) - y0 - (iy + 0.5) * 0.6]
        row = [*scaled, rcs, float(vx[i]), float(vy[i]), float(radar.age_s[i]), *hot, *offset]
        cells.setdefault((int(radar.batch_index[i]), ix, iy), []).append(torch.tensor(row))
    canvas = torch.zeros(len(batch), model.config.radar_channels, GRID.ny, GRID.nx)
    for (b, ix, iy), rows in cells.items():
        slots = [*rows[:cap], *[torch.zeros(47)] * max(0, cap - len(rows))]
        values = torch.stack(slots)
        for layer in model.radar.layers:
            values = torch.relu(layer["norm"](layer["linear"](values)))
        canvas[b, :, ix, iy] = values.amax(0)
    return canvas


def test_decoded_boxes_equal_those_of_the_network_in_its_own_axes():
    model, batch = small(), make_batch(GRID, boxes=14)
    height = model.config.mount_m[2]
    with torch.no_grad():
        radar = model.calibration(radar_map(model, batch, height))
        maps = {"bev_camera": camera_map(model, batch, height), "bev_radar": radar}
        fused = model.fuser(maps)["bev_fused"]
        neck = model.trunk(fused)["bev_neck"]
        shared = model.head.shared(neck)
        names = {"offset_cells": "reg", "height_m": "height", "log_size_m": "dim", "yaw_sincos": "rot", "velocity_mps": "vel"}
        names["heatmap_logits"] = "heatmap"
        head = [{names[n]: branch(shared) for n, branch in group.items()} for group in model.head.branches]
        outputs = model(batch)
    assert maps["bev_camera"].abs().sum() > 1 and maps["bev_radar"].abs().sum() > 1
    torch.testing.assert_close(outputs.features["bev_fused"], fused.flip(-2), atol=1e-4, rtol=1e-4)
    options = DecodeOptions(nms="none", per_sample=60, per_group=60, candidates=60, margin_m=100)
    found = decode(outputs.head, GRID, options)[1]
    public = sorted(public_boxes(head, 1, GRID), key=lambda b: -b[9])
    assert len(found) == 60
    for i in range(60):
        score = float(found.score[i])
        near = [b for b in public[:200] if abs(b[9] - score) < 2e-5]
        x, y, z = found.centre_m[i].tolist()
        places = [(b[1], -b[0], b[2] + height) for b in near]
        gap = [max(abs(p - q) for p, q in zip(place, (x, y, z), strict=True)) for place in places]
        assert gap and min(gap) < 1e-3
        box = near[gap.index(min(gap))]
        yaw = -box[6] - math.pi / 2 - math.pi / 2  # old mmdet3d yaw -> heading in LiDAR axes -> ego
        assert math.cos(yaw - float(found.yaw_rad[i])) > 1 - 1e-6
        assert found.size_lwh_m[i].tolist() == pytest.approx([box[4], box[3], box[5]], rel=1e-3)
        assert found.velocity_mps[i].tolist() == pytest.approx([box[8], -box[7]], abs=1e-3)


def test_padding_of_radar_cells_counts_in_training_as_in_evaluation():
    """The zero rows of a cell with fewer points take part in both, by the norms' running statistics, which they leave alone."""
    model, batch = small(), make_batch(GRID, boxes=14)
    encoder = model.radar
    expected = encoder(batch.radar, 0, len(batch))
    encoder.train()
    for layer in encoder.layers:
        layer["norm"].eval()  # the same statistics for the points: what differs is the padding
    assert torch.equal(encoder(batch.radar, 0, len(batch)), expected)
    encoder.train()
    encoder(batch.radar, 0, len(batch))
    assert [int(layer["norm"].num_batches_tracked) for layer in encoder.layers] == [1] * len(encoder.layers)


def test_it_trains_and_every_parameter_gets_a_gradient():
    model, batch = small().train(), make_batch(GRID, boxes=14)
    out = model(batch)
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    sum(model.loss(out, batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
