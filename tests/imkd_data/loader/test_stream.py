"""The stream: one frame for everything, exact resume, the same order for any number of ranks and workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from memory_cache import GRID, MemoryCache, rows_of

from imkd_data.errors import CacheDamageError, MismatchError, MissingFeatureError, UsageError
from imkd_data.geometry import BevGrid
from imkd_data.loader.augment import IDENTITY, AugmentConfig, draw_bev
from imkd_data.loader.batch import Batch
from imkd_data.loader.rows import read_rows
from imkd_data.loader.stream import held_out_rows, stream


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> MemoryCache:
    return MemoryCache(tmp_path_factory.mktemp("toy"))


def equal(a: Batch, b: Batch) -> bool:
    from pipelines.guard import batch_tensors

    x, y = batch_tensors(a), batch_tensors(b)
    same = a.tokens == b.tokens and set(x) == set(y)
    return same and all(torch.equal(torch.nan_to_num(x[k]), torch.nan_to_num(y[k])) for k in x)


def tokens(batches: list[Batch]) -> list[str]:
    return [t for b in batches for t in b.tokens]


# ---------------------------------------------------------------------------------------------------------------- order


def test_one_epoch_sees_each_train_row_once(cache: MemoryCache) -> None:
    s = stream(cache, 2, fields=("boxes",))
    first, second = tokens(list(s)), tokens(list(s))
    wanted = sorted(cache.token(r) for r in rows_of(cache, "train"))
    assert sorted(first) == sorted(second) == wanted and first != second
    assert len(s) == 5 and (s.epoch, s.consumed) == (2, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_in_mid_epoch_continues_exactly(tmp_path: Path, workers: int, cache: MemoryCache) -> None:
    if workers:
        pytest.importorskip("pipelines.build")
    whole = list(stream(cache, 2, augment=True, seed=3))
    s = stream(cache, 2, augment=True, seed=3)
    it = iter(s)
    seen = [next(it) for _ in range(3)]
    state = s.state_dict()
    again = stream(cache, 2, augment=True, seed=3)
    again.load_state_dict(state)
    rest = list(again)
    assert tokens(seen) + tokens(rest) == tokens(whole)
    assert all(equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_samples(cache: MemoryCache, world: int) -> None:
    whole = list(stream(cache, 6, augment=True, seed=1, split="all"))
    parts = [list(stream(cache, 6 // world, augment=True, seed=1, split="all", rank=r, world=world)) for r in range(world)]
    for step, batch in enumerate(whole):
        assert tokens([p[step] for p in parts]) == list(batch.tokens)
        here = torch.cat([p[step].bev_from_ego_B44 for p in parts])
        assert torch.equal(here, batch.bev_from_ego_B44)  # the draw belongs to the position, not to the rank
        images = torch.cat([p[step].images_BTVCHW for p in parts])
        assert torch.equal(images, batch.images_BTVCHW)


def test_elastic_resume_from_one_rank_to_two(cache: MemoryCache) -> None:
    one = stream(cache, 4, split="all", fields=("boxes",))
    batches = list(one)
    s = stream(cache, 4, split="all", fields=("boxes",))
    it = iter(s)
    next(it), next(it)
    state = s.state_dict()
    parts = []
    for rank in range(2):
        part = stream(cache, 2, split="all", fields=("boxes",), rank=rank, world=2)
        part.load_state_dict(state)
        parts.append(list(part))
    mixed = [t for step in range(len(parts[0])) for p in parts for t in p[step].tokens]
    assert mixed == tokens(batches[2:])


def test_forever_ends_epochs_at_whole_steps(cache: MemoryCache) -> None:
    s = stream(cache, 2, fields=("boxes",), drop_last=False)
    it = s.forever(8)  # ten rows, two per batch, epochs of eight samples
    seen, states = [], []
    for _ in range(9):
        seen.append(next(it).tokens)
        states.append((s.epoch, s.consumed))
    assert states[3:6] == [(0, 8), (1, 2), (1, 4)]
    again = stream(cache, 2, fields=("boxes",), drop_last=False)
    again.load_state_dict({**s.state_dict(), "epoch": 0, "consumed": 8})
    more = again.forever(8)
    assert [next(more).tokens for _ in range(5)] == seen[4:]


def test_state_of_another_selection_is_refused(cache: MemoryCache) -> None:
    state = stream(cache, 2, fields=("boxes",)).state_dict()
    with pytest.raises(MismatchError, match="selection"):
        stream(cache, 2, fields=("boxes",), split="val").load_state_dict(state)
    with pytest.raises(MismatchError, match="seed"):
        stream(cache, 2, fields=("boxes",), seed=9).load_state_dict(state)
    with pytest.raises(MismatchError, match="fields"):
        stream(cache, 2, fields=("boxes", "radar_points")).load_state_dict(state)


def test_evaluation_pads_and_marks(cache: MemoryCache) -> None:
    s = stream(cache, 4, split="val", shuffle="none", drop_last=False, fields=("boxes",))
    batches = list(s)
    assert len(s) == 3 and tokens(batches)[:10] == [cache.token(r) for r in sorted(rows_of(cache, "val"))]
    assert batches[0].padding_B is None
    assert batches[2].padding_B.tolist() == [False, False, True, True]


def test_training_rows_only_by_default_and_leaks_are_found(cache: MemoryCache) -> None:
    rows = stream(cache, 1, fields=("boxes",)).order.rows
    assert sorted(rows) == sorted(rows_of(cache, "train")) and held_out_rows(cache, rows) == []
    assert held_out_rows(cache, rows_of(cache, "val")) == sorted(rows_of(cache, "val"))
    leaky = MemoryCache.__new__(MemoryCache)
    leaky.__dict__.update(cache.__dict__)
    column = ["val", *cache.index["split"].to_pylist()[1:]]
    leaky.index = cache.index.set_column(cache.index.column_names.index("split"), "split", [column])
    with pytest.raises(MismatchError, match="two splits"):
        stream(leaky, 1, fields=("boxes",))  # type: ignore[arg-type]


def test_usage_errors(cache: MemoryCache) -> None:
    for arguments in (
        {"split": "testing"},
        {"history": (-2, 0)},
        {"radar_filter": "best"},
        {"batch_size": 11},
        {"intensity_from": "guess"},
        {"rank": 2, "world": 2},
    ):
        with pytest.raises(UsageError):
            stream(cache, arguments.pop("batch_size", 1), **{"fields": ("boxes",), **arguments})


def test_lists_of_splits_are_taken_whole(cache: MemoryCache) -> None:
    def rows(split: str) -> list[int]:
        return sorted(int(r) for r in stream(cache, 1, split=split, fields=("boxes",)).order.rows)

    both = sorted([*rows("train"), *rows("val")])
    assert rows("all") == rows("train,val") == rows("val, train") == rows("train,all") == both
    for split in ("train,typo", "typo", "mini_train,val", "train,", "", "trainval", "train;val"):
        with pytest.raises(UsageError, match="no rows of split") as caught:
            rows(split)
        assert caught.value.details["expected"] == "train, val" and caught.value.details["found"] == split
        assert "'train'" not in caught.value.what and "'val'" not in caught.value.what


def test_names_of_a_list_stand_for_what_they_do_alone(cache: MemoryCache) -> None:
    mini = MemoryCache.__new__(MemoryCache)
    mini.__dict__.update(cache.__dict__)
    column = [f"mini_{name}" for name in cache.index["split"].to_pylist()]
    mini.index = cache.index.set_column(cache.index.column_names.index("split"), "split", [column])
    for split in ("train,val", "mini_train,mini_val", "mini_train,val"):
        assert sorted(stream(mini, 1, split=split, fields=("boxes",)).order.rows) == sorted(cache.samples)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'test'"):
        stream(mini, 1, split="train,test", fields=("boxes",))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- missing fields


def test_a_missing_field_names_the_command_that_adds_it(tmp_path: Path) -> None:
    poor = MemoryCache(tmp_path, without=("lidar_bev_sum", "radar_points"), scenes=1)
    with pytest.raises(MissingFeatureError, match="radar_points") as error:
        stream(poor, 1, fields=("radar_points",))
    assert "imkd-data build" in str(error.value) and "--fields radar_points --update" in str(error.value)
    assert error.value.code == 9
    with pytest.raises(MissingFeatureError, match="fine planes"):
        stream(poor, 1, fields=("lidar_intensity",), augment=True)
    stream(poor, 1, fields=("lidar_intensity",))  # without augmentation the view is enough
    stream(poor, 1, fields=("lidar_intensity",), augment=True, intensity_from="view")
    with pytest.raises(MissingFeatureError, match="bev_stage9"):
        stream(poor, 1, fields=("teacher_00_bev_stage9",))
    assert "radar_points" not in stream(poor, 1).request.parts


def test_images_that_stayed_outside_are_no_part_that_the_cache_holds(tmp_path: Path) -> None:
    references = MemoryCache(tmp_path, scenes=1, images_mode="reference")
    first = next(iter(stream(references, 1)))
    assert first.images_BTVCHW is None and first.boxes is not None and first.radar is not None
    with pytest.raises(MissingFeatureError, match="refers to image files"):
        stream(references, 1, fields=("images",))


# ------------------------------------------------------------------------------------------------------------- geometry


def test_history_is_row_arithmetic_inside_the_clip(cache: MemoryCache) -> None:
    table = read_rows(cache)
    for scene_start in (0, 7):
        rows, genuine = table.history(scene_start + 3, (0, -2, -4))
        assert rows.tolist() == [scene_start + 3, scene_start + 1, scene_start]
        assert genuine.tolist() == [True, True, False]
    rows, genuine = table.history(7, (0, -1))
    assert rows.tolist() == [7, 7] and genuine.tolist() == [True, False]


def test_past_keyframes_see_the_same_world_point(cache: MemoryCache) -> None:
    """A fixed point of the world, seen by a past camera, lands on the same bev place through that camera's matrices."""
    batch = next(iter(stream(cache, 1, rows=[9], shuffle="none", history=(0, -1, -2), fields=("images",), augment=True)))
    point_global = np.array([30.0, 4.0, 1.0, 1.0])
    expected = None
    for t, row in enumerate((9, 8, 7)):
        ego = np.linalg.inv(cache.samples[row].global_from_ego.matrix()) @ point_global
        for v, frame in enumerate(cache.samples[row].cameras):
            camera = frame.camera.ego_from_camera.inverse().points(ego[:3])
            bev = batch.bev_from_camera_BTV44[0, t, v].double().numpy() @ np.append(camera, 1)
            expected = bev if expected is None else expected
            assert np.allclose(bev, expected, atol=2e-4)
    now = np.linalg.inv(cache.samples[9].global_from_ego.matrix()) @ point_global
    assert np.allclose(expected, batch.bev_from_ego_B44[0].double().numpy() @ now, atol=2e-4)


