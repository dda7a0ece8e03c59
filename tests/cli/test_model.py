"""``imkd``: every command by subprocess or in process; exit codes; JSON a program can read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.main import model as imkd
from pipelines.run import Run


def run(*arguments: str) -> tuple[int, str, str]:
    """In process: exit status, stdout, stderr."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        imkd(list(arguments))
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['imkd', '--help']\nfrom cli.main import model\ntry: model()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'pyarrow', 'lightning', 'zarr') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("[]") and "train" in done.stdout


def test_every_command_has_help() -> None:
    commands = ["train", "evaluate", "predict", "demo", "report", "import", "export", "cache-teacher", "methods", "runs"]
    for command in [[c] for c in commands] + [["runs", "show"], ["bench", "loader"], ["bench", "step"]]:
        code, out, _ = run(*command, "--help")
        assert code == 0 and "Usage" in out, command


def test_runs_json_is_one_object_a_line() -> None:
    code, out, _ = run("runs", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    by_name = {line["name"]: line for line in lines}
    assert {"overfit", "tiny_teacher", "tiny_label", "tiny_student", "imkd_r50", "crn_r50"} <= set(by_name)
    uncounted = {line["name"] for line in lines if line["parameters"] is None}
    assert uncounted <= {"voxel", "crkd_teacher"}  # their layers are spconv's
    for line in (v for n, v in by_name.items() if n not in uncounted):
        assert line["parameters"] == sum(line["modules"].values()) > 1000
        assert line["macs"] > 10**6 and line["sample_bytes"] > 10**6
    # bytes kept for the backward pass: more pixels, more keyframes with gradient or wider maps need more
    assert by_name["imkd_r101"]["sample_bytes"] > by_name["imkd_r50"]["sample_bytes"] > by_name["crn_r50"]["sample_bytes"]
    assert by_name["crn_r50"]["parameters"] == 61_435_037  # published and counted
    assert by_name["imkd_r50"]["parameters"] == 61_521_935
    assert by_name["tiny_student"]["macs"] > by_name["tiny_teacher"]["macs"]


@pytest.mark.parametrize("name", ["overfit", "tiny_student", "tiny_label", "imkd_r50"])
def test_show_round_trips_through_config(name: str, tmp_path: Path) -> None:
    from cli.model import resolve_run
    from pipelines.runs import get_run

    code, out, _ = run("runs", "show", name)
    assert code == 0 and len(out.splitlines()) == 1
    shown = json.loads(out)
    assert shown["name"] == name and shown["parameters"] == sum(shown["modules"].values()) and "macs" in shown
    (tmp_path / "run.json").write_text(out)
    assert resolve_run(name, config=tmp_path / "run.json") == get_run(name) == Run.from_dict(shown)


def test_methods_json() -> None:
    code, out, _ = run("methods", "--json")
    lines = {o["name"]: o for o in map(json.loads, out.splitlines())}
    assert code == 0 and {"imkd", "crkd", "adaptive_smooth", "dual_distill"} <= set(lines)
    assert set(lines["imkd"]["needs"]["teachers"]) == {"lidar", "label"}
    assert any(o["name"] == "stage2_label" and o["doc"] for o in lines["imkd"]["options"])


def test_methods_say_what_they_need_without_json() -> None:
    from imkd_models.distill import METHODS

    code, out, _ = run("methods")
    assert code == 0
    parts = re.split(r"^(?=\S)", out, flags=re.MULTILINE)[1:]  # a line that is not indented begins a method
    assert [part.split(":")[0] for part in parts] == list(METHODS)
    for part, (name, method) in zip(parts, METHODS.items(), strict=True):
        assert part.startswith(f"{name}: {method.title}")
        for teacher, features in method.needs.of_teachers.items():
            assert f"--teacher {teacher}=CKPT ({', '.join(features)})" in part
        assert f"student: {', '.join(method.needs.student)}" in part and method.twin in part
        for option in method.options.describe():
            assert option["name"] + "=" in part and option["doc"] in part


def test_settings_reach_every_section() -> None:
    from cli.model import resolve_run

    settings = (
        "seed=5",
        "optim.lr=1e-3",
        "workers=0",
        "augment.flip_x=0",
        "bev_scale=1,1",
        "stage2_label=off",
        "model.fuser_layers=2",
        "checkpoint_every=7",
        "precision=bf16-mixed",
        "milestones=[3, 4.5]",
    )
    resolved = resolve_run("tiny_student", method="imkd", settings=settings, max_steps=9, global_batch=8)
    assert (resolved.seed, resolved.optim.lr, resolved.loader.workers) == (5, 1e-3, 0)
    assert resolved.loader.augment.flip_x == 0.0 and resolved.loader.augment.bev_scale == (1, 1)
    assert resolved.options == {"stage2_label": "off"} and resolved.model["fuser_layers"] == 2
    assert (resolved.checkpoint_every, resolved.precision, resolved.optim.milestones) == (7, "bf16-mixed", (3, 4.5))
    assert (resolved.max_steps, resolved.global_batch, resolved.method) == (9, 8, "imkd")
    stages = resolve_run("overfit", settings=("seed=3", "student.optim.lr=0.5", "stage2_label=off"), max_steps=75).stages
    assert [s.seed for s in stages] == [3, 3, 3] and [s.optim.lr for s in stages] == [4e-3, 3e-3, 0.5]
    assert stages[2].options == {"stage2_label": "off"} and not stages[0].options
    assert sum(s.max_steps for s in stages) <= 75


BAD: list[tuple[tuple[str, ...], str]] = [
    (("train", "no_such_run", "--cache", "c", "--out", "o"), "no run 'no_such_run'"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--set", "sead=1"), "seed"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--set", "seed"), "key=value"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--set", "seed=x"), "setting seed"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--set", "optim.schedule=often"), "optim.schedule"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--method", "magic"), "magic"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--teacher", "lidar"), "NAME=CKPT"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--set", "stage2_label=off"), "no --method is set"),
    (("train", "tiny_student", "--out", "o"), "--cache"),
    (("runs", "show", "nothing"), "nothing"),
    (("train", "tiny_student", "--cache", "c", "--out", "o", "--memory-limit", "lots", "--max-steps", "0"), "0"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=[" ".join(a[:2] + a[-1:]) for a, _ in BAD])
