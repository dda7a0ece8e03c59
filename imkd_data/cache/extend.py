"""Add array fields to a finished cache from its own rows, without raw data: for what a program computes from the cache.

Data files and receipts are written first, one shard at a time, while the old manifest stays valid; what is there with the
right key is kept, so the same call continues. The new index, recipe and manifest are then laid down in ``logs/pending`` and
swapped in; a crash in between is finished by the next call. Bytes of other fields are not touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from imkd_data.cache import keys, layout
from imkd_data.cache.added import rows_hash
from imkd_data.cache.commit import commit_bytes, remove_file, sha256_hex
from imkd_data.cache.index import index_bytes, read_index
from imkd_data.cache.manifest import manifest_bytes
from imkd_data.cache.receipt import read_receipt
from imkd_data.cache.store import Cache
from imkd_data.cache.write import Options, ShardJob, _append, _check, _Column, _commit, array_zarr_json
from imkd_data.errors import CacheDamageError, MismatchError, UsageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.recipe import Recipe, canonical_json

__all__ = ["add_fields", "finish_pending"]

Compute = Callable[[int], Mapping[str, Stored]]
PENDING = Path("logs") / "pending"
_SWAPPED = ("recipe.json", "index.parquet", "manifest.json")


def add_fields(
    cache: Cache,
    fields: Sequence[CacheField],
    upstream: Sequence[str],
    compute: Compute,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write array fields into ``cache.path``; open the cache again to see them.

    Args:
        upstream: stored fields whose keys enter the new keys, so that a rebuilt one makes these stale.
        compute: row -> {field name: array of the declared shape and dtype}.
        progress: (shards done, all shards).

    Raises:
        UsageError: not an array field, or quarantined rows. MismatchError: a field of that name with another key or another
        array; nothing was touched then.
    """
    for one in fields:
        if one.kind != "array":
            raise UsageError("only array fields can be added to a finished cache", field=one.name)
    if any(s != "ok" for s in cache.index["status"].to_pylist()):
        raise UsageError("the cache has quarantined samples", next="repair or rebuild them first")
    recipe = cache.recipe.with_values(fields=tuple(dict.fromkeys([*cache.recipe.fields, *(f.name for f in fields)])))
    parts = {n: e["key_recipe_part"] for n, e in cache.manifest["fields"].items()}
    mine = {f.name: _told(f, upstream) for f in fields}
    for one in mine.values():
        parts[one.name] = keys.recipe_part(one, recipe, parts)
    _refuse_others(cache, mine, parts, recipe)
    for shard in cache.shards:
        _shard(cache, shard.number, mine, upstream, parts, recipe, compute)
        if progress is not None:
            progress(shard.number + 1, len(cache.shards))
    _publish(cache, mine, parts, recipe)


def _told(one: CacheField, upstream: Sequence[str]) -> CacheField:
    """The field with what it depends on in its metadata, from which a later build tells whether it still holds."""
    names = tuple(sorted(upstream))
    added = {"uses": list(one.uses), "upstream": list(names)}
    return replace(one, upstream=names, attributes=lambda recipe, suite: {**one.attributes(recipe, suite), "added": added})


def _refuse_others(cache: Cache, mine: Mapping[str, CacheField], parts: Mapping[str, str], recipe: Recipe) -> None:
    """Raise for a name that the cache holds as another field: its rows would be written over."""
    for name, one in mine.items():
        entry = cache.manifest["fields"].get(name)
        if entry is None:
            continue
        meta = array_zarr_json(one, recipe, cache.suite, len(cache.shards), parts[name])
        # The manifest tells, not the file: a damaged zarr.json of the same field is written again.
        if entry["key_recipe_part"] != parts[name] or entry.get("zarr_json_sha256") != sha256_hex(meta):
            raise MismatchError(
                "the cache holds another field of this name",
                rule="field.other",
                field=name,
                expected="the same version, shape, dtype, codec and upstream fields",
                kept="nothing was changed",
                next="give the new field another name, or add it to another cache",
            )


