"""Point files: the radar's PCD and the LiDAR's flat float32, bytes in, checked arrays out.

Facts these rules rest on: a radar file is a header, POINTS x point size bytes, then zero padding, so the size is only a lower
bound; its one-byte fields are signed; WIDTH 0 or a first point that is NaN marks an empty scan. A LiDAR file is float32 x 5
(x, y, z, intensity, ring), in whole columns of 32 points as far as seen.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import InputDataError
from imkd_data.kernels.scan import KINDS, pcd_columns, split_scan

__all__ = ["parse_lidar", "parse_radar"]

_MAX_HEADER_BYTES, _MAX_HEADER_LINES, _MAX_FIELDS = 4096, 64, 64
_KIND = {"F": "f", "I": "i", "U": "u"}
_MAX_ABS_M = 10_000.0  # a return farther than this is a broken float, not a point


def _bad(what: str, rule: str, where: dict[str, Any], **details: Any) -> InputDataError:
    return InputDataError(what, rule=rule, **details, **where)


def _header(data: bytes, where: dict[str, Any]) -> tuple[dict[str, list[str]], int]:
    """Words by key, and where the body starts."""
    words: dict[str, list[str]] = {}
    start = 0
    for _ in range(_MAX_HEADER_LINES):
        end = data.find(b"\n", start, _MAX_HEADER_BYTES)
        if end < 0:
            break
        line, start = data[start:end], end + 1
        try:
            key, *rest = line.decode("ascii").split() or ["#"]
        except UnicodeDecodeError:
            break
        if key.startswith("#"):
            continue
        words[key.upper()] = rest
        if key.upper() == "DATA":
            return words, start
    raise _bad(
        "not a PCD file",
        "radar.header",
        where,
        expected="a PCD header that ends with a DATA line",
        found=f"{len(data):,} bytes that begin with {data[:24]!r}",
    )


def _layout(words: dict[str, list[str]], where: dict[str, Any]) -> np.dtype[Any]:
    """The point's dtype from FIELDS, SIZE, TYPE, COUNT."""
    names = words.get("FIELDS", [])
    columns = [words.get(k, []) for k in ("SIZE", "TYPE")] + [words.get("COUNT", ["1"] * len(names))]
    try:
        spec: list[Any] = []
        for name, size, kind, count in zip(names, *columns, strict=True):
            dtype = np.dtype(f"<{_KIND[kind]}{int(size)}")
            if not 1 <= int(count) <= 1 << 16:
                raise ValueError
            spec.append((name, dtype) if int(count) == 1 else (name, dtype, (int(count),)))
        if not names or len(set(names)) != len(names) or len(names) > _MAX_FIELDS:
            raise ValueError
        return np.dtype(spec)
    except (ValueError, KeyError, TypeError) as error:
        raise _bad(
            "PCD header does not describe its points",
            "radar.header",
            where,
            expected="FIELDS, SIZE, TYPE (F, I, U) and COUNT of equal length",
            found="; ".join(f"{k} {' '.join(words.get(k, []))[:80]}" for k in ("FIELDS", "SIZE", "TYPE", "COUNT")),
        ) from error


def _number(words: dict[str, list[str]], key: str, default: str, where: dict[str, Any]) -> int:
    text = words.get(key, [default])
    if len(text) != 1 or not text[0].isascii() or not text[0].isdigit() or len(text[0]) > 12:
        raise _bad(
            f"PCD header has no usable {key}", "radar.header", where, expected="a whole number", found=" ".join(text)[:80]
        )
    return int(text[0])


@dataclass(frozen=True, slots=True)
class _Header:
    """What a radar header says: where the body starts, form and number of the points, and where the wanted columns stand in a
    point. ``kinds`` is None where a column has a type that only NumPy reads."""

    start: int
    dtype: np.dtype[Any]
    points: int
    offsets: NDArray[np.int64]
    kinds: NDArray[np.int64] | None


