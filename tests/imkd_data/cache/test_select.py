"""Selections: the small grammar against DuckDB and against Python over the index; refusals in one clear line."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from imkd_data import open_cache
from imkd_data.cache import select as module
from imkd_data.errors import UsageError

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "cache_v1"


@pytest.fixture(scope="module")
def kept() -> Any:
    return open_cache(FIXTURE)


def lines(kept: Any) -> list[dict[str, Any]]:
    return [line | {"num_radar": sum(line["num_radar_points"])} for line in kept.index.to_pylist()]


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("location = 'synthetic-town' and num_radar > 500", lambda s: s["num_radar"] > 500),
        ("night", lambda s: s["night"]),
        ("NOT night AND num_boxes >= 49", lambda s: not s["night"] and s["num_boxes"] >= 49),
        ("night and position = 0 or num_boxes > 48", lambda s: (s["night"] and not s["position"]) or s["num_boxes"] > 48),
        ("night and (position = 0 or num_boxes > 48)", lambda s: s["night"] and (not s["position"] or s["num_boxes"] > 48)),
        ("num_boxes between 43 and 48", lambda s: 43 <= s["num_boxes"] <= 48),
        ("num_boxes not in (49, 42)", lambda s: s["num_boxes"] not in (49, 42)),
        ("scene in ('scene-0103', 'scene-0001')", lambda s: s["scene"] == "scene-0103"),
        ("scene like '%61' and position = 1", lambda s: s["scene"] == "scene-0061" and s["position"] == 1),
        ("split <> mini_val", lambda s: s["split"] != "mini_val"),
        ("num_radar_points.RADAR_FRONT = 125", lambda s: s["num_radar_points"][0] == 125),
        ("ego_speed_mps is not null and rain = false", lambda s: not s["rain"]),
        ("previous_row = -1", lambda s: s["previous_row"] == -1),
        ("num_boxes > row", lambda s: True),
        ("num_boxes < 9223372036854775807 and timestamp_us > -9223372036854775808", lambda s: True),
        ("num_boxes > 3000000000", lambda s: False),
        ("num_boxes < 1e30", lambda s: True),
        ("not (night or previous_row >= 0)", lambda s: not s["night"] and s["previous_row"] < 0),
    ],
)
def test_conditions(kept: Any, expression: str, holds: Any) -> None:
    expected = [s["row"] for s in lines(kept) if holds(s)]
    assert kept.where(expression).tolist() == expected
    assert kept.select(expression).tolist() == expected


def test_the_grammar_means_what_sql_means(kept: Any) -> None:
    """Every pair of terms joined in every way gives the same lines here and in DuckDB."""
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    terms = [
        "night",
        "num_boxes > 43",
        "num_radar_points.RADAR_BACK_LEFT between 120 and 214",
        "scene like '%3'",
        "token in ('x')",
        "timestamp_us is null",
        "class_counts.car <> 7",
    ]
    joins = ("{} and {}", "{} or not {}", "not ({} or {})", "not {} and ({})")
    for a, b in itertools.permutations(terms, 2):
        for join in joins:
            text = join.format(a, b)
            table = module._table(kept.index, kept.suite.radars)
            ours = module._lines(table, module._Parser(text, table).parse())
            theirs = module._duckdb(kept.index, kept.suite.radars, table, text, "")
            assert ours.tolist() == theirs.tolist(), text


def test_beyond_the_grammar_duckdb_answers(kept: Any) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    expected = [s["row"] for s in lines(kept) if s["num_boxes"] % 2 == 0 and s["class_counts"][0] * 2 > 3]
    assert kept.where("num_boxes % 2 = 0 and class_counts.car * 2 > 3").tolist() == expected != []


@pytest.mark.parametrize("text", ["abs(num_boxes) > 3", "num_boxes % 2 = 0"])
def test_without_duckdb_it_says_what_to_install(kept: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UsageError, match="cannot be read") as caught:
        kept.where(text)
    assert "imkd[sql]" in caught.value.details["next"]
    assert kept.where("num_boxes > 3 and not night").tolist() == [0, 1]  # the grammar needs none


def test_arrow_expressions_are_taken_as_values(kept: Any) -> None:
    assert kept.where((pc.field("num_boxes") > 43) & ~pc.field("night")).tolist() == [0, 1]
    with pytest.raises(UsageError, match="evaluated"):
        kept.where(pc.field("num_boxen") > 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nigth", "did you mean night?"),
        ("class_counts > 1", "is a list"),
        ("num_boxes", "yes/no"),
        ("num_boxes > many", "is a number"),
        ("night = maybe", "yes or no"),
        ("num_boxes like '4%'", "no text"),
        ("", "empty"),
        ("num_boxes >", "cannot be read"),
        ("(night", "cannot be read"),
        ("night) or (true", "cannot be read"),
        ("night; drop table samples", "cannot be read"),
        ("night not is null", "cannot be read"),
        ("num_boxes not is not null", "cannot be read"),
        ("num_boxes > 99999999999999999999999", "64 bits"),
        ("num_boxes in (1, -9223372036854775809)", "64 bits"),
        (f"num_boxes < 1{'0' * 5000}", "64 bits"),
        ("__import__('os')", "cannot be read"),
        ("token in (select content from read_text('/etc/hostname'))", "cannot be read"),
    ],
)
@pytest.mark.parametrize("duckdb", [True, False])
def test_refusals(kept: Any, text: str, says: str, duckdb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not duckdb:
        monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UsageError) as caught:
        kept.where(text)
    said = f"{caught.value.what} {caught.value.details}"
    assert says in said and "localhost" not in said


def test_lines_without_lists_count_as_none(kept: Any) -> None:
    """Quarantined samples have null or short lists; later lines must not slip into their places."""
    lists = pa.array([[1, 9], None, [], [2, 8]], pa.list_(pa.int32()))
    entries = module._entries(pa.table({"num_radar_points": lists}), "num_radar_points", 2)
    assert entries.tolist() == [[1, 9], [-1, -1], [-1, -1], [2, 8]]
    assert module._entries(pa.table({"x": lists}).slice(2), "x", 2).tolist() == [[-1, -1], [2, 8]]


def test_a_text_that_occurs_nowhere_is_named(kept: Any) -> None:
    with pytest.warns(UserWarning, match=r"no sample has location = 'synthetic'; there are synthetic-town; location like"):
        assert kept.where("location = 'synthetic' and num_radar > 50").tolist() == []
