"""Fields on the tiny tree: shapes, decoding, sensors that are not there, overflow, purity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imkd_data.errors import CacheDamageError, InputDataError, UsageError
from imkd_data.fields import FIELDS, PROFILES, CacheField, fields_by_name
from imkd_data.fields.boxes import BOX_COLUMNS
from imkd_data.fields.codec import array_from_part, part_from_array
from imkd_data.fields.depth import decode_depth
from imkd_data.fields.radar import radar_rows
from imkd_data.geometry import BevGrid
from imkd_data.readers.nuscenes import NUSCENES
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload
from tests.imkd_data.readers.tiny_tree import CHANNELS, SCENES, Tree

GRID = BevGrid(x_min_m=-25.6, y_min_m=-12.8, cell_m=0.4, nx=112, ny=96)
EVERYTHING = frozenset({"images", "lidar", "radar"})


def recipe_for(sensors: tuple[str, ...] = CHANNELS, **changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "version": "v1.0-mini",
        "splits": ("mini_train",),
        "sensors": sensors,
        "reference_channel": "LIDAR_TOP",
        "fields": PROFILES["full"],
        "grid": GRID,
        "image_hw_px": (26, 52),
        "depth_width": 512,
        "boxes_width": 8,
    }
    return Recipe(**{**base, **changes})


def compute(
    payload: Payload, recipe: Recipe, names: tuple[str, ...] = PROFILES["full"]
) -> tuple[dict[str, Any], dict[str, dict]]:
    row: dict[str, Any] = {}
    drops: dict[str, dict[str, int]] = {}
    for name, field in fields_by_name(names).items():
        drops[name] = {}
        row[name] = field.compute(payload, recipe, NUSCENES, row, drops[name])
    return row, drops


def decoded(name: str, row: Mapping[str, Any], recipe: Recipe) -> Any:
    field = fields_by_name([name])[name]
    value = field.unpack(row[name], NUSCENES) if field.unpack else row[name]
    return field.decode(value, recipe, NUSCENES) if field.decode else value


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("fields"))


@pytest.fixture(scope="module")
def payload(tree: Tree) -> Payload:
    reader = tree.open(lidar_sweeps=4, radar_sweeps=3)
    return reader.read(reader.samples(SCENES[0])[2], EVERYTHING)


@pytest.fixture(scope="module")
def row(payload: Payload) -> dict[str, Any]:
    return compute(payload, recipe_for())[0]


def test_names_are_those_of_the_format() -> None:
    assert PROFILES["standard"] == (*PROFILES["student"], "lidar_points")
    assert PROFILES["full"] == (*PROFILES["standard"], "lidar_provenance")
    assert {f.name for f in FIELDS} == set(PROFILES["full"]) and len(PROFILES["student"]) == 14


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_shape_and_dtype_are_as_declared(field: CacheField, row: dict[str, Any]) -> None:
    value, recipe = row[field.name], recipe_for()
    if field.kind == "array":
        assert value.shape == field.shape(recipe, NUSCENES) and value.dtype == field.dtype
    else:
        assert value and all(isinstance(v, bytes) for v in value.values())
    assert isinstance(field.attributes(recipe, NUSCENES), dict)
    assert set(field.uses) <= set(recipe.as_dict())


def test_expected_shapes_of_the_standard_recipe() -> None:
    recipe = Recipe(version="v", splits=("train",), sensors=CHANNELS, reference_channel="LIDAR_TOP", fields=())
    shapes = {f.name: (f.shape(recipe, NUSCENES), f.dtype.str) for f in FIELDS if f.shape}
    assert shapes == {
        "lidar_bev_sum": ((512, 512), "<u4"),
        "lidar_bev_count": ((512, 512), "<u2"),
        "lidar_bev_max": ((512, 512), "|u1"),
        "lidar_bev_z_of_max": ((512, 512), "|u1"),
        "lidar_intensity": ((4, 128, 128), "|u1"),
        "lidar_provenance": ((3, 512, 512), "|u1"),
        "depth_points": ((6, 3, 6144), "<u2"),
        "depth_intensity": ((6, 6144), "|u1"),
        "depth_count": ((6,), "<u2"),
        "radar_pose": ((5, 13, 13), "<f8"),
        "camera_calibration": ((6, 34), "<f8"),
        "sample_pose": ((2, 12), "<f8"),
        "boxes": ((256, 20), "<f4"),
    }


def test_computing_twice_gives_equal_bytes(tree: Tree, payload: Payload, row: dict[str, Any]) -> None:
    reader = tree.open(lidar_sweeps=4, radar_sweeps=3)
    again, _ = compute(reader.read(reader.samples(SCENES[0])[2], EVERYTHING), recipe_for())
    alone = {}
    for name in reversed(PROFILES["student"]):  # another order, nothing shared
        if not fields_by_name([name])[name].upstream:
            alone[name] = compute(payload, recipe_for(), (name,))[0][name]
    for name, value in row.items():
        for other in (again, alone):
            if name in other:
                same = other[name] == value if isinstance(value, dict) else other[name].tobytes() == value.tobytes()
                assert same, name


def test_lidar_planes_hold_all_sweeps(payload: Payload, row: dict[str, Any]) -> None:
    recipe = recipe_for()
    ego = np.concatenate([s.ego_from_sensor.points(p.xyz_m) for s, p in zip(payload.sample.lidar, payload.lidar, strict=True)])
    _, _, inside = GRID.cells(ego[:, :2])
    drops = compute(payload, recipe)[1]["lidar_bev_count"]
    assert row["lidar_bev_count"].sum() == inside.sum() - drops["own_car"] - drops["outside_z_span"]
    assert drops["outside_grid"] == (~inside).sum() and drops["own_car"] > 0 and len(payload.lidar) == 4


def test_lidar_intensity_decodes_to_physical(row: dict[str, Any]) -> None:
    recipe = recipe_for()
    view = decoded("lidar_intensity", row, recipe)
    assert view.shape == (4, 24, 28) and view.dtype == np.float32
    count = row["lidar_bev_count"].reshape(24, 4, 28, 4).sum((1, 3))
    total = row["lidar_bev_sum"].astype(np.int64).reshape(24, 4, 28, 4).sum((1, 3))
    np.testing.assert_array_equal(view[2], np.minimum(count, 255))
    full = count > 0
    assert np.abs(view[0] - total / np.maximum(count, 1) / 255)[full].max() <= 0.5 / 255 + 1e-6
    assert view[1].max() <= 1 and not view[:, ~full].any()
    assert view[3][full].min() >= recipe.z_min_m and view[3][full].max() <= recipe.z_min_m + recipe.z_span_m


def test_height_codes_are_within_half_a_step(payload: Payload) -> None:
    """The height of the strongest return: 8 m in 255 steps, so 1.6 cm (and 1 mm of the floor)."""
    recipe = recipe_for(lidar_sweeps=1)
    one = Payload(sample=payload.sample, lidar=payload.lidar[:1])
    from dataclasses import replace

    one = replace(one, sample=replace(payload.sample, lidar=payload.sample.lidar[:1]))
    row, _ = compute(one, recipe, ("lidar_bev_count", "lidar_bev_z_of_max", "lidar_bev_max"))
    z = decoded("lidar_bev_z_of_max", row, recipe)
    ego = payload.sample.lidar[0].ego_from_sensor.points(payload.lidar[0].xyz_m)
    r, c, inside = GRID.cells(ego[:, :2])
    single = inside & np.isin(r * GRID.nx + c, np.flatnonzero(row["lidar_bev_count"].ravel() == 1))
    kept = single & (ego[:, 2] > -3) & (ego[:, 2] < 5)
    error = np.abs(z[r[kept], c[kept]] - ego[kept, 2])
    assert kept.sum() > 100 and np.quantile(error, 0.99) <= 4 / 255 + 0.001


def test_lidar_points_decode(payload: Payload, row: dict[str, Any]) -> None:
    points = decoded("lidar_points", row, recipe_for())
    ego = np.concatenate([s.ego_from_sensor.points(p.xyz_m) for s, p in zip(payload.sample.lidar, payload.lidar, strict=True)])
    assert np.abs(points["xyz_m"] - ego).max() <= 0.005 + 1e-5
    np.testing.assert_array_equal(points["intensity"], np.concatenate([p.column("intensity") for p in payload.lidar]))
    np.testing.assert_array_equal(points["ring"], np.concatenate([p.column("ring") for p in payload.lidar]))
    assert points["sweep"].tolist() == np.repeat(np.arange(4), 2048).tolist()
    np.testing.assert_allclose(points["age_s"], np.repeat([0, 0.1, 0.2, 0.3], 2048), atol=1e-6)
    np.testing.assert_array_equal(points["pose"][3, :12], payload.sample.lidar[3].ego_from_sensor.matrix34())


def test_radar_points_are_all_sensors_and_sweeps(payload: Payload, row: dict[str, Any]) -> None:
    stored = fields_by_name(["radar_points"])["radar_points"].unpack(row["radar_points"], NUSCENES)
    assert stored.dtype == np.int16 and stored.shape == (21, sum(len(p) for s in payload.radar.values() for p in s))
    radar = decoded("radar_points", row, recipe_for())
    at = 0
    for channel in ("RADAR_FRONT", "RADAR_BACK_LEFT"):
        for k, (sweep, points) in enumerate(zip(payload.sample.radar[channel], payload.radar[channel], strict=True)):
            part = slice(at, at + len(points))
            at += len(points)
            assert set(radar["sensor"][part]) == {NUSCENES.radars.index(channel)} and set(radar["sweep"][part]) == {k}
            pose = sweep.ego_from_sensor
            assert np.abs(radar["xyz_m"][part] - pose.points(points.xyz_m)).max() <= 0.005 + 1e-5
            flat = np.c_[points.column("vx_comp"), points.column("vy_comp"), np.zeros(len(points))]
            velocity = np.stack([radar["vx_comp"][part], radar["vy_comp"][part]], axis=1)
            assert np.abs(velocity - pose.vectors(flat)[:, :2]).max() <= 1 / 512 + 1e-5
            np.testing.assert_array_equal(radar["dyn_prop"][part], points.column("dyn_prop"))
            np.testing.assert_array_equal(radar["id"][part], points.column("id"))
            age = (payload.sample.timestamp_us - sweep.timestamp_us) * 1e-6
            assert np.abs(radar["age"][part] - age).max() <= 0.0005 + 1e-6
    assert radar_rows(NUSCENES)[:10] == ("x", "y", "z", "vx", "vy", "vx_comp", "vy_comp", "rcs", "dyn_prop", "id")
    assert radar_rows(NUSCENES)[-3:] == ("sensor", "sweep", "age") and len(radar_rows(NUSCENES)) == 21


def test_absent_radars_and_sweeps_are_nan(payload: Payload, row: dict[str, Any]) -> None:
    pose = row["radar_pose"]
    there = np.isfinite(pose).all(axis=2)
    assert there[:, :3].all(axis=1).tolist() == [True, False, False, True, False] and not there[:, 3:].any()
    np.testing.assert_allclose(pose[3, 1, :12], payload.sample.radar["RADAR_BACK_LEFT"][1].ego_from_sensor.matrix34())
    assert pose[0, 0, 12] == pytest.approx(-0.016227)


def test_absent_cameras_are_nan_and_empty(payload: Payload, row: dict[str, Any]) -> None:
    cameras = decoded("camera_calibration", row, recipe_for())
    there = [True, False, False, True, False, False]
    assert np.isfinite(cameras["age_s"]).tolist() == there
    assert (row["depth_count"] > 0).tolist() == there
    frame = payload.sample.cameras[1]
    np.testing.assert_array_equal(cameras["image_from_camera"][3], frame.camera.image_from_camera)
    np.testing.assert_array_equal(cameras["ego_from_camera"][3].ravel(), frame.camera.ego_from_camera.matrix34())
    np.testing.assert_array_equal(cameras["vehicle_from_camera"][3][:, 3], [0.0, 0.0, 1.55])
    assert cameras["age_s"][0] == pytest.approx(0.035) and cameras["age_s"][3] == pytest.approx(-0.0015)
    assert list(decoded("images", row, recipe_for())) == ["CAM_FRONT", "CAM_BACK"]


def test_depth_points_within_half_a_step(payload: Payload, row: dict[str, Any]) -> None:
    views = decode_depth(row["depth_points"], row["depth_count"])
    for frame in payload.sample.cameras:
        camera = frame.camera
        pose = camera.ego_from_camera.inverse() @ payload.sample.lidar[0].ego_from_sensor
        uv, depth = camera.project(pose.points(payload.lidar[0].xyz_m))
        order = np.argsort(payload.lidar[0].column("ring"), kind="stable")
        size = np.array([camera.width_px, camera.height_px])
        with np.errstate(invalid="ignore"):
            kept = order[((uv >= -0.5) & (uv < size - 0.5)).all(1)[order]]
        ours = views[NUSCENES.cameras.index(camera.name)]
        assert len(ours) == len(kept) > 20
        assert (
            np.abs(ours[:, :2] - uv[kept]).max() <= 1 / 64 + 1e-4 and np.abs(ours[:, 2] - depth[kept]).max() <= 1 / 512 + 1e-5
        )


def test_poses_are_exact(payload: Payload, row: dict[str, Any]) -> None:
    poses = decoded("sample_pose", row, recipe_for())
    np.testing.assert_array_equal(poses["global_from_ego"], payload.sample.global_from_ego.matrix()[:3])
    np.testing.assert_allclose(poses["ego_from_reference"][:, 3], [0.94, 0, 1.84], atol=1e-12)


def test_boxes_decode(payload: Payload, row: dict[str, Any]) -> None:
    boxes, truth = decoded("boxes", row, recipe_for()), payload.sample.boxes
    np.testing.assert_allclose(boxes.centre_m, truth.centre_m, atol=1e-5)
    np.testing.assert_allclose(boxes.velocity_mps, truth.velocity_mps, atol=1e-5)
    for name in ("label", "num_lidar", "num_radar", "attribute", "visibility", "track"):
        np.testing.assert_array_equal(getattr(boxes, name), getattr(truth, name))
    stored = row["boxes"]
    at = {c: i for i, c in enumerate(BOX_COLUMNS)}
    assert stored[:3, at["ignored"]].tolist() == [0, 1, 0] and stored[:3, at["present"]].tolist() == [1, 1, 0]


def test_unknown_velocity_is_never_a_standstill(tree: Tree) -> None:
    reader = tree.open()
    first = reader.read(reader.samples(SCENES[0])[0], frozenset())
    row, _ = compute(first, recipe_for(), ("boxes",))
    at = {c: i for i, c in enumerate(BOX_COLUMNS)}
    assert row["boxes"][:2, at["velocity_known"]].tolist() == [1, 0] and not row["boxes"][1, 8:10].any()
    assert np.isnan(decoded("boxes", row, recipe_for()).velocity_mps[1]).all()
    assert row["boxes"][:2, at["valid"]].tolist() == [1, 0]  # the second has no point at all and stays


def test_no_boxes_and_no_annotations(payload: Payload) -> None:
    from dataclasses import replace

    from imkd_data.sample import Boxes

    empty = replace(payload, sample=replace(payload.sample, boxes=Boxes.empty("ego")))
    row, _ = compute(empty, recipe_for(), ("boxes",))
    assert not row["boxes"].any() and len(decoded("boxes", row, recipe_for())) == 0
    absent = replace(payload, sample=replace(payload.sample, boxes=None))
    with pytest.raises(InputDataError, match="no annotations"):
        compute(absent, recipe_for(), ("boxes",))


def test_no_radar_points_at_all(payload: Payload) -> None:
    from dataclasses import replace

    none = {
        c: tuple(replace(p, xyz_m=p.xyz_m[:0], time_s=p.time_s[:0], features=p.features[:0]) for p in s)
        for c, s in payload.radar.items()
    }
    row, _ = compute(replace(payload, radar=none), recipe_for(), ("radar_points",))
    radar = decoded("radar_points", row, recipe_for())
    assert radar["xyz_m"].shape == (0, 3) and radar["rcs"].shape == (0,)


def test_radar_outside_the_codes_is_counted(payload: Payload) -> None:
    from dataclasses import replace

    scans = payload.radar["RADAR_FRONT"]
    features = scans[0].features.copy()
    features[0, 6] = 140.0  # vx beyond 128 m/s
    bad = replace(payload, radar={**payload.radar, "RADAR_FRONT": (replace(scans[0], features=features), *scans[1:])})
    row, drops = compute(bad, recipe_for(), ("radar_points",))
    assert drops["radar_points"] == {"out_of_range": 1}
    assert len(decoded("radar_points", row, recipe_for())["x"]) == sum(len(p) for s in payload.radar.values() for p in s) - 1


def test_depth_overflow_stops_or_drops_the_farthest(payload: Payload, row: dict[str, Any]) -> None:
    counts = row["depth_count"]
    width = int(counts.max()) - 5
    with pytest.raises(InputDataError) as caught:
        compute(payload, recipe_for(depth_width=width), ("depth_points",))
    assert caught.value.details["found"] == str(counts.max()) and caught.value.details["token"] == payload.sample.token
    assert "--set depth_width=1024" in caught.value.details["next"]
    recipe = recipe_for(depth_width=width, options={"on_overflow": "drop-far"})
    cut, drops = compute(payload, recipe, ("depth_points", "depth_count", "depth_intensity"))
    v = int(counts.argmax())
    assert (
        cut["depth_count"][v] == width and drops["depth_points"]["overflow"] == np.maximum(counts.astype(int) - width, 0).sum()
    )
    kept, every = cut["depth_points"][v, 2], np.sort(row["depth_points"][v, 2, : counts[v]])
    assert np.sort(kept).tolist() == every[:width].tolist()
    np.testing.assert_array_equal(cut["depth_points"][v, :, :1], row["depth_points"][v, :, :1])  # the order stays


@pytest.mark.parametrize(("width", "height", "fits"), [(2048, 2048, True), (2049, 900, False), (900, 3840, False)])
def test_depth_refuses_images_that_its_codes_cannot_hold(payload: Payload, width: int, height: int, fits: bool) -> None:
    """Codes are 1/32 px in 16 bits: beyond 2,048 px they would wrap, in silence."""
    from dataclasses import replace

    wide = replace(
        payload.sample.cameras[0], camera=replace(payload.sample.cameras[0].camera, width_px=width, height_px=height)
    )
    sample = replace(payload.sample, cameras=(wide, *payload.sample.cameras[1:]))
    suite = replace(NUSCENES, image_hw_px=(height, width))
    name = wide.camera.name
    if fits:
        compute(replace(payload, sample=sample), recipe_for(depth_width=4096), ("depth_points",))
        assert fields_by_name(["depth_points"])["depth_points"].attributes(recipe_for(), suite)["cameras"]
        return
    for field in ("depth_points", "depth_intensity", "depth_count"):
        with pytest.raises(InputDataError) as caught:
            compute(replace(payload, sample=sample), recipe_for(), (field,))
        error = caught.value
        assert error.rule == "depth.image_size" and error.details["channel"] == name
        assert error.details["found"] == f"{width} x {height}" and error.details["token"] == sample.token
        assert "leave the depth fields out" in error.details["next"]
        with pytest.raises(InputDataError) as caught:  # what a build writes before it touches the cache or reads a sample
            fields_by_name([field])[field].attributes(recipe_for(), suite)
        assert caught.value.rule == "depth.image_size" and caught.value.details["found"] == f"{width} x {height}"
    assert fields_by_name(["depth_points"])["depth_points"].shape(recipe_for(), suite) == (6, 3, 512)  # old caches still open


def test_depth_overflow_gives_no_advice_that_cannot_be_followed(payload: Payload) -> None:
    from imkd_data.fields.depth import _overflow_advice

    assert "--set depth_width=65535" in _overflow_advice(65_000) and "depth_width" not in _overflow_advice(65_536)
    assert "drop-far" in _overflow_advice(65_536)


def test_box_overflow_stops(payload: Payload) -> None:
    with pytest.raises(InputDataError, match="boxes_width") as caught:
        compute(payload, recipe_for(boxes_width=1), ("boxes",))
    assert caught.value.details["found"] == "2" and "--set boxes_width=64" in caught.value.details["next"]


def test_image_modes(tree: Tree, payload: Payload, row: dict[str, Any]) -> None:
    import google_crc32c

    assert decoded("images", row, recipe_for())["CAM_BACK"].shape == (26, 52, 3)
    original, _ = compute(payload, recipe_for(images_mode="original"), ("images",))
    assert original["images"]["cam_back.jpg"] == tree.file("CAM_BACK", 2).read_bytes()
    recipe = recipe_for(images_mode="reference")
    reference = decoded("images", compute(payload, recipe, ("images",))[0], recipe)["CAM_FRONT"]
    data = (tree.root / reference["path"]).read_bytes()
    assert reference["crc32c"] == f"{google_crc32c.value(data):08x}" and reference["bytes"] == len(data)


def test_what_the_encoder_refuses_is_not_told_as_a_broken_image(payload: Payload, monkeypatch: pytest.MonkeyPatch) -> None:
    import simplejpeg

    def refuse(*args: Any, **options: Any) -> bytes:
        raise ValueError("quality must be between 0 and 100")

    monkeypatch.setattr(simplejpeg, "encode_jpeg", refuse)
    with pytest.raises(ValueError, match="quality") as caught:
        compute(payload, recipe_for(), ("images",))
    assert not isinstance(caught.value, InputDataError)


@pytest.mark.parametrize("hw", [(26, 52), (48, 96), (11, 33), (60, 120), (17, 30)])
def test_scaling_keeps_the_picture_in_place(hw: tuple[int, int]) -> None:
    """A smooth picture stays where it is at every ratio: a shift by the decoder's odd sizes would show."""
    import io

    import simplejpeg
    from PIL import Image

    from imkd_data.fields.images import scaled_jpeg

    y, x = np.mgrid[:45, :90] / 90
    pixels = (127 + 120 * np.stack([np.sin(5 * x), np.cos(7 * y), np.sin(4 * (x + y))], axis=-1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=98)
    reference = np.asarray(Image.fromarray(pixels).resize(hw[::-1], Image.Resampling.BICUBIC)).astype(float)
    ours = simplejpeg.decode_jpeg(scaled_jpeg(buffer.getvalue(), hw, 95), "RGB")
    assert 10 * np.log10(255**2 / np.mean((ours - reference) ** 2)) > 33


def test_blob_parts_refuse_what_is_not_theirs() -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    part = part_from_array(array)
    np.testing.assert_array_equal(array_from_part(part), array)
    assert part == part_from_array(array.copy(order="F"))
    for damaged in (b"", part[:-3], part[:20] + bytes([part[20] ^ 1]) + part[21:], b"x" * 50):
        with pytest.raises(CacheDamageError):
            array_from_part(damaged)


def test_blob_parts_never_hold_objects() -> None:
    import io

    from numcodecs.zstd import Zstd

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CacheDamageError):
        array_from_part(bytes(Zstd(level=3).encode(buffer.getvalue())))


