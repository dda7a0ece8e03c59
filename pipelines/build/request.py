"""From what the user asked to a resolved recipe: reader, splits, sensors, scenes, fields."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imkd_data.cache.added import added_names
from imkd_data.cache.layout import check_name, shards_from_json
from imkd_data.cache.plan import split_by_sensors, stored_group, stored_recipe
from imkd_data.errors import ImkdError, MismatchError, RecipeError, SourceMissingError, UsageError
from imkd_data.fields.base import CacheField
from imkd_data.geometry import BevGrid
from imkd_data.recipe import Recipe
from imkd_data.sample import Reader, Sample, SensorSuite

__all__ = ["Asked", "ReaderSpec", "Resolved", "merged", "resolve"]


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
    strict: bool = False

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
            **({"strict": True} if self.strict else {}),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user said; None = not said. ``fields``: names or CacheField values. ``overrides``: recipe entries by name;
    ``grid.cell_m`` and ``options.x`` reach inside. ``scenes``: names, globs, "all" and "available"; all that match any."""

    dataroot: Path
    version: str | None = None
    splits: Sequence[str] | None = None
    sensors: Sequence[str] | None = None
    profile: str | None = None
    fields: Sequence[str | CacheField] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    scenes: str | Sequence[str] | None = None
    dataset: str | None = None
    reader: Callable[..., Reader] | None = None
    strict: bool = False


def merged(asked: Asked, out: Path) -> Asked:
    """``asked`` on top of the recipe in ``out``: nothing that is built is dropped, only changed or added to."""
    old = stored_recipe(out)
    if old is None:
        return asked
    stored = old.as_dict()
    for name in ("dataset", "version", "splits", "scenes", "sensors", "fields"):
        stored.pop(name)
    options = {f"options.{k}": v for k, v in stored.pop("options").items()}
    grid = {f"grid.{k}": v for k, v in stored.pop("grid").items()}
    if asked.overrides.get("rows_per_shard", old.rows_per_shard) != old.rows_per_shard:
        raise MismatchError(
            "rows_per_shard cannot change in a cache",
            expected=str(old.rows_per_shard),
            found=str(asked.overrides["rows_per_shard"]),
            next="build into another --out",
        )
    kept = added_names(out, old)  # no build computes them: the plan keeps or drops them
    names: dict[str, str | CacheField] = {n: n for n in old.fields if n not in kept}
    if asked.profile is not None and asked.fields is None:
        names |= {n: n for n in _profile(asked.profile)}
    names |= {(f if isinstance(f, str) else f.name): f for f in asked.fields or ()}
    scenes: str | Sequence[str] = list(old.scenes) or "all"
    if asked.scenes is not None:
        scenes = _joined_scenes(asked.scenes, set(asked.splits or ()) <= set(old.splits), old, out)
    return replace(
        asked,
        version=asked.version or old.version,
        splits=tuple(dict.fromkeys([*old.splits, *(asked.splits or ())])),
        sensors=asked.sensors if asked.sensors is not None else old.sensors,
        profile=None,
        fields=list(names.values()),
        overrides={**stored, **grid, **options, **asked.overrides},
        scenes=scenes,
        dataset=asked.dataset or old.dataset,
    )


def _patterns(scenes: str | Sequence[str]) -> list[str]:
    return scenes.split(",") if isinstance(scenes, str) else list(scenes)


def _joined_scenes(scenes: str | Sequence[str], same_splits: bool, old: Recipe, out: Path) -> list[str]:
    """The scenes asked for and those of the cache in ``out``."""
    new = _patterns(scenes)
    if old.scenes:
        return [*old.scenes, *new]
    group = stored_group(out)
    if group is None or (same_splits and "available" not in new):
        return ["all", *new]
    # The cache has all scenes of its splits; here "all" would be more than was asked for.
    return [*dict.fromkeys(c.scene for shard in shards_from_json(group["shards"]) for c in shard.clips), *new]


def _profile(name: str) -> tuple[str, ...]:
    from imkd_data.fields import PROFILES

    if name not in PROFILES:
        raise UsageError("unknown profile", expected=", ".join(PROFILES), found=name)
    return tuple(PROFILES[name])


def resolve(asked: Asked) -> Resolved:
    """Resolve a request: open the raw data, choose sensors, scenes and fields.

    Raises UsageError, RecipeError, SourceMissingError, InputDataError.
    """
    if asked.version is None or not asked.splits:
        raise UsageError("version and split are needed", next="--split train (the version follows from it)")
    values = dict(asked.overrides)
    if asked.fields is None:
        values = {**_PROFILE_VALUES.get(asked.profile or "standard", {}), **values}
    reader = asked.reader
    spec = ReaderSpec(
        dataset=asked.dataset or ("nuscenes" if reader is None else getattr(reader, "__name__", "own").removeprefix("open_")),
        dataroot=asked.dataroot,
        version=asked.version,
        sensors=tuple(asked.sensors) if asked.sensors is not None else None,
        lidar_sweeps=_whole(values, "lidar_sweeps"),
        radar_sweeps=_whole(values, "radar_sweeps"),
        reference_channel=values.get("reference_channel"),
        open=reader,
        strict=asked.strict,
    )
    source = spec.reader()
    suite = source.suite
    declared = _declared(suite, asked.sensors)
    table, names, required = _field_table(asked.fields, asked.profile or "standard")
    chosen, left_out = split_by_sensors({n: table[n] for n in names}, declared, suite, required)
    chosen = _canonical(chosen)
    if not chosen:
        raise UsageError("no field can be built with these sensors", found=", ".join(declared))
    reference = str(values.pop("reference_channel", None) or _reference(suite, declared))
    all_splits = tuple(sorted(set(asked.splits)))
    found, missing = _choose_scenes(source, all_splits, asked.scenes or "all", asked.dataroot)
    chosen, left_out = _without_annotations(source, all_splits, found, chosen, dict(left_out), required)
    base: dict[str, Any] = {
        "dataset": spec.dataset,
        "version": asked.version,
        "splits": list(all_splits),
        "scenes": list(found),
        "sensors": list(declared),
        "reference_channel": reference,
        "fields": list(chosen),
    }
    recipe = Recipe.from_dict({**base, **_nested(values)})
    return Resolved(spec=spec, reader=source, recipe=recipe, fields=chosen, left_out=left_out, missing_scenes=missing)


