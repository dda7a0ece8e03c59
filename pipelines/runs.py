"""The runs by name: functions that return a ``Run``. One function a run; no work at import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from imkd_data.errors import UsageError
from imkd_data.geometry import BevGrid
from imkd_data.loader.augment import IDENTITY, AugmentConfig
from pipelines.run import LoaderConfig, OptimConfig, Run

__all__ = ["RUNS", "get_run"]

_FITTING = LoaderConfig(split="all", workers=0, augment=IDENTITY)
_TINY = LoaderConfig(workers=0)


def _preset(name: str, **changes: Any) -> dict[str, Any]:
    from imkd_models.presets import preset_config

    return preset_config(name, **changes).as_dict()


def _fit(name: str, summary: str, model: dict[str, Any], steps: int, lr: float, **changes: Any) -> Run:
    """A network that memorises a few rows: no augmentation, no weight decay, one-cycle."""
    values: dict[str, Any] = {
        "batch_size": 1,
        "max_steps": steps,
        "checkpoint_every": 100,
        "keep": 1,
        "optim": OptimConfig(lr=lr, weight_decay=0.0, schedule="one_cycle", warmup_share=0.15, clip=10.0),
        "loader": _FITTING,
    }
    return Run(name=name, summary=summary, model=model, **{**values, **changes})


def overfit() -> Run:
    """Teacher, label encoder and IMKD student memorise the cache's rows, validation rows too; at most 800 steps in all."""
    return Run(
        name="overfit",
        summary="teacher, label encoder and IMKD student memorise the rows of a small cache (augmentation off)",
        epochs=0,
        max_steps=750,
        batch_size=1,
        loader=_FITTING,
        stages=(
            _fit("teacher", "LiDAR teacher", _preset("tiny_lidar"), 250, 4e-3),
            _fit("label", "label encoder", _preset("tiny_label"), 100, 3e-3),
            _fit("student", "IMKD student", _preset("tiny"), 400, 3e-3, method="imkd"),
        ),
    )


def tiny_teacher() -> Run:
    """LiDAR teacher for CPUs."""
    return Run(
        name="tiny_teacher",
        summary="LiDAR pillar teacher small enough for a CPU",
        model=_preset("tiny_lidar"),
        epochs=12,
        batch_size=2,
        optim=OptimConfig(lr=2e-3, weight_decay=1e-2, schedule="one_cycle", ema=0.99),
        loader=_TINY,
    )


def tiny_label() -> Run:
    """Label encoder of a tiny LiDAR teacher; needs --teacher lidar=CKPT."""
    return Run(
        name="tiny_label",
        summary="label encoder through a frozen LiDAR teacher (needs --teacher lidar=CKPT)",
        model=_preset("tiny_label"),
        epochs=6,
        batch_size=2,
        optim=OptimConfig(lr=1e-3, weight_decay=1e-7, schedule="one_cycle"),
        loader=_TINY,
    )


def tiny_student() -> Run:
    """Camera-radar student for CPUs; a method is chosen with --method."""
    return Run(
        name="tiny_student",
        summary="camera-radar student small enough for a CPU; add --method and --teacher to distil",
        model=_preset("tiny"),
        epochs=12,
        batch_size=2,
        optim=OptimConfig(lr=2e-3, weight_decay=1e-2, schedule="one_cycle", ema=0.99),
        loader=_TINY,
    )


def tiny_fusion() -> Run:
    """LiDAR-camera teacher for CPUs."""
    return Run(
        name="tiny_fusion",
        summary="LiDAR-camera teacher small enough for a CPU (crkd, adaptive_smooth)",
        model=_preset("tiny_fusion"),
        epochs=12,
        batch_size=2,
        optim=OptimConfig(lr=2e-3, weight_decay=1e-2, schedule="one_cycle", ema=0.99),
        loader=_TINY,
    )


# The distillation benchmark: 1.6 m cells and 96x256 images halve a step of the tiny networks, and longer runs are what the
# methods' feature terms need (docs/tuning.md).
_BENCH: dict[str, Any] = {"grid": BevGrid(x_min_m=-51.2, y_min_m=-51.2, cell_m=1.6, nx=64, ny=64)}
_BENCH_CAMERA: dict[str, Any] = {**_BENCH, "image_hw_px": (96, 256)}
# What the benchmark's students have of CRN beyond ``tiny``: its attention as fuser, so that IMKD's stage 3 is all that its
# network has beyond the plain one; velocity weighed like every other box value, without which a thousand steps do not learn it.
_BENCH_STUDENT: dict[str, Any] = {"fuser": "deformable", "velocity_weight": 1.0}


def bench_teacher() -> Run:
    """LiDAR teacher of the distillation benchmark."""
    summary = "LiDAR teacher of the distillation benchmark (1.6 m cells)"
    return replace(tiny_teacher(), name="bench_teacher", summary=summary, model=_preset("tiny_lidar", **_BENCH))


