"""Record one scene: every sensor file and the scene's rows of the tables."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from imkd_data.geometry import F64, quaternion_from_rotation
from imkd_data.world import rig as rigs
from imkd_data.world.annotate import KeyTruth, annotated, attribute_name, make_key_truth
from imkd_data.world.camera import CameraModel, encode_jpeg
from imkd_data.world.lidar import LidarModel
from imkd_data.world.options import WorldOptions, random_stream, token
from imkd_data.world.radar import RadarModel, encode_pcd
from imkd_data.world.road import ASPHALT, MARKING
from imkd_data.world.scene import Primitives, Scene, make_scene
from imkd_data.world.schedule import Shot, make_schedule
from imkd_data.world.tables import Row, SceneRows, calibration_rows

VEHICLE_NAME, LOCATION = "synth", "synthetic-town"
_SHARED_S = 0.1  # radar scans this close together share one set of primitives for what hides what


class Recorder:
    """Writes one scene below ``root``; ``rows`` holds its table rows afterwards."""

    def __init__(self, root: Path, options: WorldOptions, index: int) -> None:
        self.root, self.options = root, options
        self.scene: Scene = make_scene(options, index)
        self.rig = rigs.make_rig(random_stream(options.seed, index, "rig"), options.image_hw_px)
        self.key = f"imkd/{options.seed}/{index}"
        self.rows = SceneRows(scene_key=self.key)
        self.lidar, self.radar = LidarModel(self.scene, self.rig), RadarModel(self.scene, self.rig)
        self.camera = CameraModel(self.scene, self.rig)
        start = datetime.datetime.fromtimestamp(self.scene.timestamp_us(0.0) // 1_000_000, tz=datetime.UTC)
        self.log = f"{VEHICLE_NAME}-{start:%Y-%m-%d-%H-%M-%S}+0000"
        self.date = f"{start:%Y-%m-%d}"
        self.lidar_m: list[F64] = []
        self.radar_m: list[list[F64]] = [[] for _ in range(options.keyframes)]
        self.shared: tuple[int, Primitives, Any] | None = None

    def record(self) -> dict[str, list[Row]]:
        """Write all files; return the scene's rows (the scene's name is left empty)."""
        schedule = make_schedule(self.scene, self.options)
        self.rows.rows["calibrated_sensor"] = calibration_rows(self.rig, self.key)
        self._samples(schedule[rigs.LIDAR])
        for channel, shots in schedule.items():
            for kind in ("samples", "sweeps"):
                (self.root / kind / channel).mkdir(parents=True, exist_ok=True)
            if channel not in rigs.RADARS:
                self.rows.chain([self._shoot(channel, shot) for shot in shots])
        # Radar scans of one moment share what hides what: take them in time order, chain them by channel.
        radar = sorted(((shot, c) for c in rigs.RADARS for shot in schedule[c]), key=lambda x: (x[0].timestamp_us, x[1]))
        made: dict[str, list[Row]] = {c: [] for c in rigs.RADARS}
        for shot, channel in radar:
            made[channel].append(self._shoot(channel, shot))
        for channel in rigs.RADARS:
            self.rows.chain(made[channel])
        if self.options.annotated:
            self._annotations(schedule[rigs.LIDAR])
        self._map()
        return self.rows.rows

    def _samples(self, shots: list[Shot]) -> None:
        scene_token, log_token = token(self.key, "scene"), token(self.key, "log")
        keys = [s for s in shots if s.key]
        samples = [
            self.rows.add(
                "sample",
                token=token(self.key, "sample", s.sample),
                timestamp=s.timestamp_us,
                prev="",
                next="",
                scene_token=scene_token,
            )
            for s in keys
        ]
        self.rows.chain(samples)
        self.rows.add(
            "log", token=log_token, logfile=self.log, vehicle=VEHICLE_NAME, date_captured=self.date, location=LOCATION
        )
        said = {"clear": "Sunny", "rain": "Rain", "night": "Night", "rain-night": "Night, rain"}[self.scene.weather]
        self.rows.add(
            "scene", token=scene_token, log_token=log_token, nbr_samples=len(samples), first_sample_token=samples[0]["token"],
            last_sample_token=samples[-1]["token"], name="", description=f"{said}, road works, parked vehicles, peds, crossing",
        )  # fmt: skip

    def _shoot(self, channel: str, shot: Shot) -> Row:
        """Write one sensor file and its two rows."""
        t_s = self.scene.seconds(shot.timestamp_us)
        ending = ".jpg" if channel in rigs.CAMERAS else (".pcd.bin" if channel == rigs.LIDAR else ".pcd")
        folder = "samples" if shot.key else "sweeps"
        name = f"{folder}/{channel}/{self.log}__{channel}__{shot.timestamp_us}{ending}"
        height, width = self.rig.image_hw_px if channel in rigs.CAMERAS else (0, 0)
        if channel == rigs.LIDAR:
            data = self._lidar_bytes(t_s, shot)
        elif channel in rigs.RADARS:
            data = self._radar_bytes(channel, t_s, shot)
        elif self.options.images:
            image = self.camera.view(channel, t_s).image
            assert image is not None
            data = encode_jpeg(image)
        else:
            data = b""
        if data:
            (self.root / name).write_bytes(data)
        own = token(self.key, channel, shot.timestamp_us)
        rotation, translation = self.scene.ego.poses(np.array([t_s]))
        self.rows.add(
            "ego_pose", token=own, timestamp=shot.timestamp_us,
            rotation=[float(v) for v in quaternion_from_rotation(rotation[0])], translation=[float(v) for v in translation[0]],
        )  # fmt: skip
        return self.rows.add(
            "sample_data", token=own, sample_token=token(self.key, "sample", shot.sample), ego_pose_token=own,
            calibrated_sensor_token=token(self.key, "calibrated_sensor", channel), timestamp=shot.timestamp_us,
            fileformat=ending[1:4], is_key_frame=shot.key, height=height, width=width, filename=name, prev="", next="",
        )  # fmt: skip

    def _lidar_bytes(self, t_s: float, shot: Shot) -> bytes:
        points = self.lidar.turn(t_s).points
        if shot.key:
            rotation, origin = self.lidar.sensor_poses(np.array([t_s]))
            self.lidar_m.append(points[:, :3].astype(np.float64) @ rotation[0].T + origin[0])
        return points.tobytes()

    def _radar_bytes(self, channel: str, t_s: float, shot: Shot) -> bytes:
        step = round(t_s / _SHARED_S)
        if self.shared is None or self.shared[0] != step:
            centre = self.scene.ego.poses(np.array([t_s]))[1][0, :2]
            things = self.scene.primitives(step * _SHARED_S, centre, 180.0)
            self.shared = (step, things, things.tree(0.0))
        points = self.radar.scan(channel, t_s, self.shared[1], self.shared[2])
        if shot.key:
            rotation, translation = self.scene.ego.poses(np.array([t_s]))
            mount = self.rig.poses[channel]
            xyz = np.stack([points["x"], points["y"], points["z"]], axis=1).astype(np.float64)
            self.radar_m[shot.sample].append(mount.points(xyz) @ rotation[0].T + translation[0])
        return encode_pcd(points)

    def _annotations(self, shots: list[Shot]) -> None:
        truths: list[KeyTruth] = []
        for k, shot in enumerate(s for s in shots if s.key):
            t_s = self.scene.seconds(shot.timestamp_us)
            eye = self.lidar.sensor_poses(np.array([t_s]))[1][0]
            truths.append(make_key_truth(self.scene, t_s, eye, self.lidar_m[k], np.concatenate(self.radar_m[k])))
        for number, actor in enumerate(self.scene.actors):
            keyframes = annotated(truths, number)
            if keyframes:
                self._track(number, actor.category, actor.role, [(k, truths[k]) for k in keyframes])

    def _track(self, number: int, category: str, role: str, held: list[tuple[int, KeyTruth]]) -> None:
        """The rows of one instance."""
        instance = token(self.key, "instance", number)
        made = []
        for k, truth in held:
            at = int(np.flatnonzero(truth.actor == number)[0])
            attribute = attribute_name(category, role, float(truth.speed_mps[at]))
            length, width, height = (float(v) for v in truth.size_lwh_m[at])
            half = truth.yaw_rad[at] / 2
            made.append(
                self.rows.add(
                    "sample_annotation",
                    token=token(self.key, "annotation", number, k),
                    sample_token=token(self.key, "sample", k),
                    instance_token=instance,
                    visibility_token=str(truth.visibility[at]),
                    attribute_tokens=[token("attribute", attribute)] if attribute else [],
                    translation=[float(v) for v in truth.centre_m[at]],
                    size=[width, length, height],
                    rotation=[float(np.cos(half)), 0.0, 0.0, float(np.sin(half))],
                    prev="",
                    next="",
                    num_lidar_pts=int(truth.num_lidar[at]),
                    num_radar_pts=int(truth.num_radar[at]),
                )
            )
        self.rows.chain(made)
        self.rows.add(
            "instance", token=instance, category_token=token("category", category), nbr_annotations=len(made),
            first_annotation_token=made[0]["token"], last_annotation_token=made[-1]["token"],
        )  # fmt: skip

    def _map(self) -> None:
        """The drivable surface as a mask of 0.1 m pixels, row 0 at the top, as the devkit reads it."""
        from PIL import Image

        cells = self.scene.ground.cells
        mask = (((cells == ASPHALT) | (cells == MARKING)) * np.uint8(255))[::-1]
        map_token = token(self.key, "map")
        (self.root / "maps").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(mask)).save(self.root / "maps" / f"{map_token}.png", compress_level=2)
        self.rows.add(
            "map", category="semantic_prior", token=map_token, filename=f"maps/{map_token}.png",
            log_tokens=[token(self.key, "log")],
        )  # fmt: skip
