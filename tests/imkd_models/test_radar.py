"""Radar: perspective pillars under augmentation, time and caps; BEV pillars; state columns; calibration block; empties."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import ODD_GRID, make_batch, small_student
from test_camera import augmented

from imkd_data.errors import MissingFeatureError
from imkd_models.radar import BevRadarEncoder, CalibrationBlock, PerspectiveRadarEncoder, PillarNet, _rank_within, at_key_time


def encode(encoder, batch, slot=0):
    return encoder(
        batch.radar,
        slot,
        batch.image_from_camera_BTV33[:, slot],
        batch.bev_from_camera_BTV44[:, slot],
        batch.bev_from_ego_B44,
    )


def seen_points(encoder, batch):
    """Features, plane cell, view and (u, depth) of what the views see."""
    matrices = (batch.image_from_camera_BTV33[:, 0], batch.bev_from_camera_BTV44[:, 0], batch.bev_from_ego_B44)
    seen, values = encoder._rows(batch.radar, 0, *matrices)
    raw = torch.stack([values["u"], values["depth"]], dim=1)[seen]
    features, cell, view = encoder._seen_points(seen, values, 12)
    invented = torch.tensor([[0.1, 57.0]]).expand(len(view) - len(raw), 2)
    return features, cell, view, torch.cat([raw, invented])


def keep(points, mask):
    values = {f.name: getattr(points, f.name) for f in dataclasses.fields(points)}
    return type(points)(**{k: v[mask] if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def single_point(batch, xyz, velocity=(0.0, 0.0), age=0.0):
    points = keep(batch.radar, torch.arange(len(batch.radar.age_s)) < 1)
    return dataclasses.replace(
        batch,
        radar=dataclasses.replace(
            points, xyz_m=torch.tensor([xyz]), velocity_mps=torch.tensor([velocity]), age_s=torch.tensor([age])
        ),
    )


def test_a_return_appears_at_its_depth_and_column_in_the_camera_that_sees_it():
    config, batch = small_student(), single_point(make_batch(), (10.8, 2.0, 0.5))
    encoder = PerspectiveRadarEncoder(config).eval()
    _, cell, view, raw = seen_points(encoder, batch)
    assert view.tolist() == [0]  # the front camera of sample 0
    depth, focal = 10.0, float(batch.image_from_camera_BTV33[0, 0, 0, 0, 0])
    u = 47.5 - focal * 2.0 / depth
    assert raw[0].tolist() == pytest.approx([u, depth], abs=1e-3)
    row, column = divmod(int(cell), 12)
    assert row == int((depth - 2.0) / 0.75) and column == int((u + 0.5) / 8)


def test_past_returns_are_moved_by_their_velocity():
    moved = at_key_time(single_point(make_batch(), (5.0, 0.0, 0.5), (2.0, -1.0), 0.4).radar, 0)
    assert moved["use"].tolist() == [True] and moved["xyz"][0].tolist() == pytest.approx([5.8, -0.4, 0.5])


def test_perspective_radar_does_not_feel_the_augmentation():
    config, batch = small_student(), make_batch()
    torch.manual_seed(0)
    encoder = PerspectiveRadarEncoder(config).eval()
    moved, matrix = augmented(batch)
    radar = batch.radar
    turned = dataclasses.replace(
        radar, xyz_m=radar.xyz_m @ matrix[:3, :3].T, velocity_mps=radar.velocity_mps @ matrix[:2, :2].T
    )
    plain = encode(encoder, batch)
    after = encode(encoder, dataclasses.replace(moved, radar=turned))
    torch.testing.assert_close(plain[0], after[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain[1], after[1], atol=1e-4, rtol=1e-4)


def test_history_slots_are_separate():
    config, batch = small_student(), make_batch(slots=2)
    encoder = PerspectiveRadarEncoder(config).eval()
    only_now = dataclasses.replace(batch, radar=keep(batch.radar, batch.radar.time_index == 0))
    torch.testing.assert_close(encode(encoder, batch, 0)[0], encode(encoder, only_now, 0)[0])
    assert not torch.allclose(encode(encoder, batch, 1)[0], encode(encoder, only_now, 1)[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [0, 1])
def test_none_or_one_return_is_finite(training, count):
    config, batch = small_student(), make_batch()
    few = dataclasses.replace(batch, radar=keep(batch.radar, torch.arange(len(batch.radar.age_s)) < count))
    encoder = PerspectiveRadarEncoder(config).train(training)
    context, occupancy = encode(encoder, few)
    assert context.isfinite().all() and occupancy.isfinite().all()
    (context.sum() + occupancy.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    bev = BevRadarEncoder(config).train(training)
    assert bev(few.radar, 0, 2).isfinite().all()


def test_invented_return_only_where_a_view_is_empty():
    batch = single_point(make_batch(), (10.8, 2.0, 0.5))
    encoder = PerspectiveRadarEncoder(small_student(parity={"radar_empty:dummy"}, depth_step_m=5.0)).eval()
    features, _, view, raw = seen_points(encoder, batch)
    assert sorted(view.tolist()) == list(range(12)) and len(features) == 12
    assert raw[view != 0].unique(dim=0).tolist() == [[pytest.approx(0.1), 57.0]]


def test_culling_by_image_rows_is_an_option():
    batch = single_point(make_batch(), (10.8, 0.0, 30.0))  # far above every image
    clean = seen_points(PerspectiveRadarEncoder(small_student()), batch)
    crn = seen_points(PerspectiveRadarEncoder(small_student(parity={"radar_cull:image_rows"})), batch)
    assert len(clean[0]) == 1 and len(crn[0]) == 0


def test_legacy_features_repeat_the_offsets():
    batch = make_batch()
    encoder = PerspectiveRadarEncoder(small_student(parity={"pillar_features:legacy"})).eval()
    features, *_ = seen_points(encoder, batch)
    assert torch.equal(features[:, :2], features[:, 5:7]) and (features[:, [2, 7]] == 0).all()
    assert features[:, 0].abs().max() <= 4 and features[:, 1].abs().max() <= 0.375


def test_capped_pillars_equal_a_slow_voxeliser():
    batch, config = make_batch(boxes=30), small_student(parity={"radar_caps:crn"})
    torch.manual_seed(0)
    encoder = PerspectiveRadarEncoder(config).eval()
    features, plane_cell, view, _ = seen_points(encoder, batch)
    features, plane_cell, view = (x.repeat_interleave(5, 0) for x in (features, plane_cell, view))  # overfull pillars
    features = features + 0.01 * torch.arange(len(features))[:, None]
    cell = view * 24 * 12 + plane_cell
    got = encoder._capped(features, cell, 12 * 24 * 12)
    slots: dict[int, list] = {}
    for feature, c in zip(features, cell.tolist(), strict=True):
        slots.setdefault(c, []).append(feature)
    expected = torch.zeros_like(got)
    for c, rows in slots.items():
        table = torch.zeros(1, 8, 8)
        table[0, : len(rows[:8])] = torch.stack(rows[:8])
        expected[c] = encoder.pillars.padded(table)[0]
    assert max(map(len, slots.values())) > 8
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", [PerspectiveRadarEncoder, BevRadarEncoder])
def test_masked_evaluation_equals_selection(encoder, monkeypatch):
    """Evaluation keeps static shapes by masking; training selects. Same pillars, whatever lies in unused rows."""
    torch.manual_seed(0)
    batch, encoder = make_batch(slots=2), encoder(small_student()).eval()
    odd = batch.radar.xyz_m.clone()
    odd[3], odd[5] = torch.nan, torch.inf
    batch = dataclasses.replace(batch, radar=dataclasses.replace(batch.radar, xyz_m=odd))
    perspective = isinstance(encoder, PerspectiveRadarEncoder)
    run = (lambda: encode(encoder, batch)[0]) if perspective else (lambda: encoder(batch.radar, 0, 2))
    masked = run()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.momentum = 0.0
    monkeypatch.setattr(encoder, "training", True)  # selection, with the norms still in evaluation
    torch.testing.assert_close(run(), masked)


def test_rank_within_a_group():
    group, key = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([5, 1, 3, 4, 0])
    assert _rank_within(group, key).tolist() == [2, 1, 0, 1, 0]


def test_pillar_net_does_not_depend_on_the_order_of_points():
    torch.manual_seed(0)
    net, features = PillarNet(8, 16).eval(), torch.randn(40, 8)
    pillar, order = torch.randint(0, 6, (40,)), torch.randperm(40)
    torch.testing.assert_close(net(features, pillar, 6), net(features[order], pillar[order], 6))


def test_bev_pillar_lies_in_the_cell_of_the_return():
    batch = single_point(make_batch(), (3.3, -6.1, 0.5))
    encoder = BevRadarEncoder(small_student())
    canvas = encoder._canvas(batch.radar, 0, 2, ODD_GRID).view(2, 24, 32, -1)
    row, column, _ = ODD_GRID.cells([[3.3, -6.1]])
    hit = (canvas != 0).any(-1).nonzero().tolist()
    assert hit == [[0, int(row[0]), int(column[0])]]


def test_state_columns_are_one_hot_and_pdh0_is_ordinal():
    from imkd_models.radar import _states

    radar = make_batch().radar
    out = _states(radar.features_NF, radar.feature_names)
    assert out.shape[1] == 38
    for part in out.split([8, 5, 18, 7], dim=1)[:3]:
        assert (part.sum(1) == 1).all()
    bits = out[:, 31:]
    assert (bits[:, :-1] >= bits[:, 1:]).all() and torch.equal(bits.sum(1), radar.column("pdh0").clamp(max=7))
    encoder = BevRadarEncoder(small_student(radar_states=True))
    assert encoder(radar, 0, 2).isfinite().all()
    with pytest.raises(MissingFeatureError, match="radar columns"):
        _states(radar.features_NF[:, :1], ("rcs_dbsm",))


def test_calibration_block_spreads_over_thirteen_cells_and_residual_starts_as_identity():
    block = CalibrationBlock(4).eval()
    x = torch.zeros(1, 4, 21, 23)
    base = block(x)
    x[0, :, 10, 11] = 1
    touched = ((block(x) - base).abs() > 0).any(1)[0].nonzero()
    assert (touched.amax(0) - touched.amin(0)).max() <= 12
    positive = torch.rand(2, 4, 6, 7)
    residual = CalibrationBlock(4, "residual")
    torch.testing.assert_close(residual(positive), positive)
    residual(positive).sum().backward()
    assert residual.blocks[-1][1].weight.grad.abs().sum() > 0
