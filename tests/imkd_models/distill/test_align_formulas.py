"""AOA and its rivals against slow NumPy twins written from the formulas, with every parameter away from its start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from distill_fakes import generator
from distill_twins import Array, array, bilinear, conv, parameters_of
from torch import Tensor, nn

from imkd_models.distill import METHODS
from imkd_models.distill.align import ALIGNERS, Aoa, Projector
from imkd_models.distill.dual_distill import DualDistill

SOURCE, TARGET = (16, 5, 6), (10, 10, 12)  # student stage, teacher stage: C, Y, X


def _options(**values: Any) -> Any:
    return METHODS["dual_distill"].make_options(values)


def _shaken(module: nn.Module) -> nn.Module:
    """Every parameter away from 0 and 1, so that none can be left out unnoticed."""
    g = generator(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return module


def _module(kind: str, source: tuple[int, int, int] = SOURCE, **values: Any) -> nn.Module:
    torch.manual_seed(0)
    return _shaken(ALIGNERS[kind](source, TARGET, _options(**values)))


def _input(source: tuple[int, int, int] = SOURCE) -> Tensor:
    return torch.randn(2, *source, generator=generator(1))


def _close(ours: Tensor, twin: Array) -> None:
    np.testing.assert_allclose(array(ours), twin, rtol=1e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------------ twins


def _batch_norm_relu(x: Array, weight: Array, bias: Array) -> Array:
    """Statistics of this batch, then ReLU."""
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return np.maximum(weight[:, None, None] * (x - mean) / np.sqrt(var + 1e-5) + bias[:, None, None], 0)


def _layer_norm(y_NC: Array, weight: Array, bias: Array) -> Array:
    mean, var = y_NC.mean(-1, keepdims=True), y_NC.var(-1, keepdims=True)
    return weight * (y_NC - mean) / np.sqrt(var + 1e-5) + bias


def _pooled(x: Array, factor: int) -> Array:
    """Mean of factor x factor cells; border cells over what they have."""
    ny, nx = x.shape[-2:]
    rows = [[x[:, :, i : i + factor, j : j + factor].mean((2, 3)) for j in range(0, nx, factor)] for i in range(0, ny, factor)]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _attention(query: Array, key: Array, value: Array, heads: int, scale: float) -> Array:
    """softmax(scale q k / sqrt(C / heads)) v, one head after the other; all (tokens, C)."""
    width, out = query.shape[1] // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        logits = scale * query[:, part] @ key[:, part].T / np.sqrt(width)
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        out.append(share @ value[:, part])
    return np.concatenate(out, axis=1)


def _cayley(raw: Array, base: Array) -> Array:
    """base (1 - A/2)^-1 (1 + A/2), first columns, with the skew A of the raw parameter's lower triangle."""
    wide = raw.shape[0] < raw.shape[1]
    tall = np.tril(raw.T if wide else raw)
    n, k = tall.shape
    square = np.concatenate([tall, np.zeros((n, n - k))], axis=1)
    skew, one = square - square.T, np.eye(n)
    turned = base @ (np.linalg.inv(one - skew / 2) @ (one + skew / 2))[:, :k]
    return turned.T if wide else turned


def _projected(p: dict[str, Array], y: Array, prefix: str = "projector.") -> Array:
    """S = g (P y) + b a cell."""
    if f"{prefix}project.weight" in p:
        matrix = p[f"{prefix}project.weight"]
    else:
        parts = (p[f"{prefix}project.parametrizations.weight.{n}"] for n in ("original", "0.base"))
        matrix = _cayley(*parts)
    s = np.einsum("oc,bcyx->boyx", matrix, y)
    return p[f"{prefix}gain"][:, None, None] * s + p[f"{prefix}bias"][:, None, None]


def _aoa(
    p: dict[str, Array],
    x: Array,
    *,
    heads: int = 8,
    scale: float = 1,
    align_corners: bool = True,
    pool: int = 1,
    skip: bool = False,
) -> Array:
    """Z = ReLU(BN(conv X)) + P_pos; Q = ReLU(linear E); Y = LN(MHA(Q, Z, Z)); Y + W2 ReLU(W1 Y); up; S = g (P y) + b."""

    def linear(name: str, value: Array) -> Array:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    entered = conv(_pooled(x, pool), p["enter.0.weight"])
    z = _batch_norm_relu(entered, p["enter.1.weight"], p["enter.1.bias"]) + p["position"]
    batch, channels, ny, nx = z.shape
    query = linear("query", np.maximum(linear("to_query", p["embedding"]), 0))
    out = []
    for sample in range(batch):
        tokens = z[sample].reshape(channels, ny * nx).T
        y = linear("output", _attention(query, linear("key", tokens), linear("value", tokens), heads, scale))
        y = _layer_norm(y, p["norm.weight"], p["norm.bias"])
        y = y + linear("contract", np.maximum(linear("expand", y), 0))
        out.append(y.T.reshape(channels, ny, nx))
    up = bilinear(np.stack(out), TARGET[1:], align_corners)
    if skip:
        up = up + bilinear(x, TARGET[1:], align_corners)
    return _projected(p, up)


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize(
    ("options", "twin"),
    [
        ({}, {}),
        ({"attention_heads": 2}, {"heads": 2}),
        ({"softmax_scale": 5.0}, {"scale": 5}),
        ({"align_corners": False}, {"align_corners": False}),
        ({"skip": True}, {"skip": True}),
        ({"max_tokens": 12}, {"pool": 2}),
        ({"max_tokens": 12, "skip": True}, {"pool": 2, "skip": True}),
    ],
)
def test_aoa_equals_its_formula_under_every_option(options: dict[str, Any], twin: dict[str, Any]) -> None:
    module, x = _module("aoa", **options), _input()
    p, out = parameters_of(module), module(x)
    _close(out, _aoa(p, array(x), **twin))
    if options and module.pool == 1:  # the same parameters under the default options give something else
        assert (out - _module("aoa")(x)).abs().max() > 1e-2


