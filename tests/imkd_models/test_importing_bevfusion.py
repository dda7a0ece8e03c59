"""CRKD's Swin-T and its LiDAR-camera teacher: the public formulas, written from the published code, on state dicts of the
public names, against our network with the imported weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import pytest
import torch
from batches import make_batch, small_fusion, small_student, with_near
from public_names import Names, State, crkd_teacher, level_neck, public_boxes, swin_tiny
from torch import Tensor
from torch.nn import functional

from imkd_data.errors import RecipeError, UsageError
from imkd_data.geometry import BevGrid
from imkd_models.bevfusion import sparse_depth
from imkd_models.camera import BACKBONES, ImageEncoder, build_backbone
from imkd_models.detector import FusionDetector, StudentDetector
from imkd_models.head import DecodeOptions, decode
from imkd_models.importing import SOURCES, import_state
from imkd_models.keymap import public_key
from imkd_models.keyrules import CHANGES, CRKD_TEACHER
from imkd_models.presets import build_model, crkd_r50_config, crkd_swin_t_config, crkd_teacher_config

SPCONV = importlib.util.find_spec("spconv") is not None
NEEDS_SPCONV = "spconv is not installed (optional extra of networks with sparse voxels)"
GRID = BevGrid(x_min_m=-2.4, y_min_m=-2.4, cell_m=0.6, nx=12, ny=8)  # x off-centre, y symmetric


def filled(*shape: int) -> Tensor:
    """Weights that keep the size of their input, scales and variances around one."""
    if len(shape) < 2:
        return torch.rand(shape) + 0.5
    inputs = math.prod(shape[:-1]) if len(shape) == 5 else math.prod(shape[1:])
    return torch.randn(shape) * (2 / inputs) ** 0.5


# ------------------------------------------------------------------------------------------------ Swin and its neck


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def windows(state: State, name: str, x: Tensor, heads: int, shift: int) -> Tensor:
    """mmdetection's ShiftWindowMSA on (B, H, W, C): windows of 7, padded below and right, bias looked up pair by pair."""
    b, h, w, c = x.shape
    x = functional.pad(x, (0, 0, 0, -w % 7, 0, -h % 7))
    rows, columns = x.shape[1:3]
    x = torch.roll(x, (-shift, -shift), (1, 2))
    region = torch.zeros(rows, columns)
    if shift:
        for i, r in enumerate((slice(0, -7), slice(-7, -shift), slice(-shift, None))):
            for j, s in enumerate((slice(0, -7), slice(-7, -shift), slice(-shift, None))):
                region[r, s] = 3 * i + j
    place = torch.arange(49)
    y, z = place // 7, place % 7
    pair = (y[:, None] - y[None] + 6) * 13 + z[:, None] - z[None] + 6
    bias = state[f"{name}.relative_position_bias_table"][pair].permute(2, 0, 1)
    out = torch.zeros_like(x)
    for i in range(0, rows, 7):
        for j in range(0, columns, 7):
            part = x[:, i : i + 7, j : j + 7].reshape(b, 49, c)
            qkv = linear(state, f"{name}.qkv", part).view(b, 49, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
            seen = region[i : i + 7, j : j + 7].flatten()
            mask = torch.where(seen[:, None] == seen[None], 0.0, -100.0)
            weight = (qkv[0] * (c // heads) ** -0.5 @ qkv[1].transpose(-1, -2) + bias + mask).softmax(-1)
            mixed = (weight @ qkv[2]).transpose(1, 2).reshape(b, 49, c)
            out[:, i : i + 7, j : j + 7] = linear(state, f"{name}.proj", mixed).view(b, 7, 7, c)
    return torch.roll(out, (shift, shift), (1, 2))[:, :h, :w]


def public_swin(state: State, prefix: str, images: Tensor) -> list[Tensor]:
    x = functional.conv2d(
        images, state[f"{prefix}.patch_embed.projection.weight"], state[f"{prefix}.patch_embed.projection.bias"], stride=4
    )
    x, maps = norm(state, f"{prefix}.patch_embed.norm", x.permute(0, 2, 3, 1)), []
    for stage, (depth, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
        for block in range(depth):
            name = f"{prefix}.stages.{stage}.blocks.{block}"
            x = x + windows(state, f"{name}.attn.w_msa", norm(state, f"{name}.norm1", x), heads, 3 * (block % 2))
            hidden = functional.gelu(linear(state, f"{name}.ffn.layers.0.0", norm(state, f"{name}.norm2", x)))
            x = x + linear(state, f"{name}.ffn.layers.1", hidden)
        if stage > 0:
            maps.append(norm(state, f"{prefix}.norm{stage}", x).permute(0, 3, 1, 2))
        if stage < 3:
            h, w = x.shape[1:3]
            merged = functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
            name = f"{prefix}.stages.{stage}.downsample"
            x = linear(state, f"{name}.reduction", norm(state, f"{name}.norm", merged)).unflatten(1, (h // 2, w // 2))
    return maps


def batch_norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    values = (state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
    return functional.batch_norm(x, *values, eps=eps)


def public_neck(state: State, prefix: str, maps: list[Tensor]) -> Tensor:
    maps = list(maps)
    for i in (1, 0):
        up = functional.interpolate(maps[i + 1], size=maps[i].shape[2:], mode="bilinear", align_corners=False)
        x = torch.cat([maps[i], up], dim=1)
        for kind in ("lateral_convs", "fpn_convs"):
            weight = state[f"{prefix}.{kind}.{i}.conv.weight"]
            x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
            x = batch_norm(state, f"{prefix}.{kind}.{i}.bn", x).relu()
        maps[i] = x
    return maps[0]


def load(rules, state: State, module: torch.nn.Module, prefix: str) -> None:
    own = {}
    for key, value in module.state_dict().items():
        theirs, change = public_key(rules, prefix + key)
        own[key] = CHANGES[change](state[theirs]).to(value.dtype)
    module.load_state_dict(own)


def test_swin_and_its_neck_equal_the_public_formulas():
    """Maps of 16x32 down to 2x4: windows of 7 with padding, shifts and masks."""
    torch.manual_seed(0)
    n = Names(filled)
    swin_tiny(n, "encoders.camera.backbone")
    level_neck(n, "encoders.camera.neck", 32)
    encoder = ImageEncoder(crkd_swin_t_config(fpn_channels=32)).eval()
    load(CRKD_TEACHER, n.state, encoder, "camera.image.")
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        maps = public_swin(n.state, "encoders.camera.backbone", images)
        for mine, theirs in zip(encoder.backbone(images).feature_maps, maps, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)
        expected = public_neck(n.state, "encoders.camera.neck", maps)
        assert expected.shape == (1, 32, 8, 16) and expected.std() > 0.1
        torch.testing.assert_close(encoder(images), expected, atol=1e-3, rtol=1e-3)


SMALL = {
    "swin_tiny": {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4], "window_size": 7},
    "convnext_base": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24]},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_of_these_backbones_learns(name, monkeypatch):
    """A norm of the classifier that no map passes through would stop distributed training."""
    torch.manual_seed(0)
    monkeypatch.setitem(BACKBONES, name, dataclasses.replace(BACKBONES[name], arguments=SMALL[name]))
    backbone = build_backbone(name, None)
    maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [m.shape[-1] for m in maps] == [24, 12, 6, 3]
    sum(m.square().mean() for m in maps).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


# ----------------------------------------------------------------------------------------- the LiDAR-camera teacher


def lidar_axes(batch, height: float) -> tuple[Tensor, Tensor]:
    """Points (N, 5) x, y, z, raw intensity, age in LiDAR axes, and their sample; close points of past sweeps removed."""
    lidar = batch.lidar
    x, y, z = lidar.xyz_m.unbind(-1)
    points = torch.stack([-y, x, z - height, lidar.column("intensity") * 255, lidar.age_s], dim=1)
    close = lidar.column("near_m") < 1
    low, high = torch.tensor([-GRID.y_max_m, GRID.x_min_m, -5.0]), torch.tensor([GRID.y_max_m, GRID.x_max_m, 3.0])
    keep = ~close & (points[:, :3] > low).all(1) & (points[:, :3] < high).all(1)
    return points[keep], lidar.batch_index[keep]


def public_voxels(state: State, points: Tensor, sample: Tensor, batch: int) -> Tensor:
    """bev_lidar as (B, 256, X_L, Y_L): hard voxels of 0.075 x 0.075 x 0.2 m, ten points each, then dense convolutions in
    x, y, z order that keep to the active cells as sparse ones do."""
    shape = (8 * GRID.ny, 8 * GRID.nx, 41)
    cells: dict[tuple[int, ...], list[Tensor]] = {}
    for b, point in zip(sample.tolist(), points, strict=True):
        x, y, z = point[:3].tolist()
        index = ((x + GRID.y_max_m) / 0.075, (y - GRID.x_min_m) / 0.075, (z + 5) / 0.2)
        inside = cells.setdefault((b, *(math.floor(i) for i in index)), [])
        if len(inside) < 10:
            inside.append(point)
    volume, active = torch.zeros(batch, 5, *shape), torch.zeros(batch, 1, *shape)
    for (b, i, j, k), inside in cells.items():
        volume[b, :, i, j, k], active[b, 0, i, j, k] = torch.stack(inside).mean(0), 1

    def convolved(x: Tensor, name: str, mask: Tensor, bn: str, **options) -> Tensor:
        weight = state[f"encoders.lidar.backbone.{name}.weight"].permute(4, 3, 0, 1, 2)
        return batch_norm(state, f"encoders.lidar.backbone.{bn}", functional.conv3d(x, weight, **options), 1e-3) * mask

    def reached(mask: Tensor, kernel: tuple[int, ...], **options) -> Tensor:
        return (functional.conv3d(mask, torch.ones(1, 1, *kernel), **options) > 0).float()

    x = convolved(volume, "conv_input.0", active, "conv_input.1", padding=1).relu()
    for stage in range(1, 5):
        layer = f"encoder_layers.encoder_layer{stage}"
        for block in range(2):
            y = convolved(x, f"{layer}.{block}.conv1", active, f"{layer}.{block}.bn1", padding=1).relu()
            x = (convolved(y, f"{layer}.{block}.conv2", active, f"{layer}.{block}.bn2", padding=1) + x).relu()
        if stage < 4:
            options = {"stride": 2, "padding": (1, 1, 0) if stage == 3 else 1}
            active = reached(active, (3, 3, 3), **options)
            x = convolved(x, f"{layer}.2.0", active, f"{layer}.2.1", **options).relu()
    active = reached(active, (1, 1, 3), stride=(1, 1, 2))
    x = convolved(x, "conv_out.0", active, "conv_out.1", stride=(1, 1, 2)).relu()
    return x.permute(0, 1, 4, 2, 3).flatten(1, 2)


def public_depth(points: Tensor, sample: Tensor, batch, pose: Tensor, hw: tuple[int, int]) -> Tensor:
    """(B*V, 1, H, W): every point projected into every camera, the nearest one of a pixel kept."""
    image = torch.zeros(len(batch) * 6, 1, *hw)
    for b, xyz in zip(sample.tolist(), points[:, :3], strict=True):
        for view in range(6):
            camera = torch.linalg.inv(pose[b, view])
            u, v, depth = (batch.image_from_camera_BTV33[b, 0, view] @ (camera[:3, :3] @ xyz + camera[:3, 3])).tolist()
            if depth > 0 and 0 <= u / depth < hw[1] and 0 <= v / depth < hw[0]:
                pixel = (6 * b + view, 0, int(v / depth), int(u / depth))
                image[pixel] = depth if image[pixel] == 0 else min(depth, float(image[pixel]))
    return image


def layers(state: State, prefix: str, x: Tensor, numbers: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    for i, stride in zip(numbers, strides, strict=True):
        weight = state[f"{prefix}.{i}.weight"]
        bias = state.get(f"{prefix}.{i}.bias")
        x = functional.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)
        x = batch_norm(state, f"{prefix}.{i + 1}", x).relu()
    return x


def public_camera(state: State, features: Tensor, depth: Tensor, batch, pose: Tensor, bins: int) -> Tensor:
    """bev_camera as (B, 80, X_L, Y_L): DepthLSSTransform, pooled on half cells, refined."""
    v = "encoders.camera.vtransform"
    x = torch.cat([layers(state, f"{v}.dtransform", depth, (0, 3, 6), (1, 4, 2)), features], dim=1)
    x = layers(state, f"{v}.depthnet", x, (0, 3), (1, 1))
    x = functional.conv2d(x, state[f"{v}.depthnet.6.weight"], state[f"{v}.depthnet.6.bias"])
    share, context = x[:, :bins].softmax(1), x[:, bins:]
    n, _, h, w = context.shape
    columns, rows = torch.linspace(0, 95, w), torch.linspace(0, 63, h)
    pixels = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w), torch.ones(h, w)], -1)
    pose = pose.flatten(0, 1)
    inverse = torch.linalg.inv(batch.image_from_camera_BTV33[:, 0]).flatten(0, 1)
    size = (2 * GRID.ny, 2 * GRID.nx)
    out = torch.zeros(len(batch), 80, size[0] * size[1])
    low = torch.tensor([-GRID.y_max_m, GRID.x_min_m, -10.0])
    for view in range(n):
        for k in range(bins):
            ray = pixels @ inverse[view].T * (1.0 + k)
            xyz = ray @ pose[view, :3, :3].T + pose[view, :3, 3]
            cell = ((xyz - low) / torch.tensor([0.3, 0.3, 20.0])).long()
            ok = (cell >= 0).all(-1) & (cell[..., 0] < size[0]) & (cell[..., 1] < size[1]) & (cell[..., 2] < 1)
            out[view // 6].index_add_(1, cell[ok][:, 0] * size[1] + cell[ok][:, 1], (context[view] * share[view, k])[:, ok])
    return layers(state, f"{v}.downsample", out.unflatten(2, size), (0, 3, 6), (1, 2, 1))


@pytest.fixture(scope="module")
def small():
    """A teacher with the public widths on a small grid, its state dict, and a batch."""
    if not SPCONV:
        pytest.skip(NEEDS_SPCONV)
    torch.manual_seed(0)
    state = crkd_teacher(bins=11, value=filled)
    for key in state:
        if "task_heads" in key and ".1." in key:
            state[key] = state[key] / 3000  # so that sizes, which are exponentials, stay finite
    config = crkd_teacher_config(grid=GRID, image_hw_px=(64, 96), depth_bins=11, depth_step_m=1.0)
    model = build_model(config).eval()
    import_state("crkd:teacher", state, model)
    batch = make_batch(GRID, boxes=6, ground=120)
    past = torch.arange(len(batch.lidar.age_s)) % 3 * 0.05
    return model, state, with_near(dataclasses.replace(batch, lidar=dataclasses.replace(batch.lidar, age_s=past)))


def test_the_teacher_equals_the_network_in_its_own_axes(small):
    model, state, batch = small
    height = model.config.student.mount_m[2]
    turn = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, -height], [0, 0, 0, 1]])  # LiDAR from bev
    pose = turn @ batch.bev_from_camera_BTV44[:, 0]
    with torch.no_grad():
        points, sample = lidar_axes(batch, height)
        lidar = public_voxels(state, points, sample, len(batch))
        features = model.camera.image(batch.images_BTVCHW[:, 0].flatten(0, 1))
        depth = public_depth(points, sample, batch, pose, (64, 96))
        camera = public_camera(state, features, depth, batch, pose, 11)
        fused = model.fuser({"bev_camera": camera, "bev_lidar": lidar})["bev_fused"]
        shared = model.head.shared(model.trunk(fused)["bev_neck"])
        outputs = model(batch)
    assert (depth > 0).sum() > 50 and lidar.abs().mean() > 1e-3 and camera.abs().mean() > 1e-3
    for name, expected in (("bev_lidar", lidar), ("bev_camera", camera), ("bev_fused", fused)):
        scale = float(expected.abs().max())
        torch.testing.assert_close(outputs.features[name].flip(-2) / scale, expected / scale, atol=2e-4, rtol=1e-3)
    assert {k: tuple(v.shape[1:]) for k, v in outputs.features.items()} == model.feature_shapes
    names = {"offset_cells": "reg", "height_m": "height", "log_size_m": "dim", "yaw_sincos": "rot", "velocity_mps": "vel"}
    names["heatmap_logits"] = "heatmap"
    head = [{names[n]: branch(shared).detach() for n, branch in group.items()} for group in model.head.branches]
    options = DecodeOptions(nms="none", per_sample=20, per_group=20, candidates=20, margin_m=1e3, height_m=1e3, score_min=0)
    found, public = decode(outputs.head, GRID, options)[1], public_boxes(head, 1, GRID)
    assert len(found) == 20
    for i in range(20):
        gaps = []
        for box in public:
            place, size = (box[1], -box[0], box[2] + height), (box[4], box[3], box[5])
            gap = [abs(p - q) for p, q in zip(place, found.centre_m[i].tolist(), strict=True)]
            gap += [abs(p / q - 1) for p, q in zip(size, found.size_lwh_m[i].tolist(), strict=True)]
            gaps.append(max(*gap, abs(box[9] - float(found.score[i]))))
        assert min(gaps) < 1e-3


