"""verify finds every change of stored bytes; repair rebuilds exactly what it names."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import TOY_FIELDS, open_toy
from toy_build import build_toy, open_toy_cache, stored

from imkd_data.cache.verify import RULES, damaged_pairs, verify
from imkd_data.errors import (
    CacheDamageError,
    ImkdError,
    LockedError,
    MismatchError,
    SourceMissingError,
    StorageError,
    UsageError,
)
from pipelines.build.repair import clean_temp, repair


def errors(path: Path, level: str = "full") -> list[str]:
    return [p.rule for p in verify(path, level=level) if p.severity == "error"]


def do_repair(path: Path, root: Path, **rest: object) -> object:
    return repair(path, dataroot=root, reader=open_toy, fields=TOY_FIELDS, fsync=False, **rest)  # type: ignore[arg-type]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def test_clean(toy_cache: Path) -> None:
    for level in ("quick", "full", "geometry"):
        assert verify(toy_cache, level=level) == []


def test_an_unknown_field_is_refused(toy_cache: Path) -> None:
    """Else a slip of the pen would read as "no damage found"."""
    assert verify(toy_cache, level="full", fields=["toy_pose"]) == []
    with pytest.raises(UsageError, match="unknown fields") as caught:
        verify(toy_cache, level="full", fields=["toy_pose", "toy_posse"])
    assert caught.value.details == {"expected": "toy_count, toy_pictures, toy_pose, toy_view", "found": "toy_posse"}


@pytest.mark.parametrize(
    ("folder", "rules"),
    [
        ("arrays.zarr/toy_count/c/1", {"data.missing"}),
        ("arrays.zarr/toy_count", {"array.damaged", "data.missing"}),
        ("arrays.zarr", {"group.damaged", "array.damaged", "data.missing"}),
        ("blobs/toy_pictures", {"data.missing"}),
        ("receipts/toy_pose", {"receipt.missing"}),
    ],
)
def test_a_file_where_a_folder_should_be(toy_root: Path, damaged: Callable[[], Path], folder: str, rules: set[str]) -> None:
    path = damaged()
    shutil.rmtree(path / folder)
    (path / folder).write_bytes(b"x")
    for level in ("quick", "full"):
        assert set(errors(path, level)) == rules
    problems = [p for p in verify(path) if p.rule == "data.missing"]
    assert all("Not a directory" in p.what for p in problems)


def test_a_data_file_that_cannot_be_reached_is_no_damage(damaged: Callable[[], Path]) -> None:
    path = damaged()
    (path / "blobs/toy_pictures/00000.tar").unlink()
    (path / "blobs/toy_pictures/00000.tar").symlink_to("00000.tar")
    with pytest.raises(StorageError) as caught:
        verify(path)
    assert str(caught.value.details["file"]).endswith("00000.tar")


@pytest.mark.parametrize(("name", "rule"), [("NOTICE", "notice.damaged"), ("manifest.json", "manifest.damaged")])
def test_a_folder_where_a_file_should_be(damaged: Callable[[], Path], name: str, rule: str) -> None:
    path = damaged()
    (path / name).unlink()
    (path / name).mkdir()
    assert rule in errors(path)


KINDS = {
    "shard body": "arrays.zarr/toy_count/c/1/0/0",
    "zarr.json": "arrays.zarr/toy_view/zarr.json",
    "group": "arrays.zarr/zarr.json",
    "manifest": "manifest.json",
    "recipe": "recipe.json",
    "receipt": "receipts/toy_pictures/00002.json",
    "tar": "blobs/toy_pictures/00001.tar",
    "parquet": "index.parquet",
    "notice": "NOTICE",
}


def count(kind: str) -> int:
    return 200 if os.environ.get("IMKD_LONG") else 12


@pytest.mark.parametrize("kind", KINDS)
def test_f50_every_bit_flip_is_found(damaged: Callable[[], Path], kind: str) -> None:
    """Flip, verify, flip back; and a read of the hit file raises or returns the stored bytes, never other ones."""
    path = damaged()
    file = path / KINDS[kind]
    size, rng = file.stat().st_size * 8, random.Random(kind)
    truth = {int(r): open_toy_cache(path).read("toy_count", int(r)).tobytes() for r in open_toy_cache(path).rows()}
    ends = [0, size - 1, size - 8 * 60] if kind == "shard body" else [size - 1]  # the index of the shard, the last newline
    for bit in ends + [rng.randrange(size) for _ in range(count(kind))]:
        flip(file, bit)
        try:
            found = errors(path)
        except ImkdError as error:
            found = [error.rule]
        assert found, f"{kind}: bit {bit} of {file.name} is not found"
        try:
            cache = open_toy_cache(path)
            for row, expected in truth.items():
                assert cache.read("toy_count", row).tobytes() == expected
        except ImkdError as error:
            assert error.code in (4, 9), error
        flip(file, bit)
    assert errors(path) == []


@pytest.mark.parametrize("seed", range(1))
def test_f50_flips_anywhere(damaged: Callable[[], Path], seed: int) -> None:
    """200 random single-bit flips in any file but .lock and logs: 200 found."""
    path, rng = damaged(), random.Random(seed)
    files = sorted(p for p in path.rglob("*") if p.is_file() and "logs" not in p.parts and p.name != ".lock")
    weights = [p.stat().st_size for p in files]
    found = 0
    number = 200
    for _ in range(number):
        file = rng.choices(files, weights)[0] if rng.random() < 0.5 else rng.choice(files)
        bit = rng.randrange(file.stat().st_size * 8)
        flip(file, bit)
        try:
            found += bool(errors(path))
        except (CacheDamageError, MismatchError):
            found += 1
        flip(file, bit)
    assert found == number


def test_f51_f52_f55_repair_rebuilds_only_what_failed(toy_root: Path, damaged: Callable[[], Path]) -> None:
    path = damaged()
    before = stored(path)
    inode = {n: (os.stat(path / n).st_ino, os.stat(path / n).st_mtime_ns) for n in before}
    (path / "arrays.zarr/toy_count/c/1/0/0").unlink()
    os.truncate(path / "blobs/toy_pictures/00003.tar", 100)
    a, b = path / "arrays.zarr/toy_pose/c/0/0", path / "arrays.zarr/toy_pose/c/2/0"
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two), b.write_bytes(one)
    flip(path / "receipts/toy_view/00000.json", 77)
    pairs = {("toy_count", 1), ("toy_pictures", 3), ("toy_pose", 0), ("toy_pose", 2), ("toy_view", 0)}
    assert damaged_pairs(verify(path, level="full")) == pairs
    assert set(do_repair(path, toy_root, dry_run=True).pairs) == pairs  # type: ignore[attr-defined]
    do_repair(path, toy_root)
    assert stored(path) == before and errors(path) == []
    touched = {n for n in before if (os.stat(path / n).st_ino, os.stat(path / n).st_mtime_ns) != inode[n]}
    rebuilt = {n for n in touched if "/c/" in n or n.endswith(".tar")}
    assert rebuilt <= {
        "arrays.zarr/toy_count/c/1/0/0",
        "blobs/toy_pictures/00003.tar",
        "arrays.zarr/toy_pose/c/0/0",
        "arrays.zarr/toy_pose/c/2/0",
        "arrays.zarr/toy_view/c/0/0/0",
    }


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "recipe.json", "arrays.zarr/zarr.json", "arrays.zarr/toy_view/zarr.json", "index.parquet", "NOTICE"],
)
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_f55_small_files_are_restored(toy_root: Path, damaged: Callable[[], Path], name: str, how: str) -> None:
    path = damaged()
    before = stored(path)
    if how == "flip":
        flip(path / name, 99)
    else:
        (path / name).unlink()
    assert errors(path)
    result = do_repair(path, toy_root)
    assert stored(path) == before and errors(path) == []
    assert result.build is None or result.build.rebuilt == ()  # type: ignore[attr-defined]


def test_f55_without_raw_data_nothing_is_removed(damaged: Callable[[], Path], tmp_path: Path) -> None:
    path = damaged()
    flip(path / "arrays.zarr/toy_count/c/1/0/0", 33)
    before = stored(path)
    with pytest.raises(SourceMissingError) as caught:
        do_repair(path, tmp_path / "nowhere")
    assert caught.value.code == 8 and "15 of 16" in str(caught.value.details["kept"]) and stored(path) == before


def test_f53_incomplete_cache_lists_what_is_missing(damaged: Callable[[], Path]) -> None:
    path = damaged()
    (path / "manifest.json").unlink()
    (path / "receipts/toy_view/00003.json").unlink()
    assert errors(path) == ["manifest.missing", "receipt.missing"]


def test_f54_foreign_and_temp_files(toy_root: Path, damaged: Callable[[], Path]) -> None:
    path = damaged()
    temp = path / "arrays.zarr/toy_count/c/1/0/.0.otherhost-1-ab12.partial"
    temp.write_bytes(b"x")
    (path / ".DS_Store").write_bytes(b"x")
    problems = verify(path, level="full")
    assert {(p.rule, p.severity) for p in problems} == {("file.partial", "note"), ("file.foreign", "note")}
    build_toy(toy_root, path)
    assert temp.exists()  # another host's: not ours to judge
    assert clean_temp(path) == [temp] and not temp.exists() and (path / ".DS_Store").exists()


def test_f54_a_build_removes_the_temp_files_of_dead_builds(toy_root: Path, damaged: Callable[[], Path]) -> None:
    from imkd_data.cache.commit import _host

    path = damaged()
    dead = path / f"receipts/toy_count/.00001.json.{_host()}-{2**22 - 3}-ab12.partial"
    alive = path / f"receipts/toy_count/.00001.json.{_host()}-{os.getppid()}-ab12.partial"
    dead.write_bytes(b"x"), alive.write_bytes(b"x")
    build_toy(toy_root, path)
    assert not dead.exists() and alive.exists()


def test_f56_clean_up_leaves_a_running_build_alone(damaged: Callable[[], Path]) -> None:
    from pipelines.build.lock import build_lock

    path = damaged()
    temp = path / "receipts/toy_count/.00001.json.host-1-ab12.partial"
    temp.write_bytes(b"x")
    cache = open_toy_cache(path)
    with build_lock(path), pytest.raises(LockedError):
        clean_temp(path)
    assert temp.exists()
    clean_temp(path)
    assert not temp.exists() and cache.read("toy_count", 7).sum() > 0  # a reader that is open is not disturbed


@pytest.mark.parametrize(
    "point", ["remove.manifest", "remove.receipt", "remove.data", "data.renamed", "receipt.created", "manifest.done"]
)
def test_f57_repair_killed_anywhere_is_repaired_by_the_next(toy_root: Path, damaged: Callable[[], Path], point: str) -> None:
    import signal

    from imkd_data.cache import fault

    path = damaged()
    before = stored(path)
    flip(path / "arrays.zarr/toy_count/c/1/0/0", 33)
    flip(path / "blobs/toy_pictures/00002.tar", 333)
    pid = os.fork()
    if pid == 0:
        os.environ["IMKD_FAULT"] = f"{point}:kill:1"
        fault._COUNTS.clear()
        try:
            do_repair(path, toy_root)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    do_repair(path, toy_root)
    assert stored(path) == before and errors(path) == []


def test_f57_verify_on_a_read_only_mount(toy_cache: Path, tmp_path: Path) -> None:
    import subprocess

    folder = tmp_path / "ro"
    folder.mkdir()
    mount = ["mount", "--bind", "-o", "ro", str(toy_cache), str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("bind mounts are not allowed here")
    try:
        assert verify(folder, level="full") == [] and len(open_toy_cache(folder).rows()) == 20
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def test_receipt_of_another_shard(damaged: Callable[[], Path]) -> None:
    path = damaged()
    a, b = (path / f"receipts/toy_count/0000{i}.json" for i in (0, 1))
    a.write_bytes(b.read_bytes())
    assert "receipt.damaged" in errors(path, "quick")
    (path / "manifest.json").unlink()  # now only the receipt itself can tell
    assert "receipt.foreign" in errors(path, "quick")


def test_tar_header_and_payload(damaged: Callable[[], Path]) -> None:
    """Also when somebody recomputed nothing but the file hash of the receipt: members have their own checksums."""
    path = damaged()
    file = path / "blobs/toy_pictures/00001.tar"
    size = file.stat().st_size
    flip(file, 8 * 700)
    found = {p.rule for p in verify(path, level="full")}
    assert found == {"data.crc32c", "row.crc32c"}
    flip(file, 8 * 700)
    flip(file, 8 * 5)
    assert {p.rule for p in verify(path, level="full")} == {"data.crc32c", "tar.members"} and file.stat().st_size == size


def test_verify_never_writes_and_reads_a_share(damaged: Callable[[], Path]) -> None:
    path = damaged()
    before = {n: os.stat(path / n).st_mtime_ns for n in stored(path)}
    flip(path / "arrays.zarr/toy_count/c/3/0/0", 9)
    verify(path, level="full")
    assert {n for n in before if os.stat(path / n).st_mtime_ns != before[n]} == {"arrays.zarr/toy_count/c/3/0/0"}
    assert [p.shard for p in verify(path, level="full", fields=["toy_view"]) if p.severity == "error"] == []
    assert [p.shard for p in verify(path, level="full", sample=0.25) if p.severity == "error"] == []  # shard 0 only


def test_every_rule_says_what_it_wants() -> None:
    assert len(RULES) >= 20
    assert all(sentence.endswith(".") and severity in ("error", "warning", "note") for sentence, severity in RULES.values())


def test_a_newer_format_is_refused(damaged: Callable[[], Path]) -> None:
    path = damaged()
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format":1', b'"format":9'))
    with pytest.raises(MismatchError) as caught:
        verify(path)
    assert caught.value.code == 9 and json.loads(json.dumps(caught.value.as_json()))["found"] == "format 9"


def test_nothing_here(tmp_path: Path) -> None:
    with pytest.raises(CacheDamageError, match="no cache"):
        verify(tmp_path)
