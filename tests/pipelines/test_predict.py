"""Predictions from a cache and straight from a tree, and truth through the whole coordinate chain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from imkd_data import open_cache
from imkd_data.errors import SourceMissingError, UsageError
from imkd_data.geometry import BEV, GLOBAL, Pose
from imkd_data.sample import Boxes
from imkd_models.label import LabelEncoder
from pipelines.build import build
from pipelines.evaluate import ego_places, evaluate_results, scored_rows
from pipelines.predict import detections_to_boxes, open_tree, predict_cache, predict_rows, stream_options
from pipelines.submission import boxes_to_results, write_results

SENSORS = (
    "LIDAR_TOP",
    "CAM_FRONT",
    "CAM_FRONT_LEFT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
    "RADAR_FRONT",
)


@pytest.fixture(scope="module")
def keyframe_cache(real_keyframe: Path, tmp_path_factory):
    out = tmp_path_factory.mktemp("keyframe") / "cache"
    build(
        dataroot=real_keyframe,
        version="v1.0-mini",
        splits=("mini_train",),
        out=out,
        sensors=SENSORS,
        recipe_overrides={"images_mode": "original"},
        executor="sync",
    )
    return open_cache(out)


def tiny_student():
    import torch

    from imkd_models.presets import tiny

    torch.manual_seed(3)
    return tiny(history=(0,)).eval()


def loud(model):
    """A random network's scores lie at its prior; lift them so that boxes come out."""
    for name, p in model.head.named_parameters():
        if name.endswith("bias") and "heat" in name:
            p.data.fill_(-1.0)
    return model


def truth_boxes(cache, row: int) -> tuple[Boxes, Pose]:
    boxes = cache.decode("boxes", row)
    keep = (boxes.num_lidar > 0) | (boxes.num_radar > 0)
    names = ("centre_m", "size_lwh_m", "yaw_rad", "velocity_mps", "label", "score")
    names += ("num_lidar", "num_radar", "attribute", "visibility")
    pose = cache.decode("sample_pose", row)["global_from_ego"]
    picked = Boxes(frame="ego", **{n: getattr(boxes, n)[keep] for n in names})
    return picked, Pose(dst=GLOBAL, src="ego", rotation=pose[:, :3], translation_m=pose[:, 3])


@pytest.mark.real_data
@pytest.mark.parametrize("engine", ["devkit", "fast"])
def test_cached_truth_of_the_real_keyframe_scores_one(keyframe_cache, real_keyframe: Path, tmp_path: Path, engine) -> None:
    """Reader, stored boxes, ego -> global and the submission writer together lose nothing that the metric sees."""
    cache = keyframe_cache
    rows = scored_rows(cache)
    tokens = [cache.token(int(r)) for r in rows]
    results = [(t, boxes_to_results(t, *truth_boxes(cache, int(r)))) for t, r in zip(tokens, rows, strict=True)]
    path = write_results(tmp_path, results, ("camera",))
    out = evaluate_results(
        path,
        dataroot=real_keyframe,
        version="v1.0-mini",
        tokens=tokens,
        out=tmp_path,
        engine=engine,
        ego_xy_m=ego_places(cache, rows),
    )
    assert out["mAP_occurring"] == pytest.approx(1.0, abs=1e-9)
    assert len(out["occurring_classes"]) == 5
    for name in out["occurring_classes"]:
        errors = out["label_tp_errors"][name]
        assert errors["trans_err"] < 1e-4 and errors["scale_err"] < 1e-5
        assert np.isnan(errors["orient_err"]) or errors["orient_err"] < 1e-5


@pytest.mark.real_data
def test_tree_and_cache_give_the_same_boxes(keyframe_cache, real_keyframe: Path, tmp_path: Path) -> None:
    """Straight from a tree whose LiDAR file is gone: equal to the cache, box for box."""
    tree = tmp_path / "tree"
    shutil.copytree(real_keyframe, tree)
    shutil.rmtree(tree / "samples" / "LIDAR_TOP")
    model = loud(tiny_student())
    meta = {"cache": {"sensors": list(SENSORS)}, "run": {"loader": {"radar_sweeps": 6, "radar_filter": "none"}}}
    rows = scored_rows(keyframe_cache)
    path = predict_cache(model, keyframe_cache, rows, tmp_path / "a", meta=meta)
    from_cache = json.loads(path.read_text())
    memory = open_tree(model, meta, tree, "v1.0-mini", ("mini_train",))
    assert set(memory.fields) == {"images", "camera_calibration", "radar_points"}
    assert memory.recipe.sensors == tuple(c for c in memory.suite.channels if c in SENSORS and c != "LIDAR_TOP")
    found = list(predict_rows(model, memory, memory.rows(), meta))
    assert [p.token for p in found] == [keyframe_cache.token(int(r)) for r in rows]
    direct = {p.token: boxes_to_results(p.token, p.boxes, p.global_from_ego) for p in found}
    assert direct == from_cache["results"] and 20 < len(next(iter(direct.values()))) <= 500
    assert from_cache["meta"] == {
        "use_camera": True,
        "use_lidar": False,
        "use_radar": True,
        "use_map": False,
        "use_external": False,
    }


