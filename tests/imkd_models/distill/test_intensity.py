"""The intensity map: pooling, log scale, sources, controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distill_fakes import GRID, LIDAR, fake_batch, fake_outputs, planes

from imkd_data.errors import MismatchError, MissingFeatureError
from imkd_data.loader.batch import PointBatch
from imkd_models.distill.intensity import CONTROLS, SOURCES, IntensityRule, intensity_maps, log_scale, pooled_reflectance

G0, G1 = GRID.shape, GRID.coarser(2).shape


def _maps(batch, **rule):
    outputs = fake_outputs(LIDAR, 5, batch=len(batch))
    wanted = {n: outputs.features[n] for n in ("bev_stage1", "bev_stage2")}
    return intensity_maps(batch, wanted, outputs.head, IntensityRule(**rule))


def test_log_scale_maps_the_ends_to_the_ends() -> None:
    r = torch.linspace(0, 1, 50)
    g = log_scale(r)
    assert g[0] == 0 and g[-1] == pytest.approx(1.0) and (g.diff() > 0).all()


def test_pooling_planes_to_g1_equals_planes_to_g0_to_g1() -> None:
    batch = fake_batch()
    rule = IntensityRule()
    count0, max0, mean0 = pooled_reflectance(batch, G0, rule)
    count1, max1, mean1 = pooled_reflectance(batch, G1, rule)

    def fold(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), G1[0], 2, G1[1], 2)

    assert torch.equal(count1, fold(count0).sum((2, 4)))
    assert torch.equal(max1, fold(max0).amax((2, 4)))
    total = fold(mean0 * count0).sum((2, 4))
    assert torch.allclose(mean1 * count1, total, atol=1e-4)
    assert not torch.allclose(mean1, fold(mean0).mean((2, 4)), atol=1e-2)  # never a mean of means


def test_planes_equal_a_slow_loop() -> None:
    fine = planes()
    count, maximum, mean = pooled_reflectance(fake_batch(), G0, IntensityRule())
    for b, row, column in ((0, 0, 0), (1, 23, 31), (0, 7, 19), (1, 12, 3)):
        block = fine[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        n = float(block[1].sum())
        assert count[b, row, column] == n
        assert maximum[b, row, column] == pytest.approx(float(block[2].max()) / 255)
        assert mean[b, row, column] == pytest.approx(float(block[0].sum()) / 255 / max(n, 1), abs=1e-6)


def test_map_is_zero_in_empty_cells_between_rho_and_one_elsewhere() -> None:
    batch = fake_batch()
    count, _, _ = pooled_reflectance(batch, G0, IntensityRule())
    value = _maps(batch)["bev_stage1"][:, 0]
    assert (value[count == 0] == 0).all() and (count == 0).any()
    assert value[count > 0].min() >= 0.2 and value.max() <= 1


def test_map_grows_with_reflectance() -> None:
    batch = fake_batch()
    dark = batch.bev_maps["intensity_planes"] * torch.tensor([0.5, 1.0, 0.5, 1.0])[None, :, None, None]
    bright = _maps(batch)["bev_stage1"]
    darker = _maps(replace(batch, bev_maps={"intensity_planes": dark}))["bev_stage1"]
    assert (bright >= darker).all() and (bright > darker).any()


def test_view_equals_planes_up_to_its_rounding_and_is_exact_on_counts_below_255() -> None:
    batch = fake_batch()
    count, maximum, mean = pooled_reflectance(batch, G0, IntensityRule())
    view = torch.stack([torch.round(mean * 255) / 255, maximum, count.clamp(max=255), torch.zeros_like(mean)], 1)
    batch = replace(batch, bev_maps={**batch.bev_maps, "lidar_intensity": view})
    rule = IntensityRule(taken_from="view")
    for shape in (G0, G1):
        exact, stored = pooled_reflectance(batch, shape, IntensityRule()), pooled_reflectance(batch, shape, rule)
        assert torch.equal(exact[0], stored[0]) and torch.allclose(exact[1], stored[1])
        assert (exact[2] - stored[2]).abs().max() <= 0.5 / 255 + 1e-6


def _as_points(fine: torch.Tensor) -> PointBatch:
    """One point at each fine cell's centre for its maximum, the rest of its count sharing the remaining sum."""
    step = GRID.cell_m / 4
    xyz, value, sample = [], [], []
    for b, row, column in (fine[:, 1] > 0).nonzero().tolist():
        total, count, maximum, _ = fine[b, :, row, column].tolist()
        rest = [(total - maximum) / (count - 1)] * int(count - 1) if count > 1 else []
        for v in (maximum, *rest):
            xyz.append((GRID.x_min_m + (column + 0.5) * step, GRID.y_min_m + (row + 0.5) * step, 0.0))
            value.append((v / 255, 0.0))
            sample.append(b)
    return PointBatch(
        xyz_m=torch.tensor(xyz),
        features_NF=torch.tensor(value),
        feature_names=("intensity", "ring"),
        batch_index=torch.tensor(sample),
        time_index=torch.zeros(len(sample), dtype=torch.long),
        age_s=torch.zeros(len(sample)),
    )