def test_radar_history_and_velocity_frames(cache: MemoryCache) -> None:
    request = {"rows": [9], "shuffle": "none", "fields": ("radar_points",), "radar_filter": "none"}
    plain = next(iter(stream(cache, 1, history=(0, -1), **request))).radar
    moved_batch = next(iter(stream(cache, 1, history=(0, -1), augment=True, **request)))
    moved, m = moved_batch.radar, moved_batch.bev_from_ego_B44[0]
    assert set(plain.time_index.tolist()) == {0, 1} and (plain.age_s >= 0).all()
    assert torch.allclose(moved.xyz_m, plain.xyz_m @ m[:3, :3].T, atol=1e-4)
    assert torch.allclose(moved.velocity_mps, plain.velocity_mps @ m[:2, :2].T, atol=1e-5)
    past = cache.decode("radar_points", 8)
    ego_from_past = cache.samples[9].global_from_ego.inverse() @ cache.samples[8].global_from_ego.renamed(src="past")
    expected = ego_from_past.points(past["xyz_m"])
    assert np.allclose(plain.xyz_m[plain.time_index == 1].numpy(), expected, atol=1e-4)
    velocity = np.stack([past["vx_comp"], past["vy_comp"], 0 * past["vx_comp"]], axis=1)
    expected_v = ego_from_past.vectors(velocity)[:, :2]
    assert np.allclose(plain.velocity_mps[plain.time_index == 1].numpy(), expected_v, atol=1e-5)


