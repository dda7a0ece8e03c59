"""``imkd-data verify``, ``repair`` and ``doctor``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import COUNT, common, dataroot_default, names_from_text
from cli.screen import Screen, seconds_text

if TYPE_CHECKING:
    from imkd_data.cache.verify import Problem

__all__ = ["COMMANDS"]

CACHE = click.Path(path_type=Path)


def _cache_path(cache: Path | None, out: Path | None) -> Path:
    """The cache as argument or as --out."""
    if cache is None and out is None:
        raise click.UsageError("a cache folder is needed")
    return (cache or out or Path()).expanduser()


def _shard_numbers(path: Path, text: str | None) -> list[int] | None:
    """``1,2`` -> numbers of shards that the cache has; None stays None."""
    from imkd_data.cache.layout import shards_from_json
    from imkd_data.cache.plan import stored_group
    from imkd_data.errors import ImkdError, UsageError

    if text is None:
        return None
    names = names_from_text(text) or []
    if not names or not all(re.fullmatch(r"-?\d+", name) for name in names):
        raise UsageError("--shards is a list of numbers", expected="--shards 1,2", found=repr(text))
    numbers = [int(name) for name in names]
    try:
        group = stored_group(path)
        known = {shard.number for shard in shards_from_json(group["shards"])} if group else set(numbers)
    except ImkdError:  # damage, and repair says so; which shards there are is not known then
        known = set(numbers)
    if strange := sorted(set(numbers) - known):
        there = f"0..{max(known)}" if known else "none"
        raise UsageError("no such shard in this cache", expected=there, found=", ".join(map(str, strange)), file=str(path))
    return numbers


def _field_names(path: Path, text: str | None) -> list[str] | None:
    """``A,B`` -> fields of the cache; None stays None."""
    from imkd_data.cache.plan import stored_recipe
    from imkd_data.errors import ImkdError, UsageError

    if text is None:
        return None
    names = names_from_text(text) or []
    if not names:
        raise UsageError("--fields is a list of names", expected="--fields boxes,images", found=repr(text))
    try:
        recipe = stored_recipe(path)
    except ImkdError:  # damage: repair says what it can do without the recipe
        recipe = None
    if recipe is not None and (strange := [n for n in names if n not in recipe.fields]):
        raise UsageError("unknown fields", expected=", ".join(recipe.fields), found=", ".join(strange))
    return names


def _list(screen: Screen, problems: Sequence[Problem]) -> None:
    for i, p in enumerate(problems):
        screen.emit("problem", **p.as_json())
        if i < 20 or screen.verbose:
            where = ", ".join(
                f"{k} {v}" for k, v in p.as_json().items() if k in ("file", "field", "shard", "token", "expected", "found")
            )
            screen.say(f"{p.severity}: {p.what} [{p.rule}] {where}")
    if len(problems) > 20 and not screen.verbose:
        screen.say(f"... and {len(problems) - 20} more; all with -v, --json or --log-file")


@click.command()
@click.argument("cache", type=CACHE, required=False)
@click.option("--out", type=CACHE, help="The cache, as in build.")
@click.option("--quick", "level", flag_value="quick", default="quick", help="Sizes, receipts, indexes (default).")
@click.option("--full", "level", flag_value="full", help="Every stored byte.")
@click.option("--geometry", "level", flag_value="geometry", help="Every stored byte, and do the numbers make sense.")
@click.option(
    "--source",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Compute N random shards again from the raw data.",
)
@click.option("--dataroot", type=CACHE, help="Raw data, for --source.")
@click.option("--sample", default="100%", show_default=True, metavar="SHARE", help="Share of shards and rows to look into.")
@click.option("--fields", metavar="A,B", help="Only these fields.")
@click.option("--rules", is_flag=True, help="List all rules and exit.")
@common
def verify(
    screen: Screen,
    cache: Path | None,
    out: Path | None,
    level: str,
    source: int,
    dataroot: Path | None,
    sample: str,
    fields: str | None,
    rules: bool,
) -> None:
    """Check a cache; never writes. Exit 4 if something is damaged.

    \b
    Examples:
      imkd-data verify C
      imkd-data verify C --full
      imkd-data verify C --geometry --sample 5%
      imkd-data verify C --source 2 --dataroot D
    """
    import time

    from imkd_data.cache.verify import verify as run
    from imkd_data.errors import CacheDamageError, UsageError

    if rules:
        _rules(screen)
        return
    path = _cache_path(cache, out)
    try:
        share = float(sample.rstrip("%")) / (100 if sample.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError("--sample is a share", expected="5% or 0.05", found=sample)
    started = time.monotonic()
    with screen.progress("verify", 1, "files") as bar:

        def tell(done: int, total: int, text: str) -> None:
            bar.total = total
            bar.update(done, text)

        quiet = None if screen.json else tell
        problems = run(path, level=level, fields=names_from_text(fields), sample=share, progress=quiet)
    if source and not any(p.severity == "error" for p in problems):
        from pipelines.build.source import verify_source

        problems = [*problems, *verify_source(path, dataroot_default(dataroot), source)]
    _list(screen, problems)
    errors = [p for p in problems if p.severity == "error"]
    screen.emit("verified", level=level, errors=len(errors), others=len(problems) - len(errors), path=str(path))
    if errors:
        first = errors[0]
        raise CacheDamageError(
            f"{len(errors)} problems in this cache",
            rule=first.rule,
            file=first.file or None,
            field=first.field or None,
            shard=first.shard if first.shard >= 0 else None,
            token=first.token or None,
            kept="everything that is not named above is good",
            next=f"imkd-data repair {path} --dry-run; imkd-data repair {path} --dataroot D; last: build into another folder",
        )
    screen.say(f"no damage found ({level}, {seconds_text(time.monotonic() - started)})")


def _rules(screen: Screen) -> None:
    from imkd_data.cache.geometry_rules import GEOMETRY_RULES
    from imkd_data.cache.verify import RULES

    for name, (sentence, severity) in RULES.items():
        screen.out(f"{name:<24} {severity:<8} {sentence}")
        screen.emit("rule", id=name, severity=severity, sentence=sentence)
    for name, rule in GEOMETRY_RULES.items():
        screen.out(f"{name:<24} {rule.severity:<8} {rule.sentence}")
        screen.emit("rule", id=name, severity=rule.severity, sentence=rule.sentence)


@click.command()
@click.argument("cache", type=CACHE, required=False)
@click.option("--out", type=CACHE, help="The cache, as in build.")
@click.option("--dataroot", type=CACHE, help="Raw data.  [default: $IMKD_NUSCENES, $NUSCENES, ./data/nuscenes]")
@click.option("--fields", metavar="A,B", help="Only these fields.")
@click.option("--shards", metavar="1,2", help="Only these shards.")
@click.option("--quick", is_flag=True, help="Trust stored bytes; look at sizes and receipts only.")
@click.option("--clean-temp", is_flag=True, help="Remove temp files of dead builds, then stop.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Worker processes.")
@click.option("--on-error", type=click.Choice(["fail", "quarantine"]), default="fail", show_default=True, help="Bad samples.")
@common
def repair(
    screen: Screen,
    cache: Path | None,
    out: Path | None,
    dataroot: Path | None,
    fields: str | None,
    shards: str | None,
    quick: bool,
    clean_temp: bool,
    dry_run: bool,
    workers: int,
    on_error: str,
) -> None:
    """Build again exactly what verify names; everything else keeps its bytes.

    \b
    Examples:
      imkd-data repair C --dry-run
      imkd-data repair C --dataroot D
      imkd-data repair C --clean-temp
    """
    from pipelines.build import repair as module

    path = _cache_path(cache, out)
    if clean_temp:
        found = module.clean_temp(path)
        screen.say(f"removed {len(found)} temp files")
        screen.emit("cleaned", files=[str(p) for p in found])
        return
    result = module.repair(
        path,
        dataroot=dataroot_default(dataroot),
        only_fields=_field_names(path, fields),
        only_shards=_shard_numbers(path, shards),
        level="quick" if quick else "full",
        dry_run=dry_run,
        executor="sync" if workers == 1 else "processes",
        workers=workers,
        quarantine=on_error == "quarantine",
    )
    _list(screen, [p for p in result.problems if p.severity != "note"])
    verb = "would be" if dry_run else "were"
    screen.say(f"{len(result.pairs)} data files {verb} built again" if result.pairs else "no data file needs a rebuild")
    for name, shard in result.pairs[:20]:
        screen.say(f"  {name} shard {shard:05d}")
    for name in result.restored:
        screen.say(f"  {name} restored from the manifest")
    screen.emit("repaired", dry_run=dry_run, pairs=[list(p) for p in result.pairs], restored=list(result.restored))


@click.command()
@click.option("--dataroot", type=CACHE, help="Raw data.  [default: $IMKD_NUSCENES, $NUSCENES, ./data/nuscenes]")
@click.option("--version", "version", metavar="V", help="Version to look at.  [default: those that are there]")
@click.option("--hash", "hashes", metavar="CACHE", type=CACHE, help="Compare the raw files with the hashes in this cache.")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@common
def doctor(screen: Screen, dataroot: Path | None, version: str | None, hashes: Path | None, strict: bool) -> None:
    """Check this machine and the raw data: versions, disk, shared memory, GPU, missing files by channel and scene.

    \b
    Examples:
      imkd-data doctor
      imkd-data doctor --dataroot D --hash caches/nuscenes-trainval

    The exit code is that of the first error; of a warning with --strict: 3.
    """
    from imkd_data import errors
    from pipelines.doctor import examine

    findings = examine(dataroot_default(dataroot), version, hashes)
    for f in findings:
        mark = {"ok": "ok  ", "info": "    ", "warning": "warn", "error": "FAIL"}[f.severity]
        screen.say(f"{mark}  {f.name:<18} {f.text}")
        screen.emit("finding", name=f.name, severity=f.severity, text=f.text, code=f.code)
    bad = [f for f in findings if f.severity == "error" or (strict and f.severity == "warning")]
    if bad:
        kinds: tuple[type[errors.ImkdError], ...] = (
            errors.UsageError,
            errors.CacheDamageError,
            errors.StorageError,
            errors.SourceMissingError,
            errors.MismatchError,
        )
        kind = {k.code: k for k in kinds}.get(bad[0].code, errors.InputDataError)
        raise kind(bad[0].text, rule=f"doctor.{bad[0].name}", next=bad[0].advice or None)


COMMANDS = (verify, repair, doctor)
