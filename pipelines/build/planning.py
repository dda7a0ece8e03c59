"""``plan`` without a build: resolve, scan the tables, compare with what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imkd_data.cache.plan import Plan, make_plan
from imkd_data.errors import SourceMissingError
from pipelines.build.request import Asked, Resolved, merged, resolve

__all__ = ["asked_from", "plan_only"]


def asked_from(request: Mapping[str, Any]) -> tuple[Asked, Path]:
    """Keyword arguments of ``build`` -> the request and the output folder."""
    values = dict(request)
    out = Path(values.pop("out"))
    values["dataroot"] = Path(values["dataroot"])
    values["overrides"] = values.pop("recipe_overrides", None) or {}
    return Asked(**values), out


def plan_only(
    request: Mapping[str, Any],
    *,
    update: bool = False,
    hash_inputs: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Resolved, Plan, SourceMissingError | None]:
    """The plan of a request; missing sensor files are returned, grouped, instead of raised: their shards are queued, the
    others still compared. Writes nothing."""
    asked, out = asked_from(request)
    resolved = resolve(merged(asked, out) if update else asked)
    where = out if (out / "recipe.json").is_file() else None
    missing: SourceMissingError | None = None
    try:
        plan = make_plan(resolved.reader, resolved.recipe, resolved.fields, where, hash_inputs=hash_inputs, progress=progress)
    except SourceMissingError as error:
        if error.rule != "source.missing":
            raise
        missing = error
        plan = make_plan(resolved.reader, resolved.recipe, resolved.fields, where, hash_inputs=hash_inputs, missing_ok=True)
    return resolved, plan, missing
