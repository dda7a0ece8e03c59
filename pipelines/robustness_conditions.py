"""What the robustness protocol takes from a network: its conditions, and each as changes of the batches. Nothing runs here.

Draws are fixed (seed, condition, draw), so that every network loses the same sensors on the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from imkd_data.cache.index import weather

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache
    from imkd_data.loader.batch import Batch

__all__ = ["CONDITIONS", "Change", "Condition", "Variant", "variants", "weather_of"]

DRAWS = 5
RINGS_M = ((0.0, 20.0), (20.0, 30.0), (30.0, 50.0))
Change = Callable[["Batch"], "Batch"]
# Radar columns that batches carry behind the network's own: by them points are taken away, then they go themselves. So one
# reading of a sample serves all conditions.
HELPERS = ("sensor", "sweep")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One line of the table.

    weather: only these samples. ring_m, far: range limits of the scored boxes. cameras, radars: how many are lost.
    radar_sweeps: newest scans that are left. history, radar_late, camera_late: what happens to time.
    """

    name: str
    group: str
    weather: str = ""
    ring_m: tuple[float, float] | None = None
    far: bool = False
    cameras: int = 0
    radars: int = 0
    radar_sweeps: int = 0
    history: str = ""  # older | none
    radar_late: bool = False
    camera_late: bool = False

    @property
    def predicts(self) -> bool:
        """Whether the network has to run again."""
        return bool(self.cameras or self.radars or self.radar_sweeps or self.history or self.radar_late or self.camera_late)


CONDITIONS: tuple[Condition, ...] = (
    Condition(name="all samples", group="plain"),
    *(Condition(name=w, group="weather", weather=w) for w in ("day, dry", "rain", "night")),
    *(Condition(name=f"{a:.0f} to {b:.0f} m", group="range", ring_m=(a, b)) for a, b in RINGS_M),
    Condition(name="far: doubled ranges", group="range", far=True),
    *(Condition(name=f"{n} of the cameras lost", group="sensors", cameras=n) for n in (1, 3, 6)),
    *(Condition(name=f"{n} of the radars lost", group="sensors", radars=n) for n in (1, 3, 5)),
    Condition(name="past keyframes two older", group="time", history="older"),
    Condition(name="no past keyframes", group="time", history="none"),
    *(Condition(name=f"radar: {n} sweep{'s' * (n > 1)}", group="time", radar_sweeps=n) for n in (3, 1)),
    Condition(name="radar one keyframe late", group="time", radar_late=True),
    Condition(name="cameras one sweep late", group="time", camera_late=True),
)


def weather_of(description: str) -> frozenset[str]:
    """nuScenes says weather and light in a scene's description: rain, night, else "day, dry"."""
    night, rain = weather(description)
    found = {name for name, seen in (("night", night), ("rain", rain)) if seen}
    return frozenset(found or {"day, dry"})


# ----------------------------------------------------------------------------------------------------- changed batches


def _lost(seed: int, draw: int, number: int, count: int, kind: str) -> list[int]:
    """Which sensors are lost: the same for every run and sample of a draw."""
    rng = np.random.Generator(np.random.Philox(key=[seed, draw * 64 + number * 8 + (kind == "radar")]))
    return sorted(int(i) for i in rng.permutation(count)[:number])


def without_cameras(batch: Batch, lost: Sequence[int]) -> Batch:
    """Zero images after normalisation: what a network sees when a cable is out."""
    assert batch.images_BTVCHW is not None
    images = batch.images_BTVCHW.clone()
    images[:, :, list(lost)] = 0
    return replace(batch, images_BTVCHW=images)


def without_radars(batch: Batch, lost: Sequence[int]) -> Batch:
    """No points of these radars. Needs the columns HELPERS."""
    import torch

    points = _with_helpers(batch)
    sensor = points.features_NF[:, -2].round().long()
    gone = torch.isin(sensor, torch.tensor(list(lost), device=sensor.device))
    return replace(batch, radar=_radar_where(points, ~gone))


def newest_sweeps(batch: Batch, count: int) -> Batch:
    """Only the newest ``count`` scans of every radar and keyframe. Needs the columns HELPERS."""
    points = _with_helpers(batch)
    return replace(batch, radar=_radar_where(points, points.features_NF[:, -1].round() < count))


def _with_helpers(batch: Batch) -> Any:
    points = batch.radar
    assert points is not None and points.feature_names[-len(HELPERS) :] == HELPERS
    return points


def as_trained(batch: Batch) -> Batch:
    """The batch without the columns HELPERS: what the network was trained on."""
    points = batch.radar
    if points is None or points.feature_names[-len(HELPERS) :] != HELPERS:
        return batch
    features, names = points.features_NF[:, : -len(HELPERS)].contiguous(), points.feature_names[: -len(HELPERS)]
    return replace(batch, radar=replace(points, features_NF=features, feature_names=names))


