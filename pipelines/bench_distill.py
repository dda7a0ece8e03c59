"""The distillation benchmark: one world, shared teachers, every method against its undistilled twin, resumable.

Everything lies under one folder: ``world/``, ``cache/``, ``teachers/<name>/``, ``runs/<row>/seed<k>/`` with one
``score.json`` a run. A finished run is never repeated; a stopped one continues from its checkpoint; the table can be
written at any time from what is there.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.errors import MismatchError, UsageError
from imkd_data.recipe import canonical_json
from pipelines.bench_rows import PRESETS, Preset, Row, rows_of
from pipelines.bench_world import make_cache, make_world, write_json

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from pipelines.run import Run

__all__ = ["BenchTick", "bench_distill", "read_scores"]

ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
RINGS_M = ((0.0, 20.0), (20.0, 30.0), (30.0, 50.0))
TEACHERS = {"lidar": "tiny_teacher", "label": "tiny_label", "fusion": "tiny_fusion"}
STUDENT = "tiny_student"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTick:
    """Progress: runs done, runs in this plan, a line for people."""

    done: int
    total: int
    text: str


Progress = Callable[[BenchTick], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    out: Path
    preset: Preset
    world: Path
    cache: Cache
    accelerator: str
    engine: Any
    tell: Callable[[str], None]
    steps: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    materials: str = "class"

    @property
    def device(self) -> str:
        """Where scores are computed."""
        import torch

        cuda = self.accelerator in ("auto", "cuda") and torch.cuda.is_available()
        return "cuda" if cuda else "cpu"


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
    engine: str = "devkit",
    workers: int = 1,
    steps: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    max_runs: int | None = None,
    admission: bool | None = None,
    docs: Path | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is missing and write the table.

    Args:
        out: folder of the whole benchmark; the same command continues it.
        seeds: the first one alone is used by rows that run once. blocks: main, controls, ablations, defects.
        methods, rows: only these methods, or only these rows with their twins. world, cache: existing ones instead of
        ``out/world`` and ``out/cache``. materials: of the synthetic world (``class`` or ``independent``).
        steps: optimiser steps by network (lidar, label, fusion, student); settings: ``--set`` values for every run.
        max_runs: stop after so many new runs, for filling the table in several goes. admission: False runs methods on a
        world and preset that do not pass; the table says so. docs: folder that gets results.json and results.md too.

    Returns:
        The content of ``results.json``: rows, paired, admission, spread, costs.

    Raises:
        UsageError: unknown names, or the admission test failed. MismatchError: ``out`` was begun with other settings.
    """
    from imkd_data import open_cache
    from pipelines.bench_report import write_report

    if preset not in PRESETS:
        raise UsageError(f"no benchmark preset {preset!r}", expected=", ".join(PRESETS), found=preset)
    chosen = PRESETS[preset]
    root, plan = Path(out), rows_of(tuple(blocks), tuple(methods), tuple(rows))
    state = {"done": 0, "total": 0}

    def tell(text: str) -> None:
        if progress is not None:
            progress(BenchTick(done=state["done"], total=state["total"], text=text))

    root.mkdir(parents=True, exist_ok=True)
    _remember_command(
        root,
        {
            "preset": preset,
            "seeds": ",".join(map(str, seeds)),
            "blocks": ",".join(blocks),
            "methods": ",".join(methods),
            "rows": ",".join(rows),
            "materials": materials,
            "engine": engine,
        },
        steps or {},
        settings or {},
        admission,
    )
    tree = Path(world) if world is not None else make_world(root, chosen, materials, workers, tell)
    opened = open_cache(Path(cache) if cache is not None else make_cache(root, tree, chosen, tell))
    bench = _Bench(
        out=root,
        preset=chosen,
        world=tree,
        cache=opened,
        accelerator=accelerator,
        engine=engine,
        tell=tell,
        steps={**chosen.steps, **(steps or {})},
        settings={**chosen.settings, **(settings or {})},
        materials=materials,
    )
    cells = _order(plan, tuple(seeds))
    state["total"] = len(cells)
    teachers = _teachers(bench, plan)
    must_pass = chosen.admission if admission is None else admission
    new = 0
    for row, seed in cells:
        fresh = not (_folder(bench, row, seed) / "score.json").is_file()
        if fresh and row.kind != "baseline" and must_pass and not write_report(root, None)["admission"]["passed"]:
            raise UsageError(
                "the world and preset do not pass the admission test, so no method is run",
                rule="bench.admission",
                found="; ".join(_failed(write_report(root, docs)["admission"])),
                next="change the world or the preset (more steps, more scenes), or pass admission=False and say so",
            )
        if fresh and max_runs is not None and new >= max_runs:
            tell(f"stopped after {new} new runs; the same command continues")
            break
        run_cell(bench, row, seed, teachers)
        new += fresh
        state["done"] += 1
        tell(f"{row.name} seed {seed}: done")
    return write_report(root, docs)