def test_a_keyframe_repeated_at_the_clip_start_repeats_images_and_radar(cache: MemoryCache) -> None:
    """As in CRN: a slot before the clip is the oldest keyframe once more, not a picture without radar."""

    class Seen(MemoryCache):
        """The toy's first scans are empty; here they hold those of the next keyframe."""

        def decode(self, name: str, row: int) -> object:
            return super().decode(name, row + 1 if name == "radar_points" and row == 7 else row)

    other = Seen.__new__(Seen)
    other.__dict__.update(cache.__dict__)
    request = {"shuffle": "none", "fields": ("images", "radar_points"), "radar_filter": "none", "history": (0, -1, -2)}
    for row, same in ((7, (0, 1, 2)), (8, (1, 2))):
        batch = next(iter(stream(other, 1, rows=[row], **request)))  # type: ignore[arg-type]
        assert batch.history_valid_BT[0].tolist() == [t not in same[1:] for t in (0, 1, 2)]
        slots = [batch.radar.time_index == t for t in same]
        assert int(slots[0].sum()) == len(other.decode("radar_points", 7)["x"]) > 0  # type: ignore[index]
        for slot in slots[1:]:
            for name in ("xyz_m", "features_NF", "age_s", "velocity_mps"):
                assert torch.equal(getattr(batch.radar, name)[slot], getattr(batch.radar, name)[slots[0]])
        assert torch.equal(batch.images_BTVCHW[0, same[0]], batch.images_BTVCHW[0, same[-1]])


