"""What the synthetic sensors measure: geometry, time, velocity, reflectivity."""

from __future__ import annotations

import numpy as np
import pytest

from imkd_data.classes import CLASS_FROM_CATEGORY, DETECTION_CLASSES
from imkd_data.kernels import raycast
from imkd_data.world import rig as rigs
from imkd_data.world.camera import CameraModel
from imkd_data.world.lidar import LidarModel, Turn
from imkd_data.world.options import WorldOptions, random_stream
from imkd_data.world.radar import FIELDS, RadarModel
from imkd_data.world.scene import Scene, make_scene

OPTIONS = WorldOptions(keyframes=12, seed=1, image_hw_px=(225, 400))


class Stage:
    """A scene with its sensors."""

    def __init__(self, options: WorldOptions, index: int) -> None:
        self.scene: Scene = make_scene(options, index)
        self.rig = rigs.make_rig(random_stream(options.seed, index, "rig"), options.image_hw_px)
        self.lidar = LidarModel(self.scene, self.rig)

    def speed(self, t_s: float) -> float:
        return float(np.hypot(*self.scene.ego.speed(t_s)))

    def in_global(self, turn: Turn, t_s: float) -> np.ndarray:
        rotation, origin = self.lidar.sensor_poses(np.array([t_s]))
        return turn.points[:, :3].astype(np.float64) @ rotation[0].T + origin[0]


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(OPTIONS, 0)


@pytest.fixture(scope="module")
def fast() -> tuple[Stage, float]:
    """A scene and a time at which the ego drives fast."""
    for index in range(12):
        stage = Stage(OPTIONS, index)
        for t in (1.0, 3.0, 5.0):
            if stage.speed(t) > 9.0:
                return stage, t
    raise AssertionError("no fast ego in twelve scenes")


def test_scene_does_not_depend_on_the_number_of_scenes() -> None:
    a, b = make_scene(WorldOptions(scenes=2, keyframes=4), 1), make_scene(WorldOptions(scenes=9, keyframes=4), 1)
    assert (a.tracks.xy_yaw == b.tracks.xy_yaw).all() and (a.statics.prims == b.statics.prims).all()


def test_every_scene_has_all_ten_classes_and_nobody_in_the_ego() -> None:
    for index in range(3):
        scene = make_scene(OPTIONS, index)
        classes = {CLASS_FROM_CATEGORY.get(a.category) for a in scene.actors}
        assert classes >= set(DETECTION_CLASSES)
        for t in np.arange(0.0, scene.duration_s, 0.5):
            rotation, place = scene.ego.poses(np.array([t]))
            state, _ = scene.tracks.at(t)
            local = (state[:, :2] - place[0, :2]) @ rotation[0, :2, :2]
            inside = (local[:, 0] > -1.0) & (local[:, 0] < 3.8) & (np.abs(local[:, 1]) < 1.0)
            assert not inside.any()


def test_parts_lie_inside_the_annotated_box() -> None:
    scene = make_scene(OPTIONS, 1)
    for number, actor in enumerate(scene.actors):
        mine = scene.owner == number
        local, half = scene.local[mine], scene.actor_parts.prims[mine, 3:6]
        assert (np.abs(local[:, :2]) + half[:, :2] <= np.array(actor.size_lwh_m[:2]) / 2 - 0.03).all(), actor.category
        assert (local[:, 2] + half[:, 2] <= actor.size_lwh_m[2] - 0.03).all() and (local[:, 2] - half[:, 2] > -1e-9).all()


