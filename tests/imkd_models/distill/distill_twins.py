"""Slow NumPy twins (float64) of the building blocks that the formula tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from imkd_data.geometry import BevGrid
from imkd_models.outputs import HeadMaps

Array = NDArray[np.float64]


def array(value: Tensor) -> Array:
    return value.detach().double().numpy()


def parameters_of(module: nn.Module) -> dict[str, Array]:
    """Every parameter and buffer by name."""
    return {name: array(value) for name, value in module.state_dict().items()}


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def smooth_l1(difference: Array) -> Array:
    """d^2 / 2 below 1, |d| - 1/2 above."""
    d = np.abs(difference)
    return np.where(d < 1, d**2 / 2, d - 0.5)


def cross_entropy(z: Array, target: Array) -> Array:
    """Binary cross entropy of sigmoid(z), by its definition."""
    p = sigmoid(z)
    return -target * np.log(p) - (1 - target) * np.log(1 - p)


def conv(x_BCYX: Array, weight: Array, bias: Array | None = None) -> Array:
    """k x k convolution with zero padding that keeps the grid, one tap after the other."""
    k, (ny, nx) = weight.shape[-1], x_BCYX.shape[-2:]
    padded = np.pad(x_BCYX, [(0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)])
    taps = [
        np.einsum("oc,bcyx->boyx", weight[:, :, i, j], padded[:, :, i : i + ny, j : j + nx]) for i in range(k) for j in range(k)
    ]
    return sum(taps) + (0 if bias is None else bias[:, None, None])


def _line(old: int, new: int, align_corners: bool) -> Array:
    """(new, old) weights of linear interpolation along one axis."""
    out = np.zeros((new, old))
    for i in range(new):
        at = i * (old - 1) / (new - 1) if align_corners else max((i + 0.5) * old / new - 0.5, 0)
        low = min(math.floor(at), old - 1)
        high = min(low + 1, old - 1)
        out[i, low] += 1 - (at - low)
        out[i, high] += at - low
    return out


def bilinear(x_BCYX: Array, size: Sequence[int], align_corners: bool) -> Array:
    """Resize without antialias."""
    rows, columns = (_line(old, new, align_corners) for old, new in zip(x_BCYX.shape[-2:], size, strict=True))
    return np.einsum("ij,bcjl,kl->bcik", rows, x_BCYX, columns)


def box_maps(maps: HeadMaps) -> Array:
    """(B, 10, Y, X): offset, height, size, yaw, velocity."""
    names = ("offset_cells_B2YX", "height_m_B1YX", "log_size_m_B3YX", "yaw_sincos_B2YX", "velocity_mps_B2YX")
    return np.concatenate([array(getattr(maps, n)) for n in names], axis=1)


def cells_in(grid: BevGrid, x: float, y: float, length: float, width: float, yaw: float) -> NDArray[np.bool_]:
    """(Y, X): cell centres inside one rotated rectangle."""
    dx = grid.x_min_m + (np.arange(grid.nx)[None, :] + 0.5) * grid.cell_m - x
    dy = grid.y_min_m + (np.arange(grid.ny)[:, None] + 0.5) * grid.cell_m - y
    along, across = math.cos(yaw) * dx + math.sin(yaw) * dy, -math.sin(yaw) * dx + math.cos(yaw) * dy
    return (np.abs(along) <= length / 2) & (np.abs(across) <= width / 2)
