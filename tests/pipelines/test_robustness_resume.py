"""A robustness protocol that was stopped goes on with what is finished, and never with what belongs to something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cli.main import run_group
from cli.model import group
from imkd_data import open_cache
from pipelines import robustness as module
from pipelines.robustness import CONDITIONS, robustness
from pipelines.robustness_store import FOLDER, Row, Store

# Two readings a network: nine runs of it (plain, five draws, three of the radar) at most six at a time.
CHOSEN = [c for c in CONDITIONS if not c.predicts or c.cameras == 1 or c.radars == 5 or c.radar_sweeps]
SHOWN = [c for c in CHOSEN if c.name not in ("night", "day, dry")]  # the val scene is a rainy day
KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.robustness import CONDITIONS, robustness
import torch
torch.set_num_threads(1)
names = sys.argv[4].split("|")
begun = []
def tell(run, text):
    begun.append(run)
    if begun.count("b") == 2:  # in the middle of the second network
        os.kill(os.getpid(), signal.SIGKILL)
chosen = [c for c in CONDITIONS if c.name in names]
a, b = (Path(p) for p in sys.argv[5:7])
robustness({"a": a, "b": b}, Path(sys.argv[1]), Path(sys.argv[2]), dataroot=Path(sys.argv[3]), conditions=chosen, progress=tell)
"""


