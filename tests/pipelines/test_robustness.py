"""The robustness protocol: what each condition takes from the network, fixed draws, and honest gaps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from imkd_data import open_cache
from imkd_data.errors import UsageError
from pipelines.predict import predict_rows
from pipelines.robustness import CONDITIONS, robustness, robustness_text
from pipelines.robustness_conditions import (
    _lost,
    as_trained,
    late_history,
    newest_sweeps,
    weather_of,
    with_late_radar,
    without_cameras,
    without_history,
    without_radars,
)


def read_batch(line, history=(0, -1), features=("rcs_dbsm", "sensor", "sweep"), sweeps=0, rows=None):
    """Two keyframes of the val scene, its last ones unless said."""
    from imkd_data.loader.stream import stream

    cache = open_cache(line.cache)
    rows = cache.rows("mini_val")[1:3] if rows is None else rows
    options = {"radar_filter": "none", "radar_features": features, "radar_sweeps": sweeps, "image_hw_px": (32, 56)}
    return next(
        iter(stream(cache, 2, rows=rows, shuffle="none", fields=("images", "radar_points"), history=history, **options))
    )


@pytest.fixture(scope="module")
def batch(line):
    """Two keyframes of the val scene with one past slot each."""
    return read_batch(line)


def assert_same_radar(a, b) -> None:
    assert a.feature_names == b.feature_names and len(a.xyz_m) > 0
    for name in ("xyz_m", "features_NF", "batch_index", "time_index", "age_s", "velocity_mps"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_weather_is_read_from_the_description() -> None:
    assert weather_of("Night, big street, rain") == {"rain", "night"}
    assert weather_of("Parked cars, after rain, peds") == {"day, dry"}
    assert weather_of("Difficult lighting, wait at light") == {"day, dry"}


def test_lost_sensors_are_fixed_and_differ_between_draws() -> None:
    draws = [tuple(_lost(0, d, 3, 6, "camera")) for d in range(5)]
    assert draws == [tuple(_lost(0, d, 3, 6, "camera")) for d in range(5)]
    assert len(set(draws)) > 1 and all(len(set(d)) == 3 for d in draws)
    assert _lost(0, 0, 6, 6, "camera") == list(range(6))


def test_a_lost_camera_is_black_and_alone(batch) -> None:
    changed = without_cameras(batch, [1, 4])
    images = changed.images_BTVCHW
    assert (images[:, :, [1, 4]] == 0).all() and bool(
        (images[:, :, [0, 2, 3, 5]] == batch.images_BTVCHW[:, :, [0, 2, 3, 5]]).all()
    )
    assert bool((batch.images_BTVCHW[:, :, 1] != 0).any())  # the given batch is untouched


def test_a_lost_radar_gives_no_points(batch) -> None:
    sensor = batch.radar.column("sensor").round().long()
    assert set(sensor.tolist()) == {0, 1, 2, 3, 4}
    changed = as_trained(without_radars(batch, [0, 3]))
    assert len(changed.radar.xyz_m) == int(((sensor != 0) & (sensor != 3)).sum()) > 0
    assert changed.radar.feature_names == ("rcs_dbsm",) and changed.radar.features_NF.shape[1] == 1
    assert len(without_radars(batch, range(5)).radar.xyz_m) == 0


def test_one_reading_serves_every_radar_condition(line, batch) -> None:
    """Points taken away from a batch that was read once = points that were never read."""
    assert_same_radar(as_trained(batch).radar, read_batch(line, features=("rcs_dbsm",)).radar)
    for count in (3, 1):
        read = read_batch(line, features=("rcs_dbsm",), sweeps=count).radar
        assert_same_radar(as_trained(newest_sweeps(batch, count)).radar, read)
    assert len(newest_sweeps(batch, 1).radar.xyz_m) < len(newest_sweeps(batch, 3).radar.xyz_m) < len(batch.radar.xyz_m)


def test_no_history_repeats_the_current_keyframe(batch) -> None:
    changed = without_history(batch)
    assert bool((changed.images_BTVCHW[:, 1] == batch.images_BTVCHW[:, 0]).all())
    assert not bool((batch.images_BTVCHW[:, 1] == batch.images_BTVCHW[:, 0]).all())
    now = int((batch.radar.time_index == 0).sum())
    assert len(changed.radar.xyz_m) == 2 * now and int((changed.radar.time_index == 1).sum()) == now


def test_late_radar_is_that_of_the_keyframe_before(batch) -> None:
    changed = with_late_radar(batch, (0,))
    before = batch.radar.time_index == 1
    assert len(changed.radar.xyz_m) == int(before.sum()) > 0 and int(changed.radar.time_index.max()) == 0
    assert bool((changed.radar.xyz_m == batch.radar.xyz_m[before]).all())
    assert changed.images_BTVCHW.shape[1] == 1 and bool((changed.images_BTVCHW[:, 0] == batch.images_BTVCHW[:, 0]).all())


def test_late_radar_of_neighbouring_slots(line) -> None:
    """A keyframe that is one slot's own and the next one's delay is asked for once."""
    assert late_history((0, -2, -4)) == (0, -2, -4, -1, -3, -5) and late_history((0, -1)) == (0, -1, -2)
    wide = read_batch(line, history=late_history((0, -1)))
    late = with_late_radar(wide, (0, -1))
    last = wide.radar.batch_index == 1  # the clip's third keyframe: both predecessors are there
    for slot in (0, 1):
        mine = (late.radar.batch_index == 1) & (late.radar.time_index == slot)
        assert torch.equal(late.radar.xyz_m[mine], wide.radar.xyz_m[last & (wide.radar.time_index == slot + 1)])
        assert int(mine.sum()) > 0
    assert late.images_BTVCHW.shape[1] == 2


def test_late_radar_has_nothing_before_the_clip(line) -> None:
    """Slots before the clip repeat the oldest keyframe; shown as late radar it would be the keyframe's own, on time."""
    cache = open_cache(line.cache)
    first = int(cache.rows("mini_val")[0])
    plain = read_batch(line, history=(0, -1, -2), rows=[first, first + 1])
    assert plain.history_valid_BT.tolist() == [[True, False, False], [True, True, False]]
    assert int(((plain.radar.batch_index == 0) & (plain.radar.time_index == 1)).sum()) > 0  # the repeated keyframe
    late = with_late_radar(plain, (0, -1))
    assert int((late.radar.batch_index == 0).sum()) == 0
    second = late.radar.time_index[late.radar.batch_index == 1]
    assert set(second.tolist()) == {0}  # the first keyframe's points; its own past slot has no predecessor
    assert len(second) == int(((plain.radar.batch_index == 1) & (plain.radar.time_index == 1)).sum())
    assert late.history_valid_BT.tolist() == [[True, False], [True, True]]
    unsaid = with_late_radar(replace(plain, history_valid_BT=None), (0, -1))
    assert int((unsaid.radar.batch_index == 0).sum()) > 0


