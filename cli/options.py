"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.screen import Screen

__all__ = [
    "COUNT",
    "SECONDS",
    "FiniteRange",
    "common",
    "dataroot_default",
    "named_paths",
    "recipe_from_options",
    "recipe_options",
    "size_bytes",
]

F = TypeVar("F", bound=Callable[..., Any])

COUNT = click.IntRange(min=1)  # of workers and the like


class FiniteRange(click.FloatRange):
    """A finite number in a range; click's own range lets nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


SECONDS = FiniteRange(min=0, min_open=True)


def common(function: F) -> F:
    """--json, --quiet, -v, --log-file; the command gets ``screen``."""

    def wrapped(json: bool, quiet: bool, verbose: bool, log_file: str | None, **rest: Any) -> Any:
        return function(screen=Screen(json=json, quiet=quiet, verbose=verbose, log_file=log_file), **rest)

    wrapped.__name__, wrapped.__doc__ = function.__name__, function.__doc__
    wrapped.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--log-file", type=click.Path(dir_okay=False), help="Append everything as JSON lines to this file."),
        click.option("-v", "--verbose", is_flag=True, help="Say more."),
        click.option("--quiet", is_flag=True, help="Say nothing but errors."),
        click.option("--json", is_flag=True, help="One JSON object a line on stdout; text for people goes to stderr."),
    ):
        option(wrapped)
    return wrapped  # type: ignore[return-value]


def recipe_options(function: F) -> F:
    """What plan and build have in common: where the data are, what to make of them."""
    for option in (
        click.option("--images", type=click.Choice(["scaled", "original", "reference"]), help="How images are kept."),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A recipe entry, e.g. image_hw_px=396x704."),
        click.option("--scenes", metavar="all|available|LIST|GLOB", help="Which scenes of the split.  [default: all]"),
        click.option("--sensors", metavar="A,B", help="Declared sensors.  [default: all of the data set]"),
        click.option("--fields", metavar="A,B", help="Fields to build, instead of a profile."),
        click.option("--profile", metavar="NAME", help="compact, student, standard or full.  [default: standard]"),
        click.option("--recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON file of entries."),
        click.option("--out", type=click.Path(path_type=Path), help="Cache folder.  [default: ./caches/nuscenes-<split>]"),
        click.option("--split", metavar="NAME,..", help="train, val, test, mini_train, mini_val, trainval, mini."),
        click.option("--version", "version", metavar="V", help="v1.0-trainval, v1.0-mini, v1.0-test.  [default: by split]"),
        click.option(
            "--dataroot",
            type=click.Path(path_type=Path),
            help="Raw data.  [default: $IMKD_NUSCENES, $NUSCENES, ./data/nuscenes]",
        ),
    ):
        option(function)
    return function


def dataroot_default(given: Path | None) -> Path:
    """--dataroot, else $IMKD_NUSCENES, else $NUSCENES, else ./data/nuscenes."""
    if given is not None:
        return given.expanduser()
    for name in ("IMKD_NUSCENES", "NUSCENES"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    return Path("data/nuscenes")


def value_from_text(text: str) -> Any:
    """JSON if it is JSON, AxB as two numbers, else the text."""
    if re.fullmatch(r"\d+x\d+", text):
        return [int(v) for v in text.split("x")]
    try:
        return json.loads(text)
    except ValueError:
        return text


def named_paths(option: str, items: tuple[str, ...], example: str = "lidar") -> dict[str, Path]:
    """``NAME=CKPT`` texts of an option that may be repeated. Errors: UsageError for another form or a name given twice."""
    from imkd_data.errors import UsageError

    out: dict[str, Path] = {}
    for item in items:
        name, sign, path = item.partition("=")
        if not sign or not name or not path:
            raise UsageError(f"{option} needs NAME=CKPT", expected=f"{option} {example}=RUN/last.ckpt", found=item)
        if name in out:
            raise UsageError(f"{option} {name} is given twice", found=item)
        out[name] = Path(path)
    return out


def names_from_text(text: str | None) -> list[str] | None:
    """``A,B`` -> names; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _all_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# The entries of a recipe file that are taken apart here; the recipe itself checks the others.
