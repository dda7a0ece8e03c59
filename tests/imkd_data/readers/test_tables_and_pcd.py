"""The two table parsers agree; parsers never raise anything unnamed, whatever the bytes."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imkd_data.readers.tables as tables
from imkd_data.errors import ImkdError, InputDataError
from imkd_data.readers.nuscenes import NUSCENES
from imkd_data.readers.nuscenes_tables import SCHEMAS
from imkd_data.readers.pcd import parse_lidar, parse_radar
from imkd_data.readers.tables import key_index, read_table
from tests.imkd_data.readers.tiny_tree import Tree, lidar_values, radar_file, radar_values

OPTIONAL = frozenset({"visibility_token", "attribute_tokens"})
WHERE = {"file": "f", "token": "t", "scene": "s", "channel": "c"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = Tree(tmp_path_factory.mktemp("tables"), keyframes=4)
    return tree.root / tree.version


@pytest.mark.parametrize("name", ["sample_data", "ego_pose", "sample_annotation", "sample", "instance"])
@pytest.mark.parametrize(("indent", "block"), [(0, 700), (None, 1999), (4, 1 << 20), (0, 97)])
def test_big_tables_are_read_as_small_ones(
    folder: Path, tmp_path: Path, name: str, indent: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block through Arrow, cut anywhere, equals the standard parser."""
    monkeypatch.setattr(tables, "_BLOCK_BYTES", block)
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(json.loads((folder / f"{name}.json").read_text()), indent=indent))
    small = read_table(path, SCHEMAS[name], optional=OPTIONAL)
    big = read_table(path, SCHEMAS[name], optional=OPTIONAL, big=0)
    assert big.num_rows == small.num_rows > 3
    assert big.combine_chunks().equals(small.combine_chunks())
    assert {column.num_chunks for column in big.columns} == {1}  # small pieces would keep the parser's freed memory in use


def test_big_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    for text in ("[]", " [ ]\n"):
        path.write_text(text)
        assert read_table(path, SCHEMAS["sample"], big=0).num_rows == 0


