"""A remote cache's metadata and its local store: foreign manifests, a full disk, evicted shards, kept copies that rot."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from imkd_data import open_cache
from imkd_data.cache import remote, source, store
from imkd_data.cache.remote import RemoteCache, open_remote
from imkd_data.errors import CacheDamageError, DiskFullError, MismatchError
from imkd_data.loader.stream import stream

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "cache_v1"
URL = f"file://{FIXTURE}"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_pause", lambda attempt: None)


@pytest.mark.parametrize(
    ("manifest", "error", "says"),
    [
        ("{}", CacheDamageError, "no checksum of its own"),
        ("[]", CacheDamageError, "no checksum of its own"),
        ('{"format":2}', CacheDamageError, "no checksum of its own"),
        ('{"format":2,"self_sha256":"ab"}', MismatchError, "newer version"),
        ('{"format":1,"self_sha256":"ab"}', CacheDamageError, "its own checksum"),
    ],
)
def test_a_manifest_that_is_not_ours(tmp_path: Path, manifest: str, error: Any, says: str) -> None:
    source, kept = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    (source / "manifest.json").write_text(manifest + "\n")
    with pytest.raises(error, match=says) as caught:
        open_remote(f"file://{source}", store=kept)
    assert caught.value.details["file"] == f"file://{source}/manifest.json" and not kept.exists()


def test_a_full_local_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far, tries = open_remote(URL, store=tmp_path), list[str]()

    def full(source: str, target: str, **_: Any) -> None:
        tries.append(source)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr(far._source.fs, "get_file", full)
    with pytest.raises(DiskFullError, match="no space left") as caught:
        far.read("boxes", 0)
    assert len(tries) == 1 and str(tmp_path) in caught.value.details["file"] and "free" in caught.value.details["next"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("field", ["boxes", "images"])
def test_a_shard_that_another_process_evicts_is_fetched_again(
    tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the file and its opening."""
    near, far = open_cache(FIXTURE), open_remote(URL, store=tmp_path)
    number, times, touch = 0, [], os.utime

    def evicted(path: Any, *a: Any, **k: Any) -> None:
        touch(path, *a, **k)
        if not times:
            os.unlink(path)
        times.append(path)

    monkeypatch.setattr(remote.os, "utime", evicted)
    stored = far.read(field, number)
    assert len(times) == 2 and (stored == near.read(field, number) if field == "images" else stored.any())


@pytest.mark.parametrize("field", ["boxes", "images"])
def test_an_evicted_shard_beyond_the_open_files(tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is opened anew for every read, so it may be gone at any of them."""
    monkeypatch.setattr(store, "MAX_OPEN", 0)
    near, far = open_cache(FIXTURE), open_remote(URL, store=tmp_path)
    far.read(field, 0)
    far._path(field, 0).unlink()
    again = far.read(field, 1)
    assert again == near.read(field, 1) if field == "images" else (again == near.read(field, 1)).all()


@pytest.mark.parametrize("field", ["boxes", "images"])
@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "zeros"])
def test_a_damaged_copy_of_a_shard_is_fetched_again(tmp_path: Path, field: str, how: str) -> None:
    """Left by a power failure or a bad disk after it had been checked."""
    near, row = open_cache(FIXTURE), 0
    copy = open_remote(URL, store=tmp_path)._path(field, row)
    open_remote(URL, store=tmp_path).read(field, row)
    whole = copy.read_bytes()
    flipped = bytes(b ^ 4 for b in whole)
    copy.write_bytes({"cut": whole[:-10], "empty": b"", "flipped": flipped, "zeros": bytes(len(whole))}[how])
    again = open_remote(URL, store=tmp_path).read(field, row)
    assert again == near.read(field, row) if field == "images" else (again == near.read(field, row)).all()
    assert copy.read_bytes() == whole


def test_two_threads_that_met_the_same_damage_drop_one_copy(tmp_path: Path) -> None:
    """The second one to say so may come when the new copy is already here."""
    far = open_remote(URL, store=tmp_path)
    copy = far._path("boxes", 0)
    far.read("boxes", 0)
    far._drop_damaged(("boxes", 0))
    assert not copy.exists()
    far._files.clear()
    far.read("boxes", 0)
    far._drop_damaged(("boxes", 0))
    assert copy.exists()


def test_damage_that_every_copy_has_is_an_error_after_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source itself is damaged inside a file whose receipt agrees."""
    far, fetched, real = open_remote(URL, store=tmp_path), [], RemoteCache._fetch

    def broken(self: RemoteCache, name: str, number: int, path: Path, *rest: Any) -> bool:
        done = real(self, name, number, path, *rest)
        fetched.append(name)
        path.write_bytes(bytes(path.stat().st_size))
        return done

    monkeypatch.setattr(RemoteCache, "_fetch", broken)
    for _ in range(2):
        with pytest.raises(CacheDamageError):
            far.read("boxes", 0)
    assert fetched == ["boxes", "boxes"]


def test_eviction_makes_no_sample_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far, touch = open_remote(URL, store=tmp_path), os.utime

    def evicted(path: Any, *a: Any, **k: Any) -> None:
        touch(path, *a, **k)
        monkeypatch.setattr(remote.os, "utime", touch)
        os.unlink(path)

    monkeypatch.setattr(remote.os, "utime", evicted)
    s = stream(far, 1, split="all", shuffle="none", fields=("boxes",), on_bad_sample="skip")
    assert [b.tokens[0] for b in s] == [far.token(r) for r in range(4)] and s.skips == 0


@pytest.mark.parametrize("name", ["index.parquet", "recipe.json", "NOTICE", "manifest.json", "arrays.zarr/boxes/zarr.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_copy_of_the_metadata_is_fetched_again(tmp_path: Path, name: str, how: str) -> None:
    copy = open_remote(URL, store=tmp_path).path / name
    whole = copy.read_bytes()
    at = len(whole) // 2
    damaged = {"cut": whole[:-10], "flipped": whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :], "empty": b""}
    copy.write_bytes(damaged[how])
    far = open_remote(URL, store=tmp_path)
    assert isinstance(far, RemoteCache) and len(far) == 4 and copy.read_bytes() == whole
    assert far.read("boxes", 0).any() and len(far.annotation_tokens(0)[0]) == 49


def test_whole_copies_of_the_metadata_stay(tmp_path: Path) -> None:
    folder = open_remote(URL, store=tmp_path).path
    before = {p: p.stat().st_ino for p in folder.rglob("*") if p.is_file()}
    open_remote(URL, store=tmp_path)
    assert before == {p: p.stat().st_ino for p in folder.rglob("*") if p.is_file()}
