"""``imkd bench loader``: the stream beside other ways to read the same rows. Ratios within one run travel between machines,
absolute rates do not."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from imkd_data.errors import MissingFeatureError, UsageError
from imkd_data.geometry import BevGrid
from imkd_data.loader.augment import IDENTITY, ImageDraw, draw_images
from imkd_data.loader.batch import Batch
from imkd_data.loader.read import Packed, decode_image
from imkd_data.loader.stream import stream
from imkd_data.loader.work import Source

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from imkd_data.sample import Reader

__all__ = ["loader_table", "run_loader_bench"]

HW = (256, 704)


# A sample as rows, webdataset and litdata give it: "token", then by name the JPEGs (decoded or as bytes) and the arrays.
Sample = dict[str, Any]


def _rate(make: Callable[[], Iterator[Batch | Packed | Sample]], seconds: float) -> float:
    """Samples per second of CPU time of an iterator of batches or samples, started again when it ends; the first is not
    counted. CPU time, because all candidates run on one thread of this process and other work must not blur ratios."""
    done, it = 0, make()
    next(it)
    begun = time.process_time()
    while (spent := time.process_time() - begun) < seconds:
        got = next(it, None)
        if got is None:
            it = make()
        else:
            done += 1 if isinstance(got, dict) else len(got.tokens)
    return done / spent


def run_loader_bench(
    cache: Cache | Path | str,
    dataroot: Path | str | None = None,
    *,
    seconds: float = 5.0,
    batch_size: int = 2,
    history: Sequence[int] = (0,),
) -> dict[str, Any]:
    """Samples per second on one core of the stream and of other ways to read the same rows, and what follows for a GPU.

    dataroot: raw tree for the baseline that decodes whole JPEGs with PIL and projects LiDAR points on the fly, as public
    code bases do; once more with the ten-sweep intensity map that the stream delivers too. "worker's part" is the stream
    without what a GPU does itself (normalisation, depth maps); cores are counted from it. Candidates whose package is not
    installed are listed as absent. Raises MissingFeatureError where the cache lacks a field that all of them read, UsageError
    where there is no reader for the data set, SourceMissingError where its raw tree is not at ``dataroot``.
    """
    from imkd_data import open_cache

    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    _check(opened)
    raw = None if dataroot is None else _reader(opened, Path(dataroot))
    torch.set_num_threads(1)
    images = tuple(p for p in ("images", "depth", "radar_points", "boxes", "lidar_intensity"))
    rates: dict[str, float | None] = {}
    rates["stream"] = _rate(lambda: _stream(opened, batch_size, images, history, augment=False), seconds)
    rates["stream augmented"] = _rate(lambda: _stream(opened, batch_size, images, history, augment=True), seconds)
    rates["stream, worker's part"] = _rate(lambda: _workers_part(opened, batch_size, images, history), seconds)
    rates["rows, random order"] = _rate(lambda: _rows(opened, images=True), seconds)
    rates["rows, random order, without images"] = _rate(lambda: _rows(opened, images=False), seconds)
    rates["stream without images"] = _rate(lambda: _stream(opened, batch_size, images[1:], history, augment=False), seconds)
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "all.tar"
        _write_tar(opened, tar)
        if _installed("webdataset"):
            rates["webdataset sequential"] = _rate(lambda: _webdataset(tar, _draw(opened)), seconds)
            rates["webdataset sequential, without images"] = _rate(lambda: _webdataset(tar, None), seconds)
        if _installed("litdata"):
            _write_litdata(opened, Path(folder) / "litdata")
            rates["litdata, random order"] = _rate(lambda: _litdata(Path(folder) / "litdata", _draw(opened)), seconds)
            rates["litdata, random order, without images"] = _rate(lambda: _litdata(Path(folder) / "litdata", None), seconds)
    if raw is not None:
        for name, maps in (("decode and project on the fly", False), ("on the fly with intensity map", True)):
            rates[name] = _rate(lambda maps=maps: _on_the_fly(opened, raw, len(history), maps), seconds)  # type: ignore[misc]
    for package in ("webdataset", "litdata"):
        notes[package] = _installed(package) or "not installed"
    ratios = _ratios(rates)
    part = rates["stream, worker's part"] or 0.0
    jpegs = len([s for s in opened.recipe.sensors if s in opened.suite.cameras]) * len(history)
    return {
        "v": 1,
        "rows": len(opened.rows()),
        "images_per_sample": jpegs,
        "batch_size": batch_size,
        "history": list(history),
        "cores": 1,
        "samples_per_s": rates,
        "ratios": ratios,
        "others": notes,
        # data-wait under 2 %: loaders must deliver what the device takes, and two per cent more
        "cores_for": {f"{rate} samples/s": round(1.02 * rate / part, 1) if part else None for rate in (10, 50, 100)},
        "samples_per_s_of_8_cores": 8 * part / 1.02,
        "software": {n: _installed(n) or "none" for n in ("torch", "numpy", "simplejpeg", "pillow", "webdataset")},
        "machine": {"cpus": os.cpu_count()},
    }


def _ratios(rates: Mapping[str, float | None]) -> dict[str, float]:
    pairs = {
        "stream / on the fly": ("stream", "decode and project on the fly"),
        "stream / on the fly with intensity map": ("stream", "on the fly with intensity map"),
        "rows / webdataset": ("rows, random order", "webdataset sequential"),
        "rows / webdataset, without images": ("rows, random order, without images", "webdataset sequential, without images"),
        "rows / litdata": ("rows, random order", "litdata, random order"),
        "rows / litdata, without images": ("rows, random order, without images", "litdata, random order, without images"),
    }
    out = {}
    for name, (a, b) in pairs.items():
        x, y = rates.get(a), rates.get(b)
        if x and y:
            out[name] = x / y
    return out


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check(cache: Cache) -> None:
    missing = [n for n in ("images", "radar_points", *_TAR_FIELDS) if n not in cache.fields]
    if missing:
        raise MissingFeatureError(
            f"the cache has no {', '.join(missing)}",
            next=f"imkd-data build --out {cache.path} --fields {','.join(missing)} --update (with the --dataroot of the build)",
        )


def _reader(cache: Cache, dataroot: Path) -> Reader:
    from imkd_data.readers import READERS

    recipe = cache.recipe
    if recipe.dataset not in READERS:
        raise UsageError(
            "there is no reader for this cache's raw data",
            expected=", ".join(READERS),
            found=recipe.dataset,
            next="no --dataroot",
        )
    return READERS[recipe.dataset](dataroot, recipe.version, sensors=recipe.sensors, reference_channel=recipe.reference_channel)


def _stream(cache: Cache, size: int, parts: Sequence[str], history: Sequence[int], *, augment: bool) -> Iterator[Batch]:
    size = min(size, len(cache.rows()))
    made = stream(
        cache, size, split="all", fields=parts, history=history, augment=augment, image_hw_px=HW, grid=cache.recipe.view_grid
    )
    return iter(made)


def _workers_part(cache: Cache, size: int, parts: Sequence[str], history: Sequence[int]) -> Iterator[Packed]:
    """What a loader process does for a training batch (augmented): packed bytes, nothing normalised."""
    made = stream(cache, min(size, len(cache.rows())), split="all", fields=parts, history=history, augment=True, image_hw_px=HW)
    source = Source(made.reader, made.order, made.batch_size)
    return (source.packed((0, step * made.batch_size)) for step in range(len(made)))


_TAR_FIELDS = ("lidar_intensity", "depth_points", "depth_count", "boxes", "camera_calibration")


def _write_tar(cache: Cache, path: Path) -> None:
    """The same rows as one plain WebDataset tar: JPEGs and .npy members, in row order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:

        def put(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for row in cache.rows().tolist():
            token = cache.token(row)
            for name, data in cache.read("images", row).items():
                put(f"{token}.{name.lower()}.jpg", data)
            for field in (*_TAR_FIELDS, "radar_points"):
                buffer = io.BytesIO()
                np.save(buffer, cache.read(field, row), allow_pickle=False)
                put(f"{token}.{field}.npy", buffer.getvalue())


def _draw(cache: Cache) -> ImageDraw:
    full = cache.suite.image_hw_px
    return draw_images(IDENTITY, full_hw_px=full, image_hw_px=HW, cameras=1, seed=0, epoch=0, position=0)[0]


def _rows(cache: Cache, *, images: bool) -> Iterator[Sample]:
    """The same fields as in the tar, in random order, every byte checked; JPEGs decoded by the stream's decoder."""
    draw, rows = _draw(cache), cache.rows()
    for row in np.random.default_rng(0).permutation(rows).tolist():
        sample: Sample = {"token": cache.token(row)}
        for name, data in cache.read("images", row).items():
            sample[f"{name.lower()}.jpg"] = decode_image(data, draw) if images else data
        for field in (*_TAR_FIELDS, "radar_points"):
            sample[f"{field}.npy"] = cache.read(field, row)
        yield sample


def _decoded(members: Mapping[str, Any], token: str, draw: ImageDraw | None) -> Sample:
    """JPEGs by the stream's decoder where ``draw`` is given, arrays by NumPy."""
    sample: Sample = {"token": token}
    for key, value in members.items():
        if key.endswith(".jpg"):
            sample[key] = value if draw is None else decode_image(value, draw)
        elif key.endswith(".npy"):
            sample[key] = np.load(io.BytesIO(value), allow_pickle=False)
    return sample


def _webdataset(tar: Path, draw: ImageDraw | None) -> Iterator[Sample]:
    import webdataset

    # our own decoders and a plain file: nothing in the tar is executed
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        yield _decoded(sample, sample["__key__"], draw)


def _write_litdata(cache: Cache, folder: Path) -> None:
    """The same members in litdata's chunks, as bytes."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, row in enumerate(cache.rows().tolist()):
        sample: Sample = {f"{n.lower()}.jpg": bytes(data) for n, data in cache.read("images", row).items()}
        sample["token"] = cache.token(row)
        for field in (*_TAR_FIELDS, "radar_points"):
            buffer = io.BytesIO()
            np.save(buffer, cache.read(field, row), allow_pickle=False)
            sample[f"{field}.npy"] = buffer.getvalue()
        writer[number] = sample
    writer.done()
    writer.merge(1)


def _litdata(folder: Path, draw: ImageDraw | None) -> Iterator[Sample]:
    from litdata import StreamingDataset

    for sample in StreamingDataset(str(folder), shuffle=True):
        yield _decoded(sample, sample["token"], draw)


def _on_the_fly(cache: Cache, reader: Reader, keyframes: int, intensity_map: bool) -> Iterator[Sample]:
    """Own code, the usual way: whole JPEGs by PIL, resize, crop, normalise; LiDAR file to six cameras with NumPy; radar;
    with ``intensity_map`` also all sweeps into a map of sum, count and maximum."""
    from PIL import Image

    needs = frozenset(("images", "lidar" if intensity_map else "lidar_key", "radar"))
    grid = cache.recipe.view_grid
    for scene in dict.fromkeys(cache.index["scene"].to_pylist()):
        for sample in reader.samples(scene):
            payload = reader.read(sample, needs)
            for data in (payload.images or {}).values():
                for _ in range(keyframes):
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    scale = HW[1] / image.width
                    image = image.resize((HW[1], max(HW[0], round(image.height * scale))), Image.Resampling.BICUBIC)
                    pixels = np.asarray(image.crop((0, image.height - HW[0], *image.size)), dtype=np.float32)
                    (pixels - np.float32(120)) / np.float32(58)
            scans = payload.lidar or ()
            points = scans[0]
            if intensity_map:
                moved = [f.ego_from_sensor.points(p.xyz_m) for f, p in zip(sample.lidar, scans, strict=True)]
                _pillars(np.concatenate(moved), np.concatenate([p.column("intensity") for p in scans]), grid)
            for frame in sample.cameras:
                pose = frame.camera.ego_from_camera.inverse() @ sample.lidar[0].ego_from_sensor
                uv, depth = frame.camera.project(pose.points(points.xyz_m))
                width, height = frame.camera.width_px, frame.camera.height_px
                keep = (depth > 0) & (uv[:, 0] > 0) & (uv[:, 0] < width) & (uv[:, 1] > 0) & (uv[:, 1] < height)
                canvas = np.zeros(HW, dtype=np.float32)
                scale = HW[1] / width
                u, v = (uv[keep] * scale - (0, height * scale - HW[0])).T.astype(np.int64)
                inside = (u >= 0) & (u < HW[1]) & (v >= 0) & (v < HW[0])
                canvas[v[inside], u[inside]] = depth[keep][inside]
            for channel, returns in (payload.radar or {}).items():
                for sweep, scan in zip(sample.radar[channel], returns, strict=True):
                    sweep.ego_from_sensor.points(scan.xyz_m)
            yield {"token": sample.token}


def _pillars(xyz_m: NDArray[np.float64], intensity: NDArray[Any], grid: BevGrid) -> None:
    """Sum, count and maximum of the intensity in each cell."""
    column = np.floor((xyz_m[:, 0] - grid.x_min_m) / grid.cell_m).astype(np.int64)
    row = np.floor((xyz_m[:, 1] - grid.y_min_m) / grid.cell_m).astype(np.int64)
    inside = (column >= 0) & (column < grid.nx) & (row >= 0) & (row < grid.ny)
    flat, values = (row * grid.nx + column)[inside], np.asarray(intensity, dtype=np.float32)[inside]
    np.bincount(flat, weights=values, minlength=grid.nx * grid.ny)
    np.bincount(flat, minlength=grid.nx * grid.ny)
    np.maximum.at(np.zeros(grid.nx * grid.ny, dtype=np.float32), flat, values)


def loader_table(facts: Mapping[str, Any]) -> str:
    """The loader bench for people."""
    lines = [f"{'samples/s on one core':<42}"]
    lines += [f"  {name:<40}{rate:10.1f}" for name, rate in facts["samples_per_s"].items() if rate is not None]
    lines += [f"{name:<42}{value:9.2f}x" for name, value in facts["ratios"].items()]
    lines += [f"{name:<38}{note:>14}" for name, note in facts["others"].items()]
    lines += [f"{'8 cores feed, samples/s':<42}{facts['samples_per_s_of_8_cores']:9.1f}"]
    lines += [f"cores for {name:<32}{value:10.1f}" for name, value in facts["cores_for"].items() if value is not None]
    return "\n".join(lines)
