"""Dask as the executor: a local cluster of processes, or a running one by address. Not the data model: no Dask arrays."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from imkd_data.cache.write import ShardJob
from imkd_data.errors import ImkdError, InputDataError, NoProgressError, SourceMissingError, UsageError
from pipelines.build.jobs import Common, Done, pack, run_job
from pipelines.build.pool import TRIES, Deaths, _interrupts_ignored

if TYPE_CHECKING:
    from pipelines.build.engine import Engine

__all__ = ["check_address", "run_dask"]

CONNECT_S = 20


def _work(packed: bytes, job: ShardJob) -> Done:
    """A Dask task: one shard. Stops between samples once the build's stop file is there."""
    from pipelines.build.jobs import opened

    stop = opened(packed)[0].stop_file
    return run_job(packed, job, (lambda: stop.exists()) if stop else None)


@contextlib.contextmanager
def _client(engine: Engine, jobs: int) -> Iterator[Any]:
    """A client of the given scheduler, or of a new local cluster that listens on 127.0.0.1 only and has no dashboard."""
    import dask
    from distributed import Client, LocalCluster

    if "://" in engine.executor:
        try:  # errors of the build pass through here later on, and some of them are OSErrors
            client = Client(engine.executor, timeout=CONNECT_S, set_as_default=False)
        except OSError as error:
            raise SourceMissingError(
                "the Dask scheduler does not answer",
                rule="dask.address",
                found=engine.executor,
                next="dask scheduler; then try again",
            ) from error
        with client:
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": TRIES - 1,
        "distributed.worker.memory.terminate": 0.98,
        "distributed.admin.large-graph-warning-threshold": "1GB",
        "distributed.comm.timeouts.connect": "20s",
    }
    with dask.config.set(settings):
        with _interrupts_ignored():
            cluster = LocalCluster(
                n_workers=max(1, min(engine.workers, jobs)),
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,
                memory_limit=engine.memory_bytes,
                silence_logs=logging.CRITICAL,
            )
        try:
            with Client(cluster, set_as_default=False) as client:
                yield client
        finally:
            cluster.close(timeout=8)


def check_address(text: str) -> None:
    """UsageError for what cannot be a scheduler's address; a client made with it would wait at the end of the program."""
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.registry import get_backend

    try:
        scheme, place = parse_address(text)
        get_backend(scheme)
        if scheme in ("tcp", "tls"):
            host, port = parse_host_port(place)
            if not host or not 0 < port < 1 << 16:
                raise ValueError("no host, or no port of 1 to 65535")
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(
            f"not an address: {error}",
            rule="dask.address",
            expected="tcp://HOST:PORT",
            found=text,
            next="give the address that dask scheduler prints",
        ) from error


def run_dask(engine: Engine, common: Common, jobs: Sequence[ShardJob]) -> Iterator[Done]:
    """Jobs as Dask tasks ``build-<split>-shard-<n>``, two per worker in flight. Names the sample when a task kills its workers,
    after all other shards are complete.

    Dask blames every task that a dead worker held, also those that waited there and those whose result was not yet sent. A
    blamed shard that was not seen in work is therefore run once more, alone, when all others are through."""
    from distributed import CancelledError, wait
    from distributed.client import FuturesCancelledError

    if not jobs:
        return
    packed = pack(common)
    failed: list[ImkdError] = []
    deaths = Deaths(common.out)
    todo = iter(jobs)
    blamed: list[ShardJob] = []
    alone: set[int] = set()
    running: dict[Any, ShardJob] = {}
    last = time.monotonic()
    with _client(engine, len(jobs)) as client:
        try:
            while True:
                window = 2 * max(1, _workers(client) or engine.workers)
                while len(running) < window and (job := next(todo, None)) is not None:
                    running[client.submit(_work, packed, job, key=_key(job, common), pure=False)] = job
                if not running and blamed:
                    job = blamed.pop(0)
                    alone.add(job.shard.number)
                    running[client.submit(_work, packed, job, key=_key(job, common) + "-alone", pure=False)] = job
                if not running:
                    break
                try:
                    with client.as_current():
                        wait(list(running), timeout=0.5, return_when="FIRST_COMPLETED")
                except TimeoutError:
                    pass
                except (CancelledError, FuturesCancelledError) as error:
                    raise _lost(next(iter(running.values()))) from error
                engine.stop.check()
                for future in [f for f in running if f.done()]:
                    job = running.pop(future)
                    last = time.monotonic()
                    done = _outcome(future, job, engine, deaths, certain=job.shard.number in alone)
                    if isinstance(done, Done):
                        yield done
                    elif done is None:
                        blamed.append(job)
                    else:
                        failed.append(done)
                    future.release()
                _scheduler_alive(client)
                engine.stalled(common.out, last)
        except BaseException:
            if common.stop_file:
                with contextlib.suppress(OSError):
                    common.stop_file.touch()
            with contextlib.suppress(Exception):
                client.cancel(list(running), force=True)
            _drain(list(running))
            raise
    if failed:
        raise (
            failed[0]
            if len(failed) == 1
            else InputDataError(failed[0].what, rule=failed[0].rule, problems=tuple(failed), **failed[0].details)
        )


def _key(job: ShardJob, common: Common) -> str:
    return f"build-{job.shard.split}-shard-{job.shard.number:05d}-{common.token}"


def _outcome(future: Any, job: ShardJob, engine: Engine, deaths: Deaths, certain: bool) -> Done | ImkdError | None:
    """The result, the error of a shard that kills its workers, or None where the shard may only have been beside such a one
    (``certain``: it was alone). Errors of the shard itself are raised."""
    from distributed import CancelledError, KilledWorker
    from distributed.client import FuturesCancelledError

    try:
        return future.result()  # type: ignore[no-any-return]
    except KilledWorker as error:
        if not certain and not deaths.seen(job.shard.number):
            return None
        for _ in range(TRIES):
            deaths.add(job.shard.number, None, "worker died (killed, crashed or out of memory)")
        if engine.on_death:
            engine.on_death(f"shard {job.shard.label}: {error}")
        return deaths.error(job)
    except (CancelledError, FuturesCancelledError) as error:
        raise _lost(job) from error


def _lost(job: ShardJob) -> NoProgressError:
    return NoProgressError(
        "the Dask scheduler lost its tasks or is gone",
        rule="dask.lost",
        shard=job.shard.label,
        next="run the same command again",
    )


def _workers(client: Any) -> int:
    try:
        return len(client.scheduler_info(n_workers=-1)["workers"])
    except (TypeError, KeyError, OSError):
        return 0


def _scheduler_alive(client: Any) -> None:
    if client.status not in ("running", "connecting", "newly-created"):
        raise NoProgressError(
            "the Dask scheduler is gone", rule="dask.lost", found=client.status, next="run the same command again"
        )


def _drain(futures: Sequence[Any]) -> None:
    """Give running samples a moment to end; their shards stay unbuilt."""
    time.sleep(0.2 if futures else 0)
