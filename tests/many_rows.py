"""A cache on disk whose index is written many times over: as many rows as the full data set, the bytes of a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imkd_data.cache.index import read_index
from imkd_data.cache.shard_file import ShardFile
from imkd_data.cache.store import Cache

__all__ = ["ManyRows"]


class ManyRows(Cache):
    """``copies`` of every scene under numbers, scene names and tokens of their own. The long index is a file too, so opening
    costs what it costs in a large cache."""

    def __init__(self, path: Path, copies: int) -> None:
        self.copies = copies
        super().__init__(Path(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.copies)

    def _read_index(self, without: tuple[str, ...], *, coded_parts: bool = False) -> pa.Table:
        if not hasattr(self, "files"):
            self.files = len(self.shards)
            self.shards = self.shards * self.copies
        long = self.path.with_name(f"{self.path.name}.{self.copies}.parquet")
        if not long.exists():
            pq.write_table(self._long(read_index(self.path / "index.parquet")), long)
        return read_index(long, without=without, coded_parts=coded_parts)

    def _long(self, index: pa.Table) -> pa.Table:
        span = self.files * self.recipe.rows_per_shard
        steps = {"row": span, "previous_row": span, "next_row": span, "shard": self.files}
        parts = []
        for copy in range(self.copies):
            part = index
            for at, field in enumerate(index.schema):
                values = index[field.name].to_pylist() if field.name in (*steps, "scene", "token") else None
                if values is None:
                    continue
                if field.name == "scene":
                    values = [f"{copy}/{v}" for v in values]
                elif field.name == "token":
                    values = [f"{copy:08x}{v[8:]}" for v in values]
                else:
                    values = [v if v < 0 else v + copy * steps[field.name] for v in values]
                part = part.set_column(at, field, pa.array(values, field.type))
            parts.append(part)
        return pa.concat_tables(parts)

    def _file(self, name: str, number: int) -> ShardFile:
        return super()._file(name, number % self.files)
