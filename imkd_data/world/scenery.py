"""What stands beside the road: buildings, trees, hedges, poles, signs, guard rails."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from imkd_data.kernels.raycast import BOX, CYLINDER, ELLIPSOID
from imkd_data.world.road import CROSS_HALF_M, EDGE_M, Road
from imkd_data.world.shapes import FOLIAGE, PLAIN, STRIPES, WINDOWS, Part, Vector

_WALLS: tuple[Vector, ...] = (
    (0.62, 0.42, 0.33), (0.72, 0.68, 0.58), (0.5, 0.52, 0.55), (0.78, 0.74, 0.7), (0.45, 0.33, 0.28),
)  # fmt: skip
_LEAF: Vector = (0.16, 0.34, 0.1)
_BARK: Vector = (0.3, 0.22, 0.15)
_STEEL: Vector = (0.6, 0.62, 0.64)


@dataclass(slots=True, kw_only=True)
class Scenery:
    """Collects static parts in the global frame."""

    road: Road
    rng: np.random.Generator
    parts: list[Part] = field(default_factory=list)

    def put(self, shape: int, s: float, d: float, z: float, half: Vector, colour: Vector, rho: float, **more: float) -> None:
        """One primitive at path coordinates, turned with the road."""
        x, y, heading = (float(v) for v in self.road.pose(np.asarray(s), np.asarray(d)))
        self.parts.append(
            Part(
                shape=shape,
                centre_m=(x, y, z),
                half_m=half,
                colour=colour,
                reflectivity=rho,
                yaw_rad=heading,
                retro=more.get("retro", 0.0),
                density=more.get("density", 0.0),
                texture=int(more.get("texture", PLAIN)),
            )
        )

    def blocked(self, s: float, half_length: float) -> bool:
        """Whether the cross street runs here."""
        return abs(s - self.road.cross_s_m) < CROSS_HALF_M + half_length + 2.0

    def tree(self, s: float, d: float) -> None:
        """A trunk and a crown that lets part of the rays through."""
        rng = self.rng
        height, radius = float(rng.uniform(4.0, 9.0)), float(rng.uniform(1.4, 3.0))
        trunk = 0.45 * height
        self.put(CYLINDER, s, d, trunk / 2, (0.16, 0.16, trunk / 2), _BARK, float(rng.uniform(10, 25)))
        rho, half = float(rng.uniform(20.0, 50.0)), (radius, radius, 0.36 * height)
        self.put(ELLIPSOID, s, d, 0.7 * height, half, _LEAF, rho, density=float(rng.uniform(0.6, 1.6)), texture=FOLIAGE)

    def pole(self, s: float, d: float) -> None:
        """A lamp post."""
        self.put(CYLINDER, s, d, 3.5, (0.1, 0.1, 3.5), _STEEL, float(self.rng.uniform(12, 40)))

    def sign(self, s: float, d: float) -> None:
        """A retro-reflective traffic sign on a thin post, facing the traffic."""
        rng = self.rng
        self.put(CYLINDER, s, d, 1.3, (0.04, 0.04, 1.3), _STEEL, 25.0)
        paint: Vector = ((0.1, 0.2, 0.75), (0.85, 0.1, 0.1), (0.95, 0.95, 0.95), (0.1, 0.5, 0.2))[int(rng.integers(4))]
        self.put(BOX, s, d, 2.6, (0.02, 0.38, 0.38), paint, 90.0, retro=float(rng.uniform(0.6, 1.0)))


def _frontage(scenery: Scenery, side: int, first: float, last: float, town: float) -> None:
    """Buildings, hedges and trees along one side."""
    rng, s = scenery.rng, first
    while s < last:
        length = float(rng.uniform(9.0, 26.0))
        middle = s + length / 2
        if scenery.blocked(middle, length / 2):
            s = scenery.road.cross_s_m + CROSS_HALF_M + 4.0 if s < scenery.road.cross_s_m else s + 6.0
            continue
        if rng.random() < town:
            depth, height = float(rng.uniform(4.0, 7.5)), float(rng.uniform(4.0, 18.0))
            d = side * (float(rng.uniform(15.5, 21.0)) + depth)
            colour = _WALLS[int(rng.integers(len(_WALLS)))]
            rho = float(rng.uniform(12.0, 48.0))
            scenery.put(BOX, middle, d, height / 2, (length / 2, depth, height / 2), colour, rho, texture=WINDOWS)
        else:
            if rng.random() < 0.6:
                half = (length / 2, 0.6, 0.55)
                scenery.put(BOX, middle, side * 14.8, 0.55, half, _LEAF, 32.0, density=2.5, texture=FOLIAGE)
            for _ in range(int(rng.integers(1, 5))):
                scenery.tree(float(rng.uniform(s, s + length)), side * float(rng.uniform(16.0, 38.0)))
        s += length + float(rng.uniform(0.5, 7.0))


def _furniture(scenery: Scenery, side: int, first: float, last: float, rail: bool) -> None:
    """Lamp posts, street trees and signs at the pavement; a guard rail in some scenes."""
    rng = scenery.rng
    for s in np.arange(first, last, 27.0) + rng.uniform(-3, 3):
        if not scenery.blocked(float(s), 0.5):
            scenery.pole(float(s), side * 13.35)
    for s in np.arange(first, last, 16.0) + rng.uniform(-5, 5):
        if rng.random() < 0.4 and not scenery.blocked(float(s), 3.0):
            scenery.tree(float(s), side * 14.2)
    for s in np.arange(first, last, 34.0) + rng.uniform(-9, 9):
        if rng.random() < 0.7 and not scenery.blocked(float(s), 0.5):
            scenery.sign(float(s), side * (EDGE_M + 0.2))
    if rail:
        for s in np.arange(first, last, 4.0):
            if not scenery.blocked(float(s), 2.5):
                scenery.put(BOX, float(s) + 2.0, side * 13.25, 0.6, (1.98, 0.05, 0.16), _STEEL, 30.0, texture=STRIPES)
                scenery.put(BOX, float(s), side * 13.33, 0.38, (0.06, 0.05, 0.38), _STEEL, 25.0)


def make_scenery(road: Road, rng: np.random.Generator, run_m: float) -> list[Part]:
    """All static parts of a scene, in the global frame."""
    scenery = Scenery(road=road, rng=rng)
    town, rail = float(rng.uniform(0.25, 0.8)), bool(rng.random() < 0.4)
    for side in (-1, 1):
        _frontage(scenery, side, -150.0, run_m + 175.0, town)
        _furniture(scenery, side, -110.0, run_m + 130.0, rail and side < 0)
        for s in np.arange(-140.0, run_m + 170.0, 24.0):
            if rng.random() < 0.6 and not scenery.blocked(float(s), 4.0):
                scenery.tree(float(s) + float(rng.uniform(-8, 8)), side * float(rng.uniform(34.0, 46.0)))
    for s in (road.cross_s_m - 11.0, road.cross_s_m + 11.0):  # traffic lights stand at the crossing
        scenery.put(CYLINDER, s, -13.2, 1.9, (0.09, 0.09, 1.9), _STEEL, 25.0)
        scenery.put(BOX, s, -13.2, 3.4, (0.16, 0.16, 0.45), (0.1, 0.1, 0.1), 8.0)
    return scenery.parts
