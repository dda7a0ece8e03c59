"""Validation while training by the official metric; a loader worker that dies; the table of counted multiply-adds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_cache import disk_cache
from toy_training import toy_cache, toy_run

from imkd_data import open_cache
from imkd_data.errors import (
    CacheDamageError,
    InterruptedBuildError,
    NoProgressError,
    SourceMissingError,
    StorageError,
    UsageError,
)
from imkd_data.loader.stream import stream
from imkd_models.checkpoint import load_checkpoint
from pipelines.counting import _TABLE, count_cost, macs_key, resolved_config
from pipelines.run import OptimConfig
from pipelines.runs import RUNS, get_run
from pipelines.strength import own_scores
from pipelines.train import train


def test_the_best_checkpoint_is_kept_and_training_is_not_disturbed(line: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    optim = OptimConfig(lr=1e-3, schedule="constant", ema=0.5)
    run = get_run("tiny_teacher").with_values(
        max_steps=2, batch_size=1, checkpoint_every=1, keep=1, log_every=1, tensorboard=False, optim=optim
    )
    plain = train(run, line.cache, tmp_path / "plain", accelerator="cpu")
    scored = train(run.with_values(validate_every=1), line.cache, tmp_path / "scored", dataroot=line.tree, accelerator="cpu")
    best = load_checkpoint(tmp_path / "scored" / "best.ckpt")
    assert 0.0 <= best.meta["metrics"]["score"] <= 1.0 and best.step in (1, 2)
    summary = tmp_path / "scored" / "validation" / "metrics_summary.json"
    known = json.loads(summary.read_text())
    assert known["checkpoint"]["weights_sha256"] == load_checkpoint(scored.checkpoint).meta["weights_sha256"]
    assert known["checkpoint"]["step"] == 2
    found = own_scores(scored.checkpoint)
    assert found is not None and found["from"] == str(summary) and found["nds"] == known["nd_score"]
    assert own_scores(tmp_path / "scored" / "step-00000001.ckpt" if best.step == 1 else plain.checkpoint.parent) is None
    assert load_checkpoint(plain.checkpoint).files == load_checkpoint(scored.checkpoint).files


def test_every_validation_takes_place_and_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At steps 2 and 4 of 5, though checkpoints are due at the end alone; ``best.ckpt`` outlives ``keep``."""
    torch.set_num_threads(1)
    cache, scores = toy_cache(tmp_path / "world"), iter((0.5, 0.25))
    (tmp_path / "tree" / cache.recipe.version).mkdir(parents=True)
    steps: list[int] = []

    def score(*_: Any, meta: Any, **__: Any) -> float:
        steps.append(meta["step"])
        return next(scores)

    monkeypatch.setattr("pipelines.validate.score_network", score)
    run = toy_run(max_steps=5, checkpoint_every=5, validate_every=2, keep=1)
    out = tmp_path / "run"
    train(run, cache, out, accelerator="cpu", dataroot=tmp_path / "tree")
    assert steps == [2, 4] and load_checkpoint(out / "best.ckpt").meta["metrics"]["score"] == 0.5
    assert sorted(p.name for p in out.glob("step-*")) == ["step-00000002.ckpt", "step-00000005.ckpt"]