def test_radar_filters_and_sweeps(cache: MemoryCache) -> None:
    class WithStates(MemoryCache):
        def decode(self, name: str, row: int) -> object:
            value = super().decode(name, row)
            if name == "radar_points":
                n = len(value["x"])
                value["invalid_state"] = (np.arange(n) % 3 * 4).astype(np.float32)
                value["ambig_state"] = np.where(np.arange(n) % 4 == 3, 0, 3).astype(np.float32)
            return value

    other = WithStates.__new__(WithStates)
    other.__dict__.update(cache.__dict__)
    row = max(cache.samples, key=lambda r: len(cache.decode("radar_points", r)["x"]))
    n = np.arange(len(cache.decode("radar_points", row)["x"]))
    kept = {
        "none": n >= 0,
        "devkit": (n % 3 == 0) & (n % 4 != 3),
        "crn": (n % 3 != 2) * (n % 4 != 3) | (n % 3 == 2) & (n % 4 != 3),
    }
    for name, mask in kept.items():
        s = stream(other, 1, rows=[row], shuffle="none", fields=("radar_points",), radar_filter=name)  # type: ignore[arg-type]
        assert len(next(iter(s)).radar.xyz_m) == mask.sum(), name
    newest = stream(cache, 1, rows=[row], shuffle="none", fields=("radar_points",), radar_sweeps=1, radar_features=("sweep",))
    batch = next(iter(newest)).radar
    assert set(batch.column("sweep").tolist()) <= {0.0}
    with pytest.raises(MissingFeatureError, match="pdh0"):
        next(iter(stream(cache, 1, fields=("radar_points",), radar_features=("pdh0",))))


