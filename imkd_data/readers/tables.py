"""JSON tables (an array of flat objects) -> Arrow columns, without a Python object per row for the big ones.

nuScenes keeps 2.6 million rows in one JSON array. Small tables go through the strict standard parser. Big ones are cut into
blocks of whole objects, each parsed by Arrow; what Arrow refuses, or could take though it is not JSON, goes to the strict
parser as well, which says where.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from imkd_data.errors import InputDataError, SourceMissingError, StorageError

__all__ = ["BIG_TABLE_BYTES", "key_index", "read_table"]

BIG_TABLE_BYTES = 32 << 20
_BLOCK_BYTES = 8 << 20
_BETWEEN = re.compile(rb"\}\s*,\s*\{")  # the tables hold no nested objects, so this is the border of two rows
_LINES = bytes.maketrans(b"\r\n", b"  ")  # JSON has no line breaks inside strings
_SPACE = b" \t\r\n"
_MISTYPED = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)


def read_table(
    path: Path, schema: pa.Schema, *, optional: frozenset[str] = frozenset(), big: int = BIG_TABLE_BYTES
) -> pa.Table:
    """One table with exactly the schema's columns (others are not read).

    Raises SourceMissingError (no file), InputDataError with table and byte offset (not JSON, NaN, byte-order mark, cut off), or
    with row and column (missing, mistyped or too large value; ``optional`` columns may be missing and are null then).
    """
    try:
        size = path.stat().st_size
        table = _read_small(path, schema) if size < big else _read_big(path, schema)
    except FileNotFoundError as error:
        raise SourceMissingError(
            f"table {path.stem} is missing",
            rule="table.missing",
            expected=f"{path.parent.name}/{path.name}",
            found="no such file",
            file=f"{path.parent.name}/{path.name}",
            next="unpack the metadata archive of this version again",
        ) from error
    except OSError as error:
        if isinstance(error, InputDataError):
            raise
        raise StorageError(f"cannot read table {path.stem}: {error.strerror}", rule="table.io", file=path.name) from error
    for name in schema.names:
        if name not in optional and table[name].null_count:
            row = pc.index(pc.is_null(table[name]), True).as_py()
            token = table["token"][row].as_py() if "token" in schema.names else None
            raise _bad(
                path,
                f"row {row} has no {name}",
                "table.column",
                expected=f"a value of type {schema.field(name).type}",
                token=token,
            )
        _check_finite(path, name, table)
    return table


def _check_finite(path: Path, name: str, table: pa.Table) -> None:
    """Both parsers read 1e400 as infinity."""
    start = 0
    for chunk in table[name].chunks:
        levels = [chunk]
        while pa.types.is_list(levels[-1].type):
            levels.append(pc.list_flatten(levels[-1]))
        if pa.types.is_floating(levels[-1].type):
            finite = pc.is_finite(levels.pop())
            if pc.all(finite).as_py() is False:
                row = pc.index(finite, False)
                for lists in reversed(levels):
                    row = pc.list_parent_indices(lists)[row.as_py()]
                i = start + int(row.as_py())
                token = table["token"][i].as_py() if "token" in table.schema.names else None
                found = str(table[name][i].as_py())[:80]
                what = f"row {i} has a wrong {name}"
                raise _bad(path, what, "table.column", expected="finite numbers", found=found, token=token)
        start += len(chunk)


def _bad(path: Path, what: str, rule: str, **details: Any) -> InputDataError:
    details.setdefault("next", "unpack the metadata archive of this version again")
    return InputDataError(f"table {path.stem}: {what}", rule=rule, file=f"{path.parent.name}/{path.name}", **details)


def _strict_rows(path: Path, data: bytes, base: int = 0) -> list[dict[str, Any]]:
    """The standard parser, with every leniency of it refused; errors name the byte offset."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise _bad(path, "starts with a byte-order mark", "table.json", expected="plain UTF-8", found="EF BB BF at byte 0")

    def refuse(name: str) -> float:
        offset = data.find(name.encode())
        raise _bad(
            path, f"{name} is not JSON", "table.json", expected="a finite number", found=f"{name} at byte {base + offset:,}"
        )

    try:
        rows = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise _bad(path, "is not UTF-8", "table.json", found=f"byte {base + error.start:,}") from error
    except json.JSONDecodeError as error:
        offset = len(error.doc[: error.pos].encode())
        where = "the file ends" if error.pos >= len(error.doc.rstrip()) else "broken"
        raise _bad(
            path, f"is not JSON ({error.msg})", "table.json", expected="whole JSON", found=f"{where} at byte {base + offset:,}"
        ) from error
    except InputDataError:
        raise
    except ValueError as error:
        raise _bad(path, f"is not JSON ({error})", "table.json", expected="numbers of a sane length") from error
    except RecursionError as error:
        raise _bad(path, "is nested too deeply", "table.json", expected="an array of flat objects") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _bad(path, "is not an array of objects", "table.json", expected="[{...}, ...]")
    return rows


