"""Worker processes of our own: started fresh (never forked), watched one by one, so that a death names its shard and sample,
a memory limit can be kept, and nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imkd_data.cache.write import ShardJob
from imkd_data.errors import ImkdError, InputDataError, InterruptedBuildError
from pipelines.build.jobs import Common, Done, ignore_interrupts, pack, run_job, working_notes

if TYPE_CHECKING:
    from pipelines.build.engine import Engine

__all__ = ["Deaths", "kill_children", "run_pool"]

TRIES = 3
GRACE_S = 8.0


class Deaths:
    """Counts deaths by shard and says which sample was being worked on."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.of: dict[int, list[tuple[str, str]]] = {}

    def add(self, shard: int, pid: int | None, cause: str) -> str:
        """Note one death; returns the sample's token, '' where unknown."""
        tokens = [n["token"] for n in working_notes(self.out) if n["shard"] == shard and pid in (None, n["pid"])]
        token = tokens[-1] if tokens else ""
        self.of.setdefault(shard, []).append((token, cause))
        return token

    def seen(self, shard: int) -> bool:
        """Whether a worker that is gone left a note of having this shard in work."""
        return any(n["shard"] == shard for n in working_notes(self.out))

    def count(self, shard: int) -> int:
        return len(self.of.get(shard, ()))

    def poisoned(self, shard: int) -> str:
        """The sample that was in work at every death, '' where they differ."""
        tokens = {t for t, _ in self.of.get(shard, ())}
        return tokens.pop() if len(tokens) == 1 else ""

    def error(self, job: ShardJob) -> InputDataError:
        """The error after the last try."""
        history = self.of[job.shard.number]
        token = self.poisoned(job.shard.number)
        memory = [c for _, c in history if "memory" in c]
        what = "a sample kills every worker that touches it" if token else "a shard kills every worker that touches it"
        where = token or ", ".join(sorted({t for t, _ in history if t})) or None
        step = "look at the sample's files; or add --on-error quarantine"
        if memory:
            step = "use fewer --workers or more --memory; " + step
        return InputDataError(
            what, rule="worker.death", token=where, shard=job.shard.label, found="; ".join(c for _, c in history), next=step
        )


class _Worker:
    """One process and its pipe."""

    def __init__(self, packed: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, packed, os.getpid()), daemon=True)
        # What is ignored at the start stays ignored in the child: Ctrl-C in a terminal reaches the whole group, also
        # before the child has come far enough to say so itself.
        with _interrupts_ignored(), _quiet_tracker():
            self.process.start()
        theirs.close()
        self.job: ShardJob | None = None
        self.cause = ""

    def give(self, job: ShardJob) -> bool:
        """Hand over a job; False where the process has ended, or is about to."""
        if self.cause:
            return False
        try:
            self.pipe.send(job)
        except OSError:
            return False
        self.job = job
        return True

    def rss(self) -> int:
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            return 0

    def end(self, kill: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.pipe.close()
        if kill and self.process.is_alive():
            self.process.kill()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet_tracker() -> Iterator[None]:
    """Python's resource tracker inherits our warning options when it starts. A killed worker leaves a lock of a codec library
    to it, which it cleans up; its warning about that would only alarm."""
    option = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(option)
    try:
        yield
    finally:
        sys.warnoptions.remove(option)


def _serve(pipe: Connection, packed: bytes, parent: int) -> None:
    """A worker's life: jobs in, results out, until the pipe closes."""
    ignore_interrupts()
    _die_with_parent(parent)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        stopped.clear()
        try:
            answer: tuple[str, Any] = ("done", run_job(packed, job, lambda: bool(stopped)))
        except BaseException as error:
            answer = ("error", _portable(error))
        try:
            pipe.send(answer)
        except (OSError, BrokenPipeError):
            return


def _portable(error: BaseException) -> BaseException:
    """The error itself if it survives pickling, else its text."""
    text = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, ImkdError):
        copy.add_note(text)
    return copy  # type: ignore[no-any-return]


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent is gone, so that a killed build leaves no orphans."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


_LIVE: set[_Worker] = set()


def kill_children() -> None:
    """At once: for the second Ctrl-C."""
    for worker in list(_LIVE):
        worker.process.kill()


