"""What the distillation benchmark is asked for: refused commands leave no trace, materials and rows that contradict, teachers
that a gap is measured against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bench_distill import _run, fake  # noqa: F401

from imkd_data.errors import ImkdError, MismatchError, SourceMissingError, UsageError
from imkd_data.world import write_world
from pipelines.bench_report import admission_test
from pipelines.bench_rows import rows_of

Fake = dict[str, Any]
LINE = "imkd bench distill --preset tiny --seeds 0 --blocks main"


def commands(out: Path) -> list[str]:
    return json.loads((out / "commands.json").read_text()) if (out / "commands.json").is_file() else []


def test_refused_commands_are_not_remembered(fake: Fake, tmp_path: Path) -> None:  # noqa: F811
    refused: list[dict[str, Any]] = [
        {"seeds": ()},
        {"preset": "nuscenes"},
        {"world": tmp_path / "nowhere"},
        {"teachers": tmp_path / "nowhere"},
        {"steps": {"lidar": 7}, "devices": 3},
        {"rows": ("crkd",), "methods": ("imkd",)},
    ]
    for values in refused:
        with pytest.raises(ImkdError):
            _run(fake, **{"seeds": (0,), **values})
    assert commands(fake["out"]) == [] and not fake["trained"]
    report = _run(fake, seeds=(0,), rows=("plain",))
    with pytest.raises(MismatchError, match="other settings"):
        _run(fake, seeds=(0,), rows=("plain",), steps={"student": 7})
    assert commands(fake["out"]) == report["commands"] and len(report["commands"]) == 1


def test_a_command_is_remembered_once_it_has_run_something(fake: Fake) -> None:  # noqa: F811
    fake["base"] = 10.0
    with pytest.raises(UsageError, match="admission"):
        _run(fake, seeds=(0,))  # its baselines were run and stand in the table
    (line,) = commands(fake["out"])
    assert line.startswith(LINE) and line in (fake["out"] / "results.md").read_text()
    report = _run(fake, seeds=(0, 1), max_runs=0, admission=False)  # nothing new, but a table of what is there
    assert len(report["commands"]) == 2


def test_a_command_that_stops_in_its_second_run_is_remembered(fake: Fake, monkeypatch: Any) -> None:  # noqa: F811
    from pipelines import bench_distill as bench

    real = bench.run_cell

    def stops(b: Any, row: Any, seed: int, given: Any) -> Any:
        if row.name == "camera_only":
            raise KeyboardInterrupt
        return real(b, row, seed, given)

    monkeypatch.setattr(bench, "run_cell", stops)
    with pytest.raises(KeyboardInterrupt):
        _run(fake, seeds=(0,))
    assert len(commands(fake["out"])) == 1


def test_materials_are_those_of_the_given_world(fake: Fake, tmp_path: Path) -> None:  # noqa: F811
    """Also of a world that `imkd-data synth` wrote: the record is the tree's own."""
    other = tmp_path / "tree"
    values: dict[str, Any] = {"world": other, "cache": tmp_path, "seeds": (0,), "rows": ("plain",)}
    write_world(other, scenes=1, keyframes=2, images=False, materials="class")
    with pytest.raises(MismatchError, match="other materials") as caught:
        _run(fake, **{**values, "out": tmp_path / "b"}, materials="independent")
    assert (caught.value.details["expected"], caught.value.details["found"]) == ("independent", "class")
    assert caught.value.details["file"] == str(other)
    assert _run(fake, **{**values, "out": tmp_path / "c"})["materials"] == "class"
    assert _run(fake, **{**values, "out": tmp_path / "e"}, preset="nuscenes")["materials"] == "real"
    for record in ("no record of ours", "{}", '{"options": 3}'):  # it says nothing: taken as it is
        (other / ".synth" / "complete.json").write_text(record)
        assert _run(fake, **{**values, "out": tmp_path / "d"}, materials="independent")["materials"] == "independent"


def test_a_world_that_is_not_there_is_said_before_anything(fake: Fake, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(SourceMissingError, match="no world here") as caught:
        _run(fake, world=tmp_path / "nowhere", cache=tmp_path)
    assert caught.value.details["file"] == str(tmp_path / "nowhere") and "--world" in caught.value.details["next"]
    assert "--dataroot" not in str(caught.value) and not fake["trained"]


def test_a_named_row_of_a_method_that_is_left_out_is_refused() -> None:
    with pytest.raises(UsageError, match="rows crkd, crkd_twin are of no method in --methods") as caught:
        rows_of(("main",), ("imkd",), ("crkd", "imkd", "plain", "crkd_twin"))
    assert caught.value.details["expected"] == "imkd" and caught.value.details["found"] == "crkd"
    named = [r.name for r in rows_of(("main", "controls"), ("imkd",), ("imkd_permuted",))]
    assert named == ["plain", "imkd_twin", "imkd_permuted"] and rows_of(("main",), (), ("crkd",))


def test_help_says_that_rows_go_before_blocks() -> None:
    from click.testing import CliRunner

    from cli.bench_distill import distill

    text = " ".join(CliRunner().invoke(distill, ["--help"]).output.split())
    assert "Only these rows, of whatever block, and the twins" in text


def test_map_must_fall_strictly_with_range() -> None:
    def score(row: str, nds: float, rings: tuple[float, ...] = (50.0, 30.0, 10.0)) -> dict[str, Any]:
        return {"row": row, "seed": 0, "nds": nds, "map_by_range": [{"map": r} for r in rings]}

    others = [score("teacher_lidar", 60), score("camera_only", 35), score("radar_only", 20)]
    for rings, passed in (((50.0, 30.0, 10.0), True), ((0.0, 0.0, 0.0), False), ((50.0, 30.0, 30.0), False)):
        assert admission_test([score("plain", 40, rings), *others])["passed"] is passed


def test_the_gap_is_that_to_the_teacher_a_method_learns_from(fake: Fake) -> None:  # noqa: F811
    report = _run(fake, seeds=(0,))
    gaps = {p["method"]: (p["gain_nds"], p["gap_closed"]) for p in report["paired"] if p["kind"] == "system"}
    scores = {r["method"]: r["nds"] for r in report["rows"] if r["seed"] == 0}
    for method, teacher in (
        ("imkd", "teacher_lidar"),
        ("dual_distill", "teacher_lidar"),
        ("crkd", "teacher_fusion"),
        ("adaptive_smooth", "teacher_fusion"),
    ):
        gain, closed = gaps[method]
        assert closed == pytest.approx(gain / (scores[teacher] - scores["plain"]), abs=1e-3), method
    assert scores["teacher_lidar"] != scores["teacher_fusion"]
    assert "*gap closed*: the gain as a share of the lead" in (fake["out"] / "results.md").read_text()
