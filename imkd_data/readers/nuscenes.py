"""nuScenes: tables and files -> samples in ``ego`` and their payload. The only part that knows nuScenes' conventions.

No devkit at run time. Every sweep is moved with its own ego pose and its own calibration.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imkd_data.errors import InputDataError, SourceMissingError, UsageError
from imkd_data.readers.files import SourceFiles
from imkd_data.readers.nuscenes_boxes import SceneBoxes
from imkd_data.readers.nuscenes_samples import SceneBuilder
from imkd_data.readers.nuscenes_tables import NuScenesTables, load_tables
from imkd_data.readers.pcd import parse_lidar, parse_radar
from imkd_data.readers.splits import SPLITS
from imkd_data.sample import ImageFrame, Payload, Points, Sample, SensorSuite, Sweep, same_everywhere

__all__ = ["NUSCENES", "NuScenesReader", "open_nuscenes"]

NUSCENES = SensorSuite(
    cameras=("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT"),
    lidar="LIDAR_TOP",
    radars=("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT"),
    radar_columns=(
        *("x", "y", "z", "dyn_prop", "id", "rcs", "vx", "vy", "vx_comp", "vy_comp", "is_quality_valid", "ambig_state"),
        *("x_rms", "y_rms", "invalid_state", "pdh0", "vx_rms", "vy_rms"),
    ),
    reflectance_max=255.0,
    image_hw_px=(900, 1600),
    max_radar_sweeps=13,
    max_radar_points=125,
    licence="nuScenes (c) Motional AD Inc., CC BY-NC-SA 4.0 with the nuScenes Terms of Use (non-commercial)",
)
LIDAR_RINGS = 32
_SWEEP_CACHE = 96  # parsed scans kept: 10 LiDAR and 65 radar scans overlap between neighbouring keyframes
_SCENE_CACHE = 8  # scenes whose annotation columns are kept for ``input_manifest``


def open_nuscenes(
    dataroot: Path,
    version: str,
    *,
    sensors: tuple[str, ...] | None = None,
    lidar_sweeps: int = 10,
    radar_sweeps: int = 13,
    reference_channel: str | None = None,
    strict: bool = False,
) -> NuScenesReader:
    """A reader over one version of a nuScenes tree.

    sensors: declared channels (default all twelve). reference_channel: whose keyframe time ``ego`` means; default LIDAR_TOP if
    it is declared, else the first declared sensor. strict: odd but legal files are errors. Raises UsageError (unknown
    sensor, no number of sweeps), SourceMissingError (no such version or table), InputDataError (broken tables).
    """
    return NuScenesReader(Path(dataroot), version, _declared(sensors), lidar_sweeps, radar_sweeps, reference_channel, strict)


def _declared(sensors: tuple[str, ...] | None) -> tuple[str, ...]:
    unknown = sorted(set(sensors or ()) - set(NUSCENES.channels))
    if unknown or sensors == ():
        raise UsageError(
            "unknown sensor" if unknown else "no sensor declared",
            rule="sensors.unknown",
            expected=", ".join(NUSCENES.channels),
            found=", ".join(unknown) or "nothing",
        )
    return tuple(c for c in NUSCENES.channels if sensors is None or c in sensors)


def _version_folder(root: Path, version: str) -> Path:
    """F29: the version asked for, or what is there instead."""
    if not version or "/" in version or version.startswith("."):
        raise UsageError(
            "bad version name", rule="version.name", expected="v1.0-mini, v1.0-trainval or v1.0-test", found=version
        )
    try:
        there = sorted(p.name for p in root.iterdir() if p.is_dir() and (p / "sample_data.json").exists())
    except OSError as error:
        raise SourceMissingError(
            "data root cannot be opened",
            rule="source.root",
            expected="the folder that holds samples/, sweeps/ and v1.0-.../",
            found=f"{error.strerror}: {root}",
            next="give the right folder: --dataroot (imkd-data: or IMKD_NUSCENES), --world in `imkd bench distill`",
        ) from error
    folder = root / version
    if version not in there and not folder.is_dir():
        raise SourceMissingError(
            f"{version} not found, found {', '.join(there)}" if there else f"not a nuScenes folder: {root}",
            rule="source.version",
            expected=f"{version}/ with 13 JSON tables",
            found=", ".join(there) or "no v1.0-... folder",
            next="pass --version, or --dataroot of the folder that holds samples/, sweeps/ and v1.0-.../",
        )
    return folder


def _image_size(tables: NuScenesTables) -> tuple[int, int]:
    """Height and width of the camera images as the tables give them; synthetic worlds may be smaller than 900 x 1600."""
    hw = tables.data_hw[tables.key_row[tables.key_row >= 0]]
    sizes, counts = np.unique(hw[(hw > 0).all(axis=1)] @ np.array([1 << 20, 1]), return_counts=True)
    if not len(counts):
        return NUSCENES.image_hw_px
    return divmod(int(sizes[counts.argmax()]), 1 << 20)


class NuScenesReader:
    """One nuScenes version on disk. Cheap to describe (``recipe``), so workers open their own."""

    suite: SensorSuite = NUSCENES  # with the image size of the tables once they are read

    def __init__(
        self,
        dataroot: Path,
        version: str,
        sensors: tuple[str, ...],
        lidar_sweeps: int,
        radar_sweeps: int,
        reference_channel: str | None,
        strict: bool,
    ) -> None:
        for name, sweeps in (("lidar_sweeps", lidar_sweeps), ("radar_sweeps", radar_sweeps)):
            if type(sweeps) is not int or sweeps < 1:  # how many a cache can hold is the recipe's to say
                raise UsageError(f"{name} is no number of sweeps", expected="a whole number, at least 1", found=repr(sweeps))
        self.dataroot = Path(os.path.abspath(dataroot.expanduser()))
        self.version = version
        self.sensors = sensors
        self.strict = strict
        self.warnings: Counter[str] = Counter()
        default = "LIDAR_TOP" if "LIDAR_TOP" in sensors else sensors[0]
        self.reference_channel = reference_channel or default
        if self.reference_channel not in NUSCENES.channels:
            raise UsageError(
                "unknown reference channel",
                rule="sensors.unknown",
                expected=", ".join(NUSCENES.channels),
                found=reference_channel,
            )
        self.tables: NuScenesTables = load_tables(_version_folder(self.dataroot, version))
        self.suite = replace(NUSCENES, image_hw_px=_image_size(self.tables))
        self._files = SourceFiles(self.dataroot)
        self._scenes = {name: i for i, name in enumerate(self.tables.scene_name)}
        self._builder = SceneBuilder(
            self.tables,
            NUSCENES,
            sensors,
            self.reference_channel,
            {"lidar": lidar_sweeps, "radar": radar_sweeps},
            self.warnings,
        )
        self._scans: OrderedDict[str, _Scan] = OrderedDict()
        self._truth: OrderedDict[int, tuple[dict[str, int], SceneBoxes]] = OrderedDict()
        self._digests: OrderedDict[str, dict[str, str]] = OrderedDict()
        self._buffer = np.empty(1 << 20, dtype=np.uint8)

    def scene_names(self, split: str) -> tuple[str, ...]:
        """Scenes of a split that the tables hold, sorted by name. UsageError for an unknown split."""
        if split not in SPLITS:
            raise UsageError(f"unknown split {split!r}", rule="split.unknown", expected=", ".join(SPLITS), found=split)
        return tuple(sorted(set(SPLITS[split]) & set(self._scenes)))

    def split_of(self, scene: str) -> str:
        """The split of this version a scene belongs to; '' for a scene in no list."""
        names = (
            ("mini_train", "mini_val") if "mini" in self.version else ("test",) if "test" in self.version else ("train", "val")
        )
        return next((n for n in (*names, *SPLITS) if scene in SPLITS[n]), "")

    def samples(self, scene: str) -> tuple[Sample, ...]:
        """The scene's keyframes in time order. InputDataError lists every problem of the scene (``problems``)."""
        if scene not in self._scenes:
            raise UsageError(
                f"no scene {scene!r} in {self.version}", rule="scene.unknown", expected=", ".join(sorted(self._scenes)[:10])
            )
        row = self._scenes[scene]
        samples, boxes = self._builder.samples(row, self.split_of(scene))
        self._truth[row] = {s.token: i for i, s in enumerate(samples)}, boxes
        while len(self._truth) > _SCENE_CACHE:
            self._truth.popitem(last=False)
        return samples

    def read(self, sample: Sample, needs: frozenset[str]) -> Payload:
        """Read what is in ``needs`` (images, lidar, lidar_key, radar). Scans shared by neighbouring samples are parsed once."""
        files: list[tuple[str, int, int]] = []
        dropped: Counter[str] = Counter()
        odd: Counter[str] = Counter()
        images: dict[str, bytes] | None = None
        if "images" in needs:
            images = {f.camera.name: self._read_image(sample, f, files) for f in sample.cameras}
        lidar: tuple[Points, ...] | None = None
        if "lidar" in needs or "lidar_key" in needs:
            sweeps = sample.lidar if "lidar" in needs else sample.lidar[:1]
            lidar = tuple(self._points(sample, s, files, dropped, odd) for s in sweeps)
        radar: dict[str, tuple[Points, ...]] | None = None
        if "radar" in needs:
            radar = {
                c: tuple(self._points(sample, s, files, dropped, odd) for s in sweeps) for c, sweeps in sample.radar.items()
            }
        return Payload(
            sample=sample,
            images=images,
            lidar=lidar,
            radar=radar,
            files=tuple(files),
            dropped={k: v for k, v in sorted(dropped.items()) if v},
            warnings={k: v for k, v in sorted(odd.items()) if v},
        )

    def _read_image(self, sample: Sample, frame: ImageFrame, files: list[tuple[str, int, int]]) -> bytes:
        where = {"token": sample.token, "scene": sample.scene, "channel": frame.camera.name}
        data, crc = self._files.read(frame.path, **where)
        files.append((frame.path, len(data), crc))
        _check_jpeg(data, frame, where)
        return data

    def _points(
        self, sample: Sample, sweep: Sweep, files: list[tuple[str, int, int]], dropped: Counter[str], odd: Counter[str]
    ) -> Points:
        scan = self._scans.get(sweep.path)
        if scan is None:
            scan = self._scans[sweep.path] = self._parse(sample, sweep)
            while len(self._scans) > _SWEEP_CACHE:
                self._scans.popitem(last=False)
        else:
            self._scans.move_to_end(sweep.path)
        files.append(scan.file)
        if scan.dropped:
            dropped.update(scan.dropped)
        if scan.odd:
            odd.update(scan.odd)
        age_s = (sample.timestamp_us - sweep.timestamp_us) * 1e-6
        return Points(
            frame=sweep.ego_from_sensor.src,
            xyz_m=scan.xyz,
            time_s=same_everywhere(-age_s, len(scan.xyz)),
            features=scan.features,
            feature_names=scan.names,
        )

    def _parse(self, sample: Sample, sweep: Sweep) -> _Scan:
        where = {"token": sample.token, "scene": sample.scene, "channel": sweep.channel}
        data, crc, self._buffer = self._files.read_into(self._buffer, sweep.path, **where)
        where["file"] = sweep.path
        dropped: Counter[str] = Counter()
        odd: Counter[str] = Counter()
        if sweep.channel == NUSCENES.lidar:
            table = parse_lidar(
                data, intensity_max=255.0, rings=LIDAR_RINGS, odd=odd, dropped=dropped, strict=self.strict, **where
            )
            first, names = 3, ("intensity", "ring")
        else:
            table = parse_radar(data, NUSCENES.radar_columns, max_points=125, odd=odd, dropped=dropped, **where)
            first, names = 0, NUSCENES.radar_columns
        table.flags.writeable = False  # before views of it are made
        counted = ({k: v for k, v in c.items() if v} for c in (dropped, odd))
        return _Scan(table[:, :3], table[:, first:], names, (sweep.path, len(data), crc), *counted)

    def input_manifest(self, sample: Sample, needs: frozenset[str]) -> list[list[Any]]:
        """[relative path, size] of every file that ``needs`` reads, then [part, hash of its table rows]."""
        paths: list[str] = []
        if "images" in needs:
            paths += [f.path for f in sample.cameras]
        for sweep in _sweeps(sample, needs):
            paths.append(sweep.path)
        where = {"token": sample.token, "scene": sample.scene}
        digests = self._digests.get(sample.token)
        if digests is None:
            digests = self._digests[sample.token] = {}
            while len(self._digests) > 256:
                self._digests.popitem(last=False)
        parts = ["pose", *(p for p in ("boxes", "cameras", "lidar", "lidar_key", "radar") if p in needs)]
        for part in parts:
            if part not in digests:
                digests[part] = _digest(sample, part, self._annotations)
        return [[p, self._files.size(p, **where)] for p in paths] + [[f"table:{p}", digests[p]] for p in parts]

    def _annotations(self, sample: Sample) -> list[Any]:
        """Raw annotation values of a sample."""
        places, boxes = self._truth.get(self._scenes[sample.scene], ({}, None))
        if boxes is not None and sample.token in places:
            return boxes.values(places[sample.token])
        row = int(self.tables.sample_token.index(sample.token).as_py())
        return SceneBoxes(self.tables, [row]).values(0)


