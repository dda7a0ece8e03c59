"""A run is a value: the tiny student, our method, our schedule."""

from imkd_models.presets import tiny_config
from pipelines.run import LoaderConfig, OptimConfig, Run

from .methods import HINT


def hinted(grid, image_hw_px, steps=2):
    return Run(
        name="hinted",
        summary="tiny camera-radar student with a hint from a LiDAR teacher",
        model=tiny_config(grid=grid, image_hw_px=image_hw_px).as_dict(),
        method=HINT,
        options={"weight": 0.5},
        max_steps=steps,
        batch_size=1,
        tensorboard=False,
        optim=OptimConfig(lr=1e-3, schedule="constant"),
        loader=LoaderConfig(workers=0),
    )
