"""Both commands where the world or the words are wrong: one clear line and the documented exit code, never "bug"."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import click
import pytest
from toy_build import copy_cache, stored

from cli.main import run_group
from imkd_data.errors import InterruptedBuildError, RecipeError


class Ran:
    """Exit status and output of a command in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self, code: int, words: str) -> None:
        """That code, the words in the message, and one message only."""
        assert self.code == code and re.search(words, self.err), (self.code, self.err)
        assert "bug" not in self.err and "Traceback" not in self.err and self.err.lower().count("error:") == 1, self.err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(name: str, *arguments: object) -> Ran:
        from cli import data, model

        capfd.readouterr()
        group = {"imkd-data": data.group, "imkd": model.group}[name]
        code = run_group(group, name, [str(a) for a in arguments])
        return Ran(code, *capfd.readouterr())

    return call


def numba_error() -> SystemError:
    """What a Ctrl-C inside a compiled kernel arrives as."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as inner:
            raise SystemError("CPUDispatcher(<function f>) returned a result with an exception set") from inner
    except SystemError as error:
        return error


# ------------------------------------------------------------------------------------------------------------ interrupts


def raising(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


def test_ctrl_c_inside_a_kernel_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_group(raising(numba_error()), "imkd", []) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert run_group(raising(SystemError("a real one")), "imkd", []) == 1  # nobody pressed a key
    Path(re.findall(r"file +(\S+)", capsys.readouterr().err)[0]).unlink()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_synth_stopped_inside_a_kernel(number: signal.Signals, code: int, tmp_path: Path) -> None:
    from pipelines.synth import _stoppable

    def kernel() -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise SystemError("CPUDispatcher(...) returned a result with an exception set") from error

    with pytest.raises(InterruptedBuildError, match=f"stopped by {number.name}") as caught, _stoppable(tmp_path, 3):
        kernel()
    assert caught.value.exit_code == code
    with pytest.raises(SystemError, match="a real one"), _stoppable(tmp_path, 3):
        raise SystemError("a real one")


# ---------------------------------------------------------------------------------------------------------- output paths


def test_an_output_that_cannot_be_written_is_exit_5(run: Any, synthetic_cache: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder.png", tmp_path / "file"
    folder.mkdir()
    file.write_text("mine")
    run("imkd-data", "inspect", synthetic_cache, "--open", folder).refused(5, r"Is a directory(.|\n)*folder\.png")
    run("imkd-data", "inspect", synthetic_cache, "--open", file / "x.png").refused(
        5, r"(Not a directory|File exists)(.|\n)*file"
    )
    done = run("imkd-data", "inspect", synthetic_cache, "--open", folder, "--json")
    last = json.loads(done.out.splitlines()[-1])
    assert last["code"] == 5 and last["file"] == str(folder) and last["level"] == "error"
    run("imkd-data", "synth", "--out", file / "world", "--scenes", 1).refused(5, "Not a directory")


def test_a_full_disk_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    assert run_group(raising(OSError(errno.ENOSPC, "No space left on device")), "imkd", []) == 5
    assert "no space left to write" in capsys.readouterr().err


def test_an_error_that_no_operating_system_gave_stays_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries raise OSError for files they do not understand; without a number it says nothing about the disk."""
    assert run_group(raising(OSError("cannot identify image file")), "imkd", []) == 1
    Path(re.findall(r"file +(\S+)", capsys.readouterr().err)[0]).unlink()


