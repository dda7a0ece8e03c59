"""``imkd demo``, ``import``, ``export``, ``cache-teacher`` and ``bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cli.bench_distill import distill
from cli.bench_latency import latency
from cli.options import COUNT, SECONDS

__all__ = ["COMMANDS", "device_option"]

PATH = click.Path(path_type=Path)

# Every command that takes it asks ``pipelines.device.device_of`` what auto is.
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:N; auto: CUDA where torch sees it."
)


class DemoScreen:
    """A bar over all stages on a terminal, one line per finished stage everywhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.tty = quiet, sys.stderr.isatty()

    def __call__(self, event: Any) -> None:
        if event.kind == "end":
            clear = "\r\x1b[2K" if self.tty else ""
            click.echo(f"{clear}[{event.number}/{event.stages}] {event.text}", err=True)
        elif self.tty and not self.quiet:
            done = (event.number - 1 + min(1.0, event.share)) / event.stages
            bar = "#" * round(28 * done)
            click.echo(f"\r\x1b[2K[{bar:<28}] {100 * done:3.0f} %  {event.stage}  {event.text[:80]}", err=True, nl=False)


@click.command()
@click.option("--out", type=PATH, default=Path("demo"), show_default=True, help="A new folder, or that of an earlier demo.")
@click.option("--quick", is_flag=True, help="A tiny version for continuous integration; its scores mean nothing.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--workers", type=COUNT, help="Processes for world and cache.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--quiet", is_flag=True, help="No bar.")
def demo(out: Path, quick: bool, seed: int, workers: int | None, as_json: bool, quiet: bool) -> None:
    """The whole line on a synthetic world: tree, cache, teachers, distilled student, official scores, report."""
    from pipelines.demo import run_demo

    result = run_demo(out, quick=quick, seed=seed, workers=workers, progress=DemoScreen(quiet))
    if as_json:
        value = {
            "v": 1,
            "report": str(result.report),
            "seconds": round(result.seconds, 1),
            "checkpoints": {k: str(v) for k, v in result.checkpoints.items()},
            "scores": {k: {"nd_score": v["nd_score"], "mean_ap": v["mean_ap"]} for k, v in result.scores.items()},
            "stages": [{"name": s.name, "seconds": round(s.seconds, 2), "peak_mb": round(s.peak_mb)} for s in result.stages],
        }
        click.echo(json.dumps(value))
    click.echo(f"{result.seconds:.0f} s; open {result.report}", err=True)


@click.command("import")
@click.argument("file", type=PATH)
@click.option(
    "--from",
    "source",
    required=True,
    metavar="SOURCE",
    help="Family of the file: crn, bevdepth, labeldistill, crkd, centerpoint_mmdet3d.",
)
@click.option("--out", required=True, type=PATH, help="Folder that gets last.ckpt.")
@click.option("--boxes", type=click.Choice(["lwh", "wlh"]), help="Order of box sizes in a LiDAR network's file.")
@click.option("--part", default="student", show_default=True, help="Network of a family: student, lidar, label, teacher.")
def import_(file: Path, source: str, out: Path, boxes: str | None, part: str) -> None:
    """Turn public weights (read as plain tensors, nothing in them is executed) into a checkpoint."""
    from imkd_models.checkpoint import save_checkpoint
    from imkd_models.importing import import_public

    model, record = import_public(source, file, boxes=boxes, part=part)
    config: Any = model.config
    meta = {
        "name": f"imported_{source}",
        "run": {"name": f"imported_{source}", "loader": record["loader"]},
        "method": None,
        "model": config.as_dict(),
        "networks": {},
        "cache": {},
        "metrics": {},
        "imported": record,
    }
    save_checkpoint(out, 0, model, meta=meta)
    click.echo(out / "last.ckpt")


