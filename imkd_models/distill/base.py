"""What all distillation methods share: frozen teachers, the distiller itself.

A distiller is a module over (student outputs, teachers' outputs, batch). It declares the names it needs (``needs.py``),
which are checked before the first step; it runs in float32 with autocast off; nothing of it is in an exported student.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imkd_data.errors import MismatchError, MissingFeatureError, RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch
from imkd_models.distill.needs import HEAD, Needs
from imkd_models.distill.options import Options
from imkd_models.outputs import HeadMaps, Outputs

__all__ = [
    "Distiller",
    "FrozenTeacher",
    "Method",
    "gradient_norms",
    "head_in_float32",
]


class FrozenTeacher(nn.Module):
    """A trained network that only teaches.

    It stays in eval whatever ``train()`` is called on a parent, runs under no_grad in float32, has no parameter or buffer
    in any state dict, optimiser or DDP wrapper, and moves with ``to()``. The network is kept outside the module tree for
    that reason. ``in_float32`` off: the surrounding autocast decides. ``batch_statistics`` exists only to measure the defect
    of released code that trains with a drifting teacher; ``altered``: by another such defect it answers otherwise than its
    checkpoint, so that maps stored from that are not its own.
    """

    def __init__(self, network: nn.Module, *, name: str = "teacher") -> None:
        super().__init__()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.name = name
        self.batch_statistics = False
        self.altered = False
        self.in_float32 = True
        object.__setattr__(self, "_network", (network.eval(),))  # a tuple: nn.Module must not register it
        super().train(False)

    @property
    def network(self) -> nn.Module:
        """The wrapped network."""
        return self._network[0]

    @property
    def feature_shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """name -> (C, Y, X)."""
        return self.network.feature_shapes

    @property
    def sensors(self) -> tuple[str, ...]:
        """Sensors the teacher reads."""
        return tuple(getattr(self.network, "sensors", ()))

    @property
    def head(self) -> Any:
        """The teacher's head, or None."""
        return getattr(self.network, "head", None)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval."""
        self.network.train(self.batch_statistics and mode)
        self.training = False
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        self.network._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, batch: Batch) -> Outputs:
        """The teacher's outputs, detached."""
        self.network.train(self.batch_statistics)
        device = next((p.device.type for p in self.network.parameters()), "cpu")
        with torch.no_grad(), torch.autocast(device, enabled=False) if self.in_float32 else nullcontext():
            return self.network(batch)

    def heads(self, neck_BCYX: Tensor) -> tuple[HeadMaps, ...]:
        """The frozen head on any neck map: gradient passes through to the map, never to the head."""
        self.network.train(self.batch_statistics)
        with torch.autocast(neck_BCYX.device.type, enabled=False):
            return tuple(self.network.head.maps(neck_BCYX.float()))

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bytes of all weights and buffers: equal to the checkpoint's, before and after."""
        digest = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            data = value.detach().cpu().contiguous()
            digest.update(f"{key} {tuple(data.shape)} {data.dtype}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        return digest.hexdigest()


def head_in_float32(head: Iterable[HeadMaps], *, detach: bool = False) -> tuple[HeadMaps, ...]:
    """Copies in float32 for losses; logits stay logits and the originals are never touched."""
    out = []
    for maps in head:
        names = [f.name for f in fields(maps) if f.name != "classes"]
        values = {n: getattr(maps, n).detach().float() if detach else getattr(maps, n).float() for n in names}
        out.append(replace(maps, **values))
    return tuple(out)


def _needed(outputs: Outputs, names: tuple[str, ...], *, who: str, detach: bool) -> Outputs:
    missing = [n for n in names if n != HEAD and n not in outputs.features]
    if missing:
        raise MissingFeatureError(
            f"{who} gave no {', '.join(missing)}", expected=", ".join(names), found=", ".join(outputs.features)
        )
    features = {n: outputs.features[n].detach() if detach else outputs.features[n] for n in names if n != HEAD}
    head = head_in_float32(outputs.head, detach=detach) if HEAD in names else ()
    return Outputs(features={n: v.float() for n, v in features.items()}, head=head, grid=outputs.grid)


def _of_other_sample(outputs: Outputs, batch: int) -> Outputs:
    """Every sample gets its neighbour's maps: the control "a teacher shown the wrong sample"."""
    if batch < 2:
        raise MismatchError("teacher_sample other needs at least two samples in a batch", found="1")
    head = []
    for maps in outputs.head:
        names = [f.name for f in fields(maps) if f.name != "classes"]
        head.append(replace(maps, **{n: getattr(maps, n).roll(1, 0) for n in names}))
    return Outputs(features={n: v.roll(1, 0) for n, v in outputs.features.items()}, head=tuple(head), grid=outputs.grid)


class Distiller(nn.Module):
    """Base of the methods.

    ``forward(student, teachers, batch)`` returns *weighted* loss terms by log name; their sum is added to the student's
    own loss. ``diagnostics`` holds detached quantities of the last call (mask areas, running statistics, ...). Terms
    named in ``warmup_exempt`` take no part in the warm-up. ``no_decay``: ends of the names of parameters that weight
    decay must not touch. ``step`` counts optimiser steps: ``micro_batches`` calls in training make one, so that schedules
    and running statistics do not depend on how a global batch is divided. Sub-classes give ``terms``.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options, needs: Needs, *, warmup_steps: int = 0) -> None:
        super().__init__()
        self.options = options
        self.needs = needs
        self.warmup_steps = warmup_steps
        self.warmup_exempt: tuple[str, ...] = ()
        self.diagnostics: dict[str, Tensor] = {}
        self.micro_batches = 1
        self._calls = 0  # of the step that runs; checkpoints are written between steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def terms(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        """Weighted terms; all inputs are float32, teachers detached."""
        return {}

    def forward(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms, float32 scalars with a graph to the student.

        Raises:
            MissingFeatureError, MismatchError: outputs without a needed name, or on another grid or head layout.
        """
        self.diagnostics = {}
        wanted = self.needs.teachers
        for name in wanted:
            if name not in teachers:
                raise MissingFeatureError(f"no outputs of teacher {name!r}", found=", ".join(teachers) or "none")
        self.check_layout(student, teachers)
        device = next(iter(student.features.values())).device.type
        with torch.autocast(device, enabled=False):
            own = _needed(student, self.needs.student, who="the student", detach=False)
            theirs = {n: _needed(teachers[n], wanted[n], who=f"teacher {n}", detach=True) for n in wanted}
            if getattr(self.options, "teacher_sample", "own") == "other":
                theirs = {n: _of_other_sample(o, len(batch)) for n, o in theirs.items()}
            out = self.terms(own, theirs, batch)
            if self.warmup_steps:
                factor = ((self.step + 1) / self.warmup_steps).clamp(max=1.0)
                out = {k: v if k in self.warmup_exempt else v * factor for k, v in out.items()}
            if end_step := getattr(self.options, "end_step", 0):  # times 0: every device keeps the same graph, DDP asks for it
                acts = (self.step < end_step).float()
                out = {k: v * acts for k, v in out.items()}
        if self.training:
            self._calls += 1
            if self._calls >= self.micro_batches:
                self.step += 1
                self._calls = 0
        return out

    def check_layout(self, student: Outputs, teachers: Mapping[str, Outputs]) -> None:
        """Student and teachers share the head grid (same metres) and, where heads are compared, the class groups."""
        for name, wanted in self.needs.teachers.items():
            theirs = teachers[name]
            if not same_extent(student.grid, theirs.grid):
                raise MismatchError(f"teacher {name!r} covers other metres", expected=str(student.grid), found=str(theirs.grid))
            if HEAD in wanted and HEAD in self.needs.student:
                a, b = [m.classes for m in student.head], [m.classes for m in theirs.head]
                if a != b:
                    raise MismatchError(f"teacher {name!r} has other class groups", expected=str(a), found=str(b))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups: ``no_decay`` parameters apart. Empty groups are left out."""
        plain = [p for n, p in self.named_parameters() if not self._undecayed(n) and p.requires_grad]
        free = [p for n, p in self.named_parameters() if self._undecayed(n) and p.requires_grad]
        groups = [{"params": plain, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
        return [g for g in groups if g["params"]]

    def _undecayed(self, name: str) -> bool:
        return any(name.endswith(part) for part in self.no_decay)

    def diagnostic_values(self) -> dict[str, float]:
        """``diagnostics`` as numbers, those of one element; what had nothing to count (NaN) is left out."""
        values = {name: float(value) for name, value in self.diagnostics.items() if value.numel() == 1}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def note(self, **values: Tensor | float) -> None:
        """Remember diagnostics of this call."""
        for name, value in values.items():
            self.diagnostics[name] = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))


def same_extent(a: BevGrid, b: BevGrid) -> bool:
    """True where two grids cover the same rectangle."""
    return (a.x_min_m, a.y_min_m, a.x_max_m, a.y_max_m) == (b.x_min_m, b.y_min_m, b.x_max_m, b.y_max_m)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One distillation method.

    changes(options): values put into the student's configuration. teachers_for(options), needs_for(options): what it
    reads. build(options, student, teachers, grid) -> Distiller. prepare(options, student, teachers) runs once on a fresh
    student (weights copied from a teacher) and returns the names it copied. twin: the undistilled student that the
    method's gain is measured against: the same network and start, with ``twin_options`` (every loss weight 0). presets:
    named option values.
    """

    name: str
    title: str
    summary: str
    options: type[Options]
    changes: Callable[[Any], dict[str, Any]]
    needs_for: Callable[[Any], Needs]
    build: Callable[[Any, Any, Mapping[str, FrozenTeacher], BevGrid], Distiller]
    twin: str
    twin_options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any, Any, Mapping[str, FrozenTeacher]], list[str]] | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def student_changes(self) -> dict[str, Any]:
        """Changes under default options."""
        return self.changes(self.options())

    @property
    def needs(self) -> Needs:
        """Needs under default options."""
        return self.needs_for(self.options())

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teachers under default options."""
        return tuple(self.needs.of_teachers)

    def teachers_for(self, options: Options) -> tuple[str, ...]:
        """Teachers under given options."""
        return tuple(self.needs_for(options).of_teachers)

    def make_options(self, values: Mapping[str, Any] | None = None) -> Any:
        """Options from a dict; ``preset`` names one of ``presets``, other keys override it."""
        values = dict(values or {})
        preset = values.pop("preset", None)
        if preset is not None and preset not in self.presets:
            raise RecipeError(f"{self.name} has no preset {preset!r}", expected=", ".join(self.presets) or "none")
        return self.options.from_dict({**(self.presets[preset] if preset else {}), **values})

    def as_dict(self) -> dict[str, Any]:
        """JSON form for ``imkd methods --json``."""
        needs = self.needs
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "student_changes": self.student_changes,
            "needs": {
                "student": list(needs.student),
                "teachers": {k: list(v) for k, v in needs.of_teachers.items()},
                "batch": list(needs.batch),
            },
            "twin": self.twin,
            "twin_options": dict(self.twin_options),
            "presets": {k: dict(v) for k, v in self.presets.items()},
            "options": [{**o, "choices": list(o["choices"])} for o in self.options.describe()],
        }


def gradient_norms(terms: Mapping[str, Tensor], parts: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, float]]:
    """{term: {part: norm}}: L2 norm of each term's gradient at each group of tensors (a feature map, a module's parameters),
    0 where it does not reach. Costs one backward pass a term."""
    tensors = [t for group in parts.values() for t in group]
    out: dict[str, dict[str, float]] = {}
    for name, value in terms.items():
        found: Sequence[Tensor | None] = [None] * len(tensors)
        if value.requires_grad:
            found = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        left, out[name] = iter(found), {}
        for part, group in parts.items():
            squares = [float(g.square().sum()) for g in (next(left) for _ in group) if g is not None]
            out[name][part] = math.sqrt(sum(squares))
    return out
