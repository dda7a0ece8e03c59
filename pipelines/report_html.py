"""Pieces of a self-contained page: escaped text, tables, line charts as SVG, pictures as data URLs. Standard library only."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

__all__ = ["Page", "chart", "figure", "number", "pre", "side_by_side", "table"]

Line = tuple[Sequence[float], Sequence[float]]
COLOURS = 6


def text(value: Any) -> str:
    """Escaped text; everything that comes from a file goes through here."""
    return html.escape(str(value), quote=True)


def number(value: Any, digits: int = 3) -> str:
    """A number for a table cell; a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    caption: str,
    sortable: bool = False,
    digits: int = 3,
    best: Mapping[int, str] | None = None,
    text_columns: Sequence[int] = (),
) -> str:
    """A table in a box that scrolls by itself. best: column -> "max" or "min", whose best cell is marked."""
    marked = {}
    for column, kind in (best or {}).items():
        values = [r[column] for r in rows if isinstance(r[column], float) and not math.isnan(r[column])]
        if len(values) > 1:
            marked[column] = max(values) if kind == "max" else min(values)
    out = [f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">']
    kind = ' class="sortable"' if sortable else ""
    out.append(f"<table{kind}><caption><span>{text(caption)}</span></caption><thead><tr>")
    for i, name in enumerate(head):
        kind = ' class="text"' if i in text_columns else ""
        out.append(f'<th scope="col"{kind}>{text(name)}</th>')
    out.append("</tr></thead><tbody>")
    for row in rows:
        cells = []
        for i, value in enumerate(row):
            shown = text(number(value, digits))
            kind = "text" if i in text_columns else "best" if i in marked and value == marked[i] else ""
            attributes = f' class="{kind}"' if kind else ""
            if isinstance(value, float | int):
                attributes += f' data-value="{value!r}"'
            cells.append(f'<th scope="row">{shown}</th>' if i == 0 else f"<td{attributes}>{shown}</td>")
        out.append("<tr>" + "".join(cells) + "</tr>")
    out.append("</tbody></table></div>")
    return "".join(out)


def pre(value: str) -> str:
    """Preformatted text."""
    return f'<pre tabindex="0">{text(value)}</pre>'


def figure(image: bytes, kind: str, alt: str, caption: str, *, wide: bool = False) -> str:
    """A picture inside the page with its text alternative. wide: of many parts; a narrow screen scrolls it, it does not shrink
    until nothing can be seen."""
    data = base64.b64encode(image).decode()
    shown = f'<img src="data:image/{text(kind)};base64,{data}" alt="{text(alt)}">'
    if wide:
        shown = f'<div class="scroll wide" tabindex="0" role="region" aria-label="{text(caption)}">{shown}</div>'
    return f"<figure>{shown}<figcaption>{text(caption)}</figcaption></figure>"


def side_by_side(figures: Sequence[str]) -> str:
    """Figures in columns where there is room, else below each other."""
    return f'<div class="pictures">{"".join(figures)}</div>'


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round((first + k) * step, 12) for k in range(int((high - first * step) / step + 1e-9) + 1)]


def chart(
    title: str,
    lines: Mapping[str, Line],
    *,
    x: str = "",
    y: str = "",
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (360, 220),
) -> str:
    """Lines as an SVG that follows the page's colours. Points that are not finite are left out."""
    clean = {
        name: [(float(a), float(b)) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b)]
        for name, (xs, ys) in lines.items()
    }
    points = [p for line in clean.values() for p in line]
    if not points:
        return ""
    width, height = size
    left, right, top, bottom = 44, 8, 22, 30 + 13 * math.ceil(len(clean) / 3)
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = y_range or (min(0.0, min(p[1] for p in points)), max(p[1] for p in points))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def at(a: float, b: float) -> tuple[float, float]:
        return (
            left + (a - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (min(max(b, y0), y1) - y0) / (y1 - y0) * (height - top - bottom),
        )

    summary = "; ".join(f"{n}: from {line[0][1]:.3g} to {line[-1][1]:.3g}" for n, line in clean.items() if line)
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(f"{title}. {summary}")}">']
    out.append(f'<text class="title" x="{left}" y="13">{text(title)}</text>')
    for value in _ticks(y0, y1):
        _, py = at(x0, value)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        out.append(f'<text x="{left - 5}" y="{py + 3:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(x0, x1, 5):
        px, _ = at(value, y0)
        out.append(f'<text x="{px:.1f}" y="{height - bottom + 13}" text-anchor="middle">{value:g}</text>')
    out.append(f'<text x="{width - right}" y="{height - bottom + 25}" text-anchor="end">{text(x)}</text>')
    out.append(f'<text x="{width - right}" y="13" text-anchor="end">{text(y)}</text>')
    for i, (name, line) in enumerate(clean.items()):
        colour = i % COLOURS
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(a, b) for a, b in line))
        out.append(f'<polyline class="line c{colour}" points="{path}"/>')
        if len(line) <= 8:
            out += [
                f'<circle class="dot f{colour}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.4"/>' for p in (at(a, b) for a, b in line)
            ]
        lx, ly = left + (i % 3) * (width - left) / 3, height - bottom + 27 + 13 * (i // 3) + 9
        out.append(f'<line class="line c{colour}" x1="{lx:.0f}" x2="{lx + 14:.0f}" y1="{ly - 3:.0f}" y2="{ly - 3:.0f}"/>')
        out.append(f'<text x="{lx + 18:.0f}" y="{ly:.0f}">{text(name[:22])}</text>')
    return "".join(out) + "</svg>"


class Page:
    """A page of sections; ``render`` puts style and script inside and their hashes into the content policy."""

    def __init__(self, title: str, subtitle: str = "", footer: str = "") -> None:
        self.title, self.subtitle, self.footer = title, subtitle, footer
        self.sections: list[tuple[str, str, str]] = []

    def add(self, anchor: str, title: str, *parts: str) -> None:
        """A section; empty ones are left out."""
        body = "\n".join(p for p in parts if p)
        if body:
            self.sections.append((anchor, title, body))

    def render(self) -> str:
        """The whole HTML text."""
        folder = files("pipelines").joinpath("report_page")
        style, script, page = (folder.joinpath(f"report.{k}").read_text("utf-8") for k in ("css", "js", "html"))
        body = "\n".join(
            f'<section aria-labelledby="{a}"><h2 id="{a}" tabindex="-1">{text(t)}</h2>\n{b}\n</section>'
            for a, t, b in self.sections
        )
        values = {
            "title": text(self.title),
            "subtitle": text(self.subtitle),
            "footer": text(self.footer),
            "links": "".join(f'<li><a href="#{a}">{text(t)}</a></li>' for a, t, _ in self.sections),
            "style_hash": _hash(style),
            "script_hash": _hash(script),
            "style": style,
            "script": script,
            "body": body,
        }
        # One pass over the template's own parts, so that text in a section can never act as one of them.
        pieces = page.split("@")
        return "".join(piece if i % 2 == 0 else values[piece] for i, piece in enumerate(pieces))


def _hash(value: str) -> str:
    return base64.b64encode(hashlib.sha256(value.encode()).digest()).decode()
