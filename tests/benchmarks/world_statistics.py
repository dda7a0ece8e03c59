"""Synthetic against genuine: sensor statistics side by side, as Markdown.

    python tests/benchmarks/world_statistics.py [WORLD] [--real DIR]

WORLD: a tree of ``imkd-data synth`` (default: a small one is made in a temporary folder). DIR: the folder that holds
``nuscenes_keyframe`` and ``nuscenes_mini_val_radar`` (default: as the tests find it). Nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

RINGS_M = ((5, 10), (10, 15), (15, 20), (20, 30), (30, 40), (40, 55), (55, 200))
RANGE_M = (1.5, 3, 4, 5, 7, 10, 15, 20, 30, 40, 55, 70, 85, 110)
Stats = dict[str, Any]


def tables(root: Path, *names: str) -> list[list[dict[str, Any]]]:
    folder = next(p for p in root.iterdir() if p.name.startswith("v1.0"))
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def lidar_frames(root: Path, key_only: bool = True) -> list[np.ndarray]:
    (rows,) = tables(root, "sample_data")
    files = [r["filename"] for r in rows if "/LIDAR_TOP/" in r["filename"] and (r["is_key_frame"] or not key_only)]
    return [np.fromfile(root / f, np.float32).reshape(-1, 5) for f in files]


def radar_scans(root: Path) -> list[np.ndarray]:
    from imkd_data.world.radar import POINT

    (rows,) = tables(root, "sample_data")
    scans = []
    for row in rows:
        if "/RADAR_FRONT/" in row["filename"] and row["is_key_frame"]:
            data = (root / row["filename"]).read_bytes()
            at = data.index(b"DATA binary\n") + 12
            count = int(data[:at].split(b"POINTS ")[1].split()[0])
            scans.append(np.frombuffer(data, POINT, count, at))
    return scans


def quantile_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of the percentiles 1 to 99."""
    q = np.arange(1, 100)
    return float(np.abs(np.percentile(a, q) - np.percentile(b, q)).mean())


def outside(frame: np.ndarray) -> np.ndarray:
    """Returns that are neither the own car nor lost."""
    return frame[np.linalg.norm(frame[:, :3], axis=1) >= 1.5]


def lidar_statistics(frames: list[np.ndarray]) -> Stats:
    every = np.concatenate(frames)
    far = np.linalg.norm(every[:, :3], axis=1)
    out: Stats = {
        "points a turn": f"{np.mean([len(f) for f in frames]):.0f}",
        "share within 1.5 m, % (frames)": span([100 * (np.linalg.norm(f[:, :3], axis=1) < 1.5).mean() for f in frames]),
        "intensity above 100, % (frames)": span([100 * (f[:, 3] > 100).mean() for f in frames], 2),
    }
    for low, high in RINGS_M:
        here = every[(far >= low) & (far < high), 3]
        out[f"intensity {low}-{high} m: quartiles"] = "/".join(f"{v:.0f}" for v in np.percentile(here, (25, 50, 75)))
    count = np.histogram(far, RANGE_M)[0] / len(frames)
    for low, high, n in zip(RANGE_M, RANGE_M[1:], count, strict=False):
        out[f"points a turn at {low}-{high} m"] = f"{n:.0f}"
    for ring in (0, 5, 8, 10, 15, 20, 23, 26, 31):
        out[f"ring {ring}: points beyond 1.5 m"] = f"{((every[:, 4] == ring) & (far >= 1.5)).sum() / len(frames):.0f}"
    return out


def span(values: list[float], digits: int = 1) -> str:
    low, high = min(values), max(values)
    return f"{low:.{digits}f}" if len(values) == 1 else f"{np.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def box_statistics(root: Path) -> Stats:
    sample, annotation, instance, category, data, pose = tables(
        root, "sample", "sample_annotation", "instance", "category", "sample_data", "ego_pose"
    )
    name = {c["token"]: c["name"] for c in category}
    kind = {i["token"]: name[i["category_token"]] for i in instance}
    place = {p["token"]: np.array(p["translation"][:2]) for p in pose}
    ego = {d["sample_token"]: place[d["ego_pose_token"]] for d in data if d["is_key_frame"] and "LIDAR" in d["filename"]}
    points: dict[tuple[str, str], list[int]] = defaultdict(list)
    near: dict[str, int] = defaultdict(int)
    for row in annotation:
        if row["sample_token"] not in ego:
            continue
        far = float(np.hypot(*(np.array(row["translation"][:2]) - ego[row["sample_token"]])))
        near["50"] += far < 50
        ring = next((f"{a}-{b} m" for a, b in ((0, 10), (10, 20), (20, 35), (35, 50)) if a <= far < b), "")
        group = {"vehicle.car": "car", "human.pedestrian.adult": "pedestrian", "vehicle.truck": "truck"}.get(
            kind[row["instance_token"]]
        )
        if ring and group:
            points[group, ring].append(row["num_lidar_pts"])
    out: Stats = {
        "boxes a keyframe": f"{len(annotation) / len(sample):.0f}",
        "boxes within 50 m": f"{near['50'] / len(sample):.0f}",
    }
    for group in ("car", "truck", "pedestrian"):
        for ring in ("0-10 m", "10-20 m", "20-35 m", "35-50 m"):
            values = points[group, ring]
            out[f"points in a {group} at {ring}: median (boxes)"] = (
                f"{np.median(values):.0f} ({len(values)})" if values else "-"
            )
    return out


