"""What happened to every box: matches at each threshold, errors, confusion. Small enough to keep beside the scores.

``evaluation.npz`` (arrays only, no pickle). S samples, D detections in matching order within their class, G truth boxes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import CacheDamageError, SourceMissingError
from imkd_data.kernels.match import match_detections
from pipelines.evaluate_fast import CONFIG, EvalTable, match_errors

__all__ = ["DETAIL_FILE", "Detail", "match_detail", "read_detail", "resampled_map", "sample_badness", "write_detail"]

DETAIL_FILE = "evaluation.npz"
THRESHOLDS_M: tuple[float, ...] = tuple(CONFIG["dist_ths"])
AT_TP = THRESHOLDS_M.index(CONFIG["dist_th_tp"])
CONFIDENT = 0.25  # detections from this score on count in confusions and in "worst samples"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detail:
    """tokens (S,). Detections: sample (D,) i4, label (D,) i1, score (D,) f4, hits (D,) u1 = bit t set: matched at threshold t,
    truth (D,) i4 = matched truth at 2 m or -1, errors (D, 5) f4 trans m, scale, orient rad, vel m/s, attr (NaN unmatched).
    Truth: truth_sample, truth_label, truth_range_m (G,) f4, confused (G,) i1 = class of the nearest confident detection of
    any class within 2 m, -1 none."""

    tokens: NDArray[Any]
    sample: NDArray[np.int32]
    label: NDArray[np.int8]
    score: NDArray[np.float32]
    hits: NDArray[np.uint8]
    truth: NDArray[np.int32]
    errors: NDArray[np.float32]
    truth_sample: NDArray[np.int32]
    truth_label: NDArray[np.int8]
    truth_range_m: NDArray[np.float32]
    confused: NDArray[np.int8]


def _confused(truth: EvalTable, found: EvalTable) -> NDArray[np.int8]:
    """Class-blind: each confident detection takes the nearest free truth within 2 m; the truth remembers its class."""
    sure = found.where(found.score >= CONFIDENT)
    sure = sure.where(np.argsort(-sure.score, kind="stable"))
    start = np.searchsorted(truth.sample, np.arange(truth.num_samples + 1)).astype(np.int64)
    out = np.full(len(truth), -1, dtype=np.int8)
    if len(sure) and len(truth):
        xy = [np.ascontiguousarray(t.translation_m[:, :2]) for t in (sure, truth)]
        (match,) = match_detections(sure.sample, xy[0], start, xy[1], np.array([2.0]))
        out[match[match >= 0]] = sure.label[match >= 0]
    return out


def match_detail(truth: EvalTable, found: EvalTable, tokens: Sequence[str]) -> Detail:
    """Filtered truth and detections (rows ordered by sample) -> what happened to every box."""
    parts: list[tuple[NDArray[Any], ...]] = []
    for label in range(len(DETECTION_CLASSES)):
        own_truth = np.flatnonzero(truth.label == label)
        rows = np.flatnonzero(found.label == label)
        rows = rows[np.lexsort((np.arange(len(rows)), found.score[rows]))[::-1]]
        detections, boxes = found.where(rows), truth.where(own_truth)
        start = np.searchsorted(boxes.sample, np.arange(truth.num_samples + 1)).astype(np.int64)
        xy = [np.ascontiguousarray(t.translation_m[:, :2]) for t in (detections, boxes)]
        match = match_detections(detections.sample, xy[0], start, xy[1], np.array(THRESHOLDS_M))
        hits = ((match >= 0) * (1 << np.arange(len(THRESHOLDS_M)))[:, None]).sum(0).astype(np.uint8)
        at_tp = match[AT_TP]
        errors = np.full((len(rows), 5), np.nan, dtype=np.float32)
        hit = at_tp >= 0
        period = np.pi if DETECTION_CLASSES[label] == "barrier" else 2 * np.pi
        values = match_errors(boxes.where(at_tp[hit]), detections.where(hit), period)
        names = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
        errors[hit] = np.stack([values[n] for n in names], axis=1)
        global_truth = np.where(hit, own_truth[at_tp] if len(own_truth) else -1, -1)
        parts.append((detections.sample, detections.label, detections.score, hits, global_truth, errors))
    sample, label_, score, hits_, matched, errors_ = (np.concatenate([p[i] for p in parts]) for i in range(6))
    return Detail(
        tokens=np.asarray(list(tokens), dtype=np.str_),
        sample=sample.astype(np.int32),
        label=label_.astype(np.int8),
        score=score.astype(np.float32),
        hits=hits_,
        truth=matched.astype(np.int32),
        errors=errors_,
        truth_sample=truth.sample.astype(np.int32),
        truth_label=truth.label.astype(np.int8),
        truth_range_m=truth.ego_distance_m.astype(np.float32),
        confused=_confused(truth, found),
    )


def write_detail(out: Path, detail: Detail) -> Path:
    """``out/evaluation.npz``, whole or absent."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f.name: getattr(detail, f.name) for f in fields(Detail)})  # type: ignore[arg-type]
    part = out / f".{DETAIL_FILE}.part"
    part.write_bytes(buffer.getvalue())
    return part.replace(out / DETAIL_FILE)


