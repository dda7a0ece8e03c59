"""What the public conversion scripts compute, written again from their documented steps with devkit calls only.

Nothing here imports our readers, fields or views: two writers of the same arithmetic must agree.
"""

from __future__ import annotations

import os
from functools import reduce
from typing import Any

import numpy as np
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud, RadarPointCloud
from nuscenes.utils.geometry_utils import transform_matrix, view_points
from pyquaternion import Quaternion

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")


def records(nusc: NuScenes, data_token: str) -> tuple[dict, dict, dict]:
    """sample_data, calibrated_sensor, ego_pose."""
    data = nusc.get("sample_data", data_token)
    return data, nusc.get("calibrated_sensor", data["calibrated_sensor_token"]), nusc.get("ego_pose", data["ego_pose_token"])


def raw(record: dict, *keys: str) -> dict:
    return {k: record[k] for k in keys}


# ---- CRN ----------------------------------------------------------------------------------------------------------------


def to_images(
    nusc: NuScenes, sample: dict, points: np.ndarray, extra: np.ndarray | None, near: float, far: float, border: float = 1.0
) -> dict[str, np.ndarray]:
    """(4, N) points in the LiDAR key frame -> {image base name: rows u, v, depth, *extra}, in the points' precision.

    A translation is given in that precision: NumPy 1 adds a float64 number to a float32 cloud in float32, as the scripts were
    written for; NumPy 2 would not.
    """
    _, cal, pose = records(nusc, sample["data"]["LIDAR_TOP"])
    cloud = LidarPointCloud(points)
    for record in (cal, pose):
        cloud.rotate(Quaternion(record["rotation"]).rotation_matrix)
        cloud.translate(np.array(record["translation"], points.dtype))
    out = {}
    for name in CAMERAS:
        data, cal, pose = records(nusc, sample["data"][name])
        here = LidarPointCloud(cloud.points.copy())
        for record in (pose, cal):
            here.translate(-np.array(record["translation"], points.dtype))
            here.rotate(Quaternion(record["rotation"]).rotation_matrix.T)
        depth = here.points[2]
        uv = view_points(here.points[:3], np.array(cal["camera_intrinsic"]), normalize=True)
        keep = (depth > near) & (depth < far)
        for axis, size in ((0, data["width"]), (1, data["height"])):
            keep &= (uv[axis] > border) & (uv[axis] < size - border)
        table = [uv[:2].T, depth[:, None]] + ([] if extra is None else [extra])
        out[os.path.basename(data["filename"])] = np.concatenate(table, axis=1)[keep].astype(points.dtype)
    return out


def exact_depth(nusc: NuScenes, sample: dict, border: float) -> dict[str, np.ndarray]:
    """As ``depth_gt`` in double precision, rows u, v, depth in ring, then column order."""
    data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    scan = np.fromfile(os.path.join(nusc.dataroot, data["filename"]), dtype=np.float32).reshape(-1, 5).astype(np.float64)
    scan = scan[np.argsort(scan[:, 4], kind="stable")]
    return to_images(nusc, sample, scan[:, :4].T, None, 0.0, np.inf, border)


def depth_gt(nusc: NuScenes, sample: dict) -> dict[str, np.ndarray]:
    data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    scan = np.fromfile(os.path.join(nusc.dataroot, data["filename"]), dtype=np.float32).reshape(-1, 5)[:, :4]
    return to_images(nusc, sample, scan.T, None, 0.0, np.inf)


