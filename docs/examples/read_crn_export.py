"""Reads what ``imkd-data export --to crn`` wrote, knowing only CRN's documented file layout: no import of imkd.

python docs/examples/read_crn_export.py EXPORT
"""

import pickle
import sys
from pathlib import Path

import numpy as np


def read(root, split="train"):
    """Yields (sample token, {camera: depth rows}, radar rows in the LiDAR frame, {camera: radar rows in the image}, boxes)."""
    root = Path(root)
    with open(root / f"nuscenes_infos_{split}.pkl", "rb") as handle:  # made by yourself; never unpickle a stranger's file
        infos = pickle.load(handle)
    for info in infos:
        names = {camera: Path(record["filename"]).name for camera, record in info["cam_infos"].items()}
        lidar = Path(info["lidar_infos"]["LIDAR_TOP"]["filename"]).name
        depth = {c: np.fromfile(root / "depth_gt" / f"{n}.bin", np.float32).reshape(-1, 3) for c, n in names.items()}
        radar = np.fromfile(root / "radar_bev_filter" / lidar, np.float32).reshape(-1, 7)
        seen = {c: np.fromfile(root / "radar_pv_filter" / f"{n}.bin", np.float32).reshape(-1, 7) for c, n in names.items()}
        yield info["sample_token"], depth, radar, seen, info.get("ann_infos", [])


if __name__ == "__main__":
    for token, depth, radar, seen, boxes in read(sys.argv[1], *sys.argv[2:]):
        points = sum(map(len, depth.values()))
        in_images = sum(map(len, seen.values()))
        print(f"{token}: {points} depth points, {len(radar)} radar points ({in_images} in images), {len(boxes)} boxes")
