"""Truth boxes in ego, one row a box."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import InputDataError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.fields.codec import too_many
from imkd_data.recipe import Recipe
from imkd_data.sample import Boxes, Payload, SensorSuite

__all__ = ["BOX_COLUMNS", "BOX_FIELDS"]

BOX_COLUMNS = (
    *("present", "x", "y", "z", "l", "w", "h", "yaw", "vx", "vy", "velocity_known", "label", "attribute", "visibility"),
    *("num_lidar", "num_radar", "valid", "instance", "ignored", "reserved"),
)
_AT = {name: i for i, name in enumerate(BOX_COLUMNS)}


def _compute(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """(boxes_width, 20) f32. Unknown velocity: 0 with velocity_known 0. No LiDAR and no radar point: valid 0, kept;
    unknown counts: valid 1."""
    boxes = payload.sample.boxes
    if boxes is None:
        raise InputDataError(
            "this split has no annotations",
            rule="boxes.absent",
            token=payload.sample.token,
            scene=payload.sample.scene,
            field="boxes",
            next="leave the field boxes out (test splits do by default)",
        )
    n = len(boxes)
    if n > recipe.boxes_width:
        raise too_many(
            *("more boxes than boxes_width", "boxes.overflow", n, recipe.boxes_width, payload),
            advice=f"--set boxes_width={-(-n // 64) * 64} (rebuilds this field)",
            field="boxes",
        )
    out = np.zeros((recipe.boxes_width, len(BOX_COLUMNS)), dtype=np.float32)
    rows = out[:n]
    known = np.isfinite(boxes.velocity_mps).all(axis=1)
    rows[:, _AT["present"]] = 1
    rows[:, 1:4], rows[:, 4:7], rows[:, _AT["yaw"]] = boxes.centre_m, boxes.size_lwh_m, boxes.yaw_rad
    rows[:, 8:10] = np.where(known[:, None], boxes.velocity_mps, 0)
    rows[:, _AT["velocity_known"]] = known
    columns = ("label", "attribute", "visibility", "num_lidar", "num_radar")
    for name in columns:
        rows[:, _AT[name]] = getattr(boxes, name)
    rows[:, _AT["valid"]] = boxes.has_point
    rows[:, _AT["instance"]] = boxes.track if boxes.track is not None else np.arange(n)
    rows[:, _AT["ignored"]] = boxes.label < 0
    return out


def _decode(value: NDArray[np.float32], recipe: Recipe, suite: SensorSuite) -> Boxes:
    """The boxes that are present, frame ego; velocity NaN where unknown; tokens stand in the index."""
    rows = value[value[:, _AT["present"]] > 0].astype(np.float64)
    velocity = np.where(rows[:, [_AT["velocity_known"]]] > 0, rows[:, 8:10], np.nan)

    def whole(name: str) -> NDArray[np.int64]:
        return rows[:, _AT[name]].astype(np.int64)

    return Boxes(
        frame="ego",
        centre_m=rows[:, 1:4],
        size_lwh_m=rows[:, 4:7],
        yaw_rad=rows[:, _AT["yaw"]],
        velocity_mps=velocity,
        label=whole("label"),
        score=np.ones(len(rows)),
        num_lidar=whole("num_lidar"),
        num_radar=whole("num_radar"),
        attribute=whole("attribute"),
        visibility=whole("visibility"),
        track=whole("instance"),
    )


BOX_FIELDS: tuple[CacheField, ...] = (
    CacheField(
        name="boxes",
        version=1,
        kind="array",
        space="none",
        uses=("boxes_width", "reference_channel"),
        compute=_compute,
        needs=("boxes",),
        dtype=np.dtype("<f4"),
        shape=lambda recipe, suite: (recipe.boxes_width, len(BOX_COLUMNS)),
        decode=_decode,
        attributes=lambda recipe, suite: {"frame": "ego", "columns": list(BOX_COLUMNS), "units": "m, rad, m/s, counts"},
    ),
)
