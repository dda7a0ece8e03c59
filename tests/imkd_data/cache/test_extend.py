"""Adding fields to a finished cache: another field of the same name is refused untouched, a crash in the swap is no end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import TOY_PICTURES, TOY_POSE
from toy_build import build_toy, open_toy_cache, stored

from imkd_data.cache import extend
from imkd_data.cache.extend import add_fields, finish_pending
from imkd_data.cache.verify import verify
from imkd_data.errors import MismatchError
from imkd_data.fields.base import CacheField

PENDING = Path("logs") / "pending"


def own(name: str = "mine", **changes: Any) -> CacheField:
    return replace(TOY_POSE, **{"name": name, "dtype": np.dtype("<f4"), "shape": lambda recipe, suite: (3,), **changes})


def add(out: Path, one: CacheField, upstream: list[str], value: float = 1.0) -> None:
    def compute(row: int) -> dict[str, np.ndarray]:
        assert one.shape is not None
        shape = one.shape(cache.recipe, cache.suite)
        return {one.name: np.full(shape, value, one.dtype)}

    cache = open_toy_cache(out)
    add_fields(cache, [one], upstream, compute)


OTHERS: list[tuple[str, CacheField, list[str]]] = [
    ("built array", own("toy_view"), ["toy_pose"]),
    ("built blob", own("toy_pictures", version=TOY_PICTURES.version, uses=TOY_PICTURES.uses), []),
    ("version", own(version=2), ["toy_pose"]),
    ("upstream", own(), ["toy_pose", "toy_count"]),
    ("shape", own(shape=lambda recipe, suite: (4,)), ["toy_pose"]),
    ("dtype", own(dtype=np.dtype("<f8")), ["toy_pose"]),
]


@pytest.mark.parametrize(("one", "upstream"), [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS])
def test_another_field_of_the_same_name_is_refused_and_nothing_is_touched(
    damaged: Callable[[], Path], one: CacheField, upstream: list[str]
) -> None:
    out = damaged()
    add(out, own(), ["toy_pose"])
    before = stored(out)
    with pytest.raises(MismatchError, match="another field of this name") as caught:
        add(out, one, upstream, 2.0)
    assert caught.value.details["field"] == one.name
    assert stored(out) == before and verify(out, level="full") == []
    assert (open_toy_cache(out).read("mine", 0) == 1.0).all()
    add(out, own(), ["toy_pose"], 3.0)  # the same field: what is there is kept
    assert stored(out) == before


def test_a_crash_while_the_pending_folder_is_removed_stops_no_later_command(
    toy_root: Path, damaged: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is removed in any order: the crash may come after any of its files."""
    out = damaged()

    def crash(path: Path, **_: Any) -> None:
        for file in sorted(p for p in Path(path).glob("*") if p.name != "manifest.json"):
            file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extend.shutil, "rmtree", crash)
        add(out, own(), ["toy_pose"])
    assert (out / PENDING).is_dir()
    before = stored(out)
    assert build_toy(toy_root, out, update=True).rebuilt == ()
    assert stored(out) == before and not (out / PENDING).exists() and verify(out, level="full") == []
    assert "mine" in open_toy_cache(out).fields


@pytest.mark.parametrize("lost", [["recipe.json"], ["index.parquet"], ["recipe.json", "index.parquet"]])
@pytest.mark.parametrize("swapped", [True, False])
def test_a_pending_manifest_without_its_siblings_is_dropped(
    damaged: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, lost: list[str], swapped: bool
) -> None:
    out = damaged()
    with monkeypatch.context() as patch:
        patch.setattr(extend, "finish_pending", lambda out: False)
        add(out, own(), ["toy_pose"])
    if swapped:
        kept = shutil.copytree(out / PENDING, out.parent / "kept")
        assert finish_pending(out)
        shutil.copytree(kept, out / PENDING)
    for name in lost:
        (out / PENDING / name).unlink()
    before = stored(out)
    assert finish_pending(out) is swapped
    assert stored(out) == before and not (out / PENDING).exists()
    assert ("mine" in open_toy_cache(out).fields) is swapped
