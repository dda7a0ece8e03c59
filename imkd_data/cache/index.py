"""``index.parquet``: one row per sample, made from tables and receipts. Fixed schema, row order and writer options, so equal
content is equal bytes; page checksums are written and checked."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from imkd_data.cache.layout import Shard
from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import CacheDamageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.fields.codec import array_from_part
from imkd_data.sample import Sample, SensorSuite

__all__ = [
    "checksums",
    "flat_numbers",
    "index_bytes",
    "index_schema",
    "members",
    "read_index",
    "row_summary",
    "sample_row",
    "weather",
]

ROW_GROUP = 4096
# Words of a description, not letters: a train station is no rain, a knight no night. Digits and _ end a word, too.
_NIGHT = re.compile(r"(?<![a-z])(over|mid|to)?night(s|ly|time|fall)?(?![a-z])")
_RAIN = re.compile(r"(?<![a-z])rain(s|y|ed|ing|fall|storm)?(?![a-z])")
_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("row", pa.int64()),
    ("shard", pa.int32()),
    ("position", pa.int32()),
    ("token", pa.string()),
    ("scene", pa.string()),
    ("scene_token", pa.string()),
    ("split", pa.string()),
    ("timestamp_us", pa.int64()),
    ("previous_row", pa.int64()),
    ("next_row", pa.int64()),
    ("clip_start", pa.int64()),
    ("location", pa.string()),
    ("description", pa.string()),
    ("night", pa.bool_()),
    ("rain", pa.bool_()),
    ("ego_speed_mps", pa.float32()),
    ("num_boxes", pa.int32()),
    ("class_counts", pa.list_(pa.int32())),
    ("num_lidar_sweeps", pa.int32()),
    ("num_lidar_points", pa.int32()),
    ("intensity_mean", pa.float32()),
    ("intensity_max", pa.int32()),
    ("num_radar_sweeps", pa.list_(pa.int32())),
    ("num_radar_points", pa.list_(pa.int32())),
    ("global_from_ego", pa.list_(pa.float64())),
    ("ego_from_reference", pa.list_(pa.float64())),
    ("image_from_camera", pa.list_(pa.float64())),
    ("ego_from_camera", pa.list_(pa.float64())),
    ("box_tokens", pa.list_(pa.string())),
    ("instance_tokens", pa.list_(pa.string())),
    ("status", pa.string()),
    ("holes", pa.list_(pa.string())),
)


def weather(description: str) -> tuple[bool, bool]:
    """(night, rain) as a scene's description says it; the wet road after rain is no rain."""
    text = description.lower()
    return bool(_NIGHT.search(text)), bool(_RAIN.search(text.replace("after rain", "")))


def sample_row(sample: Sample, suite: SensorSuite) -> dict[str, Any]:
    """The part of an index row that the tables give. -1 where there are no annotations; nested lists in suite order, NaN for
    a camera that is not declared."""
    night, rain = weather(sample.description)
    cameras = {f.camera.name: f.camera for f in sample.cameras}
    boxes = sample.boxes
    counts = [-1] * len(DETECTION_CLASSES)
    if boxes is not None:
        counts = [int(n) for n in np.bincount(boxes.label[boxes.label >= 0], minlength=len(DETECTION_CLASSES))]
    k, pose = np.full((len(suite.cameras), 9), np.nan), np.full((len(suite.cameras), 12), np.nan)
    for i, name in enumerate(suite.cameras):
        if name in cameras:
            k[i] = cameras[name].image_from_camera.reshape(9)
            pose[i] = cameras[name].ego_from_camera.matrix34()
    return {
        "token": sample.token,
        "scene": sample.scene,
        "scene_token": sample.scene_token,
        "split": sample.split,
        "timestamp_us": sample.timestamp_us,
        "location": sample.location,
        "description": sample.description,
        "night": night,
        "rain": rain,
        "num_boxes": -1 if boxes is None else len(boxes),
        "class_counts": counts,
        "num_lidar_sweeps": len(sample.lidar),
        "num_radar_sweeps": [len(sample.radar.get(name, ())) for name in suite.radars],
        "global_from_ego": sample.global_from_ego.matrix34().tolist(),
        "ego_from_reference": sample.ego_from_reference.matrix34().tolist(),
        "image_from_camera": k.reshape(-1).tolist(),
        "ego_from_camera": pose.reshape(-1).tolist(),
        "box_tokens": list(boxes.token) if boxes is not None else [],
        "instance_tokens": list(boxes.instance) if boxes is not None else [],
    }


