"""Tables that were printed before stand in a new one; training and scoring are replaced by arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bench_distill import _run, fake

from imkd_data.errors import InputDataError, MismatchError, SourceMissingError
from pipelines.bench_printed import joined, read_printed
from pipelines.bench_report import write_report
from pipelines.bench_statistics import SceneMatches

__all__ = ["fake"]  # the fixture

Fake = dict[str, Any]
ROWS = ("plain", "camera_only", "radar_only", "imkd", "imkd_occupancy", "crkd")


def _printed(fake: Fake, tmp_path: Path, **values: Any) -> tuple[Path, dict[str, Any]]:
    """A finished benchmark's results.json, kept; the benchmark itself is gone."""
    report = _run(fake, rows=ROWS, **values)
    tmp_path.mkdir(exist_ok=True)
    kept = tmp_path / "kept.json"
    shutil.copyfile(fake["out"] / "results.json", kept)
    shutil.rmtree(fake["out"])
    fake["trained"].clear()
    return kept, report


def _near(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> None:
    """Gains alike but for what printing three digits of each score takes away; p, which is a rate, to one in a hundred."""
    assert [(p["method"], p["kind"], p["against"], p["seeds"]) for p in mine] == [
        (p["method"], p["kind"], p["against"], p["seeds"]) for p in theirs
    ]
    for a, b in zip(mine, theirs, strict=True):
        for key in (k for k, v in b.items() if isinstance(v, int | float)):
            assert a[key] == pytest.approx(b[key], abs=2e-3, rel=1e-2), (key, a, b)
        assert a["parts_nds"] == pytest.approx(b["parts_nds"], abs=2e-3)


def test_a_printed_table_alone_gives_itself_again(fake: Fake, tmp_path: Path) -> None:
    """Every gain, p, cost, pull and admission check follows from the printed file; nothing is trained for it."""
    kept, before = _printed(fake, tmp_path)
    after = _run(fake, rows=ROWS, also=[kept])
    assert fake["trained"] == [] and after["printed"] == len(after["rows"]) == len(before["rows"])
    assert after["commands"][:-1] == before["commands"] and after["commands"][-1].count("--also RESULTS.json") == 1
    assert len(after["settings"]) == 1
    left_out = {"printed", "commands", "paired"}
    _near(after["paired"], before["paired"])
    assert {k: v for k, v in after.items() if k not in left_out} == {k: v for k, v in before.items() if k not in left_out}
    assert {p["kind"] for p in after["paired"]} == {"distillation", "system", "over control"}
    text = (fake["out"] / "results.md").read_text()
    assert f"{len(after['rows'])} of the {len(after['rows'])} scores come from a table that was printed before" in text


def test_seeds_run_elsewhere_make_one_table_with_the_printed_ones(fake: Fake, tmp_path: Path) -> None:
    kept, _ = _printed(fake, tmp_path, seeds=(0, 1))
    apart = _run(fake, rows=("crkd",), seeds=(0, 1, 2), also=[kept])
    trained = {name for name in fake["trained"] if name[0].startswith("seed")}
    ours = {("seed2", "plain"), ("seed2", "crkd"), ("seed2", "crkd_twin")}
    assert trained == ours, "baselines of the admission test are printed, and so is its teacher"
    shutil.rmtree(fake["out"])
    _run(fake, rows=ROWS, seeds=(0, 1))
    whole = _run(fake, rows=("crkd",), seeds=(0, 1, 2))
    _near(apart["paired"], whole["paired"])
    assert apart["rows"] == whole["rows"] and apart["spread"] == whole["spread"]
    assert whole["printed"] == 0 and "printed before" not in (fake["out"] / "results.md").read_text()
    assert [len(p["seeds"]) for p in apart["paired"] if p["method"] == "crkd"] == [3, 3]


def test_a_printed_network_is_trained_again_where_another_row_goes_on_from_it(fake: Fake, tmp_path: Path) -> None:
    kept, _ = _printed(fake, tmp_path, seeds=(0,))
    first = "crkd_twin:calibration=false"
    values: dict[str, Any] = {"seeds": (0,), "also": [kept], "admission": False}
    _run(fake, rows=("crkd/continued_A4",), **values)
    assert [name for _, name in fake["trained"]][-2:] == [first, "crkd/continued_A4"]
    shutil.copyfile(fake["out"] / "results.json", kept)
    shutil.rmtree(fake["out"])
    fake["trained"].clear()
    _run(fake, rows=("crkd/continued_B4",), **values)
    assert [name for _, name in fake["trained"]] == ["teachers", first, "crkd/continued_B4"]
    shutil.copyfile(fake["out"] / "results.json", kept)
    shutil.rmtree(fake["out"])
    fake["trained"].clear()
    _run(fake, rows=("crkd/continued_B4",), **values)
    assert fake["trained"] == []


def test_printed_rows_of_other_settings_or_code_are_named(fake: Fake, tmp_path: Path) -> None:
    kept, _ = _printed(fake, tmp_path, seeds=(0, 1))
    report = _run(fake, rows=("crkd",), seeds=(2,), also=[kept])
    assert report["mixed"] == []
    shutil.rmtree(fake["out"])
    report = _run(fake, rows=("crkd",), seeds=(2,), also=[kept], settings={"batch_size": 4})
    (line,) = report["mixed"]
    assert line.startswith("batch_size of ") and "crkd seed 2" in line and "seed 1" not in line
    later = json.loads(kept.read_text())  # of a version with another setting, which says nothing of these
    later["settings"] = {k: {**v, "later": 1} for k, v in later["settings"].items()}
    kept.write_text(json.dumps(later))
    shutil.rmtree(fake["out"])
    assert _run(fake, rows=("crkd",), seeds=(2,), also=[kept])["mixed"] == []
    older = json.loads(kept.read_text())
    for row in older["rows"]:
        row["made_by"] = {"code": "0" * 16, "processor": "other"} if row["settings"] else None
        del row["settings"]
    kept.write_text(json.dumps(older))
    shutil.rmtree(fake["out"])
    report = _run(fake, rows=("crkd",), seeds=(2,), also=[kept])
    assert [line.split(" of ")[0] for line in report["mixed"]] == ["code", "processor"]


def test_a_run_that_is_made_again_counts_and_another_end_is_named(fake: Fake, tmp_path: Path) -> None:
    kept, _ = _printed(fake, tmp_path, seeds=(0, 1))
    report = json.loads(kept.read_text())
    for line in report["rows"]:
        if (line["method"], line["seed"]) == ("crkd", 1):
            line |= {"weights_sha256": "0" * 16, "nds": 99.0}
    kept.write_text(json.dumps(report))
    _run(fake, rows=("crkd",), seeds=(1,), admission=False)
    after = _run(fake, rows=("crkd",), seeds=(1,), also=[kept])
    assert "crkd seed 1 was printed with other weights than it has here, which count" in after["mixed"]
    assert max(r["nds"] for r in after["rows"]) < 99.0
    assert len([r for r in after["rows"] if (r["method"], r["seed"]) == ("crkd", 1)]) == 1


def test_intervals_over_scenes_are_kept_and_say_of_how_many_seeds(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Printed ones where they are of more seeds than the runs that are here; computed ones else."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(SceneMatches, "load", classmethod(lambda cls, path: path))
    monkeypatch.setattr("pipelines.bench_report.scene_draws", lambda path, draws: rng.normal(size=draws))

    def with_matches(seeds: tuple[int, ...], **values: Any) -> dict[str, Any]:
        _run(fake, rows=("crkd",), seeds=seeds, admission=False, **values)
        for folder in (fake["out"] / "runs").glob("*/seed*"):
            (folder / "matches.npz").touch()
        return write_report(fake["out"], None, draws=50, also=values.get("also", ()))

    def of(report: dict[str, Any]) -> dict[str, Any]:
        return next(p for p in report["paired"] if (p["method"], p["kind"]) == ("crkd", "distillation"))

    first = of(with_matches((0, 1)))
    assert first["seeds_scenes"] == [0, 1] and first["low_scenes"] < first["high_scenes"]
    kept = tmp_path / "kept.json"
    shutil.copyfile(fake["out"] / "results.json", kept)
    shutil.rmtree(fake["out"])
    one = of(with_matches((2,), also=[kept]))
    assert one["seeds"] == [0, 1, 2] and one["seeds_scenes"] == [0, 1]
    assert (one["low_scenes"], one["high_scenes"]) == (first["low_scenes"], first["high_scenes"])
    assert f"[{one['low_scenes']:+.2f}, {one['high_scenes']:+.2f}] (2 seeds) |" in (fake["out"] / "results.md").read_text()
    more = of(with_matches((2, 3, 4), also=[kept]))
    assert more["seeds"] == [0, 1, 2, 3, 4] and more["seeds_scenes"] == [2, 3, 4]
    older = json.loads(kept.read_text())  # of a version that did not say: of all seeds of the gain
    for line in older["paired"]:
        del line["seeds_scenes"]
    kept.write_text(json.dumps(older))
    assert read_printed([kept]).over_scenes("crkd", "distillation", first["against"])[2] == [0, 1]


def test_a_run_here_may_have_the_weights_of_a_printed_one(fake: Fake, tmp_path: Path) -> None:
    """Tables print the first digits; a switch that never acted is seen by them."""
    kept, _ = _printed(fake, tmp_path, seeds=(0,))
    table = json.loads(kept.read_text())
    table["rows"] = [r for r in table["rows"] if r["method"] != "crkd"]
    kept.write_text(json.dumps(table))
    _run(fake, rows=("crkd",), seeds=(0,), also=[kept])
    mine = json.loads((fake["out"] / "runs/crkd/seed0/score.json").read_text())["weights_sha256"]
    next(r for r in table["rows"] if r["method"] == "crkd_twin")["weights_sha256"] = mine[:16]
    kept.write_text(json.dumps(table))
    gains = write_report(fake["out"], None, also=[kept])["paired"]
    assert [p["kind"] for p in gains if p["method"] == "crkd" and p["equal_weights"]] == ["distillation"]


def test_of_two_tables_the_gain_over_more_seeds_gives_the_interval(fake: Fake, tmp_path: Path) -> None:
    kept, _ = _printed(fake, tmp_path, seeds=(0,))
    other, _ = _printed(fake, tmp_path / "other", seeds=(1, 2))
    for path, width in ((kept, 1.0), (other, 2.0)):
        report = json.loads(path.read_text())
        for line in report["paired"]:
            line |= {"low_scenes": -width, "high_scenes": width, "seeds_scenes": line["seeds"]}
        path.write_text(json.dumps(report))
    for tables in ([kept, other], [other, kept]):
        assert read_printed(tables).over_scenes("crkd", "distillation", "crkd_twin") == (-2.0, 2.0, [1, 2])
    gain = next(p for p in write_report(tmp_path, None, also=[kept, other])["paired"] if p["method"] == "crkd")
    assert gain["seeds"] == [0, 1, 2] and gain["seeds_scenes"] == [1, 2]
    nds = {(s["row"], s["seed"]): s["nds"] for s in read_printed([kept, other]).scores}
    over_all = np.mean([nds["crkd", k] - nds["crkd_twin", k] for k in range(3)])
    assert gain["gain_nds"] == pytest.approx(over_all, abs=1e-3), "of all seeds, not of those that one table has"


@pytest.mark.parametrize(("key", "value"), [("preset", "long"), ("materials", "independent"), ("cache", "other")])
def test_a_table_of_another_benchmark_is_refused(fake: Fake, tmp_path: Path, key: str, value: str) -> None:
    kept, _ = _printed(fake, tmp_path, seeds=(0,))
    _run(fake, rows=("plain",), seeds=(0,))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(kept.read_text()), key: value}))
    with pytest.raises(MismatchError, match=f"another benchmark: another {key}"):
        write_report(fake["out"], None, also=[other])
    with pytest.raises(MismatchError, match=f"another {key}"):
        read_printed([kept, other])


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match="no table here"):
        read_printed([tmp_path / "none.json"])
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"v": 2}', '{"v": 1, "rows": []}', "7"):
        bad.write_text(text)
        with pytest.raises(InputDataError, match="not a table"):
            read_printed([bad])


def test_nothing_printed_changes_nothing() -> None:
    score = {"row": "plain", "seed": 0, "kind": "baseline", "preset": "p", "materials": "m", "weights_sha256": "a"}
    scores = [{**score, "asked": {"cache": "c"}}]
    assert joined(scores, []) == (scores, []) and joined([], scores) == (scores, [])
    empty = read_printed([])
    assert not empty.has("plain") and empty.over_scenes("a", "b", "c")[2] == []


def test_the_command_refuses_a_table_that_is_not_there_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli.main import run_group
    from cli.model import group

    words = ["bench", "distill", "--preset", "smoke", "--out", str(tmp_path / "out"), "--also", str(tmp_path / "none.json")]
    assert run_group(group, "imkd", words) == 8
    said = capsys.readouterr().err
    assert "no table here" in said and "none.json" in said and not (tmp_path / "out").exists()
