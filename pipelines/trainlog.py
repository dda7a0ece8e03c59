"""What a run tells: log.jsonl (one object per logged step), TensorBoard, and the numbers of the progress line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Meter", "Tick", "TrainLog", "pull_due", "pull_warnings"]

# Steps (from 0) on which the pull of a method's terms is measured and logged: at the first nothing is aligned yet, so only the
# second warns (crkd, section 7.2, asks for both).
PULL_STEPS = (0, 500)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One line of progress. data_wait: share of the time spent waiting for batches, 0..1."""

    stage: str
    step: int
    total: int
    loss: float
    lr: float
    samples_per_s: float
    data_wait: float
    eta_s: float

    def text(self) -> str:
        """``student 120/400  loss 3.21  12.3 samples/s  data wait 1 %  eta 0:45``."""
        minutes, seconds = divmod(round(self.eta_s), 60)
        clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
        return (
            f"{self.stage} {self.step}/{self.total}  loss {self.loss:.4f}  {self.samples_per_s:.1f} samples/s  "
            f"data wait {100 * self.data_wait:.0f} %  eta {clock}"
        )


class Meter:
    """Rates over a sliding window of steps."""

    def __init__(self, samples_per_step: int) -> None:
        self.samples = samples_per_step
        self.times: list[tuple[float, float]] = []  # (seconds of a step, seconds of it spent waiting)

    def add(self, seconds: float, waited: float) -> None:
        """One step."""
        self.times = [*self.times[-49:], (seconds, waited)]

    @property
    def step_s(self) -> float:
        """Mean seconds per step; the first steps of a run are slow, so the newest 50 count."""
        return sum(t for t, _ in self.times) / max(1, len(self.times))

    @property
    def samples_per_s(self) -> float:
        """Samples per second over all ranks."""
        return self.samples / self.step_s if self.step_s > 0 else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for data."""
        total = sum(t for t, _ in self.times)
        return sum(w for _, w in self.times) / total if total > 0 else 0.0


class TrainLog:
    """``log.jsonl`` and TensorBoard files of one run, written by rank 0. After a resume at step k, lines past k are gone,
    so the file equals that of an uninterrupted run up to times."""

    def __init__(self, out: Path, *, resumed_step: int, tensorboard: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        self.warned = self._cut(resumed_step) if self.path.exists() else set()
        self.file = self.path.open("a", encoding="utf-8")
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=resumed_step + 1)

    def _cut(self, step: int) -> set[str]:
        """Drop what came after ``step``; returns the warnings in the file, so that no step reads it again."""
        kept, warned = [], set[str]()
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                value = json.loads(line)
                if "warning" in value:
                    warned.add(value["warning"])
                elif value["step"] > step:
                    continue
                kept.append(line)
            except (ValueError, KeyError, TypeError):  # torn by a kill
                continue
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)
        return warned

    def warn(self, lines: list[str]) -> None:
        """Warnings of the run: on stderr, and as lines of ``log.jsonl`` without a step (once, also over resumes)."""
        for line in lines:
            print(f"warning: {line}", file=sys.stderr)
            if line not in self.warned:
                self.file.write(json.dumps({"warning": line}) + "\n")
                self.warned.add(line)
        if lines:
            self.file.flush()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One object; floats keep every digit. A dict of values is a group of curves in TensorBoard."""
        self.file.write(json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, float):
                        self.writer.add_scalar(f"{name}/{key}" if key else name, number, step)

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def pull_due(step: int) -> bool:
    """Whether the pull is measured in this step, counted from 0."""
    return step in PULL_STEPS


def pull_warnings(pull: Mapping[str, float], step: int) -> list[str]:
    """Terms that pull harder than the task, once ``step`` steps are done; none after the first of ``PULL_STEPS``."""
    if step - 1 != PULL_STEPS[-1]:
        return []
    return [
        f"{name} pulls {share:.1f} times as hard as the task's losses at bev_fused after {PULL_STEPS[-1]} steps; consider a "
        "lower weight"
        for name, share in pull.items()
        if share > 1
    ]
