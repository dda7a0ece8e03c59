"""Truth and submissions as columns for the fast engine, read in pieces so that memory stays small."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import ATTRIBUTES, CLASS_FROM_CATEGORY, DETECTION_CLASSES, LABEL_FROM_CLASS
from imkd_data.errors import InputDataError, SourceMissingError
from imkd_data.geometry import rotation_from_quaternion, yaw_from_rotation
from pipelines.evaluate_fast import EvalTable

__all__ = ["Truth", "iter_array", "iter_results", "read_results", "read_truth"]

F64 = NDArray[np.float64]
_CHUNK = 8 << 20
_ATTRIBUTE = {name: i for i, name in enumerate(ATTRIBUTES)} | {"": -1}
_SPACE = " \t\r\n,"
_NUMBER = "0123456789.eE+-"  # "" counts as part of it
_MAX_PAIR_US = 1_500_000  # a velocity needs neighbours at most this far apart (twice that when centred)


class _Scanner:
    """Decodes a JSON file value by value; holds one chunk and the value at hand."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open(encoding="utf-8")
        except FileNotFoundError as error:
            raise SourceMissingError("file not found", file=path) from error
        self._path, self._text, self._at, self._end = path, "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def _more(self) -> None:
        if self._end:
            raise InputDataError("the JSON file ends in the middle", file=self._path, rule="json.truncated")
        chunk = self._file.read(_CHUNK)
        self._end = not chunk
        self._text, self._at = self._text[self._at :] + chunk, 0

    def peek(self) -> str:
        """The next character that is not a space or comma."""
        while True:
            while self._at < len(self._text):
                char = self._text[self._at]
                if char not in _SPACE:
                    return char
                self._at += 1
            self._more()

    def take(self, expected: str) -> None:
        """Step over one character."""
        found = self.peek()
        if found != expected:
            raise InputDataError("unexpected JSON", file=self._path, expected=expected, found=found, rule="json.syntax")
        self._at += 1

    def value(self) -> Any:
        """The next value, decoded whole."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._end:
                    raise InputDataError(f"broken JSON: {error.msg}", file=self._path, rule="json.syntax") from error
            else:
                # A number may go on in the next chunk: "7" of "7.5", or "7" with ".5" cut off behind the point.
                if self._end or self._text[end : end + 1] not in _NUMBER:
                    self._at = end
                    return value
            self._more()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def iter_array(path: Path) -> Iterator[Any]:
    """The items of a JSON file that is one list."""
    scanner = _Scanner(path)
    try:
        scanner.take("[")
        while scanner.peek() != "]":
            yield scanner.value()
    finally:
        scanner.close()


def iter_results(path: Path, meta: dict[str, Any] | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(sample token, entries) of a submission, one sample in memory at a time; ``meta`` is filled on the way."""
    scanner = _Scanner(path)
    found = False
    try:
        scanner.take("{")
        while scanner.peek() != "}":
            key = scanner.value()
            scanner.take(":")
            if key != "results":
                value = scanner.value()
                if key == "meta" and meta is not None:
                    meta.update(value)
                continue
            found = True
            scanner.take("{")
            while scanner.peek() != "}":
                token = scanner.value()
                scanner.take(":")
                yield token, scanner.value()
            scanner.take("}")
    finally:
        scanner.close()
    if not found:
        raise InputDataError("not a nuScenes submission", file=path, expected="a field `results`", rule="results.format")


def _yaw(rotation_wxyz: F64) -> F64:
    return np.asarray(yaw_from_rotation(rotation_from_quaternion(rotation_wxyz.reshape(-1, 4))))


