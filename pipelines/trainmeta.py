"""What a run knows about its surroundings: earlier checkpoints, teachers made by earlier stages, cache and stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imkd_data.errors import UsageError
from imkd_data.loader.stream import Stream
from imkd_models.checkpoint import Checkpoint, load_checkpoint, load_weights, resolve_checkpoint
from pipelines.networks import TrainUnit
from pipelines.optimise import Ema, in_layout
from pipelines.run import Run

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = [
    "cache_meta",
    "check_folder",
    "check_teachers",
    "restore",
    "saved_run",
    "stage_teachers",
    "start_warnings",
    "stream_meta",
]

# Stage name -> the teacher name under which later stages use it.
_TEACHER_OF_STAGE = {"teacher": "lidar", "label": "label", "fusion": "fusion"}


def stage_teachers(stage: Run, given: Mapping[str, Path | str], made: Mapping[str, Path]) -> dict[str, Path | str]:
    """Teachers of one stage: those given, else those that earlier stages made; only what the stage uses."""
    have: dict[str, Path | str] = {_TEACHER_OF_STAGE[n]: p for n, p in made.items() if n in _TEACHER_OF_STAGE}
    have.update(given)
    return {n: have[n] for n in _taken(stage) if n in have}


def check_teachers(run: Run, given: Mapping[str, Path | str]) -> None:
    """Errors: UsageError for a teacher that no stage takes: a misspelt one would be left out, and another trained instead."""
    taken = list(dict.fromkeys(name for stage in run.stages for name in _taken(stage)))
    if unused := [n for n in given if n not in taken]:
        raise UsageError(
            f"no stage of run {run.name} uses teacher {', '.join(unused)}",
            expected=", ".join(taken) or "no teacher",
            found=", ".join(given),
        )


def _taken(stage: Run) -> tuple[str, ...]:
    if stage.model.get("kind") == "label":
        return ("lidar",)
    if not stage.method:
        return ()
    from imkd_models.distill import make_method

    method = make_method(stage.method)
    return method.teachers_for(method.make_options(stage.options))


def cache_meta(cache: Cache, stream: Stream) -> dict[str, Any]:
    """Identity, sensors and numbers of sweeps of the cache, and versions of the fields that are read."""
    recipe = cache.recipe
    return {
        "id": cache.id,
        "fields": stream.identity()["fields"],
        "dataset": recipe.dataset,
        "version": recipe.version,
        "sensors": list(recipe.sensors),
        "reference_channel": recipe.reference_channel,
        "lidar_sweeps": recipe.lidar_sweeps,  # what a run means by 0 sweeps, at inference on other data
        "radar_sweeps": recipe.radar_sweeps,
    }


def stream_meta(stream: Stream) -> dict[str, Any]:
    """How batches must be made for this network at inference: evaluate, predict and export read it."""
    request = stream.request
    return {
        "history": list(request.history),
        "image_hw_px": list(request.image_hw_px),
        "grid": request.grid.as_dict(),
        "radar_filter": request.radar_filter,
        "radar_features": list(request.radar_features),
        "radar_sweeps": request.radar_sweeps,
        "lidar_sweeps": request.lidar_sweeps,
    }


def start_warnings(start: Mapping[str, Any]) -> list[str]:
    """A line about the tensors that the checkpoint to start from does not hold."""
    if not start.get("new"):
        return []
    modules = ", ".join(dict.fromkeys(name.split(".")[0] for name in start["new"]))
    return [f"{start['tensors']} tensors come from the start checkpoint, {len(start['new'])} begin as built: {modules}"]


def check_folder(out: Path, resume: bool | str) -> None:
    """Errors: UsageError where a file stands, or a run and --resume was not given; SourceMissingError where none is to be
    continued. Reads no checkpoint: another training may be writing it."""
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UsageError("--out is a folder", found="a file", file=str(nearest), next="choose another --out")
    if not resume and (out / "last.ckpt").is_symlink():
        raise UsageError(
            "this folder holds a run already",
            found=str(out / "last.ckpt"),
            next="continue it with --resume, or choose another --out",
        )
    if resume and resume != "auto":
        resolve_checkpoint(out / "last.ckpt")


def saved_run(out: Path, resume: bool | str) -> Checkpoint | None:
    """The checkpoint to continue from, once the folder is held. Errors: as ``check_folder``."""
    check_folder(out, resume)
    there = (out / "last.ckpt").is_symlink() or (resume and resume != "auto")
    return load_checkpoint(out / "last.ckpt") if there else None


def restore(
    saved: Checkpoint, unit: TrainUnit, optimiser: torch.optim.Optimizer, ema: Ema | None, stream: Stream, scaler: Any
) -> int:
    """Put a checkpoint's weights, averages, optimiser, loss scale and place in the data back; returns its step."""
    state = saved.training
    load_weights(unit.model, state["raw"] if ema is not None else saved.model, file=saved.path)
    if ema is not None:
        ema.load(saved.model)
    if unit.distiller is not None:
        load_weights(unit.distiller, saved.distiller or {}, file=saved.path)
    optimiser.load_state_dict(state["optimiser"])
    in_layout(optimiser)
    if "scaler" in state and scaler is not None:
        scaler.load_state_dict(state["scaler"])
    stream.load_state_dict(state["stream"])
    return saved.step
