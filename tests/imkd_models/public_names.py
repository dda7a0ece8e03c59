"""Names and shapes of public state dicts, written down from the public code (mmdetection, mmdetection3d, BEVDepth,
LabelDistill, CRKD) without looking at the key maps. Tensors lie on the meta device unless ``value`` says how to fill them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imkd_data.geometry import BevGrid

State = dict[str, Tensor]


class Names:
    """Collects tensors under a prefix."""

    def __init__(self, value: Callable[..., Tensor] | None = None) -> None:
        self.state: State = {}
        self.value = value or (lambda *shape: torch.empty(shape, device="meta"))

    def put(self, name: str, *shape: int) -> None:
        assert name not in self.state, name
        self.state[name] = self.value(*shape)

    def conv(self, name: str, out: int, inner: int, *kernel: int, bias: bool = False) -> None:
        self.put(f"{name}.weight", out, inner, *kernel)
        if bias:
            self.put(f"{name}.bias", out)

    def norm(self, name: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            self.put(f"{name}.{leaf}", channels)
        self.put(f"{name}.num_batches_tracked")

    def linear(self, name: str, out: int, inner: int, *, bias: bool = True) -> None:
        self.conv(name, out, inner, bias=bias)

    def basic(self, name: str, inner: int, out: int, *, shortcut: bool = False) -> None:
        """mmdetection's BasicBlock."""
        self.conv(f"{name}.conv1", out, inner, 3, 3)
        self.norm(f"{name}.bn1", out)
        self.conv(f"{name}.conv2", out, out, 3, 3)
        self.norm(f"{name}.bn2", out)
        if shortcut:
            self.conv(f"{name}.downsample.0", out, inner, 1, 1)
            self.norm(f"{name}.downsample.1", out)


