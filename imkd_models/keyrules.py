"""Key rules of the public code bases, one list per network, for ``importing.py``. A rule is (our key pattern, their key
template, change of the tensor), see keymap.py. Names and shapes were read from the public repositories named in SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from imkd_models.keymap import Rule, resnet_rules

__all__ = [
    "BEVDEPTH",
    "CENTERPOINT_PILLAR",
    "CENTERPOINT_VOXEL",
    "CHANGES",
    "CRKD",
    "CRKD_TEACHER",
    "CRN",
    "LABELDISTILL_LABEL",
    "LABELDISTILL_LIDAR",
]

# Changes of a tensor on the way in.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    # A transposed 1x1 convolution at stride 1 is a convolution with the first two axes exchanged.
    "deconv": lambda x: x.transpose(0, 1) if x.dim() == 4 else x,
    # CRN's view aggregation runs on (column, depth) planes, ours on (depth, column).
    "plane": lambda x: x.transpose(2, 3) if x.dim() == 4 else x,
    # Sparse convolutions of spconv 1 and mmcv store (kernel, in, out), spconv 2 (out, kernel, in).
    "sparse": lambda x: x.permute(4, 0, 1, 2, 3) if x.dim() == 5 and _is_kernel_first(x) else x,
    # BEVFusion's lie in x, y, z order (kernel, in, out), x along our rows; its points begin with x, y, ours with y, x.
    "sparse_xyz": lambda x: x.permute(4, 2, 0, 1, 3) if x.dim() == 5 else x,
    "sparse_xyz_points": lambda x: x.permute(4, 2, 0, 1, 3)[..., [1, 0, 2, 3, 4]] if x.dim() == 5 else x,
    # mmdetection's Swin holds query, key and value in one layer.
    "query": lambda x: x.chunk(3)[0],
    "key": lambda x: x.chunk(3)[1],
    "value": lambda x: x.chunk(3)[2],
    # It merges patches channel by channel, (row, column) within; transformers patch by patch, (column, row).
    "merge": lambda x: x.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2),
}


def _is_kernel_first(x: Tensor) -> bool:
    return tuple(x.shape[:3]) in ((3, 3, 3), (3, 1, 1)) and tuple(x.shape[1:4]) not in ((3, 3, 3), (3, 1, 1))


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


def _trunk(theirs: str) -> list[Rule]:
    """CRN's and BEVDepth's detection head: ResNet trunk, neck, centre head."""
    return [
        (r"trunk\.stages\.stem\.0\.(.*)", rf"{theirs}.trunk.conv1.\1", ""),
        (r"trunk\.stages\.stem\.1\.(.*)", rf"{theirs}.trunk.bn1.\1", ""),
        (r"trunk\.stages\.stages\.(\d+)\.(\d+)\.conv(\d)\.(.*)", rf"{theirs}.trunk.layer+\1.\2.conv\3.\4", ""),
        (r"trunk\.stages\.stages\.(\d+)\.(\d+)\.norm(\d)\.(.*)", rf"{theirs}.trunk.layer+\1.\2.bn\3.\4", ""),
        (r"trunk\.stages\.stages\.(\d+)\.(\d+)\.shortcut\.(.*)", rf"{theirs}.trunk.layer+\1.\2.downsample.\3", ""),
        *_neck(r"trunk\.neck", f"{theirs}.neck", 0),
        *_head(theirs),
    ]


_VIEW = ("reduce_conv.0", "reduce_conv.1", "conv.0", "conv.1", "conv.3", "conv.4")
CRN: list[Rule] = [
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
    *_trunk("model.head"),
]
CENTERPOINT_PILLAR: list[Rule] = [
    (r"lidar\.encoder\.(linear|norm)\.(.*)", r"pts_voxel_encoder.pfn_layers.0.\1.\2", ""),
    *_second(r"lidar\.stages", "pts_backbone"),
    *_neck(r"lidar\.neck", "pts_neck", None),
    *_head("pts_bbox_head"),
]
_DEPTH = "model.backbone.depth_net"
_PLANES = ("conv.0", "conv.1", "conv.3", "conv.4")
_AGGREGATION = "model.backbone.depth_aggregation_net"
BEVDEPTH: list[Rule] = [
    *resnet_rules(r"camera\.image\.backbone", "model.backbone.img_backbone"),
    *_neck(r"camera\.image\.neck", "model.backbone.img_neck", 2),
    (r"camera\.depth\.reduce\.(.*)", rf"{_DEPTH}.reduce_conv.\1", ""),
    (r"camera\.depth\.norm\.(.*)", rf"{_DEPTH}.bn.\1", ""),
    (r"camera\.depth\.(context|depth)_mlp\.0\.(.*)", rf"{_DEPTH}.\1_mlp.fc1.\2", ""),
    (r"camera\.depth\.(context|depth)_mlp\.2\.(.*)", rf"{_DEPTH}.\1_mlp.fc2.\2", ""),
    (r"camera\.depth\.(context|depth)_gate\.0\.(.*)", rf"{_DEPTH}.\1_se.conv_reduce.\2", ""),
    (r"camera\.depth\.(context|depth)_gate\.2\.(.*)", rf"{_DEPTH}.\1_se.conv_expand.\2", ""),
    (r"camera\.depth\.context\.(.*)", rf"{_DEPTH}.context_conv.\1", ""),
    (r"camera\.depth\.depth\.3\.branches\.(\d)\.0\.(.*)", rf"{_DEPTH}.depth_conv.3.aspp+\1.atrous_conv.\2", ""),
    (r"camera\.depth\.depth\.3\.branches\.(\d)\.1\.(.*)", rf"{_DEPTH}.depth_conv.3.aspp+\1.bn.\2", ""),
    (r"camera\.depth\.depth\.3\.mean\.(.*)", rf"{_DEPTH}.depth_conv.3.global_avg_pool.\1", ""),
    (r"camera\.depth\.depth\.3\.mix\.0\.(.*)", rf"{_DEPTH}.depth_conv.3.conv1.\1", ""),
    (r"camera\.depth\.depth\.3\.mix\.1\.(.*)", rf"{_DEPTH}.depth_conv.3.bn1.\1", ""),
    (r"camera\.depth\.depth\.4\.offset\.(.*)", rf"{_DEPTH}.depth_conv.4.conv_offset.\1", ""),
    (r"camera\.depth\.depth\.(\d+)\.norm(\d)\.(.*)", rf"{_DEPTH}.depth_conv.\1.bn\2.\3", ""),
    (r"camera\.depth\.depth\.(.*)", rf"{_DEPTH}.depth_conv.\1", ""),
    (r"camera\.view\.reduce\.(.*)", rf"{_AGGREGATION}.reduce_conv.\1", "plane"),
    *[
        (rf"camera\.view\.convs\.{i // 2}\.{i % 2}\.(.*)", rf"{_AGGREGATION}.{name}.\1", "plane")
        for i, name in enumerate(_PLANES)
    ],
    (r"camera\.view\.out\.(.*)", rf"{_AGGREGATION}.out_conv.0.\1", "plane"),
    *_trunk("model.head"),
]


def _sparse(theirs: str, ours: str = r"lidar\.encoder\.layers", change: str = "sparse", points: str = "sparse") -> list[Rule]:
    """mmdetection3d's SparseEncoder with basic blocks: layers 0 = conv_input, then three per stage, 12 = conv_out.
    points: the change of the first one, which reads points."""
    rules = _sparse_conv(rf"{ours}\.0", f"{theirs}.conv_input", points)
    rules += _sparse_conv(rf"{ours}\.12", f"{theirs}.conv_out", change)
    for stage in range(4):
        layer = f"{theirs}.encoder_layers.encoder_layer{stage + 1}"
        for block in range(2):
            mine = rf"{ours}\.{1 + 3 * stage + block}"
            rules += [
                (rf"{mine}\.convs\.(\d)\.(.*)", rf"{layer}.{block}.conv+\1.\2", change),
                (rf"{mine}\.norms\.(\d)\.(.*)", rf"{layer}.{block}.bn+\1.\2", ""),
            ]
        if stage < 3:
            rules += _sparse_conv(rf"{ours}\.{3 + 3 * stage}", f"{layer}.2", change)
    return rules


def _sparse_conv(ours: str, theirs: str, change: str) -> list[Rule]:
    return [(rf"{ours}\.layer\.(.*)", rf"{theirs}.0.\1", change), (rf"{ours}\.norm\.(.*)", rf"{theirs}.1.\1", "")]


def _voxel(prefix: str) -> list[Rule]:
    """CenterPoint with voxels; its neck stores the branch at stride 1 as a convolution."""
    return [
        *_sparse(f"{prefix}pts_middle_encoder"),
        *_second(r"lidar\.stages", f"{prefix}pts_backbone"),
        *_neck(r"lidar\.neck", f"{prefix}pts_neck", None),
        *_head(f"{prefix}pts_bbox_head"),
    ]


CENTERPOINT_VOXEL: list[Rule] = _voxel("")
LABELDISTILL_LIDAR: list[Rule] = _voxel("model.centerpoint.")
_LABEL = "model.label_encoder"
LABELDISTILL_LABEL: list[Rule] = [
    *[
        rule
        for ours, theirs in (("boxes", "mlp_box"), ("classes", "mlp_label"), ("joined", "mlp2"))
        for rule in (
            (rf"{ours}\.0\.(.*)", rf"{_LABEL}.{theirs}.fc1.\1", ""),
            (rf"{ours}\.2\.(.*)", rf"{_LABEL}.{theirs}.fc2.\1", ""),
        )
    ],
    (r"joined\.3\.(.*)", rf"{_LABEL}.ln2.\1", ""),
    (r"residual\.conv(\d)\.(.*)", rf"{_LABEL}.conv1.conv\1.\2", ""),
    (r"residual\.norm(\d)\.(.*)", rf"{_LABEL}.conv1.bn\1.\2", ""),
    (r"branches\.bev_stage1\.(.*)", rf"{_LABEL}.conv_blocks.0.\1", ""),
    (r"branches\.bev_stage2\.(.*)", rf"{_LABEL}.conv_blocks.1.\1", ""),
]


def _swin(ours: str, theirs: str) -> list[Rule]:
    """mmdetection's Swin with the maps of its last three stages; transformers 4 and 5 name the attention differently."""
    block, their = rf"{ours}\.swin\.encoder\.layers\.(\d)\.blocks\.(\d+)", rf"{theirs}.stages.\1.blocks.\2"
    merge = rf"{ours}\.swin\.encoder\.layers\.(\d)\.downsample"
    rules: list[Rule] = [
        (rf"{ours}\.swin\.embeddings\.patch_embeddings\.(.*)", rf"{theirs}.patch_embed.\1", ""),
        (rf"{ours}\.swin\.embeddings\.norm\.(.*)", rf"{theirs}.patch_embed.norm.\1", ""),
        (rf"{ours}\.hidden_states_norms\.stage2\.(.*)", rf"{theirs}.norm1.\1", ""),
        (rf"{ours}\.hidden_states_norms\.stage3\.(.*)", rf"{theirs}.norm2.\1", ""),
        (rf"{ours}\.hidden_states_norms\.stage4\.(.*)", rf"{theirs}.norm3.\1", ""),
        (rf"{merge}\.reduction\.(.*)", rf"{theirs}.stages.\1.downsample.reduction.\2", "merge"),
        (rf"{merge}\.norm\.(.*)", rf"{theirs}.stages.\1.downsample.norm.\2", "merge"),
        (rf"{block}\.layernorm_before\.(.*)", rf"{their}.norm1.\3", ""),
        (rf"{block}\.layernorm_after\.(.*)", rf"{their}.norm2.\3", ""),
        (rf"{block}\.(?:mlp\.fc1|intermediate\.dense)\.(.*)", rf"{their}.ffn.layers.0.0.\3", ""),
        (rf"{block}\.(?:mlp\.fc2|output\.dense)\.(.*)", rf"{their}.ffn.layers.1.\3", ""),
        (rf"{block}\.attention\.(?:o_proj|output\.dense)\.(.*)", rf"{their}.attn.w_msa.proj.\3", ""),
        (
            rf"{block}\.attention\.(?:.*\.)?(relative_position_bias_table|relative_position_index)",
            rf"{their}.attn.w_msa.\3",
            "",
        ),
    ]
    for part in ("query", "key", "value"):
        mine = rf"{block}\.attention\.(?:{part[0]}_proj|self\.{part})\.(.*)"
        rules.append((mine, rf"{their}.attn.w_msa.qkv.\3", part))
    return rules


