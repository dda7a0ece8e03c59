"""Every source fault damages exactly what it says, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from imkd_data.errors import MismatchError, UsageError
from imkd_data.world import write_world
from imkd_data.world.faults import FAULTS, check, inject
from imkd_data.world.radar import POINT

EVERY = [f"{name}.{variant}" for name, variants in FAULTS.items() for variant in variants]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of two keyframes without the LiDAR sweeps' files, small enough to be copied for every fault."""
    root = tmp_path_factory.mktemp("sound") / "world"
    write_world(root, scenes=2, keyframes=2, seed=5, image_hw_px=(45, 80))
    shutil.rmtree(root / "sweeps")
    return root


def state(root: Path) -> dict[str, str]:
    out = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            out[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            out[name] = "folder"
        else:
            mode = path.stat().st_mode & 0o777
            path.chmod(0o600)
            out[name] = f"{mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            path.chmod(mode)
    return out


@pytest.mark.parametrize("fault", EVERY)
def test_fault_changes_what_it_reports(fault: str, sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    shutil.copytree(sound, root)
    before = state(root)
    report = inject(root, "v1.0-mini", fault)
    after = state(root)
    differs = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} - {".synth/fault.json"}
    assert differs == set(report["changed"])
    assert bool(differs) == (fault not in ("F18.natural", "F23.natural"))
    assert json.loads((root / ".synth" / "fault.json").read_text()) == report


def damaged(sound: Path, tmp_path: Path, fault: str) -> Path:
    shutil.copytree(sound, tmp_path / "world")
    return tmp_path / "world" / str(inject(tmp_path / "world", "v1.0-mini", fault)["changed"][0])


@pytest.mark.parametrize(("fault", "rest"), [("F02", 3), ("F03", 16), ("F04", 0)])
def test_cut_lidar_files_leave_the_stated_remainder(fault: str, rest: int, sound: Path, tmp_path: Path) -> None:
    size = damaged(sound, tmp_path, fault).stat().st_size
    assert size % 20 == rest and (size // 20) % 32 != 0


def test_radar_header_faults(sound: Path, tmp_path: Path) -> None:
    path = damaged(sound, tmp_path, "F11.reordered")
    data = path.read_bytes()
    at = data.index(b"DATA binary\n") + 12
    header = dict(line.split(" ", 1) for line in data[:at].decode().splitlines() if not line.startswith("#"))
    names = header["FIELDS"].split()
    assert names[0] == "vx_comp" and sorted(names) == sorted(POINT.names)
    dtype = np.dtype([(n, POINT[n]) for n in names])
    moved = np.frombuffer(data[at:], dtype, int(header["POINTS"]))
    original = (sound / path.relative_to(tmp_path / "world")).read_bytes()
    straight = np.frombuffer(original[original.index(b"DATA binary\n") + 12 :], POINT, int(header["POINTS"]))
    for name in names:
        assert (moved[name] == straight[name]).all()


def test_flipped_bit_changes_pixels_without_an_error_and_an_empty_scan_is_followed_by_zeros(
    sound: Path, tmp_path: Path
) -> None:
    import simplejpeg

    path = damaged(sound, tmp_path / "a", "F15")
    before, after = (sound / path.relative_to(tmp_path / "a" / "world")).read_bytes(), path.read_bytes()
    assert sum(bin(a ^ b).count("1") for a, b in zip(before, after, strict=True)) == 1
    assert (simplejpeg.decode_jpeg(before) != simplejpeg.decode_jpeg(after)).any()
    scan = damaged(sound, tmp_path / "b", "F08").read_bytes()
    header, body = scan.split(b"DATA binary\n", 1)
    assert b"WIDTH 0\n" in header and b"POINTS 0\n" in header and len(body) > 3000 and not any(body)


def test_unknown_faults_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    assert check("F06") == ("F06", "scaled") and check("F06.constant") == ("F06", "constant")
    for wrong in ("F99", "F27", "F06.purple", "x"):
        with pytest.raises(UsageError):
            write_world(tmp_path / "w", scenes=1, keyframes=2, fault=wrong)
    assert not (tmp_path / "w").exists()


def test_faulty_world_is_finished_once_and_never_continued_as_a_sound_one(tmp_path: Path) -> None:
    options = {"scenes": 1, "keyframes": 2, "seed": 5, "image_hw_px": (45, 80)}
    root = tmp_path / "w"
    write_world(root, **options, fault="F01")  # type: ignore[arg-type]
    report = json.loads((root / ".synth" / "fault.json").read_text())
    assert (root / report["changed"][0]).stat().st_size == 0
    before = state(root)
    write_world(root, **options, fault="F01")  # type: ignore[arg-type]
    assert state(root) == before
    with pytest.raises(MismatchError):
        write_world(root, **options)  # type: ignore[arg-type]
