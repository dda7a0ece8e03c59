"""``imkd``: train, evaluate, predict, export. Commands import what they need when they run, so ``--help`` is quick."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from cli.model_tools import COMMANDS, device_option
from cli.options import named_paths
from cli.show import COMMANDS as SHOW
from cli.show import named_checkpoint, print_robustness
from pipelines.commandline import record_command

__all__ = ["group"]

PATH = click.Path(path_type=Path)


class CachePath(click.ParamType):
    """A folder, or a URL that fsspec knows (a Path would lose one of its slashes)."""

    name = "cache"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path | str:
        return value if isinstance(value, str) and "://" in value else Path(value)


CACHE = CachePath()


def say(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(text, err=True)


def out_json(value: Any) -> None:
    """One object on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


class Ticker:
    """Progress of training: one rewritten line on a terminal, else a line every 30 s and at every stage's end."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.tty, self.last, self.stage = quiet, sys.stderr.isatty(), 0.0, ""

    def __call__(self, tick: Any) -> None:
        now, done = time.monotonic(), tick.step == tick.total
        first = tick.stage != self.stage
        if self.quiet or (now - self.last < (0.2 if self.tty else 30.0) and not done and not first):
            return
        self.last, self.stage = now, tick.stage
        if self.tty:
            click.echo(f"\r\x1b[2K{tick.text()}", err=True, nl=done)
        else:
            say(tick.text())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imkd", prog_name="imkd")
def group() -> None:
    """LiDAR-to-camera-radar distillation: train, evaluate, predict, export."""


# ---------------------------------------------------------------------------------------------------------------- train


def resolve_run(
    name: str,
    *,
    config: Path | None = None,
    method: str | None = None,
    settings: tuple[str, ...] = (),
    max_steps: int | None = None,
    global_batch: int | None = None,
) -> Any:
    """The run of a command line: named run or --config file, then --method, --set, --max-steps, --global-batch."""
    from imkd_data.errors import UsageError
    from pipelines.run import Run, parse_settings
    from pipelines.runs import get_run

    if config is None:
        run = get_run(name)
    else:
        try:
            value = json.loads(config.read_text(encoding="utf-8"))
            _check_shape(value)
            run = Run.from_dict(value)
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"the configuration cannot be read: {error}", file=str(config)) from error
        if run.name != name:
            raise UsageError("the configuration is of another run", expected=name, found=run.name, file=str(config))
    if method is not None:
        run = run.with_method(method)
    run = run.with_settings(parse_settings(settings))
    if max_steps is not None:
        run = run.with_max_steps(max_steps)
    if global_batch is not None:
        run = run.with_values(global_batch=global_batch)
    _check_options(run)
    return run


def _check_options(run: Any) -> None:
    """Errors: RecipeError for method options that cannot be meant, before anything is opened or trained."""
    for one in run.stages or (run,):
        if one.method is not None:
            from imkd_models.distill import make_method

            method = make_method(one.method)
            method.changes(method.make_options(one.options))  # of joined methods: each part reads its own


def _check_shape(value: Any, what: str = "a run") -> None:
    """ValueError where a configuration is no object, or one of its sections or stages is none."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    for name in ("optim", "loader", "model", "options"):
        if not isinstance(value.get(name, {}), dict):
            raise ValueError(f"{name} of {what} is not a JSON object")
    if value.get("options") and value.get("method") is None:
        raise ValueError(f"{what} has options and no method")
    if not isinstance(value.get("stages", []), list):
        raise ValueError(f"stages of {what} is not a list")
    for number, stage in enumerate(value.get("stages", []), 1):
        _check_shape(stage, f"stage {number}")


