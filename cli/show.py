"""``imkd report`` and ``view``: see what was made. Heavy imports happen inside commands."""

from __future__ import annotations

import sys
from pathlib import Path

import click

__all__ = ["COMMANDS"]

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--out", type=PATH, default=Path("report.html"), show_default=True)
@click.option("--cache", type=PATH, help="Cache of the scored samples: pictures and scenes come from it.")
@click.option("--title", default="imkd report", show_default=True)
@click.option("--worst", default=6, show_default=True, type=click.IntRange(0, 40), help="Pictures of the worst samples.")
@click.option("--random", "drawn", default=4, show_default=True, type=click.IntRange(0, 40), help="Pictures of random samples.")
@click.option("--seed", default=0, show_default=True)
def report(runs: tuple[str, ...], out: Path, cache: Path | None, title: str, worst: int, drawn: int, seed: int) -> None:
    """One self-contained page about RUNS: folders of training or evaluation, each may be given as NAME=FOLDER."""
    import shlex

    from pipelines.report import make_report

    named = [
        (name, Path(folder)) if sep and name else Path(item) for item in runs for name, sep, folder in [item.partition("=")]
    ]
    command = shlex.join(["imkd", *sys.argv[1:]])
    path = make_report(named, out, cache=cache, title=title, commands=[command], worst=worst, random=drawn, seed=seed)
    click.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


@click.command()
@click.argument("run", type=PATH)
@click.option("--cache", type=PATH, required=True)
@click.option("--sample", "token", metavar="TOKEN", help="A sample token; default: the first scored row.")
@click.option("--teacher", "others", multiple=True, metavar="NAME=CKPT", help="Further networks to show; repeat for several.")
@click.option("--out", type=PATH, default=Path("view.html"), show_default=True)
def view(run: Path, cache: Path, token: str | None, others: tuple[str, ...], out: Path) -> None:
    """One sample as a network saw it: boxes beside truth, error per box, feature maps, weights of the distillation."""
    from pipelines.view import view_sample

    extra = {name: Path(path) for name, _, path in (item.partition("=") for item in others)}
    click.echo(view_sample(run, cache, out, token=token, others=extra))


def print_robustness(
    checkpoints: dict[str, Path], cache: Path, out: Path, dataroot: Path, split: str | None, device: str, batch_size: int
) -> None:
    """`imkd evaluate --robustness`: the table on stdout, progress on stderr."""
    from imkd_data import open_cache
    from pipelines.robustness import is_synthetic, robustness, robustness_text

    def tell(run: str, condition: str) -> None:
        click.echo(f"{run}: {condition}", err=True)

    opened = open_cache(cache)
    rows = robustness(
        checkpoints, opened, out, dataroot=dataroot, split=split, device=device, batch_size=batch_size, progress=tell
    )
    click.echo(robustness_text(rows, synthetic=is_synthetic(opened)))


COMMANDS = (report, view)
