"""``imkd evaluate --robustness``: the same weights under weather, range, lost sensors and time lag. Nothing is retrained.

Weather and range rows score the plain predictions; the others run the network again, several conditions on one reading of the
samples. A finished row is kept (``robustness_store``), so the same command goes on after a stop. Scores are the fast engine's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.classes import CLASS_RANGE_M
from imkd_data.errors import UsageError
from imkd_data.recipe import canonical_json
from pipelines.evaluate_fast import EvalTable, fast_metrics, filter_table, occurring_mean
from pipelines.evaluate_tables import TableBuilder, Truth, read_truth, truth_counts
from pipelines.predict import model_sensors, predict_variants, stream_options
from pipelines.robustness_conditions import CONDITIONS, Change, Condition, Variant, variants, weather_of
from pipelines.robustness_store import Row, Store, truth_hash
from pipelines.sample_view import is_synthetic
from pipelines.submission import MAX_BOXES_PER_SAMPLE, boxes_to_results

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["CONDITIONS", "Condition", "Row", "robustness", "robustness_text"]

MOST_AT_ONCE = 6  # variants on one reading: a sixth of its cost each, and a stop loses no more than these
MEMORY = 1 << 30  # bytes of predicted boxes that may wait for their score
_BOX_BYTES = 150


@dataclass(slots=True, kw_only=True)
class _Bench:
    """One run on one set of rows: predictions by condition, scored against one truth."""

    name: str
    model: Any
    meta: Mapping[str, Any]
    cache: Cache
    rows: np.ndarray
    truth: Truth
    weather: list[frozenset[str]]
    dataroot: Path | None
    device: str
    batch_size: int
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """What the network's stream is asked for."""
        return stream_options(self.model, self.meta)

    def identity(self) -> dict[str, Any]:
        """The network, and how it is fed."""
        stream = {k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in self.options.items()}
        asked = canonical_json({"model": self.meta.get("model"), "stream": stream})
        return {"weights_sha256": self.meta["weights_sha256"], "model_and_stream": sha256(asked).hexdigest()}

    def predict(self, group: Sequence[Variant]) -> list[EvalTable]:
        """Boxes of every variant of a group, which share their stream."""
        builders = [TableBuilder() for _ in group]
        number = {token: i for i, token in enumerate(self.truth.tokens)}
        found = predict_variants(
            self.model,
            self.cache,
            self.rows,
            self.meta,
            [v.change for v in group],
            device=self.device,
            batch_size=self.batch_size,
            **group[0].overrides,
        )
        for k, p in found:
            builders[k].add(number[p.token], boxes_to_results(p.token, p.boxes, p.global_from_ego))
        return [b.table(len(self.truth.tokens), self.truth.ego_xy_m) for b in builders]

    def score(self, found: EvalTable, condition: Condition) -> tuple[float, float, float, int]:
        """NDS, mAP, mAP of occurring classes, samples."""
        limit = {c: r * (2 if condition.far else 1) for c, r in CLASS_RANGE_M.items()}
        nearest = 0.0
        if condition.ring_m is not None:
            nearest, farthest = condition.ring_m
            limit = {c: min(r, farthest) for c, r in limit.items()}
        wanted = [i for i, w in enumerate(self.weather) if not condition.weather or condition.weather in w]
        sides = []
        for table in (self.truth.boxes, found):
            kept = filter_table(table, limit, self.truth.bike_racks, nearest)
            sides.append(kept.where(np.isin(kept.sample, wanted)))
        summary, _ = fast_metrics(sides[0], sides[1])
        occurring, _ = occurring_mean(summary["mean_dist_aps"], truth_counts(sides[0]))
        return summary["nd_score"], summary["mean_ap"], occurring, len(wanted)

    def late_cameras(self) -> Change:
        """The change to camera images one sweep earlier, read from the data set."""
        from pipelines.robustness_late import late_cameras

        assert self.dataroot is not None
        return late_cameras(self.dataroot, self.cache, self.options["image_hw_px"], self.options["augment"])


