"""``imkd bench latency``: what one student costs on this device, in all and by module, beside the floor of bytes and FLOPs.

Batch of random images, radar and LiDAR points at the sizes of nuScenes; no cache and no data are needed. The floor of a part
is the larger of its multiply-adds at the measured matmul rate and of its least traffic (weights, what comes in, what goes
out) at the measured copy rate. A figure that cannot be taken here is stated with the reason, never left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imkd_data.errors import UsageError
from imkd_data.loader.batch import Batch, BoxBatch, PointBatch
from imkd_models.config import FusionConfig, LidarConfig, ModelConfig, StudentConfig
from imkd_models.presets import build_model
from pipelines.bench_step import PARTS, copy_rate, matmul_flops
from pipelines.counting import MacCounter, blank_batch, resolved_config
from pipelines.device import device_of
from pipelines.optimise import make_optimiser
from pipelines.run import Run

__all__ = ["ENGINES", "MODES", "latency_table", "random_batch", "run_latency_bench"]

MODES = ("cached past", "all keyframes")
ENGINES = ("eager", "compiled", "cuda graph")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUSCENES_TRAIN_ROWS = 28_130
CRN_FPS = 22.7  # published for R50 256x704 on another machine (its card is not named)


def random_batch(
    config: ModelConfig, *, batch_size: int = 1, radar_points: int = 2500, lidar_points: int = 250_000, boxes: int = 40
) -> Batch:
    """A batch of the config's shapes: random images, points all over the grid, boxes of every class; the same every time."""
    g = torch.Generator().manual_seed(0)
    batch, grid = blank_batch(config, batch_size=batch_size), config.grid
    span = torch.tensor([grid.x_max_m - grid.x_min_m, grid.y_max_m - grid.y_min_m, 3.0])
    low = torch.tensor([grid.x_min_m, grid.y_min_m, -1.0])
    slots = batch.images_BTVCHW.shape[1] if batch.images_BTVCHW is not None else 1

    def points(like: PointBatch | None, count: int, slots: int) -> PointBatch:
        assert like is not None
        n = count * batch_size * slots
        index = torch.arange(n)
        xyz, features = low + span * torch.rand(n, 3, generator=g), torch.rand(n, len(like.feature_names), generator=g)
        if "near_m" in like.feature_names:  # no point is so close that a network leaves it out
            features[:, like.feature_names.index("near_m")] = torch.inf
        return replace(
            like,
            xyz_m=xyz,
            features_NF=features,
            batch_index=index % batch_size,
            time_index=index // batch_size % slots,
            age_s=0.5 * torch.rand(n, generator=g),
            velocity_mps=torch.randn(n, 2, generator=g),
        )

    def of_shape(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.randn(value.shape, generator=g)

    label = torch.arange(boxes).remainder(10).expand(batch_size, boxes).clone()
    truth = BoxBatch(
        centre_m_BM3=low + span * torch.rand(batch_size, boxes, 3, generator=g),
        size_lwh_m_BM3=1 + 3 * torch.rand(batch_size, boxes, 3, generator=g),
        yaw_rad_BM=6.28 * torch.rand(batch_size, boxes, generator=g),
        velocity_mps_BM2=torch.randn(batch_size, boxes, 2, generator=g),
        label_BM=label,
        valid_BM=torch.ones_like(label, dtype=torch.bool),
    )
    depth = {k: torch.where(torch.rand(v.shape, generator=g) < 0.02, 30.0, 0.0) for k, v in batch.image_maps.items()}
    return replace(
        batch,
        images_BTVCHW=of_shape(batch.images_BTVCHW),
        radar=points(batch.radar, radar_points, slots),
        lidar=points(batch.lidar, lidar_points, 1),
        boxes=truth,
        image_maps=depth,
    )


# ----------------------------------------------------------------------------------------------------------------- parts


def _watched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    names = {name: part for part, group in PARTS.items() for name in group}
    return [(names[name], module) for name, module in model.named_modules() if name in names]


def _tensor_bytes(value: Any, element: int) -> int:
    """Bytes of the floating tensors in a value at ``element`` bytes each, others at their own size."""
    if isinstance(value, Tensor):
        return value.numel() * (element if value.is_floating_point() else value.element_size())
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(v, element) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(v, element) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_tensor_bytes(getattr(value, n, None), element) for n in getattr(value, "__dataclass_fields__", ()))
    return 0