@pytest.mark.parametrize(
    "head",
    [
        b"{'descr': (\n",
        b"  x\n y\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000000000000000000,), }\n",
        b"{'descr': '<U0', 'fortran_order': False, 'shape': (2,), }\n",
        b"{'descr': ['<f4', 1], 'fortran_order': False, 'shape': (2,), }\n",
        b"{" * 3000 + b"\n",
        b"\0\n",
        b"'\\N{no}'\n",
        b"\xff\xfe\n",
        b"\n",
    ],
)
def test_blob_parts_with_a_malformed_header(head: bytes) -> None:
    from numcodecs.zstd import compress

    raw = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + b"\0" * 8
    with pytest.raises(CacheDamageError, match="cannot be decoded"):
        array_from_part(bytes(compress(raw, 3, True)))


def test_fields_by_name() -> None:
    names = list(fields_by_name(["lidar_intensity", "boxes", "lidar_bev_sum"]))
    assert names == ["lidar_bev_sum", "lidar_intensity", "boxes"]  # upstream first
    with pytest.raises(UsageError, match="unknown field"):
        fields_by_name(["lidar_bev"])
    from dataclasses import replace

    mine = replace(FIELDS[0], name="mine")
    assert list(fields_by_name(["mine"], [mine])) == ["mine"]
    with pytest.raises(UsageError, match="exists already"):
        fields_by_name(["boxes"], [replace(mine, name="boxes")])


