"""Nested training states as JSON and named tensors: no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["flatten", "unflatten"]


def flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON; tensors go to ``tensors`` under running numbers. Dict keys may be str or int."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[k, flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [flatten(v, tensors) for v in value]}
    if isinstance(value, list):
        return [flatten(v, tensors) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a training state holds tensors, numbers, strings and containers, not {type(value).__name__}")


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of ``flatten``."""
    if isinstance(value, list):
        return [unflatten(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(unflatten(v, tensors) for v in value["tuple"])
        return {k: unflatten(v, tensors) for k, v in value["dict"]}
    return value
