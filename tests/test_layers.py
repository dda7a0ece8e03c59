"""Who may import whom (docs/design.md): imports point down, heavy libraries stay in their one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("imkd_data", "imkd_models", "pipelines", "cli")

# A module may import modules of its own room and of the rooms listed for it. Longest prefix wins.
ALLOWED: dict[str, tuple[str, ...]] = {
    "imkd_data.errors": (),
    "imkd_data.classes": (),
    "imkd_data.geometry": ("imkd_data.errors", "imkd_data.classes"),
    "imkd_data.sample": ("imkd_data.geometry", "imkd_data.errors", "imkd_data.classes"),
    "imkd_data.recipe": ("imkd_data.geometry", "imkd_data.errors"),
    "imkd_data.kernels": ("imkd_data.sample", "imkd_data.geometry", "imkd_data.errors", "imkd_data.classes"),
    "imkd_data.readers": (
        "imkd_data.kernels",
        "imkd_data.sample",
        "imkd_data.geometry",
        "imkd_data.errors",
        "imkd_data.classes",
    ),
    "imkd_data.world": ("imkd_data.kernels", "imkd_data.sample", "imkd_data.geometry", "imkd_data.errors", "imkd_data.classes"),
    "imkd_data.fields": (
        "imkd_data.readers",
        "imkd_data.kernels",
        "imkd_data.recipe",
        "imkd_data.sample",
        "imkd_data.geometry",
        "imkd_data.errors",
        "imkd_data.classes",
    ),
    "imkd_data.cache": (
        "imkd_data.fields",
        "imkd_data.kernels",
        "imkd_data.recipe",
        "imkd_data.sample",
        "imkd_data.geometry",
        "imkd_data.errors",
        "imkd_data.classes",
    ),
    "imkd_data.loader": ("imkd_data",),
    "imkd_data.views": ("imkd_data",),
    "imkd_data": ("imkd_data",),
    "imkd_models.outputs": ("imkd_data",),
    "imkd_models": ("imkd_data", "imkd_models"),
    "pipelines": ("imkd_data", "imkd_models", "pipelines"),
    "cli": ("imkd_data", "imkd_models", "pipelines", "cli"),
}
# Never, not even through the wide rooms above.
FORBIDDEN = [("imkd_data.loader", "imkd_data.readers"), ("imkd_data.loader", "imkd_data.views")]

# Library -> the only places that may import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": ("imkd_data.loader", "imkd_data.views", "imkd_models", "pipelines"),
    "dask": ("pipelines.build",),
    "distributed": ("pipelines.build",),
    "zarr": ("imkd_data.cache",),
    "pyarrow": ("imkd_data.cache", "imkd_data.readers"),
    "duckdb": ("imkd_data.cache.select",),
    "matplotlib": ("pipelines.plots",),
    "click": ("cli",),
    "rich": ("cli",),
    "nuscenes": ("pipelines.evaluate",),
}
# imkd_models: distillation looks down on the detector, never the other way round.
BELOW_DISTILL = ("outputs", "blocks", "camera", "radar", "lidar", "label", "fusion", "head", "detector", "presets")


def modules() -> list[tuple[str, ast.Module]]:
    out = []
    for package in PACKAGES:
        for path in sorted((REPO / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
            out.append((name, ast.parse(path.read_text(), str(path))))
    return out


def imports(tree: ast.Module) -> list[str]:
    """Every imported module, lazy imports too; ``from a import b`` gives a.b so that submodules are seen."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str:
    return max((room for room in ALLOWED if inside(name, room)), key=len)


MODULES = modules()


@pytest.mark.parametrize(("name", "tree"), MODULES, ids=[m[0] for m in MODULES])
def test_imports_point_down(name: str, tree: ast.Module) -> None:
    room = room_of(name)
    for target in imports(tree):
        if target.split(".")[0] not in PACKAGES:
            for library, places in ONLY_IN.items():
                if inside(target, library):
                    assert any(inside(name, place) for place in places), f"{name} imports {target}"
            continue
        allowed = any(inside(target, other) for other in (*ALLOWED[room], room))
        assert allowed, f"{name} ({room}) imports {target}, allowed: {ALLOWED[room]}"
        for upper, lower in FORBIDDEN:
            assert not (inside(name, upper) and inside(target, lower)), f"{name} imports {target}"
        if name.startswith("imkd_models.") and name.split(".")[1] in BELOW_DISTILL:
            assert not inside(target, "imkd_models.distill"), f"{name} imports {target}"


def test_the_rule_sees_a_violation() -> None:
    tree = ast.parse("def f():\n    from pipelines.build import build")
    assert imports(tree) == ["pipelines.build.build"]
    assert not any(inside("pipelines.build.build", other) for other in ALLOWED[room_of("imkd_models.head")])


def test_importing_the_data_package_is_light() -> None:
    """`import imkd_data` and the command line's --help must not load torch, dask, zarr or the devkit."""
    heavy = "{'torch', 'dask', 'zarr', 'nuscenes', 'matplotlib', 'transformers', 'lightning'}"
    code = f"import sys, imkd_data, cli.main; bad = {heavy} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_two_test_files_share_a_name() -> None:
    """Without packages under tests/, pytest imports a test file by its bare name; a second one of that name is not run."""
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
