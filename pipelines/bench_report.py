"""The benchmark's figures: admission test, spread, paired gains with two intervals, costs; written as JSON and, by
``pipelines.bench_table``, as Markdown."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from imkd_data.recipe import canonical_json
from pipelines.bench_presets import PUBLISHED_GAIN_NDS
from pipelines.bench_printed import Printed, joined, read_printed
from pipelines.bench_rows import all_rows
from pipelines.bench_statistics import F64, SceneMatches, holm, paired_t, scene_bootstrap, scene_draws, smallest_detectable
from pipelines.bench_table import markdown

__all__ = ["SCENE_DRAWS", "admission_test", "write_report"]

Score = Mapping[str, Any]
MIN_TEACHER_GAP, PLAIN_RANGE, MAX_DETECTABLE = 8.0, (25.0, 65.0), 2.0
MIN_SEEDS = 6
SCENE_DRAWS = 400


def _by_row(scores: Sequence[Score]) -> dict[str, dict[int, Score]]:
    out: dict[str, dict[int, Score]] = defaultdict(dict)
    for score in scores:
        if "nds" in score:
            out[score["row"]][int(score["seed"])] = score
    return out


def _mean(rows: Mapping[int, Score], key: str = "nds") -> float:
    return float(np.mean([s[key] for s in rows.values()])) if rows else math.nan


def _compared_teacher(rows: Mapping[str, Mapping[int, Score]], name: str = "lidar") -> Mapping[int, Score]:
    """Scores of a teacher, where they are of the plain student's samples: a borrowed one may have been scored on another
    cache, or on other scenes of it."""
    teacher, plain = rows.get(f"teacher_{name}", {}), rows.get("plain", {})

    def samples(score: Score) -> tuple[Any, Any]:
        asked = score.get("asked", {})
        return asked.get("cache"), asked.get("run", {}).get("loader", {}).get("leave_out", 0)

    known = {samples(s) for s in plain.values()}
    return {seed: s for seed, s in teacher.items() if not known or samples(s) in known}


def admission_test(scores: Sequence[Score]) -> dict[str, Any]:
    """Is this world and preset fit to tell methods apart? Judged on baselines and teachers alone, before any method."""
    rows = _by_row(scores)
    plain, teacher = rows.get("plain", {}), _compared_teacher(rows)
    first = plain[min(plain)] if plain else None
    base = first["nds"] if first else math.nan
    gap = _mean(teacher) - base
    camera, radar = _mean(rows.get("camera_only", {})), _mean(rows.get("radar_only", {}))
    rings = [r["map"] for r in first["map_by_range"]] if first else []
    rings = [r for r in rings if not math.isnan(r)]
    low, high = PLAIN_RANGE
    checks = [
        ("teacher above plain, NDS", gap, f">= {MIN_TEACHER_GAP}", gap >= MIN_TEACHER_GAP),
        ("plain student, NDS", base, f"{low} to {high}", low <= base <= high),
        ("camera+radar above camera only, NDS", base - camera, "> 0", base > camera),
        ("camera+radar above radar only, NDS", base - radar, "> 0", base > radar),
        (
            "mAP falls with range",
            " > ".join(f"{r:.1f}" for r in rings),
            "falling",
            len(rings) > 1 and all(a > b for a, b in pairwise(rings)),
        ),
    ]
    listed = [
        {"name": n, "found": f if isinstance(f, str) else _number(f), "wanted": w, "passed": bool(ok)} for n, f, w, ok in checks
    ]
    return {"passed": all(c["passed"] for c in listed), "checks": listed}


def _headroom(rows: Mapping[str, Mapping[int, Score]], run: Score) -> float:
    """Lead over the plain student of the teacher that a run learnt from: LiDAR-camera where it was given, else LiDAR; NaN where
    none taught."""
    given = run.get("asked", {}).get("teachers", {})
    if not given or run["kind"] == "at test":
        return math.nan
    name = "fusion" if "fusion" in given else "lidar"
    return _mean(_compared_teacher(rows, name)) - _mean(rows.get("plain", {}))


def _number(value: float, digits: int = 3) -> float | None:
    return None if math.isnan(value) else round(value, digits)


def _spread(rows: Mapping[str, Mapping[int, Score]]) -> dict[str, Any]:
    """Seed spread of the plain student and what it lets the benchmark find with as many seeds as every finished row of the
    main table has (where none is finished, every row that was begun). Differences of two runs are taken as independent (square
    root of 2), which pairing can only improve."""
    values = [s["nds"] for s in rows.get("plain", {}).values()]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    begun = [len(rows[r]) for m in PUBLISHED_GAIN_NDS for r in (m, f"{m}_twin") if rows.get(r)]
    compared = min([len(values), *([n for n in begun if n >= MIN_SEEDS] or begun)])
    found = smallest_detectable(math.sqrt(2) * spread, compared) if compared > 1 else math.nan
    return {
        "seeds": len(values),
        "seeds_compared": compared,
        "compared_rows": "finished" if any(n >= MIN_SEEDS for n in begun) else "begun",
        "mean_nds": _number(float(np.mean(values))) if values else None,
        "spread_nds": _number(spread),
        "smallest_detectable_gain_nds": _number(found),
        "fine_enough": bool(found <= MAX_DETECTABLE),
    }


def _unfinished(rows: Mapping[str, Mapping[int, Score]]) -> list[str]:
    """Rows that lack seeds, without which nothing may be claimed from them."""
    wanted = ("plain", *(row for name in PUBLISHED_GAIN_NDS for row in (name, f"{name}_twin")))
    return [f"{row}: {have} of {MIN_SEEDS} seeds" for row in wanted if (have := len(rows.get(row, {}))) < MIN_SEEDS]


def _unfit(rows: Mapping[str, Mapping[int, Score]], admission: Mapping[str, Any], spread: Mapping[str, Any]) -> list[str]:
    """Why world or preset carry no claim at all."""
    out = [] if admission["passed"] else ["the admission test is not passed"]
    if len(rows.get("plain", {})) >= MIN_SEEDS and not spread["fine_enough"]:
        out.append(f"the smallest detectable gain, by the plain student's spread, is above {MAX_DETECTABLE:g} NDS")
    return out


def _mixed(rows: Mapping[str, Mapping[int, Score]]) -> list[str]:
    """Where runs that are compared differ in more than row and seed: settings (steps, batch, precision, cache, ...), or the
    code or processor that made them, where both say."""
    runs = [s for seeds in rows.values() for s in seeds.values() if s["kind"] not in ("teacher", "at test")]
    settled = [(s, known) for s in runs if (known := _settings(s))]
    out = []
    for key in sorted({k for _, settings in settled for k in settings}):
        out += _differing(key, [(s, json.dumps(settings[key])) for s, settings in settled if key in settings])
    for key in ("code", "processor"):
        out += _differing(key, [(s, str(s["made_by"][key])) for s in runs if s.get("made_by")])
    return out


def _settings(score: Score) -> dict[str, Any] | None:
    """What all runs of a table share; None of teachers, and of rows printed by a version that did not say."""
    from pipelines.bench_cell import settings_of

    if "run" not in score.get("asked", {}) or score["kind"] == "teacher":
        return score.get("settings")
    return settings_of(score)


def _digest(settings: Mapping[str, Any] | None) -> str | None:
    return None if settings is None else sha256(canonical_json(settings)).hexdigest()[:16]


def _differing(key: str, found: Sequence[tuple[Score, str]]) -> list[str]:
    """One line for a key that has several values: who has each but the commonest."""
    values = Counter(value for _, value in found)
    if len(values) < 2:
        return []
    usual = values.most_common(1)[0][0]
    named = [f"{s['row']} seed {s['seed']}" for s, value in found if value != usual]
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return [f"{key} of {', '.join(named[:4])}{more} is not that of the other runs"]


def _draws_by_run(scores: Sequence[Score], draws: int) -> dict[tuple[str, int], F64]:
    """``scene_draws`` of every run whose matches are there, once each: most runs stand in several comparisons."""
    if not draws:
        return {}
    paths = {
        (s["row"], s["seed"]): Path(s["folder"]) / "matches.npz" for s in scores if s["kind"] != "teacher" and "folder" in s
    }
    return {key: scene_draws(SceneMatches.load(path), draws=draws) for key, path in paths.items() if path.is_file()}


def _parts_nds(mine: Sequence[Score], theirs: Sequence[Score]) -> dict[str, float | None]:
    """What a mean gain is made of, in points of NDS: half the gain in mAP and a tenth of each error's fall, errors above 1
    counted as 1 (definition of the nuScenes detection score). The parts add up to the gain."""
    gain = {"mAP": [0.5 * (a["map"] - b["map"]) for a, b in zip(mine, theirs, strict=True)]}
    for name in mine[0]["errors"]:
        pairs = [(a["errors"][name], b["errors"][name]) for a, b in zip(mine, theirs, strict=True)]
        gain[name] = [10.0 * (min(b, 1.0) - min(a, 1.0)) for a, b in pairs]
    return {name: _number(float(np.mean(values))) for name, values in gain.items()}


def _paired(
    rows: Mapping[str, Mapping[int, Score]],
    name: str,
    against: str,
    kind: str,
    headroom: float,
    drawn: Mapping[tuple[str, int], F64],
    printed: Printed,
) -> dict[str, Any] | None:
    seeds = sorted(set(rows.get(name, {})) & set(rows.get(against, {})))
    if not seeds:
        return None
    mine, theirs = rows[name], rows[against]
    t = paired_t([mine[s]["nds"] for s in seeds], [theirs[s]["nds"] for s in seeds])
    t_map = paired_t([mine[s]["map"] for s in seeds], [theirs[s]["map"] for s in seeds])
    seen = [s for s in seeds if (name, s) in drawn and (against, s) in drawn]
    low, high = scene_bootstrap([(drawn[name, s], drawn[against, s]) for s in seen])
    before = printed.over_scenes(name, kind, against)
    if len(before[2]) > len(seen):
        low, high, seen = before
    line = {
        "method": name,
        "kind": kind,
        "against": against,
        "gain_nds": _number(t.mean),
        "low": _number(t.low),
        "high": _number(t.high),
        "low_scenes": _number(low),
        "high_scenes": _number(high),
        "seeds_scenes": [] if math.isnan(low) else seen,
        "parts_nds": _parts_nds([mine[s] for s in seeds], [theirs[s] for s in seeds]),
        "gain_map": _number(t_map.mean),
        "low_map": _number(t_map.low),
        "high_map": _number(t_map.high),
        "smallest_detectable_nds": _number(smallest_detectable(t.spread, t.seeds)),
        "p": None if math.isnan(t.p) else t.p,
        "p_holm": None,
        "gap_closed": _number(t.mean / headroom) if headroom > 0 else None,
        "published_gain_nds": PUBLISHED_GAIN_NDS.get(name) if kind == "system" else None,
        "equal_weights": kind != "at test" and all(_weights(mine[s]) == _weights(theirs[s]) for s in seeds),
        "seeds": seeds,
    }
    if any("folder" in rows[row][s] for row in (name, against) for s in seeds):
        return line
    return line | printed.of_scores(name, kind, against, seeds)  # all are printed: so is this, from scores of more digits


def _weights(score: Score) -> str:
    """As printed."""
    return str(score["weights_sha256"][:16])


def _costs(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Median over seeds. On a CPU the ratio is one of CPU time, which other work on the machine hardly moves."""
    rows = _by_row(scores)

    def median(name: str, value: Callable[[Score], Any]) -> float | None:
        values = [v for v in map(value, rows.get(name, {}).values()) if v is not None]
        return float(np.median(values)) if values else None

    def wall(score: Score) -> Any:
        return score["cost"].get("seconds_per_step")

    def cpu(score: Score) -> Any:
        seconds = score["cost"].get("cpu_seconds")  # none of a run that was continued
        return seconds / score["steps"] if score.get("steps") and seconds else None

    out = []
    for name, runs in rows.items():
        if all(s["kind"] == "at test" for s in runs.values()):
            continue
        clock = wall if next(iter(runs.values()))["cost"].get("device") == "cuda" else cpu
        step, base = median(name, clock), median("plain", clock)
        out.append(
            {
                "row": name,
                "seconds_per_step": median(name, wall),
                "cpu_seconds_per_step": median(name, cpu),
                "times_plain": round(step / base, 3) if step and base else None,
                "stored_teachers": any(_reads_stored(s) for s in runs.values()),
                "counted_mib": median(name, lambda s: s["cost"].get("counted_mib")),
                "peak_mib": median(name, lambda s: s["cost"].get("peak_mib") if s["cost"].get("device") == "cuda" else None),
            }
        )
    return out


