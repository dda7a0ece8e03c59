"""One row of the cache as arrays on the host, and several of them packed into tensors. Runs in loader workers.

Packed values are small: JPEGs decoded at the nearest larger DCT scale, resized and cropped to bytes; points and boxes
moved into ``bev``; planes as stored integers. What is dense or easy for a GPU (normalisation, depth maps, moving and
pooling planes) is done by ``deliver`` on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imkd_data.errors import InputDataError, MissingFeatureError
from imkd_data.loader.augment import ImageDraw, draw_bev, draw_images, draw_radar, move_boxes
from imkd_data.loader.paste import Pasted, Paster
from imkd_data.loader.released import released_frames, turn_rcs_vx
from imkd_data.loader.request import LIDAR_FEATURES, PARTS, PLANES, RADAR_FILTERS, StreamRequest
from imkd_data.loader.rows import read_rows

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["Packed", "SampleReader", "decode_image", "pack"]

F64 = NDArray[np.float64]
Arrays = dict[str, Any]


@dataclass(slots=True)
class Packed:
    """A batch on its way from a worker to the device: tensors by name, tokens, and (token, error) of samples skipped."""

    tokens: tuple[str, ...]
    tensors: dict[str, Tensor]
    skipped: tuple[tuple[str, str], ...] = ()

    def pin(self) -> Packed:
        """The same in page-locked memory."""
        return Packed(self.tokens, {k: v.pin_memory() for k, v in self.tensors.items()}, self.skipped)

    pin_memory = pin  # the name that torch's DataLoader looks for


def decode_image(jpeg: bytes, draw: ImageDraw, out: Tensor | None = None) -> Tensor:
    """JPEG -> u8 RGB (3, height, width) of the draw, into ``out`` where given: decode (at a half, a quarter, ... where that
    is still large enough: odd fractions take longer than they save), bicubic resize with antialiasing, window, black
    outside, flip.

    Planes, because the resize makes planes: interleaving them again costs more than the resize itself. Only rows that reach
    the window are resized.
    """
    import simplejpeg

    size = (draw.resized_h_px, draw.resized_w_px)
    try:
        pixels = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=size[0], min_width=size[1], min_factor=2)
    except ValueError as error:
        raise InputDataError(f"an image cannot be decoded: {error}", rule="image.decode") from error
    if out is None:
        out = torch.empty((3, draw.height_px, draw.width_px), dtype=torch.uint8)
    x0, x1 = max(0, draw.left_px), min(draw.resized_w_px, draw.left_px + draw.width_px)
    y0, y1 = max(0, draw.top_px), min(draw.resized_h_px, draw.top_px + draw.height_px)
    inside = out[:, y0 - draw.top_px : max(y0, y1) - draw.top_px, x0 - draw.left_px : max(x0, x1) - draw.left_px]
    if inside.shape != out.shape:
        out.zero_()
    if inside.numel():
        if pixels.shape[:2] == size:
            window = torch.from_numpy(pixels[y0:y1, x0:x1]).permute(2, 0, 1)
        else:
            window = _resized_rows(pixels, size, y0, y1)[:, :, x0:x1]
        inside.copy_(window)
    if draw.flip:
        out.copy_(out.flip(-1))
    if draw.rotation_rad:
        out.copy_(_turned(out, draw))
    return out


def _turned(image: Tensor, draw: ImageDraw) -> Tensor:
    """(3, H, W) u8 rotated about its middle, bilinear, black outside."""
    height, width = image.shape[1:]
    back = torch.from_numpy(np.linalg.inv(draw.turn())).float()
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    source = torch.stack([u, v, torch.ones_like(u)], dim=-1).float() @ back[:2].T
    place = (source * 2 + 1) / torch.tensor([width, height]) - 1
    return torch.nn.functional.grid_sample(image[None].float(), place[None], align_corners=False)[0].round()


def _resized_rows(pixels: NDArray[np.uint8], size: tuple[int, int], y0: int, y1: int) -> Tensor:
    """Rows y0..y1 (3, y1 - y0, width) of the image resized to ``size``; equal to resizing the whole image.

    A resize starts at an edge, so the image is turned upside down: windows lie at its lower edge, and what is above them
    then lies beyond the end.
    """
    full_h, full_w = pixels.shape[:2]
    step = full_h / size[0]
    first = max(0, int(y0 * step - 2 * max(step, 1.0)) - 1)  # two steps is the reach of the bicubic kernel
    turned = torch.from_numpy(np.ascontiguousarray(pixels[first:][::-1])).permute(2, 0, 1)[None]
    scales = size[0] / full_h, size[1] / full_w
    resized: Tensor = torch.ops.aten._upsample_bicubic2d_aa(turned, [size[0] - y0, size[1]], False, *scales)
    return resized[0].flip(1)[:, : y1 - y0]


class SampleReader:
    """Reads rows of a cache for one request. It can be sent to workers: the row table, megabytes in a large cache, stays
    behind and is read there from the cache.

    keep_keyframes: decoded keyframes to remember. Neighbours share their history, so where samples come in order and every
    draw is the same (evaluation), each keyframe is decoded once instead of once a slot. ``paste``: objects from other
    rows for LiDAR teachers, set by the trainer."""

    paste: Paster | None = None

    def __init__(self, cache: Cache, request: StreamRequest, *, seed: int, keep_keyframes: int = 0) -> None:
        self.cache, self.request, self.seed = cache, request, seed
        self.table = read_rows(cache)
        self.keep_keyframes = 0 if request.augment.enabled else keep_keyframes
        self._kept: dict[int, Tensor] = {}  # row -> (V, 3, H, W), in the order of arrival
        # (name, place on the stored camera axis) of the declared cameras
        self.cameras = tuple((c, i) for i, c in enumerate(cache.suite.cameras) if c in cache.recipe.sensors)
        self.fields = request.fields(cache.recipe.view_grid)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("table", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, table=read_rows(state["cache"]), _kept={})

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(T, V, 3, H, W) of one sample's images, None where none are asked for."""
        if "images" not in self.request.parts:
            return None
        return (len(self.request.history), len(self.cameras), 3, *self.request.image_hw_px)

    def read(self, row: int, *, epoch: int, position: int, images: Tensor | None = None) -> Arrays:
        """All parts of one row, numpy, frame bev. Draws come from (seed, epoch, position). images: u8 ``image_shape`` to
        decode into; it is what stands under ``images`` then."""
        request = self.request
        bev = draw_bev(request.augment, seed=self.seed, epoch=epoch, position=position).matrix()
        rows, genuine = self.table.history(row, request.history)
        ego_from_global = np.linalg.inv(self.table.pose(row)) if len(rows) > 1 else np.eye(4)
        # keyframe slot -> bev of the current keyframe
        moves = [bev @ (np.eye(4) if r == row else ego_from_global @ self.table.pose(int(r))) for r in rows]
        out: Arrays = {
            "timestamp_us": self.table.timestamp_us[self.table.at(row)],
            "global_from_ego": self.table.pose(row),
            "bev_from_ego": bev,
            "history_valid": genuine,
            "position": position,
        }
        parts = request.parts
        if "images" in parts or "depth" in parts:
            draws = draw_images(
                request.augment,
                full_hw_px=self.cache.suite.image_hw_px,
                image_hw_px=request.image_hw_px,
                cameras=len(self.cameras),
                seed=self.seed,
                epoch=epoch,
                position=position,
            )
            if "images" in parts:
                self._cameras(out, rows, moves, draws, images)
            if "depth" in parts:
                self._depth(out, row, draws)
                out["depth_views"] = len(self.cameras)
        if "radar_points" in parts:
            out["radar"] = self._radar(rows, moves, bev, epoch, position)
        pasted = None
        if self.paste is not None and epoch < self.paste.until_epoch and "boxes" in parts:
            pasted = self.paste.draw(self.cache.decode("boxes", row), seed=self.seed, epoch=epoch, position=position)
        if "lidar_points" in parts:
            out["lidar"] = self._lidar(row, bev, pasted)
        if "boxes" in parts:
            out["boxes"] = self._boxes(row, bev, pasted)
        for name in self.fields:
            if name in PLANES:
                out[name] = self.cache.read(name, row)
            elif name == "lidar_intensity" or name not in _HANDLED:
                out[name] = np.asarray(self.cache.decode(name, row), dtype=np.float32)
        return out

    def _cameras(
        self,
        out: Arrays,
        rows: NDArray[np.int64],
        moves: Sequence[F64],
        draws: Sequence[ImageDraw],
        images: Tensor | None,
    ) -> None:
        full, slots, views = self.cache.suite.image_hw_px, len(rows), len(self.cameras)
        if images is None:
            images = torch.empty(self.image_shape or (), dtype=torch.uint8)
        intrinsic, pose = np.empty((slots, views, 3, 3)), np.empty((slots, views, 4, 4))
        parity = self.request.parity
        mirror_off = "flip:w_minus_u" in parity
        done: dict[int, int] = {}
        for t in reversed(range(slots)):  # oldest first, so that what is kept longest is what the next sample needs
            row = int(rows[t])
            if row in done:  # a repeated keyframe at the clip's start
                images[t], intrinsic[t], pose[t] = images[done[row]], intrinsic[done[row]], pose[done[row]]
                continue
            done[row] = t
            self._decoded(row, draws, images[t])
            calibration = self.cache.read("camera_calibration", row)
            for v, ((_, place), draw) in enumerate(zip(self.cameras, draws, strict=True)):
                intrinsic[t, v] = draw.matrix(full, mirror_off=mirror_off) @ calibration[place, :9].reshape(3, 3)
                pose[t, v] = moves[t] @ _rigid(calibration[place, 9:21])
        if "ego_frame:mean_camera" in parity:
            bev, places = moves[0], [place for _, place in self.cameras]
            key = self.cache.read("camera_calibration", int(rows[0]))[places]
            shift = released_frames(_rigid(key[:, 9:21]), _rigid(key[:, 21:33]))
            pose = bev @ shift @ np.linalg.inv(bev) @ pose
        out["images"], out["image_from_camera"], out["bev_from_camera"] = images, intrinsic, pose

    def _decoded(self, row: int, draws: Sequence[ImageDraw], out: Tensor) -> None:
        """The images of one keyframe into out (V, 3, H, W)."""
        if row in self._kept:
            out.copy_(self._kept[row])
            return
        jpegs = self.cache.read("images", row)
        for (name, _), draw, image in zip(self.cameras, draws, out, strict=True):
            decode_image(jpegs[name], draw, image)
        if self.keep_keyframes:
            self._kept[row] = out.clone()
            if len(self._kept) > self.keep_keyframes:
                del self._kept[next(iter(self._kept))]

    def _depth(self, out: Arrays, row: int, draws: Sequence[ImageDraw]) -> None:
        """Points (n, 3) u, v in the augmented image and depth, with the camera's index."""
        clouds, views = [], []
        stored = self.cache.decode("depth_points", row)
        for v, ((_, place), draw) in enumerate(zip(self.cameras, draws, strict=True)):
            m = draw.matrix(self.cache.suite.image_hw_px, mirror_off="flip:w_minus_u" in self.request.parity)
            uvd = np.asarray(stored[place], dtype=np.float64)
            moved = np.concatenate([uvd[:, :2] @ m[:2, :2].T + m[:2, 2], uvd[:, 2:]], axis=1)
            clouds.append(moved)
            views.append(np.full(len(moved), v))
        out["depth"] = {"uvd": np.concatenate(clouds).astype(np.float32), "view": np.concatenate(views).astype(np.int64)}

    def _radar(self, rows: NDArray[np.int64], moves: Sequence[F64], bev: F64, epoch: int, position: int) -> Arrays:
        request, parts = self.request, []
        decoded: dict[int, Arrays] = {}
        for t, row in enumerate(rows.tolist()):
            if row not in decoded:
                decoded[row] = self.cache.decode("radar_points", row)
            columns = decoded[row]  # a keyframe repeated at the clip's start repeats its returns as it repeats its images
            keep = np.ones(len(columns["xyz_m"]), dtype=bool)
            for name, values in RADAR_FILTERS[request.radar_filter].items():
                if name in columns:
                    keep &= np.isin(columns[name], values)
            if request.radar_sweeps:
                keep &= columns["sweep"] < request.radar_sweeps
            sweep = np.where(keep, columns["sweep"], -1)
            keep &= draw_radar(request.augment, sweep, seed=self.seed, epoch=epoch, position=position, slot=t)
            move, features = moves[t], [self._radar_column(columns, f) for f in request.radar_features]
            part = {
                "xyz": _moved(columns["xyz_m"][keep], move),
                "features": np.stack(features, axis=1)[keep] if features else np.zeros((int(keep.sum()), 0), np.float32),
                "age": columns["age"][keep],
                "time": np.full(int(keep.sum()), t, dtype=np.int64),
            }
            if "vx_comp" in columns:
                velocity = np.stack([columns["vx_comp"], columns["vy_comp"]], axis=1)[keep].astype(np.float64)
                part["velocity"] = (velocity @ move[:2, :2].T).astype(np.float32)
                if "augment:rcs_vx" in request.parity:
                    rcs = np.asarray(columns["rcs"], dtype=np.float64)[keep]
                    place = [i for i, name in enumerate(request.radar_features) if name in ("rcs", "rcs_dbsm")]
                    turn_rcs_vx(part, rcs, velocity @ (np.linalg.inv(bev) @ move)[:2, :2].T, bev, place)
            parts.append(part)
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def _radar_column(self, columns: Arrays, name: str) -> NDArray[np.float32]:
        raw = {"rcs_dbsm": "rcs"}.get(name, name)
        if raw not in columns:
            raise MissingFeatureError(
                f"the cache's radar has no column {name}", expected=name, found=", ".join(columns), rule="loader.radar_column"
            )
        return np.asarray(columns[raw], dtype=np.float32)

    def _lidar(self, row: int, bev: F64, pasted: Pasted | None = None) -> Arrays:
        points = self.cache.decode("lidar_points", row)
        keep: Any = slice(None)
        if self.request.lidar_sweeps:
            keep = points["sweep"] < self.request.lidar_sweeps
        xyz, age = points["xyz_m"][keep], points["age_s"][keep]
        names = self.request.lidar_features
        features = np.stack([self._lidar_column(points, name) for name in names], axis=1)[keep]
        if pasted is not None:
            if names != LIDAR_FEATURES:  # the bank holds these; what it lacks is the distance of points that always stay
                stored = dict(zip(LIDAR_FEATURES, pasted.features.T, strict=True))
                endless = np.full(len(pasted.age), np.inf, dtype=np.float32)
                pasted = replace(pasted, features=np.stack([stored.get(name, endless) for name in names], axis=1))
            xyz, features, age = pasted.into(xyz, features, age)
        return {"xyz": _moved(xyz, bev), "features": features, "age": age}

    def _lidar_column(self, points: Arrays, name: str) -> NDArray[np.float32]:
        if name == "near_m":
            return _near_m(points)
        if name == "intensity":
            scaled: NDArray[np.float32] = points["intensity"] / np.float32(self.cache.suite.reflectance_max)
            return scaled
        return np.asarray(points[name], dtype=np.float32)

    def _boxes(self, row: int, bev: F64, pasted: Pasted | None = None) -> Arrays:
        boxes = self.cache.decode("boxes", row)
        if pasted is not None:
            boxes = pasted.beside(boxes)
        centre, size, yaw, velocity = move_boxes(bev, boxes.centre_m, boxes.size_lwh_m, boxes.yaw_rad, boxes.velocity_mps)
        return {
            "centre": centre,
            "size": size,
            "yaw": yaw,
            "velocity": velocity,
            "label": np.maximum(boxes.label, 0),
            "valid": (boxes.label >= 0) & boxes.has_point,
        }