class _Columns:
    """Grows lists of numbers by sample and turns them into one EvalTable."""

    def __init__(self) -> None:
        self.parts: list[tuple[Any, ...]] = []

    def add(self, sample: int, entries: Sequence[dict[str, Any]], num_points: Sequence[int] | None = None) -> None:
        n = len(entries)
        if not n:
            return
        self.parts.append(
            (
                np.full(n, sample, dtype=np.int64),
                np.array([e["translation"] for e in entries], dtype=np.float64),
                np.array([e["size"] for e in entries], dtype=np.float64),
                np.array([e["rotation"] for e in entries], dtype=np.float64),
                np.array([e["velocity"] for e in entries], dtype=np.float64),
                np.array([LABEL_FROM_CLASS[e["detection_name"]] for e in entries], dtype=np.int64),
                np.array([e["detection_score"] for e in entries], dtype=np.float64),
                np.array([_ATTRIBUTE[e["attribute_name"]] for e in entries], dtype=np.int64),
                np.full(n, -1, dtype=np.int64) if num_points is None else np.array(num_points, dtype=np.int64),
            )
        )

    def table(self, num_samples: int, ego_xy_m: F64) -> EvalTable:
        parts = sorted(self.parts, key=lambda p: int(p[0][0]))
        shapes: tuple[tuple[tuple[int, ...], Any], ...] = (
            ((0,), np.int64),
            ((0, 3), np.float64),
            ((0, 3), np.float64),
            ((0, 4), np.float64),
            ((0, 2), np.float64),
            ((0,), np.int64),
            ((0,), np.float64),
            ((0,), np.int64),
            ((0,), np.int64),
        )
        c = [np.concatenate([np.zeros(shape, dtype), *(p[i] for p in parts)]) for i, (shape, dtype) in enumerate(shapes)]
        level = c[1][:, :2] - ego_xy_m[c[0]]
        return EvalTable(
            num_samples=num_samples,
            sample=c[0],
            translation_m=c[1],
            size_wlh_m=c[2],
            yaw_rad=_yaw(c[3]),
            velocity_mps=c[4],
            label=c[5],
            score=c[6],
            attribute=c[7],
            num_points=c[8],
            ego_distance_m=np.sqrt((level**2).sum(1)),
        )


def read_results(
    path: Path,
    tokens: Sequence[str],
    ego_xy_m: F64,
    max_boxes: int = 500,
    check: Callable[[Sequence[str], Sequence[str]], None] | None = None,
) -> tuple[EvalTable, dict[str, Any]]:
    """A submission -> (its boxes for ``tokens``, meta). Samples of the file that are not asked for are skipped.

    ego_xy_m (S, 2): the car's place in global per token. ``check(found tokens, tokens)`` compares the sample sets.

    Raises:
        InputDataError: not a submission, an unknown class or attribute, a NaN, or more than ``max_boxes`` in a sample.
    """
    number = {token: i for i, token in enumerate(tokens)}
    columns, seen = _Columns(), []
    meta: dict[str, Any] = {}
    for token, entries in iter_results(path, meta):
        seen.append(token)
        if len(entries) > max_boxes:
            raise InputDataError(
                "too many boxes in one sample", file=path, token=token, expected=f"at most {max_boxes}", found=len(entries)
            )
        if token in number:
            try:
                columns.add(number[token], entries)
            except (KeyError, TypeError, ValueError) as error:
                raise InputDataError(
                    f"bad submission entry: {error!r}", file=path, token=token, rule="results.entry"
                ) from error
    if check is not None:
        check(seen, tokens)
    table = columns.table(len(tokens), ego_xy_m)
    for name in ("translation_m", "size_wlh_m", "yaw_rad", "score"):
        if not np.isfinite(getattr(table, name)).all():
            raise InputDataError(f"NaN or infinite {name} in the submission", file=path, rule="results.finite")
    return table, meta


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truth:
    """What a submission is scored against: boxes, bicycle racks by sample number, the car's place (S, 2) in global."""

    tokens: tuple[str, ...]
    boxes: EvalTable
    bike_racks: dict[int, list[tuple[F64, F64, F64]]]
    ego_xy_m: F64


def _ego_places(tables: Path, tokens: Sequence[str], channel: str) -> F64:
    """(S, 2) from the key sample_data of ``channel``: the pose the devkit measures ranges from."""
    wanted = {token: i for i, token in enumerate(tokens)}
    sensors = {r["token"] for r in iter_array(tables / "sensor.json") if r["channel"] == channel}
    mounts = {r["token"] for r in iter_array(tables / "calibrated_sensor.json") if r["sensor_token"] in sensors}
    pose_of = {}
    for row in iter_array(tables / "sample_data.json"):
        if row["is_key_frame"] and row["sample_token"] in wanted and row["calibrated_sensor_token"] in mounts:
            pose_of[row["ego_pose_token"]] = wanted[row["sample_token"]]
    out = np.full((len(tokens), 2), np.nan)
    for row in iter_array(tables / "ego_pose.json"):
        if row["token"] in pose_of:
            out[pose_of[row["token"]]] = row["translation"][:2]
    absent = np.flatnonzero(np.isnan(out[:, 0]))
    if len(absent):
        raise InputDataError(
            f"samples without {channel}", token=tokens[absent[0]], channel=channel, found=f"{len(absent)} samples"
        )
    return out


