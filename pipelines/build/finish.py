"""What the parent process alone writes: recipe, group and array metadata, NOTICE, index, manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imkd_data.cache import layout
from imkd_data.cache.added import Dropped, added_names, remove_added
from imkd_data.cache.commit import commit_bytes, dead_partials, remove_file, storage_error
from imkd_data.cache.index import index_bytes
from imkd_data.cache.manifest import group_json, manifest_bytes, notice_bytes
from imkd_data.cache.plan import Plan, stored_recipe
from imkd_data.cache.receipt import read_receipt
from imkd_data.cache.write import array_zarr_json
from imkd_data.errors import CacheDamageError, MismatchError, RecipeError, UsageError
from imkd_data.recipe import Recipe, canonical_json

__all__ = [
    "check_recipe",
    "check_versions",
    "clean_dead_temp",
    "dropped_line",
    "prepare_folder",
    "recipe_difference",
    "write_end",
    "write_start",
]


def prepare_folder(out: Path) -> None:
    """Make the folder, or refuse one that is not ours. Raises UsageError (a file, or foreign content), StorageError."""
    if out.exists() and not out.is_dir():
        raise UsageError("the output is a file, not a folder", file=str(out), next="choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {p.name for p in out.iterdir() if not p.name.startswith((".", "._"))}
    except OSError as error:
        raise storage_error(error, out) from error
    if names and "recipe.json" not in names and not names <= {"logs", "arrays.zarr", "NOTICE"}:
        raise UsageError(
            "the output folder exists and is not a cache",
            file=str(out),
            found=", ".join(sorted(names)[:5]),
            next="choose another --out; nothing was changed",
        )


def clean_dead_temp(out: Path) -> int:
    """Remove temp files of dead builds of this host; called only with the lock held."""
    found = dead_partials(out)
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def recipe_difference(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Entry -> (stored, asked), for entries that differ."""
    a, b = old.as_dict(), new.as_dict()
    return {k: (a[k], b[k]) for k in a if a[k] != b[k]}


def check_recipe(out: Path, new: Recipe) -> None:
    """Raise MismatchError with the difference where ``out`` was begun with another recipe."""
    old = stored_recipe(out)
    if old is not None:
        added = added_names(out, old)
        old = old.with_values(fields=tuple(n for n in old.fields if n not in added))
    if old is None or old == new or recipe_difference(old, new) == {}:
        return
    changes = recipe_difference(old, new)
    first = "; ".join(f"{k}: {_short(a)} -> {_short(b)}" for k, (a, b) in changes.items())
    raise MismatchError(
        "the cache was built with another recipe",
        rule="recipe.changed",
        file=str(out / "recipe.json"),
        found=first,
        next="add --update to rebuild what depends on it, or choose another --out",
    )


def check_versions(out: Path, plan: Plan, *, update: bool) -> None:
    """Raise MismatchError where built shards come from another version of a field and ``update`` was not asked for."""
    if update:
        return
    changed = [q for q in plan.queue if q.reason.startswith("field version")]
    if changed:
        lines = sorted({f"{q.field}: {q.reason}" for q in changed})
        raise MismatchError(
            "the cache was built by another version of this program",
            rule="field.version",
            file=str(out),
            found="; ".join(lines),
            next="add --update to rebuild these fields, or go on with the version that built it",
        )


def _short(value: Any) -> str:
    text = canonical_json(value).decode().strip()
    return text if len(text) <= 80 else text[:77] + "..."


def write_start(out: Path, plan: Plan, *, update: bool, fsync: bool) -> None:
    """Recipe, group, array metadata and NOTICE. Where something is to be built, the manifest goes first, so that a crash
    anywhere leaves "not complete" and never "torn"."""
    recipe = canonical_json(plan.recipe.as_dict())
    group = group_json(plan.suite, plan.shards)
    wanted: list[tuple[Path, bytes, str]] = [
        (out / "NOTICE", notice_bytes(plan.suite, plan.recipe.dataset), "notice"),
        (out / "arrays.zarr" / "zarr.json", group, "group"),
    ]
    for name, one in plan.fields.items():
        if one.kind == "array" and name not in plan.added:
            meta = array_zarr_json(one, plan.recipe, plan.suite, len(plan.shards), plan.parts[name])
            wanted.append((out / "arrays.zarr" / name / "zarr.json", meta, "array"))
    wanted.append((out / "recipe.json", recipe, "recipe"))
    stale = [w for w in wanted if not _same(w[0], w[1])]
    if stale or plan.queue:
        remove_file(out / "manifest.json", "manifest", fsync=fsync)
    for path, data, kind in stale:
        if kind == "recipe" and path.exists() and not (update or plan.dropped or _same(path, data)):
            raise RecipeError("recipe changed while building", file=str(path))
        commit_bytes(path, data, kind, fsync=fsync, replace=path.exists())
    for one in plan.dropped:
        remove_added(out, one.field)


def dropped_line(one: Dropped, out: Path) -> str:
    """What a person reads of an added field that goes: why, and the command that makes it again."""
    line = f"field {one.field} is dropped: {one.reason}"
    feature, weights = one.attributes.get("feature"), str(one.attributes.get("teacher_sha256", ""))[:8]
    if not feature:
        return f"{line}; add it again with the command that made it"
    command = f"imkd cache-teacher --checkpoint CKPT --cache {out} --features {feature}"
    return f"{line}; make it again with the teacher of weights {weights}: {command}"


def _same(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except FileNotFoundError:
        return False


def write_end(out: Path, plan: Plan, *, fsync: bool) -> dict[str, Any]:
    """Index, then manifest. Every receipt is read back and must be the planned one. Returns counts for the last screen."""
    receipts: dict[tuple[str, int], Mapping[str, Any]] = {}
    for name in plan.fields:
        for shard in plan.shards:
            path = layout.receipt_path(out, name, shard.number)
            receipt = read_receipt(path)
            if receipt["key"] != plan.keys[name][shard.number] or receipt["tokens"] != list(plan.tokens[shard.number]):
                raise CacheDamageError(
                    "a receipt is not the planned one", rule="receipt.key", file=str(path), shard=shard.label
                )
            receipts[name, shard.number] = receipt
    index = index_bytes(plan.shards, plan.rows, plan.fields, receipts, plan.recipe.rows_per_shard, plan.suite)
    if not _same(out / "index.parquet", index):
        remove_file(out / "manifest.json", "manifest", fsync=fsync)
        commit_bytes(out / "index.parquet", index, "index", fsync=fsync, replace=True)
    manifest = manifest_bytes(out, plan.recipe, plan.suite, plan.fields, plan.shards, receipts, plan.parts, index)
    if not _same(out / "manifest.json", manifest):
        commit_bytes(out / "manifest.json", manifest, "manifest", fsync=fsync, replace=True)
    dropped: dict[str, int] = {}
    for receipt in receipts.values():
        for reason, count in receipt["dropped"].items():
            if count:
                key = f"{receipt['field']}.{reason}"
                dropped[key] = dropped.get(key, 0) + count
    bad = sorted({h[1] for r in receipts.values() for h in r["holes"]})
    size = sum(r["bytes"] for r in receipts.values()) + len(index)
    return {"dropped": dropped, "quarantined": bad, "bytes": size, "files": 2 * len(receipts)}
