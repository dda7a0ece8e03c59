"""Method options: frozen dataclasses whose fields carry their documentation, choices and limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from imkd_data.errors import RecipeError

__all__ = ["MethodOptions", "Options", "option"]


def option(
    default: Any, doc: str, *, choices: tuple[Any, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    """A documented dataclass field of an ``Options`` class; the limits are inclusive."""
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def _coerced(name: str, value: Any, default: Any, choices: tuple[Any, ...] = ()) -> Any:
    """The value in the type of its default: command lines give strings, JSON gives lists."""
    if choices and isinstance(value, bool) and not isinstance(default, bool):
        return "on" if value else ("off" if "off" in choices else "none")  # a parser has read on/off as a truth value
    if isinstance(default, bool) and isinstance(value, str) and value.lower() in _SWITCH:
        return _SWITCH[value.lower()]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise RecipeError(f"option {name}", expected="bool", found=repr(value))
        return value
    if isinstance(default, Mapping):
        return _mapping(name, value)
    if isinstance(default, tuple):
        parts = [p for p in value.split(",") if p] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise RecipeError(f"option {name}", expected="a list", found=repr(value))
        return tuple(_coerced(name, p, default[0]) if default else p for p in parts)
    if isinstance(default, int | float):
        return _number(name, value, default)
    if isinstance(value, bool):
        raise RecipeError(f"option {name}", expected=type(default).__name__, found=repr(value))
    return value


def _number(name: str, value: Any, like: float) -> float:
    """The value as a finite number, a whole one where ``like`` is whole. NaN compares false with every limit, so no limit
    would refuse it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    whole = isinstance(like, int)
    if not math.isfinite(number) or (whole and number != int(number)):
        expected = f"a {'whole' if whole else 'finite'} number like {like}"
        raise RecipeError(f"option {name}", expected=expected, found=repr(value))
    return int(number) if whole else number


def _mapping(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RecipeError(f"option {name}", expected="a JSON object", found=repr(value)) from error
    if not isinstance(value, Mapping):
        raise RecipeError(f"option {name}", expected="a JSON object", found=repr(value))
    return dict(value)


def _members(value: Any) -> tuple[Any, ...]:
    """What choices and limits speak of: the parts of a list, the values of a mapping, else the value itself."""
    return tuple(value.values()) if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else (value,)


def _all_finite(value: Any) -> bool:
    if isinstance(value, Mapping | tuple | list):
        return all(map(_all_finite, _members(value)))
    return not isinstance(value, float) or math.isfinite(value)


def _limits(low: float | None, high: float | None) -> str:
    return f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all method options: unknown keys, wrong types, choices and limits are errors that name the option."""

    def __post_init__(self) -> None:
        defaults = self.defaults()
        for f in fields(self):
            choices, low, high = f.metadata.get("choices", ()), f.metadata.get("low"), f.metadata.get("high")
            value = _coerced(f.name, getattr(self, f.name), defaults[f.name], choices)
            object.__setattr__(self, f.name, value)
            if choices and any(v not in choices for v in _members(value)):
                raise RecipeError(f"option {f.name}", expected=" | ".join(map(str, choices)), found=repr(value))
            if not _all_finite(value):
                raise RecipeError(f"option {f.name}", expected="finite numbers", found=repr(value))
            if low is None and high is None:
                continue
            for number in (_number(f.name, v, 0.0) for v in _members(value)):
                if (low is not None and number < low) or (high is not None and number > high):
                    raise RecipeError(f"option {f.name} out of range", expected=_limits(low, high), found=repr(value))

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Options as set, ``name=value``, that look at another sample of the batch and so need two of them."""
        return ()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Default of every option."""
        return {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(cls)}  # type: ignore[misc]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """From a run configuration or ``--set`` values.

        Raises:
            RecipeError: an unknown key, a wrong type, a value outside its choices or limits.
        """
        defaults = cls.defaults()
        unknown = sorted(set(values) - set(defaults))
        if unknown:
            raise RecipeError(f"{cls.__name__} has no option {', '.join(unknown)}", expected=", ".join(defaults))
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """JSON form; ``from_dict`` reads it back."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else (dict(v) if isinstance(v, dict) else v)
            for f in fields(self)
        }

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """One object an option: name, default, choices, low, high, doc."""
        defaults = cls.defaults()
        return [{"name": f.name, "default": defaults[f.name], **f.metadata} for f in fields(cls)]


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """Options that every method has."""

    teacher_sample: str = option(
        "own",
        "control: other gives each sample the teachers' outputs of its neighbour in the batch",
        choices=("own", "other"),
    )
    end_step: int = option(
        0, "optimiser step from which no term acts (distillation that ends early, Cho & Hariharan 2019); 0: never", low=0
    )

    @property
    def neighbours(self) -> tuple[str, ...]:
        """``teacher_sample=other``."""
        return ("teacher_sample=other",) if self.teacher_sample == "other" else ()
