"""Pictures. The only file that imports matplotlib, always with the Agg canvas: no display, no pyplot state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.sample import Boxes
from pipelines.sample_view import CameraView, SampleView, box_corners, box_lines

__all__ = [
    "bev_picture",
    "bars",
    "camera_picture",
    "curves",
    "encode",
    "feature_maps",
    "histograms",
    "sample_picture",
    "save",
    "side_by_side",
]

PAPER, INK, FAINT = "#0d1117", "#e6edf3", "#8b949e"
TRUTH, LIDAR = "#3fb950", "gray"
FOUND = ("#ffa657", "#79c0ff", "#d2a8ff", "#ff7b72", "#f2cc60")
RADAR_FAST_MPS = 10.0
MIN_SHOWN_SCORE = 0.25


def _figure(width_in: float, height_in: float, dpi: int = 100) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=dpi, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def encode(figure: Figure, kind: str = "png", quality: int = 82) -> bytes:
    """A drawn figure as PNG, JPEG or WebP bytes."""
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    out = io.BytesIO()
    pixels.save(out, kind.upper().replace("JPG", "JPEG"), **({"quality": quality} if kind != "png" else {"compress_level": 3}))
    return out.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Write a figure; the format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(encode(figure, path.suffix.lstrip(".").lower() or "png"))
    return part.replace(path)


def _shown(boxes: Boxes, score_min: float) -> NDArray[np.int64]:
    return np.flatnonzero((boxes.score >= score_min) & (boxes.label >= 0))


def _draw_bev_boxes(ax: Any, boxes: Boxes, colour: str, width: float, by_score: bool) -> None:
    """Outlines, a line from the centre to the front, and a motion line of one second."""
    keep = _shown(boxes, MIN_SHOWN_SCORE if by_score else 0)
    corners = box_corners(boxes)[keep][:, [0, 1, 2, 3, 0], :2]
    alpha = np.clip(0.25 + boxes.score[keep], 0, 1) if by_score else np.ones(len(keep))
    if not len(keep):
        return
    front = box_corners(boxes)[keep][:, :2, :2].mean(1)
    centre = boxes.centre_m[keep, :2]
    speed = np.nan_to_num(boxes.velocity_mps[keep])
    colours = [(colour, float(a)) for a in alpha]
    ax.add_collection(LineCollection(list(corners[..., ::-1]), colors=colours, linewidths=width))
    ax.add_collection(LineCollection(list(np.stack([centre, front], 1)[..., ::-1]), colors=colours, linewidths=width))
    ends = np.stack([front, front + speed], 1)[np.hypot(*speed.T) > 0.5]
    ax.add_collection(LineCollection(list(ends[..., ::-1]), colors=colour, linewidths=width * 0.6, linestyles=":"))


def _draw_radar(ax: Any, radar: Mapping[str, NDArray[Any]]) -> Any:
    """The newest scan of each radar, coloured by compensated speed, with arrows of half a second for moving points."""
    newest = np.asarray(radar["sweep"]) == 0 if "sweep" in radar else np.ones(len(radar["x"]), dtype=bool)
    radar = {name: np.asarray(values)[newest] for name, values in radar.items()}
    if not newest.any():
        return None
    vx, vy = (np.asarray(radar.get(c, np.zeros_like(radar["x"])), dtype=float) for c in ("vx_comp", "vy_comp"))
    speed = np.hypot(vx, vy)
    order = np.argsort(speed)
    x, y = radar["x"][order], radar["y"][order]
    dots = ax.scatter(y, x, c=speed[order], s=6, cmap="cool", vmin=0, vmax=RADAR_FAST_MPS, linewidths=0, zorder=3)
    fast = np.flatnonzero(speed > 0.5)
    if len(fast):
        ax.quiver(
            *(radar["y"][fast], radar["x"][fast], vy[fast], vx[fast], speed[fast]),
            angles="xy",
            scale_units="xy",
            scale=2.0,
            width=0.0018,
            cmap="cool",
            zorder=3,
        ).set_clim(0, RADAR_FAST_MPS)
    return dots


def draw_bev(
    ax: Any, view: SampleView, found: Mapping[str, Boxes] | None = None, *, title: str = "", range_m: float | None = None
) -> None:
    """LiDAR intensity, radar, truth and predictions; ahead is up, the car's left is left."""
    grid = view.grid
    ax.set_facecolor(PAPER)
    if view.intensity is not None and view.occupied is not None:
        shade = np.where(view.occupied, 0.18 + 0.82 * np.sqrt(np.clip(view.intensity, 0, 1)), 0)
        extent = (grid.y_min_m, grid.y_max_m, grid.x_min_m, grid.x_max_m)
        ax.imshow(shade.T, origin="lower", extent=extent, cmap="bone", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    if view.radar is not None:
        _draw_radar(ax, view.radar)
    if view.truth is not None:
        _draw_bev_boxes(ax, view.truth, TRUTH, 1.3, by_score=False)
    for i, boxes in enumerate((view.found if found is None else found).values()):
        _draw_bev_boxes(ax, boxes, FOUND[i % len(FOUND)], 1.1, by_score=True)
    ax.plot([-0.9, 0.9, 0.9, -0.9, -0.9], [-1, -1, 3.5, 3.5, -1], color=INK, lw=1)
    for r in (20, 40):
        angle = np.linspace(0, 2 * np.pi, 90)
        ax.plot(r * np.sin(angle), r * np.cos(angle), color=FAINT, lw=0.4, alpha=0.6)
    low_x, high_x = (grid.x_min_m, grid.x_max_m) if range_m is None else (-range_m, range_m)
    low_y, high_y = (grid.y_min_m, grid.y_max_m) if range_m is None else (-range_m, range_m)
    ax.set_xlim(high_y, low_y)
    ax.set_ylim(low_x, high_x)
    ax.set_aspect("equal")
    ax.tick_params(colors=FAINT, labelsize=7, length=2)
    for spine in ax.spines.values():
        spine.set_color("#30363d")
    if title:
        ax.set_title(title, color=INK, fontsize=10, loc="left")


def _legend(figure: Figure, names: Sequence[str], radar: bool, truth: bool, x: float = 0.01, y: float = 0.005) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=TRUTH, lw=2, label="truth")] if truth else []
    handles += [Line2D([], [], color=FOUND[i % len(FOUND)], lw=2, label=n) for i, n in enumerate(names)]
    if radar:
        handles.append(Line2D([], [], color="#59a6ff", marker="o", ms=4, lw=0, label="radar, colour = speed 0..10 m/s"))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(x, y),
            ncols=len(handles),
            frameon=False,
            labelcolor=INK,
            fontsize=8,
        )


