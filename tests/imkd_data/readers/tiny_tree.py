"""A very small nuScenes tree, written by the tests themselves: moving, turning, tilting car; every table editable."""

from __future__ import annotations

import json
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imkd_data.geometry import quaternion_from_rotation, rotation_from_yaw
from imkd_data.readers.nuscenes import NUSCENES, NuScenesReader, open_nuscenes

HW = (48, 96)
CHANNELS = ("LIDAR_TOP", "CAM_FRONT", "CAM_BACK", "RADAR_FRONT", "RADAR_BACK_LEFT")
SCENES = ("scene-0061", "scene-0103")  # mini_train, mini_val
START_US = 1_532_402_927_647_951
KEY_US = 500_000
PERIOD_US = {"lidar": 100_000, "radar": 125_000, "camera": 500_000}
OFFSET_US = {"LIDAR_TOP": 0, "CAM_FRONT": -35_000, "CAM_BACK": 1_500, "RADAR_FRONT": 16_227, "RADAR_BACK_LEFT": -21_000}
RADAR_FIELDS = NUSCENES.radar_columns
RADAR_SIZES = (4, 4, 4, 1, 2, 4, 4, 4, 4, 4, 1, 1, 1, 1, 1, 1, 1, 1)
RADAR_TYPES = "FFFIIFFFFFIIIIIIII"
LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")
MOUNTS = {
    "LIDAR_TOP": ([0.94, 0.0, 1.84], -1.5707),
    "CAM_FRONT": ([1.7, 0.02, 1.5], 0.0),
    "CAM_BACK": ([0.0, 0.0, 1.55], 3.14),
    "RADAR_FRONT": ([3.4, 0.0, 0.5], 0.0035),
    "RADAR_BACK_LEFT": ([-0.56, 0.63, 0.53], 3.04),
}


def token(*parts: Any) -> str:
    return md5(":".join(map(str, parts)).encode()).hexdigest()


