"""Readers: one data set each, behind one protocol (``imkd_data.sample.Reader``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from imkd_data.readers.splits import SPLITS, expand_splits, version_from_split
from imkd_data.sample import Reader

__all__ = ["READERS", "SPLITS", "expand_splits", "version_from_split"]


def _nuscenes(*args: Any, **kwargs: Any) -> Reader:
    from imkd_data.readers.nuscenes import open_nuscenes  # pyarrow is not needed to print help

    return open_nuscenes(*args, **kwargs)


READERS: dict[str, Callable[..., Reader]] = {"nuscenes": _nuscenes}
