"""Compare stored rows with the raw data they came from: compute random shards again, in memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imkd_data.cache import keys
from imkd_data.cache.feed import Payloads
from imkd_data.cache.plan import make_plan
from imkd_data.cache.store import open_cache
from imkd_data.cache.verify import Problem
from imkd_data.errors import CacheDamageError, ImkdError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.sample import Payload, Reader, Sample
from pipelines.build.request import Asked, merged, resolve

__all__ = ["verify_source"]


def verify_source(
    path: str | os.PathLike[str],
    dataroot: str | os.PathLike[str],
    shards: int,
    *,
    reader: Callable[..., Reader] | None = None,
    fields: Sequence[CacheField] = (),
    seed: int | None = None,
) -> list[Problem]:
    """Recompute ``shards`` random shards and compare every row. Problems have rules source.changed (the raw files differ
    from those of the build), source.differs (equal raw files, other rows), quarantined (a hole whose raw files are bad still:
    a warning) or the rule of a stored row that cannot be read. Writes nothing.

    Raises SourceMissingError where a cache without holes lacks raw files.
    """
    root = Path(path)
    cache = open_cache(root, fields=fields)
    resolved = resolve(merged(Asked(dataroot=Path(dataroot), reader=reader, fields=list(fields)), root))
    holes_ok = bool(cache.manifest["quarantined"])  # then missing files may be part of what was built
    plan = make_plan(resolved.reader, resolved.recipe, resolved.fields, root, missing_ok=holes_ok)
    chosen = sorted(random.Random(seed).sample(range(len(plan.shards)), min(shards, len(plan.shards))))
    problems = [
        Problem(rule="source.changed", what=q.reason, field=q.field, shard=q.shard) for q in plan.queue if q.shard in chosen
    ]
    order = keys.ordered(resolved.fields)
    needs = [f.needs for f in resolved.fields.values()]
    for number in chosen:
        shard = plan.shards[number]
        samples = [s for c in shard.clips for s in resolved.reader.samples(c.scene)[c.start : c.stop]]
        for sample in samples:
            row = cache.row(sample.token)
            holes = cache.index["holes"][cache.line(row)].as_py() or ()
            payloads = Payloads(resolved.reader, sample, needs)
            rows: dict[str, Stored] = {}
            for name in order:
                one = resolved.fields[name]
                if not set(one.upstream) <= set(rows):
                    continue  # that field could not be computed, which is said already
                try:
                    payload = payloads.of(one.needs)
                    rows[name] = fresh = one.compute(
                        payload, resolved.recipe, plan.suite, {u: rows[u] for u in one.upstream}, {}
                    )
                except Exception as error:
                    if name not in holes and not isinstance(error, ImkdError):
                        raise
                    problems.append(_failed(error, name in holes, field=name, shard=number, token=sample.token))
                    continue
                if name in holes:
                    what = "source changed: the sample is quarantined in the cache, and its raw files now give a row"
                    found = Problem(rule="source.changed", what=what, field=name, shard=number, token=sample.token)
                    problems.append(found)
                    continue
                try:
                    old = cache.read_parts(name, row) if one.kind == "blob" else cache.read(name, row)
                except CacheDamageError as error:
                    file = str(error.details.get("file", ""))
                    rule = error.rule or "row.crc32c"
                    found = Problem(rule=rule, what=error.what, file=file, field=name, shard=number, token=sample.token)
                    problems.append(found)
                    continue
                same = _equal(fresh, old)
                if not same:
                    problems.append(
                        Problem(
                            rule="source.differs",
                            what="source changed: the raw files now give other rows",
                            field=name,
                            shard=number,
                            token=sample.token,
                            file=_suspects(sample, payload, fresh, old),
                        )
                    )
    return problems


def _failed(error: Exception, hole: bool, **where: Any) -> Problem:
    """A row that cannot be computed: as it was at the build where that left a hole, else news."""
    what, file = str(error), ""
    if isinstance(error, ImkdError):
        what, file = error.what, str(error.details.get("file", ""))
    if hole:
        return Problem(rule="quarantined", severity="warning", what=what, file=file, **where)
    return Problem(rule="source.changed", what=f"source changed: {what}", file=file, **where)


def _suspects(sample: Sample, payload: Payload, fresh: Stored, old: Stored) -> str:
    """The images whose stored parts differ; for other fields the first file of the sample, as any of them may be the one."""
    if isinstance(fresh, dict) and isinstance(old, dict):
        stems = {part.partition(".")[0] for part in fresh.keys() | old.keys() if fresh.get(part) != old.get(part)}
        images = [f.path for f in sample.cameras if f.camera.name.lower() in stems]
        if images:
            return ", ".join(images)
    return ", ".join(f[0] for f in payload.files[:1])


def _equal(a: Stored, b: Stored) -> bool:
    import numpy as np

    if isinstance(a, dict) or isinstance(b, dict):
        return isinstance(a, dict) and isinstance(b, dict) and a == b
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
