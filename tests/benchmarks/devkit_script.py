"""What a straightforward nuscenes-devkit script does: per-camera LiDAR depth points and 8-sweep five-radar points, loose
files. The yardstick for ``build_rate.py``; written from the devkit's own calls, no tricks left out on purpose.

    python tests/benchmarks/devkit_script.py DATAROOT VERSION OUT [NUMBER OF SAMPLES]
"""

from __future__ import annotations

import sys
import time
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud, RadarPointCloud
from nuscenes.utils.geometry_utils import transform_matrix, view_points
from pyquaternion import Quaternion

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
SWEEPS = 8


def depth_points(nusc: NuScenes, sample: dict[str, Any], camera: str) -> np.ndarray:
    """(n, 3) u, v, depth of the key LiDAR scan in one camera."""
    lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    cam = nusc.get("sample_data", sample["data"][camera])
    cloud = LidarPointCloud.from_file(str(Path(nusc.dataroot) / lidar["filename"]))
    cs = nusc.get("calibrated_sensor", lidar["calibrated_sensor_token"])
    cloud.rotate(Quaternion(cs["rotation"]).rotation_matrix)
    cloud.translate(np.array(cs["translation"]))
    pose = nusc.get("ego_pose", lidar["ego_pose_token"])
    cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix)
    cloud.translate(np.array(pose["translation"]))
    pose = nusc.get("ego_pose", cam["ego_pose_token"])
    cloud.translate(-np.array(pose["translation"]))
    cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix.T)
    cs = nusc.get("calibrated_sensor", cam["calibrated_sensor_token"])
    cloud.translate(-np.array(cs["translation"]))
    cloud.rotate(Quaternion(cs["rotation"]).rotation_matrix.T)
    depth = cloud.points[2, :]
    uv = view_points(cloud.points[:3, :], np.array(cs["camera_intrinsic"]), normalize=True)
    keep = (depth > 1.0) & (uv[0] > 1) & (uv[0] < cam["width"] - 1) & (uv[1] > 1) & (uv[1] < cam["height"] - 1)
    return np.stack([uv[0, keep], uv[1, keep], depth[keep]], axis=1).astype(np.float32)


def radar_points(nusc: NuScenes, sample: dict[str, Any]) -> np.ndarray:
    """(n, 20) all radars, up to eight sweeps each, in the ego frame of the LiDAR key time."""
    reference = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    ego = nusc.get("ego_pose", reference["ego_pose_token"])
    ego_from_global = transform_matrix(ego["translation"], Quaternion(ego["rotation"]), inverse=True)
    parts = []
    for number, channel in enumerate(RADARS):
        record = nusc.get("sample_data", sample["data"][channel])
        for _ in range(SWEEPS):
            cloud = RadarPointCloud.from_file(str(Path(nusc.dataroot) / record["filename"]))
            pose = nusc.get("ego_pose", record["ego_pose_token"])
            cs = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
            global_from_car = transform_matrix(pose["translation"], Quaternion(pose["rotation"]))
            car_from_sensor = transform_matrix(cs["translation"], Quaternion(cs["rotation"]))
            matrix = reduce(np.dot, [ego_from_global, global_from_car, car_from_sensor])
            cloud.transform(matrix)
            velocity = cloud.points[8:10]
            cloud.points[8:10] = (matrix[:3, :3] @ np.vstack([velocity, np.zeros(velocity.shape[1])]))[:2]
            age = (reference["timestamp"] - record["timestamp"]) * 1e-6
            extra = np.stack([np.full(cloud.nbr_points(), number), np.full(cloud.nbr_points(), age)])
            parts.append(np.vstack([cloud.points, extra]).T)
            if record["prev"] == "":
                break
            record = nusc.get("sample_data", record["prev"])
    return np.concatenate(parts).astype(np.float32)


def run(nusc: NuScenes, out: Path, number: int) -> float:
    """Seconds for ``number`` samples."""
    RadarPointCloud.disable_filters()
    (out / "depth").mkdir(parents=True, exist_ok=True)
    (out / "radar").mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    for sample in nusc.sample[:number]:
        for camera in CAMERAS:
            name = Path(nusc.get("sample_data", sample["data"][camera])["filename"]).name
            depth_points(nusc, sample, camera).flatten().tofile(out / "depth" / f"{name}.bin")
        radar_points(nusc, sample).flatten().tofile(out / "radar" / f"{sample['token']}.bin")
    return time.process_time() - started


def main() -> None:
    root, version, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    nusc = NuScenes(version, root, verbose=False)
    number = int(sys.argv[4]) if len(sys.argv) > 4 else len(nusc.sample)
    seconds = run(nusc, out, number)
    print(f"{number} samples in {seconds:.1f} s CPU = {number / seconds:.2f} samples/s")


if __name__ == "__main__":
    main()
