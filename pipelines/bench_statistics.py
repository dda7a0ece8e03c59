"""Statistics of the distillation benchmark: paired t over seeds, Holm, smallest detectable gain, bootstrap over scenes.

The scene bootstrap needs the score of resampled scenes many times. Matching happens inside samples and does not depend on
which other samples are scored, so it is done once a run; a draw only weights scenes in the sums that the metric is made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.kernels.match import match_detections
from pipelines.evaluate_fast import CONFIG, TP_METRICS, EvalTable, match_errors

if TYPE_CHECKING:
    from pipelines.evaluate import Tables

__all__ = [
    "ClassMatches",
    "PairedResult",
    "SceneMatches",
    "holm",
    "paired_t",
    "scene_bootstrap",
    "scene_draws",
    "smallest_detectable",
    "t_cdf",
    "t_quantile",
]

F64 = NDArray[np.float64]
_NO_ERROR = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}


# --------------------------------------------------------------------------------------------------------------- seeds


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t; the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if freedom < 1:
        raise ValueError("degrees of freedom must be at least 1")
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine2 = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term, total = math.cos(angle), math.cos(angle) if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine2 * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine2 * (k - 1) / k
            total += term
        inside = sine * total
    return 0.5 * (1 + inside)


def t_quantile(p: float, freedom: int) -> float:
    """t with ``t_cdf(t) == p``, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedResult:
    """Mean difference with its 95 % interval and two-sided p over ``seeds`` pairs; interval and p NaN below two pairs."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    spread: float  # standard deviation of the differences


def paired_t(a: Sequence[float], b: Sequence[float]) -> PairedResult:
    """Paired t of a - b."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n, mean = len(difference), float(difference.mean()) if len(difference) else math.nan
    if n < 2:
        return PairedResult(mean=mean, low=math.nan, high=math.nan, p=math.nan, seeds=n, spread=math.nan)
    spread = float(difference.std(ddof=1))
    half = t_quantile(0.975, n - 1) * spread / math.sqrt(n)
    if spread == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = min(2 * (1 - t_cdf(abs(mean) / (spread / math.sqrt(n)), n - 1)), 1.0)  # NaN stays NaN
    return PairedResult(mean=mean, low=mean - half, high=mean + half, p=p, seeds=n, spread=spread)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values; NaN, a comparison that is still to be made, stays NaN and counts as one."""
    known = sorted((v, k) for k, v in p.items() if not math.isnan(v))
    out, running = dict.fromkeys(p, math.nan), 0.0
    for i, (value, name) in enumerate(known):
        running = max(running, min(1.0, value * (len(p) - i)))
        out[name] = running
    return out


def smallest_detectable(spread: float, seeds: int, power: float = 0.8) -> float:
    """Gain that a paired t over ``seeds`` finds with this power at 5 %, for a standard deviation of the differences."""
    if seeds < 2:
        return math.nan
    return (t_quantile(0.975, seeds - 1) + t_quantile(power, seeds - 1)) * spread / math.sqrt(seeds)


# -------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMatches:
    """One class of one run, detections by falling score. scene (N,), score (N,), hit (thresholds, N) bool, errors
    (5, hits at the TP threshold) in the order of TP_METRICS, truth (scenes,) number of true boxes."""

    scene: NDArray[np.int64]
    score: F64
    hit: NDArray[np.bool_]
    errors: F64
    truth: F64


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneMatches:
    """What a run's score on any weighting of the scenes needs."""

    classes: Mapping[str, ClassMatches]
    scenes: int

    @classmethod
    def from_tables(cls, tables: Tables, scene_of_sample: NDArray[np.int64]) -> SceneMatches:
        """Match once. scene_of_sample (S,): scene number of each sample of the tables."""
        scenes = int(scene_of_sample.max()) + 1 if len(scene_of_sample) else 0
        matched = {n: _matched(tables.truth, tables.found, n, scene_of_sample, scenes) for n in CONFIG["class_range"]}
        return cls(classes=matched, scenes=scenes)

    def save(self, path: Path) -> None:
        """One ``.npz``, written at once."""
        arrays: dict[str, Any] = {"scenes": np.array(self.scenes)}
        for name, m in self.classes.items():
            arrays |= {f"{name}.{key}": getattr(m, key) for key in ClassMatches.__dataclass_fields__}
        part = path.with_name(f".{path.name}.part.npz")
        np.savez_compressed(part, **arrays)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> SceneMatches:
        """What ``save`` wrote."""
        with np.load(path, allow_pickle=False) as z:
            classes = {
                name: ClassMatches(**{key: z[f"{name}.{key}"] for key in ClassMatches.__dataclass_fields__})
                for name in CONFIG["class_range"]
            }
            return cls(classes=classes, scenes=int(z["scenes"]))

    def nds(self, weight: F64 | None = None) -> float:
        """NDS (0..1) with every scene counted ``weight`` times; the official score where all weights are 1."""
        w = np.ones(self.scenes) if weight is None else np.asarray(weight, dtype=np.float64)
        aps, errors = [], []
        for name, m in self.classes.items():
            ap, error = _class_score(m, w)
            aps.append(ap)
            errors.append([math.nan if k in _NO_ERROR.get(name, ()) else e for k, e in zip(TP_METRICS, error, strict=True)])
        tp = [max(0.0, 1.0 - e) for e in np.nanmean(np.array(errors), axis=0)]
        k = CONFIG["mean_ap_weight"]
        return float((k * np.mean(aps) + sum(tp)) / (k + len(tp)))


