"""Reading: rows, tokens, selections, pickling, threads, and that what is missing or foreign is an error and never zeros."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy import SUITE, TOY_FIELDS, TOY_POSE, open_toy
from toy_build import build_toy, open_toy_cache, stored

from imkd_data import open_cache
from imkd_data.cache.index import sample_row
from imkd_data.errors import CacheDamageError, MismatchError, UsageError


def test_rows_and_tokens(toy_root: Path, toy_cache: Path) -> None:
    cache = open_toy_cache(toy_cache)
    reader = open_toy(toy_root)
    tokens = [s.token for split in ("train", "val") for scene in reader.scene_names(split) for s in reader.samples(scene)]
    assert [cache.token(int(r)) for r in cache.rows()] == tokens
    assert [cache.row(t) for t in tokens] == cache.rows().tolist()
    # five samples a scene, seven rows a shard: shards hold one scene, row numbers jump
    assert cache.rows().tolist() == [7 * s + i for s in range(4) for i in range(5)]
    assert cache.rows("val").tolist() == [14, 15, 16, 17, 18, 21, 22, 23, 24, 25]
    assert cache.rows(scenes=["toy-002"]).tolist() == [7, 8, 9, 10, 11]
    for bad in (5, 6, 26, -1, 28, 10**9):
        with pytest.raises(UsageError):
            cache.token(bad)
    with pytest.raises(UsageError):
        cache.row("no such token")
    with pytest.raises(UsageError):
        cache.rows("test")


def test_what_is_read_is_what_was_computed(toy_root: Path, toy_cache: Path) -> None:
    cache, reader = open_toy_cache(toy_cache), open_toy(toy_root)
    for scene in reader.scene_names("val"):
        for sample in reader.samples(scene):
            row, payload = cache.row(sample.token), reader.read(sample, frozenset(("lidar", "images")))
            up: dict = {}
            for field in TOY_FIELDS:
                up[field.name] = field.compute(payload, cache.recipe, SUITE, up, {})
                got = cache.read_parts(field.name, row) if field.kind == "blob" else cache.read(field.name, row)
                assert (got == up[field.name]) if field.kind == "blob" else np.array_equal(got, up[field.name])
            assert set(cache.read("toy_pictures", row)) == set(SUITE.cameras)


def test_index_columns(toy_cache: Path) -> None:
    cache = open_toy_cache(toy_cache)
    first = cache.index.slice(0, 5).to_pylist()
    assert [r["previous_row"] for r in first] == [-1, 0, 1, 2, 3] and [r["next_row"] for r in first] == [1, 2, 3, 4, -1]
    assert {r["clip_start"] for r in first} == {0} and {r["split"] for r in first} == {"train"}
    assert [r["rain"] for r in first] == [False, True, False, True, False] == [r["night"] for r in first]
    # 3 m and 0.5 m per 0.25 s
    np.testing.assert_allclose([r["ego_speed_mps"] for r in first], 4 * np.hypot(3, 0.5), rtol=1e-6)
    assert [r["num_boxes"] for r in first] == [0, 1, 1, 0, 1] and len(first[0]["global_from_ego"]) == 12
    assert {r["status"] for r in cache.index.to_pylist()} == {"ok"}
    assert cache.index.schema.field("toy_count.crc32c").type == "uint32"


@pytest.mark.parametrize(
    ("text", "night", "rain"),
    [
        ("Night, rain, parked cars", True, True),
        ("light rain; rainy road", False, True),
        ("RAINING at nighttime", True, True),
        ("rain_night_2, heavy rainfall", True, True),
        ("Late night, after rain, peds", True, False),
        ("After rain, then rain again", False, True),
        ("Parked cars, train station", False, False),
        ("Long drain, rainbow, trains, terrain", False, False),
        ("Knights bridge, Nightingale road", False, False),
        ("overnight, midnight", True, False),
    ],
)
def test_weather_is_said_in_whole_words(toy_root: Path, text: str, night: bool, rain: bool) -> None:
    sample = replace(open_toy(toy_root).samples("toy-000")[0], description=text)
    row = sample_row(sample, SUITE)
    assert (row["night"], row["rain"]) == (night, rain)


def test_sequence_longer_than_a_shard_is_cut(toy_root: Path, tmp_path: Path) -> None:
    build_toy(toy_root, tmp_path / "c", overrides={"rows_per_shard": 3})
    cache = open_toy_cache(tmp_path / "c")
    assert [c.stop - c.start for s in cache.shards for c in s.clips] == [3, 2] * 4
    rows = cache.index.to_pylist()[:5]
    assert [r["previous_row"] for r in rows] == [-1, 0, 1, -1, 3] and [r["next_row"] for r in rows] == [1, 2, -1, 4, -1]


def test_opening_needs_no_raw_data_and_no_reader(toy_cache: Path) -> None:
    cache = open_cache(toy_cache)  # the toy fields are unknown to the program
    assert cache.suite == SUITE and cache.recipe.sensors == SUITE.channels
    assert cache.read("toy_count", 0).shape == (24, 32) and cache.attributes("toy_count")["units"] == "count"
    assert "open_cache" in dir(__import__("imkd_data"))


def test_field_that_is_absent_or_of_another_version(toy_cache: Path) -> None:
    cache = open_toy_cache(toy_cache)
    with pytest.raises(MismatchError, match="has no field") as caught:
        cache.read("lidar_points", 0)
    assert "--update --fields lidar_points" in str(caught.value)
    newer = open_cache(toy_cache, fields=[replace(TOY_POSE, version=2, decode=lambda v, r, s: v * 2)])
    np.testing.assert_array_equal(newer.decode("toy_pose", 0), newer.read("toy_pose", 0))  # not decoded by a foreign rule


def test_parts_of_an_array_field_are_no_question(toy_cache: Path) -> None:
    cache = open_toy_cache(toy_cache)
    with pytest.raises(UsageError, match="toy_count is an array") as caught:
        cache.read_parts("toy_count", 0)
    assert "read" in caught.value.details["next"]
    with pytest.raises(MismatchError, match="has no field"):
        cache.read_parts("lidar_points", 0)


def test_a_moved_cache_is_the_same(damaged: Callable[[], Path]) -> None:
    path = damaged()
    before = open_toy_cache(path)
    moved = path.rename(path.parent / "elsewhere with spaces")
    after = open_toy_cache(moved)
    assert after.id == before.id and np.array_equal(after.read("toy_pose", 8), open_toy_cache(moved).read("toy_pose", 8))


def test_pickle_fork_and_threads(toy_cache: Path) -> None:
    cache = open_toy_cache(toy_cache)
    expected = {int(r): cache.read("toy_count", int(r)).tobytes() for r in cache.rows()}
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.id == cache.id and copy.read("toy_count", 9).tobytes() == expected[9]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda r: cache.read("toy_count", r).tobytes(), list(expected) * 20))
    assert got == list(expected.values()) * 20
    pid = os.fork()
    if pid == 0:
        os._exit(0 if cache.read("toy_count", 9).tobytes() == expected[9] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_few_file_descriptors(toy_cache: Path) -> None:
    """F37: 64 open files are enough however many shards there are."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
        "from toy_build import open_toy_cache; from pathlib import Path\n"
        f"c = open_toy_cache(Path({str(toy_cache)!r}))\n"
        "print(sum(c.read(n, int(r)) is not None for r in c.rows() for n in c.fields))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.strip() == str(20 * 4), done.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 20


