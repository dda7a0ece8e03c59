"""Executors: how jobs run. All give the same bytes; each yields ``Done`` as shards finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
    elif kind == "dask" or "://" in kind:
        from pipelines.build.dask_engine import run_dask

        yield from run_dask(engine, common, jobs)
    else:
        raise UsageError("unknown executor", expected=", ".join([*EXECUTORS, "tcp://HOST:PORT"]), found=kind)


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
    """One reader per thread: readers keep small caches of parsed scans and are not asked to be thread-safe."""
    import threading

    local = threading.local()

    def work(job: ShardJob) -> Done:
        if not hasattr(local, "reader"):
            local.reader = common.spec.reader()
        return run_opened(common, local.reader, job, engine.stop)

    todo = iter(jobs)
    with ThreadPoolExecutor(engine.workers, thread_name_prefix="imkd-build") as pool:
        running: set[Future[Done]] = set()
        last = time.monotonic()
        try:
            while True:
                while len(running) < engine.workers * 2 and (job := next(todo, None)) is not None:
                    running.add(pool.submit(work, job))
                if not running:
                    return
                done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                engine.stop.check()
                for future in done:
                    last = time.monotonic()
                    yield future.result()
                engine.stalled(common.out, last)
        except BaseException:
            engine.stop.signal = engine.stop.signal or 2
            pool.shutdown(wait=False, cancel_futures=True)
            raise
