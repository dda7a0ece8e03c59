"""Source faults on purpose: damage a finished synthetic tree in the ways of the fault catalogue (F01 to F26).

A fault is ``Fnn`` or ``Fnn.variant``; the first variant listed is the default. The damage hits the second keyframe of the first
scene (its LiDAR file, RADAR_FRONT, CAM_FRONT or table rows). F18 and F23 are in every world anyway: nothing is changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from imkd_data.errors import UsageError
from imkd_data.world import rig as rigs

Row = dict[str, Any]
_CAMERA, _RADAR = "CAM_FRONT", "RADAR_FRONT"


class Target:
    """What is damaged: the tree, its tables (read on demand, written back by ``save``), and the chosen keyframe."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.folder = root, root / version
        self.loaded: dict[str, list[Row]] = {}
        scene = self.table("scene")[0]
        samples = [s for s in self.table("sample") if s["scene_token"] == scene["token"]]
        self.sample: str = samples[min(1, len(samples) - 1)]["token"]
        self.changed: list[str] = []

    def table(self, name: str) -> list[Row]:
        """Rows of a table."""
        if name not in self.loaded:
            self.loaded[name] = json.loads((self.folder / f"{name}.json").read_text())
        return self.loaded[name]

    def save(self, name: str) -> None:
        """Write a changed table."""
        text = ",\n".join(json.dumps(row) for row in self.table(name))
        (self.folder / f"{name}.json").write_text(f"[\n{text}\n]\n")
        self.changed.append(f"{self.folder.name}/{name}.json")

    def data_rows(self, channel: str) -> list[Row]:
        """All sample_data rows of a channel in the first scene, in time order."""
        rows = [r for r in self.table("sample_data") if f"/{channel}/" in r["filename"]]
        log = rows[0]["filename"].split("/")[-1].split("__")[0]
        return [r for r in rows if f"/{log}__" in r["filename"]]

    def key_row(self, channel: str) -> Row:
        """The key frame of the chosen sample."""
        return next(r for r in self.data_rows(channel) if r["is_key_frame"] and r["sample_token"] == self.sample)

    def file(self, channel: str) -> Path:
        """Its file; counted as changed."""
        name = self.key_row(channel)["filename"]
        self.changed.append(name)
        return self.root / str(name)


def _cut(count: int | None) -> Callable[[Target], None]:
    def apply(target: Target) -> None:
        path = target.file(rigs.LIDAR)
        path.write_bytes(b"" if count is None else path.read_bytes()[:-count])

    return apply


def _points(edit: Callable[[Any], Any]) -> Callable[[Target], None]:
    """Edit the LiDAR points (N, 5)."""

    def apply(target: Target) -> None:
        path = target.file(rigs.LIDAR)
        points = edit(np.fromfile(path, np.float32).reshape(-1, 5))
        path.write_bytes(np.asarray(points, np.float32).tobytes())

    return apply


def _not_finite(points: Any) -> Any:
    points[10, 0], points[200, 1], points[3000, 2], points[4000, 3] = np.nan, np.inf, 1e30, np.nan
    return points


