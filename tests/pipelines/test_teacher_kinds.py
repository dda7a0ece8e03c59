"""A teacher has the kind of network that its role asks for, whatever it could deliver by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import toy_cache, toy_run, toy_teachers

from imkd_data.errors import MismatchError
from imkd_models.checkpoint import load_checkpoint, save_checkpoint
from imkd_models.distill import METHODS
from pipelines.networks import build_networks
from pipelines.train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    return toy_cache(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def teachers(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of every kind, a plain student's among them."""
    out = tmp_path_factory.mktemp("teachers")
    made = toy_teachers(world, out)
    plain = build_networks(toy_run("student"))
    save_checkpoint(out / "student", 1, plain.model, meta={"name": "plain", "model": plain.config.as_dict()})
    return {**made, "student": out / "student" / "last.ckpt"}


@pytest.mark.parametrize("method", ["imkd", "crkd", "adaptive_smooth", "dual_distill"])
def test_a_built_teacher_has_every_tensor_of_its_checkpoint(method: str, teachers: dict[str, Path]) -> None:
    """Nothing initialises weights again after they were loaded, as released code did."""
    wanted = METHODS[method].teachers
    networks = build_networks(toy_run("student", method=method), {name: teachers[name] for name in wanted})
    assert networks.teachers
    for name, teacher in networks.teachers.items():
        saved, own = load_checkpoint(teachers[name]).model, teacher.network.state_dict()
        assert own.keys() == saved.keys() and all(torch.equal(own[key], saved[key]) for key in saved), name


NO_LABEL = {"stage2_label": "off"}
WRONG = [
    ("imkd", {}, "label", "lidar"),
    ("imkd", {}, "label", "fusion"),
    ("imkd", NO_LABEL, "lidar", "label"),
    ("imkd", NO_LABEL, "lidar", "fusion"),
    ("dual_distill", {}, "lidar", "student"),
    ("dual_distill", {}, "lidar", "fusion"),
    ("dual_distill", {}, "lidar", "label"),
    ("crkd", {}, "fusion", "lidar"),
    ("crkd", {}, "fusion", "student"),
    ("adaptive_smooth", {"teacher": "lidar", "lambda_m2m": 0}, "lidar", "fusion"),
]


@pytest.mark.parametrize(("method", "options", "role", "kind"), WRONG, ids=[f"{m}-{r}={k}" for m, _, r, k in WRONG])
def test_a_teacher_of_another_kind_is_refused(
    method: str, options: dict[str, Any], role: str, kind: str, teachers: dict[str, Path]
) -> None:
    run = toy_run("student", method=method, options=options)
    given = {"lidar": teachers["lidar"], role: teachers[kind]} if method == "imkd" else {role: teachers[kind]}
    with pytest.raises(MismatchError, match=f"teacher {role} is a {kind} network") as caught:
        build_networks(run, given)
    error = caught.value
    assert error.code == 9 and error.details["expected"] == f"a {role} network" and error.details["found"].startswith(kind)
    assert error.details["file"] == str(teachers[kind]) and f"--teacher {role}=" in error.details["next"]


@pytest.mark.parametrize("kind", ["label", "fusion", "student"])
def test_a_label_encoder_learns_from_a_lidar_network_alone(
    kind: str, world: Any, teachers: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=f"teacher lidar is a {kind} network"):
        train(toy_run("label"), world, tmp_path / "run", {"lidar": teachers[kind]}, accelerator="cpu")
    assert not (tmp_path / "run").exists()


def test_teachers_of_their_kind_are_taken(teachers: dict[str, Path]) -> None:
    smooth = {"teacher": "lidar", "lambda_m2m": 0}
    for method, options, roles in (
        ("imkd", {}, ("lidar", "label")),
        ("crkd", {}, ("fusion",)),
        ("adaptive_smooth", smooth, ("lidar",)),
        ("dual_distill", {}, ("lidar",)),
    ):
        given = {role: teachers[role] for role in roles}
        assert set(build_networks(toy_run("student", method=method, options=options), given).teacher_sha256) == set(roles)
