"""Selections of samples by a short expression over the index: ``night and num_boxes > 5 and class_counts.car >= 3``."""

from __future__ import annotations

import operator
import re
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import UsageError

__all__ = ["select"]

_COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_TERM = re.compile(r"^(not\s+)?([a-z_]+(?:\.[A-Za-z_0-9]+)?)(?:\s*(==|!=|>=|<=|=|>|<)\s*(.+))?$")


def select(index: pa.Table, expression: str, radars: tuple[str, ...] = ()) -> NDArray[np.bool_]:
    """Which index lines satisfy all terms, joined by ``and``. A term is a yes/no column (``night``, ``not rain``) or a
    comparison of a column with a number or text; ``class_counts.car`` and ``num_radar_points.RADAR_FRONT`` reach into lists.

    Raises UsageError for anything else; nothing is evaluated as code.
    """
    keep = np.ones(index.num_rows, bool)
    for text in re.split(r"\s+and\s+", expression.strip()):
        keep &= _term(index, text.strip(), radars)
    return keep


def _term(index: pa.Table, text: str, radars: tuple[str, ...]) -> NDArray[np.bool_]:
    match = _TERM.match(text)
    if match is None:
        raise UsageError(
            "a term cannot be read", found=text, expected="night, not rain, num_boxes > 5, class_counts.car >= 3, ..."
        )
    negate, name, sign, value = match.groups()
    column = _column(index, name, radars)
    if sign is None:
        if column.dtype != bool:
            raise UsageError(f"{name} is not a yes/no column", found=text, expected=f"{name} > 0 or the like")
        found = column
    else:
        wanted: Any = value.strip().strip("\"'")
        if column.dtype.kind in "biuf":
            try:
                wanted = {"true": 1.0, "false": 0.0}[wanted] if wanted in ("true", "false") else float(wanted)
            except ValueError:
                raise UsageError(f"{name} is a number", found=text) from None
        found = np.asarray(_COMPARE[sign](column, wanted), bool)
    return ~found if negate else found


def _column(index: pa.Table, name: str, radars: tuple[str, ...]) -> NDArray[Any]:
    head, _, tail = name.partition(".")
    inner = {"class_counts": DETECTION_CLASSES, "num_radar_points": radars, "num_radar_sweeps": radars}
    if head not in index.column_names or (tail and (head not in inner or tail not in inner[head])):
        plain = [f.name for f in index.schema if not pa.types.is_list(f.type) and "." not in f.name]
        raise UsageError("unknown column", found=name, expected=", ".join([*plain, *(f"{k}.NAME" for k in inner)]))
    if tail:
        return np.asarray([row[inner[head].index(tail)] for row in index[head].to_pylist()])
    if pa.types.is_list(index.schema.field(head).type):
        raise UsageError(f"{name} is a list", expected=", ".join(f"{name}.{n}" for n in inner.get(name, ())))
    return np.asarray(index[head].to_pylist())