def test_reading_writes_nothing(toy_cache: Path) -> None:
    before = {n: os.stat(toy_cache / n).st_mtime_ns for n in stored(toy_cache)}
    cache = open_toy_cache(toy_cache)
    for row in cache.rows():
        cache.read("toy_view", int(row))
    cache.close()
    cache.read("toy_view", 0)
    assert before == {n: os.stat(toy_cache / n).st_mtime_ns for n in stored(toy_cache)}


@pytest.mark.parametrize(
    ("expression", "lines"),
    [
        ("night", [1, 3]),
        ("not rain and num_boxes > 0", [2, 4]),
        ("class_counts.car >= 1 and split = train and scene == toy-000", [2, 4]),
        ("timestamp_us < 1000300000", [0, 1]),
    ],
)
def test_select(toy_cache: Path, expression: str, lines: list[int]) -> None:
    cache = open_toy_cache(toy_cache)
    assert [r for r in cache.select(expression) if r < 5] == lines


@pytest.mark.parametrize("expression", ["nigth", "num_boxes", "__import__('os')", "num_boxes > many", "class_counts > 1", ""])
def test_select_refuses(toy_cache: Path, expression: str) -> None:
    with pytest.raises(UsageError):
        open_toy_cache(toy_cache).select(expression)


# Damage: an error with shard and token, at open or at the first read of the row, never silent.


