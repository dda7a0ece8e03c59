"""A damaged sample: the stream stops, or puts the next position's sample in its place, alike for every division of work."""

from __future__ import annotations

from typing import Any

import pytest
from memory_cache import MemoryCache, rows_of
from test_stream import equal, tokens

from imkd_data.errors import CacheDamageError, StorageError, UsageError
from imkd_data.loader.stream import stream


class Holed(MemoryCache):
    """Reading ``bad`` rows fails as a damaged shard does."""

    bad: tuple[int, ...] = ()
    error: Any = CacheDamageError

    def read(self, name: str, row: int) -> Any:
        if name == "boxes" and row in self.bad:
            raise self.error("stored bytes are damaged", token=self.token(row))
        return super().read(name, row)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Holed:
    return Holed(tmp_path_factory.mktemp("toy"))


def test_stop_is_the_default_and_skip_replaces_by_the_next_position(cache: Holed) -> None:
    values: dict[str, Any] = {"fields": ("boxes", "radar_points"), "augment": True, "seed": 4}
    cache.bad = ()
    whole = list(stream(cache, 1, **values))
    order = tokens(whole)
    bad = rows_of(cache, "train")[3]
    cache.bad, token = (int(bad),), cache.token(bad)
    with pytest.raises(CacheDamageError, match="damaged"):
        list(stream(cache, 1, **values))
    s = stream(cache, 1, on_bad_sample="skip", **values)
    kept = list(s)
    at = order.index(token)
    assert [i for i, (a, b) in enumerate(zip(order, tokens(kept), strict=True)) if a != b] == [at]
    assert tokens(kept)[at] == order[(at + 1) % len(order)]
    assert all(equal(a, b) for i, (a, b) in enumerate(zip(whole, kept, strict=True)) if i != at)
    # the place keeps its augmentation, the content is the neighbour's
    assert (kept[at].bev_from_ego_B44 == whole[at].bev_from_ego_B44).all()
    assert s.skips == 1 and list(s.skipped) == [token] and "damaged" in s.skipped[token]


def test_ranks_and_resume_replace_alike(cache: Holed) -> None:
    rows = rows_of(cache, "train")
    cache.bad = tuple(int(r) for r in rows[[1, 2, 6]])
    values: dict[str, Any] = {"fields": ("boxes",), "seed": 1, "on_bad_sample": "skip"}
    one = [b.tokens for b in stream(cache, 2, **values)]
    ranks = [[b.tokens for b in stream(cache, 1, rank=r, world=2, **values)] for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(one)
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    assert not {cache.token(r) for r in cache.bad} & {t for b in one for t in b}
    s = stream(cache, 2, **values)
    it = iter(s)
    next(it), next(it)
    again = stream(cache, 2, **values)
    again.load_state_dict(s.state_dict())
    assert [b.tokens for b in again] == one[2:]


def test_no_whole_sample_left_and_other_errors_stop(cache: Holed) -> None:
    cache.bad = tuple(int(r) for r in rows_of(cache, "train"))
    with pytest.raises(CacheDamageError, match="16 samples in a row"):
        list(stream(cache, 1, fields=("boxes",), on_bad_sample="skip"))
    cache.error = StorageError  # a disk that is gone is no bad sample
    try:
        with pytest.raises(StorageError):
            list(stream(cache, 1, fields=("boxes",), on_bad_sample="skip"))
    finally:
        cache.error = CacheDamageError
    with pytest.raises(UsageError, match="on_bad_sample"):
        stream(cache, 1, on_bad_sample="ignore")  # type: ignore[arg-type]
