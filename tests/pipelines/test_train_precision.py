"""Training in mixed precision, on a CPU: the code and nearly the rules of types are those of a GPU."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_ddp import launch
from toy_training import toy_cache, toy_run, toy_teachers

from imkd_data.cache import fault
from imkd_data.errors import InputDataError, UsageError
from imkd_data.loader.stream import stream
from imkd_models.checkpoint import load_checkpoint, weights_hash
from imkd_models.distill import METHODS, make_method
from pipelines.bench_step import run_step_bench
from pipelines.machine import Machine, bytes_from_text, channels_last
from pipelines.measure import measure_steps
from pipelines.networks import build_networks, stream_values
from pipelines.optimise import Ema, in_layout, make_optimiser
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
    seen = [v for line in low for v in (*line.values(), *line.get("diagnostics", {}).values()) if not isinstance(v, dict)]
    assert len(low) == 3 and all(map(math.isfinite, seen))
    assert low[0]["loss"] != first["loss"]  # half precision did run
    own = [k for k in first if k.startswith(("det_", "depth"))]
    assert sum(low[0][k] for k in own) == pytest.approx(sum(first[k] for k in own), rel=0.06)  # batch norms of two samples
    saved = load_checkpoint(tmp_path / "bf16-mixed")
    for part in (saved.model, saved.distiller or {}, saved.training["raw"]):
        assert {v.dtype for v in part.values() if v.is_floating_point()} <= {torch.float32}


def same(a: Path, b: Path) -> bool:
    x, y = load_checkpoint(a), load_checkpoint(b)
    return curve(a) == curve(b) and x.step == y.step and x.files == y.files and x.structure == y.structure


def stopped_and_resumed(run: Run, cache: Any, out: Path, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run, broken off in its last step and continued from the checkpoint of the step before."""
    fault._COUNTS.clear()
    monkeypatch.setitem(os.environ, "IMKD_FAULT", f"train.step:error:{run.max_steps}")
    with pytest.raises(RuntimeError, match="injected"):
        train(run, cache, out, given, accelerator="cpu")
    monkeypatch.delitem(os.environ, "IMKD_FAULT")
    assert load_checkpoint(out).step == run.max_steps - 1
    train(run, cache, out, given, resume="auto", accelerator="cpu")