def test_lidar_file_values(stage: Stage) -> None:
    points = stage.lidar.turn(1.0).points
    assert points.dtype == np.float32 and len(points) in (34688, 34720, 34752)
    assert np.isfinite(points).all()
    assert (points[:, 3] == np.round(points[:, 3])).all() and points[:, 3].min() >= 0 and points[:, 3].max() <= 255
    assert (points[:32, 4] == np.arange(32)).all()
    far = np.linalg.norm(points[:, :3], axis=1)
    assert 0.2 < (far < 1.5).mean() < 0.45  # own car and lost rays, as in genuine frames
    assert 0.001 < (points[:, 3] > 100).mean() < 0.012
    elevation = np.degrees(np.arcsin(points[:, 2] / np.maximum(far, 1e-3)))
    ring_31 = elevation[(points[:, 4] == 31) & (far > 5)]
    assert np.median(ring_31) == pytest.approx(10.67, abs=0.15)


def test_turn_runs_clockwise_from_the_left_rear(stage: Stage) -> None:
    """Column order is firing order; a camera's axis is crossed at its nominal delay."""
    azimuth = np.unwrap(np.radians(rigs.LIDAR_START_DEG - 360.0 * np.arange(1085) / 1085))
    assert azimuth[-1] < azimuth[0]
    for camera in rigs.CAMERAS:
        rotation, _ = CameraModel(stage.scene, stage.rig).pose(camera, 1.0)
        lidar_rotation, _ = stage.lidar.sensor_poses(np.array([1.0]))
        axis = lidar_rotation[0].T @ rotation[:, 2]
        seen = np.argmin(np.abs(np.angle(np.exp(1j * (azimuth - np.arctan2(axis[1], axis[0]))))))
        assert -50.0 * (1 - (seen + 0.5) / 1085) == pytest.approx(rigs.CAMERA_DELAY_US[camera] / 1000, abs=1.5), camera


def test_static_walls_are_straight_and_moving_cars_are_smeared(fast: tuple[Stage, float]) -> None:
    stage, t = fast
    turn = stage.lidar.turn(t)
    place = stage.in_global(turn, t)
    walls = [p for p, k in zip(stage.scene.statics.prims, stage.scene.statics.kinds, strict=True) if k[2] == 1]
    worst, used = 0.0, 0
    static = turn.objects == raycast.STATIC
    for p in walls:
        turnback = np.array([[p[6], p[7]], [-p[7], p[6]]])
        local = (place[static, :2] - p[:2]) @ turnback.T
        gap = np.abs(np.abs(local[:, 1]) - p[4])
        on = (gap < 0.3) & (np.abs(local[:, 0]) < p[3] - 0.5) & (place[static, 2] > 0.3) & (place[static, 2] < 2 * p[5] - 0.3)
        if on.sum() > 30:
            worst, used = max(worst, float(gap[on].max())), used + 1
    assert used >= 2 and worst < 0.03
    state, rate = stage.scene.tracks.at(t)
    smear = []
    for number in np.flatnonzero(np.hypot(rate[:, 0], rate[:, 1]) > 5.0):
        mine = turn.objects == number
        if mine.sum() > 20 and stage.scene.actors[number].category == "vehicle.car":
            c, s = np.cos(state[number, 2]), np.sin(state[number, 2])
            along = (place[mine, :2] - state[number, :2]) @ np.array([c, s])
            smear.append(np.abs(along).max() - stage.scene.actors[number].size_lwh_m[0] / 2)
    assert smear and max(smear) > 0.02  # earlier firings see it where it was


def test_lidar_points_fall_on_the_rendered_object(stage: Stage) -> None:
    cameras = CameraModel(stage.scene, stage.rig)
    height, width = OPTIONS.image_hw_px
    total = agree = 0
    for t in (0.5, 4.0):
        turn = stage.lidar.turn(t)
        place = stage.in_global(turn, t)
        for camera in rigs.CAMERAS:
            at = t + rigs.CAMERA_DELAY_US[camera] / 1e6
            view = cameras.view(camera, at, colour=False)
            rotation, origin = cameras.pose(camera, at)
            xyz = (place - origin) @ rotation
            uvw = xyz @ stage.rig.intrinsics[camera].T
            front = (xyz[:, 2] > 1.0) & (turn.objects >= 0)
            u, v = np.round(uvw[:, :2] / np.where(front, uvw[:, 2], 1.0)[:, None]).astype(int).T
            seen = front & (u >= 0) & (u < width) & (v >= 0) & (v < height)
            total += int(seen.sum())
            agree += int((view.objects[v[seen], u[seen]] == turn.objects[seen]).sum())
    assert total > 2000 and agree / total >= 0.97