def _reads_stored(score: Score) -> bool:
    """Its steps read stored maps: more than what teachers lend before the first step."""
    from imkd_models.distill import make_method

    run = score.get("asked", {}).get("run", {})
    if not run.get("loader", {}).get("cached_teachers") or not run.get("method"):
        return False
    method = make_method(run["method"])
    return bool(method.needs_for(method.make_options(run["options"])).teachers)


def _pull(rows: Mapping[str, Mapping[int, Score]]) -> list[dict[str, Any]]:
    """Each term's gradient relative to the task's, first seed: over all of the student's parameters at the start and at the
    end of training, and in the part where it pulls hardest."""
    out = []
    for name, runs in rows.items():
        shares = runs[min(runs)].get("probe", {}).get("shares", {})
        for term in shares.get("end", {}):
            line: dict[str, Any] = {"row": name, "term": term}
            for when, found in shares.items():
                line[when] = found[term].get("student")
                parts = {part: share for part, share in found[term].items() if part != "student"}
                part = max(parts, key=lambda p: parts[p])
                line[f"{when}_hardest"] = {"part": part, "share": parts[part]}
            out.append(line)
    return out


def _independent(out: Path, draws: int) -> dict[str, Any] | None:
    """The benchmark on a world with independent materials, in short; None where it was not run."""
    if not (out / "commands.json").is_file():
        return None
    report = write_report(out, None, draws=draws)
    if report["materials"] != "independent":
        return None
    return {key: report[key] for key in ("commands", "admission", "rows", "paired")}


