"""The demo at the smallest size that still goes through every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imkd_data.errors import UsageError
from pipelines.demo import OWNED, STAGES, DemoSize, commands, demo_runs, run_demo

SMALLEST = DemoSize(scenes=2, keyframes=2, image_hw_px=(90, 160), steps=(2, 1, 2))


def test_demo_goes_through_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = []
    out = tmp_path / "demo"
    result = run_demo(out, size=SMALLEST, workers=1, progress=events.append)
    assert [s.name for s in result.stages] == list(STAGES)
    for name in ("teacher", "label", "student"):
        assert (out / name / "last.ckpt" / "checkpoint.json").is_file() and result.checkpoints[name].exists()
    for name in ("teacher", "student"):
        official = json.loads((out / name / "eval" / "metrics_summary.json").read_text())
        assert official["engine"] == "devkit" and official["num_samples"] == 2
        assert official["meta"]["use_lidar"] is (name == "teacher") and official["meta"]["use_radar"] is (name == "student")
    student = json.loads((out / "student" / "last.ckpt" / "checkpoint.json").read_text())
    assert student["method"] == "imkd" and student["warnings"] == []
    assert "teacher lidar" not in capsys.readouterr().err and "warning" not in (out / "student" / "log.jsonl").read_text()
    stages = json.loads((out / "stages.json").read_text())
    assert [s["name"] for s in stages] == list(STAGES) and all(s["seconds"] > 0 and s["peak_mb"] > 50 for s in stages)
    page = result.report.read_text()
    assert page.count("<img") == 3 and "CAM_BACK_LEFT" in page and "Bird&#x27;s-eye view" in page
    assert all(f">{s}</th>" in page for s in STAGES)  # the cost table holds every stage, the report itself too
    assert {e.kind for e in events} == {"begin", "step", "end"} and all(0 <= e.share <= 1 for e in events)
    assert sum(e.kind == "end" for e in events) == len(STAGES)
    assert {p.name for p in out.iterdir()} == {*OWNED, ".imkd-demo"}


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no demo made"):
        run_demo(tmp_path, size=SMALLEST)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_commands_by_hand_make_the_same_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The recipe of the shown build command is the one that the demo builds by."""
    import shlex
    from types import SimpleNamespace
    from typing import Any

    import pipelines.build
    from cli import data
    from pipelines.demo import _cache, _Clock

    asked: list[dict[str, Any]] = []

    class Reached(Exception):
        pass

    def build(**request: Any) -> Any:
        asked.append(request)
        if len(asked) == 2:
            raise Reached
        return SimpleNamespace(samples=1, bytes=1, seconds=1.0)

    monkeypatch.setattr(pipelines.build, "build", build)
    _cache(tmp_path, SMALLEST, 1, _Clock(tmp_path, None))
    (line,) = (c for c in commands(tmp_path, SMALLEST, 0) if c.startswith("imkd-data build"))
    with pytest.raises(Reached):
        data.group.main(shlex.split(line)[1:], standalone_mode=False)
    ours, shown = asked
    assert ours["recipe_overrides"] == shown["recipe_overrides"] and ours["recipe_overrides"]["view_cells"] == 8
    assert (tuple(shown["splits"]), shown["version"], shown["out"]) == (ours["splits"], ours["version"], ours["out"])


def test_demo_trains_on_train_rows_only() -> None:
    runs = demo_runs(SMALLEST, seed=4)
    assert list(runs) == ["teacher", "label", "student"]
    assert {r.loader.split for r in runs.values()} == {"train"} and {r.seed for r in runs.values()} == {4}
    assert [r.max_steps for r in runs.values()] == [2, 1, 2] and runs["student"].method == "imkd"
