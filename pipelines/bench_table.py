"""The benchmark's table as Markdown; every number of it is in ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["markdown"]


def _show(value: Any, digits: int = 2, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _stored(rows: Sequence[str]) -> str:
    left_out = "neither the teachers' forward passes nor storing them is in these figures."
    return f" {', '.join(rows)} read their teachers from stored maps: {left_out}" if rows else ""


def _interval(low: Any, high: Any) -> str:
    return "-" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]"


def _p(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else _show(value, 3)


def _fewer(pair: Mapping[str, Any]) -> str:
    """Of how many seeds an interval over scenes is, where the gain is of more."""
    seeds = pair.get("seeds_scenes", pair["seeds"])  # an older table's: of all
    return f" ({len(seeds)} seeds)" if seeds and len(seeds) < len(pair["seeds"]) else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*out, *("| " + " | ".join(line) + " |" for line in lines), ""]


def markdown(report: Mapping[str, Any]) -> str:
    """The table for people; every number of it is in ``results.json``."""
    out = [
        "# Distillation benchmark",
        "",
        _where(report),
        "",
        *([f"**No claim is made from this table:** {'; '.join(report['unfit'])}.", ""] if report["unfit"] else []),
        *([f"**Runs that differ in more than row and seed:** {'; '.join(report['mixed'])}.", ""] if report["mixed"] else []),
        *([f"**Unfinished, no claim is made from them:** {'; '.join(report['unfinished'])}."] if report["unfinished"] else []),
        *(["", _printed(report["printed"], len(report["rows"]))] if report["printed"] else []),
        "",
        "```",
        *report["commands"],
        "```",
        "",
        "## Admission",
        "",
    ]
    out += _table(
        ("check", "found", "wanted", "passed"),
        [
            (c["name"], _text(c["found"]), c["wanted"], "yes" if c["passed"] else "**no**")
            for c in report["admission"]["checks"]
        ],
    )
    s = report["spread"]
    out += [
        f"Plain student over {s['seeds']} seeds: mean {_show(s['mean_nds'])} NDS, standard deviation {_show(s['spread_nds'])}; "
        f"smallest gain that a paired t over {s['seeds_compared']} seeds, as many as every {s['compared_rows']} row of "
        f"the main table has, finds (5 %, power 0.8): {_show(s['smallest_detectable_gain_nds'])}.",
        "",
        "## Gains",
        "",
        "*distillation* = against the undistilled twin (same network, start, data and steps); *system* = against the "
        "plain student; *price* = a released defect against the corrected row; *over control* = the method against its "
        "control; *network* = another student, or training, without distillation against the plain one; *at test* = a "
        "trained network scored again with a part of it replaced. "
        "Two 95 % intervals: paired t over seeds, and bootstrap over val scenes. *finds*: the smallest gain that a "
        "paired t finds (5 %, power 0.8) with the spread of these differences and as many seeds. *same weights*: both "
        "trainings ended bit for bit alike, so the switch never acted with this preset. *gap closed*: the gain as a share of "
        "the lead that the row's teacher has over the plain student (the LiDAR-camera teacher where the row learns from it, "
        "else the LiDAR teacher). Holm corrects over the four methods, also while some are still to be run.",
        "",
    ]
    out += [*_gains(report["paired"]), *_parts(report["paired"]), "## Scores", "", *_scores(report["rows"])]
    out += [
        "## Cost of training",
        "",
        "Median over seeds. *times plain*: of CPU seconds on a CPU, of seconds on a GPU. *counted*: memory of a step as "
        "`imkd train --plan` counts it. *peak*: allocated on a GPU."
        + _stored([c["row"] for c in report["costs"] if c["stored_teachers"]]),
        "",
    ]
    out += _table(
        ("row", "s / step", "CPU s / step", "times plain", "counted MiB", "peak MiB"),
        [
            (
                c["row"],
                _show(c["seconds_per_step"], 3),
                _show(c["cpu_seconds_per_step"], 3),
                _show(c["times_plain"]),
                _show(c["counted_mib"], 0),
                _show(c["peak_mib"], 0),
            )
            for c in report["costs"]
        ],
    )
    if report["pull"]:
        out += [
            "## Pull of the terms",
            "",
            "Norm of each term's gradient relative to that of the task's losses, on one training batch of the first seed: over "
            "all of the student's parameters, and over those of the part where it pulls hardest.",
            "",
        ]
        out += _table(
            ("row", "term", "start", "hardest", "end", "hardest"),
            [
                (p["row"], p["term"], *(x for w in ("start", "end") for x in (_show(p[w], 3), _hardest(p[f"{w}_hardest"]))))
                for p in report["pull"]
            ],
        )
    if report["independent"]:
        out += _independent(report["independent"])
    return "\n".join(out)


def _printed(count: int, rows: int) -> str:
    return (
        f"{count} of the {rows} scores come from a table that was printed before (`--also`); their runs were not read again. "
        "Costs and pull of their rows are as printed, and an interval over scenes is of the seeds named there."
    )


def _hardest(found: Mapping[str, Any]) -> str:
    return f"{_show(found['share'], 3)} {found['part']}"


def _gains(paired: Sequence[Mapping[str, Any]]) -> list[str]:
    return _table(
        (
            "row",
            "kind",
            "against",
            "NDS",
            "over seeds",
            "over scenes",
            "finds",
            "mAP",
            "over seeds",
            "gap closed",
            "p (Holm)",
            "seeds",
            "paper",
        ),
        [
            (
                p["method"],
                p["kind"],
                p["against"],
                "same weights" if p["equal_weights"] else _show(p["gain_nds"], sign=True),
                _interval(p["low"], p["high"]),
                _interval(p["low_scenes"], p["high_scenes"]) + _fewer(p),
                _show(p["smallest_detectable_nds"]),
                _show(p["gain_map"], sign=True),
                _interval(p["low_map"], p["high_map"]),
                _show(p["gap_closed"]),
                _p(p["p_holm"]),
                str(len(p["seeds"])),
                _show(p["published_gain_nds"], 1, sign=True),
            )
            for p in paired
        ],
    )


def _parts(paired: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
    text = "Points of NDS that mAP and each error add to a mean gain over the twin; errors above 1 count as 1."
    shown = [p for p in paired if p["kind"] == "distillation"]
    lines = [
        (p["method"], *(_show(v, sign=True) for v in (p["gain_nds"], *map(p["parts_nds"].get, names))), str(len(p["seeds"])))
        for p in shown
    ]
    return ["## What the gains are made of", "", text, "", *_table(("row", "NDS", *names, "seeds"), lines)] if lines else []


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("mATE", "mASE", "mAOE", "mAVE", "mAAE")
    return _table(
        ("row", "seed", "NDS", "mAP", *names, "mAP 0-20 / 20-30 / 30-50 m"),
        [
            (
                r["method"],
                str(r["seed"]),
                _show(r["nds"]),
                _show(r["map"]),
                *(_show(r["errors"][n], 3) for n in names),
                " / ".join(_show(v, 1) for v in r["map_by_range"]),
            )
            for r in rows
        ],
    )


def _independent(report: Mapping[str, Any]) -> list[str]:
    failed = [c["name"] for c in report["admission"]["checks"] if not c["passed"]]
    return [
        "## The same with `--materials independent`",
        "",
        "The same scenes, but reflectivity is drawn alike for every class; teachers and students are trained anew."
        + (f" Admission checks not shown there: {', '.join(failed)}." if failed else ""),
        "",
        "```",
        *(c.partition(" --out DIR")[0] + " --out DIR/independent" for c in report["commands"]),
        "```",
        "",
        *_gains(report["paired"]),
        *_scores(report["rows"]),
    ]


def _where(report: Mapping[str, Any]) -> str:
    if report["materials"] == "real":
        return f"Preset `{report['preset']}`, cache `{report['cache']}`; official NDS and mAP on its val scenes, in points."
    return (
        f"Preset `{report['preset']}`, synthetic world with `--materials {report['materials']}`; official nuScenes NDS and mAP "
        "on its val scenes, in points. These figures come from a synthetic world: they compare methods, they say nothing about "
        "scores on nuScenes."
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _show(value)
