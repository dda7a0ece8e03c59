"""Public weights: explicit key maps from published code to ours. Unused or missing keys are errors that name them.

A key map is a list of (our key pattern, their key template, change of the tensor). Files are read with
``torch.load(weights_only=True)``: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imkd_data.errors import InputDataError, MismatchError, UsageError
from imkd_models.config import CRN_PARITY, FusionConfig, LabelConfig, LidarConfig, ModelConfig, StudentConfig
from imkd_models.keymap import Rule, public_key, read_public
from imkd_models.keyrules import (
    BEVDEPTH,
    CENTERPOINT_PILLAR,
    CENTERPOINT_VOXEL,
    CHANGES,
    CRKD,
    CRKD_TEACHER,
    CRN,
    LABELDISTILL_LABEL,
    LABELDISTILL_LIDAR,
)
from imkd_models.presets import (
    bevdepth_r50_config,
    build_model,
    centerpoint_pillar_config,
    crkd_r50_config,
    crkd_teacher_config,
    crn_r18_config,
    crn_r50_config,
    voxel_config,
)

__all__ = ["SOURCES", "Source", "import_public", "import_state", "public_keys", "read_public"]

# Network parity options of BEVDepth's code base: truncated cells, frustum edges, swapped channels; velocity NaN becomes 0.
BEVDEPTH_PARITY = frozenset({"cell_index:trunc", "image_channels:swapped", "frustum:linspace_edges", "nan_velocity:zero"})


def _crn_config(state: Mapping[str, Tensor]) -> StudentConfig:
    deep = "model.backbone_img.img_backbone.layer1.0.conv3.weight" in state
    return (crn_r50_config if deep else crn_r18_config)(parity=CRN_PARITY)


def _shape(state: Mapping[str, Tensor], key: str, dims: int, what: str) -> tuple[int, ...]:
    """Shape of the tensor that tells variants of a family apart. Errors: InputDataError where it is absent or of other kind."""
    value = state.get(key)
    if value is None or value.dim() != dims:
        found = "absent" if value is None else str(tuple(value.shape))
        raise InputDataError(f"this is no {what}", expected=f"{key} with {dims} dimensions", found=found)
    return tuple(value.shape)


def _centerpoint_config(state: Mapping[str, Tensor]) -> LidarConfig:
    if "pts_middle_encoder.conv_input.0.weight" in state:
        # The network of the public file is spconv's; its boxes are those of mmdetection3d 1.0 unless ``boxes`` says else.
        return _voxel_config("centerpoint_voxel", convention="mmdet3d_lwh", near_removed_m=1.0)
    shape = _shape(state, "pts_voxel_encoder.pfn_layers.0.linear.weight", 2, "CenterPoint network of mmdetection3d")
    if shape[1] not in (10, 11):
        raise InputDataError("this is no CenterPoint pillar network", expected="10 or 11 pillar inputs", found=str(shape[1]))
    # With 11 inputs the code is at least 0.17; the boxes changed in 1.0, which the keys do not tell: see ``boxes``.
    return centerpoint_pillar_config(
        pillar_centre_values=shape[1] - 8,
        points_per_pillar=20,
        intensity_scale=255.0,
        near_removed_m=1.0,
        convention="mmdet3d_lwh" if shape[1] == 11 else "mmdet3d_wlh",
    )


def _voxel_config(name: str, **changes: Any) -> LidarConfig:
    return voxel_config(name=name, intensity_scale=255.0, points_per_pillar=10, **changes)


_HISTORY = {1: (0,), 2: (0, -1), 3: (0, -2, -4), 4: (0, -2, -4, -6), 5: (0, -2, -4, -6, -8)}


def _bevdepth_config(state: Mapping[str, Tensor], *, name: str = "bevdepth_r50") -> StudentConfig:
    """Widths and number of keyframes from the file; keyframe offsets as in the public configurations."""
    what = "BEVDepth network"
    context = _shape(state, "model.backbone.depth_net.context_conv.weight", 4, what)[0]
    base, inputs = _shape(state, "model.head.trunk.conv1.weight", 4, what)[:2]
    keyframes, rest = divmod(inputs, context)
    if rest or keyframes not in _HISTORY:
        expected = f"1 to 5 keyframes of {context} channels"
        raise InputDataError(f"this is no {what}", expected=expected, found=f"{inputs} channels")
    return bevdepth_r50_config(
        name=name,
        history=_HISTORY[keyframes],
        camera_channels=context,
        fused_channels=context,
        trunk_base=base,
        depth_channels=_shape(state, "model.backbone.depth_net.reduce_conv.0.weight", 4, what)[0],
        depth_aggregation="model.backbone.depth_aggregation_net.out_conv.0.weight" in state,
        parity=BEVDEPTH_PARITY,
    )


def _labeldistill_config(state: Mapping[str, Tensor]) -> StudentConfig:
    return _bevdepth_config(state, name="labeldistill_r50")


def _label_config(state: Mapping[str, Tensor]) -> LabelConfig:
    hidden = _shape(state, "model.label_encoder.mlp_box.fc1.weight", 2, "LabelDistill label encoder")[0]
    stages = (("bev_stage1", 128, 128, 128), ("bev_stage2", 256, 64, 64))
    return LabelConfig(name="labeldistill_label", stages=stages, hidden=hidden)


def _labeldistill_lidar_config(state: Mapping[str, Tensor]) -> LidarConfig:
    _shape(state, "model.centerpoint.pts_middle_encoder.conv_input.0.weight", 5, "LabelDistill file with its LiDAR teacher")
    return _voxel_config("labeldistill_lidar", convention="bev")  # trained in the ego frame


def _from_distillation(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("encoders_student.") for key in state)


_SWIN_KEY = "camera.backbone.patch_embed.projection.weight"
_BEVFUSION_PARITY = frozenset({"cell_index:trunc", "frustum:linspace_edges"})


def _crkd_image(state: Mapping[str, Tensor], prefix: str, topdown_channels: int) -> dict[str, Any]:
    """Backbone and image neck of a CRKD network, from its keys."""
    if f"{prefix}.{_SWIN_KEY}" not in state:
        return {}
    what = "CRKD network with Swin-T and GeneralizedLSSFPN"
    _shape(state, f"{prefix}.camera.neck.lateral_convs.0.conv.weight", 4, what)
    return {"backbone": "swin_tiny", "image_neck": "topdown", "fpn_channels": topdown_channels}


def _crkd_config(state: Mapping[str, Tensor]) -> StudentConfig:
    prefix = "encoders_student" if _from_distillation(state) else "encoders"
    if any(key.startswith(f"{prefix}.lidar.") for key in state):
        raise InputDataError(
            "this is a LiDAR-camera teacher of CRKD, not a student",
            expected=f"{prefix}.radar.*",
            found=f"{prefix}.lidar.*",
            next="imkd import --from crkd --part teacher",
        )
    _shape(state, f"{prefix}.camera.vtransform.depthnet.weight", 4, "CRKD student")
    image = _crkd_image(state, prefix, 512)
    return crkd_r50_config(
        name="crkd_swin_t" if image else "crkd_r50",
        calibration=f"{prefix}.radar.backbone.caliber.0.weight" in state,
        radar_points_per_cell=20,
        convention="bevfusion",
        parity=_BEVFUSION_PARITY,
        **image,
    )


def _crkd_teacher_config(state: Mapping[str, Tensor]) -> FusionConfig:
    _shape(state, "encoders.lidar.backbone.conv_input.0.weight", 5, "LiDAR-camera teacher of CRKD")
    _shape(state, "encoders.camera.vtransform.depthnet.0.weight", 4, "LiDAR-camera teacher of CRKD")
    return crkd_teacher_config(**_crkd_image(state, "encoders", 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One network of a family of public files.

    rules: key map; a function where the file decides. ignored: patterns of keys that carry no weights of this network
    (buffers, loss constants, and other networks in the same file, which the record names). loader: what its input was made
    with, as in a run's loader section; evaluation and prediction read it.
    """

    rules: list[Rule] | Callable[[Mapping[str, Tensor]], list[Rule]]
    config: Callable[[Mapping[str, Tensor]], ModelConfig]
    ignored: tuple[str, ...]
    summary: str
    loader: Mapping[str, Any] = field(default_factory=dict)

    def rules_for(self, state: Mapping[str, Tensor]) -> list[Rule]:
        """The key map for this file."""
        return self.rules if isinstance(self.rules, list) else self.rules(state)