@pytest.mark.parametrize("how", ["delete", "empty", "truncate", "longer", "sparse"])
@pytest.mark.parametrize("name", ["arrays.zarr/toy_count/c/1/0/0", "blobs/toy_pictures/00001.tar", "index.parquet"])
def test_f51_size_is_caught_at_open(damaged: Callable[[], Path], how: str, name: str) -> None:
    path = damaged()
    file, size = path / name, (path / name).stat().st_size
    if how == "delete":
        file.unlink()
    elif how == "longer":
        with open(file, "ab") as handle:
            handle.write(b"\0")
    else:
        os.truncate(file, {"empty": 0, "truncate": size - 1, "sparse": 0}[how])
        if how == "sparse":
            os.truncate(file, size + 4096)
    with pytest.raises(CacheDamageError) as caught:
        open_toy_cache(path)
    assert name in str(caught.value) and caught.value.code == 4
    if "toy" in name:
        assert "00001" in str(caught.value.details["shard"]) and "repair" in str(caught.value.details["next"])


def test_f51_file_cut_after_open_is_an_error_and_no_crash(damaged: Callable[[], Path]) -> None:
    path = damaged()
    cache = open_toy_cache(path)
    cache.read("toy_count", 7)
    os.truncate(path / "arrays.zarr/toy_count/c/1/0/0", 10)
    with pytest.raises(CacheDamageError, match="damaged"):
        cache.read("toy_count", 8)
    os.truncate(path / "arrays.zarr/toy_view/c/1/0/0", 10)
    with pytest.raises(CacheDamageError, match="size"):
        cache.read("toy_view", 8)


def test_f52_swapped_shards_of_equal_size(damaged: Callable[[], Path]) -> None:
    """Poses are stored without compression, so sizes are equal: only the checksum in the index tells."""
    path = damaged()
    a, b = (path / f"arrays.zarr/toy_pose/c/{s}/0" for s in (0, 1))
    one, two = a.read_bytes(), b.read_bytes()
    assert len(one) == len(two) and one != two  # the check at open has nothing to see
    a.write_bytes(two), b.write_bytes(one)
    cache = open_toy_cache(path)
    wrong = 0
    for row in cache.rows("train"):
        try:
            cache.read("toy_pose", int(row))
        except CacheDamageError as error:
            wrong += 1
            assert error.details["token"] == cache.token(int(row)) and "swapped" in error.what
    assert wrong == len(cache.rows("train"))


def test_f52_shard_of_another_cache(damaged: Callable[[], Path], tmp_path: Path) -> None:
    from toy import write_toy

    other = tmp_path / "other"
    build_toy(write_toy(tmp_path / "w", seed=5), other)
    path = damaged()
    target = path / "arrays.zarr/toy_count/c/2/0/0"
    data = (other / "arrays.zarr/toy_count/c/2/0/0").read_bytes()
    target.write_bytes(data)
    try:
        cache = open_toy_cache(path)
    except CacheDamageError as error:
        assert error.details["shard"] == "val 00002"
        return
    with pytest.raises(CacheDamageError, match="another sample or cache"):
        cache.read("toy_count", 14)


