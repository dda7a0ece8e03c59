"""Augmentation as values: an image draw (IDA) per camera and a BEV draw (BDA) per sample.

Every draw is a pure function of (seed, epoch, position), whoever draws it. An image draw is a resize, a crop, a flip and a
rotation, so it gives a new Camera; the BEV draw gives ``bev_from_ego``. Ranges and formulas: public CRN / BEVDepth settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from imkd_data.errors import RecipeError
from imkd_data.geometry import Camera

__all__ = [
    "IDENTITY",
    "AugmentConfig",
    "BevDraw",
    "ImageDraw",
    "draw_bev",
    "draw_images",
    "draw_radar",
    "generator",
    "move_boxes",
]

F64 = NDArray[np.float64]
# What a draw can mean: pairs are ranges; a scale so far from 1 leaves no image, or no memory.
_PAIRS = {"image_scale": (0.05, 20), "rotation_deg": (-360, 360), "bev_scale": (0.05, 20), "image_rotation_deg": (-360, 360)}
_SINGLE = {"image_flip": (0, 1), "flip_x": (0, 1), "flip_y": (0, 1), "radar_drop": (0, 1), "evaluation_scale": (0.05, 20)}
_BEV_STREAM, _IMAGE_STREAM, _TURN_STREAM, _RADAR_STREAM = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Ranges of the draws. ``enabled`` false is evaluation: centre crop, identity BEV.

    image_scale: factor on the least scale that fills the image, max(h / H, w / W); CRN's 0.386..0.55 of 900x1600 -> 256x704
    is 0.877..1.25 of 0.44. evaluation_scale: that factor in evaluation (CRN: 1; CRKD: 0.48 / 0.44). image_flip, flip_x,
    flip_y: probabilities. rotation_deg, bev_scale: uniform ranges. image_rotation_deg: per camera (BEVDepth: +-5.4, CRN: 0).
    radar_drop: share of radar returns left out; radar_sweeps_kept: so many of the used sweeps, drawn without replacement,
    0 = all (CRN: 0.1 and 5 of 6).
    """

    enabled: bool = True
    image_scale: tuple[float, float] = (0.386 / 0.44, 0.55 / 0.44)
    image_flip: float = 0.5
    rotation_deg: tuple[float, float] = (-22.5, 22.5)
    bev_scale: tuple[float, float] = (0.9, 1.1)
    flip_x: float = 0.5
    flip_y: float = 0.5
    image_rotation_deg: tuple[float, float] = (0.0, 0.0)
    radar_drop: float = 0.0
    radar_sweeps_kept: int = 0
    evaluation_scale: float = 1.0

    def __post_init__(self) -> None:
        kept = self.radar_sweeps_kept
        expected = {
            "enabled": "" if isinstance(self.enabled, bool) else "true or false",
            "radar_sweeps_kept": "" if type(kept) is int and kept >= 0 else "a whole number, at least 0",
        }
        for name, (low, high) in _PAIRS.items():
            pair = getattr(self, name)
            fits = isinstance(pair, list | tuple) and len(pair) == 2 and all(_is_between(v, low, high) for v in pair)
            expected[name] = "" if fits and pair[0] <= pair[1] else f"2 numbers, {low} to {high}, the smaller first"
        for name, (low, high) in _SINGLE.items():
            expected[name] = "" if _is_between(getattr(self, name), low, high) else f"{low} to {high}"
        for name, words in expected.items():
            if words:
                raise RecipeError(f"setting augment.{name}", expected=words, found=repr(getattr(self, name)))

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> AugmentConfig:
        """From the JSON form; unknown keys are errors."""
        if not isinstance(value, Mapping):
            raise RecipeError("setting augment", expected="an object", found=repr(value))
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise RecipeError("unknown augmentation keys", expected=", ".join(sorted(known)), found=", ".join(unknown))
        kwargs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**kwargs)


