"""BEV pooling and deformable sampling against float64 loops, on random and edge inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imkd_models.attention import DeformableSelfAttention, cell_reference, deformable_sample, direction_bias
from imkd_models.pooling import bev_pool, pillar_max, pillar_mean


def slow_pool(values, index, cells, reduce):
    out, count = np.zeros((cells, values.shape[1])), np.zeros(cells)
    for value, cell in zip(values.double().numpy(), index.tolist(), strict=True):
        if cell >= 0:
            out[cell] += value
            count[cell] += 1
    return out / np.maximum(count, 1)[:, None] if reduce == "mean" else out


CASES = {
    "random": lambda: torch.randint(-3, 17, (500,)).clamp(min=-1),
    "empty": lambda: torch.zeros(0, dtype=torch.long),
    "one cell": lambda: torch.full((200,), 7),
    "all outside": lambda: torch.full((9,), -1),
    "first and last": lambda: torch.tensor([0, 16, 16, 0, -1]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("method", ["plain", "sorted"])
def test_pool_equals_the_loop(case, reduce, method):
    index = CASES[case]()
    values = torch.randn(len(index), 5)
    got = bev_pool(values, index, 17, reduce=reduce, method=method)
    np.testing.assert_allclose(got.numpy(), slow_pool(values, index, 17, reduce), atol=2e-5)


@pytest.mark.parametrize("method", ["plain", "sorted"])
def test_gradient_of_the_mean_is_exact(method):
    index = torch.tensor([0, 2, 2, -1, 4, 2, 0])
    values = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: bev_pool(v, index, 5, method=method), (values,))


def test_uncounted_gradient_changes_only_the_gradient():
    index, values = torch.tensor([0, 2, 2, -1]), torch.randn(4, 3, requires_grad=True)
    right, parity = bev_pool(values, index, 3), bev_pool(values, index, 3, uncounted_gradient=True)
    torch.testing.assert_close(right, parity)
    (a,) = torch.autograd.grad(right.sum(), values)
    (b,) = torch.autograd.grad(parity.sum(), values)
    assert a[:, 0].tolist() == [1, 0.5, 0.5, 0] and b[:, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.gpu
def test_triton_pool_equals_plain_and_its_gradient():
    if not torch.cuda.is_available():
        pytest.skip("gpu: no CUDA device")
    for case in CASES.values():
        index = case().cuda()
        values = torch.randn(len(index), 160, device="cuda", requires_grad=True)
        fast = bev_pool(values, index, 17, method="triton")
        plain = bev_pool(values, index, 17, method="plain")
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
        weight = torch.randn_like(plain)
        (a,) = torch.autograd.grad((fast * weight).sum(), values)
        (b,) = torch.autograd.grad((plain * weight).sum(), values)
        torch.testing.assert_close(a, b)


def test_pillar_maximum_and_mean_of_nothing_are_zero():
    values, pillar = torch.tensor([[1.0, 5], [3, 2]]), torch.tensor([1, 1])
    assert pillar_max(values, pillar, 3).tolist() == [[0, 0], [3, 5], [0, 0]]
    assert pillar_mean(values, pillar, 3).tolist() == [[0, 0], [2, 3.5], [0, 0]]
    assert pillar_max(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 2).tolist() == [[0] * 4] * 2


def slow_bilinear(value, x, y):
    """Zero outside, cell centres at integers."""
    _, ny, nx = value.shape
    x0, y0, out = int(np.floor(x)), int(np.floor(y)), np.zeros(len(value))
    for dy in (0, 1):
        for dx in (0, 1):
            if 0 <= y0 + dy < ny and 0 <= x0 + dx < nx:
                weight = (1 - abs(x - x0 - dx)) * (1 - abs(y - y0 - dy))
                out += weight * value[:, y0 + dy, x0 + dx]
    return out


def test_deformable_sampling_equals_a_float64_loop():
    torch.manual_seed(0)
    batch, queries, heads, points, shapes = 2, 11, 3, 4, ((5, 9), (4, 7))
    values = [torch.randn(batch, 6, ny, nx) for ny, nx in shapes]
    locations = torch.rand(batch, queries, heads, 2, points, 2) * 14 - 3
    locations[0, 0, :, :, :, :] = locations[0, 0].round()  # exactly on cell centres
    locations[0, 1] = -1.0  # exactly one cell outside: weight 0
    locations[0, 2] = 1e4
    weights = torch.randn(batch, queries, heads, 2, points)
    got = deformable_sample(values, locations, weights).numpy()
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                expected = np.zeros(2)
                for level in range(2):
                    value = values[level][b, 2 * h : 2 * h + 2].double().numpy()
                    for p in range(points):
                        x, y = locations[b, q, h, level, p].tolist()
                        expected += float(weights[b, q, h, level, p]) * slow_bilinear(value, x, y)
                np.testing.assert_allclose(got[b, q, 2 * h : 2 * h + 2], expected, atol=1e-4)


@pytest.mark.parametrize("size", [44, 128, 180])
def test_bfloat16_maps_are_sampled_at_exact_places(size):
    """Places in bfloat16 would be up to a sixth of a cell off; only values may be rounded."""
    g = torch.Generator().manual_seed(0)
    value = torch.randn(1, 4, size, size, generator=g)
    places, weight = torch.rand(1, 500, 1, 1, 1, 2, generator=g) * (size - 1), torch.ones(1, 500, 1, 1, 1)
    low = value.bfloat16()
    got, exact = deformable_sample([low], places, weight), deformable_sample([low.double()], places.double(), weight)
    assert float((got - exact).norm() / exact.norm()) < 4e-3


def test_reference_points_and_directions():
    assert cell_reference(2, 3, torch.device("cpu")).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    bias = direction_bias(4, 2, 3).view(4, 2, 3, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        torch.testing.assert_close(bias[:, 1, point], expected * (point + 1))


def test_self_attention_of_a_constant_map_is_constant_inside():
    layer = DeformableSelfAttention(8, heads=4, points=2)
    out = layer(torch.ones(1, 8, 9, 11))
    inner = out[0, :, 3:-3, 3:-3]
    assert out.shape == (1, 8, 9, 11)
    torch.testing.assert_close(inner, inner[:, :1, :1].expand_as(inner), atol=1e-5, rtol=1e-5)
