"""Seconds and memory of both evaluation engines on a validation set of nuScenes' size, made of random boxes.

    python tests/benchmarks/evaluation_speed.py --out /tmp/speed [--samples 6019] [--boxes 300] [--engine E] [--report]

Writes tables (31 truth boxes a sample, all ten classes and bicycle racks) and a submission of `boxes` boxes a sample, then
scores it in a fresh process per engine. Defaults give a submission of 0.7 GB with 1.8 million boxes. `--report`: also makes
the page of two runs of that size, without pictures (`imkd-data inspect --open` shows what one costs).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = "v1.0-trainval"
CATEGORIES = {
    "movable_object.barrier": ("barrier", 0.13),
    "vehicle.bicycle": ("bicycle", 0.01),
    "vehicle.bus.rigid": ("bus", 0.014),
    "vehicle.car": ("car", 0.42),
    "vehicle.construction": ("construction_vehicle", 0.012),
    "vehicle.motorcycle": ("motorcycle", 0.011),
    "human.pedestrian.adult": ("pedestrian", 0.19),
    "movable_object.trafficcone": ("traffic_cone", 0.083),
    "vehicle.trailer": ("trailer", 0.02),
    "vehicle.truck": ("truck", 0.075),
    "static_object.bicycle_rack": ("car", 0.035),
}
ATTRIBUTE = {"bicycle": "cycle.with_rider", "motorcycle": "cycle.with_rider", "pedestrian": "pedestrian.moving"}
TRUTH = 31


def make(out: Path, samples: int, boxes: int) -> None:
    """Tables, tokens.json and results.json."""
    rng = np.random.default_rng(0)
    names, share = list(CATEGORIES), np.array([s for _, s in CATEGORIES.values()])
    tables: dict[str, list[dict[str, object]]] = {
        "category": [{"token": f"c{i}", "name": n, "description": ""} for i, n in enumerate(names)],
        "attribute": [{"token": "a0", "name": "vehicle.moving", "description": ""}],
        "sensor": [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}],
        "calibrated_sensor": [
            {"token": "m", "sensor_token": "lidar", "translation": [0, 0, 1], "rotation": [1, 0, 0, 0], "camera_intrinsic": []}
        ],
        "log": [{"token": "log", "logfile": "", "vehicle": "v", "date_captured": "", "location": "here"}],
        "map": [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "map.png"}],
        "visibility": [],
    }
    tables |= {name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation")}
    (out / "tree" / VERSION).mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(out / "tree" / "map.png")
    with (out / "results.json").open("w") as file:
        file.write('{"meta": {"use_camera": true}, "results": {')
        for first in range(0, samples, 40):
            _scene(tables, file, rng, names, share / share.sum(), first, min(40, samples - first), boxes)
        file.write("}}")
    for name, rows in tables.items():
        (out / "tree" / VERSION / f"{name}.json").write_text(json.dumps(rows, indent=0))
    (out / "tokens.json").write_text(json.dumps([r["token"] for r in tables["sample"]]))


def _scene(tables, file, rng, names, share, first: int, count: int, boxes: int) -> None:  # type: ignore[no-untyped-def]
    scene, tokens = f"scene-{first:06}", [f"{k:032x}" for k in range(first + 1, first + 1 + count)]
    ends = {"first_sample_token": tokens[0], "last_sample_token": tokens[-1], "nbr_samples": count}
    tables["scene"].append({"token": scene, "log_token": "log", "name": scene, "description": "", **ends})
    kind, place = rng.choice(len(names), TRUTH, p=share), rng.uniform(-45, 45, (TRUTH, 2))
    speed, size = rng.normal(0, 1.5, (TRUTH, 2)), rng.uniform(0.5, 5, (TRUTH, 3)).tolist()
    for i in range(TRUTH):
        tables["instance"].append({"token": f"{scene}-{i}", "category_token": f"c{kind[i]}", "nbr_annotations": count})
    for k, token in enumerate(tokens):
        car = [100.0 + 2 * k, float(first), 0.3]
        stamp = int(1e15 + first * 1e8 + k * 5e5)
        tables["sample"].append({"token": token, "timestamp": stamp, "scene_token": scene, "prev": "", "next": ""})
        tables["ego_pose"].append({"token": f"p{token}", "timestamp": 0, "rotation": [1, 0, 0, 0], "translation": car})
        tables["sample_data"].append(
            {"token": f"d{token}", "sample_token": token, "ego_pose_token": f"p{token}", "calibrated_sensor_token": "m"}
            | {"timestamp": 0, "fileformat": "pcd", "is_key_frame": True, "height": 0, "width": 0, "prev": "", "next": ""}
            | {"filename": f"{token}.pcd.bin"}
        )
        centres = np.array(car[:2]) + place + speed * 0.1 * k
        for i in range(TRUTH):
            tables["sample_annotation"].append(
                {"token": f"{scene}-{i}-{k}", "sample_token": token, "instance_token": f"{scene}-{i}", "visibility_token": ""}
                | {"attribute_tokens": ["a0"], "translation": [*centres[i].tolist(), 1.0], "size": size[i]}
                | {"rotation": [math.cos(i), 0, 0, math.sin(i)], "num_lidar_pts": 5, "num_radar_pts": 1}
                | {"prev": f"{scene}-{i}-{k - 1}" if k else "", "next": f"{scene}-{i}-{k + 1}" if k + 1 < count else ""}
            )
        entries = []
        for b in range(boxes):
            i = b % TRUTH
            name = CATEGORIES[names[kind[i]]][0]
            attribute = "" if name in ("barrier", "traffic_cone") else ATTRIBUTE.get(name, "vehicle.moving")
            entries.append(
                {"sample_token": token, "translation": [*(centres[i] + rng.normal(0, 1, 2)).tolist(), 1.0], "size": size[i]}
                | {"rotation": [math.cos(i + 0.1), 0.0, 0.0, math.sin(i + 0.1)], "velocity": speed[i].tolist()}
                | {"detection_name": name, "detection_score": rng.random(), "attribute_name": attribute}
            )
        file.write((", " if first or k else "") + json.dumps(token) + ": " + json.dumps(entries))


def report(out: Path) -> None:
    """The page of two runs in this process; prints a line."""
    from pipelines.report import make_report

    results = out / "fast" / "results.json"
    if not results.exists():
        results.symlink_to(out / "results.json")
    begun = time.perf_counter()
    page = make_report([("one", out / "fast"), ("two", out / "fast")], out / "report.html")
    seconds, cpu = time.perf_counter() - begun, time.process_time()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's, which made the tables
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    print(f"report  {seconds:.1f} s wall, {cpu:.1f} s CPU, {peak:.2f} GiB, {page.stat().st_size / 1e6:.2f} MB", flush=True)


def score(out: Path, engine: str, detail: bool) -> None:
    """One engine in this process; prints a line."""
    from pipelines.evaluate import evaluate_results

    tokens = json.loads((out / "tokens.json").read_text())
    begun = time.perf_counter()
    summary = evaluate_results(
        out / "results.json",
        dataroot=out / "tree",
        version=VERSION,
        tokens=tokens,
        out=out / engine,
        engine=engine,  # type: ignore[arg-type]
        detail=detail,
    )
    seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{engine:<7} {len(tokens)} samples  {seconds:7.1f} s  {peak:5.2f} GiB  NDS {summary['nd_score']:.12f}", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=6019)
    parser.add_argument("--boxes", type=int, default=300)
    parser.add_argument("--engine", action="append", choices=("fast", "devkit"))
    parser.add_argument("--report", action="store_true", help="the page as well, from the fast engine's files")
    parser.add_argument("--only", choices=("score", "report"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.only == "report":
        return report(a.out)
    if a.only == "score":
        return score(a.out, a.engine[0], a.report)
    a.out = a.out.resolve()
    make(a.out, a.samples, a.boxes)
    engines = a.engine or ["fast", "devkit"]
    if a.report and "fast" not in engines:
        parser.error("--report reads the files of --engine fast")
    more = ["--report"] if a.report else []
    for engine in engines:
        words = ["--out", str(a.out), "--engine", engine, "--only", "score", *more]
        subprocess.run([sys.executable, __file__, *words], check=True)
    if a.report:
        subprocess.run([sys.executable, __file__, "--out", str(a.out), "--only", "report"], check=True)
    return None


if __name__ == "__main__":
    main()