def _why_not(bench: _Bench, c: Condition) -> str:
    """Why a condition cannot be shown for this run; '' if it can."""
    sensors, options = model_sensors(bench.model), bench.options
    cameras = [n for n in bench.cache.suite.cameras if n in bench.cache.recipe.sensors]
    radars = [n for n in bench.cache.suite.radars if n in bench.cache.recipe.sensors]
    read = options.get("radar_sweeps") or bench.cache.recipe.radar_sweeps
    if c.weather and not any(c.weather in w for w in bench.weather):
        return "no such scene in this split"
    if (c.cameras or c.camera_late) and "camera" not in sensors:
        return "the network has no camera"
    if (c.radars or c.radar_sweeps or c.radar_late) and "radar" not in sensors:
        return "the network has no radar"
    if c.cameras > len(cameras) or c.radars > len(radars):
        return f"the cache has {len(cameras)} cameras and {len(radars)} radars"
    if 0 < read <= c.radar_sweeps:
        return f"the network reads {read} sweep{'s' * (read > 1)} as it is"
    if c.history and len(options["history"]) < 2:
        return "the network uses no past keyframes"
    if c.camera_late:
        if bench.dataroot is None:
            return "camera sweeps are read from the data set: give --dataroot"
        from pipelines.robustness_late import why_no_sweeps

        return why_no_sweeps(bench.dataroot, bench.cache)
    return ""


