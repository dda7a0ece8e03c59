"""One batch of work, here or in a worker: a worker gets the rows of one batch and makes it.

Workers are spawned processes, hold no lock and no named shared memory, and open the cache's files themselves. What they are
started with is a path and a request, a few KB whatever the cache's size: ``Process.start`` blocks on all that exceeds a pipe's
buffer until the child has imported torch, so that a large selection would start workers one after another.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imkd_data.errors import CacheDamageError, ImkdError, InputDataError, UsageError
from imkd_data.loader.order import Order
from imkd_data.loader.read import Packed, SampleReader, pack

__all__ = [
    "LOOK_EVERY_S",
    "Batches",
    "Job",
    "Jobs",
    "Key",
    "Source",
    "arrived",
    "leave_if_started_by_a_stream",
    "one_thread",
    "started",
    "unguarded_script",
]

# Epoch and the position of this rank's first sample.
Key = tuple[int, int]

LOOK_EVERY_S = 5.0  # between two looks at whether the workers live
_STARTED_BY = "IMKD_STARTED_BY"  # in a worker's environment: the process whose stream started it
_UNGUARDED = 77  # exit status of a worker whose main script would start workers again
MOST_SKIPS = 16  # neighbours tried in place of a damaged sample


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    """What a worker is told of one batch: its epoch, and of each of its B samples the row, the position that draws its
    augmentation and whether it is padding. instead: (B, up to 15) rows to try in order where a sample's data are damaged."""

    epoch: int
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    padding: NDArray[np.bool_]
    instead: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Key -> job -> packed batch. It stays in the trainer's process.

    skip_bad: a sample whose data are damaged gives its place to the next position's sample (of the same epoch, around the
    end), with the place's own augmentation. That is arithmetic too: every rank keeps its count, and a resumed or re-ranked
    run replaces alike.
    """

    reader: SampleReader
    order: Order
    batch_size: int
    skip_bad: bool = False

    def job(self, key: Key) -> Job:
        """The rows of a key's batch."""
        epoch, first = key
        positions = np.arange(first, first + self.batch_size)
        inside = np.minimum(positions, len(self.order) - 1)
        further = inside[:, None] + np.arange(1, MOST_SKIPS if self.skip_bad else 1)
        return Job(
            epoch=epoch,
            rows=self.order.at(epoch, inside),
            positions=inside,
            padding=positions >= len(self.order),  # only without drop_last: repeats of the last row that no metric counts
            instead=self.order.at(epoch, further % len(self.order)) if self.skip_bad else further,
        )

    def tokens(self, key: Key) -> tuple[str, ...]:
        """Tokens of a batch, for messages about work in flight."""
        return tuple(self.reader.cache.token(int(r)) for r in self.job(key).rows)

    def packed(self, key: Key) -> Packed:
        """The batch, made here."""
        return made(self.reader, self.job(key))


def made(reader: SampleReader, job: Job) -> Packed:
    """The batch of a job."""
    shape = reader.image_shape
    images = None if shape is None else _buffer((len(job.rows), *shape))
    samples, tokens, skipped = [], [], list[tuple[str, str]]()
    for i in range(len(job.rows)):
        row, sample = _sample(reader, job, i, None if images is None else images[i], skipped)
        samples.append(sample)
        tokens.append(reader.cache.token(row))
    out = pack(samples, tokens, images)
    out.skipped = tuple(skipped)
    if job.padding.any():
        out.tensors["padding"] = torch.from_numpy(job.padding)
    return out


def _sample(
    reader: SampleReader, job: Job, i: int, into: Tensor | None, skipped: list[tuple[str, str]]
) -> tuple[int, dict[str, Any]]:
    """The i-th sample and its row; where it is damaged and may be skipped, the next whole one."""
    rows = [int(job.rows[i]), *job.instead[i].tolist()]
    for row in rows:
        try:
            return row, reader.read(row, epoch=job.epoch, position=int(job.positions[i]), images=into)
        except ImkdError as error:
            token = reader.cache.token(row)
            error.details.setdefault("token", token)  # a disk or server that fails knows nothing of samples
            if len(rows) == 1 or not isinstance(error, CacheDamageError | InputDataError):
                raise
            skipped.append((token, f"{type(error).__name__}: {error.what}"))
            last = error
    raise CacheDamageError(
        f"{MOST_SKIPS} samples in a row are damaged",
        rule="loader.skip",
        token=", ".join(t for t, _ in skipped[-MOST_SKIPS:]),
        next="imkd-data verify CACHE, then repair it",
    ) from last


def _buffer(shape: tuple[int, ...]) -> Tensor:
    """Bytes for a batch's images, not initialised: in a worker memory that the trainer's process maps, so nothing is copied
    on the way; else NumPy's, which asks for large pages."""
    if torch.utils.data.get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # type: ignore[call-overload, no-any-return]


class Batches(torch.utils.data.Dataset[Any]):
    """Map-style view, job -> batch, for torch's DataLoader; all that is sent to a worker when it starts. Known errors travel
    as values: re-raising in the parent by DataLoader would lose their details."""

    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __getitem__(self, job: Job) -> Packed | ImkdError:
        try:
            return made(self.reader, job)
        except ImkdError as error:
            return error


class Jobs:
    """A sampler over jobs; torch asks samplers only for iteration."""

    def __init__(self, source: Source, keys: Callable[[], Iterator[Key]]) -> None:
        self.source, self.keys = source, keys

    def __iter__(self) -> Iterator[Job]:
        return map(self.source.job, self.keys())


def one_thread(_: int) -> None:
    """A worker is one core: neither torch nor the BLAS below NumPy starts threads of its own."""
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, user_api="blas")


def leave_if_started_by_a_stream() -> None:
    """A spawned worker imports the main script before it works. Where the script's own code is not guarded it comes back to the
    stream, or to the training, that started the worker: the process ends here, and ``unguarded_script`` says why."""
    starting = getattr(multiprocessing.current_process(), "_inheriting", False)
    if starting and os.environ.get(_STARTED_BY) == str(os.getppid()):
        raise SystemExit(_UNGUARDED)


def unguarded_script(values: Iterator[Packed | ImkdError]) -> UsageError | None:
    """The error where workers died because they could not import the main script; None where they died of something else."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    if _UNGUARDED in [w.exitcode for w in getattr(values, "_workers", ())]:
        return UsageError(
            "loader workers import the script that started them, and this one starts them again",
            expected='the code of the script under if __name__ == "__main__":',
            file=main or "",
            next="put it there, or use workers=0",
        )
    if main is not None and not os.path.exists(main):
        return UsageError(
            "loader workers import the script that started them, and this one is not in a file",
            found=main,
            next="save it to a file, or use workers=0",
        )
    return None


def started(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Packed | ImkdError]:
    """The loader's workers, started without torch's SIGCHLD handler: it raises a worker's death at any line of the
    caller's code, even inside a checkpoint's write. ``arrived`` sees it within seconds at a place we choose."""
    mine = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if mine else None
    os.environ[_STARTED_BY] = str(os.getpid())
    try:
        values = iter(loader)
    finally:
        del os.environ[_STARTED_BY]
    if mine:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    return values


def arrived(values: Iterator[Packed | ImkdError], timeout_s: float) -> Packed | ImkdError:
    """The next value. Every few seconds of waiting torch looks whether a worker is dead and raises; ``timeout_s`` bounds
    the whole wait."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return next(values)
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() >= until:
                raise
