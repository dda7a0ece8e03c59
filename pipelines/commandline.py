"""The command lines that filled a folder, kept beside what they made: ``commands.jsonl``. The report shows them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["COMMANDS_FILE", "read_commands", "record_command"]

COMMANDS_FILE = "commands.jsonl"


def record_command(out: Path, words: Sequence[str]) -> None:
    """Add one command line to ``out/commands.jsonl``. A folder that cannot be written to is left alone."""
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(words)}
    try:
        with (Path(out) / COMMANDS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError:
        return


def read_commands(*folders: Path) -> tuple[str, ...]:
    """The different command lines of some folders, in order; lines that cannot be read are left out."""
    found: list[str] = []
    for folder in folders:
        path = folder / COMMANDS_FILE
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("command"), str):
                found.append(value["command"])
    return tuple(dict.fromkeys(found))
