"""Checkpoints: folders that are whole or absent, without pickle anywhere.

``step-00000012.ckpt/`` holds ``model.safetensors`` (the deployable network; the EMA copy where there is one),
``distiller.safetensors`` (adaptors), ``training.safetensors`` + the structure in ``checkpoint.json`` (optimiser, raw weights
under EMA, stream position), further named networks (``teacher_lidar.safetensors`` inside a label encoder's checkpoint) and
``checkpoint.json``: run, method, cache identity, metrics, sha256 of every file and of its own body. A folder is written under a
dot name, each file and the folder fsynced, then renamed. ``last.ckpt`` and ``best.ckpt`` are relative symlinks swapped by
rename; older folders go only after the new one has been read back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imkd_data.cache import fault
from imkd_data.errors import (
    CacheDamageError,
    DiskFullError,
    ImkdError,
    MismatchError,
    SourceMissingError,
    StorageError,
)
from imkd_data.recipe import canonical_json
from imkd_models.state import flatten, unflatten

__all__ = [
    "Checkpoint",
    "add_score",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "resolve_checkpoint",
    "save_checkpoint",
    "weights_hash",
]

FORMAT = 1
META = "checkpoint.json"
Weights = Mapping[str, Tensor]


def _weights(module: nn.Module | Weights) -> dict[str, Tensor]:
    state = module.state_dict() if isinstance(module, nn.Module) else dict(module)
    # copies: tied tensors would share storage, which safetensors refuses
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}


def weights_hash(module: nn.Module | Weights) -> str:
    """sha256 over names, dtypes, shapes and bytes of all weights: a network's identity, as FrozenTeacher.fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(module).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- save


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _storage_error(error: OSError, path: Path) -> ImkdError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(
            "no space left for a checkpoint",
            file=str(path),
            kept="the previous checkpoint is unchanged",
            next="free space or lower --set keep=N, then continue (`imkd train`: with --resume)",
        )
    return StorageError(
        f"a checkpoint could not be written: {error.strerror}",
        file=str(path),
        next="check the disk, then continue (`imkd train`: with --resume)",
    )


def save_checkpoint(
    directory: Path | str,
    step: int,
    model: nn.Module | Weights,
    distiller: nn.Module | Weights | None = None,
    training_state: Any = None,
    meta: Mapping[str, Any] | None = None,
    *,
    networks: Mapping[str, nn.Module | Weights] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``directory/step-<step>.ckpt`` and point ``last.ckpt`` at it.

    model: the network to deploy, or its weights. networks: further networks the model needs to be built again.
    meta: JSON values (run, method, cache identity, metrics). keep: newest folders that stay, besides last and best.
    A crash at any point leaves the previous ``last.ckpt`` whole. Returns the folder. Errors: DiskFullError, StorageError.
    """
    root = Path(directory)
    target = root / f"step-{step:08d}.ckpt"
    partial = root / f".{target.name}.{os.getpid()}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        fault.point("checkpoint.begin")
        _write_folder(partial, step, model, distiller, training_state, dict(meta or {}), networks or {})
        fault.point("checkpoint.written")
        _publish(partial, target)
        fault.point("checkpoint.renamed")
        load_checkpoint(target)  # read back before anything older goes
        _swap_link(root / "last.ckpt", target.name)
        fault.point("checkpoint.last.ckpt")
        _drop_old(root, keep)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, ImkdError):
            raise
        raise _storage_error(error, target) from error
    return target


def add_score(directory: Path | str, step: int, score: float, *, best: bool) -> None:
    """Point ``best.ckpt`` at the saved checkpoint of ``step`` if ``best``, and write ``metrics.score`` into it.

    Only the description changes, by rename: a crash at any point leaves the checkpoint whole. The score comes last, so a
    checkpoint that has one needs nothing more. Errors: DiskFullError, StorageError, and as ``load_checkpoint``.
    """
    root = Path(directory)
    target = resolve_checkpoint(root / f"step-{step:08d}.ckpt")
    body = _description(target)
    body["metrics"] = {**body.get("metrics", {}), "score": score}
    partial = target / f".{META}.partial"
    try:
        if best:
            _swap_link(root / "best.ckpt", target.name)
            fault.point("checkpoint.best.ckpt")
        partial.unlink(missing_ok=True)
        _write(partial, _sealed(body))
        fault.point("checkpoint.score")
        os.replace(partial, target / META)
        _sync(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, ImkdError):
            raise
        raise _storage_error(error, target) from error


def _write_folder(
    folder: Path,
    step: int,
    model: nn.Module | Weights,
    distiller: nn.Module | Weights | None,
    training_state: Any,
    meta: dict[str, Any],
    networks: Mapping[str, nn.Module | Weights],
) -> None:
    from safetensors.torch import save

    folder.mkdir()
    parts: dict[str, dict[str, Tensor]] = {"model": _weights(model)}
    if distiller is not None:
        parts["distiller"] = _weights(distiller)
    for name, network in networks.items():
        parts[name] = _weights(network)
    structure = None
    if training_state is not None:
        tensors: dict[str, Tensor] = {}
        structure = flatten(training_state, tensors)
        parts["training"] = tensors
    files: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        data = save(part)
        _write(folder / f"{name}.safetensors", data)
        files[f"{name}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        fault.point(f"checkpoint.file.{name}")
    body = {
        "format": FORMAT,
        "step": step,
        "files": files,
        "weights_sha256": weights_hash(parts["model"]),
        "training": structure,
        "software": {"torch": str(torch.__version__)},
        **meta,
    }
    _write(folder / META, _sealed(body))
    _sync(folder)


def _sealed(body: Mapping[str, Any]) -> bytes:
    """A description's bytes, with the sha256 of its own body."""
    return canonical_json({**body, "sha256": hashlib.sha256(canonical_json(body)).hexdigest()})


def _publish(partial: Path, target: Path) -> None:
    """Rename into place. A folder of the same step (killed before the links moved, then resumed) stays if it is equal."""
    if target.exists() and _same_files(partial, target):
        shutil.rmtree(partial)
    elif target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, target)
    _sync(target.parent)


