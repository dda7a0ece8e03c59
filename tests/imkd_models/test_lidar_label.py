"""LiDAR teachers and the label encoder: shapes, pillars, conventions of axes, rotation, label maps, frozen teacher."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from batches import ODD_GRID, make_batch, make_boxes, small_fusion, small_lidar, small_student, with_near
from test_radar import keep

from imkd_data.classes import CLASS_GROUPS
from imkd_data.errors import MismatchError, MissingFeatureError, RecipeError, UsageError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import BoxBatch
from imkd_models.convention import lidar_features, near_sensor, points_to_network, without_near
from imkd_models.detector import FusionDetector, LidarDetector
from imkd_models.head import DecodeOptions, decode
from imkd_models.label import LabelEncoder, label_maps
from imkd_models.lidar import PillarEncoder, finer
from imkd_models.presets import centerpoint_pillar_config, label_config_for, pillar_r34_config

SMALL = BevGrid(x_min_m=-3.2, y_min_m=-9.6, cell_m=0.8, nx=8, ny=16)
FULL = {"bev_stage0": 64, "bev_stage1": 128, "bev_stage2": 256, "bev_neck": 384}


@pytest.mark.parametrize("config", [centerpoint_pillar_config(), pillar_r34_config()], ids=lambda c: c.name)
def test_teachers_deliver_the_public_names_and_shapes(config):
    model = LidarDetector(config.with_values(grid=SMALL))
    ny, nx = SMALL.shape
    grids = {"bev_stage0": (2 * ny, 2 * nx), "bev_stage1": (ny, nx), "bev_stage2": (ny // 2, nx // 2), "bev_neck": (ny, nx)}
    assert model.feature_shapes == {k: (c, *grids[k]) for k, c in FULL.items()}
    out = model(make_batch(SMALL, boxes=4))
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    assert LidarDetector(config).feature_shapes["bev_stage0"] == (64, 256, 256)


def test_two_stage_neck_has_512_channels_and_hides_its_stem():
    config = centerpoint_pillar_config(grid=SMALL, neck_stages=2, neck_channels=256)
    shapes = LidarDetector(config).feature_shapes
    assert shapes["bev_neck"][0] == 512 and "bev_stage0" not in shapes
    with pytest.raises(RecipeError):
        centerpoint_pillar_config(neck_stages=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"pillars_per_cell": 1},
        {"pillars_per_cell": 3},
        {"pillars_per_cell": 0},
        {"pillars_per_cell": -2},
        {"encoder": "resnet34", "pillars_per_cell": 4},
        {"encoder": "resnet34"},
        {"encoder": "voxel", "pillars_per_cell": 4},
    ],
)
def test_pillars_that_do_not_come_back_to_the_head_grid_are_refused(changes):
    with pytest.raises(RecipeError, match="pillars_per_cell") as caught:
        small_lidar(**changes)
    assert caught.value.details["found"] == str(changes.get("pillars_per_cell", 2))


@pytest.mark.parametrize(
    "changes", [{"pillars_per_cell": k} for k in (2, 4, 8)] + [{"encoder": "resnet34", "pillars_per_cell": 8}]
)
def test_pillars_that_fit_give_the_stated_shapes(changes):
    model, batch = LidarDetector(small_lidar(neck_stages=3, **changes)), make_batch()
    out = model(batch)
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    assert all(t.isfinite() for t in model.loss(out, batch).values())


def test_gradient_checkpointing_changes_nothing():
    gradients, statistics = [], []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        config = pillar_r34_config(grid=SMALL, widths=(8, 8, 8), pillar_channels=8, checkpoint_stages=checkpointed)
        model, batch = LidarDetector(config), make_batch(SMALL, boxes=4)
        sum(model.loss(model(batch), batch).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        statistics.append(dict(model.named_buffers()))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*statistics)  # the second forward pass must not enter the running means a second time
    assert all(int(v) == 1 for n, v in statistics[0].items() if n.endswith("num_batches_tracked"))


def test_pillars_equal_a_slow_loop():
    torch.manual_seed(0)
    config = small_lidar(intensity_scale=255.0, near_removed_m=1.0, scaled_inputs=False)
    grid = finer(ODD_GRID, 2)
    encoder, batch = PillarEncoder(config, grid).eval(), with_near(make_batch(ground=200))
    features, cell = encoder._features(batch.lidar, 2 * grid.ny * grid.nx)
    expected, members = [], {}
    points = batch.lidar
    for xyz, row, age, b in zip(points.xyz_m, points.features_NF, points.age_s, points.batch_index, strict=True):
        r, c, inside = grid.cells(xyz[None, :2].numpy())
        if not inside[0] or not -5 <= xyz[2] < 3 or row[2] < 1:
            continue
        key = (int(b) * grid.ny + int(r[0])) * grid.nx + int(c[0])
        centre = torch.tensor([grid.x_min_m + (c[0] + 0.5) * 0.4, grid.y_min_m + (r[0] + 0.5) * 0.4])
        members.setdefault(key, []).append(xyz)
        expected.append((key, torch.cat([xyz, row[:1] * 255, age[None]]), xyz, xyz[:2] - centre))
    assert cell.tolist() == [e[0] for e in expected]
    for got, (key, values, xyz, to_centre) in zip(features, expected, strict=True):
        mean = torch.stack(members[key]).mean(0)
        torch.testing.assert_close(got, torch.cat([values, xyz - mean, to_centre]).float(), atol=1e-4, rtol=1e-4)
    canvas = encoder(batch.lidar, 2)
    key = max(members, key=lambda k: len(members[k]))
    rows = torch.relu(encoder.norm(encoder.linear(features[cell == key]))).amax(0)
    b, r, c = key // (grid.ny * grid.nx), key // grid.nx % grid.ny, key % grid.nx
    torch.testing.assert_close(canvas[b, :, r, c], rows)
    assert (canvas.amax(1) > 0).sum() <= len(members)


def test_scaled_inputs_are_of_order_one_and_say_the_same():
    grid, batch = finer(ODD_GRID, 2), make_batch(ground=200)
    num = 2 * grid.ny * grid.nx
    plain, cell = PillarEncoder(small_lidar(scaled_inputs=False), grid)._features(batch.lidar, num)
    scaled, same = PillarEncoder(small_lidar(scaled_inputs=True), grid)._features(batch.lidar, num)
    ratio = torch.tensor([1 / 12.8, 1 / 12.8, 0.5, 1, 1, 5, 5, 1, 5, 5])
    assert torch.equal(cell, same) and scaled.abs().max() < 3
    torch.testing.assert_close(scaled, plain * ratio)


def test_capped_pillars_take_the_first_points_and_their_padding():
    torch.manual_seed(0)
    config = small_lidar(points_per_pillar=3)
    grid = finer(ODD_GRID, 2)
    encoder, batch = PillarEncoder(config, grid).eval(), make_batch(ground=100)
    torch.nn.init.normal_(encoder.norm.bias)
    features, cell = encoder._features(batch.lidar, 2 * grid.ny * grid.nx)
    canvas = encoder(batch.lidar, 2).permute(0, 2, 3, 1).flatten(0, 2)
    empty = torch.relu(encoder.norm(torch.zeros(1, 16)))[0]
    for key in cell.unique().tolist():
        rows = torch.relu(encoder.norm(encoder.linear(features[cell == key][:3])))
        rows = torch.cat([rows, empty[None]]) if len(rows) < 3 else rows
        torch.testing.assert_close(canvas[key], rows.amax(0))


@pytest.mark.parametrize("training", [False, True])
def test_points_beyond_a_pillars_cap_leave_no_trace(training):
    """The mean point is that of the kept points too: 40 points in one pillar give what the first 20 alone give."""
    torch.manual_seed(0)
    encoder = PillarEncoder(small_lidar(points_per_pillar=20, scaled_inputs=False), finer(ODD_GRID, 2)).train(training)
    lidar = make_batch(batch=1, ground=40, boxes=0).lidar
    places = torch.rand(40, 3) * torch.tensor([0.39, 0.39, 2.0])
    lidar = dataclasses.replace(lidar, xyz_m=places)
    first = keep(lidar, torch.arange(40) < 20)
    num = encoder.grid.ny * encoder.grid.nx
    assert torch.equal(encoder._features(lidar, num)[0], encoder._features(first, num)[0])
    assert torch.equal(encoder(lidar, 1), encoder(first, 1)) and encoder(first, 1).any()


def test_near_points_of_past_sweeps_are_told_by_their_own_sensor():
    """At 10 m/s a return of the car's own roof 0.45 s ago lies 4.5 m behind the sensor by now, and the road that was 5 m ahead
    lies where the sensor is: mmdetection3d drops the first and keeps the second."""
    config = centerpoint_pillar_config(convention="mmdet3d_lwh", near_removed_m=1.0)
    lidar = keep(with_near(make_batch()).lidar, torch.arange(len(make_batch().lidar.age_s)) < 3)
    x = config.mount_m[0]
    places = torch.tensor([[x + 0.3 - 4.5, 0.0, 1.7], [x + 0.5, 0.2, 0.1], [x + 0.5, 0.2, 0.1]])
    own = torch.tensor([0.3, 5.0, torch.inf])  # the last one is of the key scan, of which nothing is removed
    features = torch.cat([lidar.features_NF[:, :2], own[:, None]], dim=1)
    lidar = dataclasses.replace(lidar, xyz_m=places, features_NF=features, age_s=torch.tensor([0.45, 0.45, 0.0]))
    assert near_sensor(points_to_network(lidar, config.mount_m[2]), config).tolist() == [True, False, False]
    assert near_sensor(without_near(lidar, config), config).tolist() == [False, False]
    plain = dataclasses.replace(lidar, features_NF=features[:, :2], feature_names=("intensity", "ring"))
    with pytest.raises(MissingFeatureError, match="near_m"):
        near_sensor(plain, config)
    free = config.with_values(near_removed_m=0.0)
    assert not near_sensor(plain, free).any()  # and no column is asked for
    assert len(near_sensor(keep(plain, torch.zeros(3, dtype=torch.bool)), config)) == 0  # of no points none is near
    assert lidar_features(config) == ("intensity", "ring", "near_m") and lidar_features(free) == ("intensity", "ring")
    assert lidar_features(small_fusion(lidar=small_lidar(near_removed_m=1.0)))[2:] == ("near_m",)
    assert lidar_features(small_fusion()) == lidar_features(small_student()) == ("intensity", "ring")


def test_a_fusion_teachers_depth_image_has_no_near_points_either():
    """BEVFusion's loader removes them before anything reads the cloud."""
    camera = {"view": "frustum", "depth_net": "lidar_points", "stride_px": 8, "fuser": "gated", "depth_weight": 0.0}
    student = small_student(radar=False, radar_encoder="bev", **camera)
    torch.manual_seed(0)
    model = FusionDetector(small_fusion(lidar=small_lidar(near_removed_m=1.0), student=student)).eval()
    batch = with_near(make_batch())
    kept = dataclasses.replace(batch, lidar=keep(batch.lidar, batch.lidar.column("near_m") >= 1))
    assert 0 < len(kept.lidar.age_s) < len(batch.lidar.age_s)
    with torch.no_grad():
        mine, theirs = model(batch), model(kept)
    assert torch.equal(mine.features["bev_lidar"], theirs.features["bev_lidar"])
    assert torch.equal(mine.depth_BVDHW, theirs.depth_BVDHW)


