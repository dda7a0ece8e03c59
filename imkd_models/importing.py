"""Public weights: explicit key maps from published code to ours. Unused or missing keys are errors that name them.

A key map is a list of (our key pattern, their key template, change of the tensor). Files are read with
``torch.load(weights_only=True)``: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imkd_data.errors import InputDataError, MismatchError, UsageError
from imkd_models.config import CRN_PARITY, LidarConfig, ModelConfig, StudentConfig
from imkd_models.detector import Detector
from imkd_models.keymap import Rule, public_key, read_public, resnet_rules
from imkd_models.presets import build_model, centerpoint_pillar_config, crn_r18_config, crn_r50_config

__all__ = ["SOURCES", "Source", "import_public", "import_state", "public_keys", "read_public"]

# Changes of a tensor on the way in.
_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    # A transposed 1x1 convolution at stride 1 is a convolution with the first two axes exchanged.
    "deconv": lambda x: x.transpose(0, 1) if x.dim() == 4 else x,
    # CRN's view aggregation runs on (column, depth) planes, ours on (depth, column).
    "plane": lambda x: x.transpose(2, 3) if x.dim() == 4 else x,
}


def _head(theirs: str) -> list[Rule]:
    """CenterHead: shared convolution and six branches per class group."""
    names = {
        "offset_cells": "reg",
        "height_m": "height",
        "log_size_m": "dim",
        "yaw_sincos": "rot",
        "velocity_mps": "vel",
        "heatmap_logits": "heatmap",
    }
    rules: list[Rule] = [
        (r"head\.shared\.0\.(.*)", rf"{theirs}.shared_conv.conv.\1", ""),
        (r"head\.shared\.1\.(.*)", rf"{theirs}.shared_conv.bn.\1", ""),
    ]
    for mine, their in names.items():
        rules += [
            (rf"head\.branches\.(\d+)\.{mine}\.0\.(.*)", rf"{theirs}.task_heads.\1.{their}.0.conv.\2", ""),
            (rf"head\.branches\.(\d+)\.{mine}\.1\.(.*)", rf"{theirs}.task_heads.\1.{their}.0.bn.\2", ""),
            (rf"head\.branches\.(\d+)\.{mine}\.3\.(.*)", rf"{theirs}.task_heads.\1.{their}.1.\2", ""),
        ]
    return rules


def _neck(ours: str, theirs: str, deconv: int | None) -> list[Rule]:
    """SECONDFPN; ``deconv``: the branch whose 1x1 convolution is stored as a transposed one."""
    rules: list[Rule] = []
    if deconv is not None:
        rules.append((rf"{ours}\.branches\.{deconv}\.0\.(.*)", rf"{theirs}.deblocks.{deconv}.0.\1", "deconv"))
    return [*rules, (rf"{ours}\.branches\.(\d+)\.(\d+)\.(.*)", rf"{theirs}.deblocks.\1.\2.\3", "")]


def _second(ours: str, theirs: str) -> list[Rule]:
    return [(rf"{ours}\.stages\.(\d+)\.(\d+)\.(\d+)\.(.*)", rf"{theirs}.blocks.\1.*\2+\3.\4", "")]


_VIEW = ("reduce_conv.0", "reduce_conv.1", "conv.0", "conv.1", "conv.3", "conv.4")
_CRN: list[Rule] = [
    *resnet_rules(r"camera\.image\.backbone", "model.backbone_img.img_backbone"),
    *_neck(r"camera\.image\.neck", "model.backbone_img.img_neck", 2),
    (r"camera\.depth\.reduce\.(.*)", r"model.backbone_img.depth_net.reduce_conv.\1", ""),
    (r"camera\.depth\.context\.(.*)", r"model.backbone_img.depth_net.context_conv.\1", ""),
    (r"camera\.depth\.depth\.(\d+)\.norm(\d)\.(.*)", r"model.backbone_img.depth_net.depth_conv.\1.bn\2.\3", ""),
    (r"camera\.depth\.depth\.(.*)", r"model.backbone_img.depth_net.depth_conv.\1", ""),
    *[
        (rf"camera\.view\.aggregate\.{i // 2}\.{i % 2}\.(.*)", rf"model.backbone_img.view_aggregation_net.{name}.\1", "plane")
        for i, name in enumerate(_VIEW)
    ],
    (r"camera\.view\.aggregate\.3\.(.*)", r"model.backbone_img.view_aggregation_net.out_conv.0.\1", "plane"),
    (r"radar\.pillars\.(linear|norm)1\.(.*)", r"model.backbone_pts.pts_voxel_encoder.pfn_layers.0.\1.\2", ""),
    (r"radar\.pillars\.(linear|norm)2\.(.*)", r"model.backbone_pts.pts_voxel_encoder.pfn_layers.1.\1.\2", ""),
    *_second(r"radar\.backbone", "model.backbone_pts.pts_backbone"),
    *_neck(r"radar\.neck", "model.backbone_pts.pts_neck", None),
    (r"radar\.context\.(.*)", r"model.backbone_pts.pred_context.\1", ""),
    (r"radar\.occupancy\.(.*)", r"model.backbone_pts.pred_occupancy.\1", ""),
    (r"fuser\.norms\.0\.(.*)", r"model.fuser.norm_img.\1", ""),
    (r"fuser\.norms\.1\.(.*)", r"model.fuser.norm_pts.\1", ""),
    (r"fuser\.query\.(.*)", r"model.fuser.input_proj.\1", ""),
    (r"fuser\.rows\.(.*)", r"model.fuser.positional_encoding.row_embed.\1", ""),
    (r"fuser\.columns\.(.*)", r"model.fuser.positional_encoding.col_embed.\1", ""),
    (r"fuser\.layers\.(\d+)\.attention\.offsets\.(.*)", r"model.fuser.attn_layers.\1.sampling_offsets.\2", ""),
    (r"fuser\.layers\.(\d+)\.attention\.weights\.(.*)", r"model.fuser.attn_layers.\1.attention_weights.\2", ""),
    (r"fuser\.layers\.(\d+)\.attention\.values\.0\.(.*)", r"model.fuser.attn_layers.\1.value_proj_img.\2", ""),
    (r"fuser\.layers\.(\d+)\.attention\.values\.1\.(.*)", r"model.fuser.attn_layers.\1.value_proj_pts.\2", ""),
    (r"fuser\.layers\.(\d+)\.norm([12])\.(.*)", r"model.fuser.norm_layers\2.\1.\3", ""),
    (r"fuser\.layers\.(\d+)\.expand\.(.*)", r"model.fuser.ffn_layers.\1.layers.0.0.\2", ""),
    (r"fuser\.layers\.(\d+)\.contract\.(.*)", r"model.fuser.ffn_layers.\1.layers.1.\2", ""),
    (r"time\.mix\.(.*)", r"model.fuser.reduce_conv.\1", ""),
    (r"trunk\.stages\.stem\.0\.(.*)", r"model.head.trunk.conv1.\1", ""),
    (r"trunk\.stages\.stem\.1\.(.*)", r"model.head.trunk.bn1.\1", ""),
    (r"trunk\.stages\.stages\.(\d+)\.(\d+)\.conv(\d)\.(.*)", r"model.head.trunk.layer+\1.\2.conv\3.\4", ""),
    (r"trunk\.stages\.stages\.(\d+)\.(\d+)\.norm(\d)\.(.*)", r"model.head.trunk.layer+\1.\2.bn\3.\4", ""),
    (r"trunk\.stages\.stages\.(\d+)\.(\d+)\.shortcut\.(.*)", r"model.head.trunk.layer+\1.\2.downsample.\3", ""),
    *_neck(r"trunk\.neck", "model.head.neck", 0),
    *_head("model.head"),
]
_CENTERPOINT: list[Rule] = [
    (r"lidar\.encoder\.(linear|norm)\.(.*)", r"pts_voxel_encoder.pfn_layers.0.\1.\2", ""),
    *_second(r"lidar\.stages", "pts_backbone"),
    *_neck(r"lidar\.neck", "pts_neck", None),
    *_head("pts_bbox_head"),
]


def _crn_config(state: Mapping[str, Tensor]) -> StudentConfig:
    deep = "model.backbone_img.img_backbone.layer1.0.conv3.weight" in state
    return (crn_r50_config if deep else crn_r18_config)(parity=CRN_PARITY)


def _centerpoint_config(state: Mapping[str, Tensor]) -> LidarConfig:
    weight = state.get("pts_voxel_encoder.pfn_layers.0.linear.weight")
    if weight is None or weight.dim() != 2 or weight.shape[1] not in (10, 11):
        raise InputDataError(
            "this is no CenterPoint pillar network of mmdetection3d",
            expected="pts_voxel_encoder.pfn_layers.0.linear.weight (C, 10) or (C, 11)",
            found="absent" if weight is None else str(tuple(weight.shape)),
        )
    # With 11 inputs the code is at least 0.17; the boxes changed in 1.0, which the keys do not tell: see ``boxes``.
    return centerpoint_pillar_config(
        pillar_centre_values=weight.shape[1] - 8,
        points_per_pillar=20,
        intensity_scale=255.0,
        near_removed_m=1.0,
        convention="mmdet3d_lwh" if weight.shape[1] == 11 else "mmdet3d_wlh",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One family of public files. ignored: patterns of their keys that carry no weights (buffers, loss constants)."""

    rules: list[Rule]
    config: Callable[[Mapping[str, Tensor]], ModelConfig]
    ignored: tuple[str, ...]
    summary: str


