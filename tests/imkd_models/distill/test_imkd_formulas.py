"""The numbers of IMKD's terms: slow NumPy twins written from the equations, and each option's number."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distill_fakes import GRID, LABEL, LIDAR, STUDENT, fake_head, fake_outputs, without_boxes
from test_intensity_formulas import RULES, name_of, slow_intensity, uneven_batch

from imkd_data.classes import CLASS_GROUPS, DETECTION_CLASSES
from imkd_data.loader.batch import Batch
from imkd_models.distill import METHODS
from imkd_models.distill.imkd import Adaptor, Imkd, ImkdOptions
from imkd_models.head import centre_targets
from imkd_models.outputs import HeadMaps, Outputs

Teachers = dict[str, Outputs]
TERMS = ["l2r", "l2m", "lab2m", "resp", "int"]
G1 = STUDENT["bev_stage0"][1:]
# Student map, teachers' map on the same grid, student channels of the label and of the LiDAR third.
MERGED = (
    ("bev_fused", "bev_stage1", slice(0, 5), slice(5, 10)),
    ("bev_stage0", "bev_stage2", slice(0, 6), slice(6, 12)),
)
RECEIVERS = {
    "merged": MERGED,
    "radar": (("bev_radar", "bev_stage1", slice(0, 4), slice(4, 8)),),
    "camera": (("bev_camera", "bev_stage1", slice(0, 4), slice(4, 8)),),
}


# ------------------------------------------------------------------------------------------------------------- the inputs


def _batch() -> Batch:
    """Three samples with 8, 3 and 8 boxes: one outside the grid, two of one class in one cell, two of unequal class side by
    side; radar returns of the current and of a past keyframe, some of them outside."""
    batch = uneven_batch()
    boxes, radar = batch.boxes, batch.radar
    centre, label, valid = boxes.centre_m_BM3.clone(), boxes.label_BM.clone(), boxes.valid_BM.clone()
    centre[0, 2, 0] += 100
    centre[0, 4], label[0, 4] = centre[0, 3], label[0, 3]
    centre[2, 1, :2] = centre[2, 0, :2] + 0.9
    valid[1, 3:] = False
    time_index, xyz = radar.time_index.clone(), radar.xyz_m.clone()
    time_index[1::3] = 1
    xyz[:9, 1] += 15
    xyz[::3, :2] += 4.3
    return replace(
        batch,
        boxes=replace(boxes, centre_m_BM3=centre, label_BM=label, valid_BM=valid),
        radar=replace(radar, time_index=time_index, xyz_m=xyz),
    )


def _outputs(shapes: dict[str, tuple[int, int, int]], seed: int, size: tuple[float, float, float]) -> Outputs:
    outputs = fake_outputs(shapes, seed, batch=3)
    factor = torch.tensor(size)[:, None, None, None]
    return replace(outputs, features={n: v if "intensity" in n else v * factor for n, v in outputs.features.items()})


@cache
def _case() -> tuple[Outputs, Teachers, Batch]:
    """Student, teachers and batch; the samples' features differ in size."""
    teachers = {"lidar": _outputs(LIDAR, 7, (1.0, 2.0, 0.5)), "label": _outputs(LABEL, 8, (0.5, 1.0, 3.0))}
    student = _outputs(STUDENT, 1, (1.0, 0.3, 2.0))
    # A sure teacher and a student that sees little, so that the answers around objects count and not only the background.
    teachers["lidar"] = replace(teachers["lidar"], head=fake_head(21, 3, mean=1.0))
    return replace(student, head=fake_head(22, 3, mean=-5.0)), teachers, _batch()


def _distiller(**values: Any) -> Imkd:
    torch.manual_seed(0)
    options = METHODS["imkd"].make_options(values)
    teachers = {n: s for n, s in (("lidar", LIDAR), ("label", LABEL)) if n in METHODS["imkd"].teachers_for(options)}
    return Imkd(options, STUDENT, teachers, GRID).eval()


def _run(distiller: Imkd, case: tuple[Outputs, Teachers, Batch] | None = None) -> dict[str, float]:
    with torch.no_grad():
        return {n: float(v) for n, v in distiller(*(case or _case())).items()}


# -------------------------------------------------------------------------------------------------------------- the twins


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _truth(batch: Batch) -> np.ndarray:
    """Ground-truth Gaussians Y of the ten classes (B, 10, Y, X), in the order of the class groups."""
    return _array(centre_targets(batch.boxes, GRID).heatmap_BKYX)


