"""Compare stored rows with the raw data they came from: compute random shards again, in memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from imkd_data.cache import keys
from imkd_data.cache.plan import make_plan
from imkd_data.cache.store import open_cache
from imkd_data.cache.verify import Problem
from imkd_data.errors import ImkdError
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
    from those of the build) and source.differs (equal raw files, other rows). Writes nothing."""
    root = Path(path)
    cache = open_cache(root, fields=fields)
    resolved = resolve(merged(Asked(dataroot=Path(dataroot), reader=reader, fields=list(fields)), root))
    plan = make_plan(resolved.reader, resolved.recipe, resolved.fields, root)
    chosen = sorted(random.Random(seed).sample(range(len(plan.shards)), min(shards, len(plan.shards))))
    problems = [
        Problem(rule="source.changed", what=q.reason, field=q.field, shard=q.shard) for q in plan.queue if q.shard in chosen
    ]
    order = keys.ordered(resolved.fields)
    everything = frozenset(n for f in resolved.fields.values() for n in f.needs)
    for number in chosen:
        shard = plan.shards[number]
        files: list[tuple[str, int, int]] = []
        samples = [s for c in shard.clips for s in resolved.reader.samples(c.scene)[c.start : c.stop]]
        for sample in samples:
            row = cache.row(sample.token)
            try:
                payload = resolved.reader.read(sample, everything)
            except ImkdError as error:
                problems.append(Problem(rule="source.changed", what=error.what, shard=number, token=sample.token))
                continue
            files += payload.files
            rows: dict[str, Stored] = {}
            for name in order:
                one = resolved.fields[name]
                if not set(one.upstream) <= set(rows):
                    continue  # that field could not be computed, which is said already
                try:
                    rows[name] = fresh = one.compute(
                        payload, resolved.recipe, plan.suite, {u: rows[u] for u in one.upstream}, {}
                    )
                except ImkdError as error:
                    what, file = f"source changed: {error.what}", str(error.details.get("file", ""))
                    found = Problem(rule="source.changed", what=what, file=file, field=name, shard=number, token=sample.token)
                    problems.append(found)
                    continue
                old = cache.read_parts(name, row) if one.kind == "blob" else cache.read(name, row)
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
