"""Resolved tables kept on disk, so that one process parses 2.6 GB of JSON once and every worker maps the result.

A folder per content: its name is the hash of the JSON files' sizes and crc32c, so nothing rests on times or paths, and a stale
entry cannot be found. Every column is checked by crc32c when it is opened. Small data sets are never stored.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import google_crc32c
import numpy as np
import pyarrow as pa

__all__ = ["TABLE_CACHE_VARIABLE", "kept_tables"]

TABLE_CACHE_VARIABLE = "IMKD_TABLE_CACHE"  # another folder, or "off"
_FORMAT = 2  # 2: rows that point nowhere are refused, so entries made before could hide them
_MIN_BYTES = 64 << 20
T = TypeVar("T")


def kept_tables(folder: Path, names: tuple[str, ...], kind: type[T], make: Callable[[], T]) -> T:
    """``make()``, or what it gave for the same table contents before. ``kind``: a dataclass of NumPy arrays, Arrow string
    arrays and JSON lists. Any trouble with the store only means that the tables are made again."""
    root = _root()
    files = [folder / f"{n}.json" for n in names]
    try:
        small = sum(f.stat().st_size for f in files) < _MIN_BYTES
    except OSError:
        return make()  # its errors name the table
    if small or root is None:
        return make()
    try:
        place = root / _key(files, kind)
    except OSError:
        return make()  # its errors name the table
    found = _load(place, kind)
    if found is not None:
        return found
    made = make()
    if not _store(place, made):
        return made
    del made
    pa.default_memory_pool().release_unused()
    return _load(place, kind) or make()


def _root() -> Path | None:
    chosen = os.environ.get(TABLE_CACHE_VARIABLE)
    if chosen == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(chosen) if chosen else Path(base) / "imkd" / "tables"


def _key(files: list[Path], kind: type[Any]) -> str:
    state = sha256(f"{_FORMAT} {[f.name for f in fields(kind)]}".encode())
    for path in files:
        crc, size = google_crc32c.Checksum(), 0
        with path.open("rb") as handle:
            while block := handle.read(8 << 20):
                crc.update(block)
                size += len(block)
        state.update(f"{path.name} {size} {crc.hexdigest().decode()}\n".encode())
    return state.hexdigest()[:40]


def _store(place: Path, tables: Any) -> bool:
    """Written beside, renamed when whole. False when the disk does not let us."""
    partial = place.with_name(f".{place.name}.{uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True, mode=0o700)
        meta: dict[str, Any] = {}
        for item in fields(tables):
            value = getattr(tables, item.name)
            path = partial / item.name
            if isinstance(value, np.ndarray):
                np.save(path.with_suffix(".npy"), value, allow_pickle=False)
                path = path.with_suffix(".npy")
            elif isinstance(value, pa.Array):
                table = pa.table({"value": value})
                with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)
            else:
                path.write_text(json.dumps(value, allow_nan=False), "utf-8")
            meta[path.name] = [path.stat().st_size, _crc(path)]
        (partial / "meta.json").write_text(json.dumps(meta), "utf-8")
        try:
            os.rename(partial, place)
        except OSError:
            if _load(place, type(tables)) is None:  # a damaged entry stands in the way; a good one is another process's
                shutil.rmtree(place, ignore_errors=True)
                os.rename(partial, place)
        return True
    except (OSError, ValueError):
        return False
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _crc(path: Path) -> int:
    if path.stat().st_size == 0:
        return 0
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        crc = google_crc32c.Checksum()
        for start in range(0, len(view), 8 << 20):
            crc.update(view[start : start + (8 << 20)])
        return int.from_bytes(crc.digest(), "big")


def _load(place: Path, kind: type[T]) -> T | None:
    """The tables, memory-mapped; None when there are none or any byte of them is not what was written."""
    try:
        meta = json.loads((place / "meta.json").read_text("utf-8"))
        values: dict[str, Any] = {}
        for item in fields(kind):  # type: ignore[arg-type]
            name = item.name if item.name in meta else f"{item.name}.npy"
            path = place / name
            if [path.stat().st_size, _crc(path)] != meta[name]:
                return None
            if name.endswith(".npy"):
                values[item.name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            elif path.open("rb").read(6) == b"ARROW1":
                column = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["value"]
                values[item.name] = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
            else:
                values[item.name] = json.loads(path.read_text("utf-8"))
        return kind(**values)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
