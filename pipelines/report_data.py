"""What a report is made of: the files that training and evaluation leave in a run's folder, read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import InputDataError, SourceMissingError
from imkd_data.geometry import Pose
from imkd_data.sample import Boxes
from pipelines.commandline import read_commands
from pipelines.evaluate_detail import Detail, read_detail, resampled_map, sample_badness
from pipelines.evaluate_tables import iter_results
from pipelines.submission import RESULTS_FILE, results_to_boxes

__all__ = ["RunFacts", "boxes_of_samples", "chosen_samples", "paired_intervals", "read_run"]

EVALUATION_FOLDERS = ("", "eval", "evaluation")
_MAX_JSON = 64 << 20
TP_ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
_LOG_NUMBERS = ("step", "loss", "lr", "data_wait", "samples_per_s", "time")
_NUMBER = (int, float)
_AGAIN = "run imkd evaluate again"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunFacts:
    """One network's folder. meta: checkpoint.json; log: objects of log.jsonl; scores: metrics_summary.json; curves:
    metrics_details.json; detail: evaluation.npz; commands: those that trained and scored it; parts that are absent are empty or
    None."""

    name: str
    folder: Path
    evaluation: Path | None
    meta: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Mapping[str, Any], ...] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Any] = field(default_factory=dict)
    detail: Detail | None = None
    commands: tuple[str, ...] = ()


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of limited size; {} where there is none."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_JSON:
        raise InputDataError("file is too large for a report", file=path, found=f"{path.stat().st_size:,} bytes")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputDataError(f"not JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise InputDataError("not a JSON object", file=path)
    return value


def _log(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    out = []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if not isinstance(value, dict) or "step" not in value:
            continue
        for key in _LOG_NUMBERS:
            if not isinstance(value.get(key, 0), _NUMBER):
                raise InputDataError(
                    f"line {number} of the training log cannot be read",
                    file=path,
                    expected=f"{key}: a number",
                    found=repr(value[key])[:80],
                )
        out.append(value)
    return tuple(out)


def _scores(path: Path) -> dict[str, Any]:
    """The scores that a report shows, in the devkit's form; more may stand beside them."""
    scores = _json(path)

    def check(kind: Any, *keys: str) -> Any:
        value: Any = scores
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise InputDataError(
                "not the scores of an evaluation",
                file=path,
                expected=f"{'an object' if kind is dict else 'a number'} {'.'.join(keys)}",
                found="nothing" if value is None else repr(value)[:80],
                next=_AGAIN,
            )
        return value

    for name in ("nd_score", "mean_ap", "eval_time", *(k for k in ("mAP_occurring", "num_samples") if k in scores)):
        check(_NUMBER, name)
    for error in TP_ERRORS:
        check(_NUMBER, "tp_errors", error)
    for name in check(dict, "mean_dist_aps"):
        check(_NUMBER, "mean_dist_aps", name)
        for error in TP_ERRORS:
            check(_NUMBER, "label_tp_errors", name, error)
    if "truth_boxes" in scores:
        check(dict, "truth_boxes")
    return scores


def _curves(path: Path) -> dict[str, Any]:
    """Precision and recall by class and distance."""
    curves = _json(path)
    for name, curve in curves.items():
        lines = [curve.get(k) if isinstance(curve, dict) else None for k in ("recall", "precision")]
        if not all(isinstance(v, list) and all(isinstance(x, _NUMBER) for x in v) for v in lines):
            raise InputDataError(
                f"no curve of {name}", file=path, expected="lists of numbers recall and precision", next=_AGAIN
            )
    return curves