def test_another_data_set_has_its_own_rows(tmp_path: Path) -> None:
    """Radar columns, sensors and steps come from the suite, not from nuScenes."""
    from dataclasses import replace

    from tests.toy import SUITE, open_toy, write_toy

    suite = replace(SUITE, radar_steps={"snr": 0.125})
    reader = open_toy(write_toy(tmp_path, scenes=1))
    sample = reader.samples(reader.scene_names("train")[0])[1]
    payload = reader.read(sample, frozenset({"radar", "lidar", "images"}))
    recipe = recipe_for(SUITE.channels, reference_channel="SPINNER", radar_sweeps=2, image_hw_px=(24, 40))
    assert radar_rows(suite) == ("x", "y", "z", "vx_comp", "vy_comp", "rcs", "snr", "sensor", "sweep", "age")
    fields = fields_by_name(PROFILES["standard"])
    row: dict[str, Any] = {}
    for name, field in fields.items():
        row[name] = field.compute(payload, recipe, suite, row, {})
    radar = fields["radar_points"].decode(fields["radar_points"].unpack(row["radar_points"], suite), recipe, suite)
    snr = np.concatenate([p.column("snr") for p in payload.radar["WAVE"]])
    assert len(snr) > 3 and np.abs(radar["snr"] - snr).max() <= 0.0625
    assert row["radar_pose"].shape == (1, 2, 13) and row["depth_points"].shape == (2, 3, 512)
    assert list(fields["images"].unpack(row["images"], suite)) == ["EYE_LEFT", "EYE_RIGHT"]
    boxes = fields["boxes"].decode(row["boxes"], recipe, suite)
    np.testing.assert_allclose(boxes.centre_m, sample.boxes.centre_m, atol=1e-6)


