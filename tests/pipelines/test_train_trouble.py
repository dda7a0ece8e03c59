"""Damaged samples, lost ranks and unsuitable devices: what a training run says and does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cache import MemoryCache
from torch import nn
from toy_training import GRID, toy_cache, toy_run

from imkd_data.errors import CacheDamageError, MismatchError, NoProgressError, UsageError
from imkd_models.blocks import PointNorm
from imkd_models.checkpoint import load_checkpoint
from pipelines.guard import lost_rank
from pipelines.networks import TrainUnit, build_networks
from pipelines.optimise import synchronised
from pipelines.run import LoaderConfig
from pipelines.train import train
from pipelines.trainlog import TrainLog

HERE = Path(__file__).parent


class Holed(MemoryCache):
    """One row's boxes are damaged."""

    def read(self, name: str, row: int) -> Any:
        if name == "boxes" and row == 2:
            raise CacheDamageError("stored bytes are damaged", token=self.token(row))
        return super().read(name, row)


def test_skip_names_logs_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache: Any = Holed(tmp_path / "world", grid=GRID)
    with pytest.raises(CacheDamageError, match="damaged"):
        train(toy_run(), cache, tmp_path / "stop", accelerator="cpu")
    run = toy_run(loader=LoaderConfig(workers=0, on_bad_sample="skip"))
    whole = train(run, cache, tmp_path / "whole", accelerator="cpu")
    token = cache.token(2)
    assert whole.skipped >= 1 and f"sample {token} is skipped" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert sum(token in str(line.get("warning")) for line in lines) == 1
    saved = load_checkpoint(tmp_path / "whole")
    assert saved.meta["metrics"]["skipped"] == whole.skipped

    with pytest.raises(MismatchError, match="on_bad_sample"):
        train(toy_run(), cache, tmp_path / "whole", resume=True, accelerator="cpu")


def test_a_resumed_log_keeps_warnings_and_drops_later_steps(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, resumed_step=0, tensorboard=False)
    log.write(1, {"loss": 2.0})
    log.warn(["sample a is skipped"])
    log.write(2, {"loss": 1.0})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    again = TrainLog(tmp_path, resumed_step=1, tensorboard=False)
    again.warn(["sample b is skipped"])
    again.close()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line.get("step", line.get("warning")) for line in lines] == [1, "sample a is skipped", "sample b is skipped"]


def test_the_log_is_not_read_in_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows to many thousand lines: reading it took longer than a step. Once, at the start of a resumed run, is enough."""
    cache: Any = Holed(tmp_path / "world", grid=GRID)
    run = toy_run(max_steps=2, loader=LoaderConfig(workers=0, on_bad_sample="skip"))
    read: list[Path] = []
    real = Path.read_text

    def reading(self: Path, *a: Any, **k: Any) -> str:
        read.append(self)
        return real(self, *a, **k)

    monkeypatch.setattr(Path, "read_text", reading)
    log = tmp_path / "run" / "log.jsonl"
    train(run, cache, tmp_path / "run", accelerator="cpu")
    assert read.count(log) == 0
    train(run.with_values(max_steps=6), cache, tmp_path / "run", resume=True, accelerator="cpu")
    assert read.count(log) == 1
    told = [w for line in real(log).splitlines() if (w := json.loads(line).get("warning"))]
    assert len(told) == len(set(told)) > 0
    again = TrainLog(tmp_path / "run", resumed_step=6, tensorboard=False)
    again.warn([*told, "new", "new"])
    again.close()
    assert [json.loads(line).get("warning") for line in real(log).splitlines()].count("new") == 1
    assert sum(told[0] in line for line in real(log).splitlines()) == 1


def test_another_ranks_trouble_stops_this_one_before_its_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses sum their counts over ranks: a rank without a batch must not leave the others waiting there."""
    ran: list[int] = []
    monkeypatch.setattr("pipelines.train.agree", lambda value, device: 1)
    monkeypatch.setattr(TrainUnit, "forward", lambda self, batch: ran.append(1))
    with pytest.raises(NoProgressError, match="another rank stopped"):
        train(toy_run(), toy_cache(tmp_path / "world"), tmp_path / "run", accelerator="cpu")
    assert not ran


def test_sync_batchnorm_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SyncBatchNorm needs GPUs"):
        train(toy_run(sync_batchnorm=True), toy_cache(tmp_path / "world"), tmp_path / "run", accelerator="cpu")


def test_sync_batchnorm_leaves_norms_over_points_alone() -> None:
    """Conversion needs no GPU, only its forward pass does."""
    model = build_networks(toy_run("student")).model
    before = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    keys = list(model.state_dict())
    synchronised(model, torch.device("cuda"), 2)
    after = dict(model.named_modules())
    points = {n for n, kind in before.items() if kind is PointNorm}
    assert points and len(points) < len(before)
    assert {n for n in before if isinstance(after[n], nn.SyncBatchNorm)} == set(before) - points
    assert all(type(after[n]) is PointNorm for n in points) and list(model.state_dict()) == keys


@pytest.mark.gpu
def test_sync_batchnorm_trains_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("gpu: no CUDA device")
    run = toy_run(sync_batchnorm=True, max_steps=2)
    assert train(run, toy_cache(tmp_path / "world"), tmp_path / "run", accelerator="cuda").step == 2
    assert "layers synchronised over 1 device" in capsys.readouterr().err


def test_only_communication_errors_are_read_as_a_lost_rank() -> None:
    gone = lost_rank(RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"))
    assert gone is not None and gone.code == 6 and "another rank" in str(gone)
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_rank_that_dies_stops_the_others_with_a_message(tmp_path: Path) -> None:
    """SIGKILL of rank 1 after its third step: rank 0 leaves within seconds, not at a half-hour time-out."""
    toy_cache(tmp_path / "world")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom toy_training import toy_cache, toy_run\n"
        "from imkd_data.errors import ImkdError\nfrom pipelines.train import train\ntorch.set_num_threads(1)\n"
        "run = toy_run(max_steps=50, batch_size=1, global_batch=2)\n"
        f"world, out = Path({str(tmp_path / 'world')!r}), Path({str(tmp_path / 'run')!r})\n"
        "try: train(run, toy_cache(world), out, accelerator='cpu', devices=2)\n"
        "except ImkdError as error: print(error, file=sys.stderr); sys.exit(error.code)\n"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    base |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    ranks = []
    for rank in (0, 1):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **({"IMKD_FAULT": "train.step:kill:3"} if rank else {})}
        ranks.append(subprocess.Popen([sys.executable, str(script)], env={**base, **own}, stderr=subprocess.PIPE, text=True))
    try:
        assert ranks[1].wait(timeout=120) == -9
        dead = time.monotonic()
        _, errors = ranks[0].communicate(timeout=60)
        assert time.monotonic() - dead < 30 and ranks[0].returncode == 6, errors[-2000:]
        assert "another rank died or hangs" in errors and "--resume" in errors and "Traceback" not in errors
    finally:
        for process in ranks:
            process.kill()
    assert load_checkpoint(tmp_path / "run").step == 2