@pytest.mark.parametrize("training", [True, False])
def test_no_lidar_points_is_finite(training):
    model, batch = LidarDetector(small_lidar()).train(training), make_batch()
    nothing = dataclasses.replace(batch, lidar=keep(batch.lidar, torch.zeros(len(batch.lidar.age_s), dtype=torch.bool)))
    terms = model.loss(model(nothing), nothing)
    sum(terms.values()).backward()
    assert all(t.isfinite() for t in terms.values())


def test_voxel_teacher_says_what_to_install_where_spconv_is_absent():
    import importlib.util

    from imkd_models.presets import voxel_config

    if importlib.util.find_spec("spconv") is not None:
        pytest.skip(reason="spconv is installed, so the message for its absence cannot be met")
    with pytest.raises(UsageError, match="spconv"):
        LidarDetector(voxel_config(grid=SMALL))


def test_a_neck_over_three_stages_is_refused_for_voxels():
    """Before spconv is asked for."""
    with pytest.raises(RecipeError, match="neck_stages of encoder voxel"):
        LidarDetector(small_lidar(encoder="voxel", pillars_per_cell=8, neck_stages=3))


def test_missing_lidar_is_named():
    with pytest.raises(MissingFeatureError, match="without lidar"):
        LidarDetector(small_lidar())(make_batch(lidar=None))


