"""Both engines against each other and against the devkit's own class, on real and random input."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from imkd_data.errors import InputDataError, MismatchError, SourceMissingError, UsageError
from pipelines.evaluate import check_sample_sets, evaluate_results, refuse_test, summary_lines
from pipelines.evaluate_fast import CONFIG
from pipelines.evaluate_tables import iter_array, iter_results, read_results
from pipelines.submission import write_results

ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")


def perturbed_truth(nusc, seed: int, miss: float = 0.2, extra: int = 3, level: float = 1.0) -> dict[str, list[dict]]:
    """A plausible submission: truth moved, resized, turned, some missed, some doubled, some invented; equal scores occur."""
    from nuscenes.eval.detection.utils import category_to_detection_name, detection_name_to_rel_attributes

    rng = np.random.default_rng(seed)
    out: dict[str, list[dict]] = {}
    for sample in nusc.sample:
        entries = []
        for token in sample["anns"]:
            row = nusc.get("sample_annotation", token)
            name = category_to_detection_name(row["category_name"])
            if name is None or rng.random() < miss:
                continue
            for _ in range(1 + rng.integers(0, 2) + (extra if rng.random() < 0.1 else 0)):
                yaw = rng.uniform(-math.pi, math.pi) if rng.random() < 0.1 else rng.normal(0, 0.2)
                q = np.array(row["rotation"])
                turn = np.array([math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)])
                w = turn[0] * q[0] - turn[3] * q[3]
                z = turn[0] * q[3] + turn[3] * q[0]
                names = detection_name_to_rel_attributes(name)
                entries.append(
                    {
                        "sample_token": sample["token"],
                        "translation": (np.array(row["translation"]) + rng.normal(0, level, 3)).tolist(),
                        "size": (np.array(row["size"]) * rng.uniform(0.7, 1.4, 3)).tolist(),
                        "rotation": [w, 0.0, 0.0, z],
                        "velocity": rng.normal(0, 2, 2).tolist(),
                        "detection_name": name,
                        "detection_score": float(rng.integers(1, 20) / 20),
                        "attribute_name": str(rng.choice(names)) if names else "",
                    }
                )
        out[sample["token"]] = entries[:500]
    return out


def same(a: dict, b: dict) -> None:
    """Every AP, every error, NDS and mAP equal to 1e-9."""
    assert a["mean_ap"] == pytest.approx(b["mean_ap"], abs=1e-9)
    assert a["nd_score"] == pytest.approx(b["nd_score"], abs=1e-9)
    assert set(a["label_aps"]) == set(b["label_aps"]) == set(CONFIG["class_range"])
    for name in a["label_aps"]:
        assert a["label_aps"][name] == pytest.approx(b["label_aps"][name], abs=1e-9), name
        assert a["label_tp_errors"][name] == pytest.approx(b["label_tp_errors"][name], abs=1e-9, nan_ok=True), name
    for key in ("tp_errors", "tp_scores", "mean_dist_aps"):
        assert a[key] == pytest.approx(b[key], abs=1e-9)
    assert a["mAP_occurring"] == pytest.approx(b["mAP_occurring"], abs=1e-9)
    assert a["truth_boxes"] == b["truth_boxes"] and a["meta"] == b["meta"]


@pytest.fixture(scope="module")
def keyframe(real_keyframe):
    from nuscenes import NuScenes

    return real_keyframe, NuScenes("v1.0-mini", str(real_keyframe), verbose=False)


def truth_entries(nusc, token: str) -> list[dict]:
    """The tables' boxes as a submission."""
    from nuscenes.eval.common.loaders import load_gt_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox

    entries = []
    for box in load_gt_of_sample_tokens(nusc, [token], DetectionBox)[token]:
        if box.num_pts == 0:  # the filters take these from the truth but not from a submission
            continue
        entry = box.serialize()
        entries.append(
            {k: entry[k] for k in ("sample_token", "translation", "size", "rotation", "detection_name", "attribute_name")}
            | {"velocity": np.nan_to_num(np.array(entry["velocity"])).tolist(), "detection_score": 1.0}
        )
    return entries


