"""Adaptive-Smooth against slow NumPy twins written from its equations, one cell at a time, for every option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import make_batch, make_boxes
from distill_fakes import fake_head, generator, one_box, same_head

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch, BoxBatch
from imkd_models.distill import METHODS
from imkd_models.distill.adaptive_smooth import AdaptiveSmooth, Alignment, response_weights, soft_response
from imkd_models.head import centre_targets
from imkd_models.outputs import HeadMaps, Outputs

GRID = BevGrid(x_min_m=-3.2, y_min_m=4.8, cell_m=0.8, nx=14, ny=12)  # off-centre, not square
Y, X = GRID.shape
STUDENT = {"bev_camera": (3, Y, X), "bev_sim": (3, Y, X), "bev_fused": (4, Y, X)}
FUSION = {"bev_lidar": (5, Y, X), "bev_fused": (4, Y, X)}
METHOD = METHODS["adaptive_smooth"]
DEFAULTS = {
    "lambda_l2c": 1.0,
    "lambda_m2m": 1.0,
    "lambda_srd": 0.25,
    "l2c": "sim",
    "m2m_mask": "soft",
    "pixel_loss": "asd",
    "granularity": False,
    "eta": 0.5,
    "beta_min": 1e-2,
    "beta_max": 1.0,
    "beta_rule": "tanh",
    "huber": False,
    "momentum": 0.9,
    "quality": "conf_gt",
    "alpha": 0.5,
    "q_min": 0.1,
    "fp_tail": 0.0,
    "velocity_weight": 0.2,
    "simulated_branch": True,
    "fuser": "heterogeneous",
    "teacher": "fusion",
}


def _close(value: torch.Tensor | float, expected: float) -> None:
    assert expected != 0
    assert float(torch.as_tensor(value).detach()) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def _numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().numpy().astype(np.float64)


# ------------------------------------------------------------------------------------------------------------ defaults


def test_defaults_are_those_of_the_paper_reading() -> None:
    own = {k: v for k, v in METHOD.options.defaults().items() if k in DEFAULTS or k.startswith("lambda")}
    assert own == DEFAULTS
    assert METHOD.twin_options == {"lambda_l2c": 0.0, "lambda_m2m": 0.0, "lambda_srd": 0.0}
    assert METHOD.presets["simdistill_like"] == {"pixel_loss": "mse", "lambda_srd": 0.0}
    assert METHOD.student_changes == {"sim_branch": True, "fuser": "heterogeneous"}
    assert METHOD.changes(_options(fuser="gated")) == {"sim_branch": True, "fuser": "gated"}
    assert METHOD.changes(_options(simulated_branch=False)) == {}


def response(student, teacher, truth, boxes, grid, options):
    """``soft_response`` under its own weights."""
    return soft_response(student, teacher, truth, response_weights(teacher, truth, boxes, grid, options), options)


def _options(**values: Any) -> Any:
    return METHOD.make_options(values)


# --------------------------------------------------------------------------------------------------------- ASD, R1 and R2


def _knee(distance: float, beta: float) -> float:
    return distance**2 / (2 * beta) if distance < beta else distance - beta / 2


@dataclass
class SlowAlignment:
    """ASD(S, T; M) with its running r, mu, s, in double precision."""

    options: Mapping[str, Any]
    r: np.ndarray | None = None
    mu: float = 1.0
    s: float = 0.0
    beta: np.ndarray | None = None
    slope: np.ndarray | None = None

    def _beta(self, d: float) -> float:
        o = self.options
        if o["beta_rule"] == "variance":  # v of the running spread s, so that it is defined outside training too
            return min(max(self.mu - self.s * self.s, 1e-3), o["beta_max"])
        bent = self.mu * (1 + o["eta"] * math.tanh((d - self.mu) / (self.s + 1e-6)))
        return min(max(bent, o["beta_min"]), o["beta_max"])

    def _shares(self, d: float) -> list[float]:
        delta = 1 / (1 + math.exp(-(d - self.mu) / (self.s + 1e-6)))
        raised = [math.exp(-((delta - c) ** 2) / 0.05) for c in (0.0, 0.5, 1.0)]
        return [value / sum(raised) for value in raised]

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, *, training: bool = True) -> float:
        o, S, T, M = self.options, _numpy(student), _numpy(teacher), _numpy(mask)[:, 0]
        samples, channels, rows, columns = T.shape
        cells = [(b, y, x) for b in range(samples) for y in range(rows) for x in range(columns)]
        fresh, follows = self.r is None, training and M.sum() > 0
        if follows:
            now = np.array([math.sqrt((T[:, c] ** 2).mean()) for c in range(channels)])
            self.r = now if fresh else o["momentum"] * self.r + (1 - o["momentum"]) * now
        r = np.ones(channels) if self.r is None else self.r
        used = np.array([max(r_c, 0.05 * r.mean()) for r_c in r])
        scaled_s, scaled_t = S / used[:, None, None], T / used[:, None, None]
        d = np.abs(scaled_s - scaled_t).mean(axis=1)
        if follows:
            m = sum(M[i] * d[i] for i in cells) / M.sum()
            v = sum(M[i] * (d[i] - m) ** 2 for i in cells) / M.sum()
            keep = 0.0 if fresh else o["momentum"]
            self.mu, self.s = keep * self.mu + (1 - keep) * m, keep * self.s + (1 - keep) * math.sqrt(v)
        total, self.beta, self.slope = 0.0, np.ones_like(d), np.zeros_like(T)
        norm = max(M.sum(), 1.0)
        for b, y, x in cells:
            if o["granularity"]:
                value = self._windows(scaled_s[b] - scaled_t[b], y, x, d[b, y, x])
            elif o["pixel_loss"] == "mse":  # SimDistill's form: maps as they are
                value = ((S[b, :, y, x] - T[b, :, y, x]) ** 2).mean()
            else:
                beta = 1.0 if o["pixel_loss"] == "smooth_l1" else self._beta(d[b, y, x])
                factor = beta if o["huber"] else 1.0
                difference = scaled_s[b, :, y, x] - scaled_t[b, :, y, x]
                value = factor * np.mean([_knee(abs(e), beta) for e in difference])
                self.beta[b, y, x] = beta
                steep = np.clip(difference / beta, -1, 1) * factor / used / channels
                self.slope[b, :, y, x] = M[b, y, x] * steep / norm
            total += M[b, y, x] * value
        return total / norm

    def _windows(self, difference: np.ndarray, y: int, x: int, d: float) -> float:
        value = 0.0
        for share, reach in zip(self._shares(d), (0, 1, 2), strict=True):
            window = difference[:, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
            pooled = window.mean(axis=(1, 2))  # cells of the padding are not counted
            value += share * np.mean([_knee(abs(e), 1.0) for e in pooled])
        return value


def _maps(seed: int, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher (channels of different size, one nearly dead) and a mask with zeros; noise grows over the columns."""
    g = generator(seed)
    shape = (2, 5, 6, 7)
    size = torch.tensor([1.0, 3.0, 0.2, 1e-3, 0.7])[:, None, None]
    teacher = size * torch.randn(shape, generator=g)
    wide = torch.linspace(0.02, 3.0, 7) * noise
    student = (teacher + size.clamp(min=0.05) * wide * torch.randn(shape, generator=g)).requires_grad_()
    mask = (torch.rand(2, 1, 6, 7, generator=g) - 0.3).clamp(min=0)
    return student, teacher, mask


