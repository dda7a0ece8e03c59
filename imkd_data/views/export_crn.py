"""``imkd-data export --to crn | bevdepth``: the files that CRN's and BEVDepth's own scripts write.

exact (raw data readable): recomputed from raw columns, poses and records with the scripts' own arithmetic. cache-only: the
same files and filters within the stored steps; depth rows in ring order, file names made of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.cache.export_folder import ExportFolder
from imkd_data.errors import MismatchError, UsageError
from imkd_data.fields.radar import radar_filter_mask
from imkd_data.readers.nuscenes import NuScenesReader, open_nuscenes
from imkd_data.sample import Sample
from imkd_data.views.crn import BevDepthView, CrnView
from imkd_data.views.records import Records, pickled
from imkd_data.views.released import Cloud32, image_points, rotation_of, transform_of

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["CrnExact", "all_there", "export_bevdepth", "export_crn", "raw_reader"]

Progress = Callable[[int, int, str], None]
Rows = Sequence[int] | NDArray[np.int64]
F32 = NDArray[np.float32]
_CAM_SWEEPS, _LIDAR_SWEEPS, _RADAR_SWEEPS = 6, 10, 8
_BORDER_PX, _DEPTH_M, _REACH_M = 1, (0.1, 100.0), (0.1, 100.0)


def raw_reader(cache: Cache, dataroot: Path, radar_sweeps: int) -> NuScenesReader:
    """The raw data of a cache. UsageError where the cache is not of nuScenes."""
    if cache.recipe.dataset != "nuscenes":
        raise UsageError("exact exports know nuScenes trees only", found=cache.recipe.dataset, next="leave --dataroot out")
    return open_nuscenes(
        dataroot,
        cache.recipe.version,
        sensors=cache.recipe.sensors,
        lidar_sweeps=1,
        radar_sweeps=radar_sweeps,
        reference_channel=cache.recipe.reference_channel,
    )


class CrnExact:
    """CRN's four scripts for one sample at a time. as_released: with their known defects in velocities and sweep records."""

    def __init__(self, reader: NuScenesReader, as_released: bool) -> None:
        self.reader, self.as_released = reader, as_released
        self.records = Records(reader)
        self.hw_px = reader.suite.image_hw_px

    def files(self, sample: Sample, radar: bool) -> dict[str, bytes]:
        """Depth and, where asked for, radar files of a sample, by relative name."""
        row = self.records.sample_row(sample.token)
        lidar = self.records.key(row, "LIDAR_TOP")
        names = {f.camera.name: os.path.basename(f.path) for f in sample.cameras}
        payload = self.reader.read(sample, frozenset({"lidar_key", "radar"} if radar else {"lidar_key"}))
        scan = payload.lidar[0] if payload.lidar else None
        out: dict[str, bytes] = {}
        if scan is not None:
            points = np.concatenate([scan.xyz_m, scan.features], axis=1)[..., :4].T
            for name, table in self._in_images(Cloud32(points), lidar, row, tuple(names), (0.0, np.inf)).items():
                out[f"depth_gt/{names[name]}.bin"] = table.tobytes()
        if radar:
            bev = self.radar_bev(sample, row)
            out[f"radar_bev_filter/{os.path.basename(sample.lidar[0].path)}"] = bev.tobytes()
            cloud = Cloud32(bev[:, :4].T.copy())
            for name, table in self._in_images(cloud, lidar, row, tuple(names), _DEPTH_M, bev[:, 3:]).items():
                out[f"radar_pv_filter/{names[name]}.bin"] = table.tobytes()
        return out

    def _in_images(
        self,
        cloud: Cloud32,
        lidar: int,
        row: int,
        cameras: tuple[str, ...],
        depth_m: tuple[float, float],
        extra: F32 | None = None,
    ) -> dict[str, F32]:
        """LiDAR-frame points -> per camera rows u, v, depth and ``extra``, through the world, float32 after every step."""
        for record in (self.records.calibration(lidar), self.records.ego_pose(lidar)):
            cloud.into(record["translation"], record["rotation"])
        out: dict[str, F32] = {}
        for name in cameras:
            data = self.records.key(row, name)
            cal, pose = self.records.calibration(data), self.records.ego_pose(data)
            here = cloud.copy().out_of(pose["translation"], pose["rotation"]).out_of(cal["translation"], cal["rotation"])
            depth = here.points[2, :]
            uv = image_points(here.points[:3, :], cal["camera_intrinsic"])
            with np.errstate(invalid="ignore"):
                keep = (depth > depth_m[0]) & (depth < depth_m[1])
                for axis, size in ((0, self.hw_px[1]), (1, self.hw_px[0])):
                    keep &= (uv[axis] > _BORDER_PX) & (uv[axis] < size - _BORDER_PX)
            parts: list[NDArray[Any]] = [uv[:2].T, depth[:, None]]
            parts += [] if extra is None else [extra]
            out[name] = np.concatenate(parts, axis=1)[keep].astype(np.float32)
        return out

    def radar_bev(self, sample: Sample, row: int) -> F32:
        """(P, 7) of all radars in the LiDAR key frame."""
        r = self.records
        lidar = r.key(row, "LIDAR_TOP")
        cal, pose = r.calibration(lidar), r.ego_pose(lidar)
        to_lidar = [transform_of(p["translation"], p["rotation"], inverse=True) for p in (cal, pose)]
        lidar_s = 1e-6 * int(r.t.data_timestamp[lidar])
        clouds = self.reader.read(sample, frozenset({"radar"})).radar or {}
        tables: list[F32] = []
        for channel in self.reader.suite.radars:
            if channel not in clouds:
                continue
            data = r.key(row, channel)
            for sweep, (scan, at) in enumerate(zip(clouds[channel], [data, *r.previous(data, _RADAR_SWEEPS - 1)], strict=True)):
                columns = {name: scan.column(name) for name in scan.feature_names}
                table = scan.features[radar_filter_mask(columns, "crn")].astype(np.float64).T
                tables.append(self._moved(table, scan.feature_names, to_lidar, cal, at, lidar_s, sweep))
        points = np.concatenate([np.zeros((0, 7), np.float32), *tables])
        reach = np.linalg.norm(points[:, 0:2], axis=1)
        near: F32 = points[(reach > _REACH_M[0]) & (reach < _REACH_M[1])]
        return near

    def _moved(
        self,
        table: NDArray[np.float64],
        names: tuple[str, ...],
        to_lidar: list[NDArray[np.float64]],
        lidar_cal: dict[str, Any],
        data: int,
        lidar_s: float,
        sweep: int,
    ) -> F32:
        at = {name: i for i, name in enumerate(names)}
        cal, pose = self.records.calibration(data), self.records.ego_pose(data)
        from_radar = [transform_of(p["translation"], p["rotation"]) for p in (pose, cal)]
        matrix = reduce(np.dot, [*to_lidar, *from_radar])
        xyz = matrix.dot(np.vstack((table[:3], np.ones(table.shape[1]))))[:3]
        velocity = np.vstack((table[[at["vx_comp"], at["vy_comp"]]], np.zeros(table.shape[1])))
        if self.as_released:  # mountings only: the car's own turn between the two instants is left out
            velocity = np.dot(rotation_of(cal["rotation"]), velocity)
            velocity = np.dot(rotation_of(lidar_cal["rotation"]).T, velocity)
        else:
            velocity = np.dot(matrix[:3, :3], velocity)
        lag_s = lidar_s - 1e-6 * int(self.records.t.data_timestamp[data])
        xyz[0] += velocity[0] * lag_s
        xyz[1] += velocity[1] * lag_s
        rows = np.vstack((xyz, table[at["rcs"]], velocity[:2], np.full(table.shape[1], float(sweep))))
        return rows.T.astype(np.float32)

    # ---- infos ----------------------------------------------------------------------------------------------------------

    def info(self, sample: Sample) -> dict[str, Any]:
        """The info dict of a sample."""
        r, t = self.records, self.records.t
        row = r.sample_row(sample.token)
        cameras = {c: r.key(row, c) for c in self.reader.suite.cameras if c in self.reader.sensors}
        lidar = r.key(row, "LIDAR_TOP")
        last = next(reversed(cameras.values()), lidar)
        drop = ("token",)
        info: dict[str, Any] = {
            "scene_name": sample.scene,
            "sample_token": sample.token,
            "timestamp": int(t.sample_timestamp[row]),
            "scene_token": sample.scene_token,
            "cam_infos": {c: self._record(d, d, d, drop) for c, d in cameras.items()},
            "lidar_infos": {"LIDAR_TOP": self._record(lidar, lidar, lidar, (*drop, "is_key_frame", "height", "width"))},
        }
        sweeps: list[dict[str, Any]] = [{} for _ in range(_CAM_SWEEPS)]
        for channel, key in cameras.items():
            for j, data in enumerate(self._own_sweeps(key, _CAM_SWEEPS)):
                of = (key, key) if self.as_released else (data, data)
                sweeps[j][channel] = self._record(data, *of, drop)
        info["cam_sweeps"] = _until_empty(sweeps)
        sweeps = [{} for _ in range(_LIDAR_SWEEPS)]
        for j, data in enumerate(self._own_sweeps(lidar, _LIDAR_SWEEPS)):
            sweeps[j]["LIDAR_TOP"] = self._record(data, data, last if self.as_released else data, (*drop, "height", "width"))
        info["lidar_sweeps"] = _until_empty(sweeps)
        if sample.boxes is not None:
            info["ann_infos"] = r.annotations(row)
            for annotation in info["ann_infos"]:
                if self.as_released and np.any(np.isnan(annotation["velocity"])):
                    annotation["velocity"] = np.zeros(3)
        return info

    def _own_sweeps(self, key: int, limit: int) -> list[int]:
        """Previous sweeps while they belong to the same sample."""
        t = self.records.t
        out = []
        for data in self.records.previous(key, limit):
            if t.data_sample[data] != t.data_sample[key]:
                break
            out.append(data)
        return out

    def _record(self, data: int, pose_of: int, calibration_of: int, drop: tuple[str, ...]) -> dict[str, Any]:
        record = {k: v for k, v in self.records.data(data).items() if k not in drop}
        record["ego_pose"], record["calibrated_sensor"] = (
            self.records.ego_pose(pose_of),
            self.records.calibration(calibration_of),
        )
        return record


