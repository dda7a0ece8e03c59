"""Truth and submissions as columns for the fast engine, read in pieces so that memory stays small."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import ATTRIBUTES, CLASS_FROM_CATEGORY, DETECTION_CLASSES, LABEL_FROM_CLASS
from imkd_data.errors import InputDataError, SourceMissingError
from imkd_data.geometry import rotation_from_quaternion, yaw_from_rotation
from imkd_data.readers.nuscenes_tables import SCHEMAS
from imkd_data.readers.tables import key_index, read_table
from pipelines.evaluate_fast import EvalTable

__all__ = ["TableBuilder", "Truth", "iter_array", "iter_results", "read_results", "read_truth"]

F64 = NDArray[np.float64]
_CHUNK = 8 << 20
_ATTRIBUTE = {name: i for i, name in enumerate(ATTRIBUTES)} | {"": -1}
_SPACE = " \t\r\n,"
_NUMBER = "0123456789.eE+-"  # "" counts as part of it
_MAX_PAIR_S = 1.5  # a velocity needs neighbours at most this far apart (twice that when centred)


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


class TableBuilder:
    """Grows lists of numbers by sample and turns them into one EvalTable."""

    def __init__(self) -> None:
        self.parts: list[tuple[Any, ...]] = []

    def add(self, sample: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Submission entries of one sample, in any order of samples."""
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
                np.full(n, -1, dtype=np.int64),
            )
        )

    def table(self, num_samples: int, ego_xy_m: F64) -> EvalTable:
        """The columns, ordered by sample; ego_xy_m (S, 2) is where the ranges are measured from."""
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
    columns, seen = TableBuilder(), []
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


def _table(tables: Path, name: str) -> Any:
    return read_table(tables / f"{name}.json", SCHEMAS[name], optional=frozenset({"visibility_token", "attribute_tokens"}))


def _vectors(column: Any, width: int) -> F64:
    """(R, width) f64 of an Arrow list column."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float64).reshape(-1, width)


def _ego_places(tables: Path, tokens: Sequence[str], rows: NDArray[np.int64], sample_token: Any, channel: str) -> F64:
    """(S, 2) from the key sample_data of ``channel``: the pose the devkit measures ranges from."""
    sensor, mount, data = _table(tables, "sensor"), _table(tables, "calibrated_sensor"), _table(tables, "sample_data")
    of_mount = key_index(mount["sensor_token"], sensor["token"])
    is_channel = np.array([c == channel for c in sensor["channel"].to_pylist()], dtype=bool)[of_mount]
    key = data["is_key_frame"].to_numpy() & is_channel[key_index(data["calibrated_sensor_token"], mount["token"])]
    key_row = np.full(len(sample_token), -1, dtype=np.int64)
    key_row[key_index(data["sample_token"], sample_token)[key]] = np.flatnonzero(key)
    absent = np.flatnonzero(key_row[rows] < 0)
    if len(absent):
        found = f"{len(absent)} samples"
        raise InputDataError(f"samples without {channel}", token=tokens[absent[0]], channel=channel, found=found)
    pose = _table(tables, "ego_pose")
    pose_row = key_index(data["ego_pose_token"].take(key_row[rows]), pose["token"])
    return _vectors(pose["translation"].take(pose_row), 3)[:, :2]


def _velocities(
    place: F64, sample: NDArray[Any], time_us: NDArray[np.int64], prev: NDArray[Any], following: NDArray[Any]
) -> F64:
    """(A, 2) the devkit's box_velocity: centred difference where both neighbours exist, else one-sided, NaN if too far."""
    here = np.arange(len(place))
    first, last = np.where(prev >= 0, prev, here), np.where(following >= 0, following, here)
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = 1e-6 * time_us[sample[last]] - 1e-6 * time_us[sample[first]]
        velocity = (place[last] - place[first])[:, :2] / seconds[:, None]
    velocity[seconds > np.where((prev >= 0) & (following >= 0), 2, 1) * _MAX_PAIR_S] = np.nan
    velocity[(prev < 0) & (following < 0)] = np.nan
    return np.asarray(velocity)


