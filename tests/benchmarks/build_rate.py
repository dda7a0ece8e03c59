"""Build rate against the devkit script: samples per second of one core, start-up left out as the slope between two sizes.

    python tests/benchmarks/build_rate.py DATAROOT VERSION SPLIT [--skip-images]

Ours: the fields that hold the same content (depth points and counts, all radar points with poses), then everything but images
and LiDAR points, then everything. CPU time of the process, ``--executor sync``, fsync on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

DEPTH_RADAR = ("depth_points", "depth_intensity", "depth_count", "radar_points", "radar_pose")


def ours(
    root: Path, version: str, split: str, fields: tuple[str, ...], scenes: list[str], **overrides: Any
) -> tuple[int, float]:
    """Samples and CPU seconds of one build."""
    from pipelines.build import build

    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        result = build(
            dataroot=root,
            version=version,
            splits=split.split(","),
            out=Path(folder) / "c",
            fields=fields,
            scenes=scenes,
            recipe_overrides={"rows_per_shard": 40, **overrides},
            executor="sync",
        )
        return result.samples, time.process_time() - started


def slope(small: tuple[int, float], large: tuple[int, float]) -> float:
    """Samples per second between two sizes."""
    return (large[0] - small[0]) / (large[1] - small[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dataroot", type=Path)
    parser.add_argument("version")
    parser.add_argument("split")
    parser.add_argument("--skip-images", action="store_true")
    given = parser.parse_args()

    from imkd_data.fields import PROFILES
    from imkd_data.readers import READERS

    splits = given.split.split(",")
    reader = READERS["nuscenes"](given.dataroot, given.version)
    scenes = sorted(s for split in splits for s in reader.scene_names(split))
    everything = PROFILES["standard"]
    sets = {
        "depth + radar (8 sweeps)": (DEPTH_RADAR, {"radar_sweeps": 8}),
        "all but images and LiDAR points": (tuple(n for n in everything if n not in ("images", "lidar_points")), {}),
        "all but images": (tuple(n for n in everything if n != "images"), {}),
    }
    if not given.skip_images:
        sets["standard, images scaled"] = (everything, {})
    rates = {}
    for name, (fields, overrides) in sets.items():
        ours(given.dataroot, given.version, given.split, fields, scenes[:1], **overrides)  # compile, fill caches
        small = ours(given.dataroot, given.version, given.split, fields, scenes[:1], **overrides)
        large = ours(given.dataroot, given.version, given.split, fields, scenes, **overrides)
        rates[name] = slope(small, large)
        print(f"imkd   {name:<34} {rates[name]:8.1f} samples/s  ({small[0]} -> {large[0]} samples)", flush=True)

    import devkit_script
    from nuscenes.nuscenes import NuScenes

    nusc = NuScenes(given.version, str(given.dataroot), verbose=False)
    folder = Path(tempfile.mkdtemp())
    few = min(20, len(nusc.sample) // 4)
    many = min(len(nusc.sample), 100)
    devkit_script.run(nusc, folder, 4)
    theirs = slope((few, devkit_script.run(nusc, folder, few)), (many, devkit_script.run(nusc, folder, many)))
    shutil.rmtree(folder)
    print(f"devkit depth + radar (8 sweeps)           {theirs:8.1f} samples/s  ({few} -> {many} samples)")
    for name, rate in rates.items():
        print(f"ratio  {name:<34} {rate / theirs:8.1f} x")


if __name__ == "__main__":
    main()
