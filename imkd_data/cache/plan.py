"""From tables to work: shards, keys, and which (field, shard) pairs are to be built, each with its reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imkd_data.cache import keys, layout
from imkd_data.cache.added import Dropped, with_added
from imkd_data.cache.index import sample_row
from imkd_data.cache.inputs import sample_inputs
from imkd_data.cache.layout import Shard
from imkd_data.cache.receipt import parse_json, read_json, read_receipt
from imkd_data.errors import CacheDamageError, ImkdError, InputDataError, MismatchError, RecipeError, SourceMissingError
from imkd_data.fields.base import CacheField
from imkd_data.recipe import Recipe
from imkd_data.sample import Reader, Sample, SensorSuite

__all__ = ["Plan", "Queued", "make_plan", "row_shapes", "split_by_sensors", "stored_group", "stored_recipe"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Queued:
    """One (field, shard) to build, why, and whether files of it must be removed first."""

    field: str
    shard: int
    reason: str
    remove: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a build will do. ``keys`` and ``inputs`` are per field, one entry per shard; ``rows`` holds the table part of
    the index, one dict per sample in row order; ``tokens`` per shard."""

    recipe: Recipe
    suite: SensorSuite
    fields: Mapping[str, CacheField]
    shards: tuple[Shard, ...]
    tokens: tuple[tuple[str, ...], ...]
    rows: tuple[dict[str, Any], ...]
    parts: Mapping[str, str]
    inputs: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, tuple[str, ...]]
    queue: tuple[Queued, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()  # of ``fields``: those that another command added and that stay as they are
    dropped: tuple[Dropped, ...] = ()  # added fields that no longer fit

    @property
    def num_samples(self) -> int:
        """Rows of the finished index."""
        return sum(map(len, self.tokens))

    def reasons(self) -> list[tuple[str, str, int]]:
        """(field, reason, number of shards), in field order."""
        out: dict[tuple[str, str], int] = {}
        for q in self.queue:
            out[q.field, q.reason] = out.get((q.field, q.reason), 0) + 1
        return [(f, r, n) for (f, r), n in out.items()]


def split_by_sensors(
    fields: Mapping[str, CacheField], sensors: Iterable[str], suite: SensorSuite, required: Iterable[str] = ()
) -> tuple[dict[str, CacheField], dict[str, str]]:
    """Fields whose sensors are declared, and the others with the reason. A ``required`` one among them is RecipeError."""
    declared = set(sensors)
    groups = {"lidar": {suite.lidar} if suite.lidar else set(), "camera": set(suite.cameras), "radar": set(suite.radars)}
    kept: dict[str, CacheField] = {}
    left: dict[str, str] = {}
    for name in keys.ordered(fields):
        one = fields[name]
        lacking = [kind for kind in one.sensors if not groups[kind] & declared]
        lost = [u for u in one.upstream if u in left]
        if not lacking and not lost:
            kept[name] = one
            continue
        left[name] = f"no {', '.join(lacking)} sensor is declared" if lacking else f"needs {', '.join(lost)}"
        if name in set(required):
            raise RecipeError(
                f"field {name} was asked for but {left[name]}", field=name, next="declare the sensor with --sensors, or drop it"
            )
    return {n: kept[n] for n in fields if n in kept}, left


def row_shapes(fields: Mapping[str, CacheField], recipe: Recipe, suite: SensorSuite) -> dict[str, tuple[int, ...]]:
    """Shape of one row of every array field."""
    out = {}
    for name, one in fields.items():
        if one.kind == "array":
            if one.shape is None or one.dtype is None:
                raise RecipeError(f"array field {name} needs a shape and a dtype", field=name)
            out[name] = tuple(int(n) for n in one.shape(recipe, suite))
    return out


def stored_recipe(out: Path) -> Recipe | None:
    """The recipe of a begun or finished cache, None where there is none."""
    path = out / "recipe.json"
    return Recipe.from_dict(read_json(path)) if path.is_file() else None


def stored_group(out: Path) -> dict[str, Any] | None:
    """Attributes of ``arrays.zarr`` (suite, shard table), None where there are none."""
    path = out / "arrays.zarr" / "zarr.json"
    if not path.is_file():
        return None
    attributes = parse_json(path.read_bytes(), path).get("attributes")
    if not isinstance(attributes, dict) or "shards" not in attributes or "suite" not in attributes:
        raise CacheDamageError("group metadata lacks its shard table", rule="group", file=str(path), next="imkd-data verify")
    return attributes


class _Scan:
    """One pass over the samples, scene by scene: tokens, index rows, input manifests. Samples are not kept."""

    def __init__(self, reader: Reader, recipe: Recipe, fields: Mapping[str, CacheField]) -> None:
        self.reader, self.recipe = reader, recipe
        self.missing: list[SourceMissingError] = []
        self.bad: list[ImkdError] = []
        self.needs = sorted({tuple(sorted(f.needs)) for f in fields.values()})
        self.tokens: dict[tuple[str, str], list[str]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.manifests: dict[tuple[tuple[str, ...], str], str] = {}

    def scene(self, split: str, scene: str) -> int:
        try:
            samples = self.reader.samples(scene)
        except (SourceMissingError, InputDataError) as error:
            error.details.setdefault("scene", scene)
            self.bad += list(error.problems) or [error]
            return 0
        if not samples:
            raise SourceMissingError("a scene has no samples", scene=scene)
        self.tokens[split, scene] = [s.token for s in samples]
        for sample in samples:
            self._sample(sample)
        return len(samples)

    def _sample(self, sample: Sample) -> None:
        if sample.token in self.rows:
            raise InputDataError("a sample token occurs twice", rule="token.twice", token=sample.token, scene=sample.scene)
        self.rows[sample.token] = sample_row(sample, self.reader.suite)
        for needs in self.needs:
            inputs = sample_inputs(self.reader, sample, needs)
            self.manifests[needs, sample.token] = inputs.hash
            if inputs.missing is not None:
                self.missing.append(inputs.missing)

    def check(self, missing_ok: bool, held: Collection[str] = ()) -> None:
        """Raise one error for everything that was found, grouped. ``held``: scenes that the cache holds already."""
        if self.bad:
            raise type(self.bad[0])(
                self.bad[0].what + (f"; {len(self.bad)} problems in all" if len(self.bad) > 1 else ""),
                rule=self.bad[0].rule,
                problems=tuple(self.bad) if len(self.bad) > 1 else (),
                **self.bad[0].details,
            )
        if not self.missing or missing_ok:
            return
        once = {str(e.details.get("file")): e for e in self.missing}
        by_channel: dict[str, int] = {}
        for error in once.values():
            name = str(error.details.get("channel") or Path(str(error.details.get("file", "?"))).parent.name)
            by_channel[name] = by_channel.get(name, 0) + 1
        scenes = sorted({str(e.details.get("scene", "?")) for e in once.values()})
        first = next(iter(once.values()))
        details = dict(first.details)
        details["found"] = (
            f"missing {', '.join(f'{c}: {n}' for c, n in sorted(by_channel.items()))}; in {len(scenes)} scenes, "
            f"first {', '.join(scenes[:3])}"
        )
        details["next"] = (
            "unpack the missing archives and run the same command; or build what is there with --scenes available, or add "
            "--on-error quarantine"
        )
        if not set(scenes).isdisjoint(held):
            details["next"] = (
                "put the files back and run the same command again, or add --on-error quarantine; scenes that the cache holds "
                "cannot be left out"
            )
        raise SourceMissingError(first.what, rule=first.rule, problems=tuple(once.values()) if len(once) > 1 else (), **details)


def _scenes(reader: Reader, recipe: Recipe) -> list[tuple[str, str]]:
    wanted = set(recipe.scenes)
    out: list[tuple[str, str]] = []
    for split in sorted(recipe.splits):
        out += [(split, scene) for scene in reader.scene_names(split) if not wanted or scene in wanted]
    twice = {s for _, s in out if sum(s == t for _, t in out) > 1} if len(out) != len({s for _, s in out}) else set()
    if twice:
        raise RecipeError("a scene lies in two splits", rule="split.twice", found=", ".join(sorted(twice)))
    unknown = sorted(wanted - {scene for _, scene in out})
    if unknown:
        raise RecipeError("unknown scenes", found=", ".join(unknown[:20]), next="imkd-data plan --scenes available")
    if not out:
        raise SourceMissingError("the tables hold no scene of the split", found=", ".join(recipe.splits))
    return out


def _check_held(old: Sequence[Shard], scenes: Set[tuple[str, str]]) -> None:
    """Old shards keep their samples, so their scenes must be among those that are planned."""
    held = dict.fromkeys((shard.split, clip.scene) for shard in old for clip in shard.clips)
    lost = [" ".join(one) for one in held if one not in scenes]
    if lost:
        raise MismatchError(
            "the cache holds scenes that the request lacks",
            rule="scenes.lost",
            found=", ".join(lost[:20]) + (f" and {len(lost) - 20} more" if len(lost) > 20 else ""),
            next="ask for them, too, with --update, --split and --scenes (the tables must hold them); or use another --out",
        )


def make_plan(
    reader: Reader,
    recipe: Recipe,
    fields: Mapping[str, CacheField],
    out: Path | None = None,
    *,
    retry_holes: bool = False,
    hash_inputs: bool = False,
    missing_ok: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Plan a build of ``recipe`` into ``out`` (None: as if empty). Reads tables and receipts, writes nothing.

    missing_ok: sensor files that are not there become part of the keys instead of an error (quarantine).

    ``fields`` are those of the recipe that can be built (see ``split_by_sensors``). Raises InputDataError, RecipeError,
    SourceMissingError, MismatchError.
    """
    scan = _Scan(reader, recipe, fields)
    scenes = _scenes(reader, recipe)
    # A shard table without a recipe is what a crash left before anything was built: it binds nobody.
    begun = stored_recipe(out) if out else None
    group = stored_group(out) if out and begun else None
    old = layout.shards_from_json(group["shards"]) if group else ()
    _check_held(old, set(scenes))
    counts = []
    for i, (split, scene) in enumerate(scenes):
        counts.append((split, scene, scan.scene(split, scene)))
        if progress:
            progress(i + 1, len(scenes), scene)
    scan.check(missing_ok, {clip.scene for shard in old for clip in shard.clips})
    shards = layout.extend_shards(old, counts, recipe.rows_per_shard)
    tokens = tuple(
        tuple(t for clip in s.clips for t in scan.tokens[s.split, clip.scene][clip.start : clip.stop]) for s in shards
    )
    parts = keys.recipe_parts(recipe, fields)
    inputs: dict[str, tuple[str, ...]] = {}
    shard_keys: dict[str, tuple[str, ...]] = {}
    for name in keys.ordered(fields):
        one = fields[name]
        needs = tuple(sorted(one.needs))
        inputs[name] = tuple(keys.hash_of([scan.manifests[needs, t] for t in row]) for row in tokens)
        shard_keys[name] = tuple(
            keys.shard_key(parts[name], inputs[name][s.number], {u: shard_keys[u][s.number] for u in one.upstream})
            for s in shards
        )
    plan = Plan(
        recipe=recipe,
        suite=reader.suite,
        fields=fields,
        shards=shards,
        tokens=tokens,
        rows=tuple(scan.rows[t] for row in tokens for t in row),
        parts=parts,
        inputs=inputs,
        keys=shard_keys,
    )
    queue = _queue(plan, out, begun, retry_holes) if out else _queue_all(plan)
    if hash_inputs and out:
        queue = queue + _changed_content(plan, reader, out, {(q.field, q.shard) for q in queue})
    plan = replace(plan, queue=tuple(queue))
    return with_added(plan, out, begun) if out else plan


def _queue_all(plan: Plan) -> list[Queued]:
    return [Queued(name, s.number, "new", False) for name in plan.fields for s in plan.shards]


def _queue(plan: Plan, out: Path, old: Recipe | None, retry_holes: bool) -> list[Queued]:
    shapes = row_shapes(plan.fields, plan.recipe, plan.suite)
    found: list[Queued] = []
    for name in plan.fields:
        for shard in plan.shards:
            state = _state(plan, name, shard, out, old, shapes)
            if state is None and retry_holes and read_receipt(layout.receipt_path(out, name, shard.number))["holes"]:
                state = "holes are tried again", True
            if state:
                found.append(Queued(name, shard.number, *state))
    return found


def _state(
    plan: Plan, name: str, shard: Shard, out: Path, old: Recipe | None, shapes: dict[str, tuple[int, ...]]
) -> tuple[str, bool] | None:
    """None: built and current. Else the reason, and whether old files must go first."""
    path = layout.receipt_path(out, name, shard.number)
    data = out / layout.data_path(plan.fields[name], shard.number, shapes)
    if not path.is_file():
        return ("new" if not (out / "receipts" / name).is_dir() else "not built yet"), data.exists()
    try:
        receipt = read_receipt(path)
    except ImkdError:
        return "receipt is damaged", True
    if receipt["tokens"] != list(plan.tokens[shard.number]):
        return "samples changed", True
    if receipt["key"] != plan.keys[name][shard.number]:
        return _why(plan, name, shard.number, receipt, old), True
    try:
        size = os.stat(data).st_size
    except OSError:
        return "data file is missing", True
    if size != receipt["bytes"]:
        return "data file has another size than its receipt", True
    return None


def _why(plan: Plan, name: str, shard: int, receipt: Mapping[str, Any], old: Recipe | None) -> str:
    one = plan.fields[name]
    if receipt.get("version") != one.version:
        return f"field version {receipt.get('version')} -> {one.version}"
    if receipt.get("key_recipe_part") != plan.parts[name]:
        new = keys.recipe_entries(one, plan.recipe)
        before = keys.recipe_entries(one, old) if old else {}
        changes = [f"{k} {_short(before.get(k))} -> {_short(v)}" for k, v in new.items() if before.get(k) != v]
        if changes:
            return ", ".join(changes)
        if not one.upstream:
            return "recipe entries changed"
    if receipt["inputs"].get("manifest") != plan.inputs[name][shard]:
        return "source files or tables changed"
    return "upstream changed: " + ", ".join(one.upstream)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return f"{value[0]}x{value[1]}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _changed_content(plan: Plan, reader: Reader, out: Path, queued: set[tuple[str, int]]) -> list[Queued]:
    """Read every raw file of built shards and compare with the receipts' content hashes. Left out are fields with holes, whose
    receipts hash only what could be read."""
    found = []
    for shard in plan.shards:
        names = [n for n in plan.fields if (n, shard.number) not in queued]
        samples = [s for c in shard.clips for s in reader.samples(c.scene)[c.start : c.stop]]
        hashes: dict[tuple[str, ...], str] = {}
        for name in names:
            needs = tuple(sorted(plan.fields[name].needs))
            receipt = read_receipt(layout.receipt_path(out, name, shard.number))
            if not needs or receipt["holes"]:
                continue
            if needs not in hashes:
                hashes[needs] = _content_now(reader, samples, needs, plan.inputs[name][shard.number])
            if receipt["inputs"]["hash"] != hashes[needs]:
                found.append(Queued(name, shard.number, "content of a source file changed", True))
    return found


def _content_now(reader: Reader, samples: Sequence[Sample], needs: tuple[str, ...], manifest: str) -> str:
    """Content hash of the raw files as they are; "" where one cannot be read any more, which the build could."""
    try:
        return keys.content_hash(manifest, [f for s in samples for f in reader.read(s, frozenset(needs)).files])
    except (InputDataError, SourceMissingError):
        return ""
