"""Validation while training: the official metric by the fast engine, on the copy that would be deployed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imkd_data.errors import UsageError
from imkd_models.checkpoint import weights_hash

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from pipelines.run import Run

__all__ = ["due", "need_truth", "score_network"]


def due(run: Run, step: int) -> bool:
    """Whether the network is scored after so many steps."""
    return run.validate_every > 0 and step % run.validate_every == 0


def need_truth(dataroot: Path | None, version: str) -> Path:
    """The tree that holds the truth; asked before training begins, not at the first validation.

    Raises:
        UsageError: no data root. SourceMissingError: it has no such version.
    """
    from pipelines.evaluate import check_tree

    if dataroot is None:
        raise UsageError(
            "validation (validate_every) needs the truth",
            expected="--dataroot, the nuScenes tree of the cache",
            next="give --dataroot, or set validate_every=0",
        )
    check_tree(dataroot, version)
    return dataroot


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
    come back afterwards. The model's mode and the random state are left as they were. The summary in ``out`` names the weights
    by their hash.

    Raises:
        UsageError, SourceMissingError: as ``need_truth``.
    """
    from pipelines.evaluate import ego_places, evaluate_results, scored_rows
    from pipelines.predict import predict_cache

    tree = need_truth(dataroot, cache.recipe.version)
    rows = scored_rows(cache)
    scored = {"step": meta.get("step"), "weights_sha256": weights_hash(model if weights is None else weights)}
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
        dataroot=tree,
        version=cache.recipe.version,
        tokens=[cache.token(int(r)) for r in rows],
        out=out,
        engine="fast",
        ego_xy_m=ego_places(cache, rows),
        reference_channel=cache.recipe.reference_channel,
        extra={"checkpoint": scored, "cache": cache.id},
    )
    return float(summary["nd_score"])
