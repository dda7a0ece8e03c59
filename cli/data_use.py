"""``imkd-data inspect``, ``export``, ``bench`` and ``synth``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cli.options import COUNT, SECONDS, common
from cli.screen import Screen, bytes_text

__all__ = ["COMMANDS"]

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("cache", type=PATH)
@click.option("--sample", "token", metavar="TOKEN", help="A sample token; default: the first one.")
@click.option("--field", metavar="F", help="Only this field.")
@click.option("--stats", is_flag=True, help="Statistics of every field over some samples.")
@click.option("--select", "select", metavar="EXPR", help="Samples by the index, e.g. 'night and class_counts.car >= 3'.")
@click.option(
    "--open", "picture", type=PATH, metavar="PNG|HTML", help="Write one picture of the sample; with --stats of the histograms."
)
@click.option("--compare", type=PATH, metavar="CACHE2", help="Compare with another cache.")
@common
def inspect(
    screen: Screen,
    cache: Path,
    token: str | None,
    field: str | None,
    stats: bool,
    select: str | None,
    picture: Path | None,
    compare: Path | None,
) -> None:
    """Look into a cache: channels, units, sizes, statistics, one picture.

    \b
    Examples:
      imkd-data inspect C
      imkd-data inspect C --stats --select night
      imkd-data inspect C --sample ca9a282c9e77460f8360f564131a8af5 --open sample.png
    """
    from imkd_data.cache.store import open_cache
    from imkd_data.errors import UsageError
    from pipelines import inspect as module

    opened = open_cache(cache)
    rows = opened.select(select) if select else opened.rows()
    for name, value in module.summary(opened, rows).items():
        screen.out(f"{name:<12} {value}")
        screen.emit("summary", name=name, value=value)
    if not len(rows) and (stats or (picture is not None and not token)):
        raise UsageError("no sample matches", found=select or "an empty cache", next="imkd-data inspect CACHE --select ...")
    if compare is not None:
        lines = module.compare(opened, open_cache(compare))
        for line in lines:
            screen.out(line)
        screen.emit("compared", lines=lines, equal=not any("differ" in line for line in lines))
        return
    screen.out("")
    for entry in module.describe(opened, field, rows if stats else rows[:0]):
        screen.out(entry.text)
        screen.emit("field", **entry.values)
    row = opened.row(token) if token else int(rows[0]) if len(rows) else None
    if token and row is not None:
        screen.out("")
        for name, value in module.sample_facts(opened, row).items():
            screen.out(f"{name:<20} {value}")
            screen.emit("sample", name=name, value=value)
    if stats and len(rows) and (picture is not None or not field):
        from pipelines.inspect_stats import cache_histograms, statistics_lines, write_statistics

        histograms = cache_histograms(opened, rows)
        screen.out("")
        for line in statistics_lines(histograms):
            screen.out(line)
        for h in histograms:
            screen.emit("histogram", title=h.title, unit=h.unit, edges=h.edges.tolist(), counts=h.counts.tolist())
        if picture is not None:
            write_statistics(opened, rows, histograms, picture)
            screen.say(f"wrote {picture}")
            screen.emit("picture", path=str(picture))
    elif picture is not None and row is not None:
        module.write_picture(opened, row, picture)
        screen.say(f"wrote {picture}")
        screen.emit("picture", path=str(picture), row=row)


@click.command()
@click.argument("cache", type=PATH)
@click.option("--to", "kind", required=True, metavar="KIND", help="webdataset, parquet, crn, bevdepth, bevfusion, mmdet3d.")
@click.option("--out", type=PATH, required=True, help="A new or empty folder, or one that the same command began.")
@click.option("--dataroot", type=PATH, help="Raw data: crn and bevdepth byte-equal; needed by bevfusion and mmdet3d.")
@click.option("--split", help="Only this split.")
@click.option("--select", "select", metavar="EXPR", help="Only samples that match, e.g. 'num_radar > 50'.")
@click.option("--as-released", is_flag=True, help="Reproduce known defects of the released files.")
@common
def export(
    screen: Screen,
    cache: Path,
    kind: str,
    out: Path,
    dataroot: Path | None,
    split: str | None,
    select: str | None,
    as_released: bool,
) -> None:
    """Write the same rows in another form. The same command continues an interrupted export and verifies it.

    \b
    Examples:
      imkd-data export C --to webdataset --out W --split train
      imkd-data export C --to crn --out CRN --dataroot D
      imkd-data export C --to parquet --out P --select "night and class_counts.car >= 3"
    """
    import numpy as np

    from imkd_data.cache.store import open_cache
    from imkd_data.errors import UsageError
    from imkd_data.views import EXPORTS

    if kind not in EXPORTS:
        raise UsageError("unknown form", found=kind, expected=", ".join(EXPORTS))
    opened = open_cache(cache)
    rows = opened.rows(split)
    if select:
        rows = np.intersect1d(rows, opened.select(select))
    if not len(rows):
        raise UsageError(
            "no sample matches", found=select or split or "an empty cache", next="imkd-data inspect CACHE --select ..."
        )
    root = dataroot.expanduser() if dataroot else None
    with screen.progress(f"export {kind}", len(rows), "steps") as bar:

        def tell(done: int, total: int, text: str) -> None:
            bar.total = total
            bar.update(done, text)

        EXPORTS[kind](opened, out, rows=rows, dataroot=root, as_released=as_released, progress=tell)
    receipt = json.loads((out / "imkd-export.json").read_bytes())
    edge = receipt.get("rows_within_a_step_of_a_filter_edge", {})
    if receipt["level"] == "cache-only":
        where = ", ".join(f"{count:,} rows of {name}" for name, count in edge.items())
        screen.say(
            f"cache-only: within half a stored step of the raw data; at a filter's edge, may be on its other side: {where}"
        )
    elif receipt["level"] == "exact":
        screen.say(f"exact: recomputed from the raw data{', with the released defects' if as_released else ''}")
    screen.say(f"{len(rows):,} samples written to {out} and verified; the licence of the source data applies (NOTICE)")
    screen.emit("exported", to=kind, out=str(out), samples=len(rows), level=receipt["level"], edge=edge)


@click.command()
@click.argument("cache", type=PATH)
@click.option(
    "--against",
    default="zarr,webdataset",
    show_default=True,
    metavar="A,B",
    help="Also mosaicml, litdata, where they are installed.",
)
@click.option("--seconds", type=SECONDS, default=2.0, show_default=True, help="Per measurement.")
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Reader threads.")
@common
def bench(screen: Screen, cache: Path, against: str, seconds: float, workers: int) -> None:
    """Reading rates on this machine, one library after the other on the same rows.

    \b
    Example:
      imkd-data bench C --against zarr,webdataset --seconds 5
    """
    from imkd_data.cache.bench import measure

    names = [n.strip() for n in against.split(",") if n.strip()]
    for entry in measure(cache, names, seconds, workers):
        screen.out(entry.text)
        screen.emit("measured", **entry.values)


@click.command()
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--version", "version", default="v1.0-mini", show_default=True, help="v1.0-mini or v1.0-trainval.")
@click.option("--scenes", type=int, default=3, show_default=True)
@click.option("--keyframes", type=int, default=40, show_default=True, help="Per scene.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--image-size", default="900x1600", show_default=True, metavar="HxW")
@click.option("--weather", default="clear", show_default=True, metavar="A,B", help="clear, rain, night, rain-night; by turns.")
@click.option("--materials", default="class", show_default=True, help="class or independent: what decides reflectivity.")
@click.option("--camera-sweeps", is_flag=True, help="Also images between keyframes.")
@click.option("--val-share", type=float, help="Share of val scenes.")
@click.option("--workers", type=COUNT, default=1, show_default=True)
@click.option("--fault", metavar="F07", help="Damage the finished tree in a named way.")
@common
def synth(screen: Screen, out: Path, fault: str | None, image_size: str, scenes: int, **options: Any) -> None:
    """Write a synthetic data set in nuScenes' form, to try everything without a download.

    \b
    Examples:
      imkd-data synth --out worlds/mini --scenes 3
      imkd-data synth --out worlds/broken --scenes 1 --fault F03

    Stopped by Ctrl-C or SIGTERM, the same command continues. Every fifth scene and always the last is a val scene. A wrong
    --fault lists all there are.
    """
    from pipelines.synth import run_synth

    with screen.progress("synth", scenes, "scenes") as bar:

        def tell(done: int, total: int, text: str) -> None:
            bar.total = total
            bar.update(done, text)

        root = run_synth(out=out, fault=fault, image_size=image_size, scenes=scenes, progress=tell, **options)
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    split = "mini" if "mini" in options["version"] else "trainval"
    screen.say(f"{root}: {scenes} scenes, {bytes_text(size)}")
    screen.say(f"  next  imkd-data build --dataroot {root} --split {split} --out CACHE")
    screen.emit("written", out=str(root), scenes=scenes, bytes=size)


@click.command()
@click.argument("cache", type=PATH)
@click.option("--rerun", "recording", type=PATH, required=True, metavar="FILE.rrd", help="Write a Rerun recording.")
@click.option("--scene", help="Scene name; default: the first one.")
@common
def view(screen: Screen, cache: Path, recording: Path, scene: str | None) -> None:
    """A scene over time for the Rerun viewer: cameras, LiDAR, radar, boxes, BEV intensity (pip install 'imkd[rerun]').

    \b
    Examples:
      imkd-data view C --rerun scene.rrd --scene scene-0061
      rerun scene.rrd
    """
    from imkd_data.cache.store import open_cache
    from pipelines.rerun_view import log_scene

    path = log_scene(open_cache(cache), recording, scene=scene)
    screen.say(f"wrote {path}")
    screen.emit("recording", path=str(path), bytes=path.stat().st_size)


COMMANDS = (inspect, export, bench, synth, view)
