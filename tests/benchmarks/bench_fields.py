"""Milliseconds per sample by part of the build, on one core and the genuine keyframe (its scan stands in for ten sweeps).

python tests/benchmarks/bench_fields.py [--repeat 20]        (needs IMKD_REAL_DATA or ../shared/data)
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from imkd_data.fields import PROFILES, fields_by_name
from imkd_data.readers.nuscenes import NUSCENES, open_nuscenes
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, Sample

SENSORS = ("LIDAR_TOP", *NUSCENES.cameras, "RADAR_FRONT")
TARGET_MS = {"ten sweeps into planes": 8.5, "projection to six cameras": 7.5, "six JPEG": 155.0, "all fields": 178.0}


def timed(run: Callable[[], Any], repeat: int) -> float:
    """Median milliseconds of CPU time, so that other work on the machine counts little.

    The first run (compilation, page faults) is left out.
    """
    run()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    return float(np.median(times))


def ten_sweeps(payload: Payload) -> Payload:
    """The key scan at ten poses along a straight path: the load of ten real sweeps."""
    key = payload.sample.lidar[0]
    poses = [
        replace(key.ego_from_sensor, translation_m=key.ego_from_sensor.translation_m - [0.4 * k, 0.03 * k, 0])
        for k in range(10)
    ]
    sample: Sample = replace(payload.sample, lidar=tuple(replace(key, ego_from_sensor=p) for p in poses))
    return replace(payload, sample=sample, lidar=payload.lidar * 10 if payload.lidar else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=20)
    repeat = parser.parse_args().repeat
    root = Path(os.environ.get("IMKD_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "nuscenes_keyframe"
    if not root.is_dir():
        sys.exit("no genuine nuScenes files; set IMKD_REAL_DATA")
    reader = open_nuscenes(root, "v1.0-mini", sensors=SENSORS)
    sample = reader.samples("scene-0061")[0]
    names = PROFILES["full"]
    recipe = Recipe(version="v", splits=("mini_train",), sensors=SENSORS, reference_channel="LIDAR_TOP", fields=names)
    needs = frozenset({"images", "lidar", "radar"})
    payload = ten_sweeps(reader.read(sample, needs))
    fields = fields_by_name(names)
    row: dict[str, Any] = {}

    def compute(*wanted: str) -> Callable[[], None]:
        def run() -> None:
            fresh = replace(payload)  # another object: nothing remembered from the last run
            for name in wanted:
                row[name] = fields[name].compute(fresh, recipe, NUSCENES, row, {})

        return run

    def read() -> None:
        reader._scans.clear()
        reader.read(sample, needs)

    planes = ("lidar_bev_sum", "lidar_bev_count", "lidar_bev_max", "lidar_bev_z_of_max", "lidar_provenance")
    parts: dict[str, Callable[[], Any]] = {
        "one sample from the tables": lambda: reader.samples("scene-0061"),
        "read and check 8 files, 1 sweep": read,
        "ten sweeps into planes": compute(*planes),
        "view of the planes": compute("lidar_intensity"),
        "ten sweeps as lidar_points (zstd)": compute("lidar_points"),
        "projection to six cameras": compute("depth_points", "depth_intensity", "depth_count"),
        "radar": compute("radar_points", "radar_pose"),
        "calibration, poses, boxes": compute("camera_calibration", "sample_pose", "boxes"),
        "six JPEG": compute("images"),
        "all fields": compute(*names),
    }
    print(f"{'part':36s} {'ms/sample':>10s} {'target':>8s}   (CPU time, median of {repeat}, one core)")
    for name, run in parts.items():
        target = TARGET_MS.get(name)
        print(f"{name:36s} {timed(run, repeat):10.2f} {target if target else '':>8}")


if __name__ == "__main__":
    main()
