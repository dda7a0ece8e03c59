"""A second, tiny data set: other sensor names, other radar columns, other rates. Written to disk by ``write_toy``.

Layout: ROOT/toy.json = {"scenes": {name: {"split", "keys": [{"token", "t", "xy", "yaw", "boxes"}]}}} and, for every
instant, ``<sensor>/<t>.npy`` or ``.jpg``. The car moves and turns, so a wrong frame shows.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image

from imkd_data.errors import InputDataError, SourceMissingError, UsageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.geometry import Camera, Pose, ego_at, rotation_from_yaw, sensor_at
from imkd_data.recipe import Recipe
from imkd_data.sample import Boxes, ImageFrame, Payload, Points, Sample, SensorSuite, Sweep

SUITE = SensorSuite(
    cameras=("EYE_LEFT", "EYE_RIGHT"),
    lidar="SPINNER",
    radars=("WAVE",),
    radar_columns=("x", "y", "z", "vx_comp", "vy_comp", "rcs", "snr"),
    reflectance_max=255.0,
    image_hw_px=(48, 80),
    max_radar_sweeps=3,
    max_radar_points=20,
    licence="toy: free",
)
PERIOD_US = 250_000  # keyframes at 4 Hz, sweeps at 8 Hz
CATEGORIES = ("car", "pedestrian")


def write_toy(root: Path, *, scenes: int = 4, keyframes: int = 5, seed: int = 0, val_every: int = 2) -> Path:
    """Write a world; every ``val_every``-th scene is val."""
    rng = np.random.default_rng(seed)
    table: dict[str, Any] = {}
    for name in SUITE.channels:
        (root / name).mkdir(parents=True, exist_ok=True)
    for s in range(scenes):
        keys = []
        for k in range(keyframes):
            t = 1_000_000_000 + s * 100_000_000 + k * PERIOD_US
            box = [6.0 + k, 1.5 - s, 0.8, 4.0, 1.8, 1.5, 0.3, 2.0, 0.1, int(k % 2), 7]
            token = hashlib.md5(f"{seed}.{s}.{k}".encode()).hexdigest()
            keys.append(
                {"token": token, "t": t, "xy": [100.0 * s + 3.0 * k, 0.5 * k], "yaw": 0.05 * k, "boxes": [box][: (k + s) % 3]}
            )
            for half in (0, 1):
                scan = np.c_[rng.uniform(-9, 9, (40, 3)), rng.integers(0, 256, 40), rng.integers(0, 8, 40)]
                np.save(root / "SPINNER" / f"{t - half * PERIOD_US // 2}.npy", scan.astype(np.float32))
                np.save(
                    root / "WAVE" / f"{t - half * PERIOD_US // 2}.npy", rng.normal(0, 5, ((k * 3) % 7, 7)).astype(np.float32)
                )
            for camera in SUITE.cameras:
                pixels = rng.integers(0, 255, (6, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                Image.fromarray(pixels).save(root / camera / f"{t}.jpg", quality=92)
        table[f"toy-{s:03d}"] = {"split": "val" if s % val_every == val_every - 1 else "train", "keys": keys}
    (root / "toy.json").write_text(json.dumps({"version": "toy-1", "scenes": table}))
    return root


class ToyReader:
    """Reader protocol over ``write_toy``'s files."""

    suite = SUITE

    def __init__(self, root: Path, sensors: tuple[str, ...], sweeps: int) -> None:
        self.root, self.sensors, self.sweeps = root, sensors, sweeps
        self.table = json.loads((root / "toy.json").read_text())["scenes"]

    def scene_names(self, split: str) -> tuple[str, ...]:
        if split not in ("train", "val"):
            raise UsageError("unknown split", expected="train, val", found=split)
        return tuple(sorted(n for n, s in self.table.items() if s["split"] == split))

    def _global_from_ego(self, key: dict[str, Any], t: int, dst: str) -> Pose:
        age = (t - key["t"]) / PERIOD_US
        xyz = np.array([key["xy"][0] + 3.0 * age, key["xy"][1] + 0.5 * age, 0.0])
        return Pose(dst="global", src=dst, rotation=rotation_from_yaw(key["yaw"] + 0.05 * age), translation_m=xyz)

    def _sweeps(self, key: dict[str, Any], channel: str, ego_from_global: Pose) -> tuple[Sweep, ...]:
        out = []
        mount = Pose(dst="vehicle", src=channel, rotation=rotation_from_yaw(0.1), translation_m=np.array([1.0, 0.2, 1.5]))
        for half in range(min(2, self.sweeps)):
            t = key["t"] - half * PERIOD_US // 2
            at = mount.renamed(dst=ego_at(t), src=sensor_at(channel, t))
            pose = ego_from_global @ self._global_from_ego(key, t, ego_at(t)) @ at
            still = mount.renamed(src=sensor_at(channel, t))
            sweep = Sweep(
                channel=channel,
                path=f"{channel}/{t}.npy",
                timestamp_us=t,
                ego_from_sensor=pose,
                vehicle_from_sensor=still,
                is_key=half == 0,
            )
            out.append(sweep)
        return tuple(out)

    def _image(self, key: dict[str, Any], index: int, name: str) -> ImageFrame:
        look = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
        still = Pose(dst="vehicle", src=name, rotation=look, translation_m=np.array([0.5, 0.3 - 0.6 * index, 1.2]))
        pose = still.renamed(dst="ego", src=sensor_at(name, key["t"]))
        k = np.array([[60.0, 0, 40], [0, 60, 24], [0, 0, 1]])
        camera = Camera(name=name, image_from_camera=k, ego_from_camera=pose, width_px=80, height_px=48, timestamp_us=key["t"])
        return ImageFrame(camera=camera, path=f"{name}/{key['t']}.jpg", vehicle_from_camera=still)

    def samples(self, scene: str) -> tuple[Sample, ...]:
        keys = self.table[scene]["keys"]
        out = []
        for i, key in enumerate(keys):
            global_from_ego = self._global_from_ego(key, key["t"], "ego")
            inverse = global_from_ego.inverse()
            reference = Pose.from_matrix34("ego", "SPINNER", np.r_[1, 0, 0, 1.0, 0, 1, 0, 0.2, 0, 0, 1, 1.5])
            out.append(
                Sample(
                    dataset="toy",
                    token=key["token"],
                    scene=scene,
                    scene_token=hashlib.md5(scene.encode()).hexdigest(),
                    split=self.table[scene]["split"],
                    timestamp_us=key["t"],
                    global_from_ego=global_from_ego,
                    ego_from_reference=reference,
                    cameras=tuple(self._image(key, j, n) for j, n in enumerate(SUITE.cameras) if n in self.sensors),
                    lidar=self._sweeps(key, "SPINNER", inverse) if "SPINNER" in self.sensors else (),
                    radar={n: self._sweeps(key, n, inverse) for n in SUITE.radars if n in self.sensors},
                    boxes=_boxes(key["boxes"]),
                    location="toytown",
                    description="rain at night" if i % 2 else "sun",
                    previous=keys[i - 1]["token"] if i else "",
                    next=keys[i + 1]["token"] if i + 1 < len(keys) else "",
                )
            )
        return tuple(out)

    def _paths(self, sample: Sample, needs: frozenset[str]) -> dict[str, list[Any]]:
        return {
            "images": list(sample.cameras) if "images" in needs else [],
            "lidar": list(sample.lidar) if {"lidar", "lidar_key"} & needs else [],
            "radar": [s for sweeps in sample.radar.values() for s in sweeps] if "radar" in needs else [],
        }

    def _file(self, path: str, sample: Sample) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError as error:
            where = {"file": path, "token": sample.token, "scene": sample.scene, "channel": path.split("/")[0]}
            raise SourceMissingError("file is missing", rule="source.missing", **where) from error

    def read(self, sample: Sample, needs: frozenset[str]) -> Payload:
        files, images, clouds = [], {}, {}
        for kind, frames in self._paths(sample, needs).items():
            for frame in frames:
                data = self._file(frame.path, sample)
                files.append((frame.path, len(data), google_crc32c.value(data)))
                if kind == "images":
                    images[frame.camera.name] = data
                    continue
                try:
                    table = np.load(io.BytesIO(data), allow_pickle=False)
                except (ValueError, EOFError, OSError) as error:
                    raise InputDataError("scan cannot be read", rule="toy.scan", file=frame.path, token=sample.token) from error
                names = ("intensity", "ring") if kind == "lidar" else SUITE.radar_columns
                clouds.setdefault((kind, frame.channel), []).append(
                    Points(
                        frame=frame.ego_from_sensor.src,
                        xyz_m=table[:, :3],
                        time_s=np.full(len(table), (frame.timestamp_us - sample.timestamp_us) / 1e6, np.float32),
                        features=table[:, 3:] if kind == "lidar" else table,
                        feature_names=names,
                    )
                )
        radar = {n: tuple(clouds.get(("radar", n), ())) for n in sample.radar}
        return Payload(
            sample=sample,
            images=images if "images" in needs else None,
            lidar=tuple(clouds.get(("lidar", "SPINNER"), ())) if {"lidar", "lidar_key"} & needs else None,
            radar=radar if "radar" in needs else None,
            files=tuple(files),
        )

    def input_manifest(self, sample: Sample, needs: frozenset[str]) -> list[list[Any]]:
        key = next(k for k in self.table[sample.scene]["keys"] if k["token"] == sample.token)
        out: list[list[Any]] = [["row", hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()]]
        for frames in self._paths(sample, needs).values():
            for frame in frames:
                out.append([frame.path, len(self._file(frame.path, sample))])
        return out


