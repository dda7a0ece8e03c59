"""Equal bytes however a build runs: executors, workers, task order, a real Dask scheduler with a worker killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from toy import TOY_COUNT, TOY_FIELDS, open_toy, write_toy
from toy_build import REPO, build_toy, open_toy_cache, stored

from imkd_data.errors import NoProgressError, SourceMissingError, UsageError
from pipelines.build import build
from pipelines.build.engine import Engine, run_all
from pipelines.build.jobs import Common, jobs_of, opened, pack, unpack


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), scenes=6)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("ref") / "c"
    build_toy(world, out)
    return stored(out)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("executor", "workers"), [("sync", 1), ("threads", 1), ("threads", 3), ("processes", 1), ("processes", 2), ("dask", 2)]
)
def test_f49_equal_bytes(world: Path, tmp_path: Path, reference: dict[str, bytes], executor: str, workers: int) -> None:
    result = build_toy(world, tmp_path / "c", executor=executor, workers=workers)
    assert stored(tmp_path / "c") == reference and len(result.rebuilt) == 24
    assert not list((tmp_path / "c" / "logs" / "working").glob("*.json"))


def test_f49_any_order_of_shards(
    world: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.build as module

    def shuffled(plan):  # type: ignore[no-untyped-def]
        jobs = jobs_of(plan)
        random.Random(4).shuffle(jobs)
        return jobs

    monkeypatch.setattr(module, "jobs_of", shuffled)
    build_toy(world, tmp_path / "c")
    assert stored(tmp_path / "c") == reference


def test_fields_one_after_the_other_give_equal_data(world: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    """Receipts do not depend on what else was built in the same task."""
    out = tmp_path / "c"
    for n in range(1, 5):
        build_toy(world, out, fields=TOY_FIELDS[:n], update=True)
    assert {n: v for n, v in stored(out).items() if n.startswith("receipts")} == {
        n: v for n, v in reference.items() if n.startswith("receipts")
    }
    assert stored(out) == reference


def test_what_travels_is_small_and_needs_no_arrays(world: Path, tmp_path: Path) -> None:
    from imkd_data.cache.write import Options
    from imkd_data.fields import FIELDS
    from pipelines.build.request import Asked, resolve

    asked = Asked(dataroot=world, version="toy-1", splits=("train",), reader=open_toy, fields=[*TOY_FIELDS, *FIELDS[:2]])
    got = resolve(asked)
    common = Common(spec=got.spec, recipe=got.recipe, fields=got.fields, out=tmp_path, options=Options())
    data = pack(common)
    back = unpack(data)
    assert len(data) < 20_000 and back.recipe == common.recipe
    assert all(back.fields[f.name] is f for f in FIELDS[:2])  # our own travel by name
    assert back.fields["toy_count"].compute is TOY_COUNT.compute  # functions of importable modules, too


def test_a_field_defined_in_main(world: Path, tmp_path: Path) -> None:
    """A field of the user's own script goes to worker processes by value."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys, numpy as np\nfrom dataclasses import replace\nfrom toy_build import build_toy, open_toy_cache\n"
        "from toy import TOY_POSE\nfrom pathlib import Path\nSCALE = 3.0\n"
        "def three(p, recipe, suite, up, drops):\n    return p.sample.global_from_ego.matrix34() * SCALE\n"
        "if __name__ == '__main__':\n"
        "    mine = replace(TOY_POSE, name='mine', compute=three)\n"
        f"    build_toy(Path({str(world)!r}), Path(sys.argv[1]), fields=[TOY_POSE, mine], executor='processes', workers=2)\n"
        "    c = open_toy_cache(Path(sys.argv[1]))\n"
        "    assert all((c.read('mine', int(r)) == 3 * c.read('toy_pose', int(r))).all() for r in c.rows())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    command = [sys.executable, str(script), str(tmp_path / "c")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_thread_of_a_worker_has_a_reader_of_its_own(world: Path, tmp_path: Path) -> None:
    """A Dask worker may have several threads, and readers are not asked to be thread-safe."""
    packed = [_packed(world, tmp_path / name) for name in ("a", "b")]
    together = threading.Barrier(3)

    def work(_: int) -> tuple[Any, Any, Any]:
        together.wait(30)
        return opened(packed[0])[1], opened(packed[0])[1], opened(packed[1])[1]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    assert all(first is again and first is not other for first, again, other in found)
    assert len({id(first) for first, _, _ in found}) == 3