def bev_picture(view: SampleView, *, title: str = "", size_in: float = 7.0, range_m: float | None = None) -> Figure:
    """One bird's-eye view with everything the sample has."""
    figure = _figure(size_in, size_in + 0.45)
    draw_bev(
        figure.add_axes((0.06, 0.085, 0.92, 0.87)), view, title=title or f"{view.scene}  {view.token[:8]}", range_m=range_m
    )
    _legend(figure, list(view.found), view.radar is not None, view.truth is not None)
    return figure


def side_by_side(view: SampleView, found: Mapping[str, Boxes], *, size_in: float = 5.2, range_m: float | None = None) -> Figure:
    """The same sample once per network: its boxes beside the truth."""
    figure = _figure(size_in * len(found), size_in + 0.6)
    for i, (name, boxes) in enumerate(found.items()):
        ax = figure.add_axes(((i + 0.08) / len(found), 0.09, 0.9 / len(found), 0.84))
        draw_bev(ax, view, {name: boxes}, title=name, range_m=range_m)
    _legend(figure, ["predicted"], view.radar is not None, view.truth is not None)
    return figure


def draw_camera(ax: Any, one: CameraView, view: SampleView, *, depth: bool = True) -> None:
    """An image with LiDAR depth, truth and predicted boxes."""
    height, width = one.image.shape[:2]
    ax.imshow(one.image, aspect="auto", interpolation="nearest")
    if depth and one.depth is not None and len(one.depth):
        near_last = np.argsort(-one.depth[:, 2])
        u, v, d = one.depth[near_last].T
        ax.scatter(u, v, c=np.log(np.maximum(d, 1)), s=0.9, cmap="turbo_r", vmin=0, vmax=np.log(60), linewidths=0, alpha=0.75)
    sets = [(view.truth, TRUTH, 0.0)] if view.truth is not None else []
    sets += [(b, FOUND[i % len(FOUND)], MIN_SHOWN_SCORE) for i, b in enumerate(view.found.values())]
    for boxes, colour, score_min in sets:
        keep = set(_shown(boxes, score_min).tolist())
        for m, lines in box_lines(boxes, one.camera):
            if m in keep:
                alpha = 0.9 if score_min == 0 else float(np.clip(0.35 + boxes.score[m], 0, 1))
                ax.add_collection(LineCollection(list(lines), colors=colour, linewidths=0.9, alpha=alpha))
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)
    ax.set_axis_off()
    ax.text(
        8, 8, one.camera.name, color=INK, fontsize=7, va="top", bbox={"facecolor": PAPER, "alpha": 0.6, "lw": 0, "pad": 1.5}
    )


