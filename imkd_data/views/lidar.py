"""LiDAR points and boxes as mmdetection3d and OpenPCDet take them, and the raw arrays in ego."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import UsageError
from imkd_data.geometry import Pose
from imkd_data.sample import Boxes
from imkd_data.views.base import View

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["Mmdet3dView", "OpenPcdetView", "RawView", "lidar_boxes", "lidar_points"]


def lidar_points(
    cache: Cache, row: int, dst_from_ego: Pose, sweeps: int | None = None, close_m: float = 0.0
) -> NDArray[np.float32]:
    """(N, 5) x, y, z in dst, intensity 0..255, age in s; key scan first. ``close_m``: leave out returns whose |x| and |y| in
    their own sensor's frame are both below it (the devkit's rule for the own car), of past sweeps and key scan alike."""
    points = cache.decode("lidar_points", row)
    keep = np.ones(len(points["sweep"]), dtype=bool) if sweeps is None else points["sweep"] < sweeps
    xyz = points["xyz_m"].astype(np.float64)
    if close_m > 0:
        matrix = points["pose"][:, :12].reshape(-1, 3, 4)[points["sweep"]]
        own = np.einsum("nji,nj->ni", matrix[:, :, :3], xyz - matrix[:, :, 3])
        keep &= ~(np.abs(own[:, :2]) < close_m).all(axis=1)
    age = points["pose"][points["sweep"], 12]
    table: NDArray[np.float32] = np.column_stack([dst_from_ego.points(xyz), points["intensity"], age])[keep].astype(np.float32)
    return table


def lidar_boxes(boxes: Boxes, dst_from_ego: Pose) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes with a class and a point (``has_point``): (M, 9) x, y, z (gravity centre), l, w, h, yaw, vx, vy in dst (velocity
    NaN = unknown), and labels (M,) in the order of ``DETECTION_CLASSES``."""
    use = (boxes.label >= 0) & boxes.has_point
    heading = np.column_stack([np.cos(boxes.yaw_rad), np.sin(boxes.yaw_rad), np.zeros(len(boxes))])
    turned = dst_from_ego.vectors(heading)
    yaw = np.arctan2(turned[:, 1], turned[:, 0])
    velocity = dst_from_ego.vectors(np.column_stack([boxes.velocity_mps, np.zeros(len(boxes))]))[:, :2]
    table = np.column_stack([dst_from_ego.points(boxes.centre_m), boxes.size_lwh_m, yaw, velocity])
    return table[use].astype(np.float32), boxes.label[use]


class OpenPcdetView(View):
    """``points`` (N, 5) x, y, z, intensity 0..255, age in s, LiDAR frame; ``gt_boxes`` (M, 9) x, y, z, dx, dy, dz, heading, vx,
    vy (gravity centre); ``gt_names``. Returns of the own car (|x|, |y| below 1 m) are left out, as its loader does."""

    name = "openpcdet"
    needs: ClassVar[tuple[str, ...]] = ("lidar_points", "sample_pose")
    close_m: ClassVar[float] = 1.0

    def __init__(self, cache: Cache, *, sweeps: int = 10) -> None:
        super().__init__(cache)
        self.sweeps = sweeps

    def sample(self, row: int) -> dict[str, Any]:
        """See the class."""
        move = self.ego_from_lidar(row).inverse()
        out: dict[str, Any] = {
            "token": self.cache.token(row),
            "points": lidar_points(self.cache, row, move, self.sweeps, self.close_m),
        }
        if self.has("boxes"):
            boxes, labels = lidar_boxes(self.cache.decode("boxes", row), move)
            out["gt_boxes"], out["gt_names"] = boxes, np.array([DETECTION_CLASSES[i] for i in labels], dtype="<U20")
        return out


class Mmdet3dView(OpenPcdetView):
    """mmdetection3d 1.x LiDAR boxes: ``gt_bboxes_3d`` (M, 9) x, y, z of the *bottom* face, l, w, h, yaw, vx, vy;
    ``gt_labels_3d`` numbers of ``classes``, ``gt_names``; points as for OpenPCDet.

    classes: the class list of the model. Its CenterPoint configurations use the order of ``DETECTION_CLASSES`` (default), its
    dataset's own METAINFO another one. Boxes of classes that are not in the list are left out.
    """

    name = "mmdet3d"

    def __init__(self, cache: Cache, *, sweeps: int = 10, classes: Sequence[str] = DETECTION_CLASSES) -> None:
        super().__init__(cache, sweeps=sweeps)
        unknown = sorted(set(classes) - set(DETECTION_CLASSES))
        if unknown:
            raise UsageError("unknown classes", expected=", ".join(DETECTION_CLASSES), found=", ".join(unknown))
        self.classes = tuple(classes)

    def sample(self, row: int) -> dict[str, Any]:
        """See the class."""
        out = super().sample(row)
        if "gt_boxes" in out:
            known = np.isin(out["gt_names"], self.classes)
            boxes, out["gt_names"] = out.pop("gt_boxes")[known], out["gt_names"][known]
            boxes[:, 2] -= boxes[:, 5] / 2
            out["gt_bboxes_3d"] = boxes
            out["gt_labels_3d"] = np.array([self.classes.index(n) for n in out["gt_names"]], dtype=np.int64)
        return out


class RawView(View):
    """Every field of the cache decoded to physical NumPy values in ego, by field name; images as JPEG bytes."""

    name = "raw"
    lidar_frame = False

    def __init__(self, cache: Cache, *, fields: tuple[str, ...] | None = None) -> None:
        self.needs = tuple(fields or ())  # type: ignore[misc]
        super().__init__(cache)
        self.fields = tuple(fields or cache.fields)

    def sample(self, row: int) -> dict[str, Any]:
        """See the class."""
        out: dict[str, Any] = {"token": self.cache.token(row)}
        for name in self.fields:
            out[name] = self.cache.read(name, row) if name == "images" else self.cache.decode(name, row)
        return out