def test_lidar_boxes_and_intensity_move_together(cache: MemoryCache) -> None:
    """After any draw the LiDAR points of the batch, rasterised, equal the moved intensity count up to half a cell's slip."""
    for row in (0, 1, 8, 9):
        s = stream(cache, 1, rows=[row], shuffle="none", fields=("lidar_points", "boxes"), augment=True, seed=row)
        batch = next(iter(s))
        m = draw_bev(AugmentConfig(), seed=row, epoch=0, position=0).matrix()
        assert np.allclose(batch.bev_from_ego_B44[0].numpy(), m, atol=1e-6)
        points = cache.decode("lidar_points", row)["xyz_m"]
        assert np.allclose(batch.lidar.xyz_m.numpy(), points @ m[:3, :3].T, atol=1e-4)
        boxes = cache.decode("boxes", row)
        assert np.allclose(batch.boxes.centre_m_BM3[0].numpy(), boxes.centre_m @ m[:3, :3].T, atol=1e-5)
        assert (batch.lidar.column("intensity") <= 1).all() and batch.lidar.column("intensity").max() > 0.5


def test_near_m_is_measured_from_each_sweeps_own_sensor(cache: MemoryCache) -> None:
    """max(|x|, |y|) in the frame of the scan that saw the point, whatever the draw; the key scan's points are never near."""
    from imkd_data.geometry import EGO, Pose

    columns = ("intensity", "ring", "near_m")
    options = {"rows": [8], "shuffle": "none", "fields": ("lidar_points",)}
    points, expected = cache.decode("lidar_points", 8), []
    assert set(points["sweep"].tolist()) == {0, 1}
    for xyz, sweep in zip(points["xyz_m"], points["sweep"], strict=True):
        matrix = points["pose"][sweep, :12].reshape(3, 4)
        sensor = Pose(dst=EGO, src="lidar", rotation=matrix[:, :3], translation_m=matrix[:, 3])
        expected.append(np.abs(sensor.inverse().points(xyz[None])[0, :2]).max() if sweep else np.inf)
    assert (np.array(expected) < 2).any()
    for augment in (False, True):
        plain = next(iter(stream(cache, 1, augment=augment, **options))).lidar  # type: ignore[arg-type]
        batch = next(iter(stream(cache, 1, augment=augment, lidar_features=columns, **options))).lidar  # type: ignore[arg-type]
        assert batch.feature_names == columns and plain.feature_names == columns[:2]
        assert torch.equal(batch.features_NF[:, :2], plain.features_NF) and torch.equal(batch.xyz_m, plain.xyz_m)
        assert np.allclose(batch.column("near_m").numpy(), expected, atol=1e-5)
    newest = next(iter(stream(cache, 1, lidar_features=("near_m",), lidar_sweeps=1, **options))).lidar  # type: ignore[arg-type]
    assert np.allclose(newest.features_NF[:, 0].numpy(), np.array(expected)[points["sweep"] < 1], atol=1e-5)
    with pytest.raises(UsageError, match="speed"):
        stream(cache, 1, lidar_features=("intensity", "speed"))


def test_intensity_on_identity_is_the_stored_view(cache: MemoryCache) -> None:
    batch = next(iter(stream(cache, 1, rows=[8], shuffle="none", fields=("lidar_intensity",))))
    assert np.array_equal(batch.bev_maps["lidar_intensity"][0].numpy(), cache.decode("lidar_intensity", 8))


def test_intensity_from_planes_equals_the_view_up_to_rounding(cache: MemoryCache) -> None:
    still = AugmentConfig(rotation_deg=(0, 0), bev_scale=(1, 1), flip_x=0, flip_y=0)
    batch = next(iter(stream(cache, 1, rows=[8], shuffle="none", fields=("lidar_intensity",), augment=still)))
    found, view = batch.bev_maps["lidar_intensity"][0].numpy(), cache.decode("lidar_intensity", 8)
    assert np.abs(found[0] - view[0]).max() <= 0.5 / 255 + 1e-6 and found[2].max() >= 2
    assert np.array_equal(found[1], view[1]) and np.allclose(found[3], view[3], atol=1e-6)
    assert np.array_equal(found[2], np.minimum(found[2], 1e9)) and np.array_equal(np.minimum(found[2], 255), view[2])


