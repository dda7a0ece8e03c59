"""Build a cache: plan -> shards -> index -> manifest -> quick verify. Resumable; equal bytes however it runs."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imkd_data.cache.commit import storage_error
from imkd_data.cache.extend import finish_pending
from imkd_data.cache.plan import Plan, make_plan
from imkd_data.cache.write import Options
from imkd_data.errors import DiskFullError, ImkdError, InputDataError, InterruptedBuildError, UsageError
from imkd_data.fields.base import CacheField
from imkd_data.sample import Reader
from pipelines.build import finish
from pipelines.build.engine import Engine, Stop, run_all
from pipelines.build.estimate import cores, low_bytes
from pipelines.build.jobs import Common, Done, clear_notes, jobs_of
from pipelines.build.lock import build_lock
from pipelines.build.request import Asked, Resolved, merged, resolve

__all__ = ["BuildResult", "Event", "build", "execute"]

ON_ERROR = ("fail", "quarantine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of progress. ``kind``: tables, plan, dropped, shard, death, end. ``done`` and ``total`` count samples."""

    kind: str
    text: str
    done: int = 0
    total: int = 0
    shard: Done | None = None


Progress = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build did. ``rebuilt``: (field, shard) pairs; ``quarantined``: tokens with holes; ``left_out``: fields whose
    sensors are not declared; ``missing_scenes``: with ``scenes="available"``; ``dropped_fields``: those that another command
    added and that no longer fit, with the line that says how to make them again."""

    out: Path
    id: str
    samples: int
    shards: int
    rebuilt: tuple[tuple[str, int], ...]
    quarantined: tuple[str, ...]
    left_out: Mapping[str, str]
    missing_scenes: Mapping[str, str]
    dropped: Mapping[str, int]
    dropped_fields: Mapping[str, str]
    warnings: Mapping[str, int]
    bytes: int
    files: int
    seconds: float
    peak_rss_worker: int
    deaths: int = 0


def build(
    *,
    dataroot: str | os.PathLike[str],
    version: str | None = None,
    splits: Sequence[str] | None = None,
    out: str | os.PathLike[str],
    sensors: Sequence[str] | None = None,
    profile: str | None = None,
    fields: Sequence[str | CacheField] | None = None,
    recipe_overrides: Mapping[str, Any] | None = None,
    scenes: str | Sequence[str] | None = None,
    dataset: str | None = None,
    reader: Callable[..., Reader] | None = None,
    executor: str = "dask",
    workers: int | None = None,
    memory_bytes: int = 2 << 30,
    on_error: str = "fail",
    max_bad: int = 0,
    update: bool = False,
    fsync: bool = True,
    stall_minutes: float = 30.0,
    break_lock: bool = False,
    check_space: bool = True,
    strict: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Build or continue a cache in ``out`` (a local or mounted folder).

    ``fields``: names and CacheField values of your own, e.g. ``[*PROFILES["standard"], my_field]``; fields and readers of
    your own must live in a module that workers can import, or in ``__main__``. ``reader``: a callable like
    ``open_nuscenes``. Defaults: the ``standard`` profile, all scenes, all sensors. With ``update`` what is not given is
    taken from the cache, and fields, splits and scenes are added to those it has.

    Raises UsageError, RecipeError, SourceMissingError, InputDataError, StorageError, LockedError, MismatchError,
    NoProgressError, InterruptedBuildError.
    """
    if on_error not in ON_ERROR:
        raise UsageError("unknown value of on_error", expected=", ".join(ON_ERROR), found=on_error)
    engine = Engine(executor=executor, workers=workers or cores(), memory_bytes=memory_bytes, stall_s=stall_minutes * 60)
    if fields is not None and not fields:
        raise InputDataError("no fields to build", rule="fields.empty")
    asked = Asked(
        dataroot=Path(dataroot),
        version=version,
        splits=splits,
        sensors=sensors,
        profile=profile,
        fields=fields,
        overrides=recipe_overrides or {},
        scenes=scenes,
        dataset=dataset,
        reader=reader,
        strict=strict,
    )
    resolved = resolve(merged(asked, Path(out)) if update else asked)
    return execute(
        resolved,
        Path(out),
        engine=engine,
        options=Options(fsync=fsync, quarantine=on_error == "quarantine"),
        max_bad=max_bad,
        update=update,
        break_lock=break_lock,
        check_space=check_space,
        progress=progress,
    )


