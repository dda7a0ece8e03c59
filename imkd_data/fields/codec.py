"""Small shared pieces of the fields: npy in a zstd frame, one-entry memory, own errors."""

from __future__ import annotations

import functools
import io
import math
import threading
import tokenize
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import CacheDamageError, InputDataError
from imkd_data.recipe import Recipe
from imkd_data.sample import Payload

__all__ = ["NO_UPSTREAM", "OnePayload", "array_from_part", "part_from_array", "too_many", "zstd_size"]

NO_UPSTREAM: Mapping[str, Any] = {}
_MAX_PART_BYTES = 1 << 30
T = TypeVar("T")


def part_from_array(array: NDArray[Any]) -> bytes:
    """An array as ``.npy`` in one zstd level 3 frame with content checksum: the form of a blob's ``.npy.zst`` part."""
    from numcodecs.zstd import compress

    array = np.ascontiguousarray(array)
    part = bytes(compress(b"".join([_npy_head(array.dtype, array.shape), array.data]), 3, True))
    _last.made = part, array
    return part


_last = threading.local()  # the part that was made last, and its array: a build asks it for statistics at once


@functools.lru_cache(maxsize=256)
def _npy_head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers of a version 1.0 ``.npy`` file in C order."""
    buffer = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def array_from_part(part: bytes) -> NDArray[Any]:
    """The array in a ``.npy.zst`` part; never runs code, CacheDamageError when it cannot be decoded."""
    from numcodecs.zstd import decompress

    made = getattr(_last, "made", None)
    if made is not None and made[0] is part:
        known: NDArray[Any] = made[1].view()
        known.flags.writeable = False
        return known
    try:
        if zstd_size(part) > _MAX_PART_BYTES:
            raise ValueError("larger than a part may be")
        raw = decompress(part)
        start = 10 + int.from_bytes(raw[8:10], "little")
        dtype, shape = _npy_header(raw[:start])
        array: NDArray[Any] = np.frombuffer(raw, dtype, math.prod(shape), start).reshape(shape)
    except (RuntimeError, ValueError, OSError, EOFError, OverflowError) as error:
        raise CacheDamageError(
            "a blob part cannot be decoded", rule="blob.decode", expected="npy in a zstd frame", found=str(error)[:200]
        ) from error
    return array


def zstd_size(frame: bytes | memoryview) -> int:
    """Content size in a zstd frame's header; ValueError where there is none."""
    if len(frame) < 6 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        raise ValueError("not a zstd frame")
    flags = frame[4]
    single, width = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6]
    if width == 0:
        if not single:
            raise ValueError("the zstd frame does not say its size")
        width = 1
    at = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(frame[at : at + width], "little") + (256 if width == 2 else 0)


@functools.lru_cache(maxsize=256)
def _npy_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """dtype and shape of a version 1.0 ``.npy`` header in C order; ValueError for anything else. Parsing costs more than
    reading a small array, and a field's headers repeat."""
    stream = io.BytesIO(head)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not a version 1.0 npy")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (SyntaxError, tokenize.TokenError, TypeError, MemoryError) as error:  # of Python's own parser, which NumPy asks
        raise ValueError(f"the npy header is malformed: {error}") from error
    if fortran or dtype.hasobject:
        raise ValueError("only C order and plain numbers")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"the npy header gives the shape {shape}")
    return dtype, shape


class OnePayload(Generic[T]):
    """Remembers what was computed from the last payload, per thread: several fields share one pass over its points.

    It changes no result: the value is a pure function of payload and recipe.
    """

    def __init__(self, compute: Callable[[Payload, Recipe], T]) -> None:
        self._compute = compute
        self._local = threading.local()

    def __call__(self, payload: Payload, recipe: Recipe) -> T:
        last = getattr(self._local, "last", None)
        if last is None or last[0] is not payload or last[1] is not recipe:
            last = self._local.last = (payload, recipe, self._compute(payload, recipe))
        value: T = last[2]
        return value


def too_many(what: str, rule: str, found: int, limit: int, payload: Payload, advice: str, field: str) -> InputDataError:
    """The error of a fixed-width field that is too narrow for a sample."""
    return InputDataError(
        what,
        rule=rule,
        expected=f"at most {limit:,}",
        found=f"{found:,}",
        token=payload.sample.token,
        scene=payload.sample.scene,
        field=field,
        next=advice,
    )
