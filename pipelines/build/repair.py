"""Repair: build again exactly what ``verify`` names, and write the small files that can be derived."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imkd_data.cache.commit import commit_bytes, dead_partials, remove_file
from imkd_data.cache.layout import receipt_path, shards_from_json
from imkd_data.cache.manifest import group_json, suite_from_json
from imkd_data.cache.receipt import read_json, read_receipt, unsealed
from imkd_data.cache.verify import Problem, damaged_pairs, verify
from imkd_data.cache.write import Options
from imkd_data.errors import CacheDamageError, ImkdError, SourceMissingError
from imkd_data.fields.base import CacheField
from imkd_data.recipe import Recipe, canonical_json
from imkd_data.sample import Reader
from pipelines.build import BuildResult, Progress, execute
from pipelines.build.engine import Engine
from pipelines.build.lock import build_lock
from pipelines.build.request import Asked, Resolved, merged, resolve

__all__ = ["RepairResult", "clean_temp", "repair"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairResult:
    """``problems``: found before; ``pairs``: (field, shard) that were (or would be) built again; ``restored``: small files."""

    problems: tuple[Problem, ...]
    pairs: tuple[tuple[str, int], ...]
    restored: tuple[str, ...]
    build: BuildResult | None


def clean_temp(out: Path) -> list[Path]:
    """Remove every ``.partial`` file below ``out``; refuses while a build holds the lock."""
    with build_lock(out):
        found = dead_partials(out, every=True)
        for path in found:
            path.unlink(missing_ok=True)
    return found


def repair(
    out: str | os.PathLike[str],
    *,
    dataroot: str | os.PathLike[str] | None = None,
    only_fields: Sequence[str] | None = None,
    only_shards: Sequence[int] | None = None,
    level: str = "full",
    dry_run: bool = False,
    reader: Callable[..., Reader] | None = None,
    fields: Sequence[CacheField] = (),
    executor: str = "sync",
    workers: int = 1,
    fsync: bool = True,
    quarantine: bool = False,
    progress: Progress | None = None,
) -> RepairResult:
    """Verify ``out`` and rebuild what is damaged, missing or quarantined. Bytes of everything else stay untouched.

    Raises SourceMissingError where raw data are needed and absent (nothing was removed then), CacheDamageError where
    both copies of the recipe are damaged.
    """
    root, engine = Path(out), Engine(executor=executor, workers=workers)
    problems = tuple(verify(root, level=level))
    holes = any(p.rule == "quarantined" for p in problems)
    pairs = {
        (f, s)
        for f, s in damaged_pairs(problems)
        if (only_fields is None or f in only_fields) and (only_shards is None or s in only_shards)
    }
    errors = [p for p in problems if p.severity == "error"]
    if dry_run or not (errors or holes):
        return RepairResult(problems=problems, pairs=tuple(sorted(pairs)), restored=(), build=None)
    with build_lock(root):
        restored = _restore(root, fsync)
    resolved = _sources(root, dataroot, reader, fields, problems)
    with build_lock(root):
        # The reader is open: only now is anything removed.
        if pairs:
            remove_file(root / "manifest.json", "manifest", fsync=fsync)
        for name, shard in sorted(pairs):
            _remove(root, name, shard, fsync)
    result = execute(
        resolved,
        root,
        engine=engine,
        options=Options(fsync=fsync, quarantine=quarantine),
        max_bad=len(errors) + 10**9 if quarantine else 0,
        retry_holes=True,
        progress=progress,
    )
    return RepairResult(problems=problems, pairs=tuple(sorted(pairs)), restored=restored, build=result)


def _remove(root: Path, name: str, shard: int, fsync: bool) -> None:
    """Receipt first, then its data file; both lie below the marked folder."""
    receipt = receipt_path(root, name, shard)
    paths = [root / "blobs" / name / f"{shard:05d}.tar"]
    folder = root / "arrays.zarr" / name / "c" / str(shard)
    if folder.is_dir():
        paths += [p for p in sorted(folder.rglob("*")) if p.is_file() and set(p.name) == {"0"}]
    elif folder.is_file():
        paths.append(folder)
    remove_file(receipt, "receipt", fsync=fsync)
    for path in paths:
        remove_file(path, "data", fsync=fsync)


def _restore(root: Path, fsync: bool) -> tuple[str, ...]:
    """recipe.json and the Zarr group from their second copies in the manifest."""
    restored = []
    try:
        manifest = unsealed(read_json(root / "manifest.json"), "self_sha256", root / "manifest.json")
    except ImkdError:
        return ()
    recipe = canonical_json(Recipe.from_dict(manifest["recipe"]).as_dict())
    group = group_json(suite_from_json(manifest["suite"]), shards_from_json(manifest["layout"]))
    for path, data, kind in ((root / "recipe.json", recipe, "recipe"), (root / "arrays.zarr" / "zarr.json", group, "group")):
        if not path.is_file() or path.read_bytes() != data:
            commit_bytes(path, data, kind, fsync=fsync, replace=True)
            restored.append(str(path.relative_to(root)))
    return tuple(restored)


def _sources(
    root: Path,
    dataroot: str | os.PathLike[str] | None,
    reader: Callable[..., Reader] | None,
    fields: Sequence[CacheField],
    problems: Sequence[Problem],
) -> Resolved:
    if not (root / "recipe.json").is_file():
        raise CacheDamageError(
            "recipe.json is gone and the manifest cannot restore it",
            file=str(root),
            next="run the build command again with --update",
        )
    own = {f.name: f for f in fields}
    asked = merged(Asked(dataroot=Path(dataroot or "."), reader=reader, fields=list(own.values())), root)
    try:
        if dataroot is None:
            raise SourceMissingError("no raw data given", found="no --dataroot")
        return resolve(asked)
    except SourceMissingError as error:
        bad = damaged_pairs(problems)
        receipts = sorted((root / "receipts").glob("*/*.json"))
        good = sum(1 for p in receipts if (p.parent.name, int(p.stem)) not in bad and _readable(p))
        raise SourceMissingError(
            "repair needs the raw data, and they are not there: " + error.what,
            rule="repair.source",
            found=error.details.get("found"),
            kept=f"{good} of {len(receipts)} data files are good and stay; nothing was removed",
            next=f"imkd-data repair {root} --dataroot D",
        ) from error


def _readable(path: Path) -> bool:
    try:
        read_receipt(path)
    except ImkdError:
        return False
    return True
