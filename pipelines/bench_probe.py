"""One batch through a student and its method, before and after training: how hard each term pulls, and what the method saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from imkd_data.loader.batch import Batch
    from pipelines.networks import Networks
    from pipelines.run import Run

__all__ = ["probe_terms"]

WHOLE = "student"


def probe_terms(
    run: Run, cache: Cache, checkpoint: Path, teachers: Mapping[str, Path], *, device: str = "cpu"
) -> dict[str, Any]:
    """How hard each weighted term pulls on one training batch, at the start and at the end of training, and the distiller's
    diagnostics (mask areas, running statistics, pseudo boxes) at the end.

    ``shares``: {"start" | "end": {term: {part: share}}}, the norm of the term's gradient over a part's parameters (camera,
    radar, fuser, ..., ``student`` = all of them) divided by that of the task's losses. Above 1 the method pulls harder than
    the task there; the benchmark prints it, nothing is changed by it.
    """
    from imkd_data.loader.stream import stream
    from imkd_models.checkpoint import load_checkpoint, load_weights
    from pipelines.measure import loader_values
    from pipelines.networks import build_networks

    networks = build_networks(run, dict(teachers))  # seeded: the start that the training had, image weights included
    if networks.distiller is None:
        return {}
    values = {**loader_values(run, networks, cache), "workers": 0}
    batch = next(iter(stream(cache, run.batch_size, device=torch.device(device), **values)))
    for module in (networks.model, networks.distiller, *networks.teachers.values()):
        module.to(device)
    networks.model.train()
    networks.distiller.train()
    shares = {"start": _shares(networks, batch)}
    saved = load_checkpoint(checkpoint)
    load_weights(networks.model, saved.model, file=checkpoint)
    load_weights(networks.distiller, saved.distiller or {}, file=checkpoint)
    networks.model.eval()
    networks.distiller.eval()
    shares["end"] = _shares(networks, batch)
    return {"shares": shares, "diagnostics": networks.distiller.diagnostic_values()}


def _shares(networks: Networks, batch: Batch) -> dict[str, dict[str, float]]:
    from imkd_models.distill import gradient_norms

    model: Any = networks.model
    outputs = model(batch)
    task = torch.stack(list(model.loss(outputs, batch).values())).sum()
    terms = networks.distiller(outputs, {n: t(batch) for n, t in networks.teachers.items()}, batch)  # type: ignore[misc]
    modules = {WHOLE: model, **dict(model.named_children())}
    parts = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
    parts = {name: group for name, group in parts.items() if group}
    norms = gradient_norms({"task": task, **terms}, parts)
    base = norms.pop("task")
    return {term: {p: round(v / base[p], 4) for p, v in found.items() if base[p] > 0} for term, found in norms.items()}
