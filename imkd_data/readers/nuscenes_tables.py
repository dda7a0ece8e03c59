"""The 13 nuScenes tables as columns: tokens resolved to row numbers once, no dictionaries of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imkd_data.errors import ImkdError, InputDataError, SourceMissingError
from imkd_data.geometry import F64, rotation_from_quaternion
from imkd_data.readers.table_cache import kept_tables
from imkd_data.readers.tables import key_index, read_table

__all__ = ["NuScenesTables", "load_tables"]

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

_S, _I, _F, _B = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_FS = pa.list_(_F)
# In this order: a table stands after those that its keys point to.
SCHEMAS: dict[str, pa.Schema] = {
    name: pa.schema([("token", _S), *columns])
    for name, columns in {
        "attribute": [("name", _S)],
        "category": [("name", _S)],
        "log": [("location", _S)],
        "map": [],
        "sensor": [("channel", _S), ("modality", _S)],
        "visibility": [("level", _S)],
        "calibrated_sensor": [
            ("sensor_token", _S),
            ("translation", _FS),
            ("rotation", _FS),
            ("camera_intrinsic", pa.list_(_FS)),
        ],
        "ego_pose": [("timestamp", _I), ("rotation", _FS), ("translation", _FS)],
        "instance": [("category_token", _S)],
        "scene": [("log_token", _S), ("name", _S), ("description", _S)],
        "sample": [("timestamp", _I), ("prev", _S), ("scene_token", _S)],
        "sample_data": [
            ("sample_token", _S),
            ("ego_pose_token", _S),
            ("calibrated_sensor_token", _S),
            ("timestamp", _I),
            ("is_key_frame", _B),
            ("height", _I),
            ("width", _I),
            ("filename", _S),
            ("prev", _S),
        ],
        "sample_annotation": [
            ("sample_token", _S),
            ("instance_token", _S),
            ("visibility_token", _S),
            ("attribute_tokens", pa.list_(_S)),
            ("translation", _FS),
            ("size", _FS),
            ("rotation", _FS),
            ("prev", _S),
            ("next", _S),
            ("num_lidar_pts", _I),
            ("num_radar_pts", _I),
        ],
    }.items()
}
# Columns of tokens -> the table they point to. Turned into row numbers as soon as their table is read.
_KEYS: dict[str, dict[str, str]] = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "instance": {"category_token": "category"},
    "scene": {"log_token": "log"},
    "sample": {"prev": "sample", "scene_token": "scene"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
    },
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "visibility_token": "visibility",
        "attribute_tokens": "attribute",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
}
# Real tables leave these empty: unknown, not broken.
_OPTIONAL = frozenset(
    {"visibility_token", "attribute_tokens", "description", "location", "height", "width", "camera_intrinsic"}
)


@dataclass(slots=True)
class NuScenesTables:
    """Columns by table (prefix), row numbers instead of tokens (-1 = empty, -2 = points nowhere; every sample has a scene and
    every annotation a sample).

    Poses: rotation (R, 3, 3), translation (R, 3), f64. ``norm``: length of the stored quaternion. Annotation rows are grouped
    by sample: rows ``ann_order[ann_start[s]:ann_start[s + 1]]`` belong to sample row s, in table order. ``key_row`` (samples,
    channels): the sample_data row of each channel's keyframe, -1 where there is none.
    """

    scene_token: list[str]
    scene_name: list[str]
    scene_description: list[str]
    scene_location: list[str]
    sample_token: pa.Array
    sample_timestamp: I64
    sample_scene: I32
    sample_prev: I32
    channels: list[str]
    sensor_token: list[str]
    visibility_token: list[str]
    visibility_level: list[str]
    attribute_token: list[str]
    cal_token: list[str]
    cal_channel: I32
    cal_quaternion: F64
    cal_rotation: F64
    cal_translation: F64
    cal_norm: F64
    cal_intrinsic: list[Any]
    pose_token: pa.Array
    pose_timestamp: I64
    pose_quaternion: F64
    pose_translation: F64
    data_token: pa.Array
    data_filename: pa.Array
    data_sample: I32
    data_pose: I32
    data_cal: I32
    data_prev: I32
    data_timestamp: I64
    data_hw: I32
    data_is_key: NDArray[np.bool_]
    key_row: I32
    ann_token: pa.Array
    ann_instance_token: pa.Array
    ann_order: I64
    ann_start: I64
    ann_sample: I32
    ann_instance: I32
    ann_visibility: I32
    ann_attribute: I32
    ann_prev: I32
    ann_next: I32
    ann_translation: F64
    ann_size: F64
    ann_quaternion: F64
    ann_points: I64
    instance_category: I32
    category_name: list[str]
    attribute_name: list[str]

    def token(self, table: str, row: int) -> str:
        """The token of one row (sample, data, pose, ann)."""
        return str(getattr(self, f"{table}_token")[row].as_py())


def load_tables(folder: Path) -> NuScenesTables:
    """All 13 tables of one version folder, from the store of resolved tables where they are big (``table_cache``).

    Lists every unreadable table in one error (``problems``).
    """
    return kept_tables(folder, tuple(SCHEMAS), NuScenesTables, lambda: _make(folder))


def _make(folder: Path) -> NuScenesTables:
    raw: dict[str, pa.Table] = {}
    problems: list[ImkdError] = []
    for name, schema in SCHEMAS.items():
        try:
            table = read_table(folder / f"{name}.json", schema, optional=_OPTIONAL)
        except (InputDataError, SourceMissingError) as error:
            problems.append(error)
            continue
        problems.extend(_duplicates(folder, name, table))
        raw[name] = _with_rows(name, table, raw)
        del table
        pa.default_memory_pool().release_unused()
    _stop(problems)
    return _resolve(folder, raw)


def _with_rows(name: str, table: pa.Table, raw: dict[str, pa.Table]) -> pa.Table:
    """Token columns replaced by row numbers (int32), which is a tenth of their size. The track token is kept too."""
    if name == "sample_annotation":
        table = table.append_column("instance", table["instance_token"])
    for column, target in _KEYS.get(name, {}).items():
        tokens = table["token"] if target == name else raw[target]["token"] if target in raw else None
        if tokens is None:  # that table could not be read, which is the error to show
            continue
        keys = _first(table[column]) if column == "attribute_tokens" else table[column]
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(key_index(keys, tokens)))
    return table


def _stop(problems: Sequence[ImkdError]) -> None:
    if not problems:
        return
    first = problems[0]
    rest = (*first.problems, *problems[1:])
    raise type(first)(first.what, rule=first.rule, problems=tuple(rest), **first.details)


def _duplicates(folder: Path, name: str, table: pa.Table) -> list[ImkdError]:
    """F24: a token twice. Row numbers of both."""
    tokens = table["token"].combine_chunks()
    first = pc.index_in(tokens, value_set=tokens).to_numpy(zero_copy_only=False)
    again = np.flatnonzero(first != np.arange(len(first)))
    return [
        InputDataError(
            f"table {name}: a token stands twice",
            rule="table.duplicate",
            expected="every token once",
            found=f"rows {int(first[i])} and {int(i)}",
            file=f"{folder.name}/{name}.json",
            token=tokens[int(i)].as_py(),
            next="unpack the metadata archive of this version again",
        )
        for i in again[:20]
    ]


def _vectors(folder: Path, name: str, column: str, width: int, table: pa.Table) -> F64:
    """A list column of fixed length -> (rows, width)."""
    lists = table[column].combine_chunks()
    lengths = pc.list_value_length(lists)
    flat = pc.list_flatten(lists)
    wrong = pc.index(pc.not_equal(lengths, width), True).as_py() if len(lists) else -1
    if wrong < 0 and flat.null_count:
        wrong = pc.list_parent_indices(lists)[pc.index(pc.is_null(flat), True).as_py()].as_py()
    if wrong >= 0:
        raise InputDataError(
            f"table {name}: row {wrong} has a wrong {column}",
            rule="table.column",
            expected=f"{width} numbers",
            found=str(lists[wrong].as_py())[:80],
            file=f"{folder.name}/{name}.json",
            token=table["token"][wrong].as_py(),
        )
    return np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float64).reshape(-1, width)


def _rotations(quaternion: F64) -> tuple[F64, F64]:
    """(rotation matrices, quaternion norms); a zero or non-finite quaternion gives NaN here and an error where it is used."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norm = np.sqrt((quaternion * quaternion).sum(axis=-1))
        return rotation_from_quaternion(quaternion), norm