def radar_bev(nusc: NuScenes, sample: dict, full_rotation: bool, dtype: type = np.float32) -> np.ndarray:
    """(P, 7) in the LiDAR key frame. full_rotation False: as released, velocities skip the car's rotation."""
    lidar, lidar_cal, lidar_pose = records(nusc, sample["data"]["LIDAR_TOP"])
    to_lidar = [transform_matrix(r["translation"], Quaternion(r["rotation"]), inverse=True) for r in (lidar_cal, lidar_pose)]
    every = np.zeros((18, 0))
    for name in (r for r in RADARS if r in sample["data"]):
        token = sample["data"][name]
        for sweep in range(8):
            data, cal, pose = records(nusc, token)
            path = os.path.join(nusc.dataroot, data["filename"])
            cloud = RadarPointCloud.from_file(path, [0, 4, 8, 9, 10, 11, 12, 15, 16, 17], list(range(8)), [3])
            world = [transform_matrix(r["translation"], Quaternion(r["rotation"])) for r in (pose, cal)]
            matrix = reduce(np.dot, [*to_lidar, *world])
            cloud.transform(matrix)
            velocity = np.vstack((cloud.points[8:10], np.zeros(cloud.points.shape[1])))
            if full_rotation:
                velocity = np.dot(matrix[:3, :3], velocity)
            else:
                velocity = np.dot(Quaternion(cal["rotation"]).rotation_matrix, velocity)
                velocity = np.dot(Quaternion(lidar_cal["rotation"]).rotation_matrix.T, velocity)
            cloud.points[8:10] = velocity[:2]
            lag = 1e-6 * lidar["timestamp"] - 1e-6 * data["timestamp"]
            cloud.points[0] += cloud.points[8] * lag
            cloud.points[1] += cloud.points[9] * lag
            cloud.points[-1] = sweep
            every = np.hstack((every, cloud.points))
            if data["prev"] == "":
                break
            token = data["prev"]
    rows = every[[0, 1, 2, 5, 8, 9, -1]].T.astype(dtype)
    reach = np.linalg.norm(rows[:, :2], axis=1)
    return rows[(reach > 0.1) & (reach < 100.0)]


def radar_pv(nusc: NuScenes, sample: dict, bev: np.ndarray) -> dict[str, np.ndarray]:
    return to_images(nusc, sample, bev[:, :4].T.copy(), bev[:, 3:], 0.1, 100.0)


def crn_infos(nusc: NuScenes, scenes: set[str], as_released: bool) -> list[dict]:
    out = []
    for scene in nusc.scene:
        token = scene["first_sample_token"] if scene["name"] in scenes else ""
        while token:
            sample = nusc.get("sample", token)
            out.append(crn_info(nusc, scene, sample, as_released))
            token = sample["next"]
    return out


def crn_info(nusc: NuScenes, scene: dict, sample: dict, as_released: bool) -> dict:
    info: dict[str, Any] = {
        "scene_name": scene["name"],
        "sample_token": sample["token"],
        "timestamp": sample["timestamp"],
        "scene_token": sample["scene_token"],
    }
    image_keys = ("sample_token", "timestamp", "is_key_frame", "height", "width", "filename")
    lidar_keys = ("sample_token", "timestamp", "filename")
    keys, cams, lidars = {}, {}, {}
    for name in CAMERAS:
        data, cal, pose = keys[name] = records(nusc, sample["data"][name])
        cams[name] = raw(data, *image_keys) | {"ego_pose": pose, "calibrated_sensor": cal}
    data, cal, pose = keys["LIDAR_TOP"] = records(nusc, sample["data"]["LIDAR_TOP"])
    lidars["LIDAR_TOP"] = raw(data, *lidar_keys) | {"ego_pose": pose, "calibrated_sensor": cal}
    info |= {"cam_infos": cams, "lidar_infos": lidars}
    for field, names, count, wanted in (
        ("cam_sweeps", CAMERAS, 6, image_keys),
        ("lidar_sweeps", ("LIDAR_TOP",), 10, (*lidar_keys, "is_key_frame")),
    ):
        sweeps: list[dict] = [{} for _ in range(count)]
        for name in names:
            key = data = keys[name][0]
            for j in range(count):
                if data["prev"] == "":
                    break
                data, cal, pose = records(nusc, data["prev"])
                if data["sample_token"] != key["sample_token"]:
                    break
                if as_released and field == "cam_sweeps":  # the key frame's pose and calibration
                    _, cal, pose = keys[name]
                if as_released and field == "lidar_sweeps":  # the calibration of the last camera of the loop
                    cal = keys["CAM_FRONT_LEFT"][1]
                sweeps[j][name] = raw(data, *wanted) | {"ego_pose": pose, "calibrated_sensor": cal}
        info[field] = sweeps[: next((i for i, s in enumerate(sweeps) if not s), count)]
    info["ann_infos"] = []
    for token in sample["anns"]:
        velocity = nusc.box_velocity(token)
        if as_released and np.isnan(velocity).any():
            velocity = np.zeros(3)
        info["ann_infos"].append(nusc.get("sample_annotation", token) | {"velocity": velocity})
    return info