def _without_annotations(
    reader: Reader,
    splits: tuple[str, ...],
    scenes: tuple[str, ...],
    fields: dict[str, CacheField],
    left_out: dict[str, str],
    required: Sequence[str],
) -> tuple[dict[str, CacheField], dict[str, str]]:
    """Leave out fields of boxes where the split has none (test splits): one sample tells."""
    names = [n for n, f in fields.items() if "boxes" in f.needs]
    first = next((s for split in splits for s in reader.scene_names(split) if not scenes or s in scenes), None)
    if not names or first is None:
        return fields, left_out
    try:
        samples = reader.samples(first)
    except ImkdError:
        return fields, left_out  # bad tables are told by the plan, all of them
    if not samples or samples[0].boxes is not None:
        return fields, left_out
    for name in names:
        left_out[name] = "the split has no annotations"
        if name in required:
            raise RecipeError(f"field {name} was asked for but the split has no annotations", field=name, next="drop it")
    return {n: f for n, f in fields.items() if n not in names}, left_out


def _canonical(fields: Mapping[str, CacheField]) -> dict[str, CacheField]:
    """Our fields in the order of the list, then others by name: the order of asking changes nothing."""
    from imkd_data.fields import FIELDS

    place = {f.name: i for i, f in enumerate(FIELDS)}
    return {n: fields[n] for n in sorted(fields, key=lambda n: (place.get(n, len(place)), n))}


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name, Recipe.__dataclass_fields__[name].default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RecipeError(f"{name} must be a whole number", found=repr(value))
    return value


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
    from imkd_data.fields import FIELDS

    own = {f.name: f for f in fields or () if isinstance(f, CacheField)}
    table = {**{f.name: f for f in FIELDS}, **own}
    for name in own:
        check_name(name)
    if fields is None:
        asked: tuple[str, ...] = _profile(profile)
        required: tuple[str, ...] = ()
    else:
        asked = tuple(f if isinstance(f, str) else f.name for f in fields)
        required = tuple(f for f in fields if isinstance(f, str))
    unknown = [n for n in asked if n not in table]
    if unknown:
        raise UsageError(
            "unknown fields",
            expected=", ".join(table),
            found=", ".join(unknown),
            next="fields of your own are given as CacheField values: pipelines.build.build(fields=[...])",
        )
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
    reader: Reader, splits: tuple[str, ...], scenes: str | Sequence[str], dataroot: Path
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Explicit scenes of the recipe (() = all the tables hold) and those left out with the reason."""
    names = [n for s in splits for n in reader.scene_names(s)]
    asked = _patterns(scenes)
    patterns = [p for p in asked if p not in ("all", "available")]
    found = {n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    lost = [p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for n in names)]
    if lost:
        raise UsageError("no scene of the split matches", found=", ".join(lost), expected=", ".join(names[:20]))
    if "all" in asked:
        return (), {}
    missing: dict[str, str] = {}
    if "available" in asked:
        rest = [n for n in names if n not in found]
        missing = _incomplete(reader, rest, dataroot.expanduser())
        found |= set(rest) - set(missing)
        if not found:
            first = next(iter(missing.values()), "no scenes")
            raise SourceMissingError("no scene of the split has all its files", found=first)
    return tuple(sorted(found)), missing


def _incomplete(reader: Reader, names: Sequence[str], dataroot: Path) -> dict[str, str]:
    """Scenes that lack sensor files, by the reader's own check or by the sizes in the input manifests, and how many."""
    everything = frozenset(("images", "lidar", "radar"))
    missing = {}
    for name in names:
        lost: dict[str, None] = {}  # in order, each once: samples share sweeps
        try:
            samples = reader.samples(name)
        except SourceMissingError as error:
            samples, lost = (), {str(error.details.get("file", error.what)): None}
        for sample in samples:
            try:
                reader.input_manifest(sample, everything)
            except SourceMissingError as error:  # of the first file; the others are looked for here
                lost[str(error.details.get("file", error.what))] = None
                lost |= {p: None for p in _paths(sample) if p not in lost and not (dataroot / p).is_file()}
        if lost:
            missing[name] = f"{len(lost)} file{'s' if len(lost) > 1 else ''} missing, first {next(iter(lost))}"
    return missing


def _paths(sample: Sample) -> list[str]:
    sweeps = [s for one in (sample.lidar, *sample.radar.values()) for s in one]
    return [c.path for c in sample.cameras] + [s.path for s in sweeps]
