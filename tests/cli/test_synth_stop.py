"""``imkd-data synth`` stopped by a signal: says how to go on, leaves no process, and goes on to the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_build import REPO

CODE = "import sys; from cli.main import data; sys.argv[0] = 'imkd-data'; data()"
OPTIONS = ("--scenes", "4", "--keyframes", "6", "--image-size", "45x80", "--seed", "2", "--workers", "2")


def command(out: Path) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "synth", "--out", str(out), *OPTIONS],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def group_is_empty(group: int) -> bool:
    """Within five seconds, which a new parent may need to collect what has ended."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def digests(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("whole") / "w"
    process = command(root)
    assert process.communicate(timeout=120) and process.returncode == 0
    return digests(root)


@pytest.mark.parametrize(("number", "code", "group"), [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)])
def test_stopped_run_says_how_to_go_on(number: int, code: int, group: bool, whole: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM goes to the command alone, Ctrl-C in a terminal to its workers as well."""
    process = command(tmp_path / "w")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("w/.synth/scene-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    _, text = process.communicate(timeout=10)  # the pipe ends when the last worker is gone
    assert process.returncode == code
    assert f"stopped by {signal.Signals(number).name}" in text and "run the same command again" in text, text
    assert "of 4 scenes" in text and "Traceback" not in text and "KeyboardInterrupt" not in text, text
    assert group_is_empty(process.pid)
    again = command(tmp_path / "w")
    assert again.communicate(timeout=120) and again.returncode == 0
    assert digests(tmp_path / "w") == whole
