"""Speed of the synthetic world by part, one core.

pytest tests/benchmarks/bench_world.py --benchmark-enable --benchmark-columns=min,median
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imkd_data.world import WorldOptions
from imkd_data.world.camera import CameraModel, encode_jpeg
from imkd_data.world.lidar import LidarModel
from imkd_data.world.options import random_stream
from imkd_data.world.radar import RadarModel
from imkd_data.world.rig import CAMERAS, RADARS, make_rig
from imkd_data.world.scene import make_scene
from imkd_data.world.write import write_scene

KEYFRAMES = 20


@pytest.fixture(scope="module")
def scene() -> Any:
    return make_scene(WorldOptions(keyframes=KEYFRAMES), 0)


def test_lidar_turn(benchmark: Any, scene: Any) -> None:
    """One turn of 34,720 rays."""
    model = LidarModel(scene, make_rig(random_stream(0, 0, "rig"), (900, 1600)))
    benchmark(model.turn, 2.0)


def test_five_radar_scans(benchmark: Any, scene: Any) -> None:
    """One scan of each of the five radars."""
    model = RadarModel(scene, make_rig(random_stream(0, 0, "rig"), (900, 1600)))
    things = scene.primitives(2.0, scene.ego.poses(np.array([2.0]))[1][0, :2], 180.0)
    tree = things.tree(0.0)
    benchmark(lambda: [model.scan(channel, 2.0, things, tree) for channel in RADARS])


@pytest.mark.parametrize("size", [(900, 1600), (256, 704)], ids=["900x1600", "256x704"])
def test_six_images(benchmark: Any, scene: Any, size: tuple[int, int]) -> None:
    """Six cameras with JPEG encoding."""
    model = CameraModel(scene, make_rig(random_stream(0, 0, "rig"), size))

    def render() -> int:
        views = [model.view(camera, 2.0).image for camera in CAMERAS]
        return sum(len(encode_jpeg(image)) for image in views if image is not None)

    assert benchmark(render) > 10_000


@pytest.mark.parametrize("images", [False, True], ids=["without_images", "with_images_256x704"])
def test_scene_of_twenty_keyframes(benchmark: Any, images: bool, tmp_path: Path) -> None:
    """Tables, LiDAR with its sweeps, radar (and images); divide by twenty for a keyframe."""
    options = WorldOptions(keyframes=KEYFRAMES, image_hw_px=(256, 704), images=images)

    def write() -> None:
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        (tmp_path / "w" / ".synth").mkdir(parents=True)
        write_scene(tmp_path / "w", options, 0)

    benchmark.pedantic(write, rounds=3, warmup_rounds=1)
    benchmark.extra_info["keyframes_per_second"] = KEYFRAMES / benchmark.stats["min"] if benchmark.stats else None
