"""``imkd bench``: what loading and training cost here. Ratios within one run travel between machines, absolute rates do not."""

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
from torch import nn

from imkd_data.errors import UsageError
from imkd_data.loader.augment import IDENTITY, ImageDraw, draw_images
from imkd_data.loader.read import decode_image
from imkd_data.loader.stream import stream
from imkd_data.recipe import canonical_json
from pipelines.machine import Machine
from pipelines.measure import loader_values
from pipelines.run import Run

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["loader_table", "run_loader_bench", "run_step_bench", "step_table"]

HW = (256, 704)


def _rate(make: Callable[[], Iterator[int]], seconds: float) -> float:
    """Samples per second of CPU time of an iterator of sample counts, started again when it ends; the first batch is not
    counted. CPU time, because all candidates run on one thread of this process and other work must not blur ratios."""
    done, it = 0, make()
    next(it)
    begun = time.process_time()
    while (spent := time.process_time() - begun) < seconds:
        count = next(it, None)
        if count is None:
            it = make()
            continue
        done += count
    return done / spent


# ------------------------------------------------------------------------------------------------------------- loaders


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
    code bases do. Candidates whose package is not installed are listed as absent.
    """
    from imkd_data import open_cache

    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    torch.set_num_threads(1)
    images = tuple(p for p in ("images", "depth", "radar_points", "boxes", "lidar_intensity"))
    rates: dict[str, float | None] = {}
    rates["stream"] = _rate(lambda: _stream(opened, batch_size, images, history, augment=False), seconds)
    rates["stream augmented"] = _rate(lambda: _stream(opened, batch_size, images, history, augment=True), seconds)
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
    if dataroot is not None:
        rates["decode and project on the fly"] = _rate(lambda: _on_the_fly(opened, Path(dataroot), len(history)), seconds)
    for package in ("litdata", "mosaicml-streaming"):
        notes[package] = _installed(package) or "not installed"
    ratios = _ratios(rates)
    samples = rates["stream"] or 0.0
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
        # data-wait under 2 %: loaders must deliver what the device takes
        "cores_for": {f"{rate} samples/s": round(rate / samples, 1) if samples else None for rate in (5, 10, 20)},
        "software": {n: _installed(n) or "none" for n in ("torch", "numpy", "simplejpeg", "pillow", "webdataset")},
        "machine": {"cpus": os.cpu_count()},
    }


def _ratios(rates: Mapping[str, float | None]) -> dict[str, float]:
    pairs = {
        "stream / on the fly": ("stream", "decode and project on the fly"),
        "rows / webdataset": ("rows, random order", "webdataset sequential"),
        "rows / webdataset, without images": ("rows, random order, without images", "webdataset sequential, without images"),
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


def _stream(cache: Cache, size: int, parts: Sequence[str], history: Sequence[int], *, augment: bool) -> Iterator[int]:
    size = min(size, len(cache.rows()))
    made = stream(
        cache, size, split="all", fields=parts, history=history, augment=augment, image_hw_px=HW, grid=cache.recipe.view_grid
    )
    return (len(batch) for batch in made)


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


def _rows(cache: Cache, *, images: bool) -> Iterator[int]:
    """The same fields as in the tar, in random order, every byte checked; JPEGs decoded by the stream's decoder."""
    draw, rows = _draw(cache), cache.rows()
    for row in np.random.default_rng(0).permutation(rows).tolist():
        for data in cache.read("images", row).values():
            if images:
                decode_image(data, draw)
        for field in (*_TAR_FIELDS, "radar_points"):
            cache.read(field, row)
        yield 1


def _webdataset(tar: Path, draw: ImageDraw | None) -> Iterator[int]:
    import webdataset

    # our own decoders and a plain file: nothing in the tar is executed
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        for key, value in sample.items():
            if key.endswith(".jpg") and draw is not None:
                decode_image(value, draw)
            elif key.endswith(".npy"):
                np.load(io.BytesIO(value), allow_pickle=False)
        yield 1


