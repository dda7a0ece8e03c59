"""The benchmark's shared teachers: trained once or borrowed, their maps stored where the preset says so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imkd_data.errors import MismatchError, UsageError
from pipelines.bench_cell import Bench, run_of, train_and_score
from pipelines.bench_rows import Row
from pipelines.bench_world import held, write_json

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["maps_of", "maps_read", "store_teachers", "train_teachers"]


def train_teachers(bench: Bench, plan: Sequence[Row], borrowed: Path | None, *, judged: bool = True) -> dict[str, Path]:
    """Checkpoints of the shared teachers that the plan uses: trained and scored once, or those of another benchmark. judged:
    the LiDAR teacher in any case, as admission reads its score."""
    from imkd_models.distill import make_method

    wanted: set[str] = {"lidar"} if judged else set()
    for row in plan:
        if row.method:
            method = make_method(row.method)
            wanted |= set(method.teachers_for(method.make_options(row.options)))
    wanted |= {"lidar"} if "label" in wanted else set()
    made: dict[str, Path] = {}
    for name in [n for n in bench.preset.networks if n in wanted]:
        folder = bench.out / "teachers" / name
        if borrowed is not None:
            made[name] = _borrow(borrowed / "teachers" / name, folder)
            continue
        given = {"lidar": made["lidar"]} if name == "label" else {}
        if (folder / "score.json").is_file() and not (folder / "train" / "last.ckpt").exists():
            bench.tell(
                f"teacher {name}: only its score is here, borrowed before; trained now (--teachers OUT borrows it again)"
            )
            (folder / "score.json").unlink(missing_ok=True)
        run = run_of(bench, name, seed=0)
        facts = {"row": f"teacher_{name}", "kind": "teacher", "seed": 0, "twin": None}
        with held(folder, wait=True):
            train_and_score(bench, folder, run, given, facts=facts)
        made[name] = folder / "train" / "last.ckpt"
    return made


def _borrow(theirs: Path, folder: Path) -> Path:
    """The finished teacher of another benchmark; its score is copied, so that the table shows it. Errors: UsageError where
    there is none; MismatchError where this benchmark has trained one."""
    if not (theirs / "score.json").is_file():
        raise UsageError(
            "no finished teacher there", expected=f"{theirs}/score.json", found="nothing", next="--teachers OUT of a benchmark"
        )
    if theirs.resolve() != folder.resolve():
        if (folder / "train").exists():
            raise MismatchError(
                "this benchmark has a teacher of its own", file=str(folder), next="leave out --teachers, or use another --out"
            )
        write_json(folder / "score.json", json.loads((theirs / "score.json").read_text()))
    return theirs / "train" / "last.ckpt"


def maps_of(row: Row) -> dict[str, tuple[str, ...]]:
    """What a row's method can read of stored maps: teacher -> maps; nothing of label encoders, nor of altered teachers."""
    from imkd_models.distill import make_method
    from imkd_models.distill.crkd import ALTER_TEACHER
    from pipelines.cache_teacher import stored_maps

    if not row.method:
        return {}
    method = make_method(row.method)
    options = method.make_options(row.options)
    if ALTER_TEACHER & {*getattr(options, "defects", ())}:
        return {}
    needs = method.needs_for(options).teachers
    return {name: stored_maps(features) for name, features in needs.items() if name != "label"}


def maps_read(plan: Sequence[Row], given: Mapping[str, Path]) -> dict[Path, tuple[str, ...]]:
    """``maps_of`` all rows: checkpoint -> maps."""
    wanted: dict[Path, dict[str, None]] = {}
    for row in plan:
        for name, maps in maps_of(row).items():
            wanted.setdefault(given[name], {}).update(dict.fromkeys(maps))
    return {checkpoint: tuple(maps) for checkpoint, maps in wanted.items()}


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
