"""The reader and the fields against the devkit on genuine nuScenes files. One devkit load per folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import RadarPointCloud
from nuscenes.utils.geometry_utils import transform_matrix
from nuscenes.utils.splits import create_splits_scenes
from pyquaternion import Quaternion

from imkd_data.fields import PROFILES, fields_by_name
from imkd_data.fields.boxes import BOX_COLUMNS
from imkd_data.fields.depth import decode_depth
from imkd_data.geometry import rotation_from_quaternion, yaw_from_rotation
from imkd_data.kernels.boxes import points_in_boxes
from imkd_data.readers import SPLITS
from imkd_data.readers.nuscenes import NUSCENES, NuScenesReader, open_nuscenes
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload

pytestmark = pytest.mark.real_data
SENSORS = ("LIDAR_TOP", *NUSCENES.cameras, "RADAR_FRONT")
RECIPE = Recipe(
    version="v1.0-mini", splits=("mini_train",), sensors=SENSORS, reference_channel="LIDAR_TOP", fields=PROFILES["full"]
)


@pytest.fixture(scope="module")
def devkit(real_keyframe: Path) -> NuScenes:
    return NuScenes("v1.0-mini", str(real_keyframe), verbose=False)


@pytest.fixture(scope="module")
def reader(real_keyframe: Path) -> NuScenesReader:
    return open_nuscenes(real_keyframe, "v1.0-mini", sensors=SENSORS)


@pytest.fixture(scope="module")
def payload(reader: NuScenesReader) -> Payload:
    return reader.read(reader.samples("scene-0061")[0], frozenset({"images", "lidar", "radar"}))


@pytest.fixture(scope="module")
def row(payload: Payload) -> dict[str, object]:
    """Every stored field of the keyframe."""
    out: dict[str, object] = {}
    for name, field in fields_by_name(PROFILES["full"]).items():
        out[name] = field.compute(payload, RECIPE, NUSCENES, out, {})
    return out


def chain(devkit: NuScenes, data: dict) -> tuple[np.ndarray, np.ndarray]:
    """global_from_vehicle, vehicle_from_sensor of a sample_data record, 4x4 float64, by the devkit."""
    pose = devkit.get("ego_pose", data["ego_pose_token"])
    cal = devkit.get("calibrated_sensor", data["calibrated_sensor_token"])
    return (
        transform_matrix(pose["translation"], Quaternion(pose["rotation"])),
        transform_matrix(cal["translation"], Quaternion(cal["rotation"])),
    )


def devkit_projection(devkit: NuScenes, payload: Payload, channel: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and depth of all LiDAR points by the devkit's chain, in float64 (its own class rounds to float32 on the way)."""
    data = devkit.get("sample", payload.sample.token)["data"]
    lidar, camera = devkit.get("sample_data", data["LIDAR_TOP"]), devkit.get("sample_data", data[channel])
    (g_l, v_l), (g_c, v_c) = chain(devkit, lidar), chain(devkit, camera)
    matrix = np.linalg.inv(v_c) @ np.linalg.inv(g_c) @ g_l @ v_l
    xyz = payload.lidar[0].xyz_m.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    k = np.array(devkit.get("calibrated_sensor", camera["calibrated_sensor_token"])["camera_intrinsic"])
    uvw = xyz @ k.T
    return uvw[:, :2] / uvw[:, 2:], xyz[:, 2]


def inside(uv: np.ndarray, depth: np.ndarray, margin: float = 0.0) -> np.ndarray:
    low, high = -0.5 + margin, np.array([1599.5, 899.5]) - margin
    return (depth > 1e-3) & (uv >= low).all(1) & (uv < high).all(1)


def test_splits_equal_the_devkits() -> None:
    theirs = create_splits_scenes()
    for name, scenes in SPLITS.items():
        assert sorted(theirs[name]) == list(scenes)
    assert set(SPLITS) == {"train", "val", "test", "mini_train", "mini_val"}


@pytest.mark.parametrize("channel", NUSCENES.cameras)
def test_lidar_to_camera_before_quantisation(devkit: NuScenes, payload: Payload, channel: str) -> None:
    frame = next(f for f in payload.sample.cameras if f.camera.name == channel)
    pose = frame.camera.ego_from_camera.inverse() @ payload.sample.lidar[0].ego_from_sensor
    uv, depth = frame.camera.project(pose.points(payload.lidar[0].xyz_m))
    expected_uv, expected_depth = devkit_projection(devkit, payload, channel)
    seen = inside(expected_uv, expected_depth)
    assert seen.sum() > 3000
    assert np.abs(uv - expected_uv)[seen].max() < 0.01
    assert np.abs(depth - expected_depth).max() < 1e-3


