"""Tables of the benchmark that were printed before: their rows stand in a new one though their runs are no longer there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imkd_data.errors import InputDataError, MismatchError, SourceMissingError
from pipelines.bench_rows import Row, all_rows

__all__ = ["Printed", "joined", "read_printed"]

Score = Mapping[str, Any]
_OF_SCORES = ("gain_nds", "low", "high", "parts_nds", "gain_map", "low_map", "high_map", "smallest_detectable_nds", "p")
_PARTS = ("preset", "materials", "cache", "versions", "commands", "rows", "paired", "costs", "pull", "independent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """What tables hold: scores in the form of ``score.json``, as far as they go, and what cannot be computed from them: costs
    and pull by row, gains (of which the intervals over scenes are read) by (row, kind, against). differing: see ``joined``."""

    scores: Sequence[Score]
    differing: Sequence[str]
    commands: Sequence[str]
    costs: Mapping[str, Mapping[str, Any]]
    pull: Mapping[str, Sequence[Mapping[str, Any]]]
    paired: Mapping[tuple[str, str, str], Mapping[str, Any]]
    independent: Mapping[str, Any] | None

    def has(self, row: str, seed: int | None = None) -> bool:
        """Is there a score of this row (and seed)?"""
        return any(s["row"] == row and seed in (None, s["seed"]) for s in self.scores)

    def over_scenes(self, row: str, kind: str, against: str) -> tuple[float, float, list[int]]:
        """Interval over val scenes and the seeds that it is of; NaN and none where none was printed."""
        line = self.paired.get((row, kind, against), {})
        low, high = line.get("low_scenes"), line.get("high_scenes")
        if low is None or high is None:
            return math.nan, math.nan, []
        return low, high, list(line.get("seeds_scenes", line["seeds"]))

    def of_scores(self, row: str, kind: str, against: str, seeds: Sequence[int]) -> dict[str, Any]:
        """What a printed gain over exactly these seeds has that follows from scores; nothing where there is no such gain."""
        line = self.paired.get((row, kind, against), {})
        return {k: line[k] for k in _OF_SCORES} if line.get("seeds") == list(seeds) else {}


def read_printed(paths: Sequence[Path]) -> Printed:
    """``results.json`` files of one benchmark. Where two hold the same run or row, the first speaks.

    Raises:
        SourceMissingError, InputDataError: no such file, or not a table of this version. MismatchError: of two benchmarks.
    """
    reports = [_read(path) for path in paths]
    scores: list[Score] = []
    differing: list[str] = []
    for path, report in zip(paths, reports, strict=True):
        plan = {row.name: row for row in all_rows(report["preset"])}
        lines = [_score(report, line, plan.get(line["method"])) for line in report["rows"]]
        scores, other = joined(scores, lines, path)
        differing += other
    later_first = reports[::-1]
    gains = [p for report in later_first for p in report["paired"]]  # of one over more seeds the interval says more
    return Printed(
        scores=scores,
        differing=differing,
        commands=list(dict.fromkeys(c for report in reports for c in report["commands"])),
        costs={line["row"]: {"stored_teachers": False, **line} for report in later_first for line in report["costs"]},
        pull={name: lines for report in later_first for name, lines in _by_row(report["pull"]).items()},
        paired={(p["method"], p["kind"], p["against"]): p for p in sorted(gains, key=lambda p: len(p["seeds"]))},
        independent=next((report["independent"] for report in reports if report["independent"]), None),
    )


def joined(scores: Sequence[Score], printed: Sequence[Score], file: Path | None = None) -> tuple[list[Score], list[str]]:
    """``scores`` with those of ``printed`` that they lack, and a line for every run that both hold with other weights: there
    ``scores`` count.

    Raises:
        MismatchError: they are of two benchmarks (preset, materials or cache).
    """
    ours, theirs = _benchmark(scores), _benchmark(printed)
    for key in sorted(set(ours) & set(theirs)):
        if ours[key] != theirs[key]:
            raise MismatchError(
                f"the printed table is of another benchmark: another {key}",
                expected=str(ours[key]),
                found=str(theirs[key]),
                file=None if file is None else str(file),
                next="give tables of this benchmark only",
            )
    have = {(s["row"], s["seed"]): s["weights_sha256"][:16] for s in scores}
    lacking = [s for s in printed if (s["row"], s["seed"]) not in have]
    other = [s for s in printed if have.get((s["row"], s["seed"]), s["weights_sha256"][:16]) != s["weights_sha256"][:16]]
    lines = [f"{s['row']} seed {s['seed']} was printed with other weights than it has here, which count" for s in other]
    return [*scores, *lacking], lines


def _benchmark(scores: Sequence[Score]) -> dict[str, str]:
    """Preset, materials and cache, by the first student: a borrowed teacher may have been scored on another cache."""
    first = next((s for s in scores if s["kind"] != "teacher"), None)
    return (
        {} if first is None else {"preset": first["preset"], "materials": first["materials"], "cache": first["asked"]["cache"]}
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SourceMissingError("no table here", expected="results.json of a benchmark", file=str(path))
    wanted = "results.json, v 1, as `imkd bench distill` writes it"
    try:
        report: Any = json.loads(path.read_text())
    except ValueError as error:
        raise InputDataError("not a table of the benchmark", expected=wanted, found=str(error), file=str(path)) from error
    lacking = [k for k in ("v", *_PARTS) if k not in report] if isinstance(report, dict) else ["v"]
    if lacking or report["v"] != 1:
        found = f"no {', '.join(lacking)}" if lacking else f"v {report['v']}"
        raise InputDataError("not a table of the benchmark", expected=wanted, found=found, file=str(path))
    known: dict[str, Any] = report
    return known


def _by_row(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        out.setdefault(line["row"], []).append(line)
    return out


def _score(report: Mapping[str, Any], line: Mapping[str, Any], row: Row | None) -> Score:
    """A printed row in the form of ``score.json``, as far as it goes. Method and teachers are those of today's plan."""
    from imkd_models.distill import make_method

    teachers: tuple[str, ...] = ()
    if row is not None and row.method:
        method = make_method(row.method)
        teachers = tuple(method.teachers_for(method.make_options(row.options)))
    kept = {k: line[k] for k in ("kind", "twin", "seed", "nds", "map", "steps", "identity", "weights_sha256")}
    return {
        **kept,
        "row": line["method"],
        "method": row.method if row is not None else None,
        "errors": {k: math.nan if v is None else v for k, v in line["errors"].items()},
        "map_by_range": [{"map": math.nan if m is None else m} for m in line["map_by_range"]],
        "asked": {"cache": report["cache"], "teachers": dict.fromkeys(teachers, "")},
        "cost": {},
        "settings": report.get("settings", {}).get(line.get("settings")),  # of older tables, which did not say: None
        "made_by": line.get("made_by"),
        **{k: report[k] for k in ("preset", "materials", "versions")},
    }