def test_bad_usage_is_exit_2(arguments: tuple[str, ...], text: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and text in err and "Traceback" not in err


def test_a_missing_cache_and_checkpoint(tmp_path: Path) -> None:
    code, _, err = run("train", "tiny_teacher", "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "o"))
    assert code in (4, 8) and "none" in err and not (tmp_path / "o").exists()
    arguments = ("--cache", "c", "--dataroot", "d", "--out", str(tmp_path))
    code, out, err = run("evaluate", "--checkpoint", str(tmp_path / "no.ckpt"), *arguments, "--json")
    assert code in (4, 8)
    assert json.loads(out.splitlines()[-1])["code"] == code


def test_config_errors(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for text, word in (
        ("{", "cannot be read"),
        (json.dumps({"name": "tiny_student", "epocs": 3}), "epocs"),
        (json.dumps({"name": "overfit"}), "another run"),
    ):
        file.write_text(text)
        code, _, err = run("train", "tiny_student", "--cache", "c", "--out", "o", "--config", str(file))
        assert code == 2 and word in err


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
    from toy_training import toy_cache

    return toy_cache(tmp_path_factory.mktemp("cli"))


def test_train_by_command_line(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on the toy cache: --config, --json, the refusal of a used folder, --resume auto, --plan."""
    from toy_training import toy_run

    import imkd_data.opened as opened

    monkeypatch.setattr(opened, "open_cache", lambda *a, **k: toy)
    import pipelines.runs as runs

    monkeypatch.setitem(runs.RUNS, "toy_lidar", toy_run)
    out = tmp_path / "run"
    base = ("train", "toy_lidar", "--cache", "toy", "--out", str(out), "--accelerator", "cpu", "--max-steps", "2")
    code, text, err = run(*base, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result["step"] == 2 and Path(result["checkpoints"]["toy_lidar"]).is_symlink() and result["losses"]
    code, _, err = run(*base)
    assert code == 2 and "--resume" in err
    code, _, _ = run(*base, "--resume", "auto")
    assert code == 0
    code, _, err = run(*base[:-2], "--max-steps", "3", "--resume", "--set", "seed=4")
    assert code == 9 and "seed" in err
    code, text, err = run(*base[:-2], "--plan", "--json", "--set", "batch_size=1")
    assert code == 0, err
    plan = json.loads(text)
    assert plan["planned"] == "toy_lidar" and plan["hours"] > 0 and 0 <= plan["data_wait"] < 1
    assert plan["parameters"] == sum(plan["modules"].values()) and plan["peak_bytes"] > 10**7


DEVICE_COMMANDS = [
    (
        "pipelines.evaluate.evaluate_checkpoint",
        ("evaluate", "--checkpoint", "k", "--cache", "c", "--dataroot", "d", "--out", "o"),
    ),
    (
        "pipelines.robustness.robustness",
        ("evaluate", "--robustness", "--checkpoint", "k", "--cache", "c", "--dataroot", "d", "--out", "o"),
    ),
    ("pipelines.predict.predict_split", ("predict", "--checkpoint", "k", "--dataroot", "d", "--split", "val", "--out", "o")),
    (
        "pipelines.cache_teacher.cache_features",
        ("cache-teacher", "--checkpoint", "k", "--cache", "c", "--features", "bev_neck"),
    ),
]


@pytest.mark.parametrize(("seen", "expected"), [(True, "cuda"), (False, "cpu")])
@pytest.mark.parametrize(("target", "words"), DEVICE_COMMANDS, ids=[t.rpartition(".")[2] for t, _ in DEVICE_COMMANDS])
def test_networks_run_where_training_does(
    target: str, words: tuple[str, ...], seen: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --device: CUDA where torch sees one, else the CPU; a named device that is there is taken as it is."""
    import torch

    import imkd_data

    class Reached(Exception):
        pass

    def record(*_: Any, device: str, **__: Any) -> None:
        raise Reached(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * seen)
    monkeypatch.setattr(imkd_data, "open_cache", lambda *_, **__: None)
    monkeypatch.setattr(target, record)
    from cli.model import group

    named = (("--device", "cuda:1"), "cuda:1") if seen else (("--device", "cpu:0"), "cpu:0")
    for given, device in (((), expected), (("--device", "cpu"), "cpu"), named):
        with pytest.raises(Reached, match=f"^{device}$"):
            group.main([*words, *given], standalone_mode=False)