def test_stored_depth_within_half_a_step(devkit: NuScenes, payload: Payload, row: dict) -> None:
    views = decode_depth(row["depth_points"], row["depth_count"])
    ring = payload.lidar[0].column("ring")
    for v, channel in enumerate(NUSCENES.cameras):
        uv, depth = devkit_projection(devkit, payload, channel)
        order = np.argsort(ring, kind="stable")
        kept = order[inside(uv[order], depth[order])]
        assert len(kept) == len(views[v]) == row["depth_count"][v]
        assert np.abs(views[v][:, :2] - uv[kept]).max() <= 1 / 64 + 1e-4
        assert np.abs(views[v][:, 2] - depth[kept]).max() <= 1 / 512 + 1e-5
        n = len(kept)
        np.testing.assert_array_equal(row["depth_intensity"][v, :n], payload.lidar[0].column("intensity")[kept])
        assert not row["depth_intensity"][v, n:].any() and not row["depth_points"][v, :, n:].any()


def test_all_18_raw_radar_fields(devkit: NuScenes, payload: Payload) -> None:
    RadarPointCloud.disable_filters()
    try:
        data = devkit.get("sample_data", devkit.get("sample", payload.sample.token)["data"]["RADAR_FRONT"])
        theirs = RadarPointCloud.from_file(f"{devkit.dataroot}/{data['filename']}").points
    finally:
        RadarPointCloud.default_filters()
    ours = payload.radar["RADAR_FRONT"][0]
    assert ours.feature_names == NUSCENES.radar_columns and ours.features.shape == (125, 18)
    np.testing.assert_array_equal(ours.features, theirs.T.astype(np.float32))


def test_radar_in_ego_within_half_a_step(devkit: NuScenes, payload: Payload, row: dict) -> None:
    record = devkit.get("sample", payload.sample.token)["data"]
    (g_l, _), (g_r, v_r) = (chain(devkit, devkit.get("sample_data", record[c])) for c in ("LIDAR_TOP", "RADAR_FRONT"))
    ego = np.linalg.inv(g_l) @ g_r @ v_r
    raw = payload.radar["RADAR_FRONT"][0].features.astype(np.float64)
    at = {c: i for i, c in enumerate(NUSCENES.radar_columns)}
    xyz = raw[:, :3] @ ego[:3, :3].T + ego[:3, 3]
    field = fields_by_name(["radar_points"])["radar_points"]
    decoded = field.decode(field.unpack(row["radar_points"], NUSCENES), RECIPE, NUSCENES)
    assert np.abs(decoded["xyz_m"] - xyz).max() <= 0.005 + 1e-5
    for pair in (("vx", "vy"), ("vx_comp", "vy_comp")):
        flat = np.c_[raw[:, [at[pair[0]], at[pair[1]]]], np.zeros(len(raw))]
        expected = flat @ ego[:3, :3].T
        for i, name in enumerate(pair):
            assert np.abs(decoded[name] - expected[:, i]).max() <= 1 / 512 + 1e-5
    assert np.abs(decoded["rcs"] - raw[:, at["rcs"]]).max() <= 0.25
    whole = set(NUSCENES.radar_columns) - {"x", "y", "z", "rcs", "vx", "vy", "vx_comp", "vy_comp"}
    assert len(whole) == 10
    for name in whole:
        np.testing.assert_array_equal(decoded[name], raw[:, at[name]])
    assert set(decoded["sensor"]) == {0} and set(decoded["sweep"]) == {0}
    assert abs(decoded["age"][0] - (1532402927647951 - 1532402927664178) * 1e-6) <= 0.0005
    np.testing.assert_allclose(row["radar_pose"][0, 0, :12], ego[:3].reshape(12), atol=1e-9)
    assert np.isnan(row["radar_pose"][1:]).all() and np.isnan(row["radar_pose"][0, 1:]).all()


def test_every_box_holds_its_points(devkit: NuScenes, reader: NuScenesReader, payload: Payload) -> None:
    """69 of 69. In global, where boxes stand upright; ego is tilted by half a degree here."""
    sample = payload.sample
    xyz = (sample.global_from_ego @ sample.lidar[0].ego_from_sensor).points(payload.lidar[0].xyz_m)
    records = [devkit.get("sample_annotation", t) for t in sample.boxes.token]
    yaw = yaw_from_rotation(rotation_from_quaternion([r["rotation"] for r in records]))
    centre = sample.global_from_ego.points(sample.boxes.centre_m)
    np.testing.assert_allclose(centre, [r["translation"] for r in records], atol=1e-9)
    counts = points_in_boxes(xyz, centre, sample.boxes.size_lwh_m, yaw)
    assert counts.tolist() == [r["num_lidar_pts"] for r in records] and len(counts) == 69


