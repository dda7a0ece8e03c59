"""Build one shard: compute its fields sample by sample, encode in memory, commit the data file, then its receipt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from imkd_data.cache import fault, keys, layout
from imkd_data.cache.codecs import array_metadata, encode_row, encode_shard, encode_tar
from imkd_data.cache.commit import commit_bytes, crc32c_hex, remove_file
from imkd_data.cache.feed import Payloads, Upstream
from imkd_data.cache.index import row_summary
from imkd_data.cache.inputs import check_inputs
from imkd_data.cache.layout import Shard
from imkd_data.cache.receipt import FORMAT, sealed
from imkd_data.errors import CacheDamageError, ImkdError, InputDataError, InterruptedBuildError, StorageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.recipe import Recipe, canonical_json
from imkd_data.sample import Reader, Sample, SensorSuite

__all__ = ["Options", "ShardJob", "array_zarr_json", "build_shard", "software"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to build; nothing here changes stored bytes. ``quarantine``: bad samples become holes instead of an error."""

    fsync: bool = True
    quarantine: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """All that a worker needs to know about one shard. ``fields``: names to build, upstream first. ``remove``: those whose
    old files must go first. keys, inputs: of these fields in this shard; parts: ``key_recipe_part`` of every field."""

    shard: Shard
    tokens: tuple[str, ...]
    fields: tuple[str, ...]
    remove: frozenset[str] = frozenset()
    skip: frozenset[str] = frozenset()  # tokens that killed their worker: holes without a try
    keys: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def software() -> dict[str, str]:
    """Versions of what shapes the bytes."""

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    return {"imkd": of("imkd"), "zarr": of("zarr"), "numcodecs": of("numcodecs"), "jpeg": f"simplejpeg {of('simplejpeg')}"}


def array_zarr_json(one: CacheField, recipe: Recipe, suite: SensorSuite, shards: int, part: str) -> bytes:
    """Canonical ``zarr.json`` of an array field for ``shards`` shards."""
    assert one.shape is not None and one.dtype is not None
    grid = recipe.grid.as_dict() if one.space == "bev" else None
    attributes = {
        "field": one.name,
        "version": one.version,
        "key_recipe_part": part,
        "codec": one.codec,
        "frame": "ego" if one.space != "image" else "image",
        "units": "",
        "scale": None,
        "offset": None,
        "columns": None,
        "count_field": None,
        "grid": grid,
        "licence": suite.licence,
        "reference_channel": recipe.reference_channel,
        **one.attributes(recipe, suite),
    }
    shape = tuple(int(n) for n in one.shape(recipe, suite))
    return canonical_json(array_metadata(one.dtype, shape, shards, recipe.rows_per_shard, one.codec, attributes))


@dataclass(slots=True)
class _Column:
    """One field of the shard while it is built: encoded rows, drops, holes."""

    chunks: list[bytes | None] = field(default_factory=list)
    parts: list[dict[str, bytes] | None] = field(default_factory=list)
    drops: dict[str, int] = field(default_factory=dict)
    holes: list[list[Any]] = field(default_factory=list)
    files: list[list[tuple[str, int, int]]] = field(default_factory=list)  # one list a sample, shared between fields
    summary: dict[str, dict[str, Any]] = field(default_factory=dict)


