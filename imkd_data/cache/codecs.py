"""Bytes of rows and shards: Zarr v3 sharding and USTAR, written and parsed here; zarr and webdataset are test oracles."""

from __future__ import annotations

import io
import math
import os
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from imkd_data.errors import CacheDamageError, InputDataError
from imkd_data.fields.codec import zstd_size

__all__ = [
    "MEMBER_NAME",
    "array_metadata",
    "blob_value",
    "decode_row",
    "encode_row",
    "encode_shard",
    "encode_tar",
    "parse_index",
    "zstd_size",
]

# c-blosc with several threads stores blocks in the order in which they finish: bytes would depend on the machine.
blosc.use_threads = False


def _own_lock() -> None:
    """A lock of this process for the codec. Its own one is a named semaphore, which a killed worker would leave in /dev/shm."""
    if hasattr(blosc, "_MUTEX") and hasattr(blosc, "_MUTEX_IS_INIT"):
        blosc._MUTEX, blosc._MUTEX_IS_INIT = threading.Lock(), True


_own_lock()
os.register_at_fork(after_in_child=_own_lock)  # the copy of a lock that another thread holds would never open

MISSING = 0xFFFF_FFFF_FFFF_FFFF
CRC_RESIDUE = 0x48674BC7  # crc32c over (data + its own little-endian crc32c) is this constant
MEMBER_NAME = re.compile(r"^[0-9a-z_-]+\.[a-z0-9_]+(\.[a-z0-9]+)+$")
_LEVEL = {"zstd1": 1}


def zarr_codecs(codec: str, itemsize: int) -> list[dict[str, Any]]:
    """Inner codecs as Zarr metadata: bytes, compressor, crc32c last."""
    out: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if codec == "zstd1":
        out.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    elif codec == "blosc3":
        settings = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": itemsize, "blocksize": 0}
        out.append({"name": "blosc", "configuration": settings})
    return [*out, {"name": "crc32c"}]


def array_metadata(
    dtype: np.dtype[Any], row_shape: tuple[int, ...], shards: int, rows_per_shard: int, codec: str, attributes: dict[str, Any]
) -> dict[str, Any]:
    """``zarr.json`` of one array: one Zarr shard = one cache shard, one inner chunk = one row."""
    index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [1, *row_shape],
        "codecs": zarr_codecs(codec, dtype.itemsize),
        "index_codecs": index_codecs,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [shards * rows_per_shard, *row_shape],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows_per_shard, *row_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if dtype.kind == "b" else 0.0 if dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": attributes,
    }


def encode_row(array: NDArray[Any], codec: str) -> bytes:
    """One inner chunk: little-endian bytes, compressed, crc32c appended."""
    data = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    if codec == "zstd1":
        body = zstd.compress(data, 1)
    elif codec == "blosc3":
        body = blosc.compress(data, b"zstd", 3, blosc.SHUFFLE, 0, data.dtype.itemsize)
    else:
        body = data.tobytes()
    data_bytes = bytes(body)
    crc: int = google_crc32c.value(data_bytes)
    return data_bytes + crc.to_bytes(4, "little")


def decode_row(chunk: bytes, codec: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Inverse of encode_row; the crc must have been checked. The array is read-only. ValueError where the bytes promise
    another size than the array has, before anything of that size is made."""
    body = memoryview(chunk)[:-4]
    size = math.prod(shape) * dtype.itemsize
    if codec == "zstd1":
        promised = zstd_size(body)
    elif codec == "blosc3":
        promised = int.from_bytes(body[4:8], "little")
    else:
        promised = len(body)
    if promised != size:
        raise ValueError(f"{promised} bytes for an array of {size}")
    raw = zstd.decompress(body) if codec == "zstd1" else blosc.decompress(body) if codec == "blosc3" else body
    return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape)


def encode_shard(chunks: Sequence[bytes | None], rows_per_shard: int) -> bytes:
    """A Zarr v3 shard: inner chunks in row order, then the index (offset, size per row; all ones = absent) and its crc."""
    index = np.full((rows_per_shard, 2), MISSING, "<u8")
    at = 0
    for i, chunk in enumerate(chunks):
        if chunk is not None:
            index[i] = at, len(chunk)
            at += len(chunk)
    table = index.tobytes()
    return b"".join([*(c for c in chunks if c is not None), table, google_crc32c.value(table).to_bytes(4, "little")])


def parse_index(tail: bytes, rows_per_shard: int, file_size: int) -> NDArray[np.uint64]:
    """The index (R, 2) from the last R·16 + 4 bytes of a shard. Raises CacheDamageError (without the file's name)."""
    if len(tail) != rows_per_shard * 16 + 4 or google_crc32c.value(tail) != CRC_RESIDUE:
        raise CacheDamageError("shard index is damaged", rule="shard.index", next="imkd-data repair")
    index = np.frombuffer(tail[:-4], "<u8").reshape(rows_per_shard, 2)
    there = index[:, 0] != MISSING
    ends = index[there].sum(1)
    if there.any() and int(ends.max()) > file_size - len(tail):
        raise CacheDamageError("shard index points outside the file", rule="shard.index", next="imkd-data repair")
    return index


def encode_tar(members: Iterable[tuple[str, bytes]]) -> tuple[bytes, list[tuple[str, int, int, int]]]:
    """A USTAR file with fixed owner, mode and time -> its bytes and (name, payload offset, length, crc32c) per member."""
    parts: list[bytes] = []
    table: list[tuple[str, int, int, int]] = []
    at = 0
    for name, data in members:
        if not MEMBER_NAME.match(name) or len(name) > 100:
            raise InputDataError(
                "a blob part has a name that the cache cannot store", rule="tar.name", expected=MEMBER_NAME.pattern, found=name
            )
        parts += [_tar_header(name, len(data)), data, bytes(-len(data) % 512)]
        table.append((name, at + 512, len(data), google_crc32c.value(data)))
        at += 512 + len(data) + (-len(data) % 512)
    return b"".join([*parts, bytes(1024)]), table


def _tar_header(name: str, size: int) -> bytes:
    head = bytearray(512)

    def put(at: int, text: str) -> None:
        head[at : at + len(text)] = text.encode("ascii")

    put(0, name)
    put(100, "0000644\0")
    put(108, "0000000\0")
    put(116, "0000000\0")
    put(124, f"{size:011o}\0")
    put(136, "00000000000\0")
    put(148, " " * 8)
    put(156, "0")
    put(257, "ustar\0")
    put(263, "00")
    put(148, f"{sum(head):06o}\0 ")
    return bytes(head)


def blob_value(part: str, data: bytes, max_bytes: int = 1 << 30) -> Any:
    """A blob part as stored: arrays for .npy and .npy.zst, else the bytes. Never unpickles."""
    if part.endswith(".npy.zst"):
        if zstd_size(data) > max_bytes:
            raise CacheDamageError(
                "a blob part unpacks to more than the limit", rule="blob.size", found=f"{zstd_size(data):,} bytes"
            )
        data = zstd.decompress(data)
    elif not part.endswith(".npy"):
        return data
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