@pytest.mark.real_data
@pytest.mark.parametrize("engine", ["devkit", "fast"])
def test_truth_of_the_real_keyframe_scores_one(keyframe, tmp_path: Path, engine) -> None:
    root, nusc = keyframe
    token = nusc.sample[0]["token"]
    path = write_results(tmp_path, [(token, truth_entries(nusc, token))], ("camera", "radar"))
    out = evaluate_results(path, dataroot=root, version="v1.0-mini", tokens=[token], out=tmp_path, engine=engine)
    assert out["mAP_occurring"] == pytest.approx(1.0, abs=1e-12)
    assert len(out["occurring_classes"]) == 5 and out["mean_ap"] == pytest.approx(0.5)
    written = json.loads((tmp_path / "metrics_summary.json").read_text())
    official = {
        "label_aps",
        "mean_dist_aps",
        "mean_ap",
        "label_tp_errors",
        "tp_errors",
        "tp_scores",
        "nd_score",
        "eval_time",
        "cfg",
    }
    assert official | {"meta"} <= set(written)
    assert written["meta"]["use_camera"] and not written["meta"]["use_lidar"]
    assert set(json.loads((tmp_path / "metrics_details.json").read_text())) == {
        f"{c}:{t}" for c in CONFIG["class_range"] for t in CONFIG["dist_ths"]
    }
    assert len(summary_lines(out)) == 13


@pytest.mark.real_data
@pytest.mark.parametrize("level", [0.02, 0.4, 1.5])
def test_engines_agree_on_the_real_keyframe(keyframe, tmp_path: Path, level: float) -> None:
    root, nusc = keyframe
    token = nusc.sample[0]["token"]
    path = write_results(tmp_path, perturbed_truth(nusc, seed=int(level * 100), level=level).items(), ("radar",))
    both = [
        evaluate_results(path, dataroot=root, version="v1.0-mini", tokens=[token], out=tmp_path / e, engine=e)
        for e in ("devkit", "fast")
    ]
    assert both[0]["mean_ap"] > 0
    same(*both)


@pytest.mark.real_data
def test_engines_agree_on_81_real_samples_without_lidar(real_radar: Path, tmp_path: Path) -> None:
    """A tree whose samples have no LIDAR_TOP: ranges from the front radar's pose, velocities from real tracks."""
    from nuscenes import NuScenes

    nusc = NuScenes("v1.0-mini", str(real_radar), verbose=False)
    tokens = [s["token"] for s in nusc.sample if "RADAR_FRONT" in s["data"]][5:60]
    found = perturbed_truth(nusc, seed=11, level=0.6)
    path = write_results(tmp_path, [(t, found[t]) for t in reversed(tokens)], ("radar",))
    kwargs = {"dataroot": real_radar, "version": "v1.0-mini", "tokens": tokens, "reference_channel": "RADAR_FRONT"}
    seconds, both = [], []
    evaluate_results(path, out=tmp_path / "warm", engine="fast", **kwargs)  # compiled once
    for engine in ("devkit", "fast"):
        start = time.perf_counter()
        both.append(evaluate_results(path, out=tmp_path / engine, engine=engine, **kwargs))
        seconds.append(time.perf_counter() - start)
    same(*both)
    assert both[0]["tp_errors"]["vel_err"] > 0.1 and sum(both[0]["truth_boxes"].values()) > 1000
    assert seconds[0] > 2 * seconds[1], seconds


