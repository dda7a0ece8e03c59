"""What a synthetic world is made of: options, seeded random streams, tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imkd_data.errors import UsageError

WEATHERS = ("clear", "rain", "night", "rain-night")
MATERIALS = ("class", "independent")
LAYOUT_VERSION = 2  # raise when the same options give other bytes: unfinished worlds of another version are not continued
KEYFRAME_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldOptions:
    """Options of one world; see ``write_world``. Raises UsageError on values that cannot be meant."""

    version: str = "v1.0-mini"
    scenes: int = 3
    keyframes: int = 40
    seed: int = 0
    image_hw_px: tuple[int, int] = (900, 1600)
    weather: tuple[str, ...] = ("clear",)
    materials: str = "class"
    camera_sweeps: bool = False
    images: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.scenes <= 850:
            raise UsageError("a world has 1 to 850 scenes", found=self.scenes)
        if not 2 <= self.keyframes <= 400:
            raise UsageError("a scene has 2 to 400 keyframes", found=self.keyframes)
        if not self.weather or set(self.weather) - set(WEATHERS):
            raise UsageError("unknown weather", expected=", ".join(WEATHERS), found=", ".join(self.weather))
        if self.materials not in MATERIALS:
            raise UsageError("unknown materials", expected=" or ".join(MATERIALS), found=self.materials)
        if min(self.image_hw_px) < 32 or max(self.image_hw_px) > 4096:
            raise UsageError("image sides are 32 to 4096 px", found=self.image_hw_px)
        if self.seed < 0:
            raise UsageError("the seed is not negative", found=self.seed)

    @property
    def annotated(self) -> bool:
        """Whether the tables hold boxes; those of ``v1.0-test`` do not."""
        return not self.version.endswith("test")

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def fingerprint(self) -> str:
        """Identity of everything that decides the bytes of a scene (not the number of scenes)."""
        values = asdict(self)
        del values["scenes"]
        text = json.dumps({"layout": LAYOUT_VERSION, **values}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def random_stream(seed: int, scene: int, purpose: str) -> np.random.Generator:
    """An independent generator for one purpose in one scene: adding a purpose changes no other."""
    digest = hashlib.sha256(purpose.encode()).digest()
    return np.random.default_rng([seed, scene, int.from_bytes(digest[:4], "little")])


def token(*parts: object) -> str:
    """32 hexadecimal digits, as nuScenes tokens; a pure function of the parts."""
    return hashlib.md5("/".join(str(p) for p in parts).encode(), usedforsecurity=False).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: a file under its final name is whole."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    temporary.replace(path)
