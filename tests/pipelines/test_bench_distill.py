"""The benchmark's plan, admission, resume and report; training and scoring are replaced by arithmetic."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pipelines.bench_cell as cell
import pipelines.bench_distill as bench
import pipelines.bench_presets as bench_presets
from imkd_data import open_cache
from imkd_data.errors import ImkdError, MismatchError, UsageError
from imkd_models.distill import METHODS
from pipelines.bench_ablations import ABLATIONS
from pipelines.bench_presets import PRESETS, PUBLISHED_GAIN_NDS
from pipelines.bench_report import SCENE_DRAWS, _costs, _parts_nds, _reads_stored, admission_test
from pipelines.bench_rows import BLOCKS, Row, all_rows, rows_of, with_tries
from pipelines.bench_statistics import holm, smallest_detectable
from pipelines.bench_teachers import maps_of, maps_read, store_teachers
from pipelines.bench_world import held, make_world

GAIN = {"teacher_lidar": 20.0, "teacher_fusion": 21.0, "camera_only": -5.0, "radar_only": -12.0, "imkd": 3.0, "crkd": 1.0}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Scores are 40 + gain of the row + seed / 10; every training and scoring is counted."""
    calls: dict[str, Any] = {"trained": [], "out": tmp_path / "bench", "base": 40.0}

    def train(run: Any, cache: Any, out: Path, teachers: Any, **rest: Any) -> Any:
        last = out.parent
        row = "/".join(last.parent.parts[last.parts.index("runs") + 1 :]) if last.name.startswith("seed") else last.parent.name
        calls["trained"].append((last.name, row))
        calls.setdefault("runs", {})[row if last.name.startswith("seed") else last.name] = run
        calls.setdefault("teachers", {})[row] = sorted(teachers)
        folder = out / "step-1.ckpt"
        folder.mkdir(parents=True, exist_ok=True)
        digest = sha256(out.as_posix().encode()).hexdigest()
        (folder / "checkpoint.json").write_text(json.dumps({"weights_sha256": digest, "step": run.max_steps}))
        if not (out / "last.ckpt").exists():
            (out / "last.ckpt").symlink_to(folder.name)
        return SimpleNamespace(step=run.max_steps, losses={"det": 1.0})

    def score(b: Any, checkpoint: Path, folder: Path, change: Any = None, predicted: bool = False) -> dict[str, Any]:
        calls.setdefault("from_predictions", {})[folder.relative_to(b.out).as_posix()] = predicted
        calls.setdefault("scored", []).append((folder.relative_to(b.out).as_posix(), checkpoint.relative_to(b.out).as_posix()))
        calls.setdefault("changes", {})[folder.relative_to(b.out).as_posix()] = change
        name = folder.name if folder.parent.name == "teachers" else folder.parent.relative_to(b.out / "runs").as_posix()
        seed = int(folder.name[4:]) if folder.name.startswith("seed") else 0
        name = f"teacher_{name}" if folder.parent.name == "teachers" else name
        nds = calls["base"] + GAIN.get(name, 0.0) + seed / 10 + (seed % 2) * 0.05 * len(name)
        rings = [{"from_m": a, "to_m": a + 10.0, "map": 50.0 - a} for a in (0.0, 20.0, 30.0)]
        return {"nds": nds, "map": nds / 2, "errors": dict.fromkeys(cell.ERRORS.values(), 0.5), "map_by_range": rings}

    monkeypatch.setattr("pipelines.train.train", train)
    monkeypatch.setattr(cell, "_score", score)
    counted = SimpleNamespace(counted=3 * 2**20)
    monkeypatch.setattr("pipelines.forecast.counted_memory", lambda *a: (counted, None, None))
    start, end = {"student": 0.5, "radar": 2.0, "camera": 0.25}, {"student": 0.125, "radar": 0.0, "camera": 0.25}
    probe = {"shares": {"start": {"l2r": start}, "end": {"l2r": end}}, "diagnostics": {}}
    monkeypatch.setattr("pipelines.bench_probe.probe_terms", lambda *a, **k: probe)
    monkeypatch.setattr(bench, "make_world", lambda *a: tmp_path)
    monkeypatch.setattr(bench, "make_cache", lambda *a: tmp_path)
    monkeypatch.setattr("imkd_data.open_cache", lambda path: SimpleNamespace(id="cache"))
    return calls


def _run(fake: dict[str, Any], **values: Any) -> dict[str, Any]:
    return bench.bench_distill(**{"out": fake["out"], "preset": "tiny", "seeds": (0, 1, 2), "accelerator": "cpu", **values})


def test_every_row_is_a_valid_method_and_has_its_twin() -> None:
    rows = {r.name: r for r in all_rows()}
    assert len(rows) == len(all_rows())
    for row in rows.values():
        assert row.twin is None or row.twin in rows
        if row.method:
            METHODS[row.method].make_options(row.options)
    assert set(ABLATIONS) == set(METHODS) and {r.block for r in rows.values()} == set(BLOCKS)


def _network(row: Row) -> Any:
    """Changes of the student, and what teachers lend it at the start."""
    if row.method is None:
        return row.model, {}, {}
    method = METHODS[row.method]
    options = method.make_options(row.options)
    return row.model, method.changes(options), method.needs_for(options).at_start


def test_a_twin_has_the_network_of_its_row() -> None:
    rows = {r.name: r for r in all_rows()}
    for row in rows.values():
        if row.kind == "network":
            assert row.method is None and rows[row.twin].name == "plain" and bool(row.model) != bool(row.settings)
        elif row.kind == "at test":
            assert row.sim_at_test and rows[row.twin].method == row.method and not row.options and not row.model
        elif row.kind in ("method", "control", "ablation"):
            assert _network(row) == _network(rows[row.twin]), row.name
            assert rows[row.twin].kind in ("twin", "baseline")
    assert rows["imkd/05_stage1_reflectance"].twin == "plain" and rows["imkd/03_stage3_supervised"].twin == "imkd_twin"
    assert rows["crkd/B1_resp"].twin == rows["crkd/C4_no_calibration"].twin == "crkd_twin:calibration=false"
    assert rows["adaptive_smooth/camera_05_conv_fuser"].twin == "adaptive_smooth_twin:fuser=concat,radar=false"
    assert rows["adaptive_smooth/10_attended"].twin == "adaptive_smooth_twin:sim_added=attended"
    assert {k: v for k, v in rows["crkd_twin:calibration=false"].options.items() if v} == {}
    assert rows["adaptive_smooth/05_conv_fuser"].twin == "adaptive_smooth_twin:fuser=concat"
    assert rows["dual_distill/08_fusion_teacher"].twin == "dual_distill_twin:teacher=fusion"
    tried = with_tries([], ("crkd:calibration=false,lambda_csrd=1", "imkd:stage3=false,stage3_supervision=false"))
    assert [r.twin for r in tried] == [None, "crkd_twin:calibration=false", None, "plain"]
    (_, headless) = with_tries([], ("dual_distill:head_from_teacher=false",))
    assert headless.twin == "plain", "a student that starts without the teacher's heads has the plain student beside it"


