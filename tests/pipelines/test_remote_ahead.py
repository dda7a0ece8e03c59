"""Shards of a remote cache come before they are needed; nothing that a batch holds depends on it."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_cache import disk_cache
from file_server import Server

from imkd_data import open_cache
from imkd_data.cache import remote, source
from imkd_data.cache.ahead import IN_FLIGHT
from imkd_data.cache.remote import open_remote
from imkd_data.errors import CacheDamageError, StorageError
from imkd_data.loader.batch import Batch
from imkd_data.loader.stream import stream
from pipelines.guard import batch_tensors

FIELDS = ("boxes", "radar_points", "lidar_intensity")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk_cache(tmp_path_factory.mktemp("ahead"))


@pytest.fixture
def server(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(source, "_pause", lambda attempt: None)
    made = Server(local, pause_s=0.02)
    yield made
    made.close()
    assert not fetching()


def fetching() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("imkd-fetch")]


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end and not true():
        time.sleep(0.01)
    return true()


def equal(a: Batch, b: Batch) -> bool:
    x, y = batch_tensors(a), batch_tensors(b)
    return a.tokens == b.tokens and set(x) == set(y) and all(torch.equal(x[n].nan_to_num(), y[n].nan_to_num()) for n in x)


def used(folder: Path) -> int:
    """Bytes of data files in the store, those on their way included."""
    total = 0
    for path in folder.rglob("*"):
        if "/c/" in str(path) or path.suffix in (".tar", ".partial"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
    return total


@pytest.mark.parametrize("shuffle", ["none", "global", "block"])
def test_files_come_together_once_and_before_they_are_asked_for(
    local: Path, server: Server, tmp_path: Path, shuffle: Any
) -> None:
    values: dict[str, Any] = {"split": "all", "shuffle": shuffle, "seed": 4, "history": (0, -1), "fields": FIELDS}
    near = list(stream(open_cache(local), 2, **values))
    far = open_remote(server.url, store=tmp_path)
    batches = iter(stream(far, 2, **values))
    got = [next(batches)]
    # Nothing more is asked for here, and still every shard of the epoch comes: four of each field.
    assert until(lambda: len(list(far.path.rglob("*/c/?/0*"))) + len(list(far.path.rglob("*.tar"))) >= 4 * len(FIELDS))
    got += list(batches)
    assert len(got) == len(near) > 8 and all(map(equal, near, got))
    asked = server.data_files()
    assert len(asked) == len(set(asked)) == 4 * len(FIELDS)
    assert 2 <= server.most_at_once <= IN_FLIGHT
    assert not fetching() and not list(tmp_path.rglob("*.partial"))


def test_an_abandoned_stream_leaves_no_threads_and_no_halves(local: Path, server: Server, tmp_path: Path) -> None:
    far = open_remote(server.url, store=tmp_path)
    batches = iter(stream(far, 2, split="all", fields=FIELDS))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not fetching() and until(lambda: not list(tmp_path.rglob("*.partial")))


@pytest.mark.parametrize("late_s", [(0.0,), (0.0, 0.0, 0.05, 0.2)])
def test_the_limit_holds_and_nothing_that_is_needed_next_is_evicted(
    local: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_s: tuple[float, ...]
) -> None:
    """Room for little more than one of four shards: still each file comes once, because they are read in order, also where
    the threads that fetch ahead are overtaken by the reader."""
    pauses, prompt = random.Random(3), remote.RemoteCache.fetch_ahead

    def late(self: remote.RemoteCache, *key: Any, **values: Any) -> None:
        time.sleep(pauses.choice(late_s))
        prompt(self, *key, **values)

    monkeypatch.setattr(remote.RemoteCache, "fetch_ahead", late)
    near = open_cache(local)
    sizes = [[e[0] for e in near.manifest["fields"][f]["shards"]] for f in FIELDS]
    limit = int(1.6 * max(map(sum, zip(*sizes, strict=True))))
    assert limit < sum(map(sum, sizes))
    far = open_remote(server.url, store=tmp_path, limit_bytes=limit)
    seen: list[int] = []
    server.watch = lambda: seen.append(used(far.path))
    values: dict[str, Any] = {"split": "all", "shuffle": "none", "fields": FIELDS}
    assert all(map(equal, stream(near, 1, **values), stream(far, 1, **values)))
    assert max(seen) <= limit and used(far.path) <= limit
    asked = server.data_files()
    assert len(asked) == len(set(asked)) == 4 * len(FIELDS)


def by_size(server: Server, folder: Path) -> list[tuple[str, int]]:
    """The four shards of a field, smallest first: where one goes, any before it fits."""
    far = open_remote(server.url, store=folder)
    return sorted((("boxes", n) for n in range(4)), key=lambda key: far.size_of(*key))


def with_room_for(keys: list[tuple[str, int]], server: Server, folder: Path) -> remote.RemoteCache:
    far = open_remote(server.url, store=folder)
    return open_remote(server.url, store=folder, limit_bytes=sum(far.size_of(*key) for key in keys))


def fetch(far: remote.RemoteCache, *keys: tuple[str, int]) -> None:
    for key in keys:
        far.fetch_ahead(*key, closed=threading.Event())


def read(far: remote.RemoteCache, key: tuple[str, int]) -> None:
    far.read(key[0], 5 * key[1])  # five rows per shard


def held(far: remote.RemoteCache) -> set[tuple[str, int]]:
    return {(name, n) for name in FIELDS for n in range(4) if far._path(name, n).is_file()}


def test_a_read_takes_its_room_from_what_no_batch_needs(server: Server, tmp_path: Path) -> None:
    """A shard that was fetched ahead and not opened yet is the least recently opened; it went first, and was fetched twice."""
    now, ahead, before, _ = by_size(server, tmp_path)
    far = with_room_for([ahead, before], server, tmp_path)
    far.coming["a stream"] = (ahead,)
    fetch(far, ahead)
    os.utime(far._path(*ahead), (0, 0))
    read(far, before)
    read(far, now)
    assert held(far) == {ahead, now}


def test_a_read_takes_what_is_needed_last_where_nothing_else_is_there(server: Server, tmp_path: Path) -> None:
    now, also, first, last = by_size(server, tmp_path)
    far = with_room_for([first, last], server, tmp_path)
    far.coming["a stream"], far.coming["another"] = (first, last), (last, also)
    fetch(far, last, first, also)
    assert held(far) == {first, last}  # also needed, and no room beside what is
    far.coming["another"] = ()
    read(far, now)
    assert held(far) == {now, first}


def test_a_shard_that_arrives_counts_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its arrival and the end of its fetch another one asks for room that is there."""
    now, ahead, _, _ = by_size(server, tmp_path)
    far = with_room_for([now, ahead], server, tmp_path)
    far.coming["a stream"] = (now, ahead)
    arrived, publish = threading.Event(), os.replace

    def slow(source: Any, target: Any) -> None:
        publish(source, target)
        arrived.set()
        time.sleep(0.3)

    monkeypatch.setattr(remote.os, "replace", slow)
    thread = threading.Thread(target=fetch, args=(far, ahead))
    thread.start()
    assert arrived.wait(10)
    read(far, now)
    thread.join()
    assert held(far) == {now, ahead}