ASD_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "eta 0": {"eta": 0.0},
    "eta 1": {"eta": 1.0},
    "beta_min": {"beta_min": 0.2},
    "beta_max": {"beta_max": 0.1},
    "momentum": {"momentum": 0.5},
    "huber": {"huber": True},
    "variance": {"beta_rule": "variance"},
    "variance beta_max": {"beta_rule": "variance", "beta_max": 0.1},
    "smooth_l1": {"pixel_loss": "smooth_l1"},
    "mse": {"pixel_loss": "mse"},
    "granularity": {"granularity": True},
}


@pytest.mark.parametrize("name", ASD_OPTIONS)
def test_alignment_equals_a_slow_twin_over_several_steps(name: str) -> None:
    """Value, buffers and gradient (beta and r carry none) of each option; the number is not the default's."""
    values = ASD_OPTIONS[name]
    align, slow = Alignment(5, _options(**values)), SlowAlignment({**DEFAULTS, **values})
    plain = SlowAlignment(DEFAULTS)
    last, last_plain = 0.0, 0.0
    for seed in range(4):
        student, teacher, mask = _maps(seed, noise=0.1 + 0.05 * seed)
        mask = 0 * mask if seed == 2 else mask  # an empty mask in between changes nothing, r neither
        loss, expected = align(student, teacher, mask), slow(student, teacher, mask)
        if seed == 2:
            assert loss == 0 and expected == 0
        else:
            _close(loss, expected)
            last, last_plain = expected, plain(student, teacher, mask)
        np.testing.assert_allclose(align.scale, slow.r, rtol=1e-5)
        _close(align.mean, slow.mu)
        _close(align.spread, slow.s)
    assert values == {} or abs(last - last_plain) > 0.01 * last_plain
    if not values.get("granularity") and values.get("pixel_loss") != "mse":
        loss.backward()
        np.testing.assert_allclose(student.grad, slow.slope, rtol=1e-5, atol=1e-7)
    student, teacher, mask = _maps(9)
    before = {k: v.clone() for k, v in align.state_dict().items()}
    _close(align.eval()(student, teacher, mask), slow(student, teacher, mask, training=False))
    assert all(torch.equal(v, before[k]) for k, v in align.state_dict().items())


