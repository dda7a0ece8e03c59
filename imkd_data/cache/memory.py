"""A cache that is never written: the same rows, fields and values, computed from raw data when they are read.

For inference straight from a data set. Only the fields that are asked for are computed, so only the declared sensors' files
are touched; a window of recent rows is kept, because history frames are read again soon.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imkd_data.cache.codecs import blob_value
from imkd_data.cache.index import sample_row
from imkd_data.errors import MismatchError, SourceMissingError, UsageError
from imkd_data.fields import fields_by_name
from imkd_data.fields.base import Stored
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, Reader, Sample

__all__ = ["MemoryCache"]

_COLUMNS = ("row", "shard", "position", "previous_row", "next_row", "status")


def _some(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class MemoryCache:
    """Rows of a reader's scenes behind the reading interface of ``Cache`` (recipe, suite, fields, index, read, decode, ...).

    recipe: what the fields are computed with; ``recipe.fields`` are the fields. Row numbers run over the scenes of
    ``recipe.splits`` in order of split and name. Not picklable into workers: the reader stays in this process.

    Raises:
        SourceMissingError: the tables hold no scene of these splits. UsageError: one of ``recipe.scenes`` is in none of them.
    """

    def __init__(self, reader: Reader, recipe: Recipe, *, keep_rows: int = 16) -> None:
        self.reader, self.recipe, self.suite, self.path = reader, recipe, reader.suite, None
        self.fields = fields_by_name(recipe.fields)
        self.id = ""
        self._needs = frozenset(need for f in self.fields.values() for need in f.needs)
        self._keep = keep_rows
        self._payloads: OrderedDict[int, tuple[Payload, dict[str, Stored]]] = OrderedDict()
        self._scenes: OrderedDict[str, tuple[Sample, ...]] = OrderedDict()
        self._place: list[tuple[str, int]] = []  # row -> scene, position
        self.index = self._read_index()
        self._row_of = {token: row for row, token in enumerate(self.index["token"].to_pylist())}

    def content_id(self, fields: Iterable[str]) -> str:
        """Nothing is stored: ``id``."""
        return self.id

    def _read_index(self) -> pa.Table:
        rows: list[dict[str, Any]] = []
        scenes = {split: self.reader.scene_names(split) for split in self.recipe.splits}
        there = sorted({scene for names in scenes.values() for scene in names})
        if there and (unknown := sorted(set(self.recipe.scenes) - set(there))):
            raise UsageError(
                f"no scene {', '.join(unknown)} in {', '.join(self.recipe.splits)}",
                rule="scene.unknown",
                expected=_some(there),
                found=", ".join(self.recipe.scenes),
            )
        for split, names in scenes.items():
            for scene in names:
                if self.recipe.scenes and scene not in self.recipe.scenes:
                    continue
                samples = self._samples(scene)
                for position, sample in enumerate(samples):
                    row = len(rows)
                    place = (
                        row,
                        0,
                        row,
                        row - 1 if position else -1,
                        row + 1 if position + 1 < len(samples) else -1,
                        "ok",
                    )
                    rows.append({**sample_row(sample, self.suite), "split": split, **dict(zip(_COLUMNS, place, strict=True))})
                    self._place.append((scene, position))
        if not rows:
            raise SourceMissingError(
                "the tables hold no scene of this split",
                expected=", ".join(self.recipe.splits),
                next="check --version and --split: mini_val belongs to v1.0-mini, test to v1.0-test",
            )
        return pa.Table.from_pylist(rows)

    @property
    def row_index(self) -> pa.Table:
        """``index``: nothing is left out of it."""
        return self.index

    def _samples(self, scene: str) -> tuple[Sample, ...]:
        if scene not in self._scenes:
            self._scenes[scene] = self.reader.samples(scene)
            if len(self._scenes) > 2:
                self._scenes.popitem(last=False)
        return self._scenes[scene]

    def __len__(self) -> int:
        return len(self._place)

    def sample(self, row: int) -> Sample:
        """The reader's sample behind a row."""
        if not 0 <= row < len(self._place):
            raise UsageError("no sample at this row", found=f"row {row}", expected=f"0..{len(self) - 1}")
        scene, position = self._place[row]
        return self._samples(scene)[position]

    def row(self, token: str) -> int:
        """Row of a sample token."""
        try:
            return self._row_of[token]
        except KeyError:
            raise UsageError("no sample with this token", token=token) from None

    def token(self, row: int) -> str:
        """Sample token of a row."""
        return self.sample(row).token

    def rows(self, split: str | Sequence[str] | None = None, scenes: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Rows in order, of one or more splits and scenes. Raises UsageError for one that is not there."""
        keep = np.ones(len(self), dtype=bool)
        for column, wanted in (("split", [split] if isinstance(split, str) else split), ("scene", scenes)):
            if wanted is None:
                continue
            values = self.index[column].to_pylist()
            if unknown := sorted(set(wanted) - set(values)):
                raise UsageError(f"the cache holds no {column} {', '.join(unknown)}", expected=_some(sorted(set(values))))
            keep &= np.isin(np.asarray(values), sorted(wanted))
        return np.flatnonzero(keep).astype(np.int64)

    def _computed(self, row: int, name: str) -> Stored:
        if name not in self.fields:
            raise MismatchError(f"no field {name}", expected=", ".join(self.fields), found=name)
        if row in self._payloads:
            self._payloads.move_to_end(row)
        else:
            self._payloads[row] = (self.reader.read(self.sample(row), self._needs), {})
            while len(self._payloads) > self._keep:
                self._payloads.popitem(last=False)
        payload, done = self._payloads[row]
        if name not in done:
            one = self.fields[name]
            upstream = {u: self._computed(row, u) for u in one.upstream}
            done[name] = one.compute(payload, self.recipe, self.suite, upstream, {})
        return done[name]

    def read(self, field: str, row: int) -> Any:
        """The row exactly as a written cache gives it."""
        stored, one = self._computed(row, field), self.fields.get(field)
        if not isinstance(stored, dict) or one is None:
            return stored
        if one.unpack is not None:
            return one.unpack(stored, self.suite)
        parts = {part.partition(".")[0]: blob_value(part, data) for part, data in stored.items()}
        return next(iter(parts.values())) if len(parts) == 1 else parts

    def decode(self, field: str, row: int) -> Any:
        """Physical values of a row."""
        value, one = self.read(field, row), self.fields[field]
        if one.decode is None:
            return value
        values = one.decode(value, self.recipe, self.suite)
        count = one.attributes(self.recipe, self.suite).get("count_field") if one.kind == "array" else None
        if count:
            return [v[: int(n)] for v, n in zip(values, self._computed(row, count), strict=True)]
        return values
