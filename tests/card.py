"""A graphics card that is not there: tensors that say they lie on ``cuda:0`` and compute on the CPU.

What it shows without a GPU: an operation that mixes tensors of two devices fails, values go to and fro by explicit copies
only, ``torch.autocast("cuda")`` applies CUDA's own lists of types, and places where the host waits for the card are counted.
What it does not: speed, memory, a GPU's rounding, and the backward pass (this torch has no CUDA threads).
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["CARD", "OnCard", "WrongDeviceError", "a_card"]

CARD = torch.device("cuda", 0)
HOST = torch.device("cpu")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
WAITS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.bincount.default,
    aten._unique2.default,
)
LOW = (torch.bfloat16, torch.float16)
META, CUDA = 14, 1  # torch's numbers of device types


class WrongDeviceError(RuntimeError):
    """What CUDA says of a mixed operation."""


class OnCard(Tensor):
    """A tensor of the card; ``host`` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnCard:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "layout": host.layout}
        made = Tensor._make_wrapper_subclass(cls, host.size(), dtype=host.dtype, device=CARD, requires_grad=False, **layout)
        made.host = host
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        values = kwargs or {}
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], **{"dtype": args[0].dtype, "device": args[0].device, **values})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **values)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise WrongDeviceError(f"{func} on the card's tensors while there is no card")


class Card(TorchDispatchMode):
    """waits: where the host waited for the card -> how often. copies: likewise, values taken to the card."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, values)) if isinstance(t, Tensor)]
        mine = [t for t in tensors if isinstance(t, OnCard)]
        device = None if values.get("device") is None else torch.device(values["device"])
        there = bool(mine) if device is None else device.type == "cuda"
        if not mine and not there:
            return func(*args, **values)
        if mine and func not in COPIES:
            _refuse_mixed(func, args, tensors)
        if mine and (func in WAITS or not there or (func is aten.index.Tensor and _has_mask(args[1]))):
            self.waits[_place()] += 1
        if not mine and func in COPIES:
            self.copies[_place()] += 1
        if device is not None:
            values["device"] = HOST
        out = _computed(func, *tree_map(lambda t: t.host if isinstance(t, OnCard) else t, (args, values)))
        if func is aten.copy_.default:
            return args[0]
        if not there:
            return out
        out = tree_map(lambda t: OnCard(t) if isinstance(t, Tensor) else t, out)
        return return_and_correct_aliasing(func, args, values, out)


def _has_mask(indices: Sequence[Any]) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _refuse_mixed(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Numbers without dimensions may come from the host, and so may places (not values) of an index."""
    strange = [t for t in tensors if not isinstance(t, OnCard) and t.dim() > 0]
    if func is aten.index.Tensor:
        strange = [t for t in strange if t is args[0]]
    if strange:
        shapes = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
        raise WrongDeviceError(f"Expected all tensors to be on the same device: {func} has {shapes}")


def _place() -> str:
    """File and function of ours that called."""
    ours = ("imkd_data", "imkd_models", "pipelines")
    frames = [f for f in traceback.extract_stack(sys._getframe(2)) if any(f"/{part}/" in f.filename for part in ours)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "test"


def _computed(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """On the host; what a CPU has not in half precision is done in float32, as a GPU does inside."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("not implemented for", "half to float")):
            raise
    if func is aten._softmax.default:
        return func(args[0].float(), args[1], False)
    low = next(t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dtype in LOW)
    wide = tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.dtype in LOW else t, (args, dict(kwargs)))
    return tree_map(lambda t: t.to(low) if isinstance(t, Tensor) and t.is_floating_point() else t, func(*wide[0], **wide[1]))


def _lend_guard() -> bool:
    """A torch without CUDA cannot even ask for a CUDA tensor's stream: it gets the meta device's answers."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        table = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        return False
    if not table[CUDA]:
        table[CUDA] = table[META]
    return True


@contextmanager
def a_card() -> Iterator[Card | None]:
    """While open, ``x.to(CARD)`` and ``device=CARD`` work. None where this torch cannot be lent a card (or has one)."""
    if torch.cuda.is_available() or not _lend_guard():
        yield None
        return
    lifted = torch._C._only_lift_cpu_tensors()
    replaced = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch("torch.cuda._lazy_init", lambda: None))
            stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
            stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
            yield stack.enter_context(Card())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(replaced)
        torch._C._set_only_lift_cpu_tensors(lifted)
