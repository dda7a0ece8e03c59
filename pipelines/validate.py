"""Validation while training: the official metric by the fast engine, on the copy that would be deployed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imkd_data.errors import UsageError

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["score_network"]


def score_network(
    model: nn.Module,
    weights: Mapping[str, Tensor] | None,
    cache: Cache,
    dataroot: Path | None,
    out: Path,
    *,
    meta: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> float:
    """NDS on the cache's held-out rows (all rows where it has none). weights: evaluated in place of the model's own, which
    come back afterwards. The model's mode and the random state are left as they were.

    Raises:
        UsageError: no data root, so there is no truth.
    """
    from pipelines.evaluate import ego_places, evaluate_results, scored_rows
    from pipelines.predict import predict_cache

    if dataroot is None:
        raise UsageError("validation needs the truth", expected="--dataroot", next="or set validate_every=0")
    rows = scored_rows(cache)
    own = {k: v.detach().clone() for k, v in model.state_dict().items()} if weights is not None else None
    training = model.training
    try:
        if weights is not None:
            model.load_state_dict(dict(weights))
        model.eval()
        results = predict_cache(model, cache, rows, out, meta=meta, device=str(device))
    finally:
        if own is not None:
            model.load_state_dict(own)
        model.train(training)
    summary = evaluate_results(
        results,
        dataroot=dataroot,
        version=cache.recipe.version,
        tokens=[cache.token(int(r)) for r in rows],
        out=out,
        engine="fast",
        ego_xy_m=ego_places(cache, rows),
        reference_channel=cache.recipe.reference_channel,
    )
    return float(summary["nd_score"])
