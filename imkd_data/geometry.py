"""Rigid poses, pinhole cameras and bird's-eye-view grids. float64 throughout; values are frozen.

Frames: ``global``; ``ego`` = ego vehicle at the sample's key time (x forward, y left, z up, metres); any other instant is
``ego@<timestamp_us>``; a sensor at an instant is ``<CHANNEL>@<timestamp_us>``; ``vehicle`` = ego axes without a time
(mountings); ``bev`` = ego after augmentation. A transform is called ``dst_from_src``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from imkd_data.errors import FrameMismatchError, RecipeError

F64 = NDArray[np.float64]

GLOBAL, EGO, VEHICLE, BEV = "global", "ego", "vehicle", "bev"


def frozen_array(value: ArrayLike, dtype: Any = None) -> NDArray[Any]:
    """A read-only array; copies only when the input is writeable."""
    array = np.asarray(value, dtype=dtype)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def ego_at(timestamp_us: int) -> str:
    """Name of the ego frame at an instant other than the key time."""
    return f"ego@{timestamp_us}"


def sensor_at(channel: str, timestamp_us: int) -> str:
    """Name of a sensor's frame at an instant."""
    return f"{channel}@{timestamp_us}"


def matmul3(a: F64, b: F64) -> F64:
    """(..., 3, 3) times (..., 3, K), summed in one fixed order.

    Not BLAS: its summation order differs between libraries and processors, and a last bit can move a point to the next cell.
    """
    terms = [np.asarray(a[..., :, k : k + 1] * b[..., k : k + 1, :], dtype=np.float64) for k in range(3)]
    return terms[0] + terms[1] + terms[2]


