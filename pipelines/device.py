"""Where a network runs that is not trained: the one rule of ``--device``."""

from __future__ import annotations

import torch

__all__ = ["device_of"]


def device_of(asked: str = "auto") -> str:
    """``auto``: CUDA where torch sees it, else the CPU, as ``imkd train --accelerator auto``; any other name as it is."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"
