"""Distillation methods: training-only modules over (student outputs, teachers' outputs, batch).

``METHODS`` is the whole list. ``make_method`` also joins several: ``"imkd+crkd"`` gives the terms of both, so that any
term can be combined with any other; a term is switched off by its option or by weight 0.
"""

from __future__ import annotations

from imkd_models.distill import adaptive_smooth, crkd, dual_distill, imkd
from imkd_models.distill.base import (
    Distiller,
    FrozenTeacher,
    Method,
    gradient_norms,
)
from imkd_models.distill.joined import make_method
from imkd_models.distill.needs import Needs, check_needs
from imkd_models.distill.options import Options

__all__ = [
    "METHODS",
    "Distiller",
    "FrozenTeacher",
    "Method",
    "Needs",
    "Options",
    "check_needs",
    "gradient_norms",
    "make_method",
]

METHODS: dict[str, Method] = {m.name: m for m in (imkd.METHOD, crkd.METHOD, adaptive_smooth.METHOD, dual_distill.METHOD)}