def _until_empty(sweeps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    empty = next((i for i, s in enumerate(sweeps) if not s), len(sweeps))
    return sweeps[:empty]


# ---- the commands ---------------------------------------------------------------------------------------------------------


def export_crn(
    cache: Cache,
    out: Path,
    *,
    rows: Rows,
    dataroot: Path | None = None,
    as_released: bool = False,
    progress: Progress | None = None,
    radar: bool = True,
) -> int:
    """Write depth_gt/, radar_bev_filter/, radar_pv_filter/ and the info files. Returns the number of files.

    Raises MismatchError (the cache lacks a sensor or field), UsageError (as_released without raw data; a folder in use).
    """
    if as_released and dataroot is None:
        raise UsageError(
            "--as-released needs the raw data",
            rule="export.raw",
            expected="--dataroot: the released defects depend on mountings and records that a cache does not hold",
        )
    kind = "crn" if radar else "bevdepth"
    view = CrnView(cache) if radar else BevDepthView(cache)
    level = "exact" if dataroot else "cache-only"
    tokens = [cache.token(int(r)) for r in rows]
    identity = {"kind": kind, "level": level, "as_released": as_released, "cache": cache.id, "tokens": tokens}
    with ExportFolder(Path(out), identity, (cache.path / "NOTICE").read_bytes()) as folder:
        facts: dict[str, Any] = {"samples": len(tokens)}
        if dataroot:
            exact = CrnExact(raw_reader(cache, dataroot, _RADAR_SWEEPS), as_released)
            _write_exact(cache, folder, rows, exact, radar, progress)
        else:
            facts |= _write_stored(cache, folder, rows, view, radar, progress)
        return folder.finish(facts)


def export_bevdepth(cache: Cache, out: Path, **options: Any) -> int:
    """As ``export_crn`` without radar: depth_gt/ and the info files."""
    return export_crn(cache, out, radar=False, **options)


def _info_files(infos: dict[str, list[dict[str, Any]]]) -> dict[str, bytes]:
    files = {}
    for split, chosen in infos.items():
        name = split.removeprefix("mini_")
        files[f"nuscenes_infos_{name}.pkl"] = pickled(chosen)
        if name == "train":
            first = sorted({i["scene_name"] for i in chosen})[:2]
            files["nuscenes_infos_train-tiny.pkl"] = pickled([i for i in chosen if i["scene_name"] in first])
    return files


def _write_exact(
    cache: Cache, folder: ExportFolder, rows: Rows, exact: CrnExact, radar: bool, progress: Progress | None
) -> None:
    wanted = {cache.token(int(r)) for r in rows}
    scenes = {cache.index["scene"][cache.line(int(r))].as_py() for r in rows}
    infos: dict[str, list[dict[str, Any]]] = {}
    done = 0
    for scene in (s for s in exact.records.t.scene_name if s in scenes):  # in the order of the scene table, as the script
        for sample in exact.reader.samples(scene):
            if sample.token not in wanted:
                continue
            if sample.token not in folder.done:
                folder.put(sample.token, exact.files(sample, radar))
            infos.setdefault(sample.split, []).append(exact.info(sample))
            done += 1
            if progress:
                progress(done, len(wanted), scene)
    all_there(done, len(wanted), exact.reader)
    folder.put("infos", _info_files(infos))


def all_there(found: int, wanted: int, reader: NuScenesReader) -> None:
    """MismatchError where the raw tables lack samples of the cache: another data set, or a part of it."""
    if found != wanted:
        raise MismatchError(
            "the raw data are not those of the cache",
            rule="export.source",
            expected=f"{wanted:,} samples of the cache",
            found=f"{found:,} of them in the tables",
            file=str(reader.dataroot),
            next="pass the --dataroot that the cache was built from",
        )


def _write_stored(
    cache: Cache, folder: ExportFolder, rows: Rows, view: CrnView, radar: bool, progress: Progress | None
) -> dict[str, Any]:
    infos: dict[str, list[dict[str, Any]]] = {}
    edge = {"depth_gt": 0} | ({"radar_bev_filter": 0} if radar else {})
    for done, row in enumerate(map(int, rows)):
        info = view.info(row)
        for name, count in view.at_the_edge(row, radar).items():
            edge[name] += count
        if info["sample_token"] not in folder.done:
            files = {f"depth_gt/{_base(info, c)}.bin": t.tobytes() for c, t in view.depth_gt(row).items()}
            if radar:
                bev = view.radar_bev(row)
                lidar = next(iter(info["lidar_infos"].values()))
                files[f"radar_bev_filter/{os.path.basename(lidar['filename'])}"] = bev.tobytes()
                files |= {f"radar_pv_filter/{_base(info, c)}.bin": t.tobytes() for c, t in view.radar_pv(row, bev).items()}
            folder.put(info["sample_token"], files)
        infos.setdefault(cache.index["split"][cache.line(row)].as_py(), []).append(info)
        if progress:
            progress(done + 1, len(rows), info["scene_name"])
    folder.put("infos", _info_files(infos))
    return {
        "depth_order": "ring, then column",
        "info_order": "scene name, then time",
        "file_names": "sample token, channel, time",
        "rows_within_a_step_of_a_filter_edge": edge,
    }


def _base(info: dict[str, Any], camera: str) -> str:
    return os.path.basename(str(info["cam_infos"][camera]["filename"]))
