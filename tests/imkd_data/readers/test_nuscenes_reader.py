"""The reader on a tiny moving tree, with the devkit as oracle for sweeps, and its rules of what is declared and read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud, RadarPointCloud
from nuscenes.utils.geometry_utils import transform_matrix
from pyquaternion import Quaternion

from imkd_data.errors import InputDataError, SourceMissingError, UsageError
from imkd_data.readers import READERS
from tests.imkd_data.readers.tiny_tree import CHANNELS, HW, SCENES, Tree, token

EVERYTHING = frozenset({"images", "lidar", "radar"})


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def devkit(tree: Tree) -> NuScenes:
    return NuScenes(tree.version, str(tree.root), verbose=False)


def test_opens_through_the_list_of_readers(tree: Tree) -> None:
    reader = READERS["nuscenes"](tree.root, "v1.0-mini", sensors=CHANNELS)
    assert reader.sensors == ("LIDAR_TOP", "CAM_FRONT", "CAM_BACK", "RADAR_FRONT", "RADAR_BACK_LEFT")  # suite order
    assert reader.scene_names("mini_train") == ("scene-0061",)
    assert reader.scene_names("mini_val") == ("scene-0103",)
    assert reader.scene_names("test") == ()
    with pytest.raises(UsageError, match="unknown split"):
        reader.scene_names("mini")


def test_samples_are_in_time_order_and_chained(tree: Tree) -> None:
    samples = tree.open().samples(SCENES[1])
    assert [s.token for s in samples] == [token(SCENES[1], "sample", k) for k in range(3)]
    assert [s.previous for s in samples] == ["", samples[0].token, samples[1].token]
    assert [s.next for s in samples] == [samples[1].token, samples[2].token, ""]
    assert {s.split for s in samples} == {"mini_val"} and samples[0].location == "here"
    assert pickle.loads(pickle.dumps(samples[1])).boxes.centre_m.tolist() == samples[1].boxes.centre_m.tolist()
    assert [c.camera.name for c in samples[0].cameras] == ["CAM_FRONT", "CAM_BACK"]
    assert (samples[0].cameras[0].camera.height_px, samples[0].cameras[0].camera.width_px) == HW


def test_sweep_counts_are_what_the_scene_has(tree: Tree) -> None:
    first, second, third = tree.open(lidar_sweeps=4, radar_sweeps=7).samples(SCENES[0])
    assert [len(s.lidar) for s in (first, second, third)] == [1, 4, 4]
    assert [len(s.radar["RADAR_FRONT"]) for s in (first, second, third)] == [1, 5, 7]
    for sweeps in (third.lidar, third.radar["RADAR_BACK_LEFT"]):
        assert [s.is_key for s in sweeps] == [True] + [False] * (len(sweeps) - 1)
        stamps = [s.timestamp_us for s in sweeps]
        assert stamps == sorted(stamps, reverse=True) and len(set(stamps)) == len(stamps)


def ego_from_devkit(devkit: NuScenes, sample: str, channel: str) -> np.ndarray:
    """4x4 ego_from_sensor at the LIDAR_TOP key time, by the devkit's own matrices."""
    record = devkit.get("sample", sample)
    reference = devkit.get("ego_pose", devkit.get("sample_data", record["data"]["LIDAR_TOP"])["ego_pose_token"])
    data = devkit.get("sample_data", record["data"][channel])
    pose = devkit.get("ego_pose", data["ego_pose_token"])
    cal = devkit.get("calibrated_sensor", data["calibrated_sensor_token"])
    ego_from_global = transform_matrix(reference["translation"], Quaternion(reference["rotation"]), inverse=True)
    global_from_vehicle = transform_matrix(pose["translation"], Quaternion(pose["rotation"]))
    vehicle_from_sensor = transform_matrix(cal["translation"], Quaternion(cal["rotation"]))
    return ego_from_global @ global_from_vehicle @ vehicle_from_sensor


