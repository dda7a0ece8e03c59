"""``imkd bench loader``: what it compares is the same, it runs to a table, and it says early what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import Line
from disk_cache import disk_cache

from imkd_data import open_cache
from imkd_data.errors import MissingFeatureError, SourceMissingError, UsageError
from imkd_data.loader.deliver import normalised
from pipelines import bench_loader
from pipelines.bench_loader import loader_table, run_loader_bench

INSTALLED = [n for n in ("webdataset", "litdata") if find_spec(n)]


def candidate(name: str, cache: Any, folder: Path, images: bool) -> Iterator[dict[str, Any]]:
    draw = bench_loader._draw(cache) if images else None
    if name == "webdataset":
        bench_loader._write_tar(cache, folder / "all.tar")
        return bench_loader._webdataset(folder / "all.tar", draw)
    bench_loader._write_litdata(cache, folder / "litdata")
    return bench_loader._litdata(folder / "litdata", draw)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", ["webdataset", "litdata"])
def test_candidates_read_the_same_samples(line: Line, tmp_path: Path, name: str, images: bool) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    cache = open_cache(line.cache)
    ours = {s["token"]: s for s in bench_loader._rows(cache, images=images)}
    theirs = {s["token"]: s for s in candidate(name, cache, tmp_path, images)}
    assert set(ours) == set(theirs) == {cache.token(r) for r in cache.rows()}
    for token, sample in ours.items():
        assert set(sample) == set(theirs[token]) and len(sample) == 1 + 6 + 6
        for key, value in sample.items():
            other = theirs[token][key]
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other)
            else:
                assert type(value) is type(other) and np.array_equal(value, other), key


def test_the_stream_and_the_usual_way_see_the_same_samples(line: Line) -> None:
    cache = open_cache(line.cache)
    ours = {s["token"]: s for s in bench_loader._rows(cache, images=True)}
    parts = ("images", "depth", "radar_points", "boxes", "lidar_intensity")
    seen = []
    for batch in bench_loader._stream(cache, 2, parts, (0,), augment=False):
        seen += batch.tokens
        for b, token in enumerate(batch.tokens):
            images = torch.stack([ours[token][f"{c.lower()}.jpg"] for c in cache.suite.cameras])
            torch.testing.assert_close(batch.images_BTVCHW[b, 0], normalised(images))
    packed = [t for p in bench_loader._workers_part(cache, 2, parts, (0,)) for t in p.tokens]
    reader = bench_loader._reader(cache, line.tree)
    for maps in (False, True):
        assert {s["token"] for s in bench_loader._on_the_fly(cache, reader, 1, maps)} == set(ours)
    assert set(seen) == set(packed) == set(ours) and len(seen) == len(packed) == len(ours)


def test_the_bench_runs_to_its_table(line: Line) -> None:
    threads = torch.get_num_threads()
    facts = run_loader_bench(line.cache, line.tree, seconds=0.01, batch_size=2)
    torch.set_num_threads(threads)
    rates, ratios = facts["samples_per_s"], facts["ratios"]
    assert facts["rows"] == 6 and facts["images_per_sample"] == 6 and all(r > 0 for r in rates.values())
    for name, (above, below) in {
        "stream / on the fly": ("stream", "decode and project on the fly"),
        "stream / on the fly with intensity map": ("stream", "on the fly with intensity map"),
        "rows / webdataset": ("rows, random order", "webdataset sequential"),
    }.items():
        assert ratios[name] == pytest.approx(rates[above] / rates[below])
    assert facts["cores_for"]["100 samples/s"] == pytest.approx(102 / rates["stream, worker's part"], abs=0.06)
    for name in ("webdataset", "litdata"):
        assert (facts["others"][name] == "not installed") == (name not in INSTALLED)
    lines = loader_table(json.loads(json.dumps(facts))).splitlines()
    rows = {line[:42].strip(): line[42:].strip() for line in lines[1:]}
    assert lines[0].startswith("samples/s on one core") and set(rates) | set(ratios) <= set(rows)
    for name, value in rates.items():
        assert float(rows[name]) == pytest.approx(value, abs=0.06)
    assert all(rows[name] == f"{value:.2f}x" for name, value in ratios.items())
    assert all(len(line) <= 52 for line in lines)


def test_what_cannot_be_measured_is_said_before_anything_is(line: Line, tmp_path: Path, monkeypatch: Any) -> None:
    def never(*_: Any) -> float:
        raise AssertionError("measured before the arguments were looked at")

    monkeypatch.setattr(bench_loader, "_rate", never)
    cache = open_cache(line.cache)
    with pytest.raises(SourceMissingError):
        run_loader_bench(cache, tmp_path / "nowhere")
    monkeypatch.delitem(cache.fields, "images")
    with pytest.raises(MissingFeatureError, match="no images") as raised:
        run_loader_bench(cache)
    assert "--fields images --update" in str(raised.value)
    toy = open_cache(disk_cache(tmp_path))
    with pytest.raises(UsageError, match="no reader"):
        run_loader_bench(toy, tmp_path)


def test_the_command_refuses_a_history_that_is_none(tmp_path: Path) -> None:
    from cli.model import group

    out = CliRunner().invoke(group, ["bench", "loader", "--cache", str(tmp_path), "--history", "0,now"])
    assert out.exit_code == 2 and "0,-2,-4,-6" in out.output
