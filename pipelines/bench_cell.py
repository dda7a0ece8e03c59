"""One run of the distillation benchmark: train or continue, score by the official metric, write ``score.json``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.errors import MismatchError, StorageError, UsageError
from imkd_data.recipe import canonical_json
from pipelines.bench_presets import Preset
from pipelines.bench_world import write_json
from pipelines.device import device_of
from pipelines.resumable import FREE

if TYPE_CHECKING:
    from torch import nn

    from imkd_data.cache.store import Cache
    from pipelines.run import Run

__all__ = ["Bench", "run_of", "score_again", "settings_of", "train_and_score"]

ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
RINGS_M = ((0.0, 20.0), (20.0, 30.0), (30.0, 50.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    out: Path
    preset: Preset
    world: Path
    cache: Cache
    accelerator: str
    engine: Any  # None: predictions are kept, to be scored later
    tell: Callable[[str], None]
    steps: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    materials: str = "class"
    devices: int = 1
    held_in: int = 0
    stored: Cache | None = None  # with teachers' maps, for runs that read them

    @property
    def scored(self) -> dict[str, Any]:
        """Rows that count: the val scenes, or the train scenes that tuning keeps back."""
        from imkd_data.loader.rows import TRAIN_SPLITS
        from pipelines.sampling import held_in_scenes

        if not self.held_in:
            return {}
        splits = sorted(set(self.cache.index.column("split").to_pylist()) & set(TRAIN_SPLITS))
        return {"split": ",".join(splits), "scenes": held_in_scenes(self.cache, "train", self.held_in)}

    @property
    def device(self) -> str:
        """Where scores are computed."""
        return device_of(self.accelerator)


def run_of(bench: Bench, network: str, *, seed: int) -> Run:
    """The preset's run of a network (lidar, label, fusion, student) with the benchmark's settings, steps and share of a batch.

    Raises:
        UsageError: the devices cannot share the batch.
    """
    from pipelines.runs import get_run

    run = get_run(bench.preset.networks[network]).with_settings({k: str(v) for k, v in bench.settings.items()})
    run = run.with_values(loader=replace(run.loader, leave_out=bench.held_in))
    run = run.with_values(seed=seed, tensorboard=False, keep=1)
    if bench.devices > 1 and not run.global_batch:  # full-size runs say their global batch themselves
        if run.batch_size % bench.devices:
            wanted, found = f"a divisor of {run.batch_size}", f"--devices {bench.devices}"
            raise UsageError("the devices cannot share the batch", expected=wanted, found=found)
        run = run.with_values(global_batch=run.batch_size, batch_size=run.batch_size // bench.devices)
    if network not in bench.steps:  # a full-size run keeps its own epochs and checkpoints
        return run
    steps = bench.steps[network]
    return run.with_max_steps(steps).with_values(checkpoint_every=max(100, steps // 4), log_every=max(1, steps // 50))


def train_and_score(
    bench: Bench, folder: Path, run: Run, teachers: Mapping[str, Path], *, facts: Mapping[str, Any]
) -> dict[str, Any]:
    import torch

    from pipelines.forecast import counted_memory

    weights = {n: _weights_sha256(p) for n, p in teachers.items()}
    start = _weights_sha256(Path(run.start)) if run.start else ""
    asked = {"run": {**run.as_dict(), "summary": "", "start": start}, "cache": bench.cache.id, "teachers": weights}
    cache = bench.stored if bench.stored is not None and run.loader.cached_teachers else bench.cache
    identity = sha256(canonical_json(asked)).hexdigest()
    done = folder / "score.json"
    if done.is_file():
        score: dict[str, Any] = json.loads(done.read_text())
        if _completed(score["asked"]) != _completed(asked):
            raise MismatchError(
                f"{facts['row']} seed {facts['seed']} was run with other settings, teachers or cache",
                expected=identity[:16],
                found=str(score["identity"])[:16],
                file=str(done),
                next="use another --out, or delete this run's folder",
            )
        if not score.get("to_score") or not bench.engine:
            return score
        del score["to_score"]
        there = (folder / "eval" / "results.json").is_file()  # not so where a first scoring was stopped at its very end
        score |= _score(bench, folder / "train" / "last.ckpt", folder, predicted=there)
        write_json(done, score)
        return score
    length = f"{run.max_steps} steps" if run.max_steps else f"{run.epochs} epochs"
    bench.tell(f"{facts['row']} seed {facts['seed']}: training {length}")
    seen = bench.devices == 1 and not (folder / "train" / "last.ckpt").exists()  # all of its time is spent in this process
    cpu, started = time.process_time(), time.perf_counter()
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = _train(bench, run, cache, folder / "train", teachers)
    cost = {
        "train_seconds": round(time.perf_counter() - started, 2) if seen else None,
        "cpu_seconds": round(time.process_time() - cpu, 2) if seen else None,
        "seconds_per_step": _seconds_per_step(folder / "train", run.global_batch or run.batch_size),
        "device": bench.device,
        "counted_mib": round(counted_memory(run, cache, teachers)[0].counted / 2**20, 1),
    }
    if bench.device == "cuda":
        cost["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    checkpoint = folder / "train" / "last.ckpt"
    score = {
        "v": 1,
        **facts,
        "identity": identity,
        "asked": asked,
        "steps": json.loads((checkpoint / "checkpoint.json").read_text())["step"],
        "losses": losses,
        "weights_sha256": _weights_sha256(checkpoint),
        "materials": bench.materials,
        "preset": bench.preset.name,
        "cost": cost,
        "versions": _versions(),
        "made_by": {"code": _code_sha256(), "processor": _processor(bench.device)},
    }
    if run.model.get("kind") != "label":
        score |= _score(bench, checkpoint, folder) if bench.engine else _predicted(bench, checkpoint, folder)
    if facts["kind"] in ("method", "control") or (run.start and teachers):
        from pipelines.bench_probe import probe_terms

        score["probe"] = probe_terms(run, cache, checkpoint, teachers, device=bench.device)
    write_json(done, score)
    return score


def score_again(bench: Bench, folder: Path, trained: Path, sim_at_test: str, *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Score the network of a finished run with its simulated map replaced (``lose_simulated``); nothing is trained."""
    from imkd_models.distill.adaptive_smooth import lose_simulated

    first = json.loads((trained / "score.json").read_text())
    asked = {**first["asked"], "sim_at_test": sim_at_test}
    done = folder / "score.json"
    if done.is_file():
        score: dict[str, Any] = json.loads(done.read_text())
        if score["weights_sha256"] != first["weights_sha256"]:
            raise MismatchError(
                f"{facts['row']} seed {facts['seed']} was scored on another network than {facts['twin']} has now",
                expected=f"weights {first['weights_sha256'][:16]}",
                found=f"weights {score['weights_sha256'][:16]}",
                file=str(done),
                next="delete this run's folder; the same command scores it again",
            )
        return score
    bench.tell(f"{facts['row']} seed {facts['seed']}: scoring {facts['twin']} again")
    kept = {k: first[k] for k in ("v", "steps", "weights_sha256", "materials", "preset", "versions")}
    score = {**kept, **facts, "identity": sha256(canonical_json(asked)).hexdigest(), "asked": asked, "cost": {}}
    checkpoint = trained / "train" / "last.ckpt"
    score |= _score(bench, checkpoint, folder, change=lambda model: lose_simulated(model, sim_at_test))
    write_json(done, score)
    return score


