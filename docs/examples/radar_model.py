"""A radar model of somebody else, in twenty lines, trained on cached intensity maps with plain torch.

It learns to paint the LiDAR's intensity from radar returns alone.   python docs/examples/radar_model.py CACHE [STEPS]
"""

import sys

import numpy as np
import torch
from torch import nn

from imkd_data import BevGrid, open_cache

GRID = BevGrid(x_min_m=-25.6, y_min_m=-25.6, cell_m=0.8, nx=64, ny=64)


class RadarPainter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 1, 5, padding=2))

    def forward(self, radar):
        return self.net(radar)[:, 0]


def example(cache, row):
    radar = cache.decode("radar_points", row)  # every return of five radars, in ego
    y, x, inside = GRID.cells(radar["xyz_m"][:, :2])
    picture = np.zeros((3, *GRID.shape), np.float32)  # hits, strongest rcs, fastest return
    speed = np.hypot(radar["vx_comp"], radar["vy_comp"])
    for i, value in enumerate((np.ones_like(speed), radar["rcs"] / 40, speed / 10)):
        np.maximum.at(picture[i], (y[inside], x[inside]), value[inside])
    return picture, cache.intensity(row, GRID, reduce="mean").values / 255


def main(path, steps=100):
    torch.manual_seed(0)
    cache = open_cache(path)
    radar, target = (
        torch.from_numpy(np.stack(a)) for a in zip(*(example(cache, int(r)) for r in cache.rows()[:8]), strict=True)
    )
    model = RadarPainter()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(radar), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.5f} -> {losses[-1]:.5f} on {len(radar)} samples")
    return losses


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
