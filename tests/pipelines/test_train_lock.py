"""One training a folder: a second one is told so, and the lock goes with the process that held it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import toy_cache, toy_run

from imkd_data.errors import LockedError, MismatchError, UsageError
from imkd_models.checkpoint import load_checkpoint
from pipelines.guard import run_lock
from pipelines.train import train

HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def cache(root: Path) -> Any:
    return toy_cache(root)


def test_a_second_training_of_a_folder_is_refused_and_the_first_goes_on(cache: Any, tmp_path: Path) -> None:
    refused: list[LockedError] = []
    out = tmp_path / "run"

    def again(tick: Any) -> None:
        if tick.step in (1, 4):
            with pytest.raises(LockedError, match="another training") as caught:
                train(toy_run(), cache, out, resume="auto", accelerator="cpu")
            refused.append(caught.value)

    assert train(toy_run(), cache, out, progress=again, accelerator="cpu").step == 6
    assert [e.code for e in refused] == [7, 7] and refused[0].details["file"] == str(out / ".lock")
    assert f"pid {os.getpid()}" in refused[0].details["found"]
    assert load_checkpoint(out).step == 6 and not (out / ".lock").exists()
    assert train(toy_run(), cache, out, resume="auto", accelerator="cpu").step == 6


def test_stages_are_held_one_by_one(cache: Any, tmp_path: Path) -> None:
    run = toy_run(max_steps=1).with_values(name="first")
    both = toy_run().with_values(name="both", model={}, stages=(run, run.with_values(name="second")))
    seen: list[str] = []

    def again(tick: Any) -> None:
        with pytest.raises(LockedError) as caught:
            train(both, cache, tmp_path / "run", resume="auto", accelerator="cpu")
        seen.append(Path(caught.value.details["file"]).parent.name)

    train(both, cache, tmp_path / "run", progress=again, accelerator="cpu")
    assert seen == ["first", "second"] and not list((tmp_path / "run").rglob(".lock"))


def test_the_lock_goes_with_its_process(root: Path, cache: Any, tmp_path: Path) -> None:
    """Held by a live process, free once it is killed, although its file is still there."""
    out = tmp_path / "run"
    command = [sys.executable, str(HERE / "toy_training.py"), str(root), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env={**environment, "IMKD_FAULT": "train.step:sleep:3"}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not (out / "last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(LockedError, match="another training"):
            train(toy_run(), cache, out, resume="auto", accelerator="cpu")
    finally:
        process.kill()
        process.wait(10)
    assert (out / ".lock").exists()
    assert train(toy_run(), cache, out, resume="auto", accelerator="cpu").step == 6


def test_a_refused_run_leaves_no_folder_and_no_lock(cache: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fewer rows"):
        train(toy_run(batch_size=64), cache, tmp_path / "deep" / "run", accelerator="cpu")
    assert not (tmp_path / "deep").exists()
    train(toy_run(max_steps=2), cache, tmp_path / "run", accelerator="cpu")
    with pytest.raises(MismatchError) as kept:  # the error keeps the frames alive, not the lock
        train(toy_run(seed=5), cache, tmp_path / "run", resume=True, accelerator="cpu")
    assert kept and train(toy_run(), cache, tmp_path / "run", resume=True, accelerator="cpu").step == 6


def test_file_systems_without_locks_are_trained_on(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert train(toy_run(max_steps=1), cache, tmp_path / "run", accelerator="cpu").step == 1


def test_other_ranks_take_no_lock_and_stop_with_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_lock(tmp_path / "run", 0, CPU), run_lock(tmp_path / "run", 1, CPU):
        with pytest.raises(LockedError), run_lock(tmp_path / "run", 0, CPU):
            pass
        assert (tmp_path / "run" / ".lock").is_file()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("pipelines.guard.agree", lambda value, device: 1)  # rank 0 was refused
    with pytest.raises(LockedError) as caught, run_lock(tmp_path / "run", 1, CPU):
        pass
    assert caught.value.details["found"] == "see the message of rank 0"


def test_what_another_training_saved_meanwhile_is_continued_from(
    cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one ends between this one's look at the folder and its lock."""
    import pipelines.train as module

    out, real = tmp_path / "run", module.make_fabric
    train(toy_run(max_steps=2), cache, out, accelerator="cpu")

    def late(*given: Any) -> Any:
        monkeypatch.setattr(module, "make_fabric", real)
        train(toy_run(max_steps=4), cache, out, resume=True, accelerator="cpu")
        return real(*given)

    monkeypatch.setattr(module, "make_fabric", late)
    steps: list[int] = []
    train(toy_run(), cache, out, resume=True, progress=lambda tick: steps.append(tick.step), accelerator="cpu")
    assert steps[-2:] == [5, 6] and steps.count(3) == 0


@pytest.mark.parametrize("below", ["", "run"])
@pytest.mark.parametrize("resume", [False, "auto", True])
def test_an_out_that_is_a_file_is_said(cache: Any, tmp_path: Path, below: str, resume: Any) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="--out is a folder") as caught:
        train(toy_run(), cache, tmp_path / "file" / below, resume=resume, accelerator="cpu")
    assert caught.value.details["file"] == str(tmp_path / "file") and caught.value.details["found"] == "a file"
    assert (tmp_path / "file").read_text() == "mine"
