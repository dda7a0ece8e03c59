"""Is the teacher better than what it teaches? Compared by the mAP that evaluations left beside the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imkd_data.errors import ImkdError
from imkd_models.checkpoint import load_checkpoint
from pipelines.run import Run

__all__ = ["MARGIN_MAP", "own_scores", "teacher_warnings"]

MARGIN_MAP = 0.05  # a teacher should lead by five points of mAP (imkd: section 2.1)
# Published mAP of the camera-radar baselines on nuScenes val, the yardstick where no own baseline was scored.
PUBLISHED_BASELINE_MAP = {"crn_r18": 0.449, "crn_r50": 0.4725}
_SUMMARY = "metrics_summary.json"


def own_scores(checkpoint: Path | str) -> dict[str, Any] | None:
    """mAP, NDS and where they were read: in the checkpoint's own record (``imported``, validation), or in the
    ``metrics_summary.json`` of an evaluation written inside or beside it. None where it was never scored."""
    loaded = load_checkpoint(checkpoint)
    metrics, imported = loaded.meta.get("metrics") or {}, loaded.meta.get("imported") or {}
    for record, name in ((metrics, "checkpoint"), (imported, "import")):
        if record.get("map") is not None:
            return {"map": float(record["map"]), "nds": record.get("nds"), "from": name}
    run = Path(loaded.path).parent
    for path in sorted([*run.glob(_SUMMARY), *run.glob(f"*/{_SUMMARY}")], key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            scored = summary.get("checkpoint") or {}
            if scored.get("weights_sha256", loaded.meta["weights_sha256"]) != loaded.meta["weights_sha256"]:
                continue  # the score of another checkpoint of this run
            return {"map": float(summary["mean_ap"]), "nds": float(summary["nd_score"]), "from": str(path)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def teacher_warnings(
    run: Run, teachers: Mapping[str, Path | str], *, baseline: Path | str | None = None, model_name: str = ""
) -> list[str]:
    """One line per LiDAR or fusion teacher that does not lead by five points of mAP, or of which that is unknown.

    baseline: checkpoint of the undistilled student (``run.baseline``); without it the published figure of the preset counts.
    """
    if run.method is None:
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


def _baseline(checkpoint: Path | str | None, model_name: str) -> tuple[float | None, str]:
    if checkpoint:
        scores = own_scores(checkpoint)
        return (None, "") if scores is None else (scores["map"], str(checkpoint))
    published = PUBLISHED_BASELINE_MAP.get(model_name)
    return published, f"published, {model_name}"