def random_tree(root: Path, seed: int) -> list[str]:
    """Random tables with every class, bicycle racks, boxes without points, missing attributes and lonely annotations."""
    rng = np.random.default_rng(seed)
    names = [
        "movable_object.barrier", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car",
        "vehicle.construction", "vehicle.motorcycle", "human.pedestrian.adult", "movable_object.trafficcone",
        "vehicle.trailer", "vehicle.truck", "static_object.bicycle_rack", "animal",
    ]  # fmt: skip
    attributes = ["vehicle.moving", "vehicle.parked", "cycle.with_rider", "pedestrian.moving"]
    scenes, samples, tables = 2, 7, {}
    tables["category"] = [{"token": f"c{i}", "name": n, "description": ""} for i, n in enumerate(names)]
    tables["attribute"] = [{"token": f"a{i}", "name": n, "description": ""} for i, n in enumerate(attributes)]
    tables["sensor"] = [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}]
    tables["calibrated_sensor"] = [
        {"token": "mount", "sensor_token": "lidar", "translation": [0, 0, 1], "rotation": [1, 0, 0, 0], "camera_intrinsic": []}
    ]
    tables["log"] = [{"token": "log", "logfile": "", "vehicle": "v", "date_captured": "", "location": "here"}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "map.png"}]
    tables["visibility"] = []
    for name in ("scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation"):
        tables[name] = []
    for s in range(scenes):
        tokens = [f"s{s}-{k}" for k in range(samples)]
        tables["scene"].append(
            {"token": f"sc{s}", "log_token": "log", "nbr_samples": samples, "first_sample_token": tokens[0]}
            | {"last_sample_token": tokens[-1], "name": f"scene-{s}", "description": ""}
        )
        for k, token in enumerate(tokens):
            stamp = int(1e15 + s * 1e9 + k * rng.integers(480_000, 1_200_000))
            tables["sample"].append({"token": token, "timestamp": stamp, "scene_token": f"sc{s}", "prev": "", "next": ""})
            pose = [float(100 + 2 * k), float(50 * s), 0.3]
            tables["ego_pose"].append({"token": f"p{token}", "timestamp": stamp, "rotation": [1, 0, 0, 0], "translation": pose})
            tables["sample_data"].append(
                {"token": f"d{token}", "sample_token": token, "ego_pose_token": f"p{token}", "calibrated_sensor_token": "mount"}
                | {
                    "timestamp": stamp,
                    "fileformat": "pcd",
                    "is_key_frame": True,
                    "height": 0,
                    "width": 0,
                    "prev": "",
                    "next": "",
                }
                | {"filename": f"{token}.pcd.bin"}
            )
        for i in range(70):
            first, last = sorted(rng.integers(0, samples, 2))
            place, speed = rng.uniform(-45, 45, 2) + np.array([105, 50 * s]), rng.normal(0, 1.5, 2)
            label = int(rng.integers(0, len(names)))
            if label in (1, 6) and i % 2:  # two-wheelers near the racks
                place = np.array([110.0, 50 * s + 5])
            if names[label] == "static_object.bicycle_rack":
                place, speed = np.array([110.0, 50 * s + 5]), np.zeros(2)
            instance = f"i{s}-{i}"
            tables["instance"].append(
                {"token": instance, "category_token": f"c{label}", "nbr_annotations": int(last - first + 1)}
            )
            for k in range(first, last + 1):
                yaw = rng.uniform(-3, 3)
                tables["sample_annotation"].append(
                    {
                        "token": f"{instance}-{k}",
                        "sample_token": tokens[k],
                        "instance_token": instance,
                        "visibility_token": "",
                        "attribute_tokens": [f"a{rng.integers(0, 4)}"] if rng.random() < 0.8 else [],
                        "translation": [*(place + speed * k).tolist(), 1.0],
                        "size": rng.uniform(0.5, 6, 3).tolist(),
                        "rotation": [math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)],
                        "prev": f"{instance}-{k - 1}" if k > first else "",
                        "next": f"{instance}-{k + 1}" if k < last else "",
                        "num_lidar_pts": int(rng.integers(0, 3)),
                        "num_radar_pts": int(rng.integers(0, 2)),
                    }
                )
    (root / "v1.0-mini").mkdir(parents=True)
    Image.new("L", (4, 4)).save(root / "map.png")
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows, indent=0))
    return [r["token"] for r in tables["sample"]]


@pytest.mark.parametrize("seed", range(4))
def test_engines_agree_on_random_tables(tmp_path: Path, seed: int) -> None:
    from nuscenes import NuScenes

    tokens = random_tree(tmp_path / "tree", seed)
    nusc = NuScenes("v1.0-mini", str(tmp_path / "tree"), verbose=False)
    found = perturbed_truth(nusc, seed, level=[0.05, 0.5, 1.0, 3.0][seed])
    if seed == 1:
        found = {t: e if i % 3 else [] for i, (t, e) in enumerate(found.items())}
    path = write_results(tmp_path, found.items(), ("camera",))
    both = [
        evaluate_results(path, dataroot=tmp_path / "tree", version="v1.0-mini", tokens=tokens, out=tmp_path / e, engine=e)
        for e in ("devkit", "fast")
    ]
    same(*both)
    racks = sum(1 for r in nusc.sample_annotation if r["category_name"] == "static_object.bicycle_rack")
    assert racks > 3


def test_subset_equals_the_devkits_own_class(tmp_path: Path, monkeypatch) -> None:
    """The wrapper changes nothing: DetectionEval by split name gives the same numbers as our subset."""
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection import evaluate as official

    tokens = random_tree(tmp_path / "tree", 9)
    nusc = NuScenes("v1.0-mini", str(tmp_path / "tree"), verbose=False)
    path = write_results(tmp_path, perturbed_truth(nusc, 9, level=0.4).items(), ("camera",))
    monkeypatch.setattr(official, "is_predefined_split", lambda split_name: False)
    monkeypatch.setattr(official, "get_samples_of_custom_split", lambda split_name, nusc: tokens)
    cfg = config_factory("detection_cvpr_2019")
    assert cfg.serialize() == CONFIG
    metrics, _ = official.DetectionEval(nusc, cfg, str(path), "ours", str(tmp_path / "o"), verbose=False).evaluate()
    mine = evaluate_results(path, dataroot=tmp_path / "tree", version="v1.0-mini", tokens=tokens, out=tmp_path / "m")
    theirs = json.loads(json.dumps(metrics.serialize()))
    for key in ("label_aps", "mean_ap", "nd_score", "tp_errors"):
        assert mine[key] == theirs[key]


