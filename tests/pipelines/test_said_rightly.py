"""Messages that several commands share are true for each of them."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from imkd_data.errors import InputDataError, SourceMissingError
from imkd_data.readers.nuscenes import open_nuscenes
from imkd_models.keymap import read_public
from pipelines.guard import interrupted, lost_rank


def test_what_continues_a_stopped_run_is_true_for_training_and_benchmark() -> None:
    lost: Any = lost_rank(RuntimeError("Connection closed by peer"))
    for error in (interrupted(signal.SIGTERM, 3, 6), lost):
        said = error.details["next"]
        assert "the same command continues" in said and "`imkd train` asks for --resume" in said
    assert interrupted(signal.SIGTERM, 3, 6).exit_code == 143


def test_a_data_root_that_is_not_there(tmp_path: Path) -> None:
    """The benchmark calls it --world, evaluation knows no variable of the environment."""
    with pytest.raises(SourceMissingError, match="data root cannot be opened") as caught:
        open_nuscenes(tmp_path / "nowhere", "v1.0-mini")
    assert "or set IMKD_NUSCENES" not in caught.value.details["next"]
    assert "--dataroot" in caught.value.details["next"] and "--world" in caught.value.details["next"]


class Own:
    pass


def test_no_message_recommends_to_execute_a_file(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"state_dict": Own()}, protocol=2))
    torch.save({"state_dict": {}, "own": Own()}, tmp_path / "own.pth")
    found = {}
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(InputDataError, match="plain weights") as caught:
            read_public(file)
        text = str(caught.value)
        for word in ("weights_only", "trust", "safe_globals", "arbitrary", "\x1b", "file an issue"):
            assert word not in text, (file.name, text)
        found[file.name] = caught.value.details["found"]
        assert found[file.name] and "\n" not in found[file.name]
    assert "GLOBAL" in found["own.pth"] and "Own" in found["own.pth"] and "Own" in found["pickle.pth"]
    assert "begins with b'<!DOCTYPE" in found["report.html"] and "zip archive" in found["cut.pth"]
