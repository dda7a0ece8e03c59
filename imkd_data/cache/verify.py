"""Check a cache. ``verify`` never writes; it lists problems, each with the id of the rule that it breaks.

Levels: ``quick`` sizes, receipts, shard indexes, every JSON file; ``full`` also every stored byte; ``geometry`` also the
self-checks of ``geometry_rules``. Comparing with the raw data is ``pipelines.build.source``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa

from imkd_data.cache import layout
from imkd_data.cache.codecs import CRC_RESIDUE, MEMBER_NAME, MISSING, parse_index
from imkd_data.cache.commit import crc32c_hex, sha256_hex, storage_error
from imkd_data.cache.index import read_index
from imkd_data.cache.layout import Shard
from imkd_data.cache.manifest import suite_from_json
from imkd_data.cache.receipt import parse_json, read_bytes, unsealed
from imkd_data.cache.rules import RULES, Problem
from imkd_data.errors import CacheDamageError, ImkdError, MismatchError, StorageError, UsageError
from imkd_data.recipe import Recipe

__all__ = ["LEVELS", "RULES", "Problem", "damaged_pairs", "verify"]

LEVELS = ("quick", "full", "geometry")


@dataclass(slots=True)
class _Known:
    """What could be read of a cache; parts that are damaged are None and reported."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    recipe: Recipe | None = None
    shards: tuple[Shard, ...] = ()
    suite: Any = None
    index: pa.Table | None = None
    receipts: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def add(self, rule: str, what: str = "", **details: Any) -> None:
        sentence, severity = RULES[rule]
        self.problems.append(Problem(rule=rule, what=what or f"violated: {sentence}", severity=severity, **details))


Progress = Callable[[int, int, str], None]


def verify(
    path: str | os.PathLike[str],
    *,
    level: str = "quick",
    fields: Sequence[str] | None = None,
    sample: float = 1.0,
    progress: Progress | None = None,
) -> list[Problem]:
    """Problems of a cache, worst first within each file; [] = none found. ``sample``: share of shards looked into by ``full``
    and of rows by ``geometry`` (spread evenly).

    Raises UsageError (a field that the cache does not have), MismatchError (newer format), CacheDamageError (no cache at all),
    StorageError. Never writes.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r}, known: {LEVELS}")
    root = Path(path)
    if not (root / "recipe.json").exists() and not (root / "manifest.json").exists():
        raise CacheDamageError("there is no cache here", rule="cache.missing", file=str(root), next="imkd-data build --out ...")
    known = _Known(root)
    _read_top(known)
    if known.recipe is None or not known.shards:
        return known.problems
    unknown = [n for n in fields or () if n not in known.recipe.fields]
    if unknown:
        raise UsageError("unknown fields", expected=", ".join(known.recipe.fields), found=", ".join(unknown))
    names = [n for n in known.recipe.fields if fields is None or n in fields]
    _check_receipts(known, names)
    _check_data(known, names, level != "quick", _every(len(known.shards), sample), progress)
    if known.index is not None:
        _check_index(known, names)
    _foreign(known)
    if level == "geometry" and not any(p.severity == "error" for p in known.problems):
        from imkd_data.cache.geometry_rules import check_geometry

        known.problems += check_geometry(root, sample=sample, progress=progress)
    return known.problems


def damaged_pairs(problems: Sequence[Problem]) -> set[tuple[str, int]]:
    """(field, shard) pairs that a repair must build again."""
    return {(p.field, p.shard) for p in problems if p.severity == "error" and p.field and p.shard >= 0}


def _every(count: int, share: float) -> set[int]:
    number = max(1, round(count * min(1.0, share)))
    return {i * count // number for i in range(number)}


def _read_top(known: _Known) -> None:
    """Manifest, recipe, group, NOTICE, index. The manifest's second copies stand in for a damaged recipe or group."""
    path = known.path
    try:
        known.manifest = unsealed(_json(path / "manifest.json"), "self_sha256", path / "manifest.json")
    except MismatchError:
        raise
    except CacheDamageError as error:
        there = (path / "manifest.json").exists()
        known.add("manifest.damaged" if there else "manifest.missing", error.what, file="manifest.json")
    m = known.manifest
    known.recipe = _top_json(known, "recipe.json", "recipe.damaged", "recipe_sha256", Recipe.from_dict)
    if known.recipe is None and m:
        known.recipe = Recipe.from_dict(m["recipe"])
    group = _top_json(known, "arrays.zarr/zarr.json", "group.damaged", "group_sha256", lambda v: v["attributes"])
    try:
        source = group if group else {"shards": m["layout"], "suite": m["suite"]} if m else None
        if source:
            known.shards = layout.shards_from_json(source["shards"])
            known.suite = suite_from_json(source["suite"])
    except (ImkdError, KeyError) as error:
        known.add("group.damaged", str(error), file="arrays.zarr/zarr.json")
    if m is None:
        return
    if _hash(path / "NOTICE") != m["notice_sha256"]:
        known.add("notice.damaged", file="NOTICE")
    if _hash(path / "index.parquet") != m["index_sha256"]:
        known.add("index.damaged", file="index.parquet")
    else:
        try:
            known.index = read_index(path / "index.parquet")
        except CacheDamageError as error:
            known.add("index.damaged", error.what, file="index.parquet")


