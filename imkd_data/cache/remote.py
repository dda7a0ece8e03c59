"""A cache at a URL (any fsspec file system: file, http, s3, ...): whole shards stream into a bounded local store.

The store keeps one folder per manifest, ``STORE/<sha256 of manifest.json>``, with the files under their own relative names.
A file arrives under a dot name, is compared with the sha256 of its receipt (which the manifest seals), and is published by
rename: what has its final name is whole. Evicted is only what was fetched: what no coming batch of this process needs goes
first, least recently opened first. No lock is taken:
a reader waits for a file that somebody else is fetching for as long as that one's dot name grows, and two that fetch the same
shard after all publish equal bytes. Streams fetch ahead (``ahead.py``).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from imkd_data.cache import layout
from imkd_data.cache.commit import sha256_hex, storage_error
from imkd_data.cache.receipt import parse_json, unsealed
from imkd_data.cache.shard_file import ShardFile
from imkd_data.cache.source import READ_TIMEOUT_S, GivenUp, Source, sealed, stopping
from imkd_data.cache.store import Cache
from imkd_data.errors import CacheDamageError, ImkdError, UsageError
from imkd_data.fields.base import CacheField

__all__ = ["RemoteCache", "default_store", "is_url", "open_remote"]

T = TypeVar("T")
Key = tuple[str, int]  # field, number of its shard

DEFAULT_LIMIT = 200 * 2**30
MARKER = ".imkd-store"
ATTEMPTS_AHEAD = 2  # then the read that needs the file tries, and raises
ABANDONED_S = 3600.0


def is_url(path: object) -> bool:
    """Whether a path names a remote cache: ``http://...``, ``s3://...``, ``file://...``."""
    return isinstance(path, str) and "://" in path


