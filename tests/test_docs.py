"""The documentation is run: python blocks are executed, command lines are parsed, broken links fail the build."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
DOCS = REPO / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ALSO = [REPO / "README.md", REPO / "imkd_models" / "distill" / "README.md", REPO / "imkd_data" / "cache" / "FORMAT.md"]
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in _BLOCK.findall(page.read_text()) if name == language]


def python_pages() -> list[Path]:
    return [p for p in PAGES if any(not _SNIPPET.search(b) for b in blocks(p, "python"))]


def test_the_pages_are_there() -> None:
    names = {p.name for p in PAGES}
    assert {"quickstart.md", "format.md", "views.md", "write_a_field.md", "write_a_view.md", "write_a_method.md"} <= names
    assert {"defects.md", "api_data.md", "api_models.md", "api_pipelines.md"} <= names
    assert len(python_pages()) >= 5


@pytest.fixture
def workplace(synthetic_world: Path, synthetic_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the pages speak of: worlds/small, caches/small, and the package mylab."""
    (tmp_path / "worlds").mkdir()
    (tmp_path / "worlds" / "small").symlink_to(synthetic_world)
    shutil.copytree(synthetic_cache, tmp_path / "caches" / "small")
    shutil.copytree(DOCS / "examples" / "mylab", tmp_path / "mylab", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore:no sample has location")
@pytest.mark.parametrize("page", python_pages(), ids=lambda p: p.stem)
def test_python_blocks_run(page: Path, workplace: Path) -> None:
    """One page, one namespace, top to bottom."""
    names: dict[str, Any] = {"__name__": "page"}
    for number, text in enumerate(blocks(page, "python")):
        if not _SNIPPET.search(text):
            exec(compile(text, f"{page.name}[{number}]", "exec"), names)


def test_what_the_field_page_built(workplace: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for text in blocks(DOCS / "write_a_field.md", "python"):
        if not _SNIPPET.search(text):
            exec(text, names)
    from imkd_data import open_cache

    for name in ("mine", "small"):  # built together with others, and added to a finished cache
        cache = open_cache(workplace / "caches" / name, fields=[names["RADAR_HITS"]])
        np.testing.assert_array_equal(cache.decode("radar_hits", int(cache.rows()[0])), names["hits"])


def test_included_files_are_examples_that_tests_run() -> None:
    included = {name for page in PAGES for name in _SNIPPET.findall(page.read_text()) if name.endswith(".py")}
    tested = {p.name for p in (DOCS / "examples").rglob("*.py")}
    assert included and {Path(n).name for n in included} <= tested
    for name in included:
        assert (REPO / name).is_file()
        where = "test_outside.py" if "mylab" in name else "imkd_data/views/test_worked_examples.py"
        stem = f'"{Path(name).stem}"' if "mylab" in name else Path(name).name
        assert stem in (REPO / "tests" / where).read_text(), name


def commands(page: Path) -> list[list[str]]:
    out = []
    for language in ("bash", "sh", ""):
        for text in blocks(page, language):
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith(("imkd ", "imkd-data ")):
                    out.append(shlex.split(line, comments=True))
    return out


@pytest.mark.parametrize("page", [p for p in [*PAGES, *ALSO] if commands(p)], ids=lambda p: p.stem)
def test_command_lines_are_understood(page: Path) -> None:
    """Every command and every option exists and takes such values; nothing is run."""
    import click

    from cli.data import group as data
    from cli.model import group as model

    for words in commands(page):
        group: Any = data if words[0] == "imkd-data" else model
        rest = words[1:]
        context = click.Context(group)
        while isinstance(group, click.Group):
            command = group.get_command(context, rest[0])
            assert command is not None, words
            group, rest = command, rest[1:]
        try:
            group.make_context(words[0], list(rest))
        except click.UsageError as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error.format_message()}")


def settings() -> set[str]:
    """Names that ``--set`` can reach: of runs, networks, methods and recipes."""
    from dataclasses import fields

    from imkd_data.loader.augment import AugmentConfig
    from imkd_data.recipe import Recipe
    from imkd_models.distill import METHODS
    from imkd_models.presets import CONFIGS
    from pipelines.run import LoaderConfig, OptimConfig, Run

    classes: list[Any] = [AugmentConfig, Recipe, LoaderConfig, OptimConfig, Run, *CONFIGS.values()]
    names = {f.name for cls in classes for f in fields(cls)}
    return names | {name for method in METHODS.values() for name in method.options.defaults()} | {"preset"}


def options_in(text: str) -> Iterator[tuple[str, str]]:
    """(name, value) of ``--set name=value`` anywhere and of `name: value` or `name=value` in code spans; ``name="text"`` is
    Python and not meant."""
    yield from re.findall(r"--set ([\w.]+)=([^\s`]+)", text)
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        yield from re.findall(r"^([a-z_][\w.]*)(?:: |=)([^\s\"]+)$", span)


@pytest.mark.parametrize("page", [*PAGES, *ALSO], ids=lambda p: p.stem)
def test_options_that_a_page_names_exist(page: Path) -> None:
    from imkd_data.loader.request import LOADER_PARITY
    from imkd_models.config import CRN_PARITY

    known = settings()
    for name, value in options_in(page.read_text()):
        assert f"{name}:{value}" in CRN_PARITY | {*LOADER_PARITY} or name.split(".")[-1] in known, (
            f"{page.name}: {name}={value}"
        )


def test_the_guard_sees_an_option_that_is_gone() -> None:
    text = 'Use `ego_time: mean_camera`, `--set optim.no_such=1`, `frame="lidar"`.'
    assert list(options_in(text)) == [("optim.no_such", "1"), ("ego_time", "mean_camera")]
    assert not {"ego_time", "no_such"} & settings()


def test_the_register_of_defects_is_the_code() -> None:
    """Every parity option stands in exactly one row of CRN's or CRKD's table, and every row's option exists."""
    from cli.data import group as data
    from imkd_data.loader.request import LOADER_PARITY
    from imkd_models.config import CRN_PARITY

    text = (DOCS / "defects.md").read_text()
    table, crkd = text.split("## CRKD")
    options = [row.rsplit("|", 2)[1] for row in table.splitlines() if re.match(r"\| \d+ \|", row)]
    named = re.findall(r"`([^`]+)`", " ".join(options)) + re.findall(r"`(\w+: \w+)` in `(?:loader.parity)`", crkd)
    other = ("--as-released", "loader.parity")
    assert sorted(n.replace(": ", ":") for n in named if n not in other) == sorted({*CRN_PARITY, *LOADER_PARITY})
    assert text.count("` in `loader.parity`") == len(LOADER_PARITY)
    flags = {flag for option in data.commands["export"].params for flag in option.opts}
    assert named.count("--as-released") == 4 and "--as-released" in flags


def test_crkds_switches_on_the_page_are_the_code() -> None:
    """Every switch stands once beneath CRKD's table, with rows that the table has; the forms the page shows are taken."""
    from imkd_models.distill.crkd import DEFECTS
    from pipelines.run import parse_settings
    from pipelines.runs import get_run

    text = (DOCS / "defects.md").read_text()
    part = text.split("## CRKD")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+)` \((\d+)(?: and (\d+))?\)", part)
    assert sorted(name for name, *_ in named) == sorted(DEFECTS)
    rows = set(re.findall(r"^\| (\d+) \|", part, re.MULTILINE))
    assert {number for _, *numbers in named for number in numbers if number} <= rows
    (switches,) = re.findall(r"--set (defects=[\w,]+)`", part)
    run = get_run("tiny_student").with_method("crkd").with_settings(parse_settings([switches]))
    assert len(run.options["defects"].split(",")) == 2 and set(run.options["defects"].split(",")) <= set(DEFECTS)
    (parity,) = re.findall(r"--set '(model\.parity=[^']+)'", text)
    assert get_run("crn_r50").with_settings(parse_settings([parity])).model["parity"] == ["cell_index:trunc"]


