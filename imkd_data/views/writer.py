"""Writing an export: many small files, resumable, and checked by reading them back before the receipt says "whole"."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c

from imkd_data.errors import StorageError, UsageError
from imkd_data.recipe import canonical_json

__all__ = ["ExportFolder", "pickled"]

_PROGRESS, _RECEIPT = ".imkd-export.jsonl", "imkd-export.json"


def pickled(value: Any) -> bytes:
    """The form in which the public code bases keep their infos. We only ever write it; nothing of ours reads a pickle."""
    sink = io.BytesIO()
    pickle.dump(value, sink, protocol=4)
    return sink.getvalue()


class ExportFolder:
    """The output folder of one export. ``identity`` says what is exported how; the same command continues its own work.

    Raises UsageError where the folder holds anything else, or an export of another identity.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], notice: bytes) -> None:
        self.out, self.identity, self.notice = out, json.loads(canonical_json(dict(identity))), notice
        self.files: dict[str, list[int]] = {}
        self.done: dict[str, list[str]] = {}
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            self._resume()
        else:
            self._log({"identity": self.identity})

    def _resume(self) -> None:
        try:
            lines = (self.out / _PROGRESS).read_text("utf-8").splitlines()
            first = json.loads(lines[0])["identity"]
        except (OSError, ValueError, IndexError, KeyError):
            first = None
        if first != self.identity:
            raise UsageError(
                "the output folder is not empty" if first is None else "the folder holds an export with other options",
                rule="export.folder",
                expected="an empty folder, or one that the same command began",
                file=str(self.out),
                next="choose another --out; nothing was changed",
            )
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of an interrupted run
                continue
            if all(self._there(name, value[0]) for name, value in entry["files"].items()):
                self.files |= entry["files"]
                self.done[entry["token"]] = list(entry["files"])

    def _there(self, name: str, size: int) -> bool:
        try:
            return os.stat(self.out / name).st_size == size
        except OSError:
            return False

    def _log(self, entry: Mapping[str, Any]) -> None:
        with (self.out / _PROGRESS).open("ab") as handle:
            handle.write(canonical_json(dict(entry)))

    def put(self, token: str, files: Mapping[str, bytes]) -> None:
        """Write the files of one sample, each whole or not at all, then note them as done."""
        entry = {name: [len(data), int(google_crc32c.value(data))] for name, data in files.items()}
        for name, data in files.items():
            path = self.out / name
            partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(data)
                os.replace(partial, path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise StorageError(f"cannot write: {error.strerror}", rule="export.write", file=str(path)) from error
        self._log({"token": token, "files": entry})
        self.files |= entry
        self.done[token] = list(entry)

    def finish(self, facts: Mapping[str, Any]) -> int:
        """Read every file back, compare, and write the receipt. Returns the number of files."""
        for name, (size, crc) in sorted(self.files.items()):
            data = (self.out / name).read_bytes()
            if len(data) != size or google_crc32c.value(data) != crc:
                raise StorageError(
                    "a file changed after it was written",
                    rule="export.verify",
                    file=str(self.out / name),
                    next="delete it and run the same command again",
                )
        (self.out / "NOTICE").write_bytes(self.notice)
        receipt = {"format": 1, **self.identity, **facts, "files": dict(sorted(self.files.items()))}
        (self.out / _RECEIPT).write_bytes(canonical_json(receipt))
        return len(self.files)