# Places of the six nuScenes cameras in a 2 x 3 block; other suites fill the block in order.
_PLACE = {
    "CAM_FRONT_LEFT": (0, 0),
    "CAM_FRONT": (0, 1),
    "CAM_FRONT_RIGHT": (0, 2),
    "CAM_BACK_LEFT": (1, 0),
    "CAM_BACK": (1, 1),
    "CAM_BACK_RIGHT": (1, 2),
}


def _places(cameras: Sequence[CameraView]) -> list[tuple[int, int]]:
    if all(c.camera.name in _PLACE for c in cameras):
        return [_PLACE[c.camera.name] for c in cameras]
    columns = min(3, max(1, len(cameras)))
    return [divmod(i, columns) for i in range(len(cameras))]


def camera_picture(view: SampleView, *, width_in: float = 14.0, depth: bool = True) -> Figure:
    """The cameras in a block with boxes and LiDAR depth."""
    places = _places(view.cameras) or [(0, 0)]
    rows, columns = max(r for r, _ in places) + 1, max(c for _, c in places) + 1
    ratio = view.cameras[0].image.shape[0] / view.cameras[0].image.shape[1] if view.cameras else 9 / 16
    figure = _figure(width_in, width_in / columns * ratio * rows)
    for one, (r, c) in zip(view.cameras, places, strict=False):
        box = ((c + 0.003) / columns, (rows - 1 - r + 0.003) / rows, 0.994 / columns, 0.994 / rows)
        draw_camera(figure.add_axes(box), one, view, depth=depth)
    return figure


def sample_picture(view: SampleView, *, summary: Sequence[str] = ()) -> Figure:
    """One page: BEV on the left, cameras on the right, calibration summary below them."""
    figure = _figure(17.0, 7.6)
    draw_bev(figure.add_axes((0.025, 0.07, 0.4, 0.88)), view, title=f"{view.scene}  {view.split}  {view.token}")
    places = _places(view.cameras)
    columns = max((c for _, c in places), default=0) + 1
    width = 0.565 / columns
    ratio = view.cameras[0].image.shape[0] / view.cameras[0].image.shape[1] if view.cameras else 9 / 16
    height = width * 17.0 * ratio / 7.6
    for one, (r, c) in zip(view.cameras, places, strict=False):
        draw_camera(figure.add_axes((0.432 + c * width, 0.95 - (r + 1) * height, width - 0.002, height - 0.004)), one, view)
    rows = max((r for r, _ in places), default=-1) + 1
    figure.text(
        *(0.432, 0.93 - rows * height),
        "\n".join(summary),
        color=INK,
        fontsize=7.5,
        va="top",
        family="monospace",
        linespacing=1.45,
    )
    _legend(figure, list(view.found), view.radar is not None, view.truth is not None)
    return figure


def _style(ax: Any, title: str, x: str = "", y: str = "") -> None:
    ax.set_facecolor(PAPER)
    ax.set_title(title, color=INK, fontsize=9, loc="left")
    ax.set_xlabel(x, color=FAINT, fontsize=8)
    ax.set_ylabel(y, color=FAINT, fontsize=8)
    ax.tick_params(colors=FAINT, labelsize=7)
    ax.grid(True, color="#30363d", lw=0.4)
    for spine in ax.spines.values():
        spine.set_color("#30363d")