def test_variance_rule_has_a_floor_of_a_thousandth() -> None:
    align = Alignment(1, _options(beta_rule="variance"))
    align.mean, align.spread = torch.tensor(0.3), torch.tensor(0.6)
    assert align.knee(torch.ones(1, 1, 1, 2)).flatten().tolist() == pytest.approx([1e-3, 1e-3])


def test_a_mask_below_one_cell_divides_by_one() -> None:
    student, teacher, mask = _maps(5)
    mask = mask * (0.4 / mask.sum())
    loss, expected = Alignment(5, _options())(student, teacher, mask), SlowAlignment(DEFAULTS)(student, teacher, mask)
    _close(loss, expected)


def test_window_shares_of_known_discrepancies() -> None:
    """pi = softmax_k(-(delta - c_k)^2 / 0.05), delta = sigmoid((d - mu) / (s + 1e-6)), at two discrepancies."""
    align = Alignment(4, _options(granularity=True))
    align.mean, align.spread = torch.tensor(0.4), torch.tensor(0.2)
    shares = align.window_shares(torch.tensor([0.4, 0.6]).view(1, 1, 1, 2))[0, :, 0]
    tail = math.exp(-5)
    assert shares[:, 0].tolist() == pytest.approx([tail / (1 + 2 * tail), 1 / (1 + 2 * tail), tail / (1 + 2 * tail)], rel=1e-5)
    delta = 1 / (1 + math.exp(-0.2 / (0.2 + 1e-6)))
    raised = [math.exp(-20 * (delta - c) ** 2) for c in (0, 0.5, 1)]
    assert shares[:, 1].tolist() == pytest.approx([v / sum(raised) for v in raised], rel=1e-5)


