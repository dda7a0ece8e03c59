"""Identity of stored bytes. A key is a hash of what decides the bytes of one field in one shard, and of nothing else: no
path of the machine, time, host, worker count or environment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imkd_data.errors import RecipeError
from imkd_data.fields.base import CacheField
from imkd_data.recipe import Recipe, canonical_json

__all__ = ["cache_id", "content_hash", "hash_of", "ordered", "recipe_entries", "recipe_part", "recipe_parts", "shard_key"]


def hash_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def recipe_entries(field: CacheField, recipe: Recipe) -> dict[str, Any]:
    """The recipe entries a field uses, JSON form; ``options.x`` reaches into the options. Empty values are dropped, so that
    a new optional entry does not change old keys."""
    values = recipe.as_dict()
    out: dict[str, Any] = {}
    for name in field.uses:
        head, _, tail = name.partition(".")
        if head not in values:
            raise RecipeError(f"field {field.name} uses an unknown recipe entry", expected=", ".join(values), found=name)
        value = values[head].get(tail) if tail else values[head]
        if value not in (None, "", [], {}):
            out[name] = value
    return out


def ordered(fields: Mapping[str, CacheField]) -> tuple[str, ...]:
    """Field names, every field after its upstream fields; otherwise in the given order. Raises RecipeError on a missing or
    circular upstream."""
    done: list[str] = []
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in trail:
            raise RecipeError("fields depend on each other in a circle", found=" -> ".join([*trail, name]))
        trail.append(name)
        for upstream in fields[name].upstream:
            if upstream not in fields:
                raise RecipeError(
                    f"field {name} needs field {upstream}", expected=f"{upstream} in the list of fields", field=name
                )
            visit(upstream)
        trail.pop()
        done.append(name)

    for name in fields:
        visit(name)
    return tuple(done)


def recipe_parts(recipe: Recipe, fields: Mapping[str, CacheField]) -> dict[str, str]:
    """``key_recipe_part`` of every field: its key without the input manifest, the same for all shards."""
    parts: dict[str, str] = {}
    for name in ordered(fields):
        parts[name] = recipe_part(fields[name], recipe, parts)
    return parts


def recipe_part(field: CacheField, recipe: Recipe, parts: Mapping[str, str]) -> str:
    """``key_recipe_part`` of one field; ``parts`` holds those of its upstream fields."""
    return hash_of(
        {
            "dataset": recipe.dataset,
            "field": field.name,
            "version": field.version,
            "recipe": recipe_entries(field, recipe),
            "upstream": {u: parts[u] for u in field.upstream},
        }
    )


def shard_key(part: str, manifest_hash: str, upstream_keys: Mapping[str, str]) -> str:
    """Key of one field in one shard."""
    return hash_of({"part": part, "inputs": manifest_hash, "upstream": dict(upstream_keys)})


def content_hash(manifest_hash: str, files: Iterable[Sequence[Any]]) -> str:
    """Hash over (relative path, size, crc32c) of everything that was read for a shard, in any order, and its input manifest."""
    return hash_of({"manifest": manifest_hash, "files": sorted({tuple(f) for f in files})})


def cache_id(entries: Iterable[tuple[str, int, str, str]]) -> str:
    """Identity of a cache from (field, shard, key, inputs.hash): equal ids hold equal decoded data."""
    return hash_of(sorted([list(e) for e in entries]))