@pytest.mark.parametrize("words", [("imkd-data", "synth", "--scenes", "1", "--out"), ("imkd", "demo", "--quick", "--out")])
def test_an_out_that_is_a_file(run: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("mine")
    run(*words, tmp_path / "file").refused(2, r"--out is a folder(.|\n)*file")
    assert (tmp_path / "file").read_text() == "mine"


def training_log(folder: Path, text: str = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n') -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text(text)
    return folder


def test_report_leaves_nothing_beside_what_it_cannot_write(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = training_log(tmp_path / "run")
    (tmp_path / "out").mkdir()
    run("imkd", "report", folder, "--out", tmp_path / "out").refused(2, r"--out is a file(.|\n)*out")

    def full(self: Path, *_: Any, **__: Any) -> None:
        open(self, "w").close()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    run("imkd", "report", folder, "--out", tmp_path / "r.html").refused(5, "no space left")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_log_file_that_cannot_be_opened(run: Any, synthetic_cache: Path, tmp_path: Path) -> None:
    done = run("imkd-data", "inspect", synthetic_cache, "--log-file", tmp_path / "no" / "x.jsonl")
    done.refused(5, r"No such file or directory(.|\n)*x\.jsonl")
    assert done.out == ""  # before any work
    assert run("imkd-data", "inspect", synthetic_cache, "--log-file", tmp_path / "x.jsonl").code == 0
    assert (tmp_path / "x.jsonl").read_text().count("\n") > 5


# ------------------------------------------------------------------------------------------------------------- arguments

NUMBERS = [
    ("plan --split mini --probe -1", "--probe"),
    ("plan --split mini --workers 0", "--workers"),
    ("build --split mini --workers 0", "--workers"),
    ("build --split mini --max-bad -1", "--max-bad"),
    ("build --split mini --stall-minutes 0", "--stall-minutes"),
    ("build --split mini --stall-minutes nan", "--stall-minutes"),
    ("build --split mini --memory 0", "not a size"),
    ("verify c --source -1", "--source"),
    ("repair c --workers 0", "--workers"),
    ("bench c --seconds -1", "--seconds"),
    ("bench c --seconds nan", "--seconds"),
    ("bench c --seconds inf", "--seconds"),
    ("bench c --workers 0", "--workers"),
    ("synth --out o --workers 0", "--workers"),
    ("synth --out o --scenes 0", "scenes"),
    ("synth --out o --seed -1", "seed"),
    ("synth --out o --val-share nan", "share"),
]
MODEL_NUMBERS = [
    ("bench loader --cache c --seconds -1", "--seconds"),
    ("bench loader --cache c --seconds nan", "--seconds"),
    ("demo --seed -1", "--seed"),
    ("report r --seed -1", "--seed"),
]


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [*(("imkd-data", *case) for case in NUMBERS), *(("imkd", *case) for case in MODEL_NUMBERS)],
)
def test_numbers_that_cannot_be_meant(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run(command, *words.split()).refused(2, named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("--shards", "a", "--shards"),
        ("--shards", "99", r"no such shard(.|\n)*0\.\.1(.|\n)*99"),
        ("--shards", "0,-1", "no such shard"),
        ("--shards", "", "--shards"),
        ("--shards", ",", "--shards"),
        ("--fields", "", "--fields"),
        ("--fields", "boxes,typo", "typo"),
    ],
)
def test_repair_of_what_is_not_there(
    run: Any, synthetic_cache: Path, tmp_path: Path, option: str, text: str, words: str
) -> None:
    path = copy_cache(synthetic_cache, tmp_path / "c")
    before = stored(path)
    run("imkd-data", "repair", path, option, text).refused(2, words)
    assert stored(path) == before


def test_repair_names_what_is_there(run: Any, synthetic_cache: Path) -> None:
    done = run("imkd-data", "repair", synthetic_cache, "--shards", "1, 0", "--fields", "boxes", "--dry-run")
    assert done.code == 0 and "no data file needs a rebuild" in done.err


@pytest.mark.parametrize(
    "value",
    [
        {"options": []},
        {"grid": 5},
        {"splits": 5},
        {"splits": "mini_train"},
        {"splits": ["mini_train", 3]},
        {"sensors": "CAM_FRONT"},
        {"fields": {"boxes": 1}},
        {"scenes": 7},
        {"version": 1},
    ],
)
def test_recipe_entries_of_another_kind(run: Any, synthetic_world: Path, tmp_path: Path, value: Any) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(value))
    done = run("imkd-data", "plan", "--recipe", file, "--dataroot", synthetic_world, "--out", tmp_path / "c", "--probe", 0)
    done.refused(2, rf"recipe entry {next(iter(value))}(.|\n)*recipe\.json")


def test_recipe_entries_that_fit(tmp_path: Path) -> None:
    from cli.options import _recipe_file

    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"splits": ["mini"], "scenes": "available", "grid": {"cell_m": 0.4}, "options": {"a": 1}}))
    assert _recipe_file(file) == {"splits": ["mini"], "scenes": "available", "grid.cell_m": 0.4, "options.a": 1}
    file.write_text("[]")
    with pytest.raises(RecipeError, match="not an object"):
        _recipe_file(file)


