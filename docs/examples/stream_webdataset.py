"""Tars streamed with plain webdataset: no import of imkd.

python docs/examples/stream_webdataset.py FOLDER      (`imkd-data export --to webdataset`, or a cache: its images)
"""

import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("WDS_SECURE", "1")  # before the import: no shell pipes, no code from a shard

import numcodecs
import numpy as np
import webdataset


def samples(path, field="images"):
    """Yields (token, {part: bytes}) of one blob field of a cache."""
    tars = sorted(str(p) for p in (Path(path) / "blobs" / field).glob("*.tar"))
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        yield sample["__key__"], {part: data for part, data in sample.items() if not part.startswith("__")}


def exported(path):
    """Yields (token, facts, {part: array or image bytes}) of an export; every field of a sample comes together."""
    tars = sorted(str(p) for p in Path(path).glob("*.tar"))
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
        parts = {name: value for name, value in sample.items() if not name.startswith("__")}
        for name in [n for n in parts if n.endswith(".npy.zst")]:
            data = numcodecs.Zstd().decode(parts.pop(name))
            parts[name.removesuffix(".zst")] = np.load(io.BytesIO(data), allow_pickle=False)
        yield sample["__key__"], parts.pop("sample.json"), parts


def radar(path, parts):
    """{column: physical values} of the radar returns: codes times the scale that fields.json gives."""
    about = json.loads((Path(path) / "fields.json").read_text())["fields"]["radar_points"]["attributes"]
    table = parts["radar_points.npy"].astype(np.float64) * np.array(about["scale"])[:, None]
    return dict(zip(about["columns"], table, strict=True))


if __name__ == "__main__":
    if (Path(sys.argv[1]) / "fields.json").exists():
        for token, facts, parts in exported(sys.argv[1]):
            near = (np.hypot(radar(sys.argv[1], parts)["x"], radar(sys.argv[1], parts)["y"]) < 20).sum()
            print(f"{token}: {facts['scene']}, {facts['num_boxes']} boxes, {near} radar returns within 20 m")
    else:
        for token, parts in samples(sys.argv[1]):
            print(token, {part: len(data) for part, data in parts.items()})
