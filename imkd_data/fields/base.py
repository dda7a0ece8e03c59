"""A field: a named, versioned, pure function from one sample's payload to an array or to named bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from imkd_data.recipe import Recipe
from imkd_data.sample import Payload, SensorSuite

__all__ = ["CacheField", "Stored"]

# One row: an array of the declared shape and dtype, or blob parts {"cam_front.jpg": bytes, ...}.
Stored = NDArray[Any] | dict[str, bytes]


def _no_attributes(recipe: Recipe, suite: SensorSuite) -> dict[str, Any]:
    return {}  # a named function, so that fields can be pickled


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheField:
    """One column of the cache.

    kind: ``array`` (fixed shape, Zarr) or ``blob`` (named bytes, tar). uses: recipe entries that change the bytes.
    needs: what the bytes depend on beside the sample's pose: payload parts (images, lidar, lidar_key = its key scan alone,
    radar) and parts that stand in the tables (cameras = their calibration and poses, boxes); () = the pose only.
    sensors: which declared sensors must exist ("lidar", "camera", "radar"). upstream: fields whose rows are given to
    compute instead of raw data.
    codec: ``zstd1`` | ``blosc3`` (byte shuffle + zstd 3) | ``none``. compute(payload, recipe, suite, upstream, drops) ->
    Stored; it may add to ``drops`` (counts by reason). unpack(parts, suite) -> what ``Cache.read`` gives for a blob (its
    arrays or bytes by sensor name; None: the parts as they are). decode(value, recipe, suite) -> physical arrays, from the
    array or from what unpack gave.
    attributes(recipe, suite): frame, units, scale, offset, columns, grid, ... written to the array's metadata.
    """

    name: str
    version: int
    kind: Literal["array", "blob"]
    space: Literal["bev", "image", "none"]
    uses: tuple[str, ...]
    compute: Callable[[Payload, Recipe, SensorSuite, Mapping[str, Stored], dict[str, int]], Stored]
    needs: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    dtype: np.dtype[Any] | None = None
    shape: Callable[[Recipe, SensorSuite], tuple[int, ...]] | None = None
    codec: Literal["zstd1", "blosc3", "none"] = "zstd1"
    unpack: Callable[[Mapping[str, bytes], SensorSuite], Any] | None = None
    decode: Callable[[Any, Recipe, SensorSuite], Any] | None = None
    attributes: Callable[[Recipe, SensorSuite], dict[str, Any]] = field(default=_no_attributes)
