"""Source faults on purpose: damage a finished synthetic tree in the ways of the fault catalogue (F01 to F29)."""

from __future__ import annotations

from pathlib import Path

from imkd_data.errors import UsageError


def inject(root: Path, version: str, fault: str, seed: int) -> list[str]:
    """Damage the tree; returns what was changed. Raises UsageError on an unknown fault."""
    raise UsageError("unknown fault", expected="none is offered by this version", found=fault)