@pytest.mark.parametrize("values", [{}, {"beta_min": 0.15, "beta_max": 0.25}])
def test_diagnostics_tell_mean_beta_and_the_share_of_clipped_cells(values: dict[str, float]) -> None:
    student, teacher, mask = _maps(3)
    align, slow = Alignment(5, _options(**values)), SlowAlignment({**DEFAULTS, **values})
    align(student, teacher, mask)
    slow(student, teacher, mask)
    assert slow.beta is not None
    _close(align.diagnostics["beta"], slow.beta.mean())
    clipped = np.mean((slow.beta <= slow.options["beta_min"]) | (slow.beta >= slow.options["beta_max"]))
    assert float(align.diagnostics["clipped"]) == pytest.approx(clipped)
    assert (0 < clipped < 1) == bool(values)
    _close(align.diagnostics["mean"], slow.mu)
    _close(align.diagnostics["spread"], slow.s)


# --------------------------------------------------------------------------------------------------------- both places


def _batch(seed: int = 0, boxes: int = 9) -> Batch:
    batch = make_batch(GRID, boxes=boxes, seed=seed, ground=5, image_hw_px=(8, 12))
    centre = batch.boxes.centre_m_BM3.clone()
    centre[:, 1, :2] = centre[:, 0, :2] + 0.7  # other classes beside, two of one group: sums of Gaussians unlike their maxima
    centre[:, 2, :2] = centre[:, 1, :2] + 0.7
    return replace(batch, boxes=replace(batch.boxes, centre_m_BM3=centre))


def _outputs(shapes: Mapping[str, tuple[int, int, int]], seed: int, grid: BevGrid = GRID, mean: float = -2.0) -> Outputs:
    g = generator(seed)
    features = {k: torch.randn(2, *shape, generator=g) for k, shape in shapes.items()}
    return Outputs(features=features, head=fake_head(seed + 50, grid=grid, mean=mean), grid=grid)


def _objects(boxes: BoxBatch) -> torch.Tensor:
    """M_obj = min(1, sum of the Gaussians of all classes)."""
    heat = centre_targets(boxes, GRID).heatmap_BKYX
    total = torch.zeros(2, 1, Y, X)
    for k in range(10):
        total[:, 0] += heat[:, k]
    assert total.max() > 1.2 and (total == 0).any()
    return torch.minimum(total, torch.ones(()))


def _distiller(shapes: Mapping[str, tuple[int, int, int]] = FUSION, /, **values: Any) -> AdaptiveSmooth:
    torch.manual_seed(0)
    distiller = AdaptiveSmooth(_options(**values), STUDENT, shapes)
    for module in distiller.bring.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # a start value that tells weight and bias apart
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return distiller