def default_store() -> Path:
    """``$IMKD_STORE``, else ``imkd/store`` in the user's cache folder."""
    named = os.environ.get("IMKD_STORE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imkd" / "store"


def open_remote(
    url: str,
    *,
    store: Path | str | None = None,
    limit_bytes: int = DEFAULT_LIMIT,
    fields: Iterable[CacheField] = (),
    timeout_s: float = READ_TIMEOUT_S,
    kind: type[RemoteCache] | None = None,
) -> RemoteCache:
    """Open a cache at a URL. Metadata that the store does not have whole is fetched now, shards when a row is first read.

    store: folder of the local copies, default ``default_store()``. limit_bytes: shards kept there by this cache. kind: the
    class of the result, for subclasses.

    Raises:
        StorageError: the server does not answer, after bounded retries. CacheDamageError: what arrives is not what the
        manifest says, or the manifest is none. MismatchError: written by a newer version. UsageError: no support for this kind
        of URL is installed.
    """
    source = Source(url.rstrip("/"), timeout_s)
    manifest = source.read("manifest.json", _manifest)
    value = _manifest(manifest)
    folder = Path(store or default_store()) / sha256_hex(manifest)
    _claim(folder)
    _publish(folder / "manifest.json", manifest)
    seals = {"recipe.json": value["recipe_sha256"], "NOTICE": value["notice_sha256"], "index.parquet": value["index_sha256"]}
    seals["arrays.zarr/zarr.json"] = value["group_sha256"]
    for name, entry in value["fields"].items():
        if "zarr_json_sha256" in entry:
            seals[f"arrays.zarr/{name}/zarr.json"] = entry["zarr_json_sha256"]
    for name, seal in seals.items():
        _safe_name(name)
        if not _whole(folder / name, seal):
            _publish(folder / name, source.read(name, sealed(seal, name)))
    made = kind or RemoteCache
    return made(url, Path(store or default_store()), limit_bytes, timeout_s, folder, tuple(fields), source)


def _manifest(data: bytes) -> dict[str, Any]:
    """What the manifest says, once it is known to be one, whole, and of a format that is read here."""
    name = Path("manifest.json")
    return unsealed(parse_json(data, name), "self_sha256", name)


def _whole(path: Path, seal: str) -> bool:
    """Whether the store's copy is there and has the bytes that the manifest seals: it may be years old."""
    try:
        return sha256_hex(path.read_bytes()) == seal
    except FileNotFoundError:
        return False
    except OSError as error:
        raise storage_error(error, path) from error


def _safe_name(name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in name.split("/") or "\0" in name:
        raise CacheDamageError("the manifest names a path outside the cache", rule="manifest.path", found=name)


def _claim(folder: Path) -> None:
    """Make the folder ours, without the halves of killed processes; a folder that somebody else made is left alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARKER).exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UsageError("the store's folder holds something else", found=str(folder), next="set IMKD_STORE")
        (folder / MARKER).touch()
        for partial in folder.rglob(".*.partial"):
            if time.time() - partial.stat().st_mtime > ABANDONED_S:
                partial.unlink(missing_ok=True)
    except FileNotFoundError:  # finished meanwhile
        return
    except OSError as error:
        if isinstance(error, ImkdError):
            raise
        raise storage_error(error, folder) from error


def _publish(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise storage_error(error, path) from error


def _partial(path: Path) -> Path:
    """A dot name for a file on its way; it says whose."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")


def _on_its_way(path: Path, silence_s: float) -> bool:
    """Whether a living process is fetching this file: its dot name changed within ``silence_s``."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        try:
            os.kill(int(partial.name.split(".")[-3]), 0)
            if time.time() - partial.stat().st_mtime < silence_s:
                return True
        except PermissionError:  # somebody else's process
            return True
        except (OSError, ValueError):  # gone, and its file with it or for good
            continue
    return False


class RemoteCache(Cache):
    """A ``Cache`` whose shards are fetched when they are first needed. ``url`` is where from; ``path`` is the local folder."""

    def __init__(
        self,
        url: str,
        store: Path,
        limit_bytes: int,
        timeout_s: float,
        folder: Path,
        own_fields: tuple[CacheField, ...],
        source: Source,
    ) -> None:
        self.url, self.store, self.limit_bytes, self.timeout_s = url, store, limit_bytes, timeout_s
        self._source = source
        self._room = threading.Lock()
        self._on_way: dict[Path, int] = {}  # by dot name, bytes that have been given room
        self._renewed: set[Key] = set()  # shards whose local copy was damaged and has been dropped once
        self.coming: dict[object, Collection[Key]] = {}  # what each stream's next batches read, in order of need
        super().__init__(folder, own_fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.url, str(self.store), self.limit_bytes, self._own_fields, self.timeout_s)

    def check_sizes(self, only: Any = None) -> None:
        """Nothing to compare yet: every shard is checked by sha256 when it arrives."""

    def _file(self, name: str, number: int) -> ShardFile:
        found = self._files.get((name, number))
        if found is not None:
            return found
        path = self._path(name, number)
        while True:
            try:
                os.utime(path)  # opened just now: evicted last
                return super()._file(name, number)
            except FileNotFoundError:
                if not self._fetch(name, number, path):
                    time.sleep(0.02)

    def read_parts(self, field: str, row: int) -> dict[str, bytes]:
        """As ``Cache.read_parts``."""
        return self._kept(super().read_parts, field, row)

    def _read_array(self, name: str, row: int) -> NDArray[Any]:
        return self._kept(super()._read_array, name, row)

    def _kept(self, read: Callable[[str, int], T], name: str, row: int) -> T:
        """Read a row: again where another process evicted its shard before this one had it open (with many shards a file is
        opened for every read), and once from a new copy where this one is damaged (power failure, bad disk)."""
        key = name, row // self.recipe.rows_per_shard
        while True:
            renewed = key in self._renewed
            try:
                return read(name, row)
            except CacheDamageError as error:
                if error.rule != "data.missing":
                    if renewed or error.rule == "remote.sha256":  # damage of the source, or on every way from it
                        raise
                    self._drop_damaged(key)
                with self._lock:
                    self._files.pop(key, None)

    def _drop_damaged(self, key: Key) -> None:
        path = self._path(*key)
        with self._lock:
            if key in self._renewed:  # by another thread, since this one began to read
                return
            self._renewed.add(key)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(error, path) from error

    def size_of(self, name: str, number: int) -> int:
        """Bytes of a field's shard."""
        return int(self.manifest["fields"][name]["shards"][number][0])

    def fetch_ahead(self, name: str, number: int, *, closed: threading.Event) -> None:
        """Fetch a shard of ``coming`` unless it is here, on its way, no longer in it, or has no room beside the rest of it.
        Ends soon after ``closed`` is set. Raises as a read does, after fewer attempts."""
        with contextlib.suppress(GivenUp):
            self._fetch(name, number, self._path(name, number), closed)

    def _fetch(self, name: str, number: int, path: Path, closed: threading.Event | None = None) -> bool:
        """Fetch a shard; false if somebody else is at it or was."""
        size, _, _, seal = self.manifest["fields"][name]["shards"][number]
        relative = layout.receipt_path(Path(), name, number).as_posix()
        partial = _partial(path)
        ahead: dict[str, Any] = {} if closed is None else {"attempts": ATTEMPTS_AHEAD, "callback": stopping(closed)}
        try:
            if not self._begun((name, number), path, partial, int(size), closed is not None):
                return False
            try:
                receipt = parse_json(self._source.read(relative, sealed(seal, relative)), Path(relative))
                source = str(path.relative_to(self.path))
                self._source.download(source, partial, size=int(size), sha256=receipt["sha256"], **ahead)
                with self._room:  # at once, or it counts twice and another shard goes for it
                    os.replace(partial, path)
                    self._on_way.pop(partial)
            finally:
                self._on_way.pop(partial, None)
                partial.unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, ImkdError):
                raise
            raise storage_error(error, path) from error
        return True

    def _begun(self, key: Key, path: Path, partial: Path, size: int, ahead: bool) -> bool:
        """Room for a file and the dot name that tells others to wait for it; false where another one stands there."""
        with self._room:
            if path.is_file() or _on_its_way(path, self.timeout_s):
                return False
            needed: dict[Key, int] = {}
            for keys in list(self.coming.values()):
                for rank, other in enumerate(keys):
                    needed[other] = min(rank, needed.get(other, rank))
            if ahead and key not in needed:  # its batch has come and gone while this thread waited
                raise GivenUp
            self._make_room(size + sum(list(self._on_way.values())), needed, ahead)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            self._on_way[partial] = size
        return True

    def _make_room(self, wanted: int, needed: dict[Key, int], ahead: bool) -> None:
        """Remove shards until ``wanted`` more bytes fit: first those that no coming batch needs, least recently opened first,
        then those needed last. Of the latter none goes for a fetch ahead: GivenUp is raised where they leave no room."""
        files = []
        for name in self.fields:
            for number in range(len(self.shards)):
                path = self._path(name, number)
                try:
                    stat = path.stat()
                except OSError:
                    continue
                rank = needed.get((name, number))
                order = (0, stat.st_mtime_ns) if rank is None else (1, -rank)
                files.append((order, stat.st_size, (name, number), path))
        if ahead and sum(size for order, size, _, _ in files if order[0]) + wanted > self.limit_bytes:
            raise GivenUp
        total = sum(size for _, size, _, _ in files)
        for _, size, key, path in sorted(files, key=lambda f: f[0]):
            if total + wanted <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)  # open descriptors of other workers stay readable
            with self._lock:
                self._files.pop(key, None)  # the descriptor closes with its last reader
            total -= size


def _reopen(
    kind: type[RemoteCache], url: str, store: str, limit_bytes: int, fields: tuple[CacheField, ...], timeout_s: float
) -> RemoteCache:
    return open_remote(url, store=store, limit_bytes=limit_bytes, fields=fields, timeout_s=timeout_s, kind=kind)
