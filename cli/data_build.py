"""``imkd-data plan`` and ``imkd-data build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import COUNT, FiniteRange, common, recipe_from_options, recipe_options, size_bytes
from cli.screen import Screen, bytes_text, seconds_text

if TYPE_CHECKING:
    from pipelines.build import BuildResult, Event

__all__ = ["COMMANDS"]


def _show_request(screen: Screen, request: dict[str, Any]) -> None:
    """Every default that was filled in, first."""
    screen.pairs(
        dataroot=request["dataroot"],
        version=request["version"] or "as in the cache",
        split=", ".join(request["splits"] or ["as in the cache"]),
        out=request["out"],
        profile=", ".join(map(str, request["fields"])) if request["fields"] else request["profile"] or "standard",
        scenes=request["scenes"] or "all",
    )


@click.command()
@recipe_options
@click.option(
    "--probe",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="Time N samples on this machine; 0: none.",
)
@click.option("--explain", is_flag=True, help="List every queued field and shard with its reason.")
@click.option(
    "--diff", "diff", type=click.Path(exists=True, path_type=Path), help="Show how the recipe differs from this cache's."
)
@click.option("--hash-inputs", is_flag=True, help="Read all raw files of built shards and compare their content.")
@click.option("--update", is_flag=True, help="Plan a change of an existing cache.")
@click.option("--workers", type=COUNT, help="Workers to assume for the time.  [default: cores]")
@common
def plan(
    screen: Screen,
    probe: int,
    explain: bool,
    diff: Path | None,
    hash_inputs: bool,
    update: bool,
    workers: int | None,
    **options: Any,
) -> None:
    """Show what a build would do: samples, shards, bytes, files, time, and why. Writes nothing.

    \b
    Examples:
      imkd-data plan --split trainval
      imkd-data plan --split mini_train --set image_hw_px=396x704 --out C --update --explain
    """
    from pipelines.build.estimate import cores, forecast
    from pipelines.build.finish import dropped_line
    from pipelines.build.planning import plan_only

    request = recipe_from_options(**options, update=update)
    _show_request(screen, request)
    with screen.progress("tables", 1, "scenes") as bar:

        def tables(done: int, total: int, scene: str) -> None:
            bar.total = total
            bar.update(done, scene)

        resolved, made, missing = plan_only(request, update=update, hash_inputs=hash_inputs, progress=tables)
    count = workers or cores()
    result = forecast(resolved, made, request["out"], probe=probe, workers=count)
    if diff is not None:
        from imkd_data.cache.plan import stored_recipe
        from imkd_data.errors import CacheDamageError
        from pipelines.build.finish import recipe_difference

        other = stored_recipe(diff)
        if other is None:
            raise CacheDamageError("this folder is not a cache", file=str(diff))
        for key, (theirs, ours) in recipe_difference(other, resolved.recipe).items():
            screen.say(f"  differs   {key}: {theirs} -> {ours}")
            screen.emit("difference", key=key, cache=theirs, asked=ours)
    screen.say()
    screen.say(f"{made.num_samples:,} samples in {len(made.shards)} shards; {len(made.queue)} files to build")
    for line in result.lines:
        screen.say(f"  {line.field}: {line.reason} ({line.shards} shards, {bytes_text(line.bytes)}{line.time_text})")
    for name, reason in resolved.left_out.items():
        screen.say(f"  {name}: left out, {reason}")
    for name, reason in resolved.missing_scenes.items():
        screen.say(f"  {name}: left out, {reason}")
    for one in made.dropped:
        screen.say(f"  {dropped_line(one, request['out'])}")
    if explain:
        for q in made.queue:
            screen.say(f"  shard {q.shard:05d} {q.field}: {q.reason}")
    screen.pairs(**result.summary())
    if missing is not None:
        screen.say(f"  missing   {missing.details.get('found', missing.what)}")
        screen.say(f"  next      {missing.details.get('next', '')}")
    screen.emit(
        "plan",
        samples=made.num_samples,
        shards=len(made.shards),
        queue=[{"field": q.field, "shard": q.shard, "reason": q.reason} for q in made.queue],
        left_out=dict(resolved.left_out),
        dropped_fields={one.field: dropped_line(one, request["out"]) for one in made.dropped},
        missing_scenes=dict(resolved.missing_scenes),
        missing=missing.as_json() if missing else None,
        **result.as_json(),
    )


@click.command()
@recipe_options
@click.option("--workers", type=COUNT, help="Worker processes.  [default: cores]")
@click.option(
    "--executor", default="dask", show_default=True, metavar="KIND", help="sync, threads, processes, dask or tcp://HOST:PORT."
)
@click.option("--memory", default="2GB", show_default=True, metavar="SIZE", help="Limit per worker process.")
@click.option("--on-error", type=click.Choice(["fail", "quarantine"]), default="fail", show_default=True, help="Bad samples.")
@click.option(
    "--max-bad",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Quarantined samples that still count as success.",
)
@click.option(
    "--on-overflow", type=click.Choice(["stop", "drop-far"]), default="stop", show_default=True, help="Too many depth points."
)
@click.option("--update", is_flag=True, help="Change an existing cache: rebuild what depends on the change, add the rest.")
@click.option("--no-fsync", is_flag=True, help="Faster on scratch disks; not safe against power loss.")
@click.option(
    "--stall-minutes",
    type=FiniteRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Give up when no shard ends in this time.",
)
@click.option("--break-lock", is_flag=True, help="Take over the lock of a build that is surely gone.")
@click.option("--strict", is_flag=True, help="Odd but legal raw files are errors.")
@common
def build(
    screen: Screen,
    workers: int | None,
    executor: str,
    memory: str,
    on_error: str,
    max_bad: int,
    on_overflow: str,
    update: bool,
    no_fsync: bool,
    stall_minutes: float,
    break_lock: bool,
    strict: bool,
    **options: Any,
) -> None:
    """Build a cache, or continue one. The same command resumes after any interruption.

    \b
    Examples:
      imkd-data build --split trainval
      imkd-data build --split mini_train --executor sync --out C
      imkd-data build --out C --update --fields lidar_points      add a field
      imkd-data build --split val --executor tcp://127.0.0.1:8786  a running Dask cluster
    """
    from pipelines.build import build as run

    request = recipe_from_options(**options, update=update, on_overflow=on_overflow)
    _show_request(screen, request)
    with _Watch(screen) as watch:
        result = run(
            **request,
            executor=executor,
            workers=workers,
            memory_bytes=size_bytes(memory),
            on_error=on_error,
            max_bad=max_bad,
            update=update,
            fsync=not no_fsync,
            stall_minutes=stall_minutes,
            break_lock=break_lock,
            strict=strict,
            progress=watch,
        )
    _quick_verify(screen, result.out)
    _last_screen(screen, result)


class _Watch:
    """Build events -> progress on the screen."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.bar: Any = None

    def __enter__(self) -> _Watch:
        return self

    def __call__(self, event: Event) -> None:
        if event.kind == "plan":
            self.screen.say(event.text)
            self.screen.emit("planned", text=event.text, samples=event.total)
            if event.done < event.total:
                self.bar = self.screen.progress("build", event.total - event.done)
                self.bar.__enter__()
        elif event.kind in ("death", "dropped"):
            self.screen.say(f"warning: {event.text}")
            self.screen.emit("warning", text=event.text)
        elif event.kind == "shard":
            self.bar.update(event.done, event.text)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)