def _shard(
    cache: Cache,
    number: int,
    mine: Mapping[str, CacheField],
    upstream: Sequence[str],
    parts: Mapping[str, str],
    recipe: Recipe,
    compute: Compute,
) -> None:
    shard = cache.shards[number]
    first = number * recipe.rows_per_shard
    rows = [first + i for i in range(len(shard))]
    tokens = tuple(cache.token(r) for r in rows)
    manifest = rows_hash(tokens)
    above = {u: cache.manifest["fields"][u]["shards"][number][1] for u in upstream}
    wanted = {n: keys.shard_key(parts[n], manifest, above) for n in mine}
    todo = [n for n in mine if not _there(cache.path, n, number, wanted[n], tokens)]
    if not todo:
        return
    job = ShardJob(
        shard=shard,
        tokens=tokens,
        fields=tuple(todo),
        remove=frozenset(todo),
        keys=wanted,
        inputs=dict.fromkeys(todo, manifest),
        parts=dict(parts),
    )
    columns = {n: _Column() for n in todo}
    for row in rows:
        values = compute(row)
        for name in todo:
            _check(mine[name], values[name], recipe, cache.suite)
            _append(mine[name], columns[name], values[name])
    for name in todo:
        _commit(job, mine[name], columns[name], recipe, cache.suite, cache.path, Options())


def _there(out: Path, name: str, number: int, key: str, tokens: tuple[str, ...]) -> bool:
    path = layout.receipt_path(out, name, number)
    try:
        receipt = read_receipt(path)
        data = (out / receipt["path"]).read_bytes()
    except (CacheDamageError, OSError):
        return False
    whole = len(data) == receipt["bytes"] and sha256_hex(data) == receipt["sha256"]
    return bool(whole and receipt["key"] == key and receipt["tokens"] == list(tokens))


def _publish(cache: Cache, mine: Mapping[str, CacheField], parts: Mapping[str, str], recipe: Recipe) -> None:
    """New array metadata, then recipe, index and manifest by way of ``logs/pending``."""
    out, fields = cache.path, {**cache.fields, **mine}
    receipts: dict[tuple[str, int], Mapping[str, Any]] = {
        (name, s.number): read_receipt(layout.receipt_path(out, name, s.number)) for name in fields for s in cache.shards
    }
    for name, one in mine.items():
        path = out / "arrays.zarr" / name / "zarr.json"
        meta = array_zarr_json(one, recipe, cache.suite, len(cache.shards), parts[name])
        commit_bytes(path, meta, "array", replace=path.is_file())
    rows = [{k: v for k, v in line.items() if "." not in k} for line in read_index(out / "index.parquet").to_pylist()]
    index = index_bytes(cache.shards, rows, fields, receipts, recipe.rows_per_shard, cache.suite)
    pending = out / PENDING
    _drop(pending)
    commit_bytes(pending / "recipe.json", canonical_json(recipe.as_dict()), "recipe")
    commit_bytes(pending / "index.parquet", index, "index")
    manifest = _manifest(out, pending, recipe, cache, fields, receipts, parts, index)
    commit_bytes(pending / "manifest.json", manifest, "manifest")  # last: with it the swap can be finished after a crash
    finish_pending(out)


def _manifest(
    out: Path,
    pending: Path,
    recipe: Recipe,
    cache: Cache,
    fields: Mapping[str, CacheField],
    receipts: Mapping[tuple[str, int], Mapping[str, Any]],
    parts: Mapping[str, str],
    index: bytes,
) -> bytes:
    """The manifest as it will be after the swap: it seals the pending recipe, not the one in place."""
    from imkd_data.cache.receipt import parse_json, sealed, unsealed

    data = manifest_bytes(out, recipe, cache.suite, fields, cache.shards, receipts, parts, index)
    body = unsealed(parse_json(data, out / "manifest.json"), "self_sha256", out / "manifest.json")
    body["recipe_sha256"] = sha256_hex((pending / "recipe.json").read_bytes())
    return sealed(body, "self_sha256")


def finish_pending(out: Path) -> bool:
    """Finish a swap that a crash interrupted; True if the cache now is the swapped one. What lacks one of its files is
    dropped: half laid, or half removed after the swap. The data files and receipts stay, so adding goes on from them."""
    pending = out / PENDING
    if not pending.is_dir():
        return False
    contents = {n: (pending / n).read_bytes() for n in _SWAPPED if (pending / n).is_file()}
    if len(contents) < len(_SWAPPED):
        done = "manifest.json" in contents and _holds(out / "manifest.json", contents["manifest.json"])
        _drop(pending)
        return done
    if (out / "manifest.json").is_file() and (out / "manifest.json").read_bytes() != contents["manifest.json"]:
        remove_file(out / "manifest.json", "manifest")
    for name, data in contents.items():
        commit_bytes(out / name, data, name.partition(".")[0], replace=os.path.exists(out / name))
    _drop(pending)
    return True


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _drop(pending: Path) -> None:
    """Remove the folder, its manifest first: a crash in between must not leave what looks like a whole swap."""
    remove_file(pending / "manifest.json", "manifest")
    shutil.rmtree(pending, ignore_errors=True)