def test_stored_boxes_equal_the_devkits(devkit: NuScenes, payload: Payload, row: dict) -> None:
    ego = payload.sample.global_from_ego.inverse()
    at = {c: i for i, c in enumerate(BOX_COLUMNS)}
    stored = row["boxes"]
    assert stored[:, at["present"]].sum() == 69 and not stored[69:].any()
    for i, name in enumerate(payload.sample.boxes.token):
        box = devkit.get_box(name)
        box.translate(-payload.sample.global_from_ego.translation_m)
        box.rotate(Quaternion(matrix=ego.rotation))
        np.testing.assert_allclose(stored[i, 1:4], box.center, atol=1e-5)
        np.testing.assert_allclose(stored[i, 4:7], box.wlh[[1, 0, 2]], atol=1e-6)
        heading = np.arctan2(*box.rotation_matrix[[1, 0], 0])
        assert abs(np.exp(1j * heading) - np.exp(1j * stored[i, at["yaw"]])) < 1e-6
    assert not stored[:, at["velocity_known"]].any()  # one keyframe: no velocity can be known
    has_points = [any((r["num_lidar_pts"], r["num_radar_pts"])) for r in map(_record(devkit), payload.sample.boxes.token)]
    assert stored[:69, at["valid"]].astype(bool).tolist() == has_points


def _record(devkit: NuScenes):
    return lambda name: devkit.get("sample_annotation", name)


def test_total_count_is_the_points_inside(payload: Payload, row: dict) -> None:
    """Counted apart from the kernel: ego coordinates by the pose, the grid by BevGrid.cells, boxes by comparison."""
    xyz = payload.sample.lidar[0].ego_from_sensor.points(payload.lidar[0].xyz_m)
    _, _, in_grid = RECIPE.grid.cells(xyz[:, :2])
    x0, x1, y0, y1, z0, z1 = RECIPE.own_car_box_m
    x, y, z = xyz.T
    own = (x >= x0) & (x < x1) & (y >= y0) & (y < y1) & (z >= z0) & (z < z1)
    tall = (z >= RECIPE.z_min_m) & (z < RECIPE.z_min_m + RECIPE.z_span_m)
    kept = in_grid & ~own & tall
    assert int(row["lidar_bev_count"].sum()) == int(kept.sum()) > 20_000
    assert int(row["lidar_bev_sum"].sum()) == int(payload.lidar[0].column("intensity")[kept].sum())


def test_scaled_images_stay_above_40_db(payload: Payload, row: dict) -> None:
    import io

    import simplejpeg
    from PIL import Image

    for name, data in payload.images.items():
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((880, 495), Image.Resampling.BICUBIC))
        ours = simplejpeg.decode_jpeg(row["images"][f"{name.lower()}.jpg"], "RGB")
        error = np.mean((ours.astype(np.float64) - reference) ** 2)
        assert 10 * np.log10(255**2 / error) > 40, name


def test_velocities_of_mini_val_equal_the_devkits(real_radar: Path) -> None:
    devkit = NuScenes("v1.0-mini", str(real_radar), verbose=False)
    reader = open_nuscenes(real_radar, "v1.0-mini", sensors=("RADAR_FRONT",))
    known = boxes = 0
    for scene in reader.scene_names("mini_val"):
        for sample in reader.samples(scene):
            rotate = sample.global_from_ego.inverse()
            expected = rotate.vectors(np.array([devkit.box_velocity(t) for t in sample.boxes.token]).reshape(-1, 3))[:, :2]
            np.testing.assert_allclose(sample.boxes.velocity_mps, expected, atol=1e-9)
            known += int(np.isfinite(expected).all(axis=1).sum())
            boxes += len(expected)
    assert boxes == 4514 and known > 4000


def test_all_genuine_radar_scans_equal_the_devkits(real_radar: Path) -> None:
    """81 scans, among them padded and full ones: every raw field equal; nothing odd, nothing dropped."""
    reader = open_nuscenes(real_radar, "v1.0-mini", sensors=("RADAR_FRONT",), radar_sweeps=1)
    RadarPointCloud.disable_filters()
    try:
        sizes = []
        for scene in reader.scene_names("mini_val"):
            for sample in reader.samples(scene):
                payload = reader.read(sample, frozenset({"radar"}))
                theirs = RadarPointCloud.from_file(str(real_radar / payload.files[0][0])).points
                np.testing.assert_array_equal(payload.radar["RADAR_FRONT"][0].features, theirs.T.astype(np.float32))
                assert payload.dropped == {} and payload.warnings == {}
                sizes.append(theirs.shape[1])
    finally:
        RadarPointCloud.default_filters()
    assert len(sizes) == 81 and max(sizes) == 125