@pytest.mark.real_data
def test_a_missing_image_names_file_and_token(real_keyframe: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(real_keyframe, tree)
    gone = next((tree / "samples" / "CAM_BACK").iterdir())
    gone.unlink()
    model = tiny_student()
    memory = open_tree(model, {"cache": {"sensors": list(SENSORS)}}, tree, "v1.0-mini", ("mini_train",))
    with pytest.raises(SourceMissingError) as caught:
        list(predict_rows(model, memory, memory.rows(), {}))
    assert gone.name in str(caught.value) and memory.token(0) in str(caught.value)


@pytest.mark.real_data
def test_a_split_without_scenes_is_said(real_keyframe: Path) -> None:
    with pytest.raises(SourceMissingError, match="no scene of this split"):
        open_tree(tiny_student(), {"cache": {"sensors": list(SENSORS)}}, real_keyframe, "v1.0-mini", ("mini_val",))


@pytest.mark.real_data
def test_scored_rows(keyframe_cache) -> None:
    assert len(scored_rows(keyframe_cache)) == 1  # no val rows: everything
    with pytest.raises(UsageError, match="publishes no annotations"):
        scored_rows(keyframe_cache, "test")
    with pytest.raises(UsageError, match="no rows"):
        scored_rows(keyframe_cache, "mini_val")


def test_detections_go_back_through_the_bev_draw() -> None:
    import torch

    from imkd_models.decode import Detections

    draw = np.diag([1.1, -1.1, 1.1, 1.0])  # flipped in y, 10 % larger
    one = Detections(
        centre_m=torch.tensor([[11.0, -5.5, 1.1]]),
        size_lwh_m=torch.tensor([[4.4, 2.2, 1.1]]),
        yaw_rad=torch.tensor([0.3]),
        velocity_mps=torch.tensor([[2.2, 1.1]]),
        label=torch.tensor([4]),
        score=torch.tensor([0.5]),
    )
    boxes = detections_to_boxes(one, draw)
    assert boxes.frame == "ego" and BEV not in boxes.frame
    assert np.allclose(boxes.centre_m, [[10, 5, 1]]) and np.allclose(boxes.size_lwh_m, [[4, 2, 1]])
    assert np.allclose(boxes.yaw_rad, -0.3) and np.allclose(boxes.velocity_mps, [[2, -1]])
    assert boxes.label.tolist() == [4]


def test_stream_options_follow_the_network() -> None:
    from imkd_models.presets import tiny_lidar

    student = tiny_student()
    options = stream_options(student, {"run": {"loader": {"radar_filter": "devkit", "radar_sweeps": 3, "workers": 9}}})
    assert options["fields"] == ("images", "radar_points") and options["radar_filter"] == "devkit"
    assert "workers" not in options and options["image_hw_px"] == student.config.image_hw_px
    lidar = stream_options(tiny_lidar(), {})
    assert lidar["fields"] == ("lidar_points",) and "image_hw_px" not in lidar


def as_test_split(tree: Path, out: Path) -> Path:
    """The synthetic tree as nuScenes publishes its test split: other scene names, no annotations; here also no LiDAR files."""
    from imkd_data.readers import SPLITS

    shutil.copytree(tree / "v1.0-mini", out / "v1.0-test")
    for name in ("samples", "sweeps"):
        shutil.copytree(tree / name, out / name, ignore=shutil.ignore_patterns("LIDAR_TOP"))
    tables = out / "v1.0-test"
    scenes = json.loads((tables / "scene.json").read_text())
    for scene, name in zip(scenes, SPLITS["test"], strict=False):
        scene["name"] = name
    (tables / "scene.json").write_text(json.dumps(scenes))
    for name in ("sample_annotation", "instance"):
        (tables / f"{name}.json").write_text("[]")
    return out


def test_test_split_without_lidar_or_annotations(line, tmp_path: Path) -> None:
    """One results.json with every sample of the split, valid by the devkit's own loader, at most 500 boxes a sample."""
    from nuscenes.eval.common.loaders import load_prediction_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox

    from pipelines.predict import predict_split

    tree = as_test_split(line.tree, tmp_path / "tree")
    path = predict_split(line.students["student0"], tree, "", "test", tmp_path / "out")
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    tokens = [s["token"] for s in json.loads((tree / "v1.0-test" / "sample.json").read_text())]
    boxes, meta = load_prediction_of_sample_tokens(str(path), 500, DetectionBox, tokens)
    assert meta["use_camera"] and meta["use_radar"] and not meta["use_lidar"]
    assert set(json.loads(path.read_text())["results"]) == set(tokens) and len(boxes.all) > 0
    with pytest.raises(SourceMissingError):  # the LiDAR network needs the files that are gone
        predict_split(line.lidar, tree, "v1.0-test", "test", tmp_path / "lidar")
    assert not (tmp_path / "lidar" / "results.json").exists()


def test_unknown_splits_and_missing_trees_are_said(line, tmp_path: Path) -> None:
    from pipelines.predict import predict_split

    with pytest.raises(UsageError, match="unknown split"):
        predict_split(line.students["student0"], line.tree, "v1.0-mini", "validation", tmp_path)
    with pytest.raises(SourceMissingError):
        predict_split(line.students["student0"], tmp_path, "v1.0-mini", "mini_val", tmp_path)


def test_evaluation_sees_the_radar_of_training(line, tmp_path: Path, monkeypatch) -> None:
    """Filter and sweeps of the run that made the checkpoint reach the stream (they are 6 and none there, not the default)."""
    from imkd_data.loader import stream as module
    from pipelines.evaluate import evaluate_checkpoint

    seen = []
    plain = module.stream
    monkeypatch.setattr(module, "stream", lambda *a, **k: seen.append(k) or plain(*a, **k))
    evaluate_checkpoint(line.students["student0"], line.cache, line.tree, tmp_path, engine="fast")
    assert [(k["radar_sweeps"], k["radar_filter"]) for k in seen] == [(6, "none")]


def test_a_changed_network_is_what_is_scored_and_leaves_the_checkpoint_alone(line, tmp_path: Path) -> None:
    """What rows of the benchmark at test time rest on: other detections, and no score beside the checkpoint."""
    import torch

    from pipelines.evaluate import evaluate_checkpoint

    checkpoint = tmp_path / "run" / "step.ckpt"
    shutil.copytree(Path(line.students["student0"]).resolve(), checkpoint)
    (checkpoint.parent / "scores.json").unlink(missing_ok=True)

    def halved(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 0.5

    results = {}
    for name, change in (("changed", halved), ("as it is", None)):
        evaluate_checkpoint(checkpoint, line.cache, line.tree, tmp_path / name, engine="fast", change=change)
        results[name] = json.loads((tmp_path / name / "results.json").read_text())["results"]
        assert (checkpoint.parent / "scores.json").is_file() == (change is None)
    assert results["changed"].keys() == results["as it is"].keys() and results["changed"] != results["as it is"]


def test_all_sweeps_are_those_of_the_cache_of_training(line) -> None:
    """A run says 0 for all that is stored; on a raw tree, and in a cache of more sweeps, it means those of training."""
    from imkd_models.presets import tiny_lidar

    model = tiny_lidar()

    def asked(loader: dict[str, int], cache: dict[str, int]) -> tuple[int, int]:
        options = stream_options(model, {"run": {"loader": loader}, "cache": cache})
        return options["lidar_sweeps"], options["radar_sweeps"]

    zero = {"lidar_sweeps": 0, "radar_sweeps": 0}
    assert asked(zero, {}) == (0, 0)  # a checkpoint that does not say: as before
    assert asked(zero, {"lidar_sweeps": 2, "radar_sweeps": 6}) == (2, 6)
    assert asked({"lidar_sweeps": 1, "radar_sweeps": 3}, {"lidar_sweeps": 2, "radar_sweeps": 6}) == (1, 3)
    assert asked({"lidar_sweeps": 10, "radar_sweeps": 13}, {"lidar_sweeps": 2, "radar_sweeps": 6}) == (
        2,
        6,
    )  # no more were there
    assert "lidar_sweeps" not in stream_options(model, {})
    for cache, expected in (({}, (10, 13)), ({"lidar_sweeps": 1, "radar_sweeps": 2}, (1, 2))):
        memory = open_tree(model, {"run": {"loader": zero}, "cache": cache}, line.tree, "v1.0-mini", ("mini_val",))
        assert (memory.recipe.lidar_sweeps, memory.recipe.radar_sweeps) == expected
        assert set(memory.decode("lidar_points", 0)["sweep"].tolist()) <= set(range(expected[0]))


def test_a_label_encoder_reads_no_sensor() -> None:
    from imkd_models.presets import label_config_for, tiny_lidar
    from pipelines.predict import model_sensors

    teacher = tiny_lidar()
    encoder = LabelEncoder(label_config_for(teacher, hidden=16), teacher)
    assert model_sensors(encoder) == () and model_sensors(teacher) == ("lidar",)