def test_every_parameter_of_the_teacher_learns(small, monkeypatch):
    from spconv.pytorch import ops

    if not torch.cuda.is_available():
        monkeypatch.setattr(ops, "get_current_stream", lambda: 0)
    model, _, batch = small
    model.train()
    sum(model.loss(model(batch), batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("swin", [False, True])
def test_teacher_files_fit(swin):
    if not SPCONV:
        pytest.skip(NEEDS_SPCONV)
    state = crkd_teacher(swin=swin)
    state |= {"encoders_student.radar.backbone.caliber.0.weight": torch.empty(256, 256, 3, 3, device="meta")}
    config = SOURCES["crkd:teacher"].config(state)
    with torch.device("meta"):
        model = build_model(config, pretrained=False)
    import_state("crkd:teacher", state, model)
    assert model.feature_shapes["bev_lidar"] == (256, 180, 180) and model.feature_shapes["bev_camera_gated"] == (80, 180, 180)
    assert (config.student.backbone == "swin_tiny") == swin


def test_without_spconv_the_teacher_says_what_to_install():
    if SPCONV:
        pytest.skip("spconv is installed, so there is nothing to refuse")
    with pytest.raises(UsageError, match="needs spconv"):
        build_model(crkd_teacher_config(grid=GRID), pretrained=False)


def test_sparse_depth_on_edges_and_without_points():
    config = crkd_teacher_config(grid=GRID, image_hw_px=(64, 96)).student
    batch = make_batch(GRID, slots=1)
    image33, pose44 = batch.image_from_camera_BTV33[:, 0], batch.bev_from_camera_BTV44[:, 0]

    def drawn(xyz: list[list[float]]) -> Tensor:
        n = len(xyz)
        lidar = dataclasses.replace(
            batch.lidar,
            xyz_m=torch.tensor(xyz).view(n, 3),
            features_NF=torch.zeros(n, 2),
            batch_index=torch.ones(n, dtype=torch.long),
            time_index=torch.zeros(n, dtype=torch.long),
            age_s=torch.zeros(n),
        )
        return sparse_depth(lidar, image33, pose44, config)

    assert not drawn([]).any()
    # Camera 0 looks along x from (0.8, 0, 1.5): two points on one ray, the nearer one stays; one behind, one beyond the grid.
    image = drawn([[3.8, 0.0, 1.5], [2.8, 0.0, 1.5], [4.81, 0.0, 1.5], [float("nan"), 0, 0]])
    assert image[:6].sum() == 0 and (image[6] > 0).sum() == 1 and float(image[6].max()) == pytest.approx(2.0)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(RecipeError, match="which a student never does"):
        StudentDetector(crkd_r50_config(radar=False, depth_net="lidar_points", calibration=False))
    with pytest.raises(RecipeError, match="depth_input reads LiDAR depth, which a student never does"):
        StudentDetector(small_student(depth_input=True))
    assert FusionDetector(small_fusion()).camera.config.depth_input  # a teacher may
    with pytest.raises(RecipeError, match="stride_px 8"):
        crkd_swin_t_config(stride_px=16)
    with pytest.raises(RecipeError, match="whole millimetres"):
        crkd_r50_config(view_refine=7)
    with pytest.raises(RecipeError, match="lidar_neck"):
        crkd_teacher_config().with_values(lidar_channels=128)