def build_shard(
    job: ShardJob,
    reader: Reader,
    recipe: Recipe,
    fields: Mapping[str, CacheField],
    out: Path,
    options: Options = Options(),  # noqa: B008  (frozen)
    on_sample: Callable[[int, str], None] | None = None,
    warnings: dict[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Build ``job.fields`` of one shard and return their receipts. Idempotent: equal files that exist are accepted.

    on_sample(position, token) is called before each sample; it may raise to stop. ``warnings`` collects what was strange but
    legal, by rule; it never reaches a receipt, which must not depend on what else was built at the same time.

    Raises InputDataError and
    SourceMissingError with shard, scene and token; StorageError; CacheDamageError where an upstream row is bad.
    """
    fault.point("shard.begin")
    samples = _samples(job, reader)
    sizes = check_inputs(reader, samples, job.inputs, {n: fields[n].needs for n in job.fields})
    suite = reader.suite
    columns = {name: _Column() for name in job.fields}
    upstream = Upstream(job.shard, job.fields, recipe, fields, suite, out)
    for position, sample in enumerate(samples):
        if on_sample:
            on_sample(position, sample.token)
        if sample.token in job.skip:
            for column in columns.values():
                _hole(column, position, sample.token, "the sample killed its worker")
            continue
        fault.point(f"sample@{sample.token}")
        try:
            payloads = _sample(job, position, sample, reader, recipe, fields, columns, upstream, options)
        except (StorageError, CacheDamageError, InterruptedBuildError):
            raise
        except ImkdError as error:
            _name(error, job.shard, sample)
            raise
        payloads.check_sizes(sizes, job.shard)
        if warnings is not None and payloads.whole is not None:
            for rule, count in {**(payloads.whole.warnings or {}), **(payloads.whole.dropped or {})}.items():
                warnings[rule] = warnings.get(rule, 0) + count
    fault.point("shard.encoded")
    receipts = {}
    contents: dict[tuple[Any, ...], tuple[int, str]] = {}
    for name in job.fields:
        receipts[name] = _commit(job, fields[name], columns.pop(name), recipe, suite, out, options, contents)
    return receipts


def _samples(job: ShardJob, reader: Reader) -> list[Sample]:
    samples = [s for clip in job.shard.clips for s in reader.samples(clip.scene)[clip.start : clip.stop]]
    if [s.token for s in samples] != list(job.tokens):
        raise InputDataError(
            "the tables changed between plan and build",
            rule="source.changed",
            shard=job.shard.label,
            next="run the same command; it plans again",
        )
    return samples


def _name(error: ImkdError, shard: Shard, sample: Sample) -> None:
    """Say where, if the raiser did not."""
    for key, value in (("token", sample.token), ("scene", sample.scene), ("shard", shard.label)):
        error.details.setdefault(key, value)


def _sample(
    job: ShardJob,
    position: int,
    sample: Sample,
    reader: Reader,
    recipe: Recipe,
    fields: Mapping[str, CacheField],
    columns: dict[str, _Column],
    upstream: Upstream,
    options: Options,
) -> Payloads:
    suite = reader.suite
    payloads = Payloads(reader, sample, [fields[n].needs for n in job.fields])
    fresh: dict[str, Stored] = {}
    for name in job.fields:
        one, column = fields[name], columns[name]
        try:
            payload = payloads.of(one.needs)
            rows = {u: fresh[u] if u in fresh else upstream.row(u, position) for u in one.upstream}
            drops: dict[str, int] = {}
            stored = one.compute(payload, recipe, suite, rows, drops)
            _check(one, stored, recipe, suite)
        except (StorageError, CacheDamageError):
            raise
        except Exception as error:
            if not options.quarantine or isinstance(error, MemoryError):  # a full machine says nothing of the sample
                raise _explained(error, name) from error
            _hole(column, position, sample.token, (str(error).splitlines() or [type(error).__name__])[0][:200])
            continue
        column.files.append(payloads.files_of(one.needs))
        for reason, count in drops.items():
            column.drops[reason] = column.drops.get(reason, 0) + int(count)
        _append(one, column, stored)
        facts = row_summary(one, stored, suite)
        if facts:
            column.summary[str(position)] = facts
        if any(name in fields[other].upstream for other in job.fields):
            fresh[name] = stored
    return payloads


def _hole(column: _Column, position: int, token: str, reason: str) -> None:
    column.chunks.append(None)
    column.parts.append(None)
    column.holes.append([position, token, reason])


def _explained(error: Exception, name: str) -> Exception:
    if isinstance(error, ImkdError):
        error.details.setdefault("field", name)
        return error
    if isinstance(error, OSError):
        return StorageError(f"cannot read: {error}", rule="source.io", field=name)
    error.add_note(f"while computing field {name}")
    return error


def _check(one: CacheField, stored: Stored, recipe: Recipe, suite: SensorSuite) -> None:
    """A field must deliver what it declares: a wrong dtype would be cast silently by nobody, so it is refused."""
    if one.kind == "blob":
        if not isinstance(stored, dict) or not all(isinstance(v, bytes) for v in stored.values()):
            raise InputDataError("blob field did not return a dict of bytes", field=one.name, found=type(stored).__name__)
        return
    assert one.shape is not None and one.dtype is not None
    shape = tuple(one.shape(recipe, suite))
    if not isinstance(stored, np.ndarray) or stored.shape != shape or stored.dtype != one.dtype:
        found = f"{stored.dtype} {stored.shape}" if isinstance(stored, np.ndarray) else type(stored).__name__
        raise InputDataError(
            "array field returned another shape or dtype", field=one.name, expected=f"{one.dtype} {shape}", found=found
        )


def _append(one: CacheField, column: _Column, stored: Stored) -> None:
    if isinstance(stored, dict):
        column.parts.append(stored)
    else:
        column.chunks.append(encode_row(stored, one.codec))


def _commit(
    job: ShardJob,
    one: CacheField,
    column: _Column,
    recipe: Recipe,
    suite: SensorSuite,
    out: Path,
    options: Options,
    contents: dict[tuple[Any, ...], tuple[int, str]] | None = None,
) -> dict[str, Any]:
    """Data file first, receipt last."""
    number = job.shard.number
    members: list[list[list[Any]] | None] | None = None
    if one.kind == "array":
        assert one.shape is not None
        data = encode_shard(column.chunks, recipe.rows_per_shard)
        path = layout.array_path(one.name, number, 1 + len(one.shape(recipe, suite)))
        rows = [None if c is None else f"{int.from_bytes(c[-4:], 'little'):08x}" for c in column.chunks]
    else:
        data, members = _tar(job.tokens, column.parts)
        path = layout.blob_path(one.name, number)
        rows = [None if m is None else crc32c_hex(canonical_json(m)) for m in members]
    column.chunks.clear()
    column.parts.clear()
    receipt_file = layout.receipt_path(out, one.name, number)
    if one.name in job.remove:
        remove_file(receipt_file, "receipt", fsync=options.fsync)
        remove_file(out / path, "data", fsync=options.fsync)
    done = commit_bytes(out / path, data, "data", fsync=options.fsync)
    files, content = _content(job.inputs[one.name], column, {} if contents is None else contents)
    body = {
        "format": FORMAT,
        "field": one.name,
        "version": one.version,
        "shard": number,
        "key": job.keys[one.name],
        "key_recipe_part": job.parts[one.name],
        "tokens": list(job.tokens),
        "path": path,
        "bytes": done.bytes,
        "crc32c": done.crc32c,
        "sha256": done.sha256,
        "row_crc32c": rows,
        "members": members,
        "inputs": {
            "files": files,
            "hash": content,
            "manifest": job.inputs[one.name],
        },
        "dropped": {"non_finite": 0, "overflow": 0, **column.drops},
        "holes": column.holes,
        "summary": column.summary,
        "software": software(),
    }
    commit_bytes(receipt_file, sealed(body, "self_crc32c"), "receipt", fsync=options.fsync)
    return body


def _content(manifest: str, column: _Column, known: dict[tuple[Any, ...], tuple[int, str]]) -> tuple[int, str]:
    """Number and content hash of the raw files behind a column; fields of equal needs share it."""
    key = (manifest, *map(id, column.files))  # the columns keep the lists alive
    if key not in known:
        files = {f for sample in column.files for f in sample}
        known[key] = len(files), keys.content_hash(manifest, files)
    return known[key]


def _tar(tokens: Sequence[str], rows: Sequence[Mapping[str, bytes] | None]) -> tuple[bytes, list[list[list[Any]] | None]]:
    """Members in row order, parts of one sample adjacent -> tar bytes and, per row, [part, offset, length, crc32c]."""
    flat = [(f"{token}.{part}", data) for token, row in zip(tokens, rows, strict=True) for part, data in (row or {}).items()]
    data, table = encode_tar(flat)
    members: list[list[list[Any]] | None] = []
    at = 0
    for token, row in zip(tokens, rows, strict=True):
        if row is None:
            members.append(None)
            continue
        members.append([[n[len(token) + 1 :], o, size, f"{crc:08x}"] for n, o, size, crc in table[at : at + len(row)]])
        at += len(row)
    return data, members