def resnet50(n: Names, prefix: str) -> None:
    n.conv(f"{prefix}.conv1", 64, 3, 7, 7)
    n.norm(f"{prefix}.bn1", 64)
    width = 64
    for stage, (middle, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"{prefix}.layer{stage}.{block}"
            n.conv(f"{name}.conv1", middle, width, 1, 1)
            n.norm(f"{name}.bn1", middle)
            n.conv(f"{name}.conv2", middle, middle, 3, 3)
            n.norm(f"{name}.bn2", middle)
            n.conv(f"{name}.conv3", 4 * middle, middle, 1, 1)
            n.norm(f"{name}.bn3", 4 * middle)
            if block == 0:
                n.conv(f"{name}.downsample.0", 4 * middle, width, 1, 1)
                n.norm(f"{name}.downsample.1", 4 * middle)
            width = 4 * middle


def second_fpn(n: Names, prefix: str, branches: list[tuple[str, int, int, int]]) -> None:
    """branches: (conv | deconv, in, out, kernel)."""
    for i, (kind, inner, out, kernel) in enumerate(branches):
        shape = (out, inner) if kind == "conv" else (inner, out)
        n.put(f"{prefix}.deblocks.{i}.0.weight", *shape, kernel, kernel)
        n.norm(f"{prefix}.deblocks.{i}.1", out)


def second(n: Names, prefix: str, inner: int, stages: list[tuple[int, int]]) -> None:
    for i, (out, layers) in enumerate(stages):
        for k in range(layers + 1):
            n.conv(f"{prefix}.blocks.{i}.{3 * k}", out, inner if k == 0 else out, 3, 3)
            n.norm(f"{prefix}.blocks.{i}.{3 * k + 1}", out)
        inner = out


def centre_head(n: Names, prefix: str, inner: int) -> None:
    n.conv(f"{prefix}.shared_conv.conv", 64, inner, 3, 3)
    n.norm(f"{prefix}.shared_conv.bn", 64)
    for task, classes in enumerate((1, 2, 2, 1, 2, 2)):
        for branch, out in (("reg", 2), ("height", 1), ("dim", 3), ("rot", 2), ("vel", 2), ("heatmap", classes)):
            name = f"{prefix}.task_heads.{task}.{branch}"
            n.conv(f"{name}.0.conv", 64, 64, 3, 3)
            n.norm(f"{name}.0.bn", 64)
            n.conv(f"{name}.1", out, 64, 3, 3, bias=True)


def bevdepth_head(n: Names, prefix: str, inner: int, base: int) -> None:
    n.conv(f"{prefix}.trunk.conv1", base, inner, 7, 7)
    n.norm(f"{prefix}.trunk.bn1", base)
    width = base
    for stage in range(3):
        out = base * 2**stage
        n.basic(f"{prefix}.trunk.layer{stage + 1}.0", width, out, shortcut=stage > 0)
        n.basic(f"{prefix}.trunk.layer{stage + 1}.1", out, out)
        width = out
    second_fpn(n, f"{prefix}.neck", [("deconv", (inner, base, 2 * base, 4 * base)[i], 64, 2**i) for i in range(4)])
    centre_head(n, prefix, 256)


def bevdepth(keyframes: int = 4, context: int = 80, base: int = 160, *, aggregate: bool = False) -> State:
    """A Lightning checkpoint's state dict of BEVDepth R50 (context 150, base 300: LabelDistill's student)."""
    n = Names()
    back = "model.backbone"
    for name, shape in (("voxel_size", (3,)), ("voxel_coord", (3,)), ("voxel_num", (3,)), ("frustum", (112, 16, 44, 4))):
        n.put(f"{back}.{name}", *shape)
    resnet50(n, f"{back}.img_backbone")
    kinds = [("conv", 256, 128, 4), ("conv", 512, 128, 2), ("deconv", 1024, 128, 1), ("deconv", 2048, 128, 2)]
    second_fpn(n, f"{back}.img_neck", kinds)
    d = f"{back}.depth_net"
    n.conv(f"{d}.reduce_conv.0", 512, 512, 3, 3, bias=True)
    n.norm(f"{d}.reduce_conv.1", 512)
    n.conv(f"{d}.context_conv", context, 512, 1, 1, bias=True)
    n.norm(f"{d}.bn", 27)
    for which in ("depth", "context"):
        n.linear(f"{d}.{which}_mlp.fc1", 512, 27)
        n.linear(f"{d}.{which}_mlp.fc2", 512, 512)
        n.conv(f"{d}.{which}_se.conv_reduce", 512, 512, 1, 1, bias=True)
        n.conv(f"{d}.{which}_se.conv_expand", 512, 512, 1, 1, bias=True)
    for block in range(3):
        n.basic(f"{d}.depth_conv.{block}", 512, 512)
    for i, kernel in enumerate((1, 3, 3, 3), start=1):
        n.conv(f"{d}.depth_conv.3.aspp{i}.atrous_conv", 512, 512, kernel, kernel)
        n.norm(f"{d}.depth_conv.3.aspp{i}.bn", 512)
    n.conv(f"{d}.depth_conv.3.global_avg_pool.1", 512, 512, 1, 1)
    n.norm(f"{d}.depth_conv.3.global_avg_pool.2", 512)
    n.conv(f"{d}.depth_conv.3.conv1", 512, 2560, 1, 1)
    n.norm(f"{d}.depth_conv.3.bn1", 512)
    n.put(f"{d}.depth_conv.4.weight", 512, 128, 3, 3)
    n.conv(f"{d}.depth_conv.4.conv_offset", 18, 512, 3, 3, bias=True)
    n.conv(f"{d}.depth_conv.5", 112, 512, 1, 1, bias=True)
    if aggregate:
        a = f"{back}.depth_aggregation_net"
        for name in ("reduce_conv.0", "conv.0", "conv.3"):
            n.conv(f"{a}.{name}", context, context, 3, 3)
        for name in ("reduce_conv.1", "conv.1", "conv.4"):
            n.norm(f"{a}.{name}", context)
        n.conv(f"{a}.out_conv.0", context, context, 3, 3, bias=True)
    bevdepth_head(n, "model.head", keyframes * context, base)
    return n.state


def sparse_encoder(n: Names, prefix: str, *, kernel_first: bool = False) -> None:
    """mmdetection3d's SparseEncoder with basic blocks; spconv 2 stores (out, kernel, in), mmcv (kernel, in, out)."""

    def conv(name: str, out: int, inner: int, *kernel: int) -> None:
        n.put(f"{name}.weight", *((*kernel, inner, out) if kernel_first else (out, *kernel, inner)))

    conv(f"{prefix}.conv_input.0", 16, 5, 3, 3, 3)
    n.norm(f"{prefix}.conv_input.1", 16)
    for stage, width in enumerate((16, 32, 64, 128), start=1):
        layer = f"{prefix}.encoder_layers.encoder_layer{stage}"
        for block in range(2):
            for k in (1, 2):
                conv(f"{layer}.{block}.conv{k}", width, width, 3, 3, 3)
                n.norm(f"{layer}.{block}.bn{k}", width)
        if stage < 4:
            conv(f"{layer}.2.0", 2 * width, width, 3, 3, 3)
            n.norm(f"{layer}.2.1", 2 * width)
    conv(f"{prefix}.conv_out.0", 128, 128, 3, 1, 1)
    n.norm(f"{prefix}.conv_out.1", 128)


def centerpoint_voxel(prefix: str = "", *, kernel_first: bool = False, value: Any = None) -> State:
    n = Names(value)
    sparse_encoder(n, f"{prefix}pts_middle_encoder", kernel_first=kernel_first)
    second(n, f"{prefix}pts_backbone", 256, [(128, 5), (256, 5)])
    second_fpn(n, f"{prefix}pts_neck", [("conv", 128, 256, 1), ("deconv", 256, 256, 2)])
    centre_head(n, f"{prefix}pts_bbox_head", 512)
    return n.state


def labeldistill() -> State:
    """The student with five keyframes, its teachers and its adaptors in one file."""
    n = Names()
    label = "model.label_encoder"
    for name, inner in (("mlp_box", 9), ("mlp_label", 10), ("mlp2", 256)):
        n.linear(f"{label}.{name}.fc1", 256, inner)
        n.linear(f"{label}.{name}.fc2", 256, 256)
    n.put(f"{label}.ln2.weight", 256)
    n.put(f"{label}.ln2.bias", 256)
    n.basic(f"{label}.conv1", 256, 256)
    for i, (out, size) in enumerate(((128, 128), (256, 64))):
        n.conv(f"{label}.conv_blocks.{i}.0", out, 256, 3, 3, bias=True)
        n.put(f"{label}.conv_blocks.{i}.1.weight", out, size, size)
        n.put(f"{label}.conv_blocks.{i}.1.bias", out, size, size)
    for which in ("lidar", "label"):
        for i, (inner, out) in enumerate(((250, 128), (100, 256))):
            block = f"model.distill_encoder_{which}.blocks.{i}"
            n.conv(f"{block}.0", out, inner, 3, 3, bias=True)
            n.norm(f"{block}.1", out)
            n.basic(f"{block}.3", out, out)
    return {**bevdepth(5, 150, 300), **n.state, **centerpoint_voxel("model.centerpoint.")}


def swin_tiny(n: Names, prefix: str) -> None:
    """mmdetection's Swin with the maps of its last three stages."""
    n.conv(f"{prefix}.patch_embed.projection", 96, 3, 4, 4, bias=True)
    layer_norm(n, f"{prefix}.patch_embed.norm", 96)
    for stage, (depth, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
        width = 96 * 2**stage
        for block in range(depth):
            name = f"{prefix}.stages.{stage}.blocks.{block}"
            layer_norm(n, f"{name}.norm1", width)
            n.put(f"{name}.attn.w_msa.relative_position_bias_table", 169, heads)
            n.put(f"{name}.attn.w_msa.relative_position_index", 49, 49)
            n.linear(f"{name}.attn.w_msa.qkv", 3 * width, width)
            n.linear(f"{name}.attn.w_msa.proj", width, width)
            layer_norm(n, f"{name}.norm2", width)
            n.linear(f"{name}.ffn.layers.0.0", 4 * width, width)
            n.linear(f"{name}.ffn.layers.1", width, 4 * width)
        if stage < 3:
            layer_norm(n, f"{prefix}.stages.{stage}.downsample.norm", 4 * width)
            n.linear(f"{prefix}.stages.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        if stage > 0:
            layer_norm(n, f"{prefix}.norm{stage}", width)


def layer_norm(n: Names, name: str, width: int) -> None:
    n.put(f"{name}.weight", width)
    n.put(f"{name}.bias", width)


def level_neck(n: Names, prefix: str, out: int) -> None:
    """BEVFusion's GeneralizedLSSFPN over Swin's last three maps."""
    for i, inner in enumerate((192 + out, 384 + 768)):
        for kind, width, kernel in (("lateral_convs", inner, 1), ("fpn_convs", out, 3)):
            n.conv(f"{prefix}.{kind}.{i}.conv", out, width, kernel, kernel)
            n.norm(f"{prefix}.{kind}.{i}.bn", out)


def crkd_image(n: Names, camera: str, out: int, *, swin: bool) -> None:
    """Backbone and neck of ``out`` channels at stride 8."""
    if swin:
        swin_tiny(n, f"{camera}.backbone")
        level_neck(n, f"{camera}.neck", out)
        return
    resnet50(n, f"{camera}.backbone")
    kinds = (("conv", 256, 2), ("deconv", 512, 1), ("deconv", 1024, 2), ("deconv", 2048, 4))
    second_fpn(n, f"{camera}.neck", [(kind, inner, out // 4, kernel) for kind, inner, kernel in kinds])


def crkd_rest(n: Names, suffix: str) -> None:
    """Gated fuser, decoder and head."""
    fuser = f"fuser{suffix}"
    n.conv(f"{fuser}.input_conv_sensor_1", 80, 336, 3, 3, bias=True)
    n.conv(f"{fuser}.input_conv_sensor_2", 256, 336, 3, 3, bias=True)
    n.conv(f"{fuser}.output_fuser_conv_norm.0", 256, 336, 3, 3)
    n.norm(f"{fuser}.output_fuser_conv_norm.1", 256)
    width = 256
    for stage, out in enumerate((128, 256, 512)):
        n.basic(f"decoder{suffix}.backbone.{stage}.0", width, out, shortcut=True)
        n.basic(f"decoder{suffix}.backbone.{stage}.1", out, out)
        width = out
    neck = f"decoder{suffix}.neck"
    for name, inner, kernel in (("fuse.0", 640, 1), ("fuse.3", 256, 3), ("upsample.1", 256, 3)):
        n.conv(f"{neck}.{name}", 256, inner, kernel, kernel)
    for name in ("fuse.1", "fuse.4", "upsample.2"):
        n.norm(f"{neck}.{name}", 256)
    centre_head(n, f"heads{suffix}.object", 256)


def crkd_student(suffix: str = "", *, calibrated: bool = False, swin: bool = False) -> State:
    """CRKD's camera-radar student; suffix ``_student`` in a distillation file."""
    n = Names()
    camera, radar = f"encoders{suffix}.camera", f"encoders{suffix}.radar.backbone"
    crkd_image(n, camera, 512, swin=swin)
    for name, shape in (("dx", (3,)), ("bx", (3,)), ("nx", (3,)), ("frustum", (59, 32, 88, 3))):
        n.put(f"{camera}.vtransform.{name}", *shape)
    n.conv(f"{camera}.vtransform.depthnet", 59 + 80, 512, 1, 1, bias=True)
    for i in range(4):
        n.linear(f"{radar}.pts_voxel_encoder.rfn_layers.{i}.linear", 256, 47 if i == 0 else 256, bias=False)
        n.norm(f"{radar}.pts_voxel_encoder.rfn_layers.{i}.norm", 256)
    if calibrated:
        for i in (0, 3, 6):
            n.conv(f"{radar}.caliber.{i}", 256, 256, 3, 3, bias=True)
            n.norm(f"{radar}.caliber.{i + 1}", 256)
        n.conv(f"{radar}.distill_activation_head.0", 1, 256, 1, 1)
    crkd_rest(n, suffix)
    return n.state


def crkd_teacher(*, swin: bool = False, bins: int = 118, value: Any = None) -> State:
    """CRKD's LiDAR-camera teacher. Sparse weights lie as (x, y, z, in, out)."""
    n = Names(value)
    camera, lidar = "encoders.camera", "encoders.lidar.backbone"
    crkd_image(n, camera, 256, swin=swin)
    for name, shape in (("dx", (3,)), ("bx", (3,)), ("nx", (3,)), ("frustum", (bins, 32, 88, 3))):
        n.put(f"{camera}.vtransform.{name}", *shape)
    for i, inner, out, kernel in ((0, 1, 8, 1), (3, 8, 32, 5), (6, 32, 64, 5)):
        n.conv(f"{camera}.vtransform.dtransform.{i}", out, inner, kernel, kernel, bias=True)
        n.norm(f"{camera}.vtransform.dtransform.{i + 1}", out)
    for i, inner in ((0, 320), (3, 256)):
        n.conv(f"{camera}.vtransform.depthnet.{i}", 256, inner, 3, 3, bias=True)
        n.norm(f"{camera}.vtransform.depthnet.{i + 1}", 256)
    n.conv(f"{camera}.vtransform.depthnet.6", bins + 80, 256, 1, 1, bias=True)
    for i in (0, 3, 6):
        n.conv(f"{camera}.vtransform.downsample.{i}", 80, 80, 3, 3)
        n.norm(f"{camera}.vtransform.downsample.{i + 1}", 80)
    n.put(f"{lidar}.conv_input.0.weight", 3, 3, 3, 5, 16)
    n.norm(f"{lidar}.conv_input.1", 16)
    for stage, width in enumerate((16, 32, 64, 128), start=1):
        layer = f"{lidar}.encoder_layers.encoder_layer{stage}"
        for block in range(2):
            for k in (1, 2):
                n.put(f"{layer}.{block}.conv{k}.weight", 3, 3, 3, width, width)
                n.norm(f"{layer}.{block}.bn{k}", width)
        if stage < 4:
            n.put(f"{layer}.2.0.weight", 3, 3, 3, width, 2 * width)
            n.norm(f"{layer}.2.1", 2 * width)
    n.put(f"{lidar}.conv_out.0.weight", 1, 1, 3, 128, 128)
    n.norm(f"{lidar}.conv_out.1", 128)
    crkd_rest(n, "")
    return n.state


def public_boxes(head_maps: Any, sample: int, grid: BevGrid) -> list[list[float]]:
    """CenterPointBBoxCoder of BEVFusion: rows are x_L; boxes x, y, z, w, l, h, rot, vx, vy with score and label place.
    head_maps: per class group {branch: (B, C, X, Y)}; ``grid`` in bev, symmetric in y."""
    out = []
    for group, maps in enumerate(head_maps):
        score = torch.sigmoid(maps["heatmap"][sample])
        for k in range(score.shape[0]):
            for row in range(grid.ny):
                for column in range(grid.nx):
                    at = {n: m[sample, :, row, column].tolist() for n, m in maps.items()}
                    x = (row + at["reg"][0]) * grid.cell_m - grid.y_max_m
                    y = (column + at["reg"][1]) * grid.cell_m + grid.x_min_m
                    size = [math.exp(v) for v in at["dim"]]
                    rot = math.atan2(*at["rot"])
                    out.append([x, y, at["height"][0], *size, rot, *at["vel"], float(score[k, row, column]), group, k])
    return out