def test_missing_row_is_an_error_never_zeros(damaged: Callable[[], Path]) -> None:
    import google_crc32c

    path = damaged()
    file = path / "arrays.zarr/toy_count/c/1/0/0"
    data = bytearray(file.read_bytes())
    index = len(data) - (7 * 16 + 4)
    data[index : index + 16] = b"\xff" * 16
    data[-4:] = google_crc32c.value(bytes(data[index:-4])).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(CacheDamageError, match="missing in its shard"):
        open_toy_cache(path).read("toy_count", 7)


def test_f53_no_manifest(damaged: Callable[[], Path]) -> None:
    path = damaged()
    (path / "manifest.json").unlink()
    (path / "receipts/toy_view/00003.json").unlink()
    with pytest.raises(CacheDamageError, match="3 of 4 shards complete") as caught:
        open_toy_cache(path)
    assert "resume" in str(caught.value.details["next"])
    with pytest.raises(CacheDamageError, match="no cache here"):
        open_cache(path / "nothing")


@pytest.mark.parametrize("how", ["newer", "edited", "truncated"])
def test_f53_manifest_that_is_not_ours(damaged: Callable[[], Path], how: str) -> None:
    path = damaged()
    file = path / "manifest.json"
    data = file.read_bytes()
    if how == "newer":
        data = data.replace(b'"format":1', b'"format":2')
    elif how == "edited":
        data = data.replace(b'"scenes":4', b'"scenes":5')
    else:
        data = data[: len(data) // 2]
    file.write_bytes(data)
    with pytest.raises(MismatchError if how == "newer" else CacheDamageError) as caught:
        open_toy_cache(path)
    assert caught.value.code == (9 if how == "newer" else 4)


def test_f54_foreign_files_are_ignored(damaged: Callable[[], Path]) -> None:
    path = damaged()
    for name in (".DS_Store", "._recipe.json", "arrays.zarr/toy_count/c/1/0/.0.host-1-ab.partial", "blobs/toy_pictures/x.txt"):
        (path / name).write_bytes(b"junk")
    cache = open_toy_cache(path)
    assert len(cache.rows()) == 20 and cache.read("toy_count", 7).sum() > 0


def test_f58_permission_lost_and_stale_handle(damaged: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from imkd_data.cache import shard_file as store
    from imkd_data.errors import StorageError

    cache = open_toy_cache(damaged())
    real, calls = os.pread, {"n": 0}

    def stale_once(fd: int, size: int, at: int) -> bytes:
        calls["n"] += 1
        if calls["n"] == 2:
            raise OSError(errno.ESTALE, "stale")
        return real(fd, size, at)

    monkeypatch.setattr(store.os, "pread", stale_once)
    assert cache.read("toy_count", 0).sum() > 0

    def gone(*_: object) -> bytes:
        raise OSError(errno.ETIMEDOUT, "gone")

    monkeypatch.setattr(store.os, "pread", gone)
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        cache.read("toy_count", 1)
    assert caught.value.code == 5 and time.monotonic() - started < 5
    with pytest.raises(StorageError):
        monkeypatch.setattr(store.os, "open", lambda *a: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
        cache.read("toy_view", 1)


def test_parquet_pages_carry_checksums(damaged: Callable[[], Path]) -> None:
    path = damaged() / "index.parquet"
    data = bytearray(path.read_bytes())
    meta = pq.ParquetFile(path).metadata.row_group(0).column(3)
    data[meta.data_page_offset + meta.total_compressed_size - 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheDamageError):
        open_toy_cache(path.parent)