def open_toy(
    dataroot: Path,
    version: str = "toy-1",
    *,
    sensors: tuple[str, ...] | None = None,
    lidar_sweeps: int = 2,
    radar_sweeps: int = 2,
    reference_channel: str | None = None,
) -> ToyReader:
    """The reader, by the signature of every ``READERS`` entry."""
    if not (Path(dataroot) / "toy.json").is_file():
        raise SourceMissingError("not a toy folder", found=str(dataroot))
    return ToyReader(Path(dataroot), sensors or SUITE.channels, max(lidar_sweeps, radar_sweeps))


def _boxes(rows: list[list[float]]) -> Boxes:
    b = np.array(rows, dtype=np.float64).reshape(-1, 11)
    n = len(b)
    return Boxes(
        frame="ego",
        centre_m=b[:, :3],
        size_lwh_m=b[:, 3:6],
        yaw_rad=b[:, 6],
        velocity_mps=b[:, 7:9],
        label=np.where(b[:, 9] > 0, 8, 0).astype(np.int64),
        score=np.ones(n),
        num_lidar=b[:, 10].astype(np.int64),
        num_radar=np.zeros(n, np.int64),
        attribute=np.full(n, -1),
        visibility=np.full(n, 4),
        token=tuple(f"a{i}" for i in range(n)),
        instance=tuple(f"i{i}" for i in range(n)),
    )


