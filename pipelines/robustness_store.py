"""Finished lines of the robustness table, one small file each: a protocol that was stopped goes on where it was.

A file's name is a hash of everything that its numbers depend on, and the same stands inside. Another checkpoint, cache, split,
truth, seed or batch size therefore has other files; a file that is damaged or says something else is computed anew.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imkd_data.recipe import canonical_json

if TYPE_CHECKING:
    from pipelines.evaluate_tables import Truth

__all__ = ["FOLDER", "Row", "Store", "truth_hash"]

FOLDER = "conditions"
PROTOCOL = 3  # raised when a condition's meaning or its scoring changes
_NUMBERS = ("nds", "mean_ap", "occurring")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A condition's scores for one run; spread: smallest and largest NDS over the draws. why: reason of a missing row."""

    condition: str
    group: str
    run: str
    num_samples: int = 0
    nds: float = math.nan
    mean_ap: float = math.nan
    occurring: float = math.nan
    spread: tuple[float, float] | None = None
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: null for NaN."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Row:
        """The inverse of ``as_dict``. Errors: KeyError, TypeError, ValueError on anything else."""
        if set(value) != {f.name for f in fields(cls)}:
            raise ValueError("not a row")
        numbers = {k: math.nan if value[k] is None else float(value[k]) for k in _NUMBERS}
        spread = value["spread"]
        return cls(**{**value, **numbers, "spread": None if spread is None else (float(spread[0]), float(spread[1]))})


def truth_hash(truth: Truth) -> str:
    """Hash of what predictions are scored against: the samples, and every truth box."""
    digest = sha256(canonical_json(list(truth.tokens)))
    for name in truth.boxes.__dataclass_fields__:
        value = getattr(truth.boxes, name)
        digest.update(value.tobytes() if hasattr(value, "tobytes") else str(value).encode())
    return digest.hexdigest()


class Store:
    """Rows of one network under ``out/conditions``. network: identity of weights, model and stream; settings: of the samples,
    the truth and the run."""

    def __init__(self, out: Path, network: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.folder = Path(out) / FOLDER
        self.identity: dict[str, Any] = {"protocol": PROTOCOL, "network": dict(network), "settings": dict(settings)}

    def _place(self, condition: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        identity = json.loads(canonical_json({**self.identity, "condition": dict(condition)}))
        name = re.sub(r"[^a-z0-9]+", "-", str(condition["name"]).lower()).strip("-")
        weights = str(self.identity["network"]["weights_sha256"])[:8]
        return self.folder / f"{weights}-{name}-{sha256(canonical_json(identity)).hexdigest()[:16]}.json", identity

    def load(self, condition: Mapping[str, Any], run: str) -> Row | None:
        """The finished row, under the name that the run has now; None where it has to be computed."""
        path, identity = self._place(condition)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return Row.from_dict({**value["row"], "run": run}) if value["identity"] == identity else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # damaged, or made by hand: computed anew and replaced

    def save(self, condition: Mapping[str, Any], row: Row) -> Path:
        """Keep a row; the file appears whole or not at all, also where two processes write it."""
        path, identity = self._place(condition)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"v": 1, "row": row.as_dict(), "identity": identity}, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        return path