def _rigid(matrix34: NDArray[Any]) -> F64:
    """(..., 12) row major -> (..., 4, 4)."""
    out = np.zeros((*matrix34.shape[:-1], 4, 4))
    out[..., :3, :], out[..., 3, 3] = matrix34.reshape(*matrix34.shape[:-1], 3, 4), 1.0
    return out


def _near_m(points: Arrays) -> NDArray[np.float32]:
    """(N,) max(|x|, |y|) of every past sweep's points in that sweep's own sensor frame, as public loaders measure it before
    they move the points; infinite in the key scan, of which they remove nothing."""
    out = np.full(len(points["xyz_m"]), np.inf, dtype=np.float32)
    for sweep in range(1, len(points["pose"])):
        matrix, mine = points["pose"][sweep, :12].reshape(3, 4), points["sweep"] == sweep
        own = (points["xyz_m"][mine] - matrix[:, 3]) @ matrix[:, :2]  # the sensor's x and y axes, seen from ego
        out[mine] = np.abs(own).max(axis=1)
    return out


def _moved(xyz_m: NDArray[np.float32], move: F64) -> NDArray[np.float32]:
    out: NDArray[np.float32] = (xyz_m.astype(np.float64) @ move[:3, :3].T + move[:3, 3]).astype(np.float32)
    return out