def test_F13_a_filter_that_leaves_nothing(payload: Payload, row: dict[str, Any]) -> None:
    """Empty is a valid result, and filters are functions: no order of use changes another's result."""
    from imkd_data.fields.radar import RADAR_FILTERS, radar_filter_mask

    radar = decoded("radar_points", row, recipe_for())
    before = {name: radar_filter_mask(radar, name).tolist() for name in RADAR_FILTERS}
    assert all(before["none"]) and not all(before["crn"])
    nothing = {**radar, "ambig_state": np.zeros(len(radar["x"]))}
    assert not radar_filter_mask(nothing, "devkit").any()
    after = {name: radar_filter_mask(radar, name).tolist() for name in reversed(RADAR_FILTERS)}
    assert before == after
    with pytest.raises(UsageError, match="unknown radar filter"):
        radar_filter_mask(radar, "all")


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0])
def test_planes_refuse_intensities_that_are_no_codes(payload: Payload, value: float) -> None:
    """Whatever reader they come from: a data set with 0..1 must be scaled by its reader, not cut to zero here."""
    from dataclasses import replace

    scan = payload.lidar[0]
    features = scan.features.copy()
    features[:, 0] = value
    with pytest.raises(InputDataError, match="whole numbers"):
        compute(
            replace(payload, lidar=(replace(scan, features=features), *payload.lidar[1:])), recipe_for(), ("lidar_bev_sum",)
        )