class _Scan:
    """One parsed scan in the sensor's frame, its file (path, bytes, crc32c), and counts of what reading it showed."""

    __slots__ = ("dropped", "features", "file", "names", "odd", "xyz")

    def __init__(
        self,
        xyz: NDArray[np.float32],
        features: NDArray[np.float32],
        names: tuple[str, ...],
        file: tuple[str, int, int],
        dropped: dict[str, int],
        odd: dict[str, int],
    ) -> None:
        self.xyz, self.features, self.names, self.file = xyz, features, names, file
        self.dropped, self.odd = dropped, odd


def _sweeps(sample: Sample, needs: frozenset[str]) -> Iterable[Sweep]:
    if "lidar" in needs or "lidar_key" in needs:
        yield from sample.lidar if "lidar" in needs else sample.lidar[:1]
    if "radar" in needs:
        for sweeps in sample.radar.values():
            yield from sweeps


def _digest(sample: Sample, part: str, annotations: Callable[[Sample], list[Any]]) -> str:
    """sha256 over the values of the tables behind one part of a sample, each followed by a zero byte. Nothing that went through
    a library's sine or arc tangent, whose last bits differ between versions, no path of the machine and no time of the disk."""
    if part in ("lidar", "lidar_key", "radar"):
        return sha256(b"".join(_sweep_bytes(sample, part))).hexdigest()
    values: list[Any] = []
    if part == "pose":
        values = [sample.token, sample.timestamp_us, sample.global_from_ego.matrix34(), sample.ego_from_reference.matrix34()]
    elif part == "boxes":
        values = ["none"] if sample.boxes is None else [*annotations(sample), sample.boxes.track]
    else:
        for f in sample.cameras:
            c = f.camera
            values += [c.name, c.timestamp_us, c.width_px, c.height_px, c.image_from_camera]
            values += [c.ego_from_camera.matrix34(), f.vehicle_from_camera.matrix34()]
    encoded = (v.tobytes() if isinstance(v, np.ndarray) else repr(v).encode() for v in values)
    return sha256(b"".join([piece for value in encoded for piece in (value, b"\0")])).hexdigest()