def test_no_run_is_made_twice_under_two_names() -> None:
    for preset in ("tiny", "small"):
        seen: dict[str, str] = {}
        for row in all_rows(preset):
            options = METHODS[row.method].make_options(row.options) if row.method else None
            what = repr(
                (row.method, options, row.model, row.settings, row.sim_at_test, row.sim_at_test and row.twin, row.start)
            )
            assert what not in seen, f"{row.name} is {seen.get(what)}"
            seen[what] = row.name


def test_baselines_run_first_then_seed_by_seed() -> None:
    order = [(r.name, s) for r, s in bench._order(rows_of(("main",)), (0, 1))]
    baselines = [c for c in order if c[0] in ("plain", "camera_only", "radar_only")]
    assert order[:4] == baselines and baselines[-1] == ("plain", 1)
    methods = [s for _, s in order[4:]]
    assert methods == sorted(methods)


def test_table_holds_both_gains_with_intervals_and_holm(fake: dict[str, Any]) -> None:
    report = _run(fake, docs=fake["out"] / "docs")
    gains = {(p["method"], p["kind"]): p for p in report["paired"]}
    assert gains["imkd", "distillation"]["against"] == "imkd_twin" and gains["imkd", "system"]["against"] == "plain"
    assert gains["imkd", "distillation"]["gain_nds"] == pytest.approx(3.0, abs=0.2)
    assert gains["imkd", "distillation"]["low"] < 3.0 < gains["imkd", "distillation"]["high"] + 0.2
    assert gains["imkd", "distillation"]["gap_closed"] == pytest.approx(3.0 / 20, abs=0.02)
    assert gains["imkd", "distillation"]["p_holm"] is not None and gains["imkd", "system"]["p_holm"] is None
    first = gains["imkd", "distillation"]
    assert first["smallest_detectable_nds"] > first["gain_nds"] - first["low"] > 0, (
        "a power of 0.8 asks for more than half the interval"
    )
    assert first["low_map"] < first["gain_map"] < first["high_map"] and first["gain_map"] == pytest.approx(
        first["gain_nds"] / 2, abs=0.002
    )
    assert gains["imkd", "system"]["published_gain_nds"] == 5.0 and gains["crkd", "distillation"]["seeds"] == [0, 1, 2]
    assert {"method", "twin", "seed", "nds", "map", "errors"} <= set(report["rows"][0])
    (pull,) = [p for p in report["pull"] if p["row"] == "imkd"]
    assert pull["term"] == "l2r" and (pull["start"], pull["end"]) == (0.5, 0.125)
    assert pull["start_hardest"] == {"part": "radar", "share": 2.0} and pull["end_hardest"]["part"] == "camera"
    assert "| imkd | l2r | 0.500 | 2.000 radar | 0.125 | 0.250 camera |" in (fake["out"] / "results.md").read_text()
    line = "imkd bench distill --preset tiny --seeds 0,1,2 --blocks main --materials class --engine devkit"
    assert report["commands"] == [f"{line} --out DIR --docs docs"]
    saved = json.loads((fake["out"] / "docs" / "results.json").read_text())
    assert saved == report and "| imkd | distillation | imkd_twin |" in (fake["out"] / "docs" / "results.md").read_text()
    assert "imkd: 3 of 6 seeds" in report["unfinished"]
    assert "**Unfinished, no claim" in (fake["out"] / "docs" / "results.md").read_text()
    assert report["spread"]["seeds"] == 3 and report["spread"]["fine_enough"]


def test_a_control_is_compared_with_its_twin_and_with_its_method(fake: dict[str, Any]) -> None:
    report = _run(fake, blocks=("main", "controls"), methods=("imkd",))
    gains = {(p["method"], p["against"]): p for p in report["paired"]}
    assert gains["imkd_occupancy", "imkd_twin"]["kind"] == "distillation"
    over = gains["imkd", "imkd_occupancy"]
    assert over["kind"] == "over control" and over["p_holm"] is None and over["seeds"] == [0, 1, 2]
    expected = gains["imkd", "imkd_twin"]["gain_nds"] - gains["imkd_occupancy", "imkd_twin"]["gain_nds"]
    assert over["gain_nds"] == pytest.approx(expected, abs=0.002)


def test_a_row_at_test_scores_its_twins_network_and_trains_nothing(fake: dict[str, Any]) -> None:
    row = "adaptive_smooth/11_sim_zeros"
    values: dict[str, Any] = {"rows": (row,), "seeds": (0,)}
    _run(fake, **values, max_runs=4)  # all but the method itself
    trained = len(fake["trained"])
    report = _run(fake, **values)
    assert len(fake["trained"]) == trained + 1 and not (fake["out"] / "runs" / row / "seed0/train").exists()
    assert fake["scored"][-1] == (f"runs/{row}/seed0", "runs/adaptive_smooth/seed0/train/last.ckpt")
    assert [k for k, change in fake["changes"].items() if change is not None] == [f"runs/{row}/seed0"]
    model = nn.Module()
    model.sim = nn.Identity()
    fake["changes"][f"runs/{row}/seed0"](model)  # what is done to the network that is scored
    assert not model.sim(torch.ones(1, 2, 3, 4)).any()
    (pair,) = [p for p in report["paired"] if p["method"] == row]
    assert (pair["kind"], pair["against"], pair["equal_weights"]) == ("at test", "adaptive_smooth", False)
    assert row not in {c["row"] for c in report["costs"]} and pair["p_holm"] is pair["gap_closed"] is None
    assert _run(fake, **values) == report and len(fake["trained"]) == trained + 1

    mine, theirs = (fake["out"] / "runs" / n / "seed0/score.json" for n in (row, "adaptive_smooth"))
    assert json.loads(mine.read_text())["identity"] != json.loads(theirs.read_text())["identity"]
    theirs.write_text(json.dumps(json.loads(theirs.read_text()) | {"weights_sha256": "0" * 64}))
    with pytest.raises(MismatchError, match="another network"):
        _run(fake, **values)


def test_a_row_at_test_waits_for_a_network_that_another_process_trains(fake: dict[str, Any]) -> None:
    row, twin, said = "adaptive_smooth/11_sim_noise", fake["out"] / "runs/adaptive_smooth/seed0", []
    with held(twin, wait=True):
        report = _run(fake, rows=(row,), seeds=(0,), progress=lambda tick: said.append(tick.text))
    assert row not in {r["method"] for r in report["rows"]} and any(
        "adaptive_smooth is not finished yet" in text for text in said
    )
    assert row in {r["method"] for r in _run(fake, rows=(row,), seeds=(0,))["rows"]}