def _hash(path: Path) -> str:
    try:
        return sha256_hex(_bytes(path))
    except CacheDamageError:
        return "missing"


def _bytes(path: Path) -> bytes:
    """The file's bytes; a folder in its place, or a file in place of its folder, is damage and no fault of the disk."""
    try:
        return read_bytes(path)
    except StorageError as error:
        if isinstance(error.__cause__, IsADirectoryError | NotADirectoryError):
            raise CacheDamageError(error.what, rule="file.missing", file=str(path)) from error
        raise


def _json(path: Path) -> Any:
    return parse_json(_bytes(path), path)


def _top_json(known: _Known, name: str, rule: str, seal: str, parse: Callable[[Any], Any]) -> Any:
    path = known.path / name
    try:
        data = read_bytes(path)
        value = parse(parse_json(data, path))
        if known.manifest and sha256_hex(data) != known.manifest[seal]:
            raise CacheDamageError("file differs from the manifest")
        return value
    except (CacheDamageError, ImkdError, KeyError, TypeError) as error:
        known.add(rule, str(error).splitlines()[0] if str(error) else "", file=name)
        return None


def _check_receipts(known: _Known, names: Sequence[str]) -> None:
    for name in names:
        entry = known.manifest["fields"].get(name) if known.manifest else None
        if known.manifest and entry is None:
            known.add("manifest.damaged", f"the manifest lacks field {name}", file="manifest.json")
        if _is_array(known, name):
            path = known.path / "arrays.zarr" / name / "zarr.json"
            relative = str(path.relative_to(known.path))
            try:
                data = _bytes(path)
                parse_json(data, path)
                if entry and sha256_hex(data) != entry["zarr_json_sha256"]:
                    raise CacheDamageError("file differs from the manifest")
            except CacheDamageError as error:
                known.add("array.damaged", error.what, file=relative)
        for shard in known.shards:
            receipt = _receipt(known, name, shard, entry)
            if receipt is not None:
                known.receipts[name, shard.number] = receipt


def _is_array(known: _Known, name: str) -> bool:
    if known.manifest and name in known.manifest["fields"]:
        return bool(known.manifest["fields"][name]["kind"] == "array")
    return not (known.path / "blobs" / name).is_dir()


