"""MFD and CRD of DualDistill against slow NumPy twins written from the formulas, with the published weights.

The twins take over three things that other tests pin: the stage aligners (``test_align_formulas``), and the Gaussians and
the frozen head (``test_head``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distill_fakes import GRID, LIDAR, STUDENT, FakeNet, fake_batch, fake_head, fake_outputs, generator, without_boxes
from distill_twins import Array, array, box_maps, cells_in, conv, cross_entropy, parameters_of, sigmoid, smooth_l1
from shapely.affinity import rotate, translate
from shapely.geometry import Polygon, box

from imkd_data.classes import LABEL_FROM_CLASS
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.distill import METHODS, FrozenTeacher
from imkd_models.distill.dual_distill import DualDistill, pseudo_boxes
from imkd_models.distill.terms import head_targets, stage_grid
from imkd_models.outputs import HeadMaps, Outputs

FINE = BevGrid(x_min_m=-6.4, y_min_m=-14.4, cell_m=0.5, nx=32, ny=24)  # no stage has the published cell size
TEACHER = FrozenTeacher(FakeNet(LIDAR, seed=4))
# The published values, and cells and cell size of the published teacher's maps.
PAPER: dict[str, Any] = {
    "weight_fg": 6e-3,
    "weight_bg": 4e-2,
    "weight_fp": 6e-2,
    "weight_sp": 2.5e-3,
    "lambda_mfd": 1.0,
    "lambda_crd": 1.0,
    "attention": True,
    "norm_teacher": False,
    "levels": ("bev_stage1", "bev_stage2", "bev_neck"),
    "crd_target": "teacher",
    "tau": 0.1,
    "nms": "rotated",
    "nms_iou": 0.2,
    "crd_box_weight": 0.25,
    "crd_velocity_weight": 0.2,
}
CELLS = {"bev_stage0": 256 * 256, "bev_stage1": 128 * 128, "bev_stage2": 64 * 64, "bev_neck": 128 * 128}
CELL_M = {"bev_stage0": 0.4, "bev_stage1": 0.8, "bev_stage2": 1.6, "bev_neck": 0.8}


def _options(**values: Any) -> Any:
    return METHODS["dual_distill"].make_options(values)


def _distiller(**values: Any) -> DualDistill:
    """Every parameter away from its start; teacher taken at its own size unless ``rescale`` is given."""
    torch.manual_seed(0)
    distiller = DualDistill(_options(**{"rescale": False, **values}), STUDENT, LIDAR, TEACHER.heads)
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(5))
    return distiller.eval()


def _teacher(grid: BevGrid = GRID, mean: float = -4.0) -> Outputs:
    """Some cells with a score just above 0.1, so that the threshold of hallucinations matters."""
    return replace(fake_outputs(LIDAR, 7), head=fake_head(7, mean=mean), grid=grid)


def _close(ours: Mapping[str, torch.Tensor], twin: Mapping[str, float]) -> None:
    assert list(ours) == list(twin)
    for name, value in twin.items():
        assert float(ours[name].detach()) == pytest.approx(value, rel=1e-5, abs=1e-7), name


# ------------------------------------------------------------------------------------------------------------ twin of MFD


def _regions(boxes: BoxBatch, grid: BevGrid, ghosts: Array) -> tuple[Array, Array, Array]:
    """Cell weights 1_FG a_FG, 1_BG a_BG and 1_FP a_FP, each (B, Y, X)."""
    fg, bg, fp = (np.zeros((len(boxes.valid_BM), *grid.shape)) for _ in range(3))
    for b in range(len(fg)):
        for m in boxes.valid_BM[b].nonzero()[:, 0].tolist():
            (x, y, _), (l, w, _) = boxes.centre_m_BM3[b, m].tolist(), boxes.size_lwh_m_BM3[b, m].tolist()
            inside = cells_in(grid, x, y, l, w, float(boxes.yaw_rad_BM[b, m]))
            fg[b][inside & (fg[b] == 0)] = np.sqrt(grid.cell_m**2 / (w * l))  # the first box in the list wins
        seen = ghosts[b] & (fg[b] == 0)
        rest = ~seen & (fg[b] == 0)
        fp[b] = seen / max(seen.sum(), 1)
        bg[b] = rest / max(rest.sum(), 1)
    return fg, bg, fp


def _softmax(x: Array) -> Array:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def _cell_attention(x: Array, temperature: float) -> Array:
    """A_X = n softmax over cells of mean_c |X| / temperature."""
    b, _, ny, nx = x.shape
    return (ny * nx * _softmax(np.abs(x).mean(1).reshape(b, -1) / temperature)).reshape(b, ny, nx)


def _channel_attention(t: Array, temperature: float) -> Array:
    """K_T = C softmax over channels of mean_cells |T| / temperature, (B, C, 1, 1)."""
    return (t.shape[1] * _softmax(np.abs(t).mean((2, 3)) / temperature))[:, :, None, None]


def _ghosts(teacher: Outputs, batch: Batch) -> Array:
    """Best teacher score of all classes above 0.1 where the best true Gaussian is below 0.1."""
    score = sigmoid(np.concatenate([array(m.heatmap_logits_BKYX) for m in teacher.head], axis=1)).max(1)
    truth = array(head_targets(batch.boxes, teacher.grid, teacher.head).heatmap_BKYX).max(1)
    return (score > 0.1) & (truth < 0.1)


def _level(
    name: str, s: Array, t: Array, spatial: Mapping[str, Array], batch: Batch, grid: BevGrid, ghosts: Array, rho: float, o: Any
) -> dict[str, float]:
    """L_fg, L_bg, L_fp, L_sp of one scale; ``rho`` rescales weights and temperature for a teacher of another size."""
    temperature, samples = 0.5 / np.sqrt(rho), len(s)
    fg, bg, fp = _regions(batch.boxes, grid, ghosts if name == "bev_neck" else np.zeros_like(ghosts)[:, :1, :1])
    attention = (_cell_attention(t, temperature) + _cell_attention(s, temperature)) / 2 if o["attention"] else 1.0
    error = (s - t) ** 2
    size = grid.cell_m / CELL_M[name]
    out = {
        "mfd_fg": rho * size * o["weight_fg"] / samples * (fg * attention * error.sum(1)).sum(),
        "mfd_bg": rho * o["weight_bg"] / samples * (bg * attention * error.sum(1)).sum(),
    }
    if name == "bev_neck":
        channels = _channel_attention(t, temperature)
        out["mfd_fp"] = rho * o["weight_fp"] / samples * (fp * attention * (channels * error).sum(1)).sum()
    seen = conv(s.mean(1, keepdims=True), spatial["weight"], spatial["bias"] / np.sqrt(rho))  # the bias is in the new scale
    cells = CELLS[name] / (grid.ny * grid.nx)
    out["mfd_sp"] = np.sqrt(rho) * cells * o["weight_sp"] / samples * np.abs(t.mean(1, keepdims=True) - seen).sum()
    return out


def _mfd(distiller: DualDistill, student: Outputs, teacher: Outputs, batch: Batch, rescale: bool = False, **o: Any) -> dict:
    """lambda (sum over scales of L_fg + L_bg + L_sp, and L_fp of the neck)."""
    o = {**PAPER, **o}
    total: dict[str, float] = {}
    for name in o["levels"]:
        t = array(teacher.features[name])
        if o["norm_teacher"] and name != "bev_neck":
            t = (t - t.mean((0, 2, 3), keepdims=True)) / np.sqrt(t.var((0, 2, 3), keepdims=True) + 1e-5)
        rho = 0.5 / (t**2).mean() if rescale else 1.0
        if name == "bev_neck":
            s = conv(array(student.features[name]), *map(array, distiller.neck.parameters()))
        else:
            s = array(distiller.align[name](student.features[name])) / np.sqrt(rho)  # it answers in the new scale
        spatial = parameters_of(distiller.spatial[name])
        grid = stage_grid(teacher.grid, t.shape)
        for key, value in _level(name, s, t, spatial, batch, grid, _ghosts(teacher, batch), rho, o).items():
            total[key] = total.get(key, 0.0) + o["lambda_mfd"] * value
    return {key: total[key] for key in ("mfd_fg", "mfd_bg", "mfd_fp", "mfd_sp") if key in total}


# ------------------------------------------------------------------------------------------------------------ twin of CRD


RADIUS2_M2 = {"car": 4, "truck": 12, "bus": 10, "barrier": 1, "motorcycle": 0.85, "pedestrian": 0.175}


def _rectangle(x: float, y: float, z: float, l: float, w: float, h: float, yaw: float, *_: float) -> Polygon:
    return translate(rotate(box(-l / 2, -w / 2, l / 2, w / 2), yaw, origin=(0, 0), use_radians=True), x, y)


def _suppressed(better: list[float], worse: list[float], group: Sequence[str], o: Mapping[str, Any]) -> bool:
    distance = np.hypot(better[0] - worse[0], better[1] - worse[1])
    if o["nms"] == "none" or (o["nms"] == "rotated" and 2 * distance > np.hypot(*better[3:5]) + np.hypot(*worse[3:5])):
        return False
    if o["nms"] == "circle":
        return distance**2 <= RADIUS2_M2[group[0]]
    a, b = _rectangle(*better), _rectangle(*worse)
    return a.intersection(b).area / a.union(b).area > o["nms_iou"]


def _detections(maps: HeadMaps, sample: int, grid: BevGrid, o: Mapping[str, Any]) -> list[list[float]]:
    """Published form: temper, threshold 0.1, best 500 of the group, range, suppression best first, at most 83.

    Rows x y z l w h yaw vx vy label."""
    z, values = array(maps.heatmap_logits_BKYX)[sample], box_maps(maps)[sample]
    peaks = sorted(((z[k, i, j], k, i, j) for k, i, j in np.ndindex(z.shape)), reverse=True)[:500]
    kept: list[list[float]] = []
    for logit, k, i, j in peaks:
        if len(kept) == 83:
            break
        dx, dy, height, *log_size, sin, cos, vx, vy = values[:, i, j]
        x, y = grid.x_min_m + (j + dx) * grid.cell_m, grid.y_min_m + (i + dy) * grid.cell_m
        near_x = grid.x_min_m - 10 <= x <= grid.x_max_m + 10
        near_y = grid.y_min_m - 10 <= y <= grid.y_max_m + 10
        row = [x, y, height, *np.exp(log_size), np.arctan2(sin, cos), vx, vy, LABEL_FROM_CLASS[maps.classes[k]]]
        good = sigmoid(logit / o["tau"]) > 0.1 and near_x and near_y and abs(height) <= 10
        if good and not any(_suppressed(other, row, maps.classes, o) for other in kept):
            kept.append(row)
    return kept


def _pseudo_boxes(head: Sequence[HeadMaps], grid: BevGrid, o: Mapping[str, Any]) -> list[Array]:
    """One (N, 10) a sample; sizes clamped to [0.05, 30] m."""
    out = []
    for sample in range(len(head[0].height_m_B1YX)):
        rows = np.array([row for maps in head for row in _detections(maps, sample, grid, o)]).reshape(-1, 10)
        rows[:, 3:6] = rows[:, 3:6].clip(0.05, 30)
        out.append(rows)
    return out


def _rows(boxes: BoxBatch) -> list[Array]:
    """The same rows from a BoxBatch."""
    parts = (boxes.centre_m_BM3, boxes.size_lwh_m_BM3, boxes.yaw_rad_BM[..., None], boxes.velocity_mps_BM2)
    rows = torch.cat([*parts, boxes.label_BM[..., None].float()], dim=-1)
    return [array(row[valid]) for row, valid in zip(rows, boxes.valid_BM, strict=True)]


def _as_boxes(rows: Sequence[Array]) -> BoxBatch:
    count = max(len(r) for r in rows)
    value = torch.zeros(len(rows), count, 10)
    valid = torch.zeros(len(rows), count, dtype=torch.bool)
    for b, row in enumerate(rows):
        value[b, : len(row)], valid[b, : len(row)] = torch.from_numpy(row), True
    return BoxBatch(
        centre_m_BM3=value[..., :3],
        size_lwh_m_BM3=value[..., 3:6] + ~valid[..., None],
        yaw_rad_BM=value[..., 6],
        velocity_mps_BM2=value[..., 7:9],
        label_BM=value[..., 9].long(),
        valid_BM=valid,
    )


def _centre_loss(answer: Sequence[HeadMaps], rows: Sequence[Array], grid: BevGrid, o: Mapping[str, Any]) -> tuple[float, float]:
    """Gaussian focal / max(peaks, 1) and L1 / max(boxes, 1) a class group, summed over groups."""
    heat = array(head_targets(_as_boxes(rows), grid, answer).heatmap_BKYX)
    weight = np.array([1.0] * 8 + [o["crd_velocity_weight"]] * 2)
    focal, l1, first = 0.0, 0.0, 0
    for maps in answer:
        y, p = heat[:, first : first + len(maps.classes)], sigmoid(array(maps.heatmap_logits_BKYX))
        first += len(maps.classes)
        cells = np.where(y == 1, -np.log(p) * (1 - p) ** 2, -np.log(1 - p) * p**2 * (1 - y) ** 4)
        focal += cells.sum() / max((y == 1).sum(), 1)
        labels, values, count, total = [LABEL_FROM_CLASS[c] for c in maps.classes], box_maps(maps), 0, 0.0
        for b, sample in enumerate(rows):
            for x, y_m, z, l, w, h, yaw, vx, vy, label in sample:
                column, row = (x - grid.x_min_m) / grid.cell_m, (y_m - grid.y_min_m) / grid.cell_m
                if label not in labels or not (0 <= column < grid.nx and 0 <= row < grid.ny):
                    continue
                j, i = int(column), int(row)
                target = [column - j, row - i, z, *np.log([l, w, h]), np.sin(yaw), np.cos(yaw), vx, vy]
                total += np.nansum(weight * np.abs(values[b, :, i, j] - target))  # an unknown velocity is left out
                count += 1
        l1 += total / max(count, 1)
    return focal, l1


def _dense(answer: Sequence[HeadMaps], head: Sequence[HeadMaps]) -> tuple[float, float]:
    """Quality focal (exponent 1) and smooth L1, weighted by w = max_k p_T, over max(sum w, 1), summed over groups."""
    focal, l1 = 0.0, 0.0
    for ours, theirs in zip(answer, head, strict=True):
        z, p = array(ours.heatmap_logits_BKYX), sigmoid(array(theirs.heatmap_logits_BKYX))
        w = p.max(1)
        focal += (cross_entropy(z, p) * np.abs(sigmoid(z) - p)).sum() / max(w.sum(), 1)
        l1 += (w * smooth_l1(box_maps(ours) - box_maps(theirs)).sum(1)).sum() / max(w.sum(), 1)
    return focal, l1


def _crd(distiller: DualDistill, student: Outputs, teacher: Outputs, batch: Batch, **o: Any) -> dict[str, float]:
    o = {**PAPER, **o}
    neck = conv(array(student.features["bev_neck"]), *map(array, distiller.neck.parameters()))
    answer = TEACHER.network.head.maps(torch.from_numpy(neck).float())
    if o["crd_target"] == "dense":
        focal, l1 = _dense(answer, teacher.head)
    else:
        rows = _rows(batch.boxes) if o["crd_target"] == "gt" else _pseudo_boxes(teacher.head, teacher.grid, o)
        focal, l1 = _centre_loss(answer, rows, teacher.grid, o)
    return {"crd_heatmap": o["lambda_crd"] * focal, "crd_box": o["lambda_crd"] * o["crd_box_weight"] * l1}


# ---------------------------------------------------------------------------------------------------------- tests of MFD


@pytest.mark.parametrize("grid", [GRID, FINE], ids=["published cells", "finer cells"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_fg": 0.05},
        {"weight_bg": 0.3},
        {"weight_fp": 0.7},
        {"weight_sp": 0.04},
        {"lambda_mfd": 0.3},
        {"attention": False},
        {"norm_teacher": True},
        {"levels": ("bev_stage0", "bev_neck")},
        {"levels": ("bev_stage2",)},
    ],
    ids=str,
)
def test_feature_terms_equal_their_formulas_under_every_option(grid: BevGrid, options: dict[str, Any]) -> None:
    distiller, student, batch = _distiller(lambda_crd=0, **options), fake_outputs(STUDENT, 1), fake_batch(batch=2)
    student, teacher = replace(student, grid=grid), _teacher(grid)
    ours = distiller(student, {"lidar": teacher}, batch)
    _close(ours, _mfd(distiller, student, teacher, batch, **options))
    if options:
        default = _mfd(_distiller(lambda_crd=0), student, teacher, batch)
        assert any(k not in ours or abs(ours[k].item() / v - 1) > 1e-2 for k, v in default.items())


@pytest.mark.parametrize("options", [{}, {"attention": False}, {"norm_teacher": True}], ids=str)
def test_rescaled_terms_equal_the_formulas_with_rho(options: dict[str, Any]) -> None:
    """L_fg, L_bg, L_fp times rho, L_sp times its root, temperature over its root; on by default."""
    distiller, student, batch = (
        _distiller(lambda_crd=0, rescale=_options().rescale, **options),
        fake_outputs(STUDENT, 1),
        fake_batch(),
    )
    teacher = _teacher()
    teacher = replace(teacher, features={k: 3 * v for k, v in teacher.features.items()})
    distiller.train()
    ours = distiller(student, {"lidar": teacher}, batch)
    twin = _mfd(distiller, student, teacher, batch, rescale=True, **options)
    _close(ours, twin)
    plain = _mfd(distiller, student, teacher, batch, **options)
    assert all(abs(plain[k] / v - 1) > 0.1 for k, v in twin.items())


def test_without_boxes_all_cells_are_background_or_hallucinated() -> None:
    distiller, student, teacher, batch = (
        _distiller(lambda_crd=0),
        fake_outputs(STUDENT, 1),
        _teacher(),
        without_boxes(fake_batch()),
    )
    ours = distiller(student, {"lidar": teacher}, batch)
    assert ours["mfd_fg"] == 0
    _close(ours, _mfd(distiller, student, teacher, batch))


def test_twin_sees_every_region_and_scores_near_the_threshold() -> None:
    """Otherwise the comparisons above would say little."""
    teacher, batch = _teacher(), fake_batch()
    fg, bg, fp = _regions(batch.boxes, GRID, _ghosts(teacher, batch))
    assert min((fg > 0).sum(), (bg > 0).sum(), (fp > 0).sum()) > 50
    best = sigmoid(np.concatenate([array(m.heatmap_logits_BKYX) for m in teacher.head], axis=1)).max(1)
    assert ((best > 0.1) & (best < 0.15)).sum() > 20 and ((best > 0.05) & (best < 0.1)).sum() > 20


# ---------------------------------------------------------------------------------------------------------- tests of CRD


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lambda_crd": 0.4},
        {"tau": 0.5},
        {"nms": "circle"},
        {"nms": "none"},
        {"nms_iou": 0.02},
        {"crd_box_weight": 0.7},
        {"crd_velocity_weight": 1.5},
        {"crd_target": "gt"},
        {"crd_target": "gt", "crd_velocity_weight": 1.5},
        {"crd_target": "dense"},
        {"crd_target": "dense", "crd_box_weight": 0.7},
    ],
    ids=str,
)
def test_response_terms_equal_their_formulas_under_every_option(options: dict[str, Any]) -> None:
    """One group has no pseudo box: focal on an all-zero map, box part 0."""
    distiller, student, batch = _distiller(lambda_mfd=0, **options), fake_outputs(STUDENT, 1), fake_batch()
    teacher = _teacher(mean=-4.0)
    silent = replace(teacher.head[2], heatmap_logits_BKYX=teacher.head[2].heatmap_logits_BKYX - 20)
    teacher = replace(teacher, head=(*teacher.head[:2], silent, *teacher.head[3:]))
    ours = distiller(student, {"lidar": teacher}, batch)
    _close(ours, _crd(distiller, student, teacher, batch, **options))
    if options:
        default = _distiller(lambda_mfd=0)(student, {"lidar": teacher}, batch)
        assert any((ours[k] / v - 1).abs() > 1e-3 for k, v in default.items())


def test_dense_response_of_a_silent_teacher_is_divided_by_one() -> None:
    distiller, student, teacher = _distiller(lambda_mfd=0, crd_target="dense"), fake_outputs(STUDENT, 1), _teacher(mean=-14.0)
    assert all(sigmoid(array(m.heatmap_logits_BKYX)).max(1).sum() < 1 for m in teacher.head)
    ours = distiller(student, {"lidar": teacher}, fake_batch())
    _close(ours, _crd(distiller, student, teacher, fake_batch(), crd_target="dense"))


def _compare_pseudo_boxes(head: Sequence[HeadMaps], **options: Any) -> list[Array]:
    twin, ours = _pseudo_boxes(head, GRID, {**PAPER, **options}), _rows(pseudo_boxes(head, GRID, _options(**options)))
    for a, b in zip(ours, twin, strict=True):
        assert a.shape == b.shape
        order_a, order_b = (np.lexsort(np.round(rows[:, [0, 1, 9]], 4).T) for rows in (a, b))
        np.testing.assert_allclose(a[order_a], b[order_b], rtol=1e-4, atol=1e-5)
    return twin


@pytest.mark.parametrize(
    "options", [{}, {"tau": 0.5}, {"tau": 0.1, "nms": "circle"}, {"nms_iou": 0.02}, {"nms": "none"}], ids=str
)
def test_pseudo_boxes_are_those_of_the_tempered_decoding(options: dict[str, Any]) -> None:
    """Also sizes outside [0.05, 30] m, heights beyond 10 m, and centres that lie off the grid."""
    head = list(fake_head(9, mean=-4.0))
    wide = replace(head[1], log_size_m_B3YX=6 * head[1].log_size_m_B3YX, height_m_B1YX=6 * head[1].height_m_B1YX)
    far = replace(head[2], offset_cells_B2YX=40 * (head[2].offset_cells_B2YX - 0.5))
    rows = np.concatenate(_compare_pseudo_boxes([head[0], wide, far, *head[3:]], **options))
    assert rows[:, 3:6].max() == 30 or options  # the clamp acts at least once
    assert len(rows) > 50


def test_at_most_83_pseudo_boxes_a_group_of_the_best_500_cells() -> None:
    head = fake_head(3, 1, mean=3.0)
    assert [len(r) for r in _compare_pseudo_boxes(head, nms="none")] == [6 * 83]
    car = head[0]  # its 500 best cells put their boxes on one spot, the 268 others stay apart
    order = car.heatmap_logits_BKYX.flatten().argsort(descending=True)
    column = torch.arange(32.0).expand(24, 32).flatten()
    row = torch.arange(24.0)[:, None].expand(24, 32).flatten()
    offset = torch.full((2, 24 * 32), 0.5)
    offset[:, order[:500]] = torch.stack([5.5 - column, 7.5 - row])[:, order[:500]]
    crowd = replace(car, offset_cells_B2YX=offset.view(1, 2, 24, 32))
    quiet = [replace(m, heatmap_logits_BKYX=m.heatmap_logits_BKYX - 40) for m in head[1:]]
    assert [len(r) for r in _compare_pseudo_boxes([crowd, *quiet], nms="circle")] == [1]
