"""Fields that a command added to a finished cache (``extend``), in later builds: kept whole or dropped whole.

A build cannot compute them. Each one stays, byte for byte, if every shard of the plan has its rows and the key that follows
from the fields it was computed from; else all of it goes, so that a field never claims rows that it lacks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.cache import keys, layout
from imkd_data.cache.commit import storage_error
from imkd_data.cache.receipt import read_json, read_receipt
from imkd_data.errors import CacheDamageError, ImkdError, MismatchError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.recipe import Recipe

if TYPE_CHECKING:
    from imkd_data.cache.plan import Plan

__all__ = ["Dropped", "added_names", "remove_added", "rows_hash", "with_added"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """An added field that goes. ``attributes``: of its array, {} where they cannot be read."""

    field: str
    reason: str
    attributes: Mapping[str, Any]


def rows_hash(tokens: Sequence[str]) -> str:
    """Stands in an added field's receipts where those of built fields have the hash of their input files."""
    return keys.hash_of(["rows of this cache", list(tokens)])


def added_names(out: Path, recipe: Recipe | None) -> tuple[str, ...]:
    """Names in ``recipe`` whose receipts or metadata say that they were computed from the cache's own rows."""
    return tuple(n for n in (recipe.fields if recipe else ()) if _is_added(out, n))


def _is_added(out: Path, name: str) -> bool:
    for path in sorted((out / "receipts" / layout.check_name(name)).glob("*.json")):
        try:
            receipt = read_receipt(path)
        except ImkdError:
            continue
        return bool(receipt["inputs"].get("manifest") == rows_hash(receipt["tokens"]))
    try:
        return "added" in _metadata(out, name)["attributes"]  # a repair has taken its last receipt
    except ImkdError:
        return False


def with_added(plan: Plan, out: Path, stored: Recipe | None) -> Plan:
    """``plan`` with the added fields of the cache in ``out`` that stay, and those that go in ``dropped``."""
    dropped: list[Dropped] = []
    for name in added_names(out, stored):
        if name in plan.fields:
            continue
        attributes: dict[str, Any] = {}
        try:
            meta = _metadata(out, name)
            attributes = meta["attributes"]
            plan = _kept(plan, out, _field(name, meta))
        except ImkdError as error:
            dropped.append(Dropped(field=name, reason=error.what, attributes=attributes))
    recipe = plan.recipe.with_values(fields=(*plan.recipe.fields, *plan.added))
    return replace(plan, recipe=recipe, dropped=tuple(dropped))


def _unused(*_: Any) -> Stored:
    raise MismatchError("this field is not computed by a build")


def _metadata(out: Path, name: str) -> dict[str, Any]:
    meta = read_json(out / "arrays.zarr" / name / "zarr.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("attributes"), dict):
        raise CacheDamageError("its metadata cannot be read")
    return meta


def _field(name: str, meta: Mapping[str, Any]) -> CacheField:
    """The field as its array's metadata tell it. Raises CacheDamageError."""
    attributes = meta["attributes"]
    try:
        source = attributes["added"]
        shape = tuple(meta["shape"][1:])
        return CacheField(
            name=name,
            version=attributes["version"],
            kind="array",
            space="none",
            uses=tuple(source["uses"]),
            upstream=tuple(source["upstream"]),
            compute=_unused,
            dtype=np.dtype(meta["data_type"]),
            shape=lambda recipe, suite: shape,
            codec=attributes["codec"],
        )
    except (KeyError, TypeError) as error:
        raise CacheDamageError("its metadata do not tell what it was computed from") from error


def _kept(plan: Plan, out: Path, one: CacheField) -> Plan:
    """``plan`` with ``one``. Raises ImkdError with the reason where a shard has other rows of it, or none."""
    lost = [u for u in one.upstream if u not in plan.parts]
    if lost:
        raise MismatchError(f"it was computed from {', '.join(lost)}, which the cache no longer has")
    part = keys.recipe_part(one, plan.recipe, plan.parts)
    inputs, wanted = [], []
    for shard, tokens in zip(plan.shards, plan.tokens, strict=True):
        inputs.append(rows_hash(tokens))
        wanted.append(keys.shard_key(part, inputs[-1], {u: plan.keys[u][shard.number] for u in one.upstream}))
        path = layout.receipt_path(out, one.name, shard.number)
        if not path.is_file():
            raise MismatchError(f"shard {shard.label} has no rows of it")
        receipt = read_receipt(path)
        if receipt["tokens"] != list(tokens):
            raise MismatchError(f"shard {shard.label} has other samples")
        if receipt["key"] != wanted[-1]:
            raise MismatchError(f"what it was computed from changes in shard {shard.label}")
        data = out / receipt["path"]
        whole = layout.is_own_path(receipt["path"], one.name, shard.number) and data.is_file()
        if not whole or data.stat().st_size != receipt["bytes"]:
            raise CacheDamageError(f"its data of shard {shard.label} are damaged")
    return replace(
        plan,
        fields={**plan.fields, one.name: one},
        parts={**plan.parts, one.name: part},
        inputs={**plan.inputs, one.name: tuple(inputs)},
        keys={**plan.keys, one.name: tuple(wanted)},
        added=(*plan.added, one.name),
    )


def remove_added(out: Path, name: str) -> None:
    """Delete receipts and array of a dropped field, after the recipe without it is written."""
    for path in (out / "receipts" / layout.check_name(name), out / "arrays.zarr" / name):
        if os.path.lexists(path):
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise storage_error(error, path) from error