def radar_statistics(scans: list[np.ndarray]) -> Stats:
    p = np.concatenate(scans)
    far, angle = np.hypot(p["x"], p["y"]), np.degrees(np.abs(np.arctan2(p["y"], p["x"])))
    speed = np.hypot(p["vx_comp"], p["vy_comp"])
    still = np.isin(p["dyn_prop"], (1, 3, 5, 7))
    default = (p["invalid_state"] == 0) & (p["dyn_prop"] < 7) & (p["ambig_state"] == 3)
    crn = np.isin(p["invalid_state"], (0, 4, 8, 9, 10, 11, 12, 15, 16, 17)) & (p["ambig_state"] == 3)
    quantiles = (5, 25, 50, 75, 95)

    def five(values: np.ndarray, digits: int = 0) -> str:
        return "/".join(f"{v:.{digits}f}" for v in np.percentile(values, quantiles))

    out: Stats = {
        "front scans": str(len(scans)),
        "points a scan: median (5-95 %)": "{1:.0f} ({0:.0f}-{2:.0f})".format(
            *np.percentile([len(s) for s in scans], (5, 50, 95))
        ),
        "|x| > 51.2 m, %": f"{100 * (np.abs(p['x']) > 51.2).mean():.0f}",
        "pass the devkit's default filter, %": f"{100 * default.mean():.0f}",
        "pass CRN's filter, %": f"{100 * crn.mean():.0f}",
        "|v_comp| of stationary codes: median, 90 %": "{:.2f}, {:.2f}".format(*np.percentile(speed[still], (50, 90))),
        "range: 5/25/50/75/95 %, m": five(far),
        "|azimuth|: 5/25/50/75/95 %, deg": five(angle),
        "RCS: 5/25/50/75/95 %, dBsm": five(p["rcs"], 1),
    }
    for code in (0, 1, 2, 3, 4, 6, 7):
        out[f"dyn_prop {code}, %"] = f"{100 * (p['dyn_prop'] == code).mean():.1f}"
    return out


def table(title: str, synthetic: Stats, genuine: Stats) -> str:
    lines = [f"| {title} | synthetic | genuine |", "|---|---|---|"]
    return "\n".join(lines + [f"| {key} | {synthetic[key]} | {genuine[key]} |" for key in synthetic])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="?", type=Path)
    default = os.environ.get("IMKD_REAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    parser.add_argument("--real", type=Path, default=Path(default))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        world = options.world
        if world is None:
            from imkd_data.world import write_world

            world = Path(folder) / "world"
            write_world(world, scenes=6, keyframes=12, image_hw_px=(64, 128), images=False)
        keyframe, scans = options.real / "nuscenes_keyframe", options.real / "nuscenes_mini_val_radar"
        ours, real = lidar_frames(world), lidar_frames(keyframe)
        sets = {
            "all returns": [f[:, 3] for f in ours],
            "beyond 1.5 m": [outside(f)[:, 3] for f in ours],
        }
        print(table("LiDAR key frames", lidar_statistics(ours), lidar_statistics(real)), end="\n\n")
        both = [*real, *lidar_frames(scans, key_only=False)]
        for name, values in sets.items():
            pick = (lambda f: f[:, 3]) if name == "all returns" else (lambda f: outside(f)[:, 3])
            distance = [quantile_distance(v, pick(real[0])) for v in values]
            pooled = quantile_distance(np.concatenate(values), pick(real[0]))
            between = quantile_distance(pick(both[0]), pick(both[1])) if len(both) > 1 else float("nan")
            print(f"Intensity, {name}: mean quantile distance to the genuine key frame {span(distance)} by frame,")
            print(f"{pooled:.1f} pooled; between two genuine frames {between:.1f}", end="\n\n")
        print(table("Boxes", box_statistics(world), box_statistics(keyframe)), end="\n\n")
        print(table("Front radar", radar_statistics(radar_scans(world)), radar_statistics(radar_scans(scans))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