def _centerpoint_rules(state: Mapping[str, Tensor]) -> list[Rule]:
    return CENTERPOINT_VOXEL if "pts_middle_encoder.conv_input.0.weight" in state else CENTERPOINT_PILLAR


_CRKD_IMAGES = {"evaluation_scale": 0.48 / 0.44}  # 900x1600 to 432x768, of which 256x704 are cut; CRN: to 396x704
_BEVFUSION_BUFFERS = r"encoders(_student)?\.camera\.(vtransform\.(dx|bx|nx|frustum)|backbone\..*\.relative_position_index)"
_LSS_BUFFERS = r"model\.backbone\.(voxel_size|voxel_coord|voxel_num|frustum)"
# LabelDistill's files hold all its networks; the adaptors exist in training only.
_LABELDISTILL_PARTS = {"student": r"model\.(backbone|head)\..*", "lidar": r"model\.centerpoint\..*"}
_LABELDISTILL_PARTS |= {"label": r"model\.label_encoder\..*", "adaptors": r"model\.distill_encoder_(lidar|label)\..*"}


def _others(part: str) -> tuple[str, ...]:
    return tuple(pattern for name, pattern in _LABELDISTILL_PARTS.items() if name != part)


# Family, or family:part for the further networks of a file.
SOURCES: dict[str, Source] = {
    "crn": Source(
        rules=CRN,
        config=_crn_config,
        ignored=(
            r"model\.backbone_img\.(voxel_size|voxel_coord|voxel_num|frustum)",
            r"model\.fuser\.ref_2d",
        ),
        summary="CRN R18 or R50, 256x704, four keyframes (github.com/youngskkim/CRN), all network parity options on",
        loader={"radar_filter": "crn", "radar_sweeps": 6},
    ),
    "bevdepth": Source(
        rules=BEVDEPTH,
        config=_bevdepth_config,
        ignored=(_LSS_BUFFERS,),
        summary="BEVDepth R50, 256x704, with or without depth aggregation (github.com/Megvii-BaseDetection/BEVDepth)",
    ),
    "labeldistill": Source(
        rules=BEVDEPTH,
        config=_labeldistill_config,
        ignored=(_LSS_BUFFERS, *_others("student")),
        summary="LabelDistill's camera student (github.com/sanmin0312/LabelDistill); --part lidar, --part label: its teachers",
    ),
    "labeldistill:lidar": Source(
        rules=LABELDISTILL_LIDAR,
        config=_labeldistill_lidar_config,
        ignored=_others("lidar"),
        summary="LabelDistill's CenterPoint with 0.1 m voxels, trained in the ego frame; needs spconv",
        loader={"lidar_sweeps": 10},
    ),
    "labeldistill:label": Source(
        rules=LABELDISTILL_LABEL,
        config=_label_config,
        ignored=_others("label"),
        summary="LabelDistill's label encoder",
    ),
    "crkd": Source(
        rules=lambda state: CRKD[_from_distillation(state)],
        config=_crkd_config,
        ignored=(
            _BEVFUSION_BUFFERS,
            r"encoders(_student)?\.radar\.backbone\.distill_activation_head\..*",
            r"fused_affinity_loss\..*",
        ),
        summary="CRKD's camera-radar student, R50 or Swin-T, alone or in a distillation file (github.com/Song-Jingyu/CRKD); "
        "--part teacher: its LiDAR-camera teacher",
        loader={"radar_filter": "none", "radar_sweeps": 6, "augment": _CRKD_IMAGES},
    ),
    "crkd:teacher": Source(
        rules=CRKD_TEACHER,
        config=_crkd_teacher_config,
        ignored=(
            _BEVFUSION_BUFFERS,
            r"(encoders|fuser|decoder|heads)_student\..*",
            r"fused_affinity_loss\..*",
        ),
        summary="CRKD's LiDAR-camera teacher, R50 or Swin-T, alone or in a distillation file; needs spconv",
        loader={"lidar_sweeps": 10, "augment": _CRKD_IMAGES},
    ),
    "centerpoint_mmdet3d": Source(
        rules=_centerpoint_rules,
        config=_centerpoint_config,
        ignored=(),
        summary="CenterPoint with 0.2 m pillars or 0.1 m voxels (mmdetection3d), in its own axes and units",
        loader={"lidar_sweeps": 10},
    ),
}


