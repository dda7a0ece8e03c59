"""Seconds to the first batch with 0, 1 and 2 loader workers on a cache with an index as long as the full data set's (34,176
rows), imports of this process apart; and how many bytes a worker is started with. In turn with them: the same with the row
table sent to every worker, as a comparison (a pipe holds 64 KiB, so each start waits for the child's imports).

python tests/benchmarks/first_batch.py [FOLDER]   (FOLDER/cache is built where it is absent)
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from functools import partialmethod
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "pipelines"), str(HERE.parents[1])]

ROWS, TURNS = 34_176, 5


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
