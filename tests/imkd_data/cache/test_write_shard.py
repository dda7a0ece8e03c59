"""Writing a shard: what is the sample's fault becomes a hole on request, what is the machine's does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy import TOY_COUNT, TOY_FIELDS
from toy_build import build_toy

from imkd_data.errors import InputDataError


@pytest.mark.parametrize(("error", "raised"), [(ValueError, InputDataError), (MemoryError, MemoryError)])
def test_a_machine_without_memory_makes_no_holes(toy_root: Path, tmp_path: Path, error: Any, raised: Any) -> None:
    def short(payload: Any, *rest: Any) -> Any:
        if payload.sample.scene == "toy-000":
            raise error("no more")
        return TOY_COUNT.compute(payload, *rest)

    fields = [replace(f, compute=short) if f is TOY_COUNT else f for f in TOY_FIELDS]
    with pytest.raises(raised) as caught:
        build_toy(toy_root, tmp_path / "c", fields=fields, on_error="quarantine")
    if raised is MemoryError:
        assert "while computing field toy_count" in caught.value.__notes__
    else:
        assert "quarantined" in caught.value.what