def test_a_plan_with_rows_at_test_holds_the_networks_that_they_score() -> None:
    plan = rows_of(("ablations",), ("adaptive_smooth",))
    tested = [r for r in plan if r.sim_at_test]
    assert {r.twin for r in tested} <= {r.name for r in plan} and len(tested) == 4
    (method,) = [r for r in plan if r.name == "adaptive_smooth"]
    assert method.seeds == "first" and [r.name for r in rows_of(("main",))].count("adaptive_smooth") == 1


A2 = "crkd_twin:calibration=false"


def test_crkds_schedule_goes_on_from_a_trained_student(fake: dict[str, Any]) -> None:
    """Method and control begin with the same weights and go on as long, at half the learning rate."""
    report = _run(fake, rows=("crkd/continued_B4",), seeds=(3,), admission=False)
    runs, begun = fake["runs"], fake["out"] / f"runs/{A2}/seed3/train/last.ckpt"
    assert [name for _, name in fake["trained"]][-3:] == [A2, "crkd/continued_A4", "crkd/continued_B4"]
    for name in ("crkd/continued_A4", "crkd/continued_B4"):
        assert Path(runs[name].start) == begun and runs[name].optim.lr == runs[A2].optim.lr / 2
        assert runs[name].max_steps == runs[A2].max_steps
    assert runs[A2].start == runs["plain"].start == "" and runs[A2].options["calibration"] is False
    assert fake["teachers"]["crkd/continued_B4"] == ["fusion"] and fake["teachers"]["crkd/continued_A4"] == []
    (pair,) = [p for p in report["paired"] if p["method"] == "crkd/continued_B4"]
    assert (pair["kind"], pair["against"], pair["seeds"]) == ("distillation", "crkd/continued_A4", [3])
    score = json.loads((fake["out"] / "runs/crkd/continued_B4/seed3/score.json").read_text())
    weights = json.loads((begun / "checkpoint.json").read_text())["weights_sha256"]
    assert score["asked"]["run"]["start"] == weights, "known by its weights, not its path"
    assert "probe" in score
    trained = len(fake["trained"])
    assert _run(fake, rows=("crkd/continued_B4",), seeds=(3,), admission=False) == report and len(fake["trained"]) == trained


def test_a_row_that_goes_on_waits_for_its_start(fake: dict[str, Any]) -> None:
    values: dict[str, Any] = {"rows": ("crkd/continued_A3",), "seeds": (0,), "admission": False}
    said: list[str] = []
    with held(fake["out"] / "runs" / A2 / "seed0", wait=True):
        _run(fake, **values, progress=lambda tick: said.append(tick.text))
    assert f"crkd/continued_A3 seed 0: {A2} is not finished yet; the same command runs it then" in said
    assert not any(name == "crkd/continued_A3" for _, name in fake["trained"])
    _run(fake, **values)
    assert fake["trained"][-1] == ("seed0", "crkd/continued_A3")


def test_rows_that_go_on_have_the_networks_of_the_papers_table() -> None:
    rows = {r.name: r for r in all_rows()}
    without = {name for name, row in rows.items() if row.start and row.options.get("calibration") is False}
    assert {r.start for r in rows.values()} == {"", A2} and rows[A2].block == "ablations"
    assert without == {"crkd/continued_A3", "crkd/continued_B1_resp"}
    terms = METHODS["crkd"].twin_options.keys()
    for name in ("crkd/continued_A3", "crkd/continued_A4"):
        assert all(rows[name].options[t] == 0 for t in terms)
    frozen = bench_presets.WEIGHTS["tiny"]["crkd"]
    assert rows["crkd/continued_B4"].options == frozen and rows["crkd/continued_B1_resp"].options["lambda_resp"] == 0.3
    assert rows["crkd/G1_paper"].options == {"preset": "crkd_paper"}, "the paper's settings are not mixed with tuned ones"
    plan = [r.name for r, _ in bench._order(rows_of(("ablations",), ("crkd",)), (0,))]
    assert plan.index(A2) < plan.index("crkd/continued_A4") < plan.index("crkd/continued_B4")