def _sweep_bytes(sample: Sample, part: str) -> Iterator[bytes]:
    """Of every sweep its channel (for a radar twice), time, pose, mounting, and whether it is the key frame's."""
    mounts: dict[int, bytes] = {}  # one object a mounting: a sample has up to a hundred sweeps of six of them
    for sweep in _sweeps(sample, frozenset([part])):
        name = f"{sweep.channel!r}\0"
        mount = mounts.get(id(sweep.vehicle_from_sensor))
        if mount is None:
            mount = mounts[id(sweep.vehicle_from_sensor)] = sweep.vehicle_from_sensor.matrix34().tobytes()
        yield f"{name * (1 + (part == 'radar'))}{sweep.timestamp_us!r}\0".encode()
        yield sweep.ego_from_sensor.matrix34().tobytes()
        yield b"\0%b\0%b\0" % (mount, b"True" if sweep.is_key else b"False")


def _check_jpeg(data: bytes, frame: ImageFrame, where: dict[str, Any]) -> None:
    """F14, F16: header, size against the table, end marker; nothing is decoded here, so a bomb costs nothing."""
    import simplejpeg

    camera = frame.camera
    expected = f"a JPEG of {camera.width_px} x {camera.height_px}"
    advice = "re-extract the file, then run the same command; or add --on-error quarantine"
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise InputDataError(
            "camera image is not a JPEG",
            rule="image.header",
            expected=expected,
            found=f"{len(data):,} bytes that begin with {data[:8]!r}",
            file=frame.path,
            next=advice,
            **where,
        ) from error
    if (height, width) != (camera.height_px, camera.width_px):
        raise InputDataError(
            "camera image is not of the size in the tables",
            rule="image.size",
            expected=expected,
            found=f"{width} x {height}",
            file=frame.path,
            next=advice,
            **where,
        )
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise InputDataError(
            "camera image is cut off",
            rule="image.truncated",
            expected="a JPEG end marker",
            found=f"{len(data):,} bytes without one",
            file=frame.path,
            next=advice,
            **where,
        )
