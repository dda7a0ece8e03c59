"""The written tree: the official devkit reads it, counts the same points, scores truth with 1.0; bytes never depend on luck."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imkd_data.errors import MismatchError, UsageError
from imkd_data.world import world_options, write_world
from imkd_data.world.rig import CAMERA_DELAY_US, CAMERAS, LIDAR, RADARS
from pipelines.synth import official_names, parse_size, run_synth, val_scenes, with_eta

TINY: dict[str, Any] = {"scenes": 3, "keyframes": 2, "seed": 11, "image_hw_px": (45, 80)}


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def nusc(world: Path) -> Any:
    from nuscenes.nuscenes import NuScenes

    return NuScenes("v1.0-mini", str(world), verbose=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "one"
    write_world(root, **TINY)
    return root


def test_devkit_reads_tables_files_and_map(nusc: Any, world: Path) -> None:
    assert len(nusc.scene) == 3 and len(nusc.sample) == 12 and len(nusc.category) == 23
    assert [s["description"].split(",")[0] for s in nusc.scene] == ["Sunny", "Rain", "Night"]
    for row in nusc.sample_data:
        assert (world / row["filename"]).stat().st_size > 0
        assert row["filename"].startswith("samples/" if row["is_key_frame"] else "sweeps/")
    for sample in nusc.sample:
        assert set(sample["data"]) == {LIDAR, *CAMERAS, *RADARS}
    mask = nusc.map[0]["mask"]
    pose = nusc.get("ego_pose", nusc.get("sample_data", nusc.sample[0]["data"][LIDAR])["ego_pose_token"])
    assert mask.is_on_mask(pose["translation"][0], pose["translation"][1])  # the ego drives on the drivable surface
    assert not mask.is_on_mask(1.0, 1.0)
    image = nusc.get("sample_data", nusc.sample[0]["data"]["CAM_FRONT"])
    assert (image["height"], image["width"]) == (90, 160)


def test_images_have_the_size_of_the_tables(nusc: Any, world: Path) -> None:
    from PIL import Image

    for channel in CAMERAS:
        row = nusc.get("sample_data", nusc.sample[5]["data"][channel])
        with Image.open(world / row["filename"]) as image:
            assert image.format == "JPEG" and image.size == (160, 90)
            assert np.asarray(image).std() > 8
        matrix = np.array(nusc.get("calibrated_sensor", row["calibrated_sensor_token"])["camera_intrinsic"])
        assert matrix[0, 2] == pytest.approx(80, abs=5) and matrix[0, 0] in (
            pytest.approx(126, abs=3),
            pytest.approx(81, abs=3),
        )


def test_sensors_fire_at_their_own_times_with_their_own_poses(nusc: Any) -> None:
    speeds = []
    for sample in nusc.sample:
        key = nusc.get("sample_data", sample["data"][LIDAR])
        assert key["timestamp"] == sample["timestamp"]
        at = nusc.get("ego_pose", key["ego_pose_token"])
        for channel in (*CAMERAS, *RADARS):
            row = nusc.get("sample_data", sample["data"][channel])
            late = row["timestamp"] - key["timestamp"]
            if channel in CAMERAS:
                assert abs(late - CAMERA_DELAY_US[channel]) <= 1000
            else:
                assert abs(late) < 42_000
            pose = nusc.get("ego_pose", row["ego_pose_token"])
            assert pose["timestamp"] == row["timestamp"] and pose["translation"][2] == 0
            moved = np.hypot(*(np.array(pose["translation"]) - at["translation"])[:2])
            speeds.append(moved / max(abs(late) / 1e6, 1e-3) if abs(late) > 5000 else np.nan)
    assert np.nanmax(speeds) > 4.0


def test_chains_are_in_time_order_and_sweeps_come_at_their_rates(nusc: Any) -> None:
    for scene in nusc.scene:
        first = nusc.get("sample", scene["first_sample_token"])
        for channel, period in ((LIDAR, 50.0), ("RADAR_FRONT", 76.9), ("RADAR_BACK_LEFT", 76.9)):
            row, stamps = nusc.get("sample_data", first["data"][channel]), []
            assert row["prev"] == ""  # a scene begins with a key frame
            while True:
                stamps.append(row["timestamp"])
                if not row["next"]:
                    break
                after = nusc.get("sample_data", row["next"])
                assert after["prev"] == row["token"]
                assert row["is_key_frame"] or after["sample_token"] == row["sample_token"]
                row = after
            assert row["sample_token"] == scene["last_sample_token"] and row["is_key_frame"]
            gaps = np.diff(stamps) / 1000
            assert (gaps > 0).all() and np.median(gaps) == pytest.approx(period, rel=0.06)


def test_counts_equal_the_devkit_in_every_box(nusc: Any) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud, RadarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    RadarPointCloud.disable_filters()
    try:
        held = [0, 0]
        for sample in nusc.sample:
            counts: dict[str, list[int]] = {token: [0, 0] for token in sample["anns"]}
            for channel in (LIDAR, *RADARS):
                path, boxes, _ = nusc.get_sample_data(sample["data"][channel])
                cloud = (LidarPointCloud if channel == LIDAR else RadarPointCloud).from_file(path)
                for box in boxes:
                    counts[box.token][channel != LIDAR] += int(points_in_box(box, cloud.points[:3]).sum())
            for token, (lidar, radar) in counts.items():
                row = nusc.get("sample_annotation", token)
                assert (row["num_lidar_pts"], row["num_radar_pts"]) == (lidar, radar)
                held = [held[0] + (lidar > 0), held[1] + (radar > 0)]
        assert held[0] > 100 and held[1] > 30
    finally:
        RadarPointCloud.default_filters()


def test_velocities_attributes_and_tracks(nusc: Any) -> None:
    moving = 0
    for row in nusc.instance:
        annotation, count = nusc.get("sample_annotation", row["first_annotation_token"]), 1
        while annotation["next"]:
            after = nusc.get("sample_annotation", annotation["next"])
            assert after["prev"] == annotation["token"] and after["size"] == annotation["size"]
            annotation, count = after, count + 1
        assert count == row["nbr_annotations"] and annotation["token"] == row["last_annotation_token"]
    for annotation in nusc.sample_annotation:
        assert annotation["visibility_token"] in "1234"
        speed = np.hypot(*nusc.box_velocity(annotation["token"])[:2])
        names = [nusc.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
        category = annotation["category_name"]
        assert len(names) == (0 if category.startswith("movable") else 1)
        if names and names[0] in ("vehicle.parked", "vehicle.stopped", "pedestrian.standing", "cycle.without_rider"):
            assert not speed > 1.3
        if names and names[0] == "vehicle.moving" and np.isfinite(speed):
            moving += speed > 1.0
    assert moving > 20


def test_velocity_is_the_one_of_the_world(world: Path, nusc: Any) -> None:
    """The devkit's central difference equals that of the actors' own tracks, to the millimetre rounding of the tables."""
    from imkd_data.world.options import WorldOptions, token
    from imkd_data.world.scene import make_scene

    options = WorldOptions(scenes=3, keyframes=4, seed=3, image_hw_px=(90, 160), weather=("clear", "rain", "night"))
    scene = make_scene(options, 0)
    stamps = sorted(s["timestamp"] for s in nusc.sample if s["scene_token"] == nusc.scene[0]["token"])
    before, after = (scene.tracks.at(scene.seconds(stamps[k]))[0] for k in (0, 2))
    checked = 0
    for number in range(len(scene.actors)):
        key = token("imkd/3/0", "annotation", number, 1)
        row = next((a for a in nusc.sample_annotation if a["token"] == key), None)
        if row and row["prev"] and row["next"]:
            truth = (after[number, :2] - before[number, :2]) / ((stamps[2] - stamps[0]) / 1e6)
            np.testing.assert_allclose(nusc.box_velocity(key)[:2], truth, atol=1.1e-3)
            checked += 1
    assert checked > 15


def test_tables_hold_the_poses_that_sensors_were_rendered_with(world: Path, nusc: Any) -> None:
    from pyquaternion import Quaternion

    from imkd_data.world.camera import CameraModel
    from imkd_data.world.lidar import LidarModel
    from imkd_data.world.options import WorldOptions, random_stream
    from imkd_data.world.rig import make_rig
    from imkd_data.world.scene import make_scene

    options = WorldOptions(scenes=3, keyframes=4, seed=3, image_hw_px=(90, 160), weather=("clear", "rain", "night"))
    scene, rig = make_scene(options, 0), make_rig(random_stream(3, 0, "rig"), (90, 160))
    cameras, lidar = CameraModel(scene, rig), LidarModel(scene, rig)
    sample = nusc.get("sample", nusc.get("sample", nusc.scene[0]["first_sample_token"])["next"])
    for channel in (LIDAR, *CAMERAS):
        row = nusc.get("sample_data", sample["data"][channel])
        pose, mount = nusc.get("ego_pose", row["ego_pose_token"]), nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
        turn = Quaternion(pose["rotation"]).rotation_matrix
        t = scene.seconds(row["timestamp"])
        rotation, origin = (v[0] for v in lidar.sensor_poses(np.array([t]))) if channel == LIDAR else cameras.pose(channel, t)
        np.testing.assert_allclose(turn @ Quaternion(mount["rotation"]).rotation_matrix, rotation, atol=1e-12)
        np.testing.assert_allclose(turn @ mount["translation"] + pose["translation"], origin, atol=1e-9)
        if channel == LIDAR:
            assert lidar.turn(t).points.tobytes() == (world / row["filename"]).read_bytes()
        else:
            assert np.array_equal(mount["camera_intrinsic"], rig.intrinsics[channel])


def test_truth_as_submission_scores_one_in_all_ten_classes(nusc: Any, tmp_path: Path) -> None:
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.eval.detection.utils import category_to_detection_name

    val = {"scene-0103", "scene-0916"}
    results: dict[str, list[dict[str, Any]]] = {}
    for sample in nusc.sample:
        if nusc.get("scene", sample["scene_token"])["name"] not in val:
            continue
        rows = []
        for token in sample["anns"]:
            row = nusc.get("sample_annotation", token)
            name = category_to_detection_name(row["category_name"])
            if name is None or row["num_lidar_pts"] + row["num_radar_pts"] == 0:
                continue
            velocity = np.nan_to_num(nusc.box_velocity(token)[:2])
            attribute = [nusc.get("attribute", t)["name"] for t in row["attribute_tokens"]]
            rows.append(
                {
                    "sample_token": sample["token"],
                    **{k: row[k] for k in ("translation", "size", "rotation")},
                    "velocity": [float(v) for v in velocity],
                    "detection_name": name,
                    "detection_score": 1.0,
                    "attribute_name": attribute[0] if attribute else "",
                }
            )
        results[sample["token"]] = rows
    meta = {f"use_{k}": k == "lidar" for k in ("camera", "lidar", "radar", "map", "external")}
    (tmp_path / "results.json").write_text(json.dumps({"meta": meta, "results": results}))
    config = config_factory("detection_cvpr_2019")
    oracle = DetectionEval(nusc, config, str(tmp_path / "results.json"), "mini_val", str(tmp_path), verbose=False)
    metrics = oracle.evaluate()[0].serialize()
    assert all(v == pytest.approx(1.0) for v in metrics["mean_dist_aps"].values()) and len(metrics["mean_dist_aps"]) == 10
    assert all(v < 1e-3 for v in metrics["tp_errors"].values()), metrics["tp_errors"]


def test_same_bytes_with_two_workers(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_world(tmp_path / "two", **TINY, workers=2, progress=lambda done, total, _: seen.append((done, total)))
    assert digests(tmp_path / "two") == digests(tiny)
    assert [done for done, _ in seen] == [0, 1, 2, 3]


def test_unfinished_world_continues_to_the_same_bytes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imkd_data.world import record

    whole, calls = record.Recorder.record, []

    def once(self: Any) -> Any:
        calls.append(self.scene.index)
        if len(calls) == 2:  # scene 1 is left half-written
            whole(self)
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(record.Recorder, "record", once)
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "w", **TINY)
    assert not (tmp_path / "w" / "v1.0-mini").exists()  # no half-made world that claims to be whole
    write_world(tmp_path / "w", **TINY)
    assert calls == [0, 1, 1, 2]  # the finished scene was not made again
    assert digests(tmp_path / "w") == digests(tiny)
    write_world(tmp_path / "w", **TINY)
    assert calls == [0, 1, 1, 2]  # nor the finished world


@pytest.mark.slow
def test_killed_run_leaves_no_worker_behind(tmp_path: Path) -> None:
    """Workers of a run that is killed end by themselves, and the same command continues to the same bytes."""
    import os
    import signal
    import subprocess
    import sys
    import time

    code = f"from pipelines.synth import run_synth\nif __name__ == '__main__': run_synth(out={str(tmp_path / 'w')!r}, "
    script = tmp_path / "run.py"
    script.write_text(code + "scenes=4, keyframes=8, image_size='90x160', workers=2)\n")
    process = subprocess.Popen([sys.executable, str(script)])
    children: list[str] = []
    for _ in range(300):
        time.sleep(0.1)
        listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = listing.split()
        if (tmp_path / "w" / "sweeps").exists():
            break
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{c}") for c in children):
        time.sleep(0.1)
    assert children and not any(os.path.exists(f"/proc/{c}") for c in children)
    options: dict[str, Any] = {"scenes": 4, "keyframes": 8, "image_size": "90x160"}
    run_synth(out=tmp_path / "w", **options)
    run_synth(out=tmp_path / "v", **options)
    assert digests(tmp_path / "w") == digests(tmp_path / "v")


def test_scenes_are_the_same_in_a_smaller_world(tiny: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "w", **{**TINY, "scenes": 1})
    small, large = digests(tmp_path / "w"), digests(tiny)
    sensors = {k: v for k, v in small.items() if k.startswith(("samples", "sweeps", "maps"))}
    assert len(sensors) > 30 and all(large[k] == v for k, v in sensors.items())


def test_other_options_or_foreign_folders_are_refused(tiny: Path, tmp_path: Path) -> None:
    before = digests(tiny)
    with pytest.raises(MismatchError):
        write_world(tiny, **{**TINY, "seed": 12})
    assert digests(tiny) == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(MismatchError):
        write_world(tmp_path, **TINY)
    for wrong in ({"scenes": 0}, {"keyframes": 1}, {"weather": ("snow",)}, {"materials": "gold"}, {"image_hw_px": (8, 8)}):
        with pytest.raises(UsageError):
            write_world(tmp_path / "x", **{**TINY, **wrong})
    with pytest.raises(UsageError):
        write_world(tmp_path / "x", **TINY, scene_names=["scene-0001"] * 3)


def test_test_version_has_no_boxes(tmp_path: Path) -> None:
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.splits import create_splits_scenes

    root = run_synth(out=tmp_path / "w", version="v1.0-test", scenes=1, keyframes=2, image_size="45x80")
    nusc = NuScenes("v1.0-test", str(root), verbose=False)
    assert len(nusc.sample) == 2 and not nusc.sample_annotation and not nusc.instance
    assert nusc.scene[0]["name"] in create_splits_scenes()["test"]


def test_camera_sweeps(tmp_path: Path) -> None:
    write_world(tmp_path / "w", **{**TINY, "scenes": 1}, camera_sweeps=True)
    rows = json.loads((tmp_path / "w" / "v1.0-mini" / "sample_data.json").read_text())
    front = [r for r in rows if "/CAM_FRONT/" in r["filename"]]
    assert [r["is_key_frame"] for r in front] == [True, False, False, False, False, False, True]
    assert all((tmp_path / "w" / r["filename"]).is_file() for r in front)


def test_scene_names_and_splits() -> None:
    from nuscenes.utils.splits import create_splits_scenes

    lists = create_splits_scenes()

    def val(version: str, scenes: int, share: float | None = None) -> list[int]:
        names = official_names(version, scenes, share)
        assert len(set(names)) == scenes
        train, held = ("mini_train", "mini_val") if "mini" in version else ("train", "val")
        assert set(names) <= {*lists[train], *lists[held]}
        return [k for k, name in enumerate(names) if name in lists[held]]

    assert val("v1.0-mini", 10) == [4, 9] and val("v1.0-mini", 3) == [2] and val("v1.0-mini", 2) == [1]
    assert val("v1.0-mini", 1) == []
    assert val("v1.0-trainval", 12) == [4, 9, 11]
    everything = val("v1.0-trainval", 850)
    assert len(everything) == 150 and everything[0] == 4 and everything[-1] == 849
    assert val("v1.0-trainval", 8, 0.5) == [1, 3, 5, 7]
    assert val_scenes(7, 0.2) == [4, 6]
    for wrong in (("v1.0-mini", 11, None), ("v1.0-mini", 8, 0.5), ("v2", 3, None), ("v1.0-mini", 3, 1.5)):
        with pytest.raises(UsageError):
            official_names(*wrong)


def test_command_arguments_and_progress(tmp_path: Path) -> None:
    assert parse_size("256x704") == (256, 704) and parse_size((9, 16)) == (9, 16)
    with pytest.raises(UsageError):
        parse_size("256")
    told: list[str] = []
    report = with_eta(lambda done, total, text: told.append(text))
    for done in range(3):
        report(done, 2, "scene")
    assert told[0] == "scene" and told[1].endswith("s left") and told[2] == "scene"
    root = run_synth(out=tmp_path / "w", scenes=1, keyframes=2, image_size="45x80", weather="night", seed=11)
    assert "Night" in (root / "v1.0-mini" / "scene.json").read_text()
    shutil.rmtree(root)


def test_a_world_says_what_it_was_made_with(tmp_path: Path) -> None:
    """A finished world whose record says less, as older ones do, is still left alone."""
    root = tmp_path / "w"
    assert world_options(root) is None
    values: dict[str, Any] = {"scenes": 1, "keyframes": 2, "image_hw_px": (45, 80), "materials": "independent"}
    write_world(root, **values)
    made = world_options(root)
    assert made is not None and made["image_hw_px"] == [45, 80]
    assert (made["materials"], made["scenes"], made["weather"]) == ("independent", 1, ["clear"])
    record = root / ".synth" / "complete.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "options"}))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    write_world(root, **values)
    assert world_options(root) is None and {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
