"""Selections of samples: SQL conditions over the index, ``location like 'singapore%' and num_radar > 50``.

The part of SQL that selections need is read here and evaluated by pyarrow. What lies beyond it (arithmetic, functions) is
given to DuckDB, in memory and without access to files, where DuckDB is installed. Nothing is ever evaluated as Python.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import UsageError

__all__ = ["select"]

EXAMPLES = "night and not rain, num_radar > 50, location like 'singapore%', class_counts.car >= 3, scene in ('a', 'b')"
_LINE = "__line__"
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}
_WORDS = ("and", "or", "not", "in", "like", "ilike", "between", "is", "null", "true", "false")
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*'|"[^"]*")
    |(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<sign>==|!=|<>|>=|<=|=|>|<|\(|\)|,)
    |(?P<word>[A-Za-z_0-9][\w.\-]*)
    |(?P<other>\S))""",
    re.VERBOSE,
)


class _Unread(Exception):
    """The text is not of the small grammar."""


def select(index: pa.Table, expression: str | pc.Expression, radars: tuple[str, ...] = ()) -> NDArray[np.bool_]:
    """Which index lines satisfy a condition.

    Text: comparisons (= == != <> < <= > >=) of columns with numbers, text or each other, IN (...), BETWEEN a AND b, LIKE,
    ILIKE, IS NULL, yes/no columns by themselves, joined by AND, OR, NOT and parentheses. ``class_counts.car`` and
    ``num_radar_points.RADAR_FRONT`` reach into lists; ``num_radar`` and ``num_lidar`` are all points of a sample. Single
    words need no quotes. A ``pyarrow.compute`` expression over the same columns is taken as it is.

    Raises UsageError where it cannot be read, or names no column. Warns where it finds nothing because a text does not occur.
    """
    table = _table(index, radars)
    if isinstance(expression, pc.Expression):
        return _lines(table, expression)
    parser = _Parser(expression, table)
    try:
        parsed = parser.parse()
    except _Unread as unread:
        return _duckdb(index, radars, table, expression, str(unread))
    keep = _lines(table, parsed)
    if not keep.any() and len(keep):
        _say_why(table, parser.texts)
    return keep


def _table(index: pa.Table, radars: tuple[str, ...]) -> pa.Table:
    """The plain columns, list entries as ``list.name``, totals, and the line number."""
    plain = [f.name for f in index.schema if not pa.types.is_list(f.type) and "." not in f.name]
    table = index.select(plain)
    for head, names in _lists(radars).items():
        if head in index.column_names:
            for i, column in enumerate(_entries(index, head, len(names)).T):
                table = table.append_column(f"{head}.{names[i]}", pa.array(column))
    if "num_radar_points" in index.column_names:
        total = np.maximum(_entries(index, "num_radar_points", len(radars)), 0).sum(axis=1)
        table = table.append_column("num_radar", pa.array(total))
    if "num_lidar_points" in plain:
        table = table.append_column("num_lidar", index["num_lidar_points"])
    return table.append_column(_LINE, pa.array(np.arange(index.num_rows)))


def _lists(radars: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {"class_counts": DETECTION_CLASSES, "num_radar_points": radars, "num_radar_sweeps": radars}


def _entries(index: pa.Table, head: str, count: int) -> NDArray[np.int64]:
    """(lines, count); -1 where a line has no such list."""
    out = np.full((index.num_rows, count), -1, np.int64)
    column = index[head].combine_chunks()
    whole = np.asarray(column.value_lengths().fill_null(0)) == count
    out[whole] = np.asarray(column.filter(pa.array(whole)).flatten()).reshape(-1, count)
    return out


def _lines(table: pa.Table, expression: pc.Expression) -> NDArray[np.bool_]:
    try:
        found = table.filter(expression)[_LINE].to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, pa.ArrowTypeError) as error:
        raise UsageError(
            "the condition cannot be evaluated", found=str(error).splitlines()[0], expected=EXAMPLES, rule="select.type"
        ) from error
    keep = np.zeros(table.num_rows, bool)
    keep[found] = True
    return keep


