"""What a stream is asked for: parts of a batch, the fields they need, and a check that the cache holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imkd_data.errors import MismatchError, MissingFeatureError, RecipeError, UsageError
from imkd_data.fields.radar import RADAR_FILTERS
from imkd_data.geometry import BevGrid
from imkd_data.loader.augment import IDENTITY, AugmentConfig

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = [
    "LIDAR_FEATURES",
    "LOADER_PARITY",
    "PARTS",
    "PLANES",
    "RADAR_FILTERS",
    "StreamRequest",
    "available_parts",
    "check_request",
    "normalised_parts",
]

PLANES: tuple[str, ...] = ("lidar_bev_sum", "lidar_bev_count", "lidar_bev_max", "lidar_bev_z_of_max")

# Part of a batch -> fields of the cache. Any other field of the cache may be named too: BEV fields arrive in bev_maps.
PARTS: Mapping[str, tuple[str, ...]] = {
    "images": ("images", "camera_calibration"),
    "depth": ("depth_points", "depth_count"),
    "radar_points": ("radar_points",),
    "lidar_points": ("lidar_points",),
    "lidar_intensity": ("lidar_intensity",),
    "intensity_planes": PLANES,
    "boxes": ("boxes",),
}
_PART_OF = {"depth_points": "depth", "depth_count": "depth", **dict.fromkeys(PLANES, "intensity_planes")}
_ALWAYS = ("camera_calibration",)
LIDAR_FEATURES: tuple[str, ...] = ("intensity", "ring")  # columns of every LiDAR batch that asks for no others
_LIDAR_COLUMNS = (*LIDAR_FEATURES, "near_m")

# Named departures of public code that live in what a batch holds (those of CRN's network: ``CRN_PARITY``). CRN's:
# ego_frame: each camera lifts into the ego frame of its own time, the truth stands in the mean of these frames.
# flip: a mirrored image's geometry follows u -> W - u, its pixels W - 1 - u. depth_collision: of the points in one pixel the
# last one stored counts, not the nearest. CRKD's: augment: the BEV augmentation turns the radar's (RCS, vx) instead of
# (vx, vy). paste: LiDAR objects of other samples, which no image and no radar scan shows, stand in the truth of camera-radar
# students too (``Run.pastes``: the trainer gives the reader its bank).
LOADER_PARITY: tuple[str, ...] = (
    "depth_collision:last",
    "ego_frame:mean_camera",
    "flip:w_minus_u",
    "augment:rcs_vx",
    "paste:students",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """Everything that decides the content of a batch besides the order.

    parts: names from PARTS, or BEV fields of the cache. history: keyframe offsets, newest first. image_hw_px: size of
    delivered images. grid: grid of ``lidar_intensity``. radar_features: columns of the radar batch (``rcs_dbsm`` = the
    raw ``rcs``). lidar_features: columns of the LiDAR batch, see ``PointBatch``. lidar_sweeps, radar_sweeps: newest scans
    used, 0 = all stored. intensity_from: planes | view. parity: names from LOADER_PARITY.
    """

    parts: tuple[str, ...]
    grid: BevGrid
    image_hw_px: tuple[int, int]
    history: tuple[int, ...] = (0,)
    augment: AugmentConfig = field(default=IDENTITY)
    radar_filter: str = "crn"
    radar_features: tuple[str, ...] = ("rcs_dbsm",)
    radar_sweeps: int = 0
    lidar_features: tuple[str, ...] = LIDAR_FEATURES
    lidar_sweeps: int = 0
    intensity_from: str = "planes"
    parity: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.history or self.history[0] != 0 or any(o > 0 for o in self.history):
            raise UsageError("history starts with 0 and goes into the past", expected="(0, -2)", found=str(self.history))
        if self.radar_filter not in RADAR_FILTERS:
            raise UsageError("unknown radar filter", expected=", ".join(RADAR_FILTERS), found=self.radar_filter)
        if unknown := [n for n in self.lidar_features if n not in _LIDAR_COLUMNS]:
            raise UsageError("unknown LiDAR column", expected=", ".join(_LIDAR_COLUMNS), found=", ".join(unknown))
        if self.intensity_from not in ("planes", "view"):
            raise UsageError("intensity_from", expected="planes or view", found=self.intensity_from)
        if unknown := [n for n in self.parity if n not in LOADER_PARITY]:
            raise UsageError("unknown loader.parity", expected=", ".join(LOADER_PARITY), found=", ".join(unknown))

    @property
    def needs_planes(self) -> bool:
        """Whether the fine planes are read: asked for, or needed to move or regrid ``lidar_intensity``."""
        moved = "lidar_intensity" in self.parts and self.augment.enabled and self.intensity_from == "planes"
        return "intensity_planes" in self.parts or moved

    def fields(self, recipe_grid: BevGrid | None = None) -> tuple[str, ...]:
        """Fields of the cache that are read. recipe_grid: the stored view's grid; another one needs the planes."""
        names: list[str] = []
        for part in self.parts:
            names += PARTS.get(part, (part,))
        if self.needs_planes or ("lidar_intensity" in self.parts and recipe_grid not in (None, self.grid)):
            names = [n for n in names if n != "lidar_intensity"] + list(PLANES)
        return tuple(dict.fromkeys(names))