def test_aoa_without_the_orthogonal_map_has_a_free_matrix() -> None:
    module, x = _module("attn_only"), _input()
    _close(module(x), _aoa(parameters_of(module), array(x)))
    w = module.projector.project.weight
    assert (w @ w.T - torch.eye(len(w))).abs().max() > 0.1


def test_heads_fall_to_a_divisor_of_the_width() -> None:
    source = (12, 5, 6)
    module, x = _module("aoa", source), _input(source)
    _close(module(x), _aoa(parameters_of(module), array(x), heads=6))


@pytest.mark.parametrize("align_corners", [True, False])
def test_rival_aligners_equal_their_formulas(align_corners: bool) -> None:
    """conv1: 1x1 convolution, up. ortho_only: up, orthogonal projection. up3conv: up, three times 1x1 conv-BN-ReLU."""
    x = _input()
    up = bilinear(array(x), TARGET[1:], align_corners)

    module = _module("conv1", align_corners=align_corners)
    p = parameters_of(module)
    _close(module(x), bilinear(conv(array(x), p["conv.weight"], p["conv.bias"]), TARGET[1:], align_corners))

    module = _module("ortho_only", align_corners=align_corners)
    _close(module(x), _projected(parameters_of(module), up))

    module = _module("up3conv", align_corners=align_corners)
    p, y = parameters_of(module), up
    assert len(module.body) == 9
    for i in (0, 3, 6):
        y = _batch_norm_relu(conv(y, p[f"body.{i}.weight"]), p[f"body.{i + 1}.weight"], p[f"body.{i + 1}.bias"])
    _close(module(x), y)


@pytest.mark.parametrize(("cin", "cout"), [(9, 5), (5, 9), (6, 6)])
def test_projector_is_the_cayley_map_of_its_parameter_with_gain_and_bias(cin: int, cout: int) -> None:
    torch.manual_seed(0)
    projector = Projector(cin, cout)
    start = projector.project.weight.detach()
    assert (projector.gain == 1).all() and (projector.bias == 0).all() and start.std() > 0.1
    _shaken(projector)
    p, x = parameters_of(projector), torch.randn(2, cin, 3, 4, generator=generator(1))
    matrix = _cayley(p["project.parametrizations.weight.original"], p["project.parametrizations.weight.0.base"])
    small = matrix @ matrix.T if cout <= cin else matrix.T @ matrix
    np.testing.assert_allclose(small, np.eye(min(cin, cout)), atol=1e-6)
    _close(projector(x), _projected(p, array(x), prefix=""))
    assert np.abs(matrix - array(start)).max() > 0.05


def test_projection_is_float32_under_autocast() -> None:
    module, x = _module("ortho_only"), _input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32
    _close(out, _projected(parameters_of(module), bilinear(array(x), TARGET[1:], True)))


def test_start_values_of_the_aligner() -> None:
    """P_pos 0, E standard normal, g 1, b 0."""
    torch.manual_seed(0)
    module = Aoa((32, 20, 20), (8, 20, 20), _options())
    assert not module.position.any() and module.position.shape == (1, 32, 20, 20)
    assert module.embedding.shape == (400, 32)
    embedding = array(module.embedding)
    assert embedding.mean() == pytest.approx(0, abs=0.03) and embedding.std() == pytest.approx(1, abs=0.03)
    assert (module.projector.gain == 1).all() and (module.projector.bias == 0).all()


PUBLISHED_TEACHER = {"bev_stage0": (64, 256, 256), "bev_stage1": (128, 128, 128), "bev_stage2": (256, 64, 64)}
PUBLISHED_TEACHER["bev_neck"] = (384, 128, 128)
STUDENTS = {
    "two-frame camera": {"bev_stage0": (128, 64, 64), "bev_stage1": (256, 32, 32), "bev_stage2": (512, 16, 16)},
    "camera-radar": {"bev_stage0": (160, 64, 64), "bev_stage1": (320, 32, 32), "bev_stage2": (640, 16, 16)},
}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(("level", "tokens"), [("bev_stage1", (32, 32)), ("bev_stage2", (16, 16)), ("bev_stage0", (32, 32))])
def test_published_shapes_reach_the_teachers(student: str, level: str, tokens: tuple[int, int]) -> None:
    """Stage 0 has 4096 cells, above ``max_tokens``: pooled by 2."""
    source, target = STUDENTS[student][level], PUBLISHED_TEACHER[level]
    module = Aoa(source, target, _options()).eval()
    assert module.tokens == tokens and module.heads == 8
    with torch.no_grad():
        out = module(torch.rand(1, *source))
    assert out.shape == (1, *target) and bool(out.isfinite().all())


def test_published_neck_reaches_the_teachers_width_by_one_convolution_with_bias() -> None:
    shapes = {**STUDENTS["camera-radar"], "bev_neck": (256, 128, 128)}
    distiller = DualDistill(_options(levels=("bev_neck",)), shapes, PUBLISHED_TEACHER, None)
    assert distiller.neck.weight.shape == (384, 256, 1, 1) and distiller.neck.bias is not None
    with torch.no_grad():
        assert distiller.neck(torch.rand(1, 256, 128, 128)).shape == (1, 384, 128, 128)


def test_input_reaches_the_output_only_through_keys_and_values() -> None:
    """No residual from the input: with the value's weight 0 all inputs give the same map."""
    module = _module("aoa").eval()
    with torch.no_grad():
        module.value.weight.zero_()
        a, b = module(_input()), module(_input() + 1)
    assert torch.allclose(a, b, atol=1e-5)
