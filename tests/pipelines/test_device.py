"""A device that is not there, or does not exist, is said as such by every command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.main import run_group
from imkd_data.errors import UsageError
from pipelines.device import device_of


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_named_device_must_be_there(monkeypatch: pytest.MonkeyPatch, no_cuda: None) -> None:
    assert device_of("auto") == device_of("cpu") == "cpu" and device_of("cpu:0") == "cpu:0"
    for asked in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match="no CUDA device here") as caught:
            device_of(asked)
        assert torch.__version__ in caught.value.details["found"] and "cpu" in caught.value.details["next"]
    for asked in ("foo", "", "cuda:x", "0", "meta"):
        with pytest.raises(UsageError, match="no such device") as caught:
            device_of(asked)
        assert caught.value.details["found"] == repr(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(d) for d in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(UsageError, match="no CUDA device 2 here") as caught:
        device_of("cuda:2")
    assert caught.value.details["found"] == "2 devices"


def test_mps_works_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of("mps") == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no MPS device here"):
        device_of("mps")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from toy_training import toy_cache, toy_run

    import imkd_data.opened as opened
    import pipelines.runs as runs

    made = toy_cache(tmp_path / "cache")
    monkeypatch.setattr(opened, "open_cache", lambda *a, **k: made)
    monkeypatch.setitem(runs.RUNS, "toy_lidar", toy_run)
    return tmp_path


COMMANDS = [
    "evaluate --checkpoint k --cache c --dataroot d --out {out} --device cuda",
    "predict --checkpoint k --dataroot d --split val --out {out} --device cuda:0",
    "cache-teacher --checkpoint k --cache c --features bev_neck --device cuda",
    "train toy_lidar --cache c --out {out} --accelerator cuda",
    "train toy_lidar --cache c --plan --plan-steps 1 --accelerator cuda",
    "bench step toy_lidar --cache c --accelerator cuda",
    "bench distill --preset smoke --out {out} --accelerator cuda",
]


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(c.split()[:2]) for c in COMMANDS])
def test_cuda_without_cuda_is_exit_2(words: str, toy: Path, no_cuda: None, capfd: Any, monkeypatch: Any) -> None:
    from cli.model import group

    monkeypatch.setattr(sys, "argv", ["imkd"])
    code = run_group(group, "imkd", words.format(out=toy / "out").split())
    error = capfd.readouterr().err
    assert code == 2 and "no CUDA device here" in error and "bug" not in error, error
    assert not (toy / "out").exists()


def test_a_device_that_does_not_exist_is_exit_2(tmp_path: Path, capfd: Any) -> None:
    from cli.model import group

    words = f"evaluate --checkpoint k --cache c --dataroot d --out {tmp_path / 'out'} --device foo"
    assert run_group(group, "imkd", words.split()) == 2
    assert "no such device" in capfd.readouterr().err