def read_run(folder: Path, name: str | None = None) -> RunFacts:
    """A run's folder: of training (log.jsonl, last.ckpt), of evaluation (metrics_summary.json), or both.

    The evaluation may lie in the folder itself or in ``eval/`` below it.

    Raises:
        SourceMissingError: neither is there. InputDataError: a file that cannot be read.
    """
    folder = Path(folder)
    evaluation = next((folder / f for f in EVALUATION_FOLDERS if (folder / f / "metrics_summary.json").is_file()), None)
    training = folder if (folder / "last.ckpt").exists() or (folder / "log.jsonl").is_file() else folder.parent
    meta = _json(training / "last.ckpt" / "checkpoint.json")
    meta.pop("training", None)
    log = _log(training / "log.jsonl")
    if evaluation is None and not log and not meta:
        raise SourceMissingError(
            "nothing to report here",
            file=folder,
            expected="log.jsonl, last.ckpt or metrics_summary.json",
            next="give the folder of `imkd train --out` or of `imkd evaluate --out`",
        )
    detail = None
    if evaluation is not None:
        try:
            detail = read_detail(evaluation)
        except SourceMissingError:
            detail = None
    return RunFacts(
        name=name or (folder.name if folder.name not in EVALUATION_FOLDERS else folder.parent.name) or "run",
        folder=folder,
        evaluation=evaluation,
        meta=meta,
        log=log,
        scores=_scores(evaluation / "metrics_summary.json") if evaluation else {},
        curves=_curves(evaluation / "metrics_details.json") if evaluation else {},
        detail=detail,
        commands=read_commands(training.parent, training, *([evaluation] if evaluation else [])),  # a run of stages: the parent
    )


def chosen_samples(runs: Sequence[RunFacts], worst: int, random: int, seed: int = 0) -> list[tuple[str, str]]:
    """(token, "worst" or "random"): where the runs are most wrong on average, and others drawn by the seed."""
    scored = [r.detail for r in runs if r.detail is not None]
    if not scored:
        return []
    tokens = scored[0].tokens.tolist()
    same = [d for d in scored if d.tokens.tolist() == tokens]
    badness = np.mean([sample_badness(d) for d in same], axis=0)
    order = np.argsort(-badness, kind="stable")
    rest = np.random.Generator(np.random.Philox(key=seed)).permutation(order[worst:])
    return [(tokens[i], "worst") for i in order[:worst]] + [(tokens[i], "random") for i in rest[:random]]


def boxes_of_samples(run: RunFacts, poses: Mapping[str, Pose]) -> dict[str, Boxes]:
    """Predicted boxes in ego of the samples in ``poses`` (token -> global_from_ego), read from results.json in one pass."""
    if run.evaluation is None or not (run.evaluation / RESULTS_FILE).is_file():
        return {}
    out: dict[str, Boxes] = {}
    for token, entries in iter_results(run.evaluation / RESULTS_FILE):
        if token in poses:
            out[token] = results_to_boxes(entries, poses[token])
            if len(out) == len(poses):
                break
    return out


FEWEST_SCENES = 5  # resampling fewer tells nothing


def groups_of(tokens: Sequence[str], scene_of: Mapping[str, str] | None) -> list[str]:
    """The unit that is drawn in the bootstrap: the scene of each sample, or the sample itself where scenes are few."""
    names = [scene_of.get(t, t) if scene_of else t for t in tokens]
    return names if len(set(names)) >= FEWEST_SCENES else list(tokens)


def paired_intervals(
    runs: Sequence[RunFacts], scene_of: Mapping[str, str] | None, draws: int = 200
) -> list[tuple[str, float, float, float, float, float]]:
    """(name, mAP, low, high, difference low, difference high) of each run; 95 % bootstrap over scenes, all runs drawn alike.

    Differences are to the first run. With fewer than five scenes (or none known) samples are drawn. Runs on other samples are
    left out.
    """
    scored = [(r, r.detail) for r in runs if r.detail is not None]
    if not scored:
        return []
    tokens = scored[0][1].tokens.tolist()
    names = groups_of(tokens, scene_of)
    groups: NDArray[np.int64] = np.unique(names, return_inverse=True)[1].reshape(-1).astype(np.int64)
    out = []
    first = None
    for run, detail in scored:
        if detail.tokens.tolist() != tokens:
            continue
        drawn = resampled_map(detail, groups, draws)
        first = drawn if first is None else first
        low, high = np.nanpercentile(drawn, (2.5, 97.5))
        below, above = np.nanpercentile(drawn - first, (2.5, 97.5))
        mean = float(run.scores.get("mAP_occurring", np.nanmean(drawn)))
        out.append((run.name, mean, float(low), float(high), float(below), float(above)))
    return out
