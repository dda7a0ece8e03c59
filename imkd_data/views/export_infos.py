"""``imkd-data export --to bevfusion | mmdet3d``: the info files of mmdetection3d's nuScenes converter and of BEVFusion/CRKD.

They point to raw files, so the raw data root is needed. mmdet3d: boxes as its version 1 has them (l, w, h, yaw). bevfusion: the
older order (w, l, h, -yaw - pi/2) that BEVFusion and CRKD read, with ``radars``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.cache.export_folder import ExportFolder
from imkd_data.classes import CLASS_FROM_CATEGORY
from imkd_data.errors import UsageError
from imkd_data.sample import Sample
from imkd_data.views.export_crn import all_there, raw_reader
from imkd_data.views.lidar import RawView
from imkd_data.views.records import Records, pickled
from imkd_data.views.released import box_in, rotation_of

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["export_bevfusion", "export_mmdet3d"]

Progress = Callable[[int, int, str], None]
Rows = Sequence[int] | NDArray[np.int64]
_CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
_LIDAR_SWEEPS, _RADAR_SWEEPS = 10, 6


class _Infos:
    """Info dicts of one tree. as_released: the oldest radar scan is repeated until there are six."""

    def __init__(self, records: Records, dataroot: Path, radar: bool, as_released: bool) -> None:
        self.r, self.root, self.radar, self.as_released = records, dataroot, radar, as_released

    def info(self, sample: Sample) -> dict[str, Any]:
        """One sample's info."""
        r, row = self.r, self.r.sample_row(sample.token)
        lidar = r.key(row, "LIDAR_TOP")
        cal, pose = r.calibration(lidar), r.ego_pose(lidar)
        info: dict[str, Any] = {
            "lidar_path": self._path(lidar),
            "token": sample.token,
            "cams": {},
            "lidar2ego_translation": cal["translation"],
            "lidar2ego_rotation": cal["rotation"],
            "ego2global_translation": pose["translation"],
            "ego2global_rotation": pose["rotation"],
            "timestamp": int(r.t.sample_timestamp[row]),
            "location": r.location(row),
            "prev_token": sample.previous,
            "sweeps": [self._to_top(d, info_of=(cal, pose), kind="lidar") for d in r.previous(lidar, _LIDAR_SWEEPS)],
        }
        for channel in _CAMERAS:
            if channel in self.r.reader.sensors:
                data = r.key(row, channel)
                matrix = r.intrinsic(data)
                entry = self._to_top(data, info_of=(cal, pose), kind=channel)
                info["cams"][channel] = entry | {"cam_intrinsic": matrix, "camera_intrinsics": matrix}
        if self.radar:
            info["radars"] = {
                c: self._radar_scans(row, c, (cal, pose)) for c in self.r.reader.suite.radars if c in r.reader.sensors
            }
        if sample.boxes is not None:
            info |= self._truth(row, cal, pose)
        return info

    def _path(self, data: int) -> str:
        return os.path.join(self.root, self.r.data(data)["filename"])

    def _radar_scans(self, row: int, channel: str, info_of: tuple[dict[str, Any], dict[str, Any]]) -> list[dict[str, Any]]:
        key = self.r.key(row, channel)
        scans = [key, *self.r.previous(key, _RADAR_SWEEPS - 1)]
        if self.as_released:
            scans += [scans[-1]] * (_RADAR_SWEEPS - len(scans))
        return [self._to_top(d, info_of=info_of, kind=channel) for d in scans]

    def _to_top(self, data: int, *, info_of: tuple[dict[str, Any], dict[str, Any]], kind: str) -> dict[str, Any]:
        """A scan and its rotation and translation into the LiDAR key frame: ``points @ rotation.T + translation``."""
        cal, pose = self.r.calibration(data), self.r.ego_pose(data)
        key_cal, key_pose = info_of
        own, world = rotation_of(cal["rotation"]), rotation_of(pose["rotation"])
        back = np.linalg.inv(rotation_of(key_pose["rotation"])).T @ np.linalg.inv(rotation_of(key_cal["rotation"])).T
        rotation = (own.T @ world.T) @ back
        translation = (np.array(cal["translation"]) @ world.T + pose["translation"]) @ back
        translation -= (
            key_pose["translation"] @ back + key_cal["translation"] @ np.linalg.inv(rotation_of(key_cal["rotation"])).T
        )
        return {
            "data_path": self._path(data),
            "type": kind,
            "sample_data_token": self.r.data(data)["token"],
            "sensor2ego_translation": cal["translation"],
            "sensor2ego_rotation": cal["rotation"],
            "ego2global_translation": pose["translation"],
            "ego2global_rotation": pose["rotation"],
            "timestamp": self.r.data(data)["timestamp"],
            "sensor2lidar_rotation": rotation.T,
            "sensor2lidar_translation": translation,
        }

    def _truth(self, row: int, cal: dict[str, Any], pose: dict[str, Any]) -> dict[str, Any]:
        truth = self.r.annotations(row)
        # As the quaternion library of the scripts takes the heading: a few microradians off where a box is tilted.
        placed = [box_in((pose, cal), a["translation"], a["rotation"]) for a in truth]
        centre = np.array([c for c, _ in placed]).reshape(-1, 3)
        yaw = np.array([y for _, y in placed]).reshape(-1, 1)
        size_wlh = np.array([a["size"] for a in truth], dtype=np.float64).reshape(-1, 3)
        back = [np.linalg.inv(rotation_of(r["rotation"])).T for r in (pose, cal)]
        velocity = [(np.array([*a["velocity"][:2], 0.0]) @ back[0] @ back[1])[:2] for a in truth]
        points = np.array([[a["num_lidar_pts"], a["num_radar_pts"]] for a in truth], dtype=np.int64).reshape(-1, 2)
        if self.radar:
            boxes = np.concatenate([centre, size_wlh, -yaw - np.pi / 2], axis=1)
        else:
            boxes = np.concatenate([centre, size_wlh[:, [1, 0, 2]], yaw], axis=1)
        return {
            "gt_boxes": boxes,
            "gt_names": np.array([CLASS_FROM_CATEGORY.get(a["category_name"], a["category_name"]) for a in truth]),
            "gt_velocity": np.array(velocity).reshape(-1, 2),
            "num_lidar_pts": points[:, 0],
            "num_radar_pts": points[:, 1],
            "valid_flag": points.sum(axis=1) > 0,
        }


