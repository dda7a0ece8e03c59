"""What public loaders do to a sample where imkd departs from them: the arithmetic behind names of ``LOADER_PARITY``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["released_frames", "turn_rcs_vx"]

F64 = NDArray[np.float64]


def turn_rcs_vx(part: dict[str, Any], rcs_dbsm: F64, velocity_N2: F64, bev: F64, rcs_columns: Sequence[int]) -> None:
    """What CRKD's released augmentation does to a radar cloud: its linear part acts on (RCS, vx), and vy is left as it was.
    Places are those of the right velocities, which the released code had moved by before: networks here move them by what
    ``velocity`` says, so ``xyz`` takes the difference. velocity_N2: before augmentation."""
    turned = np.stack([rcs_dbsm, velocity_N2[:, 0]], axis=1) @ bev[:2, :2].T
    spoiled = np.stack([turned[:, 1], velocity_N2[:, 1]], axis=1).astype(np.float32)
    part["xyz"][:, :2] += (part["velocity"] - spoiled) * part["age"][:, None]
    part["velocity"] = spoiled
    for column in rcs_columns:
        part["features"][:, column] = turned[:, 0]


def released_frames(ego_from_camera_V44: F64, own_ego_from_camera_V44: F64) -> F64:
    """(V, 4, 4): what CRN's released frames do to places in ego. A place that a camera saw is left in the ego frame of that
    camera's own time, and the truth is moved to the mean of these frames; here the truth stays and the places move."""
    own = ego_from_camera_V44 @ np.linalg.inv(own_ego_from_camera_V44)  # ego from ego at its own time
    mean: F64 = own.mean(0)
    u, _, vt = np.linalg.svd(mean[:3, :3])
    mean[:3, :3] = u @ vt  # the nearest rotation
    shift: F64 = mean @ np.linalg.inv(own)
    return shift