def tilted(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    cp, sp, cr, sr = np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return rotation_from_yaw(yaw) @ about_y @ about_x


def radar_file(
    values: np.ndarray,
    names: tuple[str, ...] = RADAR_FIELDS,
    sizes: tuple[int, ...] = RADAR_SIZES,
    types: str = RADAR_TYPES,
    padding: int = 3726,
    **header: Any,
) -> bytes:
    """PCD bytes as the radars write them; ``header`` replaces header values, e.g. POINTS=3, DATA='ascii'."""
    dtype = np.dtype([(n, f"<{'f' if t == 'F' else 'i'}{s}") for n, s, t in zip(names, sizes, types, strict=True)])
    body = np.zeros(len(values), dtype=dtype)
    for i, n in enumerate(names):
        body[n] = values[:, i]
    head = {
        "VERSION": "0.7",
        "FIELDS": " ".join(names),
        "SIZE": " ".join(map(str, sizes)),
        "TYPE": " ".join(types),
        "COUNT": " ".join("1" for _ in names),
        "WIDTH": len(values),
        "HEIGHT": 1,
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": len(values),
        "DATA": "binary",
    } | header
    text = "# .PCD v0.7 - Point Cloud Data file format\n" + "".join(f"{k} {v}\n" for k, v in head.items())
    return text.encode() + body.tobytes() + b"\0" * padding


def radar_values(rng: np.random.Generator, n: int) -> np.ndarray:
    out = np.zeros((n, 18))
    out[:, 0], out[:, 1] = rng.uniform(1, 90, n), rng.uniform(-40, 40, n)
    out[:, 3], out[:, 4] = rng.integers(0, 8, n), np.arange(n)
    out[:, 5] = rng.integers(-10, 60, n) / 2
    out[:, 6:10] = np.round(rng.normal(0, 6, (n, 4)), 2)
    out[:, 10:18] = rng.integers(0, 5, (n, 8))
    return out


def lidar_values(rng: np.random.Generator, columns: int = 64) -> np.ndarray:
    azimuth = np.repeat(np.linspace(-np.pi, np.pi, columns, endpoint=False), 32)
    ring = np.tile(np.arange(32), columns)
    reach = rng.uniform(2, 60, columns * 32)
    height = np.clip(np.deg2rad(-30 + 1.3 * ring), -0.5, 0.2)
    xyz = np.c_[reach * np.cos(azimuth), reach * np.sin(azimuth), reach * np.tan(height)]
    return np.c_[xyz, rng.integers(0, 256, len(xyz)), ring].astype(np.float32)


class Tree:
    """Tables as lists of dicts; edit them, then ``write`` and ``open``. Sensor files are written at once."""

    def __init__(self, root: Path, keyframes: int = 3, seed: int = 0, version: str = "v1.0-mini") -> None:
        self.root, self.keyframes, self.version = root, keyframes, version
        self.rng = np.random.default_rng(seed)
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self._fixed_tables()
        for number, scene in enumerate(SCENES):
            self._scene(number, scene)
        self.write()

    def _fixed_tables(self) -> None:
        categories = ["vehicle.car", "human.pedestrian.adult", "animal"]
        names = ["vehicle.moving", "vehicle.parked", "pedestrian.moving"]
        cameras = [[60.0, 0, 47.2], [0, 61.0, 23.1], [0, 0, 1]]
        to_camera = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        mounts = []
        for channel, (xyz, yaw) in MOUNTS.items():
            rotation = tilted(yaw, 0.01, -0.02) @ (to_camera if "CAM" in channel else np.eye(3))
            mounts.append(
                {
                    "token": token("cal", channel),
                    "sensor_token": token("sensor", channel),
                    "translation": xyz,
                    "rotation": quaternion_from_rotation(rotation).tolist(),
                    "camera_intrinsic": cameras if "CAM" in channel else [],
                }
            )
        (self.root / "maps").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(self.root / "maps/m.png")
        self.tables = {
            "attribute": [{"token": token("attribute", n), "name": n, "description": ""} for n in names],
            "calibrated_sensor": mounts,
            "category": [{"token": token("category", n), "name": n, "description": ""} for n in categories],
            "ego_pose": [],
            "instance": [],
            "log": [{"token": token("log"), "logfile": "x", "vehicle": "n", "date_captured": "", "location": "here"}],
            "map": [{"token": token("map"), "log_tokens": [token("log")], "category": "", "filename": "maps/m.png"}],
            "sample": [],
            "sample_annotation": [],
            "sample_data": [],
            "scene": [],
            "sensor": [
                {"token": token("sensor", c), "channel": c, "modality": c.split("_")[0].lower().replace("cam", "camera")}
                for c in CHANNELS
            ],
            "visibility": [{"token": str(i + 1), "level": level, "description": ""} for i, level in enumerate(LEVELS)],
        }

    def _scene(self, number: int, scene: str) -> None:
        start = START_US + number * 60_000_000
        keys = [start + k * KEY_US for k in range(self.keyframes)]
        tokens = [token(scene, "sample", k) for k in range(self.keyframes)]
        chain = lambda items, i: {"prev": items[i - 1] if i else "", "next": items[i + 1] if i + 1 < len(items) else ""}  # noqa: E731
        for k, stamp in enumerate(keys):
            row = {"token": tokens[k], "timestamp": stamp, "scene_token": token(scene), **chain(tokens, k)}
            self.tables["sample"].append(row)
        self.tables["scene"].append(
            {
                "token": token(scene),
                "log_token": token("log"),
                "nbr_samples": len(keys),
                "first_sample_token": tokens[0],
                "last_sample_token": tokens[-1],
                "name": scene,
                "description": "tiny",
            }
        )
        for channel in CHANNELS:
            self._channel(scene, channel, start, tokens)
        for track in range(3):
            self._track(scene, track, tokens)

    def _pose(self, scene: str, stamp: int) -> dict[str, Any]:
        t = (stamp - START_US) * 1e-6 % 60
        rotation = tilted(0.3 + 0.4 * t, 0.02 * np.sin(t), -0.03 * np.cos(2 * t))
        xyz = [411.3 + 7.0 * t, 1180.9 - 3.0 * t * t, 0.1 * t]
        return {"timestamp": stamp, "rotation": quaternion_from_rotation(rotation).tolist(), "translation": xyz}

    def _channel(self, scene: str, channel: str, start: int, samples: list[str]) -> None:
        kind = "lidar" if "LIDAR" in channel else "radar" if "RADAR" in channel else "camera"
        steps = KEY_US // PERIOD_US[kind]
        total = (self.keyframes - 1) * steps + 1
        tokens = [token(scene, channel, i) for i in range(total)]
        for i in range(total):
            is_key, stamp = i % steps == 0, start + i * PERIOD_US[kind] + OFFSET_US[channel]
            folder = "samples" if is_key else "sweeps"
            suffix = {"lidar": "pcd.bin", "radar": "pcd", "camera": "jpg"}[kind]
            name = f"{folder}/{channel}/{scene}__{channel}__{stamp}.{suffix}"
            self._sensor_file(kind, self.root / name)
            self.tables["ego_pose"].append({"token": tokens[i], **self._pose(scene, stamp)})
            self.tables["sample_data"].append(
                {
                    "token": tokens[i],
                    "sample_token": samples[-(-i // steps)],
                    "ego_pose_token": tokens[i],
                    "calibrated_sensor_token": token("cal", channel),
                    "timestamp": stamp,
                    "fileformat": suffix,
                    "is_key_frame": is_key,
                    "height": HW[0] if kind == "camera" else 0,
                    "width": HW[1] if kind == "camera" else 0,
                    "filename": name,
                    "prev": tokens[i - 1] if i else "",
                    "next": tokens[i + 1] if i + 1 < total else "",
                }
            )

    def _sensor_file(self, kind: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "lidar":
            path.write_bytes(lidar_values(self.rng).tobytes())
        elif kind == "radar":
            path.write_bytes(radar_file(radar_values(self.rng, int(self.rng.integers(3, 20)))))
        else:
            pixels = self.rng.integers(0, 255, (HW[0] // 8, HW[1] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(path, quality=92)

    def _track(self, scene: str, track: int, samples: list[str]) -> None:
        """Track 0 spans all samples, track 1 the first alone, track 2 (an ignored category) all but the first."""
        alive = [samples, samples[:1], samples[1:]][track]
        tokens = [token(scene, "ann", track, s) for s in alive]
        self.tables["instance"].append(
            {
                "token": token(scene, "instance", track),
                "category_token": self.tables["category"][track]["token"],
                "nbr_annotations": len(alive),
                "first_annotation_token": tokens[0] if tokens else "",
                "last_annotation_token": tokens[-1] if tokens else "",
            }
        )
        for i, sample in enumerate(alive):
            yaw = 0.2 + 0.3 * i + track
            self.tables["sample_annotation"].append(
                {
                    "token": tokens[i],
                    "sample_token": sample,
                    "instance_token": token(scene, "instance", track),
                    "visibility_token": ["4", "", "2"][track],
                    "attribute_tokens": [[token("attribute", "vehicle.moving")], [], []][track],
                    "translation": [420.0 + 2.5 * i * (track + 1), 1175.0 - 4 * track, 0.8],
                    "size": [1.9, 4.5, 1.6],
                    "rotation": quaternion_from_rotation(tilted(yaw)).tolist(),
                    "prev": tokens[i - 1] if i else "",
                    "next": tokens[i + 1] if i + 1 < len(tokens) else "",
                    "num_lidar_pts": [12, 0, 3][track],
                    "num_radar_pts": [1, 0, 0][track],
                }
            )

    # ---- use ------------------------------------------------------------------------------------------------------------

    def write(self) -> Tree:
        folder = self.root / self.version
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.tables.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=0))
        return self

    def open(self, sensors: tuple[str, ...] | None = CHANNELS, **options: Any) -> NuScenesReader:
        return open_nuscenes(self.root, self.version, sensors=sensors, **options)

    def data(self, channel: str, key: int = 0, scene: str = SCENES[0]) -> dict[str, Any]:
        """The sample_data row of a keyframe, to be edited."""
        wanted = token(scene, "sample", key)
        return next(
            r
            for r in self.tables["sample_data"]
            if r["sample_token"] == wanted and r["is_key_frame"] and f"/{channel}/" in r["filename"]
        )

    def file(self, channel: str, key: int = 0, scene: str = SCENES[0]) -> Path:
        return self.root / self.data(channel, key, scene)["filename"]
