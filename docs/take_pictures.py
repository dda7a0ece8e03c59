"""The pictures of README and docs, made by commands in the tree.

    python docs/take_pictures.py hero --cache C --run plain=RUN1/last.ckpt --run IMKD=RUN2/last.ckpt [--sample TOKEN]
    python docs/take_pictures.py screens demo/report.html
    python docs/take_pictures.py sample C --sample TOKEN

`hero` shows LiDAR intensity, radar and boxes of several networks side by side; `screens` takes a report 1280 and 400 px
wide, light and dark, in headless Chromium; `sample` is the picture that `imkd-data inspect --open` writes. Output: docs/images/
(--out).
"""

from __future__ import annotations

import argparse
import html
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def hero(cache: Path, runs: list[str], token: str | None, out: Path, range_m: float) -> Path:
    """Boxes of each network beside truth on one sample, as docs/images/hero.webp."""
    from imkd_data import open_cache
    from imkd_models.checkpoint import load_model
    from pipelines import plots
    from pipelines.evaluate import scored_rows
    from pipelines.predict import predict_rows
    from pipelines.sample_view import read_view

    opened = open_cache(cache)
    row = opened.row(token) if token else int(scored_rows(opened)[0])
    found = {}
    for item in runs:
        name, _, path = item.partition("=")
        model, meta = load_model(Path(path or name))
        found[name] = next(iter(predict_rows(model, opened, [row], meta))).boxes
    return plots.save(plots.side_by_side(read_view(opened, row), found, range_m=range_m), out / "hero.webp")


def sample(cache: Path, token: str | None, out: Path) -> Path:
    """Cameras, intensity, radar, truth and calibration of one sample, as docs/images/sample.webp."""
    from imkd_data import open_cache
    from pipelines import plots
    from pipelines.sample_view import calibration_lines, read_view

    opened = open_cache(cache)
    view = read_view(opened, opened.row(token) if token else int(opened.rows()[0]))
    return plots.save(plots.sample_picture(view, summary=calibration_lines(view)), out / "sample.webp")


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Name, width and height in px, dark. The narrow ones are shown in a frame: a headless window is at least 500 px wide.
SCREENS = (
    ("wide", 1280, 1400, False),
    ("dark", 1280, 1400, True),
    ("narrow", 400, 1400, False),
    ("narrow-dark", 400, 1400, True),
)
MOST_BYTES = 150_000


def screens(page: Path, out: Path) -> list[Path]:
    """Screenshots of a page, wide and narrow, light and dark; needs Debian's chromium or another build of it."""
    from PIL import Image

    browser = next((b for b in BROWSERS if shutil.which(b)), None)
    if browser is None:
        sys.exit("no chromium here: apt-get install chromium")
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for name, width, height, dark in SCREENS:
            shot, frame = Path(folder) / f"{name}.png", Path(folder) / f"{name}.html"
            shown = f'<iframe src="{html.escape(page.resolve().as_uri())}" width="{width}" height="{height}"></iframe>'
            frame.write_text(
                f"<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>{shown}"
            )
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
            flags += [f"--window-size={max(width, 500)},{height + 150}", f"--user-data-dir={folder}/profile"]
            flags += [f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
            subprocess.run([browser, *flags, frame.as_uri()], check=True, capture_output=True, timeout=300)
            made.append(_small(Image.open(shot).convert("RGB").crop((0, 0, width, height)), out / f"{page.stem}-{name}.webp"))
    return made


def _small(image: Any, path: Path) -> Path:
    """The picture as WebP, as good as its limit of size allows."""
    for quality in (86, 78, 70, 60, 45, 30):
        image.save(path, "WEBP", quality=quality, method=6)
        if path.stat().st_size < MOST_BYTES:
            break
    return path


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("hero", "screens", "sample"))
    parser.add_argument("given", nargs="?", type=Path, help="the page (screens) or the cache (sample)")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--run", action="append", default=[], metavar="NAME=CKPT")
    parser.add_argument("--sample")
    parser.add_argument("--range", type=float, default=40.0, dest="range_m", help="metres shown around the car")
    parser.add_argument("--out", type=Path, default=HERE / "images")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.what == "hero":
        print(hero(a.cache or a.given, a.run, a.sample, a.out, a.range_m))
    elif a.what == "sample":
        print(sample(a.given or a.cache, a.sample, a.out))
    else:
        print(*screens(a.given, a.out), sep="\n")


if __name__ == "__main__":
    main()