def run_pool(engine: Engine, common: Common, jobs: Sequence[ShardJob]) -> Iterator[Done]:
    """Jobs over ``engine.workers`` processes. A shard whose worker dies is tried three times; then its sample is named, after
    all other shards are complete."""
    if not jobs:
        return
    packed = pack(common)
    todo = deque(jobs)
    deaths = Deaths(common.out)
    failed: list[ImkdError] = []
    workers = [_Worker(packed) for _ in range(max(1, min(engine.workers, len(todo))))]
    _LIVE.update(workers)
    last = time.monotonic()
    try:
        while todo or any(w.job for w in workers):
            engine.stop.check()
            for worker in workers:
                if worker.job is None and todo and worker.give(todo[0]):
                    todo.popleft()
            for worker in _ready(workers):
                job = worker.job
                result = _result(worker)
                if isinstance(result, Done):
                    last = time.monotonic()
                    yield result
                elif isinstance(result, InterruptedBuildError) and not engine.stop():
                    # The signal went to the whole group: ours may arrive a moment later; if it does not, go on.
                    time.sleep(0.2)
                    engine.stop.check()
                    if job is not None:
                        todo.append(job)
                elif isinstance(result, BaseException):
                    engine.stop.check()
                    raise result
                else:
                    last = time.monotonic()
                    _bury(worker, engine, common, deaths, todo, failed)
                    workers.remove(worker)
                    _LIVE.discard(worker)
                    workers.append(_Worker(packed))
                    _LIVE.add(workers[-1])
            _watch_memory(workers, engine)
            engine.stalled(common.out, last)
    except BaseException as error:
        _stop_in_order(workers, isinstance(error, InterruptedBuildError))
        raise
    finally:
        for worker in workers:
            worker.end()
        _LIVE.difference_update(workers)
    if failed:
        raise (
            failed[0]
            if len(failed) == 1
            else InputDataError(failed[0].what, rule=failed[0].rule, problems=tuple(failed), **failed[0].details)
        )


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    handles: dict[Any, _Worker] = {}
    for w in workers:
        handles[w.pipe], handles[w.process.sentinel] = w, w
    found = wait(list(handles), timeout=0.25)
    return [w for w in workers if w.pipe in found or w.process.sentinel in found]


def _result(worker: _Worker) -> Done | BaseException | None:
    """What the worker sent; None when it died."""
    try:
        if worker.pipe.poll():
            _, value = worker.pipe.recv()
            worker.job = None
            return value  # type: ignore[no-any-return]
    except (EOFError, OSError):
        pass
    return None


def _bury(
    worker: _Worker, engine: Engine, common: Common, deaths: Deaths, todo: deque[ShardJob], failed: list[ImkdError]
) -> None:
    worker.process.join(5)
    code, job = worker.process.exitcode, worker.job
    worker.end(kill=True)
    cause = worker.cause or (f"signal {-code}" if code is not None and code < 0 else f"exit status {code}")
    if job is None:
        return
    number = job.shard.number
    token = deaths.add(number, worker.process.pid, cause)
    if engine.on_death:
        engine.on_death(f"a worker died ({cause}) in shard {job.shard.label}" + (f" at sample {token}" if token else ""))
    if deaths.count(number) % TRIES:
        todo.append(job)
    elif common.options.quarantine and deaths.poisoned(number):
        todo.append(replace(job, skip=job.skip | {deaths.poisoned(number)}))
        deaths.of.pop(number)
    else:
        failed.append(deaths.error(job))


def _watch_memory(workers: Sequence[_Worker], engine: Engine) -> None:
    for worker in workers:
        seen = worker.rss()
        if seen > engine.memory_bytes and not worker.cause:
            limit = engine.memory_bytes
            worker.cause = f"killed for memory: {seen / 2**20:,.0f} MiB seen, limit {limit / 2**20:,.0f} MiB"
            worker.process.kill()


def _stop_in_order(workers: Sequence[_Worker], grace: bool) -> None:
    """Let running samples end, then kill."""
    for worker in workers:
        if worker.process.is_alive():
            worker.process.terminate()
    end = time.monotonic() + (GRACE_S if grace else 1.0)
    for worker in workers:
        while worker.job and worker.process.is_alive() and time.monotonic() < end:
            if worker.pipe.poll(0.05):
                break
        worker.end(kill=True)