def _groups(wanted: Sequence[Variant], samples: int) -> Iterator[list[Variant]]:
    """Variants of one stream, as many as share a reading."""
    at_once = int(np.clip(MEMORY // (max(1, samples) * MAX_BOXES_PER_SAMPLE * _BOX_BYTES), 1, MOST_AT_ONCE))
    streams: dict[str, list[Variant]] = {}
    for variant in wanted:
        streams.setdefault(repr(sorted(variant.overrides.items())), []).append(variant)
    for same in streams.values():
        for first in range(0, len(same), at_once):
            yield same[first : first + at_once]


def _rows(bench: _Bench, conditions: Sequence[Condition], store: Store, tell: Callable[[str], None]) -> list[Row]:
    """A network's rows in the order of the conditions: read where they are finished, else computed and kept."""
    done: dict[Condition, Row] = {}
    for c in conditions:
        if why := _why_not(bench, c):  # not kept: it costs nothing, and the next call may be able to
            done[c] = Row(condition=c.name, group=c.group, run=bench.name, why=why)
        elif (kept := store.load(asdict(c), bench.name)) is not None:
            done[c] = kept
    if known := sum(not r.why for r in done.values()):
        tell(f"{known} of {len(conditions)} conditions are there already")
    todo = [c for c in conditions if c not in done]
    plain = [c for c in todo if not c.predicts]
    wanted = [v for c in [*plain[:1], *(c for c in todo if c.predicts)] for v in _variants(bench, c)]
    open_draws = {c: sum(v.condition == c for v in wanted) for c in todo}
    scores: dict[Condition, list[tuple[float, float, float, int]]] = {c: [] for c in todo}
    for group in _groups(wanted, len(bench.rows)):
        tell(", ".join(dict.fromkeys(v.condition.name if v.condition.predicts else CONDITIONS[0].name for v in group)))
        for variant, table in zip(group, bench.predict(group), strict=True):
            for c in plain if not variant.condition.predicts else [variant.condition]:
                scores[c].append(bench.score(table, c))
                if len(scores[c]) >= open_draws[c]:
                    done[c] = _row(bench.name, c, scores[c])
                    store.save(asdict(c), done[c])
    return [done[c] for c in conditions]


def _variants(bench: _Bench, c: Condition) -> list[Variant]:
    return variants(c, bench.cache, bench.options, bench.seed, bench.late_cameras)


def _row(run: str, c: Condition, scores: Sequence[tuple[float, float, float, int]]) -> Row:
    nds, mean_ap, occurring = (float(np.mean([s[i] for s in scores])) for i in range(3))
    spread = (min(s[0] for s in scores), max(s[0] for s in scores)) if len(scores) > 1 else None
    facts = {"num_samples": scores[0][3], "nds": nds, "mean_ap": mean_ap, "occurring": occurring, "spread": spread}
    return Row(condition=c.name, group=c.group, run=run, **facts)  # type: ignore[arg-type]


def robustness(
    checkpoints: Mapping[str, Path],
    cache: Path | Cache,
    out: Path,
    *,
    dataroot: Path,
    split: str | None = None,
    conditions: Sequence[Condition] = CONDITIONS,
    device: str = "cpu",
    batch_size: int = 1,
    seed: int = 0,
    read_sweeps: bool = True,
    command: str = "",
    progress: Callable[[str, str], None] | None = None,
) -> list[Row]:
    """Score several checkpoints under every condition; writes ``robustness.json`` and ``robustness.md`` to ``out``.

    The first checkpoint is the one the others stand beside (the plain student). dataroot: the tree whose tables hold the
    truth; with read_sweeps also its camera sweeps are read. Finished rows stand in ``out/conditions`` and are not computed
    again for the same weights, cache, samples, truth, seed, batch size and kind of device. command: is printed under the
    table. progress(run, text) is called before each reading of the samples.

    Raises:
        UsageError: no checkpoint, or one that reads LiDAR. SourceMissingError: no such tree or checkpoint.
    """
    from imkd_data import open_cache
    from imkd_models.checkpoint import load_model
    from pipelines.evaluate import ego_places, scored_rows

    if not checkpoints:
        raise UsageError("no checkpoint to score")
    networks = {name: load_model(path, device) for name, path in checkpoints.items()}
    for name, (model, _) in networks.items():
        if "lidar" in model_sensors(model):
            raise UsageError("robustness rows are for networks that run without LiDAR", found=name)
    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    rows = scored_rows(opened, split)
    tokens = [opened.token(int(r)) for r in rows]
    places = ego_places(opened, rows)
    truth = read_truth(Path(dataroot), opened.recipe.version, tokens, ego_xy_m=places, channel=opened.recipe.reference_channel)
    said = opened.index["description"].to_pylist()
    weather = [weather_of(said[opened.line(int(r))] or "") for r in rows]
    settings = {"cache": opened.id, "truth": truth_hash(truth), "weather": [sorted(w) for w in weather], "seed": seed}
    settings |= {"batch_size": batch_size, "device": device.split(":")[0]}
    settings["weather"] = sha256(canonical_json(settings["weather"])).hexdigest()
    table: list[Row] = []
    for name, (model, meta) in networks.items():
        bench = _Bench(
            name=name,
            model=model,
            meta=meta,
            cache=opened,
            rows=rows,
            truth=truth,
            weather=weather,
            dataroot=Path(dataroot) if read_sweeps else None,
            device=device,
            batch_size=batch_size,
            seed=seed,
        )

        def tell(text: str, name: str = name) -> None:
            if progress is not None:
                progress(name, text)

        table += _rows(bench, conditions, Store(out, bench.identity(), settings), tell)
    weights = {name: meta["weights_sha256"] for name, (_, meta) in networks.items()}
    facts = {"v": 2, "cache": opened.id, "seed": seed, "networks": weights, "rows": [r.as_dict() for r in table]}
    text = robustness_text(table, synthetic=is_synthetic(opened)) + (f"\n\n```\n{command}\n```" if command else "")
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, content in (("robustness.json", json.dumps(facts, indent=1, allow_nan=False)), ("robustness.md", text)):
        part = Path(out) / f".{name}.{os.getpid()}"
        part.write_text(content + "\n", encoding="utf-8")
        part.replace(Path(out) / name)
    return table


def robustness_text(rows: Sequence[Row], *, synthetic: bool = False) -> str:
    """The table as Markdown: a line per condition, a column per run: NDS, its change, mAP."""
    runs = list(dict.fromkeys(r.run for r in rows))
    base = {r.run: r.nds for r in rows if r.condition == CONDITIONS[0].name}
    out = []
    if synthetic:
        out += ["A test of the code on synthetic scenes; it is no evidence about roads.", ""]
    out += [
        "| condition | samples | " + " | ".join(f"{n}: NDS (change), mAP" for n in runs) + " |",
        "|---|---|" + "---|" * len(runs),
    ]
    for name in dict.fromkeys(r.condition for r in rows):
        by_run = {r.run: r for r in rows if r.condition == name}
        count = max(r.num_samples for r in by_run.values())
        cells = [_cell(by_run[n], base.get(n, float("nan"))) if n in by_run else "" for n in runs]
        out.append(f"| {name} | {count or '–'} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _cell(row: Row, base: float) -> str:
    if row.why:
        return row.why
    change = "" if row.condition == CONDITIONS[0].name or np.isnan(base) else f" ({row.nds - base:+.3f})"
    spread = f" [{row.spread[0]:.3f}..{row.spread[1]:.3f}]" if row.spread else ""
    return f"{row.nds:.3f}{change}{spread}, {row.mean_ap:.3f}"
