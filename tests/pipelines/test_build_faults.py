"""Faults of process and machine during a build (catalogue B): nothing committed is lost, the same command continues."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from toy import TOY_FIELDS, open_toy, write_toy
from toy_build import build_process, build_toy, copy_cache, open_toy_cache, stored

from imkd_data.cache import fault
from imkd_data.cache.verify import verify
from imkd_data.errors import (
    DiskFullError,
    InputDataError,
    LockedError,
    MismatchError,
    NoProgressError,
    SourceMissingError,
    StorageError,
    UsageError,
)
from pipelines.build.lock import build_lock

DEADLINE_S = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), scenes=3)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("ref") / "c"
    build_toy(world, out)
    return stored(out)


def no_temp_files(out: Path) -> bool:
    return not [p for p in out.rglob("*") if p.name.endswith(".partial")]


def kill_at(point: str, world: Path, out: Path, nth: int = 1, mode: str = "kill") -> int:
    process = build_process(world, out, {"IMKD_FAULT": f"{point}:{mode}:{nth}"})
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert "Traceback" not in errors, errors
    return process.returncode


# One process per fault point is slow; a child that builds in the forked test process is not.


def forked(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child and return its status; the child never returns into pytest."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the build hangs")


def build_with_fault(spec: str, world: Path, out: Path) -> int:
    def work() -> None:
        os.environ["IMKD_FAULT"] = spec
        fault._COUNTS.clear()
        build_toy(world, out)

    return forked(work)


def count_shards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """What is computed again."""
    import pipelines.build.jobs as module

    seen: list[tuple[int, tuple[str, ...]]] = []
    real = module.build_shard

    def counting(job, *rest, **kw):  # type: ignore[no-untyped-def]
        seen.append((job.shard.number, job.fields))
        return real(job, *rest, **kw)

    monkeypatch.setattr(module, "build_shard", counting)
    return seen


BUILD_POINTS = [p for p in fault.POINTS if not p.startswith("remove")]


@pytest.mark.parametrize("point", BUILD_POINTS)
def test_f30_sigkill_at_every_point(
    world: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    out = tmp_path / "c"
    nth = 6 if point.split(".")[0] in ("data", "receipt") else 1
    assert build_with_fault(f"{point}:kill:{nth}", world, out) == -signal.SIGKILL
    done = {str(p.relative_to(out)) for p in out.glob("receipts/*/*.json")}
    complete = (out / "manifest.json").exists()
    if complete:
        assert stored(out) == reference
    else:
        assert [p.rule for p in verify(out)] if (out / "recipe.json").exists() else True
    seen = count_shards(monkeypatch)
    build_toy(world, out)
    assert stored(out) == reference and no_temp_files(out)
    again = {f"receipts/{f}/{s:05d}.json" for s, fields in seen for f in fields}
    assert not again & done  # finished files are not computed again


@pytest.mark.parametrize("point", [p for p in fault.POINTS if p.startswith(("remove", "array", "recipe", "group", "manifest"))])
def test_f30_sigkill_while_updating(world: Path, tmp_path: Path, reference: dict[str, bytes], point: str) -> None:
    """Changing the grid removes and rebuilds; killed anywhere it is "not complete", never torn, and goes on."""
    base = tmp_path / "base"
    build_toy(world, base)
    wanted = tmp_path / "wanted"
    change = {"overrides": {"grid.nx": 16}}
    build_toy(world, copy_cache(base, wanted), update=True, **change)
    out = copy_cache(base, tmp_path / "c")

    def work() -> None:
        os.environ["IMKD_FAULT"] = f"{point}:kill:1"
        fault._COUNTS.clear()
        build_toy(world, out, update=True, **change)

    status = forked(work)
    assert status in (0, -signal.SIGKILL)
    if (out / "manifest.json").exists():
        assert stored(out) in (reference, stored(wanted))
    build_toy(world, out, update=True, **change)
    assert stored(out) == stored(wanted) and no_temp_files(out)


@pytest.mark.timeout(280)
def test_f30_sigkill_at_random_times(world: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    rng = random.Random(5)
    for i in range(1000 if os.environ.get("IMKD_LONG") else 8):
        out = tmp_path / f"c{i}"
        pid = os.fork()
        if pid == 0:
            try:
                build_toy(world, out)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        build_toy(world, out)
        assert stored(out) == reference and no_temp_files(out)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("executor", "number", "code"),
    [("sync", signal.SIGTERM, 143), ("processes", signal.SIGINT, 130), ("dask", signal.SIGINT, 130)],
)
def test_f31_one_signal_stops_in_order(
    world: Path, tmp_path: Path, reference: dict[str, bytes], number: int, code: int, executor: str
) -> None:
    """No new work, a message that says how to go on, no orphans."""
    out = tmp_path / "c"
    token = open_toy(world).samples("toy-002")[1].token
    slow = {"IMKD_FAULT": f"sample@{token}:pause:1"}
    process = build_process(world, out, slow, executor=executor, workers=2)
    _until(lambda: list(out.glob("logs/working/*.json")) and len(list(out.glob("receipts/*/*.json"))) >= 4)
    started = time.monotonic()
    os.killpg(process.pid, number)  # like Ctrl-C in a terminal: the whole group
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and time.monotonic() - started < 10
    assert "same command" in errors and "shards are complete" in errors and "Traceback" not in errors, errors
    _until(lambda: not _alive_in_session(process.pid), 3)
    build_toy(world, out)
    assert stored(out) == reference


def test_f31_two_signals_stop_at_once(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    token = open_toy(world).samples("toy-002")[1].token
    process = build_process(world, out, {"IMKD_FAULT": f"sample@{token}:sleep"}, executor="processes", workers=2)
    _until(lambda: any(token in p.read_text() for p in out.glob("logs/working/*.json")))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - started < 5
    _until(lambda: not _alive_in_session(process.pid))


@pytest.mark.parametrize(
    "mode", ["kill", pytest.param("exit", marks=pytest.mark.slow), pytest.param("segfault", marks=pytest.mark.slow)]
)
def test_f32_a_worker_dies_once(world: Path, tmp_path: Path, reference: dict[str, bytes], mode: str) -> None:
    out = tmp_path / "c"
    token = open_toy(world).samples("toy-001")[2].token
    env = {"IMKD_FAULT": f"sample@{token}:{mode}", "IMKD_FAULT_ONCE": str(tmp_path / "once")}
    process = build_process(world, out, env, executor="processes", workers=2)
    text, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert json.loads(text)["deaths"] == 1 and stored(out) == reference


@pytest.mark.parametrize("executor", ["processes", "dask"])
def test_f33_one_sample_kills_every_worker(world: Path, tmp_path: Path, executor: str) -> None:
    out = tmp_path / "c"
    token = open_toy(world).samples("toy-001")[2].token
    process = build_process(world, out, {"IMKD_FAULT": f"sample@{token}:kill:*"}, executor=executor, workers=2)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 3 and token in errors and "2 of 3 shards are complete" in errors, errors
    assert len(list(out.glob("receipts/*/*.json"))) == 8


def test_f33_a_blamed_shard_is_run_again_alone(
    world: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.build.dask_engine as module

    asked: list[tuple[int, bool]] = []
    outcome = module._outcome

    def blamed_at_first(future: Any, job: Any, engine: Any, deaths: Any, certain: bool) -> Any:
        asked.append((job.shard.number, certain))
        return outcome(future, job, engine, deaths, certain) if certain or job.shard.number == 1 else None

    monkeypatch.setattr(module, "_outcome", blamed_at_first)
    build_toy(world, tmp_path / "c", executor="dask", workers=1)
    assert stored(tmp_path / "c") == reference
    assert sorted(asked[:3]) == [(0, False), (1, False), (2, False)] and sorted(asked[3:]) == [(0, True), (2, True)]


def test_f33_shards_that_waited_on_a_dead_worker_are_built(world: Path, tmp_path: Path) -> None:
    """Dask blames every task that a dead worker held. With one worker shard 2 waits behind shard 1, three times."""
    out = tmp_path / "c"
    token = open_toy(world).samples("toy-002")[4].token
    process = build_process(world, out, {"IMKD_FAULT": f"sample@{token}:kill:*"}, executor="dask", workers=1)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 3 and token in errors and "2 of 3 shards are complete" in errors, errors
    assert "a sample kills every worker" in errors, errors


def test_f33_only_a_shard_seen_in_work_or_alone_is_called_deadly(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from distributed import KilledWorker
    from distributed.scheduler import WorkerState

    from pipelines.build.dask_engine import _outcome
    from pipelines.build.pool import Deaths

    def result() -> None:
        raise KilledWorker("build-train-shard-00007", Mock(spec=WorkerState), 2)

    future, engine = SimpleNamespace(result=result), SimpleNamespace(on_death=None)
    job = SimpleNamespace(shard=SimpleNamespace(number=7, label="train 00007"))
    assert _outcome(future, job, engine, Deaths(tmp_path), certain=False) is None
    alone = _outcome(future, job, engine, Deaths(tmp_path), certain=True)
    assert isinstance(alone, InputDataError) and alone.what.startswith("a shard kills every worker")
    notes = tmp_path / "logs" / "working"
    notes.mkdir(parents=True)
    (notes / "host-1-2.json").write_text(json.dumps({"shard": 7, "position": 4, "token": "abc", "pid": 1}))
    seen = _outcome(future, job, engine, Deaths(tmp_path), certain=False)
    assert isinstance(seen, InputDataError) and seen.details["token"] == "abc"


def test_f33_quarantine_leaves_only_that_sample_out(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    token = open_toy(world).samples("toy-001")[2].token
    process = build_process(
        world, out, {"IMKD_FAULT": f"sample@{token}:kill:*"}, executor="processes", on_error="quarantine", max_bad=1
    )
    text, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0 and json.loads(text)["quarantined"] == [token], errors
    cache = open_toy_cache(out)
    assert len(cache.rows()) == 14 and len(cache.rows(quarantined=True)) == 15


def test_f34_memory_limit(world: Path, tmp_path: Path) -> None:
    token = open_toy(world).samples("toy-001")[2].token
    env = {"IMKD_FAULT": f"sample@{token}:allocate:*"}
    process = build_process(world, tmp_path / "c", env, executor="processes", workers=1, memory_bytes=500 << 20)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 3 and "limit 500 MiB" in errors and "--memory" in errors and token in errors, errors


@pytest.mark.parametrize("executor", ["processes", "threads"])
def test_f35_a_worker_hangs(world: Path, tmp_path: Path, executor: str) -> None:
    out = tmp_path / "c"
    token = open_toy(world).samples("toy-001")[2].token
    process = build_process(
        world, out, {"IMKD_FAULT": f"sample@{token}:sleep"}, executor=executor, workers=2, stall_minutes=0.05
    )
    try:
        _, errors = process.communicate(timeout=40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == NoProgressError.code and token in errors, errors
    _until(lambda: not _alive_in_session(process.pid), 5)


def _alive_in_session(session: int) -> list[int]:
    found = []
    for p in Path("/proc").iterdir():
        if p.name.isdigit():
            try:
                if os.getsid(int(p.name)) == session and "Z" not in (p / "stat").read_text().rpartition(")")[2].split()[0]:
                    found.append(int(p.name))
            except OSError:
                continue
    return found


def _until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.02)


# Storage


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A 4 MB tmpfs, where mounting is allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@pytest.mark.parametrize("free", [0, 4_000, 30_000, 60_000])
def test_f36_disk_full(world: Path, small_disk: Path, reference: dict[str, bytes], free: int) -> None:
    ballast = small_disk / "ballast"
    status = os.statvfs(small_disk)
    ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - free))
    out = small_disk / "c"
    with pytest.raises(DiskFullError) as caught:
        build_toy(world, out)
    text = str(caught.value)
    assert caught.value.code == 5 and "free" in text and str(small_disk) in text
    kept = {p: p.read_bytes() for p in out.glob("receipts/*/*.json")}
    ballast.unlink()
    build_toy(world, out)
    assert stored(out) == reference and all(p.read_bytes() == data for p, data in kept.items())


def test_f36_preflight_refuses_first(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.build import estimate

    monkeypatch.setitem(estimate.KB_PER_SAMPLE, "toy_count", 1e12)
    with pytest.raises(DiskFullError, match="too small") as caught:
        build_toy(world, tmp_path / "c")
    assert caught.value.rule == "preflight.space" and not list((tmp_path / "c").glob("receipts/*/*"))


@pytest.mark.parametrize("kind", ["data", "receipt", "index", "manifest"])
def test_f36_full_at_each_kind_of_file(
    world: Path, tmp_path: Path, reference: dict[str, bytes], kind: str, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(fault, "_COUNTS", {})
    monkeypatch.setenv("IMKD_FAULT", f"{kind}.written:enospc:{3 if kind in ('data', 'receipt') else 1}")
    with pytest.raises(DiskFullError):
        build_toy(world, tmp_path / "c")
    assert no_temp_files(tmp_path / "c") and not (tmp_path / "c" / "manifest.json").exists()
    monkeypatch.delenv("IMKD_FAULT")
    build_toy(world, tmp_path / "c")
    assert stored(tmp_path / "c") == reference


def test_f37_file_size_limit(world: Path, tmp_path: Path) -> None:
    import resource

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            build_toy(world, tmp_path / "c")
        except DiskFullError as error:
            os._exit(error.code)

    assert forked(work) == 5


def test_f38_input_output_error_that_stays(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMKD_FAULT", "data.fsynced:eio:*")
    with pytest.raises(StorageError) as caught:
        build_toy(world, tmp_path / "c")
    assert caught.value.code == 5 and "shards are complete" in str(caught.value.details["kept"])
    assert not list((tmp_path / "c").glob("receipts/*/*.json"))


def test_f39_output_that_is_not_ours(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file, not a folder"):
        build_toy(world, tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(UsageError, match="not a cache") as caught:
        build_toy(world, tmp_path / "photos")
    assert caught.value.code == 2 and [p.name for p in (tmp_path / "photos").iterdir()] == ["me.jpg"]


def test_f39_read_only_output(world: Path, tmp_path: Path) -> None:
    """root may write anywhere, so a read-only bind mount stands in for missing permission."""
    folder = tmp_path / "ro"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
    else:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(StorageError) as caught:
            build_toy(world, folder / "c")
        assert caught.value.code == 5
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
        else:
            folder.chmod(0o700)


# Locks, resume, clocks


def test_f41_second_builder_is_refused(world: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "c"
    out.mkdir()
    with build_lock(out):
        with pytest.raises(LockedError) as caught:
            build_toy(world, out)
        text = str(caught.value)
        assert caught.value.code == 7 and str(os.getpid()) in text and os.uname().nodename in text and "since" in text
        build_toy(world, out, break_lock=True)
    assert stored(out) == reference


def test_f41_dead_and_remote_locks(world: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "c"
    out.mkdir()
    lock = out / ".lock"
    mine = {"host": os.uname().nodename, "pid": 2**22 - 5, "since": "long ago", "start": 1, "user": "x"}
    lock.write_text(json.dumps(mine))
    build_toy(world, out)  # dead: taken over
    assert stored(out) == reference and not lock.exists()
    lock.write_text(json.dumps({**mine, "pid": os.getppid()}))
    build_toy(world, out)  # the number was given to another process since
    lock.write_text(json.dumps({**mine, "host": "elsewhere"}))
    with pytest.raises(LockedError, match="another build"):
        build_toy(world, out)
    build_toy(world, out, break_lock=True)


def test_f42_two_builders_at_once_without_locks(world: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    """Locks that do nothing: no loss, since nothing is replaced and equal duplicates are recognised."""
    out = tmp_path / "c"
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            import contextlib

            import pipelines.build as module

            module.build_lock = lambda out, b=False: contextlib.nullcontext()
            module.finish.clean_dead_temp = lambda out: 0
            try:
                build_toy(world, out)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0, 0, 0]
    assert stored(out) == reference


def test_f45_clock_goes_back(world: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "c"
    build_toy(world, out)
    for p in out.rglob("*"):
        os.utime(p, (2**31, 2**31))
    (out / "receipts/toy_view/00001.json").unlink()
    (out / "manifest.json").unlink()
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert set(build_toy(world, out).rebuilt) == {("toy_view", 1)} and stored(out) == reference


def test_f46_source_changes_between_plan_and_build(world: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from imkd_data.cache.plan import make_plan
    from imkd_data.cache.write import build_shard
    from pipelines.build.jobs import jobs_of
    from pipelines.build.request import Asked, resolve

    got = resolve(Asked(dataroot=world, version="toy-1", splits=("train",), reader=open_toy, fields=TOY_FIELDS))
    job = jobs_of(make_plan(got.reader, got.recipe, got.fields))[0]
    with pytest.raises(InputDataError, match="changed between plan and build") as caught:
        build_shard(replace(job, tokens=job.tokens[::-1]), got.reader, got.recipe, got.fields, tmp_path)
    assert caught.value.code == 3 and "plans again" in str(caught.value)


def test_f46_file_changes_size_between_plan_and_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    import pipelines.build as module

    root = write_toy(tmp_path / "w", scenes=1)
    victim = root / open_toy(root).samples("toy-000")[3].lidar[0].path
    real = module.jobs_of

    def late(plan):  # type: ignore[no-untyped-def]
        np.save(victim, np.load(victim)[:-2])
        return real(plan)

    monkeypatch.setattr(module, "jobs_of", late)
    with pytest.raises(InputDataError, match="source changed") as caught:
        build_toy(root, tmp_path / "c", splits=("train",))
    assert "toy_count" in str(caught.value) and not (tmp_path / "c" / "manifest.json").exists()


def test_f47_another_recipe_is_refused(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    build_toy(world, out)
    with pytest.raises(MismatchError, match="another recipe"):
        build_toy(world, out, splits=("val",))
    assert open_toy_cache(out).recipe.splits == ("train", "val")


# Bad samples


def test_missing_files_are_grouped_before_anything_is_written(tmp_path: Path) -> None:
    root = write_toy(tmp_path / "w", scenes=4)
    for scene in ("toy-001", "toy-002"):
        gone = root / open_toy(root).samples(scene)[2].lidar[0].path
        gone.unlink()
    with pytest.raises(SourceMissingError, match=f"missing {gone.parent.name}: 2") as caught:
        build_toy(root, tmp_path / "c")
    assert caught.value.code == 8 and len(caught.value.problems) == 2 and "--scenes available" in str(caught.value)
    assert not (tmp_path / "c" / "recipe.json").exists()
    result = build_toy(root, tmp_path / "c", scenes="available")
    assert set(result.missing_scenes) == {"toy-001", "toy-002"} and result.samples == 10
    assert open_toy_cache(tmp_path / "c").recipe.scenes == ("toy-000", "toy-003")


def test_quarantine_keeps_the_good_fields_of_a_bad_sample(tmp_path: Path) -> None:
    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    bad = open_toy(root).samples("toy-000")[2]
    (root / bad.lidar[0].path).write_bytes(b"not an array")
    with pytest.raises(InputDataError) as caught:
        build_toy(root, out)
    text = str(caught.value)
    assert caught.value.code == 3 and bad.token in text and bad.lidar[0].path in text and "train 00000" in text
    with pytest.raises(InputDataError, match="quarantined") as caught:
        build_toy(root, out, on_error="quarantine")
    assert caught.value.code == 3
    cache = open_toy_cache(out)
    row = cache.row(bad.token)
    assert row not in cache.rows() and len(cache.rows()) == 9 and cache.manifest["quarantined"] == [bad.token]
    assert cache.read("toy_pose", row).shape == (12,) and len(cache.read("toy_pictures", row)) == 2
    from imkd_data.errors import CacheDamageError

    for name in ("toy_count", "toy_view"):
        with pytest.raises(CacheDamageError, match="missing in its shard"):
            cache.read(name, row)
    assert {p.rule for p in verify(out, level="full")} == {"quarantined"}
    ledger = [json.loads(line) for line in (out / "logs" / "failures.jsonl").read_text().splitlines()]
    assert {e["token"] for e in ledger} == {bad.token} and {e["field"] for e in ledger} == {"toy_count", "toy_view"}
    # when the file is back, repair fills the hole
    import numpy as np

    from pipelines.build.repair import repair

    np.save(root / bad.lidar[0].path, np.zeros((4, 5), np.float32))
    repair(out, dataroot=root, reader=open_toy, fields=TOY_FIELDS, fsync=False)
    assert len(open_toy_cache(out).rows()) == 10 and verify(out, level="full") == []


def test_quarantine_of_a_missing_file_accepts_up_to_max_bad(tmp_path: Path) -> None:
    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    bad = open_toy(root).samples("toy-000")[2]
    (root / bad.lidar[0].path).unlink()
    result = build_toy(root, out, on_error="quarantine", max_bad=1)
    assert result.quarantined == (bad.token,)