def _resized(image_BYX: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear with aligned corners: the corner cells' centres stay."""
    (ny, nx), out = image_BYX.shape[1:], np.zeros((len(image_BYX), *shape))
    for i, y in enumerate(np.linspace(0, ny - 1, shape[0])):
        for j, x in enumerate(np.linspace(0, nx - 1, shape[1])):
            r, c = min(int(y), ny - 2), min(int(x), nx - 2)
            a, b = y - r, x - c
            upper = (1 - b) * image_BYX[:, r, c] + b * image_BYX[:, r, c + 1]
            lower = (1 - b) * image_BYX[:, r + 1, c] + b * image_BYX[:, r + 1, c + 1]
            out[:, i, j] = (1 - a) * upper + a * lower
    return out


def _objects(batch: Batch, stage: str) -> np.ndarray:
    """S (B, 1, Y, X): sum of the ten heat maps on G0, resized on G1."""
    s = _truth(batch).sum(1)
    return (s if stage == "bev_stage1" else _resized(s, G1))[:, None]


def _evidence(batch: Batch) -> np.ndarray:
    """E = .5 + .5 (occupancy by returns of the current keyframe, where their velocity took them, widened to 5x5 cells)."""
    near, radar = np.zeros((3, 1, *GRID.shape)), batch.radar
    moved = _array(radar.xyz_m)[:, :2] + np.nan_to_num(_array(radar.velocity_mps)) * _array(radar.age_s)[:, None]
    for (x, y), sample, slot in zip(moved, radar.batch_index.tolist(), radar.time_index.tolist(), strict=True):
        row, column = int(np.floor((y - GRID.y_min_m) / 0.8)), int(np.floor((x - GRID.x_min_m) / 0.8))
        if slot == 0 and 0 <= row < GRID.ny and 0 <= column < GRID.nx:
            near[sample, 0, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = 1
    return 0.5 + 0.5 * near


def _weighted(x: torch.Tensor, target: torch.Tensor, weight: np.ndarray) -> float:
    """sum of W times the squared distance over channels, over max(1, sum of W), of the whole batch."""
    distance = ((_array(x) - _array(target)) ** 2).sum(1, keepdims=True)
    return float((weight * distance).sum() / max(1.0, weight.sum()))


def _slow_stage1(
    distiller: Imkd,
    case: tuple[Outputs, Teachers, Batch],
    intensity: Any,
    *,
    beta: float = 1.0,
    evidence: bool = False,
    channels: int = 6,
) -> float:
    """W_R = I_L (1 + beta S_max) E on the first half of bev_radar's channels."""
    student, teachers, batch = case
    weight = intensity * (1 + beta * _truth(batch).max(1, keepdims=True)) * (_evidence(batch) if evidence else 1.0)
    x = distiller.adaptors["l2r"](student.features["bev_radar"][:, :channels])
    return _weighted(x, teachers["lidar"].features["bev_stage1"], weight)


def _slow_stage2(
    distiller: Imkd,
    case: tuple[Outputs, Teachers, Batch],
    intensity: dict[str, Any],
    *,
    eta: float = 0.1,
    receiver: str = "merged",
    whole: bool = False,
) -> dict[str, float]:
    """W_lid = S (1 + I_L) + eta I_L and W_lab = 1[S > 0], summed over the scales."""
    student, teachers, batch = case
    out = {"l2m": 0.0, "lab2m": 0.0}
    for mine, stage, label_part, lidar_part in RECEIVERS[receiver]:
        s, i_l, everything = _objects(batch, stage), intensity[stage], slice(None)
        feature = student.features[mine]
        x = distiller.adaptors[f"l2m_{mine}"](feature[:, everything if whole else lidar_part])
        out["l2m"] += _weighted(x, teachers["lidar"].features[stage], s * (1 + i_l) + eta * i_l)
        x = distiller.adaptors[f"lab2m_{mine}"](feature[:, everything if whole else label_part])
        out["lab2m"] += _weighted(x, teachers["label"].features[stage], (s > 0).astype(float))
    return out


def _slow_supervision(case: tuple[Outputs, Teachers, Batch], i_l: np.ndarray) -> float:
    """sum w [KL(I_L, I_R) + KL(I_L, I_C)] / sum w, w = 1 where I_L > .1, else .1."""
    features = case[0].features
    weight = np.where(i_l > 0.1, 1.0, 0.1)
    loss = np.zeros_like(i_l)
    for name in ("bev_intensity_radar", "bev_intensity_camera"):
        q = _sigmoid(_array(features[name]))
        p = np.clip(i_l, 1e-12, 1 - 1e-12)
        loss += p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return float((weight * loss).sum() / weight.sum())


def _box_values(maps: HeadMaps, sample: int, row: int, column: int) -> np.ndarray:
    """dx, dy, z, log l, log w, log h, sin, cos, vx, vy in one cell."""
    parts = (maps.offset_cells_B2YX, maps.height_m_B1YX, maps.log_size_m_B3YX, maps.yaw_sincos_B2YX, maps.velocity_mps_B2YX)
    return np.concatenate([_array(p)[sample, :, row, column] for p in parts])


def _slow_response(
    student: tuple[HeadMaps, ...],
    teacher: tuple[HeadMaps, ...],
    batch: Batch,
    *,
    form: str = "soft",
    box_weight: float = 0.25,
    velocity_weight: float = 1.0,
) -> float:
    """Per class group: sum of |t - p|^2 BCE(p, t) over the peaks + .25 L1 over the boxes; t = sigma(teacher) Y."""
    truth, first, total = _truth(batch), 0, 0.0
    scale = np.array([1.0] * 8 + [velocity_weight] * 2)
    for group, ours, theirs in zip(CLASS_GROUPS, student, teacher, strict=True):
        y = truth[:, first : first + len(group)]
        first += len(group)
        p, t = _sigmoid(_array(ours.heatmap_logits_BKYX)), _sigmoid(_array(theirs.heatmap_logits_BKYX)) * y
        if form == "soft":
            cells = np.abs(t - p) ** 2 * -(t * np.log(p) + (1 - t) * np.log(1 - p))
        else:  # focal with a target below 1 everywhere: only the negative half
            cells = -np.log(1 - np.clip(p, 1e-4, 1 - 1e-4)) * p**2 * (1 - np.clip(t, 1e-4, 1 - 1e-4)) ** 4
        peaks, count, box = set(), 0, 0.0
        for b, m in batch.boxes.valid_BM.nonzero().tolist():
            name, (x, y_m) = DETECTION_CLASSES[int(batch.boxes.label_BM[b, m])], _array(batch.boxes.centre_m_BM3)[b, m, :2]
            row, column = int(np.floor((y_m - GRID.y_min_m) / 0.8)), int(np.floor((x - GRID.x_min_m) / 0.8))
            if name in group and 0 <= row < GRID.ny and 0 <= column < GRID.nx:
                peaks.add((b, name, row, column))
                count += 1
                box += (np.abs(_box_values(ours, b, row, column) - _box_values(theirs, b, row, column)) * scale).sum()
        total += cells.sum() / max(1, len(peaks)) + box_weight * box / max(1, count)
    return float(total)


@cache
def _default_intensity() -> dict[str, np.ndarray]:
    _, teachers, batch = _case()
    return {stage: slow_intensity(batch, teachers["lidar"], stage) for stage in ("bev_stage1", "bev_stage2")}


@cache
def _default() -> dict[str, float]:
    return _run(_distiller())


# ----------------------------------------------------------------------------------------------------------- whole method


def test_the_inputs_hold_what_the_formulas_distinguish() -> None:
    _, _, batch = _case()
    for stage, value in _default_intensity().items():
        outside = value[_objects(batch, stage) == 0]
        assert (outside == 0).any() and (outside > 0.2).any() and value.std() > 0.1
    truth, near = _truth(batch), _evidence(batch)
    assert np.abs(truth.sum(1) - truth.max(1)).max() > 0.1  # overlapping classes: sum and maximum differ
    assert 0.05 < (near == 1).mean() < 0.6


def test_partition_is_half_the_radar_channels_and_thirds_of_the_merged_ones() -> None:
    """Stage 1 reads C // 2 of 12 channels; stage 2 reads C // 3 of 15 and 18 for the label, the next C // 3 for LiDAR."""
    expected = {"l2r": slice(0, 6)}
    for mine, _, label_part, lidar_part in MERGED:
        expected |= {f"lab2m_{mine}": label_part, f"l2m_{mine}": lidar_part}
    distiller = _distiller()
    assert distiller.parts == expected
    widths = {key: adaptor[0].in_channels for key, adaptor in distiller.adaptors.items()}
    assert widths == {"l2r": 6, "lab2m_bev_fused": 5, "l2m_bev_fused": 5, "lab2m_bev_stage0": 6, "l2m_bev_stage0": 6}


def test_default_terms_are_lambda_times_the_published_equations() -> None:
    """.3 L_L2R, .3 L_L2M, .3 L_Lab2M, 1 L_resp, .1 L_int with beta 1, eta .1, rho .2, a .5."""
    case, distiller = _case(), _distiller()
    student, teachers, batch = case
    intensity = _default_intensity()
    stage2 = _slow_stage2(distiller, case, intensity)
    expected = {
        "l2r": 0.3 * _slow_stage1(distiller, case, intensity["bev_stage1"]),
        "l2m": 0.3 * stage2["l2m"],
        "lab2m": 0.3 * stage2["lab2m"],
        "resp": 1.0 * _slow_response(student.head, teachers["lidar"].head, batch),
        "int": 0.1 * _slow_supervision(case, intensity["bev_stage1"]),
    }
    assert _run(distiller) == pytest.approx(expected, rel=1e-5)


def test_every_default_is_the_published_designs() -> None:
    expected = {
        "teacher_sample": "own",
        "end_step": 0,
        "stage1": True,
        "lambda_l2r": 0.3,
        "stage1_partition": "half",
        "stage1_evidence": False,
        "beta": 1.0,
        "stage2_lidar": True,
        "lambda_l2m": 0.3,
        "stage2_label": True,
        "lambda_lab2m": 0.3,
        "eta": 0.1,
        "receiver": "merged",
        "partition": "thirds",
        "response": "soft",
        "lambda_resp": 1.0,
        "response_box_weight": 0.25,
        "response_velocity_weight": 1.0,
        "stage3": True,
        "stage3_supervision": True,
        "lambda_int": 0.1,
        "gate_gain": 1.0,
        "camera_gate": "radar",
        "intensity_source": "reflectance",
        "intensity_control": "off",
        "intensity_from": "planes",
        "rho": 0.2,
        "intensity_max_share": 0.5,
        "intensity_full_scale": 255.0,
        "intensity_normalise": "none",
        "intensity_threshold": 0.0,
        "intensity_top_fraction": 1.0,
        "warmup_steps": 0,
    }
    assert ImkdOptions.defaults() == expected


def test_presets_are_the_defaults_and_labeldistill_on_the_merged_map() -> None:
    """imkd_r50 changes nothing; the other leaves W_lid = S, W_lab = 1[S > 0] and the response, without stages 1 and 3."""
    case, method = _case(), METHODS["imkd"]
    assert method.make_options({"preset": "imkd_r50"}) == ImkdOptions()
    distiller = _distiller(preset="labeldistill_on_merged")
    stage2 = _slow_stage2(distiller, case, {"bev_stage1": 0.0, "bev_stage2": 0.0}, eta=0.0)
    expected = {"l2m": 0.3 * stage2["l2m"], "lab2m": 0.3 * stage2["lab2m"], "resp": _default()["resp"]}
    assert _run(distiller) == pytest.approx(expected, rel=1e-5)
    assert distiller.o.eta == 0 and method.changes(distiller.o) == {}


@pytest.mark.parametrize("term", TERMS)
def test_a_switched_off_term_is_absent_and_each_term_alone_keeps_its_number(term: str) -> None:
    off = {
        "l2r": {"stage1": False},
        "l2m": {"stage2_lidar": False},
        "lab2m": {"stage2_label": False},
        "resp": {"response": "off"},
        "int": {"stage3_supervision": False},
    }
    alone = {k: v for name, switch in off.items() if name != term for k, v in switch.items()}
    for values, left in ((off[term], [n for n in TERMS if n != term]), (alone, [term])):
        distiller = _distiller(**values)
        distiller.load_state_dict({k: v for k, v in _distiller().state_dict().items() if k in distiller.state_dict()})
        assert _run(distiller) == pytest.approx({n: _default()[n] for n in left}, rel=1e-6)


@pytest.mark.parametrize(("term", "factor"), [("l2r", 0.1), ("l2m", 2.0), ("lab2m", 0.7), ("resp", 0.5), ("int", 3.0)])
def test_lambda_multiplies_its_raw_term(term: str, factor: float) -> None:
    raw = _default()[term] / {"l2r": 0.3, "l2m": 0.3, "lab2m": 0.3, "resp": 1.0, "int": 0.1}[term]
    assert _run(_distiller(**{f"lambda_{term}": factor}))[term] == pytest.approx(factor * raw, rel=1e-5)


def test_the_twin_has_no_term_and_keeps_the_stage_3_student() -> None:
    method = METHODS["imkd"]
    options = method.make_options(method.twin_options)
    assert options.active == () and method.changes(options) == {"fuser": "intensity", "gate_gain": 1.0, "camera_gate": "radar"}
    changed = method.make_options({"gate_gain": 0.5, "camera_gate": "camera"})
    assert method.changes(changed) == {"fuser": "intensity", "gate_gain": 0.5, "camera_gate": "camera"}


def test_teacher_of_the_other_sample_is_the_neighbours_in_every_feature_and_answer() -> None:
    student, teachers, batch = _case()
    moved = {}
    for name, outputs in teachers.items():
        heads = tuple(
            HeadMaps(
                classes=m.classes,
                **{f: torch.roll(getattr(m, f), 1, 0) for f in type(m).__dataclass_fields__ if f != "classes"},
            )
            for m in outputs.head
        )
        moved[name] = replace(outputs, features={n: torch.roll(v, 1, 0) for n, v in outputs.features.items()}, head=heads)
    other = _run(_distiller(teacher_sample="other"))
    assert other == pytest.approx(_run(_distiller(), (student, moved, batch)), rel=1e-6)
    assert all(abs(other[n] / _default()[n] - 1) > 1e-3 for n in ("l2r", "l2m", "lab2m", "resp"))
    assert other["int"] == pytest.approx(_default()["int"], rel=1e-6)  # reflectance is no teacher's


# ------------------------------------------------------------------------------------------------------ intensity options


@pytest.mark.parametrize("rule", [r for r in RULES if r], ids=name_of)
def test_every_intensity_option_reaches_stage_1_stage_2_and_the_supervision(rule: dict[str, Any]) -> None:
    names = {k: k if k == "rho" else "intensity_from" if k == "taken_from" else f"intensity_{k}" for k in rule}
    case, distiller = _case(), _distiller(**{names[k]: v for k, v in rule.items()})
    _, teachers, batch = case
    intensity = {stage: slow_intensity(batch, teachers["lidar"], stage, **rule) for stage in ("bev_stage1", "bev_stage2")}
    ours = _run(distiller)
    assert ours["l2r"] == pytest.approx(0.3 * _slow_stage1(distiller, case, intensity["bev_stage1"]), rel=1e-5)
    assert ours["l2m"] == pytest.approx(0.3 * _slow_stage2(distiller, case, intensity)["l2m"], rel=1e-5)
    assert ours["int"] == pytest.approx(0.1 * _slow_supervision(case, intensity["bev_stage1"]), rel=1e-5)
    for term in ("l2r", "l2m", "int"):
        assert abs(ours[term] / _default()[term] - 1) > 1e-4
    for term in ("lab2m", "resp"):
        assert ours[term] == _default()[term]
    for stage, value in intensity.items():
        assert float(distiller.diagnostics[f"intensity_{stage}"]) == pytest.approx(value.mean(), rel=1e-5)


def test_permuted_intensity_reaches_the_terms() -> None:
    """The cells and the sum of I_L stay, so the weights' means stay and the terms move."""
    plain, permuted = _distiller(), _distiller(intensity_control="permuted")
    ours = _run(permuted)
    _run(plain)
    for term in ("l2r", "l2m", "int"):
        assert abs(ours[term] / _default()[term] - 1) > 1e-4
    for stage in ("bev_stage1", "bev_stage2"):
        value = permuted.diagnostics[f"intensity_{stage}"]
        assert float(value) == pytest.approx(float(plain.diagnostics[f"intensity_{stage}"]), rel=1e-5)


def test_source_none_weighs_stage_1_by_1_and_stage_2_by_objects_alone_without_supervision() -> None:
    """I_L = 1 in stage 1; I_L = 0 and eta = 0 in stage 2, whatever eta says; no L_int."""
    case, distiller = _case(), _distiller(intensity_source="none", eta=0.7, beta=2.0)
    expected = {
        "l2r": 0.3 * _slow_stage1(distiller, case, 1.0, beta=2.0),
        "l2m": 0.3 * _slow_stage2(distiller, case, {"bev_stage1": 0.0, "bev_stage2": 0.0}, eta=0.0)["l2m"],
        "lab2m": _default()["lab2m"],
        "resp": _default()["resp"],
    }
    assert _run(distiller) == pytest.approx(expected, rel=1e-5)
    for mine, stage, _, _ in MERGED:
        assert float(distiller.diagnostics[f"weight_l2m_{mine}"]) == pytest.approx(_objects(case[2], stage).mean(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- stage 1


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("evidence", [False, True])
def test_stage_1_weight_is_intensity_times_one_plus_beta_objects_times_evidence(beta: float, evidence: bool) -> None:
    case, distiller = _case(), _distiller(beta=beta, stage1_evidence=evidence)
    expected = 0.3 * _slow_stage1(distiller, case, _default_intensity()["bev_stage1"], beta=beta, evidence=evidence)
    ours = _run(distiller)["l2r"]
    assert ours == pytest.approx(expected, rel=1e-5)
    if beta != 1 or evidence:
        assert abs(ours / _default()["l2r"] - 1) > 1e-4
    objects, near = _truth(case[2]).max(1, keepdims=True), _evidence(case[2]) if evidence else 1.0
    weight = _default_intensity()["bev_stage1"] * (1 + beta * objects) * near
    assert float(distiller.diagnostics["weight_l2r"]) == pytest.approx(weight.mean(), rel=1e-5)


def test_evidence_is_one_within_two_cells_of_a_present_return_and_half_elsewhere() -> None:
    batch = _case()[2]
    ours = _distiller(stage1_evidence=True)._evidence(batch, torch.Size(GRID.shape))
    np.testing.assert_array_equal(ours.numpy(), _evidence(batch))


def test_stage_1_on_all_channels() -> None:
    case, distiller = _case(), _distiller(stage1_partition="all")
    expected = 0.3 * _slow_stage1(distiller, case, _default_intensity()["bev_stage1"], channels=12)
    assert _run(distiller)["l2r"] == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- stage 2


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("receiver", RECEIVERS)
def test_stage_2_weights_objects_by_one_plus_intensity_and_background_by_eta_intensity(eta: float, receiver: str) -> None:
    case, distiller = _case(), _distiller(eta=eta, receiver=receiver)
    expected, ours = _slow_stage2(distiller, case, _default_intensity(), eta=eta, receiver=receiver), _run(distiller)
    assert ours["l2m"] == pytest.approx(0.3 * expected["l2m"], rel=1e-5)
    assert ours["lab2m"] == pytest.approx(0.3 * expected["lab2m"], rel=1e-5)
    if eta != 0.1 or receiver != "merged":
        assert abs(ours["l2m"] / _default()["l2m"] - 1) > 1e-4
    for mine, stage, _, _ in RECEIVERS[receiver]:
        s, i_l = _objects(case[2], stage), _default_intensity()[stage]
        assert float(distiller.diagnostics[f"weight_l2m_{mine}"]) == pytest.approx((s * (1 + i_l) + eta * i_l).mean(), rel=1e-5)
        assert float(distiller.diagnostics[f"weight_lab2m_{mine}"]) == pytest.approx((s > 0).mean(), rel=1e-5)


def test_stage_2_without_partition_reads_all_channels_in_both_terms() -> None:
    case, distiller = _case(), _distiller(partition="all")
    expected, ours = _slow_stage2(distiller, case, _default_intensity(), whole=True), _run(distiller)
    assert ours["l2m"] == pytest.approx(0.3 * expected["l2m"], rel=1e-5)
    assert ours["lab2m"] == pytest.approx(0.3 * expected["lab2m"], rel=1e-5)


def test_without_objects_stage_2_is_the_background_part_and_the_label_term_zero() -> None:
    student, teachers, batch = _case()
    case, distiller = (student, teachers, without_boxes(batch)), _distiller(eta=0.7)
    expected = 0.0
    for mine, stage, _, part in MERGED:
        x = distiller.adaptors[f"l2m_{mine}"](student.features[mine][:, part])
        expected += 0.3 * _weighted(x, teachers["lidar"].features[stage], 0.7 * _default_intensity()[stage])
    ours = _run(distiller, case)
    assert ours["l2m"] == pytest.approx(expected, rel=1e-5) and ours["lab2m"] == 0


def test_weights_that_sum_to_less_than_one_are_divided_by_one() -> None:
    """One dark return and no box: sum of W is eta I_L or I_L, far below 1, and nothing is blown up."""
    student, teachers, batch = _case()
    fine = torch.zeros_like(batch.bev_maps["intensity_planes"])
    fine[2, :3, 41, 50] = torch.tensor([4.0, 2.0, 3.0])
    batch = replace(without_boxes(batch), bev_maps={"intensity_planes": fine})
    # One return of 2 on average and 3 at most: I_L = .2 + .8 (g(3/255) + g(2/255)) / 2, with g(3/255) = log 4 / log 256.
    i_l = 0.2 + 0.8 * (np.log(4) + np.log(3)) / (2 * np.log(256))
    distiller = _distiller(lambda_l2r=1.0, lambda_l2m=1.0)
    ours, expected = _run(distiller, (student, teachers, batch)), {"l2r": 0.0, "l2m": 0.0}
    cells = {"bev_stage1": (2, slice(None), 10, 12), "bev_stage2": (2, slice(None), 5, 6)}
    parts = [("l2r", "l2r", 1.0, "bev_radar", "bev_stage1", slice(0, 6))]
    parts += [("l2m", f"l2m_{mine}", 0.1, mine, stage, part) for mine, stage, _, part in MERGED]
    for term, key, factor, mine, stage, part in parts:
        x = distiller.adaptors[key](student.features[mine][:, part])[cells[stage]]
        difference = _array(x) - _array(teachers["lidar"].features[stage][cells[stage]])
        expected[term] += factor * i_l * (difference**2).sum()
    assert {n: ours[n] for n in expected} == pytest.approx(expected, rel=1e-5)


def test_adaptor_is_replicated_convolution_norm_relu_and_a_residual_block() -> None:
    torch.manual_seed(3)
    adaptor = Adaptor(3, 4).eval()
    assert sum(p.numel() for p in adaptor.parameters()) == (3 * 9 * 4 + 4) + 8 + 2 * (4 * 9 * 4 + 8)
    for name, value in adaptor.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.2 if "var" in name else torch.randn(value.shape) * 0.7)
    conv, norm, block = adaptor[0], adaptor[1], adaptor[3]

    def normed(x: torch.Tensor, n: torch.nn.BatchNorm2d) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        y = (x - n.running_mean.view(shape)) / (n.running_var.view(shape) + 1e-5).sqrt()
        return y * n.weight.view(shape) + n.bias.view(shape)

    with torch.no_grad():
        x = torch.randn(2, 3, 5, 6)
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), conv.weight, conv.bias)
        y = normed(y, norm).clamp(min=0)
        z = normed(F.conv2d(y, block.conv1.weight, padding=1), block.norm1).clamp(min=0)
        z = (y + normed(F.conv2d(z, block.conv2.weight, padding=1), block.norm2)).clamp(min=0)
        np.testing.assert_allclose(adaptor(x).numpy(), z.numpy(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- response


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"form": "labeldistill"},
        {"box_weight": 0.0},
        {"box_weight": 2.0},
        {"velocity_weight": 0.0},
        {"velocity_weight": 3.0, "box_weight": 0.6},
        {"form": "labeldistill", "box_weight": 0.0},
    ],
    ids=name_of,
)
def test_response_equals_a_loop_over_class_groups_and_boxes(changes: dict[str, Any]) -> None:
    student, teachers, batch = _case()
    names = {"form": "response", "box_weight": "response_box_weight", "velocity_weight": "response_velocity_weight"}
    ours = _run(_distiller(**{names[k]: v for k, v in changes.items()}))["resp"]
    assert ours == pytest.approx(_slow_response(student.head, teachers["lidar"].head, batch, **changes), rel=1e-5)
    if changes:
        assert abs(ours / _default()["resp"] - 1) > 1e-3