def _on_the_fly(cache: Cache, dataroot: Path, keyframes: int) -> Iterator[int]:
    """Own code, the usual way: whole JPEGs by PIL, resize, crop, normalise; LiDAR file to six cameras with NumPy; radar."""
    from PIL import Image

    from imkd_data.readers import READERS

    recipe = cache.recipe
    reader = READERS[recipe.dataset](
        dataroot, recipe.version, sensors=recipe.sensors, reference_channel=recipe.reference_channel
    )
    needs = frozenset(("images", "lidar_key", "radar"))
    for scene in dict.fromkeys(cache.index["scene"].to_pylist()):
        for sample in reader.samples(scene):
            payload = reader.read(sample, needs)
            for data in (payload.images or {}).values():
                for _ in range(keyframes):
                    image = Image.open(io.BytesIO(data)).convert("RGB").resize((704, 396), Image.Resampling.BICUBIC)
                    pixels = np.asarray(image.crop((0, 140, 704, 396)), dtype=np.float32)
                    (pixels - np.float32(120)) / np.float32(58)
            points = (payload.lidar or ())[0]
            for frame in sample.cameras:
                pose = frame.camera.ego_from_camera.inverse() @ sample.lidar[0].ego_from_sensor
                uv, depth = frame.camera.project(pose.points(points.xyz_m))
                keep = (depth > 0) & (uv[:, 0] > 0) & (uv[:, 0] < 1600) & (uv[:, 1] > 0) & (uv[:, 1] < 900)
                canvas = np.zeros(HW, dtype=np.float32)
                u, v = (uv[keep] * 0.44 - (0, 140)).T.astype(np.int64)
                inside = (u >= 0) & (u < HW[1]) & (v >= 0) & (v < HW[0])
                canvas[v[inside], u[inside]] = depth[keep][inside]
            for channel, scans in (payload.radar or {}).items():
                for sweep, scan in zip(sample.radar[channel], scans, strict=True):
                    sweep.ego_from_sensor.points(scan.xyz_m)
            yield 1


def loader_table(facts: Mapping[str, Any]) -> str:
    """The loader bench for people."""
    lines = [f"{'samples/s on one core':<42}"]
    lines += [f"  {name:<40}{rate:10.1f}" for name, rate in facts["samples_per_s"].items() if rate is not None]
    lines += [f"{name:<42}{value:9.2f}x" for name, value in facts["ratios"].items()]
    lines += [f"{name:<42}{note:>10}" for name, note in facts["others"].items()]
    lines += [f"cores for {name:<32}{value:10.1f}" for name, value in facts["cores_for"].items() if value is not None]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- step