def test_one_sample_does_not_depend_on_its_neighbour():
    model, both = LidarDetector(small_lidar()).eval(), make_batch(batch=2)
    first = make_batch(batch=2, lidar=keep(both.lidar, both.lidar.batch_index == 0))
    with torch.no_grad():
        a, b = model(both).features["bev_neck"][0], model(first).features["bev_neck"][0]
    assert torch.equal(a, b)


def turned(batch, yaw: float):
    """LiDAR and boxes rotated about the grid's centre; the grid of this test is square and holds everything."""
    c, s = math.cos(yaw), math.sin(yaw)
    matrix = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    middle = torch.tensor([batch.grid.x_min_m + batch.grid.x_max_m, batch.grid.y_min_m + batch.grid.y_max_m, 0]) / 2

    def move(xyz):
        return (xyz - middle) @ matrix.T + middle

    boxes = dataclasses.replace(
        batch.boxes,
        centre_m_BM3=move(batch.boxes.centre_m_BM3),
        yaw_rad_BM=batch.boxes.yaw_rad_BM + yaw,
        velocity_mps_BM2=batch.boxes.velocity_mps_BM2 @ matrix[:2, :2].T,
    )
    return dataclasses.replace(batch, lidar=dataclasses.replace(batch.lidar, xyz_m=move(batch.lidar.xyz_m)), boxes=boxes)


