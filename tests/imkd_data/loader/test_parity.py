"""Released behaviour of CRN's loader, by name: each changes the quantity it names, as the public code does, and no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from memory_cache import MemoryCache, rows_of

from imkd_data.errors import RecipeError, UsageError
from imkd_data.loader.augment import AugmentConfig
from imkd_data.loader.batch import Batch
from imkd_data.loader.deliver import depth_maps
from imkd_data.loader.request import LOADER_PARITY
from imkd_data.loader.stream import stream
from pipelines.guard import batch_tensors
from pipelines.run import LoaderConfig, Run

PARTS = ("images", "depth", "boxes", "radar_points")


class Apart(MemoryCache):
    """The toy's cameras with capture times of their own: the car drove and turned meanwhile."""

    def read(self, name: str, row: int) -> Any:
        value = super().read(name, row)
        if name != "camera_calibration":
            return value
        rng, value = np.random.default_rng(row), value.copy()
        for camera in value:
            turn, meanwhile = rng.normal(0, 0.02), np.eye(4)
            meanwhile[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
            meanwhile[:2, 3] = rng.normal(0, 0.4, 2)
            camera[9:21] = (meanwhile @ pose(camera[21:33]))[:3].reshape(12)
        return value


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> MemoryCache:
    return Apart(tmp_path_factory.mktemp("toy"))


def one(
    cache: MemoryCache, row: int, *parity: str, augment: AugmentConfig | None = None, history: tuple[int, ...] = (0,)
) -> Batch:
    found = stream(cache, 1, rows=[row], shuffle="none", fields=PARTS, augment=augment, history=history, parity=parity)  # type: ignore[arg-type]
    return next(iter(found))


def changed(a: Batch, b: Batch) -> set[str]:
    x, y = batch_tensors(a), batch_tensors(b)
    return {k for k in x | y if not torch.equal(torch.nan_to_num(x[k]), torch.nan_to_num(y[k]))}


def pose(values: np.ndarray) -> np.ndarray:
    return np.vstack([values.reshape(3, 4), [0, 0, 0, 1]])


@pytest.mark.parametrize("history", [(0,), (0, -1)])
def test_cameras_lift_into_the_ego_frame_of_their_own_time_and_truth_stands_in_the_mean(
    cache: MemoryCache, history: tuple[int, ...]
) -> None:
    """Against the public code's own steps: every camera by its pose file through global, truth by the mean of key poses."""
    row = int(rows_of(cache, "train")[2])
    right, released = one(cache, row, history=history), one(cache, row, "ego_frame:mean_camera", history=history)
    assert changed(right, released) == {"bev_from_camera_BTV44"}
    global_from_ego = {t: cache.samples[row + t].global_from_ego.matrix() for t in history}
    stored = {t: cache.read("camera_calibration", row + t) for t in history}
    views = range(right.bev_from_camera_BTV44.shape[2])  # type: ignore[union-attr]
    global_from_own = {
        (t, v): global_from_ego[t] @ pose(stored[t][v, 9:21]) @ np.linalg.inv(pose(stored[t][v, 21:33]))
        for t in history
        for v in views
    }
    key = [np.linalg.inv(global_from_ego[0]) @ global_from_own[0, v] for v in views]  # in ego, where numbers stay small
    ego_from_mean = np.eye(4)
    ego_from_mean[:3, 3] = np.mean([k[:3, 3] for k in key], axis=0)
    u, _, vt = np.linalg.svd(np.mean([k[:3, :3] for k in key], axis=0))
    ego_from_mean[:3, :3] = u @ vt
    moved = 0.0
    for i, t in enumerate(history):
        for v in views:
            lifted = np.linalg.inv(global_from_own[0, v]) @ global_from_own[t, v] @ pose(stored[t][v, 21:33])
            truth_from_camera = np.linalg.inv(ego_from_mean) @ released.bev_from_camera_BTV44[0, i, v].double().numpy()  # type: ignore[index]
            assert np.allclose(truth_from_camera, lifted, atol=1e-4)
            moved = max(moved, float((released.bev_from_camera_BTV44 - right.bev_from_camera_BTV44).abs().max()))  # type: ignore[operator]
    assert moved > 0.1


def test_a_mirrored_image_puts_places_one_pixel_beside_its_content(cache: MemoryCache) -> None:
    row = int(rows_of(cache, "train")[1])
    always = AugmentConfig(image_flip=1.0, rotation_deg=(0.0, 0.0), flip_x=0.0, flip_y=0.0)
    right, released = one(cache, row, augment=always), one(cache, row, "flip:w_minus_u", augment=always)
    assert changed(right, released) == {"image_from_camera_BTV33", "image_maps.depth_BVHW"}
    point = torch.tensor([0.3, -0.2, 5.0])
    u, v = (b.image_from_camera_BTV33[0, 0, 0] @ point / point[2] for b in (right, released))  # type: ignore[index]
    assert v[0] - u[0] == pytest.approx(1.0, abs=1e-4) and v[1] == pytest.approx(float(u[1]), abs=1e-4)
    shifted = right.image_maps["depth_BVHW"][..., :-1]
    assert torch.equal(released.image_maps["depth_BVHW"][..., 1:], shifted) and (shifted > 0).any()
    never = AugmentConfig(image_flip=0.0)
    assert not changed(one(cache, row, augment=never), one(cache, row, "flip:w_minus_u", augment=never))


def test_the_last_point_of_a_pixel_counts_instead_of_the_nearest(cache: MemoryCache) -> None:
    rng = np.random.default_rng(0)
    uvd = np.c_[rng.uniform(-2, 7, (200, 2)), rng.uniform(1, 50, 200)].astype(np.float32)
    batch, view = rng.integers(0, 2, 200), rng.integers(0, 3, 200)
    slow = np.zeros((2, 3, 5, 6), dtype=np.float32)
    for (u, v, d), b, c in zip(uvd, batch, view, strict=True):
        if 0 <= (x := int(np.floor(u + 0.5))) < 6 and 0 <= (y := int(np.floor(v + 0.5))) < 5:
            slow[b, c, y, x] = d
    given = torch.from_numpy(uvd), torch.from_numpy(batch), torch.from_numpy(view)
    found = depth_maps(*given, shape_BVHW=(2, 3, 5, 6), last_wins=True)
    assert np.array_equal(found.numpy(), slow) and not torch.equal(found, depth_maps(*given, shape_BVHW=(2, 3, 5, 6)))
    row = int(rows_of(cache, "train")[0])
    right, released = one(cache, row), one(cache, row, "depth_collision:last")
    assert changed(right, released) == {"image_maps.depth_BVHW"}
    a, b = right.image_maps["depth_BVHW"], released.image_maps["depth_BVHW"]
    assert torch.equal(a > 0, b > 0) and (b >= a).all()


@pytest.mark.parametrize("history", [(0,), (0, -1)])
def test_augmentation_turns_rcs_and_vx_and_leaves_vy_and_places(cache: MemoryCache, history: tuple[int, ...]) -> None:
    """Point by point, as the released code's columns 3 and 4; where networks move a point by its velocity stays right."""
    row = int(rows_of(cache, "train")[2])
    strong = AugmentConfig(rotation_deg=(20.0, 20.0), flip_x=1.0, flip_y=0.0, bev_scale=(1.1, 1.1))
    right, released = (one(cache, row, *p, augment=strong, history=history) for p in ((), ("augment:rcs_vx",)))
    assert changed(right, released) == {"radar.xyz_m", "radar.features_NF", "radar.velocity_mps"}
    turn = right.bev_from_ego_B44[0, :2, :2].double()
    a, b = right.radar, released.radar
    assert a is not None and b is not None and a.velocity_mps is not None and b.velocity_mps is not None and len(a.age_s) > 10
    for k in range(len(a.age_s)):
        vx, vy = torch.linalg.solve(turn, a.velocity_mps[k].double())  # before augmentation, in the current ego
        rcs, vx_released = turn @ torch.stack([a.column("rcs_dbsm")[k].double(), vx])
        assert b.column("rcs_dbsm")[k] == pytest.approx(float(rcs), abs=1e-4)
        assert b.velocity_mps[k].tolist() == pytest.approx([float(vx_released), float(vy)], abs=1e-4)
    moved = [p.xyz_m[:, :2] + p.velocity_mps * p.age_s[:, None] for p in (a, b)]
    assert torch.allclose(*moved, atol=1e-4) and not torch.equal(a.xyz_m, b.xyz_m) and torch.equal(a.xyz_m[:, 2], b.xyz_m[:, 2])
    assert not changed(one(cache, row), one(cache, row, "augment:rcs_vx"))  # nothing to do without augmentation


def test_unknown_names_are_refused_by_stream_and_run(cache: MemoryCache) -> None:
    with pytest.raises(UsageError, match=r"loader\.parity"):
        one(cache, int(rows_of(cache, "train")[0]), "flip:other")
    with pytest.raises(RecipeError, match=r"loader\.parity"):
        Run(name="x", loader=LoaderConfig(parity=("flip:other",)))


def test_a_run_keeps_its_parity_and_prediction_follows_it() -> None:
    from imkd_models.presets import build_model, tiny_config
    from pipelines.predict import stream_options

    run = Run(name="x", loader=LoaderConfig(parity=LOADER_PARITY))
    again = Run.from_dict(run.as_dict())
    assert again.loader.parity == LOADER_PARITY
    model = build_model(tiny_config())
    assert stream_options(model, {"run": run.as_dict()})["parity"] == LOADER_PARITY
    assert "parity" not in stream_options(model, {"run": Run(name="x").as_dict()})