@pytest.mark.parametrize(("flip_x", "flip_y"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_flips_move_the_planes_exactly(cache: MemoryCache, flip_x: float, flip_y: float) -> None:
    flips = AugmentConfig(rotation_deg=(0, 0), bev_scale=(1, 1), flip_x=flip_x, flip_y=flip_y)
    batch = next(iter(stream(cache, 1, rows=[9], shuffle="none", fields=("intensity_planes",), augment=flips)))
    stored = cache.read("lidar_bev_sum", 9).astype(np.float32)
    # the toy grid is symmetric in y and in x: -9.6..9.6, -6.4..6.4
    expected = stored[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    assert np.array_equal(batch.bev_maps["intensity_planes"][0, 0].numpy(), expected) and stored.sum() > 0


def test_rotation_and_scale_move_points_and_planes_alike(cache: MemoryCache) -> None:
    """Rasterising the moved points finds an occupied plane cell within one cell, for nearly all points inside."""
    turn = AugmentConfig(rotation_deg=(20, 21), bev_scale=(1.05, 1.06), flip_x=1.0, flip_y=0.0)
    hits = total = 0
    for row in (0, 1, 2, 7, 8, 9):
        s = stream(cache, 1, rows=[row], shuffle="none", fields=("intensity_planes", "lidar_points"), augment=turn)
        batch = next(iter(s))
        count = batch.bev_maps["intensity_planes"][0, 1].numpy()
        near = np.zeros_like(count)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near += np.roll(count, (dy, dx), (0, 1))
        ego = cache.decode("lidar_points", row)["xyz_m"]
        own = np.array(cache.recipe.own_car_box_m).reshape(3, 2)
        outside_car = ~((ego >= own[:, 0]) & (ego < own[:, 1])).all(axis=1)
        span = (ego[:, 2] >= cache.recipe.z_min_m) & (ego[:, 2] < cache.recipe.z_min_m + cache.recipe.z_span_m)
        r, c, inside = GRID.cells(batch.lidar.xyz_m.numpy()[:, :2])
        _, _, was_inside = GRID.cells(ego[:, :2])
        use = inside & was_inside & outside_car & span
        hits += int((near[r[use], c[use]] > 0).sum())
        total += int(use.sum())
    assert total > 100 and hits / total > 0.97


def test_height_is_scaled_like_every_z(cache: MemoryCache) -> None:
    bigger = AugmentConfig(rotation_deg=(0, 0), bev_scale=(1.1, 1.1), flip_x=0, flip_y=0)
    plain = next(iter(stream(cache, 1, rows=[8], shuffle="none", fields=("intensity_planes",))))
    moved = next(iter(stream(cache, 1, rows=[8], shuffle="none", fields=("intensity_planes",), augment=bigger)))
    a, b = plain.bev_maps["intensity_planes"][0, 3], moved.bev_maps["intensity_planes"][0, 3]
    assert torch.isclose(b.max(), 1.1 * a.max(), atol=1e-5) or b.max() < 1.1 * a.max()
    values = set(np.round((1.1 * a).flatten().tolist(), 4))
    assert set(np.round(b.flatten().tolist(), 4)) <= values and b.abs().max() > 0


def test_another_grid_is_cut_from_the_planes(cache: MemoryCache) -> None:
    """Off-centre, non-square, coarser: equal to pooling the stored planes by hand."""
    grid = BevGrid(x_min_m=-2.0, y_min_m=-5.2, cell_m=0.4, nx=25, ny=14)
    batch = next(iter(stream(cache, 1, rows=[9], shuffle="none", fields=("lidar_intensity",), grid=grid)))
    count = cache.read("lidar_bev_count", 9).astype(np.int64)
    x0, y0 = round((grid.x_min_m - GRID.x_min_m) / 0.2), round((grid.y_min_m - GRID.y_min_m) / 0.2)
    cut = count[y0 : y0 + 28, x0 : x0 + 50].reshape(14, 2, 25, 2).sum((1, 3))
    assert batch.bev_maps["lidar_intensity"].shape == (1, 4, 14, 25)
    assert np.array_equal(batch.bev_maps["lidar_intensity"][0, 2].numpy(), cut) and cut.sum() > 3


def test_depth_map_matches_a_slow_twin(cache: MemoryCache) -> None:
    for row, augment in ((8, IDENTITY), (9, AugmentConfig())):
        s = stream(cache, 1, rows=[row], shuffle="none", fields=("images", "depth"), augment=augment, image_hw_px=(30, 56))
        batch = next(iter(s))
        found = batch.image_maps["depth_BVHW"][0].numpy()
        expected = np.zeros_like(found)
        for v, points in enumerate(cache.decode("depth_points", row)):
            k = cache.samples[row].cameras[v].camera.image_from_camera
            moved = batch.image_from_camera_BTV33[0, 0, v].double().numpy() @ np.linalg.inv(k)
            for u0, v0, depth in points.astype(np.float64):
                u, w, _ = moved @ (u0, v0, 1.0)
                i, j = int(np.floor(w + 0.5)), int(np.floor(u + 0.5))
                if 0 <= i < 30 and 0 <= j < 56 and (expected[v, i, j] == 0 or depth < expected[v, i, j]):
                    expected[v, i, j] = depth
        assert np.allclose(found, expected) and (found > 0).sum() >= 2


def test_image_content_follows_the_matrix() -> None:
    """A bright block drawn at a known pixel is found where the draw's matrix says, for crops, flips and overhang."""
    import simplejpeg

    from imkd_data.loader.augment import ImageDraw
    from imkd_data.loader.read import decode_image

    full = np.zeros((90, 160, 3), dtype=np.uint8)
    full[50:58, 100:108] = 255
    jpeg = simplejpeg.encode_jpeg(full, quality=98)
    for draw in (
        ImageDraw(resized_w_px=80, resized_h_px=45, left_px=10, top_px=5, width_px=64, height_px=40),
        ImageDraw(resized_w_px=80, resized_h_px=45, left_px=10, top_px=5, width_px=64, height_px=40, flip=True),
        ImageDraw(resized_w_px=70, resized_h_px=40, left_px=-6, top_px=-4, width_px=90, height_px=50, flip=True),
        ImageDraw(resized_w_px=200, resized_h_px=112, left_px=70, top_px=40, width_px=96, height_px=64),
    ):
        out = decode_image(jpeg, draw).double().mean(0).numpy()
        weight = np.where(out > 40, out, 0)
        rows, columns = np.mgrid[: out.shape[0], : out.shape[1]]
        centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
        expected = draw.matrix((90, 160)) @ (103.5, 53.5, 1.0)
        assert np.abs(centre - expected[:2]).max() < 0.35, draw


def test_normalisation_is_imagenet_rgb(cache: MemoryCache) -> None:
    from imkd_data.loader.deliver import normalised

    image = torch.tensor([[[[255]], [[0]], [[0]]]], dtype=torch.uint8)
    assert torch.allclose(normalised(image)[0, :, 0, 0], torch.tensor([2.2489, -2.0357, -1.8044]), atol=1e-3)


def test_empty_radar_and_empty_boxes_are_valid(cache: MemoryCache) -> None:
    empty = [r for r, s in cache.samples.items() if not len(s.boxes)]
    batch = next(iter(stream(cache, 2, rows=empty[:2], shuffle="none", fields=("boxes", "radar_points"))))
    assert batch.boxes.valid_BM.shape == (2, 0) and not batch.boxes.valid_BM.any()
    none = [r for r in cache.samples if not len(cache.decode("radar_points", r)["x"])]
    if none:
        radar = next(iter(stream(cache, 1, rows=none[:1], shuffle="none", fields=("radar_points",)))).radar
        assert radar.xyz_m.shape == (0, 3) and radar.features_NF.shape == (0, 1)


def test_damage_reaches_the_caller_with_its_details(cache: MemoryCache) -> None:
    class Broken(MemoryCache):
        def read(self, name: str, row: int) -> object:
            if name == "boxes":
                raise CacheDamageError("stored bytes are damaged", token=self.token(row))
            return super().read(name, row)

    broken = Broken.__new__(Broken)
    broken.__dict__.update(cache.__dict__)
    with pytest.raises(CacheDamageError, match="damaged"):
        next(iter(stream(broken, 1, fields=("boxes",))))  # type: ignore[arg-type]
