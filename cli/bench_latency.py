"""``imkd bench latency``: milliseconds, memory and floors of one network on this device."""

from __future__ import annotations

import json

import click

__all__ = ["latency"]


@click.command("latency")
@click.argument("run", default="crn_r50")
@click.option("--method", help="Measure the student of this method.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
@click.option("--precision", "precisions", default="fp16,bf16", show_default=True, help="fp32, fp16, bf16; comma-separated.")
@click.option("--engine", "engines", default="eager,compiled,cuda graph", show_default=True, help="Comma-separated.")
@click.option("--mode", "modes", default="cached past,all keyframes", show_default=True, help="Comma-separated.")
@click.option("--repeats", default=50, show_default=True, type=click.IntRange(min=3))
@click.option("--accelerator", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--no-train", is_flag=True, help="Leave the training step out.")
@click.option("--json", "as_json", is_flag=True)
def latency(
    run: str,
    method: str | None,
    settings: tuple[str, ...],
    precisions: str,
    engines: str,
    modes: str,
    repeats: int,
    accelerator: str,
    no_train: bool,
    as_json: bool,
) -> None:
    """Latency of RUN's network at batch 1, in all and by module, with peak memory and the floor of bytes and FLOPs beside
    each; and its training step. Random inputs of the true sizes: no cache is needed."""
    from cli.model import resolve_run
    from pipelines.bench_latency import latency_table, run_latency_bench

    def names(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    facts = run_latency_bench(
        resolve_run(run, method=method, settings=settings),
        precisions=names(precisions),
        modes=names(modes),
        engines=names(engines),
        repeats=repeats,
        accelerator=accelerator,
        train=not no_train,
    )
    click.echo(json.dumps(facts, allow_nan=False) if as_json else latency_table(facts))