def kept(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / FOLDER).iterdir()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the conditions of every reading of the samples."""
    seen: list[list[str]] = []
    predict = module._Bench.predict

    def spy(self, chosen):
        seen.append([v.condition.name for v in chosen])
        return predict(self, chosen)

    monkeypatch.setattr(module._Bench, "predict", spy)
    return seen


def test_a_killed_protocol_goes_on_to_the_same_table(line, tmp_path: Path, counted) -> None:
    a, b = line.students["student0"], line.students["student1"]
    words = [str(line.cache), str(tmp_path / "killed"), str(line.tree), "|".join(c.name for c in CHOSEN), str(a), str(b)]
    repo = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": repo, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    before = kept(tmp_path / "killed")
    names = [json.loads(v)["row"]["run"] for v in before.values()]
    assert names.count("a") == len(SHOWN) > names.count("b") > 0
    assert not (tmp_path / "killed" / "robustness.json").exists()

    options = {"dataroot": line.tree, "conditions": CHOSEN}
    said: list[str] = []
    robustness(
        {"a": a, "b": b}, line.cache, tmp_path / "killed", **options, progress=lambda run, text: said.append(f"{run}: {text}")
    )
    assert said[0] == f"a: {len(SHOWN)} of {len(CHOSEN)} conditions are there already"
    assert counted and all("all samples" not in reading for reading in counted)  # the first reading was not repeated
    after = kept(tmp_path / "killed")
    assert {k: after[k] for k in before} == before and len(after) == 2 * len(SHOWN)
    whole = tmp_path / "whole"
    robustness({"a": a, "b": b}, line.cache, whole, **options)
    assert (whole / "robustness.md").read_bytes() == (tmp_path / "killed" / "robustness.md").read_bytes()
    a_json, b_json = (json.loads((d / "robustness.json").read_text()) for d in (whole, tmp_path / "killed"))
    for mine, other in zip(a_json.pop("rows"), b_json.pop("rows"), strict=True):  # two processes may round sums differently
        numbers = [[r.pop(k) for k in ("nds", "mean_ap", "occurring")] for r in (mine, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-12, nan_ok=True) or numbers[0] == numbers[1] == [None] * 3
        spreads = [r.pop("spread") or [0, 0] for r in (mine, other)]
        assert spreads[0] == pytest.approx(spreads[1], abs=1e-12) and mine == other
    assert a_json == b_json and set(kept(whole)) == set(after)

    counted.clear()  # another name and order of the same networks: nothing runs
    rows = robustness({"plain": b, "IMKD": a}, line.cache, whole, **options)
    assert counted == [] and [r.run for r in rows[:: len(CHOSEN)]] == ["plain", "IMKD"]
    assert "| plain: NDS (change), mAP | IMKD: NDS" in (whole / "robustness.md").read_text()


def test_rows_that_only_select_do_not_run_the_network(line, tmp_path: Path, monkeypatch, counted) -> None:
    from imkd_models.detector import StudentDetector

    calls = []
    forward = StudentDetector.forward
    monkeypatch.setattr(StudentDetector, "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1])
    only = [c for c in CONDITIONS if not c.predicts]
    assert len(only) == 8
    robustness({"a": line.students["student0"]}, line.cache, tmp_path, dataroot=line.tree, conditions=only)
    assert len(calls) == 3 and len(counted) == 1  # three samples, one by one, once
    many = [replace(CONDITIONS[0], cameras=1, name="x"), replace(CONDITIONS[0], radar_late=True, name="late")]
    calls.clear(), counted.clear()
    robustness({"a": line.students["student0"]}, line.cache, tmp_path, dataroot=line.tree, conditions=[*only, *many])
    assert counted == [["x"] * 5, ["late"]] and len(calls) == 3 * 6  # five draws on one reading


@pytest.mark.parametrize("changed", ["seed", "batch_size", "weights", "cache", "truth"])
def test_other_settings_are_never_mixed(line, tmp_path: Path, counted, changed: str, monkeypatch) -> None:
    options = {"dataroot": line.tree, "conditions": CONDITIONS[:1]}
    network, cache = {"a": line.students["student0"]}, open_cache(line.cache)
    first = robustness(network, cache, tmp_path, **options)
    counted.clear()
    if changed in ("seed", "batch_size"):
        options[changed] = 3
    elif changed == "weights":
        network = {"a": line.students["student1"]}
    elif changed == "cache":
        monkeypatch.setattr(cache, "id", "0" * 64)
    else:
        read = module.read_truth

        def fewer(*a, **k):
            truth = read(*a, **k)
            return replace(truth, boxes=truth.boxes.where(truth.boxes.label == 0))

        monkeypatch.setattr(module, "read_truth", fewer)
    second = robustness(network, cache, tmp_path, **options)
    assert counted == [["all samples"]] and len(kept(tmp_path)) == 2
    if changed in ("weights", "truth"):
        assert first[0].nds != second[0].nds


@pytest.mark.parametrize("damage", ["cut", "other", "hand"])
def test_a_damaged_file_is_computed_anew(line, tmp_path: Path, counted, damage: str) -> None:
    options = {"dataroot": line.tree, "conditions": CONDITIONS[:1]}
    network = {"a": line.students["student0"]}
    (first,) = robustness(network, line.cache, tmp_path, **options)
    ((name, good),) = kept(tmp_path).items()
    value = json.loads(good)
    if damage == "other":
        value["identity"]["network"]["weights_sha256"] = "0" * 64
    elif damage == "hand":
        del value["row"]["nds"]
    text = good[: len(good) // 2] if damage == "cut" else json.dumps(value).encode()
    (tmp_path / FOLDER / name).write_bytes(text)
    counted.clear()
    assert robustness(network, line.cache, tmp_path, **options) == [first] and len(counted) == 1
    assert kept(tmp_path) == {name: good}


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path, {"weights_sha256": "ab" * 32}, {"cache": "c"})
    row = Row(condition="x y", group="g", run="a", num_samples=3, nds=0.1 + 0.2, mean_ap=0.5, spread=(0.25, 1 / 3))
    path = store.save(asdict(replace(CONDITIONS[0], name="x, y")), row)
    assert path.name.startswith("abababab-x-y-") and [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = store.load(asdict(replace(CONDITIONS[0], name="x, y")), "b")
    assert loaded is not None and loaded.run == "b" and loaded.occurring != loaded.occurring
    assert replace(loaded, run="a", occurring=0.0) == replace(row, occurring=0.0)
    assert store.load(asdict(replace(CONDITIONS[0], name="x, y", far=True)), "b") is None


def test_names_on_the_command_line(line, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(module, "CONDITIONS", CONDITIONS[:1])
    monkeypatch.setattr(module.robustness, "__kwdefaults__", {**module.robustness.__kwdefaults__, "conditions": CONDITIONS[:1]})
    a, b = line.students["student0"], line.students["student1"]
    words = ["evaluate", "--cache", str(line.cache), "--dataroot", str(line.tree), "--out", str(tmp_path / "o=1")]
    assert run_group(group, "imkd", [*words, "--robustness", "--checkpoint", f"plain={a}", "--beside", f"IMKD={b}"]) == 0
    out = capsys.readouterr()
    assert "| plain: NDS (change), mAP | IMKD: NDS (change), mAP |" in out.out and "IMKD: all samples" in out.err
    md = (tmp_path / "o=1" / "robustness.md").read_text()
    assert "imkd evaluate --robustness --checkpoint plain=CKPT --beside IMKD=CKPT --cache CACHE" in md
    odd = tmp_path / "lr=0.1"
    odd.symlink_to(a.parent)  # a path may hold the sign itself
    assert run_group(group, "imkd", [*words, "--robustness", "--json", "--checkpoint", str(odd / "last.ckpt")]) == 0
    (line_of_json,) = capsys.readouterr().out.splitlines()
    assert list(json.loads(line_of_json)["networks"]) == ["lr=0.1"]
    assert run_group(group, "imkd", [*words, "--robustness", "--checkpoint", f"x={a}", "--beside", f"x={b}"]) == 2
    assert "two networks are called x" in capsys.readouterr().err
    assert run_group(group, "imkd", [*words, "--robustness", "--checkpoint", f"x={a}", "--beside", str(b)]) == 2
    assert "--beside needs NAME=CKPT" in capsys.readouterr().err
    assert run_group(group, "imkd", [*words, "--checkpoint", f"x={a}", "--beside", f"y={b}"]) == 2
    assert "add --robustness" in capsys.readouterr().err
