"""The stream's workers on a cache on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_cache import disk_cache
from many_rows import ManyRows

from imkd_data import open_cache
from imkd_data.loader.deliver import Delivery
from imkd_data.loader.stream import stream
from imkd_data.loader.work import Batches, Source
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


def test_what_a_worker_is_started_with_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    """Less than the smallest pipe buffer for every kind of selection, so that no start of a worker waits for the imports of the
    one before. The samples are those of the order's arithmetic."""
    cache = ManyRows(disk_cache(tmp_path), 400)
    rows = np.random.default_rng(0).permutation(np.concatenate([cache.rows()] * 3))
    selections: tuple[dict[str, Any], ...] = ({}, {"rows": rows}, {"shuffle": "block"})
    for values in selections:
        s = stream(cache, 2, split="all", fields=("boxes",), history=(0, -1), seed=3, on_bad_sample="skip", **values)
        batches = Batches(s.reader)
        data = pickle.dumps(batches)
        job = Source(s.reader, s.order, 2, skip_bad=True).job((1, 4000))
        assert len(cache) == 8000 and len(data) < 4096 and len(pickle.dumps(job)) < 4096
        assert job.rows.tolist() == s.order.at(1, [4000, 4001]).tolist()
        assert job.instead.tolist() == [s.order.at(1, range(p + 1, p + 16)).tolist() for p in (4000, 4001)]
        here, there = batches[job], pickle.loads(data)[job]
        assert here.tokens == there.tokens and all(torch.equal(here.tensors[n], there.tensors[n]) for n in here.tensors)


def test_workers_deliver_a_listed_selection_in_order(tmp_path: Path) -> None:
    """The rows of a list travel with each batch, also around the end of an epoch and with padding."""
    cache = ManyRows(disk_cache(tmp_path), 40)
    rows = np.random.default_rng(1).permutation(cache.rows())[:13]
    values: dict[str, Any] = {"rows": rows, "fields": ("boxes",), "seed": 2, "drop_last": False, "on_bad_sample": "skip"}
    here, there = (list(stream(cache, 4, workers=n, **values)) for n in (0, 2))
    assert [b.tokens for b in here] == [b.tokens for b in there] and len(here) == 4
    assert {t for b in there for t in b.tokens} == {cache.token(r) for r in rows}
    assert there[-1].padding_B is not None and there[-1].padding_B.tolist() == [False, True, True, True]