class _Hooks:
    """Calls ``enter(part, inputs)`` and ``leave(part, output)`` around every watched module."""

    def __init__(self, model: nn.Module, enter: Callable[[str, Any], None], leave: Callable[[str, Any], None]) -> None:
        self.handles = []
        for part, module in _watched(model):
            self.handles += [
                module.register_forward_pre_hook(lambda _m, args, p=part: enter(p, args)),
                module.register_forward_hook(lambda _m, _a, out, p=part: leave(p, out)),
            ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def part_costs(call: Callable[[], Any], model: nn.Module, element: int) -> dict[str, dict[str, float]]:
    """{part: {flops, bytes}} of one forward pass on the CPU; ``rest`` is geometry and pooling between the modules."""
    counter = MacCounter()
    open_parts: list[tuple[str, int]] = []
    out: dict[str, dict[str, float]] = {}
    weights: dict[str, int] = {}

    def enter(part: str, inputs: Any) -> None:
        open_parts.append((part, counter.macs))
        _add(out, part, 0, _tensor_bytes(inputs, element))

    def leave(part: str, result: Any) -> None:
        _, before = open_parts.pop()
        _add(out, part, 2.0 * (counter.macs - before), _tensor_bytes(result, element))

    for part, module in _watched(model):
        weights[part] = weights.get(part, 0) + sum(p.numel() for p in module.parameters()) * element
    with torch.no_grad(), counter, _Hooks(model, enter, leave):
        call()
    for part, size in weights.items():
        if part in out:
            out[part]["bytes"] += size
    known = sum(v["flops"] for v in out.values())
    _add(out, "rest", 2.0 * counter.macs - known, 0)
    return out


def _add(out: dict[str, dict[str, float]], part: str, flops: float, size: float) -> None:
    entry = out.setdefault(part, {"flops": 0.0, "bytes": 0.0})
    entry["flops"] += flops
    entry["bytes"] += size


# ---------------------------------------------------------------------------------------------------------------- timing


def _timed(call: Callable[[], Any], device: torch.device, repeats: int, warm: int) -> list[float]:
    """Seconds of each repeat after ``warm`` uncounted ones."""
    out = []
    for i in range(warm + repeats):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        if i >= warm:
            out.append(time.perf_counter() - begun)
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _parts_s(call: Callable[[], Any], model: nn.Module, device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds by part of eager passes; waiting at every border makes their sum a little more than the whole."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats + 2):
        spent: dict[str, float] = {}
        begun: list[float] = []

        def now() -> float:
            _wait(device)
            return time.perf_counter()

        def enter(_: str, __: Any, begun: list[float] = begun) -> None:
            begun.append(now())

        def leave(part: str, _: Any, begun: list[float] = begun, spent: dict[str, float] = spent) -> None:
            spent[part] = spent.get(part, 0.0) + now() - begun.pop()

        with _Hooks(model, enter, leave):
            first = now()
            call()
            spent["rest"] = now() - first - sum(spent.values())
        runs.append(spent)
    return {part: statistics.median(r.get(part, 0.0) for r in runs[2:]) for part in runs[-1]}


def _graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """One captured CUDA graph of ``call``; inputs stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _engine(name: str, model: nn.Module, arguments: tuple[Any, ...], device: torch.device, backend: str) -> Callable[[], Any]:
    if name == "eager":
        return lambda: model(*arguments)
    if name == "compiled":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        return lambda: compiled(*arguments)
    if device.type != "cuda":
        raise UsageError("CUDA graphs need a CUDA device", found=str(device))
    return _graphed(lambda: model(*arguments))


# ----------------------------------------------------------------------------------------------------------------- bench


def run_latency_bench(
    run: Run,
    *,
    precisions: Sequence[str] = ("fp16", "bf16"),
    modes: Sequence[str] = MODES,
    engines: Sequence[str] = ENGINES,
    repeats: int = 50,
    accelerator: str = "auto",
    backend: str = "inductor",
    radar_points: int = 2500,
    lidar_points: int = 250_000,
    train: bool = True,
) -> dict[str, Any]:
    """Latency at batch 1 for every precision, mode and engine; by module; floors; peak memory; the training step.

    backend: of torch.compile. Errors: UsageError for a run of several networks or of a label encoder, and unknown names.
    """
    for given, known in ((precisions, tuple(DTYPES)), (modes, MODES), (engines, ENGINES)):
        if unknown := sorted(set(given) - set(known)):
            raise UsageError("unknown choice", expected=", ".join(known), found=", ".join(unknown))
    config = None if run.stages else resolved_config(run)
    if not isinstance(config, StudentConfig | LidarConfig | FusionConfig):
        raise UsageError("latency is measured for one student or teacher", found=run.name, expected="for example crn_r50")
    device = torch.device(device_of(accelerator))
    on_gpu = device.type == "cuda"
    model: Any = build_model(config, pretrained=False).eval()
    batch = random_batch(config, radar_points=radar_points, lidar_points=lidar_points)
    sizes = {p: DTYPES[p].itemsize for p in precisions}
    costs = {
        (m, size): part_costs(_call(model, batch, m), model, size)
        for m in modes
        if _mode_exists(config, m)
        for size in sorted(set(sizes.values()))
    }
    model = model.to(device).to(memory_format=torch.channels_last)
    batch = batch.to(device)
    rates = {p: matmul_flops(device, {"fp32": "32-true"}.get(p, f"{p}-mixed")) for p in precisions}
    bandwidth = copy_rate(device)
    rows = []
    for mode in modes:
        for precision in precisions:
            if not _mode_exists(config, mode):
                rows.append({"mode": mode, "precision": precision, "engine": "", "error": "this network reads one keyframe"})
                continue
            floor = _floor(costs[mode, sizes[precision]], rates[precision], bandwidth)
            rows += _measured(model, batch, mode, precision, engines, floor, device, repeats, backend)
    facts = {
        "v": 1,
        "run": run.name,
        "method": run.as_dict()["method"],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "matmul_flops": rates,
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
        "published": {"CRN R50 256x704, FPS on another machine": CRN_FPS},
        "targets": _targets(rows, on_gpu),
        "train": _train_step(run, config, device, repeats=max(3, repeats // 10)) if train else None,
    }
    return facts


def _mode_exists(config: ModelConfig, mode: str) -> bool:
    several = isinstance(config, StudentConfig) and len(config.history) > 1
    return several or mode == MODES[1]


def _call(model: nn.Module, batch: Batch, mode: str) -> Callable[[], Any]:
    arguments = _arguments(model, batch, mode)
    return lambda: model(*arguments)


@torch.no_grad()
def _arguments(model: nn.Module, batch: Batch, mode: str) -> tuple[Any, ...]:
    """The batch; with cached past only the current slot of it and random maps for the others."""
    config: Any = model.config
    if mode == MODES[1]:
        return (batch,)
    ny, nx = config.grid.shape
    device = batch.bev_from_ego_B44.device
    past = [torch.randn(len(batch), config.fused_channels, ny, nx, device=device) for _ in config.history[1:]]
    radar = batch.radar
    if radar is not None:
        now = radar.time_index == 0
        tensors = ("xyz_m", "features_NF", "batch_index", "time_index", "age_s", "velocity_mps")
        radar = replace(radar, **{n: getattr(radar, n)[now] for n in tensors})
    return (replace(batch, radar=radar), past)


def _floor(costs: Mapping[str, Mapping[str, float]], flops: float, bandwidth: float) -> dict[str, Any]:
    parts = {part: {**cost, "seconds": max(cost["flops"] / flops, cost["bytes"] / bandwidth)} for part, cost in costs.items()}
    total = {name: sum(p[name] for p in parts.values()) for name in ("flops", "bytes", "seconds")}
    return {"parts": parts, **total}


def _measured(
    model: nn.Module,
    batch: Batch,
    mode: str,
    precision: str,
    engines: Sequence[str],
    floor: dict[str, Any],
    device: torch.device,
    repeats: int,
    backend: str,
) -> list[dict[str, Any]]:
    rows = []
    arguments = _arguments(model, batch, mode)
    half = precision != "fp32"
    cast = torch.autocast(device.type, dtype=DTYPES[precision], cache_enabled=False) if half else nullcontext()
    for engine in engines:
        row: dict[str, Any] = {"mode": mode, "precision": precision, "engine": engine, "floor": floor}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            with torch.no_grad(), cast:
                seconds = _timed(_engine(engine, model, arguments, device, backend), device, repeats, warm=3)
                if engine == "eager":
                    row["parts_s"] = _parts_s(lambda: model(*arguments), model, device, max(3, repeats // 5))
        except Exception as error:  # one engine that fails here must not cost the other figures
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            row["median_s"], row["best_s"] = statistics.median(seconds), min(seconds)
            row["fps"] = 1 / row["median_s"]
            row["share_of_floor"] = floor["seconds"] / row["median_s"]
            row["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        rows.append(row)
    return rows


def _targets(rows: Sequence[Mapping[str, Any]], on_gpu: bool) -> dict[str, Any]:
    """At least 2x our eager fp16 port on the same card, at least 60 % of the floor; 90 FPS with cached past is an aim."""
    done = [r for r in rows if "median_s" in r]
    out: dict[str, Any] = {
        "counts": on_gpu,
        "why_not": "" if on_gpu else "no GPU: figures of a CPU say nothing about the targets",
    }
    for mode in dict.fromkeys(r["mode"] for r in done):
        mine = [r for r in done if r["mode"] == mode]
        port = next((r for r in mine if r["engine"] == "eager" and r["precision"] == "fp16"), None)
        best = min(mine, key=lambda r: r["median_s"])
        out[mode] = {
            "best": f"{best['engine']} {best['precision']}",
            "fps": best["fps"],
            "times_eager_fp16": None if port is None else port["median_s"] / best["median_s"],
            "share_of_floor": best["share_of_floor"],
        }
    return out


def _train_step(run: Run, config: ModelConfig, device: torch.device, repeats: int) -> dict[str, Any]:
    """Forward, losses, backward, clipping and optimiser on one random batch: the device's part of a training step."""
    model: Any = build_model(config, pretrained=False).to(device).train()
    batch = random_batch(config, batch_size=run.batch_size).to(device)
    optimiser = make_optimiser(model, None, run.optim)
    half = run.precision != "32-true"
    dtype = torch.float16 if run.precision.startswith("16") else torch.bfloat16
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype) if half else nullcontext():
            loss = sum(model.loss(model(batch), batch).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip or 1e9)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    try:
        seconds = statistics.median(_timed(step, device, repeats, warm=2))
    except torch.OutOfMemoryError as error:
        return {"batch_size": run.batch_size, "precision": run.precision, "error": str(error).splitlines()[0]}
    rate = run.batch_size / seconds
    return {
        "batch_size": run.batch_size,
        "precision": run.precision,
        "step_s": seconds,
        "samples_per_s": rate,
        "hours_per_24_epochs": 24 * NUSCENES_TRAIN_ROWS / rate / 3600,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def latency_table(facts: Mapping[str, Any]) -> str:
    """The facts for people."""
    name = facts["run"] + (f" + {facts['method']}" if facts["method"] else "")
    lines = [f"{name} at batch 1 on {facts['device']}, torch {facts['torch']}, median of {facts['repeats']}"]
    lines.append(f"{'mode':<15}{'precision':<11}{'engine':<12}{'ms':>9}{'FPS':>8}{'floor ms':>10}{'share':>8}{'peak GiB':>10}")
    for row in facts["rows"]:
        head = f"{row['mode']:<15}{row['precision']:<11}{row['engine']:<12}"
        if "error" in row:
            lines.append(f"{head}not measured: {row['error']}")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:10.2f}"
        lines.append(
            f"{head}{1e3 * row['median_s']:9.2f}{row['fps']:8.1f}{1e3 * row['floor']['seconds']:10.2f}"
            f"{100 * row['share_of_floor']:7.1f}%{peak}"
        )
        for part, seconds in sorted(row.get("parts_s", {}).items(), key=lambda item: -item[1]):
            floor = row["floor"]["parts"].get(part, {"seconds": 0.0, "flops": 0.0, "bytes": 0.0})
            lines.append(
                f"  {part:<36}{1e3 * seconds:9.2f}{'':>8}{1e3 * floor['seconds']:10.2f}"
                f"   {floor['flops'] / 1e9:.1f} GFLOP, {floor['bytes'] / 2**20:.1f} MiB"
            )
    for mode, value in facts["targets"].items():
        if isinstance(value, Mapping):
            times = "" if value["times_eager_fp16"] is None else f", {value['times_eager_fp16']:.2f}x eager fp16 (target 2x)"
            lines.append(
                f"{mode}: best {value['best']}, {value['fps']:.1f} FPS{times}, "
                f"{100 * value['share_of_floor']:.1f} % of the floor (target 60 %)"
            )
    if facts["targets"]["why_not"]:
        lines.append(facts["targets"]["why_not"])
    lines += [f"published: {what} {value}" for what, value in facts["published"].items()]
    step = facts["train"]
    if step is not None and "error" not in step:
        peak = "" if step["peak_bytes"] is None else f", peak {step['peak_bytes'] / 2**30:.1f} GiB"
        lines.append(
            f"training step, batch {step['batch_size']}, {step['precision']}: {1e3 * step['step_s']:.1f} ms, "
            f"{step['samples_per_s']:.2f} samples/s, {step['hours_per_24_epochs']:.1f} hours for 24 epochs of nuScenes{peak}"
        )
    elif step is not None:
        lines.append(f"training step, batch {step['batch_size']}: not measured: {step['error']}")
    return "\n".join(lines)
