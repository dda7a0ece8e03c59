"""Hint distillation: the student's BEV map, through a 1x1 convolution, should look like the LiDAR teacher's."""

from dataclasses import dataclass

from torch import nn

from imkd_models.distill import Distiller, Method, Needs, Options
from imkd_models.distill.options import option

NEEDS = Needs(student=("bev_neck",), teachers={"lidar": ("bev_neck",)})


@dataclass(frozen=True, kw_only=True)
class HintOptions(Options):
    weight: float = option(1.0, "weight of the hint", low=0.0)


class Hint(Distiller):
    def __init__(self, options, student, teachers, grid):
        super().__init__(options, NEEDS)
        channels = student.feature_shapes["bev_neck"][0], teachers["lidar"].feature_shapes["bev_neck"][0]
        self.adapter = nn.Conv2d(*channels, 1)

    def terms(self, student, teachers, batch):
        a, b = self.adapter(student.features["bev_neck"]), teachers["lidar"].features["bev_neck"]
        return {"hint": self.options.weight * nn.functional.smooth_l1_loss(a, b)}


HINT = Method(
    name="hint", title="Hint", summary="match the neck map", options=HintOptions, build=Hint, twin="the plain student",
    changes=lambda options: {}, needs_for=lambda options: NEEDS,
)  # fmt: skip
