"""Polar radar points, as a model of ours takes them: range, azimuth, radial speed, rcs, age; newest scans only.

Age is key time minus scan time in seconds: positive for what was measured before.
"""

import numpy as np

from imkd_data.views import View


class PolarRadar(View):
    name = "polar"
    needs = ("radar_points",)
    lidar_frame = False  # ego at whatever sensor is the reference will do

    def __init__(self, cache, *, sweeps=2):
        super().__init__(cache)
        self.sweeps = sweeps

    def sample(self, row):
        radar = self.cache.decode("radar_points", row)
        new = radar["sweep"] < self.sweeps
        x, y = radar["xyz_m"][new, :2].T
        reach = np.hypot(x, y)
        speed = (radar["vx_comp"][new] * x + radar["vy_comp"][new] * y) / np.maximum(reach, 0.1)
        columns = [reach, np.arctan2(y, x), speed, radar["rcs"][new], radar["age"][new]]
        return {"token": self.cache.token(row), "radar": np.stack(columns, axis=1).astype(np.float32)}