def _same_files(a: Path, b: Path) -> bool:
    try:
        return load_checkpoint(a).files == load_checkpoint(b).files
    except ImkdError:
        return False


def _swap_link(link: Path, name: str) -> None:
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    os.symlink(name, fresh)
    os.replace(fresh, link)
    _sync(link.parent)


def _drop_old(root: Path, keep: int) -> None:
    pinned = {os.readlink(root / n) for n in ("last.ckpt", "best.ckpt") if (root / n).is_symlink()}
    folders = sorted(p for p in root.glob("step-*.ckpt") if p.is_dir())
    for folder in folders[: max(0, len(folders) - max(1, keep))]:
        if folder.name not in pinned:
            gone = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.rename(folder, gone)  # first out of sight: a half-deleted checkpoint never has its final name
            fault.point("checkpoint.drop")
            shutil.rmtree(gone, ignore_errors=True)
    for gone in root.glob(".step-*.old"):
        shutil.rmtree(gone, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------- load


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; every file's sha256 has been compared. meta: ``checkpoint.json`` without the training part."""

    path: Path
    step: int
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    structure: Any = None

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Weights of ``model``, ``distiller``, ... on the CPU. Errors: MismatchError when there is no such part."""
        from safetensors.torch import load_file

        if f"{part}.safetensors" not in self.files:
            raise MismatchError(
                f"the checkpoint has no {part} part",
                file=str(self.path),
                expected=f"{part}.safetensors",
                found=", ".join(sorted(self.files)),
            )
        return load_file(self.path / f"{part}.safetensors")

    @property
    def model(self) -> dict[str, Tensor]:
        """Weights of the deployable network."""
        return self.tensors("model")

    @property
    def distiller(self) -> dict[str, Tensor] | None:
        """Weights of the distiller, None without one."""
        return self.tensors("distiller") if "distiller.safetensors" in self.files else None

    @property
    def training(self) -> Any:
        """The training state that was saved, None without one."""
        return None if self.structure is None else unflatten(self.structure, self.tensors("training"))


def resolve_checkpoint(path: Path | str) -> Path:
    """The folder behind a checkpoint, a ``last.ckpt`` link, or a run's folder (then its ``last.ckpt``).

    Errors: SourceMissingError; MismatchError for a file (pickled checkpoints of other tools are refused).
    """
    given = Path(path)
    if given.is_file():
        raise MismatchError(
            "this is a file; checkpoints are folders of safetensors, and pickled files are never loaded",
            file=str(given),
            next="convert weights of other projects with `imkd import`",
        )
    for candidate in (given, given / "last.ckpt"):
        if (candidate / META).is_file():
            return candidate.resolve()
    raise SourceMissingError(
        "no checkpoint here",
        file=str(given),
        expected=f"a folder with {META}, or a run folder with last.ckpt",
        next="check the path; `imkd train RUN --out DIR` writes DIR/last.ckpt",
    )


def _damage(path: Path, what: str, **details: Any) -> CacheDamageError:
    return CacheDamageError(
        what, file=str(path), next="use an older step-*.ckpt folder of the same run, or copy the checkpoint again", **details
    )


def _description(folder: Path) -> dict[str, Any]:
    """What a checkpoint's description says without its sha256, once that and the format are right."""
    raw = (folder / META).read_bytes()
    try:
        body: dict[str, Any] = json.loads(raw)
        del body["sha256"]
        whole = raw == _sealed(body)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damage(folder / META, "the checkpoint's description cannot be read") from error
    if not whole:
        raise _damage(folder / META, "the checkpoint's description was changed")
    if body["format"] != FORMAT:
        raise MismatchError(
            "the checkpoint has another format",
            file=str(folder),
            expected=f"format {FORMAT}",
            found=f"format {body['format']}",
            next="use the version of imkd that wrote it",
        )
    return body


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Open and check a checkpoint. Errors: SourceMissingError, CacheDamageError (bytes), MismatchError (format)."""
    folder = resolve_checkpoint(path)
    body = _description(folder)
    for name, entry in body["files"].items():
        file = folder / name
        if not file.is_file():
            raise _damage(file, "a file of the checkpoint is missing")
        if file.stat().st_size != entry["bytes"]:
            raise _damage(file, "a file of the checkpoint has another size", expected=entry["bytes"], found=file.stat().st_size)
        if _sha256(file) != entry["sha256"]:
            raise _damage(file, "a file of the checkpoint was changed", expected=f"sha256 {entry['sha256'][:16]}")
    structure, files = body.pop("training"), body["files"]
    return Checkpoint(path=folder, step=int(body["step"]), meta=body, files=files, structure=structure)


def _some(names: list[str], most: int = 6) -> str:
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def load_weights(module: nn.Module, weights: Weights, *, file: Path | str = "") -> None:
    """Load all weights, strictly. Errors: MismatchError listing missing, unexpected and differently shaped tensors."""
    own = module.state_dict()
    missing, unexpected = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    common = sorted(set(own) & set(weights))
    shapes = [f"{k} {tuple(own[k].shape)} / {tuple(weights[k].shape)}" for k in common if own[k].shape != weights[k].shape]
    if missing or unexpected or shapes:
        raise MismatchError(
            "the weights belong to another network",
            file=str(file) or None,
            expected=f"missing: {_some(missing)}",
            found=f"unexpected: {_some(unexpected)}; shapes (network / file): {_some(shapes)}",
            next="build the network from the checkpoint's own configuration",
        )
    module.load_state_dict(dict(weights), strict=True)


def load_model(
    path: Path | str, device: torch.device | str = "cpu", *, attach: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint in eval mode on ``device``, and the checkpoint's meta (with ``path`` and ``step``).

    attach: give a label encoder its LiDAR teacher, whose neck and head turn its maps into boxes (not needed to teach).
    """
    from imkd_models.presets import model_from_dict

    checkpoint = load_checkpoint(path)
    model = model_from_dict(checkpoint.meta["model"])
    load_weights(model, checkpoint.model, file=checkpoint.path)
    if attach and "teacher_lidar.safetensors" in checkpoint.files:
        teacher = model_from_dict(checkpoint.meta["networks"]["teacher_lidar"])
        load_weights(teacher, checkpoint.tensors("teacher_lidar"), file=checkpoint.path)
        model.attach(teacher)
    return model.to(device).eval(), {**checkpoint.meta, "path": str(checkpoint.path)}