def normalised_parts(names: Iterable[str]) -> tuple[str, ...]:
    """Parts, given parts or field names; calibration always comes with the images."""
    return tuple(dict.fromkeys(_PART_OF.get(n, n) for n in names if n not in _ALWAYS))


def available_parts(cache: Cache) -> tuple[str, ...]:
    """The parts of which the cache holds every field, fine planes left out (they are read where they are needed), and images
    of which it holds only the names."""
    apart = {"intensity_planes"} | ({"images"} if cache.recipe.images_mode == "reference" else set())
    return tuple(p for p, needed in PARTS.items() if p not in apart and all(n in cache.fields for n in needed))


def check_request(cache: Cache, request: StreamRequest) -> None:
    """Errors: MissingFeatureError naming the field and the command that adds it; RecipeError, MismatchError."""
    recipe = cache.recipe
    needed = request.fields(recipe.view_grid)
    missing = [n for n in needed if n not in cache.fields]
    if missing:
        optional = {"lidar_intensity": PLANES}
        why = "; moving lidar_intensity with the BEV augmentation reads the fine planes" if set(missing) & set(PLANES) else ""
        raise MissingFeatureError(
            f"the cache has no {', '.join(missing)}{why}",
            rule="loader.fields",
            expected=", ".join(needed),
            found=", ".join(sorted(set(cache.fields) & (set(needed) | set(optional)))) or "none of them",
            next=f"imkd-data build --out {cache.path} --fields {','.join(missing)} --update (with the --dataroot of the build)",
        )
    if "images" in request.parts and recipe.images_mode == "reference":
        raise MissingFeatureError(
            "the cache refers to image files and does not hold images",
            rule="loader.images",
            next=f"imkd-data build --out {cache.path} --images scaled --update",
        )
    maps = [p for p in request.parts if p not in PARTS]
    for name in maps:
        one = cache.fields[name]
        planar = one.shape is not None and len(one.shape(recipe, cache.suite)) == 3  # (C, Y, X) of a field from outside
        if one.kind != "array" or not (one.space == "bev" or (one.space == "none" and planar)):
            raise UsageError(f"field {name} is no BEV map, so a batch has no place for it", expected=", ".join(PARTS))
    if maps and request.augment.enabled:
        raise MismatchError(
            f"stored maps ({', '.join(maps)}) hold for the unaugmented frame only",
            found="augmentation on",
            next="switch it off (--set augment.enabled=off), or let the network compute these maps",
        )
    if {"lidar_intensity", "intensity_planes"} & set(request.parts):
        _check_grid(recipe.grid, request.grid)


def _check_grid(fine: BevGrid, grid: BevGrid) -> None:
    if grid.cell_mm % fine.cell_mm:
        raise RecipeError(
            "the grid's cells are no multiple of the stored planes' cells",
            expected=f"k * {fine.cell_mm} mm",
            found=f"{grid.cell_mm} mm",
        )