def _is_between(value: Any, low: float, high: float) -> bool:
    """Whether it is a number in these limits; NaN is in none."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and bool(low <= value <= high)


IDENTITY = AugmentConfig(enabled=False)


def generator(seed: int, epoch: int, position: int, stream: int) -> np.random.Generator:
    """Counter-based random numbers: the counter *is* (epoch, position, stream), so no draw depends on another."""
    mask = (1 << 64) - 1
    key = np.array([seed & mask, 0x696D6B64], dtype=np.uint64)
    counter = np.array([0, epoch & mask, position & mask, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


@dataclass(frozen=True, slots=True, kw_only=True)
class BevDraw:
    """One BEV augmentation: bev_from_ego = F (k R(theta)), F = diag(-1 if flip_x, -1 if flip_y, 1); k scales x, y and z."""

    rotation_rad: float = 0.0
    scale: float = 1.0
    flip_x: bool = False
    flip_y: bool = False

    @property
    def identity(self) -> bool:
        """Whether nothing moves."""
        return self == BevDraw()

    def matrix(self) -> F64:
        """``bev_from_ego`` (4, 4) f64."""
        c, s = np.cos(self.rotation_rad), np.sin(self.rotation_rad)
        m = np.eye(4)
        m[:3, :3] = self.scale * np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        m[0, :3] *= -1.0 if self.flip_x else 1.0
        m[1, :3] *= -1.0 if self.flip_y else 1.0
        return m


def draw_bev(config: AugmentConfig, *, seed: int, epoch: int, position: int) -> BevDraw:
    """The BEV draw of one position."""
    if not config.enabled:
        return BevDraw()
    rng = generator(seed, epoch, position, _BEV_STREAM)
    turn, scale, flip_x, flip_y = rng.random(4).tolist()
    low, high = np.deg2rad(config.rotation_deg)
    return BevDraw(
        rotation_rad=float(low + (high - low) * turn),
        scale=float(config.bev_scale[0] + (config.bev_scale[1] - config.bev_scale[0]) * scale),
        flip_x=bool(flip_x < config.flip_x),
        flip_y=bool(flip_y < config.flip_y),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDraw:
    """Resize of the whole image to (resized_w, resized_h), window of (width, height) at (left, top), flip, rotation about
    the window's middle (u' = cos u + sin v: content turns counter-clockwise on screen for positive angles).

    left and top may be negative or the window may leave the image; what lies outside is black.
    """

    resized_w_px: int
    resized_h_px: int
    left_px: int
    top_px: int
    width_px: int
    height_px: int
    flip: bool = False
    rotation_rad: float = 0.0

    def turn(self) -> F64:
        """Rotation of window pixels (3, 3)."""
        c, s = np.cos(self.rotation_rad), np.sin(self.rotation_rad)
        u, v = (self.width_px - 1) / 2, (self.height_px - 1) / 2
        return np.array([[c, s, u - c * u - s * v], [-s, c, v + s * u - c * v], [0.0, 0.0, 1.0]])

    def camera(self, camera: Camera) -> Camera:
        """The camera of the augmented image."""
        moved = camera.resized(self.resized_w_px, self.resized_h_px)
        moved = moved.cropped(self.left_px, self.top_px, self.width_px, self.height_px)
        moved = moved.flipped() if self.flip else moved
        if not self.rotation_rad:
            return moved
        return replace(moved, image_from_camera=self.turn() @ moved.image_from_camera)

    def matrix(self, full_hw_px: tuple[int, int], *, mirror_off: bool = False) -> F64:
        """``augmented_from_full`` pixels (3, 3); the same product as ``camera`` applies. mirror_off: a flip moves places to
        W - u, one pixel beside the image's content (CRN's released loader)."""
        sx, sy = self.resized_w_px / full_hw_px[1], self.resized_h_px / full_hw_px[0]
        m = np.array([[sx, 0, 0.5 * sx - 0.5 - self.left_px], [0, sy, 0.5 * sy - 0.5 - self.top_px], [0, 0, 1.0]])
        if self.flip:
            m[0] = [-sx, 0, self.width_px - (0 if mirror_off else 1) - m[0, 2]]
        return self.turn() @ m if self.rotation_rad else m


def draw_images(
    config: AugmentConfig,
    *,
    full_hw_px: tuple[int, int],
    image_hw_px: tuple[int, int],
    cameras: int,
    seed: int,
    epoch: int,
    position: int,
) -> tuple[ImageDraw, ...]:
    """One draw per camera, shared by its keyframes. The crop is aligned with the lower edge, where the road is."""
    (full_h, full_w), (height, width) = full_hw_px, image_hw_px
    base = max(height / full_h, width / full_w)
    rng = generator(seed, epoch, position, _IMAGE_STREAM)
    turns = np.deg2rad(generator(seed, epoch, position, _TURN_STREAM).uniform(*config.image_rotation_deg, size=cameras))
    out = []
    for (u_scale, u_left, u_flip), turn in zip(rng.random((cameras, 3)).tolist(), turns.tolist(), strict=True):
        low, high = config.image_scale
        scale = base * (low + (high - low) * u_scale if config.enabled else config.evaluation_scale)
        resized_w, resized_h = round(full_w * scale), round(full_h * scale)
        spare = max(0, resized_w - width)
        out.append(
            ImageDraw(
                resized_w_px=resized_w,
                resized_h_px=resized_h,
                left_px=int(u_left * (spare + 1)) if config.enabled else spare // 2,
                top_px=resized_h - height,
                width_px=width,
                height_px=height,
                flip=bool(config.enabled and u_flip < config.image_flip),
                rotation_rad=turn if config.enabled else 0.0,
            )
        )
    return tuple(out)


def draw_radar(
    config: AugmentConfig, sweep: ArrayLike, *, seed: int, epoch: int, position: int, slot: int
) -> NDArray[np.bool_]:
    """Which returns of one history slot stay, given their sweep numbers (N,)."""
    sweeps = np.asarray(sweep)
    keep = np.ones(len(sweeps), dtype=bool)
    if not config.enabled:
        return keep
    rng = generator(seed, epoch, position, _RADAR_STREAM)
    present = np.arange(int(sweeps.max(initial=-1)) + 1)
    order = rng.permutation(64)  # one draw for all slots, as long as any recipe has sweeps
    if 0 < config.radar_sweeps_kept < len(present):
        keep &= np.isin(sweeps, order[order < len(present)][: config.radar_sweeps_kept])
    if config.radar_drop:
        dropped = generator(seed, epoch, position, _RADAR_STREAM + 16 * (slot + 1)).random(len(sweeps))
        keep &= dropped >= config.radar_drop
    return keep


def move_boxes(
    matrix: ArrayLike, centre_m: ArrayLike, size_lwh_m: ArrayLike, yaw_rad: ArrayLike, velocity_mps: ArrayLike
) -> tuple[F64, F64, F64, F64]:
    """Boxes under ``dst_from_src`` = similarity in x, y, z with an optional mirror: centre, size, yaw, velocity in dst.

    The heading is moved as a vector, so mirrors need no special case; NaN velocities stay NaN; z is scaled too.
    """
    m = np.asarray(matrix, dtype=np.float64)
    centre, size = np.asarray(centre_m, dtype=np.float64), np.asarray(size_lwh_m, dtype=np.float64)
    yaw, velocity = np.asarray(yaw_rad, dtype=np.float64), np.asarray(velocity_mps, dtype=np.float64)
    heading = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1) @ m[:2, :2].T
    return (
        centre @ m[:3, :3].T + m[:3, 3],
        size * np.cbrt(abs(np.linalg.det(m[:3, :3]))),
        np.arctan2(heading[..., 1], heading[..., 0]),
        velocity @ m[:2, :2].T,
    )
