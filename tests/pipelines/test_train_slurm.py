"""docs/slurm.sbatch with a fake srun: told to stop, it saves and queues itself again; the second start finishes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from disk_cache import disk_cache

from imkd_models.checkpoint import load_checkpoint

REPO = Path(__file__).parents[2]

# Runs the command as a job step does, with the variables of one task, and delivers USR1 after the second logged step.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
args = [a for a in sys.argv[1:] if not a.startswith("--kill-on-bad-exit")]
env = dict(os.environ, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_STEP_ID="0")
step = subprocess.Popen(args, env=env)
log = os.path.join(os.environ["OUT"], "log.jsonl")
sent = os.path.exists(os.environ["FLAG"])
while step.poll() is None:
    time.sleep(0.05)
    if not sent and os.path.exists(log) and len(open(log).readlines()) >= 2:
        open(os.environ["FLAG"], "w").close()
        sent = True
        step.send_signal(signal.SIGUSR1)
sys.exit(step.returncode)
"""


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
def test_a_job_that_is_stopped_comes_back(tmp_path: Path) -> None:
    cache = disk_cache(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN.format(python=sys.executable))
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
    (tools / "imkd").write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPO)!r})\nfrom cli.main import model\nmodel()\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    settings = "--set batch_size=1 --set log_every=1 --set tensorboard=off --max-steps 12 --accelerator cpu --quiet"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RUN": "tiny_teacher",
        "CACHE": str(cache),
        "OUT": str(tmp_path / "run"),
        "ARGS": settings,
        "FLAG": str(tmp_path / "sent"),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NAME": "imkd",
        "SLURM_NODELIST": "localhost",
    }
    script = ["/bin/bash", str(REPO / "docs" / "slurm.sbatch")]
    first = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=200)
    assert first.returncode == 130, first.stdout + first.stderr
    stopped_at = load_checkpoint(tmp_path / "run").step
    assert 2 <= stopped_at < 12 and (tmp_path / "requeued").read_text() == "requeue 4711\n"
    second = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=250)
    assert second.returncode == 0, second.stdout + second.stderr
    assert load_checkpoint(tmp_path / "run").step == 12 and "finished" in second.stdout
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
