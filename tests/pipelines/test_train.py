"""The trainer: exact resume, refused differences, stops in good order, what checkpoints say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import VIEW, toy_cache, toy_run

from imkd_data.errors import (
    InputDataError,
    InterruptedBuildError,
    MismatchError,
    MissingFeatureError,
    SourceMissingError,
    UsageError,
)
from imkd_data.loader.batch import Batch
from imkd_data.loader.stream import stream
from imkd_models.camera import build_backbone
from imkd_models.checkpoint import load_checkpoint, load_model, save_checkpoint
from imkd_models.distill import METHODS
from imkd_models.distill.base import FrozenTeacher
from imkd_models.keymap import public_key, resnet_rules
from pipelines.bench_probe import probe_terms
from pipelines.networks import build_networks, stream_values
from pipelines.run import LoaderConfig, OptimConfig, Run
from pipelines.train import train

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def cache(root: Path) -> Any:
    return toy_cache(root)


@pytest.fixture(scope="module")
def whole(cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted LiDAR run: six steps, epochs of five."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(toy_run(), cache, out, accelerator="cpu")
    return out


def curve(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "samples_per_s", "data_wait")} for line in lines]


def same_run(a: Path, b: Path) -> bool:
    """Equal loss curves, weights, averages and optimiser states, bit for bit."""
    x, y = load_checkpoint(a), load_checkpoint(b)
    return curve(a) == curve(b) and x.step == y.step and x.files == y.files and x.structure == y.structure


def test_a_run_writes_what_the_issue_says(whole: Path) -> None:
    assert os.readlink(whole / "last.ckpt") == "step-00000006.ckpt"
    saved = load_checkpoint(whole)
    assert saved.meta["run"]["name"] == "toy_lidar" and saved.meta["cache"]["id"] == "memory"
    assert saved.meta["cache"]["sensors"] == ["SPINNER", "EYE_LEFT", "EYE_RIGHT", "WAVE"]
    assert Run.from_dict({k: v for k, v in saved.meta["run"].items() if k != "teachers"}).model == toy_run().model
    assert len([p for p in whole.glob("step-*.ckpt") if not p.is_symlink()]) == 2  # keep
    lines = curve(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "det_heatmap", "det_box", "lr", "grad_norm", "epoch"} <= set(lines[0])
    assert [line["epoch"] for line in lines] == [0, 0, 0, 0, 0, 1]
    assert lines[0]["lr"] < lines[1]["lr"] and lines[-1]["lr"] < lines[2]["lr"]  # warm-up, then cosine
    model, meta = load_model(whole)
    assert not model.training and meta["step"] == 6


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_an_error_at_any_step_then_resume_is_exact(
    cache: Any, whole: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imkd_data.cache import fault

    monkeypatch.setitem(os.environ, "IMKD_FAULT", f"train.step:error:{at}")
    fault._COUNTS.clear()
    with pytest.raises(RuntimeError, match="injected"):
        train(toy_run(), cache, tmp_path / "run", accelerator="cpu")
    monkeypatch.delitem(os.environ, "IMKD_FAULT")
    train(toy_run(), cache, tmp_path / "run", resume="auto", accelerator="cpu")
    assert same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("fault", ["train.step:kill:4", "checkpoint.renamed:kill:2"])
def test_sigkill_then_resume_is_exact(root: Path, whole: Path, tmp_path: Path, fault: str) -> None:
    command = [sys.executable, str(HERE / "toy_training.py"), str(root), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env={**environment, "IMKD_FAULT": fault}, capture_output=True, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert load_checkpoint(tmp_path / "run").step == 2
    train(toy_run(), toy_cache(root), tmp_path / "run", resume=True, accelerator="cpu")
    assert same_run(tmp_path / "run", whole)


def test_free_settings_may_change_on_resume(cache: Any, whole: Path, tmp_path: Path) -> None:
    short = toy_run(max_steps=3, optim=OptimConfig(lr=1e-3, schedule="constant", ema=0.9))
    train(short, cache, tmp_path / "run", accelerator="cpu")
    longer = short.with_values(max_steps=6, checkpoint_every=5, keep=4, log_every=1, batch_size=1, global_batch=2)
    train(longer, cache, tmp_path / "run", resume=True, accelerator="cpu")
    assert load_checkpoint(tmp_path / "run").step == 6
    straight = short.with_values(max_steps=6)
    train(straight, cache, tmp_path / "straight", accelerator="cpu")
    a, b = curve(tmp_path / "run"), curve(tmp_path / "straight")
    assert a[:3] == b[:3]
    # micro-batches of one normalise their losses by themselves, so the curve may move a little, the order may not
    assert [line["lr"] for line in a] == [line["lr"] for line in b]


def test_every_other_difference_is_refused_and_shown(cache: Any, whole: Path) -> None:
    changed = toy_run(seed=1, optim=OptimConfig(lr=2e-3, schedule="cosine", warmup_steps=2, ema=0.9))
    with pytest.raises(MismatchError) as error:
        train(changed, cache, whole, resume=True, accelerator="cpu")
    assert error.value.code == 9
    assert "seed" in str(error.value) and "optim.lr" in str(error.value) and "0.002" in str(error.value)
    with pytest.raises(MismatchError, match="max_steps"):
        train(toy_run(max_steps=4), cache, whole, resume=True, accelerator="cpu")


def test_a_resume_never_goes_back(cache: Any, tmp_path: Path) -> None:
    """A run by epochs has no max_steps to compare with, so the steps themselves are; a finished one tells its last losses."""
    run, out = toy_run(max_steps=0, epochs=1), tmp_path / "run"
    done = train(run, cache, out, accelerator="cpu")
    with pytest.raises(MismatchError, match="step 5") as error:
        train(run.with_values(max_steps=1), cache, out, resume=True, accelerator="cpu")
    assert error.value.details["found"] == "an end at step 1"
    assert os.readlink(out / "last.ckpt") == "step-00000005.ckpt" and not (out / "step-00000001.ckpt").exists()
    again = train(run, cache, out, resume=True, accelerator="cpu")
    assert done.step == again.step == 5 and done.losses and again.losses == done.losses


def test_resume_on_another_cache_is_refused(root: Path, whole: Path) -> None:
    other = toy_cache(root)
    other.id = "another"
    with pytest.raises(MismatchError, match="cache"):
        train(toy_run(max_steps=8), other, whole, resume=True, accelerator="cpu")


def test_a_used_folder_and_a_missing_one(cache: Any, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already"):
        train(toy_run(), cache, whole, accelerator="cpu")
    with pytest.raises(SourceMissingError):
        train(toy_run(), cache, tmp_path / "nothing", resume=True, accelerator="cpu")
    before = load_checkpoint(whole).files
    result = train(toy_run(), cache, whole, resume="auto", accelerator="cpu")  # already done: nothing happens
    assert result.step == 6 and load_checkpoint(whole).files == before


def test_validation_rows_are_refused_except_by_overfit(cache: Any, tmp_path: Path) -> None:
    for split in ("val", "all"):
        run = toy_run(loader=LoaderConfig(workers=0, split=split))
        with pytest.raises(UsageError, match="validation rows"):
            train(run, cache, tmp_path / split, accelerator="cpu")
        assert not (tmp_path / split).exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 130)])
def test_signals_save_and_leave(cache: Any, whole: Path, tmp_path: Path, number: int, code: int) -> None:
    def stop(tick: Any) -> None:
        if tick.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedBuildError) as error:
        train(toy_run(), cache, tmp_path / "run", progress=stop, accelerator="cpu")
    assert error.value.exit_code == code and load_checkpoint(tmp_path / "run").step == 3
    assert signal.getsignal(number) is signal.SIG_DFL
    train(toy_run(), cache, tmp_path / "run", resume=True, accelerator="cpu")
    assert same_run(tmp_path / "run", whole)


class Poisoned:
    """A cache whose LiDAR points have no time at one sample."""

    def __init__(self, cache: Any, token: str) -> None:
        self.cache, self.bad = cache, token

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def decode(self, name: str, row: int) -> Any:
        value = self.cache.decode(name, row)
        if name == "lidar_points" and self.token(row) == self.bad:
            value["age_s"][:] = float("nan")
        return value


def test_a_poisoned_row_stops_with_its_tokens_and_the_batch(cache: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    order = iter(stream(cache, 2, fields=("boxes",), drop_last=False))
    next(order)
    tokens = next(order).tokens  # the second step's batch
    with pytest.raises(InputDataError, match="not finite") as error:
        train(toy_run(), Poisoned(cache, tokens[1]), tmp_path / "run", accelerator="cpu")
    folder = tmp_path / "run" / "bad-step-00000002"
    saved = json.loads((folder / "batch.json").read_text())
    assert error.value.details["token"].split(", ") == saved["tokens"] == list(tokens)
    assert "lidar.age_s" in saved["inputs"] and "lidar.age_s" in error.value.details["found"]
    assert torch.isnan(load_file(folder / "batch.safetensors")["lidar.age_s"]).any()


def test_a_diverging_run_stops_too(cache: Any, tmp_path: Path) -> None:
    wild = toy_run(max_steps=40, optim=OptimConfig(lr=1e30, schedule="constant", clip=0.0))
    with pytest.raises(InputDataError, match="all finite"):
        train(wild, cache, tmp_path / "run", accelerator="cpu")


def test_label_and_student_need_their_teachers(cache: Any, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFeatureError, match="teacher lidar"):
        train(toy_run("label"), cache, tmp_path / "a", accelerator="cpu")
    student = toy_run("student", method="imkd", max_steps=2)
    with pytest.raises(MissingFeatureError) as error:
        train(student, cache, tmp_path / "b", {"lidar": whole / "last.ckpt"}, accelerator="cpu")
    assert "label" in str(error.value) and "stage2_label=off" in str(error.value)
    with pytest.raises(UsageError, match="does not use teacher"):
        train(student, cache, tmp_path / "c", {"lidar": whole, "label": whole, "fusion": whole}, accelerator="cpu")
    with pytest.raises(UsageError, match="uses no teacher"):
        train(toy_run("student"), cache, tmp_path / "d", {"lidar": whole}, accelerator="cpu")


def test_label_then_imkd_student(cache: Any, whole: Path, tmp_path: Path) -> None:
    label = train(toy_run("label", max_steps=2), cache, tmp_path / "label", {"lidar": whole}, accelerator="cpu").checkpoint
    model, meta = load_model(label)
    assert meta["model"]["teacher_sha256"] == load_checkpoint(whole).meta["weights_sha256"]
    assert model(next(iter(stream(cache, 1, fields=("boxes",), grid=VIEW)))).head  # self-contained: with neck and head
    student = toy_run("student", method="imkd", max_steps=2)
    result = train(student, cache, tmp_path / "student", {"lidar": whole, "label": label}, accelerator="cpu")
    assert {"det_heatmap", "det_box", "depth", "l2r", "l2m", "lab2m", "resp", "int"} <= set(result.losses)
    saved = load_checkpoint(result.checkpoint)
    assert saved.meta["method"] == "imkd" and saved.distiller and set(saved.meta["teachers"]) == {"lidar", "label"}
    deployed = load_model(result.checkpoint)[0]
    assert deployed.sensors == ("camera", "radar")
    teacher_keys = {k for k in load_checkpoint(whole).model if k.startswith("lidar.")}
    assert not teacher_keys & set(saved.model)
    alone = toy_run("student", method="imkd", max_steps=1, options={"stage2_label": "off"})
    assert "lab2m" not in train(alone, cache, tmp_path / "alone", {"lidar": whole}, accelerator="cpu").losses


def test_a_teacher_that_only_lends_its_head_does_not_run_in_the_steps(cache: Any, whole: Path, tmp_path: Path) -> None:
    """DualDistill's undistilled twin: it starts from the teacher's heads, then neither LiDAR nor teacher is read."""
    twin = toy_run("student", method="dual_distill", options=dict(METHODS["dual_distill"].twin_options), max_steps=1)
    with pytest.raises(MissingFeatureError, match="lidar"):
        build_networks(twin, {})
    networks = build_networks(twin, {"lidar": whole})
    assert networks.teachers == {} and set(networks.teacher_sha256) == {"lidar"}
    assert "lidar_points" not in stream_values(networks)["fields"]
    theirs = load_model(whole)[0].head.state_dict()
    same = [torch.equal(v, theirs[k]) for k, v in networks.model.head.state_dict().items() if not k.startswith("shared")]
    assert same and all(same)
    distilled = build_networks(twin.with_values(options={}), {"lidar": whole})
    assert "intensity_from" not in stream_values(distilled)
    view = twin.with_values(method="imkd", options={"stage2_label": False, "intensity_from": "view"})
    assert stream_values(build_networks(view, {"lidar": whole}))["intensity_from"] == "view"  # not made of the planes
    assert "lidar_points" in stream_values(distilled)["fields"] and set(distilled.teachers) == {"lidar"}
    assert train(twin, cache, tmp_path / "twin", {"lidar": whole}, accelerator="cpu").step == 1
    started = load_checkpoint(tmp_path / "twin").meta["head_start"]
    assert started == [k for k in networks.model.head.state_dict() if not k.startswith("shared")]


def test_what_a_method_saw_is_logged_and_probed_as_it_trained(
    cache: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pseudo boxes and their agreement with the truth, by class group; the probe's batch has the run's sweeps."""
    run = toy_run("student", method="dual_distill", max_steps=1, loader=LoaderConfig(workers=0, lidar_sweeps=1))
    done = train(run, cache, tmp_path / "run", {"lidar": whole}, accelerator="cpu")
    seen = curve(tmp_path / "run")[-1]["diagnostics"]
    assert {"pseudo", "pseudo_car", "recall_car", "bev_neck_rho"} <= set(seen)
    assert seen["pseudo"] == sum(v for k, v in seen.items() if k.startswith("pseudo_"))
    given: list[Any] = []

    def seeing(self: FrozenTeacher, batch: Batch) -> Any:
        given.append(batch)
        return forward(self, batch)

    forward = FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", seeing)
    probed = probe_terms(run, cache, done.checkpoint, {"lidar": whole})
    assert set(probed["diagnostics"]) == set(seen) and set(probed["shares"]) == {"start", "end"}
    for shares in probed["shares"].values():
        assert shares["mfd_fg"]["trunk"] > 0 and shares["mfd_fg"]["head"] == 0 and shares["mfd_fg"]["student"] > 0
    assert given[0] is given[1]
    batch = given[0]
    assert batch.lidar is not None and not batch.lidar.age_s.any()  # the key sweep alone; the cache has two


