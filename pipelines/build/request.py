"""From what the user asked to a resolved recipe: reader, splits, sensors, scenes, fields."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imkd_data.cache.plan import split_by_sensors
from imkd_data.errors import RecipeError, SourceMissingError, UsageError
from imkd_data.fields.base import CacheField
from imkd_data.geometry import BevGrid
from imkd_data.recipe import Recipe
from imkd_data.sample import Reader, SensorSuite

__all__ = ["ReaderSpec", "Resolved", "resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderSpec:
    """How a worker opens the raw data again. ``open``: None = the READERS entry ``dataset``; else a callable of the same
    signature from the user's own package (it travels by cloudpickle: by name if importable, else by value)."""

    dataset: str
    dataroot: Path
    version: str
    sensors: tuple[str, ...] | None
    lidar_sweeps: int
    radar_sweeps: int
    reference_channel: str | None
    open: Callable[..., Reader] | None = None

    def reader(self) -> Reader:
        """Open the raw data. Raises SourceMissingError, InputDataError, UsageError."""
        function = self.open
        if function is None:
            from imkd_data.readers import READERS

            if self.dataset not in READERS:
                raise UsageError("unknown data set", expected=", ".join(READERS), found=self.dataset)
            function = READERS[self.dataset]
        return function(
            self.dataroot,
            self.version,
            sensors=self.sensors,
            lidar_sweeps=self.lidar_sweeps,
            radar_sweeps=self.radar_sweeps,
            reference_channel=self.reference_channel,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A request, ready to plan."""

    spec: ReaderSpec
    reader: Reader
    recipe: Recipe
    fields: Mapping[str, CacheField]
    left_out: Mapping[str, str]
    missing_scenes: Mapping[str, str]


def resolve(
    *,
    dataroot: Path,
    version: str,
    splits: Sequence[str],
    sensors: Sequence[str] | None = None,
    profile: str = "standard",
    fields: Sequence[str | CacheField] | None = None,
    overrides: Mapping[str, Any] | None = None,
    scenes: str | Sequence[str] = "all",
    dataset: str | None = None,
    reader: Callable[..., Reader] | None = None,
) -> Resolved:
    """Resolve a request. ``fields``: names or CacheField values; None = the profile's. ``overrides``: recipe entries by name;
    ``grid.cell_m`` and ``options.x`` reach inside.

    Raises UsageError, RecipeError, SourceMissingError, InputDataError.
    """
    values = dict(overrides or {})
    lidar = int(values.get("lidar_sweeps", Recipe.__dataclass_fields__["lidar_sweeps"].default))
    radar = int(values.get("radar_sweeps", Recipe.__dataclass_fields__["radar_sweeps"].default))
    spec = ReaderSpec(
        dataset=dataset or ("nuscenes" if reader is None else getattr(reader, "__name__", "own").removeprefix("open_")),
        dataroot=Path(dataroot),
        version=version,
        sensors=tuple(sensors) if sensors is not None else None,
        lidar_sweeps=lidar,
        radar_sweeps=radar,
        reference_channel=values.get("reference_channel"),
        open=reader,
    )
    source = spec.reader()
    suite = source.suite
    declared = _declared(suite, sensors)
    table, names, required = _field_table(fields, profile)
    chosen, left_out = split_by_sensors({n: table[n] for n in names}, declared, suite, required)
    if not chosen:
        raise UsageError("no field can be built with these sensors", found=", ".join(declared))
    reference = str(values.pop("reference_channel", None) or _reference(suite, declared))
    all_splits = tuple(sorted(set(splits)))
    found, missing = _choose_scenes(source, all_splits, scenes)
    if fields is None and profile in _PROFILE_VALUES:
        values = {**_PROFILE_VALUES[profile], **values}
    base: dict[str, Any] = {
        "dataset": spec.dataset,
        "version": version,
        "splits": list(all_splits),
        "scenes": list(found),
        "sensors": list(declared),
        "reference_channel": reference,
        "fields": list(chosen),
    }
    recipe = Recipe.from_dict({**base, **_nested(values)})
    return Resolved(spec=spec, reader=source, recipe=recipe, fields=chosen, left_out=left_out, missing_scenes=missing)


# Recipe entries that a profile changes; explicit ones win.
_PROFILE_VALUES: dict[str, dict[str, Any]] = {
    "compact": {"grid.cell_m": 0.4, "grid.nx": 256, "grid.ny": 256, "view_cells": 2, "image_hw_px": (396, 704)},
}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``grid.x`` and ``options.x`` keys folded into their mappings."""
    from imkd_data.recipe import PLANE_GRID

    out: dict[str, Any] = {}
    for key, value in values.items():
        head, _, tail = key.partition(".")
        if not tail:
            out[key] = value.as_dict() if isinstance(value, BevGrid) else list(value) if isinstance(value, tuple) else value
        elif head == "grid":
            out.setdefault("grid", PLANE_GRID.as_dict())[tail] = value
        elif head == "options":
            out.setdefault("options", {})[tail] = value
        else:
            raise RecipeError("unknown recipe entry", found=key, expected="a recipe entry, grid.NAME or options.NAME")
    return out


def _declared(suite: SensorSuite, sensors: Sequence[str] | None) -> tuple[str, ...]:
    if sensors is None:
        return suite.channels
    unknown = sorted(set(sensors) - set(suite.channels))
    if unknown or not sensors:
        raise UsageError("unknown sensors", expected=", ".join(suite.channels), found=", ".join(unknown) or "none")
    return tuple(c for c in suite.channels if c in set(sensors))


def _reference(suite: SensorSuite, declared: tuple[str, ...]) -> str:
    return suite.lidar if suite.lidar and suite.lidar in declared else declared[0]


def _field_table(
    fields: Sequence[str | CacheField] | None, profile: str
) -> tuple[dict[str, CacheField], tuple[str, ...], tuple[str, ...]]:
    """All known fields by name, the names to build with their upstream fields, and those that were asked for by name."""
    from imkd_data import fields as known

    FIELDS, PROFILES = getattr(known, "FIELDS", ()), getattr(known, "PROFILES", {})

    own = {f.name: f for f in fields or () if isinstance(f, CacheField)}
    table = {**{f.name: f for f in FIELDS}, **own}
    if fields is None:
        if profile not in PROFILES:
            raise UsageError("unknown profile", expected=", ".join(PROFILES), found=profile)
        asked: tuple[str, ...] = tuple(PROFILES[profile])
        required: tuple[str, ...] = ()
    else:
        asked = tuple(f if isinstance(f, str) else f.name for f in fields)
        required = tuple(f for f in fields if isinstance(f, str))
    unknown = [n for n in asked if n not in table]
    if unknown:
        raise UsageError("unknown fields", expected=", ".join(table), found=", ".join(unknown))
    names: dict[str, None] = {}

    def add(name: str) -> None:
        for upstream in table[name].upstream:
            if upstream not in table:
                raise RecipeError(f"field {name} needs field {upstream}", field=name)
            add(upstream)
        names[name] = None

    for name in asked:
        add(name)
    return table, tuple(names), required


def _choose_scenes(
    reader: Reader, splits: tuple[str, ...], scenes: str | Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Explicit scenes of the recipe (() = all the tables hold) and those left out with the reason."""
    if scenes == "all":
        return (), {}
    names = [n for s in splits for n in reader.scene_names(s)]
    if scenes == "available":
        return _available(reader, names)
    patterns = scenes.split(",") if isinstance(scenes, str) else list(scenes)
    found = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    lost = [p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for n in names)]
    if lost:
        raise UsageError("no scene of the split matches", found=", ".join(lost), expected=", ".join(names[:20]))
    return tuple(sorted(found)), {}


def _available(reader: Reader, names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Scenes whose sensor files are all there, by the reader's own check or by the sizes in the input manifests."""
    everything = frozenset(("images", "lidar", "radar"))
    found, missing = [], {}
    for name in names:
        lost: list[str] = []
        try:
            for sample in reader.samples(name):
                lost += [str(e[0]) for e in reader.input_manifest(sample, everything) if len(e) == 2 and e[1] == -1]
        except SourceMissingError as error:
            lost.append(str(error.details.get("file", error.what)))
        if lost:
            missing[name] = f"{len(lost)} files missing, first {lost[0]}"
        else:
            found.append(name)
    if not found:
        raise SourceMissingError("no scene of the split has all its files", found=next(iter(missing.values()), "no scenes"))
    return tuple(sorted(found)), missing
