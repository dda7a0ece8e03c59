"""World and cache of the distillation benchmark: made once, recognised afterwards."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imkd_data.errors import MismatchError
from pipelines.bench_presets import Preset

__all__ = ["held", "make_cache", "make_world", "write_json"]


@contextmanager
def held(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a folder against other processes of the same benchmark on this machine; the system lets go when a process dies.
    Without ``wait``: False where another holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # several processes may fill one benchmark
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def make_world(root: Path, preset: Preset, materials: str, workers: int, tell: Callable[[str], None]) -> Path:
    """``root/world``, written once, and again where a copied benchmark came without it; another world is refused."""
    from pipelines.synth import run_synth

    tree, note = root / "world", root / "world.json"
    asked = {
        "version": preset.version,
        "scenes": preset.scenes,
        "keyframes": preset.keyframes,
        "val_share": preset.val_share,
        "image_hw_px": list(preset.image_hw_px),
        "materials": materials,
        "seed": 0,
    }
    if note.is_file():
        made = json.loads(note.read_text())
        if made != asked:
            raise MismatchError(
                "this folder holds another world", expected=json.dumps(asked), found=json.dumps(made), next="use another --out"
            )
        if tree.is_dir():
            return tree
    tell(f"writing a world of {preset.scenes} scenes")
    run_synth(
        out=tree,
        version=preset.version,
        scenes=preset.scenes,
        keyframes=preset.keyframes,
        seed=0,
        image_size=preset.image_hw_px,
        materials=materials,
        val_share=preset.val_share,
        workers=workers,
        progress=lambda done, total, text: tell(f"world {done}/{total} {text}"),
    )
    write_json(note, asked)
    return tree


def make_cache(root: Path, tree: Path, preset: Preset, tell: Callable[[str], None]) -> Path:
    """``root/cache``, built or completed."""
    from pipelines.build import build

    path = root / "cache"
    tell("building the cache")
    build(
        dataroot=tree,
        version=preset.version,
        splits=("train", "val"),
        out=path,
        profile=preset.profile,
        executor="sync",
        progress=lambda event: tell(f"cache {event.done}/{event.total} {event.text}"),
    )
    return path