def _panels(count: int, columns: int, width_in: float, height_in: float) -> tuple[Figure, list[Any]]:
    rows = -(-count // columns)
    figure = _figure(width_in * columns, height_in * rows)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, axes


def histograms(
    panels: Sequence[tuple[str, str, NDArray[Any], NDArray[Any]]], columns: int = 3, *, sizes: Mapping[str, float] | None = None
) -> Figure:
    """Panels (title, unit, bin edges (N + 1,), counts (N,)) as bar histograms; sizes: one more, stored KB a sample by field."""
    figure, axes = _panels(len(panels) + bool(sizes), columns, 4.2, 2.8)
    if sizes:
        ax = axes.pop()
        ax.barh(np.arange(len(sizes)), list(sizes.values()), color=FOUND[0])
        ax.set_yticks(np.arange(len(sizes)), list(sizes))
        ax.invert_yaxis()
        _style(ax, "stored size", "KB a sample")
        ax.set_xscale("symlog", linthresh=1)  # bytes of boxes beside megabytes of images
        ax.tick_params(axis="y", labelsize=max(3.0, min(7.0, 110 / len(sizes))))
    for ax, (title, unit, edges, counts) in zip(axes, panels, strict=True):
        ax.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=FOUND[1], linewidth=0)
        _style(ax, title, unit)
        if unit == "class":
            names = [name.replace("_", " ") for name in DETECTION_CLASSES]
            ax.set_xticks(np.arange(len(names)), names, rotation=50, ha="right")
        if counts.max(initial=0) > 50 * max(np.median(counts), 1):
            ax.set_yscale("log")
    figure.tight_layout()
    return figure


def bars(title: str, names: Sequence[str], series: Mapping[str, Sequence[float]], unit: str = "") -> Figure:
    """Grouped horizontal bars."""
    figure = _figure(7.0, 0.6 + 0.32 * len(names) * max(1, 0.6 * len(series)))
    ax = figure.add_subplot()
    thick = 0.8 / max(1, len(series))
    for i, (label, values) in enumerate(series.items()):
        ax.barh(np.arange(len(names)) + i * thick, values, height=thick, color=FOUND[i % len(FOUND)], label=label)
    ax.set_yticks(np.arange(len(names)) + 0.4 - thick / 2, names)
    ax.invert_yaxis()
    _style(ax, title, unit)
    if len(series) > 1:
        ax.legend(frameon=False, labelcolor=INK, fontsize=8)
    figure.tight_layout()
    return figure


def curves(
    panels: Sequence[tuple[str, str, str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]], columns: int = 2
) -> Figure:
    """Panels (title, x label, y label, {line: (x, y)})."""
    figure, axes = _panels(len(panels), columns, 5.0, 3.2)
    for ax, (title, x, y, lines) in zip(axes, panels, strict=True):
        for i, (name, (xs, ys)) in enumerate(lines.items()):
            ax.plot(xs, ys, color=FOUND[i % len(FOUND)], lw=1.2, label=name, marker="o" if len(xs) < 8 else None, ms=3)
        _style(ax, title, x, y)
        if len(lines) > 1:
            ax.legend(frameon=False, labelcolor=INK, fontsize=7)
    figure.tight_layout()
    return figure


def feature_maps(maps: Mapping[str, NDArray[Any]], columns: int = 4) -> Figure:
    """Named BEV maps (Y, X), each on its own scale; ahead is up."""
    figure, axes = _panels(len(maps), columns, 3.0, 3.1)
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, (1, 99)) if len(finite) else (0, 1)
        ax.imshow(
            values.T[:, ::-1], origin="lower", cmap="magma", vmin=low, vmax=max(high, low + 1e-9), interpolation="nearest"
        )
        ax.set_title(f"{name}  {low:.2g}..{high:.2g}", color=INK, fontsize=8, loc="left")
        ax.set_axis_off()
    figure.tight_layout()
    return figure


def class_names(labels: Sequence[int]) -> list[str]:
    """Names of detection class indices."""
    return [DETECTION_CLASSES[i] for i in labels]
