"""The commit protocol: whole or not there, whatever step fails; and what a power loss can leave."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imkd_data.cache import commit, fault
from imkd_data.cache.commit import commit_bytes, remove_file
from imkd_data.errors import CacheDamageError, DiskFullError, ImkdError, StorageError

DATA, OTHER = b"new content" * 50, b"old content" * 50


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.endswith(".partial")]


def test_new_file(tmp_path: Path) -> None:
    done = commit_bytes(tmp_path / "a" / "b" / "c", DATA)
    assert (tmp_path / "a/b/c").read_bytes() == DATA and done.written and done.bytes == len(DATA)
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o644 and left_behind(tmp_path) == []


def test_equal_file_is_accepted_and_a_different_one_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "f"
    commit_bytes(path, DATA)
    before = path.stat()
    assert not commit_bytes(path, DATA).written
    with pytest.raises(CacheDamageError, match="already in place") as caught:
        commit_bytes(path, OTHER)
    assert str(path) in str(caught.value) and path.stat().st_ino == before.st_ino and path.read_bytes() == DATA
    assert commit_bytes(path, OTHER, replace=True).written and path.read_bytes() == OTHER and left_behind(tmp_path) == []


STEPS = fault.COMMIT_STEPS


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("mode", "kind"), [("enospc", DiskFullError), ("edquot", DiskFullError), ("eperm", StorageError)])
def test_f36_f37_an_error_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, mode: str, kind: type[ImkdError]
) -> None:
    monkeypatch.setenv("IMKD_FAULT", f"data.{step}:{mode}:*")
    path = tmp_path / "f"
    with pytest.raises(kind) as caught:
        commit_bytes(path, DATA)
    assert caught.value.code == 5 and str(path) in str(caught.value)
    assert left_behind(tmp_path) == []
    assert not path.exists() or path.read_bytes() == DATA
    monkeypatch.delenv("IMKD_FAULT")
    commit_bytes(path, DATA)
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["eio", "estale"])
def test_f38_one_retry_after_an_input_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, mode: str
) -> None:
    monkeypatch.setattr(commit.time, "sleep", lambda s: None)
    monkeypatch.setattr(fault, "_COUNTS", {})
    monkeypatch.setenv("IMKD_FAULT", f"data.{step}:{mode}:1")
    commit_bytes(tmp_path / "f", DATA)
    assert (tmp_path / "f").read_bytes() == DATA and left_behind(tmp_path) == []
    monkeypatch.setenv("IMKD_FAULT", f"data.{step}:{mode}:*")
    with pytest.raises(StorageError):
        commit_bytes(tmp_path / "g", DATA)
    assert left_behind(tmp_path) == []


def test_f43_renameat2_and_hard_links_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any) -> None:
        raise OSError(errno.EPERM, "refused")

    monkeypatch.setattr(commit, "_renameat2", no)
    commit_bytes(tmp_path / "f", DATA)  # by link
    monkeypatch.setattr(commit.os, "link", no)
    commit_bytes(tmp_path / "g", DATA)  # by exclusive create
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes() == DATA
    for name in "fg":
        assert not commit_bytes(tmp_path / name, DATA).written
        with pytest.raises(CacheDamageError):
            commit_bytes(tmp_path / name, OTHER)
    assert left_behind(tmp_path) == []


def test_f43_rename_reports_an_error_though_it_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def done_but_error(temp: Path, path: Path) -> None:
        os.rename(temp, path)
        raise OSError(errno.ENOENT, "no such file")

    monkeypatch.setattr(commit, "_renameat2", done_but_error)
    assert commit_bytes(tmp_path / "f", DATA).written and (tmp_path / "f").read_bytes() == DATA


def test_written_bytes_that_read_back_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(commit.os, "write", lambda fd, b: real(fd, bytes(b)[:-1] + b"?") if len(b) > 1 else real(fd, b))
    monkeypatch.setattr(commit.time, "sleep", lambda s: None)
    with pytest.raises(StorageError):
        commit_bytes(tmp_path / "f", DATA)
    assert list(tmp_path.iterdir()) == []


def test_f40_temp_lies_beside_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = commit._rename_new
    monkeypatch.setattr(
        commit,
        "_rename_new",
        lambda temp, path, data: (
            seen.append((temp.stat().st_dev, path.parent.stat().st_dev, temp.parent == path.parent)),
            real(temp, path, data),
        )[1],
    )
    commit_bytes(tmp_path / "f", DATA)
    assert seen[0][0] == seen[0][1] and seen[0][2]


def test_no_link_is_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / "f").symlink_to(target)
    with pytest.raises(ImkdError):
        commit_bytes(tmp_path / "f", DATA)
    assert not target.exists()


# F44: trace the system calls of a commit, replay every prefix with un-synced data lost, look at what is left.


class Trace:
    """Records what a commit asks of the system: created, written, fsync(file), renamed, unlinked, fsync(folder)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.names: dict[int, str] = {}
        real_open, real_write, real_fsync, real_unlink = os.open, os.write, os.fsync, os.unlink
        real_rename, real_replace, real_path_unlink = commit._renameat2, os.replace, Path.unlink

        def open_(path: Any, flags: int, mode: int = 0o777) -> int:
            fd = real_open(path, flags, mode)
            self.names[fd] = str(path)
            if flags & os.O_CREAT:
                self.calls.append(("create", str(path)))
            return fd

        def write(fd: int, data: Any) -> int:
            n = real_write(fd, data)
            self.calls.append(("write", self.names[fd], bytes(data[:n]).hex()))
            return n

        def fsync(fd: int) -> None:
            real_fsync(fd)
            kind = "fsync_folder" if os.path.isdir(self.names[fd]) else "fsync"
            self.calls.append((kind, self.names[fd]))

        def rename(a: Path, b: Path) -> None:
            real_rename(a, b)
            self.calls.append(("rename", str(a), str(b)))

        def replace(a: Any, b: Any) -> None:
            real_replace(a, b)
            self.calls.append(("rename", str(a), str(b)))

        def unlink(self_path: Path, missing_ok: bool = False) -> None:
            there = self_path.exists()
            real_path_unlink(self_path, missing_ok=missing_ok)
            if there:
                self.calls.append(("unlink", str(self_path)))

        monkeypatch.setattr(commit.os, "open", open_)
        monkeypatch.setattr(commit.os, "write", write)
        monkeypatch.setattr(commit.os, "fsync", fsync)
        monkeypatch.setattr(commit, "_renameat2", rename)
        monkeypatch.setattr(commit.os, "replace", replace)
        monkeypatch.setattr(Path, "unlink", unlink)
        del real_unlink