def settings_of(score: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of one table share: of a finished run's settings, today's form, those that neither row nor seed decide."""
    run = json.loads(_completed({**score["asked"], "teachers": {}}))["run"]
    left_out = {"name", "seed", "model", "method", "options", "start", "loader", "optim", *FREE} - {
        "max_steps",
        "epochs",
        "batch_size",
    }
    kept = {k: v for k, v in run.items() if k not in left_out}
    by_row = {"loader": ("parity", "augment", "cached_teachers"), "optim": ("lr",) if run["start"] else ()}
    parts = {f"{part}.{k}": v for part, own in by_row.items() for k, v in run[part].items() if k not in own}
    return {"cache": score["asked"]["cache"], **kept, **parts}


def _code_sha256() -> str:
    """Of every module of this program: two runs that are compared should come of the same code."""
    top, digest = Path(__file__).parents[1], sha256()
    for path in sorted(p for room in ("imkd_data", "imkd_models", "pipelines") for p in (top / room).rglob("*.py")):
        digest.update(path.relative_to(top).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor(device: str) -> str:
    """Name of the card, or of the processor: weights repeat bit for bit on one, not from one to another."""
    import platform

    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _completed(asked: Mapping[str, Any]) -> bytes:
    """What a finished run was asked for, in today's form: a setting that came later has its default, and changes nothing."""
    from imkd_models.presets import config_from_dict
    from pipelines.run import Run

    run = Run.from_dict(asked["run"]).as_dict()
    return canonical_json({**asked, "run": {**run, "model": config_from_dict(run["model"]).as_dict() if run["model"] else {}}})


def _train(bench: Bench, run: Run, cache: Cache, out: Path, teachers: Mapping[str, Path]) -> dict[str, float]:
    """Train or continue; the last logged losses. Several devices train in a process of their own: Fabric starts the other
    ranks by repeating the command line, and this one has the benchmark's state."""
    from pipelines.strength import NO_BASELINE

    if not run.baseline and not bench.preset.real:  # admission, not a published figure, says whether the teacher is ahead
        run = run.with_values(baseline=NO_BASELINE)
    if bench.devices == 1:
        from pipelines.train import train

        done = train(
            run,
            cache,
            out,
            dict(teachers),
            resume="auto",
            accelerator=bench.accelerator,
            progress=lambda tick: bench.tell(tick.text()) if tick.step == tick.total else None,
        )
        return dict(done.losses)
    config = out.parent / "run.json"
    write_json(config, run.as_dict())
    words = [sys.executable, "-m", "cli", "train", run.name, "--config", str(config), "--cache", str(cache.path)]
    words += ["--out", str(out), "--resume", "auto", "--devices", str(bench.devices), "--accelerator", bench.accelerator]
    words += [w for name, path in teachers.items() for w in ("--teacher", f"{name}={path}")]
    failed = subprocess.run(words, check=False).returncode
    if failed:
        raise StorageError(
            f"training of {run.name} on {bench.devices} devices ended with exit code {failed}",
            file=str(out),
            next="its message stands above; the same command continues from the last checkpoint",
        )
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    return {k: v for k, v in last.items() if k == "loss" or k.startswith(("det_", "depth"))}


def _predicted(bench: Bench, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Predictions of the val rows, ``eval/results.json``, which the same command with an engine scores, here or elsewhere."""
    from pipelines.evaluate import predict_checkpoint

    bench.tell(f"{folder.parent.name} {folder.name}: predicting")
    predict_checkpoint(checkpoint, bench.cache, folder / "eval", **bench.scored, device=bench.device, batch_size=2)
    return {"to_score": True}


def _score(
    bench: Bench,
    checkpoint: Path,
    folder: Path,
    change: Callable[[nn.Module], None] | None = None,
    *,
    predicted: bool = False,
) -> dict[str, Any]:
    """Official metrics of the val rows, mAP by range ring, and the matches that the scene bootstrap reads. ``change``: done to
    the network first. predicted: by ``_predicted``, before."""
    from pipelines.bench_statistics import SceneMatches
    from pipelines.evaluate import ego_places, predict_checkpoint, read_tables, score_checkpoint, scored_rows
    from pipelines.evaluate_fast import CONFIG, fast_metrics, filter_table, occurring_mean
    from pipelines.evaluate_tables import truth_counts

    out = folder / "eval"
    bench.tell(f"{folder.parent.name} {folder.name}: scoring")
    which = bench.scored
    if not predicted:
        predict_checkpoint(checkpoint, bench.cache, out, **which, device=bench.device, batch_size=2, change=change)
    summary = score_checkpoint(
        checkpoint, bench.cache, bench.world, out, bench.engine, **which, keep=change is None, results=out / "results.json"
    )
    rows = scored_rows(bench.cache, **which)
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


def _weights_sha256(checkpoint: Path) -> str:
    meta = json.loads((checkpoint / "checkpoint.json").read_text())
    return str(meta["weights_sha256"])


def _seconds_per_step(folder: Path, batch: int) -> float | None:
    """Median of the logged step times, None where the log has none."""
    log = folder / "log.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines() if x.strip()] if log.is_file() else []
    times = [batch / line["samples_per_s"] for line in lines if line.get("samples_per_s")]
    return round(float(np.median(times)), 4) if times else None


def _versions() -> dict[str, str]:
    """Of the packages that scores depend on; the devkit may be missing where only the fast engine or none scores."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("imkd", "torch", "numpy", "nuscenes-devkit"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
