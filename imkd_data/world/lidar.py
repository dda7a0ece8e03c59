"""LIDAR_TOP: 32 beams, one turn in 50 ms, every column cast at its own time and pose, expressed at the sweep's time stamp."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import F64
from imkd_data.kernels import raycast, reflect
from imkd_data.world import rig as rigs
from imkd_data.world.road import CELL_M
from imkd_data.world.scene import Scene, pack
from imkd_data.world.shapes import Part

REACH_M = 105.0
NOISE_M = 0.008
POWER_FLOOR = 2.8e-4

# Reflectivity, its patchiness, and how it changes with the cosine of incidence; by ground material (see world.road).
_GROUND_CLASS = np.array(
    [[22.0, 6.0, 0.9], [13.0, 3.5, 1.5], [52.0, 10.0, 0.8], [17.0, 4.0, 1.0], [19.0, 5.0, 1.0], [26.0, 5.0, 0.8]]
)
# The own car under the sensor, ego frame: roof with its rack, and the bonnet's edge.
_OWN_CAR = (
    Part(shape=raycast.BOX, centre_m=(0.66, 0.0, 1.48), half_m=(0.74, 0.565, 0.03), colour=(0.0, 0.0, 0.0), reflectivity=8.0),
    Part(shape=raycast.BOX, centre_m=(2.38, 0.0, 1.05), half_m=(0.05, 0.6, 0.03), colour=(0.0, 0.0, 0.0), reflectivity=8.0),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """One turn: points (N, 5) f32 as the file holds them; object (N,) number of the actor, or GROUND, STATIC, ..."""

    points: NDArray[np.float32]
    objects: NDArray[np.int64]


class LidarModel:
    """The sensor of one scene; holds what stays the same from turn to turn."""

    def __init__(self, scene: Scene, rig: rigs.Rig) -> None:
        self.scene = scene
        self.mount = rig.poses[rigs.LIDAR]
        self.own = pack(list(_OWN_CAR), np.full(len(_OWN_CAR), raycast.OWN_CAR))
        self.columns = {count: self._columns(count) for count in rigs.LIDAR_COLUMNS}

    def _columns(self, count: int) -> tuple[F64, F64]:
        """Azimuths (C,) of a turn of so many columns, and distances (C, K) to the own car (inf: not on it)."""
        azimuth = np.radians(rigs.LIDAR_START_DEG - 360.0 * np.arange(count) / count)
        origin = np.repeat(self.mount.translation_m[None], count, axis=0)
        rotation = np.repeat(self.mount.rotation[None], count, axis=0)
        distance, which, _, _ = raycast.cast_columns(
            self.own.prims, self.own.kinds, *self.own.tree(0.0), origin, rotation, azimuth,
            rigs.LIDAR_ELEVATION_RAD, np.zeros(count), np.full((count, rigs.LIDAR_RINGS), np.inf), 20.0, 0,
        )  # fmt: skip
        return azimuth, np.where(which >= 0, distance, np.inf)

    def sensor_poses(self, t_s: F64) -> tuple[F64, F64]:
        """Times (N,) -> global_from_lidar rotations (N, 3, 3) and origins (N, 3)."""
        rotation, translation = self.scene.ego.poses(t_s)
        return rotation @ self.mount.rotation, rotation @ self.mount.translation_m + translation

    def turn(self, t_s: float) -> Turn:
        """The turn that ends at ``t_s``."""
        stamp = round(t_s * 1e6)
        count = rigs.LIDAR_COLUMNS[stamp % len(rigs.LIDAR_COLUMNS)]  # the head does not turn quite evenly
        azimuth, own_m = self.columns[count]
        seconds = rigs.LIDAR_PERIOD_US / 1e6
        times = t_s - seconds * (1.0 - (np.arange(count) + 0.5) / count)
        rotations, origins = self.sensor_poses(np.append(times, t_s))
        middle = t_s - seconds / 2
        things = self.scene.primitives(middle, origins[0, :2], REACH_M)
        nodes, links, order = things.tree(seconds / 2)
        seed = (self.scene.seed * 1_000_003 + self.scene.index * 7919 + stamp) & 0x7FFFFFFF
        distance, which, cosine, direction = raycast.cast_columns(
            things.prims, things.kinds, nodes, links, order, origins[:-1], rotations[:-1], azimuth,
            rigs.LIDAR_ELEVATION_RAD, times - middle, own_m, REACH_M, seed,
        )  # fmt: skip
        rain = 1.0 if "rain" in self.scene.weather else 0.0
        points, which = reflect.lidar_points(
            distance, which, cosine, direction, origins[:-1], rotations[-1], origins[-1], things.prims,
            self.scene.ground.cells, CELL_M, _GROUND_CLASS, NOISE_M, POWER_FLOOR, rain, seed,
        )  # fmt: skip
        flat = which.ravel()
        objects = np.where(flat >= 0, things.kinds[np.maximum(flat, 0), 1], flat)
        return Turn(points=points.reshape(-1, 5), objects=objects)