def _slow_conv_norm_relu(x: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """phi: 3x3 convolution as a sum over nine shifts, batch statistics, ReLU."""
    weight, padded = state["0.weight"].double(), F.pad(x.double(), (1, 1, 1, 1))
    rows, columns = x.shape[-2:]
    y = sum(
        torch.einsum("oc,bcyx->boyx", weight[:, :, i, j], padded[:, :, i : i + rows, j : j + columns])
        for i in range(3)
        for j in range(3)
    )
    mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
    y = (y - mean) / (variance + 1e-5).sqrt()
    return (y * state["1.weight"].double()[:, None, None] + state["1.bias"].double()[:, None, None]).clamp(min=0)


@pytest.mark.parametrize("values", [{}, {"l2c": "camera"}, {"lambda_l2c": 3.0}, {"teacher": "lidar", "lambda_m2m": 0.0}])
def test_lidar_to_camera_is_asd_of_the_widened_map_on_the_objects(values: dict[str, Any]) -> None:
    named = values.get("teacher", "fusion")
    shapes = FUSION if named == "fusion" else {"bev_neck": (6, Y, X)}
    distiller, student, teacher, batch = _distiller(shapes, **values), _outputs(STUDENT, 1), _outputs(shapes, 2), _batch()
    out = distiller(student, {named: teacher}, batch)
    ours = student.features["bev_camera" if values.get("l2c") == "camera" else "bev_sim"]
    widened = _slow_conv_norm_relu(ours, distiller.bring["l2c"].state_dict())
    theirs = teacher.features["bev_lidar" if named == "fusion" else "bev_neck"]
    expected = SlowAlignment(DEFAULTS)(widened, theirs, _objects(batch.boxes))
    _close(out["l2c"], values.get("lambda_l2c", 1.0) * expected)


def _asked_mask(name: str, objects: torch.Tensor) -> torch.Tensor:
    return {"soft": 0.1 + 0.9 * objects, "ones": torch.ones_like(objects), "objects": objects}[name]


@pytest.mark.parametrize("values", [{}, {"m2m_mask": "ones"}, {"m2m_mask": "objects"}, {"lambda_m2m": 0.3}])
def test_fusion_to_fusion_is_asd_on_the_chosen_mask(values: dict[str, Any]) -> None:
    student, teacher, batch = _outputs(STUDENT, 1), _outputs(FUSION, 2), _batch()
    out = _distiller(**values)(student, {"fusion": teacher}, batch)
    mask = _asked_mask(values.get("m2m_mask", "soft"), _objects(batch.boxes))
    expected = SlowAlignment(DEFAULTS)(student.features["bev_fused"], teacher.features["bev_fused"], mask)
    _close(out["m2m"], values.get("lambda_m2m", 1.0) * expected)


def test_other_widths_pass_a_1x1_convolution_and_finer_maps_are_averaged() -> None:
    """psi = Conv1x1 where the widths differ; bilinear sampling of cells half as large is the mean of four."""
    fine = replace(GRID, cell_m=0.4, nx=2 * X, ny=2 * Y)
    shapes = {"bev_lidar": (5, 2 * Y, 2 * X), "bev_fused": (6, 2 * Y, 2 * X)}
    distiller, student, batch = _distiller(shapes, lambda_srd=0.0, lambda_l2c=0.0), _outputs(STUDENT, 1), _batch()
    teacher = replace(_outputs(shapes, 2, fine), head=_outputs(FUSION, 2).head)
    out = distiller(student, {"fusion": teacher}, batch)
    state = distiller.bring["m2m"].state_dict()
    ours = torch.einsum("oc,bcyx->boyx", state["weight"][:, :, 0, 0], student.features["bev_fused"])
    ours = ours + state["bias"][:, None, None]
    theirs = teacher.features["bev_fused"].unflatten(-1, (X, 2)).unflatten(-3, (Y, 2)).mean((-1, -3))
    mask = 0.1 + 0.9 * _objects(batch.boxes)
    _close(out["m2m"], SlowAlignment(DEFAULTS)(ours, theirs, mask))


# ----------------------------------------------------------------------------------------------------------------- SRD

BOX_MAPS = ("offset_cells_B2YX", "height_m_B1YX", "log_size_m_B3YX", "yaw_sincos_B2YX", "velocity_mps_B2YX")


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _slow_kappa(maps: HeadMaps, boxes: BoxBatch, grid: BevGrid, b: int, y: int, x: int) -> float:
    dx, dy = (float(v) for v in maps.offset_cells_B2YX[b, :, y, x])
    place = (grid.x_min_m + (x + dx) * grid.cell_m, grid.y_min_m + (y + dy) * grid.cell_m)
    nearest = math.inf
    for m in range(boxes.valid_BM.shape[1]):
        if boxes.valid_BM[b, m] and DETECTION_CLASSES[int(boxes.label_BM[b, m])] in maps.classes:
            nearest = min(nearest, math.dist(place, boxes.centre_m_BM3[b, m, :2].tolist()))
    return math.exp(-nearest / 2) if nearest < 2 else 0.0


def _slow_weight(maps: HeadMaps, G: np.ndarray, boxes: BoxBatch, grid: BevGrid, o: Mapping[str, Any]) -> np.ndarray:
    """w (B, Y, X) of one class group."""
    z = _numpy(maps.heatmap_logits_BKYX)
    w = np.zeros((z.shape[0], *z.shape[2:]))
    for b, y, x in np.ndindex(w.shape):
        conf = max(_sigmoid(v) for v in z[b, :, y, x])
        if conf < o["q_min"]:
            continue
        if o["quality"] == "conf_gt":
            w[b, y, x] = conf ** o["alpha"] * _slow_kappa(maps, boxes, grid, b, y, x) ** (1 - o["alpha"])
        elif o["quality"] == "label":
            w[b, y, x] = max(G[b, :, y, x]) * conf
        else:
            w[b, y, x] = conf if o["quality"] == "conf" else 1.0
    return w


def _slow_response(
    student: HeadMaps, teacher: HeadMaps, truth: torch.Tensor, boxes: BoxBatch, o: Mapping[str, Any]
) -> tuple[float, float]:
    """(L_cls, L_reg) of one class group."""
    G, z_s, z_t = _numpy(truth), _numpy(student.heatmap_logits_BKYX), _numpy(teacher.heatmap_logits_BKYX)
    w = _slow_weight(teacher, G, boxes, GRID, o)
    cells, box = 0.0, 0.0
    for b, k, y, x in np.ndindex(z_s.shape):
        p, q = _sigmoid(z_s[b, k, y, x]), _sigmoid(z_t[b, k, y, x])
        if o["quality"] == "label":
            q *= G[b, k, y, x]
        tail = o["fp_tail"] if G[b, k, y, x] == 0 and p > 0.1 else 0.0
        cells += (w[b, y, x] + tail) * (p - q) ** 2 * -(q * math.log(p) + (1 - q) * math.log(1 - p))
    ours, theirs = (np.concatenate([_numpy(getattr(m, n)) for n in BOX_MAPS], axis=1) for m in (student, teacher))
    gamma = [1.0] * 8 + [o["velocity_weight"]] * 2
    for b, y, x in np.ndindex(w.shape):
        values = [gamma[j] * _knee(abs(ours[b, j, y, x] - theirs[b, j, y, x]), 1 / 9) for j in range(10)]
        box += w[b, y, x] * sum(values) / 10
    norm = max(w.sum(), 1.0)
    return cells / norm, box / norm


def _near_heads(spread: float = 0.15) -> tuple[tuple[HeadMaps, ...], tuple[HeadMaps, ...]]:
    """Student and teacher whose box values differ on both sides of the knee 1/9."""
    teacher, other = fake_head(11, grid=GRID, mean=-1.5), fake_head(12, grid=GRID)
    student = tuple(
        replace(o, **{n: getattr(t, n) + spread * getattr(o, n) for n in BOX_MAPS}) for t, o in zip(teacher, other, strict=True)
    )
    return student, teacher


SRD_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "alpha 0": {"alpha": 0.0},
    "alpha .3": {"alpha": 0.3},
    "alpha 1": {"alpha": 1.0},
    "q_min 0": {"q_min": 0.0},
    "q_min .3": {"q_min": 0.3},
    "conf": {"quality": "conf"},
    "label": {"quality": "label"},
    "none": {"quality": "none"},
    "tail": {"fp_tail": 0.1},
    "velocity": {"velocity_weight": 2.0},
}


