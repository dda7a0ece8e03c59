"""Views and exports: the same rows in the form other code bases read. A view from outside is passed as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from imkd_data.errors import UsageError
from imkd_data.views.base import View
from imkd_data.views.bevfusion import BevFusionView, RcBevDetView
from imkd_data.views.crn import BevDepthView, CrnView
from imkd_data.views.lidar import Mmdet3dView, OpenPcdetView, RawView

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["EXPORTS", "VIEWS", "View", "open_view"]

VIEWS: Mapping[str, type[View]] = {
    "crn": CrnView,
    "bevdepth": BevDepthView,
    "bevfusion": BevFusionView,
    "crkd": BevFusionView,
    "rcbevdet": RcBevDetView,
    "mmdet3d": Mmdet3dView,
    "openpcdet": OpenPcdetView,
    "raw": RawView,
}


def _lazy(module: str, name: str) -> Callable[..., int]:
    def export(*args: Any, **kwargs: Any) -> int:
        from importlib import import_module  # readers and pyarrow are not needed to open a view

        done: int = getattr(import_module(f"imkd_data.{module}"), name)(*args, **kwargs)
        return done

    return export


# export(cache, out, rows=..., dataroot=..., as_released=..., progress=...) -> number of files
EXPORTS: Mapping[str, Callable[..., int]] = {
    "crn": _lazy("views.export_crn", "export_crn"),
    "bevdepth": _lazy("views.export_crn", "export_bevdepth"),
    "bevfusion": _lazy("views.export_infos", "export_bevfusion"),
    "mmdet3d": _lazy("views.export_infos", "export_mmdet3d"),
    "webdataset": _lazy("cache.export", "export_webdataset"),
    "parquet": _lazy("cache.export", "export_parquet"),
}


def open_view(cache: Cache, kind: str | Callable[..., View], **options: Any) -> View:
    """A view by name, or one of your own (a ``View`` class or a function that gives one).

    Raises UsageError for an unknown name or option, MismatchError where the cache cannot give the view.
    """
    if isinstance(kind, str) and kind not in VIEWS:
        raise UsageError("unknown view", rule="view.unknown", expected=", ".join(VIEWS), found=kind)
    make = VIEWS[kind] if isinstance(kind, str) else kind
    try:
        return make(cache, **options)
    except TypeError as error:
        raise UsageError(f"view cannot be made: {error}", rule="view.options", found=", ".join(options)) from error
