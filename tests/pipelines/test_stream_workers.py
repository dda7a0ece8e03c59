"""The stream's workers on a cache on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from disk_cache import disk_cache

from imkd_data import open_cache
from imkd_data.loader.deliver import Delivery
from imkd_data.loader.stream import stream
from pipelines.guard import batch_tensors


def test_a_worker_hands_over_mapped_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images decoded in a worker arrive without a copy, and equal those decoded here."""
    seen: list[bool] = []
    deliver = Delivery.batch

    def spy(self: Delivery, packed: Any, device: Any = "cpu") -> Any:
        seen.append(packed.tensors["images"].is_shared())
        return deliver(self, packed, device)

    monkeypatch.setattr(Delivery, "batch", spy)
    cache = open_cache(disk_cache(tmp_path))
    values: dict[str, Any] = {"split": "all", "augment": True, "history": (0, -1)}
    here, there = (list(stream(cache, 1, workers=n, **values)) for n in (0, 1))
    assert len(here) > 2 and seen == [False] * len(here) + [True] * len(there)
    for a, b in zip(here, there, strict=True):
        x, y = batch_tensors(a), batch_tensors(b)
        assert a.tokens == b.tokens and set(x) == set(y)
        assert all(torch.equal(torch.nan_to_num(x[n]), torch.nan_to_num(y[n])) for n in x)
