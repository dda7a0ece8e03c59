"""The recipe: everything that decides what a cache holds. Saved as JSON in the cache; unknown keys are errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from imkd_data.errors import RecipeError
from imkd_data.geometry import BevGrid

__all__ = ["Recipe", "canonical_json"]

# Whole numbers from 1 -> the largest that can be stored.
_LARGEST = {
    "view_cells": 1 << 16,
    "jpeg_quality": 100,
    "lidar_sweeps": 1 << 8,  # numbers of sweeps have 8 bits
    "radar_sweeps": 1 << 15,  # and those of radars 16 with a sign
    "rows_per_shard": (1 << 31) - 1,
    "depth_width": (1 << 16) - 1,  # counts of points have 16 bits
    "boxes_width": (1 << 31) - 1,
}
_LARGEST_SIDE_PX = 65_500  # of libjpeg
_FARTHEST_M = 1e6
PLANE_GRID = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=0.2, nx=512, ny=512)


def canonical_json(value: Any) -> bytes:
    """The one JSON form of a value: sorted keys, no spaces, UTF-8, no NaN, a newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _is_json(value: Mapping[Any, Any]) -> bool:
    try:
        canonical_json(dict(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return all(isinstance(name, str) for name in value)


def _is_grid(grid: BevGrid) -> bool:
    whole = all(type(n) is int for n in (grid.nx, grid.ny))
    return whole and all(map(_is_length, (grid.x_min_m, grid.y_min_m, grid.cell_m))) and grid.cell_mm > 0


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FARTHEST_M


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What was asked for, fully resolved. Holds no path, time or host, so a moved cache keeps its identity.

    grid: finest BEV cells (exact planes). view_cells: plane cells per cell of ``lidar_intensity`` (4 -> 0.8 m).
    sensors: declared channels in suite order. scenes: explicit subset of the splits' scenes, () = all.
    image_hw_px: stored image size for ``images_mode`` scaled. own_car_box_m: x0, x1, y0, y1, z0, z1 in ego, returns
    inside are left out of the BEV planes. z_min_m, z_span_m: height coding of ``lidar_bev_z_of_max``.
    """

    dataset: str = "nuscenes"
    version: str
    splits: tuple[str, ...]
    scenes: tuple[str, ...] = ()
    sensors: tuple[str, ...]
    reference_channel: str
    fields: tuple[str, ...]
    grid: BevGrid = PLANE_GRID
    view_cells: int = 4
    image_hw_px: tuple[int, int] = (495, 880)
    images_mode: str = "scaled"  # scaled | original | reference
    jpeg_quality: int = 90
    lidar_sweeps: int = 10
    radar_sweeps: int = 13
    rows_per_shard: int = 128
    depth_width: int = 6144
    boxes_width: int = 256
    own_car_box_m: tuple[float, float, float, float, float, float] = (-1.5, 3.5, -1.2, 1.2, -0.5, 2.2)
    z_min_m: float = -3.0
    z_span_m: float = 8.0
    options: Mapping[str, Any] = field(default_factory=dict)  # entries of fields that come from outside

    def __post_init__(self) -> None:
        modes = ("scaled", "original", "reference")
        self._check("images_mode", self.images_mode in modes, ", ".join(modes))
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            self._check(name, type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most:,}")
        for name in ("dataset", "version", "reference_channel"):
            self._check(name, isinstance(getattr(self, name), str), "a name")
        for name in ("splits", "scenes", "sensors", "fields"):
            value = getattr(self, name)
            self._check(name, isinstance(value, tuple) and all(isinstance(n, str) for n in value), "a list of names")
        size, car = self.image_hw_px, self.own_car_box_m
        sides = isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and 0 < n <= _LARGEST_SIDE_PX for n in size)
        self._check("image_hw_px", sides, f"height x width in pixels, at most {_LARGEST_SIDE_PX:,}, e.g. 396x704")
        six = isinstance(car, tuple) and len(car) == 6 and all(map(_is_length, car))
        self._check("own_car_box_m", six, "six numbers in metres: x0, x1, y0, y1, z0, z1")
        self._check("z_min_m", _is_length(self.z_min_m), "a number in metres")
        # Whole millimetres decide, so less than one is none.
        self._check("z_span_m", _is_length(self.z_span_m) and self.z_span_m >= 0.001, "a number of metres above 0")
        self._check("options", isinstance(self.options, Mapping) and _is_json(self.options), "an object of JSON values")
        self._check("grid", isinstance(self.grid, BevGrid) and _is_grid(self.grid), "whole nx and ny, lengths in metres")
        self.view_grid  # noqa: B018  (refuses a view that does not pool)

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise RecipeError(f"recipe has a wrong {name}", expected=expected, found=repr(getattr(self, name))[:120])

    @property
    def view_grid(self) -> BevGrid:
        """Grid of the trainer's ``lidar_intensity`` view."""
        return self.grid.coarser(self.view_cells)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        out = asdict(self)
        out["grid"] = self.grid.as_dict()
        out["options"] = dict(self.options)
        return json.loads(canonical_json(out))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Recipe:
        """From the JSON form; unknown or missing keys and values that cannot be meant are errors naming them."""
        if not isinstance(value, Mapping):
            raise RecipeError("recipe is not a JSON object", found=repr(value)[:80])
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise RecipeError("recipe has unknown keys", expected=", ".join(sorted(known)), found=", ".join(unknown))
        kwargs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        try:
            if "grid" in kwargs:
                kwargs["grid"] = BevGrid(**kwargs["grid"])
            return cls(**kwargs)
        except RecipeError:
            raise
        except (TypeError, ValueError, OverflowError) as error:  # of the grid: its own checks expect numbers
            raise RecipeError(f"recipe cannot be read: {error}") from error

    def with_values(self, **changes: Any) -> Recipe:
        """A changed copy."""
        return replace(self, **changes)
