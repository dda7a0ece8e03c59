"""The latency bench at tiny size on a CPU: every row is there, sums agree, and the forward pass may be captured in a graph."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import VIEW

from imkd_data.errors import MismatchError, UsageError
from imkd_data.geometry import BevGrid
from imkd_models.convention import near_sensor
from imkd_models.presets import build_model, tiny_config, tiny_lidar_config
from pipelines.bench_latency import latency_table, part_costs, random_batch, run_latency_bench
from pipelines.counting import count_cost
from pipelines.run import OptimConfig, Run

SMALL: dict[str, Any] = {"grid": VIEW, "image_hw_px": (32, 64), "depth_bins": 12, "depth_step_m": 1.0}
FUSERS: dict[str, dict[str, Any]] = {
    "crn": {"fuser": "deformable"},
    "imkd": {"fuser": "intensity"},
    "crkd": {"fuser": "gated", "calibration": True, "radar_encoder": "bev", "radar_states": True},
    "smooth": {"fuser": "heterogeneous", "sim_branch": True, "sim_attention": "deformable"},
    "camera": {"radar": False},
    "bevdepth": {
        "radar": False,
        "fuser": "none",
        "fused_channels": 32,
        "view": "frustum",
        "depth_net": "camera_aware",
        "time_fusion": "concat",
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small_run(**changes: Any) -> Run:
    model = tiny_config(**{**SMALL, "history": (0, -1), **changes}).as_dict()
    return Run(name="small", model=model, batch_size=2, optim=OptimConfig())


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()  # eight compilations of one function in a process are torch's limit


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    options: dict[str, Any] = {"repeats": 3, "accelerator": "cpu", "backend": "eager", "radar_points": 40, "lidar_points": 50}
    return run_latency_bench(small_run(), precisions=("bf16",), **options)


def test_every_mode_precision_and_engine_has_a_figure_or_a_reason(facts: dict[str, Any]) -> None:
    rows = {(r["mode"], r["precision"], r["engine"]): r for r in facts["rows"]}
    assert len(rows) == 2 * 3
    for (_, _, engine), row in rows.items():
        if engine == "cuda graph":
            assert "CUDA device" in row["error"]
            continue
        assert "error" not in row, row
        assert row["best_s"] <= row["median_s"] and row["fps"] == pytest.approx(1 / row["median_s"])
        assert row["share_of_floor"] == pytest.approx(row["floor"]["seconds"] / row["median_s"])
    one, four = (rows[m, "bf16", "eager"]["floor"]["flops"] for m in ("cached past", "all keyframes"))
    assert 1.2 < four / one < 2.2  # two keyframes against one


def test_parts_add_up(facts: dict[str, Any]) -> None:
    from imkd_models.config import StudentConfig

    config = StudentConfig.from_dict(small_run().model)
    row = next(r for r in facts["rows"] if r["mode"] == "all keyframes" and r["engine"] == "eager")
    assert {"image", "view", "radar", "fusion", "trunk", "head", "rest"} <= set(row["parts_s"])
    cost = count_cost(config)
    assert cost is not None
    assert 0 <= row["floor"]["flops"] / (2 * cost[0]) - 1 < 0.01  # the count has no radar points
    parts = row["floor"]["parts"]
    model = build_model(config, pretrained=False)
    weights = sum(p.numel() for p in model.parameters()) * 2
    assert weights < sum(p["bytes"] for p in parts.values()) < 60 * weights
    head, neck = model.head, torch.zeros(1, model.feature_shapes["bev_neck"][0], *VIEW.shape)
    made = sum(sum(sizes) for sizes in head.sizes) * VIEW.nx * VIEW.ny
    assert parts["head"]["bytes"] == 2 * (sum(p.numel() for p in head.parameters()) + neck.numel() + made)


def test_training_step_forecast_and_table(facts: dict[str, Any]) -> None:
    step = facts["train"]
    assert step["samples_per_s"] == pytest.approx(2 / step["step_s"])
    assert step["hours_per_24_epochs"] == pytest.approx(24 * 28130 / step["samples_per_s"] / 3600)
    text = latency_table(facts)
    assert "not measured: UsageError" in text and "22.7" in text and "hours for 24 epochs" in text and "no GPU" in text
    json.dumps(facts, allow_nan=False)


def test_the_command_prints_one_object() -> None:
    from cli.model import group

    arguments = ["bench", "latency", "tiny_teacher", "--repeats", "3", "--precision", "fp32", "--engine", "eager", "--no-train"]
    result = CliRunner().invoke(group, [*arguments, "--accelerator", "cpu", "--json"], catch_exceptions=False)
    facts = json.loads(result.output)
    assert {r["mode"]: "error" in r for r in facts["rows"]} == {"cached past": True, "all keyframes": False}
    for wrong in ({"engines": ("tensorrt",)}, {"precisions": ("int8",)}):
        with pytest.raises(UsageError, match="unknown choice"):
            run_latency_bench(small_run(), accelerator="cpu", **wrong)


class _Stops(TorchDispatchMode):
    """Operations that wait for the device or bring numbers from the host: neither may be in a CUDA graph."""

    forbidden = (
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "lift_fresh",
        "masked_select",
        "linalg_inv",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.forbidden:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUSERS)
def test_the_forward_pass_never_waits_for_the_device(name: str) -> None:
    config = tiny_config(**{**SMALL, "history": (0, -1), **FUSERS[name]})
    model = build_model(config, pretrained=False).eval()
    batch, watch = random_batch(config, radar_points=30, lidar_points=10), _Stops()
    with torch.no_grad(), watch:
        model(batch)
    assert watch.found == []


@pytest.mark.parametrize("name", ["crkd", "smooth", "bevdepth"])
def test_one_graph_without_breaks_equals_eager(name: str) -> None:
    config = tiny_config(**{**SMALL, "history": (0, -1), **FUSERS[name]})
    torch.manual_seed(0)
    model = build_model(config, pretrained=False).eval()
    batch = random_batch(config, radar_points=30, lidar_points=10)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(batch)  # a break is an error
        eager = model(batch)
    torch.testing.assert_close(compiled.features["bev_neck"], eager.features["bev_neck"], atol=1e-4, rtol=1e-4)


def test_a_second_grid_compiles_too_and_a_batch_on_another_grid_is_still_refused() -> None:
    made = []
    for grid in (VIEW, BevGrid(x_min_m=-3.2, y_min_m=-6.4, cell_m=0.8, nx=24, ny=16), VIEW):
        config = tiny_config(**{**SMALL, "grid": grid, "history": (0,), **FUSERS["crkd"]})
        model = build_model(config, pretrained=False).eval()
        batch = random_batch(config, radar_points=10, lidar_points=10)
        made.append((torch.compile(model, backend="eager", fullgraph=True), model, batch))
        with torch.no_grad():
            compiled, eager = made[-1][0](batch), model(batch)
        torch.testing.assert_close(compiled.features["bev_neck"], eager.features["bev_neck"], atol=1e-4, rtol=1e-4)
    with pytest.raises(MismatchError, match="another grid"), torch.no_grad():
        made[1][1](made[0][2])
    torch._dynamo.reset()
    with pytest.raises(MismatchError, match="another grid"), torch.no_grad():
        torch.compile(made[1][1], backend="eager")(made[0][2])


def test_points_of_a_random_batch_are_not_left_out_as_close_ones() -> None:
    config = tiny_lidar_config(near_removed_m=1.0)
    lidar = random_batch(config, lidar_points=50).lidar
    assert lidar is not None and len(lidar.age_s) == 50 and not near_sensor(lidar, config).any()
    build_model(config, pretrained=False).eval()(random_batch(config, lidar_points=50))


def test_costs_count_every_module_once() -> None:
    config = tiny_config(**{**SMALL, "history": (0,), "fuser": "gated"})
    model = build_model(config, pretrained=False).eval()
    batch = random_batch(config, radar_points=0, lidar_points=0)
    costs = part_costs(lambda: model(batch), model, 2)
    assert sum(c["flops"] for c in costs.values()) == 2 * (count_cost(config) or (0,))[0] and costs["rest"]["flops"] >= 0
