"""Fields: named, versioned, pure functions from a sample's payload to bytes. The list of fields is the cache."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from imkd_data.errors import UsageError
from imkd_data.fields.base import CacheField, Stored
from imkd_data.fields.boxes import BOX_FIELDS
from imkd_data.fields.calibration import CALIBRATION_FIELDS
from imkd_data.fields.depth import DEPTH_FIELDS
from imkd_data.fields.images import IMAGE_FIELDS
from imkd_data.fields.lidar import LIDAR_FIELDS
from imkd_data.fields.radar import RADAR_FIELDS

__all__ = ["FIELDS", "PROFILES", "CacheField", "Stored", "fields_by_name"]

# Upstream fields stand before those that are made from them.
FIELDS: tuple[CacheField, ...] = (*LIDAR_FIELDS, *DEPTH_FIELDS, *RADAR_FIELDS, *CALIBRATION_FIELDS, *BOX_FIELDS, *IMAGE_FIELDS)

_PLANES = ("lidar_bev_sum", "lidar_bev_count", "lidar_bev_max", "lidar_bev_z_of_max")
_SMALL = (
    *("lidar_intensity", "depth_points", "depth_intensity", "depth_count", "radar_points", "radar_pose"),
    *("camera_calibration", "sample_pose", "boxes", "images"),
)
PROFILES = MappingProxyType(
    {
        "compact": (*_PLANES, *_SMALL),
        "student": (*_PLANES, *_SMALL),
        "standard": (*_PLANES, *_SMALL, "lidar_points"),
        "full": (*_PLANES, *_SMALL, "lidar_points", "lidar_provenance"),
    }
)


def fields_by_name(names: Iterable[str], extra: Iterable[CacheField] = ()) -> dict[str, CacheField]:
    """The named fields in list order (upstream first); ``extra`` are fields from outside, placed after ours.

    Raises UsageError for an unknown name, or an extra field that has the name of one of ours.
    """
    known = {f.name: f for f in FIELDS}
    for field in extra:
        if field.name in known and known[field.name] is not field:
            raise UsageError(f"field {field.name!r} exists already", rule="field.name", next="give the field another name")
        known[field.name] = field
    wanted = list(names)
    unknown = [n for n in wanted if n not in known]
    if unknown:
        raise UsageError("unknown field", rule="field.unknown", expected=", ".join(known), found=", ".join(unknown))
    return {name: field for name, field in known.items() if name in wanted}
