"""Draws are functions of (seed, epoch, position); cameras, boxes and points move by the same matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_cache import MemoryCache

from imkd_data.errors import RecipeError
from imkd_data.geometry import Camera, Pose
from imkd_data.loader.augment import IDENTITY, AugmentConfig, BevDraw, draw_bev, draw_images, draw_radar, move_boxes
from imkd_data.loader.stream import stream

CONFIG = AugmentConfig()


def _corners(centre: np.ndarray, size: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """(M, 8, 3) corners, written independently of the code under test."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2.0
    local = signs[None] * size[:, None]
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x, y = local[..., 0] * c - local[..., 1] * s, local[..., 0] * s + local[..., 1] * c
    return np.stack([x, y, local[..., 2]], axis=-1) + centre[:, None]


def _as_sets(corners: np.ndarray) -> np.ndarray:
    return np.stack([c[np.lexsort(np.round(c, 6).T)] for c in corners])


def _boxes(seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    velocity = rng.normal(size=(9, 2))
    velocity[3] = np.nan
    centre = rng.uniform([-40, -30, -2], [50, 20, 3], size=(9, 3))
    return centre, rng.uniform(0.5, 9, size=(9, 3)), rng.uniform(-4, 4, size=9), velocity


@pytest.mark.parametrize("position", range(12))
def test_box_corners_move_with_the_points_both_ways(position: int) -> None:
    matrix = draw_bev(CONFIG, seed=3, epoch=1, position=position).matrix()
    centre, size, yaw, velocity = _boxes(position)
    moved = move_boxes(matrix, centre, size, yaw, velocity)
    expected = _corners(centre, size, yaw) @ matrix[:3, :3].T + matrix[:3, 3]
    assert np.allclose(_as_sets(_corners(*moved[:3])), _as_sets(expected), atol=1e-9)
    # the heading points to the same face: centre + half a length ahead
    ahead = centre + 0.5 * size[:, :1] * np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], axis=1)
    ahead_moved = moved[0] + 0.5 * moved[1][:, :1] * np.stack([np.cos(moved[2]), np.sin(moved[2]), 0 * yaw], axis=1)
    assert np.allclose(ahead @ matrix[:3, :3].T + matrix[:3, 3], ahead_moved, atol=1e-9)
    back = move_boxes(np.linalg.inv(matrix), *moved)
    assert np.allclose(_as_sets(_corners(*back[:3])), _as_sets(_corners(centre, size, yaw)), atol=1e-9)
    assert np.allclose(back[3], velocity, equal_nan=True)
    assert np.isnan(moved[3][3]).all() and not np.isnan(np.delete(moved[3], 3, axis=0)).any()


def test_velocity_is_the_derivative_of_the_moved_centre() -> None:
    matrix = BevDraw(rotation_rad=0.3, scale=1.1, flip_y=True).matrix()
    centre, size, yaw, velocity = _boxes(0)
    velocity[3] = 1.0
    later = centre + np.pad(velocity, ((0, 0), (0, 1))) * 0.5
    first, last = move_boxes(matrix, centre, size, yaw, velocity), move_boxes(matrix, later, size, yaw, velocity)
    assert np.allclose((last[0] - first[0])[:, :2] / 0.5, first[3])


def test_published_yaw_rules() -> None:
    """yaw + theta, then pi - yaw for flip x, then -yaw for flip y; sizes and z times k."""
    for flip_x, flip_y in [(False, False), (True, False), (False, True), (True, True)]:
        draw = BevDraw(rotation_rad=0.2, scale=0.95, flip_x=flip_x, flip_y=flip_y)
        centre, size, yaw, velocity = _boxes(1)
        expected = yaw + 0.2
        expected = np.pi - expected if flip_x else expected
        expected = -expected if flip_y else expected
        moved = move_boxes(draw.matrix(), centre, size, yaw, velocity)
        assert np.allclose(np.exp(1j * moved[2]), np.exp(1j * expected))
        assert np.allclose(moved[1], size * 0.95) and np.allclose(moved[0][:, 2], centre[:, 2] * 0.95)


def test_draws_depend_on_the_position_alone() -> None:
    def both(position: int, epoch: int = 2, seed: int = 5) -> object:
        images = draw_images(
            CONFIG, full_hw_px=(900, 1600), image_hw_px=(256, 704), cameras=6, seed=seed, epoch=epoch, position=position
        )
        return draw_bev(CONFIG, seed=seed, epoch=epoch, position=position), images

    forward = [both(p) for p in range(20)]
    backward = [both(p) for p in reversed(range(20))][::-1]
    assert forward == backward
    assert len({repr(d) for d in forward}) == 20
    assert both(3, epoch=3) != both(3) != both(3, seed=6)


