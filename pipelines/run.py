"""A run: everything that decides what training does, as one frozen value with a JSON form.

``Run.from_dict(run.as_dict()) == run``; unknown keys are errors. ``with_settings`` applies ``--set key=value``: a key is a
dotted path (``optim.lr``), a top-level name (``seed``), an option of the method (``stage2_label``), or a name that only one
section has (``lr``).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from imkd_data.errors import RecipeError, UsageError
from imkd_data.loader.augment import AugmentConfig
from imkd_data.loader.request import LOADER_PARITY
from imkd_data.recipe import canonical_json
from pipelines.run_values import check_numbers, fitting, model_value, typed

if TYPE_CHECKING:
    from imkd_models.distill.base import Method

__all__ = ["LoaderConfig", "OptimConfig", "Run", "parse_settings"]

SCHEDULES = ("constant", "step", "cosine", "one_cycle")
SAMPLINGS = ("uniform", "cbgs")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
TEACHER_PRECISIONS = ("32-true", "run")
COUNTED = ("parameters", "modules", "macs", "sample_bytes")  # `imkd runs show` adds them; reading a configuration ignores them


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    milestones: epochs after which ``step`` multiplies lr by gamma. one_cycle: to lr over warmup_share of all steps, then
    cosine to 0. warmup_steps: linear from 0 before any schedule. clip: gradient norm, 0 = none. ema: decay of the averaged
    copy that is deployed, 0 = none. backbone_factor: lr factor of the image backbone.
    """

    lr: float = 2e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "step"
    milestones: tuple[float, ...] = (19.0, 23.0)
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_share: float = 0.3
    clip: float = 5.0
    ema: float = 0.0
    backbone_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """What the stream delivers. split: rows to train on. radar_filter: none | devkit | crn. *_sweeps: newest scans used,
    0 = all stored. intensity_from: source of a moved ``lidar_intensity``: planes | view. parity: released behaviour of public
    loaders by name (docs/defects.md), in training, validation and prediction. cached_teachers: read the maps
    that `imkd cache-teacher` stored instead of running the LiDAR teachers (augmentation must be off). on_bad_sample: stop, or
    skip (the next sample of the order takes its place). sampling: uniform |
    cbgs (every class equally often; the list of rows is saved in the run). paste: objects from other rows for LiDAR
    networks, with at least paste_min_points cached points, at most paste_per_class kept of a class, off in the last
    paste_off_epochs epochs. leave_out: the split's last scenes that are not trained on, a held-in part to tune on."""

    split: str = "train"
    leave_out: int = 0
    shuffle: str = "global"
    workers: int = 2
    radar_filter: str = "crn"
    radar_sweeps: int = 6
    lidar_sweeps: int = 0
    intensity_from: str = "planes"
    parity: tuple[str, ...] = ()
    cached_teachers: bool = False
    on_bad_sample: str = "stop"
    sampling: str = "uniform"
    paste: bool = False
    paste_min_points: int = 5
    paste_per_class: int = 1000
    paste_off_epochs: int = 5
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run.

    model: configuration of the network (``kind`` student | lidar | label | fusion). method, options: distillation, by name or
    as a ``Method`` of your own; the JSON form keeps its name, so resuming such a run needs the value again.
    batch_size: samples per device and step; global_batch: samples per optimiser step over all devices (0 = batch_size
    times devices; the difference is made up by accumulation). epochs or max_steps end the run (max_steps wins when set).
    precision: of the trained network's layers; evaluation is float32 always. teacher_precision: frozen teachers run in float32,
    as their stored maps were made, or (``run``) in the run's precision: faster, and another target by its rounding.
    start: checkpoint whose tensors a new network takes where name and shape agree; the rest begins as built, optimiser, step
    and average anew. sync_batchnorm: batch statistics over all GPUs. validate_every: steps between validations by the
    official metric, 0 = never; what is scored is kept as a checkpoint too. checkpoint_every: steps, 0 = at the end of every
    epoch. baseline: checkpoint of the undistilled student, with which teachers are compared, or ``none`` where no comparison
    is meant. stages: a run of several networks trains them in order; a stage named ``teacher``, ``label`` or ``student`` gives
    its checkpoint to the later ones.
    """

    name: str
    summary: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    method: str | Method | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: int = 24
    max_steps: int = 0
    batch_size: int = 4
    global_batch: int = 0
    precision: str = "32-true"
    teacher_precision: str = "32-true"
    sync_batchnorm: bool = False
    checkpoint_every: int = 0
    keep: int = 2
    log_every: int = 10
    validate_every: int = 0
    tensorboard: bool = True
    baseline: str = ""
    start: str = ""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    stages: tuple[Run, ...] = ()

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("optim.schedule", self.optim.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
            ("teacher_precision", self.teacher_precision, TEACHER_PRECISIONS),
            ("loader.sampling", self.loader.sampling, SAMPLINGS),
            ("loader.shuffle", self.loader.shuffle, ("global", "block", "none")),
            ("loader.radar_filter", self.loader.radar_filter, ("none", "devkit", "crn")),
            ("loader.intensity_from", self.loader.intensity_from, ("planes", "view")),
            ("loader.on_bad_sample", self.loader.on_bad_sample, ("stop", "skip")),
        ):
            if value not in allowed:
                raise RecipeError(f"run setting {key}", expected=", ".join(allowed), found=str(value))
        if unknown := [str(name) for name in self.loader.parity if name not in LOADER_PARITY]:
            raise RecipeError("run setting loader.parity", expected=", ".join(LOADER_PARITY), found=", ".join(unknown))
        if self.loader.paste and self.model.get("kind", "lidar") != "lidar":
            raise RecipeError(
                "objects are pasted for LiDAR networks only: a pasted object has no image and no radar return",
                found=f"{self.name}, a {self.model.get('kind')} network",
                next="--set loader.paste=off",
            )
        if self.pastes and self.loader.cached_teachers:
            raise RecipeError(
                "stored teachers' maps hold no pasted objects",
                found="pasted objects, loader.cached_teachers=on",
                next="--set loader.cached_teachers=off",
            )
        check_numbers(self)

    @property
    def pastes(self) -> bool:
        """Objects of other samples are pasted: LiDAR networks' option, and for students what CRKD's public code does."""
        return self.loader.paste or "paste:students" in self.loader.parity

    def as_dict(self) -> dict[str, Any]:
        """JSON form; ``from_dict`` reads it back."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["method"] = None if self.method is None else str(self.method)
        out["optim"] = asdict(self.optim)
        out["loader"] = {**asdict(self.loader), "augment": self.loader.augment.as_dict()}
        out["stages"] = [s.as_dict() for s in self.stages]
        return json.loads(canonical_json({**out, "model": dict(self.model), "options": dict(self.options)}))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Run:
        """From the JSON form. Errors: RecipeError naming unknown, missing or mistyped keys."""
        values = {k: v for k, v in value.items() if k not in COUNTED}
        _known(cls, values, "run")
        example = cls(name="").as_dict()
        for key, found in values.items():
            if key != "method":
                fitting(key, found, example[key])
            elif isinstance(found, bool | int | float | list | tuple | Mapping):
                raise RecipeError("setting method", expected="a name, or null", found=repr(found))
        if "optim" in values:
            values["optim"] = _section(OptimConfig, values["optim"], "optim")
        if "loader" in values:
            loader = dict(values["loader"])
            if "augment" in loader:
                loader["augment"] = AugmentConfig.from_dict(loader["augment"])
            values["loader"] = _section(LoaderConfig, loader, "loader")
        values["stages"] = tuple(cls.from_dict(fitting("stages", s, {})) for s in values.get("stages", ()))
        try:
            return cls(**values)
        except TypeError as error:
            raise RecipeError(f"run cannot be read: {error}") from error

    def with_values(self, **changes: Any) -> Run:
        """A changed copy."""
        return replace(self, **changes)

    def with_method(self, method: str | Method) -> Run:
        """The run with a distillation method, a name or a value of your own ("none" for none); in a run of several stages,
        its students' method."""
        if self.stages:
            stages = tuple(s.with_method(method) if s.model.get("kind") == "student" else s for s in self.stages)
            return replace(self, stages=stages)
        if method == "none":
            return replace(self, method=None, options={})
        from imkd_models.distill import make_method

        make_method(method)  # an unknown name is an error here already
        return replace(self, method=method, options=self.options if method == self.method else {})

    def with_max_steps(self, steps: int) -> Run:
        """At most ``steps`` optimiser steps; several stages share them in proportion to their own steps, or all to their
        epochs, each at least one. Errors: UsageError where some stages count steps and others epochs."""
        if not self.stages:
            return replace(self, max_steps=steps)
        by_steps = any(s.max_steps for s in self.stages)
        parts = [s.max_steps if by_steps else s.epochs for s in self.stages]
        if not all(parts):
            ends = ", ".join(f"{s.name} {s.max_steps or s.epochs} {'steps' if s.max_steps else 'epochs'}" for s in self.stages)
            raise UsageError(
                f"max_steps cannot be shared by the stages of run {self.name}",
                expected="every stage ended by max_steps, or every stage by epochs",
                found=ends,
                next="--set STAGE.max_steps=N for each stage",
            )
        shares = [max(1, part * steps // sum(parts)) for part in parts]
        stages = tuple(
            replace(s, max_steps=min(s.max_steps or share, share)) for s, share in zip(self.stages, shares, strict=True)
        )
        return replace(self, max_steps=min(self.max_steps or steps, steps), stages=stages)

    def with_settings(self, settings: Mapping[str, Any]) -> Run:
        """Apply ``--set`` values. In a run of several stages ``stage.key`` reaches one stage and a plain key every stage
        that has it. Errors: UsageError naming the unknown key and close names."""
        if not self.stages:
            return _apply(self, settings)
        names = {s.name: dict[str, Any]() for s in self.stages}
        for key, value in settings.items():
            first, _, rest = key.partition(".")
            if rest and first in names:
                names[first][rest] = value
                continue
            takers = [s.name for s in self.stages if _accepts(s, key)]
            if not takers:
                raise _unknown_key(self.stages[-1], key)
            for name in takers:
                names[name][key] = value
        stages = tuple(_apply(s, names[s.name]) for s in self.stages)
        own = {k: v for k, v in settings.items() if k == "seed"}
        return _apply(replace(self, stages=stages), own)


def _known(cls: type[Any], values: Mapping[str, Any], what: str) -> None:
    known = [f.name for f in fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise RecipeError(f"{what} has unknown keys", expected=", ".join(known), found=", ".join(unknown))


def _section(cls: type[Any], value: Mapping[str, Any], what: str) -> Any:
    _known(cls, value, what)
    defaults = cls()
    return cls(**{k: typed(f"{what}.{k}", v, getattr(defaults, k)) for k, v in value.items()})


def _method_options(run: Run) -> dict[str, Any]:
    if run.method is None:
        return {}
    from imkd_models.distill import make_method

    return dict(make_method(run.method).options.defaults())


def _place(run: Run, key: str) -> tuple[str, ...] | None:
    """Path of a setting inside the run, None where there is none."""
    head, _, rest = key.partition(".")
    sections: dict[str, Mapping[str, Any]] = {
        "optim": asdict(run.optim),
        "loader": asdict(run.loader),
        "augment": run.loader.augment.as_dict(),
        "model": run.model,
        "options": {**_method_options(run), **run.options, "preset": ""} if run.method else {},
    }
    if rest:
        if key.startswith("loader.augment."):
            head, rest = "augment", key.removeprefix("loader.augment.")
        if isinstance(sections["options"].get(head), Mapping):  # joined methods nest their options: imkd.stage1=off
            return ("options", key)
        return (head, rest) if rest in sections.get(head, {}) else None
    if key in {f.name for f in fields(run)} - {"optim", "loader", "model", "options", "stages"}:
        return (key,)
    if key in sections["options"]:
        return ("options", key)
    homes = [s for s in ("optim", "loader", "augment", "model") if key in sections[s]]
    return (homes[0], key) if len(homes) == 1 else None


def _accepts(run: Run, key: str) -> bool:
    return _place(run, key) is not None


def _unknown_key(run: Run, key: str) -> UsageError:
    names = [f.name for f in fields(run)] + [f"optim.{f.name}" for f in fields(OptimConfig)]
    names += [f"loader.{f.name}" for f in fields(LoaderConfig)] + [f"augment.{f.name}" for f in fields(AugmentConfig)]
    names += [f"model.{k}" for k in run.model] + list(_method_options(run))
    tail = {n.rpartition(".")[2]: n for n in names}
    close = difflib.get_close_matches(key, names, 4, 0.5) or [tail[k] for k in difflib.get_close_matches(key, tail, 4, 0.5)]
    method = f"; method {run.method}" if run.method else "; no --method is set, so method options are unknown"
    return UsageError(
        f"no setting {key!r} in run {run.name}{method}",
        expected=", ".join(close) or "see `imkd runs show NAME` and `imkd methods`",
        found=key,
    )


def _apply(run: Run, settings: Mapping[str, Any]) -> Run:
    for key, value in settings.items():
        place = _place(run, key)
        if place is None:
            raise _unknown_key(run, key)
        if len(place) == 1:
            example = getattr(run, key)
            run = replace(run, **{key: value if example is None else typed(key, value, example)})
            continue
        section, leaf = place
        if section == "options":  # the method's own options class gives the type
            run = replace(run, options={**run.options, leaf: value})
        elif section == "model":
            example = run.model[leaf]
            run = replace(run, model={**run.model, leaf: model_value(leaf, value, example)})
        elif section == "augment":
            changed = replace(run.loader.augment, **{leaf: typed(key, value, getattr(run.loader.augment, leaf))})
            run = replace(run, loader=replace(run.loader, augment=changed))
        else:
            config = getattr(run, section)
            run = replace(run, **{section: replace(config, **{leaf: typed(key, value, getattr(config, leaf))})})
    return run


def parse_settings(items: Iterable[str], option: str = "--set") -> dict[str, str]:
    """``("optim.lr=1e-3", "seed=2")`` -> dict of strings. Errors: UsageError for an item without ``=``, naming the option."""
    out = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise UsageError(f"{option} needs key=value", found=item)
        out[key.strip()] = value.strip()
    return out
