"""Raw files that change without changing their size, after the cache was built (F15), and a program that was upgraded (F48)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simplejpeg

from imkd_data.cache.plan import Plan
from imkd_data.errors import MismatchError, SourceMissingError
from pipelines.build import build
from pipelines.build.planning import plan_only
from pipelines.build.source import verify_source
from pipelines.doctor import examine
from tests.imkd_data.readers.tiny_tree import CHANNELS, SCENES, Tree
from tests.toy import TOY_FIELDS, TOY_PICTURES, open_toy, write_toy
from tests.toy_build import build_toy


def flipped(data: bytes, decodes: bool) -> bytes:
    """One bit of the picture's body changed, so that it still decodes (to other pixels), or so that it does not."""
    for at in range(len(data) - 20, len(data) // 2, -1):
        changed = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        try:
            other = (simplejpeg.decode_jpeg(changed) != simplejpeg.decode_jpeg(data)).any()
        except ValueError:
            other = not decodes
        else:
            other = other and decodes
        if other:
            return changed
    raise AssertionError("no such bit")


@pytest.mark.parametrize("decodes", [True, False])
def test_f15_flipped_bit_in_an_image_is_found_by_hash_and_by_source(tmp_path: Path, decodes: bool) -> None:
    tree, out = Tree(tmp_path / "w"), tmp_path / "c"
    request = {"dataroot": tree.root, "version": "v1.0-mini", "splits": ["mini_train"], "out": out, "sensors": CHANNELS}
    request |= {"fields": ("images", "sample_pose"), "executor": "sync"}
    build(**request)  # type: ignore[arg-type]
    name = tree.open().samples(SCENES[0])[1].cameras[1].path
    (tree.root / name).write_bytes(flipped((tree.root / name).read_bytes(), decodes))
    assert build(**request).rebuilt == ()  # type: ignore[arg-type]  # by names and sizes nothing has changed
    assert [f.code for f in examine(tree.root, "v1.0-mini", out) if f.name == "hash"] == [3]
    problems = verify_source(out, tree.root, 1)
    assert [(p.rule, p.field) for p in problems] == [("source.differs" if decodes else "source.changed", "images")]
    assert "source changed" in problems[0].what and problems[0].file == name


def test_f48_another_version_of_a_field_is_refused_and_named(tmp_path: Path) -> None:
    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    build_toy(root, out)
    newer = [replace(TOY_PICTURES, version=TOY_PICTURES.version + 1), *(f for f in TOY_FIELDS if f.name != TOY_PICTURES.name)]
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(MismatchError) as caught:
        build_toy(root, out, fields=newer)
    text = str(caught.value)
    assert caught.value.code == 9 and "toy_pictures: field version 1 -> 2" in text and "--update" in text
    assert (out / "manifest.json").read_bytes() == before
    assert {f for f, _ in build_toy(root, out, fields=newer, update=True).rebuilt} == {"toy_pictures"}


def hashed(root: Path, out: Path) -> tuple[Plan, SourceMissingError | None]:
    request = {"dataroot": root, "out": out, "reader": open_toy, "fields": TOY_FIELDS}
    _, plan, missing = plan_only(request, update=True, hash_inputs=True)
    return plan, missing


def sources(root: Path, out: Path) -> Any:
    return verify_source(out, root, 9, reader=open_toy, fields=TOY_FIELDS)


def test_a_changed_file_is_told_beside_a_missing_one(tmp_path: Path) -> None:
    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    build_toy(root, out)
    first, second = (open_toy(root).samples(f"toy-00{i}") for i in (0, 1))
    (root / first[1].lidar[0].path).unlink()
    for path in (first[2].cameras[0].path, second[2].lidar[0].path):
        data = (root / path).read_bytes()
        (root / path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    plan, missing = hashed(root, out)
    assert missing is not None and missing.details["file"] == first[1].lidar[0].path
    assert {(q.field, q.shard): q.reason for q in plan.queue} == {
        ("toy_count", 0): "source files or tables changed",
        ("toy_view", 0): "upstream changed: toy_count",
        ("toy_pictures", 0): "content of a source file changed",
        ("toy_count", 1): "content of a source file changed",
    }


def test_a_file_that_can_no_longer_be_read_is_a_changed_one(tmp_path: Path) -> None:
    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    build_toy(root, out)
    path = root / open_toy(root).samples("toy-001")[2].lidar[0].path
    path.write_bytes(bytes(path.stat().st_size))
    plan, _ = hashed(root, out)
    assert [(q.field, q.shard, q.reason) for q in plan.queue] == [("toy_count", 1, "content of a source file changed")]


@pytest.mark.parametrize("how", ["broken", "missing"])
def test_a_quarantined_cache_is_compared_with_its_raw_files(tmp_path: Path, how: str) -> None:
    """While the file is bad nothing has changed; once it is good again the holes are named."""
    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    bad = open_toy(root).samples("toy-000")[2]
    path = root / bad.lidar[0].path
    good = path.read_bytes()
    if how == "broken":
        path.write_bytes(bytes(len(good)))
    else:
        path.unlink()
    build_toy(root, out, on_error="quarantine", max_bad=1)
    plan, _ = hashed(root, out)
    assert plan.queue == ()
    assert [(p.severity, p.rule, p.token) for p in sources(root, out)] == [("warning", "quarantined", bad.token)]
    path.write_bytes(good)
    problems = [p for p in sources(root, out) if p.token]
    assert [(p.rule, p.field, p.shard, p.token, p.severity) for p in problems] == [
        ("source.changed", name, 0, bad.token, "error") for name in ("toy_count", "toy_view")
    ]
    assert all("quarantined" in p.what for p in problems)


def test_damaged_rows_are_told_in_the_list(tmp_path: Path) -> None:
    root, out = write_toy(tmp_path / "w", scenes=2), tmp_path / "c"
    build_toy(root, out)
    file = out / "arrays.zarr/toy_pose/c/0/0"
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    token = open_toy(root).samples("toy-000")[0].token
    assert [(p.rule, p.field, p.shard, p.token) for p in sources(root, out)] == [("row.crc32c", "toy_pose", 0, token)]
