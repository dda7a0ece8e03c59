"""Opening files whose names come from tables: safe paths, whole reads, one error per cause."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import ImkdError, InputDataError, SourceMissingError, StorageError, UnsafePathError

__all__ = ["SourceFiles"]


class SourceFiles:
    """The files under one data root.

    Every name is checked before any open: relative, no ``..``, no drive letter, no NUL, and, after following links, still
    under the root. Folders are resolved once, so the check costs no system call per file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self._folders: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def path(self, name: str, **where: Any) -> str:
        """Absolute path of a table's ``filename``; UnsafePathError (F26) when it could leave the root."""
        path = self._in_folder(name, where)
        if os.path.islink(path):
            self._check_inside(os.path.realpath(path), name, where)
        return path

    def _in_folder(self, name: str, where: dict[str, Any]) -> str:
        """The path with its folder resolved and checked; its last part may still be a link."""
        folder, _, last = name.rpartition("/")
        real = self._folders.get(folder)
        if real is None or not last or "\0" in last or "\\" in last or last == ".." or last[1:2] == ":":
            parts = name.split("/")
            if (
                not name
                or "\0" in name
                or "\\" in name
                or name.startswith("/")
                or ".." in parts
                or any(len(p) > 1 and p[1] == ":" for p in parts)
            ):
                raise _unsafe(name, where)
            real = os.path.realpath(os.path.join(self._real_root, folder))
            self._check_inside(real, name, where)
            self._folders[folder] = real
        return f"{real}/{last}"

    def _check_inside(self, real: str, name: str, where: dict[str, Any]) -> None:
        if real != self._real_root and not real.startswith(self._real_root.rstrip(os.sep) + os.sep):
            raise _unsafe(name, where, real)

    def size(self, name: str, **where: Any) -> int:
        """Bytes of a regular file; remembered, so a sweep that many samples share is asked for once."""
        size = self._sizes.get(name)
        if size is None:
            try:
                info = os.lstat(self._in_folder(name, where))
                if stat.S_ISLNK(info.st_mode):
                    info = os.stat(self.path(name, **where))
            except OSError as error:
                if isinstance(error, ImkdError):
                    raise
                raise _refused(error, name, where) from error
            if not stat.S_ISREG(info.st_mode):
                raise _refused(IsADirectoryError(errno.EISDIR, "not a regular file"), name, where)
            size = self._sizes[name] = info.st_size
        return size

    def read(self, name: str, **where: Any) -> tuple[bytes, int]:
        """(content, crc32c) of one file, read once."""
        view, crc, _ = self.read_into(np.empty(0, dtype=np.uint8), name, **where)
        return view.tobytes(), crc

    def read_into(self, buffer: NDArray[np.uint8], name: str, **where: Any) -> tuple[NDArray[np.uint8], int, NDArray[np.uint8]]:
        """(content, crc32c, buffer): the content is a view of the buffer, which is a larger one where the file needs it."""
        try:
            fd = self._open(name, where)
            try:
                before = os.fstat(fd).st_size
                if before >= len(buffer):
                    buffer = np.empty(before + 1, dtype=np.uint8)
                size = 0  # one byte more is asked for than there should be, so that a file that grows is noticed
                while size < before and (more := os.readv(fd, [buffer[size : before + 1].data])):
                    size += more
            finally:
                os.close(fd)
        except OSError as error:
            if isinstance(error, ImkdError):
                raise
            raise _refused(error, name, where) from error
        if size != before:
            raise InputDataError(
                "file changed while it was read",
                rule="source.changed",
                expected=f"{before:,} bytes",
                found=f"{size:,} bytes or more",
                file=name,
                next="wait until nothing writes to the data set, then plan again",
                **where,
            )
        data = buffer[:size]
        return data, int(google_crc32c.value(data)), buffer  # type: ignore[arg-type]  # takes any read-only buffer

    def _open(self, name: str, where: dict[str, Any]) -> int:
        """A descriptor. The folder is known to lie under the root, and a file that is no link cannot leave it; a link is looked
        at first."""
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(self._in_folder(name, where), flags | getattr(os, "O_NOFOLLOW", 0))
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        return os.open(self.path(name, **where), flags)


def _unsafe(name: str, where: dict[str, Any], real: str | None = None) -> UnsafePathError:
    return UnsafePathError(
        "a file name in the tables leaves the data root",
        rule="path.unsafe",
        expected="a relative path under the data root",
        found=repr(name) if real is None else f"{name!r}, a link to {real!r}",
        file=repr(name),
        next="do not use this data set before knowing who changed it"
        if real is None
        else "link the whole data root instead of a folder in it, or pass the real folder as --dataroot",
        **where,
    )


def _refused(error: OSError, name: str, where: dict[str, Any]) -> ImkdError:
    """The documented error of a failed open or stat (F17): missing 8, no regular file 3, permission and I/O 5."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return SourceMissingError(
            "a sensor file of the tables is missing",
            rule="source.missing",
            file=name,
            next="unpack the archive that holds it (imkd-data doctor groups missing files), then run the same command",
            **where,
        )
    if isinstance(error, IsADirectoryError):
        return InputDataError(
            "not a regular file", rule="source.not_a_file", expected="a file", found="a folder", file=name, **where
        )
    advice = (
        "check the owner and mode of the file"
        if isinstance(error, PermissionError)
        else "check the disk, then run the same command"
    )
    return StorageError(f"cannot read: {error.strerror}", rule="source.io", file=name, next=advice, **where)