def _quick_verify(screen: Screen, out: Path) -> None:
    from imkd_data.cache.verify import verify
    from imkd_data.errors import CacheDamageError

    bad = [p for p in verify(out) if p.severity == "error"]
    if bad:
        raise CacheDamageError(
            "the build ended but the quick check finds damage",
            rule=bad[0].rule,
            file=bad[0].file,
            next=f"imkd-data repair {out}",
        )


def _last_screen(screen: Screen, r: BuildResult) -> None:
    screen.say()
    screen.say(f"complete: {r.samples:,} samples, {r.shards} shards, {bytes_text(r.bytes)} in {r.files:,} files")
    facts: dict[str, Any] = {
        "id": r.id,
        "time": seconds_text(r.seconds),
        "built": f"{len(r.rebuilt)} of {r.files // 2} data files",
    }
    if r.peak_rss_worker:
        facts["peak memory"] = f"{bytes_text(r.peak_rss_worker)} per worker"
    dropped: dict[str, int] = {}
    for name, number in r.dropped.items():  # several fields count the same points
        reason = name.partition(".")[2]
        dropped[reason] = max(dropped.get(reason, 0), number)
    for name, values in (("dropped", dropped), ("warnings", r.warnings)):
        if any(values.values()):
            facts[name] = ", ".join(f"{k} {v:,}" for k, v in sorted(values.items()) if v)
    if r.left_out:
        facts["left out"] = ", ".join(r.left_out)
    if r.missing_scenes:
        facts["scenes left out"] = ", ".join(r.missing_scenes)
    if r.quarantined:
        facts["quarantined"] = f"{len(r.quarantined)} samples"
    if r.deaths:
        facts["worker deaths"] = r.deaths
    screen.pairs(**facts)
    screen.say(f"  next  imkd-data inspect {r.out}   or   imkd train RUN --cache {r.out} --out DIR")
    screen.emit(
        "built",
        out=str(r.out),
        id=r.id,
        samples=r.samples,
        shards=r.shards,
        bytes=r.bytes,
        files=r.files,
        seconds=round(r.seconds, 3),
        rebuilt=len(r.rebuilt),
        dropped=dict(r.dropped),
        warnings=dict(r.warnings),
        left_out=dict(r.left_out),
        dropped_fields=dict(r.dropped_fields),
        missing_scenes=dict(r.missing_scenes),
        quarantined=list(r.quarantined),
        deaths=r.deaths,
        peak_rss_worker=r.peak_rss_worker,
    )


COMMANDS = (plan, build)
