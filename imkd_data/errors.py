"""The errors users meet. Every class has one exit code; every message says what to do next.

Exit codes: 0 done, 1 bug, 2 usage, 3 bad input, 4 damage found, 5 storage, 6 no progress, 7 locked, 8 source missing,
9 configuration or version mismatch, 130/143 interrupted (resumable).
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "CacheDamageError",
    "DiskFullError",
    "FrameMismatchError",
    "ImkdError",
    "InputDataError",
    "InterruptedBuildError",
    "LockedError",
    "MismatchError",
    "MissingFeatureError",
    "NoProgressError",
    "RecipeError",
    "SourceMissingError",
    "StorageError",
    "UnsafePathError",
    "UsageError",
]

_DETAILS = ("expected", "found", "file", "token", "scene", "channel", "shard", "field", "kept", "next")


class ImkdError(Exception):
    """Base of all errors with a known cause.

    Args:
        what: one sentence, what happened.
        rule: stable id of the violated rule, e.g. ``lidar.size``.
        details: any of expected, found, file, token, scene, channel, shard, field, kept, next.
        problems: further errors of the same run; the command line lists the first twenty.
    """

    code: ClassVar[int] = 1

    def __init__(self, what: str, *, rule: str = "", problems: tuple[ImkdError, ...] = (), **details: Any) -> None:
        unknown = set(details) - set(_DETAILS)
        if unknown:
            raise TypeError(f"unknown error details {sorted(unknown)}; known: {_DETAILS}")
        self.what, self.rule, self.problems = what, rule, problems
        self.details: dict[str, Any] = {k: details[k] for k in _DETAILS if details.get(k) is not None}
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {k:<9} {v}" for k, v in self.details.items())])

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders in builds
        return _rebuild, (type(self), self.what, self.rule, self.problems, self.details)

    def as_json(self) -> dict[str, Any]:
        """The same message as one JSON-ready object."""
        details = {k: v if isinstance(v, int | float | bool) else str(v) for k, v in self.details.items()}
        return {"v": 1, "level": "error", "code": self.code, "rule": self.rule, "what": self.what, **details}


def _rebuild(cls: type[ImkdError], what: str, rule: str, problems: tuple[ImkdError, ...], details: dict[str, Any]) -> ImkdError:
    return cls(what, rule=rule, problems=problems, **details)


class UsageError(ImkdError, ValueError):
    """Bad command line or argument."""

    code = 2


class RecipeError(UsageError):
    """A recipe or run configuration that cannot be meant."""


class InputDataError(ImkdError, ValueError):
    """Raw data that breaks a rule of its format."""

    code = 3


class UnsafePathError(InputDataError):
    """A path from a file that leaves its declared root."""


class CacheDamageError(ImkdError, OSError):
    """Stored bytes are missing, short, foreign or changed."""

    code = 4


class StorageError(ImkdError, OSError):
    """The operating system refused to store or read."""

    code = 5


class DiskFullError(StorageError):
    """No space or quota left."""


class NoProgressError(ImkdError, TimeoutError):
    """The watchdog saw nothing finish in time."""

    code = 6


class LockedError(ImkdError):
    """Another build or training holds the folder."""

    code = 7


class SourceMissingError(ImkdError, FileNotFoundError):
    """Raw data absent, or of another version than asked for."""

    code = 8


class MismatchError(ImkdError, ValueError):
    """A cache, checkpoint or recipe of another configuration or version."""

    code = 9


class MissingFeatureError(MismatchError, KeyError):
    """A network or cache does not deliver what another part needs."""


class FrameMismatchError(ImkdError, ValueError):
    """Two transforms whose frames do not chain: a bug in the calling code."""

    code = 1


class InterruptedBuildError(ImkdError):
    """Stopped by a signal; the same command continues."""

    def __init__(self, what: str, *, signal_code: int = 130, **details: Any) -> None:
        super().__init__(what, **details)
        self.exit_code = signal_code

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"exit_code": self.exit_code})
