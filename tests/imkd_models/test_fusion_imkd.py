"""IMKD's stage 3: intensity heads, query and value gates of the fuser against a slow NumPy twin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from batches import make_batch, small_student

from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch
from imkd_models.detector import StudentDetector
from imkd_models.distill import METHODS
from imkd_models.fusion import DeformableFuser, build_fuser

GRID = BevGrid(x_min_m=-6.4, y_min_m=-3.2, cell_m=0.8, nx=8, ny=4)
CAMERA, RADAR, WIDTH, HEADS, POINTS = 6, 10, 8, 2, 3
Arrays = dict[str, np.ndarray]


def _fuser(seed: int = 0, *, given: bool = True, **changes: Any) -> DeformableFuser:
    """Two layers with random weights in every place (``given``), as after training; else as they start."""
    values = {
        "fuser": "intensity",
        "grid": GRID,
        "camera_channels": CAMERA,
        "radar_channels": RADAR,
        "fused_channels": WIDTH,
        "fuser_layers": 2,
        "fuser_heads": HEADS,
        "fuser_points": POINTS,
        "fuser_hidden": 12,
        "trunk_blocks": (1, 1),
    }
    torch.manual_seed(seed)
    fuser = build_fuser(small_student(**{**values, **changes})).eval()
    if given:
        for name, value in fuser.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.5 if "var" in name else 0.6 * torch.randn(value.shape))
    return fuser


def _maps(batch: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    size = torch.tensor([1.0, 4.0])[:batch, None, None, None]
    maps = {"bev_camera": CAMERA, "bev_radar": RADAR}
    return {n: size * torch.randn(batch, c, *GRID.shape, generator=g) + 0.3 for n, c in maps.items()}


# ------------------------------------------------------------------------------------------------------------- slow twins


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _layer_norm(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    """Over the last axis."""
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def _head_logits(x_YXC: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    """h: 3x3 convolution without bias, BatchNorm, ReLU, 1x1 convolution to one channel -> (Y, X)."""
    kernel, (ny, nx, _) = w[f"{name}.0.weight"], x_YXC.shape
    padded = np.pad(x_YXC, ((1, 1), (1, 1), (0, 0)))
    hidden = np.zeros((ny, nx, len(kernel)))
    for y, x in np.ndindex(ny, nx):
        hidden[y, x] = np.einsum("oiyx,yxi->o", kernel, padded[y : y + 3, x : x + 3])
    hidden = (hidden - w[f"{name}.1.running_mean"]) / np.sqrt(w[f"{name}.1.running_var"] + 1e-5)
    hidden = np.maximum(hidden * w[f"{name}.1.weight"] + w[f"{name}.1.bias"], 0)
    return hidden @ w[f"{name}.3.weight"][0, :, 0, 0] + w[f"{name}.3.bias"][0]


def _sample(value_YXC: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear between cell centres, zero outside the map."""
    (ny, nx, channels), c, r = value_YXC.shape, math.floor(x), math.floor(y)
    out = np.zeros(channels)
    for column, row in ((c, r), (c + 1, r), (c, r + 1), (c + 1, r + 1)):
        if 0 <= column < nx and 0 <= row < ny:
            out += (1 - abs(x - column)) * (1 - abs(y - row)) * value_YXC[row, column]
    return out


def _slow_fuser(fuser: DeformableFuser, camera: np.ndarray, radar: np.ndarray, *, gain: float, camera_gate: str) -> Arrays:
    """One sample (Y, X, C) through CRN's aggregation with IMKD's intensity: logits and the fused map (C, Y, X)."""
    w = {n: v.double().numpy() for n, v in fuser.state_dict().items()}
    ny, nx, _ = camera.shape
    camera, radar = _layer_norm(camera, w, "norms.0"), _layer_norm(radar, w, "norms.1")
    logits_c = _head_logits(camera, w, "intensity_camera")  # h_C(bev_camera)
    logits_r = _head_logits(np.concatenate([radar, camera], -1), w, "intensity_radar")  # h_R([bev_radar; bev_camera])
    i_c, i_r = _sigmoid(logits_c)[..., None], _sigmoid(logits_r)[..., None]

    # q = Linear([bev_camera; bev_radar]) + U [I_C; I_R]
    q = (
        _linear(np.concatenate([camera, radar], -1), w, "query")
        + np.concatenate([i_c, i_r], -1) @ w["intensity_query.weight"].T
    )
    half = WIDTH // 2
    position = np.zeros((ny, nx, WIDTH))
    position[..., :half], position[..., half:] = w["columns.weight"][None], w["rows.weight"][:, None]

    for layer in ("layers.0", "layers.1"):
        at = f"{layer}.attention"
        # v_C (1 + gamma I_R) and v_R (1 + gamma I_R); camera_gate=camera: v_C (1 + gamma I_C)
        values = [
            _linear(camera, w, f"{at}.values.0") * (1 + gain * (i_r if camera_gate == "radar" else i_c)),
            _linear(radar, w, f"{at}.values.1") * (1 + gain * i_r),
        ]
        asked, answer, per_head = q + position, np.zeros_like(q), WIDTH // HEADS
        for y, x in np.ndindex(ny, nx):
            offsets = _linear(asked[y, x], w, f"{at}.offsets").reshape(HEADS, 2, POINTS, 2)
            scores = _linear(asked[y, x], w, f"{at}.weights").reshape(HEADS, 2 * POINTS)
            shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)  # over both sensors' points together
            for h, sensor, p in np.ndindex(HEADS, 2, POINTS):
                dx, dy = offsets[h, sensor, p]
                part = slice(h * per_head, (h + 1) * per_head)
                seen = _sample(values[sensor][..., part], x + dx, y + dy)
                answer[y, x, part] += shares[h, sensor * POINTS + p] * seen
        q = _layer_norm(q + answer, w, f"{layer}.norm1")
        hidden = np.maximum(_linear(q, w, f"{layer}.expand"), 0)
        q = _layer_norm(q + _linear(hidden, w, f"{layer}.contract"), w, f"{layer}.norm2")
    return {"bev_intensity_camera": logits_c[None], "bev_intensity_radar": logits_r[None], "bev_fused": q.transpose(2, 0, 1)}


