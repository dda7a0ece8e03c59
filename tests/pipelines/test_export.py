"""Export: the student alone, equal to the original on random and real input, in three formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_cache import disk_cache
from toy_training import VIEW, toy_run

from imkd_data import open_cache
from imkd_data.errors import MismatchError, UsageError
from imkd_models.checkpoint import load_checkpoint, save_checkpoint
from imkd_models.presets import build_model, tiny_config
from pipelines import export
from pipelines.export import export_checkpoint
from pipelines.train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled student with gates, history and two cameras."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("export")
    cache = open_cache(disk_cache(root))
    train(toy_run(max_steps=1), cache, root / "lidar", accelerator="cpu")
    run = toy_run("student", method="imkd", max_steps=2, options={"stage2_label": "off"})
    train(run, cache, root / "student", {"lidar": root / "lidar"}, accelerator="cpu")
    return root


@pytest.mark.parametrize("kind", ["safetensors", "torch", "onnx"])
def test_formats_equal_the_original(world: Path, tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    file = tmp_path / f"student.{kind}"
    facts = export_checkpoint(world / "student", kind, file, cache=world / "cache", radar_points=64)
    assert file.is_file() and json.loads((tmp_path / f"student.{kind}.json").read_text()) == facts
    assert set(facts["largest_relative_difference"]) == {"random", "real"}
    assert max(facts["largest_relative_difference"].values()) <= (0.0 if kind == "safetensors" else 1e-4)
    student = load_checkpoint(world / "student")
    assert facts["parameters"] == sum(
        v.numel() for k, v in student.model.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    assert facts["weights_sha256"] == student.meta["weights_sha256"] and facts["method"] == "imkd"
    assert facts["inputs"][0]["name"] == "images_u8" and facts["inputs"][0]["shape"][:3] == [1, 2, 2]
    assert not list(tmp_path.glob(".*")) and student.distiller is not None
    if kind == "safetensors":
        from safetensors.torch import load_file

        assert set(load_file(file)) == set(student.model)  # no adaptor, no teacher


def test_a_wrong_export_is_not_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: Any, inputs: Any, file: Path) -> Any:
        file.write_bytes(b"x")
        return lambda *v: tuple(t + 0.1 for t in network(*v))

    monkeypatch.setattr(export, "_torch", wrong)
    with pytest.raises(MismatchError, match="other answers"):
        export_checkpoint(world / "student", "torch", tmp_path / "s.pt2", radar_points=16)
    assert not list(tmp_path.iterdir())


def test_only_students(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="camera-radar student"):
        export_checkpoint(world / "lidar", "torch", tmp_path / "t.pt2")
    with pytest.raises(UsageError, match="format"):
        export_checkpoint(world / "student", "tflite", tmp_path / "t")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_a_difference(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """max(0, nan) is 0: one such value among good ones, in the first map or the last, must not pass as equal."""
    good, wrong = torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad])
    assert export._difference((good, good), (good, good)) == 0
    for found in ((wrong, good), (good, wrong)):
        assert export._difference((good, good), found) == float("inf")
    assert export._difference((wrong,), (good,)) == float("inf")  # the original itself is broken
    assert export._difference((wrong,), (wrong,)) == float("inf")

    def broken(network: Any, inputs: Any, file: Path) -> Any:
        file.write_bytes(b"x")
        return lambda *v: tuple(torch.full_like(t, bad) for t in network(*v))

    monkeypatch.setattr(export, "_torch", broken)
    with pytest.raises(MismatchError, match="other answers"):
        export_checkpoint(world / "student", "torch", tmp_path / "s.pt2", radar_points=16)
    assert not list(tmp_path.iterdir())


IMPORTED = {
    "model.parity radar_caps:crn": {"parity": frozenset({"radar_caps:crn"})},
    "model.parity radar_empty:dummy": {"parity": frozenset({"radar_empty:dummy", "cell_index:trunc"})},
    "model.radar_points_per_cell 20": {"radar_encoder": "points", "radar_states": True, "radar_points_per_cell": 20},
}


@pytest.mark.parametrize("setting", IMPORTED)
def test_imported_radar_caps_leave_safetensors(tmp_path: Path, setting: str) -> None:
    """How many points pass a cap depends on the points, so these networks have no fixed graph."""
    config = tiny_config(grid=VIEW, image_hw_px=(32, 64), **IMPORTED[setting])
    checkpoint = save_checkpoint(tmp_path / "run", 1, build_model(config), meta={"model": config.as_dict()})
    for kind in ("torch", "onnx"):
        with pytest.raises(UsageError, match="fixed graph") as caught:
            export_checkpoint(checkpoint, kind, tmp_path / "out" / f"s.{kind}", radar_points=16)
        assert setting in str(caught.value) and "safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists()
    facts = export_checkpoint(checkpoint, "safetensors", tmp_path / "s.safetensors", radar_points=16)
    assert facts["largest_relative_difference"] == {"random": 0.0}


def test_settings_of_an_encoder_that_is_not_there_do_not_matter(tmp_path: Path) -> None:
    """Parity of the perspective encoder and the cap of the point encoder say nothing to pillars on BEV cells."""
    parity = frozenset({"radar_caps:crn", "radar_empty:dummy"})
    config = tiny_config(grid=VIEW, image_hw_px=(32, 64), radar_encoder="bev", parity=parity, radar_points_per_cell=20)
    checkpoint = save_checkpoint(tmp_path / "run", 1, build_model(config), meta={"model": config.as_dict()})
    facts = export_checkpoint(checkpoint, "torch", tmp_path / "s.pt2", radar_points=16)
    assert facts["largest_relative_difference"]["random"] <= 1e-4
