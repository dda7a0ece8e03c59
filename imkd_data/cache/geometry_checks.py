"""The self-checks of one stored row: do frames, counts and images fit together. Each yields one text per violation.

They work on a cache alone; tolerances allow for the stored steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.cache.store import Cache
from imkd_data.kernels.boxes import points_in_boxes


class Row:
    """One row, each field decoded at most once."""

    def __init__(self, cache: Cache, row: int) -> None:
        self.cache, self.row = cache, row
        self.recipe, self.suite = cache.recipe, cache.suite
        self.line = cache.line(row)
        self._read: dict[tuple[str, str], Any] = {}

    def read(self, name: str) -> Any:
        """Stored codes."""
        if ("r", name) not in self._read:
            self._read["r", name] = self.cache.read(name, self.row)
        return self._read["r", name]

    def decode(self, name: str) -> Any:
        """Physical values."""
        if ("d", name) not in self._read:
            self._read["d", name] = self.cache.decode(name, self.row)
        return self._read["d", name]

    def index(self, column: str) -> Any:
        """A value of the index line."""
        return self.cache.index[column][self.line].as_py()


def _rotation_problem(matrix34: Any) -> str:
    m = np.asarray(matrix34, np.float64).reshape(3, 4)
    if not np.isfinite(m).all():
        return "has a value that is not finite"
    r = m[:, :3]
    off = float(np.abs(r @ r.T - np.eye(3)).max())
    if off > 1e-6 or np.linalg.det(r) < 0:
        return f"is no rotation (off by {off:.2g}, determinant {np.linalg.det(r):.3f})"
    return ""


def poses(row: Row) -> Iterator[str]:
    for name in ("global_from_ego", "ego_from_reference"):
        if text := _rotation_problem(row.index(name)):
            yield f"{name} {text}"


def pose_field(row: Row) -> Iterator[str]:
    stored = np.asarray(row.read("sample_pose"))
    for i, name in enumerate(("global_from_ego", "ego_from_reference")):
        if not np.array_equal(stored[i], np.asarray(row.index(name))):
            yield f"sample_pose and the index differ in {name}"


def round_trip(row: Row) -> Iterator[str]:
    m = np.asarray(row.index("global_from_ego")).reshape(3, 4)
    points = np.array([[50.0, -30.0, 2.0], [-51.2, 51.2, -3.0], [0.0, 0.0, 0.0]])
    there = points @ m[:, :3].T + m[:, 3]
    back = (there - m[:, 3]) @ m[:, :3]
    if (error := float(np.abs(back - points).max())) > 1e-6:
        yield f"ego -> global -> ego is off by {error:.2g} m"


def times(row: Row) -> Iterator[str]:
    previous = row.index("previous_row")
    if previous >= 0:
        before = row.cache.index["timestamp_us"][row.cache.line(previous)].as_py()
        if row.index("timestamp_us") <= before:
            yield f"time does not increase: {before} then {row.index('timestamp_us')}"


def speed(row: Row) -> Iterator[str]:
    speed = row.index("ego_speed_mps")
    if speed is not None and np.isfinite(speed) and speed > 60:
        yield f"the car drives {speed:.0f} m/s"


def cameras(row: Row) -> Iterator[tuple[int, str, NDArray[np.float64]]]:
    table = np.asarray(row.read("camera_calibration"))
    for i, name in enumerate(row.suite.cameras):
        if name in row.recipe.sensors and i < len(table):
            yield i, name, table[i]


def camera_rotation(row: Row) -> Iterator[str]:
    for _, name, c in cameras(row):
        for part, at in (("ego_from_camera", 9), ("vehicle_from_camera", 21)):
            if text := _rotation_problem(c[at : at + 12]):
                yield f"{name} {part} {text}"


def intrinsics(row: Row) -> Iterator[str]:
    height, width = row.suite.image_hw_px
    for _, name, c in cameras(row):
        k = c[:9].reshape(3, 3)
        if not (k[0, 0] > 0 and k[1, 1] > 0 and k[2, 2] == 1 and k[1, 0] == k[2, 0] == k[2, 1] == 0):
            yield f"{name} has no pinhole matrix"
        elif not (0 <= k[0, 2] <= width and 0 <= k[1, 2] <= height):
            yield f"{name}: principal point {k[0, 2]:.0f}, {k[1, 2]:.0f} outside the image"


def camera_age(row: Row) -> Iterator[str]:
    for _, name, c in cameras(row):
        if not abs(c[33]) < 1.0:
            yield f"{name} was taken {c[33]:.3f} s before the key time"


def mounting(row: Row) -> Iterator[str]:
    """ego_from_camera differs from the mounting only by the car's motion in the camera's age."""
    speed = row.index("ego_speed_mps")
    if speed is None or not np.isfinite(speed):
        return
    for _, name, c in cameras(row):
        moved = float(np.linalg.norm(c[9:21].reshape(3, 4)[:, 3] - c[21:33].reshape(3, 4)[:, 3]))
        if moved > 0.5 + 2 * speed * abs(c[33]):
            yield f"{name} is {moved:.2f} m from its mounting at {speed:.1f} m/s and {c[33]:.3f} s"


def calibration_index(row: Row) -> Iterator[str]:
    pose = np.asarray(row.index("ego_from_camera")).reshape(-1, 12)
    for i, name, c in cameras(row):
        if not np.array_equal(c[9:21], pose[i], equal_nan=True):
            yield f"{name}: calibration field and index differ"


def radar_pose(row: Row) -> Iterator[str]:
    table = np.asarray(row.read("radar_pose"))
    counts = row.index("num_radar_sweeps")
    for i, name in enumerate(row.suite.radars):
        there = np.isfinite(table[i, :, 12])
        if int(there.sum()) != counts[i]:
            yield f"{name}: {int(there.sum())} poses for {counts[i]} sweeps"
        for pose in table[i][there]:
            if text := _rotation_problem(pose[:12]):
                yield f"{name} pose {text}"


def sweep_age(row: Row) -> Iterator[str]:
    table = np.asarray(row.read("radar_pose"))
    for i, name in enumerate(row.suite.radars):
        ages = table[i, :, 12][np.isfinite(table[i, :, 12])]
        if len(ages) and not (ages.min() > -0.5 and ages.max() < 5.0):
            yield f"{name}: sweep ages {ages.min():.2f} to {ages.max():.2f} s"
        if (np.diff(ages) <= 0).any():
            yield f"{name}: a sweep is repeated or out of order"


def bev_empty(row: Row) -> Iterator[str]:
    count = row.read("lidar_bev_count")
    for name in ("lidar_bev_sum", "lidar_bev_max", "lidar_bev_z_of_max"):
        if name in row.cache.fields and (np.asarray(row.read(name))[count == 0] != 0).any():
            yield f"{name} is not zero in an empty cell"


def bev_bounds(row: Row) -> Iterator[str]:
    count = row.read("lidar_bev_count").astype(np.int64)
    total, high = row.read("lidar_bev_sum").astype(np.int64), row.read("lidar_bev_max").astype(np.int64)
    if (total > high * count).any():
        yield "the sum of a cell exceeds count x maximum"
    if (total < high).any():
        yield "the maximum of a cell exceeds its sum"


def bev_constant(row: Row) -> Iterator[str]:
    high, count = row.read("lidar_bev_max"), row.read("lidar_bev_count")
    values = high[count > 0]
    if len(values) > 100 and values.min() == values.max():
        yield f"every occupied cell has intensity {values[0]}"


def bev_empty_row(row: Row) -> Iterator[str]:
    if not row.read("lidar_bev_count").any() and row.index("num_lidar_sweeps") > 0:
        yield "no LiDAR point lies inside the grid"


def bev_points(row: Row) -> Iterator[str]:
    """Points inside the grid, own car and z span left out, equal the sum of the counts."""
    p = row.decode("lidar_points")
    xyz = np.asarray(p["xyz_m"], np.float64)
    x0, x1, y0, y1, z0, z1 = row.recipe.own_car_box_m
    own = (xyz >= [x0, y0, z0]).all(1) & (xyz <= [x1, y1, z1]).all(1)
    span = (xyz[:, 2] >= row.recipe.z_min_m) & (xyz[:, 2] < row.recipe.z_min_m + row.recipe.z_span_m)
    _, _, inside = row.recipe.grid.cells(xyz[:, :2])
    counted, stored = int((inside & span & ~own).sum()), int(row.read("lidar_bev_count").sum(dtype=np.int64))
    # Stored points are rounded to 1 cm, so points within 1 cm of an edge may change sides.
    if abs(counted - stored) > 20 + 0.01 * stored:
        yield f"{stored} points in the planes, {counted} among the stored points"


def view(row: Row) -> Iterator[str]:
    k = row.recipe.view_cells
    view = np.asarray(row.read("lidar_intensity"))
    ny, nx = row.recipe.view_grid.shape

    def blocks(name: str) -> NDArray[np.int64]:
        cells: NDArray[np.int64] = row.read(name).astype(np.int64).reshape(ny, k, nx, k).swapaxes(1, 2).reshape(ny, nx, k * k)
        return cells

    count, total, high = blocks("lidar_bev_count").sum(2), blocks("lidar_bev_sum").sum(2), blocks("lidar_bev_max").max(2)
    mean = np.where(count > 0, (2 * total + count) // np.maximum(2 * count, 1), 0)
    for i, (name, expected) in enumerate((("mean", mean), ("maximum", high), ("count", np.minimum(count, 255)))):
        if (view[i] != expected).any():
            yield f"the view's {name} is not the pooled planes' in {int((view[i] != expected).sum())} cells"


def depth_bounds(row: Row) -> Iterator[str]:
    height, width = row.suite.image_hw_px
    points, counts = row.read("depth_points"), np.asarray(row.read("depth_count"))
    for i, count in enumerate(counts):
        valid, rest = points[i, :, : int(count)], points[i, :, int(count) :]
        if (valid[0] >= width * 32).any() or (valid[1] >= height * 32).any():
            yield f"{row.suite.cameras[i]}: a depth point lies outside the image"
        if rest.any():
            yield f"{row.suite.cameras[i]}: slots after depth_count are not zero"


def depth_share(row: Row) -> Iterator[str]:
    """A camera of a moving car sees some hundreds of LiDAR points, never none and never most."""
    counts = np.asarray(row.read("depth_count"))
    total = max(1, row.index("num_lidar_points"))
    for i, name in enumerate(row.suite.cameras):
        if name in row.recipe.sensors and total > 5000 and not 20 <= counts[i] <= 0.6 * max(total, 20000):
            yield f"{name} sees {counts[i]} of {total} LiDAR points"


def depth_unproject(row: Row) -> Iterator[str]:
    """Depth points taken back to ego lie on the stored LiDAR points of the key sweep."""
    lidar = row.decode("lidar_points")
    key = np.asarray(lidar["xyz_m"])[np.asarray(lidar["sweep"]) == 0].astype(np.float64)
    if len(key) == 0:
        return
    depth = row.decode("depth_points")
    cells = {tuple(c) for c in np.floor(key / 0.1).astype(np.int64)}
    for i, name, c in cameras(row):
        uvd = np.asarray(depth[i], np.float64)[:200]
        if len(uvd) == 0:
            continue
        k, pose = c[:9].reshape(3, 3), c[9:21].reshape(3, 4)
        rays = np.c_[(uvd[:, 0] - k[0, 2]) / k[0, 0], (uvd[:, 1] - k[1, 2]) / k[1, 1], np.ones(len(uvd))] * uvd[:, 2:]
        ego = rays @ pose[:, :3].T + pose[:, 3]
        near = [any(tuple(n + d) in cells for d in _NEIGHBOURS) for n in np.floor(ego / 0.1).astype(np.int64)]
        if np.mean(near) < 0.9:
            yield f"{name}: only {100 * np.mean(near):.0f} % of depth points lie on LiDAR points"


_NEIGHBOURS = [np.array([x, y, z]) for x in (0, -1, 1) for y in (0, -1, 1) for z in (0, -1, 1)]


def boxes_sane(row: Row) -> Iterator[str]:
    b = row.decode("boxes")
    if not np.isfinite(b.centre_m).all() or not np.isfinite(b.yaw_rad).all():
        yield "a box has no finite centre or yaw"
    if (np.asarray(b.size_lwh_m) <= 0).any():
        yield "a box has no size"
    if len(b) != max(0, row.index("num_boxes")):
        yield f"{len(b)} boxes, {row.index('num_boxes')} in the tables"


def boxes_speed(row: Row) -> Iterator[str]:
    speed = np.linalg.norm(row.decode("boxes").velocity_mps, axis=1)
    if (speed[np.isfinite(speed)] > 70).any():
        yield f"a box moves at {np.nanmax(speed):.0f} m/s"


def boxes_points(row: Row) -> Iterator[str]:
    """Key-sweep points inside each box against num_lidar: frames, sizes and yaw all have to be right."""
    b, lidar = row.decode("boxes"), row.decode("lidar_points")
    chosen = np.asarray(lidar["sweep"]) == 0
    xyz = np.ascontiguousarray(np.asarray(lidar["xyz_m"])[chosen], np.float64)
    big = np.asarray(b.num_lidar) >= 10
    if not big.any() or not len(xyz):
        return
    inside = np.asarray(points_in_boxes(xyz, np.asarray(b.centre_m), np.asarray(b.size_lwh_m), np.asarray(b.yaw_rad)))[big]
    expected = np.asarray(b.num_lidar)[big]
    off = np.abs(inside - expected) > 3 + 0.1 * expected
    if off.mean() > 0.2:
        yield f"{int(off.sum())} of {len(off)} boxes hold another number of LiDAR points than the tables say"


def boxes_depth(row: Row) -> Iterator[str]:
    """Every box with many points is in front of at least one camera when all around is covered, or none needs to be."""
    b = row.decode("boxes")
    for _, name, c in cameras(row):
        k, pose = c[:9].reshape(3, 3), c[9:21].reshape(3, 4)
        camera = (np.asarray(b.centre_m) - pose[:, 3]) @ pose[:, :3]
        front = camera[:, 2] > 0.5
        uvw = camera[front] @ k.T
        if len(uvw) and not np.isfinite(uvw[:, :2] / uvw[:, 2:]).all():
            yield f"{name}: a box in front projects to no finite pixel"


def radar_rows(row: Row) -> Iterator[str]:
    table = np.asarray(row.read("radar_points"))
    if table.ndim != 2 or table.shape[0] != len(row.cache.attributes("radar_points").get("columns") or table):
        yield f"radar table has shape {table.shape}"
        return
    sensors, sweeps = table[-3], table[-2]
    counts = row.index("num_radar_sweeps")
    if table.shape[1] and not (sensors.min() >= 0 and sensors.max() < len(row.suite.radars)):
        yield "a radar point has an unknown sensor"
    for i, name in enumerate(row.suite.radars):
        mine = sweeps[sensors == i]
        if len(mine) and (mine.min() < 0 or mine.max() >= counts[i]):
            yield f"{name}: a point of sweep {int(mine.max())}, but there are {counts[i]} sweeps"


def radar_range(row: Row) -> Iterator[str]:
    p = row.decode("radar_points")
    far = np.abs(np.asarray(p["xyz_m"])[:, :2]).max(initial=0)
    if far > 300:
        yield f"a radar point lies {far:.0f} m away"


def radar_static(row: Row) -> Iterator[str]:
    """Compensated velocity of what radar calls stationary is small."""
    p = row.decode("radar_points")
    if not {"dyn_prop", "vx_comp", "vy_comp"} <= set(p):
        return
    still = np.isin(np.asarray(p["dyn_prop"]), (1, 5))
    speed = np.hypot(p["vx_comp"], p["vy_comp"])[still]
    if len(speed) > 20 and float(np.median(speed)) > 1.0:
        yield f"stationary radar points move at {np.median(speed):.1f} m/s (median)"


def images(row: Row) -> Iterator[str]:
    images = row.read("images")
    declared = [c for c in row.suite.cameras if c in row.recipe.sensors]
    if sorted(images) != sorted(declared):
        yield f"images of {', '.join(images)}, declared {', '.join(declared)}"
    for name, data in images.items():
        if (
            isinstance(data, bytes)
            and row.recipe.images_mode != "reference"
            and not (data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9")
        ):
            yield f"{name} is no whole JPEG"


def image_size(row: Row) -> Iterator[str]:
    if row.recipe.images_mode == "reference":
        return
    import simplejpeg

    expected = row.recipe.image_hw_px if row.recipe.images_mode == "scaled" else row.suite.image_hw_px
    for name, data in row.read("images").items():
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != tuple(expected):
            yield f"{name} is {height}x{width}, expected {expected[0]}x{expected[1]}"
