"""Cameras and poses of a sample, exact float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.fields.base import CacheField, Stored
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, SensorSuite

__all__ = ["CALIBRATION_FIELDS"]


def _compute_cameras(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """(V, 34): image_from_camera 9, ego_from_camera 12, vehicle_from_camera 12, age in s. NaN for an undeclared camera."""
    out = np.full((len(suite.cameras), 34), np.nan)
    for frame in payload.sample.cameras:
        camera = frame.camera
        out[suite.cameras.index(camera.name)] = (
            *camera.image_from_camera.reshape(9),
            *camera.ego_from_camera.matrix34(),
            *frame.vehicle_from_camera.matrix34(),
            (payload.sample.timestamp_us - camera.timestamp_us) * 1e-6,
        )
    return out


def _decode_cameras(value: NDArray[np.float64], recipe: Recipe, suite: SensorSuite) -> dict[str, NDArray[np.float64]]:
    """image_from_camera (V, 3, 3) px, ego_from_camera and vehicle_from_camera (V, 3, 4), age_s (V,)."""
    v = len(value)
    return {
        "image_from_camera": value[:, :9].reshape(v, 3, 3),
        "ego_from_camera": value[:, 9:21].reshape(v, 3, 4),
        "vehicle_from_camera": value[:, 21:33].reshape(v, 3, 4),
        "age_s": value[:, 33],
    }


def _compute_pose(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """(2, 12): global_from_ego, ego_from_reference (the LiDAR where it is the reference)."""
    return np.stack([payload.sample.global_from_ego.matrix34(), payload.sample.ego_from_reference.matrix34()])


def _decode_pose(value: NDArray[np.float64], recipe: Recipe, suite: SensorSuite) -> dict[str, NDArray[np.float64]]:
    """global_from_ego (3, 4), ego_from_reference (3, 4)."""
    return {"global_from_ego": value[0].reshape(3, 4), "ego_from_reference": value[1].reshape(3, 4)}


def _camera_attributes(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
    return {
        "frame": "ego",
        "cameras": list(suite.cameras),
        "columns": {
            "image_from_camera": [0, 9],
            "ego_from_camera (own capture time)": [9, 21],
            "vehicle_from_camera": [21, 33],
            "age_s": [33, 34],
        },
        "units": "px, m, s",
        "image_hw_px": list(suite.image_hw_px),
    }


CALIBRATION_FIELDS: tuple[CacheField, ...] = (
    CacheField(
        name="camera_calibration",
        version=1,
        kind="array",
        space="none",
        uses=("reference_channel",),
        compute=_compute_cameras,
        needs=("cameras",),
        sensors=("camera",),
        dtype=np.dtype("<f8"),
        shape=lambda recipe, suite: (len(suite.cameras), 34),
        decode=_decode_cameras,
        attributes=_camera_attributes,
    ),
    CacheField(
        name="sample_pose",
        version=1,
        kind="array",
        space="none",
        uses=("reference_channel",),
        compute=_compute_pose,
        dtype=np.dtype("<f8"),
        shape=lambda recipe, suite: (2, 12),
        decode=_decode_pose,
        attributes=lambda recipe, suite: {
            "frame": "global, ego",
            "columns": ["global_from_ego", "ego_from_reference"],
            "units": "m",
            "reference_channel": recipe.reference_channel,
        },
    ),
)
