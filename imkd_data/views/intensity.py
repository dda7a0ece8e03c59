"""LiDAR intensity maps on any grid, and in the image, from the stored exact planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import UsageError
from imkd_data.fields.lidar import z_from_code
from imkd_data.geometry import EGO, BevGrid, Pose

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["IntensityMap", "intensity_image", "intensity_map"]

REDUCTIONS = ("max", "mean", "sum", "count", "z")
_PLANES = ("lidar_bev_sum", "lidar_bev_count", "lidar_bev_max", "lidar_bev_z_of_max")


@dataclass(frozen=True, slots=True, eq=False)
class IntensityMap:
    """values (ny, nx) f32: intensities 0..255 as the sensor gives them, returns, or metres; 0 where no return is (ask
    ``count``). ``exact``: the stored cells pool to this grid and cover it, so nothing was resampled; ``note`` says why not."""

    values: NDArray[np.float32]
    grid: BevGrid
    frame: str
    exact: bool
    note: str

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        return np.array(self.values, dtype=dtype)


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """Occupied cells as a list: where their strongest return lies (x, y the centre of the cell), and what they hold."""

    xyz_m: NDArray[np.float64]
    total: NDArray[np.float64]
    count: NDArray[np.float64]
    strongest: NDArray[np.float64]


def intensity_map(cache: Cache, row: int, grid: BevGrid | None = None, reduce: str = "max", frame: str = "ego") -> IntensityMap:
    """One map of a row. ``grid`` None: the stored grid. ``frame``: ego, or lidar (the key scan's axes).

    A grid in ego whose cells are whole stored cells is pooled exactly: sum and count add, mean is their quotient, max and z
    are those of the strongest return. Any other grid or frame moves the stored cells' centres into the new cells (a coarser
    grid), or looks the stored cell up (a finer one), and says so. Raises UsageError for an unknown reduce or frame.
    """
    if reduce not in REDUCTIONS or frame not in ("ego", "lidar"):
        raise UsageError("unknown reduce or frame", expected=f"{', '.join(REDUCTIONS)}; ego, lidar", found=f"{reduce}, {frame}")
    stored = cache.recipe.grid
    grid = grid or stored
    note = _why_resampled(stored, grid, frame)
    if frame == "ego" and grid.cell_mm < stored.cell_mm:
        values = _look_up(cache, row, grid, reduce)
    else:
        values = _reduced(_moved(_cells(cache, row), cache, row, frame), grid, reduce)
    return IntensityMap(values=values, grid=grid, frame=frame, exact=not note, note=note)


def _why_resampled(stored: BevGrid, grid: BevGrid, frame: str) -> str:
    if frame != "ego":
        return "resampled: the planes are stored in ego"
    apart = (grid.x_min_mm - stored.x_min_mm, grid.y_min_mm - stored.y_min_mm)
    if grid.cell_mm % stored.cell_mm or any(d % stored.cell_mm for d in apart):
        return f"resampled: the edges are not edges of the stored {stored.cell_m} m cells"
    ends = (grid.x_max_m > stored.x_max_m, grid.y_max_m > stored.y_max_m)
    return "reaches beyond the stored grid: nothing is known there" if min(apart) < 0 or any(ends) else ""


def _cells(cache: Cache, row: int) -> _Cells:
    total, count, strongest, z_code = (cache.read(n, row) for n in _PLANES)
    full = count > 0
    xy = cache.recipe.grid.centres()[full]
    z = z_from_code(z_code[full], cache.recipe).astype(np.float64)
    parts = (p[full].astype(np.float64) for p in (total, count, strongest))
    return _Cells(np.column_stack([xy, z]), *parts)


def _moved(cells: _Cells, cache: Cache, row: int, frame: str) -> _Cells:
    if frame == "ego":
        return cells
    lidar_from_ego = Pose.from_matrix34(EGO, "LIDAR", cache.read("sample_pose", row)[1]).inverse()
    return _Cells(lidar_from_ego.points(cells.xyz_m), cells.total, cells.count, cells.strongest)


def _reduced(cells: _Cells, grid: BevGrid, reduce: str) -> NDArray[np.float32]:
    row, column, inside = grid.cells(cells.xyz_m[:, :2])
    flat = (row * grid.nx + column)[inside]
    out = np.zeros(grid.nx * grid.ny)
    if reduce in ("sum", "mean"):
        np.add.at(out, flat, cells.total[inside])
    if reduce == "count":
        np.add.at(out, flat, cells.count[inside])
    if reduce == "mean":
        n = np.zeros_like(out)
        np.add.at(n, flat, cells.count[inside])
        out /= np.maximum(n, 1)
    if reduce in ("max", "z"):
        strongest, z = cells.strongest[inside], cells.xyz_m[inside, 2]
        order = np.lexsort((z, strongest))  # of equal strength the higher one, as in the stored planes
        out[flat[order]] = (strongest if reduce == "max" else z)[order]
    return out.reshape(grid.shape).astype(np.float32)


def _look_up(cache: Cache, row: int, grid: BevGrid, reduce: str) -> NDArray[np.float32]:
    """A finer grid: each cell takes the stored cell its centre lies in; sum and count are shared out by area."""
    stored = cache.recipe.grid
    r, c, inside = stored.cells(grid.centres().reshape(-1, 2))
    fine = _reduced(_cells(cache, row), stored, reduce)
    out = np.zeros(len(r), dtype=np.float32)
    out[inside] = fine[r[inside], c[inside]]
    if reduce in ("sum", "count"):
        out *= (grid.cell_mm / stored.cell_mm) ** 2
    return out.reshape(grid.shape)


def intensity_image(
    cache: Cache, row: int, camera: str, hw_px: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """LiDAR key scan in one image of size ``hw_px`` (the whole picture, resized): intensity 0..255 and depth in metres, both
    (H, W) f32, 0 where there is no point; the nearest point of a pixel wins. UsageError for a camera the cache lacks."""
    if camera not in cache.suite.cameras or camera not in cache.recipe.sensors:
        raise UsageError("the cache has no such camera", expected=", ".join(cache.suite.cameras), found=camera)
    i = cache.suite.cameras.index(camera)
    uvd = cache.decode("depth_points", row)[i]
    intensity = cache.read("depth_intensity", row)[i, : len(uvd)]
    scale = np.array(hw_px[::-1]) / np.array(cache.suite.image_hw_px[::-1])
    column, line = np.floor((uvd[:, :2].astype(np.float64) + 0.5) * scale).astype(np.int64).T
    order = np.argsort(uvd[:, 2], kind="stable")
    flat, first = np.unique((line * hw_px[1] + column)[order], return_index=True)
    nearest = order[first]
    out = np.zeros((2, hw_px[0] * hw_px[1]), dtype=np.float32)
    out[0, flat], out[1, flat] = intensity[nearest], uvd[nearest, 2]
    return out[0].reshape(hw_px), out[1].reshape(hw_px)
