"""Several methods at once: ``imkd+crkd`` is a method whose options are nested by method and whose terms are prefixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, make_dataclass, replace
from typing import Any

from torch import Tensor, nn

from imkd_data.errors import RecipeError
from imkd_data.geometry import BevGrid
from imkd_data.loader.batch import Batch
from imkd_models.distill.base import Distiller, FrozenTeacher, Method
from imkd_models.distill.needs import Needs
from imkd_models.distill.options import Options, option
from imkd_models.outputs import Outputs

__all__ = ["JoinedDistiller", "make_method"]


@dataclass(frozen=True, kw_only=True)
class JoinedOptions(Options):
    """Base of the options of joined methods: one dict of options a method. ``imkd.stage1`` as a key means the same as
    ``stage1`` in the dict of ``imkd``."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """From nested dicts, dotted keys, or both."""
        nested: dict[str, Any] = {}
        for key, value in values.items():
            name, dot, leaf = key.partition(".")
            if dot and name in cls.defaults():
                nested[name] = {**nested.get(name, {}), leaf: value}
            else:
                nested[key] = {**nested[key], **value} if key in nested and isinstance(value, Mapping) else value
        return super().from_dict(nested)


class JoinedDistiller(Distiller):
    """Runs each part; terms and diagnostics are named ``method/term``."""

    def __init__(self, options: Options, parts: Mapping[str, Distiller]) -> None:
        super().__init__(options, sum((p.needs for p in parts.values()), Needs()))
        self.parts = nn.ModuleDict(parts)

    def check_layout(self, student: Outputs, teachers: Mapping[str, Outputs]) -> None:
        """Left to the parts."""

    def forward(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        self.diagnostics = {}
        for name, part in self.parts.items():
            part.micro_batches = self.micro_batches
            mine = {t: teachers[t] for t in part.needs.teachers}
            out.update({f"{name}/{k}": v for k, v in part(student, mine, batch).items()})
            self.diagnostics.update({f"{name}/{k}": v for k, v in part.diagnostics.items()})
        return out

    def _undecayed(self, name: str) -> bool:
        return any(part._undecayed(name) for part in self.parts.values())


def _merged(parts: Sequence[tuple[Method, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    owner: dict[str, tuple[Method, Any]] = {}
    for method, options in parts:
        for key, value in method.changes(options).items():
            if key in out and out[key] != value:
                first = owner[key][0].name
                ways = _ways_to(value, key, *owner[key]) + _ways_to(out[key], key, method, options)
                ways = [w for w in ways if f".{key}=" in w] or ways  # the option of that name switches nothing off
                apart = f"train them apart: no option of {first} or {method.name} changes {key}"
                raise RecipeError(
                    f"{first} and {method.name} want different students: {key} = {out[key]!r} and {value!r}",
                    next=f"set {' or '.join(ways)}" if ways else apart,
                )
            out[key], owner[key] = value, (method, options)
    return out


def _ways_to(wanted: Any, key: str, method: Method, options: Any) -> list[str]:
    """``method.option=value`` for every option with which the method leaves that key of the student alone, or wants the same;
    beside it what the method's own rules then ask for."""
    ways = []
    for one in options.describe():
        name, default = one["name"], one["default"]
        for value in (False, True) if isinstance(default, bool) else () if isinstance(default, tuple) else one["choices"]:
            changed = copy(options)
            object.__setattr__(changed, name, value)  # unchecked: which option decides, whatever else it asks for
            if method.changes(changed).get(key, wanted) != wanted:
                continue
            text = ("on" if value else "off") if isinstance(value, bool) else value
            try:
                replace(options, **{name: value})
                ways.append(f"{method.name}.{name}={text}")
            except RecipeError as error:
                ways.append(f"{method.name}.{name}={text} (and {error.details.get('next', error.what)})")
            break
    return ways


def make_method(spec: str | Method, methods: Mapping[str, Method] | None = None) -> Method:
    """The method of that name, or the union of several joined by ``+``; a method of your own is given as it is.

    Raises:
        RecipeError: an unknown name, listing the known ones.
    """
    if isinstance(spec, Method):
        return spec
    if methods is None:
        from imkd_models.distill import METHODS as methods  # the list imports this module
    names = [n.strip() for n in spec.split("+")]
    unknown = [n for n in names if n not in methods]
    if unknown or len(set(names)) != len(names):
        raise RecipeError(f"no distillation method {spec!r}", expected=", ".join(methods), found=", ".join(unknown) or spec)
    if len(names) == 1:
        return methods[names[0]]
    parts = [methods[n] for n in names]
    return _joined(parts)


def _joined(parts: Sequence[Method]) -> Method:
    columns = [(m.name, dict, option({}, f"options of {m.title}")) for m in parts]

    def each(options: Any) -> list[tuple[Method, Any]]:
        return [(m, m.make_options(getattr(options, m.name))) for m in parts]

    neighbours = property(lambda options: tuple(f"{m.name}.{n}" for m, o in each(options) for n in o.neighbours))
    cls = make_dataclass(
        "JoinedMethodOptions", columns, bases=(JoinedOptions,), frozen=True, kw_only=True, namespace={"neighbours": neighbours}
    )

    def build(options: Any, student: Any, teachers: Mapping[str, FrozenTeacher], grid: BevGrid) -> JoinedDistiller:
        return JoinedDistiller(options, {m.name: m.build(o, student, teachers, grid) for m, o in each(options)})

    def prepare(options: Any, student: Any, teachers: Mapping[str, FrozenTeacher]) -> list[str]:
        return [name for m, o in each(options) if m.prepare for name in m.prepare(o, student, teachers)]

    return Method(
        name="+".join(m.name for m in parts),
        title=" and ".join(m.title for m in parts),
        summary=" ".join(m.summary for m in parts),
        options=cls,
        changes=lambda options: _merged(each(options)),
        needs_for=lambda options: sum((m.needs_for(o) for m, o in each(options)), Needs()),
        build=build,
        twin="the joined student without distillation",
        twin_options={m.name: dict(m.twin_options) for m in parts},
        prepare=prepare,
    )
