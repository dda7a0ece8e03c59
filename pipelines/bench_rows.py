"""The rows of the distillation benchmark: which network, which method, against which twin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from imkd_data.errors import UsageError
from pipelines.bench_ablations import ABLATIONS, OWN_WEIGHTS, SIM_AT_TEST, STUDENT_ABLATIONS
from pipelines.bench_presets import PUBLISHED_GAIN_NDS, WEIGHTS

__all__ = ["BLOCKS", "Row", "all_rows", "rows_of", "undistilled", "with_tries"]

BLOCKS = ("main", "controls", "ablations", "defects")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table, run once a seed. twin: the row that its gain is measured against; system gains are always
    against ``plain``. model: changes of the student's configuration; settings: ``--set`` values of the run. seeds: all, or the
    first only.
    sim_at_test: nothing is trained, the twin's network is scored again with its simulated map replaced (zeros | noise).
    start: the row whose trained network of the same seed this one goes on from; lr_factor: times the run's learning rate."""

    name: str
    block: str
    kind: str  # baseline | twin | method | control | ablation | network | at test | defect | tuning
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    twin: str | None = None
    seeds: str = "all"
    frozen: bool = True
    sim_at_test: str = ""
    start: str = ""
    lr_factor: float = 1.0
    note: str = ""


def _main(weights: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    from imkd_models.distill import METHODS

    rows = [
        Row(name="plain", block="main", kind="baseline", note="camera-radar student, no distillation"),
        Row(name="camera_only", block="main", kind="baseline", model={"radar": False}, seeds="first", note="admission"),
        Row(name="radar_only", block="main", kind="baseline", model=_RADAR_ONLY, seeds="first", note="admission"),
    ]
    for name, method in METHODS.items():
        twin = f"{name}_twin"
        rows.append(Row(name=twin, block="main", kind="twin", method=name, options=method.twin_options, note=method.twin))
        options = dict(weights.get(name, {}))
        rows.append(Row(name=name, block="main", kind="method", method=name, options=options, twin=twin, note=method.title))
    return rows


def _weighted(row: Row, weights: Mapping[str, Mapping[str, Any]]) -> Row:
    """The row with its method's frozen weights below its own options and those of its preset."""
    from imkd_models.distill import METHODS

    if row.method is None or not row.frozen:
        return row
    preset = METHODS[row.method].presets.get(row.options.get("preset", ""), {})
    below = {k: v for k, v in weights.get(row.method, {}).items() if k not in preset}
    return replace(row, options={**below, **row.options})


def undistilled(method: str, options: Mapping[str, Any], block: str) -> Row:
    """What a setting's gain is measured against, the same network and start without distillation: the method's twin where that
    has them, the plain student where the setting changes neither, else the twin with the setting's own switches."""
    from imkd_models.distill import METHODS

    known = METHODS[method]

    def start(values: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, tuple[str, ...]]]:
        """Changes of the student, and what teachers lend it before the first step."""
        made = known.make_options(values)
        return known.changes(made), known.needs_for(made).at_start

    rows = {r.name: r for r in _main({})}
    if start(options) == start(known.twin_options):
        return rows[f"{method}_twin"]
    if start(options) == ({}, {}):
        return rows["plain"]
    switches = {k: v for k, v in options.items() if start({**known.twin_options, k: v}) != start(known.twin_options)}
    twin = {**known.twin_options, **switches}
    if start(twin) != start(options):
        raise UsageError(f"{method} has no undistilled twin with this network", found=json.dumps(dict(options)))
    name = f"{method}_twin:" + ",".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in switches.items())
    seeds = "all" if block == "tuning" else "first"
    return Row(name=name, block=block, kind="twin", method=method, options=twin, seeds=seeds, note=known.twin)


_RADAR_ONLY = {"camera": False, "radar_encoder": "bev", "depth_weight": 0.0}


def _controls() -> list[Row]:
    from imkd_models.distill import METHODS

    def imkd(name: str, note: str, **options: Any) -> Row:
        return Row(name=name, block="controls", kind="control", method="imkd", options=options, twin="imkd_twin", note=note)

    rows = [
        imkd("imkd_occupancy", "I_L is 1 wherever LiDAR saw anything", intensity_control="occupancy"),
        imkd("imkd_permuted", "values shuffled among occupied cells", intensity_control="permuted"),
        imkd("imkd_other_sample", "the map of another sample", intensity_control="other_sample"),
        imkd("imkd_no_intensity", "source none", intensity_source="none", stage3_supervision=False),
        imkd(
            "imkd_label_only",
            "the label teacher alone",
            stage1=False,
            stage2_lidar=False,
            response="off",
            stage3_supervision=False,
        ),
    ]
    for name in METHODS:
        options = {"teacher_sample": "other"}
        rows.append(
            Row(
                name=f"{name}_wrong_teacher",
                block="controls",
                kind="control",
                method=name,
                options=options,
                twin=f"{name}_twin",
                note="teacher shown the wrong sample",
            )
        )
    return rows