def test_table_over_two_runs(line, tmp_path) -> None:
    """All conditions that need no second prediction, and one of each kind that does; equal when run again."""
    chosen = [
        c
        for c in CONDITIONS
        if not c.predicts or c.name in {"6 of the cameras lost", "5 of the radars lost", "no past keyframes"}
    ]
    chosen += [c for c in CONDITIONS if c.radar_late or c.camera_late or c.radar_sweeps == 1]
    cache = open_cache(line.cache)
    rows = robustness(line.students, cache, tmp_path, dataroot=line.tree, conditions=chosen)
    by = {(r.run, r.condition): r for r in rows}
    assert len(rows) == 2 * len(chosen)
    plain = by["student0", "all samples"]
    assert plain.num_samples == 3 and 0 <= plain.nds < 1
    assert by["student0", "night"].why == "no such scene in this split" and by["student0", "rain"].nds == plain.nds
    assert by["student0", "no past keyframes"].why == "the network uses no past keyframes"
    for name in ("6 of the cameras lost", "5 of the radars lost", "radar one keyframe late", "cameras one sweep late"):
        assert not by["student1", name].why and np.isfinite(by["student1", name].nds), name
    text = (tmp_path / "robustness.md").read_text()
    assert text.startswith("A test of the code on synthetic scenes") and "| student0: NDS (change), mAP | student1" in text
    again = robustness(
        {"student0": line.students["student0"]}, cache, tmp_path / "b", dataroot=line.tree, conditions=chosen[:4]
    )
    assert [r.nds for r in again if not r.why] == [r.nds for r in rows[:4] if not r.why]
    kept = json.loads((tmp_path / "robustness.json").read_text())
    assert kept["cache"] == cache.id and list(kept["networks"]) == ["student0", "student1"]
    assert "rain | 3 |" in robustness_text(rows)


def test_late_cameras_show_the_sweep_before(line) -> None:
    """Other pixels and another pose for every camera that has an earlier image."""
    from imkd_models.checkpoint import load_model
    from pipelines.robustness_late import late_cameras, why_no_sweeps

    cache = open_cache(line.cache)
    assert why_no_sweeps(line.tree, cache) == "" and "no sweeps" in why_no_sweeps(line.cache, cache)
    model, meta = load_model(line.students["student0"])
    speed = np.array(cache.index["ego_speed_mps"].to_pylist()) * (np.array(cache.index["previous_row"].to_pylist()) >= 0)
    rows = [int(cache.index["row"][int(np.nanargmax(speed))].as_py())]
    assert np.nanmax(speed) > 1
    (plain,) = predict_rows(model, cache, rows, meta)
    (late,) = predict_rows(model, cache, rows, meta, change=late_cameras(line.tree, cache, (64, 128)))
    a, b = plain.batch, late.batch
    assert all(bool((a.images_BTVCHW[0, 0, v] != b.images_BTVCHW[0, 0, v]).any()) for v in range(6))
    step = (a.bev_from_camera_BTV44 - b.bev_from_camera_BTV44)[0, 0, :, :3, 3].norm(dim=-1)
    assert 0 < float(step.max()) < 3  # metres driven in one camera sweep


def test_lidar_networks_and_empty_lists_are_refused(line, tmp_path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        robustness({}, line.cache, tmp_path, dataroot=line.tree)
    for networks in ({"a": line.students["student0"], "b": line.lidar}, {"b": line.lidar}):
        with pytest.raises(UsageError, match="without LiDAR"):
            robustness(networks, line.cache, tmp_path, dataroot=line.tree, conditions=CONDITIONS[:1])
    assert replace(CONDITIONS[0], cameras=1).predicts and not CONDITIONS[0].predicts