def _describe(data: bytes, columns: tuple[str, ...], where: dict[str, Any]) -> _Header:
    words, start = _header(data, where)
    encoding = " ".join(words.get("DATA", []))
    if encoding != "binary":
        raise _bad("PCD encoding not supported", "radar.encoding", where, expected="DATA binary", found=f"DATA {encoding[:40]}")
    dtype = _layout(words, where)
    missing = [c for c in columns if c not in (dtype.names or ())]
    if missing:
        raise _bad(
            "radar file lacks columns", "radar.columns", where, expected=" ".join(columns), found=f"no {', '.join(missing)}"
        )
    width = _number(words, "WIDTH", "0", where)
    height = _number(words, "HEIGHT", "1", where)
    points = _number(words, "POINTS", str(width * height), where)
    if width * height != points:
        raise _bad(
            "radar header contradicts itself",
            "radar.points",
            where,
            expected=f"POINTS {width * height} = WIDTH x HEIGHT",
            found=f"POINTS {points}",
        )
    known: Mapping[str, Any] = dtype.fields or {}
    parts = [known[c] for c in columns]
    codes = [p[0].base.str[1:] for p in parts]
    kinds = np.array([KINDS.index(c) for c in codes], dtype=np.int64) if set(codes) <= set(KINDS) else None
    return _Header(start, dtype, points, np.array([p[1] for p in parts], dtype=np.int64), kinds)


@functools.lru_cache(maxsize=1024)
def _described(head: bytes, columns: tuple[str, ...]) -> _Header:
    """A data set has about one header per number of points, so each is read once."""
    return _describe(head, columns, {})


def _whole_header(data: NDArray[np.uint8], columns: tuple[str, ...], where: dict[str, Any]) -> _Header:
    head = data[:_MAX_HEADER_BYTES].tobytes()
    at = head.find(b"\nDATA ")
    end = head.find(b"\n", at + 1) + 1
    try:
        if 0 < at < end:
            return _described(head[:end], columns)
    except InputDataError:
        pass  # what is wrong is said with the file's name
    return _describe(data.tobytes(), columns, where)


def parse_radar(
    data: bytes | NDArray[np.uint8],
    columns: tuple[str, ...],
    *,
    max_points: int,
    odd: Counter[str],
    dropped: Counter[str],
    **where: Any,
) -> NDArray[np.float32]:
    """PCD bytes -> (P, len(columns)) float32, read by name; rows with a non-finite value are dropped and counted.

    Raises InputDataError: no PCD, another encoding than binary, missing column, WIDTH x HEIGHT != POINTS, too few bytes.
    ``odd`` counts what is legal but strange; ``dropped`` counts left-out points. ``where``: file, token, scene, channel.
    """
    raw = _read_only(data)
    header = _whole_header(raw, columns, where)
    points, dtype = header.points, header.dtype
    need, have = points * dtype.itemsize, len(raw) - header.start
    if have < need:
        raise _bad(
            "radar file is shorter than its header says",
            "radar.size",
            where,
            expected=f"{points} points x {dtype.itemsize} = {need:,} bytes after the header",
            found=f"{have:,} bytes",
            next="re-extract the file, then run the same command",
        )
    body = raw[header.start : header.start + need]
    odd["radar.extra_columns"] += len(dtype.names or ()) > len(columns)
    odd["radar.padding_not_zero"] += bool(raw[header.start + need :].any())
    odd["radar.above_cap"] += points > max_points
    if points == 0:
        odd["radar.empty_scan"] += 1
        return np.zeros((0, len(columns)), dtype=np.float32)
    out = np.empty((points, len(columns)), dtype=np.float32)
    if header.kinds is None:
        table = body.view(dtype)
        out[:] = np.stack([table[c].reshape(points, -1)[:, 0].astype(np.float32) for c in columns], axis=1)
    elif not pcd_columns(body, dtype.itemsize, header.offsets, header.kinds, out):
        return out
    finite = np.isfinite(out).all(axis=1)
    if not finite[0]:  # the sensor's own mark of an empty scan
        odd["radar.empty_scan"] += 1
        return np.zeros((0, len(columns)), dtype=np.float32)
    dropped["non_finite"] += int(points - finite.sum())
    return np.ascontiguousarray(out[finite])


