"""Rows of the nuScenes tables as the dictionaries that public code keeps in its info files. Needs the raw data root."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from imkd_data.readers.nuscenes import NuScenesReader
from imkd_data.readers.nuscenes_boxes import annotation_velocities

__all__ = ["Records", "pickled"]


def pickled(value: Any) -> bytes:
    """The form in which the public code bases keep their infos. We only ever write it; nothing of ours reads a pickle."""
    sink = io.BytesIO()
    pickle.dump(value, sink, protocol=4)
    return sink.getvalue()


class Records:
    """sample_data, ego_pose, calibrated_sensor and sample_annotation rows of an open reader, by row number."""

    def __init__(self, reader: NuScenesReader) -> None:
        self.reader, self.t = reader, reader.tables
        self._sample = {token: i for i, token in enumerate(self.t.sample_token.to_pylist())}
        self._channel = {name: i for i, name in enumerate(self.t.channels)}

    def sample_row(self, token: str) -> int:
        """Row of a sample token."""
        return self._sample[token]

    def key(self, sample: int, channel: str) -> int:
        """sample_data row of a keyframe; KeyError where there is none."""
        row = int(self.t.key_row[sample, self._channel[channel]]) if channel in self._channel else -1
        if row < 0:
            raise KeyError(channel)
        return row

    def previous(self, data: int, limit: int) -> Iterator[int]:
        """Up to ``limit`` sample_data rows before one."""
        for _ in range(limit):
            data = int(self.t.data_prev[data])
            if data < 0:
                return
            yield data

    def ego_pose(self, data: int) -> dict[str, Any]:
        """The ego pose record of a sample_data row."""
        i = int(self.t.data_pose[data])
        return {
            "token": self.t.token("pose", i),
            "timestamp": int(self.t.pose_timestamp[i]),
            "rotation": self.t.pose_quaternion[i].tolist(),
            "translation": self.t.pose_translation[i].tolist(),
        }

    def calibration(self, data: int) -> dict[str, Any]:
        """The calibrated sensor record of a sample_data row."""
        i = int(self.t.data_cal[data])
        return {
            "token": self.t.cal_token[i],
            "sensor_token": self.t.sensor_token[int(self.t.cal_channel[i])],
            "translation": self.t.cal_translation[i].tolist(),
            "rotation": self.t.cal_quaternion[i].tolist(),
            "camera_intrinsic": self.t.cal_intrinsic[i],
        }

    def data(self, data: int) -> dict[str, Any]:
        """What info files keep of a sample_data row."""
        height, width = self.t.data_hw[data].tolist()
        return {
            "token": self.t.token("data", data),
            "sample_token": self.t.token("sample", int(self.t.data_sample[data])),
            "timestamp": int(self.t.data_timestamp[data]),
            "is_key_frame": bool(self.t.data_is_key[data]),
            "height": height,
            "width": width,
            "filename": str(self.t.data_filename[data].as_py()),
        }

    def annotations(self, sample: int) -> list[dict[str, Any]]:
        """The annotation records of a sample with ``category_name`` and ``velocity`` (3,) in the world, NaN = unknown."""
        t = self.t
        rows = t.ann_order[t.ann_start[sample] : t.ann_start[sample + 1]]
        velocity = annotation_velocities(t, rows)
        return [self._annotation(int(r)) | {"velocity": v} for r, v in zip(rows, velocity, strict=True)]

    def _annotation(self, row: int) -> dict[str, Any]:
        t = self.t

        def token(index: int) -> str:
            return t.token("ann", index) if index >= 0 else ""

        attribute, visibility = int(t.ann_attribute[row]), int(t.ann_visibility[row])
        return {
            "token": token(row),
            "sample_token": t.token("sample", int(t.ann_sample[row])),
            "instance_token": str(t.ann_instance_token[row].as_py()),
            "visibility_token": t.visibility_token[visibility] if visibility >= 0 else "",
            "attribute_tokens": [t.attribute_token[attribute]] if attribute >= 0 else [],
            "translation": t.ann_translation[row].tolist(),
            "size": t.ann_size[row].tolist(),
            "rotation": t.ann_quaternion[row].tolist(),
            "prev": token(int(t.ann_prev[row])),
            "next": token(int(t.ann_next[row])),
            "num_lidar_pts": int(t.ann_points[row, 0]),
            "num_radar_pts": int(t.ann_points[row, 1]),
            "category_name": t.category_name[int(t.instance_category[t.ann_instance[row]])],
        }

    def location(self, sample: int) -> str:
        """Where the scene was driven."""
        return self.t.scene_location[int(self.t.sample_scene[sample])]

    def intrinsic(self, data: int) -> Any:
        """The camera matrix as an array."""
        return np.array(self.t.cal_intrinsic[int(self.t.data_cal[data])])