def _ablations() -> list[Row]:
    """One seed each; the first of every method stands in the main table, and so does the method with its own weights."""
    weights = [
        Row(
            name=f"{method}/default_weights",
            block="main",
            kind="ablation",
            method=method,
            twin=f"{method}_twin",
            seeds="first",
            frozen=False,
            note="weights of the paper, or ours where it is silent",
        )
        for method in ABLATIONS
    ]
    switches = [
        Row(
            name=f"{method}/{name}",
            block="main" if name == next(iter(rows)) else "ablations",
            kind="ablation",
            method=method,
            options=options,
            seeds="first",
            frozen=f"{method}/{name}" not in OWN_WEIGHTS,
        )
        for method, rows in ABLATIONS.items()
        for name, options in rows.items()
    ]
    students = [
        Row(
            name=f"{method}/{name}",
            block="ablations",
            kind="ablation",
            method=method,
            options=options,
            model=model,
            seeds="first",
        )
        for method, rows in STUDENT_ABLATIONS.items()
        for name, (model, options) in rows.items()
    ]
    fuser = Row(
        name="plain/concat_fuser",
        block="ablations",
        kind="network",
        model={"fuser": "concat"},
        twin="plain",
        seeds="first",
        note="baseline of CRKD's paper: one convolution over both maps",
    )
    tested = [
        Row(
            name=name,
            block="ablations",
            kind="at test",
            method="adaptive_smooth",
            twin=twin,
            seeds="first",
            frozen=False,
            sim_at_test=becomes,
        )
        for name, (twin, becomes) in SIM_AT_TEST.items()
    ]
    return [*weights, *switches, *students, fuser, *tested, *_continued()]


def _continued() -> list[Row]:
    """CRKD as its paper trains it: all go on from one gated student that was trained without distillation, at half the learning
    rate, as many steps again. A3 and A4 go on without distillation and are the controls: of B1, which has no calibration block
    either, and of the others. The first row is what they start from."""
    from imkd_models.distill import METHODS

    no_block, ablations, none = {"calibration": False}, ABLATIONS["crkd"], METHODS["crkd"].twin_options
    begun = replace(undistilled("crkd", no_block, "ablations"), frozen=False, note="what CRKD's continued rows start from")
    continued: dict[str, tuple[Mapping[str, Any], str | None]] = {  # name -> (options, control; None: is one)
        "A4": (none, None),
        "B4": ({}, "A4"),
        "A3": ({**none, **no_block}, None),
        "B1_resp": (ablations["B1_resp"], "A3"),
        "B2_csrd": (ablations["B2_csrd"], "A4"),
        "B3_msfd": (ablations["B3_msfd"], "A4"),
    }
    return [
        begun,
        *(
            Row(
                name=f"crkd/continued_{name}",
                kind="twin" if control is None else "ablation",
                options=options,
                twin=None if control is None else f"crkd/continued_{control}",
                frozen=control is not None,
                note="goes on without distillation" if control is None else "goes on from a trained student, as the paper does",
                block="ablations",
                method="crkd",
                seeds="first",
                start=begun.name,
                lr_factor=0.5,
            )
            for name, (options, control) in continued.items()
        ),
    ]


def _with_twins(rows: Sequence[Row]) -> list[Row]:
    """Ablations with the twin of their own network, which stands before the first that needs it."""
    out: dict[str, Row] = {}
    for row in rows:
        if row.kind == "ablation" and row.method is not None and row.twin is None:
            twin = _on_student(undistilled(row.method, row.options, row.block), row)
            if twin.seeds == "first":
                out.setdefault(twin.name, twin)
            row = replace(row, twin=twin.name)
        out[row.name] = row
    return list(out.values())


def _on_student(twin: Row, row: Row) -> Row:
    """The twin on the row's own student, under a name that says so."""
    if not row.model:
        return twin
    student = ",".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in row.model.items())
    name = f"{twin.name}{',' if ':' in twin.name else ':'}{student}"
    return replace(twin, name=name, block=row.block, kind="twin", model=row.model, seeds="first")


