"""Scores: the official nuScenes detection evaluation on any subset of samples, and the fast engine behind the same door."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import InputDataError, MismatchError, SourceMissingError, UsageError
from pipelines.evaluate_detail import match_detail, write_detail
from pipelines.evaluate_fast import CONFIG, EvalTable, fast_metrics, filter_table, occurring_mean
from pipelines.evaluate_tables import iter_results, read_results, read_truth, truth_counts

if TYPE_CHECKING:
    from torch import nn

    from imkd_data.cache.store import Cache

__all__ = [
    "METRICS_FILE",
    "check_sample_sets",
    "evaluate_checkpoint",
    "evaluate_results",
    "predict_checkpoint",
    "score_checkpoint",
    "scored_rows",
    "write_metrics",
]

Engine = Literal["devkit", "fast"]
METRICS_FILE = "metrics_summary.json"
DETAILS_FILE = "metrics_details.json"
REFERENCE_CHANNEL = "LIDAR_TOP"  # ranges are measured from the car's place at this sensor's key time


def check_sample_sets(found: Sequence[str], expected: Sequence[str]) -> None:
    """Every sample of the subset must be predicted, no other one may be.

    Raises:
        MismatchError: listing both sides of the difference.
    """
    missing, foreign = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if not missing and not foreign:
        return

    def side(tokens: list[str]) -> str:
        return f"{len(tokens)}" + (": " + ", ".join(tokens[:5]) + (", ..." if len(tokens) > 5 else "") if tokens else "")

    raise MismatchError(
        "the submission's samples are not the samples to be scored",
        rule="evaluate.samples",
        expected=f"{len(set(expected))} samples; not predicted {side(missing)}",
        found=f"{len(set(found))} samples; not in the scored set {side(foreign)}",
        next="score with the split, scenes or cache that the predictions were made from",
    )


def refuse_test(splits: Sequence[str]) -> None:
    """The test split's truth is not public.

    Raises:
        UsageError: ``test`` is among the splits.
    """
    if "test" in splits:
        raise UsageError(
            "the test split cannot be scored here: nuScenes publishes no annotations for it",
            rule="evaluate.test",
            found="split test",
            next="make results.json with `imkd predict --split test` and upload it to the nuScenes server, or score val",
        )


def scored_rows(cache: Cache, split: str | None = None, scenes: Sequence[str] | None = None) -> np.ndarray:
    """Global cache rows to score: ``split`` if given, else val (mini_val), else everything that is not test.

    Raises:
        UsageError: the test split, a split that the cache does not hold, or no row is left.
    """
    present = list(dict.fromkeys(cache.index.column("split").to_pylist()))
    if split is not None:
        wanted = list(dict.fromkeys(s.strip() for s in split.split(",")))
    else:
        wanted = [s for s in present if s in ("val", "mini_val")] or present
    refuse_test(wanted)
    absent = [s or "''" for s in wanted if s not in present]  # a misspelt one among several must not go unsaid
    parts = [cache.rows(split=s, scenes=scenes) for s in wanted if s in present]
    rows = np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
    if absent or not len(rows):
        raise UsageError("no rows to score", expected=", ".join(present), found=", ".join(absent or wanted))
    return rows


class _ReferencePose:
    """A devkit table object whose samples call another sensor's key frame LIDAR_TOP (trees without LiDAR)."""

    def __init__(self, nusc: Any, channel: str) -> None:
        self._nusc, self._channel = nusc, channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nusc, name)

    def get(self, table: str, token: str) -> Any:
        record = self._nusc.get(table, token)
        if table == "sample" and REFERENCE_CHANNEL not in record["data"]:
            return {**record, "data": {**record["data"], REFERENCE_CHANNEL: record["data"][self._channel]}}
        return record


