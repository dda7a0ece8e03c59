"""What the distillation benchmark runs on: presets (world, networks, steps) and the methods' frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PRESETS", "PUBLISHED_GAIN_NDS", "WEIGHTS", "Preset"]

# Gains over their own baselines that the papers report, in NDS points: context, not pass marks.
PUBLISHED_GAIN_NDS = {"imkd": 5.0, "crkd": 3.2, "adaptive_smooth": 4.5, "dual_distill": 3.9}

_SHORT = {"lidar": "teacher", "label": "label", "fusion": "fusion", "student": "student"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """World and budget. image_hw_px: size of the synthetic images. networks: run by network; steps: optimiser steps by
    network, where absent the run's own epochs; settings: ``--set`` values of every run. admission: refuse to run methods on
    a world and preset that do not pass. real: on a data set that the caller names. stored_teachers: teachers' maps are
    computed once and read from then on, half precision; without augmentation only."""

    name: str
    version: str = "v1.0-trainval"
    scenes: int = 60
    keyframes: int = 12
    val_share: float = 0.4
    image_hw_px: tuple[int, int] = (270, 480)
    steps: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: str = "standard"
    admission: bool = True
    real: bool = False
    stored_teachers: bool = False
    networks: Mapping[str, str] = field(default_factory=lambda: {network: f"bench_{run}" for network, run in _SHORT.items()})


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset(
            name="smoke",
            scenes=4,
            keyframes=2,
            image_hw_px=(225, 400),
            steps={"lidar": 2, "label": 2, "fusion": 2, "student": 2},
            admission=False,
        ),
        # Coarse cells and small images, so that a thousand steps (about twice the plain student's CPU) fit where 340 did at
        # 0.8 m and 128x352. In those 340 the feature terms hardly fell (docs/tuning.md). No augmentation: 23.7 NDS after 500
        # steps with it, 34.7 after 450 without (20 scenes of 10 keyframes).
        Preset(
            name="tiny",
            steps={"lidar": 900, "label": 450, "fusion": 700, "student": 1000},
            settings={"loader.augment.enabled": "false", "loader.lidar_sweeps": 4, "optim.lr": 3e-3},
        ),
        # Tiny's world with three times the student's steps and a LiDAR teacher that knows velocity: on train scenes that were
        # kept back IMKD gained there and not in a thousand steps (docs/tuning.md). The LiDAR-camera teacher has as many.
        Preset(
            name="long",
            steps={"lidar": 2500, "label": 450, "fusion": 2500, "student": 3000},
            settings={
                "loader.augment.enabled": "false",
                "loader.lidar_sweeps": 10,
                "optim.lr": 3e-3,
                "model.velocity_weight": 1,
            },
            stored_teachers=True,
        ),
        Preset(
            name="small",
            scenes=150,
            keyframes=20,
            image_hw_px=(450, 800),
            steps={"lidar": 6000, "label": 3000, "fusion": 6000, "student": 4000},
            networks={**{n: f"tiny_{run}" for n, run in _SHORT.items()}, "student": "small_student"},
            settings={"batch_size": 8, "loader.workers": 8, "precision": "bf16-mixed"},
        ),
        # A holder's own nuScenes. Admission asks what a synthetic world is fit for; here the data are what they are.
        Preset(
            name="nuscenes",
            admission=False,
            real=True,
            networks={"lidar": "pillar_r34", "label": "label", "fusion": "fusion_r50", "student": "crn_r50"},
        ),
    )
}


# Weights of the methods, by preset: found on scenes of train that tuning kept back (``--held-in``), then frozen. A preset
# without an entry uses the methods' own defaults. What val scores of an earlier preset had a part in stands in docs/tuning.md.
# No response term imitates the teacher's velocity: on those scenes the student's radar knows it better (mAVE 0.86 against
# 1.33 and 1.21).
_FROZEN: dict[str, dict[str, float]] = {
    "imkd": {
        "lambda_l2r": 0.05,
        "lambda_l2m": 0.03,
        "lambda_lab2m": 0.03,
        "lambda_resp": 1.0,
        "response_velocity_weight": 0.0,
    },
    "crkd": {"lambda_resp": 0.3, "velocity_weight": 0.0},
    "adaptive_smooth": {"lambda_l2c": 20.0, "lambda_m2m": 20.0, "lambda_srd": 1.0, "velocity_weight": 0.0},
    "dual_distill": {"lambda_mfd": 0.1, "lambda_crd": 0.3, "crd_velocity_weight": 0.0},
}
WEIGHTS: dict[str, dict[str, dict[str, float]]] = {"tiny": _FROZEN, "long": _FROZEN}
