"""``make demo``: the whole line on a synthetic world: tree -> cache -> teachers -> distilled student -> scores -> report."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imkd_data.errors import UsageError
from imkd_data.geometry import BevGrid
from imkd_data.recipe import PLANE_GRID

__all__ = ["DemoEvent", "DemoResult", "DemoSize", "Stage", "run_demo"]

MARKER = ".imkd-demo"
# What an earlier demo may have left; nothing else in the folder is ever touched.
OWNED = ("world", "cache", "teacher", "label", "student", "report.html", "stages.json")
STAGES = ("world", "cache", "teacher", "label", "student", "scores", "report")


# Cells of 1.6 m, a quarter of the usual number: four times as many steps in the same time are worth far more here.
GRID = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=1.6, nx=64, ny=64)
# What the cache is made of, for the build and for the command that the report shows.
RECIPE: dict[str, Any] = {"images_mode": "original", "view_cells": GRID.cell_mm // PLANE_GRID.cell_mm}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSize:
    """How much is made and trained. steps: of teacher, label encoder, student, batch size 1."""

    scenes: int = 10
    keyframes: int = 8
    image_hw_px: tuple[int, int] = (225, 400)
    steps: tuple[int, int, int] = (400, 120, 320)


FULL = DemoSize()
QUICK = DemoSize(scenes=2, keyframes=4, steps=(30, 10, 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoEvent:
    """Progress: ``kind`` begin, step or end of stage ``number`` (1-based) of ``stages``; share of it done, 0..1."""

    kind: str
    stage: str
    number: int
    stages: int
    share: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One finished stage: wall seconds, peak memory of this process and its children in MB, and what it made."""

    name: str
    seconds: float
    peak_mb: float
    text: str

    def line(self) -> str:
        """The line that the command prints."""
        return f"{self.name:<8} {self.seconds:7.1f} s {self.peak_mb:7.0f} MB  {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """report: the page. checkpoints by network. scores: metrics summaries of teacher and student."""

    out: Path
    report: Path
    checkpoints: Mapping[str, Path]
    scores: Mapping[str, Mapping[str, Any]]
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(s.seconds for s in self.stages)


Progress = Callable[[DemoEvent], None]


def _tree_memory_mb() -> float:
    """Resident memory of this process and everything it started, in MB."""
    import psutil

    total = 0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # ended in between
            continue
    return total / 1e6


class _Clock:
    """Runs stages: tells their progress, measures time and peak memory, keeps the lines."""

    def __init__(self, out: Path, progress: Progress | None) -> None:
        self.out, self.progress = out, progress
        self.done: list[Stage] = []
        self.text = ""

    def tell(self, share: float, text: str = "", kind: str = "step") -> None:
        """Progress inside the running stage."""
        if self.progress is not None:
            number = len(self.done) + 1
            self.progress(
                DemoEvent(kind=kind, stage=STAGES[number - 1], number=number, stages=len(STAGES), share=share, text=text)
            )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage; ``self.text`` says what it made."""
        assert name == STAGES[len(self.done)]
        stop, peak = threading.Event(), [_tree_memory_mb()]

        def watch() -> None:
            while not stop.wait(0.25):
                peak[0] = max(peak[0], _tree_memory_mb())

        watcher = threading.Thread(target=watch, daemon=True)
        self.text = ""
        self.tell(0.0, kind="begin")
        begun = time.perf_counter()
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
        peak[0] = max(peak[0], _tree_memory_mb())
        stage = Stage(name=name, seconds=time.perf_counter() - begun, peak_mb=peak[0], text=self.text)
        self.tell(1.0, stage.line(), kind="end")
        self.done.append(stage)
        lines = json.dumps([asdict(s) for s in self.done], indent=1)
        (self.out / "stages.json").write_text(lines + "\n")


