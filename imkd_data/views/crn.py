"""CRN, and BEVDepth on which it builds: depth points, seven-column radar points in LiDAR frame and images, infos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import CLASS_FROM_CATEGORY, DETECTION_CLASSES
from imkd_data.geometry import Pose, quaternion_from_rotation, rotation_from_yaw
from imkd_data.views.base import View
from imkd_data.views.radar import radar_cloud

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["CRN_RADAR_COLUMNS", "BevDepthView", "CrnView", "in_image"]

CRN_RADAR_COLUMNS = ("x", "y", "z", "rcs", "vx_comp", "vy_comp", "sweep")
# One raw category for each detection class: the common one.
_CATEGORY = {detection: category for category, detection in reversed(list(CLASS_FROM_CATEGORY.items()))} | {
    "bus": "vehicle.bus.rigid"
}
F32 = NDArray[np.float32]


def in_image(uv: NDArray[Any], hw_px: tuple[int, int]) -> NDArray[np.bool_]:
    """CRN's rule: strictly inside a border of one pixel."""
    u, v = uv[:, 0], uv[:, 1]
    inside: NDArray[np.bool_] = (u > 1) & (u < hw_px[1] - 1) & (v > 1) & (v < hw_px[0] - 1)
    return inside


class CrnView(View):
    """``depth_gt`` {camera: (n, 3) u, v, depth}; ``radar_bev`` (P, 7) in the LiDAR key frame; ``radar_pv`` {camera: (n, 7)
    u, v, depth, rcs, vx_comp, vy_comp, sweep}; ``info`` a dict with the keys of CRN's info files. All float32, full-size image.

    Positions are moved by velocity times age; velocities are turned through the whole chain (CRN's own files skip the
    car's rotation between the scans; ``imkd-data export --as-released`` reproduces that).
    """

    name = "crn"
    needs: ClassVar[tuple[str, ...]] = (
        *("depth_points", "depth_count", "radar_points", "radar_pose"),
        *("camera_calibration", "sample_pose"),
    )

    def __init__(self, cache: Cache, *, sweeps: int = 8, keep: str = "crn") -> None:
        super().__init__(cache)
        self.sweeps, self.keep = sweeps, keep

    def sample(self, row: int) -> dict[str, Any]:
        """See the class."""
        bev = self.radar_bev(row)
        out: dict[str, Any] = {
            "token": self.cache.token(row),
            "depth_gt": self.depth_gt(row),
            "radar_bev": bev,
            "radar_pv": self.radar_pv(row, bev),
            "info": self.info(row),
        }
        if self.has("images"):
            out["images"] = self.cache.read("images", row)
        return out

    def depth_gt(self, row: int) -> dict[str, F32]:
        """Rows in ring, then column order (CRN's files: the LiDAR file's order)."""
        size = self.cache.suite.image_hw_px
        return {name: uvd[in_image(uvd[:, :2], size)] for name, uvd in self.depth(row).items()}

    def at_the_edge(self, row: int, radar: bool) -> dict[str, int]:
        """How many stored points lie within half a stored step of a filter's edge, so that their originals may lie beyond it:
        of ``depth_gt`` the border of the image (1/64 px), of ``radar_bev_filter`` the range (5 mm along each axis)."""
        size, count = self.cache.suite.image_hw_px, 0
        for uvd in self.depth(row).values():
            uv = uvd[:, :2].astype(np.float64)
            near = np.minimum(np.abs(uv - 1), np.abs(uv - (np.array(size[::-1]) - 1))).min(axis=1, initial=np.inf)
            count += int((near <= 1 / 64).sum())
        if not radar:
            return {"depth_gt": count}
        reach = np.linalg.norm(self._radar(row)[:, :2].astype(np.float64), axis=1)
        near = np.minimum(np.abs(reach - 0.1), np.abs(reach - 100.0))
        return {"depth_gt": count, "radar_bev_filter": int((near <= 0.005 * np.sqrt(3)).sum())}

    def radar_bev(self, row: int) -> F32:
        """(P, 7) in the LiDAR key frame, 0.1 m < range < 100 m."""
        points = self._radar(row)
        reach = np.linalg.norm(points[:, :2], axis=1)
        near: F32 = points[(reach > 0.1) & (reach < 100.0)]
        return near

    def _radar(self, row: int) -> F32:
        cloud = radar_cloud(self.cache, row, sweeps=self.sweeps, keep=self.keep)
        lidar_from_ego = self.ego_from_lidar(row).inverse()
        xyz, velocity = lidar_from_ego.points(cloud.xyz_m), lidar_from_ego.vectors(cloud.comp_mps)[:, :2]
        xyz[:, :2] += velocity * cloud.age_s[:, None]
        points: F32 = np.column_stack([xyz, cloud.columns["rcs"], velocity, cloud.sweep]).astype(np.float32)
        return points

    def radar_pv(self, row: int, bev: F32) -> dict[str, F32]:
        """The same points in every image; velocities stay in LiDAR axes, as CRN uses their length only."""
        ego_from_lidar = self.ego_from_lidar(row)
        out = {}
        for name, (k, ego_from_camera, _, _) in self.cameras(row).items():
            xyz = (ego_from_camera.inverse() @ ego_from_lidar).points(bev[:, :3])
            depth = xyz[:, 2]
            with np.errstate(divide="ignore", invalid="ignore"):
                uv = (xyz @ k.T)[:, :2] / depth[:, None]
            seen = (depth > 0.1) & (depth < 100.0) & in_image(uv, self.cache.suite.image_hw_px)
            out[name] = np.column_stack([uv, depth, bev[:, 3:]])[seen].astype(np.float32)
        return out

    def info(self, row: int) -> dict[str, Any]:
        """The keys of CRN's info files, from the cache alone: poses of each sensor's own time, no sweeps, and file names made
        of the sample token (the raw names are not stored)."""
        token, stamp = self.cache.token(row), int(self.fact(row, "timestamp_us"))
        to_global = self.global_from_ego(row)
        height, width = self.cache.suite.image_hw_px
        cameras = {}
        for name, (k, ego_from_camera, mounting, age_s) in self.cameras(row).items():
            when = stamp - round(age_s * 1e6)
            vehicle = to_global @ ego_from_camera @ mounting.inverse()
            cameras[name] = {
                "sample_token": token,
                "ego_pose": _record(vehicle) | {"timestamp": when},
                "timestamp": when,
                "is_key_frame": True,
                "height": height,
                "width": width,
                "filename": f"samples/{name}/{token}__{name}__{when}.jpg",
                "calibrated_sensor": _record(mounting) | {"camera_intrinsic": k.tolist()},
            }
        lidar = self.cache.suite.lidar or ""
        lidars = {
            lidar: {
                "sample_token": token,
                "ego_pose": _record(to_global) | {"timestamp": stamp},
                "timestamp": stamp,
                "filename": f"samples/{lidar}/{token}__{lidar}__{stamp}.pcd.bin",
                "calibrated_sensor": _record(self.ego_from_lidar(row)) | {"camera_intrinsic": []},
            }
        }
        return {
            "scene_name": self.fact(row, "scene"),
            "sample_token": token,
            "timestamp": stamp,
            "scene_token": self.fact(row, "scene_token"),
            "cam_infos": cameras,
            "lidar_infos": lidars,
            "cam_sweeps": [],
            "lidar_sweeps": [],
            "ann_infos": self._annotations(row, to_global),
        }

    def _annotations(self, row: int, to_global: Pose) -> list[dict[str, Any]]:
        if not self.has("boxes"):
            return []
        boxes = self.cache.decode("boxes", row)
        tokens, instances = self.cache.annotation_tokens(row)
        out = []
        for i in np.flatnonzero(boxes.label >= 0):
            rotation = to_global.rotation @ rotation_from_yaw(boxes.yaw_rad[i])
            length, width, height = boxes.size_lwh_m[i].tolist()
            out.append(
                {
                    "token": tokens[i],
                    "sample_token": self.cache.token(row),
                    "instance_token": instances[i],
                    "visibility_token": str(boxes.visibility[i] or ""),
                    "translation": to_global.points(boxes.centre_m[i]).tolist(),
                    "size": [width, length, height],
                    "rotation": quaternion_from_rotation(rotation).tolist(),
                    "num_lidar_pts": int(boxes.num_lidar[i]),
                    "num_radar_pts": int(boxes.num_radar[i]),
                    "category_name": _CATEGORY[DETECTION_CLASSES[boxes.label[i]]],
                    "velocity": to_global.vectors([*boxes.velocity_mps[i], 0.0]),
                }
            )
        return out


