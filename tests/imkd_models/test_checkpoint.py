"""Checkpoints: whole or absent, refused when damaged or foreign, no pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imkd_data.errors import CacheDamageError, DiskFullError, MismatchError, SourceMissingError
from imkd_models.checkpoint import (
    add_score,
    load_checkpoint,
    load_weights,
    resolve_checkpoint,
    save_checkpoint,
    weights_hash,
)

POINTS = (
    "checkpoint.begin",
    "checkpoint.file.model",
    "checkpoint.file.training",
    "checkpoint.written",
    "checkpoint.renamed",
    "checkpoint.last.ckpt",
    "checkpoint.drop",
)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))


MOMENTS = {0: {"step": torch.tensor(3.0), "avg": torch.arange(6.0).reshape(2, 3)}}
STATE = {
    "optimizer": {"state": MOMENTS, "groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "stream": {"epoch": 2, "consumed": 7, "none": None, "flag": True},
}


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b and type(a) is type(b)


def test_round_trip(tmp_path: Path) -> None:
    model, adaptor = net(), nn.Linear(2, 2)
    folder = save_checkpoint(tmp_path / "run", 12, model, adaptor, STATE, {"run": {"name": "x"}, "model": {"kind": "t"}})
    assert folder.name == "step-00000012.ckpt"
    assert os.readlink(tmp_path / "run" / "last.ckpt") == "step-00000012.ckpt"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["last.ckpt", "step-00000012.ckpt"]
    for way in (folder, tmp_path / "run" / "last.ckpt", tmp_path / "run"):
        opened = load_checkpoint(way)
        assert opened.step == 12 and opened.meta["run"] == {"name": "x"}
        assert equal(opened.model, dict(model.state_dict())) and equal(opened.training, STATE)
        assert opened.distiller is not None and torch.equal(opened.distiller["weight"], adaptor.weight)
    other = net(1)
    load_weights(other, opened.model)
    assert weights_hash(other) == weights_hash(model) == opened.meta["weights_sha256"] != weights_hash(net(1))
    assert not any(p.suffix in (".pt", ".pkl") for p in folder.iterdir())


def test_keep_best_and_relative_links(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(1, 7):
        save_checkpoint(run, step, net(step), keep=2)
        if step in (1, 2):
            add_score(run, step, step / 10, best=True)
    assert sorted(p.name for p in run.iterdir() if p.is_dir() and not p.is_symlink()) == [
        "step-00000002.ckpt",
        "step-00000005.ckpt",
        "step-00000006.ckpt",
    ]
    run.rename(tmp_path / "moved")
    assert load_checkpoint(tmp_path / "moved" / "best.ckpt").step == 2
    assert load_checkpoint(tmp_path / "moved").step == 6


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, net(), None, STATE, {"run": {}})
    rng = np.random.default_rng(0)
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for _ in range(25):
            bad = bytearray(good)
            bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
            file.write_bytes(bad)
            with pytest.raises(CacheDamageError) as error:
                load_checkpoint(folder)
            assert file.name in str(error.value)
        for short in (good[:-1], b""):
            file.write_bytes(short)
            with pytest.raises(CacheDamageError):
                load_checkpoint(folder)
        file.write_bytes(good)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CacheDamageError, match="missing"):
        load_checkpoint(folder)


def test_foreign_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError):
        load_checkpoint(tmp_path / "nothing")
    torch.save({"a": 1}, tmp_path / "model.pth")
    with pytest.raises(MismatchError, match="pickled"):
        resolve_checkpoint(tmp_path / "model.pth")
    folder = save_checkpoint(tmp_path / "run", 1, net())
    with pytest.raises(MismatchError) as error:
        load_weights(nn.Sequential(nn.Conv2d(3, 6, 3)), load_checkpoint(folder).model)
    assert "1.running_mean" in str(error.value) and "(6, 3, 3, 3) / (5, 3, 3, 3)" in str(error.value)
    newer = json.loads((folder / "checkpoint.json").read_text())
    from hashlib import sha256

    from imkd_data.recipe import canonical_json

    newer["format"] = 99
    newer.pop("sha256")
    newer["sha256"] = sha256(canonical_json(newer)).hexdigest()
    (folder / "checkpoint.json").write_bytes(canonical_json(newer))
    with pytest.raises(MismatchError, match="another format"):
        load_checkpoint(folder)


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import STATE, net
from imkd_models.checkpoint import save_checkpoint
save_checkpoint(Path({run!r}), 4, net(4), None, STATE, keep=1)
"""

SCORE_SCRIPT = """
from pathlib import Path
from imkd_models.checkpoint import add_score
add_score(Path({run!r}), 2, 0.5, best=True)
"""


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_every_step_of_the_save(tmp_path: Path, point: str) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save_checkpoint(run, step, net(step), None, STATE, keep=3)
    script = SCRIPT.format(here=str(Path(__file__).parent), run=str(run))
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "IMKD_FAULT": f"{point}:kill"}, timeout=60)
    assert killed.returncode == -9
    after = load_checkpoint(run / "last.ckpt")  # the previous one, or the new one, never a torn one
    assert after.step == (4 if POINTS.index(point) >= POINTS.index("checkpoint.last.ckpt") else 3)
    assert equal(after.model, dict(net(after.step).state_dict()))
    save_checkpoint(run, 4, net(4), None, STATE, keep=1)  # the same save again succeeds and leaves nothing behind
    assert load_checkpoint(run).step == 4
    assert not [p for p in run.iterdir() if p.name.startswith(".step")]


@pytest.mark.parametrize("point", ["checkpoint.best.ckpt", "checkpoint.score"])
def test_kill_while_a_score_is_added(tmp_path: Path, point: str) -> None:
    """The checkpoint is whole and has no score, so a resumed run adds it again."""
    run = tmp_path / "run"
    for step in (1, 2):
        save_checkpoint(run, step, net(step), None, STATE, {"metrics": {"losses": {"loss": 1.0}}})
    add_score(run, 1, 0.25, best=True)
    env = {**os.environ, "IMKD_FAULT": f"{point}:kill"}
    assert subprocess.run([sys.executable, "-c", SCORE_SCRIPT.format(run=str(run))], env=env, timeout=60).returncode == -9
    after = load_checkpoint(run)
    assert after.meta["metrics"] == {"losses": {"loss": 1.0}} and equal(after.training, STATE)
    assert load_checkpoint(run / "best.ckpt").step == 2
    add_score(run, 2, 0.5, best=True)
    assert load_checkpoint(run / "best.ckpt").meta["metrics"]["score"] == 0.5
    assert not list((run / "step-00000002.ckpt").glob(".*"))


def test_a_damaged_checkpoint_gets_no_score(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, net())
    text = (folder / "checkpoint.json").read_text()
    (folder / "checkpoint.json").write_text(text.replace('"step":1', '"step":2'))
    with pytest.raises(CacheDamageError, match="was changed"):
        add_score(tmp_path, 1, 0.5, best=True)
    with pytest.raises(SourceMissingError):
        add_score(tmp_path, 7, 0.5, best=True)
    assert not (tmp_path / "best.ckpt").is_symlink()


@pytest.mark.parametrize("point", ["checkpoint.file.model", "checkpoint.written"])
def test_full_disk_keeps_the_previous_one(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, net(1))
    monkeypatch.setenv("IMKD_FAULT", f"{point}:enospc")
    with pytest.raises(DiskFullError, match="previous checkpoint is unchanged"):
        save_checkpoint(tmp_path, 2, net(2))
    assert load_checkpoint(tmp_path).step == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
