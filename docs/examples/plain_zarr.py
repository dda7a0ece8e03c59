"""A cache opened with zarr and pyarrow alone: no import of imkd.   python docs/examples/plain_zarr.py CACHE"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr


def strongest_returns(path, count=5):
    """(token, x m, y m, intensity) of the cell with the strongest return of the first samples."""
    index = pq.read_table(Path(path) / "index.parquet", columns=["row", "token"], page_checksum_verification=True)
    arrays = zarr.open_group(Path(path) / "arrays.zarr", mode="r")
    planes, grid = arrays["lidar_bev_max"], dict(arrays["lidar_bev_max"].attrs)["grid"]
    out = []
    for row, token in zip(index["row"].to_pylist()[:count], index["token"].to_pylist(), strict=False):
        plane = planes[row]
        y, x = np.unravel_index(int(plane.argmax()), plane.shape)
        metres = [grid[f"{axis}_min_m"] + (i + 0.5) * grid["cell_m"] for axis, i in (("x", x), ("y", y))]
        out.append((token, *metres, int(plane[y, x])))
    return out


if __name__ == "__main__":
    for token, x, y, intensity in strongest_returns(sys.argv[1]):
        print(f"{token}: {intensity} at x {x:.1f} m, y {y:.1f} m")
