"""Images on the way to a batch: windows, flips and shared keyframes equal the plain way of doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from memory_cache import MemoryCache
from test_stream import equal

from imkd_data.kernels.dense import nearest_depth, scaled_planes
from imkd_data.loader.augment import AugmentConfig, ImageDraw, draw_images
from imkd_data.loader.deliver import depth_maps, normalised
from imkd_data.loader.read import decode_image
from imkd_data.loader.stream import stream


def picture(height: int, width: int) -> bytes:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / a + y / b) for a, b in ((5.0, 9.0), (3.1, -7.0), (11.0, 2.7))]
    return simplejpeg.encode_jpeg(np.stack(waves, axis=-1).astype(np.uint8), quality=90)


def plain(jpeg: bytes, draw: ImageDraw) -> torch.Tensor:
    """Decode, resize the whole image, cut, turn."""
    size = (draw.resized_h_px, draw.resized_w_px)
    pixels = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=size[0], min_width=size[1], min_factor=2)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if pixels.shape[:2] != size:
        image = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
    whole = torch.zeros((3, 3000, 3000), dtype=torch.uint8)
    whole[:, 1000 : 1000 + size[0], 1000 : 1000 + size[1]] = image[0]
    top, left = 1000 + draw.top_px, 1000 + draw.left_px
    out = whole[:, top : top + draw.height_px, left : left + draw.width_px]
    return out.flip(-1) if draw.flip else out


def test_a_window_equals_the_window_of_the_whole_resized_image() -> None:
    jpeg = picture(495, 880)
    draws = [
        draw
        for position in range(12)
        for draw in draw_images(
            AugmentConfig(), full_hw_px=(900, 1600), image_hw_px=(256, 704), cameras=2, seed=1, epoch=0, position=position
        )
    ]
    for left, top, flip in ((-30, 10, False), (700, 300, True), (5, -20, True), (0, 0, False), (900, 0, False)):
        size = {"resized_w_px": 617, "resized_h_px": 348, "width_px": 200, "height_px": 120}
        draws.append(ImageDraw(**size, left_px=left, top_px=top, flip=flip))
    draws.append(ImageDraw(resized_w_px=1000, resized_h_px=700, left_px=90, top_px=40, width_px=300, height_px=200))
    draws.append(ImageDraw(resized_w_px=880, resized_h_px=495, left_px=90, top_px=239, width_px=704, height_px=256, flip=True))
    kinds = set()
    for draw in draws:
        found, expected = decode_image(jpeg, draw), plain(jpeg, draw)
        assert found.shape == (3, draw.height_px, draw.width_px)
        # the resize rounds positions in float32, and from the lower edge they round the other way
        assert int((found.int() - expected.int()).abs().max()) <= 1, draw
        assert float((found != expected).float().mean()) < 0.02, draw
        into = torch.full_like(found, 77)  # memory that held something else
        assert decode_image(jpeg, draw, into) is into and torch.equal(into, found)
        kinds.add((draw.flip, draw.top_px > 0, bool(found.any())))
    assert len(kinds) >= 5


def test_normalised_planes_equal_torch_to_one_rounding() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(2, 1, 2, 3, 1, 1)
    expected = normalised(images)
    planes = images.reshape(-1, 256).numpy()
    scale = np.array([1 / 58.395, 1 / 57.12, 1 / 57.375], dtype=np.float32)
    shift = np.array([-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375], dtype=np.float32)
    out = np.empty(planes.shape, dtype=np.float32)
    scaled_planes(planes, scale, shift, out)
    assert np.abs(out.reshape(images.shape) - expected.numpy()).max() <= 2.5e-7
    assert abs(float(expected[0, 0, 0, 0, 15, 15]) - (255 - 123.675) / 58.395) < 1e-6


def test_depth_kernel_equals_a_slow_twin() -> None:
    rng = np.random.default_rng(3)
    shape = (2, 3, 5, 9)
    uvd = np.c_[rng.uniform(-2, 11, 4000), rng.uniform(-2, 7, 4000), rng.uniform(0.5, 60, 4000)].astype(np.float32)
    uvd[:40, :2] = np.round(uvd[:40, :2]) + 0.5  # on the border between two pixels
    uvd[40:44, 0] = [-0.5, -0.50001, 8.5, 8.49999]
    batch, view = rng.integers(0, 2, 4000), rng.integers(0, 2, 4000)  # the third camera sees nothing
    expected = np.zeros(shape, dtype=np.float32)
    for (u, v, depth), b, c in zip(uvd, batch, view, strict=True):
        column, row = int(np.floor(float(u) + 0.5)), int(np.floor(float(v) + 0.5))
        if 0 <= column < 9 and 0 <= row < 5 and (expected[b, c, row, column] == 0 or depth < expected[b, c, row, column]):
            expected[b, c, row, column] = depth
    out = np.zeros(shape, dtype=np.float32)
    nearest_depth(uvd, batch, view, out)
    assert np.array_equal(out, expected) and not out[:, 2].any() and (out > 0).sum() > 100
    given = [torch.from_numpy(v) for v in (uvd, batch, view)]
    assert torch.equal(depth_maps(*given, shape_BVHW=shape), torch.from_numpy(expected))


@pytest.mark.gpu
def test_device_and_host_deliver_the_same(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("gpu: no CUDA device")
    cache = MemoryCache(tmp_path)
    host = next(iter(stream(cache, 2, augment=True)))
    device = next(iter(stream(cache, 2, augment=True, device="cuda"))).to("cpu")
    assert torch.allclose(host.images_BTVCHW, device.images_BTVCHW, atol=3e-7)
    assert torch.equal(host.image_maps["depth_BVHW"], device.image_maps["depth_BVHW"])


class Counting(MemoryCache):
    reads = 0

    def read(self, name: str, row: int) -> Any:
        self.reads += name == "images"
        return super().read(name, row)


def test_neighbours_in_order_decode_every_keyframe_once(tmp_path: Path) -> None:
    cache = Counting(tmp_path)
    values: dict[str, Any] = {"history": (0, -1, -2), "fields": ("images",), "shuffle": "none", "drop_last": False}
    in_order = stream(cache, 2, **values)
    shared = list(in_order)
    once = cache.reads
    in_order.reader.keep_keyframes = 0
    in_order.reader._kept.clear()
    alone = list(in_order)
    rows = sum(len(b) for b in shared) - int(shared[-1].padding_B.sum() if shared[-1].padding_B is not None else 0)
    assert once == rows < cache.reads - once  # each row's images are read once, and more often without the memory
    assert all(equal(a, b) for a, b in zip(shared, alone, strict=True))
    assert len(in_order.reader._kept) == 0 and stream(cache, 2, augment=True, **values).reader.keep_keyframes == 0