def _crkd_image(camera: str) -> list[Rule]:
    """ResNet with SECONDFPN, or Swin with GeneralizedLSSFPN."""
    return [
        *_swin(r"camera\.image\.backbone", f"{camera}.backbone"),
        *resnet_rules(r"camera\.image\.backbone", f"{camera}.backbone"),
        *_neck(r"camera\.image\.neck", f"{camera}.neck", 1),
        *[
            (rf"camera\.image\.neck\.{ours}\.(\d)\.{i}\.(.*)", rf"{camera}.neck.{theirs}_convs.\1.{leaf}.\2", "")
            for ours, theirs in (("lateral", "lateral"), ("smooth", "fpn"))
            for i, leaf in enumerate(("conv", "bn"))
        ],
    ]


def _crkd_rest(fuser: str, decoder: str, heads: str) -> list[Rule]:
    return [
        (r"fuser\.gates\.(\d)\.(.*)", rf"{fuser}.input_conv_sensor_+\1.\2", ""),
        (r"fuser\.mix\.(.*)", rf"{fuser}.output_fuser_conv_norm.\1", ""),
        (r"trunk\.stages\.(\d)\.(\d)\.norm(\d)\.(.*)", rf"{decoder}.backbone.\1.\2.bn\3.\4", ""),
        (r"trunk\.stages\.(\d)\.(\d)\.shortcut\.(.*)", rf"{decoder}.backbone.\1.\2.downsample.\3", ""),
        (r"trunk\.stages\.(.*)", rf"{decoder}.backbone.\1", ""),
        (r"trunk\.neck\.fuse\.(.*)", rf"{decoder}.neck.fuse.\1", ""),
        (r"trunk\.neck\.up\.0\.(.*)", rf"{decoder}.neck.upsample.1.\1", ""),
        (r"trunk\.neck\.up\.1\.(.*)", rf"{decoder}.neck.upsample.2.\1", ""),
        *_head(f"{heads}.object"),
    ]