def write_report(out: Path, docs: Path | str | None, *, draws: int | None = None, also: Sequence[Path] = ()) -> dict[str, Any]:
    """Read every score under ``out`` and write ``results.json`` and ``results.md`` there, and in ``docs`` if given. A
    robustness table in ``out/robustness`` is appended, and so are the gains of a benchmark in ``out/independent`` (the same
    with ``--materials independent``).

    draws: of the scene bootstrap; default ``SCENE_DRAWS`` where ``docs`` is given, else none (it takes seconds a row). A row is
    compared with the twin that it has in today's plan, whatever it had when it was run; tried settings keep theirs.
    also: printed tables (``results.json``) whose rows stand in this one too; their runs need not be there, so an interval over
    scenes may be of fewer seeds than the gain (``seeds_scenes``).
    """
    from pipelines.bench_distill import read_scores

    plan = {row.name: row for row in all_rows()}
    place = {name: i for i, name in enumerate(plan)}  # teachers first, then the order of the plan
    printed = read_printed(also)
    found = read_scores(out)
    everything, differing = joined(found, printed.scores)
    scores = sorted(everything, key=lambda s: (place.get(s["row"], -1), s["row"], s["seed"]))
    scores = [{**s, "twin": plan[s["row"]].twin} if s["row"] in plan else s for s in scores]
    rows = _by_row(scores)
    count = draws if draws is not None else (SCENE_DRAWS if docs is not None else 0)
    drawn = _draws_by_run(scores, count)
    admission, spread = admission_test(scores), _spread(rows)
    paired = []
    first = next((s for s in scores if s["kind"] != "teacher"), scores[0] if scores else None)
    for name, runs in rows.items():
        facts = next(iter(runs.values()))
        if facts["kind"] in ("baseline", "teacher"):
            continue
        headroom = _headroom(rows, facts)
        if facts.get("twin"):
            kind = {"defect": "price", "network": "network", "at test": "at test"}.get(facts["kind"], "distillation")
            paired.append(_paired(rows, name, facts["twin"], kind, headroom, drawn, printed))
        if facts["kind"] == "method":
            paired.append(_paired(rows, name, "plain", "system", headroom, drawn, printed))
        if facts["kind"] == "control" and facts["method"] in rows:
            paired.append(_paired(rows, facts["method"], name, "over control", headroom, drawn, printed))
    known = [p for p in paired if p is not None]
    main = {p["method"]: p["p"] for p in known if p["kind"] == "distillation"}
    adjusted = holm({name: math.nan if (p := main.get(name)) is None else p for name in PUBLISHED_GAIN_NDS})
    for p in known:
        if p["kind"] == "distillation" and p["method"] in adjusted:
            p["p_holm"] = _number(adjusted[p["method"]], 6)
    commands = json.loads((out / "commands.json").read_text()) if (out / "commands.json").is_file() else []
    report = {
        "v": 1,
        "preset": first["preset"] if first else None,
        "materials": first["materials"] if first else None,
        "cache": first["asked"]["cache"] if first else None,
        "versions": first["versions"] if first else {},
        "commands": list(dict.fromkeys([*printed.commands, *commands])),
        "printed": len(everything) - len(found),
        "admission": admission,
        "spread": spread,
        "unfit": _unfit(rows, admission, spread),
        "mixed": [*_mixed(rows), *printed.differing, *differing],
        "unfinished": _unfinished(rows),
        "rows": [
            {
                "method": s["row"],
                "kind": s["kind"],
                "twin": s.get("twin"),
                "seed": s["seed"],
                "nds": _number(s["nds"]),
                "map": _number(s["map"]),
                "errors": {k: _number(v, 5) for k, v in s["errors"].items()},  # a thousandth is 0.01 NDS
                "map_by_range": [_number(r["map"]) for r in s["map_by_range"]],
                "steps": s["steps"],
                "identity": s["identity"][:16],
                "weights_sha256": _weights(s),
                "settings": _digest(_settings(s)),
                "made_by": s.get("made_by"),
            }
            for runs in rows.values()
            for s in runs.values()
        ],
        "settings": {str(_digest(d)): d for s in scores if (d := _settings(s))},
        "paired": known,
        "costs": [printed.costs.get(line["row"], line) for line in _costs(scores)],
        "pull": [line for name in rows for line in printed.pull.get(name) or _pull({name: rows[name]})],
        "independent": _independent(out / "independent", count) or printed.independent,
    }
    text = markdown(report)
    table = out / "robustness" / "robustness.md"  # of `imkd evaluate --robustness --out OUT/robustness`, where it was run
    if table.is_file():
        text += "\n## Robustness\n\n" + table.read_text()
    for folder in [out, *([Path(docs)] if docs is not None else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("results.json", json.dumps(report, indent=1, allow_nan=False) + "\n"), ("results.md", text)):
            part = folder / f".{name}.{os.getpid()}.part"  # several processes may fill one benchmark
            part.write_text(content)
            part.replace(folder / name)
    return report