def _nowhere(folder: Path, name: str, column: str, table: pa.Table) -> list[InputDataError]:
    """F25: rows that belong to no row of the table above theirs. They would end up elsewhere or vanish, without a word."""
    rows = np.asarray(table[column].to_numpy())
    return [
        InputDataError(
            f"table {name}: row {i} has a wrong {column}",
            rule="table.key",
            expected=f"the token of a row of {_KEYS[name][column]}",
            found="nothing" if rows[i] == -1 else "a token that is not there",
            file=f"{folder.name}/{name}.json",
            token=table["token"][i].as_py(),
            next="unpack the metadata archive of this version again",
        )
        for i in np.flatnonzero(rows < 0)[:20].tolist()
    ]


def _resolve(folder: Path, raw: dict[str, pa.Table]) -> NuScenesTables:
    """The columns as they are used. Big ones leave ``raw`` when they are taken, so that memory holds them once."""

    def numbers(table: str, column: str) -> NDArray[Any]:
        return np.asarray(raw[table][column].to_numpy())

    def texts(table: str, column: str) -> list[str]:
        return ["" if v is None else v for v in raw[table][column].to_pylist()]

    def tokens(table: str, column: str = "token") -> pa.Array:
        values = raw[table][column].combine_chunks()
        raw[table] = raw[table].drop_columns([column])
        return values

    def vectors(table: str, column: str, width: int) -> F64:
        values = _vectors(folder, table, column, width, raw[table])
        raw[table] = raw[table].drop_columns([column])
        return values

    owners = (("sample", "scene_token"), ("sample_annotation", "sample_token"))
    _stop([lost for table, column in owners for lost in _nowhere(folder, table, column, raw[table])])
    location = texts("log", "location")
    channels = texts("sensor", "channel")
    cal_quaternion = vectors("calibrated_sensor", "rotation", 4)
    cal_rotation, cal_norm = _rotations(cal_quaternion)
    ann_sample = numbers("sample_annotation", "sample_token")
    order = np.argsort(ann_sample, kind="stable")
    size = [pc.fill_null(raw["sample_data"][c], 0).to_numpy() for c in ("height", "width")]
    key_row = _key_rows(folder, raw, len(channels))  # its errors name tokens, so it comes first
    num_samples = raw["sample"].num_rows
    return NuScenesTables(
        scene_token=texts("scene", "token"),
        scene_name=texts("scene", "name"),
        scene_description=texts("scene", "description"),
        scene_location=[location[i] if i >= 0 else "" for i in numbers("scene", "log_token")],
        sample_token=tokens("sample"),
        sample_timestamp=numbers("sample", "timestamp"),
        sample_scene=numbers("sample", "scene_token"),
        sample_prev=numbers("sample", "prev"),
        channels=channels,
        sensor_token=texts("sensor", "token"),
        visibility_token=texts("visibility", "token"),
        visibility_level=texts("visibility", "level"),
        attribute_token=texts("attribute", "token"),
        cal_token=texts("calibrated_sensor", "token"),
        cal_quaternion=cal_quaternion,
        cal_channel=numbers("calibrated_sensor", "sensor_token"),
        cal_rotation=cal_rotation,
        cal_translation=vectors("calibrated_sensor", "translation", 3),
        cal_norm=cal_norm,
        cal_intrinsic=raw["calibrated_sensor"]["camera_intrinsic"].to_pylist(),
        pose_quaternion=vectors("ego_pose", "rotation", 4),
        pose_translation=vectors("ego_pose", "translation", 3),
        pose_timestamp=numbers("ego_pose", "timestamp"),
        pose_token=tokens("ego_pose"),
        data_token=tokens("sample_data"),
        data_filename=tokens("sample_data", "filename"),
        data_sample=numbers("sample_data", "sample_token"),
        data_pose=numbers("sample_data", "ego_pose_token"),
        data_cal=numbers("sample_data", "calibrated_sensor_token"),
        data_prev=numbers("sample_data", "prev"),
        data_timestamp=numbers("sample_data", "timestamp"),
        data_is_key=np.asarray(raw["sample_data"]["is_key_frame"].to_numpy(), dtype=bool),
        data_hw=np.stack(size, axis=1).astype(np.int32),
        key_row=key_row,
        ann_order=order,
        ann_start=np.searchsorted(ann_sample[order], np.arange(num_samples + 1)),
        ann_sample=ann_sample,
        ann_instance=numbers("sample_annotation", "instance_token"),
        ann_visibility=numbers("sample_annotation", "visibility_token"),
        ann_attribute=numbers("sample_annotation", "attribute_tokens"),
        ann_prev=numbers("sample_annotation", "prev"),
        ann_next=numbers("sample_annotation", "next"),
        ann_translation=vectors("sample_annotation", "translation", 3),
        ann_size=vectors("sample_annotation", "size", 3),
        ann_quaternion=vectors("sample_annotation", "rotation", 4),
        ann_token=tokens("sample_annotation"),
        ann_instance_token=tokens("sample_annotation", "instance"),
        ann_points=np.stack([numbers("sample_annotation", f"num_{k}_pts") for k in ("lidar", "radar")], axis=1),
        instance_category=numbers("instance", "category_token"),
        category_name=texts("category", "name"),
        attribute_name=texts("attribute", "name"),
    )


