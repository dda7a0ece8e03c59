"""``manifest.json``: written last; its presence means that the cache is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from imkd_data.cache import keys
from imkd_data.cache.commit import sha256_hex
from imkd_data.cache.layout import Shard, receipt_path
from imkd_data.cache.receipt import FORMAT, read_bytes, read_json, sealed, unsealed
from imkd_data.errors import CacheDamageError
from imkd_data.fields.base import CacheField
from imkd_data.recipe import Recipe, canonical_json
from imkd_data.sample import SensorSuite

__all__ = ["group_json", "manifest_bytes", "notice_bytes", "read_manifest", "suite_from_json"]


def suite_from_json(value: Mapping[str, Any]) -> SensorSuite:
    """The sensor suite kept in the group metadata, so that opening needs no raw data."""
    try:
        facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return SensorSuite(**facts)
    except TypeError as error:
        raise CacheDamageError(f"the sensor suite cannot be read: {error}", rule="suite") from error


def suite_json(suite: SensorSuite) -> dict[str, Any]:
    """JSON form of a suite."""
    facts = {f.name: getattr(suite, f.name) for f in dataclass_fields(suite)}
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in facts.items()}


def group_json(suite: SensorSuite, shards: tuple[Shard, ...]) -> bytes:
    """Canonical ``arrays.zarr/zarr.json``: the Zarr group, with the suite and the shard table as attributes."""
    attributes = {"imkd_format": FORMAT, "suite": suite_json(suite), "shards": [s.as_json() for s in shards]}
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def notice_bytes(suite: SensorSuite, dataset: str) -> bytes:
    """The licence note that travels with derived data."""
    text = (
        f"This cache was derived from the data set '{dataset}'.\n"
        f"Licence of the source data: {suite.licence}\n"
        "It applies to this cache as well: do not publish or upload the cache unless that licence permits it.\n"
        "Publish the recipe (recipe.json) and the cache id (manifest.json) instead.\n"
    )
    return text.encode()


def manifest_bytes(
    out: Path,
    recipe: Recipe,
    suite: SensorSuite,
    fields: Mapping[str, CacheField],
    shards: tuple[Shard, ...],
    receipts: Mapping[tuple[str, int], Mapping[str, Any]],
    parts: Mapping[str, str],
    index: bytes,
) -> bytes:
    """The manifest of what now lies in ``out``; every receipt is hashed as it lies on disk."""
    per_field: dict[str, Any] = {}
    for name, one in fields.items():
        files = []
        for shard in shards:
            r = receipts[name, shard.number]
            seal = sha256_hex(read_bytes(receipt_path(out, name, shard.number)))
            files.append([r["bytes"], r["key"], r["inputs"]["hash"], seal])
        entry: dict[str, Any] = {"version": one.version, "kind": one.kind, "key_recipe_part": parts[name], "shards": files}
        if one.kind == "array":
            entry["zarr_json_sha256"] = sha256_hex(read_bytes(out / "arrays.zarr" / name / "zarr.json"))
        per_field[name] = entry
    counts: dict[str, int] = {}
    for shard in shards:
        counts[shard.split] = counts.get(shard.split, 0) + len(shard)
    quarantined = sorted({h[1] for r in receipts.values() for h in r["holes"]})
    body = {
        "format": FORMAT,
        "id": keys.cache_id((n, s, r["key"], r["inputs"]["hash"]) for (n, s), r in receipts.items()),
        "dataset": recipe.dataset,
        "fields": per_field,
        "shards": len(shards),
        "samples": counts,
        "scenes": len({c.scene for s in shards for c in s.clips}),
        "quarantined": quarantined,
        # Second copies, so that a damaged recipe.json or group can be restored without the raw data.
        "recipe": recipe.as_dict(),
        "suite": suite_json(suite),
        "layout": [s.as_json() for s in shards],
        "licence": suite.licence,
        "recipe_sha256": sha256_hex(read_bytes(out / "recipe.json")),
        "group_sha256": sha256_hex(read_bytes(out / "arrays.zarr" / "zarr.json")),
        "notice_sha256": sha256_hex(read_bytes(out / "NOTICE")),
        "index_sha256": sha256_hex(index),
        "index_bytes": len(index),
    }
    return sealed(body, "self_sha256")


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest's body. Without one the cache is incomplete: CacheDamageError with the numbers and the next step."""
    path = out / "manifest.json"
    if not path.is_file():
        raise CacheDamageError(_incomplete(out), rule="manifest.missing", file=str(path), next=_resume(out))
    return unsealed(read_json(path), "self_sha256", path)


def _incomplete(out: Path) -> str:
    if not out.is_dir():
        return "there is no cache here"
    if not (out / "recipe.json").is_file():
        return "this folder is not a cache"
    try:
        recipe = Recipe.from_dict(read_json(out / "recipe.json"))
        total = len(read_json(out / "arrays.zarr" / "zarr.json")["attributes"]["shards"])
    except Exception:
        return "the cache is incomplete and its recipe or shard table cannot be read"
    names = recipe.fields
    whole = sum(all(receipt_path(out, n, s).is_file() for n in names) for s in range(total))
    return f"the cache is incomplete: {whole} of {total} shards complete"


def _resume(out: Path) -> str:
    if not (out / "recipe.json").is_file():
        return f"imkd-data build --out {out} --split ..."
    return "resume with the same `imkd-data build` command"
