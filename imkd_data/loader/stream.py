"""``imkd_data.stream``: batches of a cache in an order that resumes anywhere, on any number of ranks and workers.

What a batch is made of stands in ``work.py``, which also runs in the workers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from imkd_data.cache.ahead import Ahead
from imkd_data.cache.remote import RemoteCache
from imkd_data.errors import ImkdError, NoProgressError, StorageError, UsageError
from imkd_data.fields.lidar import z_from_code
from imkd_data.geometry import BevGrid
from imkd_data.loader.augment import IDENTITY, AugmentConfig
from imkd_data.loader.batch import Batch
from imkd_data.loader.deliver import Delivery
from imkd_data.loader.order import Order, Shuffle, check_state, selection_hash
from imkd_data.loader.read import Packed, SampleReader
from imkd_data.loader.request import LIDAR_FEATURES, StreamRequest, available_parts, check_request, normalised_parts
from imkd_data.loader.rows import TRAIN_SPLITS, check_no_scene_in_two_splits, read_rows, select_rows
from imkd_data.loader.work import (
    LOOK_EVERY_S,
    Batches,
    Jobs,
    Key,
    Source,
    arrived,
    leave_if_started_by_a_stream,
    one_thread,
    started,
    unguarded_script,
)

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["OnBadSample", "Stream", "held_out_rows", "stream"]

OnBadSample = Literal["stop", "skip"]


class Stream:
    """An iterable of batches. Each ``iter`` runs from the current position to the end of the epoch, then the next ``iter``
    begins the next epoch. ``len`` = steps of a whole epoch on this rank.

    ``state_dict`` counts what was handed out; it holds the cache's identity, the selection, seed, epoch and samples
    consumed, and is independent of ranks and workers. ``skipped`` (token -> what was wrong) and ``skips`` (how often) say
    what ``on_bad_sample="skip"`` left out on this rank.
    """

    def __init__(
        self,
        cache: Cache,
        request: StreamRequest,
        order: Order,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        drop_last: bool = True,
        device: torch.device | str = "cpu",
        epoch: int = 0,
        timeout_s: float = 120.0,
        on_bad_sample: OnBadSample = "stop",
    ) -> None:
        if on_bad_sample not in ("stop", "skip"):
            raise UsageError("on_bad_sample", expected="stop or skip", found=str(on_bad_sample))
        if batch_size < 1 or not 0 <= rank < world:
            raise UsageError("batch_size must be at least 1 and rank in 0..world-1", found=f"{batch_size}, {rank} of {world}")
        self.cache, self.request, self.order = cache, request, order
        self.batch_size, self.rank, self.world, self.workers = batch_size, rank, world, workers
        self.drop_last, self.device, self.timeout_s = drop_last, torch.device(device), timeout_s
        self.epoch, self.consumed = epoch, 0
        self.on_bad_sample = on_bad_sample
        self.skipped: dict[str, str] = {}
        self.skips = 0
        fixed = order.shuffle == "none" and not request.augment.enabled
        keep = 1 - min(request.history) if fixed and len(request.history) > 1 else 0
        self.reader = SampleReader(cache, request, seed=order.seed, keep_keyframes=keep)
        self.delivery = _delivery(cache, request)
        if drop_last and len(order) < self.global_batch:
            raise UsageError(
                "fewer rows than one global batch",
                expected=f"at least {self.global_batch} rows",
                found=f"{len(order)} rows",
                next="lower the batch size, or pass drop_last=False",
            )

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.batch_size * self.world

    def _steps_from(self, consumed: int) -> int:
        left = len(self.order) - consumed
        return max(0, left // self.global_batch if self.drop_last else math.ceil(left / self.global_batch))

    def __len__(self) -> int:
        return self._steps_from(0)

    def identity(self) -> dict[str, Any]:
        """What a saved state must share with this stream."""
        return {
            "cache": self.cache.id,
            "content": self.cache.content_id(self.reader.fields),
            "selection": selection_hash(self.order.rows),
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
            "fields": {n: self.cache.fields[n].version for n in sorted(self.reader.fields)},
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {**self.identity(), "epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken. Errors: MismatchError listing what differs."""
        check_state(self.identity(), state)
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.epoch, self.consumed

        def keys() -> Iterator[Key]:
            for step in range(self._steps_from(start)):
                yield epoch, start + (step * self.world + self.rank) * self.batch_size

        for batch in self._delivered(keys):
            self.consumed += self.global_batch
            yield batch
        self.epoch, self.consumed = epoch + 1, 0

    def forever(self, per_epoch: int) -> Iterator[Batch]:
        """Batches without end, ``per_epoch`` samples (a multiple of the global batch) of every epoch, with the same
        workers throughout. For trainers: with accumulation an epoch ends at a whole optimiser step."""
        if per_epoch % self.global_batch or not 0 < per_epoch <= len(self.order):
            raise UsageError("an epoch takes whole global batches", expected=f"k * {self.global_batch}", found=str(per_epoch))
        start_epoch, start = self.epoch, self.consumed

        def keys() -> Iterator[Key]:
            epoch, at = start_epoch, start
            while True:
                if at + self.global_batch > per_epoch:
                    epoch, at = epoch + 1, 0
                yield epoch, at + self.rank * self.batch_size
                at += self.global_batch

        for batch in self._delivered(keys):
            if self.consumed + self.global_batch > per_epoch:
                self.epoch, self.consumed = self.epoch + 1, 0
            self.consumed += self.global_batch
            yield batch

    def _delivered(self, keys: Callable[[], Iterator[Key]]) -> Iterator[Batch]:
        source = Source(self.reader, self.order, self.batch_size, self.on_bad_sample == "skip")
        with self._fetching(source, keys) as ahead:
            for batch in self._batches(source, keys):
                yield batch
                if ahead is not None:
                    ahead.advance()

    @contextlib.contextmanager
    def _fetching(self, source: Source, keys: Callable[[], Iterator[Key]]) -> Iterator[Ahead | None]:
        """For a cache at a URL: the shards of the next batches, fetched meanwhile."""
        if not isinstance(self.cache, RemoteCache):
            yield None
            return
        per_shard = self.cache.recipe.rows_per_shard
        shards = (list(dict.fromkeys((source.job(key).rows // per_shard).tolist())) for key in keys())
        ahead = Ahead(self.cache, self.reader.fields, shards)
        try:
            yield ahead
        finally:
            ahead.close()

    def _batches(self, source: Source, keys: Callable[[], Iterator[Key]]) -> Iterator[Batch]:
        if self.workers:
            leave_if_started_by_a_stream()
        else:
            for key in keys():
                yield self._delivery_of(source.packed(key))
            return
        loader = torch.utils.data.DataLoader(
            Batches(source.reader),
            batch_size=None,
            sampler=Jobs(source, keys),  # type: ignore[arg-type]
            num_workers=self.workers,
            multiprocessing_context="spawn",
            prefetch_factor=2,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=one_thread,
            timeout=min(LOOK_EVERY_S, self.timeout_s),
        )
        values = started(loader)
        self.delivery.get_ready(self.device)
        for key in keys():
            try:
                value = arrived(values, self.timeout_s)
            except (RuntimeError, ConnectionError, EOFError) as error:  # killed while it hands over a tensor: its socket ends
                if (unguarded := unguarded_script(values)) is not None:
                    raise unguarded from None
                raise self._worker_error(error, source, key) from error
            if isinstance(value, ImkdError):
                raise value
            yield self._delivery_of(value)

    def _delivery_of(self, packed: Packed) -> Batch:
        self.skipped.update(packed.skipped)
        self.skips += len(packed.skipped)
        return self.delivery.batch(packed, self.device)

    def _worker_error(self, error: Exception, source: Source, key: Key) -> ImkdError:
        """A worker that died or hung: say what it was doing."""
        tokens = ", ".join(t[:12] for t in source.tokens(key))
        text = str(error)
        if "timed out" in text:
            return NoProgressError(
                f"no batch arrived within {self.timeout_s:g} s",
                token=tokens,
                next="look at the disk and the workers (py-spy dump); --set loader.workers=0 shows the error itself",
            )
        return StorageError(
            "a loader worker died",
            found=text.splitlines()[0] if text else "",
            token=tokens,
            next="/dev/shm may be too small (docker run --shm-size=8g), or memory ran out; try --set loader.workers=0",
        )

    def at_epoch(self, epoch: int) -> Stream:
        """Go to the start of an epoch."""
        self.epoch, self.consumed = epoch, 0
        return self


def _delivery(cache: Cache, request: StreamRequest) -> Delivery:
    recipe = cache.recipe
    return Delivery(
        request=request,
        plane_grid=recipe.grid,
        view_grid=recipe.view_grid,
        z_of_code=tuple(z_from_code(np.arange(256), recipe).tolist()),
    )


def stream(
    cache: Cache,
    batch_size: int,
    *,
    split: str = "train",
    history: Sequence[int] = (0,),
    fields: Iterable[str] | None = None,
    augment: AugmentConfig | bool | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: Shuffle = "global",
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    image_hw_px: tuple[int, int] | None = None,
    grid: BevGrid | None = None,
    drop_last: bool = True,
    rows: Sequence[int] | None = None,
    radar_filter: str = "crn",
    radar_features: Sequence[str] = ("rcs_dbsm",),
    radar_sweeps: int = 0,
    lidar_features: Sequence[str] = LIDAR_FEATURES,
    lidar_sweeps: int = 0,
    intensity_from: str = "planes",
    parity: Sequence[str] = (),
    device: torch.device | str = "cpu",
    timeout_s: float = 120.0,
    on_bad_sample: OnBadSample = "stop",
) -> Stream:
    """Batches of a cache, in frame bev, for any torch loop.

    Args:
        cache: an opened cache. batch_size: samples per rank and step.
        split: ``train`` (every training split of the cache), ``val``, ``all``, or a split's name.
        history: keyframe offsets, newest first; slots before a clip's start repeat its oldest keyframe.
        fields: parts (``images, depth, boxes, radar_points, lidar_points, lidar_intensity, intensity_planes``) or field
            names; None = every part that the cache holds.
        augment: a config, True for the defaults, None or False for none.
        shuffle: ``global``, ``block`` (few shards at a time: remote or spinning disks) or ``none``.
        image_hw_px: delivered image size, default the public 256 x 704 scaled to the data set's aspect ratio.
        grid: grid of the intensity map, default the cache's view grid.
        drop_last: drop the last incomplete global batch; False pads it with rows marked in ``padding_B``.
        lidar_features: columns of the LiDAR batch; ``near_m`` besides for networks that leave close points of sweeps out.
        parity: released behaviour of public loaders by name (``LOADER_PARITY``), to measure what it costs.
        rows: an explicit selection (global row numbers, repetition allowed) instead of a split.
        on_bad_sample: ``stop`` raises the error of a damaged sample; ``skip`` puts the next position's sample in its place
            and remembers the token in ``Stream.skipped``.

    Raises:
        MissingFeatureError: the cache lacks a field; names the command that adds it. UsageError, MismatchError: else.
    """
    config = IDENTITY if augment in (None, False) else AugmentConfig() if augment is True else augment
    assert isinstance(config, AugmentConfig)
    table = read_rows(cache)
    check_no_scene_in_two_splits(cache)
    chosen = select_rows(table, split) if rows is None else np.asarray(rows, dtype=np.int64)
    full_h, full_w = cache.suite.image_hw_px
    default_hw = (round(full_h * 256 / 900), round(full_w * 704 / 1600))
    request = StreamRequest(
        parts=available_parts(cache) if fields is None else normalised_parts(fields),
        grid=grid or cache.recipe.view_grid,
        image_hw_px=(int(image_hw_px[0]), int(image_hw_px[1])) if image_hw_px else default_hw,
        history=tuple(history),
        augment=config,
        radar_filter=radar_filter,
        radar_features=tuple(radar_features),
        radar_sweeps=radar_sweeps,
        lidar_features=tuple(lidar_features),
        lidar_sweeps=lidar_sweeps,
        intensity_from=intensity_from,
        parity=tuple(parity),
    )
    check_request(cache, request)
    shards = np.array([table.shard[table.at(int(r))] for r in chosen]) if shuffle == "block" else None
    order = Order(rows=chosen, seed=seed, shuffle=shuffle, shards=shards)
    return Stream(
        cache,
        request,
        order,
        batch_size=batch_size,
        rank=rank,
        world=world,
        workers=workers,
        drop_last=drop_last,
        device=device,
        epoch=epoch,
        timeout_s=timeout_s,
        on_bad_sample=on_bad_sample,
    )


def held_out_rows(cache: Cache, rows: Iterable[int]) -> list[int]:
    """Rows that belong to no training split; training on them is refused by the trainer."""
    table = read_rows(cache)
    trains = {i for i, n in enumerate(table.split_names) if n in TRAIN_SPLITS}
    return [int(r) for r in rows if int(table.split[table.at(int(r))]) not in trains]
