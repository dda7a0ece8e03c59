"""Look at the machine and the raw data before anything is built."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from imkd_data.errors import CacheDamageError, ImkdError, SourceMissingError, StorageError

__all__ = ["Finding", "examine"]

_PACKAGES = ("imkd", "torch", "numpy", "numba", "pyarrow", "zarr", "numcodecs", "dask", "simplejpeg", "webdataset")
_VERSIONS = ("v1.0-mini", "v1.0-trainval", "v1.0-test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: severity ok, info, warning or error (with its exit code and what to do); ``doctor`` ends with the code of
    the first error."""

    name: str
    severity: str
    text: str
    code: int = 0
    advice: str = ""


def examine(dataroot: Path, asked_version: str | None = None, hash_cache: Path | None = None) -> list[Finding]:
    """All findings; reads tables and folder listings, opens no sensor file unless ``hash_cache`` is given."""
    out = [*_environment(), *_gpu(), *_disk(dataroot)]
    out += _source(dataroot, asked_version)
    if hash_cache is not None:
        try:
            out += _hashes(dataroot, hash_cache)
        except (ImkdError, OSError) as error:
            out.append(_failed("hash", error))
    return out


def _failed(name: str, error: ImkdError | OSError) -> Finding:
    """The finding of a check that could not be made; 5 is the code of what the operating system refuses."""
    code = error.code if isinstance(error, ImkdError) else StorageError.code
    return Finding(name=name, severity="error", code=code, text=str(error).replace("\n", ";"))


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _environment() -> list[Finding]:
    out = [Finding(name="python", severity="ok", text=f"{platform.python_version()} on {platform.platform()}")]
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        out.append(Finding(name="python", severity="warning", text="only 3.11 and 3.12 are tested"))
    packages = {n: _installed(n) for n in _PACKAGES}
    out.append(Finding(name="packages", severity="ok", text=", ".join(f"{n} {v}" for n, v in packages.items())))
    lost = [n for n, v in packages.items() if v == "not installed" and n not in ("torch",)]
    if lost:
        out.append(
            Finding(name="packages", severity="error", code=2, text=f"missing: {', '.join(lost)}", advice="pip install imkd")
        )
    from pipelines.build.estimate import cores

    memory = _memory_bytes()
    text = f"{cores()} cores" + (f", {memory / 2**30:.1f} GiB memory" if memory else "")
    out.append(Finding(name="machine", severity="ok", text=text))
    return out


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _gpu() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return [Finding(name="gpu", severity="info", text="torch is not installed (not needed for building caches)")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [Finding(name="gpu", severity="ok", text=f"{', '.join(names)} (CUDA {torch.version.cuda})")]
    if torch.version.cuda:
        text = "a CUDA build of torch, but no GPU is visible"
        return [Finding(name="gpu", severity="warning", text=text, advice="install the CPU build, or check the driver")]
    return [Finding(name="gpu", severity="info", text="none (CPU build of torch)")]


def _disk(dataroot: Path) -> list[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    out = [Finding(name="disk", severity="ok", text=f"{free / 1e9:.1f} GB free in {here}")]
    try:
        shm = shutil.disk_usage("/dev/shm")
    except OSError:
        return out
    small = shm.total < 256 << 20
    text = f"/dev/shm {shm.total / 2**20:,.0f} MiB"
    advice = "loader workers pass batches through it: use --shm-size=8g in Docker, or loader workers 0"
    out.append(Finding(name="shm", severity="warning" if small else "ok", text=text, advice=advice if small else ""))
    return out


def _source(dataroot: Path, asked: str | None) -> list[Finding]:
    if not dataroot.is_dir():
        text = f"no data root at {dataroot}"
        return [Finding(name="dataroot", severity="error", code=8, text=text, advice="--dataroot D, or set IMKD_NUSCENES")]
    there = [v for v in _VERSIONS if (dataroot / v).is_dir()]
    wanted = [asked] if asked else there
    if not wanted or (asked and not (dataroot / asked).is_dir()):
        found = ", ".join(there) or "none"
        text = f"{asked or 'no v1.0-... folder'} not found in {dataroot}, found {found}"
        return [Finding(name="dataroot", severity="error", code=8, text=text, advice="unpack the metadata archive there")]
    out = [Finding(name="dataroot", severity="ok", text=f"{dataroot}: {', '.join(there)}")]
    for name in wanted:
        try:
            out += _version(dataroot, name)
        except (ImkdError, OSError) as error:
            out.append(_failed(name, error))
    return out


def _version(dataroot: Path, name: str) -> list[Finding]:
    from imkd_data.readers.nuscenes import open_nuscenes
    from imkd_data.readers.splits import SPLITS

    reader = open_nuscenes(dataroot, name)
    scenes = sorted({s for split in SPLITS for s in reader.scene_names(split) if reader.split_of(s) == split})
    missing: Counter[str] = Counter()
    whole, bad = 0, []
    lost_scenes: list[str] = []
    samples = 0
    for scene in scenes:
        lost: Counter[str] = Counter()
        try:
            for sample in reader.samples(scene):
                samples += 1
                lost += _missing_files(dataroot, sample)
        except SourceMissingError as error:
            lost[str(error.details.get("channel", "tables"))] += 1
        except ImkdError as error:
            bad.append(f"{scene}: {error.what}")
            continue
        whole += not lost
        if lost:
            lost_scenes.append(scene)
        missing += lost
    out = [Finding(name=name, severity="ok", text=f"{len(scenes)} scenes, {samples:,} samples, {whole} scenes whole")]
    if missing:
        by = ", ".join(f"{c} {n:,}" for c, n in sorted(missing.items()))
        some = ", ".join(lost_scenes[:5]) + (", ..." if len(lost_scenes) > 5 else "")
        text = f"missing files: {by}; in {len(lost_scenes)} scenes ({some})"
        advice = f"{_archives(missing)}; or build what is there with --scenes available"
        out.append(Finding(name=name, severity="error", code=8, text=text, advice=advice))
    for text in bad:
        out.append(Finding(name=name, severity="error", code=3, text=text))
    for rule, count in sorted(reader.warnings.items()):
        if count:
            out.append(Finding(name=name, severity="warning", text=f"{rule}: {count:,}"))
    return out


def _missing_files(dataroot: Path, sample: Any) -> Counter[str]:
    out: Counter[str] = Counter()
    for frame in sample.cameras:
        out[frame.camera.name] += not _there(dataroot, frame.path)
    for sweeps in (sample.lidar, *sample.radar.values()):
        for sweep in sweeps:
            kind = sweep.channel if sweep.is_key else f"{sweep.channel} sweeps"
            out[kind] += not _there(dataroot, sweep.path)
    return +out


_SEEN: dict[Path, frozenset[str]] = {}


def _there(dataroot: Path, path: str) -> bool:
    """One listing per folder instead of one stat per file."""
    folder = dataroot / os.path.dirname(path)
    if folder not in _SEEN:
        try:
            _SEEN[folder] = frozenset(os.listdir(folder))
        except OSError:
            _SEEN[folder] = frozenset()
    return os.path.basename(path) in _SEEN[folder]


def _archives(missing: Counter[str]) -> str:
    """Which archive was probably not unpacked."""
    if all(name.endswith(" sweeps") for name in missing):
        return "the sweeps seem not unpacked (blobs hold samples/ and sweeps/; the keyframe archive holds samples/ only)"
    return "one or more of the ten blob archives (v1.0-trainvalNN_blobs.tgz) seem not unpacked"


def _hashes(dataroot: Path, cache: Path) -> list[Finding]:
    """Content of the raw files against the receipts of a cache (finds replaced files of equal size)."""
    from imkd_data.cache.plan import stored_recipe
    from pipelines.build.planning import plan_only

    if stored_recipe(cache) is None:
        raise CacheDamageError("--hash is not a cache", file=str(cache), next="give the folder of imkd-data build")
    request = {"dataroot": dataroot, "out": cache}
    _, plan, _ = plan_only(request, update=True, hash_inputs=True)
    changed = [q for q in plan.queue if "changed" in q.reason]
    if not changed:
        return [Finding(name="hash", severity="ok", text=f"all raw files are those of {cache}")]
    shards = sorted({q.shard for q in changed})
    fields = sorted({q.field for q in changed})
    text = (
        f"source changed: raw files of shards {shards[:10]} differ from those that {cache} was built of ({', '.join(fields)})"
    )
    return [Finding(name="hash", severity="error", code=3, text=text, advice="imkd-data build --update, or restore the files")]
