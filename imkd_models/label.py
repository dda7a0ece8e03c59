"""Label encoder (LabelDistill): truth boxes -> maps of the shapes that a LiDAR teacher's neck reads (imkd: section 2.2).

It is trained through the frozen teacher's neck and head with the ordinary detection loss. The teacher is not a registered
module: it is in no state dict, keeps eval() and gets no gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from imkd_data.classes import LABEL_FROM_CLASS
from imkd_data.errors import MismatchError, MissingFeatureError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.blocks import BasicBlock, frozen_copy
from imkd_models.config import LabelConfig
from imkd_models.detector import Detector, check_grid
from imkd_models.head import LossOptions, _channel_table, detection_loss
from imkd_models.outputs import Outputs

__all__ = ["LabelEncoder", "label_maps"]


def label_maps(boxes: BoxBatch, grid: BevGrid, num_classes: int, shrink: float = 0.5) -> tuple[Tensor, Tensor]:
    """Box map (B, 9, Y, X): x, y, z, l, w, h, yaw, vx, vy (unknown velocity 0) and one-hot class map (B, K, Y, X), inside
    each valid box's rotated rectangle shrunk to ``shrink`` of length and width and in the cell of its centre; zero
    elsewhere. Where boxes overlap the smaller one wins. A label is the channel, 0 to K - 1; boxes below 0 are left out.
    Vectorised over boxes and cells."""
    centres = torch.as_tensor(grid.centres(), dtype=torch.float32, device=boxes.yaw_rad_BM.device)
    centre, size = boxes.centre_m_BM3.float(), boxes.size_lwh_m_BM3.float()
    batch, count = boxes.valid_BM.shape
    if count == 0:
        return centre.new_zeros(batch, 9, *grid.shape), centre.new_zeros(batch, num_classes, *grid.shape)
    d = centres - centre[:, :, None, None, :2]  # (B, M, Y, X, 2)
    c, s = boxes.yaw_rad_BM.float().cos()[..., None, None], boxes.yaw_rad_BM.float().sin()[..., None, None]
    along, across = c * d[..., 0] + s * d[..., 1], c * d[..., 1] - s * d[..., 0]
    half = size[:, :, None, None, :2] * shrink / 2
    inside = (along.abs() <= half[..., 0]) & (across.abs() <= half[..., 1])
    # d points from the box to the cell centre: the cell that holds the centre has |d| within half a cell.
    inside |= ((d <= grid.cell_m / 2) & (d > -grid.cell_m / 2)).all(-1)
    inside &= (boxes.valid_BM & (boxes.label_BM >= 0))[..., None, None]
    area = torch.where(inside, (size[..., 0] * size[..., 1])[..., None, None], torch.inf)
    smallest, owner = area.min(dim=1)  # (B, Y, X)
    covered = smallest.isfinite()
    values = torch.cat(
        [centre, size, boxes.yaw_rad_BM.float()[..., None], torch.nan_to_num(boxes.velocity_mps_BM2.float())], dim=-1
    )
    flat = owner.flatten(1)
    box_map = values.gather(1, flat[..., None].expand(-1, -1, 9)).transpose(1, 2).reshape(batch, 9, *grid.shape)
    label = boxes.label_BM.clamp(min=0).gather(1, flat).view(batch, *grid.shape)
    one_hot = nn.functional.one_hot(label, num_classes).movedim(-1, 1).float()
    return box_map * covered[:, None], one_hot * covered[:, None]


class LabelEncoder(nn.Module):
    """Batch with boxes -> Outputs with one map per stage of the teacher; with a teacher also bev_neck and head.

    Raises MismatchError when the teacher's stages do not fit the config.
    """

    sensors: tuple[str, ...] = ()

    def __init__(self, config: LabelConfig, teacher: Detector | None = None) -> None:
        super().__init__()
        self.config, self.grid = config, config.grid
        hidden, classes = config.hidden, sum(len(group) for group in config.groups)
        self.boxes = nn.Sequential(nn.Linear(9, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.classes = nn.Sequential(nn.Linear(classes, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.joined = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        self.residual = BasicBlock(hidden, hidden)
        self.branches = nn.ModuleDict({name: self._branch(c, (ny, nx)) for name, c, ny, nx in config.stages})
        self._teacher: tuple[Detector, ...] = ()
        if teacher is not None:
            self.attach(teacher)

    def _branch(self, channels: int, shape: tuple[int, int]) -> nn.Module:
        """3x3 conv (replicate), LayerNorm over (C, Y, X), ReLU; a stage finer than the label grid is up-sampled first."""
        ny = self.config.grid.ny
        layers: list[nn.Module] = []
        if shape[0] > ny:
            layers.append(nn.Upsample(size=shape, mode="bilinear", align_corners=False))
        stride = max(1, ny // shape[0])
        layers.append(nn.Conv2d(self.config.hidden, channels, 3, stride=stride, padding=1, padding_mode="replicate"))
        return nn.Sequential(*layers, nn.LayerNorm((channels, *shape)), nn.ReLU())

    @property
    def feature_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, Y, X) of every delivered map."""
        return {name: (c, ny, nx) for name, c, ny, nx in self.config.stages}

    def attach(self, teacher: Detector) -> None:
        """Give the teacher whose neck and head turn the maps into boxes; it is frozen here."""
        expected = {name: shape for name, shape in teacher.feature_shapes.items() if name.startswith("bev_stage")}
        if expected != self.feature_shapes:
            raise MismatchError(
                "the label encoder does not fit this teacher",
                expected=str(expected),
                found=str(self.feature_shapes),
                next="train the label encoder again with this teacher",
            )
        self._teacher = (frozen_copy(teacher),)

    def _apply(self, fn, recurse=True):  # the teacher follows the encoder to its device
        for teacher in self._teacher:
            teacher._apply(fn)
        return super()._apply(fn, recurse)

    def channels(self, boxes: BoxBatch) -> BoxBatch:
        """The boxes with the class map's channel for a label, -1 for a class outside the groups. Channels follow the order of
        labels, not of groups: with all ten classes they are the labels, as every trained encoder has them."""
        classes = sorted((name for group in self.config.groups for name in group), key=LABEL_FROM_CLASS.__getitem__)
        return replace(boxes, label_BM=_channel_table(classes, boxes.label_BM.device)[boxes.label_BM])

    def forward(self, batch: Batch) -> Outputs:
        check_grid(self.grid, batch)
        if batch.boxes is None:
            raise MissingFeatureError("the label encoder needs boxes", next="use a split with annotations")
        with torch.autocast(batch.boxes.centre_m_BM3.device.type, enabled=False):
            boxes = self.channels(batch.boxes)
            box_map, one_hot = label_maps(boxes, self.grid, self.classes[0].in_features, self.config.shrink)
            tokens = self.boxes(box_map.movedim(1, -1)) + self.classes(one_hot.movedim(1, -1))
            x = self.joined(tokens).movedim(-1, 1).contiguous()
        x = self.residual(x)
        features = {name: branch(x) for name, branch in self.branches.items()}
        if not self._teacher:
            return Outputs(features=features, head=(), grid=self.grid)
        teacher = self._teacher[0]
        neck = teacher.read_neck(features)
        return Outputs(features={**features, "bev_neck": neck}, head=teacher.head.maps(neck), grid=self.grid)

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Weighted detection loss through the teacher's neck and head."""
        if not outputs.head:
            raise MissingFeatureError("the label encoder's loss needs its LiDAR teacher", next="--teacher lidar=CKPT")
        options = LossOptions(box_weight=self.config.box_weight, velocity_weight=self.config.velocity_weight)
        return detection_loss(outputs.head, batch.boxes, self.grid, options)