def test_without_an_engine_predictions_are_kept_and_scored_later(fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    predicted: list[str] = []

    def predict(checkpoint: Path, cache: Any, out: Path, **rest: Any) -> Path:
        predicted.append(out.parent.relative_to(fake["out"]).as_posix())
        out.mkdir(parents=True)
        (out / "results.json").write_text("{}")
        return out / "results.json"

    monkeypatch.setattr("pipelines.evaluate.predict_checkpoint", predict)
    lost = fake["out"] / "runs/plain/seed0/eval/results.json"  # of one run the predictions went, of the others they stay
    rows = ("crkd", "adaptive_smooth/11_sim_zeros")
    values: dict[str, Any] = {"rows": rows, "seeds": (0,)}
    with pytest.raises(UsageError, match="--engine none makes none"):
        _run(fake, **values, engine="none")
    said: list[str] = []
    report = _run(fake, **values, engine="none", admission=False, progress=lambda tick: said.append(tick.text))
    assert not report["rows"] and not report["paired"] and "scored" not in fake
    assert {"teachers/lidar", "runs/plain/seed0", "runs/crkd_twin/seed0", "runs/crkd/seed0"} <= set(predicted)
    assert "adaptive_smooth/11_sim_zeros seed 0: only scored, so it waits for an engine" in said
    trained = len(fake["trained"])
    assert _run(fake, **values, engine="none", admission=False) == report and len(predicted) == len(set(predicted))
    lost.unlink()
    report = _run(fake, **values, admission=False)
    assert len(fake["trained"]) == trained
    assert fake["from_predictions"]["runs/crkd/seed0"] and not fake["from_predictions"]["runs/plain/seed0"]
    assert {"crkd", "crkd_twin", "plain", *rows} <= {r["method"] for r in report["rows"]}
    assert _run(fake, **values, admission=False) == report and len(fake["scored"]) == len(set(fake["scored"]))


def test_runs_that_differ_in_more_than_row_and_seed_are_named(fake: dict[str, Any]) -> None:
    values: dict[str, Any] = {"rows": ("crkd", "crkd/continued_A3"), "admission": False}
    _run(fake, **values, seeds=(0,))
    report = _run(fake, **values, seeds=(0, 1))
    assert report["mixed"] == [], "another learning rate belongs to a row that goes on"
    report = _run(fake, **values, seeds=(2,), steps={"student": 7})
    assert [line.split(" of ")[0] for line in report["mixed"]] == ["max_steps"]
    assert "plain seed 2" in report["mixed"][0] and "seed 1" not in report["mixed"][0]
    assert f"**Runs that differ in more than row and seed:** {report['mixed'][0]}" in (fake["out"] / "results.md").read_text()
    path = fake["out"] / "runs/crkd/seed1/score.json"
    score = json.loads(path.read_text())
    assert len(score["made_by"]["code"]) == 16 and score["made_by"]["processor"]
    path.write_text(json.dumps({**score, "made_by": {**score["made_by"], "code": "0" * 16}}))
    plain = fake["out"] / "runs/plain/seed1/score.json"  # of an older version, which did not say
    plain.write_text(json.dumps({k: v for k, v in json.loads(plain.read_text()).items() if k != "made_by"}))
    mixed = _run(fake, **values, seeds=(0, 1))["mixed"]
    assert "code of crkd seed 1 is not that of the other runs" in mixed


def test_a_borrowed_teacher_is_trained_where_it_is_no_longer_lent(fake: dict[str, Any], tmp_path: Path) -> None:
    lender, out = tmp_path / "lender", fake["out"]
    values: dict[str, Any] = {"rows": ("crkd",), "seeds": (0,), "admission": False}
    _run(fake, **values, out=lender)
    said: list[str] = []
    _run(fake, **values, teachers=lender)
    assert not (out / "teachers/fusion/train").exists()
    _run(fake, **{**values, "seeds": (1,), "progress": lambda tick: said.append(tick.text)})
    assert (out / "teachers/fusion/train/last.ckpt").exists() and any(
        "teacher fusion: only its score is here" in t for t in said
    )


def test_a_benchmark_that_was_copied_without_its_world_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("pipelines.synth.run_synth", lambda out, **rest: (made.append(rest["materials"]), out.mkdir()))
    asked: tuple[Any, ...] = (tmp_path, PRESETS["smoke"], "class", 1, lambda text: None)
    for _ in range(2):
        assert make_world(*asked) == tmp_path / "world"
    assert made == ["class"]
    (tmp_path / "world").rmdir()
    make_world(*asked)
    assert made == ["class", "class"] and (tmp_path / "world").is_dir()
    with pytest.raises(MismatchError, match="another world"):
        make_world(tmp_path, PRESETS["smoke"], "independent", 1, lambda text: None)


def test_the_report_of_real_data_has_intervals_over_scenes(fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``--docs`` too: with one seed they are the only ones."""
    asked: list[int | None] = []
    monkeypatch.setattr("pipelines.bench_report.write_report", lambda out, docs, draws=None, **rest: asked.append(draws) or {})
    for preset in ("nuscenes", "smoke"):
        _run(fake, out=fake["out"] / preset, preset=preset, rows=("plain",), seeds=(0,), world=fake["out"].parent, cache="C")
    assert asked == [SCENE_DRAWS, None]


def test_a_row_has_the_twin_of_todays_plan(fake: dict[str, Any]) -> None:
    """A run that was made when its row had another twin is not compared with that."""
    values: dict[str, Any] = {"rows": ("crkd/B1_resp",), "seeds": (0,), "admission": False}
    _run(fake, **values)
    path = fake["out"] / "runs/crkd/B1_resp/seed0/score.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "twin": "plain"}))
    (pair,) = [p for p in _run(fake, **values)["paired"] if p["method"] == "crkd/B1_resp"]
    assert pair["against"] == A2


def test_rows_whose_teacher_is_altered_read_no_stored_maps() -> None:
    rows = {r.name: r for r in all_rows("long")}
    for name, reads in (("", True), ("+teacher_backbone_reset", False), ("+half_points", False), ("+divide_by_batch", True)):
        assert bool(maps_of(rows[f"crkd{name}"])) == reads
    assert not maps_of(with_tries([], ["crkd:defects=half_points"])[-1])
    for method, options, marked in (("dual_distill", {}, True), ("dual_distill", METHODS["dual_distill"].twin_options, False)):
        run = {"method": method, "options": dict(options), "loader": {"cached_teachers": True}}
        assert _reads_stored({"asked": {"run": run}}) == marked
    assert not maps_of(rows["crkd+teacher_batch_statistics"]) and not maps_of(rows["dual_distill_twin"])


def test_the_printed_command_names_the_folder_that_was_asked_for(
    fake: dict[str, Any], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {"rows": ("plain",), "seeds": (0,)}
    for docs in (None, "docs/prices", tmp_path / "x"):  # a path of this machine is no one else's
        lines = _run(fake, **values, docs=docs)["commands"]
    assert [line.split(" --out ")[1] for line in lines] == ["DIR --docs docs", "DIR --docs docs/prices"]


def test_a_defect_that_never_acts_is_said_to_end_in_the_same_weights(fake: dict[str, Any]) -> None:
    methods = {"blocks": ("main", "defects"), "methods": ("crkd",), "seeds": (0,)}
    _run(fake, **methods)
    twin, row = (fake["out"] / f"runs/{n}/seed0/score.json" for n in ("crkd", "crkd+divide_by_batch"))
    row.write_text(json.dumps(json.loads(row.read_text()) | {"weights_sha256": json.loads(twin.read_text())["weights_sha256"]}))
    report = _run(fake, **methods, docs=fake["out"] / "docs")
    same = {p["method"]: p["equal_weights"] for p in report["paired"] if p["kind"] == "price"}
    assert len(same) > 2 and [k for k, v in same.items() if v] == ["crkd+divide_by_batch"]
    assert "| crkd+divide_by_batch | price | crkd | same weights |" in (fake["out"] / "docs" / "results.md").read_text()


def test_a_run_that_was_continued_has_no_cost(fake: dict[str, Any]) -> None:
    """Its first part ran in another process: seed 1 alone would make IMKD look cheap."""
    train = fake["out"] / "runs" / "imkd" / "seed1" / "train"
    (train / "last.ckpt").mkdir(parents=True)
    (train / "last.ckpt" / "checkpoint.json").write_text(json.dumps({"weights_sha256": "half", "step": 500}))
    _run(fake, seeds=(0, 1), methods=("imkd",))
    costs = [json.loads((fake["out"] / f"runs/imkd/seed{n}/score.json").read_text())["cost"] for n in (0, 1)]
    assert costs[0]["cpu_seconds"] is not None and costs[1]["cpu_seconds"] is costs[1]["train_seconds"] is None
    scores = [
        {"row": "imkd", "kind": "method", "seed": n, "nds": 1.0, "steps": 10, "cost": {"device": "cpu", "cpu_seconds": c}}
        for n, c in ((0, 30.0), (1, None))
    ]
    assert _costs(scores)[0]["cpu_seconds_per_step"] == 3


def test_costs_compare_cpu_time_on_a_cpu_and_time_on_a_gpu() -> None:
    def score(row: str, wall: float, cpu: float, device: str) -> dict[str, Any]:
        cost = {"seconds_per_step": wall, "cpu_seconds": cpu, "device": device, "counted_mib": 3.0, "peak_mib": 7.0}
        return {"row": row, "kind": "method", "seed": 0, "nds": 1.0, "steps": 10, "cost": cost}

    for device, times, peak in (("cpu", 1.5, None), ("cuda", 4.0, 7.0)):
        costs = {c["row"]: c for c in _costs([score("plain", 1.0, 20.0, device), score("imkd", 4.0, 30.0, device)])}
        assert costs["plain"]["times_plain"] == 1 and costs["imkd"]["times_plain"] == times
        assert costs["imkd"]["cpu_seconds_per_step"] == 3 and costs["imkd"]["counted_mib"] == 3
        assert costs["imkd"]["peak_mib"] == peak


def test_parts_of_a_gain_add_up_to_the_nuscenes_detection_score() -> None:
    names = list(cell.ERRORS.values())
    rng = np.random.default_rng(0)
    mine, theirs = ([_score_of(rng, names) for _ in range(4)] for _ in range(2))
    mine[0]["errors"]["mAVE"], theirs[1]["errors"]["mAVE"] = 1.4, 1.3  # beyond what the score counts
    for score in (*mine, *theirs):  # mAP and NDS in points, as in score.json
        score["nds"] = 100 * (5 * score["map"] / 100 + sum(max(0.0, 1.0 - score["errors"][n]) for n in names)) / 10
    parts = _parts_nds(mine, theirs)
    assert set(parts) == {"mAP", *names}
    gain = np.mean([a["nds"] - b["nds"] for a, b in zip(mine, theirs, strict=True)])
    assert sum(v for v in parts.values() if v is not None) == pytest.approx(gain, abs=5e-3)
    assert parts["mAP"] == pytest.approx(
        np.mean([a["map"] - b["map"] for a, b in zip(mine, theirs, strict=True)]) / 2, abs=1e-3
    )


def _score_of(rng: np.random.Generator, names: list[str]) -> dict[str, Any]:
    return {"map": rng.uniform(20, 40), "errors": {n: rng.uniform(0.1, 0.9) for n in names}}


def test_six_seeds_of_everything_finish_the_table(fake: dict[str, Any]) -> None:
    report = _run(fake, seeds=tuple(range(6)))
    assert "Robustness" not in (fake["out"] / "results.md").read_text()
    (fake["out"] / "robustness").mkdir()
    (fake["out"] / "robustness" / "robustness.md").write_text("| night | 12.5 |\n")
    assert _run(fake, seeds=tuple(range(6))) == report
    assert "## Robustness\n\n| night | 12.5 |" in (fake["out"] / "results.md").read_text()
    assert report["unfinished"] == report["unfit"] == []
    text = (fake["out"] / "results.md").read_text()
    assert "Unfinished" not in text and "No claim" not in text


def test_a_rows_student_and_loader_reach_its_training(fake: dict[str, Any]) -> None:
    """And those of its twin; nobody else's."""
    rows = ("plain+ego_frame:mean_camera", "adaptive_smooth/10_sim_drop")
    _run(fake, seeds=(0,), rows=rows, blocks=("main", "ablations", "defects"), admission=False)
    runs = fake["runs"]
    assert {name for name, run in runs.items() if run.loader.parity} == {rows[0]}
    assert runs[rows[0]].loader.parity == ("ego_frame:mean_camera",)
    dropped = {name for name, run in runs.items() if run.model.get("sim_drop") == 0.1}
    assert dropped == {rows[1], "adaptive_smooth_twin:sim_drop=0.1"}


def test_a_finished_pair_stands_beside_unfinished_rows(fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named as unfinished are the others; Holm is asked about the four methods, not the one that was run."""
    asked: list[dict[str, float]] = []
    monkeypatch.setattr("pipelines.bench_report.holm", lambda p: asked.append(dict(p)) or holm(p))
    report = _run(fake, seeds=tuple(range(6)), methods=("imkd",))
    named = " ".join(report["unfinished"])
    assert "imkd" not in named and "plain" not in named and "crkd: 0 of 6 seeds; crkd_twin" in "; ".join(report["unfinished"])
    assert set(asked[-1]) == set(PUBLISHED_GAIN_NDS) and [k for k, p in asked[-1].items() if p == p] == ["imkd"]
    assert "No claim" not in (fake["out"] / "results.md").read_text()
    begun = _run(fake, seeds=(0,), methods=("crkd",))
    assert "crkd: 1 of 6 seeds" in begun["unfinished"] and begun["spread"] == report["spread"]
    assert begun["unfit"] == [], "one that is begun takes no claim from those that are finished"
    monkeypatch.setattr("pipelines.bench_report.MAX_DETECTABLE", 0.0)
    report = _run(fake, seeds=tuple(range(6)), methods=("imkd",))
    assert (
        len(report["unfit"]) == 1
        and "**No claim is made from this table:** the smallest" in (fake["out"] / "results.md").read_text()
    )


def test_a_benchmark_with_independent_materials_stands_beside(fake: dict[str, Any]) -> None:
    rows = ("plain", "camera_only", "radar_only", "imkd")
    alone = _run(fake, seeds=(0,), rows=rows)
    assert alone["independent"] is None
    other = _run(
        fake, out=fake["out"] / "independent", materials="independent", seeds=(1,), rows=("plain", "imkd"), admission=False
    )
    report = _run(fake, seeds=(0,), rows=rows)
    assert {k: v for k, v in report.items() if k != "independent"} == {k: v for k, v in alone.items() if k != "independent"}
    assert report["independent"]["paired"] == other["paired"] and report["independent"]["rows"] == other["rows"]
    assert {r["seed"] for r in report["rows"] if r["kind"] != "teacher"} == {0}
    text = (fake["out"] / "results.md").read_text()
    main, beside = text.split("## The same with `--materials independent`")
    assert "| imkd | 0 |" in main and "| imkd | 0 |" not in beside and "| imkd | 1 |" in beside
    assert "--materials independent" in beside and "--no-admission --out DIR/independent\n" in beside
    assert "not shown there: camera+radar above camera only, NDS, camera+radar above radar only, NDS." in beside


def test_further_seeds_of_the_plain_student_alone_do_not_count_for_what_is_found(fake: dict[str, Any]) -> None:
    rows = ("plain", "camera_only", "radar_only", "imkd")
    three = _run(fake, seeds=(0, 1, 2), rows=rows)["spread"]
    assert three["seeds"] == three["seeds_compared"] == 3 and three["compared_rows"] == "begun"
    _run(fake, seeds=tuple(range(10)), rows=("plain",))
    more = _run(fake, seeds=(0, 1, 2), rows=rows)["spread"]
    assert more["seeds"] == 10 and more["seeds_compared"] == 3
    assert more["smallest_detectable_gain_nds"] == pytest.approx(smallest_detectable(2**0.5 * more["spread_nds"], 3), rel=1e-2)


def test_each_run_gets_exactly_its_teachers(fake: dict[str, Any]) -> None:
    _run(fake, seeds=(0,))
    given = fake["teachers"]
    assert given["imkd"] == ["label", "lidar"] and given["crkd"] == ["fusion"] and given["dual_distill"] == ["lidar"]
    assert given["imkd_twin"] == [] and given["dual_distill_twin"] == ["lidar"] and given["plain"] == []


def test_finished_runs_are_never_repeated_and_a_stop_is_continued(fake: dict[str, Any]) -> None:
    first = _run(fake, max_runs=3)
    after_three = len(fake["trained"])
    assert len([r for r in first["rows"] if r["kind"] != "teacher"]) == 3
    whole = _run(fake)
    again = _run(fake)
    assert again == whole and len(fake["trained"]) == len(set(fake["trained"])) > after_three


def test_other_settings_in_the_same_folder_are_refused(fake: dict[str, Any]) -> None:
    _run(fake, seeds=(0,), rows=("plain",))
    with pytest.raises(MismatchError, match="other settings"):
        _run(fake, seeds=(0,), rows=("plain",), steps={"student": 7})


def test_a_setting_that_came_later_keeps_finished_runs(fake: dict[str, Any]) -> None:
    first = _run(fake, seeds=(0,), rows=("plain",))
    path = fake["out"] / "runs" / "plain" / "seed0" / "score.json"
    score = json.loads(path.read_text())
    del score["asked"]["run"]["loader"]["leave_out"], score["asked"]["run"]["sync_batchnorm"]  # as an older version wrote it
    del score["asked"]["run"]["model"]["radar_states"]
    path.write_text(json.dumps(score))
    trained = len(fake["trained"])
    assert _run(fake, seeds=(0,), rows=("plain",)) == first and len(fake["trained"]) == trained
    score["asked"]["run"]["loader"]["leave_out"] = 4
    path.write_text(json.dumps(score))
    with pytest.raises(MismatchError, match="other settings"):
        _run(fake, seeds=(0,), rows=("plain",))


def test_two_processes_share_one_table(fake: dict[str, Any]) -> None:
    """What another process holds is left to it; the rest is run, and the table is whole once both are done."""
    lines: list[str] = []
    with held(fake["out"] / "runs" / "imkd" / "seed1", wait=False) as mine:
        assert mine
        _run(fake, methods=("imkd",), progress=lambda t: lines.append(t.text))
    assert "imkd seed 1: held by another process" in lines
    assert ("seed1", "imkd") not in fake["trained"] and ("seed2", "imkd") in fake["trained"]
    report = _run(fake, methods=("imkd",))
    assert ("seed1", "imkd") in fake["trained"] and len(fake["trained"]) == len(set(fake["trained"]))
    assert [r["seed"] for r in report["rows"] if r["method"] == "imkd"] == [0, 1, 2]


def test_admission_waits_for_baselines_of_another_process(fake: dict[str, Any]) -> None:
    """The other process holds the camera-only run; methods begin when it is scored, and not before."""
    entered, waited = threading.Event(), []

    def other() -> None:
        with held(fake["out"] / "runs" / "camera_only" / "seed0", wait=False) as mine:
            assert mine
            entered.set()
            while ("seed0", "plain") not in fake["trained"]:
                time.sleep(0.01)
            time.sleep(0.2)
            waited.append(any(row == "imkd" for _, row in fake["trained"]))
            rows = {r.name: r for r in rows_of(("main",))}
            chosen = PRESETS["tiny"]
            theirs = cell.Bench(
                out=fake["out"], preset=chosen, world=fake["out"], cache=SimpleNamespace(id="cache"), accelerator="cpu",
                engine="devkit", tell=lambda text: None, steps=chosen.steps, settings=chosen.settings,
            )  # fmt: skip
            bench.run_cell(theirs, rows["camera_only"], 0, {})

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    report = _run(fake, seeds=(0,))
    thread.join(10)
    assert waited == [False] and report["admission"]["passed"]
    assert ("seed0", "imkd") in fake["trained"]


def test_commands_started_at_once_are_all_remembered(tmp_path: Path) -> None:
    def remember(k: int) -> None:
        bench._remember_command(tmp_path, {"preset": "tiny", "seeds": str(k)}, {}, {}, None, "docs")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(remember, [k % 8 for k in range(64)]))
    lines = json.loads((tmp_path / "commands.json").read_text())
    assert sorted(lines) == [f"imkd bench distill --preset tiny --seeds {k} --out DIR --docs docs" for k in range(8)]


def test_teachers_of_another_benchmark_are_used_and_shown(fake: dict[str, Any], tmp_path: Path) -> None:
    _run(fake, seeds=(0,), methods=("imkd",))
    before = list(fake["trained"])
    with pytest.raises(UsageError, match="no finished teacher"):
        _run(fake, out=tmp_path / "b", seeds=(0,), methods=("crkd",), teachers=fake["out"])
    report = _run(fake, out=tmp_path / "b", seeds=(0,), methods=("imkd",), teachers=fake["out"], held_in=2, admission=False)
    assert not [t for t in fake["trained"][len(before) :] if t[1] == "teachers"]
    assert [r["method"] for r in report["rows"]][:1] == ["teacher_lidar"] and "--teachers TEACHERS" in report["commands"][-1]


def test_borrowed_teachers_are_told_from_own_ones(fake: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    _run(fake, seeds=(0,), methods=("imkd",))
    for given in (fake["out"], fake["out"] / "." / ""):  # its own: nothing to borrow
        assert _run(fake, seeds=(0,), methods=("imkd",), teachers=given)["admission"]["passed"]
    other = tmp_path / "other"
    monkeypatch.setattr("imkd_data.open_cache", lambda path: SimpleNamespace(id="another cache"))
    report = _run(
        fake, out=other, seeds=(0,), methods=("imkd",), teachers=fake["out"], materials="independent", admission=False
    )
    assert (report["materials"], report["cache"]) == ("independent", "another cache")  # the teacher's file says class, cache
    checks = {c["name"]: c for c in report["admission"]["checks"]}
    assert checks["teacher above plain, NDS"]["found"] is None  # scored on other samples: no figure to compare
    assert all(p["gap_closed"] is None for p in report["paired"])
    with pytest.raises(MismatchError, match="teacher of its own"):
        _run(fake, out=fake["out"], seeds=(0,), methods=("imkd",), teachers=other)


def test_an_ablation_that_is_the_method_itself_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, left, out in (
        (0.0, "crkd/F3_velocity", "crkd/F3_no_velocity"),
        (1.0, "crkd/F3_no_velocity", "crkd/F3_velocity"),
    ):
        monkeypatch.setitem(bench_presets.WEIGHTS, "tiny", {"crkd": {"velocity_weight": value}})
        names = {r.name for r in all_rows("tiny")}
        assert left in names and out not in names
    assert "imkd/14_from_view" in names, "pooled from rounded means, the view is near the planes and not the same"
    assert "imkd/default_weights" not in names and "imkd" in names  # no frozen weights: its own are the defaults


def test_frozen_weights_are_below_the_options_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = {"imkd": {"lambda_resp": 0.5, "lambda_l2m": 0.125}, "crkd": {"lambda_fused": 2.0}}
    monkeypatch.setitem(bench_presets.WEIGHTS, "tiny", frozen)
    rows = {r.name: dict(r.options) for r in all_rows("tiny")}
    assert rows["imkd"] == frozen["imkd"] and rows["imkd/default_weights"] == {}
    assert rows["imkd_occupancy"] == {**frozen["imkd"], "intensity_control": "occupancy"}
    assert rows["imkd/03_stage3_supervised"]["lambda_resp"] == 0.5 and rows["imkd/03_stage3_supervised"]["response"] == "off"
    assert rows["imkd/08_labeldistill_on_merged"] == {"preset": "labeldistill_on_merged"}, "a paper's settings are whole"
    assert rows["adaptive_smooth/02_mse"] == {"preset": "simdistill_like"} and rows["crkd/C3_class_max"]["lambda_fused"] == 2.0
    assert rows["imkd_twin"] == METHODS["imkd"].twin_options and rows["crkd+divide_by_batch"]["lambda_fused"] == 2.0
    assert {r.name: dict(r.options) for r in all_rows("nuscenes")}["imkd"] == {}


def test_baselines_that_a_plan_lacks_are_run_before_its_methods(fake: dict[str, Any]) -> None:
    report = _run(fake, seeds=(0, 1), rows=("imkd",))
    assert report["admission"]["passed"]
    order = [row for _, row in fake["trained"]]
    assert max(order.index(r) for r in ("plain", "camera_only", "radar_only")) < order.index("imkd_twin") < order.index("imkd")
    assert _run(fake, out=fake["out"].with_name("b"), seeds=(0,), blocks=("ablations",), methods=("crkd",))["admission"][
        "passed"
    ]


def test_a_baseline_whose_process_died_is_run_by_the_one_that_waited(fake: dict[str, Any]) -> None:
    entered = threading.Event()

    def other() -> None:
        with held(fake["out"] / "runs" / "camera_only" / "seed0", wait=False):
            entered.set()
            while ("seed0", "plain") not in fake["trained"]:
                time.sleep(0.01)
            time.sleep(0.2)  # and ends without a score

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    assert _run(fake, seeds=(0,))["admission"]["passed"]
    thread.join(10)


def test_several_devices_share_one_batch(tmp_path: Path) -> None:
    chosen = PRESETS["tiny"]

    def run(devices: int) -> Any:
        asked = cell.Bench(
            out=tmp_path, preset=chosen, world=tmp_path, cache=SimpleNamespace(id="cache"), accelerator="cpu", engine="devkit",
            tell=lambda text: None, steps=chosen.steps, settings=chosen.settings, devices=devices,
        )  # fmt: skip
        return cell.run_of(asked, "student", seed=0)

    assert (run(1).batch_size, run(1).global_batch) == (2, 0)
    assert (run(2).batch_size, run(2).global_batch) == (1, 2)  # the same samples a step as on one device
    with pytest.raises(UsageError, match="devices"):
        run(3)


def test_methods_wait_for_admission(fake: dict[str, Any]) -> None:
    fake["base"] = 10.0
    with pytest.raises(UsageError, match="admission") as caught:
        _run(fake, seeds=(0,))
    assert "plain student" in str(caught.value) and caught.value.code == 2
    assert not any(row == "imkd" for _, row in fake["trained"])
    report = _run(fake, seeds=(0,), admission=False)
    assert report["admission"]["passed"] is False and any(p["method"] == "imkd" for p in report["paired"])


def test_admission_names_each_check() -> None:
    def score(row: str, nds: float, rings: tuple[float, ...] = (50.0, 30.0, 10.0)) -> dict[str, Any]:
        return {"row": row, "seed": 0, "nds": nds, "map_by_range": [{"map": r} for r in rings]}

    good = [score("plain", 40), score("teacher_lidar", 49), score("camera_only", 35), score("radar_only", 20)]
    assert admission_test(good)["passed"]
    for i, worse in ((0, 20), (0, 70), (1, 47), (2, 41), (3, 45)):
        bad = [*good]
        bad[i] = score(good[i]["row"], worse)
        assert not admission_test(bad)["passed"]
    assert not admission_test([score("plain", 40, (30.0, 50.0, 10.0)), *good[1:]])["passed"]
    assert not admission_test([])["passed"]


def test_unknown_names_are_refused(fake: dict[str, Any]) -> None:
    for values in (
        {"preset": "huge"},
        {"blocks": ("extra",)},
        {"methods": ("nothing",)},
        {"rows": ("nowhere",)},
        {"seeds": ()},
    ):
        with pytest.raises(UsageError):
            _run(fake, **values)


def test_a_holder_of_nuscenes_gets_full_size_runs_on_the_own_data(fake: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="data set you hold"):
        _run(fake, preset="nuscenes", seeds=(0,), rows=("imkd",))
    values: dict[str, Any] = {"preset": "nuscenes", "seeds": (0,), "rows": ("imkd",), "world": tmp_path, "cache": tmp_path}
    report = _run(fake, **values, settings={"batch_size": 2})
    names = {row: run.name for row, run in fake["runs"].items()}
    assert names == {"lidar": "pillar_r34", "label": "label", **dict.fromkeys(("plain", "imkd", "imkd_twin"), "crn_r50")}
    assert fake["runs"]["imkd"].epochs == 24 and fake["runs"]["imkd"].max_steps == 0
    assert fake["runs"]["imkd"].batch_size == 2 and fake["runs"]["imkd"].method == "imkd"
    assert report["materials"] == "real" and "synthetic" not in (fake["out"] / "results.md").read_text()
    row = report["rows"][0]
    assert report["cache"] == "cache" and len(row["identity"]) == 16 and row["weights_sha256"] and report["versions"]["imkd"]


def test_settings_are_tried_on_train_scenes_only_and_all_stay_in_the_table(fake: dict[str, Any]) -> None:
    tries = ("imkd:lambda_l2m=0.25", "imkd:lambda_l2m=0.5,rho=0.1")
    with pytest.raises(UsageError, match="train scenes only"):
        _run(fake, seeds=(0,), rows=("plain",), tries=tries)
    report = _run(fake, seeds=(0,), rows=("plain",), tries=tries, held_in=3)
    assert {r["method"] for r in report["rows"]} >= {"imkd_twin", *tries}
    gains = {p["method"]: p["against"] for p in report["paired"]}
    assert gains == dict.fromkeys(tries, "imkd_twin")
    assert fake["runs"][tries[1]].options == {"lambda_l2m": 0.5, "rho": 0.1}
    assert {run.loader.leave_out for run in fake["runs"].values()} == {3}
    assert "--held-in 3 --try imkd:lambda_l2m=0.25 --try imkd:lambda_l2m=0.5,rho=0.1" in report["commands"][-1]
    for wrong in ("nothing:a=1", "imkd:rho", "imkd:no_such_option=1"):
        with pytest.raises(ImkdError):
            _run(fake, seeds=(0,), rows=("plain",), tries=(wrong,), held_in=3)


def test_chosen_rows_bring_their_twins() -> None:
    names = [r.name for r in rows_of(("main",), (), ("crkd+divide_by_batch",))]
    assert names == ["plain", "crkd_twin", "crkd", "crkd+divide_by_batch"]


@pytest.mark.slow
def test_the_smoke_preset_runs_for_real_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """World, cache, teachers, one method and its twin, two steps each: about a minute; the second call reads only."""
    values: dict[str, Any] = {"out": tmp_path, "preset": "smoke", "seeds": (0,), "rows": ("imkd",), "accelerator": "cpu"}
    first = bench.bench_distill(**values)
    assert {r["method"] for r in first["rows"]} == {"teacher_lidar", "plain", "imkd_twin", "imkd"}
    assert "warning" not in capsys.readouterr().err  # of a teacher whose lead is unknown: admission compares it
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("score.json")}
    assert bench.bench_distill(**values) == first and all(p.stat().st_mtime_ns == t for p, t in stamps.items())


@pytest.mark.slow
def test_stored_teachers_train_as_running_ones_and_leave_the_cache_alone(tmp_path: Path, monkeypatch: Any) -> None:
    still = replace(PRESETS["smoke"], settings={"loader.augment.enabled": "false"})
    values: dict[str, Any] = {"preset": "smoke", "seeds": (0,), "rows": ("imkd",), "accelerator": "cpu"}
    monkeypatch.setitem(PRESETS, "smoke", still)
    live = bench.bench_distill(**values, out=tmp_path / "live")
    given = {"world": tmp_path / "live/world", "cache": tmp_path / "live/cache", "teachers": tmp_path / "live"}
    manifest = (tmp_path / "live/cache/manifest.json").read_bytes()
    monkeypatch.setitem(PRESETS, "smoke", replace(still, stored_teachers=True))
    kept = bench.bench_distill(**values, out=tmp_path / "kept", **given)

    assert (tmp_path / "live/cache/manifest.json").read_bytes() == manifest
    added = set(open_cache(tmp_path / "kept/stored").fields) - set(open_cache(tmp_path / "live/cache").fields)
    assert {name.split("_", 2)[2] for name in added} == {"bev_stage1", "bev_stage2", "bev_neck"}
    names = [(where, row) for where in ("live", "kept") for row in ("imkd", "imkd_twin")]
    scores = {n: json.loads((tmp_path / n[0] / "runs" / n[1] / "seed0/score.json").read_text()) for n in names}
    assert [scores["kept", r]["asked"]["run"]["loader"]["cached_teachers"] for r in ("imkd", "imkd_twin")] == [True, False]
    assert scores["kept", "imkd_twin"]["weights_sha256"] == scores["live", "imkd_twin"]["weights_sha256"]
    for name, value in scores["live", "imkd"]["losses"].items():
        assert scores["kept", "imkd"]["losses"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert scores["kept", "imkd"]["asked"]["cache"] == scores["live", "imkd"]["asked"]["cache"]
    assert len(live["rows"]) == len(kept["rows"]) and bench.bench_distill(**values, out=tmp_path / "kept", **given) == kept

    base = open_cache(tmp_path / "live/cache")
    fields = {**base.manifest["fields"], "boxes": {**base.manifest["fields"]["boxes"], "key_recipe_part": "0" * 64}}
    other: Any = SimpleNamespace(path=base.path, manifest={"fields": fields})
    with pytest.raises(MismatchError, match="another cache"):
        store_teachers(tmp_path / "kept", other, {}, "cpu", print)


def test_stored_teachers_need_a_preset_without_augmentation() -> None:
    for preset in PRESETS.values():
        assert not preset.stored_teachers or preset.settings["loader.augment.enabled"] == "false"


def test_only_runs_that_read_maps_are_marked_so(fake: dict[str, Any], monkeypatch: Any) -> None:
    """Whatever else is in the plan: a twin with its teacher's heads has a teacher, and reads none of its maps."""
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], stored_teachers=True))
    monkeypatch.setattr(bench, "store_teachers", lambda *a: SimpleNamespace(id="stored"))
    for rows in (("dual_distill_twin",), ("dual_distill",)):
        _run(fake, out=fake["out"] / rows[0], seeds=(0,), rows=rows)
        assert not fake["runs"]["dual_distill_twin"].loader.cached_teachers
    assert fake["runs"]["dual_distill"].loader.cached_teachers
    text = (fake["out"] / "dual_distill" / "results.md").read_text()
    assert "read their teachers from stored maps" in text.replace("\n", " ")
    assert "stored maps" not in (fake["out"] / "dual_distill_twin" / "results.md").read_text()