@pytest.mark.parametrize("channel", CHANNELS)
def test_poses_equal_the_devkits(tree: Tree, devkit: NuScenes, channel: str) -> None:
    sample = tree.open().samples(SCENES[0])[2]
    expected = ego_from_devkit(devkit, sample.token, channel)
    if channel.startswith("CAM"):
        frame = next(f for f in sample.cameras if f.camera.name == channel)
        pose = frame.camera.ego_from_camera
    else:
        pose = (sample.lidar if channel == "LIDAR_TOP" else sample.radar[channel])[0].ego_from_sensor
    np.testing.assert_allclose(pose.matrix(), expected, atol=1e-9)


@pytest.mark.parametrize(("channel", "cloud"), [("LIDAR_TOP", LidarPointCloud), ("RADAR_FRONT", RadarPointCloud)])
def test_multi_sweep_clouds_equal_the_devkits(tree: Tree, devkit: NuScenes, channel: str, cloud: type) -> None:
    """Each sweep with its own pose: the car moves 0.7 m and turns 2.3 degrees between two LiDAR scans."""
    RadarPointCloud.disable_filters()
    reader = tree.open(lidar_sweeps=5, radar_sweeps=5)
    sample = reader.samples(SCENES[0])[2]
    payload = reader.read(sample, EVERYTHING)
    record = devkit.get("sample", sample.token)
    expected, lag = cloud.from_file_multisweep(devkit, record, channel, "LIDAR_TOP", nsweeps=5, min_distance=0.0)
    RadarPointCloud.default_filters()
    sweeps = sample.lidar if channel == "LIDAR_TOP" else sample.radar[channel]
    clouds = payload.lidar if channel == "LIDAR_TOP" else payload.radar[channel]
    to_lidar = sample.lidar[0].ego_from_sensor.inverse()
    ours = np.concatenate([(to_lidar @ s.ego_from_sensor).points(p.xyz_m) for s, p in zip(sweeps, clouds, strict=True)])
    np.testing.assert_allclose(ours, expected.points[:3].T, atol=2e-4)  # the devkit keeps float32
    ages = np.concatenate([-p.time_s for p in clouds])
    np.testing.assert_allclose(ages, lag[0], atol=1e-6)


