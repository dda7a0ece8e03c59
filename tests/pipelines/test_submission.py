"""The submission writer: frames, sizes, headings, attributes, caps, and never a NaN."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from imkd_data.classes import ATTRIBUTES, DETECTION_CLASSES, LABEL_FROM_CLASS
from imkd_data.errors import FrameMismatchError
from imkd_data.geometry import EGO, GLOBAL, Pose, rotation_from_yaw
from imkd_data.sample import Boxes
from pipelines.submission import boxes_to_results, guess_attributes, submission_meta, write_results


def tilted_pose() -> Pose:
    pitch, roll = 0.03, -0.05
    tilt = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    lean = np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]])
    rotation = rotation_from_yaw(2.1) @ tilt @ lean
    return Pose(dst=GLOBAL, src=EGO, rotation=rotation, translation_m=np.array([411.3, 1180.9, 0.4]))


def some_boxes(n: int, seed: int = 0) -> Boxes:
    rng = np.random.default_rng(seed)
    return replace(
        Boxes.empty(EGO),
        centre_m=rng.uniform(-40, 40, (n, 3)),
        size_lwh_m=rng.uniform(0.4, 9, (n, 3)),
        yaw_rad=rng.uniform(-np.pi, np.pi, n),
        velocity_mps=rng.normal(0, 3, (n, 2)),
        label=rng.integers(0, 10, n),
        score=rng.uniform(0, 1, n),
        attribute=np.full(n, -1),
        num_lidar=np.ones(n, int),
        num_radar=np.ones(n, int),
        visibility=np.zeros(n, int),
    )


def test_level_box_round_trip_under_tilt() -> None:
    """A box that is level in global comes back exactly although the car is tilted."""
    pose = tilted_pose()
    yaw_global, velocity_global = -2.7, np.array([4.0, -1.5, 0.0])
    axis = pose.inverse().vectors([np.cos(yaw_global), np.sin(yaw_global), 0])
    boxes = replace(
        some_boxes(1),
        centre_m=pose.inverse().points([[420.0, 1170.0, 1.5]]),
        size_lwh_m=np.array([[4.5, 1.9, 1.6]]),
        yaw_rad=np.array([np.arctan2(axis[1], axis[0])]),
        velocity_mps=pose.inverse().vectors(velocity_global)[None, :2],
    )
    (entry,) = boxes_to_results("tok", boxes, pose)
    w, x, y, z = entry["rotation"]
    assert (x, y) == (0, 0)
    assert np.isclose((2 * np.arctan2(z, w) - yaw_global + np.pi) % (2 * np.pi) - np.pi, 0, atol=1e-12)
    assert np.allclose(entry["translation"], [420.0, 1170.0, 1.5], atol=1e-9)
    assert entry["size"] == [1.9, 4.5, 1.6]  # width, length, height
    assert np.allclose(entry["velocity"], velocity_global[:2], atol=1e-12)


def test_nothing_non_finite_is_written(tmp_path) -> None:
    boxes = some_boxes(8)
    centre, size, yaw = boxes.centre_m.copy(), boxes.size_lwh_m.copy(), boxes.yaw_rad.copy()
    velocity, score, label = boxes.velocity_mps.copy(), boxes.score.copy(), boxes.label.copy()
    centre[0, 2], size[1, 0], size[2, 1], yaw[3], score[4], label[5] = np.nan, np.inf, 0.0, np.nan, np.nan, -1
    velocity[6] = np.nan, 2.0
    boxes = replace(boxes, centre_m=centre, size_lwh_m=size, yaw_rad=yaw, velocity_mps=velocity, score=score, label=label)
    entries = boxes_to_results("tok", boxes, tilted_pose())
    assert len(entries) == 2
    assert [0.0, 0.0] in [e["velocity"] for e in entries]
    path = write_results(tmp_path / "out", [("tok", entries), ("empty", [])], ("camera", "radar"))
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["results"]["empty"] == []
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_five_hundred_best_boxes_survive() -> None:
    entries = boxes_to_results("tok", some_boxes(640, seed=3), tilted_pose())
    scores = [e["detection_score"] for e in entries]
    assert len(entries) == 500 and scores == sorted(scores, reverse=True)
    assert min(scores) >= np.sort(some_boxes(640, seed=3).score)[-500]


def test_attributes_fit_their_class() -> None:
    boxes = replace(
        some_boxes(4),
        label=np.array([LABEL_FROM_CLASS[c] for c in ("car", "pedestrian", "barrier", "car")]),
        attribute=np.array([ATTRIBUTES.index("vehicle.stopped"), ATTRIBUTES.index("vehicle.moving"), 0, -1]),
        velocity_mps=np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [5.0, 0.0]]),
        score=np.array([0.9, 0.8, 0.7, 0.6]),
    )
    names = [e["attribute_name"] for e in boxes_to_results("tok", boxes, tilted_pose())]
    assert names == ["vehicle.stopped", "pedestrian.moving", "", "vehicle.moving"]
    every = guess_attributes(np.arange(10), np.full(10, np.nan))
    assert [i for i, a in enumerate(every) if a < 0] == [
        DETECTION_CLASSES.index("barrier"),
        DETECTION_CLASSES.index("traffic_cone"),
    ]


def test_meta_follows_the_sensors() -> None:
    assert submission_meta(("camera", "radar")) == {
        "use_camera": True,
        "use_lidar": False,
        "use_radar": True,
        "use_map": False,
        "use_external": False,
    }
    assert submission_meta(("lidar",))["use_lidar"] and not submission_meta(("lidar",))["use_camera"]


def test_wrong_frame_and_repeated_token_are_refused(tmp_path) -> None:
    with pytest.raises(FrameMismatchError):
        boxes_to_results("tok", replace(some_boxes(1), frame="bev"), tilted_pose())
    with pytest.raises(ValueError, match="twice"):
        write_results(tmp_path, [("a", []), ("a", [])], ())
    assert not (tmp_path / "results.json").exists()