_HANDLED = {name for fields in PARTS.values() for name in fields} | {"camera_calibration"}
_FLOAT32 = ("image_from_camera", "bev_from_camera")  # bev_from_ego stays float64: cells are looked up with it


def pack(samples: Sequence[Arrays], tokens: Sequence[str], images: Tensor | None = None) -> Packed:
    """Samples of one batch as tensors: fixed shapes stacked, points in one list with a batch index, boxes padded.
    images: (B, T, V, 3, H, W) that the samples were decoded into; it is taken as it is."""
    first = samples[0]
    tensors: dict[str, Tensor] = {} if images is None else {"images": images}
    for name in [n for n in first if n not in ("depth", "radar", "lidar", "boxes") and n not in tensors]:
        stacked = np.stack([np.asarray(s[name]) for s in samples])
        if name in _FLOAT32:
            stacked = stacked.astype(np.float32)
        if stacked.dtype in (np.uint16, np.uint32):  # torch has few operations on these
            stacked = stacked.astype(np.int32)
        tensors[name] = torch.from_numpy(stacked)
    for group in ("depth", "radar", "lidar"):
        if group in first:
            for key in first[group]:
                tensors[f"{group}.{key}"] = torch.from_numpy(np.concatenate([s[group][key] for s in samples]))
            counts = [len(next(iter(s[group].values()))) for s in samples]
            tensors[f"{group}.batch"] = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts))
    if "boxes" in first:
        most = max(len(s["boxes"]["yaw"]) for s in samples)
        for key, value in first["boxes"].items():
            padded = np.zeros(
                (len(samples), most, *value.shape[1:]), dtype=np.float32 if value.dtype == np.float64 else value.dtype
            )
            for b, s in enumerate(samples):
                padded[b, : len(s["boxes"][key])] = s["boxes"][key]
            tensors[f"boxes.{key}"] = torch.from_numpy(padded)
    return Packed(tuple(tokens), tensors)
