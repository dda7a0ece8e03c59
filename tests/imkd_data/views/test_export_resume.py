"""Exports killed (SIGKILL) anywhere are finished by the same command; what is done is not done again."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from imkd_data.errors import LockedError, MismatchError, StorageError, UsageError
from imkd_data.views import EXPORTS

REPO = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
from imkd_data import open_cache
from imkd_data.views import EXPORTS
kind, cache, out, raw = sys.argv[1:5]
opened = open_cache(cache)
EXPORTS[kind](opened, Path(out), rows=opened.rows(), dataroot=Path(raw) if raw else None)
"""


def tree(root: Path) -> dict[str, bytes]:
    paths = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".imkd-export.jsonl")
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


@pytest.mark.parametrize(
    ("kind", "exact", "fault"),
    [
        ("crn", True, "export.renamed:kill:20"),
        ("crn", False, "export.written:kill:30"),
        ("webdataset", False, "export.written:kill:2"),
        ("webdataset", False, "export.verify:kill"),
        ("parquet", False, "export.logged:kill"),
    ],
)
def test_killed_and_run_again(cache: Any, raw_root: Path, tmp_path: Path, kind: str, exact: bool, fault: str) -> None:
    root = raw_root if exact else None
    rows, whole, broken = cache.rows(), tmp_path / "whole", tmp_path / "broken"
    EXPORTS[kind](cache, whole, rows=rows, dataroot=root)
    arguments = [sys.executable, "-c", PROGRAM, kind, str(cache.path), str(broken), str(root or "")]
    done = subprocess.run(arguments, env={**os.environ, "IMKD_FAULT": fault}, cwd=REPO, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert not (broken / "imkd-export.json").exists()
    entries = [json.loads(line) for line in (broken / ".imkd-export.jsonl").read_text().splitlines()[1:]]
    noted = {name for entry in entries for name in entry["files"]}
    kept = {name: (broken / name).stat().st_ino for name in noted}
    assert noted
    EXPORTS[kind](cache, broken, rows=rows, dataroot=root)
    assert tree(broken) == tree(whole)  # no left-over partial file either
    assert {name: (broken / name).stat().st_ino for name in noted} == kept
    stamps = {p: p.stat().st_ino for p in broken.rglob("*") if p.is_file() and str(p.relative_to(broken)) in noted}
    EXPORTS[kind](cache, broken, rows=rows, dataroot=root)  # a finished one is verified, not written again
    assert {p: p.stat().st_ino for p in stamps} == stamps


def test_a_damaged_file_is_named_and_replaced(cache: Any, tmp_path: Path) -> None:
    EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows())
    (tar,) = tmp_path.glob("mini_val-*.tar")
    good = tar.read_bytes()
    flipped = bytearray(good)
    flipped[1000] ^= 1
    tar.write_bytes(flipped)
    with pytest.raises(StorageError, match="changed after") as caught:
        EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows())
    assert caught.value.details["file"] == str(tar)
    tar.unlink()  # what the error advises
    EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows())
    assert tar.read_bytes() == good


def test_two_at_once_are_refused(cache: Any, tmp_path: Path) -> None:
    def nested(done: int, total: int, text: str) -> None:
        with pytest.raises(LockedError, match="another export"):
            EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows(), progress=nested)
    assert EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows()) == 1 + len(cache.shards)


def test_a_full_disk_is_named_and_the_export_continues(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMKD_FAULT", "export.written:enospc:2")
    with pytest.raises(StorageError, match="space"):
        EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows())
    assert not list(tmp_path.glob(".*.partial"))
    monkeypatch.delenv("IMKD_FAULT")
    EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows())


def test_other_rows_are_another_export(cache: Any, tmp_path: Path) -> None:
    EXPORTS["parquet"](cache, tmp_path, rows=cache.where("split = 'mini_val'"))
    assert pq.read_table(tmp_path / "samples.parquet")["scene"].to_pylist() == ["scene-0103"] * 3
    with pytest.raises(UsageError, match="other options"):
        EXPORTS["parquet"](cache, tmp_path, rows=cache.rows())


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_plain_forms_have_no_defects_to_reproduce(cache: Any, raw_root: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="no meaning"):
        EXPORTS[kind](cache, tmp_path / "x", rows=cache.rows(), dataroot=raw_root, as_released=True)
    assert not (tmp_path / "x").exists()