def test_ranges_are_reached_and_kept() -> None:
    draws = [draw_bev(CONFIG, seed=0, epoch=0, position=p) for p in range(2000)]
    turns, scales = np.rad2deg([d.rotation_rad for d in draws]), np.array([d.scale for d in draws])
    assert -22.5 <= turns.min() < -21 and 21 < turns.max() <= 22.5
    assert 0.9 <= scales.min() < 0.905 and 1.095 < scales.max() <= 1.1
    assert 0.45 < np.mean([d.flip_x for d in draws]) < 0.55 and 0.45 < np.mean([d.flip_y for d in draws]) < 0.55
    images = [
        draw
        for p in range(200)
        for draw in draw_images(CONFIG, full_hw_px=(900, 1600), image_hw_px=(256, 704), cameras=6, seed=0, epoch=0, position=p)
    ]
    widths = np.array([d.resized_w_px for d in images])
    assert widths.min() >= 617 and widths.max() <= 880 and widths.max() > 870
    assert all(0 <= d.left_px <= max(0, d.resized_w_px - 704) for d in images)
    assert all(d.top_px == d.resized_h_px - 256 for d in images)


def test_evaluation_draw_is_the_published_centre_crop() -> None:
    draw = draw_images(IDENTITY, full_hw_px=(900, 1600), image_hw_px=(256, 704), cameras=1, seed=9, epoch=9, position=9)[0]
    assert (draw.resized_w_px, draw.resized_h_px, draw.left_px, draw.top_px, draw.flip) == (704, 396, 0, 140, False)
    assert draw_bev(IDENTITY, seed=9, epoch=9, position=9).identity


def test_image_matrix_equals_the_camera_product() -> None:
    """A pixel projected by the augmented camera is the augmented pixel of the full camera."""
    k = np.array([[1266.4, 0, 816.2], [0, 1266.4, 491.5], [0, 0, 1]])
    full = Camera(
        name="c",
        image_from_camera=k,
        ego_from_camera=Pose.identity("ego", "c@1"),
        width_px=1600,
        height_px=900,
        timestamp_us=1,
    )
    xyz = np.random.default_rng(0).uniform([-5, -3, 4], [5, 2, 40], size=(30, 3))
    uv, _ = full.project(xyz)
    for p in range(8):
        draw = draw_images(CONFIG, full_hw_px=(900, 1600), image_hw_px=(250, 610), cameras=2, seed=1, epoch=0, position=p)[1]
        expected = np.concatenate([uv, np.ones((30, 1))], axis=1) @ draw.matrix((900, 1600)).T
        assert np.allclose(draw.camera(full).project(xyz)[0], expected[:, :2], atol=1e-9)


def test_config_round_trip_and_unknown_keys() -> None:
    assert AugmentConfig.from_dict(CONFIG.as_dict()) == CONFIG
    with pytest.raises(RecipeError, match="unknown augmentation"):
        AugmentConfig.from_dict({"rotaton_deg": [0, 0]})


TURNED = AugmentConfig(image_rotation_deg=(-5.4, 5.4))


def test_image_rotation_moves_pixels_camera_and_matrix_together() -> None:
    import simplejpeg

    from imkd_data.loader.read import decode_image

    full = np.zeros((90, 160, 3), dtype=np.uint8)
    full[50:58, 100:108] = 255
    jpeg = simplejpeg.encode_jpeg(full, quality=98)
    camera = Camera(
        name="c",
        image_from_camera=np.array([[120.0, 0, 80], [0, 120, 45], [0, 0, 1]]),
        ego_from_camera=Pose.identity("ego", "c@1"),
        width_px=160,
        height_px=90,
        timestamp_us=1,
    )
    xyz = np.random.default_rng(0).uniform([-5, -3, 4], [5, 2, 40], size=(30, 3))
    uv, _ = camera.project(xyz)
    angles = []
    for p in range(10):
        options = {"full_hw_px": (90, 160), "image_hw_px": (48, 112), "cameras": 3, "seed": 1, "epoch": 0, "position": p}
        draws = draw_images(TURNED, **options)
        plain = draw_images(CONFIG, **options)
        angles += [d.rotation_rad for d in draws]
        for draw, still in zip(draws, plain, strict=True):
            assert (draw.left_px, draw.flip, draw.resized_w_px) == (still.left_px, still.flip, still.resized_w_px)
            expected = np.concatenate([uv, np.ones((30, 1))], axis=1) @ draw.matrix((90, 160)).T
            assert np.allclose(draw.camera(camera).project(xyz)[0], expected[:, :2], atol=1e-9)
            middle = draw.turn() @ (55.5, 23.5, 1.0)
            assert np.allclose(middle[:2], (55.5, 23.5))
            c, s = np.cos(draw.rotation_rad), np.sin(draw.rotation_rad)
            assert np.allclose(draw.turn()[:2, :2], [[c, s], [-s, c]])  # the public formula
        out = decode_image(jpeg, draws[0]).double().mean(0).numpy()
        weight = np.where(out > 40, out, 0)
        at = draws[0].matrix((90, 160)) @ (103.5, 53.5, 1.0)
        if 5 < at[0] < 107 and 5 < at[1] < 43:
            rows, columns = np.mgrid[: out.shape[0], : out.shape[1]]
            centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
            assert np.abs(centre - at[:2]).max() < 0.4
    assert np.rad2deg(min(angles)) < -3 and np.rad2deg(max(angles)) > 3 and len(set(angles)) == 30


