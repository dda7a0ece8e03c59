"""The distillation benchmark: one world, shared teachers, every method against its undistilled twin, resumable.

Everything lies under one folder: ``world/``, ``cache/``, ``teachers/<name>/``, ``runs/<row>/seed<k>/`` with one
``score.json`` a run. A finished run is never repeated; a stopped one continues from its checkpoint; the table can be
written at any time from what is there. The same command may run several times at once on one machine: each takes the next
run that no other holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imkd_data.errors import MismatchError, SourceMissingError, UsageError
from imkd_data.world import world_options
from pipelines.bench_cell import Bench, run_of, score_again, train_and_score
from pipelines.bench_presets import PRESETS
from pipelines.bench_printed import Printed, read_printed
from pipelines.bench_rows import Row, all_rows, rows_of, with_tries
from pipelines.bench_teachers import maps_of, maps_read, store_teachers, train_teachers
from pipelines.bench_world import held, make_cache, make_world, write_json
from pipelines.device import device_of

__all__ = ["BenchTick", "bench_distill", "read_scores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTick:
    """Progress: runs done, runs in this plan, a line for people."""

    done: int
    total: int
    text: str


Progress = Callable[[BenchTick], None]


def bench_distill(
    *,
    out: Path | str,
    preset: str = "tiny",
    seeds: Sequence[int] = (0, 1, 2, 3, 4, 5),
    blocks: Sequence[str] = ("main",),
    methods: Sequence[str] = (),
    rows: Sequence[str] = (),
    world: Path | str | None = None,
    cache: Path | str | None = None,
    materials: str = "class",
    accelerator: str = "auto",
    devices: int = 1,
    held_in: int = 0,
    tries: Sequence[str] = (),
    teachers: Path | str | None = None,
    engine: str = "devkit",
    workers: int = 1,
    steps: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    max_runs: int | None = None,
    admission: bool | None = None,
    docs: Path | str | None = None,
    also: Sequence[Path] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is missing and write the table.

    Args:
        out: folder of the whole benchmark; the same command continues it.
        seeds: the first one alone is used by rows that run once. blocks: main, controls, ablations, defects.
        methods, rows: only these methods, or only these rows with their twins. world, cache: existing ones instead of
        ``out/world`` and ``out/cache``. materials: of the synthetic world (``class`` or ``independent``).
        devices: training processes of every run, as `imkd train --devices`. They share the batch of one device, so that a
        step sees the same samples; batch norms see each device's part.
        held_in: tune: every run leaves out the last scenes of train and is scored on them, val scenes are never read.
        tries: with held_in, further rows ``METHOD:option=value,...``; every tried setting stays in the table.
        teachers: folder of another benchmark whose teachers are used instead of training them here. They may have been
        trained on scenes that ``held_in`` keeps from the students; the table names their weights.
        steps: optimiser steps by network (lidar, label, fusion, student); settings: ``--set`` values for every run.
        max_runs: stop after so many new runs, for filling the table in several goes. admission: False runs methods on a
        world and preset that do not pass, and the table says so; tuning (held_in) is not asked. docs: folder that gets
        results.json and results.md too. also: results.json of earlier tables of the same benchmark: their
        rows stand in this one, and their runs are not made again.

    Returns:
        The content of ``results.json``: rows, paired, admission, spread, costs.

    Raises:
        UsageError: unknown names, a row and method that contradict, no such device, or the admission test failed.
        MismatchError: ``out`` was begun with other settings, ``world`` with other materials, ``also`` is of another benchmark.
        SourceMissingError: no ``world``, no such table.
    """
    from imkd_data import open_cache
    from pipelines.bench_report import SCENE_DRAWS, write_report

    if preset not in PRESETS:
        raise UsageError(f"no benchmark preset {preset!r}", expected=", ".join(PRESETS), found=preset)
    chosen = PRESETS[preset]
    if tries and not held_in:
        raise UsageError(
            "settings are tried on train scenes only", expected="--held-in N", found="val scenes", rule="bench.tuning"
        )
    must_pass = chosen.admission and not held_in if admission is None else admission
    if engine == "none" and must_pass:
        raise UsageError(
            "whether world and preset may be used is judged on scores, and --engine none makes none",
            rule="bench.admission",
            next="add --no-admission; the same command with an engine scores what was predicted, and says whether they pass",
        )
    root, plan = Path(out), with_tries(rows_of(tuple(blocks), tuple(methods), tuple(rows), preset), tries)
    printed = read_printed(also)
    plan = _with_baselines(plan, preset, printed) if must_pass else plan
    state = {"done": 0, "total": 0}

    def tell(text: str) -> None:
        if progress is not None:
            progress(BenchTick(done=state["done"], total=state["total"], text=text))

    def remember() -> None:
        options = {
            "preset": preset,
            "seeds": ",".join(map(str, seeds)),
            "blocks": ",".join(blocks),
            "methods": ",".join(methods),
            "rows": ",".join(rows),
            "materials": materials,
            "engine": engine,
            "held-in": str(held_in or ""),
            "try": " --try ".join(tries),
            "teachers": "TEACHERS" if teachers is not None else "",
            "also": " --also ".join("RESULTS.json" for _ in also),
        }
        _remember_command(root, options, steps or {}, settings or {}, admission, _published(docs, preset))

    if chosen.real and (world is None or cache is None):
        raise UsageError(
            f"preset {preset} is for a data set you hold",
            expected="--world DATAROOT --cache CACHE",
            found="no --world" if world is None else "no --cache",
            next="imkd-data build --split trainval --dataroot DATAROOT makes the cache",
        )
    cells = _without_printed(_order(plan, tuple(seeds)), printed)
    plan = [row for row in plan if any(r is row for r, _ in cells)]
    device_of(accelerator)  # said now, not once a world and a cache are made
    if world is not None:
        _check_world(Path(world), None if chosen.real else materials)
    root.mkdir(parents=True, exist_ok=True)
    with held(root / "world", wait=world is None or cache is None):
        tree = Path(world) if world is not None else make_world(root, chosen, materials, workers, tell)
        opened = open_cache(Path(cache) if cache is not None else make_cache(root, tree, chosen, tell))
    bench = Bench(
        out=root,
        preset=chosen,
        world=tree,
        cache=opened,
        accelerator=accelerator,
        engine=None if engine == "none" else engine,
        tell=tell,
        steps={**chosen.steps, **(steps or {})},
        settings={**chosen.settings, **(settings or {})},
        materials="real" if chosen.real else materials,
        devices=devices,
        held_in=held_in,
    )
    state["total"] = len(cells)
    given = train_teachers(bench, plan, None if teachers is None else Path(teachers), judged=not printed.has("teacher_lidar"))
    if chosen.stored_teachers and (maps := maps_read(plan, given)):
        with held(root / "stored", wait=True):
            bench = replace(bench, stored=store_teachers(root, opened, maps, bench.device, tell))
    new = 0
    for row, seed in cells:
        fresh = not (_folder(bench, row, seed) / "score.json").is_file()
        if fresh and row.kind != "baseline" and must_pass:
            _finish_baselines(bench, cells)
            if not write_report(root, None, also=also)["admission"]["passed"]:
                raise UsageError(
                    "the world and preset do not pass the admission test, so no method is run",
                    rule="bench.admission",
                    found="; ".join(_failed(write_report(root, docs, also=also)["admission"])),
                    next="change the world or the preset (more steps, more scenes), or pass --no-admission and say so",
                )
        if fresh and max_runs is not None and new >= max_runs:
            tell(f"stopped after {new} new runs; the same command continues")
            break
        if row.sim_at_test and bench.engine is None:
            tell(f"{row.name} seed {seed}: only scored, so it waits for an engine")
            continue
        first = row.twin if row.sim_at_test else row.start
        if first and not (_run_folder(bench, first, seed) / "score.json").is_file():
            tell(f"{row.name} seed {seed}: {first} is not finished yet; the same command runs it then")
            continue
        with held(_folder(bench, row, seed), wait=False) as mine:
            if not mine:
                tell(f"{row.name} seed {seed}: held by another process")
                continue
            run_cell(bench, row, seed, given)
        remember()
        new += fresh
        state["done"] += 1
        tell(f"{row.name} seed {seed}: done")
    remember()
    draws = SCENE_DRAWS if chosen.real else None  # one seed of these is days: scenes tell most
    return write_report(root, docs, draws=draws, also=also)


