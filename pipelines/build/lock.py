"""The courtesy lock of a build. No safety rests on it: the commit protocol is safe with two builders; the lock only keeps them
from working twice."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imkd_data.cache.commit import storage_error
from imkd_data.errors import LockedError

__all__ = ["build_lock"]


def _process_start(pid: int) -> int | None:
    """Kernel start time of a process; tells a live process from another one with a recycled id."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _me() -> dict[str, Any]:
    pid = os.getpid()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"host": socket.gethostname(), "pid": pid, "user": _user(), "since": started, "start": _process_start(pid)}


def _dead(owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    pid = int(owner["pid"])
    if pid == os.getpid():
        return owner.get("start") != _process_start(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return owner.get("start") is not None and owner["start"] != _process_start(pid)


@contextlib.contextmanager
def build_lock(out: Path, break_lock: bool = False) -> Iterator[None]:
    """Hold ``out/.lock``. A lock of a dead process of this host is taken over; a live or remote one raises LockedError."""
    path = out / ".lock"
    mine = _me()
    for attempt in range(3):
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileExistsError:
            owner = _owner(path)
            if not (break_lock or _dead(owner)) or attempt == 2:
                raise LockedError(
                    "another build holds this folder",
                    rule="lock",
                    file=str(path),
                    found=f"host {owner.get('host')}, pid {owner.get('pid')}, since {owner.get('since')}",
                    next="wait for it; if it is surely gone, add --break-lock",
                ) from None
            path.unlink(missing_ok=True)
            continue
        except OSError as error:
            raise storage_error(error, path) from error
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(mine, file, sort_keys=True)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise storage_error(error, path, 4096) from error
        break
    try:
        yield
    finally:
        if _owner(path) == json.loads(json.dumps(mine)):
            with contextlib.suppress(OSError):
                path.unlink()


def _owner(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