def _lidar_count(stored: Stored, suite: SensorSuite) -> dict[str, Any]:
    return {"num_lidar_points": int(np.asarray(stored).sum())}


def _lidar_sum(stored: Stored, suite: SensorSuite) -> dict[str, Any]:
    return {"intensity_sum": int(np.asarray(stored).sum(dtype=np.int64))}


def _lidar_max(stored: Stored, suite: SensorSuite) -> dict[str, Any]:
    return {"intensity_max": int(np.asarray(stored).max(initial=0))}


def _radar(stored: Stored, suite: SensorSuite) -> dict[str, Any]:
    if not isinstance(stored, dict) or len(stored) != 1:
        return {}
    table = array_from_part(next(iter(stored.values())))
    sensor = table[18] if table.ndim == 2 and len(table) > 18 else np.zeros(0, np.int64)
    return {"num_radar_points": np.bincount(sensor, minlength=len(suite.radars)).tolist()}


# What a stored row tells the index, kept in the receipt of its field.
SUMMARIES: Mapping[str, Callable[[Stored, SensorSuite], dict[str, Any]]] = {
    "lidar_bev_count": _lidar_count,
    "lidar_bev_sum": _lidar_sum,
    "lidar_bev_max": _lidar_max,
    "radar_points": _radar,
}


def row_summary(field: CacheField, stored: Stored, suite: SensorSuite) -> dict[str, Any]:
    """Numbers about one stored row for the index; {} for most fields."""
    return SUMMARIES[field.name](stored, suite) if field.name in SUMMARIES else {}


def index_schema(fields: Mapping[str, CacheField]) -> pa.Schema:
    """The fixed columns, then per array field ``<name>.crc32c`` and per blob field part, offset, length, crc32c."""
    columns = list(_COLUMNS)
    for name in sorted(fields):
        if fields[name].kind == "array":
            columns.append((f"{name}.crc32c", pa.uint32()))
        else:
            columns += [
                (f"{name}.part", pa.list_(pa.string())),
                (f"{name}.offset", pa.list_(pa.int64())),
                (f"{name}.length", pa.list_(pa.int64())),
                (f"{name}.crc32c", pa.list_(pa.uint32())),
            ]
    return pa.schema([pa.field(n, t) for n, t in columns])


def _speed(rows: Sequence[dict[str, Any]], a: int, b: int) -> float:
    dt = (rows[b]["timestamp_us"] - rows[a]["timestamp_us"]) / 1e6
    at = [np.array(rows[i]["global_from_ego"])[[3, 7]] for i in (a, b)]
    return float(np.linalg.norm(at[1] - at[0]) / dt) if dt > 0 else float("nan")


def index_bytes(
    shards: Sequence[Shard],
    rows: Sequence[Mapping[str, Any]],
    fields: Mapping[str, CacheField],
    receipts: Mapping[tuple[str, int], Mapping[str, Any]],
    rows_per_shard: int,
    suite: SensorSuite,
) -> bytes:
    """The Parquet file. ``rows``: ``sample_row`` dicts in row order; ``receipts``: by (field, shard)."""
    full: list[dict[str, Any]] = []
    at = 0
    for shard in shards:
        position = 0
        for clip in shard.clips:
            first = at
            for _ in range(len(clip)):
                row = shard.number * rows_per_shard + position
                here = dict(rows[at], row=row, shard=shard.number, position=position, clip_start=row - (at - first))
                here["previous_row"] = row - 1 if at > first else -1
                here["next_row"] = row + 1 if at + 1 < first + len(clip) else -1
                full.append(here)
                at, position = at + 1, position + 1
            for i in range(first, at):
                a, b = max(first, i - 1), min(at - 1, i + 1)
                full[i]["ego_speed_mps"] = _speed(full, a, b) if b > a else float("nan")
    for here in full:
        _stored_columns(here, fields, receipts, suite)
    schema = index_schema(fields)
    table = pa.table({f.name: pa.array([r[f.name] for r in full], type=f.type) for f in schema}, schema=schema)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="2.0",
        use_dictionary=True,
        write_statistics=True,
        write_page_checksum=True,
        store_schema=False,
    )
    return sink.getvalue()


