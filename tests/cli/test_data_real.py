"""The command of the first user, on the genuine keyframe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_data import imkd_data
from toy_build import stored

from imkd_data import open_cache

SENSORS = "LIDAR_TOP,CAM_FRONT,CAM_FRONT_LEFT,CAM_FRONT_RIGHT,CAM_BACK,CAM_BACK_LEFT,CAM_BACK_RIGHT,RADAR_FRONT"
ORDER = ["CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT"]


def arguments(root: Path, out: Path) -> list[str]:
    base = ["--dataroot", str(root), "--version", "v1.0-mini", "--split", "mini_train", "--sensors", SENSORS]
    return ["build", *base, "--out", str(out)]


@pytest.mark.real_data
@pytest.mark.timeout(120)
def test_build_the_keyframe(real_keyframe: Path, tmp_path: Path) -> None:
    done = imkd_data(*arguments(real_keyframe, tmp_path / "a"))  # default executor: Dask
    assert done.returncode == 0, done.stderr
    done = imkd_data(*arguments(real_keyframe, tmp_path / "b"), "--executor", "sync", "--no-fsync")
    assert done.returncode == 0 and stored(tmp_path / "a") == stored(tmp_path / "b")
    assert imkd_data("verify", tmp_path / "a", "--geometry").returncode == 0
    assert imkd_data("verify", tmp_path / "a", "--source", 1, "--dataroot", real_keyframe).returncode == 0
    cache = open_cache(tmp_path / "a")
    (row,) = cache.rows().tolist()
    facts = cache.index.to_pylist()[0]
    assert facts["scene"] == "scene-0061" and facts["num_boxes"] == 69 and facts["split"] == "mini_train"
    assert len(cache.decode("boxes", row)) == 69 and list(cache.read("images", row)) == ORDER
    assert cache.attributes("depth_points")["cameras"] == ORDER
    radar = cache.read("radar_points", row)
    assert radar.dtype == np.int16 and radar.shape == (21, facts["num_radar_points"][0]) and radar.shape[1] > 50
    pose = cache.read("radar_pose", row)
    assert np.isfinite(pose[0, 0]).all() and np.isnan(pose[1:]).all()  # absent radars are NaN
    points = cache.decode("lidar_points", row)["xyz_m"]
    assert 34_000 < len(points) < 35_000 and np.abs(points[:, 2]).max() < 50


@pytest.mark.real_data
def test_all_twelve_sensors_are_not_there(real_keyframe: Path, tmp_path: Path) -> None:
    """A declared sensor that the sample lacks is an error that names token, channel and file; nothing is half-made."""
    base = ["build", "--dataroot", str(real_keyframe), "--split", "mini_train", "--out", str(tmp_path / "c")]
    done = imkd_data(*base, "--executor", "sync")
    assert done.returncode in (3, 8) and "RADAR_" in done.stderr and "ca9a282c9e77460f8360f564131a8af5" in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "c" / "manifest.json").exists()
