"""Rows of the nuScenes tables -> ``Sample`` values of one scene, every pose composed into ``ego``; a scene at a time, because a
sample names up to a hundred scans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import ImkdError, InputDataError
from imkd_data.geometry import EGO, F64, GLOBAL, VEHICLE, Camera, Pose, matmul3, rotation_from_quaternion, sensor_at
from imkd_data.readers.nuscenes_boxes import SceneBoxes, annotation_velocities
from imkd_data.readers.nuscenes_tables import I64, NuScenesTables
from imkd_data.sample import ImageFrame, Sample, SensorSuite, Sweep

__all__ = ["SUSPECT_SCENES", "SceneBuilder", "annotation_velocities"]

# Scenes whose ego poses are known to be wrong in places; reported, never corrected.
SUSPECT_SCENES = frozenset({"scene-0499", "scene-0501", "scene-0502", "scene-0515", "scene-0517"})
_MICROSECONDS = (10**15, 4 * 10**15)  # 2001 .. 2096: anything else is another unit
_SWEEP_GAP_US = {"lidar": 150_000, "radar": 250_000}  # three nominal periods: longer is a gap worth a warning
_GAP_BINS_S = (0.15, 0.25, 0.5, 1.0, 2.0)  # a long gap is told apart from many short ones
_NORM_WARN, _NORM_BAD = 1e-3, 0.1


@dataclass(slots=True)
class _Frames:
    """Every scan and image of some samples, flat, sample by sample: the reference first, then each channel's key frame and past
    sweeps. ``counts``: (samples, 1 + channels). Poses as stacks (K, 3, 3), (K, 3)."""

    data: I64
    counts: I64
    global_from_ego: tuple[F64, F64]
    ego_from_global: tuple[F64, F64]
    ego_from_sensor: tuple[F64, F64]
    odd: Counter[str]


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
        self._warnings = warnings
        self._kind = {c: "lidar" if c == suite.lidar else "radar" if c in suite.radars else "camera" for c in sensors}
        self._count = {c: num_sweeps.get(kind, 1) for c, kind in self._kind.items()}
        self._channel_row = {c: i for i, c in enumerate(tables.channels)}
        order = np.lexsort((tables.sample_timestamp, tables.sample_scene))
        starts = np.searchsorted(tables.sample_scene[order], np.arange(len(tables.scene_name) + 1))
        self._rows = [order[start:stop] for start, stop in pairwise(starts.tolist())]

    def samples(self, scene: int, split: str) -> tuple[tuple[Sample, ...], SceneBoxes]:
        """All samples of scene row ``scene`` in time order, and their annotations in the same order. Raises the first problem
        with the others in ``problems``."""
        rows: list[int] = self._rows[scene].tolist()
        tokens: list[str] = self.t.sample_token.take(self._rows[scene]).to_pylist()
        problems: list[ImkdError] = self._time_problems(scene, rows)
        boxes = SceneBoxes(self.t, rows)
        try:
            frames = self._frames(scene, rows, tokens)
            cameras = self._cameras(scene, frames, tokens)
            problems += boxes.check(self.t.scene_name[scene], tokens)
        except ImkdError:
            problems += self._every_problem(scene, rows, tokens)
        if problems:
            first, *rest = problems
            raise type(first)(first.what, rule=first.rule, problems=tuple(rest), **first.details)
        frames.odd["annotation.ignored_category"] += boxes.move(*frames.ego_from_global)
        frames.odd["scene.suspect_poses"] += self.t.scene_name[scene] in SUSPECT_SCENES
        self._warnings.update({rule: count for rule, count in frames.odd.items() if count})
        return self._assembled(scene, split, tokens, frames, cameras, boxes), boxes

    def _every_problem(self, scene: int, rows: list[int], tokens: list[str]) -> Iterable[ImkdError]:
        """One sample after the other, so that each that is broken is named."""
        for row, token in zip(rows, tokens, strict=True):
            try:
                self._cameras(scene, self._frames(scene, [row], [token]), [token])
                yield from SceneBoxes(self.t, [row]).check(self.t.scene_name[scene], [token])
            except ImkdError as error:
                yield error

    def _bad(self, what: str, rule: str, scene: int, **details: Any) -> InputDataError:
        return InputDataError(what, rule=rule, scene=self.t.scene_name[scene], **details)

    def _time_problems(self, scene: int, rows: list[int]) -> list[ImkdError]:
        problems: list[ImkdError] = []
        for row in rows:
            stamp, previous = int(self.t.sample_timestamp[row]), int(self.t.sample_prev[row])
            unit = not _MICROSECONDS[0] < stamp < _MICROSECONDS[1]
            back = not unit and previous >= 0 and int(self.t.sample_timestamp[previous]) >= stamp
            if not unit and not back:
                continue
            where: dict[str, Any] = {"token": self.t.token("sample", row), "file": "sample.json"}
            if unit:
                what = "time stamp is not in microseconds"
                problems.append(self._bad(what, "time.unit", scene, expected="about 1.5e15", found=stamp, **where))
            else:
                found = f"{stamp} after {int(self.t.sample_timestamp[previous])} of {self.t.token('sample', previous)}"
                problems.append(self._bad("time goes back between samples", "time.order", scene, found=found, **where))
        return problems

    def _assembled(
        self,
        scene: int,
        split: str,
        tokens: list[str],
        frames: _Frames,
        cameras: Mapping[int, NDArray[np.float64]],
        boxes: SceneBoxes,
    ) -> tuple[Sample, ...]:
        t, suite = self.t, self.suite
        stamps: list[int] = t.data_timestamp[frames.data].tolist()
        paths: list[str] = t.data_filename.take(frames.data).to_pylist()
        names: list[str] = t.data_token.take(frames.data).to_pylist()
        cals: list[int] = t.data_cal[frames.data].tolist()
        sizes: list[list[int]] = t.data_hw[frames.data].tolist()
        channels = [self.reference, *self.sensors]
        of_row = [c for counts in frames.counts.tolist() for c, n in zip(channels, counts, strict=True) for _ in range(n)]
        sources = [sensor_at(c, stamp) for c, stamp in zip(of_row, stamps, strict=True)]
        ego_from = Pose.many([EGO] * len(sources), sources, *frames.ego_from_sensor)
        global_from = Pose.many([GLOBAL] * len(tokens), [EGO] * len(tokens), *frames.global_from_ego)
        mounted = {
            (c, cal): Pose(dst=VEHICLE, src=c, rotation=t.cal_rotation[cal], translation_m=t.cal_translation[cal])
            for c, cal in set(zip(of_row, cals, strict=True))
        }
        samples, at = [], 0
        for i, counts in enumerate(frames.counts.tolist()):
            reference, at = at, at + 1
            images: list[ImageFrame] = []
            sweeps: dict[str, tuple[Sweep, ...]] = {}
            for channel, n in zip(self.sensors, counts[1:], strict=True):
                here, at = range(at, at + n), at + n
                if channel not in suite.cameras:
                    sweeps[channel] = tuple(
                        Sweep(
                            channel=channel,
                            path=paths[k],
                            timestamp_us=stamps[k],
                            ego_from_sensor=ego_from[k],
                            vehicle_from_sensor=mounted[channel, cals[k]],
                            is_key=k == here[0],
                            token=names[k],
                        )
                        for k in here
                    )
                    continue
                k = here[0]
                camera = Camera(
                    name=channel,
                    image_from_camera=cameras[cals[k]],
                    ego_from_camera=ego_from[k],
                    width_px=sizes[k][1],
                    height_px=sizes[k][0],
                    timestamp_us=stamps[k],
                )
                mount = mounted[channel, cals[k]]
                images.append(ImageFrame(camera=camera, path=paths[k], vehicle_from_camera=mount, token=names[k]))
            samples.append(
                Sample(
                    dataset="nuscenes",
                    token=tokens[i],
                    scene=t.scene_name[scene],
                    scene_token=t.scene_token[scene],
                    split=split,
                    timestamp_us=stamps[reference],
                    global_from_ego=global_from[i],
                    ego_from_reference=ego_from[reference],
                    cameras=tuple(images),
                    lidar=sweeps.get(suite.lidar or "", ()),
                    radar={c: s for c, s in sweeps.items() if c in suite.radars},
                    boxes=None if split == "test" else boxes.boxes(i),
                    location=t.scene_location[scene],
                    description=t.scene_description[scene],
                    previous=tokens[i - 1] if i else "",
                    next=tokens[i + 1] if i + 1 < len(tokens) else "",
                )
            )
        return tuple(samples)

    def _frames(self, scene: int, rows: list[int], tokens: list[str]) -> _Frames:
        """Chains and poses of all scans. Raises the first problem."""
        odd: Counter[str] = Counter()
        keys = self._key_rows(scene, rows, tokens)
        columns = [keys[self.reference][:, None]]
        columns += [self._chains(scene, tokens, keys[c], c, odd) for c in self.sensors]
        table = np.concatenate(columns, axis=1)
        counts = np.stack([(c >= 0).sum(axis=1) for c in columns], axis=1)
        data = table[table >= 0]
        sample = np.repeat(np.arange(len(rows)), counts.sum(axis=1))
        (turn, shift), mounting = self._poses(scene, [tokens, sample], data, odd)
        first = np.concatenate([[0], np.cumsum(counts.sum(axis=1))[:-1]])
        ego_turn = np.ascontiguousarray(turn[first].swapaxes(1, 2))  # the inverse of a rotation
        ego_shift = -matmul3(ego_turn, shift[first][..., None])[..., 0]
        ego_from_vehicle = _compose((ego_turn[sample], ego_shift[sample]), (turn, shift))
        return _Frames(
            data, counts, (turn[first], shift[first]), (ego_turn, ego_shift), _compose(ego_from_vehicle, mounting), odd
        )

    def _key_rows(self, scene: int, rows: list[int], tokens: list[str]) -> dict[str, I64]:
        """sample_data rows (samples,) of the reference and every declared channel; an error where one is missing."""
        none = np.full(len(rows), -1, dtype=np.int64)
        table = self.t.key_row[np.array(rows, dtype=np.int64)].astype(np.int64)
        found = {c: table[:, self._channel_row[c]] if c in self._channel_row else none for c in self.suite.channels}
        wanted = list(dict.fromkeys((self.reference, *self.sensors)))
        lacking = np.stack([found[c] < 0 for c in wanted], axis=1)
        if lacking.any():
            i = int(lacking.any(axis=1).argmax())
            missing = [c for c, lost in zip(wanted, lacking[i], strict=True) if lost]
            held = [c for c in self.suite.channels if found[c][i] >= 0]
            raise self._bad(
                f"sample has no {', '.join(missing)}",
                "sample.sensor_missing",
                scene,
                expected="a key frame of every declared sensor",
                found=", ".join(held) or "no sensor",
                token=tokens[i],
                channel=", ".join(missing),
                file="sample_data.json",
                next=f"declare what the data has: --sensors {','.join(held)}" if held else "unpack the metadata again",
            )
        return found

    def _chains(self, scene: int, tokens: list[str], keys: I64, channel: str, odd: Counter[str]) -> I64:
        """(samples, sweeps): key row, then past sweeps newest first, by ``prev``; -1 where a scene has no more. F19, F20:
        never a loop, another scene or a step forward."""
        t = self.t
        out = np.full((len(keys), self._count[channel]), -1, dtype=np.int64)
        out[:, 0] = keys
        self._check_unit(scene, tokens, keys, channel)
        place = np.arange(len(keys))
        for k in range(1, out.shape[1]):
            here = out[place, k - 1]
            previous = t.data_prev[here].astype(np.int64)
            place, here, previous = (a[previous != -1] for a in (place, here, previous))
            if not len(place):
                break
            gap = t.data_timestamp[here] - t.data_timestamp[previous]
            cal, other = t.data_cal[previous], t.data_sample[previous]
            same = (cal >= 0) & (t.cal_channel[cal] == self._channel_row[channel])
            good = (previous >= 0) & same & (other >= 0) & (t.sample_scene[other] == scene) & (gap > 0)
            if not good.all():
                i = int((~good).argmax())
                raise self._broken_chain(scene, tokens[place[i]], channel, int(here[i]), int(previous[i]), bool(same[i]))
            self._count_gaps(gap, self._kind[channel], odd)
            out[place, k] = previous
        return out

    def _check_unit(self, scene: int, tokens: list[str], rows: I64, channel: str) -> None:
        """F20: seconds for microseconds, said before the order of such times can look like a loop."""
        stamps = self.t.data_timestamp[rows]
        wrong = np.flatnonzero((stamps <= _MICROSECONDS[0]) | (stamps >= _MICROSECONDS[1]))
        if len(wrong):
            i = int(wrong[0])
            raise self._bad(
                "time stamp is not in microseconds",
                "time.unit",
                scene,
                expected="about 1.5e15",
                found=f"{int(stamps[i])} in sample_data {self.t.token('data', int(rows[i]))}",
                token=tokens[i],
                channel=channel,
                file="sample_data.json",
            )

    @staticmethod
    def _count_gaps(gap_us: I64, kind: str, odd: Counter[str]) -> None:
        """F20: all gaps above the limit, and a histogram of their lengths."""
        if (limit := _SWEEP_GAP_US.get(kind)) is None or not (long := gap_us[gap_us > limit]).size:
            return
        odd["sweep.gap"] += long.size
        edges = [limit / 1e6, *(e for e in _GAP_BINS_S if e > limit / 1e6), np.inf]
        for low, high, count in zip(edges, edges[1:], np.histogram(long / 1e6, edges)[0].tolist(), strict=False):
            where = f"{low:g} to {high:g} s" if high < np.inf else f"above {low:g} s"
            odd[f"sweep.gap {kind} {where}"] += count

    def _broken_chain(self, scene: int, token: str, channel: str, here: int, previous: int, same: bool) -> InputDataError:
        t = self.t
        found = "a token that is not in sample_data"
        if previous >= 0:
            other, gap = int(t.data_sample[previous]), int(t.data_timestamp[here] - t.data_timestamp[previous])
            found = f"{t.token('data', previous)}, "
            if not same:
                found += "a sweep of another sensor"
            elif other < 0 or t.sample_scene[other] != scene:
                found += "a sweep of another scene"
            else:
                found += f"a sweep {-gap} us later (a loop, or time goes back)"
        return self._bad(
            "chain of sweeps is broken",
            "sweep.chain",
            scene,
            expected=f"an earlier {channel} sweep of the same scene before {t.token('data', here)}",
            found=found,
            token=token,
            channel=channel,
            file=t.data_filename[here].as_py(),
        )

    def _poses(self, scene: int, samples: Any, data: I64, odd: Counter[str]) -> tuple[tuple[F64, F64], tuple[F64, F64]]:
        """global_from_vehicle and vehicle_from_sensor of sample_data rows: ((K, 3, 3), (K, 3)) each. samples: tokens, and which
        of them every row belongs to."""
        t = self.t
        tokens, sample = samples
        pose, cal = t.data_pose[data], t.data_cal[data]
        lost = np.flatnonzero((pose < 0) | (cal < 0))
        if len(lost):
            i = int(lost[0])
            raise self._bad(
                "sample_data row without ego pose or calibration",
                "table.key",
                scene,
                expected="tokens of ego_pose and calibrated_sensor rows",
                found=f"sample_data {t.token('data', int(data[i]))} points nowhere",
                token=tokens[sample[i]],
                file="sample_data.json",
            )
        quaternion, shift, mount = t.pose_quaternion[pose], t.pose_translation[pose], t.cal_translation[cal]
        with np.errstate(invalid="ignore", over="ignore"):
            norm = np.sqrt((quaternion * quaternion).sum(axis=-1))
        for table, length, place in (("ego_pose", norm, shift), ("calibrated_sensor", t.cal_norm[cal], mount)):
            off = np.abs(length - 1)
            bad = np.flatnonzero(~(off <= _NORM_BAD) | ~np.isfinite(place).all(axis=1))
            if len(bad):
                i = int(bad[0])
                name = t.token("pose", int(pose[i])) if table == "ego_pose" else t.cal_token[cal[i]]
                raise self._bad(
                    f"{table} row is not a pose",
                    "pose.quaternion",
                    scene,
                    expected="a quaternion of length 1 and a finite translation",
                    found=f"{table} {name}: length {length[i]:g}, translation {place[i].tolist()}",
                    token=tokens[sample[i]],
                    file=f"{table}.json",
                )
            odd["pose.quaternion_norm"] += int((off > _NORM_WARN).sum())
        return (rotation_from_quaternion(quaternion), shift), (t.cal_rotation[cal], mount)

    def _cameras(self, scene: int, frames: _Frames, tokens: list[str]) -> dict[int, NDArray[np.float64]]:
        """Intrinsics (3, 3) by calibrated_sensor row. Raises where they or an image's size cannot be used."""
        t = self.t
        first = 1 + np.concatenate([[0], np.cumsum(frames.counts.sum(axis=1))[:-1]])
        out: dict[int, NDArray[np.float64]] = {}
        for j, channel in enumerate(self.sensors):
            if self._kind[channel] == "camera":
                for i, row in enumerate(frames.data[first].tolist()):
                    cal = int(t.data_cal[row])
                    if cal not in out:
                        out[cal] = _intrinsics(t.cal_intrinsic[cal])
                    height, width = t.data_hw[row].tolist()
                    if min(height, width) <= 0 or np.isnan(out[cal][0, 0]):
                        matrix = str(t.cal_intrinsic[cal])[:120]
                        raise self._bad(
                            "camera without usable intrinsics or size",
                            "camera.intrinsic",
                            scene,
                            expected="a 3 x 3 matrix with positive focal lengths, and an image size",
                            found=f"calibrated_sensor {t.cal_token[cal]}: {matrix}, {width} x {height}",
                            token=tokens[i],
                            channel=channel,
                            file="calibrated_sensor.json",
                        )
            first = first + frames.counts[:, 1 + j]
        return out


def _intrinsics(matrix: Any) -> NDArray[np.float64]:
    """(3, 3), all NaN where it is not the matrix of a camera."""
    try:
        k = np.array(matrix, dtype=np.float64).reshape(3, 3)
    except (TypeError, ValueError):
        k = np.full((3, 3), np.nan)
    if not np.isfinite(k).all() or k[0, 0] <= 0 or k[1, 1] <= 0 or k[2].tolist() != [0, 0, 1]:
        k = np.full((3, 3), np.nan)
    k.flags.writeable = False
    return k


def _compose(a: tuple[F64, F64], b: tuple[F64, F64]) -> tuple[F64, F64]:
    """Stacks of rigid transforms a @ b: ((K, 3, 3), (K, 3)) each."""
    return matmul3(a[0], b[0]), matmul3(a[0], b[1][..., None])[..., 0] + a[1]
