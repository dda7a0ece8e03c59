"""One toy world and one finished toy cache per session; tests that damage a cache work on a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy import write_toy
from toy_build import build_toy, copy_cache


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), scenes=4)


@pytest.fixture(scope="session")
def toy_cache(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "cache"
    build_toy(toy_root, out)
    return out


@pytest.fixture
def damaged(toy_cache: Path, tmp_path: Path) -> Callable[[], Path]:
    """A fresh copy of the finished cache."""
    return lambda: copy_cache(toy_cache, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
