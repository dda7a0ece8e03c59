"""``imkd evaluate --robustness``: the same weights under weather, range, lost sensors and time lag. Nothing is retrained.

Draws are fixed (seed, condition, draw), so two runs lose the same cameras on the same samples. Weather and range rows reuse
the plain predictions; the others predict again. Scores come from the fast engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.classes import CLASS_RANGE_M
from imkd_data.errors import UsageError
from pipelines.evaluate_fast import EvalTable, fast_metrics, filter_table, occurring_mean
from pipelines.evaluate_tables import TableBuilder, Truth, read_truth, truth_counts
from pipelines.predict import model_sensors, predict_rows, stream_options
from pipelines.submission import boxes_to_results

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from imkd_data.loader.batch import Batch

__all__ = ["CONDITIONS", "Condition", "Row", "robustness", "robustness_text", "weather_of"]

DRAWS = 5
RINGS_M = ((0.0, 20.0), (20.0, 30.0), (30.0, 50.0))
Change = Callable[["Batch"], "Batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One line of the table.

    weather: only these samples. ring_m, far: range limits of the scored boxes. cameras, radars: how many are lost.
    radar_sweeps: newest scans that are left. history, radar_late, camera_late: what happens to time.
    """

    name: str
    group: str
    weather: str = ""
    ring_m: tuple[float, float] | None = None
    far: bool = False
    cameras: int = 0
    radars: int = 0
    radar_sweeps: int = 0
    history: str = ""  # older | none
    radar_late: bool = False
    camera_late: bool = False

    @property
    def predicts(self) -> bool:
        """Whether the network has to run again."""
        return bool(self.cameras or self.radars or self.radar_sweeps or self.history or self.radar_late or self.camera_late)