def test_the_probe_begins_where_the_training_did(
    cache: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image weights are part of the start; a run without any looks for none."""
    source = build_backbone("resnet_tiny", None)
    state = {public_key(resnet_rules("", ""), f".{k}")[0][1:]: v for k, v in source.state_dict().items()}
    torch.save(state, tmp_path / "resnet.pth")
    plain = toy_run("student", method="dual_distill")
    run = plain.with_values(model={**plain.model, "backbone_weights": str(tmp_path / "resnet.pth")})
    seen: list[dict[str, torch.Tensor]] = []

    def look(networks: Any, batch: Any) -> dict[str, Any]:
        seen.append({k: v.clone() for k, v in networks.model.state_dict().items()})
        return {}

    monkeypatch.setattr("pipelines.bench_probe._shares", look)
    monkeypatch.setattr("transformers.AutoBackbone.from_pretrained", None)  # a download would fail
    for each in (plain, run):
        networks = build_networks(each, {"lidar": whole})
        save_checkpoint(tmp_path / "end", 1, networks.model, networks.distiller, meta={})
        seen.clear()
        probe_terms(each, cache, tmp_path / "end", {"lidar": whole})
        assert all(torch.equal(v, seen[0][k]) for k, v in networks.model.state_dict().items())


def test_a_run_starts_from_a_trained_network(
    cache: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CRKD's student comes from a trained one and brings a block of its own; a continued run no longer needs that file."""
    plain = train(toy_run("student", max_steps=1), cache, tmp_path / "plain", accelerator="cpu").checkpoint
    theirs = load_checkpoint(plain)
    again = build_networks(toy_run("student", start=str(plain), seed=9))
    assert again.start == {"weights_sha256": theirs.meta["weights_sha256"], "tensors": len(theirs.model), "new": []}
    assert all(torch.equal(v, theirs.model[k]) for k, v in again.model.state_dict().items())

    moved = tmp_path / "moved"
    plain.parent.rename(moved)
    run = toy_run("student", method="imkd", options={"stage2_label": "off"}, max_steps=1, start=str(moved))
    train(run, cache, tmp_path / "imkd", {"lidar": whole}, accelerator="cpu")
    assert "begin as built: fuser" in capsys.readouterr().err
    start = load_checkpoint(tmp_path / "imkd").meta["start"]
    assert start["weights_sha256"] == theirs.meta["weights_sha256"] and start["tensors"] > len(start["new"]) > 0
    shutil.rmtree(moved)
    more = run.with_values(max_steps=2)
    assert train(more, cache, tmp_path / "imkd", {"lidar": whole}, resume=True, accelerator="cpu").step == 2
    assert load_checkpoint(tmp_path / "imkd").meta["start"] == start

    with pytest.raises(MismatchError, match="another network"):
        build_networks(toy_run("student", start=str(whole)))
    with pytest.raises(UsageError, match="label encoder"):
        build_networks(toy_run("label", start=str(whole)), {"lidar": whole})


def test_a_label_encoder_of_another_teacher_is_refused(cache: Any, whole: Path, tmp_path: Path) -> None:
    other = train(toy_run(seed=7, max_steps=1), cache, tmp_path / "other", accelerator="cpu").checkpoint
    label = train(toy_run("label", max_steps=1), cache, tmp_path / "label", {"lidar": other}, accelerator="cpu").checkpoint
    with pytest.raises(MismatchError, match="another LiDAR teacher"):
        train(
            toy_run("student", method="imkd", max_steps=1),
            cache,
            tmp_path / "s",
            {"lidar": whole, "label": label},
            accelerator="cpu",
        )


def test_stages_in_one_run(cache: Any, tmp_path: Path) -> None:
    stages = tuple(
        toy_run(kind, name=name, max_steps=2, method=method)
        for kind, name, method in (("lidar", "teacher", None), ("label", "label", None), ("student", "student", "imkd"))
    )
    run = toy_run(name="all_three", stages=stages, model={})
    result = train(run, cache, tmp_path, accelerator="cpu")
    assert set(result.stages) == {"teacher", "label", "student"}
    for name in result.stages:
        assert load_checkpoint(tmp_path / name / "last.ckpt").step == 2
    again = train(run, cache, tmp_path, resume=True, accelerator="cpu")
    assert again.step == 2


def test_a_teacher_that_no_stage_takes_is_refused(cache: Any, whole: Path, tmp_path: Path) -> None:
    stages = (toy_run(name="teacher"), toy_run("student", name="student", method="imkd"))
    run = toy_run(name="both", stages=stages, model={})
    with pytest.raises(UsageError, match="lidr") as error:
        train(run, cache, tmp_path / "run", {"lidr": whole, "label": whole}, accelerator="cpu")
    assert error.value.details["expected"] == "lidar, label" and not (tmp_path / "run").exists()


def test_teachers_are_untouched(cache: Any, whole: Path, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in load_checkpoint(whole).model.items()}
    label = train(toy_run("label", max_steps=2), cache, tmp_path, {"lidar": whole}, accelerator="cpu").checkpoint
    kept = load_checkpoint(label).tensors("teacher_lidar")
    assert all(torch.equal(kept[k], before[k]) for k in before)
