"""One synthetic scene: road, ego, actors, scenery, weather; and its primitives at any instant."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import F64
from imkd_data.kernels import raycast
from imkd_data.world import motion
from imkd_data.world.options import KEYFRAME_S, WorldOptions, random_stream
from imkd_data.world.road import CONCRETE, GRASS, Ground, Road, make_ground, make_road
from imkd_data.world.scenery import make_scenery
from imkd_data.world.shapes import Part
from imkd_data.world.traffic import Actor, make_actors

START_US = 1_700_000_000_000_000  # scene i begins at this time plus 10 i minutes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Primitives:
    """Arrays for the ray caster and the renderer at one instant (see ``kernels.raycast``)."""

    prims: F64
    kinds: NDArray[np.int64]
    colours: NDArray[np.float32]

    def tree(self, reach_s: float) -> raycast.Tree:
        """Bounding hierarchy, valid within ``reach_s`` of the instant."""
        nodes, links, order = raycast.build_tree(self.prims, reach_s)
        return nodes, links, order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """Everything that decides the content of a scene. Times are seconds from the first key time."""

    index: int
    seed: int
    duration_s: float
    weather: str
    road: Road
    ground: Ground
    ego: motion.EgoTrack
    actors: tuple[Actor, ...]
    tracks: motion.Tracks
    sun_direction: F64
    local: F64  # (N, 4) part centre x, y, z in the actor's frame, yaw
    owner: NDArray[np.int64]  # (N,) actor of each part
    actor_parts: Primitives  # in the actors' own frames
    statics: Primitives

    def timestamp_us(self, t_s: float) -> int:
        """Absolute time stamp."""
        return START_US + self.index * 600_000_000 + round(t_s * 1e6)

    def seconds(self, timestamp_us: int) -> float:
        """Scene time of a time stamp."""
        return (timestamp_us - START_US - self.index * 600_000_000) / 1e6

    def primitives(self, t_s: float, centre_xy_m: F64, reach_m: float) -> Primitives:
        """Primitives near a place at an instant, global frame, with velocities."""
        state, rate = self.tracks.at(t_s)
        gap = np.hypot(*(state[:, :2] - centre_xy_m).T)
        near = (gap < reach_m)[self.owner]
        owner, local = self.owner[near], self.local[near]
        prims = self.actor_parts.prims[near].copy()
        x, y, yaw = state[owner].T
        c, s = np.cos(yaw), np.sin(yaw)
        prims[:, 0] = x + c * local[:, 0] - s * local[:, 1]
        prims[:, 1] = y + s * local[:, 0] + c * local[:, 1]
        turned = yaw + local[:, 3]
        prims[:, 6], prims[:, 7] = np.cos(turned), np.sin(turned)
        prims[:, 8] = rate[owner, 0] - rate[owner, 2] * (prims[:, 1] - y)
        prims[:, 9] = rate[owner, 1] + rate[owner, 2] * (prims[:, 0] - x)
        fixed = self.statics.prims
        close = np.hypot(fixed[:, 0] - centre_xy_m[0], fixed[:, 1] - centre_xy_m[1]) - fixed[:, 13] < reach_m
        return Primitives(
            prims=np.concatenate([prims, fixed[close]]),
            kinds=np.concatenate([self.actor_parts.kinds[near], self.statics.kinds[close]]),
            colours=np.concatenate([self.actor_parts.colours[near], self.statics.colours[close]]),
        )


def pack(parts: list[Part], objects: NDArray[np.int64]) -> Primitives:
    """Parts -> arrays, positions as they are."""
    prims = np.zeros((len(parts), raycast.PRIM_COLUMNS))
    kinds = np.zeros((len(parts), 3), np.int64)
    colours = np.zeros((len(parts), 3), np.float32)
    for k, part in enumerate(parts):
        prims[k, 0:3], prims[k, 3:6] = part.centre_m, part.half_m
        prims[k, 6], prims[k, 7] = np.cos(part.yaw_rad), np.sin(part.yaw_rad)
        prims[k, 10:13] = part.density, part.reflectivity, part.retro
        round_part = part.shape == raycast.CYLINDER
        prims[k, 13] = part.half_m[0] if round_part else np.hypot(part.half_m[0], part.half_m[1])
        kinds[k] = part.shape, objects[k], part.texture
        colours[k] = part.colour
    return Primitives(prims=prims, kinds=kinds, colours=colours)


def _sun(rng: np.random.Generator) -> F64:
    azimuth, height = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(30, 65))
    return np.array([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)])


def make_scene(options: WorldOptions, index: int) -> Scene:
    """Scene ``index`` of a world: a pure function of the seed, the index and the options (not of the number of scenes)."""
    duration = (options.keyframes - 1) * KEYFRAME_S
    grid = motion.time_grid(duration)
    rng = random_stream(options.seed, index, "ego")
    kind = ("cruise", "stop", "cruise", "start")[int(rng.integers(4))]
    speed = motion.make_speed(rng, grid, kind, float(rng.uniform(5.0, 13.0)))
    ego_s = motion.distance_from_speed(grid, speed)
    road = make_road(random_stream(options.seed, index, "road"), float(ego_s[-1]))
    actors = make_actors(road, random_stream(options.seed, index, "traffic"), grid, ego_s, options.materials)
    parts = [part for actor in actors for part in actor.parts]
    owner = np.repeat(np.arange(len(actors)), [len(a.parts) for a in actors])
    statics = make_scenery(road, random_stream(options.seed, index, "scenery"), float(ego_s[-1]))
    look = random_stream(options.seed, index, "look")
    tracks = np.stack([np.column_stack([a.track[:, :2], np.unwrap(a.track[:, 2])]) for a in actors])
    return Scene(
        index=index,
        seed=options.seed,
        duration_s=duration,
        weather=options.weather[index % len(options.weather)],
        road=road,
        ground=make_ground(road, GRASS if look.random() < 0.6 else CONCRETE),
        ego=motion.make_ego(road, rng, grid, ego_s),
        actors=tuple(actors),
        tracks=motion.Tracks(xy_yaw=tracks, start_s=float(grid[0])),
        sun_direction=_sun(look),
        local=np.array([[*p.centre_m, p.yaw_rad] for p in parts]),
        owner=owner,
        actor_parts=pack(parts, owner),
        statics=pack(statics, np.full(len(statics), raycast.STATIC)),
    )
