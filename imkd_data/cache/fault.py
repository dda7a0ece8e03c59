"""Named places where a test can make the machine fail. Nothing happens unless ``IMKD_FAULT`` is set.

``IMKD_FAULT=point:mode:n`` acts at the n-th time (per process, default 1; ``*`` = every time) that ``point`` is reached.
Modes: kill (SIGKILL), exit, segfault, enospc, edquot, eio, estale, eperm, sleep (an hour), pause (2 s), allocate, error.
``IMKD_FAULT_ONCE=FILE`` limits it to the first process that can create FILE. Several faults are joined by ``;``.
"""

from __future__ import annotations

import errno
import os
import signal
import time

__all__ = ["POINTS", "point"]

_COUNTS: dict[str, int] = {}

# Every named point of a commit, in order; tests are parametrised over this list. `<kind>` is data, receipt, index, ...
COMMIT_STEPS = ("begin", "created", "written", "fsynced", "checked", "renamed", "done")
COMMIT_KINDS = ("recipe", "group", "array", "notice", "data", "receipt", "index", "manifest")
POINTS: tuple[str, ...] = (
    *(f"{kind}.{step}" for kind in COMMIT_KINDS for step in COMMIT_STEPS),
    *("shard.begin", "shard.encoded", "remove.manifest", "remove.receipt", "remove.data"),
)


def point(name: str) -> None:
    """Fail here if the environment says so."""
    spec = os.environ.get("IMKD_FAULT")
    if not spec:
        return
    for one in spec.split(";"):
        wanted, _, rest = one.partition(":")
        if wanted != name:
            continue
        mode, _, nth = rest.partition(":")
        _COUNTS[one] = _COUNTS.get(one, 0) + 1
        if (nth == "*" or _COUNTS[one] == int(nth or 1)) and _first():
            _act(mode, name)


def _first() -> bool:
    latch = os.environ.get("IMKD_FAULT_ONCE")
    if not latch:
        return True
    try:
        os.close(os.open(latch, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _act(mode: str, name: str) -> None:
    numbers = {"enospc": errno.ENOSPC, "eio": errno.EIO, "estale": errno.ESTALE, "edquot": errno.EDQUOT, "eperm": errno.EPERM}
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "exit":
        os._exit(17)
    elif mode == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif mode in numbers:
        raise OSError(numbers[mode], f"injected {mode} at {name}")
    elif mode in ("sleep", "pause"):
        time.sleep(3600 if mode == "sleep" else 2)
    elif mode == "allocate":
        hog = []
        while True:
            hog.append(bytearray(os.urandom(1 << 20)) * 16)
            time.sleep(0.005)
    elif mode == "error":
        raise RuntimeError(f"injected error at {name}")
    else:
        raise ValueError(f"IMKD_FAULT: unknown mode {mode!r}")