@pytest.mark.parametrize("end", ["signal before", "killed meanwhile"])
def test_a_run_that_ends_on_a_validation_step_keeps_it_and_validates_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A stop signal saves at once (a scheduler's grace is shorter than a validation); what ends a validation loses no step."""
    torch.set_num_threads(1)
    cache, out = toy_cache(tmp_path / "world"), tmp_path / "run"
    (tmp_path / "tree" / cache.recipe.version).mkdir(parents=True)
    run = toy_run(max_steps=4, checkpoint_every=4, validate_every=2)
    scored: list[int] = []

    def score(*_: Any, meta: Any, **__: Any) -> float:
        if end == "killed meanwhile" and not scored:
            scored.append(-1)
            raise KeyboardInterrupt
        scored.append(meta["step"])
        return 0.5

    def ends(tick: Any) -> None:
        if tick.step == 2 and end == "signal before" and not out.joinpath("last.ckpt").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("pipelines.validate.score_network", score)
    values: dict[str, Any] = {"accelerator": "cpu", "dataroot": tmp_path / "tree", "progress": ends}
    with pytest.raises(InterruptedBuildError if end == "signal before" else KeyboardInterrupt):
        train(run, cache, out, **values)
    left = load_checkpoint(out)
    assert left.step == 2 and "score" not in left.meta["metrics"] and scored in ([], [-1])
    train(run, cache, out, resume=True, **values)
    assert [s for s in scored if s > 0] == [2, 4]
    assert load_checkpoint(out / "step-00000002.ckpt").meta["metrics"]["score"] == 0.5
    train(run, cache, out, resume=True, **values)  # finished and scored: nothing to do
    assert [s for s in scored if s > 0] == [2, 4]


def test_validation_without_its_truth_is_refused_before_training(tmp_path: Path) -> None:
    """Not at the first validation, and no stage is trained before the one that validates is reached."""
    cache = toy_cache(tmp_path / "world")
    run = toy_run(max_steps=3, checkpoint_every=3, validate_every=2)
    plain = toy_run(name="teacher", max_steps=3)
    for each in (run, toy_run(name="both", model={}, stages=(plain, run))):
        with pytest.raises(UsageError, match="--dataroot"):
            train(each, cache, tmp_path / "run", accelerator="cpu")
    with pytest.raises(SourceMissingError, match=cache.recipe.version):
        train(run, cache, tmp_path / "run", accelerator="cpu", dataroot=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_dead_worker_is_an_error_with_tokens_and_advice(tmp_path: Path) -> None:
    cache = open_cache(disk_cache(tmp_path))
    batches = iter(stream(cache, 1, workers=1, split="all", fields=("boxes",)))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(StorageError, match="worker died") as error:
        for _ in batches:
            pass
    assert "/dev/shm" in str(error.value) and error.value.details["token"] and error.value.code == 5


def test_a_worker_that_hangs_is_named_after_the_timeout(tmp_path: Path) -> None:
    """A dead mount: opening the shard never returns."""
    root = disk_cache(tmp_path)
    cache = open_cache(root)
    shard = root / "arrays.zarr" / "boxes" / "c" / "0" / "0" / "0"
    shard.unlink()
    os.mkfifo(shard)
    started = time.monotonic()
    with pytest.raises(NoProgressError, match="within 7 s") as error:
        next(iter(stream(cache, 1, workers=1, split="all", shuffle="none", fields=("boxes",), timeout_s=7)))
    assert error.value.details["token"] and 7 <= time.monotonic() - started < 60


def test_streaming_leaves_the_callers_signal_handler(tmp_path: Path) -> None:
    """torch's own handler would raise a worker's death anywhere, for instance inside a checkpoint's write."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(stream(open_cache(disk_cache(tmp_path)), 1, workers=1, split="all", fields=("boxes",)))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before


def test_damage_in_a_worker_keeps_its_details(tmp_path: Path) -> None:
    root = disk_cache(tmp_path)
    cache = open_cache(root)
    row = int(cache.rows("train")[0])
    file = root / "arrays.zarr" / "boxes" / "c" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CacheDamageError) as error:
        next(iter(stream(cache, 1, workers=1, rows=[row], shuffle="none", fields=("boxes",))))
    assert error.value.details["token"] == cache.token(row) and error.value.details["field"] == "boxes"


def test_the_table_of_counts_is_current() -> None:
    """Every named run is in it (`python -m pipelines.counting` writes it); small ones are counted anew."""
    table = json.loads(_TABLE.read_text())
    missing = []
    for name, make in RUNS.items():
        run = make()
        for one in run.stages or (run,):
            config = resolved_config(one)
            if config.kind == "label" or getattr(getattr(config, "lidar", config), "encoder", "") == "voxel":
                continue  # boxes alone; spconv
            if macs_key(config) not in table:
                missing.append(f"{name}/{one.name}")
            elif "tiny" in config.name:
                macs, kept = count_cost(config) or (0, 0)
                assert table[macs_key(config)] == [macs, pytest.approx(kept, rel=0.01)], name  # what autograd keeps is torch's
    assert not missing, "run `python -m pipelines.counting`"
