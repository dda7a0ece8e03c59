"""Statistics of the distillation benchmark against scipy and against the official metric."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from imkd_data.classes import DETECTION_CLASSES
from pipelines.bench_statistics import (
    SceneMatches,
    holm,
    paired_t,
    scene_bootstrap,
    scene_draws,
    smallest_detectable,
    t_cdf,
    t_quantile,
)
from pipelines.evaluate import Tables
from pipelines.evaluate_fast import EvalTable, fast_metrics


def _table(rng: np.random.Generator, samples: int, per_sample: int, truth: EvalTable | None = None) -> EvalTable:
    """Boxes of three classes; detections lie near truth, with false ones between."""
    n = samples * per_sample
    sample = np.repeat(np.arange(samples), per_sample)
    if truth is None:
        xyz, label = rng.uniform(-40, 40, (n, 3)), rng.integers(0, 3, n)
    else:
        xyz = truth.translation_m + rng.normal(0, 0.8, (n, 3))
        xyz[rng.random(n) < 0.3] += 30
        label = truth.label
    return EvalTable(
        num_samples=samples,
        sample=sample,
        translation_m=xyz,
        size_wlh_m=rng.uniform(1, 4, (n, 3)),
        yaw_rad=rng.uniform(-3, 3, n),
        velocity_mps=rng.normal(0, 2, (n, 2)),
        label=label,
        score=np.round(rng.random(n), 6) if truth is not None else np.full(n, -1.0),
        attribute=rng.integers(-1, 4, n),
        num_points=np.full(n, 5 if truth is None else -1),
        ego_distance_m=np.full(n, 10.0),
    )


def _tables(seed: int, samples: int = 12) -> Tables:
    rng = np.random.default_rng(seed)
    truth = _table(rng, samples, 9)
    return Tables(truth=truth, found=_table(rng, samples, 9, truth), meta={})


SCENES = np.repeat(np.arange(4), 3)


def test_t_distribution_equals_scipy() -> None:
    for freedom in (1, 2, 3, 4, 5, 8, 29):
        for t in (-3.0, -0.4, 0.0, 1.3, 4.0):
            assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
        for p in (0.025, 0.5, 0.8, 0.975):
            assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-6, abs=1e-9)


def test_paired_t_equals_scipy_and_needs_two_pairs() -> None:
    a, b = [30.1, 31.4, 29.9, 30.8, 33.0, 30.2], [29.0, 30.0, 30.1, 29.5, 30.0, 29.9]
    ours, theirs = paired_t(a, b), stats.ttest_rel(a, b)
    assert ours.p == pytest.approx(theirs.pvalue) and ours.seeds == 6
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    one = paired_t([1.0], [0.0])
    assert one.mean == 1 and math.isnan(one.low) and math.isnan(one.p)
    assert paired_t([1.0, 1.0], [1.0, 1.0]).p == 1.0
    assert math.isnan(paired_t([1.0, 2.0, math.nan], [0.0, 0.5, 0.0]).p)


def test_holm_is_monotone_and_counts_what_is_still_to_come() -> None:
    out = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    assert out["a"] == pytest.approx(0.04) and out["c"] == pytest.approx(0.09) and out["b"] == pytest.approx(0.09)
    assert math.isnan(out["d"])


def test_smallest_detectable_gain_shrinks_with_seeds() -> None:
    few, many = smallest_detectable(1.0, 3), smallest_detectable(1.0, 6)
    assert few > many > 1.0 and many == pytest.approx((2.5706 + 0.9195) / math.sqrt(6), rel=1e-3)
    assert math.isnan(smallest_detectable(1.0, 1))


def test_matches_give_the_official_score() -> None:
    for seed in range(3):
        tables = _tables(seed)
        summary, _ = fast_metrics(tables.truth, tables.found)
        assert SceneMatches.from_tables(tables, SCENES).nds() == pytest.approx(summary["nd_score"], abs=1e-9)


def test_weight_zero_is_a_scene_left_out() -> None:
    tables = _tables(5)
    matches = SceneMatches.from_tables(tables, SCENES)
    keep = [SCENES[t.sample] != 1 for t in (tables.truth, tables.found)]
    summary, _ = fast_metrics(tables.truth.where(keep[0]), tables.found.where(keep[1]))
    assert matches.nds(np.array([1.0, 0.0, 1.0, 1.0])) == pytest.approx(summary["nd_score"], abs=1e-9)


def test_weight_two_is_a_scene_counted_twice() -> None:
    tables = _tables(6)
    doubled = []
    for table in (tables.truth, tables.found):
        extra = table.where(SCENES[table.sample] == 2)
        moved = replace(extra, sample=extra.sample + 12)
        columns = {
            n: np.concatenate([getattr(table, n), getattr(moved, n)])
            for n in EvalTable.__dataclass_fields__
            if n != "num_samples"
        }
        doubled.append(EvalTable(num_samples=24, **columns))
    summary, _ = fast_metrics(*doubled)
    matches = SceneMatches.from_tables(tables, SCENES)
    assert matches.nds(np.array([1.0, 1.0, 2.0, 1.0])) == pytest.approx(summary["nd_score"], abs=2e-3)


def test_matches_survive_a_file_and_empty_runs(tmp_path) -> None:
    tables = _tables(7)
    matches = SceneMatches.from_tables(tables, SCENES)
    matches.save(tmp_path / "m.npz")
    assert SceneMatches.load(tmp_path / "m.npz").nds() == matches.nds()
    none = Tables(truth=tables.truth, found=tables.found.where(np.zeros(len(tables.found), dtype=bool)), meta={})
    assert SceneMatches.from_tables(none, SCENES).nds() == 0.0


def test_bootstrap_of_equal_runs_is_zero_and_of_a_better_run_positive() -> None:
    tables = _tables(8)
    near = replace(
        tables.found, translation_m=np.where(np.arange(len(tables.found))[:, None] >= 0, tables.truth.translation_m, 0)
    )
    worse = SceneMatches.from_tables(tables, SCENES)
    better = SceneMatches.from_tables(Tables(truth=tables.truth, found=near, meta={}), SCENES)
    a, b = (scene_draws(m, draws=50) for m in (better, worse))
    assert scene_bootstrap([(b, b)]) == (0.0, 0.0)
    low, high = scene_bootstrap([(a, b)])
    gain = 100 * (better.nds() - worse.nds())
    assert 0 < low < gain < high
    assert np.array_equal(scene_draws(better, draws=50), a) and len(set(a)) > 1
    assert len(DETECTION_CLASSES) == len(worse.classes)


def test_a_p_that_rounds_to_nothing_is_not_printed_as_nothing() -> None:
    from pipelines.bench_table import _p

    assert [_p(p) for p in (None, 0.0, 0.0004, 0.0011, 0.05)] == ["-", "<0.001", "<0.001", "0.001", "0.050"]