def _prepare(out: Path) -> None:
    """A fresh folder, or one that an earlier demo made."""
    if out.exists() and not out.is_dir():
        raise UsageError("--out is a folder", found="a file", file=str(out), next="choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UsageError(
            "the folder holds something that no demo made", found=str(out), next="give --out another folder, or empty this one"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("made by imkd demo\n")
    for name in OWNED:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def demo_runs(size: DemoSize, seed: int) -> dict[str, Any]:
    """The three runs: those of ``overfit``, on the train split and the demo's grid, with the demo's numbers of steps. No plain
    student is trained here, so the teacher is compared with none."""
    from imkd_models.config import ModelConfig
    from imkd_models.presets import preset_config
    from pipelines.runs import get_run
    from pipelines.strength import NO_BASELINE

    models: tuple[ModelConfig, ...] = tuple(preset_config(name, grid=GRID) for name in ("tiny_lidar", "tiny_label", "tiny"))
    runs = {}
    for stage, model, steps in zip(get_run("overfit").stages, models, size.steps, strict=True):
        loader = replace(stage.loader, split="train")
        made = stage.with_values(model=model.as_dict(), loader=loader, seed=seed, baseline=NO_BASELINE)
        runs[stage.name] = made.with_values(max_steps=steps, checkpoint_every=steps, log_every=10)
    return runs


def run_demo(
    out: Path | str,
    *,
    quick: bool = False,
    size: DemoSize | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Run every stage in ``out`` and write ``report.html`` and ``stages.json`` there. An earlier demo is replaced.

    Leaves ``teacher/last.ckpt``, ``label/last.ckpt``, ``student/last.ckpt`` and ``<network>/eval/metrics_summary.json``.
    quick: a tiny version for continuous integration, whose scores mean nothing. workers: processes for world and cache.

    Raises:
        UsageError: ``out`` holds something else, or is a file.
    """
    out = Path(out)
    size = size or (QUICK if quick else FULL)
    _prepare(out)
    # Starting a process costs more than a tiny world.
    workers = workers or (1 if quick else max(1, min(4, len(os.sched_getaffinity(0)))))
    clock = _Clock(out, progress)
    with _threads(1 if quick else None):
        return _stages(out, size, seed, workers, clock)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Tiny tensors on shared cores: several threads that wait for each other are slower than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stages(out: Path, size: DemoSize, seed: int, workers: int, clock: _Clock) -> DemoResult:
    with clock.stage("world"):
        _world(out, size, seed, workers, clock)
    with clock.stage("cache"):
        _cache(out, size, workers, clock)
    checkpoints = _train(out, size, seed, clock)
    scores = {}
    with clock.stage("scores"):
        for i, name in enumerate(("teacher", "student")):
            scores[name] = _score(out, name, i, clock)
        clock.text = "; ".join(f"{n} NDS {s['nd_score']:.3f} mAP {s['mean_ap']:.3f}" for n, s in scores.items())
    with clock.stage("report"):
        clock.text = _report(out, size, seed, clock)
    _report(out, size, seed, clock)  # once more, now that the cost of every stage is known
    return DemoResult(out=out, report=out / "report.html", checkpoints=checkpoints, scores=scores, stages=tuple(clock.done))


def _world(out: Path, size: DemoSize, seed: int, workers: int, clock: _Clock) -> None:
    from pipelines.synth import run_synth

    run_synth(
        out=out / "world",
        scenes=size.scenes,
        keyframes=size.keyframes,
        seed=seed,
        image_size=size.image_hw_px,
        workers=workers,
        progress=lambda done, total, text: clock.tell(done / max(1, total), text),
    )
    clock.text = f"synthetic nuScenes tree: {size.scenes} scenes, {size.scenes * size.keyframes} keyframes, 12 sensors"


def _cache(out: Path, size: DemoSize, workers: int, clock: _Clock) -> None:
    from pipelines.build import build

    result = build(
        dataroot=out / "world",
        version="v1.0-mini",
        splits=("mini_train", "mini_val"),
        out=out / "cache",
        recipe_overrides=RECIPE,
        executor="threads" if workers > 1 else "sync",
        workers=workers,
        progress=lambda event: clock.tell(event.done / max(1, event.total), event.text),
    )
    clock.text = (
        f"{result.samples} samples, {result.bytes / 1e6:.0f} MB, {result.seconds / result.samples * 1e3:.0f} ms a sample"
    )


def _train(out: Path, size: DemoSize, seed: int, clock: _Clock) -> dict[str, Path]:
    from pipelines.train import train

    made: dict[str, Path] = {}
    for name, run in demo_runs(size, seed).items():
        needed = {"teacher": (), "label": ("lidar",), "student": ("lidar", "label")}[name]
        with clock.stage(name):
            teachers = {t: made[{"lidar": "teacher"}.get(t, t)] for t in needed}
            result = train(
                run, out / "cache", out / name, teachers, progress=lambda tick: clock.tell(tick.step / tick.total, tick.text())
            )
            made[name] = result.checkpoint
            losses = " ".join(f"{k} {v:.2f}" for k, v in result.losses.items())
            clock.text = f"{result.step} steps; {losses}"
    return made


def _score(out: Path, name: str, index: int, clock: _Clock) -> dict[str, Any]:
    from pipelines.evaluate import evaluate_checkpoint

    return evaluate_checkpoint(
        out / name / "last.ckpt",
        out / "cache",
        out / "world",
        out / name / "eval",
        progress=lambda done, total: clock.tell((index + 0.9 * done / total) / 2, f"{name} {done}/{total} samples"),
    )


def _report(out: Path, size: DemoSize, seed: int, clock: _Clock) -> str:
    from pipelines.report import make_report

    notes = [
        "A synthetic world, tiny networks and minutes of training: this page shows the way from a data set to a scored "
        "student. The numbers say nothing about real roads.",
        f"Scored on held-out scenes by the official nuScenes evaluation. World, weights and order follow from seed {seed}.",
    ]
    folders = [(name, out / name) for name in ("teacher", "student")]
    path = make_report(
        folders,
        out / "report.html",
        cache=out / "cache",
        title="imkd demo: a LiDAR teacher and the camera-radar student it taught",
        commands=commands(out, size, seed),
        stages=[asdict(s) for s in clock.done],
        notes=notes,
        worst=2 if size is FULL else 1,
        random=2 if size is FULL else 0,
        seed=seed,
    )
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB)"


def commands(out: Path, size: DemoSize, seed: int) -> list[str]:
    """The same steps by hand; networks and numbers of steps are in each run's ``last.ckpt/checkpoint.json``."""
    run = f"--cache {out}/cache --out {out}"
    score = f"--cache {out}/cache --dataroot {out}/world"
    height, width = size.image_hw_px
    recipe = " ".join(f"--set {key}={value}" for key, value in RECIPE.items())
    world = f"--scenes {size.scenes} --keyframes {size.keyframes} --image-size {height}x{width} --seed {seed}"
    return [
        f"imkd-data synth --out {out}/world {world}",
        f"imkd-data build --dataroot {out}/world --split mini --out {out}/cache {recipe}",
        f"imkd train tiny_teacher {run}/teacher",
        f"imkd train tiny_label {run}/label --teacher lidar={out}/teacher/last.ckpt",
        f"imkd train tiny_student {run}/student --method imkd --teacher lidar={out}/teacher/last.ckpt "
        f"--teacher label={out}/label/last.ckpt --set baseline=none",
        f"imkd evaluate --checkpoint {out}/student/last.ckpt {score} --out {out}/student/eval",
        f"imkd view {out} --cache {out}/cache --out {out}/view.html",
        f"imkd report {out}/teacher {out}/student --cache {out}/cache --out {out}/report.html",
    ]