# ---- mmdetection3d, BEVFusion, CRKD -----------------------------------------------------------------------------------------


def to_top(nusc: NuScenes, token: str, cal: dict, pose: dict) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and translation of a scan into the LiDAR key frame, from 4x4 matrices."""
    _, own_cal, own_pose = records(nusc, token)
    chain = [transform_matrix(r["translation"], Quaternion(r["rotation"]), inverse=True) for r in (cal, pose)]
    chain += [transform_matrix(r["translation"], Quaternion(r["rotation"])) for r in (own_pose, own_cal)]
    matrix = reduce(np.dot, chain)
    return matrix[:3, :3], matrix[:3, 3]


CONVERTER_CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")


def converter_scan(nusc: NuScenes, token: str, kind: str, cal: dict, pose: dict) -> dict:
    """A scan's entry in the converter's infos: row vectors, so points @ rotation.T + translation."""
    data, own_cal, own_pose = records(nusc, token)
    own, world = (Quaternion(r["rotation"]).rotation_matrix for r in (own_cal, own_pose))
    key, key_world = (np.linalg.inv(Quaternion(r["rotation"]).rotation_matrix).T for r in (cal, pose))
    rotation = (own.T @ world.T) @ (key_world @ key)
    translation = (own_cal["translation"] @ world.T + own_pose["translation"]) @ (key_world @ key)
    translation -= pose["translation"] @ (key_world @ key) + cal["translation"] @ key
    return {
        "data_path": str(nusc.get_sample_data_path(token)),
        "type": kind,
        "sample_data_token": token,
        "sensor2ego_translation": own_cal["translation"],
        "sensor2ego_rotation": own_cal["rotation"],
        "ego2global_translation": own_pose["translation"],
        "ego2global_rotation": own_pose["rotation"],
        "timestamp": data["timestamp"],
        "sensor2lidar_rotation": rotation.T,
        "sensor2lidar_translation": translation,
    }


def chain(nusc: NuScenes, token: str, limit: int) -> list[str]:
    """Up to ``limit`` sample_data tokens before one."""
    out: list[str] = []
    while len(out) < limit and (token := nusc.get("sample_data", token)["prev"]):
        out.append(token)
    return out


def converter_info(nusc: NuScenes, sample: dict, radar: bool, as_released: bool) -> dict:
    """mmdetection3d's info of a sample; with radar the older box order and the radar scans of BEVFusion and CRKD."""
    lidar = sample["data"]["LIDAR_TOP"]
    _, cal, pose = records(nusc, lidar)
    boxes = nusc.get_sample_data(lidar)[1]
    annotations = [nusc.get("sample_annotation", token) for token in sample["anns"]]
    back = [np.linalg.inv(Quaternion(r["rotation"]).rotation_matrix).T for r in (pose, cal)]
    velocity = [np.array([*nusc.box_velocity(t)[:2], 0.0]) @ back[0] @ back[1] for t in sample["anns"]]
    yaw = np.array([b.orientation.yaw_pitch_roll[0] for b in boxes]).reshape(-1, 1)
    centre, wlh = (np.array([getattr(b, n) for b in boxes]).reshape(-1, 3) for n in ("center", "wlh"))
    shape = [wlh, -yaw - np.pi / 2] if radar else [wlh[:, [1, 0, 2]], yaw]
    info = {
        "lidar_path": nusc.get_sample_data_path(lidar),
        "token": sample["token"],
        "cams": {},
        "lidar2ego_translation": cal["translation"],
        "lidar2ego_rotation": cal["rotation"],
        "ego2global_translation": pose["translation"],
        "ego2global_rotation": pose["rotation"],
        "timestamp": sample["timestamp"],
        "sweeps": [converter_scan(nusc, t, "lidar", cal, pose) for t in chain(nusc, lidar, 10)],
        "gt_boxes": np.concatenate([centre, *shape], axis=1),
        "gt_names": np.array([category_to_detection_name(b.name) or b.name for b in boxes]),
        "gt_velocity": np.array(velocity).reshape(-1, 3)[:, :2],
        "num_lidar_pts": np.array([a["num_lidar_pts"] for a in annotations]),
        "num_radar_pts": np.array([a["num_radar_pts"] for a in annotations]),
        "valid_flag": np.array([a["num_lidar_pts"] + a["num_radar_pts"] > 0 for a in annotations]),
    }
    for name in CONVERTER_CAMERAS:
        token = sample["data"][name]
        info["cams"][name] = converter_scan(nusc, token, name, cal, pose)
        info["cams"][name]["cam_intrinsic"] = nusc.get_sample_data(token)[2]
    for name in RADARS if radar else ():
        scans = [sample["data"][name], *chain(nusc, sample["data"][name], 5)]
        scans += [scans[-1]] * (6 - len(scans)) if as_released else []
        info.setdefault("radars", {})[name] = [converter_scan(nusc, t, name, cal, pose) for t in scans]
    return info


