"""The recipe: class-balanced rows, pasted objects, schedules, averages, and the warning about a weak teacher."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import toy_cache, toy_run

from imkd_data.errors import MismatchError, RecipeError
from imkd_data.loader.augment import IDENTITY
from imkd_data.loader.paste import write_bank
from imkd_models.checkpoint import load_checkpoint, save_checkpoint
from imkd_models.presets import model_from_dict
from pipelines.optimise import Ema, lr_factor
from pipelines.report import make_report
from pipelines.run import LoaderConfig, OptimConfig, Run
from pipelines.runs import RUNS
from pipelines.sampling import balanced, virtual_rows
from pipelines.strength import own_scores, record_scores, sweep_warnings, teacher_warnings
from pipelines.train import train


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return toy_cache(tmp_path_factory.mktemp("world"), lidar_sweeps=2, radar_sweeps=2)  # as many as its reader delivers


# ------------------------------------------------------------------------------------------------------------ sampling


def test_every_class_gets_the_same_number_of_entries() -> None:
    rng = np.random.default_rng(0)
    rows = np.arange(1000) * 3 + 7
    has = rng.random((1000, 4)) < np.array([0.9, 0.3, 0.02, 0.0])
    has[has.sum(1) == 0, 0] = False
    listed = balanced(rows, has, seed=5)
    share = round(has.sum() / 3)  # three classes occur
    assert len(listed) == 3 * share and np.array_equal(listed, balanced(rows, has, seed=5))
    assert not np.array_equal(listed, balanced(rows, has, seed=6))
    assert set(listed) <= set(rows[has.any(1)])
    times = np.bincount((listed - 7) // 3, minlength=1000)
    rare, common_only = has[:, 2], has[:, 0] & ~has[:, 1] & ~has[:, 2]
    whole = share // rare.sum()
    assert times[rare].min() >= whole > 10  # a rare row comes back again and again
    assert times[common_only].max() <= 1 and times[common_only].mean() < share / has[:, 0].sum() + 0.1
    assert len(balanced(rows, np.zeros((1000, 4), bool), seed=0)) == 0


def test_the_list_is_saved_in_the_run_and_holds_on_resume(cache: Any, tmp_path: Path) -> None:
    loader = LoaderConfig(workers=0, sampling="cbgs")
    run = toy_run(loader=loader, max_steps=2, optim=OptimConfig(lr=1e-3, schedule="constant"))
    out = tmp_path / "run"
    train(run, cache, out, accelerator="cpu")
    rows = np.load(out / "rows.npy")
    assert np.array_equal(rows, virtual_rows(cache, loader, run.seed))
    uniform = virtual_rows(cache, LoaderConfig(workers=0), run.seed)
    assert set(rows) <= set(uniform) and len(rows) != len(uniform)
    longer = run.with_values(max_steps=4)
    assert train(longer, cache, out, resume=True, accelerator="cpu").step == 4
    straight = train(longer, cache, tmp_path / "straight", accelerator="cpu").checkpoint
    a, b = load_checkpoint(out), load_checkpoint(straight)
    assert a.files["model.safetensors"] == b.files["model.safetensors"]
    np.save(out / "rows.npy", rows[::-1])
    with pytest.raises(MismatchError, match="list of rows"):
        train(longer.with_values(max_steps=6), cache, out, resume=True, accelerator="cpu")
    with pytest.raises(RecipeError, match="sampling"):
        toy_run(loader=LoaderConfig(sampling="balanced"))


# ------------------------------------------------------------------------------------------------------------- pasting


def test_a_lidar_run_pastes_until_its_last_epochs_and_resumes_exactly(cache: Any, tmp_path: Path) -> None:
    loader = LoaderConfig(workers=0, paste=True, paste_min_points=1, paste_off_epochs=1)
    run = toy_run(loader=loader, max_steps=12, checkpoint_every=5)  # epochs of five steps: pasting in two of three
    straight = train(run, cache, tmp_path / "a", accelerator="cpu").checkpoint
    plain = train(run.with_settings({"loader.paste": "off"}), cache, tmp_path / "b", accelerator="cpu").checkpoint
    assert (tmp_path / "a" / "paste_bank.npz").is_file() and not (tmp_path / "b" / "paste_bank.npz").exists()
    model = "model.safetensors"
    assert load_checkpoint(straight).files[model] != load_checkpoint(plain).files[model]
    half = run.with_values(max_steps=7)  # ends earlier, so the last epochs would be others: refused silently nowhere
    train(half.with_settings({"loader.paste_off_epochs": "0"}), cache, tmp_path / "c", accelerator="cpu")
    with pytest.raises(MismatchError, match="paste_off_epochs"):
        train(run, cache, tmp_path / "c", resume=True, accelerator="cpu")


def test_a_bank_of_an_earlier_start_is_not_taken_over(cache: Any, tmp_path: Path) -> None:
    """A run killed before its first checkpoint leaves a bank; the next start may have another seed or another rule."""

    def bank(folder: str) -> dict[str, Any]:
        with np.load(tmp_path / folder / "paste_bank.npz") as file:
            return {name: file[name] for name in file.files}

    run = toy_run(loader=LoaderConfig(workers=0, paste=True, paste_min_points=1, paste_off_epochs=0), max_steps=1)
    rows = virtual_rows(cache, run.loader, run.seed)
    write_bank(cache, rows.tolist(), tmp_path / "run" / "paste_bank.npz", min_points=1, per_class=1)
    left = bank("run")
    straight = train(run, cache, tmp_path / "straight", accelerator="cpu").checkpoint
    mended = train(run, cache, tmp_path / "run", accelerator="cpu").checkpoint
    assert len(left["boxes"]) < len(bank("straight")["boxes"])
    assert all(np.array_equal(v, bank("run")[k]) for k, v in bank("straight").items())
    assert load_checkpoint(mended).files == load_checkpoint(straight).files
    whole = (tmp_path / "run" / "paste_bank.npz").stat().st_mtime_ns  # a resumed run goes on with the bank it has
    train(run.with_values(max_steps=2), cache, tmp_path / "run", resume=True, accelerator="cpu")
    assert (tmp_path / "run" / "paste_bank.npz").stat().st_mtime_ns == whole


def test_pasting_is_for_lidar_networks_only() -> None:
    with pytest.raises(RecipeError, match="no image and no radar return"):
        toy_run("student", loader=LoaderConfig(paste=True))
    pasting = {name for name, make in RUNS.items() if make().loader.paste}
    assert pasting == {"centerpoint_pillar", "pillar_r34", "voxel"}


def test_crkds_released_pasting_for_students_is_a_named_departure(cache: Any, tmp_path: Path) -> None:
    """Boxes of pasted objects stand in the truth of a run without LiDAR, in three of four epochs; stored maps know none."""
    loader = LoaderConfig(workers=0, paste_min_points=1, augment=IDENTITY)
    a_epoch = len(virtual_rows(cache, loader, 0)) // 2
    run = toy_run("student", loader=loader, max_steps=4 * a_epoch, optim=OptimConfig(lr=0.0))
    released = run.with_values(loader=replace(loader, parity=("paste:students",)))
    assert released.pastes and not run.pastes
    losses = {}
    for name, each in (("right", run), ("released", released)):
        train(each, cache, tmp_path / name, accelerator="cpu")
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = np.array([json.loads(line)["det_heatmap"] for line in lines])
        assert (tmp_path / name / "paste_bank.npz").is_file() == (name == "released")
    same = losses["right"] == losses["released"]  # the weights stand still: only the truth can move them
    assert len(same) == 4 * a_epoch and not same[: 3 * a_epoch].any() and same[3 * a_epoch :].all()
    with pytest.raises(RecipeError, match="no pasted objects"):
        released.with_settings({"loader.cached_teachers": "on"})


# ------------------------------------------------------------------------------------------------------------ schedule


def test_schedules_follow_their_formulas() -> None:
    def factors(steps: int, **values: Any) -> list[float]:
        return [lr_factor(OptimConfig(**values), s, total_steps=steps, steps_per_epoch=10) for s in range(steps)]

    step = factors(240, schedule="step", milestones=(19.0, 23.0), warmup_steps=0)
    assert step[:190] == [1.0] * 190 and np.allclose(step[190:230], 0.1) and np.allclose(step[230:], 0.01)
    warm = factors(240, schedule="step", milestones=(19.0,), warmup_steps=4)
    assert np.allclose(warm[:5], [0.25, 0.5, 0.75, 1, 1])
    cycle = factors(200, schedule="one_cycle", warmup_share=0.4)
    peak = int(np.argmax(cycle))
    assert peak == 80 and cycle[80] == 1.0 and cycle[0] == pytest.approx(0.04) and cycle[-1] < 1e-3
    assert (np.diff(cycle[:81]) > 0).all() and (np.diff(cycle[80:]) < 0).all()
    assert cycle[140] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_the_backbone_factor_is_for_the_image_backbone_alone() -> None:
    """The radar's stages are a backbone by name, too."""
    from imkd_models.presets import tiny
    from pipelines.optimise import make_optimiser

    model = tiny()
    groups = make_optimiser(model, None, OptimConfig(backbone_factor=0.1)).param_groups
    slow = [id(p) for g in groups if g["factor"] == 0.1 for p in g["params"]]
    assert slow == [id(p) for p in model.camera.image.backbone.parameters()] and len(list(model.radar.backbone.parameters()))
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_the_average_is_what_its_definition_says_and_what_is_deployed(cache: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema, expected = Ema(model, 0.9), {k: v.clone() for k, v in model.named_parameters()}
    for step in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(4, 3))
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {k: decay * expected[k] + (1 - decay) * v for k, v in model.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(ema.shadow[name], value.detach())
    assert torch.equal(ema.shadow["1.running_mean"], model[1].running_mean)  # statistics are copied
    run = toy_run(max_steps=3, optim=OptimConfig(lr=1e-2, schedule="constant", ema=0.99))
    saved = load_checkpoint(train(run, cache, tmp_path, accelerator="cpu").checkpoint)
    raw = saved.training["raw"]
    name = next(k for k in saved.model if k.endswith("encoder.linear.weight"))
    assert not torch.equal(raw[name], saved.model[name])


# ------------------------------------------------------------------------------------------------------------- warning


def scored(folder: Path, value: float) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    weights = {"weights_sha256": load_checkpoint(folder).meta["weights_sha256"]}
    summary = {"mean_ap": value, "nd_score": value + 0.1, "checkpoint": weights}
    (folder / "eval" / "metrics_summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def teacher(cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(toy_run(max_steps=1), cache, out, accelerator="cpu")
    return out


def distilled(**changes: Any) -> Run:
    return toy_run("student", method="imkd", max_steps=1, options={"stage2_label": "off"}, **changes)


def test_a_weak_teacher_warns_in_log_checkpoint_and_report(
    cache: Any, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline"
    train(toy_run("student", max_steps=1), cache, baseline, accelerator="cpu")
    scored(baseline, 0.40)
    scored(teacher, 0.44)
    run = distilled(baseline=str(baseline))
    train(run, cache, tmp_path / "weak", {"lidar": teacher}, accelerator="cpu")
    line = "teacher lidar has 44.0 mAP, the baseline 40.0"
    assert line in capsys.readouterr().err
    logged = [json.loads(v) for v in (tmp_path / "weak" / "log.jsonl").read_text().splitlines()]
    assert [v for v in logged if line in str(v.get("warning"))] and any("loss" in v for v in logged)
    assert any(line in w for w in load_checkpoint(tmp_path / "weak").meta["warnings"])
    make_report([tmp_path / "weak"], tmp_path / "page.html")
    assert line in (tmp_path / "page.html").read_text()
    scored(teacher, 0.451)
    train(run, cache, tmp_path / "strong", {"lidar": teacher}, accelerator="cpu")
    assert load_checkpoint(tmp_path / "strong").meta["warnings"] == [] and "warning" not in capsys.readouterr().err
    other = {"mean_ap": 0.9, "nd_score": 0.9, "checkpoint": {"weights_sha256": "0" * 64}}
    (teacher / "eval" / "metrics_summary.json").write_text(json.dumps(other))  # of other weights, so it says nothing
    train(run, cache, tmp_path / "unknown", {"lidar": teacher}, accelerator="cpu")
    assert "no score of its own" in load_checkpoint(tmp_path / "unknown").meta["warnings"][0]


def test_a_teacher_that_is_shown_other_sweeps_than_it_was_trained_on_is_named(cache: Any, teacher: Path) -> None:
    run = distilled(baseline="none")
    assert sweep_warnings(run, {"lidar": teacher}, 2) == []  # both read all that is stored
    assert sweep_warnings(run.with_values(loader=LoaderConfig(lidar_sweeps=2)), {"lidar": teacher}, 2) == []
    fewer = run.with_values(loader=LoaderConfig(lidar_sweeps=1))
    (line,) = sweep_warnings(fewer, {"lidar": teacher, "label": teacher}, 2)
    assert "teacher lidar was trained on 2 LiDAR sweeps and is shown 1" in line and "--set loader.lidar_sweeps=2" in line


def test_sweeps_are_those_of_the_teachers_own_cache(cache: Any, teacher: Path, tmp_path: Path) -> None:
    """Its run said 0, all that its cache held; a cache of more or fewer sweeps shows it something else."""
    meta = load_checkpoint(teacher).meta
    recipe = cache.recipe
    assert (
        (meta["cache"]["lidar_sweeps"], meta["cache"]["radar_sweeps"]) == (recipe.lidar_sweeps, recipe.radar_sweeps) == (2, 2)
    )
    run = distilled(baseline="none")
    (line,) = sweep_warnings(run, {"lidar": teacher}, 10)
    assert "was trained on 2 LiDAR sweeps and is shown 10" in line and "--set loader.lidar_sweeps=2" in line
    (line,) = sweep_warnings(run, {"lidar": teacher}, 1)
    assert "was trained on 2 LiDAR sweeps and is shown 1" in line and "--set loader" not in line and "build" in line
    more = run.with_values(loader=LoaderConfig(lidar_sweeps=5))  # the newest five of two are two
    assert sweep_warnings(more, {"lidar": teacher}, 2) == []
    config = toy_run().model
    loader = {"lidar_sweeps": 0}
    network = model_from_dict(config)
    old = save_checkpoint(tmp_path / "old", 1, network, meta={"model": config, "run": {"loader": loader}})
    assert sweep_warnings(run, {"lidar": old}, 10) == []  # it does not say: as before


def test_what_a_teacher_is_compared_with(teacher: Path) -> None:
    scored(teacher, 0.50)
    assert own_scores(teacher)["map"] == 0.50
    assert teacher_warnings(toy_run("student"), {"lidar": teacher}) == []  # nothing is distilled
    run = distilled()
    (line,) = teacher_warnings(run, {"lidar": teacher, "label": teacher}, model_name="crn_r50")
    assert "50.0 mAP, the baseline 47.2 (published, crn_r50)" in line or "47.3" in line
    scored(teacher, 0.53)
    assert teacher_warnings(run, {"lidar": teacher}, model_name="crn_r50") == []
    (line,) = teacher_warnings(run, {"lidar": teacher}, model_name="tiny")
    assert "no known baseline" in line
    assert teacher_warnings(run, {"lidar": teacher}, baseline="none", model_name="tiny") == []  # none is meant
    for nobody in ({}, {"checkpoint": {}}, {"checkpoint": {"weights_sha256": "0" * 64}}):  # of weights that are not named
        (teacher / "eval" / "metrics_summary.json").write_text(json.dumps({"mean_ap": 0.9, "nd_score": 0.9, **nobody}))
        assert own_scores(teacher) is None
    (teacher / "eval" / "metrics_summary.json").unlink()


def test_a_networks_own_scores_are_kept_beside_it(cache: Any, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    train(toy_run(max_steps=1), cache, teacher, accelerator="cpu")
    meta = load_checkpoint(teacher).meta
    summary = {"mean_ap": 0.31, "nd_score": 0.42, "num_samples": 9, "engine": "fast", "cache": "c"}
    record_scores(teacher / "last.ckpt", meta, summary)
    kept = json.loads((teacher / "scores.json").read_text())[meta["weights_sha256"]]
    assert kept == {"map": 0.31, "nds": 0.42, "samples": 9, "engine": "fast", "cache": "c", "convention": "bev"}
    assert own_scores(teacher) == {"map": 0.31, "nds": 0.42, "from": str(teacher / "scores.json")}
    train(distilled(), cache, tmp_path / "s", {"lidar": teacher}, accelerator="cpu")
    said = load_checkpoint(tmp_path / "s").meta["teacher_records"]
    assert said == {"lidar": {"weights_sha256": meta["weights_sha256"], "convention": "bev", "map": 0.31, "nds": 0.42}}
    train(toy_run(max_steps=2), cache, teacher, resume=True, accelerator="cpu")  # other weights: the score is not theirs
    assert own_scores(teacher) is None
    (teacher / "scores.json").write_text("{")
    assert own_scores(teacher) is None


def test_the_convention_of_a_lidar_camera_teacher_is_that_of_its_camera_side() -> None:
    from imkd_models.presets import crkd_teacher_config, fusion_config, preset_config
    from pipelines.strength import input_convention

    pillars = preset_config("centerpoint_pillar", convention="mmdet3d_lwh")
    for config, convention in ((crkd_teacher_config(), "bevfusion"), (fusion_config(), "bev"), (pillars, "mmdet3d_lwh")):
        assert input_convention({"model": config.as_dict()}) == convention


def test_settings_that_came_later_do_not_stop_a_resume(cache: Any, tmp_path: Path) -> None:
    """A checkpoint written before ``sampling``, ``paste`` or a model setting existed continues."""
    from pipelines.resumable import check_resumable

    run = toy_run("student")
    now = {**run.as_dict(), "global_batch": 2, "teachers": {}}
    old = json.loads(json.dumps(now))
    for key in ("sampling", "paste", "paste_off_epochs"):
        del old["loader"][key]
    del old["model"]["depth_net"], old["baseline"]
    old["model"]["radar_drop"] = 0.0
    check_resumable(old, now)
    old["loader"]["sampling"] = "cbgs"
    with pytest.raises(MismatchError, match=r"loader\.sampling"):
        check_resumable(old, now)
