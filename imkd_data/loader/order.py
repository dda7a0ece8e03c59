"""The order of a stream: arithmetic on (seed, epoch, position), so it needs no list, no worker and no rank.

``permuted`` is a keyed bijection of 0..n-1 (a Feistel network over the next even power of two, with cycle walking for
values that fall outside). Position of step t, rank r, item i is ``t * G + r * b + i`` with global batch ``G = world * b``:
with equal G the batches of 1, 2 or 3 ranks hold the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from imkd_data.errors import MismatchError, UsageError

__all__ = ["Order", "Shuffle", "check_state", "key64", "permuted", "selection_hash"]

Shuffle = Literal["global", "block", "none"]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
ROUNDS = 6


def key64(*parts: int | str) -> int:
    """A 64-bit key of the parts; equal on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _mix(value: U64, key: int) -> U64:
    """splitmix64 finaliser: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        z = (value + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permuted(positions: ArrayLike, n: int, key: int) -> I64:
    """The keyed permutation of 0..n-1 at ``positions`` (any shape, each in 0..n-1); a bijection for every key.

    >>> sorted(permuted(range(5), 5, key=7).tolist())
    [0, 1, 2, 3, 4]
    """
    position = np.asarray(positions, dtype=np.int64)
    if position.size and (position.min() < 0 or position.max() >= n):
        raise UsageError(f"positions must lie in 0..{n - 1}", found=f"{position.min()}..{position.max()}")
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = [key64(key, r) for r in range(ROUNDS)]
    value = position.astype(np.uint64).reshape(-1)
    walking = np.arange(value.size)
    while walking.size:  # on average under four turns: the domain is at most 4 n
        left, right = value[walking] >> half, value[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        value[walking] = (left << half) | right
        walking = walking[value[walking] >= np.uint64(n)]
    return value.astype(np.int64).reshape(position.shape)


def selection_hash(rows: ArrayLike) -> str:
    """Identity of a selection of rows (16 hex digits)."""
    data = np.ascontiguousarray(np.asarray(rows, dtype="<i8")).tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """Which row stands at which position of which epoch.

    rows: the selection (global row numbers; repetition allowed, e.g. class balancing). shards: shard of each entry of
    ``rows``, needed by ``block``: shards are permuted, and ``block_shards`` neighbours in that order are mixed, so a
    remote or spinning disk reads few shards at a time. ``none`` keeps the selection's order (evaluation).
    """

    rows: I64
    seed: int = 0
    shuffle: Shuffle = "global"
    shards: I64 | None = None
    block_shards: int = 4
    _grouped: tuple[I64, I64, I64] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.shuffle not in ("global", "block", "none"):
            raise UsageError("unknown shuffle", expected="global, block or none", found=str(self.shuffle))
        if self.shuffle == "block" and (self.shards is None or len(self.shards) != len(self.rows)):
            raise UsageError("block shuffle needs the shard of every row")
        object.__setattr__(self, "rows", np.asarray(self.rows, dtype=np.int64))
        if self.shards is not None and len(self.shards):
            counts = np.unique(self.shards, return_counts=True)[1]
            entries = np.argsort(self.shards, kind="stable")  # entry numbers grouped by shard
            object.__setattr__(self, "_grouped", (counts, entries, np.concatenate([[0], np.cumsum(counts)[:-1]])))

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, epoch: int, positions: ArrayLike) -> I64:
        """Rows (same shape as positions) at the given positions of an epoch."""
        position = np.asarray(positions, dtype=np.int64)
        if self.shuffle == "none":
            return self.rows[position]
        if self.shuffle == "global":
            return self.rows[permuted(position, len(self), key64("global", self.seed, epoch))]
        return self.rows[self._block(epoch, position)]

    def _block(self, epoch: int, position: I64) -> I64:
        assert self._grouped is not None
        counts, entries, first = self._grouped
        order = permuted(np.arange(len(counts)), len(counts), key64("shards", self.seed, epoch))
        window_of = np.arange(len(order)) // self.block_shards
        sizes = np.bincount(window_of, weights=counts[order]).astype(np.int64)
        ends = np.cumsum(sizes)
        out = np.empty(position.size, dtype=np.int64)
        flat = position.reshape(-1)
        window = np.searchsorted(ends, flat, side="right")
        for w in np.unique(window):
            members = order[window_of == w]
            pool = np.concatenate([entries[first[s] : first[s] + counts[s]] for s in members])
            here = np.flatnonzero(window == w)
            local = permuted(flat[here] - (ends[w] - sizes[w]), int(sizes[w]), key64("window", self.seed, epoch, int(w)))
            out[here] = pool[local]
        return out.reshape(position.shape)


def check_state(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a saved stream state that belongs to other data; the error lists every difference.

    Compared: content of the fields that are read (the whole cache, in states from before that was noted), selection, seed,
    shuffle, fields. Not compared: ranks, workers, batch size.
    """
    names = ("content" if "content" in found else "cache", "selection", "seed", "shuffle", "fields")
    wrong = [n for n in names if expected.get(n) != found.get(n)]
    if wrong:
        raise MismatchError(
            "the saved stream state belongs to other data: " + ", ".join(wrong),
            expected="; ".join(f"{n} {found.get(n)}" for n in wrong),
            found="; ".join(f"{n} {expected.get(n)}" for n in wrong),
            next="give the cache, selection and seed of the saved run, or start a new run in another folder",
        )
