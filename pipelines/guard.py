"""What stops a training run in good order: signals, non-finite losses, trouble on another rank."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from imkd_data.errors import ImkdError, InputDataError, InterruptedBuildError, LockedError, NoProgressError
from imkd_data.loader.batch import Batch
from imkd_data.recipe import canonical_json

__all__ = [
    "EXIT_CODES",
    "StopSignals",
    "agree",
    "batch_tensors",
    "elsewhere",
    "interrupted",
    "lost_rank",
    "non_finite_error",
    "run_lock",
    "save_batch",
    "total",
]

RESUME = "; `imkd train` asks for --resume"  # the benchmark and the demo, which train too, continue without it

# Signals that finish the step, write a checkpoint and leave with this exit code.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 130, signal.SIGINT: 130}


class StopSignals:
    """Remembers the first stop signal; a second SIGINT interrupts at once. Use as a context manager in the main thread."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __enter__(self) -> StopSignals:
        for number in EXIT_CODES:
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: signals are somebody else's
                break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def agree(value: int, device: torch.device) -> int:
    """The largest value over all ranks (one tiny all-reduce; nothing on one rank). Trouble anywhere stops all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    tensor = torch.tensor([value], device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def total(value: int, device: torch.device) -> int:
    """The sum over all ranks; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    tensor = torch.tensor([value], device=device)
    torch.distributed.all_reduce(tensor)
    return int(tensor.item())


def batch_tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a batch by dotted name."""
    if isinstance(value, Tensor):
        return {prefix: value}
    if isinstance(value, Mapping):
        items = list(value.items())
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in fields(value)]
    else:
        return {}
    out: dict[str, Tensor] = {}
    for name, item in items:
        out.update(batch_tensors(item, f"{prefix}.{name}" if prefix else str(name)))
    return out


@contextlib.contextmanager
def run_lock(out: Path, rank: int, device: torch.device) -> Iterator[None]:
    """Hold ``out/.lock`` against other trainings while rank 0 lives; every rank calls it, so that all of them stop where one
    is refused. What this makes and nothing was put into is removed at the end. Errors: LockedError."""
    with contextlib.ExitStack() as held:
        owner = _hold(out, held) if rank == 0 else ""
        if agree(int(bool(owner)), device):
            raise LockedError(
                "another training writes this folder",
                rule="lock",
                file=str(out / ".lock"),
                found=owner or "see the message of rank 0",
                next="wait for it, or choose another --out",
            )
        yield


def _hold(out: Path, held: contextlib.ExitStack) -> str:
    """Take the lock until ``held`` closes, which removes its file; else who has it. The system lets go when a process dies,
    however; where a file system has no locks there is none, as nothing written rests on it."""
    path = out / ".lock"
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    while True:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(path.open("a+", encoding="utf-8"))
            except FileNotFoundError:  # another one ended just now and removed the folder
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    file.seek(0)
                    return file.read().strip() or "no word of its process"
            try:
                ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                ours = False
            if not ours:  # its holder removed it between opening and locking
                continue
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
            file.flush()
            held.push(opened.pop_all())
            held.callback(_leave, path, missing)
            return ""


def _leave(path: Path, made: list[Path]) -> None:
    """Remove the lock while it is held, and the folders that were made for a run that then was refused."""
    with contextlib.suppress(OSError):
        path.unlink()
        for folder in made:
            folder.rmdir()


_MAY_BE_NAN = ("velocity_mps_BM2", "velocity_mps")  # unknown velocities


def save_batch(batch: Batch, folder: Path, info: Mapping[str, Any]) -> Path:
    """The batch for replay: ``batch.safetensors`` and ``batch.json`` (tokens, positions, what was seen)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in batch_tensors(batch).items()}, folder / "batch.safetensors")
    (folder / "batch.json").write_bytes(canonical_json({"tokens": list(batch.tokens), **info}))
    return folder


def non_finite_error(batch: Batch, terms: Mapping[str, Tensor], *, step: int, out: Path, what: str) -> InputDataError:
    """Say which term and which input is not finite, name the tokens, keep the batch."""
    bad_terms = [n for n, v in terms.items() if not bool(torch.isfinite(v).all())]
    tensors = batch_tensors(batch)
    bad_inputs = [
        n
        for n, v in tensors.items()
        if v.is_floating_point() and not n.endswith(_MAY_BE_NAN) and not bool(torch.isfinite(v).all())
    ]
    seen = {"step": step, "what": what, "terms": bad_terms, "inputs": bad_inputs}
    folder = save_batch(batch, out / f"bad-step-{step:08d}", seen)
    return InputDataError(
        f"{what} is not finite at step {step}",
        rule="train.non_finite",
        expected="finite numbers",
        found=f"terms: {', '.join(bad_terms) or 'none'}; inputs: {', '.join(bad_inputs) or 'all finite'}",
        token=", ".join(batch.tokens),
        file=str(folder),
        kept="the last checkpoint is unchanged",
        next="inspect the saved batch; if the inputs are finite, lower optim.lr or set precision=32-true",
    )


def interrupted(number: int, step: int, steps: int) -> InterruptedBuildError:
    """The error of a run that a stop signal ended after a whole step."""
    return InterruptedBuildError(
        f"stopped by {signal.Signals(number).name} after step {step} of {steps}",
        signal_code=EXIT_CODES[signal.Signals(number)],
        kept="the checkpoint of this step is written",
        next=f"the same command continues{RESUME}",
    )


# How gloo and NCCL say that a peer's process is gone or silent; torch has no type of its own for gloo's.
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "gloo", "tcpstore")


def lost_rank(error: RuntimeError) -> ImkdError | None:
    """The readable error where a collective failed because another rank died or hangs; None for any other error."""
    text = str(error)
    if isinstance(error, ImkdError) or not any(word in text.lower() for word in _LOST):
        return None
    return NoProgressError(
        "another rank died or hangs",
        rule="train.lost_rank",
        found=text.splitlines()[0][:200],
        kept="the last checkpoint is unchanged",
        next=f"see the message of that rank (memory? signal?); then the same command continues{RESUME}",
    )


def elsewhere() -> ImkdError:
    """The error of a rank that stops because another one had trouble."""
    return NoProgressError("another rank stopped", rule="train.other_rank", next="see the message of that rank")