def bench_label() -> Run:
    """Label encoder of ``bench_teacher``; needs --teacher lidar=CKPT."""
    from imkd_models.presets import tiny_label_config

    summary = "label encoder of the distillation benchmark (needs --teacher lidar=CKPT)"
    return replace(tiny_label(), name="bench_label", summary=summary, model=tiny_label_config(**_BENCH).as_dict())


def bench_student() -> Run:
    """Student of the distillation benchmark."""
    summary = "camera-radar student of the distillation benchmark (1.6 m cells, 96x256 images)"
    model = _preset("tiny", **_BENCH_STUDENT, **_BENCH_CAMERA)
    return replace(tiny_student(), name="bench_student", summary=summary, model=model)


def small_student() -> Run:
    """Student of the benchmark's ``small`` preset: ``tiny_student`` with what ``bench_student`` has of CRN."""
    summary = "camera-radar student of the benchmark's small preset (CRN's attention as fuser)"
    return replace(tiny_student(), name="small_student", summary=summary, model=_preset("tiny", **_BENCH_STUDENT))


def bench_fusion() -> Run:
    """LiDAR-camera teacher of the distillation benchmark."""
    from imkd_models.presets import tiny_config, tiny_fusion_config, tiny_lidar_config

    camera = tiny_config(radar=False, depth_input=True, **_BENCH_CAMERA)
    model = tiny_fusion_config(lidar=tiny_lidar_config(**_BENCH), student=camera, **_BENCH)
    summary = "LiDAR-camera teacher of the distillation benchmark"
    return replace(tiny_fusion(), name="bench_fusion", summary=summary, model=model.as_dict())


# Full size. Schedules: crn section 4, imkd sections 2.1, 2.2 and 8.
_LARGE = LoaderConfig(workers=8)
# CRN leaves out a tenth of the radar returns and one of six sweeps.
_CAMERA_RADAR = LoaderConfig(workers=8, augment=AugmentConfig(radar_drop=0.1, radar_sweeps_kept=5))
# The public CenterPoint pastes objects until five epochs before the end.
_LIDAR = LoaderConfig(workers=8, paste=True)


def _student(name: str, summary: str, preset: str, *, method: str | None = None, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "epochs": 24,
        "batch_size": 4,
        "global_batch": 16,
        "precision": "bf16-mixed",
        "optim": OptimConfig(ema=0.999),
        "loader": _CAMERA_RADAR,
    }
    return Run(name=name, summary=summary, model=_preset(preset), method=method, **{**values, **changes})


def crn_r50() -> Run:
    """CRN, ResNet-50, 256x704, four keyframes, as published: no EMA."""
    return _student("crn_r50", "CRN baseline, ResNet-50, 256x704", "crn_r50", optim=OptimConfig())


def crn_r18() -> Run:
    """CRN, ResNet-18."""
    return _student("crn_r18", "CRN baseline, ResNet-18, 256x704", "crn_r18", optim=OptimConfig())


def imkd_r50() -> Run:
    """IMKD on CRN ResNet-50; needs --teacher lidar=CKPT --teacher label=CKPT."""
    return _student("imkd_r50", "IMKD student, ResNet-50, 256x704", "crn_r50", method="imkd")


def imkd_r101() -> Run:
    """IMKD on CRN ResNet-101, 512x1408."""
    return _student("imkd_r101", "IMKD student, ResNet-101, 512x1408", "crn_r101", method="imkd", batch_size=2)


def imkd_convnext_b() -> Run:
    """IMKD with ConvNeXt-B."""
    return _student("imkd_convnext_b", "IMKD student, ConvNeXt-B, 256x704", "convnext_b", method="imkd")


def imkd_swin_t() -> Run:
    """IMKD with Swin-T."""
    return _student("imkd_swin_t", "IMKD student, Swin-T, 256x704", "swin_t", method="imkd")


def _teacher(name: str, summary: str, preset: str, loader: LoaderConfig = _LIDAR) -> Run:
    return Run(
        name=name,
        summary=summary,
        model=_preset(preset),
        epochs=20,
        batch_size=4,
        global_batch=16,
        precision="bf16-mixed",
        optim=OptimConfig(lr=1e-4, weight_decay=1e-2, milestones=(16.0, 19.0), ema=0.999, clip=35.0),
        loader=loader,
    )


def centerpoint_pillar() -> Run:
    """LiDAR teacher: CenterPoint with 0.2 m pillars."""
    return _teacher("centerpoint_pillar", "LiDAR teacher, CenterPoint with 0.2 m pillars", "centerpoint_pillar")