def test_points_equal_planes() -> None:
    batch = fake_batch()
    batch = replace(batch, lidar=_as_points(batch.bev_maps["intensity_planes"]))
    for shape in (G0, G1):
        exact = pooled_reflectance(batch, shape, IntensityRule())
        points = pooled_reflectance(batch, shape, IntensityRule(taken_from="points"))
        for a, b in zip(exact, points, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_missing_part_and_grids_that_do_not_pool_are_refused() -> None:
    batch = fake_batch()
    with pytest.raises(MissingFeatureError, match="intensity_planes"):
        _maps(replace(batch, bev_maps={}))
    with pytest.raises(MissingFeatureError, match="points"):
        _maps(replace(batch, lidar=None), taken_from="points")
    with pytest.raises(MismatchError, match="pool"):
        pooled_reflectance(batch, (7, 9), IntensityRule())


def test_empty_lidar_gives_a_zero_map() -> None:
    batch = fake_batch()
    batch = replace(batch, bev_maps={"intensity_planes": torch.zeros_like(batch.bev_maps["intensity_planes"])})
    for source in SOURCES[:1]:
        assert _maps(batch, source=source)["bev_stage2"].abs().max() == 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("control", CONTROLS)
def test_every_source_and_control_stays_in_the_unit_interval_without_gradient(source: str, control: str) -> None:
    for name, value in _maps(fake_batch(), source=source, control=control).items():
        assert value.shape == (2, 1, *LIDAR[name][1:])
        assert value.min() >= 0 and value.max() <= 1 and not value.requires_grad


def test_controls_change_what_they_name() -> None:
    batch = fake_batch()
    plain = _maps(batch)["bev_stage1"]
    occupancy = _maps(batch, control="occupancy")["bev_stage1"]
    assert torch.equal(occupancy, (plain > 0).float())
    permuted = _maps(batch, control="permuted")["bev_stage1"]
    assert not torch.equal(permuted, plain) and torch.equal(permuted > 0, plain > 0)
    assert torch.equal(permuted.flatten(1).sort(1).values, plain.flatten(1).sort(1).values)
    assert torch.equal(permuted, _maps(batch, control="permuted")["bev_stage1"])  # the same order in every step
    other = _maps(batch, control="other_sample")["bev_stage1"]
    assert torch.equal(other[0], plain[1]) and torch.equal(other[1], plain[0])
    with pytest.raises(MismatchError, match="two samples"):
        _maps(fake_batch(batch=1), control="other_sample")


def test_threshold_fraction_and_normalisation() -> None:
    batch = fake_batch()
    plain = _maps(batch)["bev_stage1"]
    kept = _maps(batch, threshold=0.6)["bev_stage1"]
    assert torch.equal(kept, torch.where(plain >= 0.6, plain, 0.0)) and (kept > 0).any()
    top = _maps(batch, top_fraction=0.25)["bev_stage1"]
    share = (top > 0).sum((1, 2, 3)) / (plain > 0).sum((1, 2, 3))
    assert ((share - 0.25).abs() < 0.02).all() and top[top > 0].min() >= plain[(plain > 0) & (top == 0)].min()
    scaled = _maps(batch, normalise="max")["bev_stage1"]
    assert torch.allclose(scaled.amax((1, 2, 3)), torch.ones(2), atol=1e-5)


def test_heatmap_source_takes_the_maximum_on_the_coarse_grid() -> None:
    maps = _maps(fake_batch(), source="heatmap")
    fine = maps["bev_stage1"].view(2, 1, G1[0], 2, G1[1], 2).amax((3, 5))
    assert torch.equal(maps["bev_stage2"], fine)
