"""A data set of ours: ROOT/<split>-<name>/poses.npy (K, 4) = time in us, x, y, yaw; and <time>.npy (P, 4) = x, y, z, rcs."""

import numpy as np
from google_crc32c import value as crc32c

from imkd_data.geometry import Pose, rotation_from_yaw, sensor_at
from imkd_data.sample import Payload, Points, Sample, SensorSuite, Sweep


class LogReader:
    suite = SensorSuite(cameras=(), lidar=None, radars=("FRONT",), radar_columns=("x", "y", "z", "rcs"), reflectance_max=255.0,
                        image_hw_px=(1, 1), max_radar_sweeps=1, max_radar_points=200, licence="ours")  # fmt: skip

    def __init__(self, dataroot, version, **sensors_and_sweeps):
        self.root, self.sensors = dataroot, self.suite.channels

    def scene_names(self, split):
        return tuple(sorted(p.name for p in self.root.glob(f"{split}-*")))

    def samples(self, scene):
        return tuple(self._sample(scene, *line) for line in np.load(self.root / scene / "poses.npy"))

    def _sample(self, scene, t, x, y, yaw):
        moved = Pose(dst="global", src="ego", rotation=rotation_from_yaw(yaw), translation_m=np.array([x, y, 0.0]))
        still = Pose.identity("ego", sensor_at("FRONT", int(t)))
        scan = Sweep(channel="FRONT", path=f"{scene}/{t:.0f}.npy", timestamp_us=int(t), ego_from_sensor=still,
                     vehicle_from_sensor=still, is_key=True)  # fmt: skip
        return Sample(dataset="logs", token=f"{scene}-{t:.0f}", scene=scene, scene_token=scene, timestamp_us=int(t),
                      split=scene.split("-")[0], global_from_ego=moved, ego_from_reference=still, cameras=(), lidar=(),
                      radar={"FRONT": (scan,)}, boxes=None)  # fmt: skip

    def read(self, sample, needs):
        scan = sample.radar["FRONT"][0]
        data, table = (self.root / scan.path).read_bytes(), np.load(self.root / scan.path)
        points = Points(frame=scan.ego_from_sensor.src, xyz_m=table[:, :3], time_s=np.zeros(len(table), np.float32),
                        features=table, feature_names=self.suite.radar_columns)  # fmt: skip
        return Payload(sample=sample, radar={"FRONT": (points,)}, files=((scan.path, len(data), crc32c(data)),))

    def input_manifest(self, sample, needs):
        path = sample.radar["FRONT"][0].path
        return [["pose", *sample.global_from_ego.matrix34().tolist()], [path, (self.root / path).stat().st_size]]
