"""Executors: how jobs run. All give the same bytes; each yields ``Done`` as shards finish."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imkd_data.cache.write import ShardJob
from imkd_data.errors import InterruptedBuildError, NoProgressError, UsageError
from pipelines.build.jobs import Common, Done, run_opened, working_notes

__all__ = ["EXECUTORS", "Engine", "Stop", "run_all"]

EXECUTORS = ("sync", "threads", "processes", "dask")


@dataclass(slots=True)
class Stop:
    """Set by a signal: no new jobs; running ones end at the next sample."""

    signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0

    def check(self) -> None:
        """Raise InterruptedBuildError once set."""
        if self.signal:
            raise InterruptedBuildError("interrupted", signal_code=128 + self.signal)


@dataclass(slots=True, kw_only=True)
class Engine:
    """How to run jobs. ``memory_bytes``: limit per worker process. ``stall_s``: no shard done in this time is an error."""

    executor: str
    workers: int
    memory_bytes: int = 2 << 30
    stall_s: float = 1800.0
    stop: Stop = field(default_factory=Stop)
    on_death: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if "://" in self.executor:
            from pipelines.build.dask_engine import check_address

            check_address(self.executor)
        elif self.executor not in EXECUTORS:
            raise UsageError("unknown executor", expected=", ".join([*EXECUTORS, "tcp://HOST:PORT"]), found=self.executor)

    def stalled(self, out: Path, since: float) -> None:
        """Raise NoProgressError when nothing finished for too long."""
        if time.monotonic() - since > self.stall_s:
            running = ", ".join(f"shard {n['shard']:05d} at sample {n['token']}" for n in working_notes(out))
            raise NoProgressError(
                f"no shard finished in {self.stall_s / 60:.3g} minutes",
                rule="watchdog",
                found=running or "no worker has begun a sample",
                next="look at the named samples and the disk; then run the same command again, or raise --stall-minutes",
            )


def run_all(engine: Engine, common: Common, jobs: Sequence[ShardJob]) -> Iterator[Done]:
    """Run all jobs, at most two per worker submitted at a time."""
    kind = engine.executor
    if kind == "sync":
        yield from _sync(engine, common, jobs)
    elif kind == "threads":
        yield from _threads(engine, common, jobs)
    elif kind == "processes":
        from pipelines.build.pool import run_pool

        yield from run_pool(engine, common, jobs)
    else:
        from pipelines.build.dask_engine import run_dask

        yield from run_dask(engine, common, jobs)


def _sync(engine: Engine, common: Common, jobs: Sequence[ShardJob]) -> Iterator[Done]:
    reader = common.spec.reader()
    for job in jobs:
        engine.stop.check()
        try:
            yield run_opened(common, reader, job, engine.stop)
        except InterruptedBuildError:
            engine.stop.check()
            raise


def _threads(engine: Engine, common: Common, jobs: Sequence[ShardJob]) -> Iterator[Done]:
    """Daemon threads: one that hangs cannot keep the program from ending. One reader per thread: readers keep small caches of
    parsed scans and are not asked to be thread-safe."""
    todo: queue.SimpleQueue[ShardJob | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()

    def work() -> None:
        reader = None
        while (job := todo.get()) is not None:
            try:
                reader = reader or common.spec.reader()
                results.put(run_opened(common, reader, job, engine.stop))
            except BaseException as error:
                results.put(error)

    for job in jobs:
        todo.put(job)
    threads = [threading.Thread(target=work, daemon=True, name=f"imkd-build-{i}") for i in range(engine.workers)]
    for thread in threads:
        todo.put(None)
        thread.start()
    last = time.monotonic()
    try:
        for _ in jobs:
            result: Done | BaseException | None = None
            while result is None:
                engine.stop.check()
                engine.stalled(common.out, last)
                with contextlib.suppress(queue.Empty):
                    result = results.get(timeout=0.2)
            last = time.monotonic()
            if isinstance(result, BaseException):
                engine.stop.check()
                raise result
            yield result
    except BaseException:
        engine.stop.signal = engine.stop.signal or 2  # the other threads end at their next sample
        while not todo.empty():
            with contextlib.suppress(queue.Empty):
                todo.get_nowait()
        for _ in threads:
            todo.put(None)
        for thread in threads:
            thread.join(2)
        raise