def test_radar_fields(stage: Stage) -> None:
    model = RadarModel(stage.scene, stage.rig)
    stacks = []
    for channel in rigs.RADARS:
        for t in np.arange(0.2, 5.0, 0.4):
            centre = stage.scene.ego.poses(np.array([t]))[1][0, :2]
            things = stage.scene.primitives(t, centre, 150.0)
            stacks.append(model.scan(channel, t, things, things.tree(0.0)))
            assert len(stacks[-1]) <= 125
    points = np.concatenate(stacks)
    assert points.dtype.names == FIELDS and points.dtype.itemsize == 43
    line = np.stack([points["x"], points["y"]], 1) / np.hypot(points["x"], points["y"])[:, None]
    comp = np.stack([points["vx_comp"], points["vy_comp"]], 1)
    across = comp[:, 0] * line[:, 1] - comp[:, 1] * line[:, 0]
    assert np.abs(across).max() < 1e-5  # exactly radial
    raw = np.stack([points["vx"], points["vy"]], 1)
    assert np.abs(raw / 0.25 - np.round(raw / 0.25)).max() < 1e-6
    moving = np.hypot(*raw.T) > 2.0
    assert np.median(np.abs(raw[moving, 0] * line[moving, 1] - raw[moving, 1] * line[moving, 0])) > 0.3  # raw is no radial pair
    assert np.abs(points["x"] / 0.2 - np.round(points["x"] / 0.2)).max() < 1e-3
    assert np.abs(points["rcs"] * 2 - np.round(points["rcs"] * 2)).max() == 0.0
    assert (points["z"] == 0).all() and (points["is_quality_valid"] == 1).all()
    far, angle = np.hypot(points["x"], points["y"]), np.degrees(np.abs(np.arctan2(points["y"], points["x"])))
    assert far.max() < 250 * 2 and np.mean((far < 76) | (angle < 10)) > 0.97  # the rest are ghosts
    still = np.isin(points["dyn_prop"], (1, 3))
    speed = np.hypot(*comp.T)[still]
    assert np.median(speed) < 0.2 and np.percentile(speed, 90) < 0.5
    assert 0.45 < (points["dyn_prop"] == 1).mean() < 0.75
    default = (points["invalid_state"] == 0) & (points["dyn_prop"] < 7) & (points["ambig_state"] == 3)
    crn = np.isin(points["invalid_state"], (0, 4, 8, 9, 10, 11, 12, 15, 16, 17)) & (points["ambig_state"] == 3)
    assert 0.42 < default.mean() < 0.62 and 0.83 < crn.mean() < 0.97


def test_radar_velocity_of_moving_actors_is_their_true_radial_velocity(stage: Stage) -> None:
    model = RadarModel(stage.scene, stage.rig)
    errors = []
    for t, channel in ((t, c) for t in np.arange(0.3, 5.0, 0.3) for c in rigs.RADARS):
        rotation, origin, _ = model._sensor(channel, t)
        things = stage.scene.primitives(t, origin[:2], 150.0)
        points = model.scan(channel, t, things, things.tree(0.0))
        place = np.stack([points["x"], points["y"]], 1) @ rotation[:2, :2].T + origin[:2]
        state, rate = stage.scene.tracks.at(t)
        for number in np.flatnonzero(np.hypot(rate[:, 0], rate[:, 1]) > 4.0):
            near = np.hypot(*(place - state[number, :2]).T) < 1.5
            for k in np.flatnonzero(near & np.isin(points["dyn_prop"], (0, 2))):
                sight = (place[k] - origin[:2]) / np.hypot(*(place[k] - origin[:2]))
                seen = np.hypot(points["vx_comp"][k], points["vy_comp"][k]) * np.sign(
                    points["vx_comp"][k] * points["x"][k] + points["vy_comp"][k] * points["y"][k]
                )
                errors.append(seen - rate[number, :2] @ sight)
    assert len(errors) > 10 and np.median(np.abs(errors)) < 0.25


