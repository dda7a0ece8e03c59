"""Raw files that change without changing their size, after the cache was built (F15), and a program that was upgraded (F48)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simplejpeg

from imkd_data.errors import MismatchError
from pipelines.build import build
from pipelines.build.source import verify_source
from pipelines.doctor import examine
from tests.imkd_data.readers.tiny_tree import CHANNELS, SCENES, Tree
from tests.toy import TOY_FIELDS, TOY_PICTURES, write_toy
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
