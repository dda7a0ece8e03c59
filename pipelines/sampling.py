"""Which rows an epoch takes: every row once, CBGS's list with repetitions, or all but some scenes. Such a list is saved in the
run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import MismatchError, UsageError
from imkd_data.loader.order import key64, permuted
from imkd_data.loader.paste import Paster, write_bank
from imkd_data.loader.rows import read_rows, select_rows

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from pipelines.run import LoaderConfig, Run

__all__ = ["ROWS_FILE", "balanced", "held_in_scenes", "is_listed", "make_paster", "saved_rows", "virtual_rows"]

I64 = NDArray[np.int64]
ROWS_FILE, BANK_FILE = "rows.npy", "paste_bank.npz"


def balanced(rows: I64, has_class: NDArray[np.bool_], seed: int) -> I64:
    """CBGS: a list in which every class that occurs has the same number of entries, a tenth of all entries before balancing.

    has_class (N, K): classes in each row. A class with fewer rows than its share repeats all of them, then a drawn part; one
    with more is drawn without repetition. Rows without any class are left out, as in the public code. Deterministic in seed.
    """
    counts = has_class.sum(0)
    present = np.flatnonzero(counts)
    share = round(int(counts.sum()) / max(1, len(present)))
    parts = []
    for k in present.tolist():
        own = rows[has_class[:, k]]
        whole, rest = divmod(share, len(own))
        drawn = permuted(np.arange(rest), len(own), key64("cbgs", seed, k)) if rest else np.zeros(0, dtype=np.int64)
        parts += [own] * whole + [own[drawn]]
    return np.sort(np.concatenate(parts)) if parts else rows[:0]


def is_listed(loader: LoaderConfig) -> bool:
    """Whether an epoch is a list of its own rather than every row of the split."""
    return loader.sampling != "uniform" or loader.leave_out > 0


def held_in_scenes(cache: Cache, split: str, count: int) -> list[str]:
    """The last ``count`` scenes of a split, in index order. Errors: UsageError where none would be left."""
    chosen = set(select_rows(read_rows(cache), split).tolist())
    pairs = zip(cache.index.column("row").to_pylist(), cache.index.column("scene").to_pylist(), strict=True)
    scenes = list(dict.fromkeys(scene for row, scene in pairs if int(row) in chosen))
    if not 0 <= count < len(scenes):
        raise UsageError("scenes are kept back from training", expected=f"0 to {len(scenes) - 1} of {split}", found=str(count))
    return scenes[len(scenes) - count :]


def virtual_rows(cache: Cache, loader: LoaderConfig, seed: int) -> I64:
    """Rows of one epoch, repetitions included; the stream shuffles them anew every epoch."""
    rows = select_rows(read_rows(cache), loader.split)
    if loader.leave_out:
        kept_back = [cache.rows(scenes=[name]) for name in held_in_scenes(cache, loader.split, loader.leave_out)]
        rows = rows[~np.isin(rows, np.concatenate(kept_back))]
    if loader.sampling == "uniform":
        return rows
    has_class = np.zeros((len(rows), len(DETECTION_CLASSES)), dtype=bool)
    for i, row in enumerate(rows.tolist()):
        boxes = cache.decode("boxes", row)
        has_class[i, boxes.label[(boxes.label >= 0) & boxes.has_point]] = True
    return balanced(rows, has_class, seed)


def saved_rows(rows: I64, out: Path, *, write: bool) -> I64:
    """Keep the list in ``out`` at the first start, and hold a resumed run to it. Errors: MismatchError where it differs."""
    path = out / ROWS_FILE
    if path.is_file():
        saved: I64 = np.load(path, allow_pickle=False)
        if not np.array_equal(saved, rows):
            raise MismatchError(
                "the list of rows differs from the one this run began with",
                file=str(path),
                expected=f"{len(saved)} rows",
                found=f"{len(rows)} rows",
                next="resume with the cache, split, sampling and seed of the saved run",
            )
    elif write:
        out.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.npy")
        np.save(partial, rows)
        os.replace(partial, path)
    return rows


def make_paster(run: Run, cache: Cache, rows: I64, out: Path, epochs: int, *, write: bool, fresh: bool) -> Paster:
    """The bank of objects in ``out``, made from ``rows`` (each once), and when pasting ends: some epochs before the last; for
    students, as in CRKD's public code, after three quarters of them. fresh: the run begins, so a bank that lies there is of a
    start that never came to a checkpoint, perhaps with other settings: it is made anew."""
    loader, bank = run.loader, out / BANK_FILE
    if write and (fresh or not bank.is_file()):
        write_bank(
            cache,
            np.unique(rows).tolist(),
            bank,
            min_points=loader.paste_min_points,
            per_class=loader.paste_per_class,
            seed=run.seed,
            sweeps=loader.lidar_sweeps,
        )
    released = "paste:students" in loader.parity
    return Paster(bank, until_epoch=epochs * 3 // 4 if released else epochs - loader.paste_off_epochs)