def _remember_command(
    root: Path, options: Mapping[str, str], steps: Mapping[str, int], settings: Mapping[str, Any], admission: bool | None
) -> None:
    """Keep every different command line that filled this folder; the table prints them."""
    words = ["imkd bench distill", *(f"--{k} {v}" for k, v in options.items() if v)]
    words += [f"--steps {k}={v}" for k, v in steps.items()] + [f"--set {k}={v}" for k, v in settings.items()]
    line = " ".join(words) + (" --no-admission" if admission is False else "") + " --out DIR --docs docs"
    path = root / "commands.json"
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
    order = {"main": 1, "controls": 2, "ablations": 3, "defects": 4}
    return sorted(cells, key=lambda c: (rank.get(c[0].kind, order[c[0].block]), seeds.index(c[1])))


# ----------------------------------------------------------------------------------------------------------------- runs


def _teachers(bench: _Bench, plan: Sequence[Row]) -> dict[str, Path]:
    """Checkpoints of the shared teachers that the plan uses, trained and scored once."""
    from imkd_models.distill import make_method

    wanted: set[str] = {"lidar"}
    for row in plan:
        if row.method:
            method = make_method(row.method)
            wanted |= set(method.teachers_for(method.make_options(row.options)))
    made: dict[str, Path] = {}
    for name in [n for n in TEACHERS if n in wanted]:
        given = {"lidar": made["lidar"]} if name == "label" else {}
        run = _run(bench, TEACHERS[name], seed=0, steps=bench.steps[name])
        folder = bench.out / "teachers" / name
        _train_and_score(
            bench, folder, run, given, facts={"row": f"teacher_{name}", "kind": "teacher", "seed": 0, "twin": None}
        )
        made[name] = folder / "train" / "last.ckpt"
    return made


