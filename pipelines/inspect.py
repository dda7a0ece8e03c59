"""What ``imkd-data inspect`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.cache.store import Cache
from imkd_data.errors import ImkdError, UsageError

__all__ = ["compare", "describe", "sample_facts", "summary", "write_picture"]

STATS_ROWS = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of text and the same as values."""

    text: str
    values: dict[str, Any]


def summary(cache: Cache, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Facts about the whole cache."""
    m = cache.manifest
    size = sum(s[0] for f in m["fields"].values() for s in f["shards"])
    return {
        "id": cache.id,
        "data set": f"{cache.recipe.dataset} {cache.recipe.version}",
        "samples": ", ".join(f"{k} {v:,}" for k, v in m["samples"].items()) + f"; {len(rows):,} selected",
        "shards": f"{m['shards']} of at most {cache.recipe.rows_per_shard} rows, {m['scenes']} scenes",
        "size": f"{size / 1e6:,.1f} MB",
        "sensors": ", ".join(cache.recipe.sensors),
        "quarantined": len(m["quarantined"]),
        "licence": m["licence"],
    }


def describe(cache: Cache, only: str | None, rows: NDArray[np.int64]) -> list[Entry]:
    """One entry per field: shape, dtype, frame, units, size; with ``rows`` also statistics over at most 64 of them."""
    names = [only] if only else list(cache.fields)
    out = []
    for name in names:
        one = cache.fields.get(name)
        if one is None:
            raise UsageError("the cache has no such field", found=name, expected=", ".join(cache.fields))
        attributes = cache.attributes(name)
        stored = sum(s[0] for s in cache.manifest["fields"][name]["shards"])
        per_sample = stored / max(1, len(cache))
        shape = tuple(one.shape(cache.recipe, cache.suite)) if one.shape else ()
        kind = f"{one.dtype} {list(shape)}" if one.kind == "array" else "blob"
        units = attributes.get("units") or ""
        text = f"{name:<20} {kind:<26} {per_sample / 1000:9.1f} KB/sample  {attributes.get('frame') or '':<6} {units}"
        values: dict[str, Any] = {
            "name": name,
            "storage": one.kind,
            "dtype": str(one.dtype) if one.dtype is not None else None,
            "shape": list(shape),
            "bytes": stored,
            "attributes": attributes,
        }
        if len(rows):
            facts = _statistics(cache, name, rows)
            values["statistics"] = facts
            text += "".join(f"\n    {k:<18} {v}" for k, v in facts.items())
        out.append(Entry(text, values))
    return out


def _statistics(cache: Cache, name: str, rows: NDArray[np.int64]) -> dict[str, str]:
    """Per column: smallest, mean, largest of the decoded values of evenly spread rows."""
    count = cache.attributes(name).get("count_field")
    if count and count not in cache.fields:
        return {"error": f"the cache has no {count}, which says how many values each row has"}
    chosen = rows[np.linspace(0, len(rows) - 1, min(STATS_ROWS, len(rows))).astype(int)]
    values: dict[str, list[NDArray[Any]]] = {}
    for row in chosen:
        try:
            decoded = cache.read(name, int(row)) if name == "images" else cache.decode(name, int(row))
        except ImkdError as error:
            return {"error": error.what}
        for column, array in _columns(decoded):
            values.setdefault(column, []).append(np.asarray(array).reshape(-1))
    out = {}
    for column, parts in values.items():
        joined = np.concatenate(parts)
        if joined.dtype.kind not in "biuf" or not len(joined):
            out[column] = f"{len(joined)} values"
            continue
        good = joined[np.isfinite(joined)]
        zero = 100 * float((joined == 0).mean())
        text = f"min {good.min():.4g}  mean {good.mean():.4g}  max {good.max():.4g}" if len(good) else "no finite value"
        out[column] = f"{text}  zero {zero:.1f} %" + (f"  NaN {len(joined) - len(good)}" if len(good) < len(joined) else "")
    return out


def _columns(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(k), len(v) if isinstance(v, bytes) else v) for k, v in value.items() if not isinstance(v, str)]
    if isinstance(value, list):
        return [("all", np.concatenate([np.asarray(v).reshape(-1) for v in value]) if value else np.zeros(0))]
    if isinstance(value, np.ndarray):
        return [("all", value)]
    names = ("centre_m", "size_lwh_m", "yaw_rad", "velocity_mps", "label", "num_lidar", "num_radar")
    return [(n, getattr(value, n)) for n in names if hasattr(value, n)]


def sample_facts(cache: Cache, row: int) -> dict[str, Any]:
    """The index line of a sample, without storage columns and long lists."""
    line = cache.line(row)
    out: dict[str, Any] = {}
    for name in cache.index.column_names:
        if "." not in name and name not in ("image_from_camera", "ego_from_camera"):
            out[name] = cache.index[name][line].as_py()
    return out


def compare(a: Cache, b: Cache, rows: int = 16) -> list[str]:
    """Lines that say where two caches agree: identity, recipe, fields, and decoded rows of common samples."""
    if a.id == b.id:
        return [f"equal: same identity {a.id}"]
    out = [f"identities differ: {a.id[:16]} and {b.id[:16]}"]
    ours, theirs = a.recipe.as_dict(), b.recipe.as_dict()
    out += [f"recipe {k} differs: {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    tokens_b = set(b.index["token"].to_pylist())
    common = [t for t in a.index["token"].to_pylist() if t in tokens_b]
    out.append(
        f"{len(common)} samples in both; only in the first {len(a) - len(common)}, only in the second {len(b) - len(common)}"
    )
    for name in a.fields:
        if name not in b.fields:
            out.append(f"field {name} is only in the first (differ)")
            continue
        picked = common[:: max(1, len(common) // rows)][:rows]
        same = sum(_same_row(a, b, name, t) for t in picked)
        out.append(
            f"field {name}: {same} of {len(picked)} compared rows are equal" + ("" if same == len(picked) else " (differ)")
        )
    out += [f"field {n} is only in the second (differ)" for n in b.fields if n not in a.fields]
    return out


def _same_row(a: Cache, b: Cache, name: str, token: str) -> bool:
    if a.fields[name].kind != b.fields[name].kind:
        return False
    if a.fields[name].kind == "blob":
        return a.read_parts(name, a.row(token)) == b.read_parts(name, b.row(token))
    x, y = a.read(name, a.row(token)), b.read(name, b.row(token))
    return x.shape == y.shape and x.dtype == y.dtype and bool(np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))


def write_picture(cache: Cache, row: int, path: Path) -> None:
    """One picture: cameras with depth and boxes, BEV intensity, radar. PNG, or an HTML page with the same in words."""
    from pipelines.plots import encode, sample_picture
    from pipelines.report_html import Page, figure, pre, table
    from pipelines.sample_view import calibration_lines, read_view

    if path.suffix.lower() not in (".png", ".html", ".htm"):
        raise UsageError("the picture is a .png or .html file", found=str(path))
    view = read_view(cache, row)
    calibration = calibration_lines(view)
    drawn = sample_picture(view, summary=[*_summary_lines(cache, row), "", *calibration])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        path.write_bytes(encode(drawn))
        return
    boxes = 0 if view.truth is None else int((view.truth.label >= 0).sum())
    points = 0 if view.radar is None else len(view.radar["x"])
    cameras = ", ".join(c.camera.name for c in view.cameras) or "no camera images"
    alt = (
        f"Sample {view.token} of {view.scene}: bird's-eye view of LiDAR intensity with {points} radar points, coloured by "
        f"speed and with arrows, and {boxes} truth boxes; beside it {cameras} with projected LiDAR depth and the boxes"
    )
    facts = [[name, str(value)] for name, value in sample_facts(cache, row).items()]
    page = Page(f"{cache.path.name}, {view.scene}", f"sample {view.token}; {view.split}; {view.description}", cache.id)
    caption = "Ahead is up. Green: truth; depth: near red, far blue."
    page.add("picture", "Picture", figure(encode(drawn, "webp", 88), "webp", alt, caption, wide=True))
    page.add("calibration", "Calibration", pre("\n".join(calibration)) if calibration else "")
    page.add("facts", "Index line", table(["what", "value"], facts, caption="What the index says", text_columns=(1,)))
    path.write_text(page.render(), encoding="utf-8")


def _summary_lines(cache: Cache, row: int) -> Sequence[str]:
    facts = sample_facts(cache, row)
    keys = ("scene", "split", "location", "description", "num_boxes", "num_lidar_points", "num_radar_points", "ego_speed_mps")
    return [f"{k:<18} {f'{v:.1f}' if isinstance(v := facts[k], float) else v}" for k in keys if k in facts]
