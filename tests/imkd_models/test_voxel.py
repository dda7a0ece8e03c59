"""The voxel teacher, where spconv is installed: against a dense float64 network, its gradient, and imported weights.

spconv is an optional extra. Its CPU wheel runs the forward pass; its backward pass asks for a CUDA stream even on a CPU, so
the test answers that question with the default stream.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import ODD_GRID, make_batch, with_near
from public_names import centerpoint_voxel

from imkd_data.geometry import BevGrid
from imkd_models.convention import network_grid
from imkd_models.importing import SOURCES, import_state
from imkd_models.presets import build_model, voxel

pytest.importorskip("spconv", reason="spconv is not installed (optional extra of the voxel teacher)")


def dense(encoder, features: torch.Tensor, index: torch.Tensor, shape: list[int], batch: int) -> torch.Tensor:
    """The same layers as dense convolutions in float64, masked to the active voxels."""
    conv3d = torch.nn.functional.conv3d
    b, z, y, x = index.long().unbind(1)
    volume = torch.zeros(batch, *shape, features.shape[1], dtype=torch.float64)
    active = torch.zeros(batch, 1, *shape, dtype=torch.float64)
    volume[b, z, y, x], active[b, 0, z, y, x] = features.double(), 1.0
    volume = volume.movedim(-1, 1)

    def weight(layer):
        return layer.weight.double().permute(0, 4, 1, 2, 3)

    def normed(x, norm, mask):
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        return (x * scale.view(1, -1, 1, 1, 1) + shift.view(1, -1, 1, 1, 1)) * mask

    for layer in encoder.layers:
        if hasattr(layer, "convs"):
            y = normed(conv3d(volume, weight(layer.convs[0]), padding=1), layer.norms[0], active).relu()
            volume = (normed(conv3d(y, weight(layer.convs[1]), padding=1), layer.norms[1], active) + volume).relu()
            continue
        conv = layer.layer
        if not conv.subm:
            kernel = torch.ones(1, 1, *conv.kernel_size, dtype=torch.float64)
            active = (conv3d(active, kernel, stride=tuple(conv.stride), padding=tuple(conv.padding)) > 0).double()
        volume = conv3d(volume, weight(conv), stride=tuple(conv.stride), padding=1 if conv.subm else tuple(conv.padding))
        volume = normed(volume, layer.norm, active).relu()
    return volume.flatten(1, 2)


def test_sparse_network_equals_a_dense_one(monkeypatch):
    torch.manual_seed(0)
    grid = BevGrid(x_min_m=-3.2, y_min_m=-1.6, cell_m=0.8, nx=8, ny=6)  # dense float64 convolutions are slow
    model, batch = voxel(grid=grid).eval(), make_batch(ground=200, grid=grid)
    encoder = model.lidar.encoder
    for norm in (m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm1d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    seen = []

    class Spy:
        @staticmethod
        def SparseConvTensor(*arguments):
            seen.append(arguments)
            return real(*arguments)

    real = encoder.spconv.SparseConvTensor
    monkeypatch.setattr(encoder, "spconv", Spy)
    with torch.no_grad():
        got = encoder(batch.lidar, 2)
        expected = dense(encoder, *seen[0])
    assert got.shape == (2, 256, *grid.shape) and expected.abs().max() > 1e-3
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


def test_every_parameter_gets_a_gradient_and_the_loss_falls(monkeypatch):
    from spconv.pytorch import ops

    if not torch.cuda.is_available():
        monkeypatch.setattr(ops, "get_current_stream", lambda: 0)
    torch.manual_seed(0)
    model, batch = voxel(grid=ODD_GRID), make_batch(ground=200)
    optimiser, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(4):
        out = model(batch)
        assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
        loss = sum(model.loss(out, batch).values())
        optimiser.zero_grad()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_an_empty_cloud_gives_finite_maps_and_gradients():
    torch.manual_seed(0)
    model, batch = voxel(grid=ODD_GRID), make_batch(ground=0, boxes=0)
    none = dataclasses.replace(
        batch.lidar, **{n: getattr(batch.lidar, n)[:0] for n in ("xyz_m", "features_NF", "batch_index", "time_index", "age_s")}
    )
    out = model(dataclasses.replace(batch, lidar=none))
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    sum(model.loss(out, batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(("source", "prefix"), [("centerpoint_mmdet3d", ""), ("labeldistill:lidar", "model.centerpoint.")])
def test_public_voxel_files_fit(source, prefix):
    torch.manual_seed(0)
    state = centerpoint_voxel(prefix, kernel_first=not prefix, value=lambda *shape: torch.rand(shape))
    config = SOURCES[source].config(state).with_values(grid=ODD_GRID)
    model = build_model(config).eval()
    import_state(source, state, model)
    first = state[f"{prefix}pts_middle_encoder.conv_input.0.weight"]
    first = first if prefix else first.permute(4, 0, 1, 2, 3)
    assert torch.equal(model.state_dict()["lidar.encoder.layers.0.layer.weight"], first)
    turned = config.convention != "bev"
    assert turned == (not prefix) and model.lidar.encoder.grid.nx == 8 * (ODD_GRID.ny if turned else ODD_GRID.nx)


def test_turned_points_fill_turned_voxels():
    """A network in LiDAR axes gives, on turned points, the maps of the same network run in those axes directly."""
    torch.manual_seed(0)
    turned = voxel(grid=ODD_GRID, convention="mmdet3d_lwh", near_removed_m=1.0, points_per_pillar=10).eval()
    grid = network_grid(ODD_GRID)
    height = turned.config.mount_m[2]
    plain = voxel(grid=grid, near_removed_m=1.0, points_per_pillar=10).eval()
    plain.load_state_dict(turned.state_dict())
    batch = with_near(make_batch(ground=300))
    x, y, z = batch.lidar.xyz_m.unbind(-1)
    lidar = dataclasses.replace(batch.lidar, xyz_m=torch.stack([-y, x, z - height], dim=1))
    with torch.no_grad():
        mine = turned(batch).features["bev_neck"]
        theirs = plain(dataclasses.replace(batch, lidar=lidar, grid=grid)).features["bev_neck"]
    torch.testing.assert_close(mine, theirs.transpose(-1, -2).flip(-2), atol=1e-5, rtol=1e-5)
