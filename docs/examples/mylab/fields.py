"""How often the radars hit each cell of the model's grid, per sweep age: a new column of the cache."""

import numpy as np

from imkd_data.fields.base import CacheField

SWEEPS = 3


def hits(payload, recipe, suite, upstream, drops):
    out = np.zeros((SWEEPS, *recipe.view_grid.shape), np.uint8)
    for channel, scans in payload.radar.items():
        for k, (sweep, points) in enumerate(zip(payload.sample.radar[channel], scans, strict=True)):
            row, column, inside = recipe.view_grid.cells(sweep.ego_from_sensor.points(points.xyz_m)[:, :2])
            drops["outside"] = drops.get("outside", 0) + int((~inside).sum())
            if k < SWEEPS:
                np.add.at(out[k], (row[inside], column[inside]), 1)
    return out


def shape(recipe, suite):
    return (SWEEPS, *recipe.view_grid.shape)


RADAR_HITS = CacheField(
    name="radar_hits", version=1, kind="array", space="bev", dtype=np.dtype("u1"), shape=shape, compute=hits,
    needs=("radar",), sensors=("radar",), uses=("grid", "view_cells", "radar_sweeps"),
)  # fmt: skip