class _Spans:
    """Time inside named modules, forward only, by hooks; nested ones count for the inner."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.total: dict[str, float] = {}
        self.stack: list[tuple[str, float]] = []

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(self, name: str) -> None:
        now = self.now()
        if self.stack:
            outer, since = self.stack[-1]
            self.total[outer] = self.total.get(outer, 0.0) + now - since
        self.stack.append((name, now))

    def leave(self) -> None:
        now = self.now()
        name, since = self.stack.pop()
        self.total[name] = self.total.get(name, 0.0) + now - since
        if self.stack:
            self.stack[-1] = (self.stack[-1][0], now)

    def watch(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave())


_PARTS: Mapping[str, tuple[str, ...]] = {
    "image": ("camera.image", "camera.depth", "camera.sparse_depth"),
    "view": ("camera.view",),
    "radar": ("radar", "calibration"),
    "lidar": ("lidar",),
    "fusion": ("fuser", "time", "sim"),
    "trunk": ("trunk",),
    "head": ("head",),
}


def run_step_bench(
    run: Run,
    cache: Cache | Path | str,
    teachers: Mapping[str, Path | str] | None = None,
    *,
    steps: int = 10,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Seconds of a training step by part: modules of the forward pass, the rest of it (pooling, losses), backward, optimiser,
    data; and what share of the measured matmul ceiling the whole step reaches."""
    from imkd_data import open_cache
    from pipelines.counting import counted
    from pipelines.machine import make_fabric
    from pipelines.networks import TrainUnit, build_networks, use_cached_teachers
    from pipelines.optimise import make_optimiser

    if run.stages:
        raise UsageError("name a run of one network", found=run.name, expected="for example tiny_student")
    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    fabric = make_fabric(run, Machine(accelerator=accelerator))
    networks = build_networks(run, teachers, pretrained=False)
    if run.loader.cached_teachers:
        use_cached_teachers(networks, opened)
    plain = TrainUnit(networks)
    on_gpu = fabric.device.type == "cuda"
    spans = _Spans(on_gpu)
    for part, names in _PARTS.items():
        for name, module in networks.model.named_modules():
            if name in names:
                spans.watch(module, part)
    for name, teacher in networks.teachers.items():
        teacher.to(fabric.device)
        spans.watch(teacher, f"teacher {name}")
    if networks.distiller is not None:
        spans.watch(networks.distiller, "distillation")
    unit, optimiser = fabric.setup(plain, make_optimiser(plain.model, plain.distiller, run.optim))
    unit.train()
    source = stream(opened, run.batch_size, device=fabric.device, **loader_values(run, networks))
    batches = source.forever(len(source.order) // run.batch_size * run.batch_size)
    for step in range(steps + 3):
        if step == 3:
            spans.total.clear()
        spans.enter("data")
        batch = next(batches)
        spans.leave()
        spans.enter("forward, rest")
        terms = unit(batch)
        spans.leave()
        spans.enter("backward")
        fabric.backward(sum(terms.values()))
        spans.leave()
        spans.enter("optimiser")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        spans.leave()
    batches.close()  # type: ignore[attr-defined]
    parts = {k: v / steps for k, v in sorted(spans.total.items(), key=lambda i: -i[1])}
    total = sum(parts.values())
    macs = counted(run)["macs"]
    ceiling = _matmul_flops(fabric.device, run.precision)
    useful = None if macs is None else 6.0 * macs * run.batch_size  # forward and twice that backward, 2 FLOP each
    return {
        "v": 1,
        "run": run.name,
        "method": run.method,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "precision": run.precision,
        "batch_size": run.batch_size,
        "steps": steps,
        "step_s": total,
        "samples_per_s": run.batch_size / total,
        "parts_s": parts,
        "matmul_flops": ceiling,
        "share_of_matmul_ceiling": None if useful is None else useful / total / ceiling,
        "copy_bytes_per_s": _copy_rate(fabric.device),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "identity": canonical_json(run.as_dict()).decode().strip(),
    }


def _matmul_flops(device: torch.device, precision: str, size: int = 1024) -> float:
    """Measured matmul rate of this device in the run's precision, FLOP/s."""
    if device.type == "cuda":
        size = 8192
    dtype = torch.bfloat16 if precision != "32-true" and device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    begun, count = time.perf_counter(), 5
    for _ in range(count):
        a @ a
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2.0 * size**3 * count / (time.perf_counter() - begun)


def _copy_rate(device: torch.device, size: int = 1 << 26) -> float:
    """Measured memory copy on the device, bytes read and written per second."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    begun = time.perf_counter()
    for _ in range(5):
        b.copy_(a)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2.0 * size * 5 / (time.perf_counter() - begun)


def step_table(facts: Mapping[str, Any]) -> str:
    """The step bench for people."""
    lines = [
        f"{facts['run']}{' + ' + facts['method'] if facts['method'] else ''}, {facts['device']}, {facts['precision']}, "
        f"batch {facts['batch_size']}: {1e3 * facts['step_s']:.1f} ms a step, {facts['samples_per_s']:.2f} samples/s"
    ]
    for name, seconds in facts["parts_s"].items():
        lines.append(f"  {name:<24}{1e3 * seconds:9.1f} ms {100 * seconds / facts['step_s']:6.1f} %")
    share = facts["share_of_matmul_ceiling"]
    if share is not None:
        lines.append(f"  {100 * share:.1f} % of the measured matmul ceiling ({facts['matmul_flops'] / 1e12:.2f} TFLOP/s)")
    return "\n".join(lines)
