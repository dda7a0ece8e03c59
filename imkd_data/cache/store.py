"""Read a cache: ``open_cache`` -> ``Cache``. Random access to single rows, every byte checked at every read.

Safe for threads and after fork; picklable (a worker opens it again). Files are read with positioned reads, never mapped, so
a file that is cut while it is open gives an error and not a crash of the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imkd_data.cache import keys, layout
from imkd_data.cache.codecs import CRC_RESIDUE, MISSING, blob_value, decode_row
from imkd_data.cache.commit import sha256_hex, storage_error
from imkd_data.cache.index import checksums, members, read_index
from imkd_data.cache.manifest import read_manifest, suite_from_json
from imkd_data.cache.receipt import parse_json, read_bytes, read_json
from imkd_data.cache.shard_file import MAX_OPEN, ShardFile
from imkd_data.errors import CacheDamageError, MismatchError, UsageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.recipe import Recipe
from imkd_data.sample import SensorSuite

__all__ = ["Cache", "open_cache"]

ANNOTATION_TOKENS = ("box_tokens", "instance_tokens")
# Columns that reading rows needs none of, and half of the time that the rest takes: read when ``index`` is first asked for.
CAMERA_COLUMNS = ("image_from_camera", "ego_from_camera")


def open_cache(
    path: str | os.PathLike[str],
    *,
    check: bool = True,
    fields: Iterable[CacheField] = (),
    only: Sequence[str] | None = None,
) -> Cache:
    """Open a finished cache for reading; needs no raw data.

    Args:
        path: the cache folder, or a URL that fsspec knows (``http://...``, ``s3://...``): see ``remote.open_remote``.
        check: compare the size of every data file with the manifest (one stat per file).
        fields: fields of your own that the cache holds, for ``decode``.
        only: limit ``check`` to these fields.

    Raises:
        CacheDamageError: no manifest (says how much is built), or missing, short or foreign files.
        MismatchError: written by a newer version.
    """
    if isinstance(path, str) and "://" in path:
        from imkd_data.cache.remote import open_remote

        return open_remote(path, fields=fields)
    cache = Cache(Path(path), tuple(fields))
    if check:
        cache.check_sizes(only)
    return cache


def _known_fields() -> Mapping[str, CacheField]:
    from imkd_data import fields

    return {f.name: f for f in getattr(fields, "FIELDS", ())}


class Cache:
    """A cache opened for reading.

    Attributes:
        path, recipe, suite, id: folder, what was asked for, the data set's sensors, identity of the content.
        fields: name -> CacheField. index: pyarrow Table, one line per sample (see FORMAT.md; without the annotation tokens,
            which ``annotation_tokens`` gives). row_index: what reading rows takes of it, names of blob parts as dictionaries.

    Rows are global row numbers ``shard * rows_per_shard + position``, the row in the Zarr arrays. Numbers between shards
    that hold no sample are never given out by ``rows``.
    """

    def __init__(self, path: Path, own_fields: tuple[CacheField, ...] = ()) -> None:
        self.path = path
        self._own_fields = own_fields
        self.manifest = read_manifest(path)
        recipe_bytes = self._sealed("recipe.json", "recipe_sha256")
        self.recipe = Recipe.from_dict(parse_json(recipe_bytes, path / "recipe.json"))
        group = parse_json(self._sealed("arrays.zarr/zarr.json", "group_sha256"), path / "arrays.zarr/zarr.json")
        self.suite: SensorSuite = suite_from_json(group["attributes"]["suite"])
        self.shards = layout.shards_from_json(group["attributes"]["shards"])
        self.id: str = self.manifest["id"]
        self.fields = self._fields(own_fields)
        self._index: pa.Table | None = None
        self.row_index = self._read_index((*ANNOTATION_TOKENS, *CAMERA_COLUMNS), coded_parts=True)
        self._open_index()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._own_fields)

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, {len(self)} samples, {len(self.fields)} fields, id {self.id[:12]})"

    def __len__(self) -> int:
        return int(self.row_index.num_rows)

    def content_id(self, fields: Iterable[str]) -> str:
        """``id`` of these fields alone: a field that is added or dropped beside them does not change it."""
        shards = {name: self.manifest["fields"][name]["shards"] for name in fields}
        return keys.cache_id((n, i, key, inputs) for n, found in shards.items() for i, (_, key, inputs, _) in enumerate(found))

    # Opening

    def _sealed(self, name: str, seal: str) -> bytes:
        data = read_bytes(self.path / name)
        if sha256_hex(data) != self.manifest[seal]:
            raise CacheDamageError("file differs from the manifest", rule="manifest.sha256", file=name, next="imkd-data verify")
        return data

    @property
    def index(self) -> pa.Table:
        """One line per sample, every column but the annotation tokens."""
        if self._index is None:
            self._index = self._read_index(ANNOTATION_TOKENS)
        return self._index

    def _read_index(self, without: tuple[str, ...], *, coded_parts: bool = False) -> pa.Table:
        path = self.path / "index.parquet"
        size = path.stat().st_size if path.is_file() else -1
        if size != self.manifest["index_bytes"]:
            raise CacheDamageError(
                "index is missing or has another size",
                rule="index",
                file=str(path),
                expected=f"{self.manifest['index_bytes']:,} bytes",
                found=f"{size:,} bytes",
                next="imkd-data repair",
            )
        return read_index(path, without=without, coded_parts=coded_parts)

    def _fields(self, own: tuple[CacheField, ...]) -> dict[str, CacheField]:
        known = {**_known_fields(), **{f.name: f for f in own}}
        out = {}
        for name, entry in sorted(self.manifest["fields"].items(), key=lambda item: self._place(item[0])):
            layout.check_name(name)
            stored = self._stored_field(name, entry)
            mine = known.get(name)
            same = mine is not None and mine.version == entry["version"] and mine.kind == stored.kind
            out[name] = mine if mine is not None and same else stored
        return out

    def _place(self, name: str) -> int:
        """Place of a field in the recipe's list."""
        names = self.recipe.fields
        return names.index(name) if name in names else len(names)

    def _stored_field(self, name: str, entry: Mapping[str, Any]) -> CacheField:
        """The field as the cache itself describes it: enough to read, not to decode."""

        def unknown(*_: Any) -> Stored:
            raise MismatchError(f"field {name} version {entry['version']} is not known to this program", field=name)

        if entry["kind"] == "blob":
            return CacheField(
                name=name, version=entry["version"], kind="blob", space="none", uses=(), compute=unknown, codec="none"
            )
        path = self.path / "arrays.zarr" / name / "zarr.json"
        data = read_bytes(path)
        if sha256_hex(data) != entry["zarr_json_sha256"]:
            raise CacheDamageError("array metadata differs from the manifest", rule="zarr_json", file=str(path), field=name)
        meta = parse_json(data, path)
        try:
            shape = tuple(meta["shape"][1:])
            dtype, codec = np.dtype(meta["data_type"]), meta["attributes"]["codec"]
        except (KeyError, TypeError) as error:
            raise CacheDamageError("array metadata lacks entries", rule="zarr_json", file=str(path), field=name) from error
        return CacheField(
            name=name,
            version=entry["version"],
            kind="array",
            space="none",
            uses=(),
            compute=unknown,
            dtype=dtype,
            shape=lambda recipe, suite: shape,
            codec=codec,
        )

    def _open_index(self) -> None:
        r = self.recipe.rows_per_shard
        self._rows = np.asarray(self.row_index["row"].to_numpy(), np.int64)
        self._line_of_row = np.full(len(self.shards) * r, -1, np.int64)
        self._line_of_row[self._rows] = np.arange(len(self._rows))
        self._crc: dict[str, NDArray[Any]] = {}
        self._blob: dict[str, tuple[Any, ...]] = {}
        self._row_of_token: dict[str, int] | None = None
        self._annotations: pa.Table | None = None
        self._array: dict[str, tuple[str, np.dtype[Any], tuple[int, ...]]] = {}
        for name, one in self.fields.items():
            if one.kind == "array":
                assert one.shape is not None and one.dtype is not None
                shape = tuple(int(n) for n in one.shape(self.recipe, self.suite))
                self._array[name] = one.codec, one.dtype, shape
                self._crc[name] = checksums(self.row_index, name)
            else:
                self._blob[name] = members(self.row_index, name)
        self._files: dict[tuple[str, int], ShardFile] = {}
        self._lock = threading.Lock()
        self._channel = {c.lower(): c for c in self.suite.channels}

    def check_sizes(self, only: Sequence[str] | None = None) -> None:
        """Size of every data file against the manifest. Raises one CacheDamageError that lists all."""
        problems: list[CacheDamageError] = []
        for name in self._names(only):
            for number, entry in enumerate(self.manifest["fields"][name]["shards"]):
                path = self._path(name, number)
                try:
                    size = os.stat(path).st_size
                except FileNotFoundError:
                    size = -1
                except OSError as error:
                    raise storage_error(error, path) from error
                if size != entry[0]:
                    problems.append(self._size_problem(name, number, path, entry[0], size))
        if problems:
            first = problems[0]
            more = f"; {len(problems)} files in all" if len(problems) > 1 else ""
            raise CacheDamageError(first.what + more, rule=first.rule, problems=tuple(problems), **first.details)

    def _size_problem(self, name: str, number: int, path: Path, expected: int, size: int) -> CacheDamageError:
        what = "data file is missing" if size < 0 else "data file has another size than its receipt"
        return CacheDamageError(
            what,
            rule="data.size",
            field=name,
            shard=self.shards[number].label,
            file=str(path.relative_to(self.path)),
            expected=f"{expected:,} bytes",
            found="no file" if size < 0 else f"{size:,} bytes",
            next=f"imkd-data repair --out {self.path} --dataroot ...",
        )

    def _names(self, only: Sequence[str] | None) -> list[str]:
        names = list(self.fields) if only is None else list(only)
        for name in names:
            self._require(name)
        return names

    def _require(self, name: str) -> CacheField:
        try:
            return self.fields[name]
        except KeyError:
            raise MismatchError(
                f"the cache has no field {name}",
                rule="field.absent",
                field=name,
                expected=", ".join(self.fields),
                next=f"imkd-data build --out {self.path} --update --fields {name}",
            ) from None

    def _path(self, name: str, number: int) -> Path:
        if self.fields[name].kind == "blob":
            return self.path / layout.blob_path(name, number)
        return self.path / layout.array_path(name, number, 1 + len(self._array[name][2]))

    # Rows

    def row(self, token: str) -> int:
        """Global row of a sample token. Raises UsageError where the cache has no such sample."""
        if self._row_of_token is None:
            self._row_of_token = dict(zip(self.row_index["token"].to_pylist(), self._rows.tolist(), strict=True))
        try:
            return self._row_of_token[token]
        except KeyError:
            raise UsageError("the cache holds no sample with this token", token=token) from None

    def token(self, row: int) -> str:
        """Sample token of a row."""
        return str(self.row_index["token"][self.line(row)].as_py())

    def line(self, row: int) -> int:
        """Line of a row in ``index``. Raises UsageError where there is no sample."""
        line = int(self._line_of_row[row]) if 0 <= row < len(self._line_of_row) else -1
        if line < 0:
            raise UsageError("no sample at this row", found=f"row {row}", expected="a row of cache.rows()")
        return line

    def rows(
        self,
        split: str | Sequence[str] | None = None,
        scenes: Iterable[str] | None = None,
        *,
        quarantined: bool = False,
    ) -> NDArray[np.int64]:
        """Global rows in order, of one or more splits and scenes; quarantined samples only on request.

        Raises UsageError for a split or scene that the cache does not hold.
        """
        keep = np.ones(len(self._rows), bool)
        if not quarantined:
            keep &= np.asarray(self.row_index["status"].to_pylist()) == "ok"
        for column, wanted in (("split", [split] if isinstance(split, str) else split), ("scene", scenes)):
            if wanted is None:
                continue
            names = set(wanted)
            values = np.asarray(self.row_index[column].to_pylist())
            unknown = sorted(names - set(values.tolist()))
            if unknown:
                raise UsageError(
                    f"the cache holds no {column} {', '.join(unknown)}", expected=", ".join(sorted(set(values.tolist()))[:20])
                )
            keep &= np.isin(values, sorted(names))
        rows: NDArray[np.int64] = self._rows[keep]
        return rows

    def select(self, expression: str) -> NDArray[np.int64]:
        """Rows by an expression over the index, e.g. ``night and class_counts.car >= 3`` (see ``cache/select.py``)."""
        from imkd_data.cache.select import select

        chosen: NDArray[np.int64] = self._rows[select(self.index, expression, self.suite.radars)]
        return np.intersect1d(chosen, self.rows())

    def annotation_tokens(self, row: int) -> tuple[list[str], list[str]]:
        """Annotation tokens and track tokens of a row's boxes, in the order of ``boxes``. Read from the index file when first
        asked for: they are two thirds of it and training needs none of them."""
        if self._annotations is None:
            self._annotations = read_index(self.path / "index.parquet", columns=list(ANNOTATION_TOKENS))
        line = self.line(row)
        box, instance = (list(self._annotations[name][line].as_py() or ()) for name in ANNOTATION_TOKENS)
        return box, instance

    # Reading

    def read(self, field: str, row: int) -> Any:
        """One row exactly as stored: a read-only array as plain zarr gives it (integer codes, not metres). Blobs: the array
        where the blob is one ``.npy`` part, else {part: array or bytes}; ``images`` is {camera name: JPEG bytes}.

        Raises CacheDamageError with field, shard and token when bytes are missing, foreign or changed; MismatchError for a
        field that the cache lacks; UsageError for a row without a sample.
        """
        if field in self._array:
            return self._read_array(field, row)
        parts = self.read_parts(field, row)
        unpack = self.fields[field].unpack
        if unpack is not None:
            return unpack(parts, self.suite)
        out = {}
        for part, data in parts.items():
            stem = part.partition(".")[0]
            out[self._channel.get(stem, stem)] = blob_value(part, data)
        return next(iter(out.values())) if _single_npy(parts) else out

    def read_parts(self, field: str, row: int) -> dict[str, bytes]:
        """A blob row as raw bytes, {part name: bytes}, as its field computed it. Raises as ``read``, and UsageError for an
        array field."""
        if self._require(field).kind == "array":
            raise UsageError(f"field {field} is an array and has no parts", field=field, next="cache.read or cache.decode")
        line = self.line(row)
        number = row // self.recipe.rows_per_shard
        starts, names, codes, offsets, lengths, crcs = self._blob[field]
        first, last = int(starts[line]), int(starts[line + 1])
        file = self._file(field, number)
        out = {}
        for i in range(first, last):
            data = file.read(int(lengths[i]), int(offsets[i]))
            if len(data) != lengths[i] or google_crc32c.value(data) != crcs[i]:
                raise self._damage(field, row, "stored bytes differ from the index")
            out[names[codes[i]]] = data
        if not out and field in (self.row_index["holes"][line].as_py() or ()):
            raise self._damage(field, row, "the sample is quarantined: it has no data of this field")
        return out

    def _read_array(self, name: str, row: int) -> NDArray[Any]:
        line = self.line(row)
        rows_per_shard = self.recipe.rows_per_shard
        file = self._file(name, row // rows_per_shard)
        at, size = file.span(row % rows_per_shard)
        if at == MISSING:
            raise self._damage(name, row, "the row is missing in its shard")
        chunk = file.read(size, at)
        # One pass checks the bytes (crc of data + crc is a constant); the crc itself must be the one the index expects.
        if len(chunk) != size or size < 4 or google_crc32c.value(chunk) != CRC_RESIDUE:
            raise self._damage(name, row, "stored bytes are damaged")
        if int.from_bytes(chunk[-4:], "little") != self._crc[name][line]:
            raise self._damage(name, row, "the row belongs to another sample or cache (swapped shard?)")
        codec, dtype, shape = self._array[name]
        try:
            return decode_row(chunk, codec, dtype, shape)
        except (ValueError, RuntimeError) as error:
            raise self._damage(name, row, f"stored bytes cannot be decoded: {error}") from error

    def _damage(self, name: str, row: int, what: str) -> CacheDamageError:
        number = row // self.recipe.rows_per_shard
        return CacheDamageError(
            what,
            rule="row.crc32c",
            field=name,
            shard=self.shards[number].label,
            token=self.token(row),
            file=str(self._path(name, number).relative_to(self.path)),
            next=f"imkd-data verify --full {self.path}; then imkd-data repair",
        )

    def _file(self, name: str, number: int) -> ShardFile:
        found = self._files.get((name, number))
        if found is not None:
            return found
        path = self._path(name, number)
        rows = self.recipe.rows_per_shard if self.fields[name].kind == "array" else 0
        entry = self.manifest["fields"][name]["shards"][number]
        try:
            file = ShardFile(path, rows, entry[0], keep=len(self._files) < MAX_OPEN)
        except CacheDamageError as error:
            details = dict(error.details, field=name, shard=self.shards[number].label, file=str(path.relative_to(self.path)))
            raise CacheDamageError(error.what, rule=error.rule, **details) from error
        with self._lock:
            return self._files.setdefault((name, number), file)

    def decode(self, field: str, row: int) -> Any:
        """Physical values (float arrays, Boxes, ...) of one row; see the field's docstring.

        Raises as ``read``, and MismatchError where the stored field version is not the one this program decodes.
        """
        one = self._require(field)
        if one.decode is None:
            if field in _known_fields() and one is not _known_fields()[field]:
                raise MismatchError(
                    f"field {field} was written as version {one.version}",
                    field=field,
                    expected=f"version {_known_fields()[field].version}",
                    next=f"imkd-data build --out {self.path} --update",
                )
            return self.read(field, row)
        value = self.read(field, row)
        count = self.attributes(field).get("count_field") if one.kind == "array" else None
        if not count:
            return one.decode(value, self.recipe, self.suite)
        counts = self._read_array(count, row)
        # Only slots that some camera fills are decoded; then every camera gets its own number of them.
        values = one.decode(value[..., : int(counts.max(initial=0))], self.recipe, self.suite)
        return [v[: int(n)] for v, n in zip(values, counts, strict=True)]

    def attributes(self, field: str) -> dict[str, Any]:
        """The array's attributes (frame, units, scale, columns, cameras, ...); for blobs what the field declares."""
        one = self._require(field)
        if one.kind == "blob":
            return one.attributes(self.recipe, self.suite)
        cached: dict[str, dict[str, Any]] = self.__dict__.setdefault("_attributes", {})
        if field not in cached:
            cached[field] = read_json(self.path / "arrays.zarr" / field / "zarr.json")["attributes"]
        return cached[field]

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        with self._lock:
            files, self._files = list(self._files.values()), {}
        for file in files:
            file.close()


def _single_npy(parts: Mapping[str, bytes]) -> bool:
    return len(parts) == 1 and all(p.endswith((".npy", ".npy.zst")) for p in parts)
