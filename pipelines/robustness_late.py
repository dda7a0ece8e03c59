"""Camera images one sweep (about 0.08 s) late, read from the data set: the newest image before each keyframe's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.errors import SourceMissingError
from imkd_data.geometry import rotation_from_quaternion
from imkd_data.loader.augment import IDENTITY, AugmentConfig, draw_images

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from imkd_data.loader.batch import Batch

__all__ = ["late_cameras", "why_no_sweeps"]


def _tables(dataroot: Path, cache: Cache) -> Any:
    from imkd_data.readers.nuscenes_tables import load_tables

    return load_tables(Path(dataroot) / cache.recipe.version)


def why_no_sweeps(dataroot: Path, cache: Cache) -> str:
    """'' where the tree has camera sweeps, else what is missing."""
    first = next(n for n in cache.suite.cameras if n in cache.recipe.sensors)
    folder = Path(dataroot) / "sweeps" / first
    if cache.recipe.dataset != "nuscenes":
        return f"camera sweeps of {cache.recipe.dataset} are not read"
    if not folder.is_dir() or not any(folder.iterdir()):
        return f"the data set has no sweeps/{first}"
    return ""


def _pose(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotation, translation
    return out


def late_cameras(
    dataroot: Path, cache: Cache, image_hw_px: tuple[int, int], augment: AugmentConfig = IDENTITY
) -> Callable[[Batch], Batch]:
    """A change of batches: the current keyframe's images are those of one sweep earlier, with their true poses.

    augment: that of the batches; it holds the scale of images in evaluation. A camera whose keyframe has no earlier image (a
    clip's start) keeps its own.
    """
    import torch

    from imkd_data.loader.deliver import normalised
    from imkd_data.loader.read import decode_image

    t = _tables(dataroot, cache)
    names = [n for n in cache.suite.cameras if n in cache.recipe.sensors]
    sample_row = {token: i for i, token in enumerate(t.sample_token.to_pylist())}
    draw = draw_images(
        augment, full_hw_px=cache.suite.image_hw_px, image_hw_px=image_hw_px, cameras=1, seed=0, epoch=0, position=0
    )[0]

    def late(token: str, name: str, ego_from_global: np.ndarray) -> tuple[torch.Tensor, np.ndarray] | None:
        key = int(t.key_row[sample_row[token], t.channels.index(name)])
        row = int(t.data_prev[key]) if key >= 0 else -1
        if row < 0:
            return None
        path = Path(dataroot) / t.data_filename[row].as_py()
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise SourceMissingError("camera sweep is missing", file=path, token=token, channel=name) from error
        pose = int(t.data_pose[row])
        global_from_ego = _pose(rotation_from_quaternion(t.pose_quaternion[pose]), t.pose_translation[pose])
        mount = int(t.data_cal[row])
        ego_from_camera = _pose(t.cal_rotation[mount], t.cal_translation[mount])
        return decode_image(data, draw), ego_from_global @ global_from_ego @ ego_from_camera

    def change(batch: Batch) -> Batch:
        assert batch.images_BTVCHW is not None and batch.bev_from_camera_BTV44 is not None
        images, poses = batch.images_BTVCHW.clone(), batch.bev_from_camera_BTV44.clone()
        for b, token in enumerate(batch.tokens):
            ego_from_global = np.linalg.inv(batch.global_from_ego_B44[b].cpu().numpy())
            for v, name in enumerate(names):
                found = late(token, name, ego_from_global)
                if found is not None:
                    images[b, 0, v] = normalised(found[0]).to(images)
                    poses[b, 0, v] = torch.from_numpy(found[1]).to(poses)
        return replace(batch, images_BTVCHW=images, bev_from_camera_BTV44=poses)

    return change
