"""Image tars of a cache streamed with plain webdataset: no import of imkd.

python docs/examples/stream_webdataset.py CACHE
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("WDS_SECURE", "1")  # before the import: no shell pipes, no code from a shard

import webdataset


def samples(path, field="images"):
    """Yields (token, {part: bytes}) of one blob field."""
    tars = sorted(str(p) for p in (Path(path) / "blobs" / field).glob("*.tar"))
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        yield sample["__key__"], {part: data for part, data in sample.items() if not part.startswith("__")}


if __name__ == "__main__":
    for token, parts in samples(sys.argv[1]):
        print(token, {part: len(data) for part, data in parts.items()})