def _packed(world: Path, out: Path) -> bytes:
    from imkd_data.cache.write import Options
    from pipelines.build.request import Asked, resolve

    got = resolve(Asked(dataroot=world, version="toy-1", splits=("train",), reader=open_toy, fields=TOY_FIELDS))
    return pack(Common(spec=got.spec, recipe=got.recipe, fields=got.fields, out=out, options=Options()))


@pytest.mark.parametrize("cause", ["killed", "memory"])
def test_a_worker_that_ends_between_two_shards_costs_no_try(
    world: Path, tmp_path: Path, reference: dict[str, bytes], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.build as module
    from pipelines.build import pool

    ended: list[int] = []

    def rss(worker: Any) -> int:
        if cause == "memory" and worker.job is None and not ended:
            ended.append(worker.process.pid)
            return 1 << 50
        return 0

    def jobs_done(*a: Any) -> Any:
        for done in run_all(*a):
            if cause == "killed" and not ended:
                (worker,) = pool._LIVE
                ended.append(worker.process.pid)
                worker.process.kill()
                worker.process.join()
            yield done

    monkeypatch.setattr(pool._Worker, "rss", rss)
    monkeypatch.setattr(module, "run_all", jobs_done)
    result = build_toy(world, tmp_path / "c", executor="processes", workers=1)
    assert len(ended) == 1 and result.deaths == 0 and stored(tmp_path / "c") == reference


@pytest.mark.parametrize(("name", "value"), [("executor", "magic"), ("executor", "tcp://x"), ("on_error", "quarentine")])
def test_a_wrong_word_is_refused_before_anything_is_touched(
    world: Path, tmp_path: Path, reference: dict[str, bytes], name: str, value: str
) -> None:
    build_toy(world, tmp_path / "c")
    with pytest.raises(UsageError, match="address" if "//" in value else name.replace("_", ".")):
        build_toy(world, tmp_path / "c", update=True, **{name: value})
    assert stored(tmp_path / "c") == reference and open_toy_cache(tmp_path / "c").id


def test_a_dead_address(world: Path, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    import pipelines.build.dask_engine as module

    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONNECT_S", 2)
        with pytest.raises(SourceMissingError, match="scheduler") as caught:
            build_toy(world, tmp_path / "d", executor=f"tcp://127.0.0.1:{port}")
    assert time.monotonic() - started < 30 and caught.value.code == 8


@pytest.mark.parametrize("address", ["tcp://x", "tcp://x:y", "tcp://x:99999", "tcp://:8786", "moon://x:8786"])
def test_what_is_no_address(world: Path, tmp_path: Path, address: str) -> None:
    """Refused before a client is made: that of a wrong address waits for 40 s at the end of the program."""
    import distributed

    def made(*_: object, **__: object) -> None:
        raise AssertionError("a client was made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "Client", made)
        with pytest.raises(UsageError, match="not an address") as caught:
            build_toy(world, tmp_path / "d", executor=address)
    assert caught.value.details["found"] == address and caught.value.code == 2


# A real scheduler and two real workers on loopback.


class Cluster:
    def __init__(self, folder: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
        self.env = {**os.environ, "PYTHONPATH": paths, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "2"}
        self.folder = folder
        common = ["--no-dashboard"]
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), *common)
        self.workers = [self.add_worker() for _ in range(2)]

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *arguments]
        log = open(self.folder / f"{arguments[0]}-{time.monotonic_ns()}.log", "wb")  # noqa: SIM115
        return subprocess.Popen(
            command, env={**self.env, **(env or {})}, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )

    def add_worker(self, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        options = ["--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard", "--no-nanny", "--death-timeout", "60"]
        return self.start("worker", self.address, *options, env=env)

    def close(self) -> None:
        for process in [*self.workers, self.scheduler]:
            if process.poll() is None:
                process.kill()
            process.wait(10)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "dask").mkdir()
    one = Cluster(tmp_path / "dask")
    yield one
    one.close()


@pytest.mark.timeout(150)
def test_f32_a_running_cluster_one_worker_killed(
    world: Path, tmp_path: Path, reference: dict[str, bytes], cluster: Cluster
) -> None:
    """SIGKILL of one of two worker processes while it is inside a shard."""
    victim = open_toy(world).samples("toy-004")[2].token
    cluster.workers[1].kill()
    cluster.workers[1].wait(10)
    cluster.workers[1] = cluster.add_worker({"IMKD_FAULT": f"sample@{victim}:kill", "IMKD_FAULT_ONCE": str(tmp_path / "once")})
    # The first worker takes that sample just as well as the second one; either way one of them may die once.
    cluster.workers[0].kill()
    cluster.workers[0].wait(10)
    cluster.workers[0] = cluster.add_worker({"IMKD_FAULT": f"sample@{victim}:kill", "IMKD_FAULT_ONCE": str(tmp_path / "once")})
    result = build_toy(world, tmp_path / "c", executor=cluster.address, stall_minutes=1)
    assert stored(tmp_path / "c") == reference and len(result.rebuilt) == 24
    dead = [w.poll() for w in cluster.workers]
    assert sorted(x is None for x in dead) == [False, True] and -signal.SIGKILL in dead


@pytest.mark.timeout(120)
def test_f35_scheduler_dies(world: Path, tmp_path: Path, cluster: Cluster) -> None:
    import threading

    token = open_toy(world).samples("toy-000")[0].token
    for i, worker in enumerate(cluster.workers):
        worker.kill()
        worker.wait(10)
        cluster.workers[i] = cluster.add_worker({"IMKD_FAULT": f"sample@{token}:sleep"})
    killer = threading.Timer(6, cluster.scheduler.kill)
    killer.start()
    with pytest.raises(NoProgressError) as caught:
        build_toy(world, tmp_path / "c", executor=cluster.address, stall_minutes=0.4)
    killer.join()
    assert caught.value.code == 6
    assert build_toy(world, tmp_path / "c").samples == 30


def test_local_cluster_listens_on_loopback_only(world: Path, tmp_path: Path) -> None:
    """While a build runs, every listening socket of its process group is on 127.0.0.1 (no dashboard)."""
    from toy_build import build_process

    token = open_toy(world).samples("toy-001")[4].token
    process = build_process(world, tmp_path / "c", {"IMKD_FAULT": f"sample@{token}:sleep"}, executor="dask", workers=2)
    try:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and not list((tmp_path / "c").glob("receipts/*/*.json")):
            time.sleep(0.1)
        group = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _session(int(p.name)) == process.pid}
        found = {a for pid in group for a in _listening(pid)}
        assert len(group) >= 3 and found and found <= {"127.0.0.1", "::1"}, found
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _listening(pid: int) -> set[str]:
    sockets = set()
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            link = os.readlink(fd)
            if link.startswith("socket:["):
                sockets.add(link[8:-1])
    except OSError:
        return set()
    out = set()
    for name, length in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            part = line.split()
            if part[3] == "0A" and part[9] in sockets:
                raw = bytes.fromhex(part[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, length, 4))
                out.add(socket.inet_ntop(socket.AF_INET if length == 4 else socket.AF_INET6, words))
    return out


def test_engine_says_what_it_needs(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        list(run_all(Engine(executor="?", workers=1), None, []))  # type: ignore[arg-type]
    result = build(
        dataroot=world,
        version="toy-1",
        splits=["val"],
        out=tmp_path / "c",
        fields=TOY_FIELDS,
        reader=open_toy,
        executor="sync",
        fsync=False,
    )
    assert result.samples == 15 and open_toy_cache(tmp_path / "c").recipe.splits == ("val",)
