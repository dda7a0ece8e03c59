"""Reading rates on this machine, one library after the other over the same rows in the same random order.

A rate is rows per second of one thread unless ``workers`` says otherwise, file cache warm; every measurement first reads some
rows untimed. Each entry says what limits it, from the parts timed on their own: the copy from the file cache, the checksum, the
decompression.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from imkd_data.cache.codecs import decode_row
from imkd_data.cache.store import Cache, open_cache
from imkd_data.errors import UsageError

__all__ = ["AGAINST", "Measured", "measure"]

AGAINST = ("zarr", "webdataset", "mosaicml", "litdata")
SAMPLE = ("lidar_intensity", "depth_points", "depth_count", "radar_points", "boxes", "camera_calibration")


@dataclass(frozen=True, slots=True)
class Measured:
    """One line and its values."""

    text: str
    values: dict[str, Any]


def _rate(work: Callable[[int], Any], rows: Sequence[int], seconds: float, workers: int = 1) -> float:
    """Calls per second over random rows, for about ``seconds``."""
    order = np.random.default_rng(0).permutation(np.asarray(rows))
    for row in order[: min(8, len(order))]:
        work(int(row))
    done, started = 0, time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        while (spent := time.perf_counter() - started) < seconds:
            if workers == 1:
                for row in order[:64]:
                    work(int(row))
            else:
                list(pool.map(work, order[:64].tolist()))
            done += len(order[:64])
            order = np.roll(order, -64)
    return done / spent


def _both(
    theirs: Callable[[int], Any],
    ours: Callable[[int], Any],
    rows: Sequence[int],
    seconds: float,
    their_rows: Sequence[int] = (),
) -> tuple[float, float, float]:
    """Calls per second of both, and how many times as quick ours is: medians over eight short turns each, taken in alternation,
    so that other work on the machine meets both."""
    turns = []
    for _ in range(8):
        turns.append((_rate(theirs, their_rows or rows, seconds / 8), _rate(ours, rows, seconds / 8)))
    rates = np.array(turns)
    return float(np.median(rates[:, 0])), float(np.median(rates[:, 1])), float(np.median(rates[:, 1] / rates[:, 0]))


def _entry(name: str, rate: float, note: str = "", **values: Any) -> Measured:
    text = f"{name:<44} {rate:10,.0f} /s   {1000 / rate:8.3f} ms" + (f"   {note}" if note else "")
    return Measured(text, {"name": name, "per_second": round(rate, 2), "ms": round(1000 / rate, 4), **values})


def measure(path: Path, against: Sequence[str], seconds: float = 2.0, workers: int = 1) -> Iterator[Measured]:
    """All measurements. Libraries that are not installed are named and left out. Raises UsageError for an unknown name."""
    unknown = sorted(set(against) - set(AGAINST))
    if unknown:
        raise UsageError("unknown library", found=", ".join(unknown), expected=", ".join(AGAINST))
    cache = open_cache(path)
    rows = cache.rows().tolist()
    if not rows:
        raise UsageError("the cache has no rows to read")
    yield from _ours(cache, rows, seconds, workers)
    for name in against:
        yield from {"zarr": _zarr, "webdataset": _webdataset, "mosaicml": _mosaicml, "litdata": _litdata}[name](
            cache, rows, seconds
        )


def _arrays(cache: Cache) -> list[str]:
    return [n for n, f in cache.fields.items() if f.kind == "array"]


def _near_25_kb(cache: Cache) -> str:
    """The array field whose stored row is nearest to 25 KB."""
    stored = {n: sum(s[0] for s in cache.manifest["fields"][n]["shards"]) / len(cache) for n in _arrays(cache)}
    return min(stored, key=lambda n: abs(stored[n] - 25_000))


def _ours(cache: Cache, rows: Sequence[int], seconds: float, workers: int) -> Iterator[Measured]:
    for name in cache.fields:
        stored = sum(s[0] for s in cache.manifest["fields"][name]["shards"]) / len(cache)
        reads = _rate(lambda r, n=name: cache.read(n, r), rows, seconds / 4, workers)  # type: ignore[misc]
        note = f"{stored / 1000:.1f} KB stored" + (f"; {_limit(cache, name, rows)}" if name in _arrays(cache) else "")
        yield _entry(f"imkd read {name}", reads, note, stored_bytes=round(stored))
    names = [n for n in SAMPLE if n in cache.fields]
    if names:
        whole = _rate(lambda r: [cache.decode(n, r) for n in names], rows, seconds, workers)
        yield _entry("imkd decode a sample, no images, no LiDAR", whole, " + ".join(names), fields=names)


def _limit(cache: Cache, name: str, rows: Sequence[int]) -> str:
    """Share of file copy, checksum and decompression in one read."""
    number, position = divmod(int(rows[0]), cache.recipe.rows_per_shard)
    file = cache._file(name, number)
    at, size = file.span(position)
    codec, dtype, shape = cache._array[name]
    chunk = file.read(size, at)
    parts = {
        "copy": lambda: file.read(size, at),
        "crc": lambda: google_crc32c.value(chunk),
        "decode": lambda: decode_row(chunk, codec, dtype, shape),
    }
    times = {}
    for part, work in parts.items():
        started = time.perf_counter()
        for _ in range(50):
            work()
        times[part] = (time.perf_counter() - started) / 50
    return ", ".join(f"{p} {1e6 * t:.0f} us" for p, t in times.items())


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _absent(name: str, package: str) -> Measured:
    return Measured(f"{name}: not installed (pip install {package})", {"name": name, "skipped": f"{package} is not installed"})


def _zarr(cache: Cache, rows: Sequence[int], seconds: float) -> Iterator[Measured]:
    import zarr

    group = zarr.open_group(str(cache.path / "arrays.zarr"), mode="r")
    name = _near_25_kb(cache)
    array: Any = group[name]
    theirs, ours, ratio = _both(lambda r: array[r], lambda r: cache.read(name, r), rows, seconds)
    yield _compared(f"zarr read {name}", f"zarr {zarr.__version__}; imkd", theirs, ours, ratio, version=zarr.__version__)


def _compared(name: str, note: str, theirs: float, ours: float, ratio: float, **values: Any) -> Measured:
    note = f"{note} {ours:,.0f} /s = {ratio:.2f} x"
    return _entry(name, theirs, note, ours=round(ours, 1), ratio=round(ratio, 2), **values)


def _webdataset(cache: Cache, rows: Sequence[int], seconds: float) -> Iterator[Measured]:
    import os

    os.environ["WDS_SECURE"] = "1"
    try:
        import webdataset
    except ImportError:
        yield _absent("webdataset", "webdataset")
        return
    for name in (n for n in ("radar_points", "images", "lidar_points") if n in cache.fields):
        tars = [str(cache.path / "blobs" / name / f"{s.number:05d}.tar") for s in cache.shards]
        turns = []
        for _ in range(4):
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds / 4:
                for _ in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
                    count += 1
            there = count / (time.perf_counter() - started)
            turns.append((there, _rate(lambda r, n=name: cache.read_parts(n, r), rows, seconds / 4)))  # type: ignore[misc]
        rates = np.array(turns)
        theirs, ours, ratio = (float(v) for v in np.median(np.c_[rates, rates[:, 1] / rates[:, 0]], axis=0))
        note = f"webdataset {webdataset.__version__}; imkd random with crc"
        yield _compared(f"webdataset sequential {name}", note, theirs, ours, ratio)


def _plain_arrays(cache: Cache, rows: Sequence[int]) -> tuple[str, list[Any]]:
    """384 KB arrays for libraries with a format of their own: up to 256 rows of the field nearest to that size in memory."""

    def size(name: str) -> int:
        _, dtype, shape = cache._array[name]
        return int(np.prod(shape)) * dtype.itemsize

    name = min(_arrays(cache), key=lambda n: abs(size(n) - 384_000))
    return name, [np.ascontiguousarray(cache.read(name, int(r))) for r in rows[:256]]


def _mosaicml(cache: Cache, rows: Sequence[int], seconds: float) -> Iterator[Measured]:
    if not _installed("mosaicml-streaming"):
        yield _absent("mosaicml", "mosaicml-streaming")
        return
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]

    name, arrays = _plain_arrays(cache, rows)
    with tempfile.TemporaryDirectory() as folder:
        with MDSWriter(out=folder, columns={"x": "ndarray"}, compression="zstd:1", hashes=["xxh64"]) as out:
            for array in arrays:
                out.write({"x": array})
        data = StreamingDataset(local=folder, batch_size=1, shuffle=False)
        yield _against("mosaicml-streaming", name, lambda r: data[r]["x"], cache, rows[: len(arrays)], seconds)


def _litdata(cache: Cache, rows: Sequence[int], seconds: float) -> Iterator[Measured]:
    if not _installed("litdata"):
        yield _absent("litdata", "litdata")
        return
    from litdata import StreamingDataset, optimize  # type: ignore[import-not-found]

    name, arrays = _plain_arrays(cache, rows)
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "d")
        with contextlib.redirect_stdout(sys.stderr):  # it talks; ours may be JSON
            inputs = list(range(len(arrays)))
            optimize(fn=partial(_nth, arrays), inputs=inputs, output_dir=target, chunk_bytes="64MB", num_workers=1)
        data = StreamingDataset(target)
        yield _against("litdata", name, lambda r: data[r]["x"], cache, rows[: len(arrays)], seconds)


def _nth(arrays: Sequence[Any], i: int) -> dict[str, Any]:
    """Row ``i`` for another library's writer; its processes need a function with a name."""
    return {"x": arrays[i]}


def _against(
    package: str, name: str, theirs: Callable[[int], Any], cache: Cache, rows: Sequence[int], seconds: float
) -> Measured:
    """Their number of a row is its place in ``rows``."""
    there, ours, ratio = _both(theirs, lambda r: cache.read(name, r), rows, seconds, range(len(rows)))
    note = f"random order, {package} {_installed(package)}; imkd"
    return _compared(f"{package} read {name}", note, there, ours, ratio)