CONDITIONS: tuple[Condition, ...] = (
    Condition(name="all samples", group="plain"),
    *(Condition(name=w, group="weather", weather=w) for w in ("day, dry", "rain", "night")),
    *(Condition(name=f"{a:.0f} to {b:.0f} m", group="range", ring_m=(a, b)) for a, b in RINGS_M),
    Condition(name="far: doubled ranges", group="range", far=True),
    *(Condition(name=f"{n} of the cameras lost", group="sensors", cameras=n) for n in (1, 3, 6)),
    *(Condition(name=f"{n} of the radars lost", group="sensors", radars=n) for n in (1, 3, 5)),
    Condition(name="past keyframes two older", group="time", history="older"),
    Condition(name="no past keyframes", group="time", history="none"),
    *(Condition(name=f"radar: {n} sweep{'s' * (n > 1)}", group="time", radar_sweeps=n) for n in (3, 1)),
    Condition(name="radar one keyframe late", group="time", radar_late=True),
    Condition(name="cameras one sweep late", group="time", camera_late=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A condition's scores for one run; spread: smallest and largest NDS over the draws. why: reason of a missing row."""

    condition: str
    group: str
    run: str
    num_samples: int = 0
    nds: float = float("nan")
    mean_ap: float = float("nan")
    occurring: float = float("nan")
    spread: tuple[float, float] | None = None
    why: str = ""


def weather_of(description: str) -> frozenset[str]:
    """nuScenes says weather and light in a scene's description: rain, night, else "day, dry"."""
    words = description.lower()
    found = {w for w in ("rain", "night") if w in words}
    if "after rain" in words and words.count("rain") == 1:
        found.discard("rain")
    return frozenset(found or {"day, dry"})


# ----------------------------------------------------------------------------------------------------- changed batches


def _lost(seed: int, draw: int, number: int, count: int, kind: str) -> list[int]:
    """Which sensors are lost: the same for every run and sample of a draw."""
    rng = np.random.Generator(np.random.Philox(key=[seed, draw * 64 + number * 8 + (kind == "radar")]))
    return sorted(int(i) for i in rng.permutation(count)[:number])


def without_cameras(batch: Batch, lost: Sequence[int]) -> Batch:
    """Zero images after normalisation: what a network sees when a cable is out."""
    assert batch.images_BTVCHW is not None
    images = batch.images_BTVCHW.clone()
    images[:, :, list(lost)] = 0
    return replace(batch, images_BTVCHW=images)


def without_radars(batch: Batch, lost: Sequence[int]) -> Batch:
    """No points of these radars. The last radar feature must be the sensor number; it is taken away here."""
    import torch

    points = batch.radar
    assert points is not None and points.feature_names[-1] == "sensor"
    gone = torch.isin(points.features_NF[:, -1].round().long(), torch.tensor(list(lost), device=points.features_NF.device))
    return replace(batch, radar=_radar_where(points, ~gone, last=False))


def _radar_where(points: Any, keep: Any, last: bool = True) -> Any:
    columns = points.features_NF.shape[1] - (0 if last else 1)
    return replace(
        points,
        xyz_m=points.xyz_m[keep],
        features_NF=points.features_NF[keep][:, :columns].contiguous(),
        feature_names=points.feature_names[:columns],
        batch_index=points.batch_index[keep],
        time_index=points.time_index[keep],
        age_s=points.age_s[keep],
        velocity_mps=None if points.velocity_mps is None else points.velocity_mps[keep],
    )


def without_history(batch: Batch) -> Batch:
    """Every past slot repeats the current keyframe."""
    import torch

    slots = batch.history_valid_BT.shape[1] if batch.history_valid_BT is not None else 1
    changes: dict[str, Any] = {}
    for name in ("images_BTVCHW", "image_from_camera_BTV33", "bev_from_camera_BTV44"):
        value = getattr(batch, name)
        if value is not None:
            changes[name] = value[:, :1].expand(-1, slots, *value.shape[2:]).contiguous()
    if batch.radar is not None and slots > 1:
        now = _radar_where(batch.radar, batch.radar.time_index == 0)
        copies = [replace(now, time_index=torch.full_like(now.time_index, t)) for t in range(slots)]
        joined = {
            name: None if getattr(now, name) is None else torch.cat([getattr(c, name) for c in copies])
            for name in ("xyz_m", "features_NF", "batch_index", "time_index", "age_s", "velocity_mps")
        }
        changes["radar"] = replace(now, **joined)
    return replace(batch, **changes)


def with_late_radar(batch: Batch, slots: int) -> Batch:
    """Slot t gets the radar of slot t + slots, which the stream was asked for: one keyframe older. The car's own motion is
    known, so places are right; what moved meanwhile is not. The clip's first keyframe has no radar."""
    points = batch.radar
    assert points is not None
    late = _radar_where(points, points.time_index >= slots)
    changes: dict[str, Any] = {"radar": replace(late, time_index=late.time_index - slots)}
    for name in ("images_BTVCHW", "image_from_camera_BTV33", "bev_from_camera_BTV44", "history_valid_BT"):
        value = getattr(batch, name)
        if value is not None:
            changes[name] = value[:, :slots].contiguous()
    return replace(batch, **changes)


# --------------------------------------------------------------------------------------------------------------- running


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
    plain: EvalTable | None = field(default=None)

    def predict(self, change: Change | None = None, rows: np.ndarray | None = None, **overrides: Any) -> EvalTable:
        builder = TableBuilder()
        number = {token: i for i, token in enumerate(self.truth.tokens)}
        found = predict_rows(
            self.model,
            self.cache,
            self.rows if rows is None else rows,
            self.meta,
            device=self.device,
            batch_size=self.batch_size,
            change=change,
            **overrides,
        )
        for p in found:
            builder.add(number[p.token], boxes_to_results(p.token, p.boxes, p.global_from_ego))
        return builder.table(len(self.truth.tokens), self.truth.ego_xy_m)

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


def _why_not(bench: _Bench, c: Condition) -> str:
    """Why a condition cannot be shown for this run; '' if it can."""
    sensors, history = model_sensors(bench.model), stream_options(bench.model, bench.meta)["history"]
    cameras = [n for n in bench.cache.suite.cameras if n in bench.cache.recipe.sensors]
    radars = [n for n in bench.cache.suite.radars if n in bench.cache.recipe.sensors]
    if c.weather and not any(c.weather in w for w in bench.weather):
        return "no such scene in this split"
    if (c.cameras or c.camera_late) and "camera" not in sensors:
        return "the network has no camera"
    if (c.radars or c.radar_sweeps or c.radar_late) and "radar" not in sensors:
        return "the network has no radar"
    if c.cameras > len(cameras) or c.radars > len(radars):
        return f"the cache has {len(cameras)} cameras and {len(radars)} radars"
    if c.history and len(history) < 2:
        return "the network uses no past keyframes"
    if c.camera_late:
        if bench.dataroot is None:
            return "camera sweeps are read from the data set: give --dataroot"
        from pipelines.robustness_late import why_no_sweeps

        return why_no_sweeps(bench.dataroot, bench.cache)
    return ""


def _variants(bench: _Bench, c: Condition) -> Iterable[EvalTable]:
    """Predictions of a condition, one table per draw."""
    options = stream_options(bench.model, bench.meta)
    history, features = tuple(options["history"]), tuple(options.get("radar_features", ("rcs_dbsm",)))
    suite = bench.cache.suite
    if c.cameras:
        count = sum(n in bench.cache.recipe.sensors for n in suite.cameras)
        for draw in range(1 if c.cameras == count else DRAWS):
            lost = _lost(bench.seed, draw, c.cameras, count, "camera")
            yield bench.predict(lambda b, lost=lost: without_cameras(b, lost))  # type: ignore[misc]
    elif c.radars:
        present = [i for i, n in enumerate(suite.radars) if n in bench.cache.recipe.sensors]
        for draw in range(1 if c.radars == len(present) else DRAWS):
            lost = [present[i] for i in _lost(bench.seed, draw, c.radars, len(present), "radar")]
            yield bench.predict(lambda b, lost=lost: without_radars(b, lost), radar_features=(*features, "sensor"))  # type: ignore[misc]
    elif c.radar_sweeps:
        yield bench.predict(radar_sweeps=c.radar_sweeps)
    elif c.history == "older":
        yield bench.predict(history=tuple(0 if o == 0 else o - 2 for o in history))
    elif c.history == "none":
        yield bench.predict(without_history)
    elif c.radar_late:
        slots = len(history)
        yield bench.predict(lambda b: with_late_radar(b, slots), history=(*history, *(o - 1 for o in history)))
    elif c.camera_late:
        from pipelines.robustness_late import late_cameras

        assert bench.dataroot is not None
        yield bench.predict(late_cameras(bench.dataroot, bench.cache, options["image_hw_px"]))


def _row(bench: _Bench, c: Condition) -> Row:
    base: dict[str, Any] = {"condition": c.name, "group": c.group, "run": bench.name}
    if why := _why_not(bench, c):
        return Row(**base, why=why)
    if not c.predicts:
        if bench.plain is None:
            bench.plain = bench.predict()
        nds, mean_ap, occurring, samples = bench.score(bench.plain, c)
        return Row(**base, num_samples=samples, nds=nds, mean_ap=mean_ap, occurring=occurring)
    scores = [bench.score(table, c) for table in _variants(bench, c)]
    nds, mean_ap, occurring = (float(np.mean([s[i] for s in scores])) for i in range(3))
    spread = (min(s[0] for s in scores), max(s[0] for s in scores)) if len(scores) > 1 else None
    return Row(**base, num_samples=scores[0][3], nds=nds, mean_ap=mean_ap, occurring=occurring, spread=spread)


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
    progress: Callable[[str, str], None] | None = None,
) -> list[Row]:
    """Score several checkpoints under every condition; writes ``robustness.json`` and ``robustness.md`` to ``out``.

    The first checkpoint is the one the others stand beside (the plain student). dataroot: the tree whose tables hold the
    truth; with read_sweeps also its camera sweeps are read. progress(run, condition) is called before each row.
    """
    from imkd_data import open_cache
    from imkd_models.checkpoint import load_model
    from pipelines.evaluate import ego_places, scored_rows

    if not checkpoints:
        raise UsageError("no checkpoint to score")
    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    rows = scored_rows(opened, split)
    tokens = [opened.token(int(r)) for r in rows]
    places = ego_places(opened, rows)
    truth = read_truth(Path(dataroot), opened.recipe.version, tokens, ego_xy_m=places, channel=opened.recipe.reference_channel)
    said = opened.index["description"].to_pylist()
    weather = [weather_of(said[opened.line(int(r))] or "") for r in rows]
    table: list[Row] = []
    for name, path in checkpoints.items():
        model, meta = load_model(path, device)
        if name != next(iter(checkpoints)) and "lidar" in model_sensors(model):
            raise UsageError("robustness rows are for networks that run without LiDAR", found=name)
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
        for condition in conditions:
            if progress is not None:
                progress(name, condition.name)
            table.append(_row(bench, condition))
    Path(out).mkdir(parents=True, exist_ok=True)
    plain = [{k: getattr(r, k) for k in Row.__dataclass_fields__} for r in table]
    safe = json.loads(json.dumps(plain), parse_constant=lambda _: None)
    (Path(out) / "robustness.json").write_text(
        json.dumps({"v": 1, "cache": opened.id, "seed": seed, "rows": safe}, indent=1) + "\n"
    )
    (Path(out) / "robustness.md").write_text(robustness_text(table, synthetic=is_synthetic(opened)) + "\n")
    return table


def is_synthetic(cache: Cache) -> bool:
    """Whether the scenes come from `imkd-data synth`, whose logs say so."""
    return any(str(place or "").startswith("synthetic") for place in set(cache.index["location"].to_pylist()))


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