def _crkd(suffix: str) -> list[Rule]:
    """CRKD's student; in a distillation file its names end in ``_student``."""
    encoders = f"encoders{suffix}"
    return [
        *_crkd_image(f"{encoders}.camera"),
        (r"camera\.depth\.both\.(.*)", rf"{encoders}.camera.vtransform.depthnet.\1", ""),
        (r"radar\.layers\.(\d)\.(.*)", rf"{encoders}.radar.backbone.pts_voxel_encoder.rfn_layers.\1.\2", ""),
        (r"calibration\.blocks\.(\d)\.(\d)\.(.*)", rf"{encoders}.radar.backbone.caliber.*\1+\2.\3", ""),
        *_crkd_rest(f"fuser{suffix}", f"decoder{suffix}", f"heads{suffix}"),
    ]


CRKD: dict[bool, list[Rule]] = {False: _crkd(""), True: _crkd("_student")}
CRKD_TEACHER: list[Rule] = [
    *_crkd_image("encoders.camera"),
    (r"camera\.depth\.points\.(.*)", r"encoders.camera.vtransform.dtransform.\1", ""),
    (r"camera\.depth\.both\.(.*)", r"encoders.camera.vtransform.depthnet.\1", ""),
    (r"camera\.refine\.(.*)", r"encoders.camera.vtransform.downsample.\1", ""),
    *_sparse("encoders.lidar.backbone", r"lidar\.layers", "sparse_xyz", "sparse_xyz_points"),
    *_crkd_rest("fuser", "decoder", "heads"),
]
