"""Rows of the nuScenes tables -> ``Sample`` values of one scene, every pose composed into ``ego``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.classes import ATTRIBUTES, CLASS_FROM_CATEGORY, LABEL_FROM_CLASS
from imkd_data.errors import ImkdError, InputDataError
from imkd_data.geometry import (
    EGO,
    F64,
    GLOBAL,
    VEHICLE,
    Camera,
    Pose,
    matmul3,
    rotation_from_quaternion,
    sensor_at,
    yaw_from_rotation,
)
from imkd_data.readers.nuscenes_tables import I64, NuScenesTables
from imkd_data.sample import Boxes, ImageFrame, Sample, SensorSuite, Sweep

__all__ = ["SUSPECT_SCENES", "SceneBuilder", "annotation_values", "annotation_velocities"]

# Scenes whose ego poses are known to be wrong in places; reported, never corrected.
SUSPECT_SCENES = frozenset({"scene-0499", "scene-0501", "scene-0502", "scene-0515", "scene-0517"})
_MICROSECONDS = (10**15, 4 * 10**15)  # 2001 .. 2096: anything else is another unit
_SWEEP_GAP_US = {"lidar": 150_000, "radar": 250_000}  # three nominal periods: longer is a gap worth a warning
_MAX_VELOCITY_GAP_S = 1.5  # the devkit's limit for velocities by difference
_NORM_WARN, _NORM_BAD = 1e-3, 0.1


def annotation_velocities(tables: NuScenesTables, rows: NDArray[Any]) -> F64:
    """(M, 3) global velocities by the devkit's rule: central difference where both neighbours exist, else one-sided; NaN for a
    single annotation or a gap above 1.5 s (3 s for the central one)."""
    previous, following = tables.ann_prev[rows], tables.ann_next[rows]
    first = np.where(previous >= 0, previous, rows)
    last = np.where(following >= 0, following, rows)
    time = 1e-6 * tables.sample_timestamp
    dt = time[tables.ann_sample[last]] - time[tables.ann_sample[first]]
    limit = np.where((previous >= 0) & (following >= 0), 2 * _MAX_VELOCITY_GAP_S, _MAX_VELOCITY_GAP_S)
    known = (first != last) & (dt <= limit) & (dt > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        velocity = (tables.ann_translation[last] - tables.ann_translation[first]) / dt[:, None]
    return np.where(known[:, None], velocity, np.nan)


def annotation_values(tables: NuScenesTables, sample_token: str) -> list[Any]:
    """Everything of the tables that the boxes of a sample are made of, as raw values: for hashing."""
    t = tables
    sample = t.sample_token.index(sample_token).as_py()
    rows = t.ann_order[t.ann_start[sample] : t.ann_start[sample + 1]]
    category = [t.category_name[c] if c >= 0 else "" for c in t.instance_category[t.ann_instance[rows]]]
    attribute = [t.attribute_name[a] if a >= 0 else "" for a in t.ann_attribute[rows]]
    tokens = [t.ann_token.take(rows).to_pylist(), t.ann_instance_token.take(rows).to_pylist()]
    arrays = [t.ann_translation[rows], t.ann_size[rows], t.ann_quaternion[rows], t.ann_points[rows], t.ann_visibility[rows]]
    return [*tokens, category, attribute, *arrays, annotation_velocities(t, rows)]


class SceneBuilder:
    """Makes the samples of a scene; collects every problem of the scene before it raises."""

    def __init__(
        self,
        tables: NuScenesTables,
        suite: SensorSuite,
        sensors: tuple[str, ...],
        reference_channel: str,
        num_sweeps: Mapping[str, int],
        warnings: Counter[str],
    ) -> None:
        self.t, self.suite, self.sensors, self.reference = tables, suite, sensors, reference_channel
        self.num_sweeps, self._warnings = num_sweeps, warnings
        self._channel_row = {c: i for i, c in enumerate(tables.channels)}
        self._label = [LABEL_FROM_CLASS.get(CLASS_FROM_CATEGORY.get(n, ""), -1) for n in tables.category_name]
        self._attribute = [ATTRIBUTES.index(n) if n in ATTRIBUTES else -1 for n in tables.attribute_name]
        order = np.lexsort((tables.sample_timestamp, tables.sample_scene))
        starts = np.searchsorted(tables.sample_scene[order], np.arange(len(tables.scene_name) + 1))
        self._rows = np.split(order, starts[1:-1])
        self._problems: list[ImkdError] = []

    def samples(self, scene: int, split: str) -> tuple[Sample, ...]:
        """All samples of scene row ``scene`` in time order. Raises the first problem with the others in ``problems``."""
        self._problems = []
        if self.t.scene_name[scene] in SUSPECT_SCENES:
            self._odd("scene.suspect_poses", 1)
        rows = [int(r) for r in self._rows[scene]]
        self._check_times(scene, rows)
        tokens = [self.t.token("sample", r) for r in rows]
        tracks: dict[int, int] = {}
        out = []
        for i, row in enumerate(rows):
            previous = tokens[i - 1] if i else ""
            following = tokens[i + 1] if i + 1 < len(rows) else ""
            try:
                out.append(self._sample(scene, split, row, tokens[i], previous, following, tracks))
            except ImkdError as error:
                self._problems.append(error)
        if self._problems:
            first, *rest = self._problems
            raise type(first)(first.what, rule=first.rule, problems=tuple(rest), **first.details)
        return tuple(out)

    def _odd(self, rule: str, count: int) -> None:
        if count:
            self._warnings[rule] += count

    def _bad(self, what: str, rule: str, scene: int, **details: Any) -> InputDataError:
        return InputDataError(what, rule=rule, scene=self.t.scene_name[scene], **details)

    def _check_times(self, scene: int, rows: list[int]) -> None:
        for row in rows:
            stamp, previous = int(self.t.sample_timestamp[row]), int(self.t.sample_prev[row])
            where: dict[str, Any] = {"token": self.t.token("sample", row), "file": "sample.json"}
            if not _MICROSECONDS[0] < stamp < _MICROSECONDS[1]:
                self._problems.append(
                    self._bad(
                        "time stamp is not in microseconds", "time.unit", scene, expected="about 1.5e15", found=stamp, **where
                    )
                )
            elif previous >= 0 and int(self.t.sample_timestamp[previous]) >= stamp:
                found = f"{stamp} after {int(self.t.sample_timestamp[previous])} of {self.t.token('sample', previous)}"
                self._problems.append(self._bad("time goes back between samples", "time.order", scene, found=found, **where))

    def _sample(
        self, scene: int, split: str, row: int, token: str, previous: str, following: str, tracks: dict[int, int]
    ) -> Sample:
        t, suite = self.t, self.suite
        keys = self._key_rows(scene, row)
        reference = keys[self.reference]
        chains: dict[str, list[int]] = {}
        for channel in self.sensors:
            kind = "lidar" if channel == suite.lidar else "radar" if channel in suite.radars else "camera"
            chains[channel] = self._chain(scene, row, keys[channel], channel, self.num_sweeps.get(kind, 1), kind)
        data = np.array([reference, *(r for rows in chains.values() for r in rows)], dtype=np.int64)
        global_from_vehicle, vehicle_from_sensor = self._poses(scene, token, data)
        global_from_ego = Pose(dst=GLOBAL, src=EGO, rotation=global_from_vehicle[0][0], translation_m=global_from_vehicle[1][0])
        ego_from_global = global_from_ego.inverse()
        ego_from_vehicle = _compose((ego_from_global.rotation[None], ego_from_global.translation_m[None]), global_from_vehicle)
        ego_from_sensor = _compose(ego_from_vehicle, vehicle_from_sensor)
        for array in (*ego_from_sensor, *vehicle_from_sensor):
            array.flags.writeable = False  # views of it then need no copies

        def poses(i: int, channel: str) -> tuple[Pose, Pose]:
            src = sensor_at(channel, int(t.data_timestamp[data[i]]))
            return (
                Pose(dst=EGO, src=src, rotation=ego_from_sensor[0][i], translation_m=ego_from_sensor[1][i]),
                Pose(dst=VEHICLE, src=channel, rotation=vehicle_from_sensor[0][i], translation_m=vehicle_from_sensor[1][i]),
            )

        cameras: list[ImageFrame] = []
        sweeps: dict[str, tuple[Sweep, ...]] = {}
        at = 1
        for channel, rows in chains.items():
            if channel in suite.cameras:
                cameras.append(self._camera(scene, token, channel, rows[0], *poses(at, channel)))
            else:
                sweeps[channel] = tuple(self._sweep(channel, r, k == 0, *poses(at + k, channel)) for k, r in enumerate(rows))
            at += len(rows)
        return Sample(
            dataset="nuscenes",
            token=token,
            scene=t.scene_name[scene],
            scene_token=t.scene_token[scene],
            split=split,
            timestamp_us=int(t.data_timestamp[reference]),
            global_from_ego=global_from_ego,
            ego_from_reference=poses(0, self.reference)[0],
            cameras=tuple(cameras),
            lidar=sweeps.get(suite.lidar or "", ()),
            radar={c: s for c, s in sweeps.items() if c in suite.radars},
            boxes=None if split == "test" else self._boxes(scene, row, token, ego_from_global, tracks),
            location=t.scene_location[scene],
            description=t.scene_description[scene],
            previous=previous,
            next=following,
        )

    def _key_rows(self, scene: int, sample: int) -> dict[str, int]:
        """sample_data row of every channel that the sample has; an error where the reference or a declared one is missing."""
        found = {c: int(self.t.key_row[sample, i]) for c, i in self._channel_row.items() if self.t.key_row[sample, i] >= 0}
        missing = [c for c in dict.fromkeys((self.reference, *self.sensors)) if c not in found]
        if missing:
            held = [c for c in self.suite.channels if c in found]
            raise self._bad(
                f"sample has no {', '.join(missing)}",
                "sample.sensor_missing",
                scene,
                expected="a key frame of every declared sensor",
                found=", ".join(held) or "no sensor",
                token=self.t.token("sample", sample),
                channel=", ".join(missing),
                file="sample_data.json",
                next=f"declare what the data has: --sensors {','.join(held)}" if held else "unpack the metadata again",
            )
        return found

    def _chain(self, scene: int, sample: int, key: int, channel: str, count: int, kind: str) -> list[int]:
        """Key row, then past sweeps newest first, by ``prev``. F19, F20: never a loop, another scene or a step forward."""
        t = self.t
        rows = [key]
        while len(rows) < count and (previous := int(t.data_prev[rows[-1]])) != -1:
            here = rows[-1]
            found = "a token that is not in sample_data"
            if previous >= 0:
                other = int(t.data_sample[previous])
                gap = int(t.data_timestamp[here] - t.data_timestamp[previous])
                found = f"{t.token('data', previous)}, "
                if t.data_cal[previous] < 0 or t.channels[t.cal_channel[t.data_cal[previous]]] != channel:
                    found += "a sweep of another sensor"
                elif other < 0 or t.sample_scene[other] != scene:
                    found += "a sweep of another scene"
                elif gap <= 0:
                    found += f"a sweep {-gap} us later (a loop, or time goes back)"
                else:
                    self._odd("sweep.gap", int(gap > _SWEEP_GAP_US.get(kind, gap)))
                    rows.append(previous)
                    continue
            raise self._bad(
                "chain of sweeps is broken",
                "sweep.chain",
                scene,
                expected=f"an earlier {channel} sweep of the same scene before {t.token('data', here)}",
                found=found,
                token=t.token("sample", sample),
                channel=channel,
                file=t.data_filename[here].as_py(),
            )
        return rows

    def _poses(self, scene: int, token: str, data: I64) -> tuple[tuple[F64, F64], tuple[F64, F64]]:
        """global_from_vehicle and vehicle_from_sensor of sample_data rows: ((K, 3, 3), (K, 3)) each."""
        t = self.t
        pose, cal = t.data_pose[data], t.data_cal[data]
        lost = np.flatnonzero((pose < 0) | (cal < 0))
        if len(lost):
            raise self._bad(
                "sample_data row without ego pose or calibration",
                "table.key",
                scene,
                expected="tokens of ego_pose and calibrated_sensor rows",
                found=f"sample_data {t.token('data', int(data[lost[0]]))} points nowhere",
                token=token,
                file="sample_data.json",
            )
        quaternion = t.pose_quaternion[pose]
        with np.errstate(invalid="ignore", over="ignore"):
            norm = np.sqrt((quaternion * quaternion).sum(axis=-1))
        self._check_rotation(scene, token, "ego_pose", norm, t.pose_translation[pose], lambda i: t.token("pose", int(pose[i])))
        self._check_rotation(
            scene, token, "calibrated_sensor", t.cal_norm[cal], t.cal_translation[cal], lambda i: t.cal_token[cal[i]]
        )
        mounting = t.cal_rotation[cal], t.cal_translation[cal]
        return (rotation_from_quaternion(quaternion), t.pose_translation[pose]), mounting

    def _check_rotation(self, scene: int, token: str, table: str, norm: F64, translation: F64, name: Any) -> None:
        off = np.abs(norm - 1)
        bad = np.flatnonzero(~(off <= _NORM_BAD) | ~np.isfinite(translation).all(axis=1))
        if len(bad):
            i = int(bad[0])
            raise self._bad(
                f"{table} row is not a pose",
                "pose.quaternion",
                scene,
                expected="a quaternion of length 1 and a finite translation",
                found=f"{table} {name(i)}: length {norm[i]:g}, translation {translation[i].tolist()}",
                token=token,
                file=f"{table}.json",
            )
        self._odd("pose.quaternion_norm", int((off > _NORM_WARN).sum()))

    def _camera(self, scene: int, token: str, channel: str, row: int, ego_from: Pose, vehicle_from: Pose) -> ImageFrame:
        t = self.t
        matrix = t.cal_intrinsic[t.data_cal[row]]
        try:
            k = np.asarray(matrix, dtype=np.float64).reshape(3, 3)
        except (TypeError, ValueError):
            k = np.zeros((3, 3))
        height, width = (int(v) for v in t.data_hw[row])
        if not np.isfinite(k).all() or k[0, 0] <= 0 or k[1, 1] <= 0 or k[2].tolist() != [0, 0, 1] or min(height, width) <= 0:
            raise self._bad(
                "camera without usable intrinsics or size",
                "camera.intrinsic",
                scene,
                expected="a 3 x 3 matrix with positive focal lengths, and an image size",
                found=f"calibrated_sensor {t.cal_token[t.data_cal[row]]}: {str(matrix)[:120]}, {width} x {height}",
                token=token,
                channel=channel,
                file="calibrated_sensor.json",
            )
        camera = Camera(
            name=channel,
            image_from_camera=k,
            ego_from_camera=ego_from,
            width_px=width,
            height_px=height,
            timestamp_us=int(t.data_timestamp[row]),
        )
        name = t.data_filename[row].as_py()
        return ImageFrame(camera=camera, path=name, vehicle_from_camera=vehicle_from, token=t.token("data", row))

    def _sweep(self, channel: str, row: int, is_key: bool, ego_from: Pose, vehicle_from: Pose) -> Sweep:
        return Sweep(
            channel=channel,
            path=self.t.data_filename[row].as_py(),
            timestamp_us=int(self.t.data_timestamp[row]),
            ego_from_sensor=ego_from,
            vehicle_from_sensor=vehicle_from,
            is_key=is_key,
            token=self.t.token("data", row),
        )

    def _boxes(self, scene: int, sample: int, token: str, ego_from_global: Pose, tracks: dict[int, int]) -> Boxes:
        t = self.t
        rows = t.ann_order[t.ann_start[sample] : t.ann_start[sample + 1]]
        if len(rows) == 0:
            return Boxes.empty(EGO)
        self._check_annotations(scene, token, rows)
        category = t.instance_category[t.ann_instance[rows]]
        rotation = matmul3(ego_from_global.rotation, rotation_from_quaternion(t.ann_quaternion[rows]))
        velocity = matmul3(ego_from_global.rotation, annotation_velocities(t, rows)[..., None])[:, :2, 0]
        label = np.array([self._label[c] for c in category], dtype=np.int64)
        self._odd("annotation.ignored_category", int((label < 0).sum()))
        attribute = t.ann_attribute[rows]
        visibility = t.ann_visibility[rows].astype(np.int64)
        return Boxes(
            frame=EGO,
            centre_m=ego_from_global_points(ego_from_global, t.ann_translation[rows]),
            size_lwh_m=t.ann_size[rows][:, [1, 0, 2]],  # the tables give width, length, height
            yaw_rad=yaw_from_rotation(rotation),
            velocity_mps=velocity,
            label=label,
            score=np.ones(len(rows)),
            num_lidar=t.ann_points[rows, 0],
            num_radar=t.ann_points[rows, 1],
            attribute=np.array([self._attribute[a] if a >= 0 else -1 for a in attribute], dtype=np.int64),
            visibility=visibility + 1,
            token=tuple(t.ann_token.take(rows).to_pylist()),
            instance=tuple(t.ann_instance_token.take(rows).to_pylist()),
            track=np.array([tracks.setdefault(int(i), len(tracks)) for i in t.ann_instance[rows]], dtype=np.int64),
        )

    def _check_annotations(self, scene: int, token: str, rows: NDArray[Any]) -> None:
        """F22, F25. An empty visibility or attribute means unknown; a token that points nowhere is broken."""
        t = self.t
        quaternion = t.ann_quaternion[rows]
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.abs(np.sqrt((quaternion * quaternion).sum(axis=1)) - 1)
        instance = t.ann_instance[rows]
        category = np.where(instance >= 0, t.instance_category[np.maximum(instance, 0)], -2)
        rules: list[tuple[str, str, NDArray[np.bool_]]] = [
            ("annotation.instance", "an instance with a category", (instance < 0) | (category < 0)),
            ("annotation.visibility", "an empty or known visibility_token", t.ann_visibility[rows] == -2),
            ("annotation.attribute", "no or known attribute_tokens", t.ann_attribute[rows] == -2),
            ("annotation.chain", "prev and next in sample_annotation", (t.ann_prev[rows] == -2) | (t.ann_next[rows] == -2)),
            ("annotation.centre", "a finite centre", ~np.isfinite(t.ann_translation[rows]).all(axis=1)),
            ("annotation.size", "a size above 0", ~((t.ann_size[rows] > 0) & np.isfinite(t.ann_size[rows])).all(axis=1)),
            ("annotation.rotation", "a quaternion of length 1", ~(off <= _NORM_BAD)),
        ]
        for rule, expected, wrong in rules:
            for i in np.flatnonzero(wrong):
                row = int(rows[i])
                centre, size = t.ann_translation[row].tolist(), t.ann_size[row].tolist()
                found = f"annotation {t.token('ann', row)}: centre {centre}, size {size}"
                self._problems.append(
                    self._bad(
                        "annotation is broken",
                        rule,
                        scene,
                        expected=expected,
                        found=found,
                        token=token,
                        file="sample_annotation.json",
                    )
                )
        if any(wrong.any() for _, _, wrong in rules):
            raise self._problems.pop()


def ego_from_global_points(pose: Pose, xyz_m: F64) -> F64:
    """(N, 3) points moved by a pose, in the fixed summation order of ``matmul3``."""
    return matmul3(pose.rotation, xyz_m[..., None])[..., 0] + pose.translation_m


def _compose(a: tuple[F64, F64], b: tuple[F64, F64]) -> tuple[F64, F64]:
    """Stacks of rigid transforms a @ b: ((K, 3, 3), (K, 3)) each."""
    return matmul3(a[0], b[0]), matmul3(a[0], b[1][..., None])[..., 0] + a[1]
