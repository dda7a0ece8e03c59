"""The numbers of the intensity map I_L: slow NumPy twins written from the formulas, one cell at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from distill_fakes import GRID, LIDAR, fake_batch, fake_outputs, generator, planes

from imkd_data.loader.batch import Batch, PointBatch
from imkd_models.distill.intensity import IntensityRule, intensity_maps, log_scale, pooled_reflectance
from imkd_models.outputs import Outputs

STAGES = ("bev_stage1", "bev_stage2")  # on G0 and G1
BRIGHTNESS = (1.0, 0.3, 0.05)  # of the three samples

# Every option of I_L, alone and together.
RULES: list[dict[str, Any]] = [
    {},
    {"rho": 0.6},
    {"rho": 0.0},
    {"max_share": 0.9},
    {"max_share": 0.0},
    {"max_share": 1.0},
    {"full_scale": 100.0},
    {"full_scale": 1000.0, "rho": 0.05},
    {"source": "activation"},
    {"source": "heatmap"},
    {"source": "mix"},
    {"source": "mix", "rho": 0.7, "max_share": 0.1},
    {"control": "occupancy"},
    {"control": "occupancy", "source": "mix"},
    {"control": "other_sample"},
    {"control": "other_sample", "source": "activation"},
    {"normalise": "max"},
    {"normalise": "max", "source": "heatmap"},
    {"threshold": 0.55},
    {"top_fraction": 0.37},
    {"normalise": "max", "threshold": 0.8, "top_fraction": 0.37},
    {"taken_from": "view", "max_share": 0.3},
    {"taken_from": "points", "max_share": 0.3},
]


def name_of(rule: dict[str, Any]) -> str:
    """Test id of a rule."""
    return ",".join(f"{k}={v}" for k, v in rule.items()) or "default"


@cache
def uneven_batch() -> Batch:
    """Three samples of unequal brightness, about half of the coarse cells without return; planes, a view and points."""
    g = generator(11)
    fine = planes(3)
    returned = torch.rand(3, 1, GRID.ny // 2, GRID.nx // 2, generator=g) < 0.5
    fine = fine * returned.repeat_interleave(8, 2).repeat_interleave(8, 3)
    fine[:, [0, 2]] *= torch.tensor(BRIGHTNESS)[:, None, None, None]
    # The view holds a mean and a maximum of its own and counts that saturate, so that nothing is taken from the planes.
    count = (torch.randint(0, 400, (3, *GRID.shape), generator=g) * (torch.rand(3, *GRID.shape, generator=g) < 0.4)).clamp(
        max=255
    )
    high, low = torch.rand(2, 3, *GRID.shape, generator=g).sort(0, descending=True).values
    seen = count > 0
    view = torch.stack([low * seen, high * seen, count.float(), torch.zeros(count.shape)], 1)
    span = torch.tensor([GRID.nx * GRID.cell_m + 4, GRID.ny * GRID.cell_m + 4, 1.0])  # some points lie outside
    number = 900
    points = PointBatch(
        xyz_m=torch.rand(number, 3, generator=g) * span + torch.tensor([GRID.x_min_m - 2, GRID.y_min_m - 2, 0]),
        features_NF=torch.rand(number, 2, generator=g),
        feature_names=("ring", "intensity"),
        batch_index=torch.randint(0, 3, (number,), generator=g),
        time_index=torch.zeros(number, dtype=torch.long),
        age_s=torch.zeros(number),
    )
    maps = {"intensity_planes": fine, "lidar_intensity": view}
    return fake_batch(batch=3, bev_maps=maps, lidar=points)


def uneven_teacher(seed: int = 5) -> Outputs:
    """A LiDAR teacher whose three samples have features of unequal size."""
    outputs = fake_outputs(LIDAR, seed, batch=3)
    size = torch.tensor([1.0, 4.0, 0.2])[:, None, None, None]
    return replace(outputs, features={n: v * size for n, v in outputs.features.items()})


# ------------------------------------------------------------------------------------------------------------ slow twins


def slow_scale(r: float) -> float:
    """g(r) = log(1 + 255 r) / log 256."""
    return float(np.log(1 + 255 * r) / np.log(256))


def slow_pooled(batch: Batch, shape: tuple[int, int], taken_from: str, full_scale: float) -> list[np.ndarray]:
    """Count, r_max and r_mean of all returns in a cell."""
    b, (ny, nx) = len(batch), shape
    k = 4 * GRID.ny // ny if taken_from == "planes" else GRID.ny // ny
    count, top, mean = (np.zeros((b, ny, nx)) for _ in range(3))
    if taken_from == "points":
        cell = GRID.cell_m * GRID.ny / ny
        xy, value = batch.lidar.xyz_m.double().numpy(), batch.lidar.column("intensity").double().numpy()
        for i, sample in enumerate(batch.lidar.batch_index.tolist()):
            x, y = int(np.floor((xy[i, 0] - GRID.x_min_m) / cell)), int(np.floor((xy[i, 1] - GRID.y_min_m) / cell))
            if 0 <= x < nx and 0 <= y < ny:
                count[sample, y, x] += 1
                top[sample, y, x] = max(top[sample, y, x], value[i])
                mean[sample, y, x] += value[i]
        return [count, top, mean / np.maximum(count, 1)]
    name = {"planes": "intensity_planes", "view": "lidar_intensity"}[taken_from]
    fine = batch.bev_maps[name].double().numpy()
    for s, y, x in np.ndindex(b, ny, nx):
        block = fine[s, :3, k * y : k * y + k, k * x : k * x + k]
        if taken_from == "planes":
            total, number, highest = block[0].sum() / full_scale, block[1].sum(), block[2].max() / full_scale
        else:  # mean and maximum in 0..1, saturated count
            total, number, highest = (block[0] * block[2]).sum(), block[2].sum(), block[1].max()
        if number > 0:
            count[s, y, x], top[s, y, x], mean[s, y, x] = number, min(highest, 1.0), min(total / number, 1.0)
    return [count, top, mean]


def slow_reflectance(batch: Batch, shape: tuple[int, int], rho: float, a: float, taken_from: str, full: float) -> np.ndarray:
    """I_L = O (rho + (1 - rho)(a g(r_max) + (1 - a) g(r_mean)))."""
    count, top, mean = slow_pooled(batch, shape, taken_from, full)
    out = np.zeros_like(count)
    for i in np.ndindex(count.shape):
        if count[i] > 0:
            out[i] = rho + (1 - rho) * (a * slow_scale(top[i]) + (1 - a) * slow_scale(mean[i]))
    return out


def slow_activation(feature: torch.Tensor) -> np.ndarray:
    """Mean over channels of |F| over its maximum in the sample."""
    f = feature.detach().double().numpy()
    out = np.zeros((len(f), *f.shape[2:]))
    for s in range(len(f)):
        a = np.abs(f[s]).mean(0)
        out[s] = a / (a.max() + 1e-6)
    return out


def slow_heatmap(teacher: Outputs, shape: tuple[int, int]) -> np.ndarray:
    """Maximum over all classes of sigma(logit), and over the fine cells of a coarse one."""
    logits = np.concatenate([m.heatmap_logits_BKYX.detach().double().numpy() for m in teacher.head], axis=1)
    best = (1 / (1 + np.exp(-logits))).max(1)
    k = GRID.ny // shape[0]
    out = np.zeros((len(best), *shape))
    for s, y, x in np.ndindex(out.shape):
        out[s, y, x] = best[s, k * y : k * y + k, k * x : k * x + k].max()
    return out


def slow_intensity(
    batch: Batch,
    teacher: Outputs,
    stage: str,
    *,
    source: str = "reflectance",
    control: str = "off",
    taken_from: str = "planes",
    rho: float = 0.2,
    max_share: float = 0.5,
    full_scale: float = 255.0,
    normalise: str = "none",
    threshold: float = 0.0,
    top_fraction: float = 1.0,
) -> np.ndarray:
    """I_L (B, 1, Y, X) on the grid of a teacher map; defaults are the published design's (rho .2, a .5)."""
    feature = teacher.features[stage]
    shape = (feature.shape[2], feature.shape[3])
    if control == "occupancy":
        rho = 1.0
    if source in ("reflectance", "mix"):
        reflectance = slow_reflectance(batch, shape, rho, max_share, taken_from, full_scale)
    if source == "reflectance":
        value = reflectance
    elif source == "activation":
        value = slow_activation(feature)
    elif source == "heatmap":
        value = slow_heatmap(teacher, shape)
    elif source == "mix":
        value = slow_activation(feature) * (1 + reflectance) / 2
    if control == "other_sample":
        value = np.stack([value[s - 1] for s in range(len(value))])
    out = np.zeros_like(value)
    for s in range(len(value)):  # normalise, threshold, top fraction, in this order, each sample for itself
        v = value[s] / (value[s].max() + 1e-6) if normalise == "max" else value[s]
        v = np.where(v >= threshold, v, 0.0)
        if top_fraction < 1 and (v > 0).any():
            v = np.where(v >= np.quantile(v[v > 0], 1 - top_fraction), v, 0.0)
        out[s] = v
    return out[:, None]


