"""Forecast of bytes, files, time and memory: from a few samples timed on this machine, else from published sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imkd_data.cache.codecs import encode_row
from imkd_data.cache.keys import ordered
from imkd_data.cache.plan import Plan
from imkd_data.errors import ImkdError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.sample import Reader, Sample
from pipelines.build.request import Resolved

__all__ = ["KB_PER_SAMPLE", "Forecast", "cores", "forecast", "low_bytes"]

# Compressed kilobytes per sample measured on one genuine frame with simulated sweeps; other fields: unknown, taken as 1.
KB_PER_SAMPLE: dict[str, float] = {
    "lidar_bev_sum": 67,
    "lidar_bev_count": 41,
    "lidar_bev_max": 31.6,
    "lidar_bev_z_of_max": 45,
    "lidar_intensity": 18,
    "lidar_points": 1200,
    "lidar_provenance": 138,
    "depth_points": 83,
    "depth_intensity": 13,
    "depth_count": 0.05,
    "radar_points": 50,
    "radar_pose": 3,
    "camera_calibration": 1.5,
    "sample_pose": 0.2,
    "boxes": 3,
    "images": 525,
}


def cores() -> int:
    """Cores that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return os.cpu_count() or 1


def low_bytes(name: str, samples: int) -> int:
    """A size that a build will hardly stay below: a tenth of the usual one, since small sensors compress far better."""
    return int(100 * KB_PER_SAMPLE.get(name, 0.0) * samples)


@dataclass(slots=True)
class Line:
    """One queued field and reason."""

    field: str
    reason: str
    shards: int
    samples: int
    bytes: float = 0.0
    core_seconds: float | None = None

    @property
    def time_text(self) -> str:
        if self.core_seconds is None:
            return ""
        s = self.core_seconds
        return f", about {s / 3600:.2g} core-hours" if s > 360 else f", about {s:.2g} core-seconds"


