"""``imkd report`` and ``view``: see what was made. Heavy imports happen inside commands."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cli.options import named_paths

__all__ = ["COMMANDS"]

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--out", type=PATH, default=Path("report.html"), show_default=True)
@click.option("--cache", type=PATH, help="Cache of the scored samples: pictures and scenes come from it.")
@click.option("--title", default="imkd report", show_default=True)
@click.option("--worst", default=6, show_default=True, type=click.IntRange(0, 40), help="Pictures of the worst samples.")
@click.option("--random", "drawn", default=4, show_default=True, type=click.IntRange(0, 40), help="Pictures of random samples.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
def report(runs: tuple[str, ...], out: Path, cache: Path | None, title: str, worst: int, drawn: int, seed: int) -> None:
    """One self-contained page about RUNS: folders of training or evaluation, each may be given as NAME=FOLDER."""
    import shlex

    from pipelines.report import make_report

    named = [(name, folder) if name else folder for name, folder in map(named_path, runs)]
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

    click.echo(view_sample(run, cache, out, token=token, others=named_paths("--teacher", others)))


def named_path(text: str) -> tuple[str, Path]:
    """``PATH`` or ``NAME=PATH`` -> name ("" without one) and path; a path that is there may hold a ``=`` itself."""
    name, sign, path = text.partition("=")
    if sign and name and path and not Path(text).exists():
        return name, Path(path)
    return "", Path(text)


def named_checkpoint(text: str) -> tuple[str, Path]:
    """``CKPT`` or ``NAME=CKPT``. Without a name: its folder's."""
    name, path = named_path(text)
    return name or path.parent.name or "run", path


def print_robustness(
    checkpoint: str,
    beside: tuple[str, ...],
    *,
    cache: Path,
    out: Path,
    dataroot: Path,
    split: str | None,
    device: str,
    batch_size: int,
    as_json: bool,
) -> None:
    """`imkd evaluate --robustness`: the table (or robustness.json on one line) on stdout, progress on stderr."""
    import json

    from imkd_data import open_cache
    from imkd_data.errors import UsageError
    from pipelines.robustness import robustness, robustness_text
    from pipelines.sample_view import is_synthetic

    def tell(run: str, text: str) -> None:
        click.echo(f"{run}: {text}", err=True)

    first, path = named_checkpoint(checkpoint)
    networks = {first: path}
    for item in beside:
        name, sign, path_text = item.partition("=")
        if not sign or not name or not path_text:
            raise UsageError("--beside needs NAME=CKPT", expected="--beside imkd=RUN/last.ckpt", found=item)
        if name in networks:
            raise UsageError(
                f"two networks are called {name}",
                found=item,
                next="--checkpoint NAME=CKPT names the first one, --beside the others",
            )
        networks[name] = Path(path_text)
    words = f"imkd evaluate --robustness --checkpoint {first}=CKPT" + "".join(f" --beside {n}=CKPT" for n in [*networks][1:])
    words += " --cache CACHE --dataroot TREE --out OUT" + (f" --split {split}" if split else "")
    words += (f" --batch-size {batch_size}" if batch_size > 1 else "") + f" --device {device}"
    opened = open_cache(cache)
    options = {"dataroot": dataroot, "split": split, "device": device, "batch_size": batch_size}
    rows = robustness(networks, opened, out, **options, command=words, progress=tell)  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(json.loads((out / "robustness.json").read_text(encoding="utf-8"))))
    else:
        click.echo(robustness_text(rows, synthetic=is_synthetic(opened)))


COMMANDS = (report, view)