def test_export_commands_of_the_page_run(workplace: Path) -> None:
    from cli.data import group
    from cli.main import run_group

    run = [words[1:] for words in commands(DOCS / "views.md") if words[:2] == ["imkd-data", "export"]]
    assert {words[3] for words in run} == {"crn", "bevdepth", "bevfusion", "mmdet3d", "webdataset", "parquet"}
    for words in run:
        assert run_group(group, "imkd-data", [*words, "--quiet"]) == 0, words
    assert len(list((workplace / "exports" / "crn" / "depth_gt").iterdir())) == 12 * 6


def test_field_table_is_the_code() -> None:
    """The FORMAT page names every field with its dtype."""
    from imkd_data.fields import FIELDS

    text = (REPO / "imkd_data" / "cache" / "FORMAT.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert set(rows) == {f.name for f in FIELDS}
    for field in FIELDS:
        kind = "blob" if field.kind == "blob" else str(field.dtype)
        assert rows[field.name].split(",")[-1].strip() == kind, field.name


def test_broken_links_fail_the_build(tmp_path: Path) -> None:
    """What `make docs` runs, on a copy of the pages with a link to nowhere and one to a heading that is not there."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install -e '.[docs]')")
    for name in ("docs", "imkd_data", "imkd_models"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pipelines").symlink_to(REPO / "pipelines")
    shutil.copy(REPO / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "quickstart.md").open("a") as page:
        page.write("\n[gone](nowhere.md) and [gone](views.md#no-such-heading)\n")
    (tmp_path / "docs" / "forgotten.md").write_text("A page that no menu names.\n")
    (line,) = [t for t in (REPO / "Makefile").read_text().splitlines() if "/mkdocs build" in t]
    assert "make docs" in (REPO / ".ci" / "run").read_text()
    words = shlex.split(line[line.index("mkdocs build") :])  # as it stands: with --quiet no warning would count
    done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0 and "in strict mode" in done.stdout, done.stderr
    warned = [t for t in done.stderr.splitlines() if t.startswith("WARNING")]
    assert any("quickstart.md" in t and "nowhere.md" in t for t in warned)
    assert any("quickstart.md" in t and "#no-such-heading" in t for t in done.stderr.splitlines())
    assert "forgotten.md" in done.stderr


NAMES = {"imkd": "IMKD", "crkd": "CRKD", "adaptive_smooth": "Adaptive-Smooth", "dual_distill": "DualDistill"}


def gains_table(report: dict[str, Any], steps: str) -> list[str]:
    """The README's lines of one benchmark: a method over its twin and over the plain student."""
    paired = {(p["method"], p["against"]): p for p in report["paired"]}
    lines = []
    for method, name in NAMES.items():
        over, system = paired[method, f"{method}_twin"], paired[method, "plain"]
        wrong, parts = paired.get((method, f"{method}_wrong_teacher")), over["parts_nds"]
        ends = [
            f"{p[f'gain_{what}']:+.2f} ({p[low]:+.2f} to {p[high]:+.2f})"
            for p, what, low, high in (
                (over, "nds", "low", "high"),
                (over, "map", "low_map", "high_map"),
                (system, "nds", "low", "high"),
            )
        ]
        moving = parts["mAVE"] + parts["mAAE"]
        above = over["low"] > 0 and len(over["seeds"]) >= 6
        gain = f"**{ends[0]}**" if above else ends[0]
        shown = f"{wrong['gain_nds']:+.1f}" if wrong else "-"
        what = f"{moving:+.2f}; {sum(parts.values()) - moving:+.2f}"
        lines.append(f"| {steps} | {name} | {len(over['seeds'])} | {gain} | {what} | {ends[1]} | {ends[2]} | {shown} |")
    return lines


def test_the_readmes_gains_are_those_of_the_tables() -> None:
    text = (REPO / "README.md").read_text()
    for table, steps in (("long/results.json", "3000"), ("results.json", "1000")):
        for line in gains_table(json.loads((DOCS / table).read_text()), steps):
            assert line in text, f"README differs from docs/{table}: {line}"
