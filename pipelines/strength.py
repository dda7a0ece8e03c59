"""Is the teacher better than what it teaches, and is it shown what it was trained on? Compared by the mAP that evaluations
left beside the checkpoints, and by the sweeps of its own run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imkd_data.errors import ImkdError
from imkd_models.checkpoint import load_checkpoint
from pipelines.predict import trained_sweeps
from pipelines.run import Run

__all__ = [
    "MARGIN_MAP",
    "NO_BASELINE",
    "input_convention",
    "own_scores",
    "record_scores",
    "sweep_warnings",
    "teacher_records",
    "teacher_warnings",
]

MARGIN_MAP = 0.05  # a teacher should lead by five points of mAP (imkd: section 2.1)
# Published mAP of the camera-radar baselines on nuScenes val, the yardstick where no own baseline was scored.
PUBLISHED_BASELINE_MAP = {"crn_r18": 0.449, "crn_r50": 0.4725, "crkd_r50": 0.418, "crkd_swin_t": 0.432}
NO_BASELINE = "none"  # a run that says so compares nothing: a demonstration, or a teacher that was judged elsewhere
_SUMMARY, SCORES_FILE = "metrics_summary.json", "scores.json"


def own_scores(checkpoint: Path | str) -> dict[str, Any] | None:
    """mAP, NDS and where they were read: in the checkpoint's own record, in ``scores.json`` beside it (`imkd evaluate` writes
    it, by the hash of the weights), or in a ``metrics_summary.json`` in or below its run that names these weights by their
    hash. None where it was never scored."""
    loaded = load_checkpoint(checkpoint)
    metrics, imported = loaded.meta.get("metrics") or {}, loaded.meta.get("imported") or {}
    for record, name in ((metrics, "checkpoint"), (imported, "import")):
        if record.get("map") is not None:
            return {"map": float(record["map"]), "nds": record.get("nds"), "from": name}
    run = Path(loaded.path).parent
    if (run / SCORES_FILE).is_file():
        try:
            kept = json.loads((run / SCORES_FILE).read_text(encoding="utf-8"))[loaded.meta["weights_sha256"]]
            return {"map": float(kept["map"]), "nds": float(kept["nds"]), "from": str(run / SCORES_FILE)}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # of other weights, or damaged: an evaluation's own file may say more
    for path in sorted([*run.glob(_SUMMARY), *run.glob(f"*/{_SUMMARY}")], key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            if summary["checkpoint"]["weights_sha256"] != loaded.meta["weights_sha256"]:
                continue  # the score of another checkpoint of this run; one that names none is nobody's
            return {"map": float(summary["mean_ap"]), "nds": float(summary["nd_score"]), "from": str(path)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def input_convention(meta: Mapping[str, Any]) -> str:
    """Input convention of a network; a LiDAR-camera teacher keeps it with its camera side."""
    model = dict(meta["model"])
    return str(model.get("convention") or dict(model.get("student") or {}).get("convention") or "bev")


def record_scores(checkpoint: Path | str, meta: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Keep a network's own scores beside its checkpoint, under the hash of its weights, with its input convention: what a
    teacher's record must say. A folder that cannot be written to is left alone."""
    path = Path(load_checkpoint(checkpoint).path).parent / SCORES_FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known[str(meta["weights_sha256"])] = {
            "map": float(summary["mean_ap"]),
            "nds": float(summary["nd_score"]),
            "samples": summary.get("num_samples"),
            "engine": summary.get("engine"),
            "cache": summary.get("cache"),
            "convention": input_convention(meta),
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except (OSError, ValueError):
        return


def teacher_records(teachers: Mapping[str, Path | str]) -> dict[str, dict[str, Any]]:
    """{teacher: weights_sha256, convention, map, nds}: what the student's checkpoint says about its teachers."""
    out = {}
    for name, path in teachers.items():
        meta = load_checkpoint(path).meta
        scores = own_scores(path) or {}
        own = {"weights_sha256": meta["weights_sha256"], "convention": input_convention(meta)}
        out[name] = {**own, "map": scores.get("map"), "nds": scores.get("nds")}
    return out


def teacher_warnings(
    run: Run, teachers: Mapping[str, Path | str], *, baseline: Path | str | None = None, model_name: str = ""
) -> list[str]:
    """One line per LiDAR or fusion teacher that does not lead by five points of mAP, or of which that is unknown.

    baseline: checkpoint of the undistilled student (``run.baseline``); without it the published figure of the preset counts;
    ``none``: no comparison is meant, so nothing is said.
    """
    if run.method is None or str(baseline) == NO_BASELINE:
        return []
    level, source = _baseline(baseline, model_name)
    lines = []
    for name, path in teachers.items():
        if name == "label":  # it reads the truth; its own score says nothing about what it can teach
            continue
        try:
            scores = own_scores(path)
        except ImkdError:
            scores = None
        if scores is None:
            lines.append(
                f"teacher {name} has no score of its own: whether it beats the student by 5 mAP is unknown "
                "(imkd evaluate --checkpoint TEACHER --out beside it)"
            )
        elif level is not None and scores["map"] < level + MARGIN_MAP:
            lines.append(
                f"teacher {name} has {100 * scores['map']:.1f} mAP, the baseline {100 * level:.1f} ({source}): "
                "less than 5 points ahead, so it has little to teach"
            )
        elif level is None:
            lines.append(
                f"teacher {name} has {100 * scores['map']:.1f} mAP, but {model_name or 'this student'} has no known baseline: "
                "--set baseline=CKPT of the undistilled student"
            )
    return lines


def sweep_warnings(run: Run, teachers: Mapping[str, Path | str], stored: int) -> list[str]:
    """One line per teacher that was trained on another number of LiDAR sweeps than this run shows it. stored: sweeps of the
    cache, which 0 stands for here, and for a teacher whose checkpoint does not say how many its own cache held."""
    lines = []
    shown = min(run.loader.lidar_sweeps or stored, stored)
    for name, path in teachers.items():
        meta = load_checkpoint(path).meta
        loader = dict(dict(meta.get("run") or {}).get("loader") or {})
        if name == "label" or "lidar_sweeps" not in loader:  # the label encoder reads the truth; imported weights say nothing
            continue
        trained = trained_sweeps(meta, "lidar_sweeps") or stored
        if trained != shown:
            fits = f"--set loader.lidar_sweeps={trained}" if trained <= stored else f"build the cache with {trained}"
            lines.append(f"teacher {name} was trained on {trained} LiDAR sweeps and is shown {shown} here: {fits}")
    return lines


def _baseline(checkpoint: Path | str | None, model_name: str) -> tuple[float | None, str]:
    if checkpoint:
        scores = own_scores(checkpoint)
        return (None, "") if scores is None else (scores["map"], str(checkpoint))
    published = PUBLISHED_BASELINE_MAP.get(model_name)
    return published, f"published, {model_name}"