@dataclass(slots=True)
class Forecast:
    """What a build will take. ``seconds``: (low, middle, high) for the given workers; None without a probe."""

    lines: list[Line]
    bytes: float
    files: int
    workers: int
    free: int
    probed: int
    seconds: tuple[float, float, float] | None = None
    peak_bytes: float = 0.0
    probe_error: str = ""
    parts_ms: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Lines for the screen."""
        out: dict[str, Any] = {"size": f"{_size(self.bytes)} in {self.files:,} files, {_size(self.free)} free"}
        if self.bytes > self.free:
            out["warning"] = "the disk is too small"
        if self.seconds:
            low, middle, high = (_time(s) for s in self.seconds)
            out["time"] = f"about {middle} ({low} to {high}) with {self.workers} workers, from {self.probed} timed samples"
        if self.peak_bytes:
            out["memory"] = f"about {_size(self.peak_bytes)} per worker"
        if self.probe_error:
            out["probe"] = self.probe_error
        return out

    def as_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "bytes": int(self.bytes),
            "files": self.files,
            "free_bytes": self.free,
            "workers": self.workers,
            "probed": self.probed,
            "seconds": [round(s, 2) for s in self.seconds] if self.seconds else None,
            "peak_bytes": int(self.peak_bytes),
            "ms_per_sample": {k: round(v, 3) for k, v in self.parts_ms.items()},
        }


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.0f} s"


def forecast(resolved: Resolved, plan: Plan, out: Path, *, probe: int, workers: int) -> Forecast:
    """Estimate ``plan``; ``probe`` samples are read and computed, nothing is written."""
    lines: dict[tuple[str, str], Line] = {}
    for q in plan.queue:
        line = lines.setdefault((q.field, q.reason), Line(q.field, q.reason, 0, 0))
        line.shards += 1
        line.samples += len(plan.shards[q.shard])
    measured = _Probe(resolved, plan)
    problem = ""
    if probe > 0 and plan.queue:
        try:
            measured.run(probe)
        except ImkdError as error:
            problem = f"a sample could not be built: {error.what}"
    for line in lines.values():
        line.bytes = measured.mean_bytes(line.field) * line.samples
        if measured.times:
            line.core_seconds = measured.mean_seconds(line.field) * line.samples
    result = Forecast(
        lines=list(lines.values()),
        bytes=sum(line.bytes for line in lines.values()),
        files=2 * len(plan.queue),
        workers=workers,
        free=_free(out),
        probed=len(measured.times),
        probe_error=problem,
        parts_ms=measured.parts_ms(),
    )
    if measured.times:
        samples = sum(len(plan.shards[s]) for s in {q.shard for q in plan.queue})
        each = sorted(measured.times)
        mean = sum(each) / len(each)
        low, high = (each[0], each[-1]) if len(each) > 2 else (0.7 * mean, 1.4 * mean)
        ways = min(workers, len({q.shard for q in plan.queue}))
        result.seconds = (low * samples / ways, mean * samples / ways, 1.2 * high * samples / ways)
        shard = max(map(len, plan.shards))
        # A worker holds the encoded rows of one shard, and the largest file once more while it is joined.
        sizes = [measured.mean_bytes(n) * shard for n in {q.field for q in plan.queue}]
        result.peak_bytes = 250e6 + sum(sizes) + max(sizes)
    return result


def _free(out: Path) -> int:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


class _Probe:
    """Times and sizes of a few real samples."""

    def __init__(self, resolved: Resolved, plan: Plan) -> None:
        self.reader: Reader = resolved.reader
        self.plan = plan
        self.queued = {q.field for q in plan.queue}
        self.times: list[float] = []
        self.bytes: dict[str, list[int]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.read_seconds: list[float] = []

    def run(self, count: int) -> None:
        """Time ``count`` samples spread over the queue. The first one is done twice: compilation is no cost per sample."""
        samples = self._choose(count)
        self._one(samples[0])
        for values in (self.times, self.read_seconds):
            values.clear()
        for table in (self.bytes, self.seconds):
            table.clear()
        for sample in samples:
            self._one(sample)

    def _choose(self, count: int) -> list[Sample]:
        shards = sorted({q.shard for q in self.plan.queue})
        picked = [shards[i * len(shards) // min(count, len(shards))] for i in range(min(count, len(shards)))]
        out = []
        for k in range(count):
            clip = self.plan.shards[picked[k % len(picked)]].clips[0]
            out.append(self.reader.samples(clip.scene)[clip.start + (len(clip) * (k + 1) // (count + 1))])
        return out

    def _one(self, sample: Sample) -> None:
        fields: Mapping[str, CacheField] = self.plan.fields
        wanted = set(self.queued)
        for name in reversed(ordered(fields)):
            if name in wanted:
                wanted |= set(fields[name].upstream)
        started = time.perf_counter()
        payload = self.reader.read(sample, frozenset(n for f in wanted for n in fields[f].needs))
        self.read_seconds.append(time.perf_counter() - started)
        rows: dict[str, Stored] = {}
        for name in ordered(fields):
            if name not in wanted:
                continue
            one, began = fields[name], time.perf_counter()
            rows[name] = one.compute(payload, self.plan.recipe, self.plan.suite, {u: rows[u] for u in one.upstream}, {})
            row = rows[name]
            size = sum(map(len, row.values())) if isinstance(row, dict) else len(encode_row(row, one.codec))
            self.bytes.setdefault(name, []).append(size)
            self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        self.times.append(time.perf_counter() - started)

    def mean_bytes(self, name: str) -> float:
        values = self.bytes.get(name)
        return sum(values) / len(values) if values else 1000 * KB_PER_SAMPLE.get(name, 1.0)

    def mean_seconds(self, name: str) -> float:
        """Compute and encode, plus an equal share of reading."""
        values = self.seconds.get(name)
        share = sum(self.read_seconds) / len(self.read_seconds) / max(1, len(self.seconds))
        return sum(values) / len(values) + share if values else 0.0

    def parts_ms(self) -> dict[str, float]:
        out = {n: 1000 * sum(v) / len(v) for n, v in self.seconds.items()}
        if self.read_seconds:
            out["read"] = 1000 * sum(self.read_seconds) / len(self.read_seconds)
        return out
