"""The far side of a remote cache: whole files of any fsspec file system (file, http, s3, ...), each checked by sha256, with
bounded retries, jitter, and a limit on silence."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from imkd_data.cache.commit import sha256_hex, storage_error
from imkd_data.errors import CacheDamageError, DiskFullError, MismatchError, StorageError, UsageError

__all__ = ["ATTEMPTS", "READ_TIMEOUT_S", "GivenUp", "Source", "sealed", "stopping"]

T = TypeVar("T")

ATTEMPTS = 5
READ_TIMEOUT_S = 60.0
CHUNK = 1 << 20


class GivenUp(Exception):
    """Fetching ahead ended before the file was here."""


def stopping(closed: threading.Event) -> Any:
    """A callback of fsspec that ends a transfer at its next bytes once ``closed`` is set."""
    from fsspec.callbacks import Callback

    class Stopping(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if closed.is_set():
                raise GivenUp

    return Stopping()


def sealed(seal: str, name: str) -> Callable[[bytes], None]:
    """A check for ``Source.read``: the bytes are those that the manifest sealed."""

    def check(data: bytes) -> None:
        if sha256_hex(data) != seal:
            raise CacheDamageError(
                "what arrived is not what the manifest says", rule="remote.sha256", file=name, expected=f"sha256 {seal[:16]}"
            )

    return check


def _pause(attempt: int) -> None:
    """Wait before a further attempt: longer each time, with jitter so that many readers do not return together."""
    time.sleep(min(8.0, 0.2 * 2**attempt) * (0.5 + random.random()))


class Source:
    """The far side: reads of whole files with bounded retries, jitter, and a limit on silence."""

    def __init__(self, url: str, timeout_s: float) -> None:
        import fsspec

        self.url, self.timeout_s = url, timeout_s
        self.shown = re.sub(r"//[^/@]*@", "//", url)  # no credentials in messages
        protocol = url.split("://", 1)[0]
        options: dict[str, Any] = {"skip_instance_cache": True}
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
            options["client_kwargs"] = {"timeout": timeout}
        if protocol == "s3":
            options["config_kwargs"] = {"read_timeout": timeout_s, "connect_timeout": timeout_s}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"no support for {protocol}:// is installed", found=str(error)[:200], next="pip install 'imkd[remote]'"
            ) from error

    def _try(self, name: str, action: Callable[[], T], attempts: int = ATTEMPTS) -> T:
        """Run ``action`` up to ``attempts`` times; wrong bytes are retried too, they may be a proxy's."""
        last: Exception | None = None
        for attempt in range(attempts):
            if attempt:
                _pause(attempt)
            try:
                return action()
            except (UsageError, KeyboardInterrupt, GivenUp):
                raise
            except MismatchError as error:  # another version: asking again changes nothing
                error.details["file"] = f"{self.shown}/{name}"
                raise
            except Exception as error:  # every library has its own network errors
                if isinstance(error, StorageError):  # our own disk
                    raise
                last = error
        if isinstance(last, CacheDamageError):
            raise CacheDamageError(
                f"{last.what}, {attempts} times",
                rule=last.rule,
                **{**last.details, "file": f"{self.shown}/{name}", "next": "imkd-data verify at the source"},
            ) from last
        raise StorageError(
            "a file of the remote cache could not be read",
            rule="remote.read",
            file=f"{self.shown}/{name}",
            expected=f"an answer within {attempts} attempts",
            found=f"{type(last).__name__}: {str(last)[:160]}",
            next="check the server, then run the same command again",
        ) from last

    def read(self, name: str, check: Callable[[bytes], object]) -> bytes:
        """A small file, checked."""

        def once() -> bytes:
            data: bytes = self.fs.cat_file(f"{self.root}/{name}")
            check(data)
            return data

        return self._try(name, once)

    def download(
        self, name: str, partial: Path, *, size: int, sha256: str, attempts: int = ATTEMPTS, callback: Any = None
    ) -> None:
        """A data file, streamed into ``partial`` and checked."""
        options = {} if callback is None else {"callback": callback}

        def once() -> None:
            try:
                self.fs.get_file(f"{self.root}/{name}", str(partial), **options)
            except OSError as error:  # of the network mostly, which is tried again; a full disk here is not
                ours = storage_error(error, partial, size)
                if isinstance(ours, DiskFullError):
                    raise ours from error
                raise
            _check_file(partial, name, size, sha256)

        self._try(name, once, attempts)


def _check_file(path: Path, name: str, size: int, sha256: str) -> None:
    found = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    if found != size or digest.hexdigest() != sha256:
        raise CacheDamageError(
            "a shard arrived damaged",
            rule="remote.sha256",
            file=name,
            expected=f"{size:,} bytes, sha256 {sha256[:16]}",
            found=f"{found:,} bytes, sha256 {digest.hexdigest()[:16]}",
        )