_RECIPE_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("dataset", "version"), (_is_text, "text")),
    **dict.fromkeys(("splits", "sensors", "fields"), (_all_text, "a list of names")),
    "scenes": (lambda value: _is_text(value) or _all_text(value), "a list of names, or text as for --scenes"),
    **dict.fromkeys(("options", "grid"), (_is_object, "an object")),
}
_REQUEST = ("dataset", "version", "splits", "sensors", "scenes", "fields")


def recipe_from_options(
    *,
    dataroot: Path | None,
    version: str | None,
    split: str | None,
    out: Path | None,
    recipe: Path | None,
    profile: str | None,
    fields: str | None,
    sensors: str | None,
    scenes: str | None,
    sets: tuple[str, ...],
    images: str | None,
    update: bool = False,
    on_overflow: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for ``pipelines.build.build``: file entries first, options over them, defaults last."""
    from imkd_data.errors import UsageError
    from imkd_data.readers.splits import expand_splits, version_from_split

    entries = _recipe_file(recipe) if recipe else {}
    overrides: dict[str, Any] = {k: v for k, v in entries.items() if k not in _REQUEST}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError("--set needs KEY=VALUE", found=text)
        if key in _REQUEST:
            raise UsageError(f"--set cannot change {key}", next=f"use --{key.rstrip('s') if key == 'splits' else key}")
        overrides[key] = value_from_text(value)
    if images:
        overrides["images_mode"] = images
    if on_overflow == "drop-far":
        overrides["options.on_overflow"] = on_overflow
    given = split or ",".join(entries.get("splits", ()))
    if not given and not (update and out):
        raise UsageError("a split is needed", next="--split trainval, or mini_train, ...")
    splits = list(expand_splits(given)) if given else None
    where = out or Path("caches") / f"nuscenes-{given.replace(',', '+')}"
    chosen_version = version or entries.get("version") or (version_from_split(given) if given else None)
    return {
        "dataroot": dataroot_default(dataroot),
        "version": chosen_version,
        "splits": splits,
        "out": where.expanduser(),
        "sensors": names_from_text(sensors) or entries.get("sensors"),
        "profile": profile,
        "fields": names_from_text(fields) if fields is not None else (entries.get("fields") if profile is None else None),
        "recipe_overrides": overrides,
        "scenes": scenes if scenes is not None else (entries.get("scenes") or None),
    }


def _recipe_file(path: Path) -> Mapping[str, Any]:
    from dataclasses import fields

    from imkd_data.errors import RecipeError
    from imkd_data.recipe import Recipe

    data = path.read_bytes()
    try:
        if len(data) > 1 << 20:
            raise ValueError("larger than 1 MiB")
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise RecipeError(f"the recipe file cannot be read: {error}", file=str(path)) from error
    known = {f.name for f in fields(Recipe)}
    unknown = sorted(set(value) - known)
    if unknown:
        raise RecipeError(
            "recipe has unknown keys", file=str(path), expected=", ".join(sorted(known)), found=", ".join(unknown)
        )
    for key, (fits, expected) in _RECIPE_KINDS.items():
        if key in value and not fits(value[key]):
            raise RecipeError(f"recipe entry {key}", expected=expected, found=repr(value[key])[:80], file=str(path))
    options = value.pop("options", {})
    grid = value.pop("grid", {})
    return {**value, **{f"options.{k}": v for k, v in options.items()}, **{f"grid.{k}": v for k, v in grid.items()}}


def size_bytes(text: str) -> int:
    """``2GB``, ``1.5GiB``, ``800MB`` -> bytes. UsageError otherwise, and for less than one byte."""
    from imkd_data.errors import UsageError

    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
        if size < 1:
            raise ValueError
        return size
    except ValueError:
        raise UsageError("not a size", found=text, expected="2GB, 1.5GiB, 800MB") from None