def _slow(fuser: DeformableFuser, maps: dict[str, torch.Tensor], *, gain: float = 1.0, camera_gate: str = "radar") -> Arrays:
    camera, radar = (maps[n].double().numpy().transpose(0, 2, 3, 1) for n in ("bev_camera", "bev_radar"))
    samples = [_slow_fuser(fuser, c, r, gain=gain, camera_gate=camera_gate) for c, r in zip(camera, radar, strict=True)]
    return {n: np.stack([s[n] for s in samples]) for n in samples[0]}


def _run(fuser: DeformableFuser, maps: dict[str, torch.Tensor]) -> Arrays:
    with torch.no_grad():
        return {n: v.numpy() for n, v in fuser(maps).items()}


def _assert_equal(ours: Arrays, expected: Arrays) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("camera_gate", ["radar", "camera"])
@pytest.mark.parametrize("gain", [0.0, 0.4, 1.0, 2.0])
def test_fused_map_and_intensities_equal_the_slow_twin_with_every_gain_and_gate(camera_gate: str, gain: float) -> None:
    fuser, maps = _fuser(gate_gain=gain, camera_gate=camera_gate), _maps()
    ours = _run(fuser, maps)
    _assert_equal(ours, _slow(fuser, maps, gain=gain, camera_gate=camera_gate))
    if gain != 1:
        assert np.abs(ours["bev_fused"] - _run(_fuser(camera_gate=camera_gate), maps)["bev_fused"]).max() > 0.01
    if gain > 0:
        other = "camera" if camera_gate == "radar" else "radar"
        assert np.abs(ours["bev_fused"] - _run(_fuser(gate_gain=gain, camera_gate=other), maps)["bev_fused"]).max() > 0.01


def test_defaults_are_gain_one_with_the_radars_gate_on_both_sensors() -> None:
    fuser, maps = _fuser(), _maps()
    _assert_equal(_run(fuser, maps), _slow(fuser, maps, gain=1.0, camera_gate="radar"))


def test_the_methods_options_reach_the_fuser() -> None:
    method, maps = METHODS["imkd"], _maps()
    for values, gain, gate in (
        ({}, 1.0, "radar"),
        ({"gate_gain": 0.4}, 0.4, "radar"),
        ({"camera_gate": "camera"}, 1.0, "camera"),
    ):
        fuser = _fuser(**method.changes(method.make_options(values)))
        _assert_equal(_run(fuser, maps), _slow(fuser, maps, gain=gain, camera_gate=gate))