def test_a_rotated_world_gives_the_rotated_heatmap():
    grid = BevGrid(x_min_m=4.0, y_min_m=-11.2, cell_m=0.8, nx=24, ny=24)
    torch.manual_seed(0)
    model = LidarDetector(small_lidar(grid=grid))
    batch = make_batch(grid, batch=1, boxes=6, ground=150, images_BTVCHW=None)
    boxes = batch.boxes
    middle = torch.tensor([13.6, -1.6])
    boxes = dataclasses.replace(
        boxes,
        centre_m_BM3=torch.cat([middle + 0.65 * (boxes.centre_m_BM3[..., :2] - middle), boxes.centre_m_BM3[..., 2:]], -1),
        label_BM=torch.zeros_like(boxes.label_BM),
    )
    # Bright points only at the boxes: the network must find them by intensity wherever they are turned.
    xyz = boxes.centre_m_BM3[0, :6].repeat_interleave(20, 0) + 0.3 * torch.randn(120, 3)
    lidar = dataclasses.replace(
        keep(batch.lidar, torch.arange(len(batch.lidar.age_s)) < 120), xyz_m=xyz, batch_index=torch.zeros(120).long()
    )
    batch = dataclasses.replace(batch, boxes=boxes, lidar=lidar)
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=120)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        view = turned(batch, float(torch.rand(1, generator=generator)) * 6.283)
        optimiser.zero_grad()
        sum(model.loss(model(view), view).values()).backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        for yaw in (0.0, 0.5, math.pi / 2, 3.3):
            view = turned(batch, yaw)
            found = decode(model(view).head, grid, DecodeOptions(nms="none", peaks_only=True, score_min=0.25))[0]
            truth = view.boxes.centre_m_BM3[0, :6, :2]
            distance = torch.cdist(truth, found.centre_m[:, :2])
            assert (distance.amin(1) < 0.8).float().mean() >= 5 / 6, f"yaw {yaw}: {distance.amin(1)}"
        # The maps themselves: a quarter turn moves cells onto cells, row = old column, column = n - 1 - old row.
        first, quarter = (
            torch.sigmoid(model(turned(batch, yaw)).head[0].heatmap_logits_BKYX[0, 0]) for yaw in (0, math.pi / 2)
        )
        expected = torch.rot90(first, -1)
        likeness = torch.corrcoef(torch.stack([quarter.flatten(), expected.flatten()]))[0, 1]
        wrong = torch.corrcoef(torch.stack([quarter.flatten(), first.flatten()]))[0, 1]
        assert likeness > 0.9 > wrong + 0.5


def test_label_maps_equal_a_slow_loop():
    boxes = make_boxes(torch.Generator().manual_seed(4), ODD_GRID, 2, 40)
    box_map, one_hot = label_maps(boxes, ODD_GRID, 10)
    centres = ODD_GRID.centres()
    for b in range(2):
        for row in range(ODD_GRID.ny):
            for column in range(0, ODD_GRID.nx, 3):
                best, area = None, math.inf
                for m in range(42):
                    if not boxes.valid_BM[b, m]:
                        continue
                    centre, size = boxes.centre_m_BM3[b, m].numpy(), boxes.size_lwh_m_BM3[b, m].numpy()
                    d, yaw = centres[row, column] - centre[:2], float(boxes.yaw_rad_BM[b, m])
                    along = math.cos(yaw) * d[0] + math.sin(yaw) * d[1]
                    across = math.cos(yaw) * d[1] - math.sin(yaw) * d[0]
                    r, c, inside = ODD_GRID.cells(centre[None, :2])
                    hit = abs(along) <= size[0] / 4 and abs(across) <= size[1] / 4
                    hit = hit or (inside[0] and (r[0], c[0]) == (row, column))
                    if hit and size[0] * size[1] < area:
                        best, area = m, size[0] * size[1]
                if best is None:
                    assert box_map[b, :, row, column].abs().sum() == 0 and one_hot[b, :, row, column].sum() == 0
                else:
                    assert int(one_hot[b, :, row, column].argmax()) == int(boxes.label_BM[b, best])
                    np.testing.assert_allclose(box_map[b, :3, row, column], boxes.centre_m_BM3[b, best], rtol=1e-6)
                    velocity = torch.nan_to_num(boxes.velocity_mps_BM2[b, best])
                    np.testing.assert_allclose(box_map[b, 7:, row, column], velocity, rtol=1e-6)


