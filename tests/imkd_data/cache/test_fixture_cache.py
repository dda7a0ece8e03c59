"""A cache as version 1 wrote it, kept in tests/fixtures/cache_v1: every later version reads these bytes.

Never make it again to please a test (tests/fixtures/make_cache_v1.py says how it was made): change the reader instead.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from imkd_data import open_cache
from imkd_data.cache.receipt import sealed
from imkd_data.cache.verify import verify
from imkd_data.errors import MismatchError

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "cache_v1"
ID = "4f94bd142d15be62816cf285c5aa5fca9018cc745abccf5be642433bf716c862"
# crc32 over all rows as they are stored, by plain zarr and plain tarfile when the cache was made.
CONTENT = {
    "boxes": 845613516,
    "camera_calibration": 4167365285,
    "depth_count": 1608741003,
    "depth_intensity": 260338076,
    "depth_points": 1066572993,
    "images": 2245898265,
    "lidar_bev_count": 2779065012,
    "lidar_bev_max": 631485246,
    "lidar_bev_sum": 1847518277,
    "lidar_bev_z_of_max": 2999848010,
    "lidar_intensity": 3519305128,
    "lidar_points": 2319261813,
    "lidar_provenance": 378012006,
    "radar_points": 3085049570,
    "radar_pose": 3343177291,
    "sample_pose": 121809460,
}
ROW = 3  # scene-0103, the second keyframe: two sweeps of everything
POSE = {  # translations of sample_pose, the middle column of the front camera, the newest scan of RADAR_FRONT_LEFT
    "global_from_ego": [298.1794500694045, 215.15600654454173, 0.0],
    "ego_from_reference": [0.9534, -0.0066, 1.8368],
}


@pytest.fixture(scope="module")
def kept() -> Any:
    return open_cache(FIXTURE)


def test_it_is_small_and_whole(kept: Any) -> None:
    assert sum(p.stat().st_size for p in FIXTURE.rglob("*") if p.is_file()) < 300_000
    assert kept.id == ID and kept.manifest["format"] == 1
    assert set(kept.fields) == set(CONTENT)
    assert verify(FIXTURE, level="full") == []


def test_index(kept: Any) -> None:
    assert kept.rows().tolist() == [0, 1, 2, 3] and kept.rows("mini_val").tolist() == [2, 3]
    facts = {name: kept.index[name].to_pylist() for name in ("scene", "night", "previous_row", "num_boxes", "num_radar_points")}
    assert facts["scene"] == ["scene-0061"] * 2 + ["scene-0103"] * 2 and facts["night"] == [False, False, True, True]
    assert facts["previous_row"] == [-1, 0, -1, 2] and facts["num_boxes"] == [49, 48, 42, 44]
    assert facts["num_radar_points"][ROW] == [250, 93, 94, 250, 250]
    assert pq.read_table(FIXTURE / "index.parquet", page_checksum_verification=True).num_rows == 4
    assert kept.annotation_tokens(ROW)[0][0] == "4e8a1714cf06faa06d24474da9d5f700"


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_every_field_gives_the_same_bytes(kept: Any, name: str) -> None:
    if kept.fields[name].kind == "array":
        rows = np.stack([kept.read(name, int(r)) for r in kept.rows()])
        np.testing.assert_array_equal(rows, zarr.open_group(FIXTURE / "arrays.zarr", mode="r")[name][:])
        assert zlib.crc32(rows.tobytes()) == CONTENT[name]
        return
    crc = 0
    for tar in sorted((FIXTURE / "blobs" / name).glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                data = members.extractfile(member).read()  # type: ignore[union-attr]
                token, _, part = member.name.partition(".")
                assert kept.read_parts(name, kept.row(token))[part] == data
                crc = zlib.crc32(data, crc)
    assert crc == CONTENT[name]


def test_physical_values(kept: Any) -> None:
    """What the codes mean must not change either: scale, offset, column order, frames."""
    boxes = kept.decode("boxes", ROW)
    assert len(boxes) == 44 and boxes.frame == "ego"
    np.testing.assert_allclose(boxes.centre_m[0], [-54.75242615, -4.14943695, 0.79066133], atol=1e-6)
    np.testing.assert_allclose(boxes.size_lwh_m[0], [4.757, 1.895, 1.868], atol=1e-6)
    assert boxes.yaw_rad[0] == pytest.approx(-0.20031564) and boxes.label[0] == 0 and boxes.num_lidar[0] == 2
    assert [len(d) for d in kept.decode("depth_points", ROW)] == [81, 110, 89, 95, 107, 111]
    np.testing.assert_array_equal(kept.decode("depth_points", ROW)[2][0], np.float32([75.265625, 88.078125, 4.994140625]))
    assert [int(v[0]) for v in kept.decode("depth_intensity", ROW)] == [34, 13, 58, 16, 12, 4]
    radar = {name: values[5] for name, values in kept.decode("radar_points", ROW).items()}
    np.testing.assert_allclose(radar["xyz_m"], [9.84, -5.88, 0.51], atol=1e-6)
    expected = {"vx": 0.25, "vx_comp": 0.13671875, "vy_comp": -0.125, "rcs": 3.5, "dyn_prop": 3, "id": 5, "invalid_state": 15}
    assert {name: float(radar[name]) for name in expected} == expected
    lidar = kept.decode("lidar_points", ROW)
    np.testing.assert_allclose(lidar["xyz_m"][7], [0.33, 4.62, 0.0], atol=1e-6)
    assert (lidar["intensity"][7], lidar["ring"][7], lidar["sweep"][7], len(lidar["xyz_m"])) == (11, 7, 0, 1984)
    maps = kept.decode("lidar_intensity", ROW).sum(axis=(1, 2))
    np.testing.assert_allclose(maps, [3.019608, 6.2980394, 1123.0, 52.235294], rtol=1e-5)
    poses = kept.decode("sample_pose", ROW)
    for name, translation in POSE.items():
        np.testing.assert_allclose(poses[name][:, 3], translation, atol=1e-9)
    assert kept.decode("radar_pose", ROW)[1, 1, 12] == pytest.approx(0.041028)
    camera = kept.decode("camera_calibration", ROW)
    assert camera["image_from_camera"][1][0, 0] == pytest.approx(126.301208973)
    assert list(kept.read("images", ROW)) == list(kept.suite.cameras)


@pytest.mark.parametrize("kind", ["crn", "bevdepth", "bevfusion", "rcbevdet", "mmdet3d", "openpcdet", "raw"])
def test_every_view_reads_it(kept: Any, kind: str) -> None:
    assert kept.view(kind).sample(ROW)["token"] == kept.token(ROW)


def of_format(tmp_path: Path, number: Any) -> Path:
    """A copy whose manifest claims another format, otherwise sealed as it should be."""
    shutil.copytree(FIXTURE, tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    body: Mapping[str, Any] = {k: v for k, v in json.loads(path.read_bytes()).items() if k != "self_sha256"}
    path.write_bytes(sealed({**body, "format": number}, "self_sha256"))
    return tmp_path / "cache"


def test_a_newer_format_is_refused_with_one_clear_line(tmp_path: Path) -> None:
    cache = of_format(tmp_path, 2)
    with pytest.raises(MismatchError, match="newer") as caught:
        open_cache(cache)
    assert "format 1" in str(caught.value.details["expected"]) and "2" in str(caught.value.details["found"])
    done = subprocess.run(
        [sys.executable, "-c", "from cli.main import data; data()", "inspect", str(cache)], capture_output=True, text=True
    )
    assert done.returncode == 9 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: the cache was written by a newer version"
    ]


@pytest.mark.parametrize("number", [0, "1", None])
def test_a_format_that_never_was_is_refused(tmp_path: Path, number: Any) -> None:
    with pytest.raises(MismatchError, match="format"):
        open_cache(of_format(tmp_path, number))