def test_a_fetch_that_comes_too_late_is_not_made(server: Server, tmp_path: Path) -> None:
    """Its batch was read, and its shard evicted, between the thread's choice and its turn."""
    far = open_remote(server.url, store=tmp_path)
    far.coming["a stream"] = (("boxes", 1),)
    fetch(far, ("boxes", 0))
    assert not server.data_files() and not held(far)
    fetch(far, ("boxes", 1))
    assert held(far) == {("boxes", 1)}


def test_faults_on_the_way_change_nothing(local: Path, server: Server, tmp_path: Path) -> None:
    server.faults = {"boxes/c": ["500", "corrupt", "503"], "blobs/radar": ["short", "stall"], "receipts": ["503", "corrupt"]}
    far = open_remote(server.url, store=tmp_path, timeout_s=1.0)
    values: dict[str, Any] = {"split": "all", "seed": 1, "fields": FIELDS}
    assert all(map(equal, stream(open_cache(local), 3, **values), stream(far, 3, **values)))
    assert not any(server.faults.values())


@pytest.mark.parametrize(("fault", "error"), [("500", StorageError), ("corrupt", CacheDamageError)])
def test_the_batch_that_needs_a_lost_file_says_so_and_none_before_it(
    local: Path, server: Server, tmp_path: Path, fault: str, error: Any
) -> None:
    server.faults = {"boxes/c/1": [fault] * 99}
    cache = open_cache(local)
    batches = iter(stream(open_remote(server.url, store=tmp_path), 2, split="all", shuffle="none", fields=FIELDS))
    assert [next(batches).tokens for _ in range(2)] == [tuple(cache.token(r) for r in pair) for pair in ((0, 1), (2, 3))]
    with pytest.raises(error) as raised:
        next(batches)  # rows 4 of shard 0 and 5 of shard 1
    assert f"{server.url}/arrays.zarr/boxes/c/1" in str(raised.value) and cache.token(5) in str(raised.value)
    assert not fetching()


def test_workers_wait_for_what_is_on_its_way(local: Path, server: Server, tmp_path: Path) -> None:
    """The trainer's process fetches for its spawned workers, and they do not fetch the same again."""
    values: dict[str, Any] = {"split": "all", "shuffle": "block", "fields": FIELDS}
    far = open_remote(server.url, store=tmp_path)
    assert all(map(equal, stream(open_cache(local), 2, **values), stream(far, 2, workers=1, **values)))
    asked = server.data_files()
    assert len(asked) == len(set(asked)) == 4 * len(FIELDS)


def test_halves_of_killed_processes(local: Path, server: Server, tmp_path: Path) -> None:
    """A half of a process that is gone is waited for by nobody, and opening removes it once it is old; a living one's stays."""
    far = open_remote(server.url, store=tmp_path)
    folder = far.path / "arrays.zarr/boxes/c/0/0"
    folder.mkdir(parents=True)
    gone, old, living = (folder / f".0.{pid}.abc.partial" for pid in (2**22 + 1, os.getpid(), os.getppid()))
    for path in (gone, old):
        path.touch()
    os.utime(old, (0, 0))
    row = int(far.rows()[0])
    begun = time.monotonic()
    assert (far.read("boxes", row) == open_cache(local).read("boxes", row)).all() and time.monotonic() - begun < 20
    living.touch()
    open_remote(server.url, store=tmp_path)
    assert not old.exists() and living.exists()
