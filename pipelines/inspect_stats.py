"""Histograms of a cache: what the sensors saw and what the fields weigh. ``imkd-data inspect --stats --open FILE``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import UsageError

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["Histogram", "cache_histograms", "statistics_lines", "write_statistics"]

SAMPLES = 48


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """title, unit, edges (N + 1,), counts (N,); mean of the values, NaN where there are none."""

    title: str
    unit: str
    edges: NDArray[np.float64]
    counts: NDArray[np.float64]
    mean: float

    def line(self) -> str:
        """A row of the table."""
        total = self.counts.sum()
        if not total:
            return f"{self.title:<36} no values"
        share = np.cumsum(self.counts) / total
        low, mid, high = (float(self.edges[np.searchsorted(share, q)]) for q in (0.05, 0.5, 0.95))
        spread = f"5 % {low:8.3g}  50 % {mid:8.3g}  95 % {high:8.3g}"
        return f"{self.title:<36} {int(total):>11,} values  mean {self.mean:9.3g}  {spread}  {self.unit}"


class _Counter:
    """A histogram that grows row by row."""

    def __init__(self, title: str, unit: str, edges: NDArray[np.float64]) -> None:
        self.title, self.unit, self.edges = title, unit, edges
        self.counts, self.total, self.number = np.zeros(len(edges) - 1), 0.0, 0

    def add(self, values: Any) -> None:
        array = np.asarray(values, dtype=np.float64).reshape(-1)
        array = array[np.isfinite(array)]
        self.counts += np.histogram(np.clip(array, self.edges[0], self.edges[-1]), self.edges)[0]
        self.total, self.number = self.total + float(array.sum()), self.number + len(array)

    def done(self) -> Histogram:
        mean = self.total / self.number if self.number else float("nan")
        return Histogram(title=self.title, unit=self.unit, edges=self.edges, counts=self.counts, mean=mean)


def _lidar(cache: Cache) -> tuple[list[_Counter], Callable[[int], None]]:
    counters = [
        _Counter("LiDAR intensity of occupied cells", "0..1", np.linspace(0, 1, 52)),
        _Counter("LiDAR returns per occupied cell", "returns", np.arange(0.5, 41)),
    ]

    def read(row: int) -> None:
        count = cache.read("lidar_bev_count", row).astype(np.int64)
        seen = count > 0
        counters[0].add(cache.read("lidar_bev_sum", row)[seen] / (count[seen] * cache.suite.reflectance_max))
        counters[1].add(count[seen])

    return counters, read


def _depth(cache: Cache) -> tuple[list[_Counter], Callable[[int], None]]:
    counters = [
        _Counter("LiDAR depth in images", "m", np.linspace(0, 80, 81)),
        _Counter("LiDAR points per camera", "points", np.linspace(0, 6200, 63)),
    ]

    def read(row: int) -> None:
        for points in cache.decode("depth_points", row):
            counters[0].add(np.asarray(points)[:, 2])
            counters[1].add([len(points)])

    return counters, read


def _radar(cache: Cache) -> tuple[list[_Counter], Callable[[int], None]]:
    counters = [
        _Counter("radar speed (compensated)", "m/s", np.linspace(0, 25, 51)),
        _Counter("radar cross section", "dBsm", np.linspace(-10, 50, 61)),
        _Counter("radar distance", "m", np.linspace(0, 200, 51)),
        *(_Counter(f"points per sample, {n}", "points", np.linspace(0, 130 * 13, 53)) for n in _declared(cache)),
    ]

    def read(row: int) -> None:
        points = cache.decode("radar_points", row)
        if "vx_comp" in points:
            counters[0].add(np.hypot(points["vx_comp"], points["vy_comp"]))
        if "rcs" in points:
            counters[1].add(points["rcs"])
        counters[2].add(np.hypot(points["x"], points["y"]))
        per_sensor = np.bincount(points["sensor"], minlength=len(cache.suite.radars))
        for counter, name in zip(counters[3:], _declared(cache), strict=True):
            counter.add([per_sensor[cache.suite.radars.index(name)]])

    return counters, read


def _declared(cache: Cache) -> list[str]:
    return [n for n in cache.suite.radars if n in cache.recipe.sensors]


def _boxes(cache: Cache) -> tuple[list[_Counter], Callable[[int], None]]:
    counters = [
        _Counter("box classes", "class", np.arange(-0.5, len(DETECTION_CLASSES))),
        _Counter("box distance", "m", np.linspace(0, 100, 51)),
        _Counter("box speed", "m/s", np.linspace(0, 20, 41)),
        _Counter("LiDAR points per box", "points", np.linspace(0, 200, 51)),
    ]

    def read(row: int) -> None:
        boxes = cache.decode("boxes", row)
        counters[0].add(boxes.label[boxes.label >= 0])
        counters[1].add(np.hypot(boxes.centre_m[:, 0], boxes.centre_m[:, 1]))
        counters[2].add(np.hypot(boxes.velocity_mps[:, 0], boxes.velocity_mps[:, 1]))
        counters[3].add(boxes.num_lidar)

    return counters, read


_GROUPS: tuple[tuple[tuple[str, ...], Callable[[Any], tuple[list[_Counter], Callable[[int], None]]]], ...] = (
    (("lidar_bev_sum", "lidar_bev_count"), _lidar),
    (("depth_points", "depth_count"), _depth),
    (("radar_points",), _radar),
    (("boxes",), _boxes),
)


def cache_histograms(cache: Cache, rows: NDArray[np.int64], samples: int = SAMPLES) -> list[Histogram]:
    """Histograms over at most ``samples`` evenly spread rows, of the fields that the cache holds."""
    if not len(rows):
        raise UsageError("no samples to look at", found="0 rows")
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(int))]
    out: list[Histogram] = []
    for needed, make in _GROUPS:
        if all(name in cache.fields for name in needed):
            counters, read = make(cache)
            for row in chosen.tolist():
                read(row)
            out += [c.done() for c in counters]
    return out


def field_sizes(cache: Cache) -> dict[str, float]:
    """Field -> stored KB per sample, largest first."""
    stored = {n: sum(s[0] for s in cache.manifest["fields"][n]["shards"]) for n in cache.fields}
    return {n: size / 1e3 / max(1, len(cache)) for n, size in sorted(stored.items(), key=lambda item: -item[1])}


def statistics_lines(histograms: list[Histogram]) -> list[str]:
    """The table: a line per histogram, then the boxes of each class."""
    lines = [h.line() for h in histograms]
    classes = next((h for h in histograms if h.title == "box classes"), None)
    if classes is not None:
        lines += [f"  {name:<34} {int(n):>11,} boxes" for name, n in zip(DETECTION_CLASSES, classes.counts, strict=True)]
    return lines


def write_statistics(cache: Cache, rows: NDArray[np.int64], histograms: list[Histogram], path: Path) -> None:
    """Histograms and sizes per field as one picture, or as a page with the picture and the table.

    Raises:
        UsageError: neither .png nor .html.
    """
    from pipelines import plots
    from pipelines.report_html import Page, figure, pre

    if path.suffix.lower() not in (".png", ".html", ".htm"):
        raise UsageError("the picture is a .png or .html file", found=str(path))
    sizes = field_sizes(cache)
    drawn = plots.histograms([(h.title, h.unit, h.edges, h.counts) for h in histograms], sizes=sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        plots.save(drawn, path)
        return
    page = Page(f"Statistics of {cache.path.name}", f"{len(rows):,} samples selected; at most {SAMPLES} were read", cache.id)
    alt = "Histograms: " + ", ".join(h.title for h in histograms)
    alt += ". Stored KB a sample: " + ", ".join(f"{n} {v:.1f}" for n, v in sizes.items())
    shown = figure(plots.encode(drawn, "webp"), "webp", alt, "Values outside are in the last bars.", wide=True)
    page.add("histograms", "Histograms", shown)
    page.add("table", "Table", pre("\n".join(statistics_lines(histograms))))
    weight = [f"{name:<24} {size:10.1f} KB a sample" for name, size in sizes.items()]
    page.add("sizes", "Sizes", pre("\n".join(weight)))
    path.write_text(page.render(), encoding="utf-8")
