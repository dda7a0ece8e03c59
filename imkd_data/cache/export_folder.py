"""The output folder of an export: many files, resumable after any crash, read back before the receipt says "whole"."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c

from imkd_data.cache import fault
from imkd_data.cache.commit import storage_error
from imkd_data.errors import LockedError, StorageError, UsageError
from imkd_data.recipe import canonical_json

__all__ = ["ExportFolder"]

_PROGRESS, _RECEIPT = ".imkd-export.jsonl", "imkd-export.json"
_PARTIAL = re.compile(r"^\..+\.[0-9a-f]{8}\.partial$")


class ExportFolder:
    """The folder ``out`` of one export; a context manager that holds it against a second run of the same command.

    identity: what is exported how (JSON); the same command continues its own work. notice: the licence text of the cache.

    Raises UsageError where the folder holds anything else or an export of another identity, LockedError where another
    process writes it.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], notice: bytes) -> None:
        self.out, self.identity, self.notice = out, json.loads(canonical_json(dict(identity))), notice
        self.files: dict[str, list[int]] = {}
        self.done: dict[str, list[str]] = {}
        if out.exists() and not out.is_dir():
            raise UsageError("the output is not a folder", file=str(out), next="choose another --out; nothing was changed")
        out.mkdir(parents=True, exist_ok=True)
        fresh = not any(out.iterdir())
        if not fresh:
            self._refuse_others()
        self._log_file = (out / _PROGRESS).open("ab")
        try:
            fcntl.flock(self._log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._log_file.close()
            raise LockedError("another export writes this folder", file=str(out)) from None
        if fresh:
            self._log({"identity": self.identity})
        else:
            self._resume()

    def __enter__(self) -> ExportFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._log_file.close()

    def _refuse_others(self) -> None:
        try:
            with (self.out / _PROGRESS).open("rb") as log:
                first = json.loads(log.readline())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            first = None
        if first != self.identity:
            raise UsageError(
                "the output folder is not empty" if first is None else "the folder holds an export with other options",
                rule="export.folder",
                expected="an empty folder, or one that the same command began",
                file=str(self.out),
                next="choose another --out; nothing was changed",
            )

    def _resume(self) -> None:
        data = (self.out / _PROGRESS).read_bytes()
        if not data.endswith(b"\n"):  # the run was cut off in the middle of a line
            self._log_file.write(b"\n")
        for line in data.splitlines()[1:]:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if all(self._there(name, value[0]) for name, value in entry["files"].items()):
                    self.files |= entry["files"]
                    self.done[entry["token"]] = list(entry["files"])
        for path in self._partials():
            path.unlink(missing_ok=True)

    def _partials(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.out):
            yield from (Path(folder) / n for n in names if _PARTIAL.match(n))

    def _there(self, name: str, size: int) -> bool:
        try:
            return os.stat(self.out / name).st_size == size
        except OSError:
            return False

    def _log(self, entry: Mapping[str, Any]) -> None:
        try:
            self._log_file.write(canonical_json(dict(entry)))
            self._log_file.flush()
        except OSError as error:
            raise storage_error(error, self.out / _PROGRESS) from error

    def put(self, token: str, files: Mapping[str, bytes]) -> None:
        """Write the files of one sample, each whole or not at all, then note them as done. Nothing to do where they are."""
        if token in self.done:
            return
        entry = {name: [len(data), int(google_crc32c.value(data))] for name, data in files.items()}
        for name, data in files.items():
            path = self.out / name
            partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(data)
                fault.point("export.written")
                os.replace(partial, path)
                fault.point("export.renamed")
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise storage_error(error, path, len(data)) from error
        self._log({"token": token, "files": entry})
        fault.point("export.logged")
        self.files |= entry
        self.done[token] = list(entry)

    def finish(self, facts: Mapping[str, Any]) -> int:
        """Read every file back, compare, and write the receipt. Returns the number of files.

        Raises StorageError naming the first file that is not what was written.
        """
        fault.point("export.verify")
        for name, (size, crc) in sorted(self.files.items()):
            try:
                data = (self.out / name).read_bytes()
            except OSError as error:
                raise storage_error(error, self.out / name) from error
            if len(data) != size or google_crc32c.value(data) != crc:
                raise StorageError(
                    "a file changed after it was written",
                    rule="export.verify",
                    file=str(self.out / name),
                    next="delete it and run the same command again",
                )
        receipt = {"format": 1, **self.identity, **facts, "files": dict(sorted(self.files.items()))}
        self._replace("NOTICE", self.notice)
        self._replace(_RECEIPT, canonical_json(receipt))
        return len(self.files)

    def _replace(self, name: str, data: bytes) -> None:
        partial = self.out / f".{name}.{uuid4().hex[:8]}.partial"
        try:
            partial.write_bytes(data)
            os.replace(partial, self.out / name)
        except OSError as error:
            raise storage_error(error, self.out / name) from error
