"""World and cache of the distillation benchmark: made once, recognised afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imkd_data.errors import MismatchError
from pipelines.bench_presets import Preset

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["make_cache", "make_world", "store_teachers", "write_json"]


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


def store_teachers(
    root: Path, cache: Cache, wanted: Mapping[Path, Sequence[str]], device: str, tell: Callable[[str], None]
) -> Cache:
    """``root/stored``: the cache with teachers' maps (checkpoint -> features) as further fields. ``cache`` itself stays as it
    is: its files are linked where the disk can, and files of a cache are replaced, never changed in place.

    Raises:
        MismatchError: ``root/stored`` was made from another cache.
    """
    from imkd_data import open_cache
    from imkd_models.checkpoint import load_checkpoint
    from pipelines.cache_teacher import cache_features, field_name

    path = root / "stored"
    if not path.exists():
        part = root / ".stored.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(cache.path, part, copy_function=_linked)
        part.rename(path)
    found: Cache = open_cache(path)
    fields = cache.manifest["fields"]
    if other := [name for name in fields if found.manifest["fields"].get(name) != fields[name]]:
        raise MismatchError(
            "the stored teacher maps belong to another cache",
            expected=f"{', '.join(other)} as in {cache.path}",
            file=str(path),
            next="delete this folder; it is made again",
        )
    for checkpoint, features in wanted.items():
        digest = str(load_checkpoint(checkpoint).meta["weights_sha256"])
        if any(field_name(digest, f) not in found.fields for f in features):
            tell(f"storing {', '.join(features)} of {checkpoint}")
            cache_features(checkpoint, path, features, device=device)
            found = open_cache(path)
    _ = found.index  # read now, while no other process adds maps: it belongs to the manifest that was read
    return found


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