def test_response_without_any_box_is_the_students_scores_squared_times_their_cross_entropy() -> None:
    """t = 0 everywhere and N_pos counts as 1: sum of p^2 times -log(1 - p)."""
    student, teachers, batch = _case()
    p = np.concatenate([_sigmoid(_array(m.heatmap_logits_BKYX)) for m in student.head], axis=1)
    ours = _run(_distiller(), (student, teachers, without_boxes(batch)))["resp"]
    assert ours == pytest.approx((p**2 * -np.log(1 - p)).sum(), rel=1e-5)


@pytest.mark.parametrize("form", ["soft", "labeldistill"])
def test_response_gradient_is_that_of_the_whole_formula(form: str) -> None:
    """Both factors of |t - p|^2 BCE(p, t) are followed: central differences of the slow twin, at a peak and beside it."""
    student, teachers, batch = _case()
    boxes = batch.boxes
    x, y = _array(boxes.centre_m_BM3)[2, 0, :2]  # a car: the first group
    row, column = int((y - GRID.y_min_m) / 0.8), int((x - GRID.x_min_m) / 0.8)
    logits = student.head[0].heatmap_logits_BKYX.clone().requires_grad_()
    head = (replace(student.head[0], heatmap_logits_BKYX=logits), *student.head[1:])
    _distiller(response=form)(replace(student, head=head), teachers, batch)["resp"].backward()
    for cell in ((2, 0, row, column), (2, 0, row, column + 1), (0, 0, 0, 0)):
        total = []
        for step in (1e-3, -1e-3):
            moved = student.head[0].heatmap_logits_BKYX.double().clone()
            moved[cell] += step
            answer = (replace(student.head[0], heatmap_logits_BKYX=moved), *student.head[1:])
            total.append(_slow_response(answer, teachers["lidar"].head, batch, form=form))
        assert float(logits.grad[cell]) == pytest.approx((total[0] - total[1]) / 2e-3, rel=1e-4, abs=1e-7)