class BevDepthView(CrnView):
    """Camera-only: ``depth_gt``, ``info``, and as matrices ``intrin_mats`` (V, 4, 4) of the full image, ``sensor2ego_mats``
    (V, 4, 4) camera at its own time to ego at the key time; ``gt_boxes`` (M, 9) x, y, z, l, w, h, yaw, vx, vy in ego and
    ``gt_labels`` (M,) of boxes with a point, class order of ``DETECTION_CLASSES``."""

    name = "bevdepth"
    needs: ClassVar[tuple[str, ...]] = ("depth_points", "depth_count", "camera_calibration", "sample_pose")

    def sample(self, row: int) -> dict[str, Any]:
        """See the class."""
        cameras = self.cameras(row)
        out: dict[str, Any] = {
            "token": self.cache.token(row),
            "cameras": tuple(cameras),
            "depth_gt": self.depth_gt(row),
            "info": self.info(row),
            "intrin_mats": np.stack([self.matrix4(k) for k, _, _, _ in cameras.values()]),
            "sensor2ego_mats": np.stack([pose.matrix() for _, pose, _, _ in cameras.values()]),
            "timestamps_s": np.array([-age for _, _, _, age in cameras.values()]),
        }
        if self.has("boxes"):
            b = self.cache.decode("boxes", row)
            use = (b.label >= 0) & b.has_point
            out["gt_boxes"] = np.column_stack([b.centre_m, b.size_lwh_m, b.yaw_rad, b.velocity_mps])[use].astype(np.float32)
            out["gt_labels"] = b.label[use]
        if self.has("images"):
            out["images"] = self.cache.read("images", row)
        return out


def _record(pose: Pose) -> dict[str, Any]:
    """A pose as nuScenes tables hold it."""
    return {"translation": pose.translation_m.tolist(), "rotation": quaternion_from_rotation(pose.rotation).tolist()}
