"""``imkd export``: the student alone, as ONNX, a torch.export program or plain safetensors, compared before it is kept.

The exported network takes arrays, not a Batch: images as bytes, camera matrices, a fixed number of radar slots. Slots that
are not used hold points a thousand kilometres away, which the network drops by itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imkd_data.errors import MismatchError, UsageError
from imkd_data.loader.batch import Batch, PointBatch
from imkd_data.loader.deliver import MEAN, STD, normalised
from imkd_data.recipe import canonical_json
from imkd_models.checkpoint import load_model
from imkd_models.config import StudentConfig
from imkd_models.presets import model_from_dict
from pipelines.counting import blank_batch
from pipelines.networks import STATE_FEATURES

__all__ = ["Deployed", "batch_inputs", "export_checkpoint", "random_inputs"]

FAR_M = 1e6
TOLERANCE = 2e-3  # on logits and box values, relative to the largest value of each map
VALUES = (
    "heatmap_logits_BKYX",
    "offset_cells_B2YX",
    "height_m_B1YX",
    "log_size_m_B3YX",
    "yaw_sincos_B2YX",
    "velocity_mps_B2YX",
)


class Deployed(nn.Module):
    """The student behind plain tensors, batch 1, no augmentation. ``names``: its inputs in order."""

    def __init__(self, model: nn.Module, *, views: int) -> None:
        super().__init__()
        self.model = model
        self.config: StudentConfig = model.config  # type: ignore[assignment]
        self.features = STATE_FEATURES if self.config.radar_states else ("rcs_dbsm",)
        self.blank = (replace(blank_batch(self.config, views=views), lidar=None, boxes=None, image_maps={}),)
        camera = ("images_u8", "image_from_camera", "bev_from_camera") if self.config.camera else ()
        radar = ("radar_xyz_m", "radar_features", "radar_velocity_mps", "radar_age_s", "radar_slot")
        self.names = (*camera, *(radar if self.config.radar else ()))
        self.outputs = [f"{'_'.join(g)}.{v.rpartition('_')[0]}" for g in self.config.groups for v in VALUES]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """images_u8 (1, T, V, H, W, 3) RGB bytes; image_from_camera (1, T, V, 3, 3); bev_from_camera (1, T, V, 4, 4), T slots
        newest first, all in the current ego frame; radar points (N, ...) in the current ego frame with their history slot.
        Returns the head maps in the order of ``outputs``."""
        given = dict(zip(self.names, values, strict=True))
        batch: Batch = self.blank[0]
        if self.config.camera:
            batch = replace(
                batch,
                images_BTVCHW=normalised(given["images_u8"].movedim(-1, -3)),
                image_from_camera_BTV33=given["image_from_camera"],
                bev_from_camera_BTV44=given["bev_from_camera"],
            )
        if self.config.radar:
            points = PointBatch(
                xyz_m=given["radar_xyz_m"],
                features_NF=given["radar_features"],
                feature_names=tuple(self.features),
                batch_index=torch.zeros_like(given["radar_slot"]),
                time_index=given["radar_slot"],
                age_s=given["radar_age_s"],
                velocity_mps=given["radar_velocity_mps"],
            )
            batch = replace(batch, radar=points)
        out = self.model(batch)
        return tuple(getattr(maps, v) for maps in out.head for v in VALUES)


def random_inputs(network: Deployed, points: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of random content: noise images, cameras that look ahead, points in front with every tenth slot unused."""
    g = torch.Generator().manual_seed(seed)
    blank, history = network.blank[0], len(network.config.history)
    images = blank.images_BTVCHW
    assert images is not None and blank.image_from_camera_BTV33 is not None and blank.bev_from_camera_BTV44 is not None
    _, slots, views, _, height, width = images.shape
    xyz = torch.rand(points, 3, generator=g) * torch.tensor([50.0, 40.0, 2.0]) - torch.tensor([5.0, 20.0, 1.0])
    xyz[::10] = FAR_M
    values = {
        "images_u8": torch.randint(0, 256, (1, slots, views, height, width, 3), generator=g, dtype=torch.uint8),
        "image_from_camera": blank.image_from_camera_BTV33.clone(),
        "bev_from_camera": blank.bev_from_camera_BTV44.clone(),
        "radar_xyz_m": xyz,
        "radar_features": torch.randint(0, 4, (points, len(network.features)), generator=g).float(),
        "radar_velocity_mps": torch.randn(points, 2, generator=g),
        "radar_age_s": torch.rand(points, generator=g) * 0.4,
        "radar_slot": torch.randint(0, history, (points,), generator=g),
    }
    return tuple(values[n] for n in network.names)