def test_only_maps_that_the_plan_reads_are_stored() -> None:
    given = {name: Path(name) for name in ("lidar", "label", "fusion")}
    assert maps_read(rows_of(("main",), names=("imkd_label_only",)), given) == {}
    plan = rows_of(("main",), names=("imkd", "crkd"))
    maps = maps_read(plan, given)
    neck_for_the_head = {"bev_stage1", "bev_stage2", "bev_neck"}
    assert set(maps[Path("lidar")]) == neck_for_the_head
    assert "bev_neck" in maps[Path("fusion")] and "head" not in maps[Path("fusion")] and Path("label") not in maps


@pytest.mark.slow
def test_several_devices_train_in_a_process_of_their_own(tmp_path: Path) -> None:
    values: dict[str, Any] = {"out": tmp_path, "preset": "smoke", "seeds": (0,), "rows": ("plain",), "accelerator": "cpu"}
    report = bench.bench_distill(**values, devices=2)
    assert [r["method"] for r in report["rows"]] == ["teacher_lidar", "plain"] and report["rows"][1]["steps"] == 2
    log = (tmp_path / "runs" / "plain" / "seed0" / "train" / "log.jsonl").read_text()
    assert len([line for line in log.splitlines() if '"loss"' in line]) == 2, "one rank writes the log"


@pytest.mark.slow
def test_tuning_trains_and_scores_on_train_scenes_only(tmp_path: Path) -> None:
    values: dict[str, Any] = {"out": tmp_path, "preset": "smoke", "seeds": (0,), "rows": ("plain",), "accelerator": "cpu"}
    bench.bench_distill(**values, held_in=1)
    cache = open_cache(tmp_path / "cache")
    train = [int(r) for r in cache.rows("train")]
    trained = np.load(tmp_path / "runs" / "plain" / "seed0" / "train" / "rows.npy").tolist()
    score = json.loads((tmp_path / "runs" / "plain" / "seed0" / "score.json").read_text())
    assert set(trained) < set(train) and score["samples"] == len(train) - len(trained) == PRESETS["smoke"].keyframes
    with pytest.raises(UsageError, match="kept back"):
        world, cache = tmp_path / "world", tmp_path / "cache"
        bench.bench_distill(**{**values, "out": tmp_path / "other"}, world=world, cache=cache, held_in=99)
