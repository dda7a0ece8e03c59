"""Camera images: scaled JPEG, the original bytes, or a reference to the raw file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import InputDataError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.recipe import Recipe, canonical_json
from imkd_data.sample import ImageFrame, Payload, SensorSuite

__all__ = ["IMAGE_FIELDS", "scaled_jpeg"]


def scaled_jpeg(data: bytes, hw_px: tuple[int, int], quality: int) -> bytes:
    """JPEG -> JPEG of another size (4:2:0, so that every decoder is quick). ValueError when it does not decode."""
    return _encoded(_resized(data, hw_px), quality)


def _resized(data: bytes, hw_px: tuple[int, int]) -> NDArray[np.uint8]:
    """JPEG -> pixels of another size. ValueError when it does not decode.

    The decoder already halves and more on the way (n/8 of the size, the smallest n that is still large enough). That size
    is rarely whole, so the last row may reach past the picture: the resize then takes the exact fraction, else everything
    shifts by up to a pixel (12 dB). More than 47 dB away from a full decode and bicubic resize before encoding.
    """
    import simplejpeg
    from PIL import Image

    height, width = hw_px
    full_height, full_width, _, _ = simplejpeg.decode_jpeg_header(data)
    n = min(8, max(1, -(-8 * height // full_height), -(-8 * width // full_width)))
    decoded_hw = (-(-full_height * n // 8), -(-full_width * n // 8))
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=decoded_hw[0], min_width=decoded_hw[1], min_factor=1)
    if pixels.shape[:2] != decoded_hw:
        pixels, n = simplejpeg.decode_jpeg(data, "RGB"), 8
    if pixels.shape[:2] != (height, width) or n < 8:
        whole = (0.0, 0.0, full_width * n / 8, full_height * n / 8)
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=whole))
    return np.ascontiguousarray(pixels)


def _encoded(pixels: NDArray[np.uint8], quality: int) -> bytes:
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420"))


def _compute(
    payload: Payload, recipe: Recipe, suite: SensorSuite, upstream: Mapping[str, Stored], drops: dict[str, int]
) -> Stored:
    """One part a camera: <channel>.jpg, or <channel>.json with path and crc32c for images_mode = reference."""
    out: dict[str, bytes] = {}
    for frame in payload.sample.cameras:
        name = frame.camera.name
        data = (payload.images or {})[name]
        if recipe.images_mode == "reference":
            value = {"path": frame.path, "crc32c": f"{google_crc32c.value(data):08x}", "bytes": len(data)}
            out[f"{name.lower()}.json"] = canonical_json(value)
        elif recipe.images_mode == "original":
            out[f"{name.lower()}.jpg"] = data
        else:
            out[f"{name.lower()}.jpg"] = _scaled(data, recipe, payload, frame)
    return out


def _scaled(data: bytes, recipe: Recipe, payload: Payload, frame: ImageFrame) -> bytes:
    try:
        pixels = _resized(data, recipe.image_hw_px)
    except ValueError as error:
        raise InputDataError(
            "camera image does not decode",
            rule="image.decode",
            expected="a whole JPEG",
            found=str(error)[:200],
            file=frame.path,
            token=payload.sample.token,
            scene=payload.sample.scene,
            channel=frame.camera.name,
            next="re-extract the file, then run the same command; or add --on-error quarantine",
        ) from error
    return _encoded(pixels, recipe.jpeg_quality)


def _unpack(parts: Mapping[str, bytes], suite: SensorSuite) -> dict[str, bytes]:
    """{camera name: bytes} in suite order: JPEG, or canonical JSON for references."""
    return {c: parts[p] for c in suite.cameras for p in (f"{c.lower()}.jpg", f"{c.lower()}.json") if p in parts}


def _decode(value: Mapping[str, bytes], recipe: Recipe, suite: SensorSuite) -> dict[str, NDArray[np.uint8] | dict[str, Any]]:
    """{camera name: (H, W, 3) u8 RGB}; a reference gives its {path, crc32c, bytes}."""
    import simplejpeg

    if recipe.images_mode == "reference":
        return {name: json.loads(data) for name, data in value.items()}
    return {name: simplejpeg.decode_jpeg(data, "RGB") for name, data in value.items()}


def _attributes(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
    size = recipe.image_hw_px if recipe.images_mode == "scaled" else suite.image_hw_px
    return {"frame": "image", "mode": recipe.images_mode, "image_hw_px": list(size), "cameras": list(suite.cameras)}


IMAGE_FIELDS: tuple[CacheField, ...] = (
    CacheField(
        name="images",
        version=1,
        kind="blob",
        space="image",
        uses=("image_hw_px", "images_mode", "jpeg_quality"),
        compute=_compute,
        needs=("images",),
        sensors=("camera",),
        codec="none",
        unpack=_unpack,
        decode=_decode,
        attributes=_attributes,
    ),
)
