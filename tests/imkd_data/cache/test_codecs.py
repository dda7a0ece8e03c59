"""Our shards and tars against plain zarr and plain webdataset, on undamaged caches and on random arrays."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_build import open_toy_cache

from imkd_data.cache import codecs
from imkd_data.errors import CacheDamageError, InputDataError, RecipeError
from imkd_data.recipe import canonical_json


@pytest.mark.parametrize("codec", ["zstd1", "blosc3", "none"])
@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<i2", "<f4", "<f8"])
def test_zarr_reads_our_shards(tmp_path: Path, codec: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    rows = [(rng.integers(0, 200, (5, 3)) * (rng.random((5, 3)) < 0.5)).astype(dtype) for _ in range(4)]
    rows.append(np.zeros((5, 3), dtype))  # an empty row is written, too
    folder = tmp_path / "a.zarr"
    (folder / "c" / "1" / "0").mkdir(parents=True)
    meta = codecs.array_metadata(np.dtype(dtype), (5, 3), shards=2, rows_per_shard=7, codec=codec, attributes={"units": "m"})
    (folder / "zarr.json").write_bytes(canonical_json(meta))
    data = codecs.encode_shard([codecs.encode_row(r, codec) for r in rows], 7)
    (folder / "c" / "1" / "0" / "0").write_bytes(data)
    array = zarr.open_array(str(folder), mode="r")
    assert array.shape == (14, 5, 3) and array.attrs["units"] == "m" and array.dtype == np.dtype(dtype)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(array[7 + i], row)
    spans = codecs.parse_index(data[-(7 * 16 + 4) :], 7, len(data))
    assert [int(a) == codecs.MISSING for a in spans[:, 0]] == [False] * 5 + [True] * 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 255), st.integers(1, 40), st.sampled_from(["zstd1", "blosc3", "none"]))
def test_rows_come_back(seed: int, width: int, codec: str) -> None:
    array = np.random.default_rng(seed).integers(0, 9, (3, width)).astype("<u2")
    np.testing.assert_array_equal(codecs.decode_row(codecs.encode_row(array, codec), codec, array.dtype, array.shape), array)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 8))
def test_index_parser_never_trusts_bytes(data: bytes, rows: int) -> None:
    with pytest.raises(CacheDamageError):
        codecs.parse_index(data, rows, len(data))


def test_tar_is_plain_ustar() -> None:
    members = [("abc.cam_front.jpg", b"x" * 700), ("abc.points.npy.zst", b""), ("def.cam_front.jpg", b"yy")]
    data, table = codecs.encode_tar(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
        assert [(i.name, i.size, i.mode, i.mtime, i.uid, i.gid) for i in infos] == [
            (n, len(d), 0o644, 0, 0, 0) for n, d in members
        ]
        assert [tar.extractfile(i).read() for i in infos] == [d for _, d in members]  # type: ignore[union-attr]
    assert [(n, data[o : o + s]) for n, o, s, _ in table] == members


@pytest.mark.parametrize("name", ["../x.a.jpg", "a/b.c.jpg", "noextension", "UPPER.a.jpg", "a.b", "a" * 98 + ".b.c"])
def test_tar_refuses_odd_names(name: str) -> None:
    with pytest.raises(InputDataError):
        codecs.encode_tar([(name, b"")])


@pytest.mark.parametrize("size", [1, 200, 255, 256, 257, 70_000, 1_000_000])
def test_zstd_size_is_read_from_the_header(size: int) -> None:
    from numcodecs import zstd

    for level in (1, 3, 19):
        assert codecs.zstd_size(zstd.compress(np.zeros(size, np.uint8), level)) == size


def test_a_bomb_is_refused_before_it_unpacks() -> None:
    """A small frame that promises (and holds) far more than the array has."""
    from numcodecs import zstd

    bomb = zstd.compress(np.zeros(50_000_000, np.uint8), 19)
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match="50000000 bytes for an array of 12"):
        codecs.decode_row(bomb + b"crc.", "zstd1", np.dtype("u1"), (3, 4))
    with pytest.raises(CacheDamageError, match="limit"):
        codecs.blob_value("x.npy.zst", bomb, max_bytes=1000)
    with pytest.raises(ValueError, match="not a zstd frame"):
        codecs.zstd_size(b"hello, world")


def test_the_codec_makes_no_named_semaphore() -> None:
    """A killed worker would leave it in /dev/shm. A forked child gets a lock of its own, open even if ours is held."""
    import os
    import threading

    from numcodecs import blosc

    lock = blosc.get_mutex()
    assert type(lock) is type(threading.Lock())
    with lock:
        pid = os.fork()
        if pid == 0:
            row = codecs.encode_row(np.arange(999, dtype="<u2"), "blosc3")
            os._exit(0 if blosc.get_mutex() is not lock and len(row) > 10 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "arrays.zarr/a/c/1/../../x", "arrays.zarr/a/c/12", "arrays.zarr/b/c/1/0", "blobs/a/00002.tar"]
)
def test_paths_of_receipts_are_not_trusted(path: str) -> None:
    from imkd_data.cache.layout import check_name, is_own_path

    assert not is_own_path(path, "a", 1)
    assert is_own_path("arrays.zarr/a/c/1/0/0", "a", 1) and is_own_path("blobs/a/00001.tar", "a", 1)
    for name in ("../x", "a/b", "", "A", ".."):
        with pytest.raises(RecipeError):
            check_name(name)


def test_blob_value_never_unpickles() -> None:
    sink = io.BytesIO()
    np.save(sink, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        codecs.blob_value("x.npy", sink.getvalue())


def test_plain_zarr_reads_the_cache(toy_cache: Path) -> None:
    cache = open_toy_cache(toy_cache)
    group = zarr.open_group(str(toy_cache / "arrays.zarr"), mode="r")
    names = [n for n, f in cache.fields.items() if f.kind == "array"]
    assert sorted(group.array_keys()) == sorted(names)
    for row in cache.rows():
        for name in names:
            ours = cache.read(name, int(row))
            assert not ours.flags.writeable and ours.dtype == group[name].dtype
            np.testing.assert_array_equal(ours, group[name][int(row)])


def test_plain_webdataset_reads_the_cache(toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    cache = open_toy_cache(toy_cache)
    found = {}
    for path in sorted((toy_cache / "blobs" / "toy_pictures").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            found[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    assert list(found) == cache.index["token"].to_pylist()
    for token, parts in found.items():
        assert parts == cache.read_parts("toy_pictures", cache.row(token))


def test_every_json_is_canonical(toy_cache: Path) -> None:
    paths = [p for p in toy_cache.rglob("*.json") if "logs" not in p.parts]
    assert len(paths) > 10
    for path in paths:
        assert canonical_json(json.loads(path.read_bytes())) == path.read_bytes(), path