def _intensity(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def edit(points: Any) -> Any:
        points[:, 3] = function(points[:, 3])
        return points

    return edit


def _scan(edit: Callable[[list[str], bytes], tuple[list[str], bytes]]) -> Callable[[Target], None]:
    """Edit a radar file as header lines and body."""

    def apply(target: Target) -> None:
        path = target.file(_RADAR)
        data = path.read_bytes()
        at = data.index(b"DATA binary\n") + len(b"DATA binary\n")
        header, body = edit(data[:at].decode().splitlines(), data[at:])
        path.write_bytes(("\n".join(header) + "\n").encode() + body)

    return apply


def _header_value(lines: list[str], key: str, value: object) -> list[str]:
    return [f"{key} {value}" if line.split(" ")[0] == key else line for line in lines]


def _count(lines: list[str]) -> int:
    return int(next(line for line in lines if line.startswith("POINTS")).split()[1])


def _structured(edit: Callable[[Any], Any]) -> Callable[[list[str], bytes], tuple[list[str], bytes]]:
    """Edit the points as a structured array; the header follows the dtype of what comes back."""

    def apply(lines: list[str], body: bytes) -> tuple[list[str], bytes]:
        from imkd_data.world.radar import POINT

        size = _count(lines) * POINT.itemsize
        points = edit(np.frombuffer(body[:size], POINT).copy())
        names = points.dtype.names
        kinds = [points.dtype[n] for n in names]
        lines = _header_value(lines, "FIELDS", " ".join(names))
        lines = _header_value(lines, "SIZE", " ".join(str(k.itemsize) for k in kinds))
        lines = _header_value(lines, "TYPE", " ".join("F" if k.kind == "f" else "I" for k in kinds))
        lines = _header_value(lines, "COUNT", " ".join("1" for _ in kinds))
        return lines, points.tobytes() + body[size:]

    return apply


def _columns(names: Callable[[list[str]], list[str]], extra: bool = False) -> Callable[[Any], Any]:
    """Reorder, drop or add fields."""

    def edit(points: Any) -> Any:
        chosen = names(list(points.dtype.names))
        dtype = [(n, points.dtype[n] if n in points.dtype.names else np.dtype("<f4")) for n in chosen]
        out = np.zeros(len(points), dtype)
        for name in chosen:
            if name in points.dtype.names:
                out[name] = points[name]
        return out

    return edit


def _set(field: str, value: float, rows: slice | int) -> Callable[[Any], Any]:
    def edit(points: Any) -> Any:
        points[field][rows] = value
        return points

    return edit


def _image(edit: Callable[[bytes], bytes]) -> Callable[[Target], None]:
    def apply(target: Target) -> None:
        path = target.file(_CAMERA)
        path.write_bytes(edit(path.read_bytes()))

    return apply


def _picture(height: int, width: int, form: str) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(out, form)
    return out.getvalue()


def _bomb(_: bytes) -> bytes:
    """A JPEG whose header claims 10,000 x 10,000 pixels."""
    data = _picture(16, 16, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 10000, 10000) + data[at + 4 :]


def _flip(data: bytes) -> bytes:
    """One bit near the middle that changes pixels and is no error to the decoder: only a checksum can tell."""
    import simplejpeg

    sound = simplejpeg.decode_jpeg(data)
    for at in range(len(data) // 2, len(data) - 2):
        other = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        with contextlib.suppress(ValueError):
            if (simplejpeg.decode_jpeg(other) != sound).any():
                return other
    raise UsageError("no bit of this image can be turned unseen", next="choose a larger --image-size")


def _missing(target: Target, kind: str) -> None:
    path = target.file(rigs.LIDAR)
    if kind == "permission":
        path.chmod(0)
        return
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere.pcd.bin")


def _chain(target: Target, kind: str) -> None:
    rows = target.data_rows(rigs.LIDAR)
    at = rows.index(target.key_row(rigs.LIDAR))
    if kind == "loop":
        rows[at - 2]["prev"] = rows[at]["token"]
    elif kind == "cross":
        other = [r for r in target.table("sample_data") if f"/{rigs.LIDAR}/" in r["filename"] and r not in rows]
        rows[at]["prev"] = (other or target.data_rows(_RADAR))[0]["token"]
    else:
        rows[at]["prev"] = "0" * 32
    target.save("sample_data")


def _time(target: Target, kind: str) -> None:
    rows = target.data_rows(rigs.LIDAR)
    at = rows.index(target.key_row(rigs.LIDAR))
    if kind == "gap":
        for row in rows[:at]:
            row["timestamp"] -= 1_500_000
    elif kind == "back":
        rows[at - 1]["timestamp"] = rows[at]["timestamp"] + 40_000
    else:
        for row in rows:
            row["timestamp"] //= 1_000_000
    target.save("sample_data")


def _calibration(target: Target, kind: str) -> None:
    wanted = target.key_row(_CAMERA)["calibrated_sensor_token"]
    row = next(r for r in target.table("calibrated_sensor") if r["token"] == wanted)
    factor = {"norm": 2.0, "slight": 1.05, "zero": 0.0, "nan": float("nan")}.get(kind)
    if factor is None:
        row["camera_intrinsic"] = []
    else:
        row["rotation"] = [v * factor for v in row["rotation"]]
    target.save("calibrated_sensor")


def _box(target: Target, kind: str) -> None:
    row = next(r for r in target.table("sample_annotation") if r["sample_token"] == target.sample)
    if kind == "category":
        instance = next(r for r in target.table("instance") if r["token"] == row["instance_token"])
        category = next(r for r in target.table("category") if r["token"] == instance["category_token"])
        category["name"] = "vehicle.unheard_of"
        target.save("category")
        return
    if kind == "size":
        row["size"][1] = 0.0
    else:
        row["translation"][0] = float("nan")
    target.save("sample_annotation")


def _double(target: Target, kind: str) -> None:
    if kind == "token":
        target.table("sample").append(dict(target.table("sample")[1]))
        target.save("sample")
        return
    keys = [r for r in target.data_rows(rigs.LIDAR) if r["is_key_frame"]]
    keys[1]["filename"] = keys[0]["filename"]
    target.save("sample_data")


def _table(target: Target, kind: str) -> None:
    path = target.folder / "ego_pose.json"
    if kind == "key":
        target.key_row(rigs.LIDAR)["ego_pose_token"] = "f" * 32
        target.save("sample_data")
        return
    data = path.read_bytes()
    target.changed.append(f"{target.folder.name}/ego_pose.json")
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + data)
    else:
        at = data.index(b'"translation": [') + len(b'"translation": [')
        path.write_bytes(data[:at] + b"NaN" + data[data.index(b",", at) :])


def _path(target: Target, kind: str) -> None:
    row = target.key_row(rigs.LIDAR)
    if kind == "link":
        path = target.root / row["filename"]
        outside = target.root.parent / f"{target.root.name}-outside.pcd.bin"
        shutil.move(path, outside)
        path.symlink_to(os.path.abspath(outside))
        target.changed.append(row["filename"])
        return
    names = {"absolute": "/etc/passwd", "parent": "../../x", "inner": "a/../../x", "drive": "C:\\x", "nul": "samples/a\0b"}
    row["filename"] = names[kind]
    target.save("sample_data")


def _with(function: Callable[[Target, str], None], kind: str) -> Callable[[Target], None]:
    return lambda target: function(target, kind)


def _nothing(_: Target) -> None:
    """The fault is in every synthetic world."""


def _swap(names: list[str]) -> list[str]:
    return [*reversed(names[:9]), *names[9:]]


# fault -> variant -> damage; the first variant is the default.
FAULTS: dict[str, dict[str, Callable[[Target], None]]] = {
    "F01": {"empty": _cut(None)},
    "F02": {"cut": _cut(17)},
    "F03": {"cut": _cut(4)},
    "F04": {"cut": _cut(20)},
    "F05": {
        "few": _points(_not_finite),
        "many": _points(lambda p: np.where(np.arange(len(p))[:, None] % 20 == 0, np.float32(np.nan), p)),
    },
    "F06": {
        "scaled": _points(_intensity(lambda v: v / np.float32(255.0))),
        "outside": _points(_intensity(lambda v: v + np.float32(300.0))),
        "constant": _points(_intensity(lambda v: np.full_like(v, 17.0))),
    },
    "F07": {"away": _points(lambda p: p + np.array([900, 900, 0, 0, 0], np.float32))},
    "F08": {"width": _scan(lambda h, b: (_header_value(_header_value(h, "WIDTH", 0), "POINTS", 0), b[_count(h) * 43 :]))},
    "F09": {
        "first": _scan(_structured(_set("x", float("nan"), 0))),
        "later": _scan(_structured(_set("x", float("nan"), 3))),
    },
    "F10": {
        "shorter": _scan(lambda h, b: (h, b[: _count(h) * 43 - 20])),
        "longer": _scan(lambda h, b: (h, b + bytes(500))),
        "nonzero": _scan(lambda h, b: (h, b[:-40] + b"\x07" * 40)),
        "width": _scan(lambda h, b: (_header_value(h, "WIDTH", _count(h) + 1), b)),
    },
    "F11": {
        "reordered": _scan(_structured(_columns(_swap))),
        "extra": _scan(_structured(_columns(lambda n: [*n, "snr"]))),
        "missing": _scan(_structured(_columns(lambda n: [x for x in n if x != "rcs"]))),
    },
    "F12": {
        "ascii": _scan(lambda h, b: (_header_value(h, "DATA", "ascii"), b)),
        "compressed": _scan(lambda h, b: (_header_value(h, "DATA", "binary_compressed"), zlib.compress(b))),
        "foreign": lambda t: (t.file(_RADAR).write_bytes(bytes(range(256)) * 9), None)[1],
    },
    "F13": {"states": _scan(_structured(_set("invalid_state", 3, slice(None))))},
    "F14": {"half": _image(lambda d: d[: len(d) // 2]), "marker": _image(lambda d: d[:-2])},
    "F15": {"flip": _image(_flip)},
    "F16": {
        "png": _image(lambda _: _picture(90, 160, "PNG")),
        "html": _image(lambda _: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        "empty": _image(lambda _: b""),
        "size": _image(lambda _: _picture(60, 80, "JPEG")),
        "bomb": _image(_bomb),
    },
    "F17": {k: _with(_missing, k) for k in ("missing", "directory", "permission", "link")},
    "F18": {"natural": _nothing},
    "F19": {k: _with(_chain, k) for k in ("loop", "cross", "unknown")},
    "F20": {k: _with(_time, k) for k in ("gap", "back", "seconds")},
    "F21": {k: _with(_calibration, k) for k in ("norm", "slight", "zero", "nan", "intrinsic")},
    "F22": {k: _with(_box, k) for k in ("size", "category", "centre")},
    "F23": {"natural": _nothing},
    "F24": {k: _with(_double, k) for k in ("token", "file")},
    "F25": {k: _with(_table, k) for k in ("key", "missing", "truncated", "nan", "bom")},
    "F26": {k: _with(_path, k) for k in ("absolute", "parent", "inner", "drive", "nul", "link")},
}


def check(fault: str) -> tuple[str, str]:
    """``Fnn`` or ``Fnn.variant`` -> (Fnn, variant). Raises UsageError with what there is."""
    name, _, variant = fault.partition(".")
    if name not in FAULTS:
        known = ", ".join(f"{k} ({'|'.join(v)})" for k, v in FAULTS.items())
        raise UsageError("no such source fault", expected=known, found=fault, next="F27 to F29 are arguments, not damage")
    variants = FAULTS[name]
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise UsageError(f"{name} has no such variant", expected=", ".join(variants), found=variant)
    return name, variant


def inject(root: Path, version: str, fault: str) -> dict[str, Any]:
    """Damage a finished tree; returns (and writes to ``.synth/fault.json``) fault, variant, sample token, changed paths."""
    name, variant = check(fault)
    target = Target(root, version)
    FAULTS[name][variant](target)
    report = {"fault": name, "variant": variant, "sample": target.sample, "changed": target.changed}
    (root / ".synth" / "fault.json").write_text(json.dumps(report, indent=1))
    return report
