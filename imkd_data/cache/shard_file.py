"""One data file opened for reading: its index parsed once, positioned reads, retries of passing errors."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from imkd_data.cache.codecs import parse_index
from imkd_data.cache.commit import storage_error
from imkd_data.errors import CacheDamageError

__all__ = ["MAX_OPEN", "ShardFile"]

T = TypeVar("T")
_TRANSIENT = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN)


def _max_open() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // 2))


MAX_OPEN = _max_open()


class ShardFile:
    """A data file: its index parsed once, positioned reads. With ``keep`` false it is opened for every read, so that many
    shards do not exhaust file descriptors; a kept file is never closed behind another thread's back."""

    __slots__ = ("_fd", "_path", "_spans")

    def __init__(self, path: Path, rows_per_shard: int, size: int, keep: bool) -> None:
        self._path = path
        self._spans: list[list[int]] | None = None
        self._fd: int | None = None
        fd = self._retry(lambda: os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        try:
            found = os.fstat(fd).st_size
            if found != size:
                raise CacheDamageError(
                    "data file has another size than its receipt",
                    rule="data.size",
                    expected=f"{size:,} bytes",
                    found=f"{found:,} bytes",
                    next="imkd-data repair",
                )
            if rows_per_shard:
                tail = rows_per_shard * 16 + 4
                self._spans = parse_index(os.pread(fd, tail, max(0, size - tail)), rows_per_shard, size).tolist()
        except BaseException:
            os.close(fd)
            raise
        if keep:
            self._fd = fd
        else:
            os.close(fd)

    def span(self, position: int) -> tuple[int, int]:
        """Offset and size of a row's inner chunk."""
        assert self._spans is not None
        at, size = self._spans[position]
        return at, size

    def read(self, size: int, at: int) -> bytes:
        """``size`` bytes at ``at``; fewer at the end of the file."""
        if self._fd is not None:
            fd = self._fd
            return self._retry(lambda: os.pread(fd, size, at))
        fd = self._retry(lambda: os.open(self._path, os.O_RDONLY))
        try:
            return self._retry(lambda: os.pread(fd, size, at))
        finally:
            os.close(fd)

    def _retry(self, call: Callable[[], T]) -> T:
        for pause in (0.05, 0.2, 0.8, None):
            try:
                return call()
            except FileNotFoundError as error:
                raise CacheDamageError("data file is missing", rule="data.missing", next="imkd-data repair") from error
            except OSError as error:
                if error.errno not in _TRANSIENT or pause is None:
                    raise storage_error(error, self._path) from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:  # dropped by an eviction: closes with its last reader
        if getattr(self, "_fd", None) is not None:
            self.close()