def test_label_map_of_no_boxes_and_of_a_cone_between_cells():
    empty = make_boxes(torch.Generator(), ODD_GRID, 2, 0, padding=0)
    assert label_maps(empty, ODD_GRID, 10)[0].shape == (2, 9, 24, 32)
    cone = BoxBatch(
        centre_m_BM3=torch.tensor([[[0.79, -0.01, 0.5]]]),
        size_lwh_m_BM3=torch.tensor([[[0.3, 0.3, 1.0]]]),
        yaw_rad_BM=torch.zeros(1, 1),
        velocity_mps_BM2=torch.full((1, 1, 2), torch.nan),
        label_BM=torch.tensor([[9]]),
        valid_BM=torch.tensor([[True]]),
    )
    hit = label_maps(cone, ODD_GRID, 10)[1][0, 9].nonzero().tolist()
    row, column, _ = ODD_GRID.cells([[0.79, -0.01]])
    assert hit == [[int(row[0]), int(column[0])]]


@pytest.mark.parametrize("stages", [2, 3])
def test_label_encoder_fits_its_teacher_and_leaves_it_alone(stages):
    torch.manual_seed(0)
    teacher, batch = LidarDetector(small_lidar(neck_stages=stages)), make_batch()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    encoder = LabelEncoder(label_config_for(teacher, hidden=16), teacher)
    encoder.train()
    assert not teacher.training and not any("teacher" in key for key in encoder.state_dict())
    out = encoder(batch)
    stage_names = {k for k in teacher.feature_shapes if k.startswith("bev_stage")}
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items() if k in stage_names} == encoder.feature_shapes
    assert set(out.features) == stage_names | {"bev_neck"} and len(stage_names) == stages
    terms = encoder.loss(out, batch)
    sum(terms.values()).backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_label_encoder_without_teacher_gives_stages_only_and_refuses_another_one():
    teacher = LidarDetector(small_lidar())
    encoder = LabelEncoder(label_config_for(teacher, hidden=16))
    out = encoder(make_batch())
    assert out.head == () and set(out.features) == {"bev_stage1", "bev_stage2"}
    with pytest.raises(MissingFeatureError, match="teacher"):
        encoder.loss(out, make_batch())
    with pytest.raises(MissingFeatureError, match="boxes"):
        encoder(dataclasses.replace(make_batch(), boxes=None))
    with pytest.raises(MismatchError, match="fit"):
        encoder.attach(LidarDetector(small_lidar(neck_stages=3)))


def test_label_encoder_of_some_classes_leaves_the_others_out():
    """A class map's channels are the groups' classes in the order of their labels; for all ten that is the label itself."""
    torch.manual_seed(0)
    some = (("pedestrian",), ("car", "trailer"))
    teacher = LidarDetector(small_lidar(groups=some))
    encoder = LabelEncoder(label_config_for(teacher, hidden=16), teacher).eval()
    batch = make_batch()  # boxes of all ten classes
    channels = encoder.channels(batch.boxes).label_BM
    assert set(zip(batch.boxes.label_BM.flatten().tolist(), channels.flatten().tolist(), strict=True)) == {
        (label, {0: 0, 4: 1, 8: 2}.get(label, -1)) for label in range(10)
    }
    with torch.no_grad():
        out = encoder(batch)
        known = torch.isin(batch.boxes.label_BM, torch.tensor([0, 4, 8]))
        alone = encoder(
            dataclasses.replace(batch, boxes=dataclasses.replace(batch.boxes, valid_BM=batch.boxes.valid_BM & known))
        )
    assert all(torch.equal(value, alone.features[name]) for name, value in out.features.items())
    assert all(t.isfinite() for t in encoder.loss(out, batch).values())


@pytest.mark.parametrize("turned_groups", [False, True])
def test_label_encoder_of_all_classes_keeps_its_channels(turned_groups):
    """Trained encoders know a class by its label, in whatever order the groups stand."""
    groups = tuple(reversed(CLASS_GROUPS)) if turned_groups else CLASS_GROUPS
    encoder = LabelEncoder(label_config_for(LidarDetector(small_lidar(groups=groups)), hidden=16))
    boxes = make_boxes(torch.Generator().manual_seed(1), ODD_GRID, 2, 20)
    boxes.label_BM[:, 3] = -1  # ignored
    assert torch.equal(encoder.channels(boxes).label_BM, boxes.label_BM)
