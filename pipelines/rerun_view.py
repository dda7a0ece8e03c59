"""A scene as a Rerun recording (``.rrd``): cameras, LiDAR, radar, boxes, BEV intensity over time. Optional extra ``rerun``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import SourceMissingError, UsageError
from imkd_data.sample import Boxes
from pipelines.sample_view import SampleView, read_view

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["log_scene"]

_PALETTE = np.array(
    [
        *([255, 158, 0], [255, 99, 71], [233, 150, 70], [255, 69, 0], [255, 140, 0]),
        *([112, 128, 144], [255, 61, 99], [220, 20, 60], [0, 0, 230], [47, 79, 79]),
    ],
    dtype=np.uint8,
)


def _rerun() -> Any:
    try:
        import rerun
    except ImportError as error:
        raise SourceMissingError(
            "Rerun is not installed", expected="the optional extra rerun", next="pip install 'imkd[rerun]'"
        ) from error
    return rerun


def log_scene(cache: Cache, out: Path, *, scene: str | None = None, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write one scene of a cache (default: the first) to ``out``; open it with ``rerun FILE``. Frame ego, metres.

    Raises:
        SourceMissingError: the extra is not installed. UsageError: unknown scene.
    """
    rr = _rerun()
    names = list(dict.fromkeys(cache.index["scene"].to_pylist()))
    if scene is not None and scene not in names:
        raise UsageError("the cache holds no such scene", expected=", ".join(names[:20]), found=scene)
    chosen = scene or names[0]
    rows = cache.rows(scenes=[chosen])
    recording = rr.new_recording(application_id="imkd", recording_id=f"{cache.id[:12]}-{chosen}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rr.save(str(out), recording=recording)
    rr.log("ego", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True, recording=recording)
    for i, row in enumerate(rows.tolist()):
        view = read_view(cache, row)
        rr.set_time_nanos("time", view.timestamp_us * 1000, recording=recording)
        rr.set_time_sequence("keyframe", i, recording=recording)
        _log_sample(rr, recording, cache, row, view)
        if progress is not None:
            progress(i + 1, len(rows))
    recording.flush()
    return out


def _log_sample(rr: Any, recording: Any, cache: Cache, row: int, view: SampleView) -> None:
    def log(path: str, value: Any) -> None:
        rr.log(path, value, recording=recording)

    for one in view.cameras:
        camera, path = one.camera, f"ego/{one.camera.name}"
        pose = camera.ego_from_camera
        log(path, rr.Transform3D(translation=pose.translation_m, mat3x3=pose.rotation))
        size = [camera.width_px, camera.height_px]
        log(path, rr.Pinhole(image_from_camera=camera.image_from_camera, resolution=size, camera_xyz=rr.ViewCoordinates.RDF))
        log(path, rr.Image(one.image).compress(jpeg_quality=85))
    if "lidar_points" in cache.fields:
        points = cache.decode("lidar_points", row)
        shade = np.clip(40 + 215 * np.sqrt(np.asarray(points["intensity"]) / cache.suite.reflectance_max), 0, 255).astype(
            np.uint8
        )
        log("ego/lidar", rr.Points3D(points["xyz_m"], colors=np.repeat(shade[:, None], 3, axis=1), radii=0.03))
    if view.radar is not None:
        vx, vy = (view.radar.get(k, np.zeros(len(view.radar["x"]))) for k in ("vx_comp", "vy_comp"))
        log("ego/radar", rr.Points3D(view.radar["xyz_m"], colors=[0, 220, 255], radii=0.15))
        arrows = np.stack([vx, vy, np.zeros_like(vx)], axis=1)
        log("ego/radar/velocity", rr.Arrows3D(origins=view.radar["xyz_m"], vectors=0.5 * arrows, colors=[255, 0, 255]))
    if view.truth is not None:
        log("ego/truth", _boxes(rr, view.truth))
    if view.intensity is not None:
        log("bev/intensity", rr.DepthImage(view.intensity.T[::-1, ::-1].astype(np.float32)))


def _boxes(rr: Any, boxes: Boxes) -> Any:
    keep = boxes.label >= 0
    half = boxes.yaw_rad[keep] / 2
    zero = np.zeros_like(half)
    return rr.Boxes3D(
        centers=boxes.centre_m[keep],
        half_sizes=boxes.size_lwh_m[keep] / 2,
        quaternions=np.stack([zero, zero, np.sin(half), np.cos(half)], axis=1),
        colors=_PALETTE[boxes.label[keep]],
        labels=[DETECTION_CLASSES[i] for i in boxes.label[keep]],
    )
