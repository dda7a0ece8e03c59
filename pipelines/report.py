"""``imkd report``: one page that shows runs, scores, errors and pictures, and works from a file without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import UsageError
from imkd_data.geometry import EGO, GLOBAL, Pose
from imkd_data.sample import Boxes
from pipelines.evaluate_detail import confusion, range_table
from pipelines.report_data import RunFacts, boxes_of_samples, chosen_samples, groups_of, paired_intervals, read_run
from pipelines.report_html import Page, chart, figure, number, pre, side_by_side, table, text
from pipelines.sample_view import SampleView, is_synthetic, match_boxes, read_view

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["make_report"]

ERRORS = {"trans_err": "ATE m", "scale_err": "ASE", "orient_err": "AOE rad", "vel_err": "AVE m/s", "attr_err": "AAE"}
SHOWN_SCORE = 0.25


def make_report(
    runs: Sequence[Path | tuple[str, Path]],
    out: Path,
    *,
    cache: Path | Cache | None = None,
    title: str = "imkd report",
    commands: Sequence[str] = (),
    stages: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    worst: int = 6,
    random: int = 4,
    seed: int = 0,
) -> Path:
    """Write the report of ``runs`` (folders of training or evaluation, or (name, folder) pairs) to ``out``.

    cache: gives pictures and scenes; without it the samples are listed without pictures. stages: cost rows with name,
    seconds, peak_mb, text. worst, random: numbers of samples with pictures.

    Raises:
        SourceMissingError: a folder with nothing to report. InputDataError: files that cannot be read. UsageError: ``out`` is
            a folder.
    """
    out = Path(out)
    if out.is_dir():
        raise UsageError("--out is a file, not a folder", file=str(out), next=f"--out {out}/report.html")
    facts = [read_run(r[1], r[0]) if isinstance(r, tuple) else read_run(r) for r in runs]
    opened = _open(cache)
    page = Page(title, _subtitle(facts, opened), "Made by imkd. No script, style or picture is loaded from elsewhere.")
    page.add("summary", "Summary", *(f"<p>{text(n)}</p>" for n in notes), _summary(facts))
    page.add("samples", "Samples", *_samples(facts, opened, worst, random, seed))
    page.add("classes", "Classes", *_classes(facts))
    page.add("comparison", "Comparison", _comparison(facts, _scenes(opened)))
    page.add("curves", "Precision and recall", _precision_recall(facts))
    page.add("range", "Errors against range", *_range(facts))
    page.add("confusion", "Confusion", *_confusions(facts))
    page.add("training", "Training", *(_training(f) for f in facts))
    page.add("cost", "Cost", _cost(facts, stages))
    lines = list(dict.fromkeys([*(c for f in facts for c in f.commands), *commands]))
    page.add("identity", "Identity and commands", _identity(facts, opened), pre("\n".join(lines)) if lines else "")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(page.render(), encoding="utf-8")
        return part.replace(out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _open(cache: Path | Cache | None) -> Cache | None:
    if not isinstance(cache, str | Path):
        return cache
    from imkd_data.cache.store import open_cache

    return open_cache(cache, check=False)


def _scenes(cache: Cache | None) -> dict[str, str]:
    if cache is None:
        return {}
    return dict(zip(cache.index["token"].to_pylist(), cache.index["scene"].to_pylist(), strict=True))


def _subtitle(facts: Sequence[RunFacts], cache: Cache | None) -> str:
    counts = {f.scores["num_samples"] for f in facts if "num_samples" in f.scores}
    parts = [f"{len(facts)} run{'s' if len(facts) != 1 else ''}"]
    parts += [f"{' / '.join(str(c) for c in sorted(counts))} samples scored"] if counts else []
    if cache is not None:
        parts.append(f"{cache.recipe.dataset} {cache.recipe.version}" + (" (synthetic scenes)" if is_synthetic(cache) else ""))
    return ", ".join(parts)


def _scored(facts: Sequence[RunFacts]) -> list[RunFacts]:
    return [f for f in facts if f.scores]


def _summary(facts: Sequence[RunFacts]) -> str:
    scored = _scored(facts)
    if not scored:
        return "<p>No evaluation yet: run <code>imkd evaluate</code>.</p>"
    best = max(scored, key=lambda f: f.scores["nd_score"])
    cards = [("best NDS", number(best.scores["nd_score"])), ("mAP of it", number(best.scores["mean_ap"])), ("run", best.name)]
    shown = "".join(f'<div class="card"><span class="faint">{text(k)}</span><b>{text(v)}</b></div>' for k, v in cards)
    rows = [
        [
            f.name,
            *(float(f.scores[k]) for k in ("nd_score", "mean_ap")),
            float(f.scores.get("mAP_occurring", math.nan)),
            *(float(f.scores["tp_errors"][k]) for k in ERRORS),
        ]
        for f in scored
    ]
    head = ["run", "NDS", "mAP", "mAP of occurring classes", *(f"m{v}" for v in ERRORS.values())]
    marks = dict.fromkeys((1, 2, 3), "max") | dict.fromkeys(range(4, 9), "min")
    caption = "Official nuScenes scores (detection_cvpr_2019); the best of a column is marked"
    return f'<div class="cards">{shown}</div>' + table(head, rows, caption=caption, sortable=True, best=marks)


def _classes(facts: Sequence[RunFacts]) -> list[str]:
    out = []
    for f in _scored(facts):
        counts = f.scores.get("truth_boxes", {})
        rows = [
            [name, counts.get(name), float(f.scores["mean_dist_aps"][name]), *_class_errors(f, name)]
            for name in DETECTION_CLASSES
            if name in f.scores["mean_dist_aps"]
        ]
        head = ["class", "truth boxes", "AP", *ERRORS.values()]
        out.append(f"<h3>{text(f.name)}</h3>" + table(head, rows, caption=f"{f.name}: AP and errors by class", sortable=True))
    return out


def _class_errors(facts: RunFacts, name: str) -> list[float]:
    return [float(facts.scores["label_tp_errors"][name][k]) for k in ERRORS]


def _comparison(facts: Sequence[RunFacts], scene_of: Mapping[str, str]) -> str:
    rows = [list(r) for r in paired_intervals(facts, scene_of)]
    if len(rows) < 2:
        return ""
    tokens = next(f.detail.tokens.tolist() for f in facts if f.detail is not None)
    first, unit = rows[0][0], "samples" if groups_of(tokens, scene_of) == tokens else "scenes"
    for row in rows:
        row[1:] = [
            row[1],
            f"{row[2]:.3f} to {row[3]:.3f}",
            "reference" if row is rows[0] else f"{row[4]:+.3f} to {row[5]:+.3f}",
        ]
    caption = f"95 % bootstrap intervals over {unit}, the same draws for every run; difference to {first}"
    return table(["run", "mAP (occurring)", "interval", "difference"], rows, caption=caption)


def _precision_recall(facts: Sequence[RunFacts]) -> str:
    charts = []
    for name in DETECTION_CLASSES:
        lines = {
            f.name: (f.curves[f"{name}:2.0"]["recall"], f.curves[f"{name}:2.0"]["precision"])
            for f in facts
            if f"{name}:2.0" in f.curves and f.scores.get("truth_boxes", {}).get(name, 1)
        }
        charts.append(chart(name, lines, x="recall", y="precision at 2 m", y_range=(0, 1)))
    shown = "".join(f"<figure>{c}</figure>" for c in charts if c)
    return f'<div class="charts">{shown}</div>' if shown else ""


def _range(facts: Sequence[RunFacts]) -> list[str]:
    scored = [(f.name, range_table(f.detail)) for f in facts if f.detail is not None]
    if not scored:
        return []
    middle = [5, 15, 25, 35, 45]
    names = {"found": f"share found (score {SHOWN_SCORE} or more)"} | ERRORS
    charts = [
        chart(
            label, {n: (middle, t[key].tolist()) for n, t in scored}, x="distance m", y_range=(0, 1) if key == "found" else None
        )
        for key, label in names.items()
    ]
    rows = [
        [f"{n}, {10 * i} to {10 * i + 10} m", int(t["truth"][i]), *(float(t[k][i]) for k in names)]
        for n, t in scored
        for i in range(5)
    ]
    body = "".join(f"<figure>{c}</figure>" for c in charts if c)
    caption = "Matched at 2 m by a detection of the class; errors are means over matched boxes"
    return [f'<div class="charts">{body}</div>', table(["ring", "truth", *names.values()], rows, caption=caption)]


def _pose(cache: Cache, token: str) -> Pose:
    row = cache.index["global_from_ego"][cache.line(cache.row(token))].as_py()
    return Pose.from_matrix34(GLOBAL, EGO, row)


def _samples(facts: Sequence[RunFacts], cache: Cache | None, worst: int, random: int, seed: int) -> list[str]:
    chosen = chosen_samples(facts, worst, random, seed)
    if not chosen:
        return []
    if cache is None:
        rows = [[token, kind] for token, kind in chosen]
        return ["<p>Pictures need <code>--cache</code>.</p>", table(["sample", "why"], rows, caption="Chosen samples")]
    known = set(cache.index["token"].to_pylist())
    chosen = [(t, kind) for t, kind in chosen if t in known]
    poses = {token: _pose(cache, token) for token, _ in chosen}
    found = {f.name: boxes_of_samples(f, poses) for f in facts}
    tabs, panels = [], []
    for i, (token, kind) in enumerate(chosen):
        view = read_view(cache, cache.row(token))
        boxes = {name: by_token[token] for name, by_token in found.items() if token in by_token}
        label = f"{view.scene} {token[:6]} ({kind})"
        links = f'id="tab{i}" aria-controls="panel{i}" aria-selected="false"'
        tabs.append(f'<button type="button" role="tab" {links}>{text(label)}</button>')
        panels.append(f'<div role="tabpanel" id="panel{i}" aria-labelledby="tab{i}">{_sample(view, boxes)}</div>')
    why = f"The samples on which the runs are most wrong, and {random} drawn at random (seed {seed})."
    listed = f'<div class="tabs" role="tablist" aria-label="Samples">{"".join(tabs)}</div>'
    return [f"<p>{text(why)}</p>", listed, *panels]


def _sample(view: SampleView, found: Mapping[str, Boxes]) -> str:
    from pipelines import plots

    parts = [f"<h3>{text(view.scene)}, sample {text(view.token)}</h3>"]
    if view.description:
        parts.append(f'<p class="faint">{text(view.description)}</p>')
    rows = [[name, *counts] for name, counts in ((n, _counts(view, b)) for n, b in found.items())]
    truth = 0 if view.truth is None else int((view.truth.label >= 0).sum())
    alt = f"Bird's-eye view of {view.scene}: LiDAR intensity, radar points, {truth} truth boxes"
    note = "Ahead is up. Green: truth; dotted: motion in one second."
    seen = []
    for (name, boxes), row in zip(found.items(), rows, strict=True):
        drawn = plots.encode(plots.side_by_side(view, {name: boxes}), "webp")
        words = f"{alt}. {name}: {row[1]} found, {row[2]} missed, {row[3]} without truth"
        seen.append(figure(drawn, "webp", words, f"{name}. {note}"))
    parts.append(side_by_side(seen or [figure(plots.encode(plots.bev_picture(view), "webp"), "webp", alt, note)]))
    if view.cameras:
        last = list(found)[-1] if found else ""
        shown = view.with_found(**{last: found[last]}) if last else view
        names = ", ".join(c.camera.name for c in view.cameras)
        alt = f"Camera images {names} of {view.scene} with LiDAR depth, truth boxes and boxes of {last or 'no run'}"
        caption = f"Truth (green), {last or 'no run'} (orange), LiDAR depth (near red, far blue)"
        parts.append(figure(plots.encode(plots.camera_picture(shown), "webp", 74), "webp", alt, caption, wide=True))
    if rows:
        head = ["run", "found", "missed", "without truth", "mean distance m"]
        parts.append(table(head, rows, caption=f"Boxes with a score of {SHOWN_SCORE} or more, matched within 2 m"))
    return "\n".join(parts)


def _counts(view: SampleView, boxes: Boxes) -> tuple[int, int, int, float]:
    """Found, missed, without truth, mean distance of the found ones; ranges of the official metric are not applied."""
    if view.truth is None:
        return 0, 0, int((boxes.score >= SHOWN_SCORE).sum()), math.nan
    seen = view.truth.has_point & (view.truth.label >= 0)
    sure = np.flatnonzero(boxes.score >= SHOWN_SCORE)
    match = match_boxes(view.truth, boxes)
    hit = seen & (match >= 0) & np.isin(match, sure)
    step = view.truth.centre_m[hit, :2] - boxes.centre_m[match[hit], :2]
    mean = float(np.linalg.norm(step, axis=1).mean()) if hit.any() else math.nan
    return int(hit.sum()), int(seen.sum() - hit.sum()), int(len(sure) - np.isin(sure, match).sum()), mean


def _confusions(facts: Sequence[RunFacts]) -> list[str]:
    out = []
    for f in facts:
        if f.detail is not None:
            counts = confusion(f.detail)
            rows = [[name, *(int(v) for v in counts[i])] for i, name in enumerate(DETECTION_CLASSES) if counts[i].any()]
            head = ["truth", *(n.replace("_", " ") for n in DETECTION_CLASSES), "nothing"]
            caption = f"{f.name}: class of the confident detection at a truth box, whatever its class, within 2 m"
            out.append(table(head, rows, caption=caption))
    return out


_NOT_LOSSES = ("step", "epoch", "lr", "grad_norm", "samples_per_s", "data_wait", "time", "loss")


def _number(entry: Mapping[str, Any], name: str, absent: float = math.nan) -> float:
    """A number of a log line; ``absent`` where it has none of that name."""
    value = entry.get(name)
    return float(value) if isinstance(value, int | float) else absent


def _training(facts: RunFacts) -> str:
    if len(facts.log) < 2:
        return ""
    steps = [float(e["step"]) for e in facts.log]

    def line(name: str) -> tuple[list[float], list[float]]:
        return steps, [_number(e, name) for e in facts.log]

    terms = [k for k, v in facts.log[-1].items() if k not in _NOT_LOSSES and isinstance(v, float)]
    charts = [chart("loss", {"loss": line("loss")}, x="step")]
    charts += [chart("loss terms", {t: line(t) for t in terms[:9]}, x="step")] if len(terms) > 1 else []
    charts += [chart("learning rate", {"lr": line("lr")}, x="step"), chart("data wait", {"share": line("data_wait")}, x="step")]
    body = "".join(f"<figure>{c}</figure>" for c in charts if c)
    return f'<h3>{text(facts.name)}</h3><div class="charts">{body}</div>'


def _cost(facts: Sequence[RunFacts], stages: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if stages:
        cost = [(float(s["seconds"]), float(s.get("peak_mb", math.nan))) for s in stages]
        listed: list[list[Any]] = [[str(s["name"]), *c, str(s.get("text", ""))] for s, c in zip(stages, cost, strict=True)]
        listed.append(["all", sum(c[0] for c in cost), max(c[1] for c in cost), ""])
        parts.append(table(["stage", "seconds", "peak memory MB", ""], listed, caption="Stages", digits=1, text_columns=(3,)))
    rows = []
    for f in facts:
        if f.log:
            wait = np.mean([_number(e, "data_wait") for e in f.log])
            rate = np.median([_number(e, "samples_per_s") for e in f.log])
            hours = (_number(f.log[-1], "time", 0.0) - _number(f.log[0], "time", 0.0)) / 3600
            rows.append([f.name, int(f.log[-1]["step"]), float(rate), float(100 * wait), float(hours)])
    if rows:
        head = ["run", "steps", "samples/s", "data wait %", "hours between first and last log line"]
        parts.append(table(head, rows, caption="Training", digits=2))
    times = [[f.name, float(f.scores["eval_time"]), str(f.scores.get("engine", ""))] for f in _scored(facts)]
    if times:
        parts.append(table(["run", "seconds", "engine"], times, caption="Computing the metric", digits=1))
    return "".join(parts)


def _identity(facts: Sequence[RunFacts], cache: Cache | None) -> str:
    rows: list[list[str]] = []
    if cache is not None:
        splits = ", ".join(dict.fromkeys(cache.index["split"].to_pylist()))
        rows.append(["cache", f"{cache.id} ({len(cache)} samples; {splits}; {', '.join(cache.recipe.sensors)})"])
    for f in facts:
        values = {"folder": f.folder.name, "evaluation": f.scores.get("checkpoint"), "scored cache": f.scores.get("cache")}
        values |= {k: f.meta.get(k) for k in ("name", "method", "step", "weights_sha256", "software")}
        rows += [[f"{f.name}: {k}", _short(v)] for k, v in values.items() if v not in (None, "", {})]
        rows += [[f"{f.name}: warning", str(line)] for line in f.meta.get("warnings") or ()]
        run = f.meta.get("run")
        if isinstance(run, Mapping):
            rows.append([f"{f.name}: settings", _short({k: v for k, v in run.items() if k not in ("model", "stages")}, 1200)])
    return (
        table(["what", "value"], rows, caption="Which weights, which data, which settings", text_columns=(1,)) if rows else ""
    )


def _short(value: Any, limit: int = 300) -> str:
    import json

    shown = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return shown if len(shown) <= limit else shown[:limit] + " ..."
