"""Who is in a scene: all ten detection classes near the start, then traffic, parked vehicles and people along the road."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from imkd_data.geometry import F64
from imkd_data.world import motion
from imkd_data.world.road import CROSS_HALF_M, CROSS_LENGTH_M, Road
from imkd_data.world.shapes import Part, Vector, make_look, make_parts, make_size, with_chance_materials

PARKING_M = 8.15


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Actor:
    """One annotated thing. ``role``: moving, parked, standing, rider, no_rider or prop (no attribute)."""

    category: str
    role: str
    size_lwh_m: Vector
    parts: tuple[Part, ...]
    track: F64  # (T, 3) x, y, yaw


@dataclass(slots=True, kw_only=True)
class Cast:
    """Collects actors while a scene is laid out; each one draws from its own numbers."""

    road: Road
    grid_s: F64
    rng: np.random.Generator
    materials: str
    actors: list[Actor] = field(default_factory=list)

    def add(self, category: str, role: str, track: F64, size: Vector | None = None) -> Actor:
        """Append one actor with a random size and look."""
        size = size or make_size(category, self.rng)
        look = make_look(category, self.rng)
        parts = make_parts(category, size, look, rider=role == "rider")
        if self.materials == "independent":
            parts = with_chance_materials(parts, np.random.default_rng(int(1e6 * size[0]) + len(self.actors)))
        actor = Actor(category=category, role=role, size_lwh_m=size, parts=tuple(parts), track=track)
        self.actors.append(actor)
        return actor

    def stand(self, category: str, role: str, s: float, d: float, yaw: float = 0.0, size: Vector | None = None) -> Actor:
        """A standing actor at path coordinates; yaw relative to the road."""
        return self.add(category, role, motion.stand(self.road, self.grid_s, s, d, yaw), size)

    def crossing_near(self, s: float, margin: float) -> bool:
        """Whether s is closer to the crossing than a margin."""
        return abs(s - self.road.cross_s_m) < CROSS_HALF_M + margin

    def walk(self, category: str, s: float, d: float, speed: float, direction: int) -> Actor:
        """Somebody who moves along the pavement."""
        sway = 0.15 * np.sin(self.grid_s * 0.8 + self.rng.uniform(0, 6))
        path = s + direction * speed * self.grid_s
        track = motion.drive(self.road, self.grid_s, path, d + sway, direction)
        return self.add(category, "moving" if category.startswith("human") else "rider", track)


def _work_site(cast: Cast, s: float, side: int) -> float:
    """Cones, barriers, a construction vehicle and workers in the parking lane; returns where it ends."""
    rng = cast.rng
    for k in range(3):
        cast.stand(
            "movable_object.trafficcone",
            "prop",
            s + float(rng.uniform(1.7, 2.1)) * k,
            side * (7.15 + 0.2 * k),
            rng.uniform(-3, 3),
        )
    for k in range(3):
        lean = float(rng.uniform(-0.08, 0.08))
        cast.stand(
            "movable_object.barrier", "prop", s + 8.2 + 3.1 * k, side * (7.3 + rng.uniform(-0.06, 0.06)), np.pi / 2 + lean
        )
    cast.stand("vehicle.construction", "parked", s + 14.5, side * 9.1, float(rng.uniform(-0.03, 0.03)))
    cast.stand("human.pedestrian.construction_worker", "standing", s + 9.0, side * 9.3, float(rng.uniform(-3, 3)))
    cast.walk("human.pedestrian.construction_worker", s + 7.0, side * 8.4, 0.35, -1)
    for k in range(2):
        cast.stand("movable_object.trafficcone", "prop", s + 19.5 + 1.8 * k, side * (7.3 + 0.5 * k), rng.uniform(-3, 3))
    return s + 26.0


def _cycles(cast: Cast, s: float, side: int) -> float:
    """Parked two-wheelers, and one of each kind ridden along the kerb."""
    rng = cast.rng
    for k, category in enumerate(("vehicle.bicycle", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.motorcycle")):
        yaw = side * np.pi / 2 + float(rng.uniform(-0.2, 0.2))
        cast.stand(category, "no_rider", s + 1.3 * k, side * 8.3, yaw)
    return s + 6.5


def _parked(cast: Cast, s: float, side: int, category: str) -> float:
    """One vehicle at the kerb; returns where it ends."""
    rng = cast.rng
    size = make_size(category, rng)
    facing = 0.0 if side < 0 else np.pi
    d = side * (PARKING_M if size[1] < 2.3 else PARKING_M + 0.2)
    cast.stand(category, "parked", s + size[0] / 2, d, facing + float(rng.normal(0, 0.02)), size)
    return s + size[0] + float(rng.uniform(1.8, 3.5))


_KERB = (
    "vehicle.car",
    "vehicle.truck",
    "vehicle.bus.rigid",
    "vehicle.trailer",
    "work",
    "cycles",
    "gap",
    "vehicle.emergency.police",
)
_KERB_SHARE = (0.24, 0.045, 0.03, 0.03, 0.025, 0.03, 0.59, 0.01)


def _kerb(cast: Cast, side: int, last_s: float, opening: list[str]) -> None:
    """Fill one parking lane from behind the start to the end of the drive; ``opening`` comes first after the start."""
    rng, s = cast.rng, -75.0
    while s < last_s:
        kind = _KERB[int(rng.choice(len(_KERB), p=_KERB_SHARE))]
        if s > -9.0 and opening:
            s, kind = max(s, 2.5) + float(rng.uniform(0.0, 4.0)), opening.pop(0)
        room = {"work": 27.0, "gap": 0.0, "cycles": 7.0, "vehicle.bus.rigid": 14.0, "vehicle.trailer": 14.0}.get(kind, 9.0)
        if s < cast.road.cross_s_m and s + room > cast.road.cross_s_m - CROSS_HALF_M - 6.0:
            s = cast.road.cross_s_m + CROSS_HALF_M + 6.5
        if kind == "work":
            s = _work_site(cast, s, side) + 2.0
        elif kind == "cycles":
            s = _cycles(cast, s, side) + 1.0
        elif kind == "gap":
            s += float(rng.uniform(5.0, 16.0))
        else:
            s = _parked(cast, s, side, kind)


_LANE = ("vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.motorcycle", "rig", "vehicle.bicycle")
_LANE_SHARE = (0.66, 0.11, 0.07, 0.08, 0.06, 0.02)


def _lane(cast: Cast, d: float, path_m: F64, first_s: float, last_s: float, clear_m: tuple[float, float]) -> None:
    """Traffic of one lane: one common motion with small waves, so nobody runs into anybody. ``clear_m`` stays empty."""
    rng, direction = cast.rng, 1 if d < 0 else -1
    s = first_s + float(rng.uniform(0.0, 25.0))
    while s < last_s:
        kind = _LANE[int(rng.choice(len(_LANE), p=_LANE_SHARE))]
        category = "vehicle.truck" if kind == "rig" else kind
        size = make_size(category, rng)
        if clear_m[0] - size[0] < s < clear_m[1]:
            s = clear_m[1] + float(rng.uniform(0.0, 12.0))
            continue
        trailer = make_size("vehicle.trailer", rng) if kind == "rig" else None
        if trailer and direction > 0:
            s += trailer[0] + 3.0
        wave = 0.8 * np.sin(cast.grid_s * float(rng.uniform(0.25, 0.6)) + float(rng.uniform(0, 6)))
        offset = d + float(rng.normal(0.0, 0.12))
        s_path = s + size[0] / 2 + direction * path_m + wave
        role = "rider" if category in ("vehicle.motorcycle", "vehicle.bicycle") else "moving"
        cast.add(category, role, motion.drive(cast.road, cast.grid_s, s_path, np.full_like(s_path, offset), direction), size)
        s += size[0] + 4.0
        if trailer:  # it follows in the truck's track
            back = s_path - direction * (size[0] / 2 + 1.2 + trailer[0] / 2)
            track = motion.drive(cast.road, cast.grid_s, back, np.full_like(back, offset), direction)
            cast.add("vehicle.trailer", "moving", track, trailer)
            s += trailer[0] + 3.0 if direction < 0 else 0.0
        s += 6.0 + float(rng.exponential(42.0))


def _crossing(cast: Cast) -> None:
    """Cross traffic that comes to the stop line or leaves it: radar sees it move across."""
    rng, t = cast.rng, cast.grid_s
    for side in (-1, 1):
        start = float(rng.uniform(0.0, 2.5))
        leaving = 16.0 + 0.5 * 2.0 * np.clip(t - start, 0.0, None) ** 2
        gone = np.where(leaving > 16.0 + 64.0, 80.0 + 16.0 * (t - start - 8.0), leaving)
        stop = float(rng.uniform(3.0, 7.0))
        coming = 18.0 + 0.5 * 2.2 * np.clip(stop - t, 0.0, None) ** 2
        for outward, d in ((1, gone), (-1, np.minimum(coming, CROSS_LENGTH_M - 2.0))):
            if rng.random() < 0.25:
                continue
            lane = side * outward * 2.4  # right-hand traffic on the cross street
            x, y, heading = cast.road.pose(np.full_like(t, cast.road.cross_s_m + lane), float(side) * d)
            yaw = heading + side * outward * np.pi / 2
            cast.add("vehicle.car", "moving", np.stack([x, y, yaw], axis=1))


def _people(cast: Cast, last_s: float) -> None:
    """Pedestrians and riders on both pavements: some near the start, more along the road."""
    rng = cast.rng
    for side in (-1, 1):
        cast.walk("vehicle.bicycle", float(rng.uniform(-10.0, 14.0)), side * 10.7, float(rng.uniform(2.5, 5.0)), -side)
        starts = [float(rng.uniform(-5.0, 25.0)), *np.arange(-60.0, last_s, 28.0) + rng.uniform(-14, 14)]
        for s in starts:
            if rng.random() < 0.2:
                continue
            category = "human.pedestrian.child" if rng.random() < 0.12 else "human.pedestrian.adult"
            d, direction = side * float(rng.uniform(11.3, 12.6)), int(rng.choice((-1, 1)))
            if rng.random() < 0.62:
                cast.walk(category, float(s), d, float(rng.uniform(0.7, 1.7)), direction)
            elif not cast.crossing_near(float(s), 1.0):
                cast.stand(category, "standing", float(s), d, float(rng.uniform(-3.1, 3.1)))
    for s in rng.uniform(0.0, last_s, 2):
        if not cast.crossing_near(float(s), 1.0):
            cast.stand("movable_object.pushable_pullable", "prop", float(s), float(rng.choice((-12.7, 12.7))), 0.3)


def make_actors(road: Road, rng: np.random.Generator, grid_s: F64, ego_s_m: F64, materials: str) -> list[Actor]:
    """All actors of a scene; ``ego_s_m`` (T,) is the ego's own path, which its lane follows."""
    cast = Cast(road=road, grid_s=grid_s, rng=rng, materials=materials)
    run = float(ego_s_m[-1])
    # Every scene's start holds all standing classes, on sides and in an order that differ from scene to scene.
    rows = [["work", "vehicle.truck"], [str(k) for k in rng.permutation(["cycles", "vehicle.bus.rigid", "vehicle.trailer"])]]
    if rows[1][2] == "cycles":
        rows[1] = [rows[1][2], *rows[1][:2]]
    flip = int(rng.integers(2))
    for side, opening in zip((-1, 1), (rows[flip], rows[1 - flip]), strict=True):
        _kerb(cast, side, run + 85.0, opening)
    _lane(cast, -1.75, ego_s_m, -70.0, run + 20.0, (-14.0, 16.0))
    for d in (-5.25, 1.75, 5.25):
        speed = motion.make_speed(rng, grid_s, str(rng.choice(["cruise", "cruise", "stop"])), float(rng.uniform(5.0, 12.0)))
        path = motion.distance_from_speed(grid_s, speed)
        ahead = float(path[-1]) if d > 0 else 0.0
        clear = (-6.0, 6.0) if d > 0 else (-9.0, 9.0)
        _lane(cast, d, path, -95.0, run + 95.0 + ahead, clear)
    _people(cast, run + 60.0)
    _crossing(cast)
    return cast.actors