@pytest.mark.parametrize(
    "text", ["[]", "5", '{"name": "tiny_student", "loader": 5}', '{"stages": [5]}', '{"optim": [1]}', '{"stages": {}}']
)
def test_run_configurations_of_another_kind(run: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    done = run("imkd", "train", "tiny_student", "--cache", "c", "--out", tmp_path / "o", "--config", file)
    done.refused(2, r"cannot be read(.|\n)*run\.json")


# ---------------------------------------------------------------------------------------------------------------- doctor


def findings(done: Ran) -> list[dict[str, Any]]:
    return [o for o in map(json.loads, done.out.splitlines()) if o.get("kind") == "finding"]


def test_doctor_says_everything_although_the_hashes_cannot_be_compared(
    run: Any, synthetic_world: Path, synthetic_cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, tmp_path / "none"):
        done = run("imkd-data", "doctor", "--dataroot", synthetic_world, "--hash", path, "--json")
        done.refused(4, "not a cache")
        assert {"python", "v1.0-mini", "hash"} <= {f["name"] for f in findings(done)}
    done = run("imkd-data", "doctor", "--dataroot", tmp_path / "none", "--hash", synthetic_cache, "--json")
    done.refused(8, "no data root")
    assert [f["code"] for f in findings(done) if f["severity"] == "error"] == [8, 8]
    path = copy_cache(synthetic_cache, tmp_path / "c")
    (path / "recipe.json").write_text("{")
    done = run("imkd-data", "doctor", "--dataroot", synthetic_world, "--hash", path, "--json")
    assert done.code == findings(done)[-1]["code"] == 4 and findings(done)[-1]["name"] == "hash"
    assert run("imkd-data", "doctor", "--dataroot", synthetic_world, "--hash", synthetic_cache).code == 0


@pytest.mark.parametrize(("codes", "expected"), [((2,), 2), ((5, 3), 5), ((4, 8), 4), ((9,), 9), ((0,), 3), ((0, 8), 3)])
def test_doctor_exits_with_the_code_of_its_first_error(
    run: Any, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], expected: int
) -> None:
    import pipelines.doctor as module

    made = [module.Finding(name=f"n{c}", severity="error" if c else "warning", text=f"finding {c}", code=c) for c in codes]
    fine = module.Finding(name="a", severity="ok", text="fine")
    monkeypatch.setattr(module, "examine", lambda *_: [fine, *made])
    done = run("imkd-data", "doctor", "--strict")
    done.refused(expected, f"error: finding {codes[0]}")
    assert all(f"finding {c}" in done.err for c in codes)


def test_doctor_reports_what_the_system_refuses(monkeypatch: pytest.MonkeyPatch, synthetic_world: Path) -> None:
    import pipelines.doctor as module

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "sample.json")

    monkeypatch.setattr(module, "_version", refuse)
    last = module.examine(synthetic_world)[-1]
    assert (last.name, last.severity, last.code) == ("v1.0-mini", "error", 5) and "sample.json" in last.text


# --------------------------------------------------------------------------------------------------------------- inspect


def test_a_picture_of_no_sample(run: Any, synthetic_cache: Path, tmp_path: Path) -> None:
    none = ("inspect", synthetic_cache, "--select", "num_boxes > 99999")
    for more in (("--open", tmp_path / "none.png"), ("--stats",), ("--stats", "--open", tmp_path / "none.png")):
        run("imkd-data", *none, *more).refused(2, "no sample matches(.|\n)*num_boxes > 99999")
    assert not list(tmp_path.iterdir())
    done = run("imkd-data", *none)
    assert done.code == 0 and "0 selected" in done.out  # how many there are is a question too


def test_a_folder_whose_name_holds_a_sign(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cli.show import named_path

    monkeypatch.chdir(tmp_path)
    training_log(tmp_path / "a=b")
    assert run("imkd", "report", "a=b", "--out", "r.html").code == 0
    assert run("imkd", "report", "mine=a=b", "--out", "s.html").code == 0 and "mine" in Path("s.html").read_text()
    assert named_path("a=b") == ("", Path("a=b")) and named_path("x=a=b") == ("x", Path("a=b"))
    assert named_path("=b") == ("", Path("=b")) and named_path("x=") == ("", Path("x="))


@pytest.fixture(scope="module")
def parts(synthetic_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of fields without those that tell how to read them: no depth_count, no camera_calibration."""
    from pipelines.build import build

    out = tmp_path_factory.mktemp("parts") / "c"
    fields = ["images", "depth_points", "boxes", "sample_pose"]
    build(dataroot=synthetic_world, version="v1.0-mini", splits=["mini_val"], out=out, fields=fields, executor="sync")
    return out


def test_inspect_leaves_out_what_a_cache_does_not_hold(run: Any, parts: Path, tmp_path: Path) -> None:
    done = run("imkd-data", "inspect", parts, "--stats", "--json")
    assert done.code == 0, done.err
    stats = {o["name"]: o["statistics"] for o in map(json.loads, done.out.splitlines()) if o["kind"] == "field"}
    assert "depth_count" in stats["depth_points"]["error"] and stats["boxes"]["label"].startswith("min")
    for name in ("a.png", "a.html"):
        done = run("imkd-data", "inspect", parts, "--open", tmp_path / name)
        assert done.code == 0 and (tmp_path / name).stat().st_size > 1000, done.err
