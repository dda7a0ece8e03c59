"""What travels to a worker, and what a worker does with it: plain values in, receipts' sizes out."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imkd_data.cache.plan import Plan
from imkd_data.cache.write import Options, ShardJob, build_shard
from imkd_data.fields.base import CacheField
from imkd_data.recipe import Recipe
from imkd_data.sample import Reader
from pipelines.build.request import ReaderSpec

__all__ = ["Common", "Done", "jobs_of", "pack", "run_job", "unpack", "working_notes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The same for all jobs of a build."""

    spec: ReaderSpec
    recipe: Recipe
    fields: Mapping[str, CacheField]
    out: Path
    options: Options
    stop_file: Path | None = None  # workers elsewhere stop between samples once it exists
    token: str = ""  # tells the tasks of this build from those of an earlier one on the same cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished job: counts and times, no arrays."""

    shard: int
    fields: tuple[str, ...]
    samples: int
    bytes: int
    seconds: float
    holes: tuple[tuple[str, str, str], ...]  # field, token, reason
    pid: int
    peak_rss: int
    warnings: Mapping[str, int]


def jobs_of(plan: Plan) -> list[ShardJob]:
    """One job per shard that has something to build, in shard order; fields upstream first."""
    from imkd_data.cache.keys import ordered

    queued: dict[int, list[Any]] = {}
    for q in plan.queue:
        queued.setdefault(q.shard, []).append(q)
    out = []
    for number in sorted(queued):
        names = {q.field for q in queued[number]}
        out.append(
            ShardJob(
                shard=plan.shards[number],
                tokens=plan.tokens[number],
                fields=tuple(n for n in ordered(plan.fields) if n in names),
                remove=frozenset(q.field for q in queued[number] if q.remove),
                keys={n: plan.keys[n][number] for n in names},
                inputs={n: plan.inputs[n][number] for n in names},
                parts={n: plan.parts[n] for n in names},
            )
        )
    return out


def pack(common: Common) -> bytes:
    """Bytes for another process. Our own fields travel by name; functions of importable modules, too; others (``__main__``)
    by value."""
    import cloudpickle

    from imkd_data.fields import FIELDS

    own = {f.name: f for f in FIELDS}
    fields = {n: n if own.get(n) is f else f for n, f in common.fields.items()}
    return cloudpickle.dumps((replace(common, fields={}), fields))  # type: ignore[no-any-return]


def unpack(data: bytes) -> Common:
    """Inverse of ``pack``; only ever given bytes that this build made."""
    import cloudpickle

    from imkd_data.fields import FIELDS

    own = {f.name: f for f in FIELDS}
    common: Common
    common, fields = cloudpickle.loads(data)
    return replace(common, fields={n: own[f] if isinstance(f, str) else f for n, f in fields.items()})


_OPEN = threading.local()  # .build: (packed, common, reader), the latest of this thread


def opened(packed: bytes) -> tuple[Common, Reader]:
    """The build's common part and an open reader: tables are read once, not once per shard. One reader per thread, because
    a Dask worker may have several, and readers keep buffers and small caches of parsed scans."""
    if getattr(_OPEN, "build", (None,))[0] != packed:
        common = unpack(packed)
        _OPEN.build = packed, common, common.spec.reader()
    _, common, reader = _OPEN.build
    return common, reader


def run_job(packed: bytes, job: ShardJob, stop: Callable[[], bool] | None = None) -> Done:
    """Build one shard in this process. Runs at least once, maybe more often: it is idempotent."""
    common, reader = opened(packed)
    return run_opened(common, reader, job, stop)


def run_opened(common: Common, reader: Reader, job: ShardJob, stop: Callable[[], bool] | None = None) -> Done:
    """``run_job`` with what is open already."""
    from imkd_data.errors import InterruptedBuildError

    started = time.perf_counter()
    note = _Note(common.out, job)

    def on_sample(position: int, token: str) -> None:
        if stop and stop():
            raise InterruptedBuildError("stopped between two samples")
        note.write(position, token)

    warnings: dict[str, int] = {}
    try:
        with _no_collection():
            receipts = build_shard(job, reader, common.recipe, common.fields, common.out, common.options, on_sample, warnings)
    finally:
        note.close()
    return Done(
        shard=job.shard.number,
        fields=job.fields,
        samples=len(job.tokens),
        bytes=sum(r["bytes"] for r in receipts.values()),
        seconds=time.perf_counter() - started,
        holes=tuple((n, h[1], h[2]) for n, r in receipts.items() for h in r["holes"]),
        pid=os.getpid(),
        peak_rss=peak_rss(),
        warnings=warnings,
    )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A shard makes hundreds of thousands of small objects and no cycles among them: looking for cycles only costs time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def peak_rss() -> int:
    """Largest resident size of this process so far, bytes. From /proc where there is one: getrusage also counts the process
    that started this one."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Note:
    """One line on disk saying what this worker is doing, so that a death names the sample and not a task key."""

    def __init__(self, out: Path, job: ShardJob) -> None:
        self.job = job
        self.path = out / "logs" / "working" / f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.json"
        self.fd = -1
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)

    def write(self, position: int, token: str) -> None:
        if self.fd < 0:
            return
        note = {"shard": self.job.shard.number, "position": position, "token": token, "pid": os.getpid()}
        with contextlib.suppress(OSError):
            os.pwrite(self.fd, json.dumps(note).ljust(300).encode() + b"\n", 0)

    def close(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
                self.path.unlink(missing_ok=True)


def working_notes(out: Path) -> list[dict[str, Any]]:
    """Notes of workers that are running, or died."""
    found = []
    for path in sorted((out / "logs" / "working").glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def clear_notes(out: Path) -> None:
    """Forget the notes of an earlier build."""
    for path in (out / "logs" / "working").glob("*.json"):
        path.unlink(missing_ok=True)


def ignore_interrupts() -> None:
    """Workers leave Ctrl-C to the parent, which stops them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
