"""The examples in docs/ are run as a user would run them."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imkd_data.views import EXPORTS

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.parametrize("name", ["read_crn_export.py", "plain_zarr.py", "stream_webdataset.py"])
def test_these_import_nothing_of_ours(name: str) -> None:
    tree = ast.parse((EXAMPLES / name).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any(i.split(".")[0] in ("imkd_data", "imkd_models", "pipelines", "cli") for i in imported)


def test_a_third_party_radar_model_learns(cache: Any) -> None:
    losses = run("radar_model.py")["main"](cache.path, 40)
    assert losses[-1] < 0.9 * losses[0]


def test_crn_export_is_read_by_its_layout_alone(cache: Any, tmp_path: Path) -> None:
    EXPORTS["crn"](cache, tmp_path, rows=cache.rows())
    found = list(run("read_crn_export.py")["read"](tmp_path))
    assert [f[0] for f in found] == [cache.token(int(r)) for r in cache.rows("mini_train")]
    token, depth, radar, seen, boxes = found[2]
    view = cache.view("crn").sample(cache.row(token))
    np.testing.assert_array_equal(radar, view["radar_bev"])
    np.testing.assert_array_equal(depth["CAM_BACK"], view["depth_gt"]["CAM_BACK"])
    assert len(seen) == 6 and len(boxes) > 5


def test_plain_zarr_and_pyarrow(cache: Any) -> None:
    found = run("plain_zarr.py")["strongest_returns"](cache.path)
    for token, x, y, intensity in found:
        plane = cache.read("lidar_bev_max", cache.row(token))
        row, column, inside = cache.recipe.grid.cells(np.array([[x, y]]))
        assert inside[0] and plane[row[0], column[0]] == intensity == plane.max()
    assert len(found) == 5


def test_plain_webdataset(cache: Any) -> None:
    found = list(run("stream_webdataset.py")["samples"](cache.path))
    assert [t for t, _ in found] == [cache.token(int(r)) for r in cache.rows()]
    row = cache.row(found[1][0])
    assert found[1][1]["cam_back.jpg"] == cache.read("images", row)["CAM_BACK"]


def test_as_a_command(cache: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "plain_zarr.py"), str(cache.path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count(" at x ") == 5
