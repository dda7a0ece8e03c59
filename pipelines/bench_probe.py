"""One batch through a trained student and its method: how hard each term pulls, and what the method saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from pipelines.run import Run

__all__ = ["probe_terms"]

FEATURE = "bev_fused"


def probe_terms(
    run: Run, cache: Cache, checkpoint: Path, teachers: Mapping[str, Path], *, device: str = "cpu"
) -> dict[str, Any]:
    """Gradient norm at ``bev_fused`` of every weighted term, each method term's share of the detection loss's norm, and the
    distiller's diagnostics (mask areas, running statistics, pseudo boxes) on one training batch.

    A share above 1 means that the method pulls harder than the task; the benchmark prints it, nothing is changed by it.
    """
    from imkd_data.loader.stream import stream
    from imkd_models.checkpoint import load_checkpoint, load_weights
    from imkd_models.distill import gradient_norms
    from pipelines.networks import build_networks, stream_values
    from pipelines.sampling import virtual_rows

    networks = build_networks(run, dict(teachers), pretrained=False)
    if networks.distiller is None:
        return {}
    saved = load_checkpoint(checkpoint)
    load_weights(networks.model, saved.model, file=checkpoint)
    load_weights(networks.distiller, saved.distiller or {}, file=checkpoint)
    for module in (networks.model, networks.distiller, *networks.teachers.values()):
        module.to(device)
    batches = stream(
        cache,
        run.batch_size,
        rows=virtual_rows(cache, run.loader, run.seed).tolist(),
        seed=run.seed,
        workers=0,
        radar_filter=run.loader.radar_filter,
        radar_sweeps=run.loader.radar_sweeps,
        device=torch.device(device),
        **stream_values(networks),
    )
    batch = next(iter(batches))
    networks.model.eval()
    networks.distiller.eval()
    outputs = networks.model(batch)
    task = torch.stack(list(networks.model.loss(outputs, batch).values())).sum()  # type: ignore[operator]
    terms = networks.distiller(outputs, {n: t(batch) for n, t in networks.teachers.items()}, batch)
    norms = gradient_norms({"task": task, **terms}, outputs.features[FEATURE])
    base = norms.pop("task")
    return {
        "gradient_at_bev_fused": {"task": base, **norms},
        "share_of_task": {k: round(v / base, 4) for k, v in norms.items()} if base > 0 else {},
        "diagnostics": {k: float(v) for k, v in networks.distiller.diagnostics.items() if v.numel() == 1},
    }
