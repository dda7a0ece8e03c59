"""The arithmetic of the public conversion scripts, step by step, for exports that equal theirs byte for byte.

Their clouds are float32 after every step (rotate in float64, round; translate in float32, as NumPy 1 promotes), and their
rotation matrices come from quaternion products. None of this is used elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Cloud32", "box_in", "image_points", "rotation_of", "transform_of"]

F64 = NDArray[np.float64]


def _unit(wxyz: ArrayLike) -> F64:
    q: F64 = np.array(wxyz, dtype=np.float64)
    return q / np.sqrt(np.dot(q, q)) if abs(1.0 - np.dot(q, q)) >= 1e-14 else q


def _times(wxyz: ArrayLike) -> F64:
    """(4, 4) that multiplies a quaternion from the left."""
    w, x, y, z = np.array(wxyz, dtype=np.float64)
    return np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])


def rotation_of(wxyz: ArrayLike) -> F64:
    """(3, 3) as the product of the two quaternion matrices; normalised first unless the square sum is 1 within 1e-14."""
    q = _unit(wxyz)
    w, x, y, z = q
    left = _times(q)
    right = np.array([[w, -x, -y, -z], [x, w, z, -y], [y, -z, w, x], [z, y, -x, w]])
    matrix: F64 = np.dot(left, right.conj().transpose())[1:][:, 1:]
    return matrix


def transform_of(translation_m: ArrayLike, wxyz: ArrayLike, inverse: bool = False) -> F64:
    """(4, 4) dst_from_src, or src_from_dst."""
    matrix, rotation = np.eye(4), rotation_of(wxyz)
    if inverse:
        matrix[:3, :3] = rotation.T
        matrix[:3, 3] = rotation.T.dot(-np.array(translation_m, dtype=np.float64))
    else:
        matrix[:3, :3] = rotation
        matrix[:3, 3] = np.array(translation_m)
    return matrix


def box_in(frames: Sequence[Mapping[str, Any]], translation_m: ArrayLike, wxyz: ArrayLike) -> tuple[F64, float]:
    """Centre (3,) and heading of a box after stepping into one frame after the other (pose and calibration records)."""
    centre, orientation = np.array(translation_m, dtype=np.float64), np.array(wxyz, dtype=np.float64)
    for frame in frames:
        q = np.array(frame["rotation"], dtype=np.float64)
        inverse = _unit(q * np.array([1.0, -1.0, -1.0, -1.0]) / np.dot(q, q))
        centre = np.dot(rotation_of(inverse), centre + -np.array(frame["translation"]))
        orientation = np.dot(_times(inverse), orientation)
    w, x, y, z = _unit(orientation)
    return centre, float(np.arctan2(2 * (w * z - x * y), 1 - 2 * (y**2 + z**2)))


class Cloud32:
    """(4, N) float32 points that are rotated and translated in place."""

    def __init__(self, points: NDArray[np.float32]) -> None:
        self.points = points

    def rotate(self, rotation: F64) -> Cloud32:
        """In float64, rounded to float32."""
        self.points[:3, :] = np.dot(rotation, self.points[:3, :])
        return self

    def translate(self, xyz_m: ArrayLike) -> Cloud32:
        """In float32."""
        for i, value in enumerate(np.array(xyz_m, dtype=np.float64)):
            self.points[i, :] = self.points[i, :] + np.float32(value)
        return self

    def into(self, translation_m: ArrayLike, wxyz: ArrayLike) -> Cloud32:
        """From a frame into its parent."""
        return self.rotate(rotation_of(wxyz)).translate(translation_m)

    def out_of(self, translation_m: ArrayLike, wxyz: ArrayLike) -> Cloud32:
        """From a parent into the frame."""
        return self.translate(-np.array(translation_m, dtype=np.float64)).rotate(rotation_of(wxyz).T)

    def copy(self) -> Cloud32:
        """The same points again."""
        return Cloud32(self.points.copy())


def image_points(xyz: NDArray[Any], intrinsic: ArrayLike) -> F64:
    """(3, N) camera points -> (3, N) float64 u, v, 1."""
    padded = np.eye(4)
    padded[:3, :3] = np.array(intrinsic)
    points = np.concatenate((xyz, np.ones((1, xyz.shape[1]))))
    points = np.dot(padded, points)[:3, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        out: F64 = points / points[2:3, :].repeat(3, 0).reshape(3, xyz.shape[1])
    return out
