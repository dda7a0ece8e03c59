"""When each sensor fires in a scene. Every sensor has its own clock; key frames are those nearest to the LiDAR's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imkd_data.world import rig as rigs
from imkd_data.world.options import KEYFRAME_S, WorldOptions, random_stream
from imkd_data.world.scene import Scene

_DROP_SHARE = 0.01  # sweeps that the recorder lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One firing: time stamp, keyframe it belongs to (sweeps: the next one), whether it is the key frame itself."""

    timestamp_us: int
    sample: int
    key: bool


def make_schedule(scene: Scene, options: WorldOptions) -> dict[str, list[Shot]]:
    """Channel -> firings in time order. The first LiDAR firing is the first key frame; chains end with the last one."""
    rng = random_stream(options.seed, scene.index, "schedule")
    keys = [scene.timestamp_us(k * KEYFRAME_S) + int(rng.integers(-1500, 1500)) for k in range(options.keyframes)]
    out = {rigs.LIDAR: _lidar(keys, rng)}
    for channel in rigs.RADARS:
        out[channel] = _radar(keys, rng)
    for channel in rigs.CAMERAS:
        out[channel] = _camera(keys, rigs.CAMERA_DELAY_US[channel], rng, options.camera_sweeps)
    return out


def _between(keys: list[int], period_us: int, rng: np.random.Generator) -> list[Shot]:
    """Key frames at given stamps and sweeps between them about every ``period_us``."""
    shots = [Shot(timestamp_us=keys[0], sample=0, key=True)]
    for k in range(1, len(keys)):
        count = round((keys[k] - keys[k - 1]) / period_us)
        for j in range(1, count):
            stamp = keys[k - 1] + (keys[k] - keys[k - 1]) * j // count + int(rng.integers(-250, 250))
            if rng.random() >= _DROP_SHARE:
                shots.append(Shot(timestamp_us=stamp, sample=k, key=False))
        shots.append(Shot(timestamp_us=keys[k], sample=k, key=True))
    return shots


def _lidar(keys: list[int], rng: np.random.Generator) -> list[Shot]:
    return _between(keys, rigs.LIDAR_PERIOD_US, rng)


def _camera(keys: list[int], delay_us: int, rng: np.random.Generator, sweeps: bool) -> list[Shot]:
    stamps = [k + delay_us + int(rng.integers(-800, 800)) for k in keys]
    if sweeps:
        return _between(stamps, rigs.CAMERA_PERIOD_US, rng)
    return [Shot(timestamp_us=s, sample=k, key=True) for k, s in enumerate(stamps)]


def _radar(keys: list[int], rng: np.random.Generator) -> list[Shot]:
    start = keys[0] - 200_000 + int(rng.integers(0, rigs.RADAR_PERIOD_US))
    count = (keys[-1] - start) // rigs.RADAR_PERIOD_US + 2
    stamps = start + np.arange(count) * rigs.RADAR_PERIOD_US + rng.integers(-2500, 2500, count)
    nearest = [int(np.abs(stamps - key).argmin()) for key in keys]
    lost = rng.random(count) < _DROP_SHARE
    shots = []
    for at in range(nearest[0], nearest[-1] + 1):
        sample = int(np.searchsorted(nearest, at))
        if nearest[sample] == at or not lost[at]:
            shots.append(Shot(timestamp_us=int(stamps[at]), sample=sample, key=nearest[sample] == at))
    return shots