def open_devkit(dataroot: Path, version: str, reference_channel: str = REFERENCE_CHANNEL) -> Any:
    """The devkit's own table object.

    Raises:
        SourceMissingError: no such version under dataroot.
    """
    if not (dataroot / version / "sample.json").is_file():
        raise SourceMissingError(
            "not a nuScenes folder of this version", expected=f"{version}/sample.json", file=dataroot, next="check --dataroot"
        )
    from nuscenes import NuScenes

    nusc = NuScenes(version=version, dataroot=str(dataroot), verbose=False)
    return nusc if reference_channel == REFERENCE_CHANNEL else _ReferencePose(nusc, reference_channel)


def _filtered(nusc: Any, boxes: Any, class_range: Any) -> Any:
    from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes

    boxes = add_center_dist(nusc, boxes)
    return filter_eval_boxes(nusc, boxes, class_range) if boxes.all else boxes  # the devkit cannot filter "no boxes at all"


def _devkit_metrics(
    nusc: Any, results: Path, tokens: Sequence[str], config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The devkit's loading, filters and metric, unchanged, on exactly ``tokens``: summary, curves, truth per class."""
    os.environ["MPLBACKEND"] = "Agg"  # the devkit imports pyplot
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.loaders import load_gt_of_sample_tokens, load_prediction_of_sample_tokens
    from nuscenes.eval.detection.data_classes import DetectionBox, DetectionConfig
    from nuscenes.eval.detection.evaluate import DetectionEval

    class SubsetEval(DetectionEval):  # type: ignore[misc]
        """DetectionEval whose boxes are given instead of chosen by the name of a split."""

        def __init__(self, cfg: Any, truth: Any, found: Any) -> None:
            self.cfg, self.gt_boxes, self.pred_boxes, self.verbose = cfg, truth, found, False

    cfg = config_factory("detection_cvpr_2019") if config is None else DetectionConfig.deserialize(dict(config))
    found, meta = load_prediction_of_sample_tokens(str(results), cfg.max_boxes_per_sample, DetectionBox, list(tokens))
    with contextlib.redirect_stderr(io.StringIO()):  # a tqdm bar that cannot be switched off
        truth = load_gt_of_sample_tokens(nusc, list(tokens), DetectionBox)
    truth = _filtered(nusc, truth, cfg.class_range)
    found = _filtered(nusc, found, cfg.class_range)
    metrics, curves = SubsetEval(cfg, truth, found).evaluate()
    counts = {name: sum(b.detection_name == name for b in truth.all) for name in DETECTION_CLASSES}
    return json.loads(json.dumps(metrics.serialize())) | {"meta": meta}, curves.serialize(), counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tables:
    """Filtered truth and detections as columns, and the submission's meta."""

    truth: EvalTable
    found: EvalTable
    meta: dict[str, Any]


def read_tables(
    results: Path,
    dataroot: Path,
    version: str,
    tokens: Sequence[str],
    *,
    ego_xy_m: np.ndarray | None = None,
    channel: str = REFERENCE_CHANNEL,
    class_range: Mapping[str, float] = CONFIG["class_range"],
) -> Tables:
    """Truth and submission of ``tokens`` after the official filters (``class_range`` may differ in a robustness protocol)."""
    truth = read_truth(dataroot, version, tokens, ego_xy_m=ego_xy_m, channel=channel)
    found, meta = read_results(results, tokens, truth.ego_xy_m, CONFIG["max_boxes_per_sample"], check_sample_sets)
    kept = [filter_table(boxes, class_range, truth.bike_racks) for boxes in (truth.boxes, found)]
    return Tables(truth=kept[0], found=kept[1], meta=meta)


def _fast_metrics(tables: Tables) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    summary, curves = fast_metrics(tables.truth, tables.found)
    plain = {key: {name: values.tolist() for name, values in c.items()} for key, c in curves.items()}
    return json.loads(json.dumps(summary)) | {"meta": tables.meta}, plain, truth_counts(tables.truth)


def write_metrics(out: Path, summary: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
    """``metrics_summary.json`` and ``metrics_details.json`` with the devkit's keys (NaN where a class has no such error)."""
    out.mkdir(parents=True, exist_ok=True)
    for name, value in ((METRICS_FILE, summary), (DETAILS_FILE, curves)):
        part = out / f".{name}.part"
        part.write_text(json.dumps(value, indent=2) + "\n")
        part.replace(out / name)


def evaluate_results(
    results: Path,
    *,
    dataroot: Path,
    version: str,
    tokens: Sequence[str],
    out: Path,
    engine: Engine = "devkit",
    ego_xy_m: np.ndarray | None = None,
    reference_channel: str = REFERENCE_CHANNEL,
    extra: Mapping[str, Any] | None = None,
    detail: bool = True,
) -> dict[str, Any]:
    """Score a submission on exactly ``tokens`` (any samples of the tree) and write the devkit's metric files to ``out``.

    Returns the devkit's summary with additional keys: ``mAP_occurring`` = mean of the per-class AP over the classes with
    truth left after the official range and point filters, ``occurring_classes``, ``truth_boxes`` (per class),
    ``num_samples``, ``engine``, and ``extra``. ego_xy_m (S, 2) spares the fast engine two large tables. detail: also write
    ``evaluation.npz``, what happened to every box (the report reads it).

    Raises:
        MismatchError: predicted samples and ``tokens`` differ. UsageError: no truth in the samples.
        SourceMissingError: no such tree or results file. InputDataError: not a valid submission.
    """
    if engine not in ("devkit", "fast"):
        raise UsageError("unknown evaluation engine", expected="devkit or fast", found=engine)
    if not results.is_file():
        raise SourceMissingError("no submission file", file=results)
    if engine == "devkit":
        check_sample_sets([token for token, _ in iter_results(results)], tokens)
        nusc = open_devkit(dataroot, version, reference_channel)
        known = {s["token"] for s in nusc.sample}
        absent = [t for t in tokens if t not in known]
        if absent:
            raise InputDataError("samples are not in the tables", token=absent[0], found=f"{len(absent)} absent", file=dataroot)
        summary, curves, counts = _devkit_metrics(nusc, results, tokens)
        del nusc
    if engine == "fast" or detail:
        tables = read_tables(results, dataroot, version, tokens, ego_xy_m=ego_xy_m, channel=reference_channel)
    if engine == "fast":
        summary, curves, counts = _fast_metrics(tables)
    if not sum(counts.values()):
        raise UsageError(
            "nothing to score: no truth box is left in these samples after the official range and point filters",
            rule="evaluate.empty",
            found=f"{len(tokens)} samples",
        )
    occurring, names = occurring_mean(summary["mean_dist_aps"], counts)
    summary |= {"mAP_occurring": occurring, "occurring_classes": names, "truth_boxes": counts}
    summary |= {"num_samples": len(tokens), "engine": engine, **(extra or {})}
    write_metrics(out, summary, curves)
    if detail:
        write_detail(out, match_detail(tables.truth, tables.found, tokens))
    return summary


def check_tree(dataroot: Path, version: str) -> None:
    """Errors: SourceMissingError where the data root has no tables of this version."""
    if not (dataroot / version).is_dir():
        raise SourceMissingError(
            "the truth is read from the nuScenes tables, which are not there",
            expected=f"{version}/ under the data root",
            file=dataroot,
            next="give --dataroot",
        )


def ego_places(cache: Cache, rows: np.ndarray) -> np.ndarray:
    """(R, 2) the car's place in global per cache row (the reference sensor's key time)."""
    poses = cache.index.column("global_from_ego").to_pylist()
    numbers = cache.index.column("row").to_numpy()
    place = {int(row): (pose[3], pose[7]) for row, pose in zip(numbers, poses, strict=True)}
    return np.array([place[int(row)] for row in rows], dtype=np.float64).reshape(-1, 2)


def evaluate_checkpoint(
    checkpoint: Path,
    cache: Path | Cache,
    dataroot: Path,
    out: Path,
    engine: Engine = "devkit",
    split: str | None = None,
    *,
    scenes: Sequence[str] | None = None,
    device: str = "cpu",
    batch_size: int = 1,
    change: Callable[[nn.Module], None] | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Run a checkpoint on a cache's rows and score it against the tree the cache was built from.

    ``out`` gets ``results.json``, ``metrics_summary.json``, ``metrics_details.json``; ``scores.json`` beside the checkpoint
    keeps its mAP and NDS. split None: the val split if the cache has one, else all rows. ``change`` alters the loaded network
    first: what is scored then is not the checkpoint, whose ``scores.json`` stays. ``progress(done, total)``: called per batch.
    """
    from imkd_data import open_cache

    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    scored_rows(opened, split, scenes)
    check_tree(Path(dataroot), opened.recipe.version)
    how: Any = {"device": device, "batch_size": batch_size, "change": change, "progress": progress}
    results = predict_checkpoint(checkpoint, opened, out, split, scenes=scenes, **how)
    keep = change is None
    return score_checkpoint(checkpoint, opened, dataroot, out, engine, split, scenes=scenes, results=results, keep=keep)


def predict_checkpoint(
    checkpoint: Path,
    cache: Cache,
    out: Path,
    split: str | None = None,
    *,
    scenes: Sequence[str] | None = None,
    device: str = "cpu",
    batch_size: int = 1,
    change: Callable[[nn.Module], None] | None = None,
    progress: Any = None,
) -> Path:
    """The first half of ``evaluate_checkpoint``, which needs neither tables nor devkit: ``out/results.json``."""
    from imkd_models.checkpoint import load_model
    from pipelines.predict import predict_cache

    model, meta = load_model(checkpoint, device)
    if change is not None:
        change(model)
    rows = scored_rows(cache, split, scenes)
    return predict_cache(model, cache, rows, out, meta=meta, device=device, batch_size=batch_size, progress=progress)


def score_checkpoint(
    checkpoint: Path,
    cache: Cache,
    dataroot: Path,
    out: Path,
    engine: Engine = "devkit",
    split: str | None = None,
    *,
    results: Path,
    scenes: Sequence[str] | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """The second half: score the checkpoint's predictions ``results``. keep: also in ``scores.json`` beside it."""
    from imkd_models.checkpoint import load_checkpoint
    from pipelines.strength import record_scores

    rows = scored_rows(cache, split, scenes)
    check_tree(Path(dataroot), cache.recipe.version)
    meta = load_checkpoint(checkpoint).meta
    summary = evaluate_results(
        results,
        dataroot=Path(dataroot),
        version=cache.recipe.version,
        tokens=[cache.token(int(row)) for row in rows],
        out=Path(out),
        engine=engine,
        ego_xy_m=ego_places(cache, rows),
        reference_channel=cache.recipe.reference_channel,
        extra={"checkpoint": checkpoint_identity(Path(checkpoint), meta), "cache": cache.id},
    )
    if keep:
        record_scores(checkpoint, meta, summary)
    return summary


def checkpoint_identity(checkpoint: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Name, run, method and step of a checkpoint: what a report needs to say which weights were scored."""
    keys = ("run", "method", "step", "weights_sha256")
    return {"name": checkpoint.resolve().name} | {k: meta[k] for k in keys if isinstance(meta.get(k), str | int)}


def json_ready(value: Any) -> Any:
    """The same with None for NaN and infinities, which are not JSON."""
    if isinstance(value, Mapping):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The lines that `imkd evaluate` prints."""
    names = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
    lines = [f"NDS {summary['nd_score']:.4f}   mAP {summary['mean_ap']:.4f}   mAP_occurring {summary['mAP_occurring']:.4f}"]
    lines.append("   ".join(f"{names[k]} {v:.4f}" for k, v in summary["tp_errors"].items()))
    lines.append(f"{'class':<22}{'truth':>7}{'AP':>8}{'ATE':>8}{'ASE':>8}{'AOE':>8}{'AVE':>8}{'AAE':>8}")
    for name, ap in summary["mean_dist_aps"].items():
        errors = summary["label_tp_errors"][name]
        cells = "".join("       -" if math.isnan(errors[k]) else f"{errors[k]:8.3f}" for k in names)
        lines.append(f"{name:<22}{summary['truth_boxes'][name]:>7}{ap:8.3f}{cells}")
    return lines