def _radar_where(points: Any, keep: Any) -> Any:
    columns = ("xyz_m", "features_NF", "batch_index", "time_index", "age_s", "velocity_mps")
    return replace(points, **{n: None if getattr(points, n) is None else getattr(points, n)[keep] for n in columns})


def without_history(batch: Batch) -> Batch:
    """Every past slot repeats the current keyframe."""
    import torch

    slots = batch.history_valid_BT.shape[1] if batch.history_valid_BT is not None else 1
    changes: dict[str, Any] = {}
    for name in ("images_BTVCHW", "image_from_camera_BTV33", "bev_from_camera_BTV44"):
        value = getattr(batch, name)
        if value is not None:
            changes[name] = value[:, :1].expand(-1, slots, *value.shape[2:]).contiguous()
    if batch.radar is not None and slots > 1:
        now = _radar_where(batch.radar, batch.radar.time_index == 0)
        copies = [replace(now, time_index=torch.full_like(now.time_index, t)) for t in range(slots)]
        joined = {
            name: None if getattr(now, name) is None else torch.cat([getattr(c, name) for c in copies])
            for name in ("xyz_m", "features_NF", "batch_index", "time_index", "age_s", "velocity_mps")
        }
        changes["radar"] = replace(now, **joined)
    return replace(batch, **changes)


def late_history(history: Sequence[int]) -> tuple[int, ...]:
    """Offsets to ask for so that every slot's predecessor is there: the network's own first."""
    return (*history, *(o - 1 for o in history if o - 1 not in history))


def with_late_radar(batch: Batch, history: Sequence[int]) -> Batch:
    """Every slot gets the radar of one keyframe earlier; the batch holds ``late_history(history)``. The car's own motion is
    known, so places are right; what moved meanwhile is not. Before the clip there is no radar: its first keyframe has none."""
    import torch

    points, asked = batch.radar, late_history(history)
    assert points is not None
    slot_of = torch.full((len(asked),), -1, device=points.time_index.device)
    slot_of[[asked.index(o - 1) for o in history]] = torch.arange(len(history), device=slot_of.device)
    slot = slot_of[points.time_index]
    if batch.history_valid_BT is not None:  # a slot before the clip repeats its oldest keyframe, which would not be late
        slot = torch.where(batch.history_valid_BT[points.batch_index, points.time_index], slot, -1)
    changes: dict[str, Any] = {"radar": _radar_where(replace(points, time_index=slot), slot >= 0)}
    for name in ("images_BTVCHW", "image_from_camera_BTV33", "bev_from_camera_BTV44", "history_valid_BT"):
        value = getattr(batch, name)
        if value is not None:
            changes[name] = value[:, : len(history)].contiguous()
    return replace(batch, **changes)


# ------------------------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One run of the network over all samples: batches of a stream asked for ``overrides``, then changed."""

    condition: Condition
    change: Change
    overrides: Mapping[str, Any]


def variants(
    condition: Condition, cache: Cache, options: Mapping[str, Any], seed: int, late: Callable[[], Change]
) -> list[Variant]:
    """The runs that a condition needs, one per draw; the plain one where it only selects samples or boxes.

    options: of the network's stream. late: makes the change to cameras one sweep earlier.
    """
    history = tuple(options["history"])
    overrides: dict[str, Any] = {}
    if "radar_points" in options["fields"]:
        overrides["radar_features"] = (*options.get("radar_features", ("rcs_dbsm",)), *HELPERS)
    changes: list[Change] = [lambda b: b]
    declared = [i for i, n in enumerate(cache.suite.radars) if n in cache.recipe.sensors]
    if condition.cameras:
        count = sum(n in cache.recipe.sensors for n in cache.suite.cameras)
        draws = 1 if condition.cameras == count else DRAWS
        lost = [_lost(seed, d, condition.cameras, count, "camera") for d in range(draws)]
        changes = [lambda b, gone=gone: without_cameras(b, gone) for gone in lost]  # type: ignore[misc]
    elif condition.radars:
        draws = 1 if condition.radars == len(declared) else DRAWS
        lost = [[declared[i] for i in _lost(seed, d, condition.radars, len(declared), "radar")] for d in range(draws)]
        changes = [lambda b, gone=gone: without_radars(b, gone) for gone in lost]  # type: ignore[misc]
    elif condition.radar_sweeps:
        changes = [lambda b: newest_sweeps(b, condition.radar_sweeps)]
    elif condition.history == "older":
        overrides["history"] = tuple(0 if o == 0 else o - 2 for o in history)
    elif condition.history == "none":
        changes = [without_history]
    elif condition.radar_late:
        overrides["history"] = late_history(history)
        changes = [lambda b: with_late_radar(b, history)]
    elif condition.camera_late:
        changes = [late()]
    return [Variant(condition=condition, change=_then(c, as_trained), overrides=overrides) for c in changes]


def _then(first: Change, second: Change) -> Change:
    return lambda batch: second(first(batch))
