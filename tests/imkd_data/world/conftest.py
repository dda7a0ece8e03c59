"""One small world for all tests of the writer: three scenes (clear, rain, night) of four keyframes, small images."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.synth import run_synth

SMALL = {"scenes": 3, "keyframes": 4, "seed": 3, "image_size": (90, 160), "weather": "clear,rain,night"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the small world; tests must not change it."""
    root = tmp_path_factory.mktemp("synth") / "nuscenes"
    run_synth(out=root, **SMALL)
    return root
