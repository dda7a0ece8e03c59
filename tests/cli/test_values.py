"""Values on the command lines that cannot be meant: exit status 2, the option's name, never "bug"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.bench_distill import seeds_from
from cli.main import run_group
from imkd_data.errors import UsageError


def imkd(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and stderr."""
    from cli.model import group

    capsys.readouterr()
    return run_group(group, "imkd", [str(a) for a in arguments]), capsys.readouterr().err


TRAIN = ("train", "tiny_student", "--cache", "c", "--out", "o")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optim.clip=-1", "0 to 1e+30"),
        ("optim.lr=NaN", "0 to 1e+30"),
        ("bev_scale=[1.1,0.9]", "the smaller first"),
        ("seed=-1", "a whole number, at least 0"),
        ("seed=99999999999999999999999", "a whole number, 0 to"),
    ],
)
def test_a_setting_names_its_range(setting: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = imkd(capsys, *TRAIN, "--set", setting)
    key, _, value = setting.partition("=")
    assert code == 2 and key in err and expected in err and "bug" not in err, err
    assert {"NaN": "nan", "[1.1,0.9]": "(1.1, 0.9)"}.get(value, value) in err


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("imkd", "lambda_l2m=nan"),
        ("imkd", "rho=nan"),
        ("imkd", "warmup_steps=1.5"),
        ("imkd", "warmup_steps=inf"),
        ("adaptive_smooth", "beta_min=nan"),
        ("crkd", "relation_sizes=a"),
        ("crkd", "relation_sizes=32,0"),
        ("crkd", 'group_weight_by_name={"car":"a"}'),
        ("imkd+dual_distill", "imkd.lambda_l2m=nan"),
    ],
)
def test_a_method_option_is_refused_before_any_cache_is_opened(
    method: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = imkd(capsys, *TRAIN, "--method", method, "--set", setting)
    assert code == 2 and f"option {setting.partition('=')[0].rpartition('.')[2]}" in err and "bug" not in err, err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "a"}, "setting seed"),
        ({"seed": 1.5}, "setting seed"),
        ({"batch_size": True}, "setting batch_size"),
        ({"tensorboard": "maybe"}, "setting tensorboard"),
        ({"optim": {"betas": [1]}}, "optim.betas"),
        ({"optim": {"milestones": ["a"]}}, "optim.milestones"),
        ({"loader": {"augment": [1]}}, "setting augment"),
        ({"options": {"a": 1}}, "no method"),
        ({"method": "imkd", "options": {"rho": float("nan")}}, "option rho"),
    ],
)
def test_a_configuration_file(change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"name": "tiny_student", **change}))
    code, err = imkd(capsys, *TRAIN, "--config", file)
    assert code == 2 and words in err and "bug" not in err, err


def test_a_memory_limit_is_read_without_a_gpu(
    synthetic_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--cache", synthetic_cache, "--out", tmp_path / "o", "--memory-limit", "foo", "--accelerator", "cpu")
    code, err = imkd(capsys, "train", "tiny_teacher", *words)
    assert code == 2 and "size cannot be read" in err and "foo" in err
    assert not (tmp_path / "o").exists()


def test_a_run_whose_out_is_a_file(synthetic_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    code, err = imkd(capsys, "train", "tiny_teacher", "--cache", synthetic_cache, "--out", tmp_path / "file")
    assert code == 2 and "--out is a folder" in err and str(tmp_path / "file") in err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("item", ["student", "=3", "student=0", "student=-1", "student=²", "nobody=3"])
def test_steps_name_their_option(item: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = imkd(capsys, "bench", "distill", "--out", tmp_path / "o", "--steps", item)
    assert code == 2 and "--steps" in err and item in err and "--set" not in err, err


@pytest.mark.parametrize("text", ["-1", "0,-1", "-2..1", "-1..0", "2..1", "1,1", "a", "", "0..1..2", f"{2**63}"])
def test_seeds_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError, match="seeds are") as error:
        seeds_from(text)
    assert error.value.details["found"] == text


def test_seeds() -> None:
    assert seeds_from("0..2") == (0, 1, 2) and seeds_from("4,0") == (4, 0) and seeds_from("3") == (3,)
