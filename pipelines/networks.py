"""From a run to modules: the network, its frozen teachers, the distiller, and what the stream must deliver for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imkd_data.errors import MismatchError, MissingFeatureError, UsageError
from imkd_data.loader.batch import Batch
from imkd_models.blocks import StepCounts
from imkd_models.checkpoint import load_checkpoint, load_model, weights_hash
from imkd_models.config import FusionConfig, LabelConfig, LidarConfig, ModelConfig, StudentConfig
from imkd_models.convention import lidar_features
from imkd_models.distill import FrozenTeacher, Method, check_needs, gradient_norms, make_method
from imkd_models.distill.base import Distiller
from imkd_models.outputs import Outputs
from imkd_models.presets import build_model, config_from_dict, label_config_for
from pipelines.cache_teacher import CachedTeacher
from pipelines.machine import channels_last
from pipelines.run import Run
from pipelines.strength import input_convention

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["Networks", "Sealed", "TrainUnit", "build_networks", "place", "stream_values", "use_cached_teachers"]

STATE_FEATURES = ("rcs_dbsm", "dyn_prop", "ambig_state", "invalid_state", "pdh0")


@dataclass(slots=True, kw_only=True)
class Networks:
    """config: of the network as built (method changes applied). teacher_sha256: identity of every teacher's weights.
    head_start: tensors of the student's head that a fresh one takes from a teacher. start: what ``run.start`` gave.
    kept: networks that the checkpoint must hold besides the model (a label encoder's LiDAR teacher)."""

    model: nn.Module
    config: ModelConfig
    teachers: dict[str, FrozenTeacher] = field(default_factory=dict)
    distiller: Distiller | None = None
    method: Method | None = None
    options: dict[str, Any] = field(default_factory=dict)
    teacher_sha256: dict[str, str] = field(default_factory=dict)
    head_start: tuple[str, ...] = ()
    start: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def grid(self) -> Any:
        """Grid of the head maps."""
        return self.config.grid


class Sealed:
    """A batch that Fabric passes on untouched. Under mixed precision it would convert every argument: it refuses frozen
    values, and places and times must stay float32 anyway. Autocast converts what a layer may take in half precision."""

    __slots__ = ("batch",)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch


class TrainUnit(nn.Module):
    """Network and distiller in one module, so that distributed training synchronises both; teachers stay outside.

    ``forward(batch)`` -> weighted loss terms by log name; once Fabric has wrapped the unit, it is given ``Sealed(batch)``.
    ``expect(batches)`` before the first of several micro-batches of a step: detection and depth losses are then normalised
    by the counts of all of them, as in one large batch. Normalisers of a distillation method stay those of a micro-batch,
    because some follow from network outputs. ``measure_pull()``: the next forward leaves in ``pull`` how hard each term of the
    method pulls at ``bev_fused``, relative to the task's losses.
    """

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.model = networks.model
        self.distiller = networks.distiller
        self.pull: dict[str, float] = {}
        self._measured = True
        self._expected: tuple[Batch, ...] = ()
        self._counts: StepCounts | None = None
        self._teachers = (networks.teachers,)  # a tuple: their weights are in no state dict, optimiser or DDP bucket

    def expect(self, batches: Sequence[Batch]) -> None:
        """The micro-batches of the step that begins; one alone needs nothing."""
        self._expected, self._counts = tuple(batches) if len(batches) > 1 else (), None

    def measure_pull(self) -> None:
        """In the next forward; one backward pass a term, as far as ``bev_fused``."""
        self._measured = False

    def _measure(self, task: Mapping[str, Tensor], method: Mapping[str, Tensor], outputs: Outputs) -> None:
        self._measured, self.pull = True, {}
        fused = outputs.features.get("bev_fused")
        if fused is not None and fused.requires_grad:
            norms = gradient_norms({"": sum(task.values(), torch.zeros(())), **method}, {"fused": [fused]})
            base = norms.pop("")["fused"]
            self.pull = {name: norm["fused"] / base for name, norm in norms.items()} if base > 0 else {}

    def _loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        loss: Any = self.model.loss
        if self._expected:  # the counts need truth alone: the first outputs stand in for all
            self._counts = StepCounts()
            with torch.no_grad():
                for each in self._expected:
                    with self._counts.gathering():
                        loss(outputs, each)
            self._expected = ()
        with nullcontext() if self._counts is None else self._counts.given():
            return dict(loss(outputs, batch))

    def forward(self, given: Batch | Sealed) -> dict[str, Tensor]:
        """Terms of the detection loss and of the method."""
        batch = given.batch if isinstance(given, Sealed) else given
        outputs = self.model(batch)
        terms = self._loss(outputs, batch)
        if self.distiller is not None:
            theirs = {name: teacher(batch) for name, teacher in self._teachers[0].items()}
            of_method = self.distiller(outputs, theirs, batch)
            if not self._measured:
                self._measure(terms, of_method, outputs)
            terms.update(of_method)
        return terms


def _load_teachers(paths: Mapping[str, Path | str]) -> tuple[dict[str, FrozenTeacher], dict[str, str], dict[str, Any]]:
    teachers, hashes, metas = {}, {}, {}
    for name, path in paths.items():
        network, meta = load_model(path, attach=False)
        teachers[name], hashes[name], metas[name] = FrozenTeacher(network, name=name), meta["weights_sha256"], meta
    return teachers, hashes, metas


def build_networks(run: Run, teachers: Mapping[str, Path | str] | None = None, *, pretrained: bool = True) -> Networks:
    """Build everything a run trains with, on the CPU; weights depend on ``run.seed`` alone.

    Raises:
        MissingFeatureError: a teacher is not given, or a network does not deliver what the method reads.
        UsageError: a teacher that nothing uses. MismatchError: a teacher of another kind than its role, a label encoder of
        another LiDAR teacher, a start that does not fit.
    """
    given = dict(teachers or {})
    torch.manual_seed(run.seed)
    config = config_from_dict(run.model)
    if isinstance(config, LabelConfig):
        return _label_networks(run, config, given)
    method = make_method(run.method) if run.method else None
    if method is None or not isinstance(config, StudentConfig):
        if run.method and not isinstance(config, StudentConfig):
            raise UsageError(
                f"method {run.method} trains a student, and this run trains a {config.kind} network", found=run.name
            )
        if given:
            raise UsageError(
                f"run {run.name} uses no teacher",
                found=", ".join(given),
                next="choose a method with --method (see `imkd methods`)",
            )
        model, start = _started(run, config, pretrained)
        return Networks(model=model, config=config, start=start)
    options = method.make_options(run.options)
    if options.neighbours and run.batch_size < 2:
        raise UsageError(f"{', '.join(options.neighbours)} needs a batch of at least 2", found=f"batch_size={run.batch_size}")
    config = config.with_values(**method.changes(options))
    model, start = _started(run, config, pretrained)
    wanted = method.teachers_for(options)
    if extra := sorted(set(given) - set(wanted)):
        raise UsageError(
            f"method {method.name} does not use teacher {', '.join(extra)}",
            expected=", ".join(wanted) or "no teacher",
            found=", ".join(given),
        )
    _refuse_missing(method.name, wanted, given)
    frozen, hashes, metas = _load_teachers(given)
    _check_kinds(metas, given)
    for teacher in frozen.values():
        teacher.in_float32 = run.teacher_precision == "32-true"
    _check_label_teacher(metas, hashes)
    needs = method.needs_for(options)
    check_needs(needs, model, frozen)
    head_start = () if method.prepare is None else tuple(method.prepare(options, model, frozen))
    distiller = method.build(options, model, frozen, config.grid)
    return Networks(
        model=model,
        config=config,
        teachers={n: t for n, t in frozen.items() if n in needs.teachers},
        distiller=distiller,
        method=method,
        options=options.as_dict(),
        teacher_sha256=hashes,
        head_start=head_start,
        start=start,
    )


def _started(run: Run, config: ModelConfig, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    """The network, with the tensors of ``run.start`` where name and shape agree, and what that was: weights_sha256, tensors
    (number taken), new (names of those that begin as built)."""
    model = build_model(config, pretrained=pretrained and not run.start)
    if not run.start:
        return model, {}
    saved = load_checkpoint(run.start)
    own, theirs = model.state_dict(), saved.model
    taken = [name for name, value in own.items() if name in theirs and theirs[name].shape == value.shape]
    there, here = ((m["model"].get("kind"), input_convention(m)) for m in (saved.meta, {"model": config.as_dict()}))
    if not taken or there != here:
        raise MismatchError(
            "the checkpoint to start from belongs to another network",
            file=run.start,
            expected=f"{here[0]} with inputs in convention {here[1]}, tensors like {', '.join(list(own)[:3])}",
            found=f"{there[0]}, {there[1]}, {', '.join(list(theirs)[:3])}",
            next="start from a network of the same kind",
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(theirs[name])
    return model, {
        "weights_sha256": saved.meta["weights_sha256"],
        "tensors": len(taken),
        "new": sorted(set(own) - set(taken)),
    }


_ADVICE = {"label": "; without it: --set stage2_label=off"}


def _refuse_missing(method: str, wanted: tuple[str, ...], given: Mapping[str, Any]) -> None:
    missing = [n for n in wanted if n not in given]
    if missing:
        flags = " ".join(f"--teacher {n}=CKPT" for n in missing)
        advice = "".join(_ADVICE.get(n, "") for n in missing) if method == "imkd" else ""
        raise MissingFeatureError(
            f"method {method} needs teacher {', '.join(missing)}",
            rule="train.teachers",
            expected=", ".join(wanted),
            found=", ".join(given) or "none",
            next=flags + advice,
        )


# A method of your own may call its teachers otherwise; then it says itself what it needs of them.
_KIND_OF_ROLE = {"lidar": LidarConfig.kind, "label": LabelConfig.kind, "fusion": FusionConfig.kind}


def _check_kinds(metas: Mapping[str, Any], given: Mapping[str, Path | str]) -> None:
    """Maps of the same names fit by chance: another kind of network would teach without a word."""
    for role, meta in metas.items():
        wanted, found = _KIND_OF_ROLE.get(role), meta["model"].get("kind")
        if wanted is not None and found != wanted:
            raise MismatchError(
                f"teacher {role} is a {found} network",
                rule="train.teacher_kind",
                expected=f"a {wanted} network",
                found=f"{found}, {meta.get('name') or 'without a name'}",
                file=str(given[role]),
                next=f"--teacher {role}=CKPT of a {wanted} network (`imkd runs` lists those to train)",
            )


def _check_label_teacher(metas: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """A label encoder speaks the features of the LiDAR teacher it was trained with."""
    if {"label", "lidar"} <= set(metas):
        trained_with = metas["label"]["model"].get("teacher_sha256", "")
        if trained_with and trained_with != hashes["lidar"]:
            raise MismatchError(
                "the label teacher was trained with another LiDAR teacher",
                expected=f"weights {trained_with[:16]}",
                found=f"weights {hashes['lidar'][:16]}",
                next="train the label encoder again with this LiDAR teacher",
            )


def _label_networks(run: Run, config: LabelConfig, given: Mapping[str, Path | str]) -> Networks:
    if run.method:
        raise UsageError("a label encoder is trained without a method", found=run.method)
    if run.start:
        raise UsageError("a label encoder starts from its LiDAR teacher", found=f"start={run.start}")
    _refuse_missing(f"run {run.name}", ("lidar",), given)
    if extra := sorted(set(given) - {"lidar"}):
        raise UsageError("a label encoder has one teacher, lidar", found=", ".join(extra))
    teacher: Any
    teacher, meta = load_model(given["lidar"])
    _check_kinds({"lidar": meta}, given)
    fitted = label_config_for(teacher, name=config.name, hidden=config.hidden)
    digest = weights_hash(teacher)
    fitting = config.with_values(stages=fitted.stages, grid=fitted.grid, groups=fitted.groups, teacher_sha256=digest)
    torch.manual_seed(run.seed)
    model = build_model(fitting, teacher=teacher)
    return Networks(model=model, config=fitting, teacher_sha256={"lidar": digest}, kept={"teacher_lidar": teacher})


def place(networks: Networks, device: torch.device) -> TrainUnit:
    """Teachers on the device and, on a GPU, all convolutions channels last; what is trained, for Fabric to set up."""
    teachers = networks.teachers.values()
    if device.type == "cuda":
        for module in (networks.model, *networks.kept.values(), *(t.network for t in teachers)):
            channels_last(module)
        if networks.distiller is not None:
            channels_last(networks.distiller)
    for teacher in teachers:
        teacher.to(device)
    return TrainUnit(networks)


def use_cached_teachers(networks: Networks, cache: Cache) -> None:
    """Replace teachers by ones that read their stored maps, all but label encoders and those whose answer depends on the rest
    of the batch or is not their checkpoint's. Errors: MissingFeatureError naming the command."""
    if networks.method is None:
        return
    needs = networks.method.needs_for(networks.method.make_options(networks.options))
    for name, teacher in networks.teachers.items():
        if isinstance(teacher.network.config, LabelConfig) or teacher.batch_statistics or teacher.altered:
            continue  # a label encoder reads boxes alone and is cheap
        cached = CachedTeacher(teacher, networks.teacher_sha256[name], needs.teachers[name])
        cached.check(cache)
        networks.teachers[name] = cached


def stream_values(networks: Networks) -> dict[str, Any]:
    """Arguments of ``imkd_data.stream`` that follow from the networks: fields, history, image size, grid, columns."""
    parts, history = {"boxes"}, {0}
    image_hw, features = None, ["rcs_dbsm"]
    stored = [t for t in networks.teachers.values() if isinstance(t, CachedTeacher)]
    parts |= {name for t in stored for name in t.stored.values()}
    running = [t.network.config for t in networks.teachers.values() if not isinstance(t, CachedTeacher)]
    configs: list[Any] = [networks.config, *running]
    for config in configs:
        camera = config.student if isinstance(config, FusionConfig) else config
        sensors = () if isinstance(config, LabelConfig) else _sensors(config)
        parts |= {{"camera": "images", "radar": "radar_points", "lidar": "lidar_points"}[s] for s in sensors}
        if isinstance(camera, StudentConfig) and "camera" in sensors:
            if image_hw not in (None, camera.image_hw_px):
                raise MismatchError(
                    "student and teacher read images of different sizes", expected=str(image_hw), found=str(camera.image_hw_px)
                )
            image_hw = camera.image_hw_px
            if camera.depth_input or (config is networks.config and camera.depth_weight > 0):
                parts.add("depth")
        if isinstance(config, StudentConfig):
            if config.radar_states:
                features = list(STATE_FEATURES)
            if config is networks.config:
                history |= set(config.history)
    if networks.distiller is not None:
        parts |= set(networks.distiller.needs.batch)
    own = networks.config.history if isinstance(networks.config, StudentConfig) else (0,)
    # A method that asks for the view (IMKD's intensity_from=view) gets it as stored and moved, not made of the fine planes.
    view = {"intensity_from": "view"} if "lidar_intensity" in parts else {}
    return view | {
        "fields": tuple(sorted(parts)),
        "history": tuple(own),
        "image_hw_px": image_hw,
        "grid": networks.grid,
        "radar_features": tuple(features),
        "lidar_features": max(map(lidar_features, configs), key=len),  # one that leaves close points out asks for one more
    }


def _sensors(config: ModelConfig) -> tuple[str, ...]:
    if isinstance(config, StudentConfig):
        return tuple(n for n, on in (("camera", config.camera), ("radar", config.radar)) if on)
    return ("camera", "lidar") if isinstance(config, FusionConfig) else ("lidar",)