def read_detail(folder: Path) -> Detail:
    """The file that ``write_detail`` wrote. Errors: SourceMissingError, CacheDamageError."""
    path = folder / DETAIL_FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Detail(**{f.name: stored[f.name] for f in fields(Detail)})
    except FileNotFoundError as error:
        raise SourceMissingError("no evaluation detail here", file=path, next="run imkd evaluate again") from error
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise CacheDamageError(
            f"evaluation detail cannot be read: {error}", file=path, next="run imkd evaluate again"
        ) from error


def resampled_map(detail: Detail, groups: NDArray[np.int64], draws: int = 200, seed: int = 0) -> NDArray[np.float64]:
    """(draws,) mAP of bootstrap samples: groups (S,) of samples (scenes) drawn with replacement, counter-based generator.

    The same seed and groups draw the same scenes for every run, so differences of two runs' results are paired. Classes
    without truth in a draw are left out of its mean. Detections below score 0.02 are left out (they move no AP by 1e-3).
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    count = int(groups.max(initial=-1)) + 1
    out = np.zeros(draws)
    usable = detail.score >= 0.02
    classes = [c for c in range(len(DETECTION_CLASSES)) if (detail.truth_label == c).any()]
    pieces = []
    for c in classes:
        mine = usable & (detail.label == c)
        pieces.append((groups[detail.sample[mine]], detail.hits[mine], groups[detail.truth_sample[detail.truth_label == c]]))
    for k in range(draws):
        weight = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        aps = [ap for piece in pieces if not np.isnan(ap := _weighted_ap(weight, *piece))]
        out[k] = np.mean(aps) if aps else np.nan
    return out


def _weighted_ap(
    weight: NDArray[np.float64], group: NDArray[np.int64], hits: NDArray[np.uint8], truth_group: NDArray[np.int64]
) -> float:
    """Mean AP over the thresholds when every group counts ``weight`` times; detections are in matching order."""
    positives = weight[truth_group].sum()
    if positives == 0:
        return float("nan")
    own = weight[group]
    seen = np.cumsum(own)
    grid, total = np.linspace(0, 1, 101), 0.0
    for t in range(len(THRESHOLDS_M)):
        tp = np.cumsum(own * ((hits >> t) & 1))
        if len(tp) and tp[-1] > 0:
            recall, precision = tp / positives, tp / np.maximum(seen, 1e-12)
            curve = np.interp(grid, recall, precision, right=0)[11:] - 0.1
            total += float(np.maximum(curve, 0).mean()) / 0.9
    return total / len(THRESHOLDS_M)


def sample_badness(detail: Detail) -> NDArray[np.float64]:
    """(S,) how wrong a sample is: missed truth plus confident detections without truth, per truth box (at least 3)."""
    count = len(detail.tokens)
    truth = np.bincount(detail.truth_sample, minlength=count)
    sure = detail.score >= CONFIDENT
    hit = (detail.hits >> AT_TP) & 1 == 1
    found = np.bincount(detail.sample[sure & hit], minlength=count)
    false = np.bincount(detail.sample[sure & ~hit], minlength=count)
    return np.asarray((truth - found + false) / np.maximum(truth, 3), dtype=np.float64)


def confusion(detail: Detail, samples: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """(10, 11) truth class x class of the detection at its place; the last column: none."""
    keep = np.ones(len(detail.truth_label), bool) if samples is None else np.isin(detail.truth_sample, samples)
    n = len(DETECTION_CLASSES)
    column = np.where(detail.confused[keep] < 0, n, detail.confused[keep]).astype(np.int64)
    return np.bincount(detail.truth_label[keep].astype(np.int64) * (n + 1) + column, minlength=n * (n + 1)).reshape(n, n + 1)


def range_table(detail: Detail, edges_m: Sequence[float] = (0, 10, 20, 30, 40, 50)) -> Mapping[str, NDArray[np.float64]]:
    """By distance ring: truth boxes, share found at 2 m by a confident detection, and the five mean errors of those."""
    rings = np.digitize(detail.truth_range_m, edges_m) - 1
    n = len(edges_m) - 1
    matched = (detail.truth >= 0) & (detail.score >= CONFIDENT)
    ring_of = rings[detail.truth[matched]]
    truth = np.bincount(rings[(rings >= 0) & (rings < n)], minlength=n).astype(float)
    found = np.bincount(ring_of[(ring_of >= 0) & (ring_of < n)], minlength=n).astype(float)
    out = {"truth": truth, "found": np.divide(found, truth, out=np.full(n, np.nan), where=truth > 0)}
    errors = detail.errors[matched]
    for i, name in enumerate(("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")):
        value = np.full(n, np.nan)
        for r in range(n):
            own = errors[ring_of == r, i]
            if np.isfinite(own).any():
                value[r] = np.nanmean(own)
        out[name] = value
    return out