def _check_world(tree: Path, materials: str | None) -> None:
    """A given world is there and, where its own record says which, of these materials (None: of any)."""
    if not tree.is_dir():
        raise SourceMissingError(
            "no world here", expected="a nuScenes tree", file=str(tree), next="--world TREE, or leave it out"
        )
    made = (world_options(tree) or {}).get("materials")
    if materials is not None and made not in (None, materials):
        raise MismatchError(
            "the given world has other materials",
            expected=materials,
            found=str(made),
            file=str(tree),
            next=f"--materials {made}, or another --world",
        )


def _with_baselines(plan: Sequence[Row], preset: str, printed: Printed) -> list[Row]:
    """The plan; where it has more than baselines, with those that the admission test reads and no table has, first seed."""
    have = {row.name for row in plan}
    wanted = [r for r in all_rows(preset) if r.kind == "baseline" and r.name not in have and not printed.has(r.name)]
    lacking = [replace(r, seeds="first") for r in wanted]
    return [*(lacking if any(r.kind != "baseline" for r in plan) else ()), *plan]


def _finish_baselines(bench: Bench, cells: Sequence[tuple[Row, int]]) -> None:
    """Baselines of the first seed, on which admission is judged: wait for those that another process runs, and run what it
    left when it ended."""
    for row, seed in cells:
        if row.kind == "baseline" and seed == cells[0][1] and not (_folder(bench, row, seed) / "score.json").is_file():
            with held(_folder(bench, row, seed), wait=True):
                run_cell(bench, row, seed, {})


