"""A view: cached rows in the arrays, frames and conventions of another model. It computes; it stores nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import MismatchError
from imkd_data.geometry import EGO, GLOBAL, Pose

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["View"]

LIDAR = "LIDAR"


class View:
    """One form of a cache's rows. Subclasses set ``name``, ``needs`` and ``lidar_frame`` and give ``sample``.

    needs: fields without which nothing can be given. lidar_frame: positions and times are relative to the LiDAR key scan,
    so ``ego`` must be the ego frame at that scan.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    lidar_frame: ClassVar[bool] = True

    def __init__(self, cache: Cache) -> None:
        """Raises MismatchError where the cache cannot give this view, saying which sensor or field it lacks and why."""
        self.cache = cache
        lidar = cache.suite.lidar
        if self.lidar_frame and cache.recipe.reference_channel != lidar:
            raise MismatchError(
                f"view {self.name!r} needs {lidar or 'a LiDAR'} as the reference of the cache",
                rule="view.reference",
                expected=f"ego at the key time of {lidar}: its points, ages and boxes are relative to that scan",
                found=f"ego at the key time of {cache.recipe.reference_channel}",
                next=f"build with --sensors that include {lidar}, or use view('raw')",
            )
        missing = [n for n in self.needs if n not in cache.fields]
        if missing:
            raise MismatchError(
                f"view {self.name!r} needs fields that the cache lacks",
                rule="view.fields",
                expected=", ".join(self.needs),
                found=f"no {', '.join(missing)}",
                next=f"imkd-data build --update --fields {','.join(missing)}",
            )

    def sample(self, row: int) -> dict[str, Any]:
        """The arrays of one row."""
        raise TypeError(f"{type(self).__name__} gives no sample")  # pragma: no cover  (subclasses do)

    def dataset(self, split: str | None = None, rows: Iterable[int] | None = None) -> Any:
        """A torch Dataset of ``sample`` dicts over the rows of a split, or over ``rows`` (default: all rows of the
        cache). It can be pickled, so DataLoader workers may be forked or spawned."""
        from imkd_data.views.dataset import ViewDataset

        chosen = self.cache.rows(split) if rows is None else list(rows)
        return ViewDataset(self, np.asarray(chosen, dtype=np.int64))

    # ---- frames ---------------------------------------------------------------------------------------------------------

    def has(self, field: str) -> bool:
        """Whether the cache holds a field."""
        return field in self.cache.fields

    def fact(self, row: int, column: str) -> Any:
        """One value of the index."""
        return self.cache.index[column][self.cache.line(row)].as_py()

    def global_from_ego(self, row: int) -> Pose:
        """Ego at the key time in the world."""
        return Pose.from_matrix34(GLOBAL, EGO, self.cache.read("sample_pose", row)[0])

    def ego_from_lidar(self, row: int) -> Pose:
        """The LiDAR key scan's frame in ego."""
        return Pose.from_matrix34(EGO, LIDAR, self.cache.read("sample_pose", row)[1])

    def cameras(self, row: int) -> dict[str, tuple[NDArray[np.float64], Pose, Pose, float]]:
        """Per camera that the row has: image_from_camera of the full image, ego_from_camera (own time), the mounting, age."""
        values = self.cache.decode("camera_calibration", row)
        out = {}
        for i, name in enumerate(self.cache.suite.cameras):
            if np.isfinite(values["age_s"][i]):
                ego = Pose.from_matrix34(EGO, name, values["ego_from_camera"][i])
                mounting = Pose.from_matrix34(f"{name} vehicle", name, values["vehicle_from_camera"][i])
                out[name] = values["image_from_camera"][i], ego, mounting, float(values["age_s"][i])
        return out

    def depth(self, row: int) -> dict[str, NDArray[np.float32]]:
        """Per camera (n, 3) u, v in the full image, depth."""
        views = self.cache.decode("depth_points", row)
        return {name: views[i] for i, name in enumerate(self.cache.suite.cameras) if name in self.cameras(row)}

    def matrix4(self, k: NDArray[np.float64]) -> NDArray[np.float64]:
        """(3, 3) -> (4, 4)."""
        out = np.eye(4)
        out[:3, :3] = k
        return out
