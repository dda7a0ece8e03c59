"""A table set of the size of nuScenes trainval: 850 scenes, 34,149 samples, all sensors and sweeps, payload files shared.

    python tests/benchmarks/scale_tables.py OUT [--scenes 850] [--world WORLD]

One synthetic scene is written (or taken from --world), its rows are multiplied with new tokens, names and times; file names
stay, so the payload is that of one scene. Then: plan time, build of the pose field over everything, index size and open time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

TRAIN_VAL = 850
SAMPLES = 34_149


def token(old: str, scene: int) -> str:
    """A new token for a copy of a row: the scene's number over the first digits."""
    return f"{scene:04x}{old[4:]}" if old else old


def multiply(world: Path, out: Path, scenes: int) -> int:
    """Write the tables of ``scenes`` copies; returns the number of samples."""
    from imkd_data.readers.splits import SPLITS

    source = world / "v1.0-trainval"
    tables: dict[str, list[dict[str, Any]]] = {p.stem: json.loads(p.read_text()) for p in source.glob("*.json")}
    names = [*SPLITS["train"], *SPLITS["val"]][:scenes]
    keep = ("attribute", "calibrated_sensor", "category", "log", "map", "sensor", "visibility")
    target = out / "v1.0-trainval"
    target.mkdir(parents=True, exist_ok=True)
    # Names must differ between key frames, bytes need not: every scene gets a link to the one folder per channel.
    for folder in ("samples", "sweeps"):
        for channel in sorted(p.name for p in (world / folder).iterdir()):
            payload = out / "payload" / folder / channel
            payload.mkdir(parents=True, exist_ok=True)
            for file in (world / folder / channel).iterdir():
                if not (payload / file.name).exists():
                    os.link(file, payload / file.name)
            (out / folder / channel).mkdir(parents=True, exist_ok=True)
            for scene in range(scenes):
                link = out / folder / channel / f"s{scene:04d}"
                if not link.is_symlink():
                    link.symlink_to(payload.resolve())
    first = tables["scene"][0]
    mine = {r["token"] for r in tables["sample"] if r["scene_token"] == first["token"]}
    data = [r for r in tables["sample_data"] if r["sample_token"] in mine]
    poses = {r["ego_pose_token"] for r in data}
    rows = {
        "scene": [first],
        "sample": [r for r in tables["sample"] if r["token"] in mine],
        "sample_data": data,
        "ego_pose": [r for r in tables["ego_pose"] if r["token"] in poses],
        "sample_annotation": [r for r in tables["sample_annotation"] if r["sample_token"] in mine],
    }
    rows["instance"] = [r for r in tables["instance"] if r["token"] in {a["instance_token"] for a in rows["sample_annotation"]}]
    changed = ("token", "scene_token", "sample_token", "prev", "next", "ego_pose_token", "instance_token")
    changed = (*changed, "first_sample_token", "last_sample_token", "first_annotation_token", "last_annotation_token")
    per_scene = len(rows["sample"])
    for name, part in rows.items():
        with open(target / f"{name}.json", "w") as file:
            file.write("[\n")
            for scene in range(len(names)):
                for i, row in enumerate(part):
                    copy = dict(row)
                    for key in changed:
                        if key in copy:
                            copy[key] = token(copy[key], scene)
                    if "timestamp" in copy:
                        copy["timestamp"] += scene * 100_000_000
                    if "filename" in copy:
                        head, _, tail = copy["filename"].rpartition("/")
                        copy["filename"] = f"{head}/s{scene:04d}/{tail}"
                    if name == "scene":
                        copy["name"] = names[scene]
                    last = scene == len(names) - 1 and i == len(part) - 1
                    file.write(json.dumps(copy) + ("\n" if last else ",\n"))
            file.write("]\n")
    for name in keep:
        (target / f"{name}.json").write_text((source / f"{name}.json").read_text())
    return per_scene * len(names)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=TRAIN_VAL)
    parser.add_argument("--world", type=Path)
    given = parser.parse_args()
    world = given.world
    if world is None:
        from pipelines.synth import run_synth

        world = given.out / "world"
        run_synth(out=world, version="v1.0-trainval", scenes=1, keyframes=40, image_size="90x160")
    root = given.out / "scaled"
    if not (root / "v1.0-trainval" / "sample.json").exists():
        print(f"{multiply(world.resolve(), root, given.scenes):,} samples written", flush=True)

    from imkd_data.cache.plan import make_plan
    from imkd_data.fields import PROFILES
    from pipelines.build import build
    from pipelines.build.request import Asked, resolve

    size = sum(p.stat().st_size for p in (root / "v1.0-trainval").glob("*.json"))
    started = time.perf_counter()
    got = resolve(Asked(dataroot=root, version="v1.0-trainval", splits=("train", "val"), fields=PROFILES["student"]))
    opened = time.perf_counter()
    plan = make_plan(got.reader, got.recipe, got.fields)
    planned = time.perf_counter()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    files = 2 * len(plan.queue)
    print(
        f"tables {size / 1e9:.2f} GB: opened in {opened - started:.1f} s; plan {planned - opened:.1f} s; "
        f"peak RSS {rss:,.0f} MiB"
    )
    print(f"{plan.num_samples:,} samples, {len(plan.shards)} shards, {files:,} files for the student profile", flush=True)
    out = given.out / "cache"
    started = time.perf_counter()
    fields = ("sample_pose", "camera_calibration", "boxes")
    result = build(
        dataroot=root, version="v1.0-trainval", splits=("train", "val"), out=out, fields=fields, executor="processes", workers=2
    )
    print(
        f"build of {', '.join(fields)}: {time.perf_counter() - started:.1f} s, "
        f"{result.peak_rss_worker / 2**20:,.0f} MiB per worker"
    )
    from imkd_data import open_cache

    times = []
    for _ in range(3):
        started = time.perf_counter()
        cache = open_cache(out)
        times.append(time.perf_counter() - started)
    print(f"index {(out / 'index.parquet').stat().st_size / 1e6:.1f} MB; opened in {min(times):.2f} s; {len(cache):,} rows")


if __name__ == "__main__":
    main()
