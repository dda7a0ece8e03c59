"""Scene-name lists of the nuScenes splits (our own data file, equal to the official lists by test)."""

from __future__ import annotations

import json
from importlib.resources import files
from types import MappingProxyType

from imkd_data.errors import UsageError

__all__ = ["SPLITS", "SPLIT_UNIONS", "expand_splits", "version_from_split"]

SPLITS = MappingProxyType(
    {
        name: tuple(scenes)
        for name, scenes in json.loads(files("imkd_data.readers").joinpath("splits.json").read_text("utf-8")).items()
    }
)
SPLIT_UNIONS = MappingProxyType({"trainval": ("train", "val"), "mini": ("mini_train", "mini_val")})
_VERSION = {"train": "v1.0-trainval", "val": "v1.0-trainval", "test": "v1.0-test"}


def expand_splits(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """``"trainval"``, ``"mini_train,mini_val"``, ... -> split names without unions, each once, in the order given.

    Raises UsageError for an unknown or empty name, and for splits that share scenes (mini with train or val).
    """
    parts = [p.strip() for p in (text.split(",") if isinstance(text, str) else text)]
    out: list[str] = []
    for part in parts:
        for name in SPLIT_UNIONS.get(part, (part,)):
            if name not in SPLITS:
                raise UsageError(
                    f"unknown split {part!r}",
                    rule="split.unknown",
                    expected=", ".join([*SPLITS, *SPLIT_UNIONS]),
                    found=part or "''",
                )
            if name not in out:
                out.append(name)
    versions = {version_from_split(name) for name in out}
    if len(versions) > 1:
        raise UsageError(
            "these splits belong to different versions of the data set",
            rule="split.versions",
            expected="splits of one version",
            found=", ".join(f"{name} ({version_from_split(name)})" for name in out),
        )
    return tuple(out)


def version_from_split(split: str) -> str:
    """The data set version a split (or union, or comma-separated list) lies in: train -> v1.0-trainval, mini* -> v1.0-mini."""
    first = split.split(",")[0].strip()
    first = SPLIT_UNIONS.get(first, (first,))[0]
    if first not in SPLITS:
        raise UsageError(
            f"unknown split {first!r}", rule="split.unknown", expected=", ".join([*SPLITS, *SPLIT_UNIONS]), found=first
        )
    return _VERSION.get(first, "v1.0-mini")
