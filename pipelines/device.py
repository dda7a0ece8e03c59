"""Where networks run: the one rule of ``--device`` and ``--accelerator``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from imkd_data.errors import UsageError

__all__ = ["device_of"]


def device_of(asked: str = "auto") -> str:
    """``auto``: CUDA where torch sees it, else the CPU, as ``imkd train --accelerator auto``; any other name as it is.

    Raises:
        UsageError: no such device, or none here.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")  # which nothing can run on
    if device.type == "meta":
        raise UsageError("no such device", expected="auto, cpu, cuda, cuda:N or mps", found=repr(asked), next="--device cpu")
    seen: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device.type in seen and not seen[device.type]():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise UsageError(
            f"no {device.type.upper()} device here",
            rule="device",
            expected=f"a device that torch sees, for {asked}",
            found=f"torch {torch.__version__}, built with {built}",
            next="--device cpu, in training --accelerator cpu",
        )
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        found, wanted = f"{count} devices", f"cuda:0 to cuda:{count - 1}"
        raise UsageError(f"no CUDA device {device.index} here", rule="device", expected=wanted, found=found)
    return asked
