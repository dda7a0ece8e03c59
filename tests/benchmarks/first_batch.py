"""Seconds to the first batch with 0, 1 and 2 loader workers on a cache with an index as long as the full data set's (34,176
rows), imports of this process apart; how many bytes a worker is started with; the CPU time of its start, torch and the rest.
In turn with them: the same with the row table sent to every worker, as a comparison (a pipe holds 64 KiB, so each start waits
for the child's imports).

python tests/benchmarks/first_batch.py [FOLDER]   (FOLDER/cache is built where it is absent)
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import time
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "pipelines"), str(HERE.parents[1])]

ROWS, TURNS = 34_176, 5
WORKER = """
import pickle, sys, time
sys.path[:0] = sys.argv[2:]
import torch, torch.utils.data
torch.set_num_threads(1)
torch_s = time.process_time()
batches, job = pickle.load(open(sys.argv[1], "rb"))
batches[job]
first_s = time.process_time()
batches[job]
print(torch_s, first_s - torch_s - (time.process_time() - first_s))
"""


def worker_start(cache: Cache, folder: Path) -> tuple[float, float]:
    """CPU seconds of what a spawned worker does up to its first batch: importing torch; our modules, the cache and the index
    (the batch itself left out, as it costs every time). Median of five processes."""
    from imkd_data import stream
    from imkd_data.loader.work import Batches, Source

    s = stream(cache, 2, split="all", augment=True)
    (folder / "worker.pickle").write_bytes(pickle.dumps((Batches(s.reader), Source(s.reader, s.order, 2).job((0, 0)))))
    command = [sys.executable, "-c", WORKER, str(folder / "worker.pickle"), *sys.path[:3]]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    torch_s, own_s = np.median(np.array(said, dtype=float), axis=0)
    return float(torch_s), float(own_s)


def main(root: Path) -> None:
    """Print the table."""
    from disk_cache import disk_cache
    from many_rows import ManyRows

    from imkd_data import stream
    from imkd_data.loader.read import SampleReader
    from imkd_data.loader.rows import read_rows
    from imkd_data.loader.work import Batches

    path = root / "cache"
    if not path.exists():
        disk_cache(root)
    small = len(ManyRows(path, 1))
    begun = time.perf_counter()
    cache = ManyRows(path, -(-ROWS // small))
    print(f"{len(cache):,} rows, index written and read in {time.perf_counter() - begun:.2f} s")
    begun = time.perf_counter()
    cache = ManyRows(path, cache.copies)
    print(f"open {time.perf_counter() - begun:.2f} s")
    print("a worker's start, CPU: torch {:.2f} s, the rest {:.2f} s".format(*worker_start(cache, root)))
    sent, seconds = list[int](), dict[tuple[int, bool], list[float]]()
    made = Batches.__init__

    def spy(self: Batches, reader: SampleReader, with_table: bool) -> None:
        made(self, reader)
        self.more = read_rows(cache) if with_table else None  # type: ignore[attr-defined]
        sent.append(len(pickle.dumps(self)))

    for turn in range(1 + TURNS):  # the first warms up
        for workers, with_table in ((0, False), (1, False), (1, True), (2, False), (2, True)):
            Batches.__init__ = partialmethod(spy, with_table=with_table)  # type: ignore[method-assign, assignment]
            begun = time.perf_counter()
            batches = iter(stream(cache, 2, split="all", workers=workers))
            next(batches)
            if turn:
                seconds.setdefault((workers, with_table), []).append(time.perf_counter() - begun)
            batches.close()  # type: ignore[attr-defined]
    print(f"a worker is started with {min(sent):,} bytes; with the row table {max(sent):,} bytes")
    for (workers, with_table), values in seconds.items():
        every = ", ".join(f"{v:.2f}" for v in values)
        name = "with the row table" if with_table else ""
        print(f"{workers} workers: first batch after {np.median(values):.2f} s ({every}) {name}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
