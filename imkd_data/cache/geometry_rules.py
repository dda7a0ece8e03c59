"""The rules of ``verify --geometry``: id, sentence, severity, fields needed, and the check of one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imkd_data.cache import geometry_checks as checks
from imkd_data.cache.geometry_checks import Row
from imkd_data.cache.store import open_cache
from imkd_data.cache.verify import Problem
from imkd_data.errors import CacheDamageError

__all__ = ["GEOMETRY_RULES", "GeometryRule", "Row", "check_geometry"]

Check = Callable[["Row"], Iterator[str]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class GeometryRule:
    """A check of one row; yields one text per violation. ``needs``: fields it reads."""

    sentence: str
    severity: str
    needs: tuple[str, ...]
    check: Check


_PLANES = ("lidar_bev_count", "lidar_bev_sum", "lidar_bev_max")

GEOMETRY_RULES: dict[str, GeometryRule] = {
    "pose.rotation": GeometryRule("Poses are rotations: orthonormal, determinant +1.", "error", (), checks.poses),
    "pose.index": GeometryRule("The pose field equals the index.", "error", ("sample_pose",), checks.pose_field),
    "pose.round_trip": GeometryRule("ego -> global -> ego comes back within 1 micrometre.", "error", (), checks.round_trip),
    "time.increases": GeometryRule("Time increases inside a clip.", "error", (), checks.times),
    "ego.speed": GeometryRule("The car drives below 60 m/s.", "warning", (), checks.speed),
    "camera.rotation": GeometryRule("Camera poses are rotations.", "error", ("camera_calibration",), checks.camera_rotation),
    "camera.matrix": GeometryRule(
        "Cameras are pinholes that look through their image.", "error", ("camera_calibration",), checks.intrinsics
    ),
    "camera.age": GeometryRule("Images lie within 1 s of the key time.", "error", ("camera_calibration",), checks.camera_age),
    "camera.mounting": GeometryRule(
        "Only the car's motion moves a camera off its mounting.", "warning", ("camera_calibration",), checks.mounting
    ),
    "camera.index": GeometryRule(
        "The calibration field equals the index.", "error", ("camera_calibration",), checks.calibration_index
    ),
    "radar.pose": GeometryRule("Every radar sweep has a pose that is a rotation.", "error", ("radar_pose",), checks.radar_pose),
    "radar.age": GeometryRule("Sweep ages increase and stay below five seconds.", "error", ("radar_pose",), checks.sweep_age),
    "radar.rows": GeometryRule("Radar points have a known sensor and sweep.", "error", ("radar_points",), checks.radar_rows),
    "radar.range": GeometryRule("Radar points lie within 300 m.", "warning", ("radar_points",), checks.radar_range),
    "radar.static": GeometryRule(
        "Stationary radar points have little compensated velocity.", "warning", ("radar_points",), checks.radar_static
    ),
    "bev.empty_cells": GeometryRule(
        "Cells without returns are zero in every plane.", "error", ("lidar_bev_count",), checks.bev_empty
    ),
    "bev.bounds": GeometryRule("maximum <= sum <= count x maximum in every cell.", "error", _PLANES, checks.bev_bounds),
    "bev.constant": GeometryRule("Intensity is not constant.", "warning", _PLANES, checks.bev_constant),
    "bev.no_points": GeometryRule("Some LiDAR point is in the grid.", "warning", ("lidar_bev_count",), checks.bev_empty_row),
    "bev.points": GeometryRule(
        "Plane counts equal the stored points inside the grid.", "error", ("lidar_bev_count", "lidar_points"), checks.bev_points
    ),
    "view.pooled": GeometryRule("The view equals the pooled planes.", "error", ("lidar_intensity", *_PLANES), checks.view),
    "depth.bounds": GeometryRule(
        "Depth points lie in their image, unused slots are zero.", "error", ("depth_points", "depth_count"), checks.depth_bounds
    ),
    "depth.share": GeometryRule(
        "Every camera sees a plausible number of LiDAR points.", "warning", ("depth_count",), checks.depth_share
    ),
    "depth.unproject": GeometryRule(
        "Depth points taken back to ego lie on LiDAR points.",
        "error",
        ("depth_points", "camera_calibration", "lidar_points"),
        checks.depth_unproject,
    ),
    "boxes.sane": GeometryRule(
        "Boxes have finite places and positive sizes, as many as in the tables.", "error", ("boxes",), checks.boxes_sane
    ),
    "boxes.speed": GeometryRule("Boxes move below 70 m/s.", "warning", ("boxes",), checks.boxes_speed),
    "boxes.points": GeometryRule(
        "Boxes hold the number of LiDAR points of the tables.", "error", ("boxes", "lidar_points"), checks.boxes_points
    ),
    "boxes.depth": GeometryRule(
        "Boxes in front of a camera project to finite pixels.", "error", ("boxes", "camera_calibration"), checks.boxes_depth
    ),
    "images.whole": GeometryRule("Every declared camera has a whole JPEG.", "error", ("images",), checks.images),
    "images.size": GeometryRule("Images have the size of the recipe.", "error", ("images",), checks.image_size),
}


def check_geometry(path: Path, *, sample: float = 1.0, progress: Progress | None = None) -> list[Problem]:
    """All rules over a share of the rows, spread evenly. Warnings of one rule are listed at most ten times."""
    cache = open_cache(path)
    rows = cache.rows()
    chosen = rows[np.linspace(0, len(rows) - 1, max(1, round(len(rows) * min(1.0, sample)))).astype(int)] if len(rows) else rows
    rules = {n: r for n, r in GEOMETRY_RULES.items() if set(r.needs) <= set(cache.fields)}
    out: list[Problem] = []
    seen: dict[str, int] = {}
    for done, number in enumerate(np.unique(chosen)):
        row = Row(cache, int(number))
        for name, rule in rules.items():
            try:
                texts = list(rule.check(row))
            except CacheDamageError as error:
                texts = [error.what]
            for text in texts:
                seen[name] = seen.get(name, 0) + 1
                if seen[name] <= 10:
                    shard = int(number) // cache.recipe.rows_per_shard
                    what = f"{text} [{rule.sentence}]"
                    out.append(
                        Problem(rule=name, what=what, severity=rule.severity, shard=shard, token=cache.token(int(number)))
                    )
        if progress:
            progress(done + 1, len(chosen), "geometry")
    out += [
        Problem(rule=n, what=f"{c - 10} more of {n}", severity=GEOMETRY_RULES[n].severity) for n, c in seen.items() if c > 10
    ]
    return out