SOURCES: dict[str, Source] = {
    "crn": Source(
        rules=_CRN,
        config=_crn_config,
        ignored=(
            r"model\.backbone_img\.(voxel_size|voxel_coord|voxel_num|frustum)",
            r"model\.fuser\.ref_2d",
        ),
        summary="CRN R18 or R50, 256x704, four keyframes (github.com/youngskkim/CRN), all network parity options on",
    ),
    "centerpoint_mmdet3d": Source(
        rules=_CENTERPOINT,
        config=_centerpoint_config,
        ignored=(),
        summary="CenterPoint with 0.2 m pillars (mmdetection3d), in its own axes and units",
    ),
}


def public_keys(source: str, model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """{our key: (their key, change)} for every tensor of the model."""
    return {key: public_key(SOURCES[source].rules, key) for key in model.state_dict()}


def import_state(source: str, state: Mapping[str, Tensor], model: torch.nn.Module) -> None:
    """Load a public state dict into ``model``. MismatchError lists missing, unused and wrongly shaped keys; only absent
    ``num_batches_tracked`` counters are tolerated."""
    own, used, problems = model.state_dict(), set(), []
    for key, (their, change) in public_keys(source, model).items():
        if their not in state:
            if not key.endswith("num_batches_tracked"):
                problems.append(f"missing {their} (our {key})")
            continue
        used.add(their)
        value = _CHANGES[change](state[their])
        if value.shape != own[key].shape:
            problems.append(f"shape of {their}: {tuple(value.shape)}, our {key} has {tuple(own[key].shape)}")
            continue
        own[key] = value.to(own[key].dtype).contiguous()
    ignored = SOURCES[source].ignored
    problems += [f"unused {k}" for k in state if k not in used and not any(re.fullmatch(p, k) for p in ignored)]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise MismatchError(
            f"the file's keys do not fit a {source} network",
            expected="every key of the network once, and no other",
            found="; ".join(problems[:10]) + more,
            next="check that the file is of this family and version (imkd import --help)",
        )
    model.load_state_dict(own)


def import_public(source: str, file: Path, *, boxes: str | None = None) -> tuple[Detector, dict[str, Any]]:
    """Model and record of a public file.

    boxes: ``lwh`` (mmdetection3d 1.0 and later) or ``wlh`` (before), for LiDAR networks; None = guessed from the number of
    pillar inputs. The record holds source, sha256 of the file, input convention and the parity options that were set.
    """
    if source not in SOURCES:
        known = ", ".join(f"{name} ({s.summary})" for name, s in SOURCES.items())
        raise UsageError("no key map for this source", expected=known, found=source)
    state = read_public(file)
    config = SOURCES[source].config(state)
    if boxes is not None:
        if not isinstance(config, LidarConfig) or boxes not in ("lwh", "wlh"):
            raise UsageError("boxes is lwh or wlh, for LiDAR networks", found=boxes)
        config = config.with_values(convention=f"mmdet3d_{boxes}")
    model = build_model(config, pretrained=False)
    import_state(source, state, model)
    record = {
        "imported_from": source,
        "file_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        "convention": getattr(config, "convention", "bev"),
        "parity": sorted(getattr(config, "parity", ())),
        "map": None,  # its own scores, filled in by an evaluation
        "nds": None,
    }
    return model, record
