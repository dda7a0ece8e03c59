"""Head: targets, loss, decoding, suppression, attributes; each against a slow twin or a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from batches import ODD_GRID, make_boxes
from shapely.geometry import Polygon

from imkd_data.classes import ATTRIBUTES, CLASS_GROUPS, DETECTION_CLASSES
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import BoxBatch
from imkd_models.decode import greedy_keep, rotated_nms
from imkd_models.head import (
    BOX_VALUES,
    CentreHead,
    DecodeOptions,
    LossOptions,
    attributes_from,
    centre_targets,
    circle_nms,
    decode,
    detection_loss,
    gaussian_radius,
    rotated_iou,
)
from imkd_models.outputs import HeadMaps


def one_box(xy, label=0, size=(4.0, 2.0, 1.5), yaw=0.3, velocity=(1.0, -2.0), valid=True) -> BoxBatch:
    return BoxBatch(
        centre_m_BM3=torch.tensor([[[*xy, 0.7]]]),
        size_lwh_m_BM3=torch.tensor([[size]]),
        yaw_rad_BM=torch.tensor([[yaw]]),
        velocity_mps_BM2=torch.tensor([[velocity]]),
        label_BM=torch.tensor([[label]]),
        valid_BM=torch.tensor([[valid]]),
    )


def random_head(batch=2, grid=ODD_GRID, seed=0) -> tuple[HeadMaps, ...]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return CentreHead(6, shared_channels=4, branch_channels=4).maps(torch.randn(batch, 6, *grid.shape))


def perfect_head(boxes: BoxBatch, grid: BevGrid) -> tuple[HeadMaps, ...]:
    """Maps that say exactly what the truth says."""
    targets = centre_targets(boxes, grid)
    batch, head, first = len(boxes.valid_BM), [], 0
    for group in CLASS_GROUPS:
        heat = targets.heatmap_BKYX[:, first : first + len(group)].clamp(1e-6, 1 - 1e-6)
        maps = torch.zeros(batch, 10, *grid.shape)
        for b, m in targets.valid_BM.nonzero().tolist():
            if first <= targets.channel_BM[b, m] < first + len(group):
                values = torch.nan_to_num(targets.values_BMD[b, m])
                maps[b, :, targets.row_BM[b, m], targets.column_BM[b, m]] = values
        parts = maps.split([n for _, n in BOX_VALUES], dim=1)
        named = {name: part for (name, _), part in zip(BOX_VALUES, parts, strict=True)}
        head.append(HeadMaps(classes=group, heatmap_logits_BKYX=torch.logit(heat), **named))
        first += len(group)
    return tuple(head)


def test_radius_equals_the_public_scalar_formula():
    def slow(length, width, overlap=0.1):
        b1 = length + width
        c1 = width * length * (1 - overlap) / (1 + overlap)
        r1 = (b1 + math.sqrt(b1**2 - 4 * c1)) / 2
        b2, c2 = 2 * (length + width), (1 - overlap) * width * length
        r2 = (b2 + math.sqrt(b2**2 - 16 * c2)) / 2
        a3, b3, c3 = 4 * overlap, -2 * overlap * (length + width), (overlap - 1) * width * length
        return min(r1, r2, (b3 + math.sqrt(b3**2 - 4 * a3 * c3)) / 2)

    for length, width in ((5.75, 2.4), (0.5, 0.5), (15.0, 3.6), (0.6, 3.1)):
        got = gaussian_radius(torch.tensor(length), torch.tensor(width), 0.1)
        assert float(got) == pytest.approx(slow(length, width), rel=1e-5)


def test_target_lies_in_the_cell_of_the_centre_with_corner_offset():
    g = ODD_GRID
    targets = centre_targets(one_box((g.x_min_m + 5.25 * g.cell_m, g.y_min_m + 9.5 * g.cell_m), label=3), g)
    assert (int(targets.row_BM), int(targets.column_BM)) == (9, 5)
    assert targets.heatmap_BKYX[0, 3, 9, 5] == 1 and (targets.heatmap_BKYX == 1).sum() == 1
    assert targets.values_BMD[0, 0, :2].tolist() == pytest.approx([0.25, 0.5], abs=1e-4)
    expected = [0.7, math.log(4), math.log(2), math.log(1.5), math.sin(0.3), math.cos(0.3), 1, -2]
    assert targets.values_BMD[0, 0, 2:].tolist() == pytest.approx(expected, abs=1e-5)


def test_box_just_below_the_lower_edge_is_outside_and_folds_in_only_with_truncation():
    g = ODD_GRID
    box = one_box((g.x_min_m - 0.3 * g.cell_m, 0.0))
    assert not centre_targets(box, g).valid_BM.any()
    assert centre_targets(box, g).heatmap_BKYX.sum() == 0
    folded = centre_targets(box, g, LossOptions(truncate_cells=True))
    assert folded.valid_BM.all() and int(folded.column_BM) == 0


@pytest.mark.parametrize("edge", ["x_max", "y_max"])
def test_upper_edge_is_open(edge):
    g = ODD_GRID
    xy = (g.x_max_m, 0.0) if edge == "x_max" else (0.0, g.y_max_m)
    assert not centre_targets(one_box(xy), g).valid_BM.any()


def test_gaussians_equal_a_slow_loop_and_combine_by_maximum():
    boxes = make_boxes(torch.Generator().manual_seed(3), ODD_GRID, 2, 30)
    targets = centre_targets(boxes, ODD_GRID)
    slow = np.zeros(targets.heatmap_BKYX.shape)
    for b, m in targets.valid_BM.nonzero().tolist():
        size = (boxes.size_lwh_m_BM3[b, m] / ODD_GRID.cell_m).tolist()
        radius = max(2, int(gaussian_radius(torch.tensor(size[0]), torch.tensor(size[1]), 0.1)))
        sigma, r0, c0 = (2 * radius + 1) / 6, int(targets.row_BM[b, m]), int(targets.column_BM[b, m])
        for row in range(max(0, r0 - radius), min(ODD_GRID.ny, r0 + radius + 1)):
            for column in range(max(0, c0 - radius), min(ODD_GRID.nx, c0 + radius + 1)):
                value = math.exp(-((row - r0) ** 2 + (column - c0) ** 2) / (2 * sigma**2))
                k = int(targets.channel_BM[b, m])
                slow[b, k, row, column] = max(slow[b, k, row, column], value)
    np.testing.assert_allclose(targets.heatmap_BKYX.numpy(), slow, atol=1e-6)
    assert targets.valid_BM[:, 30:].sum() == 0


def test_decoding_a_perfect_head_gives_the_truth_back():
    boxes = make_boxes(torch.Generator().manual_seed(5), ODD_GRID, 2, 8)
    found = decode(perfect_head(boxes, ODD_GRID), ODD_GRID, DecodeOptions(score_min=0.5))
    for b, got in enumerate(found):
        truth = boxes.valid_BM[b]
        order = boxes.label_BM[b][truth].argsort()
        got_order = got.label.argsort()
        assert got.label[got_order].tolist() == boxes.label_BM[b][truth][order].tolist()
        torch.testing.assert_close(got.centre_m[got_order], boxes.centre_m_BM3[b][truth][order], atol=1e-4, rtol=0)
        torch.testing.assert_close(got.size_lwh_m[got_order], boxes.size_lwh_m_BM3[b][truth][order], atol=1e-4, rtol=0)
        turn = got.yaw_rad[got_order] - boxes.yaw_rad_BM[b][truth][order]
        torch.testing.assert_close(torch.cos(turn), torch.ones_like(turn))
        known = ~boxes.velocity_mps_BM2[b][truth][order].isnan()
        velocity = boxes.velocity_mps_BM2[b][truth][order]
        torch.testing.assert_close(got.velocity_mps[got_order][known], velocity[known])


def test_loss_of_a_perfect_head_is_nearly_zero_and_box_term_exactly():
    boxes = make_boxes(torch.Generator().manual_seed(5), ODD_GRID, 2, 8)
    terms = detection_loss(perfect_head(boxes, ODD_GRID), boxes, ODD_GRID)
    assert float(terms["det_box"]) == pytest.approx(0, abs=1e-5)
    worse = detection_loss(random_head(), boxes, ODD_GRID)
    assert worse["det_heatmap"] > 3 * terms["det_heatmap"]


def test_loss_changes_no_logits_and_velocity_weight_scales_only_velocity():
    head, boxes = random_head(), make_boxes(torch.Generator().manual_seed(1), ODD_GRID, 2, 9)
    before = [maps.heatmap_logits_BKYX.clone() for maps in head]
    full = detection_loss(head, boxes, ODD_GRID)["det_box"]
    none = detection_loss(head, boxes, ODD_GRID, LossOptions(velocity_weight=0))["det_box"]
    half = detection_loss(head, boxes, ODD_GRID, LossOptions(velocity_weight=0.5))["det_box"]
    assert float(half - none) == pytest.approx(float(full - none) / 2, rel=1e-4) and full > none
    assert all(torch.equal(a, maps.heatmap_logits_BKYX) for a, maps in zip(before, head, strict=True))


def test_unknown_velocity_gives_no_gradient_unless_crn_is_asked_for():
    head = random_head(batch=1)
    leaf = head[0].velocity_mps_B2YX.detach().requires_grad_()
    maps = (HeadMaps(**{f: getattr(head[0], f) for f in HeadMaps.__slots__} | {"velocity_mps_B2YX": leaf}),)
    box = one_box((1.0, -3.0), velocity=(math.nan, math.nan))
    terms = detection_loss(maps, centre_targets(box, ODD_GRID, groups=CLASS_GROUPS[:1]), ODD_GRID)
    terms["det_box"].backward()
    assert terms["det_box"].isfinite() and leaf.grad.abs().sum() == 0
    options = LossOptions(zero_unknown_velocity=True)
    detection_loss(maps, centre_targets(box, ODD_GRID, groups=CLASS_GROUPS[:1]), ODD_GRID, options)["det_box"].backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [0, 3])
def test_no_boxes_and_only_padding_are_finite(count):
    boxes = make_boxes(torch.Generator(), ODD_GRID, 2, 0, padding=count)
    terms = detection_loss(random_head(), boxes, ODD_GRID)
    assert float(terms["det_box"]) == 0 and terms["det_heatmap"].isfinite() and terms["det_heatmap"] > 0


def test_focal_pulls_towards_the_target():
    boxes = make_boxes(torch.Generator().manual_seed(2), ODD_GRID, 1, 6)
    logits = torch.zeros(1, 10, *ODD_GRID.shape, requires_grad=True)
    zeros = random_head(batch=1)
    head = [
        HeadMaps(**{f: getattr(m, f) for f in HeadMaps.__slots__} | {"heatmap_logits_BKYX": part})
        for m, part in zip(zeros, logits.split([len(g) for g in CLASS_GROUPS], dim=1), strict=True)
    ]
    targets = centre_targets(boxes, ODD_GRID)
    detection_loss(head, targets, ODD_GRID)["det_heatmap"].backward()
    peak = targets.heatmap_BKYX == 1
    assert (logits.grad[peak] < 0).all() and (logits.grad[~peak] >= 0).all()


def slow_greedy(xy, radius):
    kept = []
    for i, p in enumerate(xy):
        if all(math.dist(p, xy[j]) > radius for j in kept):
            kept.append(i)
    return kept


def test_circle_nms_equals_the_greedy_loop():
    torch.manual_seed(0)
    xy = torch.rand(3, 60, 2) * 12
    keep = circle_nms(xy, torch.ones(3, 60, dtype=torch.bool), torch.tensor([0.5, 1.5, 4.0]))
    for row, radius, k in zip(xy, (0.5, 1.5, 4.0), keep, strict=True):
        assert k.nonzero()[:, 0].tolist() == slow_greedy(row.tolist(), radius)


def test_a_long_chain_of_suppressions_is_resolved():
    relation = torch.zeros(9, 9, dtype=torch.bool)
    for i in range(8):
        relation[i, i + 1] = True
    assert greedy_keep(relation).tolist() == [i % 2 == 0 for i in range(9)]


def rectangle(box) -> Polygon:
    x, y, length, width, yaw = box
    c, s = math.cos(yaw), math.sin(yaw)
    corners = [(sx * length / 2, sy * width / 2) for sx, sy in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    return Polygon([(x + c * a - s * b, y + s * a + c * b) for a, b in corners])


def test_rotated_iou_equals_shapely_on_random_and_edge_cases():
    torch.manual_seed(0)
    a = torch.cat([torch.rand(300, 2) * 6, torch.rand(300, 2) * 5 + 0.3, torch.rand(300, 1) * 7 - 3.5], dim=1).double()
    b = a[torch.randperm(300)]
    extra_a = torch.tensor([[0, 0, 4, 2, 0.3], [0, 0, 4, 2, 0], [0, 0, 4, 2, 0], [0, 0, 4, 2, 0], [50, 50, 1, 1, 1]]).double()
    extra_b = torch.tensor(
        [[0, 0, 4, 2, 0.3], [0, 0, 4, 2, math.pi / 2], [4, 0, 4, 2, 0], [0, 0, 1, 1, 0.7], [50.2, 50, 1, 1, 1]]
    ).double()
    a, b = torch.cat([a, extra_a]), torch.cat([b, extra_b])
    expected = []
    for p, q in zip(a.tolist(), b.tolist(), strict=True):
        p, q = rectangle(p), rectangle(q)
        expected.append(p.intersection(q).area / p.union(q).area)
    np.testing.assert_allclose(rotated_iou(a, b).numpy(), expected, atol=2e-5)


def test_rotated_nms_keeps_crossing_boxes_that_circle_nms_would_not():
    boxes = torch.tensor([[0.0, 0, 10, 1, 0], [0, 1.5, 10, 1, 0], [0.3, 0, 10, 1, 0.02]])
    assert rotated_nms(boxes, torch.ones(3, dtype=torch.bool), 0.2).tolist() == [True, True, False]


@pytest.mark.parametrize("nms", ["circle", "rotated", "none"])
def test_decode_limits_and_order(nms):
    options = DecodeOptions(nms=nms, per_sample=37, candidates=60, score_min=0.0)
    for got in decode(random_head(seed=4), ODD_GRID, options):
        assert 0 < len(got) <= 37
        assert (got.score[:-1] >= got.score[1:]).all() and got.centre_m.isfinite().all()
    assert all(len(d) == 0 for d in decode(random_head(), ODD_GRID, DecodeOptions(score_min=0.99)))


def test_nothing_but_three_kinds_of_nms():
    with pytest.raises(ValueError, match="circle, rotated or none"):
        decode(random_head(), ODD_GRID, DecodeOptions(nms="soft"))


def test_attributes_follow_speed():
    labels = torch.arange(10).repeat(2)
    velocity = torch.zeros(20, 2)
    velocity[10:, 0] = 0.5
    names = [ATTRIBUTES[i] if i >= 0 else "" for i in attributes_from(labels, velocity).tolist()]
    slow = dict(zip(DETECTION_CLASSES, names[:10], strict=True))
    fast = dict(zip(DETECTION_CLASSES, names[10:], strict=True))
    assert slow["car"] == "vehicle.parked" and slow["bus"] == "vehicle.stopped" and fast["bus"] == "vehicle.moving"
    assert slow["bicycle"] == "cycle.without_rider" and fast["motorcycle"] == "cycle.with_rider"
    assert slow["pedestrian"] == "pedestrian.standing" and fast["pedestrian"] == "pedestrian.moving"
    assert slow["barrier"] == fast["traffic_cone"] == ""


@pytest.mark.parametrize("branch", [0, 5])
def test_both_head_forms_start_with_the_prior(branch):
    head = CentreHead(6, shared_channels=8, branch_channels=branch).eval()
    with torch.no_grad():
        maps = head(torch.zeros(1, 6, *ODD_GRID.shape))
    assert [m.classes for m in maps] == list(CLASS_GROUPS)
    for m in maps:
        assert m.heatmap_logits_BKYX.shape == (1, len(m.classes), *ODD_GRID.shape)
        assert float(m.heatmap_logits_BKYX.mean()) == pytest.approx(-2.19, abs=0.3)
