"""``imkd view``: one sample as the networks saw it: boxes beside truth, error per box, feature maps, distillation weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import DETECTION_CLASSES
from imkd_data.errors import SourceMissingError
from imkd_data.sample import Boxes
from pipelines.predict import Prediction, predict_rows, stream_options
from pipelines.report_html import Page, figure, side_by_side, table
from pipelines.sample_view import SampleView, match_boxes, read_view

if TYPE_CHECKING:
    from torch import Tensor

    from imkd_data.cache.store import Cache

__all__ = ["box_errors", "feature_pictures", "method_maps", "view_sample"]

Maps = dict[str, NDArray[Any]]
# Parts of a batch that the weights of a method are computed from, as far as the cache holds them.
_EXTRA_PARTS = {"boxes": ("boxes",), "intensity_planes": ("lidar_bev_sum", "lidar_bev_count", "lidar_bev_max")}


def networks_of(run: Path) -> dict[str, Path]:
    """name -> checkpoint: the run's own network, or the stages of a run of several (teacher, label, student).

    Raises:
        SourceMissingError: no checkpoint.
    """
    if (run / "checkpoint.json").is_file() or (run / "last.ckpt").exists():
        return {run.resolve().parent.name if run.name.endswith(".ckpt") else run.name: run}
    found = {p.parent.name: p for p in sorted(run.glob("*/last.ckpt"))}
    order = {"teacher": 0, "label": 1, "student": 2}
    if not found:
        raise SourceMissingError("no checkpoint here", file=run, next="give the --out folder of `imkd train`")
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], 3)))


def view_sample(
    run: Path,
    cache: Path | Cache,
    out: Path,
    *,
    token: str | None = None,
    others: Mapping[str, Path] | None = None,
    device: str = "cpu",
) -> Path:
    """Write a page about one sample of a cache to ``out`` and return its path.

    run: a run's folder (of one or several networks) or a checkpoint. token: default the first scored row. others: further
    networks by name.

    Raises:
        SourceMissingError: no checkpoint. UsageError: a token that the cache does not hold.
    """
    from imkd_data import open_cache
    from imkd_models.checkpoint import load_model
    from pipelines.evaluate import scored_rows

    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    row = opened.row(token) if token else int(scored_rows(opened)[0])
    view = read_view(opened, row)
    seen: dict[str, tuple[Any, Mapping[str, Any], Prediction]] = {}
    for name, path in {**networks_of(Path(run)), **(others or {})}.items():
        model, meta = load_model(path, device)
        parts = [p for p, needed in _EXTRA_PARTS.items() if all(f in opened.fields for f in needed)]
        wanted = (*stream_options(model, meta)["fields"], *parts)
        (found,) = predict_rows(model, opened, [row], meta, device=device, fields=tuple(dict.fromkeys(wanted)))
        seen[name] = (model, meta, found)
    page = Page(
        f"{view.scene}, sample {view.token}", f"{', '.join(seen)}; {view.split}; {view.description}", "Made by imkd view."
    )
    _boxes_sections(page, view, {name: p.boxes for name, (_, _, p) in seen.items()})
    for name, (_, meta, found) in seen.items():
        _maps_section(page, name, meta, found)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(page.render(), encoding="utf-8")
    return Path(out)


def _boxes_sections(page: Page, view: SampleView, found: Mapping[str, Boxes]) -> None:
    from pipelines import plots

    seen = []
    for name, boxes in found.items():
        sure = int((boxes.score >= 0.25).sum())
        alt = f"Bird's-eye view of {view.scene}, truth beside the {sure} boxes of {name} with a score of 0.25 or more"
        drawn = plots.encode(plots.side_by_side(view, {name: boxes}), "webp")
        seen.append(figure(drawn, "webp", alt, f"{name}. Ahead is up; green: truth."))
    page.add("boxes", "Boxes", side_by_side(seen))
    if view.cameras:
        last = list(found)[-1]
        picture = plots.encode(plots.camera_picture(view.with_found(**{last: found[last]})), "webp", 76)
        alt = f"Camera images with truth boxes and boxes of {last}"
        page.add("cameras", "Cameras", figure(picture, "webp", alt, f"Truth (green) and {last} (orange)", wide=True))
    if view.truth is not None:
        head = ["truth box", "distance m", "LiDAR points", "score", "place m", "size (1 - IoU)", "heading rad", "velocity m/s"]
        tables = []
        for name, boxes in found.items():
            rows = box_errors(view.truth, boxes)
            tables.append(
                table(head, rows, caption=f"{name}: error of each truth box; dashes: not found within 2 m", sortable=True)
            )
        page.add("errors", "Error per box", *tables)


def box_errors(truth: Boxes, found: Boxes) -> list[list[Any]]:
    """A row per truth box of a detection class, nearest first: class, distance, points, score, errors (NaN = not found)."""
    match = match_boxes(truth, found)
    distance = np.linalg.norm(truth.centre_m[:, :2], axis=1)
    rows: list[list[Any]] = []
    for m in np.argsort(distance).tolist():
        if truth.label[m] < 0:
            continue
        values = [math.nan] * 5
        if (d := int(match[m])) >= 0:
            a, b = truth.size_lwh_m[m], found.size_lwh_m[d]
            common = float(np.minimum(a, b).prod())
            turn = float(abs((truth.yaw_rad[m] - found.yaw_rad[d] + np.pi) % (2 * np.pi) - np.pi))
            values = [
                float(found.score[d]),
                float(np.linalg.norm(truth.centre_m[m, :2] - found.centre_m[d, :2])),
                1 - common / float(a.prod() + b.prod() - common),
                turn,
                float(np.linalg.norm(truth.velocity_mps[m] - found.velocity_mps[d])),
            ]
        rows.append([DETECTION_CLASSES[truth.label[m]], float(distance[m]), int(truth.num_lidar[m]), *values])
    return rows


def _plane(value: Tensor, position: int) -> NDArray[Any]:
    return np.asarray(value[position].detach().float().abs().mean(0).cpu().numpy())


def feature_pictures(found: Prediction) -> Maps:
    """Every BEV map of a network as mean absolute value; intensity logits as probabilities; the best class score."""
    import torch

    maps: Maps = {}
    for name, value in found.outputs.features.items():
        if name.startswith("bev_intensity"):
            maps[name.replace("bev_intensity", "gate from")] = np.asarray(torch.sigmoid(value[found.position, 0].float()).cpu())
        else:
            maps[name] = _plane(value, found.position)
    score = torch.cat([m.heatmap_logits_BKYX[found.position].float() for m in found.outputs.head]).sigmoid().amax(0)
    maps["best class score"] = np.asarray(score.cpu())
    return maps


def method_maps(meta: Mapping[str, Any], found: Prediction) -> Maps:
    """The weights that the checkpoint's method used in training, computed again for this sample.

    imkd: I_L, W_R (stage 1), weight of stage 2. crkd: object mask. dual_distill: attention over cells. adaptive_smooth: soft
    object mask. {} for an undistilled network or where the cache lacks what the weights are made of.
    """
    methods = str(meta.get("method") or "").split("+")
    batch, outputs = found.batch, found.outputs
    out: Maps = {}
    if batch.boxes is None:
        return out
    from imkd_models.distill import make_method
    from imkd_models.distill.terms import head_targets, heatmaps_at

    heat = head_targets(batch.boxes, outputs.grid, outputs.head).heatmap_BKYX
    objects = heat.sum(1, keepdim=True)
    if "imkd" in methods and "bev_radar" in outputs.features and "intensity_planes" in batch.bev_maps:
        from imkd_models.distill.intensity import intensity_maps

        # The options of a joined method hold those of each part under its name.
        stored = dict(meta.get("options") or {})
        options = make_method("imkd").make_options(stored.get("imkd", stored) if len(methods) == 1 or "imkd" in stored else {})
        strength = intensity_maps(batch, {"map": outputs.features["bev_radar"]}, outputs.head, options.rule)["map"]
        best = heatmaps_at(heat, strength.shape).amax(1, keepdim=True)
        out["I_L LiDAR intensity"] = _plane(strength, found.position)
        out["W_R weight of stage 1"] = _plane(strength * (1 + options.beta * best), found.position)
        spread = heatmaps_at(objects, strength.shape)
        out["weight of stage 2"] = _plane(spread * (1 + strength) + options.eta * strength, found.position)
    if "crkd" in methods:
        from imkd_models.distill.crkd import object_mask

        mask = object_mask(batch.boxes, batch.bev_from_ego_B44, outputs.grid, make_method("crkd").make_options({}))
        out["CRKD object mask"] = np.asarray(mask[found.position].float().cpu())
    if "adaptive_smooth" in methods:
        out["Adaptive-Smooth object mask"] = _plane(0.1 + 0.9 * objects.clamp(max=1), found.position)
    if "dual_distill" in methods:
        from imkd_models.distill.dual_distill import cell_attention

        for name in ("bev_stage1", "bev_neck"):
            if name in outputs.features:
                out[f"AOA attention {name}"] = _plane(cell_attention(outputs.features[name]), found.position)
    return out


def _maps_section(page: Page, name: str, meta: Mapping[str, Any], found: Prediction) -> None:
    from pipelines import plots

    maps = feature_pictures(found)
    alt = f"Feature maps of {name}: " + ", ".join(maps)
    note = "Mean absolute value over channels; ahead is up; each map on its own scale (1 to 99 %)."
    parts = [figure(plots.encode(plots.feature_maps(maps), "webp"), "webp", alt, note, wide=True)]
    weights = method_maps(meta, found)
    if weights:
        alt = f"What the method weighted on this sample: {', '.join(weights)}"
        drawn = plots.encode(plots.feature_maps(weights), "webp")
        parts.append(figure(drawn, "webp", alt, f"Method {meta.get('method')}", wide=True))
    page.add(f"maps-{name}".replace(" ", "-"), f"Maps of {name}", *parts)