def test_a_submission_without_any_box_scores_zero(tmp_path: Path) -> None:
    tokens = random_tree(tmp_path / "tree", 2)
    path = write_results(tmp_path, [(t, []) for t in tokens], ())
    for engine in ("devkit", "fast"):
        out = evaluate_results(
            path, dataroot=tmp_path / "tree", version="v1.0-mini", tokens=tokens, out=tmp_path / "m", engine=engine
        )
        assert out["mean_ap"] == 0 and out["tp_errors"]["trans_err"] == 1


@pytest.mark.parametrize("engine", ["devkit", "fast"])
def test_sample_sets_that_differ_are_shown_on_both_sides(tmp_path: Path, engine) -> None:
    tokens = random_tree(tmp_path / "tree", 2)
    path = write_results(tmp_path, [(t, []) for t in [*tokens[2:], "stranger"]], ())
    with pytest.raises(MismatchError) as caught:
        evaluate_results(path, dataroot=tmp_path / "tree", version="v1.0-mini", tokens=tokens, out=tmp_path, engine=engine)
    text = str(caught.value)
    assert "s0-0" in text and "s0-1" in text and "stranger" in text and caught.value.code == 9
    assert not (tmp_path / "metrics_summary.json").exists()


def test_many_missing_samples_are_counted_not_all_listed() -> None:
    with pytest.raises(MismatchError, match="4 samples") as caught:
        check_sample_sets(["a", "b", "c", "d"], [f"t{i}" for i in range(600)])
    assert "600: t0, t1" in str(caught.value) and len(str(caught.value)) < 600


def test_test_split_says_why_it_cannot_be_scored() -> None:
    with pytest.raises(UsageError, match="publishes no annotations"):
        refuse_test(("val", "test"))


def test_bad_input_is_one_clear_message(tmp_path: Path) -> None:
    tokens = random_tree(tmp_path / "tree", 2)
    kwargs = {"dataroot": tmp_path / "tree", "version": "v1.0-mini", "tokens": tokens, "out": tmp_path}
    with pytest.raises(SourceMissingError, match="no submission"):
        evaluate_results(tmp_path / "absent.json", **kwargs)
    path = write_results(tmp_path, [(t, []) for t in tokens], ())
    with pytest.raises(UsageError, match="engine"):
        evaluate_results(path, engine="quick", **kwargs)
    with pytest.raises(SourceMissingError, match="not a nuScenes folder"):
        evaluate_results(path, **(kwargs | {"dataroot": tmp_path}))
    (tmp_path / "cut.json").write_text(path.read_text()[:-40])
    with pytest.raises(InputDataError, match=r"ends in the middle|broken JSON"):
        evaluate_results(tmp_path / "cut.json", engine="fast", **kwargs)
    many = [{"sample_token": tokens[0]}] * 501
    path = write_results(tmp_path, [(t, many if t == tokens[0] else []) for t in tokens], ())
    with pytest.raises(InputDataError, match="too many boxes"):
        evaluate_results(path, engine="fast", **kwargs)
    path = write_results(tmp_path, [(t, [{"sample_token": t}] if t == tokens[0] else []) for t in tokens], ())
    with pytest.raises(InputDataError, match="bad submission entry"):
        evaluate_results(path, engine="fast", **kwargs)


def test_scanner_equals_json_whatever_the_piece_size(tmp_path: Path, monkeypatch) -> None:
    value = {
        "meta": {"use_camera": True},
        "results": {"a": [{"x": 12345.678, "s": 'a}],"b'}], "b": [], "c": [{"n": -1e-7}] * 30},
    }
    (tmp_path / "r.json").write_text(json.dumps(value, indent=1))
    (tmp_path / "list.json").write_text(json.dumps([1234567, {"a": [1, 2]}, "x,y", 7.5]))
    for size in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr("pipelines.evaluate_tables._CHUNK", size)
        meta: dict = {}
        assert dict(iter_results(tmp_path / "r.json", meta)) == value["results"] and meta == value["meta"]
        assert list(iter_array(tmp_path / "list.json")) == [1234567, {"a": [1, 2]}, "x,y", 7.5]


def test_results_outside_the_subset_are_skipped_by_the_reader(tmp_path: Path) -> None:
    tokens = random_tree(tmp_path / "tree", 5)
    from nuscenes import NuScenes

    nusc = NuScenes("v1.0-mini", str(tmp_path / "tree"), verbose=False)
    found = perturbed_truth(nusc, 5)
    path = write_results(tmp_path, found.items(), ())
    table, _ = read_results(path, tokens[3:5], np.zeros((2, 2)))
    assert len(table) == len(found[tokens[3]]) + len(found[tokens[4]])
    assert SimpleNamespace(n=table.num_samples).n == 2