def _matched(truth: EvalTable, found: EvalTable, name: str, scene_of_sample: NDArray[np.int64], scenes: int) -> ClassMatches:
    label = DETECTION_CLASSES.index(name)
    truth, found = truth.where(truth.label == label), found.where(found.label == label)
    found = found.where(np.lexsort((np.arange(len(found)), found.score))[::-1])
    count = np.bincount(scene_of_sample[truth.sample], minlength=scenes).astype(np.float64)
    thresholds = np.asarray(CONFIG["dist_ths"], dtype=np.float64)
    if not len(found) or not len(truth):
        hit = np.zeros((len(thresholds), len(found)), dtype=np.bool_)
        errors = np.zeros((len(TP_METRICS), 0))
    else:
        start = np.searchsorted(truth.sample, np.arange(truth.num_samples + 1)).astype(np.int64)
        match = match_detections(
            found.sample,
            np.ascontiguousarray(found.translation_m[:, :2]),
            start,
            np.ascontiguousarray(truth.translation_m[:, :2]),
            thresholds,
        )
        hit = match >= 0
        at = match[CONFIG["dist_ths"].index(CONFIG["dist_th_tp"])]
        period = np.pi if name == "barrier" else 2 * np.pi
        pairs = match_errors(truth.where(at[at >= 0]), found.where(at >= 0), period)
        errors = np.stack([pairs[k] for k in TP_METRICS])
    scene = scene_of_sample[found.sample] if len(found) else np.zeros(0, dtype=np.int64)
    return ClassMatches(scene=scene, score=found.score, hit=hit, errors=errors, truth=count)


_RECALL = np.linspace(0, 1, 101)


def _class_score(m: ClassMatches, weight: F64) -> tuple[float, list[float]]:
    """AP over the four distances and the five errors of one class under scene weights."""
    total = float(m.truth @ weight)
    use = weight[m.scene] > 0
    if total <= 0 or not use.any():
        return 0.0, [1.0] * len(TP_METRICS)
    w, score, hits = weight[m.scene[use]], m.score[use], m.hit[:, use]
    found = np.cumsum(w)
    first = round(100 * CONFIG["min_recall"]) + 1
    aps, errors = [], [1.0] * len(TP_METRICS)
    for threshold, hit, hit_of_all in zip(CONFIG["dist_ths"], hits, m.hit, strict=True):
        if not hit.any():
            aps.append(0.0)
            continue
        tp = np.cumsum(w * hit)
        recall = tp / total
        precision = np.interp(_RECALL, recall, tp / found, right=0)
        keep = np.maximum(precision[first:] - CONFIG["min_precision"], 0)
        aps.append(float(keep.mean()) / (1 - CONFIG["min_precision"]))
        if threshold == CONFIG["dist_th_tp"]:
            confidence = np.interp(_RECALL, recall, score, right=0)
            errors = _tp_errors(m.errors[:, use[hit_of_all]], w[hit], score[hit], confidence, first)
    return float(np.mean(aps)), errors


def _tp_errors(values: F64, weight: F64, score: F64, confidence: F64, first: int) -> list[float]:
    reached = np.flatnonzero(confidence)
    last = int(reached[-1]) if len(reached) else 0
    if last < first:
        return [1.0] * len(values)
    out = []
    for row in values:
        known = ~np.isnan(row)
        if not known.any():
            out.append(1.0)
            continue
        count = np.cumsum(weight * known)
        mean = np.divide(np.nancumsum(weight * row), count, out=np.zeros(len(row)), where=count > 0)
        curve = np.interp(confidence[::-1], score[::-1], mean[::-1])[::-1]
        out.append(float(np.mean(curve[first : last + 1])))
    return out


def scene_draws(matches: SceneMatches, *, draws: int = 400, seed: int = 0) -> F64:
    """NDS in points, (draws,): each time other scenes, drawn with replacement. Equal ``seed``: the same scenes for every run,
    so that only what scenes do to a difference of two runs is left. Empty where there are fewer than two scenes."""
    n = matches.scenes
    if n < 2:
        return np.zeros(0)
    rng = np.random.default_rng(seed)
    weights = [np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64) for _ in range(draws)]
    return np.array([100 * matches.nds(w) for w in weights])


def scene_bootstrap(pairs: Sequence[tuple[F64, F64]]) -> tuple[float, float]:
    """95 % interval of the mean NDS difference over ``pairs`` (method, twin) of ``scene_draws``; NaN where there are none."""
    if not pairs or not len(pairs[0][0]):
        return math.nan, math.nan
    low, high = np.percentile(np.mean([a - b for a, b in pairs], axis=0), [2.5, 97.5])
    return float(low), float(high)