def public_keys(source: str, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, tuple[str, str]]:
    """{our key: (their key, change)} for every tensor of the model. state: the file, where it decides on the key map."""
    rules = SOURCES[source].rules_for({} if state is None else state)
    return {key: public_key(rules, key) for key in model.state_dict()}


def import_state(source: str, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load a public state dict into ``model``. MismatchError lists missing, unused and wrongly shaped keys; only absent
    ``num_batches_tracked`` counters are tolerated."""
    own, used, problems = model.state_dict(), set(), []
    for key, (their, change) in public_keys(source, model, state).items():
        if their not in state:
            if not key.endswith("num_batches_tracked"):
                problems.append(f"missing {their} (our {key})")
            continue
        used.add(their)
        value = CHANGES[change](state[their])
        if value.shape != own[key].shape:
            problems.append(f"shape of {their}: {tuple(value.shape)}, our {key} has {tuple(own[key].shape)}")
            continue
        own[key] = value.to(own[key].dtype).contiguous()
    ignored = SOURCES[source].ignored
    if source == "crkd" and _from_distillation(state):
        ignored += (r"(encoders|fuser|decoder|heads)\..*",)  # the teacher in the same file
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


def import_public(
    source: str, file: Path, *, boxes: str | None = None, part: str = "student"
) -> tuple[nn.Module, dict[str, Any]]:
    """Model and record of a public file.

    boxes: ``lwh`` (mmdetection3d 1.0 and later) or ``wlh`` (before), for LiDAR networks in mmdetection3d's axes; None = guessed
    from the number of pillar inputs. part: which network of a file that holds several. The record holds source, sha256 of the
    file, input convention, the parity options that were set, and how many keys of other networks were left alone.
    """
    name = source if part == "student" else f"{source}:{part}"
    if name not in SOURCES:
        known = ", ".join(f"{name} ({s.summary})" for name, s in SOURCES.items())
        raise UsageError("no key map for this source", expected=known, found=name)
    state = read_public(file)
    config = SOURCES[name].config(state)
    if boxes is not None:
        if not isinstance(config, LidarConfig) or config.convention == "bev" or boxes not in ("lwh", "wlh"):
            raise UsageError("boxes is lwh or wlh, for LiDAR networks in mmdetection3d's axes", found=boxes)
        config = config.with_values(convention=f"mmdet3d_{boxes}")
    model = build_model(config, pretrained=False)
    import_state(name, state, model)
    used = {theirs for theirs, _ in public_keys(name, model, state).values()}
    network = getattr(config, "student", config)  # a LiDAR-camera teacher keeps them with its camera side
    record = {
        "imported_from": name,
        "file_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        "convention": getattr(network, "convention", "bev"),
        "parity": sorted(getattr(network, "parity", ())),
        "loader": dict(SOURCES[name].loader),
        "keys_of_other_networks": len(set(state) - used),
        "map": None,  # its own scores, filled in by an evaluation
        "nds": None,
    }
    return model, record