def batch_inputs(network: Deployed, batch: Batch, points: int) -> tuple[Tensor, ...]:
    """One real sample (a batch of one, not augmented) as inputs; the newest radar points are kept where slots run out."""
    values: dict[str, Tensor] = {}
    if network.config.camera:
        assert batch.images_BTVCHW is not None
        images = batch.images_BTVCHW.movedim(-3, -1) * torch.tensor(STD) + torch.tensor(MEAN)
        assert batch.image_from_camera_BTV33 is not None and batch.bev_from_camera_BTV44 is not None
        values["images_u8"] = images.round().clamp(0, 255).to(torch.uint8)
        values["image_from_camera"], values["bev_from_camera"] = batch.image_from_camera_BTV33, batch.bev_from_camera_BTV44
    if network.config.radar:
        radar = batch.radar
        assert radar is not None and radar.velocity_mps is not None
        keep = torch.argsort(radar.time_index * 1000 + radar.age_s, stable=True)[:points]
        n = len(keep)
        columns = torch.stack([radar.column(f) for f in network.features], dim=1)
        for name, value, fill in (
            ("radar_xyz_m", radar.xyz_m, FAR_M),
            ("radar_features", columns, 0.0),
            ("radar_velocity_mps", radar.velocity_mps, 0.0),
            ("radar_age_s", radar.age_s, 0.0),
            ("radar_slot", radar.time_index, 0),
        ):
            padded = torch.full((points, *value.shape[1:]), fill, dtype=value.dtype)
            padded[:n] = value[keep]
            values[name] = padded
    return tuple(values[n] for n in network.names)


@contextmanager
def _plain_inverse() -> Iterator[None]:
    """Matrix inverses by cross products while exporting: ONNX has no inverse, and these are rotations with a translation or
    camera matrices."""

    def cross(a: Tensor, b: Tensor) -> Tensor:
        x = a[..., 1] * b[..., 2] - a[..., 2] * b[..., 1]
        y = a[..., 2] * b[..., 0] - a[..., 0] * b[..., 2]
        return torch.stack([x, y, a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]], dim=-1)

    def inverse(matrix: Tensor) -> Tensor:
        if matrix.shape[-1] == 4:
            rotation = inverse(matrix[..., :3, :3])
            shift = -(rotation @ matrix[..., :3, 3:])
            return torch.cat([torch.cat([rotation, shift], dim=-1), matrix[..., 3:, :]], dim=-2)
        x, y, z = matrix[..., 0], matrix[..., 1], matrix[..., 2]
        rows = torch.stack([cross(y, z), cross(z, x), cross(x, y)], dim=-2)
        return rows / (x * rows[..., 0, :]).sum(-1)[..., None, None]

    before = torch.linalg.inv_ex
    torch.linalg.inv_ex = lambda matrix: (inverse(matrix), None)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.linalg.inv_ex = before


def _difference(expected: tuple[Tensor, ...], found: Any) -> float:
    """Largest difference over all maps, relative to each map's largest value; infinite where a value is no finite number."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        gap = float((a - torch.as_tensor(b)).abs().max())
        if not math.isfinite(gap):  # max(worst, nan) would keep worst
            return math.inf
        worst = max(worst, gap / max(1.0, float(a.abs().max())))
    return worst


def export_checkpoint(
    checkpoint: Path | str,
    kind: str,
    out: Path | str,
    *,
    cache: Path | str | None = None,
    radar_points: int = 4096,
) -> dict[str, Any]:
    """Write ``out`` (and ``out`` + ``.json``) and return what the JSON says, with the measured differences.

    Raises:
        UsageError: the checkpoint is no camera-radar student, ONNX support is not installed, or the network has no fixed graph
        (radar caps of imported weights) and the format needs one.
        MismatchError: the exported network differs from the original by more than the tolerance; nothing is written.
    """
    model, meta = load_model(checkpoint)
    config = model.config
    if not isinstance(config, StudentConfig) or config.depth_input:
        raise UsageError("only a camera-radar student is exported", found=str(meta["model"].get("kind")))
    if kind not in ("onnx", "torch", "safetensors"):
        raise UsageError("unknown format", expected="onnx, torch or safetensors", found=kind)
    if kind != "safetensors" and (capped := _radar_caps(config)):
        raise UsageError(
            f"a network with radar caps of imported weights has no fixed graph for {kind}",
            expected="a network without these settings",
            found=", ".join(capped),
            file=checkpoint,
            next="--format safetensors keeps the weights and their configuration",
        )
    sensors = meta.get("cache", {}).get("sensors")
    real = _real_batch(model, meta, cache) if cache is not None else None
    views = real.images_BTVCHW.shape[2] if real is not None and real.images_BTVCHW is not None else _views(sensors)
    network = Deployed(model, views=views).eval()
    inputs = [("random", random_inputs(network, radar_points, seed)) for seed in (0, 1)]
    if real is not None:
        inputs.append(("real", batch_inputs(network, real, radar_points)))
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        run = {"onnx": _onnx, "torch": _torch, "safetensors": _safetensors}[kind](network, inputs[0][1], partial)
        differences = _compare(network, run, inputs)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    facts = _facts(network, meta, kind, inputs[0][1], differences, radar_points)
    target.with_name(target.name + ".json").write_bytes(canonical_json(facts))
    return facts


def _radar_caps(config: StudentConfig) -> list[str]:
    """Settings by which the number of rows depends on the points' values, which neither torch.export nor ONNX can follow."""
    if not config.radar:
        return []
    if config.assisted:
        return [f"model.parity {p}" for p in sorted(config.parity & {"radar_caps:crn", "radar_empty:dummy"})]
    if config.radar_encoder == "points" and config.radar_points_per_cell:
        return [f"model.radar_points_per_cell {config.radar_points_per_cell}"]
    return []


