"""What a command says: human text on stderr, results on stdout, one JSON object a line with --json."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress", "Screen", "bytes_text", "log_entry", "seconds_text"]

_LOG: list[str] = []  # path of the log file of this process, at most one


def log_entry(entry: dict[str, Any]) -> None:
    """Append to the file of ``--log-file``, if there is one. Its disk filling up later does not end the command."""
    for path in _LOG:
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **entry}, ensure_ascii=False, default=str) + "\n")


def bytes_text(count: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def seconds_text(seconds: float) -> str:
    """95 -> '1 min 35 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


class Screen:
    """Output of one command. ``json``: objects on stdout. ``quiet``: errors only. ``verbose``: more lines. OSError: a
    ``log_file`` that cannot be opened."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False, log_file: str | None = None) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        _LOG.clear()
        if log_file:
            with open(log_file, "a"):  # one that cannot be written to is refused now, not missed later
                _LOG.append(log_file)

    def say(self, text: str = "") -> None:
        """A line for people, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
        if text:
            log_entry({"text": text})

    def pairs(self, **values: Any) -> None:
        """Aligned name-value lines."""
        width = max(map(len, values)) if values else 0
        for name, value in values.items():
            self.say(f"  {name.replace('_', '-'):<{width}}  {value}")

    def emit(self, kind: str, /, **values: Any) -> None:
        """One result object on stdout with --json."""
        entry = {**values, "v": 1, "kind": kind}
        if self.json:
            print(json.dumps(entry, ensure_ascii=False, default=str), flush=True)
        log_entry(entry)

    def out(self, text: str) -> None:
        """A result line on stdout, unless --json."""
        if not self.json:
            print(text, flush=True)

    def progress(self, label: str, total: int, unit: str = "samples") -> Progress:
        """Progress of ``total`` units: a bar on a terminal, one line per 30 s otherwise, objects with --json."""
        return Progress(self, label, total, unit)


class Progress:
    """Context manager; ``update(done, text)`` may be called often."""

    LINE_EVERY_S = 30.0

    def __init__(self, screen: Screen, label: str, total: int, unit: str) -> None:
        self.screen, self.label, self.total, self.unit = screen, label, total, unit
        self.bar: Any = None
        self.task: Any = None
        self.started = self.last_line = time.monotonic()
        self.done = 0

    def __enter__(self) -> Progress:
        if not (self.screen.quiet or self.screen.json) and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            rate = TextColumn("{task.fields[rate]}")
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate)
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, rate="")
        return self

    def update(self, done: int, text: str = "") -> None:
        """``done`` of ``total`` are finished."""
        now = time.monotonic()
        rate = done / max(1e-9, now - self.started)
        self.done = done
        if self.bar:
            self.bar.update(self.task, completed=done, description=f"{self.label} {text}", rate=f"{rate:.1f} {self.unit}/s")
        self.screen.emit("progress", label=self.label, done=done, total=self.total, rate=round(rate, 3), text=text)
        if not self.bar and (now - self.last_line >= self.LINE_EVERY_S or done == self.total):
            self.last_line = now
            left = (self.total - done) / rate if rate > 0 else 0.0
            eta = f", {seconds_text(left)} left" if done < self.total else ""
            self.screen.say(f"{self.label}: {done}/{self.total} {self.unit}, {rate:.1f}/s{eta}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