def rotation_from_quaternion(wxyz: ArrayLike) -> F64:
    """(..., 4) quaternions (w, x, y, z), normalised here -> (..., 3, 3) rotation matrices."""
    q = np.asarray(wxyz, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def quaternion_from_rotation(rotation: ArrayLike) -> F64:
    """(3, 3) rotation -> unit quaternion (w, x, y, z) with w >= 0 (Shepperd's method)."""
    m = np.asarray(rotation, dtype=np.float64)
    k = np.array([m[0, 0] + m[1, 1] + m[2, 2], m[0, 0], m[1, 1], m[2, 2]])
    case = int(np.argmax(k))
    if case == 0:
        q = np.array([1 + k[0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]])
    else:
        i, j, l = case - 1, case % 3, (case + 1) % 3
        q = np.zeros(4)
        q[0] = m[l, j] - m[j, l]
        q[1 + i] = 1 + m[i, i] - m[j, j] - m[l, l]
        q[1 + j] = m[j, i] + m[i, j]
        q[1 + l] = m[l, i] + m[i, l]
    q /= np.linalg.norm(q)
    return q if q[0] >= 0 else -q


def yaw_from_rotation(rotation: ArrayLike) -> Any:
    """Heading of the rotated x axis in the x-y plane, radians; (..., 3, 3) -> (...)."""
    r = np.asarray(rotation, dtype=np.float64)
    return np.arctan2(r[..., 1, 0], r[..., 0, 0])


def rotation_from_yaw(yaw_rad: float) -> F64:
    """(3, 3) rotation about z."""
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pose:
    """Rigid transform ``dst_from_src``: rotation (3, 3) and translation (3,) metres, both float64, read-only."""

    dst: str
    src: str
    rotation: F64
    translation_m: F64
    _row: F64 | None = field(default=None, init=False, repr=False)  # ``matrix34`` where it is known

    def __post_init__(self) -> None:
        object.__setattr__(self, "rotation", frozen_array(self.rotation, np.float64))
        object.__setattr__(self, "translation_m", frozen_array(self.translation_m, np.float64))
        if self.rotation.shape != (3, 3) or self.translation_m.shape != (3,):
            raise ValueError(f"Pose needs (3, 3) and (3,), got {self.rotation.shape} and {self.translation_m.shape}")

    @classmethod
    def many(cls, dst: list[str], src: list[str], rotation: F64, translation_m: F64) -> list[Pose]:
        """Poses from stacks (K, 3, 3) and (K, 3), checked once: a sample has a hundred of them."""
        rotation, translation_m = frozen_array(rotation, np.float64), frozen_array(translation_m, np.float64)
        if rotation.shape != (len(src), 3, 3) or translation_m.shape != (len(src), 3) or len(dst) != len(src):
            raise ValueError(f"Pose.many needs (K, 3, 3) and (K, 3), got {rotation.shape} and {translation_m.shape}")
        rows = np.concatenate([rotation, translation_m[:, :, None]], axis=2).reshape(-1, 12)
        rows.flags.writeable = False
        out = []
        for values in zip(dst, src, rotation, translation_m, rows, strict=True):
            pose = object.__new__(cls)
            for setter, value in zip(_SETTERS, values, strict=True):
                setter(pose, value)
            out.append(pose)
        return out

    @classmethod
    def from_quaternion(cls, dst: str, src: str, wxyz: ArrayLike, translation_m: ArrayLike) -> Pose:
        """From a (w, x, y, z) quaternion, normalised here."""
        return cls(dst=dst, src=src, rotation=rotation_from_quaternion(wxyz), translation_m=np.asarray(translation_m))

    @classmethod
    def from_matrix34(cls, dst: str, src: str, matrix: ArrayLike) -> Pose:
        """From the first three rows of a homogeneous matrix, any shape with 12 values (row major)."""
        m = np.asarray(matrix, dtype=np.float64).reshape(3, 4)
        return cls(dst=dst, src=src, rotation=m[:, :3], translation_m=m[:, 3])

    @classmethod
    def identity(cls, dst: str, src: str) -> Pose:
        """The transform that only renames the frame."""
        return cls(dst=dst, src=src, rotation=np.eye(3), translation_m=np.zeros(3))

    def __matmul__(self, other: Pose) -> Pose:
        if self.src != other.dst:
            raise FrameMismatchError(
                f"cannot chain {self.dst}_from_{self.src} @ {other.dst}_from_{other.src}",
                expected=f"dst {self.src}",
                found=f"dst {other.dst}",
            )
        return Pose(
            dst=self.dst,
            src=other.src,
            rotation=matmul3(self.rotation, other.rotation),
            translation_m=matmul3(self.rotation, other.translation_m[:, None])[:, 0] + self.translation_m,
        )

    def inverse(self) -> Pose:
        """``src_from_dst``."""
        rotation = self.rotation.T
        return Pose(
            dst=self.src, src=self.dst, rotation=rotation, translation_m=-matmul3(rotation, self.translation_m[:, None])[:, 0]
        )

    def points(self, xyz_m: ArrayLike) -> F64:
        """(..., 3) points in src -> (..., 3) points in dst."""
        return np.asarray(xyz_m, dtype=np.float64) @ self.rotation.T + self.translation_m

    def vectors(self, xyz: ArrayLike) -> F64:
        """(..., 3) free vectors (velocities, directions): rotated, never translated."""
        return np.asarray(xyz, dtype=np.float64) @ self.rotation.T

    def matrix(self) -> F64:
        """(4, 4) homogeneous matrix."""
        m = np.eye(4)
        m[:3, :3], m[:3, 3] = self.rotation, self.translation_m
        return m

    def matrix34(self) -> F64:
        """(12,) first three rows, row major: the form stored in caches."""
        if self._row is not None:
            return self._row
        m = np.empty((3, 4))
        m[:, :3], m[:, 3] = self.rotation, self.translation_m
        return m.reshape(12)

    def yaw_rad(self) -> float:
        """Heading of src's x axis in dst."""
        return float(yaw_from_rotation(self.rotation))

    def renamed(self, *, dst: str | None = None, src: str | None = None) -> Pose:
        """The same numbers under other frame names; use only where two names mean one frame."""
        return replace(self, dst=dst or self.dst, src=src or self.src)


_SETTERS = tuple(getattr(Pose, item.name).__set__ for item in fields(Pose))  # the slots of a frozen class, for ``Pose.many``


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Camera:
    """A pinhole camera: frame x right, y down, z forward; pixel centres at integers; u right, v down.

    ``image_from_camera`` (3, 3) px. Resizing, cropping and flipping give a new Camera, so there is no separate
    augmentation matrix anywhere.
    """

    name: str
    image_from_camera: F64
    ego_from_camera: Pose
    width_px: int
    height_px: int
    timestamp_us: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_from_camera", frozen_array(self.image_from_camera, np.float64))

    def project(self, xyz_camera_m: ArrayLike) -> tuple[F64, F64]:
        """(N, 3) camera points -> (N, 2) pixels u, v and (N,) depth = camera z. Points with z <= 0 give non-finite uv."""
        xyz = np.asarray(xyz_camera_m, dtype=np.float64)
        uvw = xyz @ self.image_from_camera.T
        with np.errstate(divide="ignore", invalid="ignore"):
            uv = uvw[:, :2] / uvw[:, 2:3]
        return np.where(xyz[:, 2:3] > 0, uv, np.nan), xyz[:, 2]

    def resized(self, width_px: int, height_px: int) -> Camera:
        """Resize of the whole image; pixel centres at integers, so u' = (u + 0.5) s - 0.5."""
        sx, sy = width_px / self.width_px, height_px / self.height_px
        a = np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])
        return replace(self, image_from_camera=a @ self.image_from_camera, width_px=width_px, height_px=height_px)

    def cropped(self, left_px: int, top_px: int, width_px: int, height_px: int) -> Camera:
        """Keep the window whose upper left pixel is (left, top)."""
        a = np.array([[1, 0, -left_px], [0, 1, -top_px], [0, 0, 1]], dtype=np.float64)
        return replace(self, image_from_camera=a @ self.image_from_camera, width_px=width_px, height_px=height_px)

    def flipped(self) -> Camera:
        """Mirror left-right: u' = width - 1 - u."""
        a = np.array([[-1, 0, self.width_px - 1], [0, 1, 0], [0, 0, 1]], dtype=np.float64)
        return replace(self, image_from_camera=a @ self.image_from_camera)


