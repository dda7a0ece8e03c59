"""Write a synthetic nuScenes tree: scenes in parallel processes, resumable, the same bytes with any number of workers.

A scene is the unit of work: its sensor files, then one part file with its table rows (written last, by rename). When all
parts are there the 13 tables are put together. ``.synth/`` in the output holds the parts and the identity of the world.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from imkd_data.errors import MismatchError, UsageError
from imkd_data.world import faults
from imkd_data.world.options import WorldOptions, write_whole
from imkd_data.world.tables import SCENE_TABLES, TABLES, fixed_rows, lines

Progress = Callable[[int, int, str], None]
STATE = ".synth"


def _part_path(root: Path, index: int) -> Path:
    return root / STATE / f"scene-{index:04d}.json"


def finished_scenes(root: Path) -> int:
    """How many scenes of an unfinished world are whole."""
    return len(list((root / STATE).glob("scene-*.json")))


def world_options(root: Path) -> dict[str, Any] | None:
    """Options of the finished synthetic world below ``root`` (WorldOptions' names), by its own record; None without one."""
    try:
        options = json.loads((Path(root) / STATE / "complete.json").read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return options if isinstance(options, dict) else None


def write_scene(root: Path, options: WorldOptions, index: int) -> int:
    """Write one scene's files and its part; returns the index. A pure function of the options and the index."""
    from imkd_data.world.record import Recorder

    rows = Recorder(root, options, index).record()
    part = {table: lines(rows[table]) for table in SCENE_TABLES}
    write_whole(_part_path(root, index), json.dumps(part).encode())
    return index


def write_world(
    out: Path,
    *,
    version: str = "v1.0-mini",
    scenes: int = 3,
    keyframes: int = 40,
    seed: int = 0,
    image_hw_px: tuple[int, int] = (900, 1600),
    weather: Sequence[str] = ("clear",),
    materials: str = "class",
    camera_sweeps: bool = False,
    images: bool = True,
    workers: int = 1,
    fault: str | None = None,
    scene_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a complete synthetic nuScenes tree below ``out``.

    Args:
        out: output folder; an unfinished world of the same options is continued, a finished one is left alone.
        version: name of the table folder, e.g. ``v1.0-mini``; ``v1.0-test`` has no annotations.
        scenes, keyframes: number of scenes, keyframes (2 Hz) in each. Scene i does not depend on the number of scenes.
        seed: the same seed gives the same bytes, whatever the number of workers.
        image_hw_px: camera images (height, width); intrinsics are scaled.
        weather: cycled over the scenes: clear, rain, night, rain-night.
        materials: ``class``: LiDAR reflectivity says something about the class; ``independent``: it does not.
        camera_sweeps: 12 Hz images between keyframes too. images: False leaves the image files out (tables stay complete).
        workers: processes.
        fault: a source fault of the catalogue (``F01`` ...), damaged into the finished tree; see ``world.faults``.
        scene_names: one name per scene; default scene-0001, ...
        progress: called as (scenes done, scenes, text).

    Raises:
        UsageError: options that cannot be meant. MismatchError: ``out`` holds a world of other options.
    """
    options = WorldOptions(
        version=version, scenes=scenes, keyframes=keyframes, seed=seed, image_hw_px=image_hw_px, weather=tuple(weather),
        materials=materials, camera_sweeps=camera_sweeps, images=images,
    )  # fmt: skip
    if fault:
        faults.check(fault)
    names = list(scene_names) if scene_names is not None else [f"scene-{k + 1:04d}" for k in range(scenes)]
    if len(names) != scenes or len(set(names)) != scenes:
        raise UsageError("every scene needs its own name", expected=f"{scenes} different names", found=len(set(names)))
    root = Path(out)
    identity: dict[str, object] = {"world": options.fingerprint(), "names": names, "fault": fault, "options": options.as_dict()}
    if not _begin(root, identity):
        return
    _write_scenes(root, options, workers, progress)
    _write_tables(root, options, names)
    for index in range(scenes):
        _part_path(root, index).unlink(missing_ok=True)
    if fault:
        faults.inject(root, version, fault)
    write_whole(root / STATE / "complete.json", json.dumps(identity).encode())
    (root / STATE / "begun.json").unlink()


def _begin(root: Path, identity: dict[str, object]) -> bool:
    """Prepare the folder; False when this very world is finished. Raises MismatchError on anything else in the way."""
    state = root / STATE
    for name in ("complete.json", "begun.json"):
        if not (state / name).is_file():
            continue
        there = json.loads((state / name).read_text())
        if name == "complete.json" and all(there.get(k) == identity[k] for k in ("world", "names", "fault")):
            return False
        if there["world"] != identity["world"] or there["fault"] not in (None, identity["fault"]):
            raise MismatchError(
                "the output holds a synthetic world of other options",
                expected=f"world {identity['world']}, fault {identity['fault']}",
                found=f"world {there['world']}, fault {there['fault']}",
                file=str(root),
                next="choose another --out, or remove the folder",
            )
    if root.is_dir() and not state.is_dir() and any(root.iterdir()):
        raise MismatchError("the output folder is not empty and not ours", file=str(root), next="choose another --out")
    state.mkdir(parents=True, exist_ok=True)
    (state / "complete.json").unlink(missing_ok=True)
    write_whole(state / "begun.json", json.dumps({"world": identity["world"], "fault": identity["fault"]}).encode())
    return True


def _end_with_parent() -> None:
    """In a worker: exit when the parent is gone, however it died; a pool's workers would wait for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started here inherit that SIGINT is ignored: Ctrl-C is the parent's business, which stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write_scenes(root: Path, options: WorldOptions, workers: int, progress: Progress | None) -> None:
    todo = [k for k in range(options.scenes) if not _part_path(root, k).is_file()]
    done = options.scenes - len(todo)

    def tell(index: int) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, options.scenes, f"scene {index}")

    if progress:
        progress(done, options.scenes, "start")
    if workers <= 1 or len(todo) <= 1:
        for index in todo:
            tell(write_scene(root, options, index))
        return
    # Fresh processes: a forked one could inherit locks of threads in the caller.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=_end_with_parent) as pool:
        with _interrupts_ignored():
            pending = {pool.submit(write_scene, root, options, index) for index in todo}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    tell(future.result())
        except BaseException:
            # A stopped run does not wait for scenes in progress: they leave no part and are made again.
            for process in list(getattr(pool, "_processes", {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_tables(root: Path, options: WorldOptions, names: list[str]) -> None:
    """Put the parts together, one table at a time."""
    folder = root / options.version
    folder.mkdir(parents=True, exist_ok=True)
    parts = [json.loads(_part_path(root, k).read_text()) for k in range(options.scenes)]
    for table in TABLES:
        if table not in SCENE_TABLES:
            text = lines(fixed_rows(table))
        else:
            pieces = [part[table] for part in parts]
            if table == "scene":  # the only thing that depends on the number of scenes
                pieces = [
                    piece.replace('"name": ""', f'"name": {json.dumps(name)}')
                    for piece, name in zip(pieces, names, strict=True)
                ]
            text = ",\n".join(piece for piece in pieces if piece)
        write_whole(folder / f"{table}.json", f"[\n{text}\n]\n".encode())