def execute(
    resolved: Resolved,
    out: Path,
    *,
    engine: Engine,
    options: Options,
    max_bad: int = 0,
    update: bool = False,
    break_lock: bool = False,
    check_space: bool = True,
    retry_holes: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Plan and build a resolved request."""
    started = time.monotonic()
    tell = progress or (lambda event: None)
    finish.prepare_folder(out)
    with build_lock(out, break_lock):
        finish.clean_dead_temp(out)
        finish_pending(out)
        clear_notes(out)
        if not update:
            finish.check_recipe(out, resolved.recipe)
        plan = make_plan(
            resolved.reader,
            resolved.recipe,
            resolved.fields,
            out,
            retry_holes=retry_holes,
            missing_ok=options.quarantine,
            progress=lambda done, total, scene: tell(Event(kind="tables", text=scene, done=done, total=total)),
        )
        finish.check_versions(out, plan, update=update)
        todo = sum(len(plan.shards[s]) for s in {q.shard for q in plan.queue})
        tell(Event(kind="plan", text=_plan_text(plan), done=plan.num_samples - todo, total=plan.num_samples))
        dropped_fields = {one.field: finish.dropped_line(one, out) for one in plan.dropped}
        for line in dropped_fields.values():
            tell(Event(kind="dropped", text=line))
        if check_space:
            _check_space(out, plan)
        finish.write_start(out, plan, update=update, fsync=options.fsync)
        token = secrets.token_hex(4)
        common = Common(
            spec=replace(resolved.spec, dataroot=resolved.spec.dataroot.expanduser().resolve()),
            recipe=resolved.recipe,
            fields=resolved.fields,
            out=out.resolve(),
            options=options,
            stop_file=out.resolve() / "logs" / "working" / f"stop-{token}",
            token=token,
        )
        tally = _run(engine, common, plan, out, tell)
        engine.stop.check()
        end = finish.write_end(out, plan, fsync=options.fsync)
        _log(out, {"end": end, "seconds": time.monotonic() - started, "executor": engine.executor, "workers": engine.workers})
    from imkd_data.cache.manifest import read_manifest

    result = BuildResult(
        out=out,
        id=read_manifest(out)["id"],
        samples=plan.num_samples,
        shards=len(plan.shards),
        rebuilt=tuple((q.field, q.shard) for q in plan.queue),
        quarantined=tuple(end["quarantined"]),
        left_out=resolved.left_out,
        missing_scenes=resolved.missing_scenes,
        dropped=end["dropped"],
        dropped_fields=dropped_fields,
        warnings={**dict(getattr(resolved.reader, "warnings", None) or {}), **tally.warnings},
        bytes=end["bytes"],
        files=end["files"],
        seconds=time.monotonic() - started,
        peak_rss_worker=tally.peak_rss,
        deaths=tally.deaths,
    )
    if len(result.quarantined) > max_bad:
        raise InputDataError(
            f"{len(result.quarantined)} samples are quarantined; the rest is built",
            rule="quarantine",
            token=result.quarantined[0],
            file=str(out / "logs" / "failures.jsonl"),
            next=f"see the list; then `imkd-data repair`, or accept them with --max-bad {len(result.quarantined)}",
        )
    tell(Event(kind="end", text="complete", done=plan.num_samples, total=plan.num_samples))
    return result


@dataclass(slots=True)
class _Tally:
    samples: int = 0
    peak_rss: int = 0
    deaths: int = 0
    warnings: dict[str, int] = field(default_factory=dict)


def _run(engine: Engine, common: Common, plan: Plan, out: Path, tell: Progress) -> _Tally:
    tally = _Tally()
    jobs = jobs_of(plan)
    total = sum(len(j.tokens) for j in jobs)

    def died(text: str) -> None:
        tally.deaths += 1
        tell(Event(kind="death", text=text, done=tally.samples, total=total))
        _log(out, {"death": text})

    engine.on_death = died
    try:
        with _signals(engine.stop):
            for done in run_all(engine, common, jobs):
                tally.samples += done.samples
                tally.peak_rss = max(tally.peak_rss, done.peak_rss)
                for name, count in done.warnings.items():
                    tally.warnings[name] = tally.warnings.get(name, 0) + count
                _record(out, done, tally.samples, total)
                tell(Event(kind="shard", text=plan.shards[done.shard].label, done=tally.samples, total=total, shard=done))
    except InterruptedBuildError as error:
        error.details.setdefault("kept", _kept(plan, out))
        error.details.setdefault("next", "run the same command again; it continues where it stopped")
        raise
    except ImkdError as error:
        error.details.setdefault("kept", _kept(plan, out))
        error.details.setdefault("next", "repair the input, then run the same command; or add --on-error quarantine")
        raise
    return tally


def _kept(plan: Plan, out: Path) -> str:
    from imkd_data.cache.layout import receipt_path

    whole = sum(all(receipt_path(out, n, s.number).is_file() for n in plan.fields) for s in plan.shards)
    return f"{whole} of {len(plan.shards)} shards are complete and unchanged"


def _plan_text(plan: Plan) -> str:
    shards = len({q.shard for q in plan.queue})
    return f"{plan.num_samples} samples in {len(plan.shards)} shards; {shards} shards to build, {len(plan.queue)} files"


def _check_space(out: Path, plan: Plan) -> None:
    """Refuse a disk that cannot even hold a low estimate. The estimate is the published size per sample of each field."""
    shards = {s.number: len(s) for s in plan.shards}
    need = sum(low_bytes(q.field, shards[q.shard]) for q in plan.queue)
    try:
        status = os.statvfs(out)
    except OSError as error:
        raise storage_error(error, out) from error
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise DiskFullError(
            "the disk is too small for what is to be built",
            rule="preflight.space",
            file=str(out),
            expected=f"about {need / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB free",
            next="free some space, choose another --out, or a smaller --profile",
        )


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """First SIGINT or SIGTERM: stop in order. Second: at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: object) -> None:
        if stop.signal:
            from pipelines.build.pool import kill_children

            kill_children()
            os._exit(128 + number)
        stop.signal = number

    old = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def _record(out: Path, done: Done, samples: int, total: int) -> None:
    """Cost ledger, failures and a file to poll, all outside the cache's identity."""
    cost = {"shard": done.shard, "fields": list(done.fields), "samples": done.samples, "bytes": done.bytes}
    _log(out, {**cost, "seconds": round(done.seconds, 3), "pid": done.pid, "peak_rss": done.peak_rss}, "cost.jsonl")
    for name, token, reason in done.holes:
        _log(out, {"field": name, "token": token, "reason": reason, "shard": done.shard}, "failures.jsonl")
    with contextlib.suppress(OSError):
        temp = out / "logs" / ".progress"
        temp.write_text(json.dumps({"samples": samples, "total": total, "time": time.time()}))
        temp.replace(out / "logs" / "progress.json")


def _log(out: Path, entry: dict[str, Any], name: str = "build.jsonl") -> None:
    with contextlib.suppress(OSError):
        (out / "logs").mkdir(exist_ok=True)
        with open(out / "logs" / name, "a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **entry}) + "\n")