def _receipt(known: _Known, name: str, shard: Shard, entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    path = layout.receipt_path(known.path, name, shard.number)
    where: dict[str, Any] = {"file": str(path.relative_to(known.path)), "field": name, "shard": shard.number}
    try:
        data = path.read_bytes()
    except OSError:
        known.add("receipt.missing", **where)
        return None
    try:
        body = unsealed(parse_json(data, path), "self_crc32c", path)
    except CacheDamageError as error:
        known.add("receipt.damaged", error.what, **where)
        return None
    if entry and sha256_hex(data) != entry["shards"][shard.number][3]:
        known.add("receipt.damaged", "the receipt differs from the manifest", **where)
        return None
    if body["field"] != name or body["shard"] != shard.number or len(body["tokens"]) != len(shard):
        known.add("receipt.foreign", f"it speaks of {body['field']} shard {body['shard']}", **where)
        return None
    if entry and body["key"] != entry["shards"][shard.number][1]:
        known.add("receipt.key", **where)
    if body["holes"]:
        for _, token, reason in body["holes"]:
            known.add("quarantined", reason, token=token, **where)
    return body


def _check_data(known: _Known, names: Sequence[str], full: bool, chosen: set[int], progress: Progress | None) -> None:
    total = len(names) * len(known.shards)
    for i, name in enumerate(names):
        for shard in known.shards:
            receipt = known.receipts.get((name, shard.number))
            if receipt is not None:
                for rule, details in _data_problems(known, name, receipt, full and shard.number in chosen):
                    known.add(rule, details.pop("what", ""), file=receipt["path"], field=name, shard=shard.number, **details)
            if progress:
                progress(i * len(known.shards) + shard.number + 1, total, name)


def _data_problems(known: _Known, name: str, receipt: Mapping[str, Any], full: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    path = known.path / receipt["path"]
    array = _is_array(known, name)
    if not layout.is_own_path(receipt["path"], name, receipt["shard"]):
        yield "receipt.foreign", {"found": receipt["path"]}
        return
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        yield "data.missing", {}
        return
    except NotADirectoryError as error:
        yield "data.missing", {"what": f"a file lies where its folder should be: {error.strerror}"}
        return
    except OSError as error:  # it may be there: no repair may take this for damage
        raise storage_error(error, path) from error
    if size != receipt["bytes"]:
        yield "data.size", {"expected": f"{receipt['bytes']:,} bytes", "found": f"{size:,} bytes"}
        return
    assert known.recipe is not None
    rows = known.recipe.rows_per_shard
    if full:
        data = read_bytes(path)
        yield from _content(data, receipt, rows, array)
    elif array:
        with open(path, "rb") as file:
            file.seek(max(0, size - rows * 16 - 4))
            yield from _shard_index(file.read(), receipt, rows, size)


def _content(data: bytes, receipt: Mapping[str, Any], rows: int, array: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every stored byte: whole file, then rows or members."""
    crc, sha = crc32c_hex(data), sha256_hex(data)
    if crc != receipt["crc32c"]:
        yield "data.crc32c", {"expected": receipt["crc32c"], "found": crc}
    elif sha != receipt["sha256"]:
        yield "data.sha256", {"expected": receipt["sha256"], "found": sha}
    if not array:
        yield from _members(data, receipt)
        return
    bad = list(_shard_index(data[len(data) - rows * 16 - 4 :], receipt, rows, len(data)))
    yield from bad
    if bad:
        return
    spans = parse_index(data[len(data) - rows * 16 - 4 :], rows, len(data)).tolist()
    for position, expected in enumerate(receipt["row_crc32c"]):
        if expected is None:
            continue
        at, size = spans[position]
        chunk = data[at : at + size]
        if google_crc32c.value(chunk) != CRC_RESIDUE or f"{int.from_bytes(chunk[-4:], 'little'):08x}" != expected:
            yield "row.crc32c", {"token": receipt["tokens"][position]}


def _shard_index(tail: bytes, receipt: Mapping[str, Any], rows: int, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        spans = parse_index(tail, rows, size)
    except CacheDamageError as error:
        yield "shard.index", {"what": error.what}
        return
    there = [int(a) != MISSING for a in spans[:, 0]]
    wanted = [c is not None for c in receipt["row_crc32c"]]
    if there != wanted + [False] * (rows - len(wanted)):
        yield "shard.rows", {}


def _members(data: bytes, receipt: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    at = 0
    for token, members in zip(receipt["tokens"], receipt["members"], strict=True):
        for part, offset, size, crc in members or []:
            name = f"{token}.{part}"
            header = data[at : at + 512]
            stored = header[:100].rstrip(b"\0").decode("ascii", "replace")
            typeflag, length = header[156:157], header[124:135]
            if (
                offset != at + 512
                or stored != name
                or not MEMBER_NAME.match(stored)
                or typeflag != b"0"
                or length != f"{size:011o}".encode()
            ):
                yield "tar.members", {"token": token, "expected": name, "found": stored}
                return
            if f"{google_crc32c.value(data[offset : offset + size]):08x}" != crc:
                yield "row.crc32c", {"token": token, "expected": f"{part} with crc32c {crc}"}
            at = offset + size + (-size % 512)
    if len(data) != at + 1024:
        yield "tar.members", {"what": "bytes after the last member"}


def _check_index(known: _Known, names: Sequence[str]) -> None:
    assert known.index is not None and known.recipe is not None
    index, r = known.index, known.recipe.rows_per_shard
    rows = index["row"].to_pylist()
    expected = [s.number * r + i for s in known.shards for i in range(len(s))]
    tokens = index["token"].to_pylist()
    if rows != expected or len(set(tokens)) != len(tokens):
        known.add("index.rows", file="index.parquet")
        return
    counts = dict.fromkeys(known.manifest["samples"], 0) if known.manifest else {}
    for split in index["split"].to_pylist():
        counts[split] = counts.get(split, 0) + 1
    if known.manifest and counts != known.manifest["samples"]:
        known.add("index.counts", expected=str(known.manifest["samples"]), found=str(counts), file="index.parquet")
    pairs = set(zip(index["scene"].to_pylist(), index["split"].to_pylist(), strict=True))
    if len({scene for scene, _ in pairs}) != len(pairs):
        known.add("split.twice", file="index.parquet")
    for name in names:
        column = index[f"{name}.crc32c"].to_pylist()
        at = 0
        for shard in known.shards:
            receipt = known.receipts.get((name, shard.number))
            mine, at = column[at : at + len(shard)], at + len(shard)
            if receipt is None:
                continue
            where: dict[str, Any] = {"field": name, "shard": shard.number, "file": receipt["path"]}
            if receipt["tokens"] != tokens[at - len(shard) : at]:
                known.add("receipt.foreign", "its tokens are not those of the index", **where)
            elif receipt["members"] is None:
                stored = [None if c is None else int(c, 16) for c in receipt["row_crc32c"]]
                if stored != mine:
                    known.add("index.checksums", **where)
            elif [[int(m[3], 16) for m in row or []] for row in receipt["members"]] != [list(v or []) for v in mine]:
                known.add("index.checksums", **where)


def _foreign(known: _Known) -> None:
    """Files that no receipt or rule names: reported, never touched."""
    ours = {"recipe.json", "manifest.json", "index.parquet", "NOTICE", ".lock", "arrays.zarr/zarr.json"}
    assert known.recipe is not None
    for name in known.recipe.fields:
        ours.add(f"arrays.zarr/{name}/zarr.json")
        for shard in known.shards:
            ours.add(f"receipts/{name}/{shard.number:05d}.json")
            ours.add(f"blobs/{name}/{shard.number:05d}.tar")
    prefixes = tuple(f"arrays.zarr/{n}/c/{s.number}/" for n in known.recipe.fields for s in known.shards)
    for folder, folders, files in os.walk(known.path):
        relative = os.path.relpath(folder, known.path)
        if relative == ".":
            folders[:] = [f for f in folders if f != "logs"]
        for file in sorted(files):
            name = file if relative == "." else f"{relative}/{file}"
            if file.endswith(".partial"):
                known.add("file.partial", file=name)
            elif name not in ours and not (name.startswith(prefixes) and set(file) == {"0"}):
                known.add("file.foreign", file=name)
