"""What a cache gives without the raw files, against the same arithmetic in double precision: within half a stored step.

1/64 px, 1/512 m of depth, 0.5 cm, 1/512 m/s, 0.25 dB; row counts within max(2, 0.3 %); order as documented.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imkd_data.views import EXPORTS
from tests.imkd_data.views import reference

Record = Callable[[int], dict]
STEPS = np.array([1 / 64, 1 / 64, 1 / 512])
ROUNDING = 2e-5  # of float32 pixels and metres


def in_order(ours: np.ndarray, inner: np.ndarray, outer: np.ndarray) -> None:
    """Our rows are rows of ``outer`` in its order, within the steps, and every row of ``inner`` is among them."""
    at, matched = 0, []
    for row in ours:
        while at < len(outer) and (np.abs(row - outer[at]) > STEPS + ROUNDING).any():
            at += 1
        assert at < len(outer), "a row that the scan does not hold at this place"
        matched.append(at)
        at += 1
    found = {tuple(outer[i]) for i in matched}
    assert {tuple(r) for r in inner} <= found


@pytest.fixture(scope="module")
def stored(cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored")
    EXPORTS["crn"](cache, out, rows=cache.rows())
    return out


def infos(root: Path) -> list[dict]:
    return [i for s in ("train", "val") for i in pickle.loads((root / f"nuscenes_infos_{s}.pkl").read_bytes())]


def table(root: Path, folder: str, filename: str, columns: int) -> np.ndarray:
    return np.fromfile(root / folder / filename, "<f4").reshape(-1, columns).astype(np.float64)


@pytest.mark.parametrize("which", range(6))
def test_depth_points(stored: Path, nusc: Any, which: int) -> None:
    info = infos(stored)[which]
    sample = nusc.get("sample", info["sample_token"])
    inner, outer = (reference.exact_depth(nusc, sample, border) for border in (1 + 1 / 64 + 1e-4, 1 - 1 / 64 - 1e-4))
    plain = reference.exact_depth(nusc, sample, 1.0)
    for camera in reference.CAMERAS:
        raw = Path(nusc.get("sample_data", sample["data"][camera])["filename"]).name
        ours = table(stored, "depth_gt", f"{Path(info['cam_infos'][camera]['filename']).name}.bin", 3)
        assert abs(len(ours) - len(plain[raw])) <= max(2, 0.003 * len(ours)) and len(ours) > 300
        in_order(ours, inner[raw], outer[raw])


@pytest.mark.parametrize("which", range(6))
def test_radar_points(stored: Path, cache: Any, nusc: Any, which: int) -> None:
    """In ego axes, in which they are stored; a point moves by velocity times age, so its error does too."""
    info = infos(stored)[which]
    sample = nusc.get("sample", info["sample_token"])
    theirs = reference.radar_bev(nusc, sample, full_rotation=True, dtype=np.float64)
    ours = table(stored, "radar_bev_filter", Path(info["lidar_infos"]["LIDAR_TOP"]["filename"]).name, 7)
    assert len(ours) == len(theirs) > 60  # none of this world's points lies at the edge of the range
    np.testing.assert_array_equal(ours[:, 6], theirs[:, 6])
    row = cache.row(info["sample_token"])
    rotation = cache.decode("sample_pose", row)["ego_from_reference"][:, :3]
    age = np.abs(np.nan_to_num(cache.read("radar_pose", row)[..., 12])).max(axis=0)
    slack = 0.005 + np.sqrt(2) / 512 * age[ours[:, 6].astype(int)] + ROUNDING
    assert (np.abs((ours[:, :3] - theirs[:, :3]) @ rotation.T) <= slack[:, None]).all()
    assert np.abs(ours[:, 3] - theirs[:, 3]).max() <= 0.25 + ROUNDING
    turned = np.abs(rotation.T[:2, :2]).sum(axis=1)  # one step of either axis of ego, seen along an axis of the LiDAR
    assert (np.abs(ours[:, 4:6] - theirs[:, 4:6]) <= turned / 512 + ROUNDING).all() and turned.max() < 1.1


@pytest.mark.parametrize("which", range(6))
def test_radar_points_in_images(stored: Path, nusc: Any, which: int) -> None:
    info = infos(stored)[which]
    sample = nusc.get("sample", info["sample_token"])
    bev = reference.radar_bev(nusc, sample, full_rotation=True, dtype=np.float64)
    theirs = reference.to_images(nusc, sample, bev[:, :4].T.copy(), bev[:, 3:], 0.1, 100.0)
    total = 0
    for camera in reference.CAMERAS:
        raw = Path(nusc.get("sample_data", sample["data"][camera])["filename"]).name
        ours = table(stored, "radar_pv_filter", f"{Path(info['cam_infos'][camera]['filename']).name}.bin", 7)
        assert abs(len(ours) - len(theirs[raw])) <= max(2, 0.003 * len(ours))
        total += len(ours)
        if len(ours) == len(theirs[raw]) > 0:
            np.testing.assert_array_equal(ours[:, 6], theirs[raw][:, 6])  # the same points in the same order
            assert np.abs(ours[:, 2] - theirs[raw][:, 2]).max() < 0.005 * np.sqrt(3) + 0.003
    assert total > 30


def test_the_receipt_counts_the_edge(stored: Path, cache: Any) -> None:
    receipt = json.loads((stored / "imkd-export.json").read_text())
    edge = receipt["rows_within_a_step_of_a_filter_edge"]
    rows = sum(len(t) for r in cache.rows() for t in cache.view("crn").depth_gt(int(r)).values())
    assert 0 < edge["depth_gt"] < 0.003 * rows and edge["radar_bev_filter"] <= 2
