"""``open_cache``: a cache with everything that can be asked of it. The store itself knows neither views nor maps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.cache import remote, store
from imkd_data.fields.base import CacheField
from imkd_data.geometry import BevGrid

if TYPE_CHECKING:
    from imkd_data.views import View
    from imkd_data.views.intensity import IntensityMap

__all__ = ["Cache", "open_cache"]


class Cache(store.Cache):
    """A cache opened for reading, with views for other models and maps on other grids."""

    def view(self, kind: str | Callable[..., View], **options: Any) -> View:
        """Rows as another model takes them: ``cache.view("crn").sample(row)``, ``.dataset("train")``. See ``imkd_data.views``.

        Raises UsageError for an unknown view, MismatchError where the cache cannot give it (it says which sensor is missing).
        """
        from imkd_data.views import open_view

        return open_view(self, kind, **options)

    def intensity(self, row: int, grid: BevGrid | None = None, reduce: str = "max", frame: str = "ego") -> IntensityMap:
        """LiDAR intensity on any grid: reduce = max, mean, sum, count or z (of the strongest return); frame = ego or lidar.

        Exact where the grid's cells are whole stored cells, else resampled; ``.exact`` and ``.note`` of the result say which.
        """
        from imkd_data.views.intensity import intensity_map

        return intensity_map(self, row, grid, reduce, frame)

    def intensity_image(self, row: int, camera: str, hw_px: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(intensity 0..255, depth in metres), each (H, W), of the LiDAR key scan in one resized camera image."""
        from imkd_data.views.intensity import intensity_image

        return intensity_image(self, row, camera, hw_px)

    def where(self, expression: Any) -> NDArray[np.int64]:
        """Rows by a condition over the index: SQL (``"location like 'singapore%' and num_radar > 50"``) or a
        ``pyarrow.compute`` expression. What can be written: ``imkd_data.cache.select.select``.

        Raises UsageError for what cannot be read and for unknown columns, in one line that says what there is.
        """
        return self.select(expression)


class RemoteCache(remote.RemoteCache, Cache):
    """The same at a URL: shards are fetched, checked and kept in a bounded local store when they are first read."""


def open_cache(
    path: str | os.PathLike[str], *, check: bool = True, fields: Iterable[CacheField] = (), only: Sequence[str] | None = None
) -> Cache | RemoteCache:
    """Open a finished cache, a folder or a URL that fsspec knows; needs no raw data.

    See ``imkd_data.cache.store.open_cache`` for arguments and errors.
    """
    if isinstance(path, str) and remote.is_url(path):
        return remote.open_remote(path, fields=fields, kind=RemoteCache)  # type: ignore[return-value]
    cache = Cache(Path(path), tuple(fields))
    if check:
        cache.check_sizes(only)
    return cache
