"""What a reader makes of a data set: points, boxes, sensor frames, samples and their payload. All values are frozen."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import Camera, Pose, frozen_array

__all__ = ["Boxes", "ImageFrame", "Payload", "Points", "Reader", "Sample", "SensorSuite", "Sweep", "freeze", "same_everywhere"]


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


def freeze(instance: Any) -> None:
    """Set every array of a frozen dataclass read-only (copying writeable ones)."""
    kind: Any = type(instance)
    for name in _names(kind):
        value = getattr(instance, name)
        if isinstance(value, np.ndarray) and value.flags.writeable:
            object.__setattr__(instance, name, frozen_array(value))


def same_everywhere(value: float, n: int) -> NDArray[np.float32]:
    """(n,) f32 that is one number n times, without the memory of it."""
    one = np.array([value], dtype=np.float32)
    one.flags.writeable = False
    return np.ndarray((n,), dtype=np.float32, buffer=one, strides=(0,))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """LiDAR or radar points in one named frame.

    xyz_m (N, 3) f32; velocity_mps (N, 2) f32 in the same frame, or None; time_s (N,) f32 relative to the key time
    (negative = past); features (N, F) f32, one column per feature_names entry, raw sensor units.
    """

    frame: str
    xyz_m: NDArray[np.float32]
    time_s: NDArray[np.float32]
    features: NDArray[np.float32]
    feature_names: tuple[str, ...]
    velocity_mps: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        freeze(self)
        n = len(self.xyz_m)
        if self.time_s.shape != (n,) or self.features.shape != (n, len(self.feature_names)):
            raise ValueError(f"Points: {n} points, time {self.time_s.shape}, features {self.features.shape}")

    def __len__(self) -> int:
        return len(self.xyz_m)

    def column(self, name: str) -> NDArray[np.float32]:
        """One feature column (N,)."""
        return self.features[:, self.feature_names.index(name)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boxes:
    """Truth or detections in one named frame; gravity centres, yaw about z from the x axis, size length, width, height.

    velocity_mps (M, 2), NaN = unknown; label (M,) index into the detection classes, -1 = ignored category; score (M,)
    1 for truth; num_lidar, num_radar (M,) points inside, -1 = unknown; attribute (M,) index, -1 = unknown; visibility
    (M,) 1..4, 0 = unknown; token: annotation token, instance: track token ('' where there is none).
    """

    frame: str
    centre_m: NDArray[np.float64]
    size_lwh_m: NDArray[np.float64]
    yaw_rad: NDArray[np.float64]
    velocity_mps: NDArray[np.float64]
    label: NDArray[np.int64]
    score: NDArray[np.float64]
    num_lidar: NDArray[np.int64]
    num_radar: NDArray[np.int64]
    attribute: NDArray[np.int64]
    visibility: NDArray[np.int64]
    token: tuple[str, ...] = ()
    instance: tuple[str, ...] = ()
    track: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        freeze(self)

    def __len__(self) -> int:
        return len(self.centre_m)

    @property
    def has_point(self) -> NDArray[np.bool_]:
        """(M,) boxes with a LiDAR or radar point inside: what models train on. Where neither count is known (-1) a box stays
        in: of such a data set nothing else would."""
        seen = (self.num_lidar > 0) | (self.num_radar > 0)
        return seen | ((self.num_lidar < 0) & (self.num_radar < 0))

    @classmethod
    def empty(cls, frame: str) -> Boxes:
        """No boxes."""
        f, i = np.zeros(0), np.zeros(0, dtype=np.int64)
        return cls(
            frame=frame,
            centre_m=np.zeros((0, 3)),
            size_lwh_m=np.zeros((0, 3)),
            yaw_rad=f,
            velocity_mps=np.zeros((0, 2)),
            label=i,
            score=f,
            num_lidar=i,
            num_radar=i,
            attribute=i,
            visibility=i,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """One LiDAR or radar scan: its file, its instant, and where the sensor was (own pose, own calibration).

    ``ego_from_sensor``: sensor@t -> vehicle mounting -> ego@t -> global -> ego (key time). ``vehicle_from_sensor``: the
    mounting alone. ``is_key``: the scan that belongs to the keyframe.
    """

    channel: str
    path: str  # relative to the data root
    timestamp_us: int
    ego_from_sensor: Pose
    vehicle_from_sensor: Pose
    is_key: bool
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageFrame:
    """One camera image of a keyframe; ``camera`` has full image size, its own time and its pose in ego (key time)."""

    camera: Camera
    path: str  # relative to the data root
    vehicle_from_camera: Pose
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A keyframe: small, picklable, every pose already expressed in ``ego`` (ego at the reference sensor's key time).

    cameras, lidar, radar hold only declared sensors. ``lidar`` is key sweep first, then past sweeps newest first.
    ``radar`` maps channel -> the same. ``boxes`` is None where the split has no annotations.
    """

    dataset: str
    token: str
    scene: str
    scene_token: str
    split: str
    timestamp_us: int
    global_from_ego: Pose
    ego_from_reference: Pose
    cameras: tuple[ImageFrame, ...]
    lidar: tuple[Sweep, ...]
    radar: Mapping[str, tuple[Sweep, ...]]
    boxes: Boxes | None
    location: str = ""
    description: str = ""
    previous: str = ""  # sample token, '' at the scene's start
    next: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Payload:
    """The sensor content of one sample, each file read once. Parts that were not asked for are None.

    images: camera name -> file bytes. lidar: one Points per sweep of ``sample.lidar``, each in its *sensor's* frame,
    features (intensity, ring). radar: channel -> one Points per sweep, sensor frame, features = the raw columns as the
    file has them. ``files``: (relative path, size in bytes, crc32c) of everything read, in reading order.
    ``dropped``: counts of points that were left out by rule (non_finite, ...). ``warnings``: counts by rule id of things
    that are odd but legal (a receipt or log may carry them; they never stop a build unless the reader is strict).
    """

    sample: Sample
    images: Mapping[str, bytes] | None = None
    lidar: tuple[Points, ...] | None = None
    radar: Mapping[str, tuple[Points, ...]] | None = None
    files: tuple[tuple[str, int, int], ...] = ()
    dropped: Mapping[str, int] | None = None
    warnings: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SensorSuite:
    """What a data set's sensors are called and how they number things; the reader owns it, fields and views ask it."""

    cameras: tuple[str, ...]  # the order of every camera axis
    lidar: str | None
    radars: tuple[str, ...]  # the order of every radar axis
    radar_columns: tuple[str, ...]  # raw columns of a radar file, in order; x, y, z and vx.., vy.. pairs are geometry
    reflectance_max: float  # largest LiDAR intensity; readers give whole numbers 0..255
    image_hw_px: tuple[int, int]  # full size
    max_radar_sweeps: int
    max_radar_points: int  # per scan
    licence: str
    radar_steps: Mapping[str, float] = field(default_factory=dict)  # stored step of a raw column where it is not the default

    @property
    def channels(self) -> tuple[str, ...]:
        """All sensors: LiDAR, cameras, radars."""
        return ((self.lidar,) if self.lidar else ()) + self.cameras + self.radars


class Reader(Protocol):
    """What the cache asks of a data set. One file per data set under readers/ implements it."""

    suite: SensorSuite

    def scene_names(self, split: str) -> tuple[str, ...]:
        """Scenes of a split that the tables hold, sorted by name."""
        ...

    def samples(self, scene: str) -> tuple[Sample, ...]:
        """The scene's keyframes in time order."""
        ...

    def read(self, sample: Sample, needs: frozenset[str]) -> Payload:
        """Read what is in ``needs``: any of images, lidar (all sweeps), lidar_key (at least the key scan), radar.

        ``cameras`` and ``boxes`` may be among the needs too; they stand in the sample already."""
        ...

    def input_manifest(self, sample: Sample, needs: frozenset[str]) -> list[list[Any]]:
        """What fields with these needs (images, lidar, lidar_key, radar, cameras, boxes) depend on: [relative path, size]
        of files, and hashes of table rows, the sample's pose always. No paths of the machine, no times."""
        ...
