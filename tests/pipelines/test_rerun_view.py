"""The optional Rerun recording: every entity over every keyframe; a clear word where the extra is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from imkd_data import open_cache
from imkd_data.errors import SourceMissingError, UsageError
from pipelines.rerun_view import log_scene


def test_recording_holds_every_entity(line, tmp_path: Path) -> None:
    rerun = pytest.importorskip("rerun", reason="the optional extra rerun is not installed")
    from rerun.dataframe import load_recording

    cache = open_cache(line.cache)
    path = log_scene(cache, tmp_path / "scene.rrd", scene="scene-0103")
    recording = load_recording(str(path))
    entities = {str(c.entity_path) for c in recording.schema().component_columns()}
    wanted = {"/ego/lidar", "/ego/radar", "/ego/truth", "/bev/intensity", "/ego/CAM_BACK_LEFT"}
    assert wanted <= entities
    table = recording.view(index="keyframe", contents="/ego/truth").select().read_all()
    assert table.num_rows == len(cache.rows(scenes=["scene-0103"])) == 3
    assert rerun.__version__
    with pytest.raises(UsageError, match="no such scene"):
        log_scene(cache, tmp_path / "x.rrd", scene="scene-9999")


def test_missing_extra_says_how_to_install(line, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(SourceMissingError, match="not installed") as caught:
        log_scene(open_cache(line.cache), tmp_path / "x.rrd")
    assert "imkd[rerun]" in str(caught.value) and not (tmp_path / "x.rrd").exists()
