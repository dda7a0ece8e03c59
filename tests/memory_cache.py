"""A cache without files: the real fields computed from the toy data set, behind the Cache interface that loaders use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from toy import SUITE, open_toy, write_toy

from imkd_data.fields.boxes import BOX_FIELDS
from imkd_data.fields.calibration import CALIBRATION_FIELDS
from imkd_data.fields.depth import DEPTH_FIELDS
from imkd_data.fields.images import IMAGE_FIELDS
from imkd_data.fields.lidar import LIDAR_FIELDS
from imkd_data.fields.radar import RADAR_FIELDS
from imkd_data.geometry import BevGrid
from imkd_data.recipe import Recipe

ALL = {f.name: f for g in (BOX_FIELDS, CALIBRATION_FIELDS, DEPTH_FIELDS, IMAGE_FIELDS, LIDAR_FIELDS, RADAR_FIELDS) for f in g}
GRID = BevGrid(x_min_m=-9.6, y_min_m=-6.4, cell_m=0.2, nx=96, ny=64)  # neither square nor symmetric in its counts


def _denser_scans(root: Path) -> None:
    """Clusters of returns, so that cells hold several; ahead of the car, so that cameras see some."""
    rng = np.random.default_rng(5)
    for path in sorted((root / "SPINNER").iterdir()):
        centres = rng.uniform((-7, -4, -2), (9, 4, 1), (60, 3))
        xyz = np.repeat(centres, 8, axis=0) + rng.normal(0, 0.15, (480, 3))
        scan = np.c_[xyz, rng.integers(0, 256, 480), rng.integers(0, 8, 480)]
        np.save(path, scan.astype(np.float32))


def _written_once(root: Path, scenes: int, keyframes: int) -> None:
    """The toy world at ``root``, whole or not at all: several ranks open the same folder at once."""
    if (root / "toy.json").is_file():
        table = json.loads((root / "toy.json").read_text())["scenes"]
        assert [len(s["keys"]) for s in table.values()] == [keyframes] * scenes, f"another toy world lies in {root}"
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root.parent) as scratch:
        made = Path(scratch) / "world"
        write_toy(made, scenes=scenes, keyframes=keyframes)
        _denser_scans(made)
        try:
            made.rename(root)
        except OSError:  # a folder is there: another rank's world, or an empty one of a test's own
            if not (root / "toy.json").is_file():
                shutil.copytree(made, root, dirs_exist_ok=True)


class MemoryCache:
    """Every field of ``names`` for all scenes of a toy world; rows are numbered with a gap after every scene."""

    def __init__(
        self, root: Path, *, without: tuple[str, ...] = (), scenes: int = 4, keyframes: int = 5, **recipe: Any
    ) -> None:
        _written_once(root, scenes, keyframes)
        self.path, self.suite, self.id = root, SUITE, "memory"
        self.reader = open_toy(root)
        self.fields = {n: f for n, f in ALL.items() if n not in without and n != "lidar_provenance"}
        self.recipe = Recipe(
            dataset="toy",
            version="toy-1",
            splits=("train", "val"),
            sensors=SUITE.channels,
            reference_channel="SPINNER",
            fields=tuple(self.fields),
            **{"grid": GRID, "view_cells": 4, "depth_width": 512, "boxes_width": 8, "image_hw_px": (48, 80), **recipe},
        )
        self.samples, lines = {}, []
        shard = 0
        for split in ("train", "val"):
            for scene in self.reader.scene_names(split):
                samples = self.reader.samples(scene)
                first = shard * (keyframes + 2)
                for k, sample in enumerate(samples):
                    self.samples[first + k] = sample
                    lines.append(
                        {
                            "row": first + k,
                            "shard": shard,
                            "token": sample.token,
                            "scene": scene,
                            "split": split,
                            "timestamp_us": sample.timestamp_us,
                            "previous_row": first + k - 1 if k else -1,
                            "global_from_ego": sample.global_from_ego.matrix34().tolist(),
                            "status": "ok",
                        }
                    )
                shard += 1
        self.index = pa.Table.from_pylist(lines)
        self._payloads: dict[int, Any] = {}

    def content_id(self, fields: Iterable[str]) -> str:
        return f"{self.id}:{','.join(sorted(fields))}"

    @property
    def row_index(self) -> pa.Table:
        return self.index

    def token(self, row: int) -> str:
        return self.samples[row].token

    def read(self, name: str, row: int) -> Any:
        one = self.fields.get(name) or ALL[name]
        if row not in self._payloads:
            self._payloads[row] = self.reader.read(self.samples[row], frozenset(("images", "lidar", "radar")))
        upstream = {n: self.read(n, row) for n in one.upstream}
        stored = one.compute(self._payloads[row], self.recipe, self.suite, upstream, {})
        return one.unpack(stored, self.suite) if one.unpack else stored

    def decode(self, name: str, row: int) -> Any:
        one = self.fields[name]
        value = one.decode(self.read(name, row), self.recipe, self.suite)
        if name == "depth_points":
            return [v[: int(n)] for v, n in zip(value, self.read("depth_count", row), strict=True)]
        return value


def rows_of(cache: MemoryCache, split: str) -> np.ndarray:
    return np.array([r for r, s in cache.samples.items() if s.split == split])