@click.command()
@click.option("--checkpoint", required=True, type=PATH)
@click.option("--format", "kind", required=True, type=click.Choice(["onnx", "torch", "safetensors"]))
@click.option("--out", required=True, type=PATH, help="The file to write; a .json beside it describes it.")
@click.option("--cache", type=PATH, help="Also compare on a real sample of this cache.")
@click.option("--radar-points", default=4096, show_default=True, type=click.IntRange(min=1), help="Slots for radar points.")
def export(checkpoint: Path, kind: str, out: Path, cache: Path | None, radar_points: int) -> None:
    """The student alone, without LiDAR or method, as ONNX, torch.export or safetensors; compared with the original."""
    from pipelines.export import export_checkpoint

    result = export_checkpoint(checkpoint, kind, out, cache=cache, radar_points=radar_points)
    click.echo(json.dumps(result))


@click.command("cache-teacher")
@click.option("--checkpoint", required=True, type=PATH, help="The teacher.")
@click.option("--cache", required=True, type=PATH, help="Gets the fields teacher_<hash8>_<name>.")
@click.option("--features", required=True, help="Comma-separated feature names, e.g. bev_stage1,bev_stage2.")
@device_option
@click.option("--quiet", is_flag=True)
def cache_teacher(checkpoint: Path, cache: Path, features: str, device: str, quiet: bool) -> None:
    """Store a frozen teacher's maps (half precision, no augmentation) in the cache; the same command continues."""
    from pipelines.cache_teacher import cache_features
    from pipelines.device import device_of

    names = tuple(n.strip() for n in features.split(",") if n.strip())

    def tell(done: int, total: int) -> None:
        if not quiet:
            click.echo(f"shard {done}/{total}", err=True)

    for name in cache_features(checkpoint, cache, names, device=device_of(device), progress=tell):
        click.echo(name)


@click.group()
def bench() -> None:
    """What this machine does: loading and training, as ratios measured in one run."""


@bench.command("loader")
@click.option("--cache", required=True, type=PATH)
@click.option("--dataroot", type=PATH, help="nuScenes tree, for the on-the-fly baseline.")
@click.option("--seconds", default=5.0, show_default=True, type=SECONDS, help="Time for each candidate.")
@click.option("--batch-size", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--history", default="0", show_default=True, help="Keyframe offsets, e.g. 0,-2,-4,-6.")
@click.option("--json", "as_json", is_flag=True)
def bench_loader(cache: Path, dataroot: Path | None, seconds: float, batch_size: int, history: str, as_json: bool) -> None:
    """Samples per second of the stream against loaders of other kinds on the same data."""
    from pipelines.bench_loader import loader_table, run_loader_bench

    try:
        offsets = tuple(int(v) for v in history.split(","))
    except ValueError:
        raise click.BadParameter(f"{history!r} is no list such as 0,-2,-4,-6", param_hint="--history") from None
    facts = run_loader_bench(cache, dataroot, seconds=seconds, batch_size=batch_size, history=offsets)
    click.echo(json.dumps(facts) if as_json else loader_table(facts))


@bench.command("step")
@click.argument("run")
@click.option("--cache", required=True, type=PATH)
@click.option("--teacher", multiple=True, metavar="NAME=CKPT")
@click.option("--method")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=1))
@click.option("--accelerator", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--json", "as_json", is_flag=True)
def bench_step(
    run: str,
    cache: Path,
    teacher: tuple[str, ...],
    method: str | None,
    settings: tuple[str, ...],
    steps: int,
    accelerator: str,
    as_json: bool,
) -> None:
    """Where a training step's time goes: image, radar, view, fusion, head, teachers, losses, backward."""
    from cli.model import resolve_run
    from cli.options import named_paths
    from pipelines.bench_step import run_step_bench, step_table

    resolved = resolve_run(run, method=method, settings=settings)
    facts = run_step_bench(resolved, cache, named_paths("--teacher", teacher), steps=steps, accelerator=accelerator)
    click.echo(json.dumps(facts) if as_json else step_table(facts))


bench.add_command(distill)
bench.add_command(latency)

COMMANDS: tuple[click.Command, ...] = (demo, import_, export, cache_teacher, bench)