def _maps(batch: Batch, teacher: Outputs, **rule: Any) -> dict[str, torch.Tensor]:
    return intensity_maps(batch, {n: teacher.features[n] for n in STAGES}, teacher.head, IntensityRule(**rule))


# ----------------------------------------------------------------------------------------------------------------- tests


def test_log_scale_is_log_base_256_of_one_plus_255_r() -> None:
    r = [0.0, 1 / 255, 0.01, 0.3, 15 / 255, 1.0]
    expected = [0.0, 0.125, np.log2(3.55) / 8, np.log2(77.5) / 8, 0.5, 1.0]
    np.testing.assert_allclose(log_scale(torch.tensor(r)).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose([slow_scale(x) for x in r], expected, atol=1e-12)


@pytest.mark.parametrize("taken_from", ["planes", "view", "points"])
@pytest.mark.parametrize("stage", STAGES)
def test_pooled_count_maximum_and_mean_equal_a_loop_over_cells(taken_from: str, stage: str) -> None:
    batch, shape = uneven_batch(), LIDAR[stage][1:]
    pooled = pooled_reflectance(batch, shape, IntensityRule(taken_from=taken_from))
    expected = slow_pooled(batch, shape, taken_from, 255.0)
    assert (expected[0] == 0).any() and (expected[0] > 1).any()
    assert np.abs(expected[1] - expected[2]).max() > 0.05  # maximum and mean are different things here
    for ours, theirs in zip(pooled, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_reflectance_beyond_the_full_scale_counts_as_one() -> None:
    batch = uneven_batch()
    rule = IntensityRule(full_scale=100.0)
    _, maximum, mean = pooled_reflectance(batch, GRID.shape, rule)
    expected = slow_pooled(batch, GRID.shape, "planes", 100.0)
    np.testing.assert_allclose(maximum.numpy(), expected[1], atol=1e-5)
    np.testing.assert_allclose(mean.numpy(), expected[2], atol=1e-5)
    assert maximum.max() == 1.0 and mean.max() == 1.0


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("stage", STAGES)
def test_map_equals_the_slow_twin_and_every_option_changes_it(rule: dict[str, Any], stage: str) -> None:
    batch, teacher = uneven_batch(), uneven_teacher()
    value = _maps(batch, teacher, **rule)[stage].numpy()
    expected = slow_intensity(batch, teacher, stage, **rule)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    plain = slow_intensity(batch, teacher, stage, source=rule.get("source", "reflectance"))
    if set(rule) - {"source"}:
        assert np.abs(value - plain).max() > 0.01
    if rule.get("source") == "mix":
        assert np.abs(value - slow_intensity(batch, teacher, stage, source="activation")).max() > 0.01


def test_a_single_cell_by_hand() -> None:
    """Sum 60 over 3 returns with maximum 51, full scale 255: r_max = .2, r_mean = 20/255; g(.2) = log 52 / log 256."""
    fine = torch.zeros(1, 4, 4 * GRID.ny, 4 * GRID.nx)
    fine[0, :3, 9, 6] = torch.tensor([9.0, 2.0, 6.0])  # both fine cells lie in row 2, column 1
    fine[0, :3, 10, 7] = torch.tensor([51.0, 1.0, 51.0])
    batch = fake_batch(batch=1, bev_maps={"intensity_planes": fine})
    maps = _maps(batch, fake_outputs(LIDAR, 5, batch=1))
    expected = 0.2 + 0.8 * (0.5 * np.log(52) / np.log(256) + 0.5 * np.log(21) / np.log(256))
    for stage, cell in (("bev_stage1", (2, 1)), ("bev_stage2", (1, 0))):
        assert maps[stage][0, 0][cell].item() == pytest.approx(expected, abs=1e-6)
        assert (maps[stage] > 0).sum() == 1


def test_source_none_is_zero_everywhere() -> None:
    for value in _maps(uneven_batch(), uneven_teacher(), source="none").values():
        assert value.abs().max() == 0


def test_activation_keeps_its_small_number_in_the_denominator() -> None:
    """a / (max a + 1e-6): a map of size 1e-6 is halved, not blown up to 1."""
    teacher = uneven_teacher()
    tiny = {n: torch.full_like(v, 1e-6) for n, v in teacher.features.items()}
    for value in _maps(uneven_batch(), replace(teacher, features=tiny), source="activation").values():
        np.testing.assert_allclose(value.numpy(), 0.5, rtol=1e-5)


def test_activation_counts_negative_features_by_their_size() -> None:
    teacher = uneven_teacher()
    signed = {n: torch.randn(v.shape, generator=generator(3)) for n, v in teacher.features.items()}
    teacher = replace(teacher, features=signed)
    for stage, value in _maps(uneven_batch(), teacher, source="activation").items():
        np.testing.assert_allclose(value[:, 0].numpy(), slow_activation(signed[stage]), rtol=1e-5)


def _flipped(batch: Batch) -> Batch:
    maps = {n: v.flip(0) for n, v in batch.bev_maps.items()}
    return replace(batch, bev_maps=maps, timestamp_us_B=batch.timestamp_us_B.flip(0))


@pytest.mark.parametrize("rule", [{}, {"rho": 0.6, "max_share": 0.9}], ids=name_of)
def test_permuted_keeps_cells_and_values_of_each_sample_and_its_order_hangs_on_the_time_stamp(rule: dict[str, Any]) -> None:
    batch, teacher = uneven_batch(), uneven_teacher()
    for stage, value in _maps(batch, teacher, control="permuted", **rule).items():
        plain = slow_intensity(batch, teacher, stage, **rule)
        for ours, theirs in zip(value.numpy(), plain, strict=True):
            assert ((ours > 0) == (theirs > 0)).all()
            np.testing.assert_allclose(np.sort(ours[ours > 0]), np.sort(theirs[theirs > 0]), rtol=1e-5)
            assert (np.abs(ours - theirs)[theirs > 0] > 1e-4).mean() > 0.8  # nearly every value has moved
        turned = _maps(_flipped(batch), teacher, control="permuted", **rule)[stage]
        assert torch.equal(turned.flip(0), value)  # the place in the batch does not matter
        later = replace(batch, timestamp_us_B=batch.timestamp_us_B + 50_000)
        assert not torch.equal(_maps(later, teacher, control="permuted", **rule)[stage], value)


def test_permuted_is_shaped_afterwards() -> None:
    batch, teacher = uneven_batch(), uneven_teacher()
    shaped = {"normalise": "max", "threshold": 0.8, "top_fraction": 0.37}
    mixed, expected = _maps(batch, teacher, control="permuted"), _maps(batch, teacher, control="permuted", **shaped)
    for stage, value in expected.items():
        for ours, plain, whole in zip(
            value.numpy(), mixed[stage].numpy(), slow_intensity(batch, teacher, stage, **shaped), strict=True
        ):
            np.testing.assert_allclose(np.sort(ours.ravel()), np.sort(whole.ravel()), atol=1e-6)
            np.testing.assert_allclose(ours[ours > 0], (plain / (plain.max() + 1e-6))[ours > 0], rtol=1e-5)


def test_a_sample_without_returns_stays_zero_beside_others_under_every_shaping() -> None:
    batch = uneven_batch()
    fine = batch.bev_maps["intensity_planes"].clone()
    fine[1] = 0
    batch, teacher = replace(batch, bev_maps={"intensity_planes": fine}), uneven_teacher()
    rule = {"normalise": "max", "threshold": 0.8, "top_fraction": 0.37}
    for stage, value in _maps(batch, teacher, **rule).items():
        np.testing.assert_allclose(value.numpy(), slow_intensity(batch, teacher, stage, **rule), atol=1e-6)
        assert value[1].abs().max() == 0 and value[0].max() > 0.9


def test_default_rule_is_the_published_design() -> None:
    rule = IntensityRule()
    assert (rule.source, rule.control, rule.taken_from, rule.normalise) == ("reflectance", "off", "planes", "none")
    assert (rule.rho, rule.max_share, rule.full_scale) == (0.2, 0.5, 255.0)
    assert (rule.threshold, rule.top_fraction) == (0.0, 1.0)
