"""A cache under random builds, kills, damage, repair and reads: a read returns what was computed, or raises."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy import TOY_FIELDS, open_toy, write_toy
from toy_build import GRID, build_toy, open_toy_cache

from imkd_data.cache import fault
from imkd_data.cache.verify import verify
from imkd_data.errors import ImkdError
from imkd_data.recipe import Recipe
from pipelines.build.repair import clean_temp, repair

_WORLD: list[Path] = []
KILL_POINTS = [p for p in fault.POINTS if p.split(".")[0] in ("data", "receipt", "index", "manifest", "remove", "shard")]


def world() -> Path:
    if not _WORLD:
        _WORLD.append(write_toy(Path(tempfile.mkdtemp(prefix="imkd-machine-")), scenes=2, keyframes=3))
    return _WORLD[0]


class Machine(RuleBasedStateMachine):
    """Model: token -> expected rows, computed straight from the reader with the recipe that was built last."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="imkd-machine-"))
        self.out = self.folder / "c"
        self.nx = 32
        self.damaged = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def overrides(self) -> dict[str, Any]:
        return {"grid.nx": self.nx}

    @initialize()
    def begin(self) -> None:
        build_toy(world(), self.out, overrides=self.overrides())

    @rule()
    def build(self) -> None:
        """Goes on, or says what is wrong; never makes a damaged file pass for a good one."""
        with contextlib.suppress(ImkdError):
            build_toy(world(), self.out, overrides=self.overrides(), update=True)

    @rule(point=st.sampled_from(KILL_POINTS), nth=st.integers(1, 3), grow=st.booleans())
    def build_killed(self, point: str, nth: int, grow: bool) -> None:
        """A build that changes the grid, killed anywhere."""
        if grow:
            self.nx = 16 if self.nx == 32 else 32
        pid = os.fork()
        if pid == 0:
            os.environ["IMKD_FAULT"] = f"{point}:kill:{nth}"
            fault._COUNTS.clear()
            try:
                build_toy(world(), self.out, overrides=self.overrides(), update=True)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    def files(self) -> list[Path]:
        return sorted(p for p in self.out.rglob("*") if p.is_file() and "logs" not in p.parts and p.stat().st_size)

    @rule(seed=st.integers(0, 10**6))
    def flip_a_bit(self, seed: int) -> None:
        rng = random.Random(seed)
        if files := self.files():
            path = rng.choice(files)
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            self.damaged = True

    @rule(seed=st.integers(0, 10**6), how=st.sampled_from(["delete", "truncate", "swap", "duplicate"]))
    def damage(self, seed: int, how: str) -> None:
        rng = random.Random(seed)
        if len(files := self.files()) > 1:
            a, b = rng.sample(files, 2)
            if how == "delete":
                a.unlink()
            elif how == "truncate":
                os.truncate(a, rng.randrange(a.stat().st_size))
            elif how == "swap":
                one, two = a.read_bytes(), b.read_bytes()
                a.write_bytes(two), b.write_bytes(one)
            else:
                b.write_bytes(a.read_bytes())
            self.damaged = True

    @rule()
    def clean(self) -> None:
        if self.out.is_dir():
            clean_temp(self.out)

    @rule()
    def check(self) -> None:
        """If full verification finds nothing, everything reads."""
        try:
            problems = [p for p in verify(self.out, level="full") if p.severity == "error"]
        except ImkdError:
            return
        if not problems:
            assert self.read_all() == 6 * len(TOY_FIELDS)

    @rule()
    def repair_it(self) -> None:
        """Repaired means whole: verified clean, all rows readable and right."""
        try:
            repair(self.out, dataroot=world(), reader=open_toy, fields=TOY_FIELDS, fsync=False)
        except ImkdError:
            return  # both copies of the recipe are gone, or there is no cache: said, not guessed
        assert [p for p in verify(self.out, level="full") if p.severity == "error"] == []
        assert self.read_all() == 6 * len(TOY_FIELDS)
        self.damaged = False

    @precondition(lambda self: not self.damaged)
    @rule()
    def undamaged_builds_end_well(self) -> None:
        build_toy(world(), self.out, overrides=self.overrides(), update=True)
        assert self.read_all() == 6 * len(TOY_FIELDS)

    def read_all(self) -> int:
        """Rows that could be read, each compared with the model."""
        try:
            cache = open_toy_cache(self.out)
        except ImkdError:
            return 0
        recipe, reader, good = cache.recipe, open_toy(world()), 0
        assert isinstance(recipe, Recipe) and recipe.grid.ny == GRID["grid.ny"]
        for split in ("train", "val"):
            for scene in reader.scene_names(split):
                for sample in reader.samples(scene):
                    payload = reader.read(sample, frozenset(("lidar", "images")))
                    up: dict[str, Any] = {}
                    for field in TOY_FIELDS:
                        up[field.name] = expected = field.compute(payload, recipe, cache.suite, up, {})
                        try:
                            row = cache.row(sample.token)
                            got = cache.read_parts(field.name, row) if field.kind == "blob" else cache.read(field.name, row)
                        except ImkdError as error:
                            assert error.code in (2, 4, 5, 9), error
                            continue
                        if field.kind == "blob":
                            assert got == expected
                        else:
                            np.testing.assert_array_equal(got, expected)
                        good += 1
        cache.close()
        return good

    @invariant()
    def never_a_wrong_row(self) -> None:
        if self.out.is_dir():
            self.read_all()


LONG = bool(os.environ.get("IMKD_LONG"))
TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=200 if LONG else 12,
    stateful_step_count=30 if LONG else 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not LONG,
)
