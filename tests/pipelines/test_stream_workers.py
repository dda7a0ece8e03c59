"""The stream's workers on a cache on disk."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
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

REPO = Path(__file__).resolve().parents[2]


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


def _python(script: Path | None, *arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    paths = [REPO, REPO / "tests", REPO / "tests/pipelines"]
    command = [sys.executable, "-" if script is None else str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_worker_starts_without_what_only_builds_need(tmp_path: Path) -> None:
    """numba, pyarrow.compute and the cameras' columns of the index take longer than a worker's own first batch."""
    cache = open_cache(disk_cache(tmp_path))
    s = stream(cache, 2, split="all", augment=True, history=(0, -1))
    job = Source(s.reader, s.order, 2).job((0, 4))
    (tmp_path / "worker.pickle").write_bytes(pickle.dumps((Batches(s.reader), job)))
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, sys\n"
        "batches, job = pickle.load(open(sys.argv[1], 'rb'))\n"
        "packed = batches[job]\n"
        "heavy = ('numba', 'scipy', 'pyarrow.compute', 'pyarrow.dataset', 'fsspec', 'pandas', 'lightning')\n"
        "print([n for n in heavy if n in sys.modules], batches.reader.cache._index, *packed.tokens)\n"
    )
    out = _python(script, tmp_path / "worker.pickle")
    assert out.stdout.split() == ["[]", "None", *Source(s.reader, s.order, 2).tokens((0, 4))], out.stderr
    assert "ego_from_camera" in cache.index.column_names and "ego_from_camera" not in cache.row_index.column_names


STREAMS = "for batch in stream(open_cache(sys.argv[1]), 2, split='all', workers=2): print('a batch')\n"
TRAINS = (
    "from toy_training import toy_run\nfrom pipelines.run import LoaderConfig\nfrom pipelines.train import train\n"
    "train(toy_run(loader=LoaderConfig(workers=1)), sys.argv[1], sys.argv[2], accelerator='cpu')\n"
)


@pytest.mark.parametrize(("text", "where"), [(STREAMS, "file"), (TRAINS, "file"), (STREAMS, "stdin")])
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path, text: str, where: str) -> None:
    """Spawned workers import the script, which comes back to the same line: neither a hang nor a word about /dev/shm."""
    path = disk_cache(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom imkd_data import open_cache, stream\n"
        "import imkd_data.loader.stream as module\nmodule.LOOK_EVERY_S = 0.5\n" + text
    )
    given = (path, tmp_path / "out")
    out = _python(script, *given) if where == "file" else _python(None, *given, text=script.read_text())
    assert out.returncode == 1 and "a batch" not in out.stdout
    last = out.stderr[out.stderr.rindex("UsageError") :]
    if where == "stdin":
        assert "not in a file" in last and "save it to a file" in last
    else:
        assert 'if __name__ == "__main__":' in last and str(script) in last
        assert out.stderr.count("Traceback") == 1 and "bootstrapping" not in out.stderr