# A few small fields, so that the cache is tested without the real ones.


def _count(p: Payload, recipe: Recipe, suite: SensorSuite, up: Mapping[str, Stored], drops: dict[str, int]) -> Stored:
    out = np.zeros(recipe.grid.shape, np.uint16)
    for sweep, points in zip(p.sample.lidar, p.lidar or (), strict=True):
        xyz = sweep.ego_from_sensor.points(points.xyz_m)
        row, column, inside = recipe.grid.cells(xyz[:, :2])
        drops["outside"] = drops.get("outside", 0) + int((~inside).sum())
        np.add.at(out, (row[inside], column[inside]), 1)
    return out


def _view(p: Payload, recipe: Recipe, suite: SensorSuite, up: Mapping[str, Stored], drops: dict[str, int]) -> Stored:
    fine = up["toy_count"]
    assert isinstance(fine, np.ndarray)
    ny, nx = recipe.view_grid.shape
    k = recipe.view_cells
    return fine.reshape(ny, k, nx, k).sum((1, 3)).astype(np.float32)


def _pose(p: Payload, recipe: Recipe, suite: SensorSuite, up: Mapping[str, Stored], drops: dict[str, int]) -> Stored:
    return p.sample.global_from_ego.matrix34()


def _pictures(p: Payload, recipe: Recipe, suite: SensorSuite, up: Mapping[str, Stored], drops: dict[str, int]) -> Stored:
    return {f"{name.lower()}.jpg": data for name, data in (p.images or {}).items()}


def _plane(recipe: Recipe, suite: SensorSuite) -> tuple[int, ...]:
    return recipe.grid.shape


def _coarse(recipe: Recipe, suite: SensorSuite) -> tuple[int, ...]:
    return recipe.view_grid.shape


def _twelve(recipe: Recipe, suite: SensorSuite) -> tuple[int, ...]:
    return (12,)


def _units(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
    return {"frame": "ego", "units": "count"}


TOY_COUNT = CacheField(
    name="toy_count",
    version=1,
    kind="array",
    space="bev",
    uses=("grid", "lidar_sweeps", "sensors"),
    needs=("lidar",),
    sensors=("lidar",),
    dtype=np.dtype("u2"),
    shape=_plane,
    compute=_count,
    attributes=_units,
)
TOY_VIEW = CacheField(
    name="toy_view",
    version=1,
    kind="array",
    space="bev",
    uses=("view_cells",),
    upstream=("toy_count",),
    dtype=np.dtype("f4"),
    shape=_coarse,
    codec="blosc3",
    compute=_view,
)
TOY_POSE = CacheField(
    name="toy_pose",
    version=1,
    kind="array",
    space="none",
    uses=(),
    dtype=np.dtype("f8"),
    shape=_twelve,
    codec="none",
    compute=_pose,
)
TOY_PICTURES = CacheField(
    name="toy_pictures",
    version=1,
    kind="blob",
    space="image",
    uses=("image_hw_px",),
    needs=("images",),
    sensors=("camera",),
    codec="none",
    compute=_pictures,
)
TOY_FIELDS = (TOY_COUNT, TOY_VIEW, TOY_POSE, TOY_PICTURES)
