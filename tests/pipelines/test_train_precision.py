"""Training in mixed precision, on a CPU: the code and nearly the rules of types are those of a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import toy_cache, toy_run, toy_teachers

from imkd_models.checkpoint import load_checkpoint
from imkd_models.distill import METHODS, make_method
from pipelines.run import Run
from pipelines.train import train

LOW = {"precision": "bf16-mixed"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def cache(root: Path) -> Any:
    return toy_cache(root / "world")


@pytest.fixture(scope="module")
def teachers(root: Path, cache: Any) -> dict[str, Path]:
    return toy_teachers(cache, root)


def curve(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if "warning" not in line]
    return [{k: v for k, v in line.items() if k not in ("time", "samples_per_s", "data_wait")} for line in lines]


def case(name: str, teachers: dict[str, Path], **changes: Any) -> tuple[Run, dict[str, Path]]:
    """Run and teachers of a network, or of the student under a method."""
    if name in METHODS:
        method = make_method(name)
        options = {"adaptive_smooth": {"quality": "conf"}, "dual_distill": {"tau": 1.0, "nms": "circle"}}.get(name, {})
        wanted = method.teachers_for(method.make_options(options))
        return toy_run("student", method=name, options=options, **changes), {n: teachers[n] for n in wanted}
    return toy_run(name, **changes), {"lidar": teachers["lidar"]} if name == "label" else {}


@pytest.mark.parametrize("name", ["lidar", "label", "fusion", "student", *METHODS])
def test_every_network_and_method_trains_in_bfloat16(name: str, cache: Any, teachers: dict[str, Path], tmp_path: Path) -> None:
    logs = {}
    for precision, steps in (("32-true", 1), ("bf16-mixed", 3)):
        run, given = case(name, teachers, precision=precision, max_steps=steps)
        train(run, cache, tmp_path / precision, given, accelerator="cpu")
        logs[precision] = curve(tmp_path / precision)
    low, first = logs["bf16-mixed"], logs["32-true"][0]
    assert len(low) == 3 and all(math.isfinite(v) for line in low for v in line.values())
    assert low[0]["loss"] != first["loss"]  # half precision did run
    assert low[0]["loss"] == pytest.approx(first["loss"], rel=0.03)
    saved = load_checkpoint(tmp_path / "bf16-mixed")
    for part in (saved.model, saved.distiller or {}, saved.training["raw"]):
        assert {v.dtype for v in part.values() if v.is_floating_point()} <= {torch.float32}
