"""What actors look like: for every class a few primitives with reflectivity, colour and texture, inside the annotated box.

A part is one row: shape, centre (x forward, y left, z up from the middle of the box's floor), half sizes, yaw, reflectivity
0..100, retro-reflective strength 0..1, density, colour (r, g, b 0..1), texture. Parts stay ``MARGIN_M`` inside the box, as
annotated boxes are a little larger than what they hold; so points lie inside and not on faces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from imkd_data.kernels.raycast import BOX, CYLINDER, ELLIPSOID

MARGIN_M = 0.045
PLAIN, WINDOWS, STRIPES, FOLIAGE, EMISSIVE, GLASS, TAIL_LIGHT = range(7)  # textures

Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One primitive of an actor or of the scenery; see the module's text."""

    shape: int
    centre_m: Vector
    half_m: Vector
    colour: Vector
    reflectivity: float
    retro: float = 0.0
    yaw_rad: float = 0.0
    density: float = 0.0
    texture: int = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How one actor's surface differs from another's of its class."""

    colour: Vector
    second: Vector
    reflectivity: float


# Mean length, width, height and relative deviation by kind of actor (published nuScenes statistics).
SIZES: MappingProxyType[str, tuple[Vector, float]] = MappingProxyType(
    {
        "vehicle.car": ((4.62, 1.95, 1.73), 0.07),
        "vehicle.truck": ((6.93, 2.51, 2.84), 0.13),
        "vehicle.construction": ((6.56, 2.6, 3.2), 0.06),
        "vehicle.bus.rigid": ((11.1, 2.94, 3.47), 0.07),
        "vehicle.trailer": ((10.8, 2.75, 3.6), 0.1),
        "movable_object.barrier": ((0.5, 2.5, 1.0), 0.08),
        "vehicle.motorcycle": ((2.11, 0.77, 1.47), 0.08),
        "vehicle.bicycle": ((1.72, 0.6, 1.3), 0.08),
        "human.pedestrian.adult": ((0.72, 0.67, 1.76), 0.07),
        "human.pedestrian.child": ((0.5, 0.5, 1.3), 0.07),
        "human.pedestrian.construction_worker": ((0.72, 0.7, 1.77), 0.05),
        "movable_object.trafficcone": ((0.41, 0.41, 0.98), 0.1),
        "movable_object.pushable_pullable": ((0.7, 0.6, 1.06), 0.1),
        "vehicle.emergency.police": ((4.9, 2.0, 1.6), 0.04),
    }
)

CAR_PAINTS: tuple[Vector, ...] = (
    (0.85, 0.85, 0.87), (0.08, 0.08, 0.1), (0.55, 0.57, 0.6), (0.6, 0.07, 0.08), (0.1, 0.2, 0.5), (0.3, 0.32, 0.34),
)  # fmt: skip
TYRE: Vector = (0.05, 0.05, 0.05)
GLAZING: Vector = (0.12, 0.16, 0.2)
LAMP: Vector = (1.0, 0.95, 0.8)
TAIL: Vector = (0.9, 0.05, 0.05)

_MEAN_REFLECTIVITY = MappingProxyType(
    {
        "vehicle.car": (24.0, 16.0), "vehicle.truck": (38.0, 12.0), "vehicle.construction": (46.0, 8.0),
        "vehicle.bus.rigid": (34.0, 8.0), "vehicle.trailer": (46.0, 10.0), "movable_object.barrier": (58.0, 10.0),
        "vehicle.motorcycle": (14.0, 6.0), "vehicle.bicycle": (20.0, 6.0), "human.pedestrian.adult": (16.0, 9.0),
        "human.pedestrian.child": (18.0, 9.0), "human.pedestrian.construction_worker": (32.0, 6.0),
        "movable_object.trafficcone": (58.0, 8.0), "movable_object.pushable_pullable": (30.0, 10.0),
        "vehicle.emergency.police": (40.0, 8.0),
    }
)  # fmt: skip


def make_size(category: str, rng: np.random.Generator) -> Vector:
    """Length, width, height in metres, whole millimetres."""
    mean, spread = SIZES[category]
    scale = 1.0 + spread * np.clip(rng.standard_normal(3), -2.0, 2.0)
    return tuple(round(float(m * k), 3) for m, k in zip(mean, scale, strict=True))  # type: ignore[return-value]


def with_chance_materials(parts: list[Part], rng: np.random.Generator) -> list[Part]:
    """The same shapes with reflectivity and retro-reflection drawn alike for every part of every class."""
    rho, mirrors = rng.uniform(4.0, 80.0, len(parts)), rng.random(len(parts)) < 0.05
    return [replace(p, reflectivity=float(r), retro=0.5 * float(m)) for p, r, m in zip(parts, rho, mirrors, strict=True)]


def make_look(category: str, rng: np.random.Generator) -> Look:
    """Paint and reflectivity of one actor of a class."""
    mean, spread = _MEAN_REFLECTIVITY[category]
    reflectivity = float(np.clip(mean + spread * rng.standard_normal(), 3.0, 95.0))
    paint = CAR_PAINTS[int(rng.integers(len(CAR_PAINTS)))]
    cloth: Vector = tuple(float(v) for v in rng.uniform(0.05, 0.8, 3))  # type: ignore[assignment]
    colour: dict[str, Vector] = {
        "vehicle.car": paint,
        "vehicle.truck": ((0.9, 0.9, 0.85), (0.85, 0.5, 0.1), (0.2, 0.35, 0.6))[int(rng.integers(3))],
        "vehicle.construction": (0.95, 0.72, 0.05),
        "vehicle.bus.rigid": ((0.75, 0.1, 0.12), (0.1, 0.5, 0.35))[int(rng.integers(2))],
        "vehicle.trailer": (0.62, 0.64, 0.7),
        "movable_object.barrier": (0.95, 0.45, 0.1),
        "movable_object.trafficcone": (1.0, 0.35, 0.02),
        "human.pedestrian.construction_worker": (0.85, 0.95, 0.1),
        "vehicle.emergency.police": (0.95, 0.95, 0.98),
    }
    return Look(colour=colour.get(category, cloth), second=cloth, reflectivity=reflectivity)


def _box(x: float, y: float, z0: float, z1: float, hx: float, hy: float, colour: Vector, rho: float, **more: float) -> Part:
    texture = int(more.pop("texture", PLAIN))
    return Part(
        shape=BOX, centre_m=(x, y, (z0 + z1) / 2), half_m=(hx, hy, (z1 - z0) / 2), colour=colour, reflectivity=rho,
        texture=texture, **more,
    )  # fmt: skip


def _tube(x: float, y: float, z0: float, z1: float, radius: float, colour: Vector, rho: float, retro: float = 0.0) -> Part:
    return Part(
        shape=CYLINDER, centre_m=(x, y, (z0 + z1) / 2), half_m=(radius, radius, (z1 - z0) / 2), colour=colour,
        reflectivity=rho, retro=retro,
    )  # fmt: skip


def _ball(x: float, y: float, z: float, half: Vector, colour: Vector, rho: float) -> Part:
    return Part(shape=ELLIPSOID, centre_m=(x, y, z), half_m=half, colour=colour, reflectivity=rho)


def _wheels(hl: float, hw: float, radius: float, at: tuple[float, ...]) -> list[Part]:
    return [_box(f * hl, side * (hw - 0.13), 0.0, 2 * radius, radius, 0.12, TYRE, 4.0) for f in at for side in (-1, 1)]


def _lamps(hl: float, hw: float, z: float) -> list[Part]:
    """Front lamps, tail lamps, and the two retro-reflective number plates."""
    parts = [_box(hl - 0.02, s * hw * 0.72, z - 0.07, z + 0.07, 0.02, 0.14, LAMP, 30.0, texture=EMISSIVE) for s in (-1, 1)]
    parts += [
        _box(-hl + 0.02, s * hw * 0.76, z, z + 0.16, 0.02, 0.11, TAIL, 40.0, retro=0.25, texture=TAIL_LIGHT) for s in (-1, 1)
    ]
    plate: Vector = (0.9, 0.9, 0.8)
    return parts + [_box(s * (hl - 0.012), 0.0, z - 0.22, z - 0.1, 0.012, 0.26, plate, 80.0, retro=0.9) for s in (-1, 1)]


def _car(l: float, w: float, h: float, look: Look) -> list[Part]:
    rho, belt = look.reflectivity, 0.56 * h
    return [
        _box(0.0, 0.0, 0.2, belt, l - 0.03, w - 0.02, look.colour, rho),
        _box(-0.12 * l, 0.0, belt, h - 0.08, 0.52 * l, 0.84 * w, GLAZING, 5.0, texture=GLASS),
        _box(-0.14 * l, 0.0, h - 0.08, h, 0.44 * l, 0.8 * w, look.colour, rho),
        *_wheels(l, w, 0.32, (-0.6, 0.62)),
        *_lamps(l, w, 0.66),
    ]


def _police(l: float, w: float, h: float, look: Look) -> list[Part]:
    bar: Vector = (0.1, 0.2, 0.95)
    return [*_car(l, w, h - 0.1, look), _box(-0.1 * l, 0.0, h - 0.1, h, 0.12, 0.6 * w, bar, 30.0, texture=EMISSIVE)]


def _truck(l: float, w: float, h: float, look: Look) -> list[Part]:
    rho, cab = look.reflectivity, 0.28 * l
    return [
        _box(l - cab, 0.0, 0.4, 0.8 * h, cab - 0.03, w - 0.03, look.second, 0.7 * rho),
        _box(l - 0.06, 0.0, 0.5 * h, 0.74 * h, 0.05, 0.88 * w, GLAZING, 5.0, texture=GLASS),
        _box(-cab, 0.0, 0.8, h, l - cab - 0.06, w, look.colour, rho),
        _box(-cab, 0.0, 0.45, 0.8, l - cab - 0.2, 0.5 * w, TYRE, 8.0),
        *_wheels(l, w, 0.46, (-0.7, -0.45, 0.68)),
        *_lamps(l, w, 0.75),
    ]


def _construction(l: float, w: float, h: float, look: Look) -> list[Part]:
    rho = look.reflectivity
    return [
        _box(-0.25 * l, 0.0, 0.75, 0.55 * h, 0.72 * l, 0.8 * w, look.colour, rho, texture=STRIPES),
        _box(-0.1 * l, 0.25 * w, 0.55 * h, h, 0.24 * l, 0.45 * w, GLAZING, 8.0, texture=GLASS),
        _box(0.5 * l, -0.2 * w, 0.5 * h, 0.66 * h, 0.45 * l, 0.14 * w, look.colour, rho),
        _box(0.86 * l, -0.1 * w, 0.1, 0.55 * h, 0.13 * l, 0.55 * w, (0.25, 0.24, 0.22), 12.0),
        *[_box(-0.15 * l, s * 0.78 * w, 0.0, 0.8, 0.62 * l, 0.2 * w, TYRE, 5.0) for s in (-1, 1)],
    ]


def _bus(l: float, w: float, h: float, look: Look) -> list[Part]:
    rho = look.reflectivity
    return [
        _box(0.0, 0.0, 0.3, 0.38 * h, l - 0.03, w, look.colour, rho),
        _box(0.0, 0.0, 0.38 * h, 0.75 * h, l - 0.05, w - 0.03, GLAZING, 6.0, texture=GLASS),
        _box(0.0, 0.0, 0.75 * h, h, l - 0.03, w, look.colour, rho),
        *_wheels(l, w, 0.48, (-0.55, 0.6)),
        *_lamps(l, w, 0.75),
    ]


def _trailer(l: float, w: float, h: float, look: Look) -> list[Part]:
    grey: Vector = (0.3, 0.3, 0.32)
    return [
        _box(0.0, 0.0, 1.0, h, l - 0.03, w, look.colour, look.reflectivity, texture=STRIPES),
        _box(0.0, 0.0, 0.7, 1.0, l - 0.3, 0.5 * w, grey, 8.0),
        *_wheels(l, w, 0.48, (-0.8, -0.6, -0.4)),
        _box(0.6 * l, 0.0, 0.05, 0.7, 0.08, 0.3 * w, grey, 8.0),
        *_lamps(l, w, 0.9)[2:],
    ]


def _barrier(l: float, w: float, h: float, look: Look) -> list[Part]:
    rho = look.reflectivity
    return [
        _box(0.0, 0.0, 0.0, 0.35 * h, l, w, (0.85, 0.85, 0.85), 0.8 * rho),
        _box(0.0, 0.0, 0.35 * h, h, 0.45 * l, w, look.colour, rho, texture=STRIPES),
    ]


def _two_wheeler(l: float, w: float, h: float, look: Look, *, rider: bool, heavy: bool) -> list[Part]:
    rho, frame = look.reflectivity, 0.09 if heavy else 0.045
    seat = (0.55 if rider else 0.72) * h
    skin: Vector = (0.75, 0.55, 0.45)
    wheel = min(0.31, 0.37 * l)
    parts = [_box(x * l, 0.0, 0.0, 2 * wheel, wheel, 0.05 if heavy else 0.028, TYRE, 6.0) for x in (-0.62, 0.62)]
    parts += [
        _box(0.0, 0.0, 0.3, seat, 0.6 * l, frame if not heavy else 0.5 * w, look.colour, rho),
        _box(0.42 * l, 0.0, seat, seat + 0.12, 0.04, 0.85 * w, TYRE, 12.0),
        _box(-l + 0.02, 0.0, 0.55, 0.63, 0.015, 0.05, TAIL, 60.0, retro=0.8, texture=TAIL_LIGHT),
    ]
    if rider:
        parts += [
            _ball(-0.05 * l, 0.0, 0.68 * h, (0.19, min(0.24, w), 0.2 * h), look.second, 18.0),
            _ball(0.0, 0.0, 0.915 * h, (0.11, 0.1, 0.085 * h), skin, 22.0),
        ]
    else:
        parts.append(_box(0.42 * l, 0.0, seat, h, 0.03, 0.5 * w, TYRE, 12.0))
    return parts


def _person(l: float, w: float, h: float, look: Look, *, vest: bool = False) -> list[Part]:
    rho = look.reflectivity
    skin: Vector = (0.75, 0.55, 0.45)
    trousers: Vector = (0.12, 0.13, 0.2)
    parts = [_tube(s * 0.3 * l, s * 0.28 * w, 0.0, 0.5 * h, 0.085, trousers, 0.7 * rho) for s in (-1, 1)]
    parts += [
        _ball(0.0, 0.0, 0.64 * h, (min(0.17, l), min(0.25, w), 0.21 * h), look.colour, rho),
        _ball(0.0, 0.0, 0.925 * h, (0.1, 0.09, 0.075 * h), skin, 22.0),
    ]
    if vest:
        parts.append(_tube(0.0, 0.0, 0.6 * h, 0.68 * h, min(0.22, w), (0.9, 0.9, 0.9), 70.0, retro=0.7))
    return parts


def _cone(l: float, w: float, h: float, look: Look) -> list[Part]:
    rho, radius = look.reflectivity, min(l, w)
    white: Vector = (0.95, 0.95, 0.95)
    return [
        _box(0.0, 0.0, 0.0, 0.06, l, w, (0.1, 0.1, 0.1), 6.0),
        _tube(0.0, 0.0, 0.06, 0.45 * h, 0.75 * radius, look.colour, rho),
        _tube(0.0, 0.0, 0.45 * h, 0.7 * h, 0.55 * radius, white, 75.0, retro=0.55),
        _tube(0.0, 0.0, 0.7 * h, h, 0.32 * radius, look.colour, rho),
    ]


def _cart(l: float, w: float, h: float, look: Look) -> list[Part]:
    return [_box(0.0, 0.0, 0.1, h, l, w, (0.1, 0.4, 0.2), look.reflectivity)]


def make_parts(category: str, size_lwh_m: Vector, look: Look, *, rider: bool) -> list[Part]:
    """The primitives of one actor, all within its box less ``MARGIN_M``."""
    hl, hw, height = size_lwh_m[0] / 2 - MARGIN_M, size_lwh_m[1] / 2 - MARGIN_M, size_lwh_m[2] - MARGIN_M
    if category in ("vehicle.motorcycle", "vehicle.bicycle"):
        return _two_wheeler(hl, hw, height, look, rider=rider, heavy=category == "vehicle.motorcycle")
    if category.startswith("human."):
        return _person(hl, hw, height, look, vest=category.endswith("worker"))
    makers: dict[str, Callable[[float, float, float, Look], list[Part]]] = {
        "vehicle.car": _car,
        "vehicle.emergency.police": _police,
        "vehicle.truck": _truck,
        "vehicle.construction": _construction,
        "vehicle.bus.rigid": _bus,
        "vehicle.trailer": _trailer,
        "movable_object.barrier": _barrier,
        "movable_object.trafficcone": _cone,
        "movable_object.pushable_pullable": _cart,
    }
    return makers[category](hl, hw, height, look)
