"""Build toy caches in a test, or in a process of its own: ``python tests/toy_build.py ROOT OUT [json of build arguments]``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(REPO), str(REPO / "tests")) if p not in sys.path]

from toy import TOY_FIELDS, open_toy  # noqa: E402

from imkd_data import open_cache  # noqa: E402
from imkd_data.cache.store import Cache  # noqa: E402
from imkd_data.errors import ImkdError  # noqa: E402

# Neither square nor centred; seven rows per shard do not divide the scenes' five.
GRID = {"grid.x_min_m": -8.0, "grid.y_min_m": -6.4, "grid.nx": 32, "grid.ny": 24, "grid.cell_m": 0.5, "rows_per_shard": 7}


def build_toy(root: Path, out: Path, *, overrides: dict[str, Any] | None = None, **rest: Any) -> Any:
    """Build all toy fields of both splits on one core."""
    from pipelines.build import build

    given: dict[str, Any] = {
        "dataroot": root,
        "version": "toy-1",
        "splits": ("train", "val"),
        "out": out,
        "fields": TOY_FIELDS,
        "reader": open_toy,
        "recipe_overrides": {**GRID, **(overrides or {})},
        "executor": "sync",
        "fsync": False,
    }
    return build(**{**given, **rest})


def open_toy_cache(out: Path, **rest: Any) -> Cache:
    """Open with the toy fields known."""
    return open_cache(out, fields=TOY_FIELDS, **rest)


def stored(out: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache's identity."""
    found = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in found.items() if not n.startswith("logs/") and n != ".lock"}


def copy_cache(source: Path, target: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(source, target)
    return target


def build_process(root: Path, out: Path, env: dict[str, str] | None = None, **arguments: Any) -> subprocess.Popen[str]:
    """A build in a process of its own; ``env`` may hold IMKD_FAULT."""
    command = [sys.executable, str(REPO / "tests" / "toy_build.py"), str(root), str(out), json.dumps(arguments)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("IMKD_")}
    paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
    return subprocess.Popen(
        command,
        env={**inherited, "PYTHONPATH": paths, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def main() -> None:
    root, out, arguments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    try:
        result = build_toy(root, out, **{"fsync": True, **arguments})
    except ImkdError as error:
        print(error, file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", error.code)) from error
    print(json.dumps({"rebuilt": len(result.rebuilt), "deaths": result.deaths, "quarantined": result.quarantined}))


if __name__ == "__main__":
    main()
