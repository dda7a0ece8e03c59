"""Write a synthetic world under official scene names, so that splits mean what they mean for nuScenes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from imkd_data.errors import InterruptedBuildError, UsageError

VERSIONS = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val"), "v1.0-test": ("test", None)}
DEFAULT_VAL_SHARE = 0.2

Progress = Callable[[int, int, str], None]


def val_scenes(scenes: int, val_share: float) -> list[int]:
    """Numbers of the val scenes: every fifth (for a share of 0.2), and from two scenes on always the last."""
    if not 0.0 <= val_share <= 1.0:
        raise UsageError("the share of val scenes is between 0 and 1", found=val_share)
    due = [k for k in range(scenes) if int((k + 1) * val_share + 1e-9) > int(k * val_share + 1e-9)]
    if scenes >= 2 and scenes - 1 not in due:
        due.append(scenes - 1)
    return due


def official_names(version: str, scenes: int, val_share: float | None = None) -> list[str]:
    """Scene names from the official lists of a version, in scene order.

    Without a ``val_share`` every fifth scene is a val scene as long as there are names of that split; where one split runs
    out the other one gives the name (850 scenes of v1.0-trainval use every name).

    Raises:
        UsageError: unknown version, or more scenes than the lists have names.
    """
    from imkd_data.readers.splits import SPLITS

    if version not in VERSIONS:
        raise UsageError("a synthetic world has a version with scene lists", expected=", ".join(VERSIONS), found=version)
    train, val = (list(SPLITS[name]) if name else [] for name in VERSIONS[version])
    if scenes > len(train) + len(val):
        limit = len(train) + len(val)
        raise UsageError(
            f"{version} has {limit} scene names", found=f"{scenes} scenes", next="use v1.0-trainval or fewer scenes"
        )
    due = val_scenes(scenes, DEFAULT_VAL_SHARE if val_share is None else val_share) if val else []
    if val_share is not None and (len(due) > len(val) or scenes - len(due) > len(train)):
        raise UsageError(
            f"{version} has {len(train)} train and {len(val)} val names",
            found=f"{scenes - len(due)} train and {len(due)} val scenes",
            next="change the share of val scenes or their number",
        )
    short = max(scenes - len(due) - len(train), 0)
    chosen = set(due if len(due) <= len(val) else [*due[: len(val) - 1], due[-1]])  # the last scene stays val
    for k in range(scenes):
        if short and k not in chosen:
            chosen.add(k)
            short -= 1
    return [val.pop(0) if k in chosen else train.pop(0) for k in range(scenes)]


def with_eta(tell: Progress) -> Progress:
    """Adds the time left to the text of a progress callback, from the scenes finished in this run."""
    started, first = time.monotonic(), -1

    def report(done: int, total: int, text: str) -> None:
        nonlocal first
        first = done if first < 0 else first
        fresh, spent = done - first, time.monotonic() - started
        left = f", {spent / fresh * (total - done):.0f} s left" if fresh and done < total else ""
        tell(done, total, text + left)

    return report


@contextlib.contextmanager
def _stoppable(root: Path, scenes: int) -> Iterator[None]:
    """SIGTERM and Ctrl-C end in an InterruptedBuildError that says what is kept; a second one ends at once."""
    from imkd_data.world.write import finished_scenes

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (KeyboardInterrupt, SystemError) as error:
        if isinstance(error, SystemError) and not received:
            raise
        # A compiled kernel that is interrupted hands the KeyboardInterrupt on as a SystemError.
        number = signal.Signals(received[0] if received else signal.SIGINT)
        raise InterruptedBuildError(
            f"stopped by {number.name}",
            signal_code=128 + number,
            kept=f"{finished_scenes(root)} of {scenes} scenes are whole",
            file=str(root),
            next="run the same command again; it continues where it stopped",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_synth(
    *,
    out: str | Path,
    version: str = "v1.0-mini",
    scenes: int = 10,
    keyframes: int = 40,
    seed: int = 0,
    image_size: str | tuple[int, int] = (900, 1600),
    weather: str | Sequence[str] = ("clear",),
    materials: str = "class",
    camera_sweeps: bool = False,
    val_share: float | None = None,
    workers: int = 1,
    fault: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a synthetic nuScenes tree; see ``imkd_data.world.write_world``. Returns its root.

    ``image_size`` is (height, width) or text ``900x1600``; ``weather`` a sequence or text ``clear,rain,night``.

    Raises:
        UsageError: options that cannot be meant, or ``out`` is a file. MismatchError: ``out`` holds something else.
        InterruptedBuildError: stopped by SIGTERM or Ctrl-C; the same call continues.
    """
    from imkd_data.world import write_world

    root = Path(out).expanduser()
    if root.exists() and not root.is_dir():
        raise UsageError("--out is a folder", found="a file", file=str(root), next="choose another --out")
    with _stoppable(root, scenes):
        write_world(
            root,
            version=version,
            scenes=scenes,
            keyframes=keyframes,
            seed=seed,
            image_hw_px=parse_size(image_size),
            weather=tuple(weather.split(",")) if isinstance(weather, str) else tuple(weather),
            materials=materials,
            camera_sweeps=camera_sweeps,
            workers=workers,
            fault=fault,
            scene_names=official_names(version, scenes, val_share),
            progress=with_eta(progress) if progress else None,
        )
    return root


def parse_size(text: str | tuple[int, int]) -> tuple[int, int]:
    """``900x1600`` -> (900, 1600)."""
    if not isinstance(text, str):
        return text
    try:
        height, width = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise UsageError("an image size is HEIGHTxWIDTH", expected="900x1600", found=text) from None
    return height, width
