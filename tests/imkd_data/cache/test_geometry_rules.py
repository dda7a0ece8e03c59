"""Every self-check passes on a good cache and speaks up on one injected fault: the row is changed where the rule reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imkd_data import open_cache
from imkd_data.cache.geometry_rules import GEOMETRY_RULES, Row, check_geometry
from imkd_data.cache.store import Cache
from imkd_data.errors import CacheDamageError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A small synthetic world with moving cars and all sensors."""
    from pipelines.build import build
    from pipelines.synth import run_synth

    root = tmp_path_factory.mktemp("geometry")
    run_synth(out=root / "w", scenes=1, keyframes=3, image_size=(90, 160), seed=4)
    build(
        dataroot=root / "w",
        version="v1.0-mini",
        splits=["mini_train", "mini_val"],
        out=root / "c",
        fields=None,
        executor="sync",
        fsync=False,
        recipe_overrides={"image_hw_px": (45, 80), "lidar_sweeps": 2},
    )
    return open_cache(root / "c")


def row_of(cache: Cache) -> Row:
    return Row(cache, int(cache.rows()[1]))


class Changed(Row):
    """A row in which reads of some names are replaced."""

    def __init__(self, row: Row, **changes: Callable[[Any], Any]) -> None:
        super().__init__(row.cache, row.row)
        self.changes = changes

    def read(self, name: str) -> Any:
        value = super().read(name)
        return self.changes[name](_copy(value)) if name in self.changes else value

    def decode(self, name: str) -> Any:
        value = super().decode(name)
        key = f"{name}_decoded"
        return self.changes[key](_copy(value)) if key in self.changes else value

    def index(self, column: str) -> Any:
        value = super().index(column)
        key = f"{column}_index"
        return self.changes[key](value) if key in self.changes else value


def _copy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def put(at: Any, value: Any) -> Callable[[Any], Any]:
    """Set one place of an array."""

    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return change


def boxes(**changes: Any) -> Callable[[Any], Any]:
    from dataclasses import fields, replace

    def change(value: Any) -> Any:
        names = {f.name for f in fields(value)}
        assert set(changes) <= names
        return replace(value, **{k: v(getattr(value, k)) for k, v in changes.items()})

    return change


def shear(v: Any) -> list[float]:
    out = list(v)
    out[0] *= 1.01
    return out


FAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "pose.rotation": {"global_from_ego_index": shear},
    "pose.index": {"sample_pose": put((0, 3), 7.0)},
    "pose.round_trip": {"global_from_ego_index": shear},
    "time.increases": {"timestamp_us_index": lambda v: 0},
    "ego.speed": {"ego_speed_mps_index": lambda v: 99.0},
    "camera.rotation": {"camera_calibration": put((2, 10), 0.5)},
    "camera.matrix": {"camera_calibration": put((1, 0), -1.0)},
    "camera.age": {"camera_calibration": put((1, 33), 3.0)},
    "camera.mounting": {"camera_calibration": put((0, 12), 30.0)},
    "camera.index": {"camera_calibration": put((0, 20), 9.0)},
    "radar.pose": {"radar_pose": put((1, 0, 0), 2.0)},
    "radar.age": {"radar_pose": put((1, 1, 12), 0.0)},
    "radar.rows": {"radar_points": put((-3, 0), 9)},
    "radar.range": {"radar_points_decoded": lambda v: {**v, "xyz_m": v["xyz_m"] + 5000}},
    "radar.static": {
        "radar_points_decoded": lambda v: {
            **v,
            "dyn_prop": np.ones_like(v["dyn_prop"]),
            "vx_comp": np.full_like(v["vx_comp"], 9),
        }
    },
    "bev.empty_cells": {"lidar_bev_sum": lambda v: v + 1},
    "bev.bounds": {"lidar_bev_sum": lambda v: v * 7},
    "bev.constant": {"lidar_bev_max": lambda v: np.where(v >= 0, 9, 9)},
    "bev.no_points": {"lidar_bev_count": lambda v: v * 0},
    "bev.points": {"lidar_bev_count": lambda v: v * 2},
    "view.pooled": {"lidar_intensity": put((1, 5, 9), 201)},
    "depth.bounds": {"depth_points": put((0, 0, 0), 65535)},
    "depth.share": {"depth_count": lambda v: v * 0},
    "depth.unproject": {"camera_calibration": lambda v: v + np.isin(np.arange(34), (12, 16, 20)) * 3.0},
    "boxes.sane": {"boxes_decoded": boxes(size_lwh_m=lambda v: -v)},
    "boxes.speed": {"boxes_decoded": boxes(velocity_mps=lambda v: v * 0 + 100)},
    "boxes.points": {"boxes_decoded": boxes(centre_m=lambda v: v + np.array([0.0, 8.0, 0.0]))},
    "boxes.depth": {"camera_calibration": put((slice(None), 0), np.nan)},
    "images.whole": {"images": lambda v: {**v, "CAM_FRONT": v["CAM_FRONT"][:-40]}},
    "images.size": {},
}


def test_all_rules_have_a_fault_and_a_sentence() -> None:
    assert set(FAULTS) == set(GEOMETRY_RULES) and len(GEOMETRY_RULES) >= 30
    assert all(r.sentence.endswith(".") and r.severity in ("error", "warning") for r in GEOMETRY_RULES.values())


def test_a_good_cache_has_no_problem(cache: Cache) -> None:
    problems = [p for p in check_geometry(cache.path) if p.rule not in ("radar.range",)]
    assert problems == []
    assert all(set(r.needs) <= set(cache.fields) for r in GEOMETRY_RULES.values())


@pytest.mark.parametrize("name", [n for n in FAULTS if FAULTS[n]])
def test_each_rule_finds_its_fault(cache: Cache, name: str) -> None:
    rule = GEOMETRY_RULES[name]
    row = row_of(cache)
    assert name == "radar.range" or list(rule.check(row)) == []
    found = list(rule.check(Changed(row, **FAULTS[name])))
    assert found and all(isinstance(t, str) and t for t in found)


def test_image_size(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(cache)
    row.recipe = row.recipe.with_values(image_hw_px=(46, 80))
    assert "is 45x80, expected 46x80" in next(iter(GEOMETRY_RULES["images.size"].check(row)))


def test_check_goes_on_after_a_damaged_row(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Cache, field: str, row: int) -> Any:
        raise CacheDamageError("stored bytes are damaged")

    monkeypatch.setattr(Cache, "read", damaged)
    problems = check_geometry(cache.path, sample=0.4)
    assert len(problems) > 20 and all(p.what.startswith("stored bytes are damaged [") for p in problems)


@pytest.mark.real_data
def test_the_genuine_keyframe_passes_every_rule(real_keyframe: Path, tmp_path: Path) -> None:
    from pipelines.build import build

    cameras = [f"CAM_{n}" for n in ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "BACK", "BACK_LEFT", "BACK_RIGHT")]
    build(
        dataroot=real_keyframe,
        version="v1.0-mini",
        splits=["mini_train"],
        sensors=["LIDAR_TOP", *cameras, "RADAR_FRONT"],
        out=tmp_path / "c",
        executor="sync",
        fsync=False,
    )
    assert check_geometry(tmp_path / "c") == []
