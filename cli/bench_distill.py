"""``imkd bench distill``: the four methods against their twins on one synthetic world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

__all__ = ["distill", "seeds_from"]

PATH = click.Path(path_type=Path)


def seeds_from(text: str) -> tuple[int, ...]:
    """``0..5`` or ``0,2,4`` -> whole numbers."""
    from imkd_data.errors import UsageError

    try:
        first, dots, last = text.partition("..")
        seeds = tuple(range(int(first), int(last) + 1)) if dots else tuple(int(s) for s in text.split(","))
    except ValueError:
        raise UsageError("seeds are FIRST..LAST or a list", expected="0..5 or 0,1,2", found=text) from None
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise UsageError("seeds are FIRST..LAST or a list, from 0 and without repeats", expected="0..5 or 0,1,2", found=text)
    return seeds


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(n for n in (text or "").split(",") if n)


@click.command("distill")
@click.option("--preset", default="tiny", show_default=True, help="smoke, tiny or long (CPU), small (one GPU) or nuscenes.")
@click.option("--seeds", default="0..5", show_default=True)
@click.option(
    "--out",
    type=PATH,
    default=Path("bench/distill"),
    show_default=True,
    help="The same command continues it, also beside itself.",
)
@click.option("--blocks", default="main", show_default=True, help="main,controls,ablations,defects; --rows names rows of any.")
@click.option("--methods", help="Only these methods, comma-separated.")
@click.option("--rows", help="Only these rows, of whatever block, and the twins they are compared with.")
@click.option("--world", type=PATH, help="An existing tree instead of OUT/world.")
@click.option("--cache", type=PATH, help="Its cache instead of OUT/cache.")
@click.option(
    "--materials",
    default="class",
    show_default=True,
    type=click.Choice(["class", "independent"]),
    help="What decides reflectivity, also that of --world. Independent ones with --out OUT/independent stand in OUT's table.",
)
@click.option("--accelerator", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--devices", default=1, show_default=True, type=click.IntRange(min=1), help="Devices of every training.")
@click.option(
    "--engine",
    default="devkit",
    show_default=True,
    type=click.Choice(["devkit", "fast", "none"]),
    help="none: only predict; the same command with an engine scores what is there, also on another machine.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Processes that write the world.")
@click.option("--steps", "steps", multiple=True, metavar="NETWORK=N", help="lidar, label, fusion or student.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting of every run.")
@click.option(
    "--held-in", default=0, type=click.IntRange(min=0), help="Tune: score the last N train scenes, left out of training."
)
@click.option(
    "--try",
    "tries",
    multiple=True,
    metavar="METHOD:K=V,...",
    help="With --held-in: another setting of a method; what it does not name is the method's default.",
)
@click.option("--teachers", type=PATH, help="OUT of another benchmark: use its teachers.")
@click.option("--max-runs", type=click.IntRange(min=0), help="Stop after so many new runs.")
@click.option("--no-admission", is_flag=True, help="Run methods on a world that does not pass; the table says so.")
@click.option("--docs", type=PATH, help="Also write results.json and results.md there, with the scene bootstrap.")
@click.option(
    "--also",
    multiple=True,
    type=PATH,
    metavar="RESULTS.json",
    help="An earlier table of this benchmark: its rows stand in this one too and are not run again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def distill(
    preset: str,
    seeds: str,
    out: Path,
    blocks: str,
    methods: str | None,
    rows: str | None,
    world: Path | None,
    cache: Path | None,
    materials: str,
    accelerator: str,
    devices: int,
    engine: str,
    workers: int,
    steps: tuple[str, ...],
    settings: tuple[str, ...],
    held_in: int,
    tries: tuple[str, ...],
    teachers: Path | None,
    max_runs: int | None,
    no_admission: bool,
    docs: Path | None,
    also: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the distillation methods: system gain, distillation gain, controls, ablations, price of defects."""
    from pipelines.bench_distill import bench_distill
    from pipelines.run import parse_settings

    def tell(tick: Any) -> None:
        if not quiet:
            click.echo(f"[{tick.done}/{tick.total}] {tick.text}", err=True)

    report = bench_distill(
        out=out,
        preset=preset,
        seeds=seeds_from(seeds),
        blocks=_names(blocks),
        methods=_names(methods),
        rows=_names(rows),
        world=world,
        cache=cache,
        materials=materials,
        accelerator=accelerator,
        devices=devices,
        engine=engine,
        workers=workers,
        steps={k: _whole(k, v) for k, v in parse_settings(steps, "--steps").items()},
        settings=parse_settings(settings),
        held_in=held_in,
        tries=tries,
        teachers=teachers,
        max_runs=max_runs,
        admission=False if no_admission else None,
        docs=docs,
        also=also,
        progress=tell,
    )
    if as_json:
        click.echo(json.dumps(report, allow_nan=False))
        return
    for line in report["paired"]:
        low, high = line["low"], line["high"]
        interval = "" if low is None else f"  [{low:+.2f}, {high:+.2f}]"
        click.echo(f"{line['method']:<28} {line['kind']:<14}{line['gain_nds']:+7.2f} NDS{interval}  seeds {len(line['seeds'])}")
    click.echo(f"tables: {out / 'results.md'}" + (f", {docs / 'results.md'}" if docs else ""))


def _whole(name: str, value: str) -> int:
    from imkd_data.errors import UsageError

    if name not in ("lidar", "label", "fusion", "student") or not value.isdecimal() or int(value) < 1:
        raise UsageError(
            "--steps is NETWORK=N", expected="lidar, label, fusion or student = 1, 2, ...", found=f"{name}={value}"
        )
    return int(value)