def _read_only(data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes, or a buffer that will be used again, as an array that nobody writes to."""
    raw: NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8)
    raw.flags.writeable = False
    return raw


def parse_lidar(
    data: bytes | NDArray[np.uint8],
    *,
    intensity_max: float,
    rings: int,
    odd: Counter[str],
    dropped: Counter[str],
    strict: bool = False,
    **where: Any,
) -> NDArray[np.float32]:
    """Flat float32 bytes -> (N, 5) x, y, z, intensity, ring, stored column by column; rows with a non-finite or absurd position
    are dropped and counted.

    Raises InputDataError: empty file, not whole points, more than 1 % broken rows, intensity or ring out of their range or
    not whole; with ``strict`` also a file that is not whole columns of ``rings`` points.
    """
    if len(data) == 0:
        raise _bad(
            "LiDAR file is empty", "lidar.empty", where, expected="size = k x 20 bytes, k > 0", found="0 bytes", next=_REEXTRACT
        )
    if len(data) % 20:
        raise _bad(
            "LiDAR file is not a whole number of points",
            "lidar.size",
            where,
            expected="size = k x 20 bytes",
            found=f"{len(data):,} bytes (remainder {len(data) % 20})",
            next=_REEXTRACT,
        )
    raw: NDArray[np.float32] = _read_only(data).view("<f4")
    scan = raw.reshape(-1, 5)
    if len(scan) % rings:
        if strict:
            raise _bad(
                f"LiDAR file is not whole columns of {rings} points",
                "lidar.columns",
                where,
                expected=f"a multiple of {rings} points",
                found=f"{len(scan):,} points (remainder {len(scan) % rings})",
                next=_REEXTRACT,
            )
        odd["lidar.columns"] += 1
    columns = np.empty((5, len(scan)), dtype=np.float32)
    strange, varied = split_scan(raw, columns, _MAX_ABS_M, intensity_max, rings - 1)
    if not strange and varied:  # nearly every file; the others take the checks that can say what is wrong
        return columns.T
    with np.errstate(invalid="ignore"):
        good = (np.abs(scan[:, :3]) < _MAX_ABS_M).all(axis=1) & np.isfinite(scan[:, 3]) & np.isfinite(scan[:, 4])
    broken = int(len(scan) - np.count_nonzero(good))
    if broken:
        if broken > 0.01 * len(scan):
            raise _bad(
                "LiDAR file holds broken numbers",
                "lidar.finite",
                where,
                expected="at most 1 % of points with NaN, inf or a position beyond 10 km",
                found=f"{broken:,} of {len(scan):,} points",
                next=_REEXTRACT,
            )
        dropped["non_finite"] += broken
        scan = scan[good]
    _check_whole(scan[:, 3], "intensity", intensity_max, where)
    _check_whole(scan[:, 4], "ring", rings - 1, where)
    odd["lidar.constant_intensity"] += len(scan) > 1 and bool((scan[:, 3] == scan[0, 3]).all())
    return np.array(scan, order="F")


_REEXTRACT = "re-extract the file, then run the same command; or add --on-error quarantine"


def _check_whole(values: NDArray[np.float32], name: str, high: float, where: dict[str, Any]) -> None:
    if len(values) == 0:
        return
    low, top = float(values.min()), float(values.max())
    if low < 0 or top > high or (values != np.floor(values)).any():
        raise _bad(
            f"LiDAR {name} is not what this sensor writes",
            f"lidar.{name}",
            where,
            expected=f"whole numbers 0..{high:g}",
            found=f"minimum {low:g}, maximum {top:g}, mean {float(values.mean()):g}, "
            f"{int((values != np.floor(values)).sum()):,} of {len(values):,} not whole",
            next="do not rescale the raw files: the reader expects them as published",
        )