# ------------------------------------------------------------------------------------------------- stage 3: supervision


def test_supervision_weighs_dark_returns_like_empty_cells() -> None:
    """w is 1 above .1 and .1 below it: with rho 0 and a large full scale returns lie on both sides."""
    case, rule = _case(), {"rho": 0.0, "full_scale": 2e4}
    i_l = slow_intensity(case[2], case[1]["lidar"], "bev_stage1", **rule)
    assert ((i_l > 0.11) & (i_l < 0.3)).any() and ((i_l > 0.01) & (i_l < 0.09)).any()
    ours = _run(_distiller(rho=0.0, intensity_full_scale=2e4))["int"]
    assert ours == pytest.approx(0.1 * _slow_supervision(case, i_l), rel=1e-5)


@pytest.mark.parametrize("name", ["bev_intensity_radar", "bev_intensity_camera"])
def test_supervision_is_the_sum_of_both_sensors_divergences(name: str) -> None:
    """One sensor's map equal to I_L leaves the other's divergence alone."""
    student, teachers, batch = _case()
    i_l = _default_intensity()["bev_stage1"]
    right = torch.from_numpy(np.log(np.clip(i_l, 1e-9, 1) / np.clip(1 - i_l, 1e-9, 1))).float()
    case = (replace(student, features={**student.features, name: right}), teachers, batch)
    ours, other = _run(_distiller(lambda_int=1.0), case)["int"], _slow_supervision(_case(), i_l)
    assert ours == pytest.approx(_slow_supervision(case, i_l), rel=1e-4)
    assert 0.2 * other < ours < 0.8 * other


