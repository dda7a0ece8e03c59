"""Rows of the 13 nuScenes tables: the fixed ones, and how one scene's rows are put together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from imkd_data.geometry import quaternion_from_rotation
from imkd_data.world import rig as rigs
from imkd_data.world.options import token

Row = dict[str, Any]

TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene", "sample",
    "sample_data", "sample_annotation", "map",
)  # fmt: skip
SCENE_TABLES = (
    "instance", "calibrated_sensor", "ego_pose", "log", "scene", "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip

_CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker", "animal",
    "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.truck",
    "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.trailer",
    "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable", "movable_object.debris",
    "static_object.bicycle_rack",
)  # fmt: skip
_ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
_VISIBILITY = (
    ("1", "v0-40", "0 and 40%"),
    ("2", "v40-60", "40 and 60%"),
    ("3", "v60-80", "60 and 80%"),
    ("4", "v80-100", "80 and 100%"),
)


def fixed_rows(table: str) -> list[Row]:
    """Rows of category, attribute, visibility and sensor; the same in every world."""
    if table == "category":
        return [{"token": token(table, n), "name": n, "description": f"Synthetic {n}."} for n in _CATEGORIES]
    if table == "attribute":
        return [{"token": token(table, n), "name": n, "description": f"Synthetic {n}."} for n in _ATTRIBUTES]
    if table == "visibility":
        return [
            {"description": f"visibility of whole object is between {text}", "token": key, "level": level}
            for key, level, text in _VISIBILITY
        ]
    channels = [(c, "camera") for c in rigs.CAMERAS] + [(rigs.LIDAR, "lidar")] + [(r, "radar") for r in rigs.RADARS]
    return [{"token": token("sensor", c), "channel": c, "modality": m} for c, m in channels]


def calibration_rows(rig: rigs.Rig, scene_key: str) -> list[Row]:
    """One row per sensor of a scene's rig."""
    rows = []
    for channel, pose in rig.poses.items():
        matrix = rig.intrinsics.get(channel)
        rows.append(
            {
                "token": token(scene_key, "calibrated_sensor", channel),
                "sensor_token": token("sensor", channel),
                "translation": [float(v) for v in pose.translation_m],
                "rotation": [float(v) for v in quaternion_from_rotation(pose.rotation)],
                "camera_intrinsic": [] if matrix is None else [[float(v) for v in row] for row in matrix],
            }
        )
    return rows


@dataclass(slots=True, kw_only=True)
class SceneRows:
    """The rows of one scene by table; ``scene_key`` starts every token."""

    scene_key: str
    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in SCENE_TABLES})

    def add(self, table: str, **row: Any) -> Row:
        """Append one row."""
        self.rows[table].append(row)
        return row

    def chain(self, table_rows: Iterable[Row]) -> None:
        """Set prev and next along a time-ordered list of rows."""
        rows = list(table_rows)
        for k, row in enumerate(rows):
            row["prev"] = rows[k - 1]["token"] if k else ""
            row["next"] = rows[k + 1]["token"] if k + 1 < len(rows) else ""


def lines(rows: Iterable[Row]) -> str:
    """Rows as JSON objects, one a line, joined by commas (the inside of a JSON list)."""
    return ",\n".join(json.dumps(row, separators=(", ", ": ")) for row in rows)
