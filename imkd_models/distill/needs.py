"""What a distiller reads, declared by name and checked before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from imkd_data.errors import MissingFeatureError

__all__ = ["BATCH_PARTS", "HEAD", "Needs", "check_needs"]

# Names a method may ask of the batch, and the loader that gives them.
BATCH_PARTS: tuple[str, ...] = ("boxes", "lidar_intensity", "intensity_planes", "lidar_points", "radar_points")
HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Names that a distiller reads: student features, features by teacher, parts of the batch (``BATCH_PARTS``).

    ``head`` stands for the head maps. ``heads_of``: teachers whose head is called as a function (CRD). ``at_start``: what
    teachers lend before the first step; one that stands there alone does not run in the steps."""

    student: tuple[str, ...] = ()
    teachers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    batch: tuple[str, ...] = ()
    heads_of: tuple[str, ...] = ()
    at_start: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __add__(self, other: Needs) -> Needs:
        return Needs(
            student=_union(self.student, other.student),
            teachers=_united(self.teachers, other.teachers),
            batch=_union(self.batch, other.batch),
            heads_of=_union(self.heads_of, other.heads_of),
            at_start=_united(self.at_start, other.at_start),
        )

    @property
    def of_teachers(self) -> dict[str, tuple[str, ...]]:
        """Everything a teacher must offer, in the steps or before them."""
        return _united(self.teachers, self.at_start)


def _union(a: Iterable[str], b: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*a, *b)))


def _united(a: Mapping[str, tuple[str, ...]], b: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {n: _union(a.get(n, ()), b.get(n, ())) for n in _union(a, b)}


def _offers(network: Any) -> tuple[str, ...]:
    shapes = network if isinstance(network, Mapping) else network.feature_shapes
    has_head = isinstance(network, Mapping) or getattr(network, "head", None) is not None
    return (*shapes, HEAD) if has_head and HEAD not in shapes else tuple(shapes)


_ADVICE = {
    "fusion": "train a LiDAR-camera teacher and pass --teacher fusion=CKPT; a LiDAR-only teacher has no camera map",
    "lidar": "train a LiDAR teacher and pass --teacher lidar=CKPT",
    "label": "train a label encoder on the same LiDAR teacher and pass --teacher label=CKPT, or switch the label term off",
}


def check_needs(needs: Needs, student: Any, teachers: Mapping[str, Any], batch: Iterable[str] | None = None) -> None:
    """Refuse, before the first step, what a method would miss later.

    Args:
        student: a network with ``feature_shapes`` (and ``head``), or a mapping of its shapes.
        teachers: the same by name.
        batch: the parts the stream will deliver; None leaves the batch unchecked.

    Raises:
        MissingFeatureError: naming who lacks what, what is offered instead, and what to do.
    """
    problems: list[MissingFeatureError] = []
    offered = _offers(student)
    missing = [n for n in needs.student if n not in offered]
    if missing:
        problems.append(
            MissingFeatureError(
                f"the student does not deliver {', '.join(missing)}",
                expected=", ".join(needs.student),
                found=", ".join(offered),
                next="apply the method's student_changes to the student configuration, or switch the term off",
            )
        )
    for name, wanted in needs.of_teachers.items():
        if name not in teachers:
            problems.append(
                MissingFeatureError(
                    f"the method needs a teacher {name!r}",
                    expected=", ".join(needs.of_teachers),
                    found=", ".join(teachers) or "no teacher",
                    next=_ADVICE.get(name, f"pass --teacher {name}=CKPT"),
                )
            )
            continue
        offered = _offers(teachers[name])
        missing = [n for n in wanted if n not in offered]
        if missing:
            problems.append(
                MissingFeatureError(
                    f"teacher {name!r} does not deliver {', '.join(missing)}",
                    expected=", ".join(wanted),
                    found=", ".join(offered),
                    next=_ADVICE.get(name, "use another teacher"),
                )
            )
        elif name in needs.heads_of and not callable(getattr(teachers[name], "heads", None)):
            problems.append(MissingFeatureError(f"teacher {name!r} has no head that can be called", expected="FrozenTeacher"))
    if batch is not None:
        have = set(batch)
        missing = [n for n in needs.batch if n not in have]
        if missing:
            problems.append(
                MissingFeatureError(
                    f"the batch lacks {', '.join(missing)}",
                    expected=", ".join(needs.batch),
                    found=", ".join(sorted(have)) or "nothing",
                    next="build the cache with a profile that holds these fields, or change the option that needs them",
                )
            )
    if problems:
        first = problems[0]
        raise MissingFeatureError(first.what, rule="distill.needs", problems=tuple(problems[1:]), **first.details)
