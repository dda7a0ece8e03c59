"""The sensor rig: where sensors sit, how they are timed. Rounded published nuScenes values, moved a little per scene."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from imkd_data.geometry import F64, VEHICLE, Pose, rotation_from_yaw

LIDAR = "LIDAR_TOP"
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
FULL_HW_PX = (900, 1600)

LIDAR_PERIOD_US, RADAR_PERIOD_US, CAMERA_PERIOD_US = 50_000, 76_900, 83_333
LIDAR_COLUMNS, LIDAR_RINGS = (1084, 1085, 1086), 32
LIDAR_START_DEG = -172.0  # azimuth (from x = right, counter-clockwise) where a turn begins; it runs clockwise
LIDAR_ELEVATION_RAD = np.radians(-30.67 + 1.3338 * np.arange(LIDAR_RINGS))

# The beam crosses the camera's axis this long before the turn's time stamp (which is the end of the turn).
CAMERA_DELAY_US = MappingProxyType(
    {
        "CAM_FRONT_LEFT": -43_000, "CAM_FRONT": -35_000, "CAM_FRONT_RIGHT": -28_000, "CAM_BACK_RIGHT": -20_000,
        "CAM_BACK": -10_000, "CAM_BACK_LEFT": -1_000,
    }
)  # fmt: skip

# x, y, z in metres; yaw of the viewing axis in degrees (ego: 0 = forward, left positive); focal length, principal point in px.
_CAMERA_MOUNT = MappingProxyType(
    {
        "CAM_FRONT": ((1.70, 0.015, 1.51), 0.0, 1266.0, (816.0, 491.5)),
        "CAM_FRONT_RIGHT": ((1.55, -0.493, 1.496), -56.2, 1261.0, (808.0, 495.3)),
        "CAM_BACK_RIGHT": ((1.015, -0.48, 1.562), -109.8, 1259.5, (807.3, 501.2)),
        "CAM_BACK": ((0.028, 0.003, 1.579), 180.0, 809.0, (829.2, 481.8)),
        "CAM_BACK_LEFT": ((1.036, 0.485, 1.591), 108.6, 1257.0, (792.1, 492.8)),
        "CAM_FRONT_LEFT": ((1.524, 0.495, 1.509), 55.3, 1272.6, (826.6, 479.8)),
    }
)
_RADAR_MOUNT = MappingProxyType(
    {
        "RADAR_FRONT": ((3.412, 0.0, 0.5), 0.2),
        "RADAR_FRONT_LEFT": ((2.422, 0.8, 0.78), 88.4),
        "RADAR_FRONT_RIGHT": ((2.422, -0.8, 0.77), -91.0),
        "RADAR_BACK_LEFT": ((-0.562, 0.628, 0.53), 174.4),
        "RADAR_BACK_RIGHT": ((-0.562, -0.618, 0.53), -176.1),
    }
)
_LIDAR_MOUNT = ((0.944, 0.0, 1.84), -90.0)

# Camera axes (x right, y down, z forward) in a frame whose x looks along the viewing axis.
_FROM_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rig:
    """Mountings of one scene. ``poses``: channel -> vehicle_from_sensor; ``intrinsics``: camera -> (3, 3) px at full size."""

    poses: dict[str, Pose]
    intrinsics: dict[str, F64]
    image_hw_px: tuple[int, int]


def _tilt(rng: np.random.Generator, scale_deg: float) -> F64:
    roll, pitch, yaw = np.radians(scale_deg) * np.clip(rng.standard_normal(3), -2, 2)
    rx = np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]])
    ry = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    return np.asarray(rotation_from_yaw(float(yaw)) @ ry @ rx)


def _scaled(matrix: F64, hw_px: tuple[int, int]) -> F64:
    sy, sx = hw_px[0] / FULL_HW_PX[0], hw_px[1] / FULL_HW_PX[1]
    resize = np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])
    return np.asarray(resize @ matrix)


def make_rig(rng: np.random.Generator, image_hw_px: tuple[int, int]) -> Rig:
    """Mountings with small random offsets (1 cm, 0.4 degrees), so that every scene has its own calibration.

    Radars turn about z only, as in nuScenes. Intrinsics are scaled to ``image_hw_px`` (pixel centres at integers).
    """
    poses: dict[str, Pose] = {}
    intrinsics: dict[str, F64] = {}

    def add(channel: str, at: tuple[float, float, float], rotation: F64) -> None:
        shift = np.round(np.asarray(at) + 0.01 * rng.uniform(-1, 1, 3), 4)
        poses[channel] = Pose(dst=VEHICLE, src=channel, rotation=rotation, translation_m=shift)

    for camera, (at, yaw, focal, (cx, cy)) in _CAMERA_MOUNT.items():
        add(camera, at, rotation_from_yaw(np.radians(yaw)) @ _tilt(rng, 0.4) @ _FROM_OPTICAL)
        f = focal + rng.uniform(-4, 4)
        full = np.array([[f, 0, cx + rng.uniform(-5, 5)], [0, f, cy + rng.uniform(-5, 5)], [0, 0, 1]])
        intrinsics[camera] = _scaled(full, image_hw_px)
    add(LIDAR, _LIDAR_MOUNT[0], rotation_from_yaw(np.radians(_LIDAR_MOUNT[1])) @ _tilt(rng, 0.5))
    for radar, (at, yaw) in _RADAR_MOUNT.items():
        add(radar, at, rotation_from_yaw(np.radians(yaw + rng.uniform(-0.6, 0.6))))
    return Rig(poses=poses, intrinsics=intrinsics, image_hw_px=image_hw_px)