@pytest.mark.parametrize("name", ["lidar", "imkd"])
def test_resume_in_bfloat16_is_exact(
    name: str, cache: Any, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With averaged weights and with two micro-batches a step."""
    run, given = case(name, teachers, **LOW, max_steps=3, batch_size=1, global_batch=2)
    train(run, cache, tmp_path / "whole", given, accelerator="cpu")
    stopped_and_resumed(run, cache, tmp_path / "broken", given, monkeypatch)
    assert run.optim.ema and same(tmp_path / "whole", tmp_path / "broken")


def test_two_ranks_in_bfloat16_equal_two_micro_batches(cache: Any, tmp_path: Path) -> None:
    run = toy_run(**LOW, max_steps=1, batch_size=1, global_batch=2)
    train(run, cache, tmp_path / "one", accelerator="cpu")
    script = tmp_path / "two.py"
    script.write_text(
        "import os, torch\nfrom pathlib import Path\nfrom toy_training import toy_cache, toy_run\n"
        "from pipelines.train import train\ntorch.set_num_threads(1)\n"
        "run = toy_run(precision='bf16-mixed', max_steps=1, batch_size=1, global_batch=2)\n"
        f"root = Path({str(tmp_path)!r})\n"
        "world = toy_cache(root / f'world{os.environ[\"RANK\"]}')\n"  # each writes its own: equal, and never half-written
        "train(run, world, root / 'two', accelerator='cpu', devices=2)\n"
    )
    launch([str(script)], 2)
    one, two = (load_checkpoint(tmp_path / n).training["raw"] for n in ("one", "two"))
    weights = [k for k in one if "running_" not in k and one[k].is_floating_point()]  # each rank keeps its own statistics
    start = build_networks(run).model.state_dict()
    apart = torch.cat([(one[k] - two[k]).flatten() for k in weights]).norm()
    moved = torch.cat([(one[k] - start[k]).flatten() for k in weights]).norm()
    assert float(moved) > 0 and float(apart) < 0.05 * float(moved)  # Adam's first step turns a rounding of nothing into lr


def test_sixteen_bit_floats_skip_steps_and_resume_exactly(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real float16 with a loss scaler on the CPU. At the first scale, 65536, gradients overflow: the step is left out, the
    scale halves, schedule and data go on; the scale is part of the checkpoint."""
    run = toy_run(precision="16-mixed", max_steps=2, checkpoint_every=1, keep=9)
    train(run, cache, tmp_path / "whole", accelerator="cpu")
    first, last = load_checkpoint(tmp_path / "whole" / "step-00000001.ckpt"), load_checkpoint(tmp_path / "whole")
    start = dict(build_networks(run).model.named_parameters())
    assert all(torch.equal(first.training["raw"][k], v) and torch.equal(first.model[k], v) for k, v in start.items())
    assert first.training["scaler"]["scale"] == 32768.0 > last.training["scaler"]["scale"]
    lines = curve(tmp_path / "whole")
    assert not math.isfinite(lines[0]["grad_norm"]) and math.isfinite(lines[0]["loss"])
    assert first.training["optimiser"]["state"] == {} and last.training["stream"]["consumed"] == 4
    stopped_and_resumed(run, cache, tmp_path / "broken", {}, monkeypatch)
    assert same(tmp_path / "whole", tmp_path / "broken")


def test_a_gradient_that_no_scale_saves_stops_the_run(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 1.0)
    with pytest.raises(InputDataError, match="the gradient is not finite"):
        train(toy_run(precision="16-mixed"), cache, tmp_path / "run", accelerator="cpu")


def test_the_plan_and_the_step_bench_measure_low_precision(cache: Any) -> None:
    run = toy_run(**LOW)
    cost, networks, _ = measure_steps(run, cache, steps=1, machine=Machine(accelerator="cpu"))
    assert all(math.isfinite(v) for v in cost.terms.values()) and cost.step_s > 0
    facts = run_step_bench(run, cache, steps=1, accelerator="cpu")
    assert facts["precision"] == "bf16-mixed" and facts["parts_s"]["backward"] > 0
    assert next(networks.model.parameters()).dtype == torch.float32


def test_a_teacher_runs_in_float32_unless_told_otherwise(cache: Any, teachers: dict[str, Path]) -> None:
    """In the run's precision its maps are another target by their rounding, far more than that of stored maps (1e-4)."""
    found = {}
    for precision in ("32-true", "run"):
        run, given = case("imkd", teachers, **LOW, teacher_precision=precision)
        networks = build_networks(run, given)
        batch = next(iter(stream(cache, 2, **stream_values(networks))))
        with torch.autocast("cpu", torch.bfloat16):
            found[precision] = networks.teachers["lidar"](batch).features["bev_stage2"]
    exact, rounded = found["32-true"], found["run"]
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert 1e-3 < float((exact - rounded).norm() / exact.norm()) < 0.05


def test_channels_last_changes_neither_checkpoint_nor_resume(cache: Any, tmp_path: Path) -> None:
    """What a GPU trains with: the memory layout of weights, averages and moments, and nothing of what is saved."""
    train(toy_run(max_steps=1), cache, tmp_path, accelerator="cpu")
    saved, model = load_checkpoint(tmp_path), build_networks(toy_run()).model
    channels_last(model)
    model.load_state_dict(saved.training["raw"])
    assert weights_hash(model) == weights_hash(saved.training["raw"])
    optimiser = make_optimiser(model, None, toy_run().optim)
    optimiser.load_state_dict(saved.training["optimiser"])
    wide = [p for p in model.parameters() if p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)]
    before = [optimiser.state[p]["exp_avg"].clone() for p in wide]
    in_layout(optimiser)
    assert len(wide) > 5 and all(optimiser.state[p]["exp_avg"].stride() == p.stride() for p in wide)
    assert all(torch.equal(optimiser.state[p]["exp_avg"], old) for p, old in zip(wide, before, strict=True))
    assert Ema(model, 0.9).shadow["head.shared.0.weight"].stride() == model.get_parameter("head.shared.0.weight").stride()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lidar", "label", "fusion", "student", *METHODS])
def test_a_gpu_trains_as_the_cpu_does(name: str, cache: Any, teachers: dict[str, Path], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("gpu: no CUDA device")
    logs = {}
    for device, precision in (("cpu", "32-true"), ("cuda", "32-true"), ("cuda", "bf16-mixed"), ("cuda", "16-mixed")):
        run, given = case(name, teachers, precision=precision, max_steps=2)
        out = tmp_path / f"{device}-{precision}"
        train(run, cache, out, given, accelerator=device)
        logs[device, precision] = curve(out)
        assert all(v.device.type == "cpu" for v in load_checkpoint(out).model.values())
    first = logs["cpu", "32-true"][0]
    own = [k for k in first if k.startswith(("det_", "depth"))]
    for log in logs.values():  # dropout draws other numbers on a GPU
        assert sum(log[0][k] for k in own) == pytest.approx(sum(first[k] for k in own), rel=0.1)
        assert math.isfinite(log[1]["loss"])


@pytest.mark.parametrize("text", ["1.2.3GiB", ".", "..5MB", "", "GiB", "-1GiB", "1 TiB", "0TiB", "9" * 400])
def test_a_size_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size cannot be read"):
        bytes_from_text(text)


def test_sizes_are_read() -> None:
    assert [bytes_from_text(t) for t in ("22GiB", " 1.5 kib", ".5MB", "2.GB", "7")] == [22 << 30, 1536, 500_000, 2 * 10**9, 7]