@group.command()
@click.argument("run")
@click.option("--cache", required=True, type=CACHE, help="Cache folder (imkd-data build) or URL.")
@click.option("--out", type=PATH, help="Folder of the run.")
@click.option("--method", help="Distillation method (imkd methods); several are joined by +.")
@click.option("--teacher", multiple=True, metavar="NAME=CKPT", help="Frozen teacher; repeat for several.")
@click.option("--max-steps", type=click.IntRange(min=1), help="End after N optimiser steps.")
@click.option("--resume", is_flag=False, flag_value="yes", type=click.Choice(["yes", "auto"]), help="Continue --out.")
@click.option("--config", type=PATH, help="JSON of `imkd runs show RUN`, edited.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting or method option.")
@click.option("--devices", default=1, show_default=True, type=click.IntRange(min=1), help="Devices of this machine.")
@click.option("--accelerator", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--global-batch", type=click.IntRange(min=1), help="Samples per optimiser step over all devices.")
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Refuse to use more GPU memory than this, e.g. 22GiB; with --plan and no GPU: by counting.",
)
@click.option("--on-bad-sample", type=click.Choice(["stop", "skip"]), help="Damaged sample: stop (default), or take the next.")
@click.option("--plan", is_flag=True, help="Print the resolved run, its cost and a forecast; train nothing.")
@click.option("--plan-steps", default=20, show_default=True, type=click.IntRange(min=0), help="Steps --plan times; 0: none.")
@click.option("--dataroot", type=PATH, help="nuScenes tree, for validation by the official metric (validate_every).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def train(
    run: str,
    cache: Path,
    out: Path | None,
    method: str | None,
    teacher: tuple[str, ...],
    max_steps: int | None,
    resume: str | None,
    config: Path | None,
    settings: tuple[str, ...],
    devices: int,
    accelerator: str,
    global_batch: int | None,
    memory_limit: str | None,
    on_bad_sample: str | None,
    plan: bool,
    plan_steps: int,
    dataroot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train RUN (see `imkd runs`) on a cache. Writes OUT/last.ckpt, or OUT/<stage>/last.ckpt for runs of several networks."""
    from imkd_data.errors import UsageError

    if on_bad_sample is not None:
        settings = (*settings, f"loader.on_bad_sample={on_bad_sample}")
    resolved = resolve_run(run, config=config, method=method, settings=settings, max_steps=max_steps, global_batch=global_batch)
    teachers = named_paths("--teacher", teacher)
    if plan:
        from pipelines.forecast import plan_run, plan_text

        machine: dict[str, Any] = {"devices": devices, "accelerator": accelerator, "memory_limit": memory_limit}
        facts = plan_run(resolved, cache, teachers, steps=plan_steps, **machine)
        if as_json:
            out_json(facts)
        else:
            click.echo(plan_text(facts))
        return
    if out is None:
        raise UsageError("--out is missing", expected="--out DIR, the folder of the run")
    from pipelines.train import train as train_run

    result = train_run(
        resolved,
        cache,
        out,
        teachers,
        resume="auto" if resume == "auto" else resume == "yes",
        progress=Ticker(quiet),
        devices=devices,
        accelerator=accelerator,
        memory_limit=memory_limit,
        dataroot=dataroot,
    )
    if result.rank != 0:
        return
    record_command(out, ["imkd", *sys.argv[1:]])
    made = result.stages or {resolved.name: result.checkpoint}
    if as_json:
        out_json(
            {
                "v": 1,
                "run": resolved.name,
                "step": result.step,
                "losses": result.losses,
                "seconds": round(result.seconds, 3),
                "skipped": result.skipped,
                "checkpoints": {k: str(v) for k, v in made.items()},
            }
        )
    for name, path in made.items():
        say(f"{name:<12} {path}")


# ------------------------------------------------------------------------------------------------------ score, predict


@group.command()
@click.option("--checkpoint", required=True, metavar="[NAME=]CKPT", help="NAME: of its column in the robustness table.")
@click.option("--cache", required=True, type=CACHE)
@click.option("--dataroot", required=True, type=PATH, help="nuScenes tree that holds the truth.")
@click.option("--out", required=True, type=PATH, help="Gets results.json and metrics_summary.json, or the robustness table.")
@click.option("--engine", default="devkit", show_default=True, type=click.Choice(["devkit", "fast"]))
@click.option("--split", help="Splits to score; default val, else all rows of the cache.")
@device_option
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--robustness", is_flag=True, help="Score under weather, range, lost sensors, time lag; resumable.")
@click.option("--beside", multiple=True, metavar="NAME=CKPT", help="A further network in the robustness table; repeat.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def evaluate(
    checkpoint: str,
    cache: Path,
    dataroot: Path,
    out: Path,
    engine: Any,
    split: str | None,
    device: str,
    batch_size: int,
    robustness: bool,
    beside: tuple[str, ...],
    as_json: bool,
) -> None:
    """Score a checkpoint by the official nuScenes detection evaluation; networks run in float32, however they were trained."""
    from pipelines.device import device_of

    device = device_of(device)
    if robustness:
        options: dict[str, Any] = {"cache": cache, "out": out, "dataroot": dataroot, "split": split, "as_json": as_json}
        print_robustness(checkpoint, beside, **options, device=device, batch_size=batch_size)
        return
    if beside:
        from imkd_data.errors import UsageError

        raise UsageError("--beside is for the robustness table", next="add --robustness, or score one checkpoint at a time")
    from pipelines.evaluate import evaluate_checkpoint, json_ready, summary_lines

    path = named_checkpoint(checkpoint)[1]
    summary = evaluate_checkpoint(path, cache, dataroot, out, engine, split, device=device, batch_size=batch_size)
    record_command(out, ["imkd", *sys.argv[1:]])
    if as_json:
        out_json(json_ready(summary))
    else:
        for line in summary_lines(summary):
            click.echo(line)


@group.command()
@click.option("--checkpoint", required=True, type=PATH)
@click.option("--dataroot", required=True, type=PATH)
@click.option("--version", default="", help="v1.0-mini, v1.0-trainval, v1.0-test; default from the split.")
@click.option("--split", required=True)
@click.option("--out", required=True, type=PATH, help="Gets results.json, a nuScenes submission.")
@click.option("--scenes", help="Comma-separated scene names; default all of the split.")
@device_option
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1))
def predict(
    checkpoint: Path, dataroot: Path, version: str, split: str, out: Path, scenes: str | None, device: str, batch_size: int
) -> None:
    """Boxes for a split of a nuScenes tree, in float32; opens no file that the checkpoint's sensors do not need."""
    from pipelines.device import device_of
    from pipelines.predict import predict_split

    names, device = tuple(s for s in (scenes or "").split(",") if s), device_of(device)
    click.echo(predict_split(checkpoint, dataroot, version, split, out, scenes=names, device=device, batch_size=batch_size))


# ---------------------------------------------------------------------------------------------------------------- lists


@group.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
@click.pass_context
def runs(ctx: click.Context, as_json: bool) -> None:
    """The runs by name: counted parameters, multiply-adds and float32 activation memory of one training sample."""
    if ctx.invoked_subcommand is not None:
        return
    from pipelines.counting import counted
    from pipelines.runs import RUNS

    for name, make in RUNS.items():
        run = make()
        facts = counted(run)
        if as_json:
            out_json({"v": 1, "name": name, "summary": run.summary, "method": run.method, **facts})
        else:
            macs = "" if facts["macs"] is None else f"{facts['macs'] / 1e9:10.1f} GMAC"
            count = f"{'':>8}  " if facts["parameters"] is None else f"{facts['parameters'] / 1e6:8.2f} M"
            memory = f"{'':>19}" if facts["sample_bytes"] is None else f"{facts['sample_bytes'] / 2**30:8.2f} GiB/sample"
            click.echo(f"{name:<20}{count}{macs or ' ' * 15}{memory}  {run.summary}")


@runs.command("show")
@click.argument("name")
@click.option("--method", help="Show the run with this method.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
def show(name: str, method: str | None, settings: tuple[str, ...]) -> None:
    """The resolved configuration of a run as one JSON object, with counted parameters; `imkd train --config` reads it."""
    from pipelines.counting import counted

    run = resolve_run(name, method=method, settings=settings)
    out_json({**run.as_dict(), **counted(run)})


@group.command()
@click.option("--json", "as_json", is_flag=True, help="One object a line, with every option.")
def methods(as_json: bool) -> None:
    """The distillation methods: what each needs, its twin and its options (`--json`: with choices and bounds)."""
    from imkd_models.distill import METHODS

    for name, method in METHODS.items():
        if as_json:
            out_json({"v": 1, **method.as_dict()})
            continue
        click.echo(f"{name}: {method.title}\n  {method.summary}")
        for line in _needs_lines(method):
            click.echo(f"  {line}")
        for option in method.options.describe():
            default = option["default"]
            value = ("on" if default else "off") if isinstance(default, bool) else json.dumps(default)
            click.echo(f"    --set {option['name'] + '=' + value:<34} {option['doc']}")


def _needs_lines(method: Any) -> list[str]:
    """What a method reads under its default options, for people."""
    teachers = [f"--teacher {name}=CKPT ({', '.join(features)})" for name, features in method.needs.of_teachers.items()]
    changes = ", ".join(f"{key}={value}" for key, value in method.student_changes.items())
    return [
        f"teachers: {'; '.join(teachers) or 'none'}",
        f"student: {', '.join(method.needs.student)}{f'; built with {changes}' if changes else ''}",
        f"batch: {', '.join(method.needs.batch)}",
        f"undistilled twin: {method.twin}",
        *([f"presets: {', '.join(method.presets)}"] if method.presets else []),
    ]


for _command in (*COMMANDS, *SHOW):
    group.add_command(_command)