def _defects() -> list[Row]:
    """Released behaviour, one switch at a time: the price is the row minus the corrected row."""
    from imkd_data.loader.request import LOADER_PARITY
    from imkd_models.config import CRN_PARITY
    from imkd_models.distill.crkd import DEFECTS

    rows = [
        Row(
            name=f"crkd+{d}",
            block="defects",
            kind="defect",
            method="crkd",
            options={"defects": [d]},
            twin="crkd",
            seeds="first",
        )
        for d in DEFECTS
    ]
    rows.append(
        Row(
            name="imkd+labeldistill_response",
            block="defects",
            kind="defect",
            method="imkd",
            options={"response": "labeldistill"},
            twin="imkd",
            seeds="first",
        )
    )
    rows += [
        Row(name=f"plain+{p}", block="defects", kind="defect", model={"parity": [p]}, twin="plain", seeds="first")
        for p in sorted(CRN_PARITY)
    ]
    augmented = {"loader.augment.enabled": "true"}
    rows.append(
        Row(
            name="plain/augmented",
            block="defects",
            kind="network",
            settings=augmented,
            twin="plain",
            seeds="first",
            note="what defects of the augmentation are compared with, where the preset augments nothing",
        )
    )
    for name in LOADER_PARITY:
        moved = name in ("flip:w_minus_u", "augment:rcs_vx")  # these act with augmentation only
        settings = {**(augmented if moved else {}), "loader.parity": json.dumps([name])}
        twin = "plain/augmented" if moved else "plain"
        rows.append(Row(name=f"plain+{name}", block="defects", kind="defect", settings=settings, twin=twin, seeds="first"))
    return rows


def with_tries(plan: Sequence[Row], tries: Sequence[str]) -> list[Row]:
    """The plan and one row for each ``METHOD:option=value,...`` beside its twin. Errors: UsageError, RecipeError."""
    from imkd_models.distill import METHODS

    rows, known = list(plan), {r.name: r for r in all_rows()}
    for text in tries:
        method, _, pairs = text.partition(":")
        if method not in METHODS or not all("=" in p for p in pairs.split(",")):
            raise UsageError("a try is METHOD:option=value,...", expected=", ".join(METHODS), found=text)
        options = {k.strip(): _value(v) for k, v in (p.split("=", 1) for p in pairs.split(","))}
        METHODS[method].make_options(options)
        twin = undistilled(method, options, "tuning")
        rows += [known.get(twin.name, twin)] * (twin.name not in {r.name for r in rows})
        rows.append(Row(name=text, block="tuning", kind="tuning", method=method, options=options, twin=twin.name, note="tried"))
    return rows


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def all_rows(preset: str = "tiny") -> list[Row]:
    """Every row, in the order of the table, with the weights that are frozen for this preset. An ablation that sets what the
    method's own row has anyway is left out."""
    from imkd_models.distill import METHODS

    weights = WEIGHTS.get(preset, {})
    main = _main(weights)
    own = {r.method: METHODS[r.method].make_options(r.options) for r in main if r.method and r.kind == "method"}
    others = [_weighted(r, weights) for r in (*_controls(), *_ablations(), *_defects())]

    def repeats(row: Row) -> bool:
        if row.method is None or row.kind != "ablation" or row.model or row.start:
            return False
        return bool(METHODS[row.method].make_options(row.options) == own[row.method])

    return [*main, *_with_twins([r for r in others if not repeats(r)])]


def rows_of(
    blocks: tuple[str, ...], methods: tuple[str, ...] = (), names: tuple[str, ...] = (), preset: str = "tiny"
) -> list[Row]:
    """Rows of the named blocks, and those whose trained network a row at test scores again; ``methods`` keeps only these
    methods' rows (and the baselines), ``names`` only these rows, of whatever block, and the twins they are compared with;
    ``preset`` decides the weights.

    Raises:
        UsageError: an unknown block, method or row, or a row of a method that is not among ``methods``.
    """
    rows = all_rows(preset)
    for what, given, known in (
        ("block", blocks, BLOCKS),
        ("method", methods, tuple(PUBLISHED_GAIN_NDS)),
        ("row", names, tuple(r.name for r in rows)),
    ):
        if unknown := [g for g in given if g not in known]:
            raise UsageError(f"no {what} {', '.join(unknown)}", expected=", ".join(known))
    if names:
        by_name = {r.name: r for r in rows}
        others = [n for n in names if methods and by_name[n].method not in (None, *methods)]
        if others:
            raise UsageError(
                f"rows {', '.join(others)} are of no method in --methods",
                expected=", ".join(methods),
                found=", ".join(dict.fromkeys(str(by_name[n].method) for n in others)),
                next="leave --methods out: rows say their method themselves",
            )
        wanted = dict.fromkeys(names)
        for name in names:
            above = [name]
            while above:
                row = by_name[above.pop()]
                wanted.setdefault(row.name)
                above += [r for r in (row.twin, row.start) if r]
        return [r for r in rows if r.name in wanted or r.name == "plain"]
    plan = [r for r in rows if r.block in blocks and (not methods or r.method is None or r.method in methods)]
    scored_again = {r.twin for r in plan if r.sim_at_test} - {r.name for r in plan}
    return [*(replace(r, seeds="first") for r in rows if r.name in scored_again), *plan]
