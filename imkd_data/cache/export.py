"""Plain exports of a cache: WebDataset tars with all fields of a sample together, and Parquet tables. Resumable, verified."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from imkd_data.cache.codecs import encode_tar
from imkd_data.cache.export_folder import ExportFolder
from imkd_data.cache.manifest import suite_json
from imkd_data.cache.store import Cache
from imkd_data.errors import UsageError
from imkd_data.recipe import canonical_json

__all__ = ["export_parquet", "export_webdataset"]

Progress = Callable[[int, int, str], None]
Rows = Sequence[int] | NDArray[np.int64]


def _npy(array: NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def export_webdataset(
    cache: Cache,
    out: Path,
    rows: Rows,
    *,
    fields: Sequence[str] | None = None,
    dataroot: Path | None = None,
    as_released: bool = False,
    progress: Progress | None = None,
) -> int:
    """One tar per shard, ``<split>-<shard>.tar``; per sample ``<token>.sample.json`` (index facts), ``<token>.<field>.npy`` for
    arrays as stored, and the parts of blobs as stored. ``fields.json`` says what the codes mean (shape, dtype, scale, offset,
    columns, frame) and which sensors there are, so nothing of ours is needed to use them. ``dataroot`` is not needed.

    Returns the number of files. Raises UsageError (a folder in use, ``as_released``), LockedError, StorageError.
    """
    _no_defects("webdataset", as_released)
    names = list(cache.fields) if fields is None else list(fields)
    by_shard: dict[int, list[int]] = {}
    for row in rows:
        by_shard.setdefault(int(row) // cache.recipe.rows_per_shard, []).append(int(row))
    with _folder(cache, out, "webdataset", rows, fields=names) as folder:
        folder.put("fields.json", {"fields.json": canonical_json(_finite(_meaning(cache, names)))})
        for done, (number, inside) in enumerate(sorted(by_shard.items())):
            name = f"{cache.shards[number].split}-{number:05d}.tar"
            if name not in folder.done:
                folder.put(name, {name: encode_tar(_members(cache, inside, names))[0]})
            if progress:
                progress(done + 1, len(by_shard), f"shard {number:05d}")
        return folder.finish({"samples": len(rows)})


def _no_defects(kind: str, as_released: bool) -> None:
    if as_released:
        raise UsageError(
            f"--as-released has no meaning for --to {kind}",
            rule="export.released",
            expected="crn, bevdepth, bevfusion, mmdet3d: forms of other programs, with known defects",
        )


def _folder(cache: Cache, out: Path, kind: str, rows: Rows, **more: Any) -> ExportFolder:
    tokens = [cache.token(int(r)) for r in rows]
    identity = {"kind": kind, "level": "stored", "cache": cache.id, "tokens": tokens, **more}
    return ExportFolder(Path(out), identity, (cache.path / "NOTICE").read_bytes())


def _meaning(cache: Cache, names: Sequence[str]) -> dict[str, Any]:
    """What a reader without this program must know: the sensors, and of every field what is stored."""
    fields: dict[str, Any] = {}
    for name in names:
        one = cache.fields[name]
        entry: dict[str, Any] = {"kind": one.kind, "attributes": cache.attributes(name)}
        if one.kind == "array" and one.shape is not None:
            entry |= {"dtype": str(one.dtype), "shape": list(one.shape(cache.recipe, cache.suite))}
        fields[name] = entry
    return {"fields": fields, "sensors": suite_json(cache.suite), "recipe": cache.recipe.as_dict(), "cache": cache.id}


def _members(cache: Cache, rows: Sequence[int], names: Sequence[str]) -> list[tuple[str, bytes]]:
    facts = [n for n in cache.index.column_names if "." not in n]
    members: list[tuple[str, bytes]] = []
    for row in rows:
        token, line = cache.token(row), cache.line(row)
        entry = {n: cache.index[n][line].as_py() for n in facts}
        entry["box_tokens"], entry["instance_tokens"] = cache.annotation_tokens(row)
        members.append((f"{token}.sample.json", json.dumps(_finite(entry), sort_keys=True).encode()))
        for name in names:
            if cache.fields[name].kind == "array":
                members.append((f"{token}.{name}.npy", _npy(cache.read(name, row))))
            else:
                members += [(f"{token}.{part}", data) for part, data in cache.read_parts(name, row).items()]
    return members


def _finite(value: Any) -> Any:
    """NaN has no JSON form: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def export_parquet(
    cache: Cache,
    out: Path,
    rows: Rows,
    *,
    dataroot: Path | None = None,
    as_released: bool = False,
    progress: Progress | None = None,
) -> int:
    """``samples.parquet`` (the index without storage columns) and, where there are boxes, ``boxes.parquet``: one line per box
    in ``ego``, metres, radians; velocity NaN = unknown. ``dataroot`` is not needed. Returns the number of files.

    Raises UsageError (a folder in use, ``as_released``), LockedError, StorageError.
    """
    _no_defects("parquet", as_released)
    lines = [cache.line(int(r)) for r in rows]
    with _folder(cache, out, "parquet", rows) as folder:
        if "samples" not in folder.done:
            plain = [n for n in cache.index.column_names if "." not in n]
            samples = cache.index.select(plain).take(pa.array(lines, pa.int64()))
            folder.put("samples", {"samples.parquet": _parquet(samples)})
        if "boxes" in cache.fields and "boxes" not in folder.done:
            columns: dict[str, list[Any]] = {}
            for i, row in enumerate(rows):
                for name, values in _box_columns(cache, int(row)).items():
                    columns.setdefault(name, []).append(values)
                if progress:
                    progress(i + 1, len(rows), "boxes")
            table = pa.table({n: np.concatenate(v) for n, v in columns.items()})
            folder.put("boxes", {"boxes.parquet": _parquet(table)})
        return folder.finish({"samples": len(lines)})


def _box_columns(cache: Cache, row: int) -> dict[str, NDArray[Any]]:
    boxes = cache.decode("boxes", row)
    n = len(boxes)
    out: dict[str, NDArray[Any]] = {"row": np.full(n, row), "token": np.full(n, cache.token(row), dtype=object)}
    annotation, instance = cache.annotation_tokens(row)
    out["annotation"], out["instance"] = np.array(annotation, dtype=object), np.array(instance, dtype=object)
    for table, names in (
        (boxes.centre_m, ("x_m", "y_m", "z_m")),
        (boxes.size_lwh_m, ("length_m", "width_m", "height_m")),
        (boxes.velocity_mps, ("vx_mps", "vy_mps")),
    ):
        out.update({name: np.asarray(table)[:, i] for i, name in enumerate(names)})
    for name in ("yaw_rad", "label", "num_lidar", "num_radar", "attribute", "visibility"):
        out[name] = np.asarray(getattr(boxes, name))
    return out


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