def _read_small(path: Path, schema: pa.Schema) -> pa.Table:
    return _from_rows(path, _strict_rows(path, path.read_bytes()), schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as Arrow, without the conversions Arrow would make in silence (1.5 -> 1, True -> 1)."""
    exact = {pa.int64(): int, pa.bool_(): bool, pa.string(): str}.get(kind)
    if exact is not None and not all(v is None or type(v) is exact for v in values):
        raise pa.ArrowTypeError("another type")
    return pa.array(values, type=kind)


def _from_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, start: int = 0) -> pa.Table:
    """``start``: how many rows of the table stand before these."""
    columns = []
    for item in schema:
        values = [row.get(item.name) for row in rows]
        try:
            columns.append(_column(values, item.type))
        except _MISTYPED as error:
            raise _mistyped(path, item, rows, error, start) from error
    return pa.table(columns, schema=schema)


def _mistyped(path: Path, item: pa.Field, rows: list[dict[str, Any]], error: Exception, start: int) -> InputDataError:
    kind = str(item.type)
    for i, row in enumerate(rows, start):
        try:
            _column([row.get(item.name)], item.type)
        except _MISTYPED:
            found, token = repr(row.get(item.name))[:80], str(row.get("token", ""))
            return _bad(path, f"row {i} has a wrong {item.name}", "table.column", expected=kind, found=found, token=token)
    return _bad(path, f"wrong {item.name}: {error}", "table.column", expected=kind)


def _blocks(handle: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(bytes of whole objects separated by commas, offset in the file) of a JSON array of flat objects."""
    rest, offset = b"", 0
    while chunk := handle.read(_BLOCK_BYTES):
        block = rest + chunk
        cut = block.rfind(b"}", 0, max(block.rfind(b"{"), 0)) + 1  # the last row border: '}' before the last '{'
        if cut:
            yield block[:cut], offset
        rest, offset = block[cut:], offset + cut
    yield rest, offset


def _read_big(path: Path, schema: pa.Schema) -> pa.Table:
    """Arrow's parser over blocks. Each block loses the array's brackets and gets one row a line.

    Arrow takes more than JSON has: what it could let through (numbers that are none, other bytes than UTF-8, rows without a
    comma between) goes to the strict parser, which refuses it or finds it inside a text.
    """
    # One thread is as quick here and leaves less memory behind.
    options = pj.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES + (1 << 20))
    parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    tables: list[pa.Table] = []
    closed = False
    with path.open("rb") as handle:
        for raw, offset in _blocks(handle):
            body = raw.strip(_SPACE)
            if offset == 0:
                if not body.startswith(b"["):
                    _strict_rows(path, body)
                    raise _bad(path, "is not an array of objects", "table.json", expected="[{...}, ...]")
                body = body[1:].lstrip(_SPACE)
            elif body.startswith(b","):
                body = body[1:].lstrip(_SPACE)
            else:
                found = f"broken at byte {offset + raw.find(body[:64]):,}"
                raise _bad(path, "is not JSON (Expecting ',' delimiter)", "table.json", expected="whole JSON", found=found)
            if body.endswith(b"]"):
                body, closed = body[:-1].rstrip(_SPACE), True
            if not body:
                continue
            table: pa.Table | None = None
            if not (b"NaN" in body or b"Inf" in body or not _is_utf8(body)):
                lines, borders = _BETWEEN.subn(b"}\n{", body.translate(_LINES))
                with contextlib.suppress(pa.ArrowInvalid):
                    table = pj.read_json(pa.BufferReader(lines), read_options=options, parse_options=parse)
            if table is None or table.num_rows != borders + 1:
                start = offset + raw.find(body[:64]) - 1
                rows = _strict_rows(path, b"[" + body + b"]", start)  # raises with the offset, unless only a type is wrong
                table = _from_rows(path, rows, schema, sum(t.num_rows for t in tables))
            tables.append(table)
    if not closed:
        raise _bad(
            path, "is cut off", "table.json", expected="']' at the end", found=f"the file ends at byte {path.stat().st_size:,}"
        )
    return _joined(tables, schema) if tables else schema.empty_table()


def _is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _joined(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    """One table, each column in one piece. Column by column, as hundreds of small pieces among what the parser has freed keep
    that memory from going back (a quarter of the peak of trainval's tables)."""
    blocks = pa.concat_tables(tables).select(schema.names)
    tables.clear()
    columns = []
    for name in schema.names:
        columns.append(blocks[name].combine_chunks())
        blocks = blocks.drop_columns([name])
    del blocks
    pa.default_memory_pool().release_unused()
    return pa.table(columns, schema=schema)


def key_index(keys: pa.ChunkedArray, target: pa.ChunkedArray) -> Any:
    """Foreign keys -> int32 row numbers in ``target``; -1 for an empty or null key, -2 for one that points nowhere."""
    import numpy as np

    found = pc.index_in(keys, value_set=target.combine_chunks())
    row = pc.fill_null(found, -2).to_numpy()
    empty = pc.fill_null(pc.equal(keys, ""), True).to_numpy()
    return np.where(empty, np.int32(-1), row.astype(np.int32, copy=False))