def _compare(network: Deployed, run: Any, inputs: list[tuple[str, tuple[Tensor, ...]]]) -> dict[str, float]:
    worst: dict[str, float] = {}
    with torch.no_grad():
        for name, values in inputs:
            worst[name] = max(worst.get(name, 0.0), _difference(network(*values), run(*values)))
    if not max(worst.values()) <= TOLERANCE:
        raise MismatchError(
            "the exported network gives other answers", expected=f"at most {TOLERANCE:g} relative", found=str(worst)
        )
    return worst


def _views(sensors: list[str] | None) -> int:
    return len([s for s in sensors or () if s.startswith("CAM_")]) or 6


def _real_batch(model: nn.Module, meta: dict[str, Any], cache: Path | str) -> Batch:
    from imkd_data import open_cache
    from imkd_data.loader.stream import stream
    from pipelines.predict import stream_options

    opened = open_cache(cache)
    row = int(opened.rows()[-1])  # the last row of the last scene: all its history is there
    return next(iter(stream(opened, 1, rows=[row], shuffle="none", **stream_options(model, meta))))


def _torch(network: Deployed, inputs: tuple[Tensor, ...], file: Path) -> Any:
    with torch.no_grad(), _plain_inverse():
        program = torch.export.export(network, inputs, strict=False)
    with file.open("wb") as stream:
        torch.export.save(program, stream)
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def _onnx(network: Deployed, inputs: tuple[Tensor, ...], file: Path) -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("ONNX support is not installed", found=str(error), next="pip install 'imkd[onnx]'") from error
    with torch.no_grad(), _plain_inverse():
        program = torch.export.export(network, inputs, strict=False)
        torch.onnx.export(
            program,
            inputs,
            str(file),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=list(network.names),
            output_names=network.outputs,
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}

    def run(*values: Tensor) -> Any:
        given = dict(zip(network.names, values, strict=True))
        return session.run(network.outputs, {k: v.numpy() for k, v in given.items() if k in taken})

    return run


def _safetensors(network: Deployed, inputs: tuple[Tensor, ...], file: Path) -> Any:
    from safetensors.torch import load_file, save_file

    from imkd_models.checkpoint import load_weights

    weights = {k: v.detach().clone().contiguous() for k, v in network.model.state_dict().items()}
    text = canonical_json(network.config.as_dict()).decode().strip()
    save_file(weights, str(file), metadata={"imkd_model": text})
    again = model_from_dict(network.config.as_dict())
    load_weights(again, load_file(str(file)), file=file)
    return Deployed(again, views=network.blank[0].images_BTVCHW.shape[2]).eval()  # type: ignore[union-attr]


def _facts(
    network: Deployed,
    meta: dict[str, Any],
    kind: str,
    inputs: tuple[Tensor, ...],
    differences: dict[str, float],
    radar_points: int,
) -> dict[str, Any]:
    described = [
        {"name": n, "shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")}
        for n, v in zip(network.names, inputs, strict=True)
    ]
    return {
        "v": 1,
        "format": kind,
        "weights_sha256": meta["weights_sha256"],
        "method": meta.get("method"),
        "model": network.config.as_dict(),
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "inputs": described,
        "radar_columns": list(network.features),
        "radar_slots": radar_points,
        "unused_slot_xyz_m": FAR_M,
        "outputs": network.outputs,
        "grid": network.config.grid.as_dict(),
        "stream": meta.get("stream", {}),
        "largest_relative_difference": differences,
        "tolerance": TOLERANCE,
        "software": {"torch": str(torch.__version__)},
    }