@pytest.mark.parametrize("name", SRD_OPTIONS)
def test_response_of_one_group_equals_a_slow_twin(name: str) -> None:
    """Two groups: one class and two classes; weights, class part and box part, and that the option changes the number."""
    values, (students, teachers), boxes = SRD_OPTIONS[name], _near_heads(), _batch().boxes
    truth = centre_targets(boxes, GRID).heatmap_BKYX
    changed = False
    for group, first in ((0, 0), (1, 1)):
        student, teacher = students[group], teachers[group]
        G = truth[:, first : first + len(teacher.classes)]
        weight = response_weights(teacher, G, boxes, GRID, _options(**values))
        np.testing.assert_allclose(
            weight[:, 0], _slow_weight(teacher, _numpy(G), boxes, GRID, {**DEFAULTS, **values}), rtol=1e-5, atol=1e-6
        )
        cells, box = response(student, teacher, G, boxes, GRID, _options(**values))
        expected = _slow_response(student, teacher, G, boxes, {**DEFAULTS, **values})
        _close(cells, expected[0])
        _close(box, expected[1])
        plain = _slow_response(student, teacher, G, boxes, DEFAULTS)
        changed |= max(abs(a - b) / b for a, b in zip(expected, plain, strict=True)) > 0.01
    assert changed or not values