def pillar_r34() -> Run:
    """LiDAR teacher: dense 0.1 m pillars, ResNet-34 stages."""
    return _teacher("pillar_r34", "LiDAR teacher, 0.1 m pillars with ResNet-34 stages", "pillar_r34")


def voxel() -> Run:
    """LiDAR teacher: CenterPoint with 0.1 m voxels; needs spconv."""
    return _teacher("voxel", "LiDAR teacher, CenterPoint with 0.1 m voxels (needs spconv)", "voxel")


def bevdepth_r50() -> Run:
    """BEVDepth, ResNet-50, camera only: the baseline without radar."""
    turned = AugmentConfig(image_rotation_deg=(-5.4, 5.4), bev_scale=(0.95, 1.05))
    loader = LoaderConfig(workers=8, augment=turned)
    return _student("bevdepth_r50", "BEVDepth baseline, ResNet-50, camera only", "bevdepth_r50", loader=loader)


# CRKD section 5: images turned, no BEV rotation for networks with radar (its shift of 0.5 m is left out), classes balanced,
# no pasting.
_CRKD_IMAGES = AugmentConfig(
    image_scale=(0.38 / 0.44, 0.55 / 0.44), evaluation_scale=0.48 / 0.44, image_rotation_deg=(-5.4, 5.4), rotation_deg=(0, 0)
)
_CRKD_OPTIM = OptimConfig(lr=1e-4, weight_decay=1e-2, schedule="cosine", warmup_steps=500, clip=35.0)


def _crkd_student(name: str, summary: str) -> Run:
    loader = LoaderConfig(workers=8, sampling="cbgs", radar_filter="none", augment=_CRKD_IMAGES)
    values: dict[str, Any] = {"epochs": 20, "batch_size": 2, "global_batch": 8, "optim": _CRKD_OPTIM, "loader": loader}
    return _student(name, summary, name, method="crkd", options={"preset": "crkd_paper"}, **values)


def crkd_r50() -> Run:
    """CRKD, ResNet-50, its own grid; needs --teacher fusion=CKPT on that grid (crkd_teacher, or imported). As published it
    goes on from a trained student: ``--set start=CKPT``; without it the student starts as built, its image
    backbone at random unless ``model.backbone_weights`` is set."""
    return _crkd_student("crkd_r50", "CRKD student, ResNet-50, 180x180 cells of 0.6 m")


def crkd_swin_t() -> Run:
    """CRKD, Swin-T; teacher and start as for ``crkd_r50``."""
    return _crkd_student("crkd_swin_t", "CRKD student, Swin-T, 180x180 cells of 0.6 m")


def crkd_teacher() -> Run:
    """CRKD's LiDAR-camera teacher, ResNet-50; needs spconv."""
    optim = replace(_CRKD_OPTIM, lr=2e-4, backbone_factor=0.1)
    loader = LoaderConfig(workers=8, sampling="cbgs", augment=replace(_CRKD_IMAGES, rotation_deg=(-45.0, 45.0)))
    summary = "CRKD's LiDAR-camera teacher, 0.075 m voxels and ResNet-50 (needs spconv)"
    return _teacher("crkd_teacher", summary, "crkd_teacher", loader).with_values(optim=optim)


def fusion_r50() -> Run:
    """LiDAR-camera teacher of crkd and adaptive_smooth."""
    return _teacher("fusion_r50", "LiDAR-camera teacher, pillars and ResNet-50", "fusion", _LARGE)


def label() -> Run:
    """Label encoder of a full-size LiDAR teacher; needs --teacher lidar=CKPT."""
    return Run(
        name="label",
        summary="label encoder through a frozen LiDAR teacher (needs --teacher lidar=CKPT)",
        model=_preset("label"),
        epochs=12,
        batch_size=4,
        global_batch=16,
        optim=OptimConfig(lr=1e-3, weight_decay=1e-7, milestones=(10.0, 11.0), ema=0.999),
        loader=_LARGE,
    )


RUNS: dict[str, Callable[[], Run]] = {
    f.__name__: f
    for f in (
        overfit,
        tiny_teacher,
        tiny_label,
        tiny_student,
        tiny_fusion,
        bench_teacher,
        bench_label,
        bench_student,
        bench_fusion,
        small_student,
        imkd_r50,
        imkd_r101,
        imkd_convnext_b,
        imkd_swin_t,
        crn_r50,
        crn_r18,
        bevdepth_r50,
        centerpoint_pillar,
        pillar_r34,
        voxel,
        crkd_r50,
        crkd_swin_t,
        crkd_teacher,
        fusion_r50,
        label,
    )
}


def get_run(name: str) -> Run:
    """The run of that name. Errors: UsageError listing the names."""
    if name not in RUNS:
        raise UsageError(f"no run {name!r}", expected=", ".join(RUNS), found=name, next="see `imkd runs`")
    return RUNS[name]()