def read_truth(
    dataroot: Path, version: str, tokens: Sequence[str], *, ego_xy_m: F64 | None = None, channel: str = "LIDAR_TOP"
) -> Truth:
    """The tables' annotations of ``tokens`` as the devkit loads them (unfiltered).

    ego_xy_m (S, 2): place of the car in global, e.g. from a cache's index; without it sample_data and ego_pose are read.

    Raises:
        SourceMissingError: a table is absent. InputDataError: a token is not in the tables, or two attributes on a box.
    """
    tables = dataroot / version
    sample = _table(tables, "sample")
    row_of = {token: i for i, token in enumerate(sample["token"].to_pylist())}
    absent = [t for t in tokens if t not in row_of]
    if absent:
        raise InputDataError("samples are not in the tables", token=absent[0], found=f"{len(absent)} absent", file=tables)
    rows = np.array([row_of[t] for t in tokens], dtype=np.int64)
    number = np.full(len(row_of), -1, dtype=np.int64)
    number[rows] = np.arange(len(tokens))
    ego_xy = _ego_places(tables, tokens, rows, sample["token"], channel) if ego_xy_m is None else np.asarray(ego_xy_m)

    ann = _table(tables, "sample_annotation")
    ann_sample = key_index(ann["sample_token"], sample["token"])
    place = _vectors(ann["translation"], 3)
    links = [key_index(ann[name], ann["token"]) for name in ("prev", "next")]
    velocity = _velocities(place, ann_sample, sample["timestamp"].to_numpy(), *links)
    instance, category = _table(tables, "instance"), _table(tables, "category")
    names = category["name"].to_pylist()
    label_of = np.array([LABEL_FROM_CLASS[CLASS_FROM_CATEGORY[n]] if n in CLASS_FROM_CATEGORY else -1 for n in names])
    kind = key_index(instance["category_token"], category["token"])[key_index(ann["instance_token"], instance["token"])]

    mine = np.where(ann_sample >= 0, number[ann_sample], -1)
    racks: dict[int, list[tuple[F64, F64, F64]]] = defaultdict(list)
    rack_kind = [i for i, n in enumerate(names) if n == "static_object.bicycle_rack"]
    for row in np.flatnonzero((mine >= 0) & np.isin(kind, rack_kind)).tolist():
        rotation = rotation_from_quaternion(ann["rotation"][row].as_py())
        racks[int(mine[row])].append((place[row], np.array(ann["size"][row].as_py()), rotation))
    keep = np.flatnonzero((mine >= 0) & (label_of[kind] >= 0))
    keep = keep[np.argsort(mine[keep], kind="stable")]  # by sample, table order within
    points = ann["num_lidar_pts"].to_numpy() + ann["num_radar_pts"].to_numpy()
    boxes = EvalTable(
        num_samples=len(tokens),
        sample=mine[keep],
        translation_m=place[keep],
        size_wlh_m=_vectors(ann["size"].take(keep), 3),
        yaw_rad=_yaw(_vectors(ann["rotation"].take(keep), 4)),
        velocity_mps=velocity[keep],
        label=label_of[kind[keep]],
        score=np.full(len(keep), -1.0),
        attribute=_attributes(tables, ann, keep),
        num_points=points[keep],
        ego_distance_m=np.sqrt(((place[keep][:, :2] - ego_xy[mine[keep]]) ** 2).sum(1)),
    )
    return Truth(tokens=tuple(tokens), boxes=boxes, bike_racks=dict(racks), ego_xy_m=ego_xy)


def _attributes(tables: Path, annotation: Any, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    table = _table(tables, "attribute")
    names = dict(zip(table["token"].to_pylist(), table["name"].to_pylist(), strict=True))
    out = np.full(len(rows), -1, dtype=np.int64)
    for i, tokens in enumerate(annotation["attribute_tokens"].take(rows).to_pylist()):
        if tokens:
            if len(tokens) > 1:
                found, token = ", ".join(names[t] for t in tokens), annotation["token"][int(rows[i])].as_py()
                raise InputDataError("an annotation has more than one attribute", token=token, found=found)
            out[i] = _ATTRIBUTE[names[tokens[0]]]
    return out


def truth_counts(boxes: EvalTable) -> dict[str, int]:
    """Class name -> number of boxes."""
    counts = np.bincount(boxes.label, minlength=len(DETECTION_CLASSES))
    return {name: int(counts[i]) for i, name in enumerate(DETECTION_CLASSES)}