@pytest.mark.parametrize("big", [0, 1 << 30])
def test_offsets_of_damage_are_the_files(folder: Path, tmp_path: Path, big: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 4096)
    good = (folder / "sample_data.json").read_bytes()
    path = tmp_path / "sample_data.json"
    at = good.index(b'"timestamp"', len(good) * 2 // 3)
    path.write_bytes(good[:at] + b"?" + good[at:])
    with pytest.raises(InputDataError) as caught:
        read_table(path, SCHEMAS["sample_data"], big=big)
    offset = int(caught.value.details["found"].split("byte ")[1].replace(",", ""))
    assert caught.value.rule == "table.json" and abs(offset - at) <= 2
    for cut in (len(good) // 2, len(good) - 2):
        path.write_bytes(good[:cut])
        with pytest.raises(InputDataError) as caught:
            read_table(path, SCHEMAS["sample_data"], big=big)
        assert caught.value.rule == "table.json" and "byte" in str(caught.value)


@pytest.mark.parametrize("big", [0, 1 << 30])
def test_wrong_types_are_named(folder: Path, tmp_path: Path, big: int) -> None:
    rows = json.loads((folder / "ego_pose.json").read_text())
    rows[5]["timestamp"] = "late"
    path = tmp_path / "ego_pose.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputDataError, match="row 5") as caught:
        read_table(path, SCHEMAS["ego_pose"], big=big)
    assert caught.value.rule == "table.column" and caught.value.details["token"] == rows[5]["token"]


ROWS = pa.schema([("token", pa.string()), ("n", pa.int64()), ("f", pa.float64()), ("v", pa.list_(pa.list_(pa.float64())))])
GOOD = '{"token": "%s", "n": 1, "f": 0.5, "v": [[1, 2.5], []]}'


@pytest.mark.parametrize("block", [40, 1 << 20])
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[%a %b]", "table.json"),
        ("[%a%b]", "table.json"),
        ("[%a\n%b]", "table.json"),
        ("[%a,,%b]", "table.json"),
        ("[%a , , %b]", "table.json"),
        ("[,%a,%b]", "table.json"),
        ("[ , %a]", "table.json"),
        ("[%a,%b,]", "table.json"),
        ("[%a]%b]", "table.json"),
        ("[%a],%b]", "table.json"),
        ("[%a:%b]", "table.json"),
        ("[,]", "table.json"),
        *[
            (f"[%a,{GOOD % 'b'}]".replace("0.5", v), "table.json")
            for v in ("NaN", "-Infinity", "Infinity", "Inf", "-NaN", "nan")
        ],
        (f"[%a,{GOOD % 'b'}]".replace("2.5", "NaN"), "table.json"),
        ('[%a, {"token": "b", "n": 1, "f": 1, "v": [], "more": NaN}]', "table.json"),
        ('[%a, {"token": "\\ud800", "n": 1, "f": 1, "v": [], "more": "\xff"}]', "table.json"),
        (f"[%a,{GOOD % 'b'}]".replace("0.5", "1e400"), "table.column"),
        (f"[%a,{GOOD % 'b'}]".replace("2.5", "-1e400"), "table.column"),
        (f"[%a,{GOOD % 'b'}]".replace("0.5", "1" * 400), ""),  # each in its own words
        (f"[%a,{GOOD % 'b'}]".replace("0.5", "1" * 5000), ""),
        ('[%a,%b, {"token": "b", "n": 1.5, "f": 1, "v": []}]', "table.column"),
    ],
)
def test_both_parsers_refuse_the_same(
    tmp_path: Path, text: str, rule: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_BLOCK_BYTES", block)
    path = tmp_path / "some.json"
    path.write_bytes(text.replace("%a", GOOD % "a").replace("%b", GOOD % "b").encode("latin-1"))
    found = []
    for big in (1 << 30, 0):
        with pytest.raises(InputDataError) as caught:
            read_table(path, ROWS, big=big)
        assert caught.value.rule == rule or not rule, str(caught.value)
        assert caught.value.details["file"].endswith("some.json")
        found.append(caught.value)
    if rule == "table.column":
        assert found[0].what == found[1].what and found[0].details == found[1].details


@pytest.mark.parametrize("block", [40, 1 << 20])
def test_words_in_texts_are_no_numbers(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, Infinity, row borders and letters beyond ASCII inside a text are that text."""
    monkeypatch.setattr(tables, "_BLOCK_BYTES", block)
    path = tmp_path / "some.json"
    names = ["NaN", "Infinity", "Inf", "a } , b", "Köln", "京"]
    path.write_text("[" + ",\n".join(GOOD % n for n in names) + "]", "utf-8")
    for big in (1 << 30, 0):
        assert read_table(path, ROWS, big=big)["token"].to_pylist() == names


def test_a_non_finite_value_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    rows = [GOOD % i for i in range(5)]
    rows[3] = rows[3].replace("2.5", "1e999")
    path.write_text("[" + ", ".join(rows) + "]")
    with pytest.raises(InputDataError, match="row 3 has a wrong v") as caught:
        read_table(path, ROWS, big=0)
    assert caught.value.details["token"] == "3" and "inf" in caught.value.details["found"]


def test_key_index() -> None:
    target = pa.chunked_array([["a", "b"], ["c"]])
    keys = pa.chunked_array([["c", "", "x", None, "a"]])
    assert key_index(keys, target).tolist() == [2, -1, -2, -1, 0]


RADAR = radar_file(radar_values(np.random.default_rng(0), 5), padding=40)
LIDAR = lidar_values(np.random.default_rng(0), 2).tobytes()
quiet = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def named(run: object) -> None:
    """Runs; an ImkdError that names the file is the only way to fail."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            run()  # type: ignore[operator]
        except ImkdError as error:
            assert error.details["file"] and error.rule


def radar_parse(data: bytes) -> np.ndarray:
    return parse_radar(data, NUSCENES.radar_columns, max_points=125, odd=Counter(), dropped=Counter(), **WHERE)


def lidar_parse(data: bytes) -> np.ndarray:
    return parse_lidar(data, intensity_max=255, rings=32, odd=Counter(), dropped=Counter(), **WHERE)


@quiet
@given(st.binary(max_size=400))
def test_any_bytes_as_points(data: bytes) -> None:
    named(lambda: radar_parse(data))
    named(lambda: lidar_parse(data))


@quiet
@given(st.integers(0, len(RADAR) - 1), st.binary(min_size=1, max_size=6))
def test_any_damage_in_a_radar_file(at: int, what: bytes) -> None:
    named(lambda: radar_parse(RADAR[:at] + what + RADAR[at + len(what) :]))
    named(lambda: radar_parse(RADAR[:at]))


@quiet
@given(st.integers(0, len(LIDAR) - 1), st.binary(min_size=1, max_size=6))
def test_any_damage_in_a_lidar_file(at: int, what: bytes) -> None:
    named(lambda: lidar_parse(LIDAR[:at] + what + LIDAR[at + len(what) :]))


@quiet
@given(st.sampled_from(["FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "POINTS", "DATA"]), st.text(max_size=30))
def test_any_text_in_a_radar_header(key: str, text: str) -> None:
    data = radar_file(radar_values(np.random.default_rng(0), 5), **{key: text})
    named(lambda: radar_parse(data))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_in_a_table(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    good = (folder / "sample.json").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    what = data.draw(st.binary(min_size=1, max_size=4))
    path = tmp_path / "sample.json"
    path.write_bytes(good[:at] + what + good[at + len(what) :])
    for big in (0, 1 << 30):
        named(lambda big=big: read_table(path, SCHEMAS["sample"], big=big))