def radar_45(nusc: NuScenes, sample: dict, as_released: bool) -> np.ndarray:
    """(P, 45) radar features in the LiDAR frame; ages to the LiDAR key time, or as released to the radar's own key scan."""
    lidar, cal, pose = records(nusc, sample["data"]["LIDAR_TOP"])
    blocks = []
    for name in RADARS:
        token = sample["data"][name]
        own_key = nusc.get("sample_data", token)["timestamp"]
        for _ in range(6):
            data = nusc.get("sample_data", token)
            points = RadarPointCloud.from_file(
                os.path.join(nusc.dataroot, data["filename"]), list(range(18)), list(range(8)), list(range(5))
            ).points.T
            rotation, translation = to_top(nusc, token, cal, pose)
            age = ((own_key if as_released else lidar["timestamp"]) - data["timestamp"]) * 1e-6
            velocity = np.c_[points[:, 8:10], np.zeros(len(points))] @ rotation.T
            xyz = points[:, :3] @ rotation.T + translation
            xyz[:, :2] += velocity[:, :2] * age
            hot = [np.eye(n)[points[:, c].astype(int)] for c, n in ((3, 8), (11, 5), (14, 18))]
            ordinal = points[:, 15:16] > np.arange(7)
            blocks.append(np.c_[xyz, points[:, 5], velocity[:, :2], np.full(len(points), age), *hot, ordinal])
            if data["prev"] == "":
                break
            token = data["prev"]
    return np.concatenate(blocks)


def boxes_in_lidar(nusc: NuScenes, sample: dict) -> list[Any]:
    """Devkit boxes in the LiDAR key frame with velocity, in table order."""
    _, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
    _, cal, pose = records(nusc, sample["data"]["LIDAR_TOP"])
    for box in boxes:
        box.velocity = nusc.box_velocity(box.token)
        for record in (pose, cal):
            box.velocity = np.dot(Quaternion(record["rotation"]).inverse.rotation_matrix, box.velocity)
    return boxes