def _export(
    kind: str, cache: Cache, out: Path, rows: Rows, dataroot: Path | None, as_released: bool, progress: Progress | None
) -> int:
    if dataroot is None:
        raise UsageError(
            f"--to {kind} needs --dataroot: its info files point to the raw files",
            rule="export.raw",
            next=f'add --dataroot, or read the cache itself: cache.view("{kind}")',
        )
    _LidarReference(cache)
    radar = kind == "bevfusion"
    reader = raw_reader(cache, dataroot, _RADAR_SWEEPS)
    make = _Infos(Records(reader), Path(dataroot), radar, as_released)
    wanted = {cache.token(int(r)) for r in rows}
    scenes = {cache.index["scene"][cache.line(int(r))].as_py() for r in rows}
    identity = {"kind": kind, "level": "exact", "as_released": as_released, "cache": cache.id, "tokens": sorted(wanted)}
    with ExportFolder(Path(out), identity, (cache.path / "NOTICE").read_bytes()) as folder:
        infos: dict[str, list[dict[str, Any]]] = {}
        done = 0
        for scene in (s for s in reader.tables.scene_name if s in scenes):
            for sample in reader.samples(scene):
                if sample.token in wanted:
                    infos.setdefault(sample.split.removeprefix("mini_"), []).append(make.info(sample))
                    done += 1
                    if progress:
                        progress(done, len(wanted), scene)
        all_there(done, len(wanted), reader)
        files = {}
        for split, chosen in infos.items():
            number = {info["token"]: i for i, info in enumerate(chosen)}
            for info in chosen:
                info["prev"] = number.get(info["prev_token"], -1)
            name = f"nuscenes_infos_{split}_radar.pkl" if radar else f"nuscenes_infos_{split}.pkl"
            files[name] = pickled({"infos": chosen, "metadata": {"version": cache.recipe.version}})
        folder.put("infos", files)
        return folder.finish({"samples": len(wanted)})


class _LidarReference(RawView):
    """Refuses caches whose ego is not at the LiDAR's key time."""

    name = "mmdet3d infos"
    lidar_frame = True


def export_bevfusion(
    cache: Cache,
    out: Path,
    *,
    rows: Rows,
    dataroot: Path | None = None,
    as_released: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write nuscenes_infos_<split>_radar.pkl. Returns the number of files."""
    return _export("bevfusion", cache, out, rows, dataroot, as_released, progress)


def export_mmdet3d(
    cache: Cache,
    out: Path,
    *,
    rows: Rows,
    dataroot: Path | None = None,
    as_released: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write nuscenes_infos_<split>.pkl. ``as_released`` changes nothing here: no defect of it is known."""
    return _export("mmdet3d", cache, out, rows, dataroot, as_released, progress)