def test_neighbouring_samples_share_parsed_sweeps(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    import imkd_data.readers.nuscenes as module

    parsed: list[str] = []
    real = module.parse_lidar
    monkeypatch.setattr(module, "parse_lidar", lambda data, **kw: (parsed.append(kw["file"]), real(data, **kw))[1])
    reader = tree.open(lidar_sweeps=10)
    payloads = [reader.read(s, frozenset({"lidar"})) for s in reader.samples(SCENES[0])]
    assert sum(len(p.lidar) for p in payloads) == 1 + 6 + 10 and len(parsed) == len(set(parsed)) == 11
    first = tree.open(lidar_sweeps=10).read(reader.samples(SCENES[0])[2], frozenset({"lidar"}))
    for one, other in zip(first.lidar, payloads[2].lidar, strict=True):  # shared or not, the same values and file records
        np.testing.assert_array_equal(one.features, other.features)
    assert first.files == payloads[2].files


def test_reads_only_what_is_needed(tree: Tree) -> None:
    reader = tree.open()
    sample = reader.samples(SCENES[0])[1]
    assert reader.read(sample, frozenset()).files == ()
    lidar = reader.read(sample, frozenset({"lidar_key", "cameras", "boxes"}))
    assert [name for name, _, _ in lidar.files] == [sample.lidar[0].path] and len(lidar.lidar) == 1
    assert lidar.images is None and lidar.radar is None
    name, size, _ = reader.read(sample, frozenset({"images"})).files[1]
    assert name == sample.cameras[1].path and size == (tree.root / name).stat().st_size


def test_crc32c_is_of_the_files_content(tree: Tree) -> None:
    import google_crc32c

    reader = tree.open()
    for name, size, crc in reader.read(reader.samples(SCENES[0])[0], EVERYTHING).files:
        data = (tree.root / name).read_bytes()
        assert (len(data), google_crc32c.value(data)) == (size, crc)


def test_input_manifest_names_files_and_tables_only(tree: Tree, tmp_path: Path) -> None:
    reader = tree.open(lidar_sweeps=3)
    sample = reader.samples(SCENES[0])[1]
    manifest = reader.input_manifest(sample, frozenset({"lidar"}))
    assert [m[0] for m in manifest] == [s.path for s in sample.lidar] + ["table:pose", "table:lidar"]
    assert manifest[0][1] == 2048 * 20
    moved = Tree(tmp_path / "ein anderer Ort")  # same seed: equal content elsewhere
    other = moved.open(lidar_sweeps=3)
    assert other.input_manifest(other.samples(SCENES[0])[1], frozenset({"lidar"})) == manifest


def test_input_manifest_sees_each_edited_row_where_it_matters(tree: Tree, tmp_path: Path) -> None:
    parts = ("boxes", "cameras", "lidar", "lidar_key", "radar")

    def digests(t: Tree) -> dict[str, str]:
        reader = t.open()
        sample = reader.samples(SCENES[0])[1]
        return {
            k.removeprefix("table:"): v for k, v in reader.input_manifest(sample, frozenset(parts)) if k.startswith("table:")
        }

    before = digests(tree)
    edited = Tree(tmp_path)
    next(a for a in edited.tables["sample_annotation"] if a["sample_token"] == token(SCENES[0], "sample", 1))["size"] = [
        1.0,
        2.0,
        3.0,
    ]
    assert {k for k, v in digests(edited.write()).items() if v != before[k]} == {"boxes"}
    edited = Tree(tmp_path)
    edited.tables["ego_pose"] = [
        dict(r, translation=[r["translation"][0] + 0.01, *r["translation"][1:]])
        if r["token"] == edited.data("CAM_BACK", 1)["ego_pose_token"]
        else r
        for r in edited.tables["ego_pose"]
    ]
    assert {k for k, v in digests(edited.write()).items() if v != before[k]} == {"cameras"}


def test_more_sweeps_change_only_the_multi_sweep_parts(tree: Tree) -> None:
    def digests(n: int) -> dict[str, str]:
        reader = tree.open(lidar_sweeps=n)
        sample = reader.samples(SCENES[0])[1]
        return dict(reader.input_manifest(sample, frozenset({"boxes", "cameras", "lidar_key", "lidar", "radar"}))[-6:])

    one, three = digests(1), digests(3)
    assert {k for k in one if one[k] != three[k]} == {"table:lidar"}


def test_boxes_have_their_numbers(tree: Tree) -> None:
    first, second, _ = tree.open().samples(SCENES[0])
    assert first.boxes.label.tolist() == [0, 8] and second.boxes.label.tolist() == [0, -1]
    assert first.boxes.track.tolist() == [0, 1] and second.boxes.track.tolist() == [0, 2]
    assert first.boxes.attribute.tolist() == [0, -1] and first.boxes.visibility.tolist() == [4, 0]
    assert first.boxes.size_lwh_m[0].tolist() == [4.5, 1.9, 1.6]
    assert first.boxes.num_lidar.tolist() == [12, 0] and first.boxes.num_radar.tolist() == [1, 0]


def test_box_velocities_and_yaws_equal_the_devkits(tree: Tree, devkit: NuScenes) -> None:
    known = 0
    for sample in tree.open().samples(SCENES[0]):
        boxes = sample.boxes
        rotate = sample.global_from_ego.inverse()
        for i, name in enumerate(boxes.token):
            expected = rotate.vectors(devkit.box_velocity(name))[:2]
            np.testing.assert_allclose(boxes.velocity_mps[i], expected, atol=1e-9)
            known += bool(np.isfinite(expected).all())
            box = devkit.get_box(name)
            box.translate(-sample.global_from_ego.translation_m)
            box.rotate(Quaternion(matrix=rotate.rotation))
            np.testing.assert_allclose(boxes.centre_m[i], box.center, atol=1e-9)
            assert abs(boxes.yaw_rad[i] - np.arctan2(*box.rotation_matrix[[1, 0], 0])) < 1e-9
    assert known == 5  # the single annotation has none


def test_reference_channel_moves_ego(tree: Tree, devkit: NuScenes) -> None:
    radar = tree.open(("RADAR_FRONT", "RADAR_BACK_LEFT")).samples(SCENES[0])[1]
    assert radar.timestamp_us == radar.radar["RADAR_FRONT"][0].timestamp_us and radar.lidar == () and radar.cameras == ()
    data = devkit.get("sample_data", devkit.get("sample", radar.token)["data"]["RADAR_FRONT"])
    np.testing.assert_allclose(
        radar.global_from_ego.translation_m, devkit.get("ego_pose", data["ego_pose_token"])["translation"]
    )
    np.testing.assert_allclose(radar.ego_from_reference.translation_m, [3.4, 0, 0.5], atol=1e-12)
    lidar = tree.open(("RADAR_FRONT",), reference_channel="LIDAR_TOP").samples(SCENES[0])[1]
    assert lidar.timestamp_us == radar.timestamp_us - 16_227  # the row is enough, no file is opened
    assert np.linalg.norm(lidar.global_from_ego.translation_m - radar.global_from_ego.translation_m) > 0.01


def test_declared_sensor_that_a_sample_lacks(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.tables["sample_data"].remove(tree.data("CAM_BACK", 1))
    with pytest.raises(InputDataError, match="no CAM_BACK") as caught:
        tree.write().open().samples(SCENES[0])
    details = caught.value.details
    assert details["token"] == token(SCENES[0], "sample", 1) and details["channel"] == "CAM_BACK"
    assert details["file"] == "sample_data.json" and "--sensors LIDAR_TOP,CAM_FRONT,RADAR_FRONT" in details["next"]
    assert len(tree.open(("LIDAR_TOP", "CAM_FRONT")).samples(SCENES[0])) == 3
    with pytest.raises(InputDataError, match=r"no CAM_FRONT_RIGHT, .*RADAR_BACK_RIGHT"):
        tree.open(None).samples(SCENES[1])


def test_unknown_sensor_and_reference(tree: Tree) -> None:
    with pytest.raises(UsageError, match="unknown sensor") as caught:
        tree.open(("LIDAR_TOP", "LIDAR_TOPP"))
    assert "RADAR_BACK_RIGHT" in caught.value.details["expected"] and caught.value.details["found"] == "LIDAR_TOPP"
    with pytest.raises(UsageError, match="no sensor"):
        tree.open(())
    with pytest.raises(UsageError, match="reference channel"):
        tree.open(reference_channel="EGO")


def test_test_split_has_no_boxes(tmp_path: Path) -> None:
    tree = Tree(tmp_path, version="v1.0-test")
    for scene, name in zip(tree.tables["scene"], ("scene-0077", "scene-0078"), strict=True):
        scene["name"] = name
    tree.tables["sample_annotation"], tree.tables["instance"] = [], []
    reader = tree.write().open()
    assert reader.scene_names("test") == ("scene-0077", "scene-0078")
    assert [s.boxes for s in reader.samples("scene-0077")] == [None, None, None]
    assert {s.split for s in reader.samples("scene-0078")} == {"test"}


def test_sample_without_boxes(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.tables["sample_annotation"], tree.tables["instance"] = [], []
    assert [len(s.boxes) for s in tree.write().open().samples(SCENES[0])] == [0, 0, 0]


def test_missing_scene_and_missing_file_are_told_apart(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no scene"):
        tree.open().samples("scene-0001")
    other = Tree(tmp_path)
    other.file("CAM_FRONT", 2).unlink()
    reader = other.open()
    sample = reader.samples(SCENES[0])[2]
    with pytest.raises(SourceMissingError) as caught:
        reader.read(sample, frozenset({"images"}))
    assert caught.value.details["file"] == sample.cameras[0].path and caught.value.details["token"] == sample.token
    with pytest.raises(SourceMissingError):
        reader.input_manifest(sample, frozenset({"images"}))
