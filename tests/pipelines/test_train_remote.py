"""A cache behind a URL: checked on arrival, retried, bounded, and bit-equal to the local one in training."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_cache import disk_cache
from file_server import Server
from toy_training import toy_run

from imkd_data import open_cache
from imkd_data.cache import source
from imkd_data.cache.remote import RemoteCache, open_remote
from imkd_data.errors import CacheDamageError, StorageError, UsageError
from imkd_data.loader.stream import stream
from imkd_models.checkpoint import load_checkpoint
from pipelines.run import LoaderConfig
from pipelines.train import train


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk_cache(tmp_path_factory.mktemp("remote"))


@pytest.fixture
def server(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(source, "_pause", lambda attempt: None)  # no waiting between attempts
    made = Server(local)
    yield made
    made.close()


def test_reads_equal_the_local_cache_and_files_come_once(local: Path, server: Server, tmp_path: Path) -> None:
    near, far = open_cache(local), open_remote(server.url, store=tmp_path)
    assert far.id == near.id and far.index.equals(near.index)
    before = len(server.asked)
    for row in near.rows():
        for field in ("boxes", "lidar_bev_sum", "camera_calibration"):
            assert np.array_equal(near.read(field, row), far.read(field, row))
        assert near.read("images", row) == far.read("images", row)
    shards = [a for a in server.asked[before:] if "receipts" not in a]
    assert len(shards) == len(set(shards)) == 4 * 4
    again = open_remote(server.url, store=tmp_path)
    before = len(server.asked)
    again.read("boxes", int(near.rows()[0]))
    assert not [a for a in server.asked[before:] if "/c/" in a]  # from the store
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("faults", [["500"], ["503", "short"], ["corrupt", "corrupt"], ["stall"]])
def test_bounded_retries_until_the_bytes_are_right(local: Path, server: Server, tmp_path: Path, faults: list[str]) -> None:
    far = open_remote(server.url, store=tmp_path, timeout_s=1.0)
    server.faults["boxes/c"] = list(faults)
    row = int(far.rows()[0])
    assert np.array_equal(far.read("boxes", row), open_cache(local).read("boxes", row))
    assert not server.faults["boxes/c"]


@pytest.mark.parametrize(("fault", "error"), [("500", StorageError), ("corrupt", CacheDamageError), ("short", StorageError)])
def test_a_partial_never_enters_the_store(local: Path, server: Server, tmp_path: Path, fault: str, error: Any) -> None:
    far = open_remote(server.url, store=tmp_path)
    server.faults["blobs/images"] = [fault] * 20
    with pytest.raises(error) as raised:
        far.read("images", int(far.rows()[0]))
    assert server.url in str(raised.value) and "5" in str(raised.value)
    assert raised.value.code == (4 if fault == "corrupt" else 5)
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("*.partial"))
    assert len([a for a in server.asked if a.endswith(".tar")]) == source.ATTEMPTS


def test_a_changed_manifest_or_receipt_is_found(local: Path, server: Server, tmp_path: Path) -> None:
    server.faults["recipe.json"] = ["corrupt"] * 9
    with pytest.raises(CacheDamageError, match="manifest says"):
        open_remote(server.url, store=tmp_path)
    server.faults = {"receipts/boxes": ["corrupt"] * 9}
    far = open_remote(server.url, store=tmp_path)
    with pytest.raises(CacheDamageError, match="manifest says"):
        far.read("boxes", int(far.rows()[0]))


def test_the_store_is_bounded_and_evicts_only_its_own(local: Path, server: Server, tmp_path: Path) -> None:
    whole = open_remote(server.url, store=tmp_path / "a")
    sizes = [e[0] for e in whole.manifest["fields"]["images"]["shards"]]
    limit = sizes[0] + sizes[1] + 100
    far = open_remote(server.url, store=tmp_path / "b", limit_bytes=limit)
    stranger = far.path / "blobs" / "images" / "notes.txt"
    stranger.parent.mkdir(parents=True, exist_ok=True)
    stranger.write_text("mine")
    near = open_cache(local)
    for _ in range(2):
        for row in near.rows():
            assert far.read("images", row) == near.read("images", row)
            kept = sum(p.stat().st_size for p in far.path.rglob("*.tar"))
            assert kept <= limit
    assert stranger.read_text() == "mine"
    assert len([a for a in server.asked if a.endswith("00000.tar")]) == 2  # gone once, fetched again


def test_file_urls_pickle_and_foreign_folders(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMKD_STORE", str(tmp_path / "store"))
    far = open_cache(f"file://{local}")
    assert isinstance(far, RemoteCache)
    copy = pickle.loads(pickle.dumps(far))
    row = int(far.rows()[-1])
    assert np.array_equal(copy.read("boxes", row), far.read("boxes", row))
    with pytest.raises(UsageError, match="no support"):
        open_remote("nosuchscheme://x/y", store=tmp_path)
    (tmp_path / "other" / far.path.name).mkdir(parents=True)
    (tmp_path / "other" / far.path.name / "thesis.tex").touch()
    with pytest.raises(UsageError, match="something else"):
        open_remote(f"file://{local}", store=tmp_path / "other")


def test_twenty_steps_from_http_equal_the_local_cache(local: Path, server: Server, tmp_path: Path) -> None:
    """With 500s, a short body and a flipped bit on the way; weights, averages and log are bit-equal."""
    torch.set_num_threads(1)
    server.faults = {"boxes": ["500"], "lidar_points": ["corrupt", "short"], "index": ["503"]}
    run = toy_run(max_steps=20, checkpoint_every=20, log_every=20)
    train(run, open_cache(local), tmp_path / "near", accelerator="cpu")
    train(run, open_remote(server.url, store=tmp_path / "store"), tmp_path / "far", accelerator="cpu")
    a, b = load_checkpoint(tmp_path / "near"), load_checkpoint(tmp_path / "far")
    assert a.files == b.files and a.meta["cache"] == b.meta["cache"] and not server.faults["lidar_points"]


def test_workers_give_the_same_batches(local: Path) -> None:
    """Spawned workers on the cache on disk: same order, same bytes, and a known error keeps its details."""
    cache = open_cache(local)
    values: dict[str, Any] = {"augment": True, "seed": 2, "history": (0, -1)}
    alone, helped = list(stream(cache, 2, **values)), list(stream(cache, 2, workers=1, **values))
    assert [b.tokens for b in alone] == [b.tokens for b in helped]
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.images_BTVCHW, b.images_BTVCHW) and torch.equal(a.lidar.xyz_m, b.lidar.xyz_m)
        assert torch.equal(a.bev_maps["lidar_intensity"], b.bev_maps["lidar_intensity"])
    assert LoaderConfig().workers >= 0
