"""What may differ between a saved run and the one that continues it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from imkd_data.errors import MismatchError
from imkd_data.recipe import canonical_json
from pipelines.run import Run

__all__ = ["FREE", "check_end", "check_resumable"]

# What may differ between the saved run and the resumed one; everything else is refused.
FREE = frozenset(
    {
        "summary",
        "baseline",
        "checkpoint_every",
        "keep",
        "log_every",
        "validate_every",
        "tensorboard",
        "max_steps",
        "epochs",
        "batch_size",
    }
)


def check_resumable(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare two runs' JSON forms (with ``global_batch`` resolved). Errors: MismatchError with every difference."""
    wrong = [
        (path, a, b)
        for path, a, b in _differences(_complete(saved), _complete(now))
        if path.split(".")[0] not in FREE and path not in ("loader.workers",)
    ]
    for key in ("max_steps", "epochs"):
        if now.get(key, 0) and saved.get(key, 0) and now[key] < saved[key]:
            wrong.append((f"{key} (may only grow)", saved[key], now[key]))
    if wrong:
        raise MismatchError(
            "the run was started with another configuration: " + ", ".join(p for p, _, _ in wrong),
            expected="; ".join(f"{p} {a!r}" for p, a, _ in wrong),
            found="; ".join(f"{p} {b!r}" for p, _, b in wrong),
            next="resume with the saved values (they stand in checkpoint.json), or start anew in another --out",
        )


def check_end(saved_step: int, total: int) -> None:
    """Steps cannot be taken back: a run by epochs has no max_steps to compare, so its end is compared with what is done.
    Errors: MismatchError."""
    if saved_step > total:
        raise MismatchError(
            f"the run has come to step {saved_step} already",
            expected=f"an end at step {saved_step} or later",
            found=f"an end at step {total}",
            next="raise max_steps or epochs; an earlier step-*.ckpt of the run is used by its own path",
        )


def _complete(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's JSON form with every setting stated, so that settings that came later do not differ from their absence."""
    from imkd_models.presets import config_from_dict

    known = {f.name for f in fields(Run)}
    out = {
        **run,
        **Run.from_dict({k: v for k, v in run.items() if k in known}).as_dict(),
        "global_batch": run.get("global_batch"),
    }
    if run.get("model"):
        out["model"] = json.loads(canonical_json(config_from_dict(run["model"]).as_dict()))
    return out


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        out = []
        for key in sorted(set(a) | set(b)):
            out += _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return out
    return [] if a == b else [(path, a, b)]