@pytest.mark.parametrize("values", [{}, {"lambda_srd": 2.0}, {"quality": "label", "fp_tail": 0.2}])
def test_response_is_the_weighted_sum_over_the_class_groups(values: dict[str, Any]) -> None:
    """L_SRD = lambda_SRD times the sum of both parts over all six groups."""
    (students, teachers), batch = _near_heads(), _batch(boxes=7)
    student, teacher = replace(_outputs(STUDENT, 1), head=students), replace(_outputs(FUSION, 2), head=teachers)
    out = _distiller(**values)(student, {"fusion": teacher}, batch)
    truth, first, cells, box, sums = centre_targets(batch.boxes, GRID).heatmap_BKYX, 0, 0.0, 0.0, []
    for ours, theirs in zip(students, teachers, strict=True):
        G = truth[:, first : first + len(ours.classes)]
        first += len(ours.classes)
        c, r = _slow_response(ours, theirs, G, batch.boxes, {**DEFAULTS, **values})
        cells, box = cells + c, box + r
        sums.append(_slow_weight(theirs, _numpy(G), batch.boxes, GRID, {**DEFAULTS, **values}).sum())
    assert max(sums) > 2
    _close(out["srd_class"], values.get("lambda_srd", 0.25) * cells)
    _close(out["srd_box"], values.get("lambda_srd", 0.25) * box)


def test_a_sum_of_weights_below_one_counts_as_one() -> None:
    (students, teachers), boxes = _near_heads(), _batch().boxes
    truth = centre_targets(boxes, GRID).heatmap_BKYX[:, :1]
    o = {"q_min": 0.85}
    total = _slow_weight(teachers[0], _numpy(truth), boxes, GRID, {**DEFAULTS, **o}).sum()
    assert 0.05 < total < 0.9
    found = response(students[0], teachers[0], truth, boxes, GRID, _options(**o))
    for value, expected in zip(found, _slow_response(students[0], teachers[0], truth, boxes, {**DEFAULTS, **o}), strict=True):
        _close(value, expected)


@pytest.mark.parametrize("values", [{}, {"quality": "label"}, {"fp_tail": 0.3, "quality": "conf"}])
def test_gradient_of_the_class_part_equals_finite_differences(values: dict[str, Any]) -> None:
    """|p - q|^2 is part of the graph, the weight and the tail are not."""
    (students, teachers), boxes = _near_heads(), _batch().boxes
    student, teacher = same_head(students)[1], teachers[1]
    G = centre_targets(boxes, GRID).heatmap_BKYX[:, 1:3]
    response(student, teacher, G, boxes, GRID, _options(**values))[0].backward()
    found = student.heatmap_logits_BKYX.grad
    o = {**DEFAULTS, **values}
    for place in np.argsort(-found.abs().flatten().numpy())[[0, 3, 9]]:
        moved = []
        for step in (1e-3, -1e-3):
            z = student.heatmap_logits_BKYX.detach().double().clone()
            z.view(-1)[place] += step
            moved.append(_slow_response(replace(student, heatmap_logits_BKYX=z), teacher, G, boxes, o)[0])
        assert float(found.flatten()[place]) == pytest.approx((moved[0] - moved[1]) / 2e-3, rel=1e-3)


def _flat_head(logit: float, grid: BevGrid) -> HeadMaps:
    """Every cell: this logit, a box centred in the cell."""
    maps = fake_head(0, batch=1, grid=grid)[0]
    logits = torch.full_like(maps.heatmap_logits_BKYX, logit)
    return replace(maps, heatmap_logits_BKYX=logits, offset_cells_B2YX=torch.full_like(maps.offset_cells_B2YX, 0.5))