def test_radar_tells_trucks_more_often_than_cars_and_cars_more_often_than_people(stage: Stage) -> None:
    """Points on an actor's outline per scan within 30 m, over all five radars."""
    model, seen = RadarModel(stage.scene, stage.rig), dict.fromkeys(("truck", "car", "adult"), 0)
    there = dict.fromkeys(seen, 0)
    for t in np.arange(0.2, 5.4, 0.4):
        ego = stage.scene.ego.poses(np.array([t]))[1][0, :2]
        things = stage.scene.primitives(t, ego, 180.0)
        state, _ = stage.scene.tracks.at(t)
        tree, place = things.tree(0.0), []
        for channel in rigs.RADARS:
            rotation, origin, _ = model._sensor(channel, t)
            points = model.scan(channel, t, things, tree)
            place.append(np.stack([points["x"], points["y"]], 1) @ rotation[:2, :2].T + origin[:2])
        xy = np.concatenate(place)
        for number in np.flatnonzero(np.hypot(*(state[:, :2] - ego).T) < 30.0):
            kind = stage.scene.actors[number].category.rsplit(".", 1)[-1]
            if kind not in seen:
                continue
            c, s = np.cos(state[number, 2]), np.sin(state[number, 2])
            local = (xy - state[number, :2]) @ np.array([[c, -s], [s, c]])
            half = np.array(stage.scene.actors[number].size_lwh_m[:2]) / 2
            seen[kind] += bool((np.abs(local) < half).all(axis=1).any())
            there[kind] += 1
    share = {k: seen[k] / there[k] for k in seen}
    assert min(there.values()) >= 10
    assert share["truck"] > 0.6 and 0.3 < share["car"] < 0.9 * share["truck"] and share["adult"] < 0.5 * share["car"], share


def test_reflectivity_says_something_about_the_class_only_if_asked() -> None:
    def spread(materials: str) -> float:
        by_class: dict[str, list[float]] = {}
        for index in range(2):
            for actor in make_scene(WorldOptions(keyframes=4, materials=materials), index).actors:
                by_class.setdefault(actor.category, []).append(float(np.mean([p.reflectivity for p in actor.parts])))
        groups = [v for v in by_class.values() if len(v) >= 6]
        means = np.array([np.mean(v) for v in groups])
        return float(means.std() / np.mean([np.std(v) for v in groups]))

    assert spread("class") > 1.0 and spread("independent") < 0.5


@pytest.mark.parametrize("weather", ["rain", "night"])
def test_weather_changes_what_sensors_see(weather: str) -> None:
    clear = Stage(OPTIONS, 0)
    other = Stage(WorldOptions(keyframes=12, seed=1, image_hw_px=(225, 400), weather=(weather,)), 0)
    image = [CameraModel(s.scene, s.rig).view("CAM_BACK_RIGHT", 1.0).image for s in (clear, other)]
    assert image[0] is not None and image[1] is not None
    if weather == "night":
        assert image[1].mean() < 0.35 * image[0].mean()
    else:
        assert image[1].std() < 0.9 * image[0].std()  # no sun
    near = []
    for s in (clear, other):
        far = np.linalg.norm(s.lidar.turn(1.0).points[:, :3], axis=1)
        near.append(int(((far > 1.3) & (far < 3.0)).sum()))
    assert (near[1] > near[0] + 150) == (weather == "rain")  # echoes of drops
