"""Adaptive-Smooth's heterogeneous fusion module against slow twins: formula, start, camera path, sim_drop, rivals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import make_batch, small_student
from torch import Tensor

from imkd_data.errors import RecipeError
from imkd_models.attention import direction_bias
from imkd_models.config import StudentConfig
from imkd_models.detector import StudentDetector
from imkd_models.fusion import HeterogeneousFuser, build_fuser

CAMERA, FUSED = 6, 8
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _config(**changes: Any) -> StudentConfig:
    values = {"fuser": "heterogeneous", "sim_branch": True, "camera_channels": CAMERA, "fused_channels": FUSED}
    return small_student(**{**values, "fuser_heads": 2, "fuser_points": 3, **changes})


def _fuser(**changes: Any) -> HeterogeneousFuser:
    torch.manual_seed(1)
    fuser = build_fuser(_config(**changes))
    assert isinstance(fuser, HeterogeneousFuser)
    return fuser


def _stirred(fuser: HeterogeneousFuser) -> HeterogeneousFuser:
    """Every weight and statistic away from its start, so that each one is seen in the number."""
    g = torch.Generator().manual_seed(2)
    for name, value in fuser.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=g)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else value + 0.3 * noise)
    return fuser.eval()


def _maps(batch: int = 2, rows: int = 3, columns: int = 4, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(batch, CAMERA, rows, columns, generator=g) for n in ("bev_camera", "bev_sim")}


def _norm(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    mean, variance, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    column = (slice(None), None, None)
    return (x - mean[column]) / (variance[column] + 1e-5).sqrt() * weight[column] + bias[column]


def _slow_ends(maps: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """c and p: ReLU(BN(Conv3x3(map)))."""
    c = F.conv2d(maps["bev_camera"].double(), state["camera.0.weight"], padding=1)
    p = F.conv2d(maps["bev_sim"].double(), state["sim.0.weight"], padding=1)
    return _norm(c, state, "camera.1").clamp(min=0), _norm(p, state, "sim.1").clamp(min=0)


def _slow_gated(p: Tensor, c: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """g p with g = sigmoid(Conv3x3[c; p; |c - p|] + b0), the three inputs one after the other."""
    kernels = state["gate.weight"].split(FUSED, dim=1)
    total = state["gate.bias"][:, None, None]
    for x, kernel in zip((c, p, torch.maximum(c, p) - torch.minimum(c, p)), kernels, strict=True):
        total = total + F.conv2d(x, kernel, padding=1)
    return p / (1 + torch.exp(-total))


def _slow_attended(p: Tensor, c: Tensor, state: Mapping[str, Tensor], heads: int, points: int) -> Tensor:
    """Deformable cross-attention, query c and value p: one cell, head and point at a time; zero outside the map."""
    value = torch.einsum("oc,bcyx->boyx", state["attention.values.0.weight"], p)
    value = value + state["attention.values.0.bias"][:, None, None]
    out, width = torch.zeros_like(c), FUSED // heads
    for b, y, x in np.ndindex(c.shape[0], *c.shape[2:]):
        query = c[b, :, y, x]
        offsets = state["attention.offsets.weight"] @ query + state["attention.offsets.bias"]
        logits = state["attention.weights.weight"] @ query + state["attention.weights.bias"]
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            share = torch.softmax(logits.view(heads, points)[h], dim=0)
            for k in range(points):
                dx, dy = offsets.view(heads, points, 2)[h, k].tolist()
                out[b, own, y, x] += share[k] * _bilinear(value[b, own], y + dy, x + dx)
    return out


def _bilinear(value: Tensor, y: float, x: float) -> Tensor:
    total = torch.zeros(len(value), dtype=value.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < value.shape[1] and 0 <= column < value.shape[2]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * value[:, row, column]
    return total


@pytest.mark.parametrize("added", ["gated", "attended"])
def test_fused_map_equals_a_slow_twin(added: str) -> None:
    """bev_fused = ReLU(BN(c + Conv1x1(added))); outputs on both sides of the ReLU."""
    fuser, maps = _stirred(_fuser(sim_added=added)), _maps()
    state = {k: v.double() for k, v in fuser.state_dict().items()}
    with torch.no_grad():
        fused = fuser(maps)["bev_fused"]
    c, p = _slow_ends(maps, state)
    evidence = _slow_gated(p, c, state) if added == "gated" else _slow_attended(p, c, state, heads=2, points=3)
    mixed = c + torch.einsum("oc,bcyx->boyx", state["add.weight"][:, :, 0, 0], evidence)
    expected = _norm(mixed, state, "norm").clamp(min=0)
    assert evidence.abs().mean() > 0.1 and 0.1 < (expected > 0).double().mean() < 0.9
    np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-5)


def _gate_of(fuser: HeterogeneousFuser, maps: Mapping[str, Tensor]) -> Tensor:
    seen = []
    handle = fuser.gate.register_forward_hook(lambda module, inputs, output: seen.append(torch.sigmoid(output.detach())))
    fuser(maps)
    handle.remove()
    return seen[0]


def test_gate_starts_nearly_closed_and_its_bias_is_a_setting() -> None:
    """b0 = -2: mean g 0.12 +- 0.03; the rival b0 = 0: one half. All channels start alike."""
    maps = _maps(8, 10, 12)
    closed, rival = _fuser(), _fuser(sim_gate_bias=0.0)
    assert closed.gate.bias.unique().tolist() == [-2.0] and rival.gate.bias.unique().tolist() == [0.0]
    assert float(_gate_of(closed, maps).mean()) == pytest.approx(0.12, abs=0.03)
    assert float(_gate_of(rival, maps).mean()) == pytest.approx(0.5, abs=0.05)
    for fuser, start in ((closed, 1 / (1 + math.exp(2))), (rival, 0.5)):
        torch.nn.init.zeros_(fuser.gate.weight)
        assert float(_gate_of(fuser, maps).mean()) == pytest.approx(start, rel=1e-5)


@pytest.mark.parametrize("added", ["gated", "attended"])
def test_last_convolution_starts_at_a_tenth_and_has_no_bias(added: str) -> None:
    """The library's start is uniform in +- 1 / sqrt(C); ours is a tenth of that."""
    fuser = _fuser(sim_added=added, fused_channels=64)
    limit = 1 / math.sqrt(64)
    assert fuser.add.bias is None and fuser.add.weight.shape == (64, 64, 1, 1)
    assert 0.098 * limit < float(fuser.add.weight.detach().abs().max()) <= 0.1 * limit
    assert float(fuser.add.weight.detach().std()) == pytest.approx(0.1 * limit / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("closed", ["gate", "add"])
def test_without_evidence_only_the_camera_is_left(closed: str) -> None:
    """g forced to 0, or the last convolution: ReLU(BN(c)), bit-identical for any bev_sim."""
    fuser, maps = _stirred(_fuser()), _maps()
    with torch.no_grad():
        open_gate = fuser(maps)["bev_fused"]
        if closed == "gate":
            fuser.gate.weight.zero_()
            fuser.gate.bias.fill_(-1e4)
        else:
            fuser.add.weight.zero_()
        fused = fuser(maps)["bev_fused"]
        other = fuser({**maps, "bev_sim": 100 * torch.randn(2, CAMERA, 3, 4)})["bev_fused"]
    state = {k: v.double() for k, v in fuser.state_dict().items()}
    c, _ = _slow_ends(maps, state)
    np.testing.assert_allclose(fused, _norm(c, state, "norm").clamp(min=0), rtol=1e-5, atol=1e-5)
    assert torch.equal(fused, other) and (fused - open_gate).abs().max() > 0.1


@pytest.mark.parametrize("added", ["gated", "attended"])
def test_first_step_reaches_both_branches(added: str) -> None:
    maps = {k: v.requires_grad_() for k, v in _maps().items()}
    fuser = _fuser(sim_added=added)
    weight = torch.randn(2, FUSED, 3, 4)
    (fuser(maps)["bev_fused"] * weight).sum().backward()
    assert all(v.grad.abs().mean() > 1e-4 for v in maps.values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fuser.parameters())


def _added(fuser: HeterogeneousFuser, maps: Mapping[str, Tensor]) -> Tensor:
    """What reaches the last convolution."""
    seen = []
    handle = fuser.add.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    fuser(maps)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("added", ["gated", "attended"])
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_sim_drop_zeroes_its_share_of_samples_in_training_only(share: float, added: str) -> None:
    """Whole samples, the others as they are (not made larger)."""
    maps = _maps(4000, 1, 2)
    dropping, plain = _fuser(sim_drop=share, sim_added=added).train(), _fuser(sim_added=added).train()
    for fuser in (dropping, plain):
        torch.nn.init.ones_(fuser.sim[1].bias)  # evidence of every sample is away from zero
    found, whole = _added(dropping, maps), _added(plain, maps)
    zeroed = (found == 0).flatten(1).all(1)
    assert not (whole == 0).flatten(1).all(1).any()
    assert float(zeroed.float().mean()) == pytest.approx(share, abs=0.03)  # four standard deviations
    assert torch.equal(found[~zeroed], whole[~zeroed])
    kept = _added(dropping.eval(), maps)
    assert torch.equal(kept, _added(plain.eval(), maps)) and not (kept == 0).flatten(1).all(1).any()


def test_no_share_is_dropped_by_default() -> None:
    assert _config().sim_drop == 0.0
    fuser, maps = _fuser().train(), _maps(200, 1, 2)
    torch.nn.init.ones_(fuser.sim[1].bias)
    assert not (_added(fuser, maps) == 0).flatten(1).all(1).any()


# ------------------------------------------------------------------------------------------------------------- settings


def test_defaults_keep_weights_names_and_older_configurations() -> None:
    """A configuration saved before the settings were there is today's default, and its weights still fit."""
    config = _config()
    older = {k: v for k, v in json.loads(json.dumps(config.as_dict())).items() if k not in ("sim_gate_bias", "sim_added")}
    assert StudentConfig.from_dict(older) == config
    assert (config.sim_gate_bias, config.sim_added) == (-2.0, "gated")
    shapes = {k: tuple(v.shape) for k, v in _fuser().state_dict().items() if not k.endswith(BUFFERS)}
    norms = {f"{n}.{k}": (FUSED,) for n in ("camera.1", "sim.1", "norm") for k in ("weight", "bias")}
    assert shapes == {
        "camera.0.weight": (FUSED, CAMERA, 3, 3),
        "sim.0.weight": (FUSED, CAMERA, 3, 3),
        "gate.weight": (FUSED, 3 * FUSED, 3, 3),
        "gate.bias": (FUSED,),
        "add.weight": (FUSED, FUSED, 1, 1),
        **norms,
    }
    chosen = _config(sim_gate_bias=0.0, sim_added="attended", sim_drop=0.1)
    assert StudentConfig.from_dict(json.loads(json.dumps(chosen.as_dict()))) == chosen


def test_attention_replaces_the_gate_and_starts_as_an_even_mean() -> None:
    fuser = _fuser(sim_added="attended")
    assert not hasattr(fuser, "gate") and not any(k.startswith("gate") for k in fuser.state_dict())
    assert torch.equal(fuser.attention.offsets.bias.detach(), direction_bias(2, 1, 3))
    assert not fuser.attention.weights.weight.any() and not fuser.attention.offsets.weight.any()
    assert fuser.attention.dropout.p == 0


def test_an_unknown_form_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="sim_added") as caught:
        _config(sim_added="summed")
    assert caught.value.details["expected"] == "gated | attended"


def test_a_student_with_attention_trains() -> None:
    torch.manual_seed(0)
    model, batch = StudentDetector(_config(sim_added="attended", sim_drop=0.1)), make_batch()
    out = model(batch)
    assert {k: tuple(v.shape[1:]) for k, v in out.features.items()} == model.feature_shapes
    sum(model.loss(out, batch).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.fuser.parameters())
    assert model.fuser.attention.offsets.weight.grad.abs().max() > 0
