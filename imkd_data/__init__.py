"""imkd_data: raw camera-radar-LiDAR data -> cache -> batches. Public names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "BevGrid": "imkd_data.geometry",
    "Cache": "imkd_data.opened",
    "Recipe": "imkd_data.recipe",
    "open_cache": "imkd_data.opened",
    "stream": "imkd_data.loader.stream",
}

__all__ = ["BevGrid", "Cache", "Recipe", "open_cache", "stream"]


def __getattr__(name: str) -> Any:
    # A submodule of the same name (imkd_data.loader.stream) must not shadow the function, so it is looked up in its module.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