def test_u_adds_camera_intensity_by_its_first_and_radar_intensity_by_its_second_column() -> None:
    maps, answers = _maps(), []
    for column in (0, 1, None):
        fuser = _fuser(gate_gain=0.0)  # no gates: U alone
        with torch.no_grad():
            fuser.intensity_query.weight.zero_()
            if column is not None:
                fuser.intensity_query.weight[:, column] = torch.linspace(-2, 2, WIDTH)
        _assert_equal(_run(fuser, maps), _slow(fuser, maps, gain=0.0))
        answers.append(_run(fuser, maps)["bev_fused"])
    assert min(np.abs(answers[i] - answers[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


def test_stage_3_starts_at_intensity_sigma_of_minus_four_without_u_and_with_a_small_gate() -> None:
    """sigma(-4) = .018 where the head sees nothing; U is 0; the head's last bias is the only one of its convolutions."""
    fuser = _fuser(given=False)
    assert fuser.intensity_query.weight.shape == (WIDTH, 2) and fuser.intensity_query.weight.abs().max() == 0
    assert fuser.intensity_query.bias is None
    for head in (fuser.intensity_camera, fuser.intensity_radar):
        assert head[0].bias is None and head[-1].bias.item() == -4.0
        with torch.no_grad():
            empty = torch.sigmoid(head(torch.zeros(1, head[0].in_channels, 3, 3)))
        np.testing.assert_allclose(empty.numpy(), 1 / (1 + np.exp(4.0)), rtol=1e-5)
    maps = _maps()
    _assert_equal(_run(fuser, maps), _slow(fuser, maps))


@pytest.mark.parametrize("camera_gate", ["radar", "camera"])
def test_gradient_reaches_the_intensity_heads_through_query_and_gates(camera_gate: str) -> None:
    """Central differences of the slow twin with respect to the heads' last bias; with U = 0 the gates alone carry it."""
    maps, share = _maps(), torch.randn(2, WIDTH, *GRID.shape, generator=torch.Generator().manual_seed(2))
    for with_u in (True, False):
        fuser = _fuser(camera_gate=camera_gate)
        if not with_u:
            torch.nn.init.zeros_(fuser.intensity_query.weight)
        (fuser(maps)["bev_fused"] * share).sum().backward()
        for head in (fuser.intensity_camera, fuser.intensity_radar):
            total, bias = [], head[-1].bias
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    bias += step
                    total.append((_slow(fuser, maps, camera_gate=camera_gate)["bev_fused"] * share.numpy()).sum())
                    bias -= step
            gradient = 0.0 if bias.grad is None else float(bias.grad)
            assert gradient == pytest.approx((total[0] - total[1]) / 2e-3, rel=2e-3, abs=1e-4)


def test_without_intensity_the_fuser_is_the_twin_without_gates_and_u() -> None:
    guided, maps = _fuser(), _maps()
    plain = _fuser(fuser="deformable")
    plain.load_state_dict({n: v for n, v in guided.state_dict().items() if "intensity" not in n})
    with torch.no_grad():
        guided.intensity_query.weight.zero_()
    expected = _slow(guided, maps, gain=0.0)
    _assert_equal(_run(plain, maps), {"bev_fused": expected["bev_fused"]})


def test_a_coarse_fuser_averages_its_inputs_and_brings_logits_and_map_back_bilinearly() -> None:
    grid = BevGrid(x_min_m=GRID.x_min_m, y_min_m=GRID.y_min_m, cell_m=0.4, nx=16, ny=8)
    fuser, g = _fuser(grid=grid, fuser_stride=2, gate_gain=0.7), torch.Generator().manual_seed(6)
    fine = {n: torch.randn(2, c, *grid.shape, generator=g) for n, c in (("bev_camera", CAMERA), ("bev_radar", RADAR))}
    coarse = {n: v.view(2, -1, GRID.ny, 2, GRID.nx, 2).mean((3, 5)) for n, v in fine.items()}
    expected = {}
    for name, value in _slow(fuser, coarse, gain=0.7).items():
        padded = np.pad(value, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        out = np.zeros((*value.shape[:2], *grid.shape))
        for y, x in np.ndindex(grid.shape):  # the centre of fine cell i lies at (i + .5) / 2 - .5 in coarse cells
            v, u = (y + 0.5) / 2 - 0.5 + 1, (x + 0.5) / 2 - 0.5 + 1
            r, c = int(v), int(u)
            a, b = v - r, u - c
            upper = (1 - b) * padded[..., r, c] + b * padded[..., r, c + 1]
            out[..., y, x] = (1 - a) * upper + a * ((1 - b) * padded[..., r + 1, c] + b * padded[..., r + 1, c + 1])
        expected[name] = out
    _assert_equal(_run(fuser, fine), expected)


def test_intensities_that_leave_the_student_are_those_of_the_current_keyframe(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StudentDetector(small_student(camera=False, radar_encoder="bev", history=(0, -1, -2))).eval()
    fused, names = model.config.fused_channels, ("bev_intensity_camera", "bev_intensity_radar")

    def keyframe(batch: Batch, slot: int) -> tuple[dict[str, torch.Tensor], None]:
        """Every intensity holds the number of its slot."""
        maps = {n: torch.full((2, 1, *model.grid.shape), float(slot)) for n in names}
        return {**maps, "bev_fused": torch.zeros(2, fused, *model.grid.shape)}, None

    monkeypatch.setattr(model, "fused_keyframe", keyframe)
    with torch.no_grad():
        features = model(make_batch(slots=3)).features
    assert all((features[n] == 0).all() for n in names)
