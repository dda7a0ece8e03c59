"""Two gloo processes equal one process with the same global batch: loss and gradients to 1e-5 relative."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import toy_cache, toy_run

from imkd_models.checkpoint import load_checkpoint
from pipelines.train import train

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(arguments: list[str], world: int, *, slurm: bool = False) -> None:
    """As torchrun or srun do: one process a rank, told by the environment."""
    base = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}
    if slurm:
        base |= {"SLURM_NTASKS": str(world), "SLURM_NTASKS_PER_NODE": str(world), "SLURM_JOB_NUM_NODES": "1"}
        base |= {"SLURM_JOB_ID": str(20_000 + os.getpid() % 20_000), "SLURM_JOB_NAME": "imkd", "SLURM_NODELIST": "localhost"}
    elif world > 1:
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        base |= {"LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    processes = []
    for rank in range(world):
        names = ("SLURM_PROCID", "SLURM_LOCALID") if slurm else ("RANK", "LOCAL_RANK")
        own = dict.fromkeys(names, str(rank)) | ({"SLURM_NODEID": "0"} if slurm else {}) if world > 1 else {}
        command = [sys.executable, *arguments]
        processes.append(subprocess.Popen(command, env={**base, **own}, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ddp")
    cache = toy_cache(root / "world")
    train(toy_run(max_steps=1), cache, root / "lidar", accelerator="cpu")
    train(toy_run("label", max_steps=1), cache, root / "label", {"lidar": root / "lidar"}, accelerator="cpu")
    return root


@pytest.mark.parametrize("kind", ["student"])
def test_two_ranks_equal_one(world_folder: Path, tmp_path: Path, kind: str) -> None:
    out: dict[int, Any] = {}
    for world in (1, 2):
        file = tmp_path / f"{world}.pt"
        paths = [str(world_folder / n) for n in ("world", "lidar", "label")]
        launch([str(HERE / "ddp_step.py"), *paths, str(file), kind], world)
        out[world] = torch.load(file, weights_only=True)
    assert out[2]["world"] == 2 and out[2]["boxes"][0] != out[2]["boxes"][1]  # uneven on purpose
    assert torch.isclose(out[1]["loss"], out[2]["loss"], rtol=1e-5)
    assert set(out[1]["gradients"]) == set(out[2]["gradients"])
    largest = max(float(g.abs().max()) for g in out[1]["gradients"].values())
    for name, gradient in out[1]["gradients"].items():
        scale = max(float(gradient.abs().max()), 1e-4 * largest)
        assert float((gradient - out[2]["gradients"][name]).abs().max()) <= 1e-5 * scale, name


def test_a_run_resumes_on_two_ranks(world_folder: Path, tmp_path: Path) -> None:
    """Three steps on one rank, then to the end on two: the same samples, the same step count, one checkpoint."""
    cache = toy_cache(world_folder / "world")
    first = toy_run(max_steps=3, batch_size=2, global_batch=2)
    train(first, cache, tmp_path / "run", accelerator="cpu")
    script = tmp_path / "resume.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom toy_training import toy_cache, toy_run\n"
        "from pipelines.train import train\ntorch.set_num_threads(1)\n"
        f"run = toy_run(max_steps=5, batch_size=1, global_batch=2)\n"
        f"train(run, toy_cache(Path({str(world_folder / 'world')!r})), Path({str(tmp_path / 'run')!r}), resume=True,"
        " accelerator='cpu', devices=2)\n"
    )
    launch([str(script)], 2, slurm=True)
    saved = load_checkpoint(tmp_path / "run")
    assert saved.step == 5 and saved.training["stream"]["consumed"] == 10
