"""Six pinhole cameras: z-buffered rendering, sun or headlights, haze, rain, JPEG."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imkd_data.geometry import F64
from imkd_data.kernels import render
from imkd_data.world import rig as rigs
from imkd_data.world.options import random_stream
from imkd_data.world.road import CELL_M
from imkd_data.world.scene import Scene

REACH_M, SHADOW_M = 180.0, 70.0
JPEG_QUALITY = 88
_GROUND_RGB = np.array(
    [[0.28, 0.38, 0.18], [0.3, 0.3, 0.31], [0.86, 0.86, 0.82], [0.55, 0.53, 0.5], [0.46, 0.45, 0.42], [0.64, 0.63, 0.6]]
)
_SKY = {
    "clear": ((0.74, 0.82, 0.9), (0.32, 0.53, 0.83)),
    "rain": ((0.6, 0.62, 0.64), (0.5, 0.53, 0.57)),
    "night": ((0.035, 0.035, 0.05), (0.01, 0.01, 0.025)),
    "rain-night": ((0.04, 0.04, 0.05), (0.02, 0.02, 0.03)),
}
# Sun, ambient, haze per metre, sensor noise (grey levels), exposure.
_LIGHT = {
    "clear": (0.72, 0.42, 0.0012, 2.0, 1.0),
    "rain": (0.08, 0.66, 0.006, 3.0, 0.9),
    "night": (0.0, 0.05, 0.001, 5.0, 1.25),
    "rain-night": (0.0, 0.045, 0.004, 6.0, 1.25),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """What one camera sees: depth (H, W) f32 camera z (inf: sky) and object numbers (H, W) as in ``kernels.raycast``."""

    depth_m: NDArray[np.float32]
    objects: NDArray[np.int64]
    image: NDArray[np.uint8] | None


class CameraModel:
    """The cameras of one scene."""

    def __init__(self, scene: Scene, rig: rigs.Rig) -> None:
        self.scene, self.rig = scene, rig
        self.sky = np.array(_SKY[scene.weather])
        sun, ambient, haze, noise, exposure = _LIGHT[scene.weather]
        self.light = np.array([*scene.sun_direction, sun, ambient, haze, noise, exposure])
        self.still_shadow = np.zeros(scene.ground.cells.shape, np.uint8)
        if sun > 0.2:
            fixed = scene.statics
            render.paint_shadows(self.still_shadow, 0.0, 0.0, CELL_M, fixed.prims, fixed.kinds, scene.sun_direction)

    def pose(self, camera: str, t_s: float) -> tuple[F64, F64]:
        """global_from_camera rotation (3, 3) and origin (3,)."""
        rotation, translation = self.scene.ego.poses(np.array([t_s]))
        mount = self.rig.poses[camera]
        return rotation[0] @ mount.rotation, rotation[0] @ mount.translation_m + translation[0]

    def view(self, camera: str, t_s: float, *, colour: bool = True) -> View:
        """Render one camera at one instant."""
        rotation, origin = self.pose(camera, t_s)
        matrix = self.rig.intrinsics[camera]
        height, width = self.rig.image_hw_px
        things = self.scene.primitives(t_s, origin[:2], REACH_M)
        seed = (
            self.scene.seed * 31 + self.scene.index * 977 + round(t_s * 1000) * 13 + rigs.CAMERAS.index(camera)
        ) & 0x7FFFFFFF
        depth, which = render.render_depth(things.prims, things.kinds, rotation, origin, matrix, width, height, REACH_M, 5)
        objects = np.where(which >= 0, things.kinds[np.maximum(which, 0), 1], which)
        if not colour:
            return View(depth_m=depth, objects=objects, image=None)
        image = render.shade(
            depth, which, things.prims, things.kinds, things.colours, rotation, origin, matrix, self.scene.ground.cells, CELL_M,
            _GROUND_RGB, *self._shadows(t_s, origin), self.light, self.sky, self._lamp(t_s), seed,
        )  # fmt: skip
        if "rain" in self.scene.weather:
            image = self._drops(image, seed)
        return View(depth_m=depth, objects=objects, image=image)

    def _shadows(self, t_s: float, origin: F64) -> tuple[NDArray[np.uint8], F64]:
        """Ground hidden from the sun about the camera, and the window's lower corner."""
        column, row = (max(int((v - SHADOW_M) / CELL_M), 0) for v in origin[:2])
        side = int(2 * SHADOW_M / CELL_M)
        window = self.still_shadow[row : row + side, column : column + side].copy()
        at = np.array([column * CELL_M, row * CELL_M])
        if self.light[3] > 0.2:
            things = self.scene.primitives(t_s, origin[:2], SHADOW_M)
            actors = things.kinds[:, 1] >= 0
            prims, kinds = things.prims[actors], things.kinds[actors]
            render.paint_shadows(window, at[0], at[1], CELL_M, prims, kinds, self.scene.sun_direction)
        return window, at

    def _lamp(self, t_s: float) -> F64:
        """Headlights at night: place, direction, strength."""
        rotation, translation = self.scene.ego.poses(np.array([t_s]))
        at = rotation[0] @ np.array([3.6, 0.0, 0.7]) + translation[0]
        strength = 1.5 if "night" in self.scene.weather else 0.0
        return np.array([*at, rotation[0, 0, 0], rotation[0, 1, 0], strength])

    def _drops(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Streaks of falling rain and a few blurred drops on the lens."""
        rng = random_stream(seed, self.scene.index, "drops")
        height, width = image.shape[:2]
        out = image.astype(np.int16)
        for u, v in zip(rng.integers(0, width, width // 4), rng.integers(0, height, width // 4), strict=True):
            length = max(3, height // 40)
            out[v : v + length, u] += 26
        radius = max(3, height // 45)
        for u, v in zip(rng.integers(0, width, 9), rng.integers(0, height, 9), strict=True):
            patch = out[max(v - radius, 0) : v + radius, max(u - radius, 0) : u + radius]
            patch[:] = (patch + 2 * patch.mean(axis=(0, 1))) / 3
        return np.clip(out, 0, 255).astype(np.uint8)


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) RGB -> JPEG bytes."""
    import simplejpeg

    return bytes(
        simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
    )
