"""Shards of a remote cache, fetched before they are needed.

The results never depend on it: what is not there in time, or failed, is fetched by the read that needs it, and only that read
raises. At most ``IN_FLIGHT`` files are on their way at once, in the order of need, and only as far ahead as the store has room
for; what the next batches need is not evicted for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imkd_data.cache.remote import Key, RemoteCache

__all__ = ["BATCHES", "IN_FLIGHT", "Ahead"]

IN_FLIGHT = 4
BATCHES = 64  # looked at in advance


class Ahead:
    """Fetches for the next ``BATCHES`` batches in threads of its own; ``close`` ends them.

    shards: of every batch to come the numbers of the shards it reads, in order. fields: what is read of each.
    """

    def __init__(self, cache: RemoteCache, fields: Sequence[str], shards: Iterable[Sequence[int]]) -> None:
        self._cache, self._fields = cache, tuple(fields)
        self._coming: Iterator[Sequence[int]] = iter(shards)
        self._window: deque[Sequence[int]] = deque()
        self._tried: set[Key] = set()
        self._todo: deque[Key] = deque()
        self._changed, self._closed = threading.Condition(), threading.Event()
        self._plan()
        # Daemons: a server that is silent does not keep the process alive.
        names = [f"imkd-fetch-{i}" for i in range(IN_FLIGHT)]
        self._threads = [threading.Thread(target=self._work, name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def advance(self) -> None:
        """The first batch is done with."""
        with self._changed:
            if self._window:
                self._window.popleft()
            self._plan()
            self._changed.notify_all()

    def _plan(self) -> None:
        while len(self._window) < BATCHES and (shards := next(self._coming, None)) is not None:
            self._window.append(shards)
        wanted: dict[Key, None] = {}  # in the order of need
        room = self._cache.limit_bytes
        for number in dict.fromkeys(n for shards in self._window for n in shards):
            for name in self._fields:
                room -= self._cache.size_of(name, number)
                if room >= 0:
                    wanted[name, number] = None
        self._cache.coming[self] = wanted
        self._tried &= wanted.keys()
        self._todo = deque(key for key in wanted if key not in self._tried)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._todo or self._closed.is_set())
                if self._closed.is_set():
                    return
                key = self._todo.popleft()
                self._tried.add(key)
            with contextlib.suppress(Exception):  # the read that needs it tries again, and says what is wrong
                self._cache.fetch_ahead(*key, closed=self._closed)

    def close(self) -> None:
        """Stop: what is on its way is given up at its next bytes."""
        self._closed.set()
        self._cache.coming.pop(self, None)
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=2.0)
