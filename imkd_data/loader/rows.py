"""What the index says about rows: splits, scenes, time, poses and the way back in time. Read once, kept as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.cache.index import flat_numbers
from imkd_data.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["TRAIN_SPLITS", "RowTable", "check_no_scene_in_two_splits", "read_rows", "select_rows"]

I64 = NDArray[np.int64]
# Rows of any other split are held out: training on them is refused.
TRAIN_SPLITS = ("train", "mini_train")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowTable:
    """Columns of the index in index order. row, previous_row (-1 at a clip's start), shard, timestamp_us (N,) i64;
    global_from_ego (N, 12) f64; split as codes into split_names; whole: not quarantined; position_of: row -> index position
    or -1."""

    row: I64
    previous_row: I64
    shard: I64
    timestamp_us: I64
    global_from_ego: NDArray[np.float64]
    split: I64
    split_names: tuple[str, ...]
    whole: NDArray[np.bool_]
    position_of: I64

    def at(self, row: int) -> int:
        """Index position of a row. Errors: UsageError for a row that the cache does not list."""
        position = int(self.position_of[row]) if 0 <= row < len(self.position_of) else -1
        if position < 0:
            raise UsageError("the cache has no such row", found=str(row))
        return position

    def history(self, row: int, offsets: Sequence[int]) -> tuple[I64, NDArray[np.bool_]]:
        """Rows of the keyframes at ``offsets`` (0 = current, -2 = two keyframes ago) and whether they are genuine.

        A slot before the clip's start repeats the clip's oldest keyframe and is not genuine; clips are never crossed.
        """
        steps = -min(offsets)
        chain = [row]
        while len(chain) <= steps:
            previous = int(self.previous_row[self.at(chain[-1])])
            if previous < 0:
                break
            chain.append(previous)
        rows = np.array([chain[min(-o, len(chain) - 1)] for o in offsets], dtype=np.int64)
        return rows, np.array([-o < len(chain) for o in offsets])

    def pose(self, row: int) -> NDArray[np.float64]:
        """``global_from_ego`` (4, 4) f64 of a row."""
        m = np.eye(4)
        m[:3] = self.global_from_ego[self.at(row)].reshape(3, 4)
        return m


def _numbers(index: Any, name: str) -> I64:
    return np.asarray(index[name].to_numpy(), dtype=np.int64)


def read_rows(cache: Cache) -> RowTable:
    """The columns that a stream needs, from ``cache.row_index``."""
    index = cache.row_index
    row = _numbers(index, "row")
    position_of = np.full(int(row.max(initial=-1)) + 1, -1, dtype=np.int64)
    position_of[row] = np.arange(len(row))
    names, codes = np.unique(np.asarray(index["split"].to_pylist(), dtype=object).astype(str), return_inverse=True)
    poses = flat_numbers(index["global_from_ego"])
    return RowTable(
        row=row,
        previous_row=_numbers(index, "previous_row"),
        shard=_numbers(index, "shard"),
        timestamp_us=_numbers(index, "timestamp_us"),
        global_from_ego=np.asarray(poses, dtype=np.float64).reshape(-1, 12),
        split=codes.reshape(-1).astype(np.int64),
        split_names=tuple(str(n) for n in names),
        whole=np.asarray(index["status"].to_pylist()) == "ok",
        position_of=position_of,
    )


def check_no_scene_in_two_splits(cache: Cache) -> None:
    """Errors: MismatchError naming a scene that stands in two splits."""
    seen: dict[str, str] = {}
    for scene, split in zip(cache.row_index["scene"].to_pylist(), cache.row_index["split"].to_pylist(), strict=True):
        if seen.setdefault(scene, split) != split:
            raise MismatchError(
                "a scene stands in two splits, so validation would see training data",
                scene=scene,
                found=f"{seen[scene]} and {split}",
                next="build the cache again from one list of splits",
            )


def _named(table: RowTable, name: str) -> set[str]:
    """The splits of the cache that one name stands for."""
    if name == "all":
        return set(table.split_names)
    if name in table.split_names or name not in ("train", "val"):
        return {name} & set(table.split_names)
    return {n for n in table.split_names if (n in TRAIN_SPLITS) == (name == "train")}


def select_rows(table: RowTable, split: str) -> I64:
    """Rows of a split, or of several with commas between, in index order, quarantined samples left out.

    ``train`` stands for every training split of the cache, ``val`` for every held-out one, ``all`` for both. Errors:
    UsageError naming the splits that the cache has, also where only one of several names selects none of them."""
    named = {name: _named(table, name) for name in (n.strip() for n in split.split(","))}
    wanted = set().union(*named.values())
    codes = [i for i, n in enumerate(table.split_names) if n in wanted]
    rows = table.row[np.isin(table.split, codes) & table.whole]
    absent = [name for name, splits in named.items() if not splits]
    if absent or not len(rows):
        raise UsageError(
            f"the cache has no rows of split {', '.join(map(repr, absent or [split]))}",
            expected=", ".join(table.split_names),
            found=split,
            next="name a split that the cache holds, or build one with it",
        )
    return rows