def _say_why(table: pa.Table, texts: list[tuple[str, str]]) -> None:
    for column, text in texts:
        values = pc.unique(table[column]).to_pylist()
        if text not in values:
            shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
            hint = f"; {column} like '{text}%'?" if any(str(v).startswith(text) for v in values) else ""
            warnings.warn(f"no sample has {column} = '{text}'; there are {shown}{hint}", stacklevel=4)


class _Parser:
    """Recursive descent over tokens (kind, value); gives one pyarrow expression. ``texts``: column = text pairs seen."""

    def __init__(self, text: str, table: pa.Table) -> None:
        self.table, self.texts = table, list[tuple[str, str]]()
        self.tokens: list[tuple[str, str]] = []
        self.at = position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            assert match is not None  # anything that is no space is a token
            kind = str(match.lastgroup)
            value = match[kind]
            if kind == "word" and value.lower() in _WORDS:
                kind, value = value.lower(), value.lower()
            self.tokens.append((kind, value))
            position = match.end()

    def parse(self) -> pc.Expression:
        if not self.tokens:
            raise UsageError("the condition is empty", expected=EXAMPLES)
        out = self._either()
        if self.at < len(self.tokens):
            raise _Unread(self.tokens[self.at][1])
        return out

    def _kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else "end"

    def _next(self, *kinds: str) -> str:
        if self._kind() not in kinds:
            raise _Unread(self.tokens[self.at][1] if self.at < len(self.tokens) else "the end")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def _taken(self, kind: str, value: str | None = None) -> bool:
        if self._kind() == kind and value in (None, self.tokens[self.at][1]):
            self.at += 1
            return True
        return False

    def _either(self) -> pc.Expression:
        out = self._both()
        while self._taken("or"):
            out = out | self._both()
        return out

    def _both(self) -> pc.Expression:
        out = self._one()
        while self._taken("and"):
            out = out & self._one()
        return out

    def _one(self) -> pc.Expression:
        if self._taken("not"):
            return ~self._one()
        if self._taken("sign", "("):
            out = self._either()
            if not self._taken("sign", ")"):
                raise _Unread("no closing parenthesis")
            return out
        return self._term()

    def _term(self) -> pc.Expression:
        name = self._column()
        column = pc.field(name)
        negate = self._taken("not")
        if not negate and self._taken("is"):
            negate = self._taken("not")
            self._next("null")
            out = column.is_null()
        elif self._taken("in"):
            out = self._among(name)
        elif self._taken("between"):
            low = self._value(name)
            self._next("and")
            out = (column >= low) & (column <= self._value(name))
        elif self._kind() in ("like", "ilike"):
            out = self._pattern(name, self._next("like", "ilike") == "ilike")
        elif self._kind() == "sign" and self.tokens[self.at][1] in _COMPARE and not negate:
            sign = self._next("sign")
            out = _COMPARE[sign](column, self._value(name, equality=sign in ("=", "==")))
        elif negate:
            raise _Unread("not")
        elif pa.types.is_boolean(self.table.schema.field(name).type):
            out = column
        elif self._kind() in ("end", "and", "or") or self.tokens[self.at] == ("sign", ")"):
            raise UsageError(f"{name} is not a yes/no column", expected=f"{name} > 0 or the like", rule="select.type")
        else:
            raise _Unread(self.tokens[self.at][1])
        return ~out if negate else out

    def _column(self) -> str:
        name = self._next("word", "text").strip("\"'")
        if name in self.table.column_names and name != _LINE:
            return name
        if self.tokens[self.at : self.at + 1] == [("sign", "(")] or "-" in name:  # a function, a difference
            raise _Unread(name)
        inside = [c for c in self.table.column_names if c.startswith(f"{name}.")]
        if inside:
            raise UsageError(f"{name} is a list", expected=", ".join(inside), rule="select.type")
        known = [c for c in self.table.column_names if c != _LINE]
        near = difflib.get_close_matches(name, known, 3, 0.6)
        details: dict[str, Any] = {"next": f"did you mean {' or '.join(near)}?"} if near else {}
        heads = dict.fromkeys(c.split(".")[0] + (".NAME" if "." in c else "") for c in known)
        raise UsageError("unknown column", rule="select.column", found=name, expected=", ".join(heads), **details)

    def _value(self, column: str, equality: bool = False) -> Any:
        """The next literal as the column's type, or another column."""
        kind = self._kind()
        text = self._next("number", "text", "word", "true", "false")
        bare = kind == "word"
        if bare and text in self.table.column_names and text != _LINE:
            return pc.field(text)
        of = self.table.schema.field(column).type
        if kind == "text":
            text = text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
        if pa.types.is_string(of):
            if equality:
                self.texts.append((column, text))
            return text
        if pa.types.is_boolean(of):
            if text.lower() in ("true", "false", "0", "1"):
                return text.lower() in ("true", "1")
            raise UsageError(f"{column} is yes or no", found=text, expected="true, false", rule="select.type")
        try:
            number = float(text)
        except ValueError:
            raise UsageError(f"{column} is a number", found=text, rule="select.type") from None
        if not re.fullmatch(r"[+-]?\d+", text):
            return number
        if abs(number) > 2**63 or not -(2**63) <= int(text) < 2**63:  # the first for texts too long for int()
            raise UsageError("a whole number has more than 64 bits", found=text[:40], rule="select.type")
        return int(text)

    def _among(self, column: str) -> pc.Expression:
        if not self._taken("sign", "("):
            raise _Unread("in")
        values = [self._value(column, equality=True)]
        while self._taken("sign", ","):
            values.append(self._value(column, equality=True))
        if not self._taken("sign", ")"):
            raise _Unread("no closing parenthesis")
        out = pc.field(column) == values[0]
        for value in values[1:]:
            out = out | (pc.field(column) == value)
        return out

    def _pattern(self, column: str, ignore_case: bool) -> pc.Expression:
        if not pa.types.is_string(self.table.schema.field(column).type):
            raise UsageError(f"{column} is no text", expected="like is for text columns", rule="select.type")
        text = self._next("text", "word").strip("\"'")
        return pc.match_like(pc.field(column), text, ignore_case=ignore_case)


