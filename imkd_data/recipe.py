"""The recipe: everything that decides what a cache holds. Saved as JSON in the cache; unknown keys are errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from imkd_data.errors import RecipeError
from imkd_data.geometry import BevGrid

__all__ = ["Recipe", "canonical_json"]

PLANE_GRID = BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=0.2, nx=512, ny=512)


def canonical_json(value: Any) -> bytes:
    """The one JSON form of a value: sorted keys, no spaces, UTF-8, no NaN, a newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


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
        if self.images_mode not in ("scaled", "original", "reference"):
            raise RecipeError("images_mode", expected="scaled, original or reference", found=self.images_mode)
        if self.rows_per_shard < 1 or self.lidar_sweeps < 1 or self.radar_sweeps < 1:
            raise RecipeError("rows_per_shard, lidar_sweeps and radar_sweeps must be at least 1", found=repr(self))
        size = self.image_hw_px
        if not (isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
            raise RecipeError("image_hw_px", expected="height x width in pixels, e.g. 396x704", found=repr(size))
        self.view_grid  # noqa: B018  (refuses a view that does not pool)

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
        """From the JSON form; unknown or missing keys are errors naming them."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise RecipeError("recipe has unknown keys", expected=", ".join(sorted(known)), found=", ".join(unknown))
        kwargs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        try:
            if "grid" in kwargs:
                kwargs["grid"] = BevGrid(**kwargs["grid"])
            return cls(**kwargs)
        except TypeError as error:
            raise RecipeError(f"recipe cannot be read: {error}") from error

    def with_values(self, **changes: Any) -> Recipe:
        """A changed copy."""
        return replace(self, **changes)