def _first(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """First entry of every list, '' of an empty or missing one: the data set gives at most one attribute."""
    filled = pc.if_else(pc.greater(pc.fill_null(pc.list_value_length(lists), 0), 0), lists, pa.scalar([""], lists.type))
    return pc.list_element(filled, 0)


def _key_rows(folder: Path, raw: dict[str, pa.Table], num_channels: int) -> I32:
    """(samples, channels) sample_data row of each keyframe. F24: two of them for one place."""
    data = raw["sample_data"]
    is_key, sample, cal = (np.asarray(data[c].to_numpy()) for c in ("is_key_frame", "sample_token", "calibrated_sensor_token"))
    sensor = np.asarray(raw["calibrated_sensor"]["sensor_token"].to_numpy())
    rows = np.flatnonzero(np.asarray(is_key, dtype=bool) & (sample >= 0) & (cal >= 0))
    channel = sensor[cal[rows]]
    rows, channel = rows[channel >= 0], channel[channel >= 0]
    out: I32 = np.full((raw["sample"].num_rows, num_channels), -1, dtype=np.int32)
    flat = sample[rows].astype(np.int64) * num_channels + channel
    out.reshape(-1)[flat] = rows
    tokens, files = raw["sample_data"]["token"], raw["sample_data"]["filename"]
    lost = np.flatnonzero(out.reshape(-1)[flat] != rows)
    pair = [int(rows[lost[0]]), int(out.reshape(-1)[flat[lost[0]]])] if len(lost) else []
    if not pair:
        names = files.take(rows).combine_chunks()
        seen = pc.index_in(names, value_set=names).to_numpy(zero_copy_only=False)
        twice = np.flatnonzero(seen != np.arange(len(rows)))
        pair = [int(rows[seen[twice[0]]]), int(rows[twice[0]])] if len(twice) else []
    if pair:
        first, again = pair
        raise InputDataError(
            "two key frames of one channel in one sample, or one file for two key frames",
            rule="sample.duplicate_key",
            expected="one sample_data row and one file per sample and channel",
            found=f"{tokens[first].as_py()} ({files[first].as_py()}) and {tokens[again].as_py()} ({files[again].as_py()})",
            file=f"{folder.name}/sample_data.json",
            token=raw["sample"]["token"][int(sample[first])].as_py(),
        )
    return out