def test_supervision_gradient_is_weight_times_prediction_minus_intensity() -> None:
    student, teachers, batch = _case()
    names = ("bev_intensity_radar", "bev_intensity_camera")
    logits = {n: student.features[n].clone().requires_grad_() for n in names}
    _distiller()(replace(student, features={**student.features, **logits}), teachers, batch)["int"].backward()
    i_l = _default_intensity()["bev_stage1"]
    weight = np.where(i_l > 0.1, 1.0, 0.1)
    for name in names:
        expected = 0.1 * weight * (_sigmoid(_array(logits[name])) - i_l) / weight.sum()
        np.testing.assert_allclose(logits[name].grad.numpy(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("term", ["l2r", "l2m", "lab2m"])
def test_feature_gradient_is_twice_the_normed_weight_times_the_difference(term: str) -> None:
    """d term / d x = lambda 2 W (x - F) / max(1, sum W), with the adapted map x."""
    student, teachers, batch = _case()
    distiller, seen = _distiller(), {}

    def keep(_: torch.nn.Module, __: Any, x: torch.Tensor) -> None:
        x.retain_grad()
        seen[term] = x

    key = term if term == "l2r" else f"{term}_bev_fused"
    distiller.adaptors[key].register_forward_hook(keep)
    distiller(student, teachers, batch)[term].backward()
    i_l, s = _default_intensity()["bev_stage1"], _objects(batch, "bev_stage1")
    weight = {"l2r": i_l * (1 + _truth(batch).max(1, keepdims=True)), "l2m": s * (1 + i_l) + 0.1 * i_l, "lab2m": s > 0}[term]
    target = teachers["label" if term == "lab2m" else "lidar"].features["bev_stage1"]
    expected = 0.3 * 2 * weight * (_array(seen[term]) - _array(target)) / weight.sum()
    np.testing.assert_allclose(seen[term].grad.numpy(), expected, rtol=1e-4, atol=1e-8)
