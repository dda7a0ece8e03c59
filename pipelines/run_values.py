"""Values of run settings: their types and ranges, and how the text of a command line becomes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

from imkd_data.errors import RecipeError

__all__ = ["LEAST", "RANGES", "check_numbers", "fitting", "model_value", "typed"]

# Whole numbers and the least that each can mean.
LEAST = {
    "seed": 0,
    "batch_size": 1,
    "keep": 1,
    "log_every": 1,
    "epochs": 0,
    "max_steps": 0,
    "global_batch": 0,
    "checkpoint_every": 0,
    "validate_every": 0,
    "optim.warmup_steps": 0,
    "loader.workers": 0,
    "loader.leave_out": 0,
    "loader.radar_sweeps": 0,
    "loader.lidar_sweeps": 0,
    "loader.paste_min_points": 0,
    "loader.paste_per_class": 0,
    "loader.paste_off_epochs": 0,
    "loader.augment.radar_sweeps_kept": 0,
}
MOST = 2**63 - 1  # of them all: torch takes no larger seed, and nothing else counts so far
LARGE = 1e30  # where a number has no meaning of its own that bounds it: float32, in which networks train, ends at 3.4e38
# Other numbers, alone or every one of a list. Draws have their ranges in ``AugmentConfig``.
RANGES = {
    "optim.lr": (0.0, LARGE),
    "optim.weight_decay": (0.0, LARGE),
    "optim.betas": (0.0, 0.999999),
    "optim.milestones": (0.0, LARGE),
    "optim.gamma": (0.0, 1e3),
    "optim.warmup_share": (0.0, 1.0),
    "optim.clip": (0.0, LARGE),
    "optim.ema": (0.0, 1.0),
    "optim.backbone_factor": (0.0, 1e3),
}
_LENGTHS = {"optim.betas": 2, "optim.milestones": None}  # of lists; None: any
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    list: "a list",
    dict: "an object",
}
_SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def check_numbers(run: Any) -> None:
    """Errors: RecipeError for a number of the run that is outside its range, NaN and infinity included."""
    for key, least in LEAST.items():
        number = attrgetter(key)(run)
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise RecipeError(f"run setting {key}", expected=f"a whole number, at least {least}", found=repr(number))
        if number > MOST:
            raise RecipeError(f"run setting {key}", expected=f"a whole number, {least} to {MOST}", found=repr(number))
    for key, (low, high) in RANGES.items():
        value = attrgetter(key)(run)
        listed, length = key in _LENGTHS, _LENGTHS.get(key)
        fits = isinstance(value, list | tuple) == listed and (length is None or len(value) == length)
        # NaN is between no two numbers.
        if not fits or not all(_is_number(v) and low <= v <= high for v in (value if listed else (value,))):
            count = ("numbers, " if length is None else f"{length} numbers, ") if listed else ""
            raise RecipeError(f"run setting {key}", expected=f"{count}{low:g} to {high:g}", found=repr(value))


def typed(key: str, value: Any, example: Any) -> Any:
    """The value in the type of ``example``; strings from the command line are read as JSON."""
    if isinstance(example, bool) and isinstance(value, str) and value.lower() in _SWITCH:
        return _SWITCH[value.lower()]
    if isinstance(value, str) and not isinstance(example, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [json.loads(v) for v in value.split(",")] if _all_numbers(value.split(",")) else value
    return fitting(key, value, example)


def fitting(key: str, value: Any, example: Any) -> Any:
    """The value, which must have the type of ``example``. Errors: RecipeError."""
    if isinstance(example, float) and _is_number(value):
        try:
            return float(value)
        except OverflowError:  # a whole number of more than 308 digits
            return math.inf
    kind = type(example)
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: False,
        str: isinstance(value, str),
        tuple: isinstance(value, list | tuple),
        list: isinstance(value, list | tuple),
        dict: isinstance(value, Mapping),
    }
    if not fits.get(kind, True):
        like = f" like {example!r}" if example or kind is int else ""
        raise RecipeError(f"setting {key}", expected=f"{_KINDS[kind]}{like}", found=repr(value))
    return tuple(value) if kind is tuple else value


def model_value(leaf: str, value: Any, example: Any) -> Any:
    """A setting of a network's configuration. Errors: RecipeError, also for a number that is not finite."""
    if example is None and isinstance(value, str):
        return None if value in ("null", "none") else value
    value = typed(f"model.{leaf}", value, example)
    parts = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(v, float) and not math.isfinite(v) for v in parts):
        raise RecipeError(f"setting model.{leaf}", expected="finite numbers", found=repr(value))
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _all_numbers(parts: Iterable[str]) -> bool:
    try:
        return all(isinstance(json.loads(p), int | float) for p in parts)
    except ValueError:
        return False
