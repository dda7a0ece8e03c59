"""Counted, not estimated: parameters of a run's network by module, its multiply-adds and its memory for one sample.

Multiply-adds: a forward pass at batch 1 in which convolutions and matrix products are replaced by zeros of their shape and
counted, so a large network counts in seconds on a CPU. Point-wise work is not counted; point clouds are empty. Memory: float32
bytes of everything that the same pass in training keeps for its backward pass, parameters left out; mixed precision needs
about half, checkpointed stages only their inputs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from imkd_data.errors import UsageError
from imkd_data.loader.batch import Batch, BoxBatch, PointBatch
from imkd_data.recipe import canonical_json
from imkd_models.config import FusionConfig, ModelConfig, StudentConfig
from imkd_models.convention import lidar_features
from imkd_models.presets import build_model, config_from_dict
from pipelines.run import Run

__all__ = ["MacCounter", "blank_batch", "count_cost", "counted", "resolved_config", "write_table"]

_TABLE = Path(__file__).with_name("macs.json")


def resolved_config(run: Run) -> ModelConfig:
    """The network's configuration after the method's changes."""
    config = config_from_dict(run.model)
    if run.method and isinstance(config, StudentConfig):
        from imkd_models.distill import make_method

        method = make_method(run.method)
        config = config.with_values(**method.changes(method.make_options(run.options)))
    return config


def counted(run: Run, *, macs: bool = True) -> dict[str, Any]:
    """parameters (total), modules (name -> parameters, they add up to the total), macs (None where not counted)."""
    if run.stages:
        parts = {s.name: counted(s, macs=macs) for s in run.stages}

        def total(name: str) -> int | None:
            known = [p[name] for p in parts.values()]
            return sum(known) if all(k is not None for k in known) else None

        most = [p["sample_bytes"] for p in parts.values() if p["sample_bytes"] is not None]
        return {
            "parameters": total("parameters"),
            "modules": {n: p["parameters"] for n, p in parts.items()},
            "macs": total("macs"),
            "sample_bytes": max(most, default=None),  # stages run one after the other
        }
    config = resolved_config(run)
    try:
        with torch.device("meta"):
            model = build_model(config, pretrained=False)
    except UsageError:  # the voxel teacher without spconv
        return {"parameters": None, "modules": {}, "macs": None, "sample_bytes": None}
    modules = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    own = sum(p.numel() for p in model.parameters(recurse=False))
    modules = {k: v for k, v in {**modules, "own": own}.items() if v}
    cost = _known_cost(config) if macs else None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "modules": modules,
        "macs": None if cost is None else cost[0],
        "sample_bytes": None if cost is None else cost[1],
    }


def macs_key(config: ModelConfig) -> str:
    """Identity of a configuration in ``macs.json``: what differs from its kind's defaults, so that a new setting with a
    default changes no key."""
    return hashlib.sha256(canonical_json(_departures(config))).hexdigest()[:16]


def _departures(config: ModelConfig) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    plain = config.as_dict()
    out: dict[str, Any] = {"kind": config.kind}
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        if name == "name" or (name in defaults and value == defaults[name]):
            continue
        nested = isinstance(value, ModelConfig)
        out[name] = _departures(value) if nested else plain[name]
    return out


def _known_cost(config: ModelConfig) -> tuple[int, int]:
    """From ``macs.json``, which a test recounts; counted now (up to half a minute) where the configuration is not in it."""
    table = json.loads(_TABLE.read_text()) if _TABLE.is_file() else {}
    key = macs_key(config)
    return (int(table[key][0]), int(table[key][1])) if key in table else count_cost(config)


def write_table() -> None:
    """Count every named run anew and write ``macs.json``: ``python -m pipelines.counting``."""
    from pipelines.runs import RUNS

    table: dict[str, list[int]] = {}
    for make in RUNS.values():
        run = make()
        for one in run.stages or (run,):
            config = resolved_config(one)
            try:
                cost = count_cost(config)
            except UsageError:  # the voxel teacher without spconv
                continue
            table[macs_key(config)] = list(cost)
    _TABLE.write_text(json.dumps(table, sort_keys=True).replace("], ", "],\n ") + "\n")


def blank_batch(config: ModelConfig, *, batch_size: int = 1, views: int = 6) -> Batch:
    """A batch of zeros with the shapes that the network reads: cameras look ahead, no points, no boxes."""
    camera = config.student if isinstance(config, FusionConfig) else config
    slots = len(config.history) if isinstance(config, StudentConfig) else 1
    height, width = getattr(camera, "image_hw_px", (256, 704))
    k = torch.tensor([[width / 1.2, 0, width / 2], [0, width / 1.2, height / 2], [0, 0, 1.0]])
    pose = torch.eye(4)
    pose[:3, :3] = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    features = ("rcs_dbsm", "dyn_prop", "ambig_state", "invalid_state", "pdh0")
    return Batch(
        tokens=("blank",) * batch_size,
        timestamp_us_B=torch.zeros(batch_size, dtype=torch.int64),
        global_from_ego_B44=torch.eye(4, dtype=torch.float64).repeat(batch_size, 1, 1),
        bev_from_ego_B44=torch.eye(4).repeat(batch_size, 1, 1),
        grid=config.grid,
        images_BTVCHW=torch.zeros(batch_size, slots, views, 3, height, width),
        image_from_camera_BTV33=k.expand(batch_size, slots, views, 3, 3).clone(),
        bev_from_camera_BTV44=pose.expand(batch_size, slots, views, 4, 4).clone(),
        history_valid_BT=torch.ones(batch_size, slots, dtype=torch.bool),
        lidar=_no_points(lidar_features(config)),
        radar=_no_points(features),
        image_maps={"depth_BVHW": torch.zeros(batch_size, views, height, width)},
        boxes=_no_boxes(batch_size),
    )


def _no_boxes(batch_size: int) -> BoxBatch:
    none = torch.zeros(batch_size, 0)
    return BoxBatch(
        centre_m_BM3=none[..., None].expand(-1, -1, 3),
        size_lwh_m_BM3=none[..., None].expand(-1, -1, 3),
        yaw_rad_BM=none,
        velocity_mps_BM2=none[..., None].expand(-1, -1, 2),
        label_BM=none.long(),
        valid_BM=none.bool(),
    )


def _no_points(names: tuple[str, ...]) -> PointBatch:
    none = torch.zeros(0, dtype=torch.int64)
    return PointBatch(
        xyz_m=torch.zeros(0, 3),
        features_NF=torch.zeros(0, len(names)),
        feature_names=names,
        batch_index=none,
        time_index=none,
        age_s=torch.zeros(0),
        velocity_mps=torch.zeros(0, 2),
    )


class MacCounter(TorchDispatchMode):
    """Counts convolutions and matrix products and answers them with zeros of the right shape."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("convolution", "_convolution"):
            return self._convolution(func, args)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:] if name in ("mm", "bmm") else args[1:3]
            self.macs += a.numel() * b.shape[-1]
            return a.new_zeros(*a.shape[:-1], b.shape[-1])
        return func(*args, **(kwargs or {}))

    def _convolution(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        x, weight = args[0], args[1]
        bias = None if args[2] is None else args[2].to("meta")
        shape = func(x.to("meta"), weight.to("meta"), bias, *args[3:]).shape
        transposed = bool(args[6])
        places = x[:, 0].numel() if transposed else shape.numel() // shape[1]
        self.macs += places * weight.numel()
        zeros: Tensor = x.new_zeros(shape)
        return zeros


class _Kept:
    """Bytes of the distinct storages that autograd saves; they are let go at once."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.seen: list[StorageWeakRef] = []  # keeps their addresses from being used again

    def pack(self, tensor: Tensor) -> Any:
        """Hook of ``saved_tensors_hooks``: nothing is kept."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.seen.append(StorageWeakRef(storage))
            self.bytes += storage.nbytes()


def _nothing(_: Any) -> Tensor:
    raise RuntimeError("a counted pass has no backward pass")


def count_cost(config: ModelConfig) -> tuple[int, int]:
    """Multiply-adds of one forward pass at batch 1 with six cameras, and bytes it keeps for the backward pass. A label
    encoder is counted without its teacher's neck and head."""
    model: nn.Module = build_model(config, pretrained=False).train()
    batch, counter, kept = blank_batch(config), MacCounter(), _Kept(model)
    with counter, torch.autograd.graph.saved_tensors_hooks(kept.pack, _nothing):
        model(batch)
    return counter.macs, kept.bytes


if __name__ == "__main__":
    write_table()
