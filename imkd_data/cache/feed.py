"""What a shard job feeds to its fields: payloads, each raw file read once, and rows of upstream fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imkd_data.cache import layout
from imkd_data.cache.codecs import decode_row, parse_index
from imkd_data.cache.commit import crc32c_hex
from imkd_data.cache.layout import Shard
from imkd_data.cache.receipt import read_receipt
from imkd_data.errors import CacheDamageError, ImkdError, InputDataError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, Reader, Sample, SensorSuite

__all__ = ["Payloads", "Upstream"]


class Payloads:
    """The sample's payload, each raw file read once. If reading all at once fails, fields are served one by one, so that a
    bad radar file leaves the images usable."""

    def __init__(self, reader: Reader, sample: Sample, needs: Sequence[tuple[str, ...]]) -> None:
        self.reader, self.sample = reader, sample
        self.all = frozenset(n for one in needs for n in one)
        self.whole: Payload | None = None
        self.single: dict[tuple[str, ...], Payload | ImkdError] = {}
        self.files: dict[tuple[str, ...], list[tuple[str, int, int]]] = {}

    def of(self, needs: tuple[str, ...]) -> Payload:
        if self.whole is None and not self.single:
            try:
                self.whole = self.reader.read(self.sample, self.all)
            except ImkdError as error:
                self.single[tuple(sorted(self.all))] = error
        if self.whole is not None:
            return self.whole
        key = tuple(sorted(needs))
        if key not in self.single:
            try:
                self.single[key] = self.reader.read(self.sample, frozenset(needs))
            except ImkdError as error:
                self.single[key] = error
        found = self.single[key]
        if isinstance(found, ImkdError):
            raise found
        return found

    def check_sizes(self, promised: Mapping[str, int], shard: Shard) -> None:
        """A file that was read has the size that the plan saw."""
        for payload in (self.whole, *self.single.values()):
            for path, size, _ in payload.files if isinstance(payload, Payload) else ():
                if promised.get(path, size) != size:
                    raise InputDataError(
                        "the source changed between plan and build: a file has another size",
                        rule="source.changed",
                        file=path,
                        expected=f"{promised[path]:,} bytes",
                        found=f"{size:,} bytes",
                        token=self.sample.token,
                        shard=shard.label,
                        next="wait until nothing writes to the data set, then run the same command; it plans again",
                    )

    def files_of(self, needs: tuple[str, ...]) -> list[tuple[str, int, int]]:
        """(relative path, bytes, crc32c) of what fields with these needs depend on."""
        found = self.files.get(needs)
        if found is None:
            found = self.files[needs] = self._files_of(needs)
        return found

    def _files_of(self, needs: tuple[str, ...]) -> list[tuple[str, int, int]]:
        s = self.sample
        paths: set[str] = set()
        if "images" in needs:
            paths |= {f.path for f in s.cameras}
        if "lidar" in needs or "lidar_key" in needs:
            paths |= {f.path for f in s.lidar if f.is_key or "lidar" in needs}
        if "radar" in needs:
            paths |= {f.path for sweeps in s.radar.values() for f in sweeps}
        return [f for f in self.of(needs).files if f[0] in paths] if paths else []


class Upstream:
    """Rows of upstream fields that this job does not build: read from their committed shard, checked."""

    def __init__(
        self,
        shard: Shard,
        building: Sequence[str],
        recipe: Recipe,
        fields: Mapping[str, CacheField],
        suite: SensorSuite,
        out: Path,
    ) -> None:
        self.shard, self.building = shard, building
        self.recipe, self.fields, self.suite, self.out = recipe, fields, suite, out
        self.open: dict[str, tuple[bytes, Any, dict[str, Any]]] = {}

    def row(self, name: str, position: int) -> Stored:
        if name in self.building:  # built in this job, but not for this sample
            raise InputDataError("upstream row is a hole", rule="upstream.hole", field=name)
        one = self.fields[name]
        number = self.shard.number
        if name not in self.open:
            receipt = read_receipt(layout.receipt_path(self.out, name, number))
            own = layout.is_own_path(receipt["path"], name, number)
            data = (self.out / receipt["path"]).read_bytes() if own else b""
            if len(data) != receipt["bytes"] or crc32c_hex(data) != receipt["crc32c"]:
                raise CacheDamageError("upstream shard is damaged", file=receipt["path"], shard=self.shard.label, field=name)
            r = self.recipe.rows_per_shard
            index = parse_index(data[-(r * 16 + 4) :], r, len(data)) if one.kind == "array" else None
            self.open[name] = data, index, receipt
        data, index, receipt = self.open[name]
        if receipt["row_crc32c"][position] is None:
            raise InputDataError("upstream row is a hole", rule="upstream.hole", field=name)
        if one.kind == "blob":
            return {m[0]: data[m[1] : m[1] + m[2]] for m in receipt["members"][position]}
        assert one.shape is not None and one.dtype is not None
        at, size = (int(v) for v in index[position])
        return decode_row(data[at : at + size], one.codec, one.dtype, one.shape(self.recipe, self.suite))