def _velocity(row: dict[str, Any], by_token: dict[str, dict[str, Any]], time_us: dict[str, int]) -> list[float]:
    """The devkit's box_velocity: centred difference where both neighbours exist, one-sided otherwise, NaN if too far."""
    if not row["prev"] and not row["next"]:
        return [np.nan, np.nan]
    first, last = by_token[row["prev"]] if row["prev"] else row, by_token[row["next"]] if row["next"] else row
    seconds = 1e-6 * time_us[last["sample_token"]] - 1e-6 * time_us[first["sample_token"]]
    limit = 1.5 * (2 if row["prev"] and row["next"] else 1)
    if seconds > limit:
        return [np.nan, np.nan]
    step = np.array(last["translation"]) - np.array(first["translation"])
    return (step / seconds)[:2].tolist()  # type: ignore[no-any-return]


def read_truth(
    dataroot: Path, version: str, tokens: Sequence[str], *, ego_xy_m: F64 | None = None, channel: str = "LIDAR_TOP"
) -> Truth:
    """The tables' annotations of ``tokens`` as the devkit loads them (unfiltered).

    ego_xy_m (S, 2): place of the car in global, e.g. from a cache's index; without it sample_data and ego_pose are read.

    Raises:
        SourceMissingError: a table is absent. InputDataError: a token is not in the tables, or two attributes on a box.
    """
    tables = dataroot / version
    number = {token: i for i, token in enumerate(tokens)}
    samples = {r["token"]: (r["timestamp"], r["scene_token"]) for r in iter_array(tables / "sample.json")}
    absent = [t for t in tokens if t not in samples]
    if absent:
        raise InputDataError("samples are not in the tables", token=absent[0], found=f"{len(absent)} absent", file=tables)
    scenes = {samples[t][1] for t in tokens}
    time_us = {token: stamp for token, (stamp, scene) in samples.items() if scene in scenes}
    category = {r["token"]: r["name"] for r in iter_array(tables / "category.json")}
    category_of = {r["token"]: category[r["category_token"]] for r in iter_array(tables / "instance.json")}
    attribute = {r["token"]: r["name"] for r in iter_array(tables / "attribute.json")}
    ego_xy = _ego_places(tables, tokens, channel) if ego_xy_m is None else np.asarray(ego_xy_m, dtype=np.float64)

    rows = {r["token"]: r for r in iter_array(tables / "sample_annotation.json") if r["sample_token"] in time_us}
    entries: dict[int, list[dict[str, Any]]] = defaultdict(list)
    points: dict[int, list[int]] = defaultdict(list)
    racks: dict[int, list[tuple[F64, F64, F64]]] = defaultdict(list)
    for row in rows.values():
        sample = number.get(row["sample_token"])
        if sample is None:
            continue
        name = category_of[row["instance_token"]]
        if name == "static_object.bicycle_rack":
            racks[sample].append(
                (np.array(row["translation"]), np.array(row["size"]), rotation_from_quaternion(row["rotation"]))
            )
        if name not in CLASS_FROM_CATEGORY:
            continue
        names = [attribute[t] for t in row["attribute_tokens"]]
        if len(names) > 1:
            raise InputDataError("an annotation has more than one attribute", token=row["token"], found=", ".join(names))
        entries[sample].append(
            {
                "translation": row["translation"],
                "size": row["size"],
                "rotation": row["rotation"],
                "velocity": _velocity(row, rows, time_us),
                "detection_name": CLASS_FROM_CATEGORY[name],
                "detection_score": -1.0,
                "attribute_name": names[0] if names else "",
            }
        )
        points[sample].append(row["num_lidar_pts"] + row["num_radar_pts"])
    columns = _Columns()
    for sample, boxes in entries.items():
        columns.add(sample, boxes, points[sample])
    return Truth(tokens=tuple(tokens), boxes=columns.table(len(tokens), ego_xy), bike_racks=dict(racks), ego_xy_m=ego_xy)


def truth_counts(boxes: EvalTable) -> dict[str, int]:
    """Class name -> number of boxes."""
    counts = np.bincount(boxes.label, minlength=len(DETECTION_CLASSES))
    return {name: int(counts[i]) for i, name in enumerate(DETECTION_CLASSES)}
