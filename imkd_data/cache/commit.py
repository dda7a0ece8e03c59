"""The commit protocol: every file of a cache is written by ``commit_bytes``, and is there whole or not at all.

Encode in memory -> temp file in the target folder -> write, fsync -> read back and compare -> rename without replace ->
fsync of the folder. An equal file that is already there is accepted; a different one is an error, never overwritten.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from imkd_data.cache import fault
from imkd_data.errors import CacheDamageError, DiskFullError, StorageError

__all__ = ["Committed", "commit_bytes", "crc32c_hex", "dead_partials", "remove_file", "sha256_hex", "storage_error"]

_PARTIAL = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]*)-(?P<pid>\d+)-(?P<random>[0-9a-f]+)\.partial$")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RETRY = (errno.EIO, errno.ESTALE, errno.EINTR)


@dataclass(frozen=True, slots=True)
class Committed:
    """What is now on disk: size, crc32c (hex) and sha256 (hex); ``written`` is false when an equal file was there."""

    bytes: int
    crc32c: str
    sha256: str
    written: bool


def crc32c_hex(data: bytes) -> str:
    """crc32c as eight hex digits."""
    return f"{google_crc32c.value(data):08x}"


def sha256_hex(data: bytes) -> str:
    """sha256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def storage_error(error: OSError, path: Path, needed: int | None = None) -> StorageError:
    """The named error of an operating-system error: DiskFullError for space and quota, else StorageError."""
    full = error.errno in _FULL
    kind = DiskFullError if full else StorageError
    what = "no space left to write" if full else f"cannot store or read: {os.strerror(error.errno or errno.EIO)}"
    expected = None
    if full and needed is not None:
        expected = f"{needed:,} bytes free, found {_free_bytes(path.parent):,}"
    step = "free some space, then run the same command again" if full else "check the disk and permissions, then run it again"
    return kind(what, rule="storage.full" if full else "storage.io", file=str(path), expected=expected, next=step)


def _free_bytes(folder: Path) -> int:
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return int(status.f_bavail * status.f_frsize)


def commit_bytes(path: Path, data: bytes, kind: str = "data", *, fsync: bool = True, replace: bool = False) -> Committed:
    """Put ``data`` at ``path`` by the protocol above.

    kind names the fault points (``data``, ``receipt``, ...). replace: rename over an old file; only for the files that
    the parent process alone writes. Raises DiskFullError, StorageError, or CacheDamageError where other bytes are in place.
    """
    crc, sha = google_crc32c.value(data), sha256_hex(data)
    for attempt in (1, 2):
        try:
            written = _commit_once(path, data, crc, kind, fsync, replace)
            return Committed(len(data), f"{crc:08x}", sha, written)
        except OSError as error:
            if isinstance(error, CacheDamageError):
                raise
            if error.errno not in _RETRY or attempt == 2:
                raise storage_error(error, path, len(data)) from error
            time.sleep(0.2)
    raise AssertionError("unreachable")


def _commit_once(path: Path, data: bytes, crc: int, kind: str, fsync: bool, replace: bool) -> bool:
    fault.point(f"{kind}.begin")
    _make_folder(path.parent, fsync)
    temp = path.parent / f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        _write_checked(temp, data, crc, kind, fsync)
        if replace:
            os.replace(temp, path)
            placed = True
        else:
            placed = _rename_new(temp, path, data)
        fault.point(f"{kind}.renamed")
        if fsync:
            _fsync_folder(path.parent)
        fault.point(f"{kind}.done")
        return placed
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def _write_checked(temp: Path, data: bytes, crc: int, kind: str, fsync: bool) -> None:
    fd = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        fault.point(f"{kind}.created")
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fault.point(f"{kind}.written")
        if fsync:
            os.fsync(fd)
        fault.point(f"{kind}.fsynced")
        if _crc_of(fd, len(data)) != crc:
            raise OSError(errno.EIO, "written bytes read back differently")
        os.fchmod(fd, 0o644)
        fault.point(f"{kind}.checked")
    finally:
        os.close(fd)


def _crc_of(fd: int, size: int) -> int:
    crc, at = 0, 0
    while at < size:
        block = os.pread(fd, 4 << 20, at)
        if not block:
            return -1
        crc = google_crc32c.extend(crc, block)
        at += len(block)
    return crc if os.fstat(fd).st_size == size else -1


def _rename_new(temp: Path, path: Path, data: bytes) -> bool:
    """Rename that never replaces. True if our file is now in place, false if an equal one already was."""
    for attempt in (_renameat2, _link):
        try:
            attempt(temp, path)
            return True
        except FileExistsError:
            break
        except OSError as error:
            # A rename may report an error although it was done (network file systems): the content decides.
            if not temp.exists() and _equal(path, data):
                return True
            if error.errno in _FULL or error.errno in _RETRY:
                raise
    else:
        with contextlib.suppress(FileExistsError):
            _exclusive_copy(path, data)
            return True
    if _equal(path, data):
        return False
    raise CacheDamageError(
        "another file is already in place and has other bytes",
        rule="commit.exists",
        file=str(path),
        expected=f"crc32c {crc32c_hex(data)}, {len(data):,} bytes",
        next="run `imkd-data verify`, then `imkd-data repair`",
    )


def _equal(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except FileNotFoundError:
        return False


@functools.cache
def _libc_renameat2() -> ctypes._NamedFuncPointer | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def _renameat2(temp: Path, path: Path) -> None:
    function = _libc_renameat2()
    if function is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    here, noreplace = -100, 1
    if function(here, os.fsencode(temp), here, os.fsencode(path), noreplace) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


def _link(temp: Path, path: Path) -> None:
    os.link(temp, path)
    os.unlink(temp)


def _exclusive_copy(path: Path, data: bytes) -> None:
    """Last resort where neither renameat2 nor hard links work. Not atomic: a receipt is written only after the content
    was read back, so a torn copy counts as not built."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if not _equal(path, data):
        raise OSError(errno.EIO, "written bytes read back differently", str(path))


def _make_folder(folder: Path, fsync: bool) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent, fsync)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    if fsync:
        _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_file(path: Path, kind: str, *, fsync: bool = True) -> None:
    """Unlink, then fsync the folder, so that a crash cannot bring the file back after a later step."""
    try:
        path.unlink(missing_ok=True)
        if fsync and path.parent.is_dir():
            _fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    fault.point(f"remove.{kind}")


@functools.cache
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname()) or "host"


def dead_partials(root: Path, *, every: bool = False) -> list[Path]:
    """Temp files below ``root`` that dead processes of this host left behind; ``every``: those of any host, too."""
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            match = _PARTIAL.match(name)
            if match and (every or (match["host"] == _host() and not _alive(int(match["pid"])))):
                found.append(Path(folder) / name)
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
