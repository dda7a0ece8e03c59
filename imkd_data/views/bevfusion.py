"""BEVFusion and CRKD: 45-feature radar points; and the seven-column points of RCBEVDet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import UsageError
from imkd_data.geometry import EGO, Pose
from imkd_data.views.base import View
from imkd_data.views.lidar import lidar_boxes, lidar_points
from imkd_data.views.radar import RadarCloud, radar_cloud

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["CRKD_COLUMNS", "BevFusionView", "RcBevDetView", "crkd_features"]

_ONE_HOT = (("dyn_prop", 8), ("ambig_state", 5), ("invalid_state", 18))
_ORDINAL = 7
CRKD_COLUMNS = (
    *("x", "y", "z", "rcs", "vx_comp", "vy_comp", "age_s"),
    *(f"{name}={i}" for name, n in _ONE_HOT for i in range(n)),
    *(f"pdh0>{i}" for i in range(_ORDINAL)),
)
RADAR_NEEDS = ("radar_points", "radar_pose", "sample_pose")


def crkd_features(cloud: RadarCloud, dst_from_ego: Pose, age_s: NDArray[np.float64]) -> NDArray[np.float32]:
    """(P, 45) by ``CRKD_COLUMNS`` in frame dst: positions moved by velocity times ``age_s``, velocities rotated only."""
    xyz, velocity = dst_from_ego.points(cloud.xyz_m), dst_from_ego.vectors(cloud.comp_mps)[:, :2]
    xyz[:, :2] += velocity * age_s[:, None]
    n = len(xyz)
    blocks = [xyz, cloud.columns["rcs"][:, None], velocity, age_s[:, None]]
    for name, size in _ONE_HOT:
        hot = np.zeros((n, size))
        state = cloud.columns[name].astype(np.int64)
        known = (state >= 0) & (state < size)
        hot[np.flatnonzero(known), state[known]] = 1
        blocks.append(hot)
    blocks.append(cloud.columns["pdh0"][:, None] > np.arange(_ORDINAL))
    features: NDArray[np.float32] = np.concatenate(blocks, axis=1).astype(np.float32)
    return features


class BevFusionView(View):
    """``radar`` (P, 45) by ``CRKD_COLUMNS``, every state kept; ``points`` (N, 5) x, y, z, intensity, age of the LiDAR sweeps;
    ``gt_boxes`` and matrices, all in ``frame``: ego (default) or lidar.

    as_released: LiDAR frame, and ages relative to each radar's own key scan instead of the LiDAR's. (The released info files
    also repeat the oldest scan at a scene's start; a cache holds each scan once and does not repeat it.)
    """

    name = "bevfusion"
    needs: ClassVar[tuple[str, ...]] = RADAR_NEEDS

    def __init__(
        self, cache: Cache, *, frame: str = "ego", sweeps: int = 6, keep: str = "none", as_released: bool = False
    ) -> None:
        super().__init__(cache)
        if frame not in ("ego", "lidar"):
            raise UsageError("unknown frame", expected="ego or lidar", found=frame)
        self.frame = "lidar" if as_released else frame
        self.sweeps, self.keep, self.as_released = sweeps, keep, as_released

    def sample(self, row: int) -> dict[str, Any]:
        """See the class."""
        move = self.ego_from_lidar(row).inverse() if self.frame == "lidar" else Pose.identity(EGO, EGO)
        cloud = radar_cloud(self.cache, row, sweeps=self.sweeps, keep=self.keep)
        age_s = cloud.age_s
        if self.as_released:
            age_s = age_s - self.cache.read("radar_pose", row)[cloud.sensor, 0, 12]
        out: dict[str, Any] = {"token": self.cache.token(row), "frame": self.frame, "radar": crkd_features(cloud, move, age_s)}
        if self.has("lidar_points"):
            out["points"] = lidar_points(self.cache, row, move)
        if self.has("boxes"):
            out["gt_boxes"], out["gt_labels"] = lidar_boxes(self.cache.decode("boxes", row), move)
        if self.has("camera_calibration"):
            out |= self._matrices(row, move)
        if self.has("images"):
            out["images"] = self.cache.read("images", row)
        return out

    def _matrices(self, row: int, move: Pose) -> dict[str, Any]:
        """(V, 4, 4): camera_intrinsics, camera2frame, frame2image (full image) of the cameras named in ``cameras``."""
        cameras = self.cameras(row)
        to_frame = [(move @ pose).matrix() for _, pose, _, _ in cameras.values()]
        k = [self.matrix4(k) for k, _, _, _ in cameras.values()]
        return {
            "cameras": tuple(cameras),
            "camera_intrinsics": np.stack(k),
            "camera2frame": np.stack(to_frame),
            "frame2image": np.stack([a @ np.linalg.inv(b) for a, b in zip(k, to_frame, strict=True)]),
        }


class RcBevDetView(View):
    """``radar`` (P, 7) x, y, z, vx_comp, vy_comp, rcs, age in s, LiDAR key frame, eight sweeps, positions as measured."""

    name = "rcbevdet"
    needs: ClassVar[tuple[str, ...]] = RADAR_NEEDS

    def __init__(self, cache: Cache, *, sweeps: int = 8, keep: str = "none") -> None:
        super().__init__(cache)
        self.sweeps, self.keep = sweeps, keep

    def sample(self, row: int) -> dict[str, Any]:
        """See the class."""
        move = self.ego_from_lidar(row).inverse()
        cloud = radar_cloud(self.cache, row, sweeps=self.sweeps, keep=self.keep)
        velocity = move.vectors(cloud.comp_mps)[:, :2]
        radar = np.column_stack([move.points(cloud.xyz_m), velocity, cloud.columns["rcs"], cloud.age_s]).astype(np.float32)
        out: dict[str, Any] = {"token": self.cache.token(row), "radar": radar}
        if self.has("boxes"):
            out["gt_boxes"], out["gt_labels"] = lidar_boxes(self.cache.decode("boxes", row), move)
        if self.has("images"):
            out["images"] = self.cache.read("images", row)
        return out
