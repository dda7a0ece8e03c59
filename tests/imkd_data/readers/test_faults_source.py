"""Faults F01..F29 of the source data, at the reader: one clear error, or a counted and documented way to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imkd_data.errors import ImkdError, InputDataError, SourceMissingError, StorageError, UnsafePathError, UsageError
from imkd_data.fields import fields_by_name
from imkd_data.readers import expand_splits, version_from_split
from imkd_data.readers.nuscenes import NUSCENES, NuScenesReader, open_nuscenes
from imkd_data.sample import Payload
from tests.imkd_data.fields.test_fields import compute, recipe_for
from tests.imkd_data.readers.tiny_tree import (
    CHANNELS,
    RADAR_FIELDS,
    RADAR_SIZES,
    RADAR_TYPES,
    SCENES,
    Tree,
    lidar_values,
    radar_file,
    radar_values,
    token,
)

EVERYTHING = frozenset({"images", "lidar", "radar"})


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path, keyframes=2)


def read(tree: Tree, key: int = 1, needs: frozenset[str] = EVERYTHING, **options: Any) -> Payload:
    reader = tree.open(**options)
    return reader.read(reader.samples(SCENES[0])[key], needs)


def refused(run: Callable[[], object], kind: type[ImkdError], rule: str, *words: str, file: str | None = None) -> ImkdError:
    """The error of ``run``: class, rule id, and words of its text; a token and scene where a sample is concerned."""
    with pytest.raises(kind) as caught:
        run()
    error = caught.value
    assert type(error) is kind and error.rule == rule, (type(error), error.rule)
    for word in words:
        assert word in str(error), (word, str(error))
    if file is not None:
        assert error.details["file"] == file and len(error.details["token"]) == 32 and error.details["scene"] == SCENES[0]
    return error


def lidar_name(tree: Tree) -> str:
    return str(tree.data("LIDAR_TOP", 1)["filename"])


def truncate(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])


# ---- LiDAR --------------------------------------------------------------------------------------------------------------


def test_F01_lidar_file_of_zero_bytes(tree: Tree) -> None:
    tree.file("LIDAR_TOP", 1).write_bytes(b"")
    error = refused(lambda: read(tree), InputDataError, "lidar.empty", "0 bytes", "LIDAR_TOP", file=lidar_name(tree))
    assert error.code == 3 and error.details["token"] == token(SCENES[0], "sample", 1)


@pytest.mark.parametrize(("cut", "remainder"), [(17, 3), (4, 16)], ids=["F02", "F03"])
def test_F02_F03_lidar_size_is_not_whole_points(tree: Tree, cut: int, remainder: int) -> None:
    truncate(tree.file("LIDAR_TOP", 1), cut)
    size = 2048 * 20 - cut
    refused(lambda: read(tree), InputDataError, "lidar.size", f"{size:,} bytes (remainder {remainder})", file=lidar_name(tree))


def test_F04_lidar_cut_by_one_point(tree: Tree) -> None:
    truncate(tree.file("LIDAR_TOP", 1), 20)
    payload = read(tree)
    assert len(payload.lidar[0]) == 2047 and payload.warnings["lidar.columns"] == 1
    refused(lambda: read(tree, strict=True), InputDataError, "lidar.columns", "remainder 31", file=lidar_name(tree))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_F05_broken_floats_are_dropped_and_counted(tree: Tree, value: float) -> None:
    path = tree.file("LIDAR_TOP", 1)
    scan = np.frombuffer(path.read_bytes(), "<f4").reshape(-1, 5).copy()
    scan[100:110, 1] = value
    scan[200, 3 if not np.isfinite(value) else 0] = value
    path.write_bytes(scan.tobytes())
    payload = read(tree)
    assert payload.dropped["non_finite"] == 11 and len(payload.lidar[0]) == 2048 - 11
    assert np.isfinite(payload.lidar[0].xyz_m).all() and payload.lidar[0].xyz_m.max() < 1e4
    scan[:30, 2] = value
    path.write_bytes(scan.tobytes())
    refused(lambda: read(tree), InputDataError, "lidar.finite", "41 of 2,048", file=lidar_name(tree))


def test_F06_intensity_that_this_sensor_does_not_write(tree: Tree) -> None:
    path = tree.file("LIDAR_TOP", 1)
    scan = np.frombuffer(path.read_bytes(), "<f4").reshape(-1, 5).copy()
    for change, words in ((scan[:, 3] / 255, "not whole"), (scan[:, 3] * 2, "maximum"), (scan[:, 3] - 3, "minimum -3")):
        bad = scan.copy()
        bad[:, 3] = change
        path.write_bytes(bad.tobytes())
        refused(lambda: read(tree), InputDataError, "lidar.intensity", "0..255", words, file=lidar_name(tree))
    bad = scan.copy()
    bad[7, 4] = 32
    path.write_bytes(bad.tobytes())
    refused(lambda: read(tree), InputDataError, "lidar.ring", "0..31", "maximum 32", file=lidar_name(tree))
    scan[:, 3] = 9
    path.write_bytes(scan.tobytes())
    payload = read(tree, lidar_sweeps=1)
    assert payload.warnings == {"lidar.constant_intensity": 1}
    row, _ = compute(payload, recipe_for())
    view = fields_by_name(["lidar_intensity"])["lidar_intensity"].decode(row["lidar_intensity"], recipe_for(), NUSCENES)
    assert np.isfinite(view).all() and view[1].max() == np.float32(9 / 255)


def test_F07_no_point_inside_the_grid(tree: Tree) -> None:
    path = tree.file("LIDAR_TOP", 1)
    scan = lidar_values(np.random.default_rng(0))
    scan[:, 0] += 900
    path.write_bytes(scan.tobytes())
    row, drops = compute(read(tree, lidar_sweeps=1), recipe_for())
    assert not row["lidar_bev_count"].any() and not row["lidar_intensity"].any()
    assert drops["lidar_bev_count"]["outside_grid"] == 2048


# ---- radar --------------------------------------------------------------------------------------------------------------


def radar(tree: Tree, content: bytes) -> None:
    tree.file("RADAR_FRONT", 1).write_bytes(content)


def radar_name(tree: Tree) -> str:
    return str(tree.data("RADAR_FRONT", 1)["filename"])


VALUES = radar_values(np.random.default_rng(1), 9)


def test_F08_radar_width_zero(tree: Tree) -> None:
    radar(tree, radar_file(VALUES[:0]))
    payload = read(tree, radar_sweeps=1)
    assert len(payload.radar["RADAR_FRONT"][0]) == 0 and payload.warnings["radar.empty_scan"] == 1
    row, _ = compute(payload, recipe_for(), ("radar_points",))
    field = fields_by_name(["radar_points"])["radar_points"]
    decoded = field.decode(field.unpack(row["radar_points"], NUSCENES), recipe_for(), NUSCENES)
    assert set(decoded["sensor"]) == {3}  # the other radar is still there


def test_F09_radar_nan_first_and_later(tree: Tree) -> None:
    first, later = VALUES.copy(), VALUES.copy()
    first[0, 0], later[4, 6] = np.nan, np.nan
    radar(tree, radar_file(first))
    payload = read(tree, radar_sweeps=1)
    assert len(payload.radar["RADAR_FRONT"][0]) == 0 and payload.warnings["radar.empty_scan"] == 1
    radar(tree, radar_file(later))
    payload = read(tree, radar_sweeps=1)
    assert payload.dropped == {"non_finite": 1} and payload.radar["RADAR_FRONT"][0].column("id").tolist() == [
        0,
        1,
        2,
        3,
        5,
        6,
        7,
        8,
    ]


def test_F10_radar_size_against_its_header(tree: Tree) -> None:
    whole = radar_file(VALUES, padding=0)
    radar(tree, whole[:-1])
    refused(lambda: read(tree), InputDataError, "radar.size", "9 points x 43 = 387", "386 bytes", file=radar_name(tree))
    radar(tree, whole)  # no padding at all is as good as 3.7 KB of it
    assert len(read(tree).radar["RADAR_FRONT"][0]) == 9
    radar(tree, whole + b"\0" * 9999)
    assert "radar.padding_not_zero" not in read(tree).warnings
    radar(tree, whole + b"\0" * 10 + b"\1")
    payload = read(tree)
    assert payload.warnings["radar.padding_not_zero"] == 1 and len(payload.radar["RADAR_FRONT"][0]) == 9
    radar(tree, radar_file(VALUES, WIDTH=8))
    refused(lambda: read(tree), InputDataError, "radar.points", "POINTS 9", "POINTS 8", file=radar_name(tree))


def test_F11_radar_fields_by_name(tree: Tree) -> None:
    order = [17, 5, 0, 2, 1, 3, 4, *range(6, 17)]
    names = tuple(RADAR_FIELDS[i] for i in order)
    sizes, types = tuple(RADAR_SIZES[i] for i in order), "".join(RADAR_TYPES[i] for i in order)
    radar(tree, radar_file(VALUES[:, order], names, sizes, types))
    reordered = read(tree).radar["RADAR_FRONT"][0]
    radar(tree, radar_file(VALUES))
    np.testing.assert_array_equal(reordered.features, read(tree).radar["RADAR_FRONT"][0].features)
    radar(tree, radar_file(np.c_[VALUES, np.ones(9)], (*RADAR_FIELDS, "snr"), (*RADAR_SIZES, 8), RADAR_TYPES + "F"))
    extra = read(tree)
    assert extra.warnings["radar.extra_columns"] == 1
    np.testing.assert_array_equal(extra.radar["RADAR_FRONT"][0].features, reordered.features)
    radar(tree, radar_file(VALUES[:, 1:], RADAR_FIELDS[1:], RADAR_SIZES[1:], RADAR_TYPES[1:]))
    refused(lambda: read(tree), InputDataError, "radar.columns", "no x", file=radar_name(tree))


@pytest.mark.parametrize("encoding", ["ascii", "binary_compressed"])
def test_F12_radar_encoding(tree: Tree, encoding: str) -> None:
    radar(tree, radar_file(VALUES, DATA=encoding))
    refused(lambda: read(tree), InputDataError, "radar.encoding", f"DATA {encoding}", "DATA binary", file=radar_name(tree))


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(500), b"<html>\n" * 99, b"\n" * 5000, radar_file(VALUES)[:200]]
)
def test_F12_no_pcd_at_all(tree: Tree, content: bytes) -> None:
    radar(tree, content)
    refused(lambda: read(tree), InputDataError, "radar.header", file=radar_name(tree))


@pytest.mark.parametrize(
    "header",
    [
        {"SIZE": "4 4"},
        {"TYPE": "F F F Q " + "F " * 14},
        {"COUNT": "1 1 1 -1 " + "1 " * 14},
        {"FIELDS": "x x " + " ".join(RADAR_FIELDS[2:])},
        {"POINTS": "many"},
        {"POINTS": "-3"},
        {"WIDTH": "1e3"},
        {"SIZE": "4 4 4 3 2 4 4 4 4 4 1 1 1 1 1 1 1 1"},
    ],
)
def test_F12_broken_pcd_header(tree: Tree, header: dict[str, str]) -> None:
    radar(tree, radar_file(VALUES, **header))
    refused(lambda: read(tree), InputDataError, "radar.header", file=radar_name(tree))


def test_F12_a_huge_count_allocates_nothing(tree: Tree) -> None:
    radar(tree, radar_file(VALUES, POINTS=10**11, WIDTH=10**11))
    refused(lambda: read(tree), InputDataError, "radar.size", file=radar_name(tree))


def test_more_points_than_the_sensors_cap_are_odd_but_kept(tree: Tree) -> None:
    radar(tree, radar_file(radar_values(np.random.default_rng(2), 126)))
    payload = read(tree, radar_sweeps=1)
    assert payload.warnings == {"radar.above_cap": 1} and len(payload.radar["RADAR_FRONT"][0]) == 126


# ---- images -------------------------------------------------------------------------------------------------------------


def jpeg(width: int, height: int) -> bytes:
    import simplejpeg

    rng = np.random.default_rng(0)
    return bytes(simplejpeg.encode_jpeg(rng.integers(0, 255, (height, width, 3), dtype=np.uint8), quality=80))


def image_name(tree: Tree) -> str:
    return str(tree.data("CAM_FRONT", 1)["filename"])


def test_F14_jpeg_cut_in_half_or_without_its_end(tree: Tree) -> None:
    path = tree.file("CAM_FRONT", 1)
    data = path.read_bytes()
    for short in (data[: len(data) // 2], data[:-2], data[:-2] + b"\0\0"):
        path.write_bytes(short)
        refused(lambda: read(tree), InputDataError, "image.truncated", "end marker", "CAM_FRONT", file=image_name(tree))
    path.write_bytes(data + b"\0" * 7)  # zero padding is legal
    assert read(tree).images["CAM_FRONT"] == data + b"\0" * 7


def test_F14_a_body_that_does_not_decode_is_no_grey_picture(tree: Tree) -> None:
    path = tree.file("CAM_FRONT", 1)
    data = path.read_bytes()
    path.write_bytes(data[:-60] + b"\xff\xd9")  # an end marker in the middle of the picture
    payload = read(tree)
    refused(
        lambda: compute(payload, recipe_for(), ("images",)), InputDataError, "image.decode", "CAM_FRONT", file=image_name(tree)
    )


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "image.header"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "image.header"),
        (b"<!DOCTYPE html><html>quota exceeded</html>", "image.header"),
        (b"\xff\xd8\xff\xe0", "image.header"),
        (jpeg(96, 50), "image.size"),
    ],
    ids=["empty", "png", "html", "four bytes", "other size"],
)
def test_F16_not_the_picture_of_the_table(tree: Tree, content: bytes, rule: str) -> None:
    tree.file("CAM_FRONT", 1).write_bytes(content)
    refused(lambda: read(tree), InputDataError, rule, "96 x 48", file=image_name(tree))


def test_F16_a_bomb_is_refused_from_its_header(tree: Tree) -> None:
    data = bytearray(jpeg(16, 16))
    at = data.index(b"\xff\xc0") + 5  # the frame header: 60,000 x 60,000 pixels claimed
    data[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    tree.file("CAM_FRONT", 1).write_bytes(bytes(data))
    refused(lambda: read(tree), InputDataError, "image.size", "60000 x 60000", file=image_name(tree))


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["LIDAR_TOP", "CAM_FRONT", "RADAR_FRONT"])
def test_F17_missing_file_and_broken_link(tree: Tree, channel: str) -> None:
    name = str(tree.data(channel, 1)["filename"])
    path = tree.root / name
    path.unlink()
    error = refused(lambda: read(tree), SourceMissingError, "source.missing", channel, file=name)
    assert error.code == 8
    path.symlink_to(path.with_suffix(".gone"))
    refused(lambda: read(tree), SourceMissingError, "source.missing", file=name)
    reader = tree.open()
    sample = reader.samples(SCENES[0])[1]
    refused(lambda: reader.input_manifest(sample, EVERYTHING), SourceMissingError, "source.missing")


def test_F17_directory_in_place_of_a_file(tree: Tree) -> None:
    name = lidar_name(tree)
    (tree.root / name).unlink()
    (tree.root / name).mkdir()
    refused(lambda: read(tree), InputDataError, "source.not_a_file", file=name)
    reader = tree.open()
    sample = reader.samples(SCENES[0])[1]
    refused(lambda: reader.input_manifest(sample, EVERYTHING), InputDataError, "source.not_a_file")


def test_F17_no_permission(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for open, as root may read everything."""
    name, real = lidar_name(tree), os.open
    reader = tree.open()
    sample = reader.samples(SCENES[0])[1]

    def denied(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(".pcd.bin"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    error = refused(lambda: reader.read(sample, EVERYTHING), StorageError, "source.io", "Permission denied", file=name)
    assert error.code == 5


def test_F18_first_sample_of_a_scene(tree: Tree) -> None:
    one, other = (read(tree, key=0), read(tree, key=0))
    assert len(one.lidar) == 1 and len(one.radar["RADAR_FRONT"]) == 1
    a, b = compute(one, recipe_for())[0], compute(other, recipe_for())[0]
    assert a["radar_points"] == b["radar_points"] and a["lidar_points"] == b["lidar_points"]
    assert np.isnan(a["radar_pose"][0, 1:]).all()


# ---- tables -------------------------------------------------------------------------------------------------------------


def edit_data(tree: Tree, row: dict[str, Any], **changes: Any) -> None:
    row.update(changes)
    tree.write()


def samples(tree: Tree, scene: str = SCENES[0]) -> Callable[[], object]:
    return lambda: tree.open().samples(scene)


def test_F19_sweep_chains(tree: Tree) -> None:
    key = tree.data("LIDAR_TOP", 1)
    good = key["prev"]
    edit_data(tree, key, prev=token("nowhere"))
    refused(samples(tree), InputDataError, "sweep.chain", key["token"], "not in sample_data", file=key["filename"])
    edit_data(tree, key, prev=key["token"])
    refused(samples(tree), InputDataError, "sweep.chain", key["token"], "loop", file=key["filename"])
    edit_data(tree, key, prev=tree.data("LIDAR_TOP", 0, SCENES[1])["token"])
    refused(samples(tree), InputDataError, "sweep.chain", "another scene", file=key["filename"])
    edit_data(tree, key, prev=tree.data("RADAR_FRONT", 0)["token"])
    refused(samples(tree), InputDataError, "sweep.chain", "another sensor", file=key["filename"])
    before = next(r for r in tree.tables["sample_data"] if r["token"] == good)
    edit_data(tree, key, prev=good)
    edit_data(tree, before, prev=key["token"])  # a loop of two
    error = refused(samples(tree), InputDataError, "sweep.chain", "loop")
    assert before["token"] in error.details["expected"] and key["token"] in error.details["found"]
    assert len(tree.open(lidar_sweeps=2).samples(SCENES[0])[1].lidar) == 2  # not reached: no harm


def test_F20_times(tree: Tree) -> None:
    key = tree.data("LIDAR_TOP", 1)
    gap = next(r for r in tree.tables["sample_data"] if r["token"] == key["prev"])
    edit_data(tree, gap, prev=tree.data("LIDAR_TOP", 0)["token"])  # 0.3 s lost
    reader = tree.open(lidar_sweeps=10)
    assert len(reader.samples(SCENES[0])[1].lidar) == 3 and reader.warnings["sweep.gap"] == 1
    lengths = {k: v for k, v in reader.warnings.items() if k.startswith("sweep.gap ")}
    assert lengths == {"sweep.gap lidar 0.25 to 0.5 s": 1}
    row = tree.tables["sample"][1]
    good = row["timestamp"]
    edit_data(tree, row, timestamp=tree.tables["sample"][0]["timestamp"] - 5)
    refused(samples(tree), InputDataError, "time.order", row["token"])
    edit_data(tree, row, timestamp=good // 10**6)
    refused(samples(tree), InputDataError, "time.unit", row["token"], "microseconds")
    edit_data(tree, row, timestamp=good * 1e-6)
    refused(tree.open, InputDataError, "table.column", "table sample", "timestamp", row["token"])
    edit_data(tree, row, timestamp=good)
    scan = tree.data("LIDAR_TOP", 1)
    edit_data(tree, scan, timestamp=scan["timestamp"] // 10**6)  # of a scan: no loop, and no step back
    refused(samples(tree), InputDataError, "time.unit", scan["token"], "LIDAR_TOP", "microseconds")


@pytest.mark.parametrize("table", ["ego_pose", "calibrated_sensor"])
def test_F21_quaternions(tree: Tree, table: str) -> None:
    wanted = tree.data("LIDAR_TOP", 1)[f"{table}_token"]
    row = next(r for r in tree.tables[table] if r["token"] == wanted)
    good = row["rotation"]
    pose = tree.open().samples(SCENES[0])[1].lidar[0].ego_from_sensor.rotation
    for scale in (2.0, 0.0, 1e200):
        edit_data(tree, row, rotation=[scale * v for v in good])
        refused(samples(tree), InputDataError, "pose.quaternion", wanted, table)
    edit_data(tree, row, rotation=[1.05 * v for v in good])
    reader = tree.open()
    np.testing.assert_allclose(reader.samples(SCENES[0])[1].lidar[0].ego_from_sensor.rotation, pose, atol=1e-12)
    assert reader.warnings["pose.quaternion_norm"] > 0
    edit_data(tree, row, rotation=good[:3])
    refused(tree.open, InputDataError, "table.column", wanted, "rotation", "4 numbers")
    edit_data(tree, row, rotation=good, translation=[1e400, 0, 0])
    with pytest.raises(InputDataError):
        tree.open().samples(SCENES[0])


@pytest.mark.parametrize("matrix", [[], [[1, 0, 0], [0, 1, 0]], [[-5.0, 0, 1], [0, 5, 1], [0, 0, 1]], [[0.0] * 3] * 3])
def test_F21_camera_intrinsics(tree: Tree, matrix: list[Any]) -> None:
    row = next(r for r in tree.tables["calibrated_sensor"] if r["token"] == token("cal", "CAM_BACK"))
    edit_data(tree, row, camera_intrinsic=matrix)
    refused(samples(tree), InputDataError, "camera.intrinsic", "CAM_BACK", row["token"])
    assert len(tree.open(("LIDAR_TOP", "CAM_FRONT")).samples(SCENES[0])) == 2  # not declared: not in the way


def test_F22_boxes_that_cannot_be(tree: Tree) -> None:
    row = tree.tables["sample_annotation"][0]
    good = dict(row)
    for changes, rule in (
        ({"size": [1.9, 0.0, 1.6]}, "annotation.size"),
        ({"size": [1.9, -4.5, 1.6]}, "annotation.size"),
        ({"rotation": [0.0, 0, 0, 0]}, "annotation.rotation"),
        ({"instance_token": token("nobody")}, "annotation.instance"),
    ):
        edit_data(tree, row, **changes)
        error = refused(samples(tree), InputDataError, rule, row["token"])
        assert error.details["token"] == row["sample_token"]
        edit_data(tree, row, **good)
    reader = tree.open()
    labels = reader.samples(SCENES[0])[1].boxes.label
    assert labels.tolist() == [0, -1] and reader.warnings["annotation.ignored_category"] == 1  # "animal" is kept, ignored


def test_F22_all_problems_of_a_scene_are_listed(tree: Tree) -> None:
    for row in tree.tables["sample_annotation"][:3]:
        row["size"] = [0.0, 1.0, 1.0]
    tree.tables["sample"][1]["timestamp"] = 5
    error = refused(samples(tree.write()), InputDataError, "time.unit")
    assert sorted(p.rule for p in error.problems) == ["annotation.size"] * 3


def test_F23_box_without_any_point_is_kept_as_invalid(tree: Tree) -> None:
    payload = read(tree, key=0)
    row, _ = compute(payload, recipe_for(), ("boxes",))
    assert payload.sample.boxes.num_lidar.tolist() == [12, 0] and row["boxes"][:2, 16].tolist() == [1, 0]


@pytest.mark.parametrize("table", ["sample", "sample_data", "ego_pose", "sample_annotation", "calibrated_sensor"])
def test_F24_token_twice(tree: Tree, table: str) -> None:
    rows = tree.tables[table]
    rows.append(dict(rows[1]))
    error = refused(tree.write().open, InputDataError, "table.duplicate", f"rows 1 and {len(rows) - 1}", rows[1]["token"])
    assert error.details["file"] == f"v1.0-mini/{table}.json"


def test_F24_two_key_frames_for_one_place_and_one_file_for_two(tree: Tree) -> None:
    key = tree.data("LIDAR_TOP", 1)
    tree.tables["sample_data"].append(dict(key, token=token("again")))
    refused(tree.write().open, InputDataError, "sample.duplicate_key", key["token"], token("again"))
    tree.tables["sample_data"].pop()
    key["filename"] = tree.data("LIDAR_TOP", 0)["filename"]
    refused(tree.write().open, InputDataError, "sample.duplicate_key", key["filename"], key["token"])


def broken_json(tree: Tree, table: str, change: Callable[[bytes], bytes]) -> None:
    path = tree.root / "v1.0-mini" / f"{table}.json"
    path.write_bytes(change(path.read_bytes()))


def test_F25_tables_that_are_not_json(tree: Tree) -> None:
    path = tree.root / "v1.0-mini" / "sample_data.json"
    good = path.read_bytes()
    half = len(good) // 2
    for content, words in (
        (good[:half], ("the file ends at byte", "is not JSON")),
        (good[:-2], (f"byte {len(good) - 2:,}",)),
        (b"\xef\xbb\xbf" + good, ("byte-order mark",)),
        (
            good.replace(b'"timestamp": 1', b'"timestamp": NaN, "x": 1', 1),
            ("NaN", f"at byte {good.index(b'timestamp') + 12:,}"),
        ),
        (good[:half] + b"\xff" + good[half:], ("UTF-8", f"byte {half:,}")),
        (b'{"token": "x"}', ("array of objects",)),
        (b"[1, 2]", ("array of objects",)),
        (b"[" * 100_000, ()),
        (b"", ("the file ends at byte 0",)),
    ):
        path.write_bytes(content)
        error = refused(tree.open, InputDataError, "table.json", "table sample_data", *words)
        assert error.details["file"] == "v1.0-mini/sample_data.json"
    path.unlink()
    error = refused(tree.open, SourceMissingError, "table.missing", "sample_data.json")
    assert error.code == 8


def test_F25_every_unreadable_table_is_listed(tree: Tree) -> None:
    (tree.root / "v1.0-mini" / "ego_pose.json").write_text("[")
    (tree.root / "v1.0-mini" / "scene.json").unlink()
    tree.root.joinpath("v1.0-mini", "instance.json").write_text("[{}]")
    error = refused(tree.open, InputDataError, "table.json", "table ego_pose")
    assert [p.details["file"] for p in error.problems] == ["v1.0-mini/instance.json", "v1.0-mini/scene.json"]


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("sample", "timestamp", "soon"),
        ("sample_data", "is_key_frame", "yes"),
        ("ego_pose", "translation", "here"),
        ("sample_annotation", "num_lidar_pts", None),
        ("calibrated_sensor", "sensor_token", 7),
        ("ego_pose", "rotation", [1.0, None, 0.0, 0.0]),
    ],
)
def test_F25_missing_and_mistyped_values(tree: Tree, table: str, column: str, value: Any) -> None:
    row = tree.tables[table][1]
    edit_data(tree, row, **{column: value})
    refused(tree.open, InputDataError, "table.column", f"table {table}", column, row["token"])
    del row[column]
    refused(tree.write().open, InputDataError, "table.column", f"table {table}", column, row["token"])


@pytest.mark.parametrize("column", ["ego_pose_token", "calibrated_sensor_token"])
def test_F25_broken_foreign_key(tree: Tree, column: str) -> None:
    edit_data(tree, tree.data("RADAR_BACK_LEFT", 1), **{column: token("nowhere")})
    with pytest.raises(InputDataError) as caught:
        tree.open().samples(SCENES[0])
    assert caught.value.rule in ("table.key", "sample.sensor_missing") and caught.value.details["token"] == token(
        SCENES[0], "sample", 1
    )
    assert len(tree.open().samples(SCENES[1])) == 2  # the other split
    assert len(tree.open(CHANNELS[:4]).samples(SCENES[0])) == 2  # the sensor is not declared


@pytest.mark.parametrize(("table", "column"), [("sample", "scene_token"), ("sample_annotation", "sample_token")])
@pytest.mark.parametrize("value", [token("nowhere"), ""])
def test_F25_rows_of_no_scene_or_sample(tree: Tree, table: str, column: str, value: str) -> None:
    """They would join another scene, or vanish and spoil their neighbours' velocities."""
    rows = tree.tables[table]
    edit_data(tree, rows[1], **{column: value})
    edit_data(tree, rows[-1], **{column: token("elsewhere")})
    error = refused(tree.open, InputDataError, "table.key", f"table {table}", "row 1", column, rows[1]["token"])
    assert error.details["file"] == f"v1.0-mini/{table}.json" and error.details["token"] == rows[1]["token"]
    assert [p.details["token"] for p in error.problems] == [rows[-1]["token"]]


def test_visibility_is_the_level_not_the_place_in_the_table(tree: Tree) -> None:
    def seen() -> tuple[list[int], Any]:
        reader = tree.open()
        sample = reader.samples(SCENES[0])[1]
        return sample.boxes.visibility.tolist(), reader.input_manifest(sample, frozenset({"boxes"}))

    before = seen()
    assert before[0] == [4, 2]
    tree.tables["visibility"].reverse()
    tree.write()
    assert seen() == before
    tree.tables["visibility"][0]["level"] = "mostly"  # 80 to 100 % under a name that nobody knows
    tree.write()
    assert seen()[0] == [0, 2] and seen()[1] != before[1]


@pytest.mark.parametrize("sweeps", [{"lidar_sweeps": 0}, {"radar_sweeps": -3}, {"radar_sweeps": 2.0}])
def test_sweeps_that_cannot_be_read(tree: Tree, sweeps: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(sweeps))):
        tree.open(**sweeps)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"visibility_token": "9"}, "annotation.visibility"),
        ({"attribute_tokens": [token("x")]}, "annotation.attribute"),
        ({"next": token("x")}, "annotation.chain"),
    ],
)
def test_F25_annotation_keys(tree: Tree, changes: dict[str, Any], rule: str) -> None:
    row = tree.tables["sample_annotation"][0]
    edit_data(tree, row, **changes)
    refused(samples(tree), InputDataError, rule, row["token"])
    assert len(tree.open().samples(SCENES[1])) == 2
    edit_data(tree, row, visibility_token="", attribute_tokens=[], next="")
    boxes = tree.open().samples(SCENES[0])[0].boxes
    assert boxes.visibility[0] == 0 and boxes.attribute[0] == -1  # unknown, and valid


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../x",
        "samples/../../x",
        "samples/LIDAR_TOP/../../../x",
        "C:\\x",
        "C:/x",
        "samples\\x",
        "a\0b",
        "",
        "..",
    ],
)
def test_F26_unsafe_paths(tree: Tree, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tree.data("LIDAR_TOP", 1)
    edit_data(tree, key, filename=name)
    reader = tree.open()
    sample = reader.samples(SCENES[0])[1]
    monkeypatch.setattr(os, "open", lambda *a, **k: pytest.fail("opened before it was checked"))
    for run in (
        lambda: reader.read(sample, EVERYTHING - {"images"}),
        lambda: reader.input_manifest(sample, frozenset({"lidar"})),
    ):
        with pytest.raises(UnsafePathError) as caught:
            run()
        assert caught.value.rule == "path.unsafe" and caught.value.code == 3 and caught.value.details["token"] == sample.token


@pytest.mark.parametrize("which", ["file", "folder"])
def test_F26_link_out_of_the_root(tree: Tree, tmp_path_factory: pytest.TempPathFactory, which: str) -> None:
    outside = tmp_path_factory.mktemp("outside")
    path = tree.file("LIDAR_TOP", 1)
    if which == "file":
        target = outside / path.name
        os.rename(path, target)
        path.symlink_to(target)
    else:
        os.rename(path.parent, outside / "LIDAR_TOP")
        path.parent.symlink_to(outside / "LIDAR_TOP")
    with pytest.raises(UnsafePathError) as caught:
        read(tree)
    assert str(outside) in str(caught.value)


def test_F26_links_inside_the_root_and_a_linked_root_are_fine(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tree.file("LIDAR_TOP", 1)
    os.rename(path, tree.root / "elsewhere.bin")
    path.symlink_to(tree.root / "elsewhere.bin")
    assert len(read(tree).lidar[0]) == 2048
    link = tmp_path_factory.mktemp("link") / "nuscenes"
    link.symlink_to(tree.root)
    reader = open_nuscenes(link, "v1.0-mini", sensors=CHANNELS)
    assert len(reader.read(reader.samples(SCENES[0])[1], EVERYTHING).lidar[0]) == 2048


def test_F27_odd_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "Zürich 数据 set" / ("d" * 120)
    Tree(root, keyframes=1)

    def count(path: Any) -> int:
        reader = open_nuscenes(path, "v1.0-mini", sensors=CHANNELS)
        return sum(len(reader.read(s, EVERYTHING).files) for s in reader.samples(SCENES[0]))

    assert count(root) == count(Path(f"{root}/")) == 5
    monkeypatch.setenv("HOME", str(root.parent))
    assert count(Path("~") / root.name) == 5
    monkeypatch.chdir(root.parent)
    assert count(Path(root.name)) == 5


def test_F28_splits() -> None:
    assert expand_splits("trainval") == ("train", "val") and expand_splits("mini") == ("mini_train", "mini_val")
    assert expand_splits("mini_val, mini_train,mini_val") == ("mini_val", "mini_train")
    assert expand_splits(("train", "trainval")) == ("train", "val")
    for bad in ("trian", "", "train,", "train_detect"):
        with pytest.raises(UsageError, match="unknown split") as caught:
            expand_splits(bad)
        assert "mini_train" in caught.value.details["expected"] and "trainval" in caught.value.details["expected"]
    with pytest.raises(UsageError, match="different versions"):
        expand_splits("train,mini_val")
    versions = {s: version_from_split(s) for s in ("train", "val", "trainval", "test", "mini_train", "mini", "val,train")}
    assert versions == {
        "train": "v1.0-trainval",
        "val": "v1.0-trainval",
        "trainval": "v1.0-trainval",
        "test": "v1.0-test",
        "mini_train": "v1.0-mini",
        "mini": "v1.0-mini",
        "val,train": "v1.0-trainval",
    }
    with pytest.raises(UsageError):
        version_from_split("nothing")


def test_F29_another_version_or_no_nuscenes_at_all(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> None:
    error = refused(
        lambda: open_nuscenes(tree.root, "v1.0-trainval"),
        SourceMissingError,
        "source.version",
        "v1.0-trainval not found, found v1.0-mini",
    )
    assert error.code == 8
    empty = tmp_path_factory.mktemp("empty")
    refused(lambda: open_nuscenes(empty, "v1.0-mini"), SourceMissingError, "source.version", "not a nuScenes folder")
    refused(lambda: open_nuscenes(empty / "none", "v1.0-mini"), SourceMissingError, "source.root", "--dataroot")
    refused(lambda: open_nuscenes(tree.file("LIDAR_TOP"), "v1.0-mini"), SourceMissingError, "source.root")
    for name in ("../v1.0-mini", "", ".hidden"):
        with pytest.raises(UsageError):
            open_nuscenes(tree.root, name)


def test_file_that_changes_while_it_is_read(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """F46, the reader's part: the size seen at open is the size that must be read."""
    real = os.fstat

    class Shorter:
        def __init__(self, info: os.stat_result) -> None:
            self.st_size = info.st_size - 20

    reader = tree.open()
    sample = reader.samples(SCENES[0])[1]
    monkeypatch.setattr("imkd_data.readers.files.os.fstat", lambda fd: Shorter(real(fd)))
    refused(lambda: reader.read(sample, frozenset({"lidar_key"})), InputDataError, "source.changed", file=lidar_name(tree))


def test_errors_are_json_ready_and_cross_processes(tree: Tree) -> None:
    import pickle

    truncate(tree.file("LIDAR_TOP", 1), 3)
    with pytest.raises(InputDataError) as caught:
        read(tree)
    value = json.loads(json.dumps(caught.value.as_json()))
    assert value["code"] == 3 and value["rule"] == "lidar.size" and value["file"] == lidar_name(tree)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.rule == "lidar.size"


def test_reader_is_a_reader() -> None:
    assert {"suite", "scene_names", "samples", "read", "input_manifest"} <= set(dir(NuScenesReader))