def _run(bench: _Bench, name: str, *, seed: int, steps: int) -> Run:
    from pipelines.runs import get_run

    run = get_run(name).with_settings({k: str(v) for k, v in bench.settings.items()}).with_max_steps(steps)
    every = max(100, steps // 4)
    return run.with_values(seed=seed, tensorboard=False, keep=1, checkpoint_every=every, log_every=max(1, steps // 50))


def _folder(bench: _Bench, row: Row, seed: int) -> Path:
    return bench.out / "runs" / row.name / f"seed{seed}"


def run_cell(bench: _Bench, row: Row, seed: int, teachers: Mapping[str, Path]) -> dict[str, Any]:
    """One row at one seed: train (or continue), score, write ``score.json``; a finished one is only read."""
    from imkd_models.distill import make_method

    run = _run(bench, STUDENT, seed=seed, steps=bench.steps["student"])
    run = run.with_values(model={**run.model, **row.model})
    given: dict[str, Path] = {}
    if row.method:
        method = make_method(row.method)
        given = {n: teachers[n] for n in method.teachers_for(method.make_options(row.options))}
        run = run.with_method(row.method).with_values(options=dict(row.options))
    facts = {f: getattr(row, f) for f in ("kind", "block", "method", "twin", "note")} | {"row": row.name, "seed": seed}
    return _train_and_score(bench, _folder(bench, row, seed), run, given, facts=facts)


def _train_and_score(
    bench: _Bench, folder: Path, run: Run, teachers: Mapping[str, Path], *, facts: Mapping[str, Any]
) -> dict[str, Any]:
    from pipelines.train import train

    weights = {n: _weights_sha256(p) for n, p in teachers.items()}
    asked = {"run": {**run.as_dict(), "summary": ""}, "cache": bench.cache.id, "teachers": weights}
    identity = sha256(canonical_json(asked)).hexdigest()
    done = folder / "score.json"
    if done.is_file():
        score: dict[str, Any] = json.loads(done.read_text())
        if score["identity"] != identity:
            raise MismatchError(
                f"{facts['row']} seed {facts['seed']} was run with other settings, teachers or cache",
                expected=identity[:16],
                found=str(score["identity"])[:16],
                file=str(done),
                next="use another --out, or delete this run's folder",
            )
        return score
    bench.tell(f"{facts['row']} seed {facts['seed']}: training {run.max_steps} steps")
    cpu, started = time.process_time(), time.perf_counter()
    _reset_peak()
    result = train(
        run,
        bench.cache,
        folder / "train",
        dict(teachers),
        resume="auto",
        accelerator=bench.accelerator,
        progress=lambda tick: bench.tell(tick.text()) if tick.step == tick.total else None,
    )
    cost = {
        "train_seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "seconds_per_step": _seconds_per_step(folder / "train", run.global_batch or run.batch_size),
        "peak_mib": _peak_mib(),
    }
    checkpoint = folder / "train" / "last.ckpt"
    score = {
        "v": 1,
        **facts,
        "identity": identity,
        "asked": asked,
        "steps": result.step,
        "losses": result.losses,
        "weights_sha256": _weights_sha256(checkpoint),
        "materials": bench.materials,
        "preset": bench.preset.name,
        "cost": cost,
        "versions": _versions(),
    }
    if run.model.get("kind") != "label":
        score |= _score(bench, checkpoint, folder)
    if facts["kind"] in ("method", "control"):
        from pipelines.bench_probe import probe_terms

        score["probe"] = probe_terms(run, bench.cache, checkpoint, teachers, device=bench.device)
    write_json(done, score)
    return score


def _score(bench: _Bench, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Official metrics of the val rows, mAP by range ring, and the matches that the scene bootstrap reads."""
    from pipelines.bench_statistics import SceneMatches
    from pipelines.evaluate import ego_places, evaluate_checkpoint, read_tables, scored_rows
    from pipelines.evaluate_fast import CONFIG, fast_metrics, filter_table, occurring_mean
    from pipelines.evaluate_tables import truth_counts

    out = folder / "eval"
    bench.tell(f"{folder.parent.name} {folder.name}: scoring")
    summary = evaluate_checkpoint(checkpoint, bench.cache, bench.world, out, bench.engine, device=bench.device, batch_size=2)
    rows = scored_rows(bench.cache)
    tables = read_tables(
        out / "results.json",
        bench.world,
        bench.cache.recipe.version,
        [bench.cache.token(int(r)) for r in rows],
        ego_xy_m=ego_places(bench.cache, rows),
        channel=bench.cache.recipe.reference_channel,
    )
    SceneMatches.from_tables(tables, _scene_numbers(bench.cache, rows)).save(folder / "matches.npz")
    rings = []
    for low, high in RINGS_M:
        limit = {name: min(float(r), high) for name, r in CONFIG["class_range"].items()}
        truth, found = (filter_table(t, limit, None, low) for t in (tables.truth, tables.found))
        metrics, _ = fast_metrics(truth, found)
        rings.append(100 * occurring_mean(metrics["mean_dist_aps"], truth_counts(truth))[0])
    for heavy in ("results.json", "evaluation.npz", "metrics_details.json"):
        (out / heavy).unlink(missing_ok=True)
    return {
        "nds": 100 * summary["nd_score"],
        "map": 100 * summary["mean_ap"],
        "errors": {ERRORS[k]: v for k, v in summary["tp_errors"].items()},
        "map_occurring": 100 * summary["mAP_occurring"],
        "ap": {k: 100 * v for k, v in summary["mean_dist_aps"].items()},
        "map_by_range": [{"from_m": a, "to_m": b, "map": v} for (a, b), v in zip(RINGS_M, rings, strict=True)],
        "samples": summary["num_samples"],
        "engine": summary["engine"],
    }


def _scene_numbers(cache: Cache, rows: np.ndarray) -> np.ndarray:
    scene = dict(zip(cache.index.column("row").to_pylist(), cache.index.column("scene").to_pylist(), strict=True))
    names = [scene[int(r)] for r in rows]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[n] for n in names], dtype=np.int64)


# --------------------------------------------------------------------------------------------------------------- helpers


def _weights_sha256(checkpoint: Path) -> str:
    meta = json.loads((checkpoint / "checkpoint.json").read_text())
    return str(meta["weights_sha256"])


def _seconds_per_step(folder: Path, batch: int) -> float | None:
    """Median of the logged step times, None where the log has none."""
    log = folder / "log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines() if x.strip()] if log.is_file() else []
    times = [batch / line["samples_per_s"] for line in lines if line.get("samples_per_s")]
    return round(float(np.median(times)), 4) if times else None


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> float:
    """Peak GPU memory of this run, or peak resident memory of the process so far where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("imkd", "torch", "numpy", "nuscenes-devkit")}


def read_scores(out: Path) -> list[dict[str, Any]]:
    """Every ``score.json`` under a benchmark folder, teachers first."""
    found = sorted((out / "teachers").glob("*/score.json")) + sorted((out / "runs").rglob("score.json"))
    return [{**json.loads(p.read_text()), "folder": str(p.parent)} for p in found]