def _whole_mm(name: str, value_m: float) -> int:
    mm = round(value_m * 1000)
    if abs(mm - value_m * 1000) > 1e-6:
        raise RecipeError(
            f"grid {name} must be a whole number of millimetres",
            found=f"{value_m} m",
            next="round it to 0.001 m; otherwise cells do not pool exactly",
        )
    return mm


@dataclass(frozen=True, slots=True, kw_only=True)
class BevGrid:
    """A bird's-eye-view grid: half-open cells, arrays (ny, nx), row = y, column = x, row 0 at y_min.

    The one rule for "which cell": ``x_mm = floor(1000 x)`` in float64, ``column = (x_mm - x_min_mm) // cell_mm``.
    Truncation towards zero is never used: it pulls points outside the lower edge into cell 0.

    >>> g = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=0.2, nx=512, ny=512)
    >>> g.coarser(4).shape, g.coarser(4).cell_m
    ((128, 128), 0.8)
    """

    x_min_m: float
    y_min_m: float
    cell_m: float
    nx: int
    ny: int

    def __post_init__(self) -> None:
        if self.nx < 1 or self.ny < 1 or self.cell_m <= 0:
            raise RecipeError("grid must have positive cell size and counts", found=repr(self))
        for name in ("x_min_m", "y_min_m", "cell_m"):
            _whole_mm(name, getattr(self, name))

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.ny, self.nx

    @property
    def x_max_m(self) -> float:
        """Upper edge, exclusive."""
        return (self.x_min_mm + self.nx * self.cell_mm) / 1000

    @property
    def y_max_m(self) -> float:
        """Upper edge, exclusive."""
        return (self.y_min_mm + self.ny * self.cell_mm) / 1000

    @property
    def x_min_mm(self) -> int:
        """Lower edge in millimetres."""
        return _whole_mm("x_min_m", self.x_min_m)

    @property
    def y_min_mm(self) -> int:
        """Lower edge in millimetres."""
        return _whole_mm("y_min_m", self.y_min_m)

    @property
    def cell_mm(self) -> int:
        """Cell size in millimetres."""
        return _whole_mm("cell_m", self.cell_m)

    def coarser(self, k: int) -> BevGrid:
        """The grid whose cells are k x k cells of this one."""
        if k < 1 or self.nx % k or self.ny % k:
            raise RecipeError(f"grid {self.ny}x{self.nx} does not pool by {k}", expected="a divisor of both counts")
        return BevGrid(
            x_min_m=self.x_min_m, y_min_m=self.y_min_m, cell_m=self.cell_mm * k / 1000, nx=self.nx // k, ny=self.ny // k
        )

    def cells(self, xy_m: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(N, 2) metres -> row (N,), column (N,), inside (N,). Rows and columns outside are not clipped."""
        xy = np.asarray(xy_m, dtype=np.float64)
        mm = np.floor(xy * 1000).astype(np.int64)
        column = (mm[:, 0] - self.x_min_mm) // self.cell_mm
        row = (mm[:, 1] - self.y_min_mm) // self.cell_mm
        return row, column, (row >= 0) & (row < self.ny) & (column >= 0) & (column < self.nx)

    def centres(self) -> F64:
        """(ny, nx, 2) x, y of the cell centres in metres."""
        x = (self.x_min_mm + (np.arange(self.nx) + 0.5) * self.cell_mm) / 1000
        y = (self.y_min_mm + (np.arange(self.ny) + 0.5) * self.cell_mm) / 1000
        return np.stack(np.meshgrid(x, y, indexing="xy"), axis=-1)

    def as_dict(self) -> dict[str, float | int]:
        """JSON form."""
        return {n: getattr(self, n) for n in ("x_min_m", "y_min_m", "cell_m", "nx", "ny")}