def _duckdb(index: pa.Table, radars: tuple[str, ...], table: pa.Table, text: str, unread: str) -> NDArray[np.bool_]:
    """The whole of SQL, by DuckDB: in memory, no files, no extensions, no look at the caller's variables."""
    try:
        import duckdb
    except ImportError:
        raise UsageError(
            "the condition cannot be read", rule="select.grammar", found=f"{text}  (at: {unread})", expected=EXAMPLES,
            next="conditions with arithmetic and functions need DuckDB: pip install 'imkd[sql]'",
        ) from None  # fmt: skip
    plain = table.select([n for n in table.column_names if "." not in n])
    for head, names in _lists(radars).items():
        if head in index.column_names and names:
            columns = [pa.array(c) for c in _entries(index, head, len(names)).T]
            plain = plain.append_column(head, pa.StructArray.from_arrays(columns, names=list(names)))
    config: dict[str, Any] = {"enable_external_access": False, "python_enable_replacements": False}
    config |= {"threads": 1, "lock_configuration": True}
    with duckdb.connect(":memory:", config=config) as connection:
        try:
            found = connection.from_arrow(plain).filter(text).project(_LINE).fetchnumpy()[_LINE]
        except duckdb.Error as error:
            message = str(error).splitlines()[0]
            raise UsageError(
                "the condition cannot be read", rule="select.grammar", found=f"{text}  ({message})", expected=EXAMPLES
            ) from error
    keep = np.zeros(index.num_rows, bool)
    keep[np.asarray(found, np.int64)] = True
    return keep