def test_webdataset_is_self_contained(cache: Any, tmp_path: Path) -> None:
    """Every field, and what its codes mean, by plain webdataset, numpy and numcodecs."""
    EXPORTS["webdataset"](cache, tmp_path, rows=cache.rows())
    example = runpy.run_path(str(REPO / "docs" / "examples" / "stream_webdataset.py"))
    about = json.loads((tmp_path / "fields.json").read_text())
    assert set(about["fields"]) == set(cache.fields) and about["sensors"]["radars"] == list(cache.suite.radars)
    found = {token: (facts, parts) for token, facts, parts in example["exported"](tmp_path)}
    assert list(found) == [cache.token(int(r)) for r in cache.rows()]
    for token, (facts, parts) in found.items():
        row = cache.row(token)
        assert facts["row"] == row and facts["box_tokens"] == cache.annotation_tokens(row)[0]
        for name, field in cache.fields.items():
            if field.kind == "array":
                np.testing.assert_array_equal(parts[f"{name}.npy"], cache.read(name, row))
                assert list(parts[f"{name}.npy"].shape) == about["fields"][name]["shape"]
            else:
                for part, data in cache.read_parts(name, row).items():
                    stored = parts[part.removesuffix(".zst")]
                    if part.endswith(".zst"):
                        sink = io.BytesIO()
                        np.lib.format.write_array(sink, stored, version=(1, 0))
                        assert sink.getvalue()[-stored.nbytes :] == stored.tobytes() and stored.size
                    else:
                        assert stored == data
        radar, ours = example["radar"](tmp_path, parts), cache.decode("radar_points", row)
        for name in ours.keys() & radar.keys():
            np.testing.assert_allclose(radar[name], ours[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["crn", "mmdet3d"])
def test_other_raw_data_are_refused(cache: Any, synthetic_world: Path, tmp_path: Path, kind: str) -> None:
    """The same scene names, other samples: nothing half is called whole."""
    with pytest.raises(MismatchError, match="not those of the cache"):
        EXPORTS[kind](cache, tmp_path, rows=cache.rows(), dataroot=synthetic_world)
    assert not (tmp_path / "imkd-export.json").exists()


def test_the_command_line(cache: Any, raw_root: Path, tmp_path: Path) -> None:
    """--select, a selection that finds nothing, --as-released without raw data: one clear line each."""

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        code = "from cli.main import data; data()"
        command = [sys.executable, "-c", code, "export", str(cache.path), *map(str, arguments)]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)

    done = run("--to", "parquet", "--out", tmp_path / "p", "--select", "scene = 'scene-0061' and num_radar > 50")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "p" / "samples.parquet").num_rows == 3
    done = run("--to", "crn", "--out", tmp_path / "c", "--as-released")
    assert done.returncode == 2 and done.stderr.startswith("error: --as-released needs the raw data"), done.stderr
    assert "--dataroot" in done.stderr and not (tmp_path / "c").exists()
    done = run("--to", "bevdepth", "--out", tmp_path / "d")
    assert done.returncode == 0 and "cache-only" in done.stderr and "rows of depth_gt" in done.stderr
    done = run("--to", "webdataset", "--out", tmp_path / "w", "--select", "location = 'singapore'")
    assert done.returncode == 2 and "error: no sample matches" in done.stderr and "synthetic-town" in done.stderr
    done = run("--to", "webdataset", "--out", tmp_path / "w", "--select", "nun_radar > 5")
    assert done.returncode == 2 and "did you mean num_radar" in done.stderr
    done = run("--to", "crm", "--out", tmp_path / "w")
    assert done.returncode == 2 and "bevdepth" in done.stderr and not (tmp_path / "w").exists()