def test_radar_draws_are_a_function_of_the_position_and_share_their_sweeps() -> None:
    sweep = np.repeat(np.arange(6), 500)
    config = AugmentConfig(radar_drop=0.1, radar_sweeps_kept=5)

    def kept(position: int, slot: int = 0, c: AugmentConfig = config) -> np.ndarray:
        return draw_radar(c, sweep, seed=3, epoch=1, position=position, slot=slot)

    masks = [kept(p) for p in range(30)]
    assert all(np.array_equal(m, kept(p)) for p, m in reversed(list(enumerate(masks))))
    lost = [set(range(6)) - set(sweep[m]) for m in masks]
    assert all(len(x) == 1 for x in lost) and len(set.union(*lost)) == 6
    assert all(set(sweep[kept(p, slot=2)]) == set(sweep[m]) for p, m in enumerate(masks))
    assert not np.array_equal(kept(0), kept(0, slot=1))  # returns are drawn per slot
    assert 0.87 < np.mean([m.sum() / 2500 for m in masks]) < 0.93
    assert kept(0, c=AugmentConfig()).all() and kept(0, c=AugmentConfig(enabled=False, radar_drop=0.5)).all()
    assert draw_radar(config, np.zeros(0, np.int64), seed=0, epoch=0, position=0, slot=0).shape == (0,)


def test_dropped_radar_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    cache = MemoryCache(tmp_path, scenes=3, keyframes=4)
    options = {"fields": ("radar_points",), "augment": AugmentConfig(radar_drop=0.3), "seed": 2}

    def points(batch: Any) -> dict[str, Any]:
        return {t: batch.radar.xyz_m[batch.radar.batch_index == i].tolist() for i, t in enumerate(batch.tokens)}

    whole = {k: v for b in stream(cache, 4, **options) for k, v in points(b).items()}
    halves = [
        {k: v for b in stream(cache, 2, rank=r, world=2, workers=0, **options) for k, v in points(b).items()} for r in (0, 1)
    ]
    assert {**halves[0], **halves[1]} == whole
    plain = sum(len(b.radar.xyz_m) for b in stream(cache, 4, fields=("radar_points",), seed=2))
    assert 0.55 * plain < sum(map(len, whole.values())) < 0.85 * plain


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"bev_scale": (0, 0)}, "2 numbers, 0.05 to 20, the smaller first"),
        ({"bev_scale": (-1.0, -1.0)}, "2 numbers"),
        ({"bev_scale": (1.1, 0.9)}, "the smaller first"),
        ({"bev_scale": (math.nan, 1.0)}, "0.05 to 20"),
        ({"bev_scale": (1.0,)}, "2 numbers"),
        ({"bev_scale": 1.0}, "2 numbers"),
        ({"bev_scale": ("a", 1.0)}, "2 numbers"),
        ({"image_scale": (0.0, 1.0)}, "0.05 to 20"),
        ({"rotation_deg": (0.0, math.inf)}, "-360 to 360"),
        ({"image_rotation_deg": (5.4, -5.4)}, "the smaller first"),
        ({"flip_x": 2}, "0 to 1"),
        ({"flip_y": -0.5}, "0 to 1"),
        ({"image_flip": math.nan}, "0 to 1"),
        ({"radar_drop": 1.5}, "0 to 1"),
        ({"radar_drop": "a"}, "0 to 1"),
        ({"radar_drop": True}, "0 to 1"),
        ({"evaluation_scale": 0}, "0.05 to 20"),
        ({"radar_sweeps_kept": -1}, "a whole number, at least 0"),
        ({"radar_sweeps_kept": 1.5}, "a whole number, at least 0"),
        ({"enabled": "off"}, "true or false"),
    ],
)
def test_draws_that_cannot_be_meant(values: dict[str, Any], expected: str) -> None:
    (name,) = values
    for make in (lambda: AugmentConfig(**values), lambda: AugmentConfig.from_dict(values)):
        with pytest.raises(RecipeError, match=f"setting augment.{name}") as error:
            make()
        assert expected in error.value.details["expected"] and error.value.details["found"] == repr(values[name])


def test_draws_at_their_limits() -> None:
    config = AugmentConfig(
        rotation_deg=(0, 0), bev_scale=(1, 1), flip_x=0, flip_y=1, radar_drop=1, image_scale=(np.float32(0.5), np.float64(2))
    )
    assert draw_bev(config, seed=0, epoch=0, position=0).flip_y and config == AugmentConfig.from_dict(config.as_dict())
    with pytest.raises(RecipeError, match="augment"):
        AugmentConfig.from_dict([1])  # type: ignore[arg-type]