def test_kappa_ends_at_two_metres_and_confidence_at_q_min_counts() -> None:
    """Cells of half a metre on one row: kappa = exp(-d / 2) up to but without d = 2; conf = q_min is inside."""
    grid = BevGrid(x_min_m=-1.0, y_min_m=2.0, cell_m=0.5, nx=12, ny=1)
    car, heat = one_box(-0.75, 2.25, 4.0, 2.0, 0.3), torch.zeros(1, 1, 1, 12)
    for alpha, power in ((0.0, 1.0), (0.5, 0.5)):
        options = _options(alpha=alpha, q_min=0.5)
        weight = response_weights(_flat_head(0.0, grid), heat, car, grid, options)[0, 0, 0]
        expected = [0.5**alpha * math.exp(-x / 4) ** power for x in range(4)] + [0.0] * 8
        assert weight.tolist() == pytest.approx(expected, rel=1e-5)
    assert not response_weights(_flat_head(-1e-3, grid), heat, car, grid, _options(q_min=0.5)).any()


@pytest.mark.parametrize("other", [{"label": 1}, {"valid": False}])
def test_kappa_asks_for_a_true_box_of_the_own_group(other: dict[str, Any]) -> None:
    grid = BevGrid(x_min_m=-1.0, y_min_m=2.0, cell_m=0.5, nx=12, ny=1)
    box = one_box(-0.75, 2.25, 4.0, 2.0, 0.3, label=other.get("label", 0))
    box = replace(box, valid_BM=torch.tensor([[other.get("valid", True)]]))
    heat = torch.zeros(1, 1, 1, 12)
    assert not response_weights(_flat_head(2.0, grid), heat, box, grid, _options()).any()
    assert response_weights(_flat_head(2.0, grid), heat, box, grid, _options(alpha=1.0)).unique().tolist() == pytest.approx(
        [_sigmoid(2.0)]
    )


def test_response_of_known_numbers_by_hand() -> None:
    """One cell at the truth, q = 0.5, p = 0.25: w = sqrt(0.5), box values 0.05 (quadratic), 1 and velocity 1 (linear)."""
    grid = BevGrid(x_min_m=-1.0, y_min_m=2.0, cell_m=0.5, nx=1, ny=1)
    teacher, car = _flat_head(0.0, grid), one_box(-0.75, 2.25, 4.0, 2.0, 0.3)
    logits = torch.full_like(teacher.heatmap_logits_BKYX, -math.log(3))
    student = replace(
        teacher,
        heatmap_logits_BKYX=logits,
        height_m_B1YX=teacher.height_m_B1YX + 0.05,
        log_size_m_B3YX=teacher.log_size_m_B3YX + torch.tensor([1.0, 0.0, 0.0])[:, None, None],
        velocity_mps_B2YX=teacher.velocity_mps_B2YX - torch.tensor([1.0, 0.0])[:, None, None],
    )
    cells, box = response(student, teacher, torch.ones(1, 1, 1, 1), car, grid, _options())
    w = math.sqrt(0.5)  # its sum is below 1, so the norm is 1
    entropy = -(0.5 * math.log(0.25) + 0.5 * math.log(0.75))
    _close(cells, w * 0.25**2 * entropy)
    linear = 1 - 1 / 18
    _close(box, w * (0.05**2 * 4.5 + linear + 0.2 * linear) / 10)


def test_random_boxes_lie_where_the_twins_expect_them() -> None:
    """The fixture has boxes of several groups in the grid, overlapping Gaussians and cells without any."""
    boxes = make_boxes(generator(0), GRID, 2, 9)
    assert centre_targets(boxes, GRID).valid_BM.sum() >= 16
    assert 0.1 < (_objects(_batch().boxes) == 0).float().mean() < 0.9
