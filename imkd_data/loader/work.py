"""One batch of work, here or in a worker: a worker gets an epoch and a position and makes that batch; nothing else travels.

Workers are spawned processes, hold no lock and no named shared memory, and open the cache's files themselves.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imkd_data.errors import CacheDamageError, ImkdError, InputDataError
from imkd_data.loader.order import Order
from imkd_data.loader.read import Packed, SampleReader, pack

__all__ = ["LOOK_EVERY_S", "Batches", "Key", "Keys", "Source", "arrived", "one_thread", "started"]

# Epoch and the position of this rank's first sample.
Key = tuple[int, int]

LOOK_EVERY_S = 5.0  # between two looks at whether the workers live
MOST_SKIPS = 16  # neighbours tried in place of a damaged sample


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Key -> packed batch. The only thing that is sent to a worker.

    skip_bad: a sample whose data are damaged gives its place to the next position's sample (of the same epoch, around the
    end), with the place's own augmentation. That is arithmetic too: every rank keeps its count, and a resumed or re-ranked
    run replaces alike.
    """

    reader: SampleReader
    order: Order
    batch_size: int
    skip_bad: bool = False

    def _rows(self, key: Key) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        epoch, first = key
        positions = np.arange(first, first + self.batch_size)
        padding = positions >= len(self.order)  # only without drop_last: repeats of the last row that no metric counts
        inside = np.minimum(positions, len(self.order) - 1)
        return self.order.at(epoch, inside), inside, padding

    def tokens(self, key: Key) -> tuple[str, ...]:
        """Tokens of a batch, for messages about work in flight."""
        return tuple(self.reader.cache.token(int(r)) for r in self._rows(key)[0])

    def packed(self, key: Key) -> Packed:
        rows, positions, padding = self._rows(key)
        shape = self.reader.image_shape
        images = None if shape is None else _buffer((len(rows), *shape))
        samples, tokens, skipped = [], [], list[tuple[str, str]]()
        for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            into = None if images is None else images[i]
            row, sample = self._sample(row, key[0], position, into, skipped)
            samples.append(sample)
            tokens.append(self.reader.cache.token(row))
        out = pack(samples, tokens, images)
        out.skipped = tuple(skipped)
        if padding.any():
            out.tensors["padding"] = torch.from_numpy(padding)
        return out

    def _sample(
        self, row: int, epoch: int, position: int, into: Tensor | None, skipped: list[tuple[str, str]]
    ) -> tuple[int, dict[str, Any]]:
        """The sample of a position and its row; where it is damaged and may be skipped, the next whole one."""
        for further in range(1, MOST_SKIPS + 1):
            try:
                return row, self.reader.read(row, epoch=epoch, position=position, images=into)
            except (CacheDamageError, InputDataError) as error:
                if not self.skip_bad:
                    raise
                skipped.append((self.reader.cache.token(row), f"{type(error).__name__}: {error.what}"))
                last = error
            row = int(self.order.at(epoch, [(position + further) % len(self.order)])[0])
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
    """Map-style view of a source for torch's DataLoader. Known errors travel as values: re-raising in the parent by
    DataLoader would lose their details."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, key: Key) -> Packed | ImkdError:
        try:
            return self.source.packed(key)
        except ImkdError as error:
            return error


class Keys:
    """A sampler over keys; torch asks samplers only for iteration."""

    def __init__(self, keys: Callable[[], Iterator[Key]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Key]:
        return self.keys()


def one_thread(_: int) -> None:
    """A worker is one core: neither torch nor the BLAS below NumPy starts threads of its own."""
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, user_api="blas")


def started(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Packed | ImkdError]:
    """The loader's workers, started without torch's SIGCHLD handler: it raises a worker's death at any line of the
    caller's code, even inside a checkpoint's write. ``arrived`` sees it within seconds at a place we choose."""
    mine = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if mine else None
    values = iter(loader)
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