def _published(docs: Path | str | None, preset: str) -> str:
    """The folder of the printed command's ``--docs``: the one that was asked for, else where this preset's tables go."""
    if docs is not None and not Path(docs).is_absolute():
        return Path(docs).as_posix()
    return "docs" if preset == "tiny" else f"docs/{preset}"


def _remember_command(
    root: Path,
    options: Mapping[str, str],
    steps: Mapping[str, int],
    settings: Mapping[str, Any],
    admission: bool | None,
    docs: str,
) -> None:
    """Keep every different command line that filled this folder or wrote its table, which prints them."""
    words = ["imkd bench distill", *(f"--{k} {v}" for k, v in options.items() if v)]
    words += [f"--steps {k}={v}" for k, v in steps.items()] + [f"--set {k}={v}" for k, v in settings.items()]
    line = " ".join(words) + (" --no-admission" if admission is False else "") + f" --out DIR --docs {docs}"
    path = root / "commands.json"
    with held(path, wait=True):
        known = json.loads(path.read_text()) if path.is_file() else []
        if line not in known:
            write_json(path, [*known, line])


def _failed(admission: Mapping[str, Any]) -> list[str]:
    return [f"{c['name']}: {c['found']} (wanted {c['wanted']})" for c in admission["checks"] if not c["passed"]]


def _order(plan: Sequence[Row], seeds: tuple[int, ...]) -> list[tuple[Row, int]]:
    """Baselines of the first seed (admission) first, then all baselines (spread), then seed by seed, so that a table that
    is stopped early is balanced."""
    if not seeds:
        raise UsageError("the benchmark needs at least one seed")
    cells = [(r, s) for s in seeds for r in plan if r.seeds == "all" or s == seeds[0]]
    rank = {"baseline": 0}
    order = {"main": 1, "tuning": 1, "controls": 2, "ablations": 3, "defects": 4}
    return sorted(cells, key=lambda c: (rank.get(c[0].kind, order[c[0].block]), seeds.index(c[1])))


def _without_printed(cells: Sequence[tuple[Row, int]], printed: Printed) -> list[tuple[Row, int]]:
    """Those of which no table has the score, and those whose network one of them goes on from or scores again."""
    lacking = [(row, seed) for row, seed in cells if not printed.has(row.name, seed)]
    read = {(row.twin if row.sim_at_test else row.start, seed) for row, seed in lacking}
    return [(row, seed) for row, seed in cells if (row, seed) in lacking or (row.name, seed) in read]


def _folder(bench: Bench, row: Row, seed: int) -> Path:
    return _run_folder(bench, row.name, seed)


def _run_folder(bench: Bench, name: str, seed: int) -> Path:
    return bench.out / "runs" / name / f"seed{seed}"


def run_cell(bench: Bench, row: Row, seed: int, teachers: Mapping[str, Path]) -> dict[str, Any]:
    """One row at one seed: train (or continue; or, at test, take its twin's network), score, write ``score.json``; a finished
    one is only read."""
    from imkd_models.distill import make_method

    facts = {f: getattr(row, f) for f in ("kind", "block", "method", "twin", "note")} | {"row": row.name, "seed": seed}
    if row.sim_at_test:
        trained = _run_folder(bench, str(row.twin), seed)
        return score_again(bench, _folder(bench, row, seed), trained, row.sim_at_test, facts=facts)
    run = run_of(bench, "student", seed=seed)
    run = run.with_values(model={**run.model, **row.model}).with_settings(row.settings)
    if row.start:
        begun = _run_folder(bench, row.start, seed) / "train" / "last.ckpt"
        run = run.with_values(start=str(begun), optim=replace(run.optim, lr=run.optim.lr * row.lr_factor))
    given: dict[str, Path] = {}
    if row.method:
        method = make_method(row.method)
        given = {n: teachers[n] for n in method.teachers_for(method.make_options(row.options))}
        run = run.with_method(row.method).with_values(options=dict(row.options))
        if bench.stored is not None and maps_of(row):
            run = run.with_values(loader=replace(run.loader, cached_teachers=True))
    return train_and_score(bench, _folder(bench, row, seed), run, given, facts=facts)


def read_scores(out: Path) -> list[dict[str, Any]]:
    """Every ``score.json`` under a benchmark folder, teachers first."""
    found = sorted((out / "teachers").glob("*/score.json")) + sorted((out / "runs").rglob("score.json"))
    return [{**json.loads(p.read_text()), "folder": str(p.parent)} for p in found]