def after_power_loss(calls: list[tuple[str, ...]], start: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """States a disk may be in when the power goes after ``calls``: data without fsync is whole, empty or half; names whose
    folder was not synced exist as before or as after, in order."""
    inode: dict[str, list[bytes]] = {n: [d, d] for n, d in start.items()}  # [volatile, durable]
    durable: dict[str, list[bytes]] = dict(inode)
    pending: list[tuple[str, ...]] = []
    states: list[dict[str, list[bytes]]] = [dict(durable)]
    for call in calls:
        if call[0] == "create":
            inode[call[1]] = [b"", b""]
            pending.append(("name", call[1]))
        elif call[0] == "write":
            inode[call[1]][0] += bytes.fromhex(call[2])
        elif call[0] == "fsync":
            inode[call[1]][1] = inode[call[1]][0]
        elif call[0] == "rename":
            inode[call[2]] = inode.pop(call[1])
            pending.append(call)
        elif call[0] == "unlink":
            inode.pop(call[1], None)
            pending.append(call)
        elif call[0] == "fsync_folder":
            durable = dict(inode)
            pending = []
        states = [dict(durable), dict(inode)]
    for names in states:
        for lost in ("durable", "half", "volatile"):
            yield {
                n: v[0] if lost == "volatile" else v[1] if lost == "durable" else v[1] or v[0][: len(v[0]) // 2]
                for n, v in names.items()
            }


def states_of(calls: list[tuple[str, ...]], start: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    for end in range(len(calls) + 1):
        yield from after_power_loss(calls[:end], start)


@pytest.mark.parametrize("replace", [False, True])
def test_f44_power_loss_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool) -> None:
    path = tmp_path / "f"
    start = {}
    if replace:
        path.write_bytes(OTHER)
        start = {str(path): OTHER}
    trace = Trace(monkeypatch)
    commit_bytes(path, DATA, replace=replace)
    kinds = [c[0] for c in trace.calls]
    assert kinds == ["create", "write", "fsync", "rename", "fsync_folder"]
    found = [state.get(str(path)) for state in states_of(trace.calls, start)]
    assert set(found) == {OTHER if replace else None, DATA}
    assert all(s.get(str(path)) == DATA for s in after_power_loss(trace.calls, start))  # after the end: surely there


@pytest.mark.parametrize("left_out", ["fsync", "fsync_folder"])
def test_f44_the_replay_sees_a_missing_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    """Mutation: without each of the two syncs some state is torn or lost, so the test above can fail."""
    trace = Trace(monkeypatch)
    commit_bytes(tmp_path / "f", DATA)
    calls = [c for c in trace.calls if c[0] != left_out]
    if left_out == "fsync":
        assert any(s.get(str(tmp_path / "f"), DATA) != DATA for s in states_of(calls, {}))
    else:
        assert any(str(tmp_path / "f") not in s for s in after_power_loss(calls, {}))


def test_f44_data_before_receipt_and_receipt_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no state is there a receipt without its whole data file, in building and in rebuilding."""
    data, receipt = tmp_path / "data", tmp_path / "receipt"
    trace = Trace(monkeypatch)
    commit_bytes(data, DATA)
    commit_bytes(receipt, b"receipt 1", "receipt")
    remove_file(receipt, "receipt")
    remove_file(data, "data")
    commit_bytes(data, OTHER)
    commit_bytes(receipt, b"receipt 2", "receipt")
    for state in states_of(trace.calls, {}):
        told = state.get(str(receipt))
        assert told is None or state.get(str(data)) == (DATA if told == b"receipt 1" else OTHER)


def test_no_fsync_is_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    commit_bytes(tmp_path / "f", DATA, fsync=False)
    assert [c[0] for c in trace.calls] == ["create", "write", "rename"]


def test_fault_points_do_nothing_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMKD_FAULT", raising=False)
    for name in fault.POINTS:
        fault.point(name)
    monkeypatch.setenv("IMKD_FAULT", "data.begin:explode")
    with pytest.raises(ValueError, match="unknown mode"):
        fault.point("data.begin")
