"""The order: a bijection for every key, elastic over ranks, the same on every machine."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imkd_data.errors import MismatchError, UsageError
from imkd_data.loader.order import Order, check_state, permuted, selection_hash


@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permuted_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permuted(np.arange(n), n, key).tolist()) == list(range(n))


def test_permuted_is_pointwise_and_fixed_for_ever() -> None:
    n = 34_149
    whole = permuted(np.arange(n), n, 5)
    some = np.array([[0, 17], [n - 1, 4096]])
    assert np.array_equal(permuted(some, n, 5), whole[some])
    # these numbers are part of the format of saved stream states
    assert permuted(np.arange(11), 11, 3).tolist() == [10, 0, 2, 1, 4, 9, 6, 5, 3, 7, 8]
    assert selection_hash([1, 2, 3]) == "77ba1ae68d5afbb4"


def test_permuted_reaches_all_orders_evenly() -> None:
    seen = Counter(tuple(permuted(range(4), 4, k).tolist()) for k in range(4800))
    assert len(seen) == 24
    assert min(seen.values()) > 130 and max(seen.values()) < 280  # 200 expected


def test_permuted_leaves_no_neighbours_together() -> None:
    p = permuted(np.arange(5000), 5000, 1)
    assert abs(np.corrcoef(np.arange(5000), p)[0, 1]) < 0.05
    assert (np.abs(np.diff(p)) == 1).mean() < 0.01


def test_positions_outside_are_refused() -> None:
    with pytest.raises(UsageError):
        permuted([5], 5, 0)


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
def test_every_row_once_per_epoch(shuffle: str) -> None:
    rows, shards = np.arange(101) * 3 + 1, np.arange(101) // 9
    order = Order(rows=rows, shards=shards, seed=4, shuffle=shuffle, block_shards=3)  # type: ignore[arg-type]
    epochs = [order.at(e, np.arange(101)) for e in (0, 1)]
    for seen in epochs:
        assert sorted(seen.tolist()) == rows.tolist()
    assert (epochs[0].tolist() != epochs[1].tolist()) == (shuffle != "none")


def test_block_shuffle_touches_few_shards_at_a_time() -> None:
    shards = np.repeat(np.arange(12), 10)
    order = Order(rows=np.arange(120), shards=shards, shuffle="block", block_shards=3)
    seen = order.at(0, np.arange(120)) // 10
    windows = [set(seen[i : i + 30].tolist()) for i in range(0, 120, 30)]
    assert all(len(w) == 3 for w in windows)
    assert set.union(*windows) == set(range(12))
    assert any(len(set(seen[i : i + 8].tolist())) == 3 for i in range(24))  # mixed inside the window


def test_block_shuffle_with_uneven_shards() -> None:
    shards = np.array([5, 5, 5, 5, 5, 1, 9, 9])
    order = Order(rows=np.arange(8), shards=shards, shuffle="block", block_shards=2)
    for epoch in range(6):
        assert sorted(order.at(epoch, np.arange(8)).tolist()) == list(range(8))


def test_states_of_other_data_are_refused_with_the_difference() -> None:
    mine = {"cache": "a", "selection": "s", "seed": 1, "shuffle": "global", "fields": ["x"], "consumed": 5}
    check_state(mine, {**mine, "consumed": 99})
    with pytest.raises(MismatchError) as error:
        check_state(mine, {**mine, "cache": "b", "seed": 2})
    assert "cache b" in str(error.value) and "cache a" in str(error.value) and "seed 2" in str(error.value)
    known = {**mine, "content": "c"}
    check_state(known, mine)  # a state from before content was noted: the cache's id must be equal
    check_state(known, {**known, "cache": "b"})  # a field was added that this stream does not read
    for wrong in ({**mine, "cache": "b"}, {**known, "content": "d"}):
        with pytest.raises(MismatchError):
            check_state(known, wrong)