def _stored_columns(
    here: dict[str, Any],
    fields: Mapping[str, CacheField],
    receipts: Mapping[tuple[str, int], Mapping[str, Any]],
    suite: SensorSuite,
) -> None:
    """Fill what the receipts know about one row: checksums, offsets, statistics, holes."""
    holes: list[str] = []
    facts: dict[str, Any] = {}
    position = here["position"]
    for name in sorted(fields):
        receipt = receipts[name, here["shard"]]
        crc = receipt["row_crc32c"][position]
        if fields[name].kind == "array":
            here[f"{name}.crc32c"] = None if crc is None else int(crc, 16)
        else:
            members = receipt["members"][position] or []
            here[f"{name}.part"] = [m[0] for m in members]
            here[f"{name}.offset"] = [m[1] for m in members]
            here[f"{name}.length"] = [m[2] for m in members]
            here[f"{name}.crc32c"] = [int(m[3], 16) for m in members]
        if any(h[0] == position for h in receipt["holes"]):
            holes.append(name)
        facts.update((receipt.get("summary") or {}).get(str(position), {}))
    points = facts.get("num_lidar_points")
    here["num_lidar_points"] = -1 if points is None else points
    total = facts.get("intensity_sum")
    here["intensity_mean"] = total / points if total is not None and points else float("nan")
    here["intensity_max"] = facts.get("intensity_max", -1)
    here["num_radar_points"] = facts.get("num_radar_points", [-1] * len(suite.radars))
    here["holes"] = holes
    here["status"] = "quarantined" if holes else "ok"


def flat(chunk: pa.ListArray) -> pa.Array:
    """Values of all lists, one after another. Here and below no ``pyarrow.compute``: importing it takes a loader worker as long
    as reading the index."""
    return chunk.values[chunk.offsets[0].as_py() : chunk.offsets[-1].as_py()]


def flat_numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of lists as one array of numbers."""
    parts = [flat(c).to_numpy(zero_copy_only=False) for c in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0)


def checksums(table: pa.Table, name: str) -> NDArray[np.int64]:
    """(N,) checksum of every row of an array field, -1 where the row is a hole."""
    crc: NDArray[Any] = table[f"{name}.crc32c"].to_numpy()
    if crc.dtype.kind == "f":  # with holes
        crc = np.where(np.isnan(crc), -1, crc)
    return crc.astype(np.int64)


def members(table: pa.Table, name: str) -> tuple[Any, ...]:
    """Members of a blob field, flat over all rows: (N + 1,) starts of the rows, part names, then of every member the code of
    its part, offset, length and checksum. table: read with ``coded_parts``."""
    counts, codes, place = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], dict[str, int]()
    for chunk in table[f"{name}.part"].chunks:  # each with a dictionary of its own
        parts = flat(chunk)
        code = [place.setdefault(part, len(place)) for part in parts.dictionary.to_pylist()]
        counts.append(np.diff(chunk.offsets.to_numpy()))
        codes.append(np.array(code, np.int64)[parts.indices.to_numpy(zero_copy_only=False)])
    numbers = [flat_numbers(table[f"{name}.{c}"]) for c in ("offset", "length", "crc32c")]
    return np.cumsum(np.concatenate(counts)), list(place), np.concatenate(codes), *numbers


def read_index(
    path: Path, columns: list[str] | None = None, without: tuple[str, ...] = (), *, coded_parts: bool = False
) -> pa.Table:
    """Read with page checksums checked; all columns, or ``columns``, or all but ``without``. coded_parts: names of blob parts
    as dictionaries, as ``members`` takes them. Raises CacheDamageError."""
    options: dict[str, Any] = {"page_checksum_verification": True, "memory_map": True}
    try:
        with pq.ParquetFile(path, **options) as file:
            if without:
                columns = [n for n in file.schema_arrow.names if n not in without]
            if not coded_parts:
                return file.read(columns=columns)
            paths = [file.schema.column(i).path for i in range(len(file.schema))]
            coded = [p for p in paths if ".part." in p]  # <field>.part.list.element
            with pq.ParquetFile(path, metadata=file.metadata, read_dictionary=coded, **options) as again:
                return again.read(columns=columns)
    except FileNotFoundError as error:
        raise CacheDamageError("index is missing", rule="index", file=str(path), next="imkd-data repair") from error
    except (OSError, pa.ArrowException, ValueError) as error:
        raise CacheDamageError(
            "index cannot be read", rule="index", file=str(path), found=str(error)[:200], next="imkd-data repair"
        ) from error
