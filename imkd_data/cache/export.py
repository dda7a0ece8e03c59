"""Plain exports of a cache: WebDataset tars with all fields of a sample together, and Parquet tables."""

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
from imkd_data.cache.commit import commit_bytes
from imkd_data.cache.store import Cache
from imkd_data.errors import UsageError

__all__ = ["export_parquet", "export_webdataset"]

Progress = Callable[[int, int, str], None]
Rows = Sequence[int] | NDArray[np.int64]


def _npy(array: NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def empty_folder(out: Path) -> None:
    """Make ``out``; UsageError where it holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the output folder is not empty", file=str(out), next="choose another --out; nothing was changed")
    out.mkdir(parents=True, exist_ok=True)


def export_webdataset(
    cache: Cache, out: Path, rows: Rows, *, fields: Sequence[str] | None = None, progress: Progress | None = None
) -> int:
    """One tar per shard, ``<split>-<shard>.tar``; per sample ``<token>.sample.json`` (index facts), ``<token>.<field>.npy`` for
    arrays as stored, and the parts of blobs as stored. Returns the number of tars."""
    empty_folder(out)
    names = list(cache.fields) if fields is None else list(fields)
    facts = [n for n in cache.index.column_names if "." not in n]
    by_shard: dict[int, list[int]] = {}
    for row in rows:
        by_shard.setdefault(int(row) // cache.recipe.rows_per_shard, []).append(int(row))
    for done, (number, inside) in enumerate(sorted(by_shard.items())):
        members: list[tuple[str, bytes]] = []
        for row in inside:
            token, line = cache.token(row), cache.line(row)
            entry = {n: cache.index[n][line].as_py() for n in facts}
            members.append((f"{token}.sample.json", json.dumps(_finite(entry), sort_keys=True).encode()))
            for name in names:
                if cache.fields[name].kind == "array":
                    members.append((f"{token}.{name}.npy", _npy(cache.read(name, row))))
                else:
                    members += [(f"{token}.{part}", data) for part, data in cache.read_parts(name, row).items()]
        data, _ = encode_tar(members)
        commit_bytes(out / f"{cache.shards[number].split}-{number:05d}.tar", data)
        if progress:
            progress(done + 1, len(by_shard), f"shard {number:05d}")
    (out / "NOTICE").write_bytes((cache.path / "NOTICE").read_bytes())
    return len(by_shard)


def _finite(value: Any) -> Any:
    """NaN has no JSON form: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def export_parquet(cache: Cache, out: Path, rows: Rows, *, progress: Progress | None = None) -> int:
    """``samples.parquet`` (the index without storage columns) and, where there are boxes, ``boxes.parquet``: one line per box
    in ``ego``, metres, radians; velocity NaN = unknown. Returns the number of samples."""
    empty_folder(out)
    lines = [cache.line(int(r)) for r in rows]
    plain = [n for n in cache.index.column_names if "." not in n]
    _write(cache.index.select(plain).take(pa.array(lines, pa.int64())), out / "samples.parquet")
    if "boxes" in cache.fields:
        columns: dict[str, list[Any]] = {}
        for i, row in enumerate(rows):
            for name, values in _box_columns(cache, int(row)).items():
                columns.setdefault(name, []).append(values)
            if progress:
                progress(i + 1, len(rows), "boxes")
        table = {n: np.concatenate(v) for n, v in columns.items()}
        _write(pa.table(table), out / "boxes.parquet")
    (out / "NOTICE").write_bytes((cache.path / "NOTICE").read_bytes())
    return len(lines)


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


def _write(table: pa.Table, path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    commit_bytes(path, sink.getvalue())
