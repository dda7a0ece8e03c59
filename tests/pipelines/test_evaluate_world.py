"""The synthetic world against the official metric, and what the evaluation keeps about every box."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imkd_data import open_cache
from imkd_data.classes import CLASS_RANGE_M, DETECTION_CLASSES
from imkd_data.errors import CacheDamageError, SourceMissingError, UsageError
from imkd_data.geometry import GLOBAL, Pose
from imkd_data.sample import Boxes
from pipelines.build import build
from pipelines.evaluate import ego_places, evaluate_results, read_tables, scored_rows
from pipelines.evaluate_detail import (
    confusion,
    match_detail,
    range_table,
    read_detail,
    resampled_map,
    sample_badness,
)
from pipelines.evaluate_fast import fast_metrics
from pipelines.submission import boxes_to_results, write_results
from pipelines.synth import run_synth


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two scenes (one train, one val), six keyframes each, and a cache of their boxes."""
    root = tmp_path_factory.mktemp("world")
    run_synth(out=root / "tree", scenes=3, keyframes=5, seed=5, image_size="90x160")
    build(
        dataroot=root / "tree",
        version="v1.0-mini",
        splits=("mini_train", "mini_val"),
        out=root / "cache",
        fields=("boxes", "sample_pose"),
        executor="sync",
    )
    return root / "tree", open_cache(root / "cache")


def truth_results(cache, rows, *, shift_m: float = 0.0, drop: int = 0):
    names = ("centre_m", "size_lwh_m", "yaw_rad", "velocity_mps", "label", "score")
    names += ("num_lidar", "num_radar", "attribute", "visibility")
    for row in rows.tolist():
        boxes = cache.decode("boxes", row)
        keep = np.flatnonzero((boxes.num_lidar > 0) | (boxes.num_radar > 0))[drop:]
        picked = {n: getattr(boxes, n)[keep] for n in names}
        picked["centre_m"] = picked["centre_m"] + np.array([shift_m, 0, 0])
        pose = cache.decode("sample_pose", row)["global_from_ego"]
        pose = Pose(dst=GLOBAL, src="ego", rotation=pose[:, :3], translation_m=pose[:, 3])
        yield cache.token(row), boxes_to_results(cache.token(row), Boxes(frame="ego", **picked), pose)


def scored(world, tmp_path: Path, engine: str, rows=None, **change):
    tree, cache = world
    rows = cache.rows() if rows is None else rows
    path = write_results(tmp_path / "r", truth_results(cache, rows, **change), ("camera", "radar"))
    tokens = [cache.token(int(r)) for r in rows]
    places = ego_places(cache, rows)
    return evaluate_results(
        path, dataroot=tree, version="v1.0-mini", tokens=tokens, out=tmp_path / engine, engine=engine, ego_xy_m=places
    )


@pytest.mark.parametrize("engine", ["devkit", "fast"])
def test_truth_of_the_synthetic_world_is_perfect(world, tmp_path: Path, engine: str) -> None:
    """mAP 1.0 and all five errors under 1e-3: frames, sizes, yaw, velocities and attributes, through cache and submission."""
    out = scored(world, tmp_path, engine)
    assert out["mean_ap"] == pytest.approx(1.0, abs=1e-9) and len(out["occurring_classes"]) == 10
    assert max(out["tp_errors"].values()) < 1e-3
    assert out["nd_score"] > 0.999


def test_val_rows_are_the_default(world) -> None:
    _, cache = world
    rows = scored_rows(cache)
    splits = {cache.index["split"][cache.line(int(r))].as_py() for r in rows}
    assert splits == {"mini_val"} and len(rows) == 5
    assert len(scored_rows(cache, "mini_train,mini_val")) == len(scored_rows(cache, "mini_train, mini_val,mini_val")) == 15
    for wrong, name in (("mini_val,mini_vall", "mini_vall"), ("val,mini_val", "val"), ("mini_val,", "''")):
        with pytest.raises(UsageError, match="no rows to score") as error:
            scored_rows(cache, wrong)
        assert error.value.details["found"] == name and error.value.details["expected"] == "mini_train, mini_val"


def test_detail_says_what_happened_to_every_box(world, tmp_path: Path) -> None:
    rows = scored_rows(world[1])
    out = scored(world, tmp_path, "fast", rows, shift_m=0.7, drop=2)
    detail = read_detail(tmp_path / "fast")
    assert len(detail.truth_label) == sum(out["truth_boxes"].values())
    hit = detail.truth >= 0
    shifted = detail.errors[hit, 0]
    assert np.median(shifted) == pytest.approx(0.7, abs=1e-3)  # a neighbour may be nearer for a few
    assert (detail.label[hit] == detail.truth_label[detail.truth[hit]]).all()
    assert (detail.sample[hit] == detail.truth_sample[detail.truth[hit]]).all()
    by_bit = [(detail.hits >> t & 1).sum() for t in range(4)]
    assert by_bit[0] < by_bit[1] <= by_bit[2] <= by_bit[3]  # 0.7 m fails at 0.5 m
    assert (sample_badness(detail) > 0).all()
    table = range_table(detail)
    assert table["truth"].sum() == len(detail.truth_label)
    assert np.nanmax(table["found"]) <= 1 and np.nanmin(table["found"]) < 1
    counts = confusion(detail)
    assert counts.sum() == len(detail.truth_label) and counts.shape == (10, 11)
    assert np.trace(counts[:, :10]) > 0.7 * counts.sum()


def test_resampling_without_weights_gives_the_score(world, tmp_path: Path) -> None:
    """One group drawn once is the sample itself; groups of a paired comparison are drawn alike."""
    out = scored(world, tmp_path, "fast", shift_m=0.7, drop=2)
    detail = read_detail(tmp_path / "fast")
    whole = resampled_map(detail, np.zeros(len(detail.tokens), dtype=np.int64), draws=2)
    assert whole == pytest.approx(out["mAP_occurring"], abs=1e-6)
    scenes = np.arange(len(detail.tokens)) // 5
    first, again = (resampled_map(detail, scenes, draws=20, seed=4) for _ in range(2))
    assert np.array_equal(first, again) and first.std() > 0


def test_a_ring_of_ranges_is_the_metric_of_that_ring(world, tmp_path: Path) -> None:
    tree, cache = world
    rows = cache.rows()
    path = write_results(tmp_path, truth_results(cache, rows), ())
    tokens = [cache.token(int(r)) for r in rows]
    near = {name: min(20.0, r) for name, r in CLASS_RANGE_M.items()}
    tables = read_tables(path, tree, "v1.0-mini", tokens, class_range=near)
    assert tables.truth.ego_distance_m.max() < 20 and tables.found.ego_distance_m.max() < 20
    summary, _ = fast_metrics(tables.truth, tables.found)
    detail = match_detail(tables.truth, tables.found, tokens)
    present = {DETECTION_CLASSES[i] for i in np.unique(detail.truth_label)}
    for name, ap in summary["mean_dist_aps"].items():
        assert ap == pytest.approx(1.0 if name in present else 0.0, abs=1e-9)


def test_damaged_detail_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError):
        read_detail(tmp_path)
    (tmp_path / "evaluation.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(CacheDamageError, match="cannot be read"):
        read_detail(tmp_path)
