"""``imkd-data`` as users meet it: exit codes by subprocess, the form of messages, --json, defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import open_toy, write_toy
from toy_build import REPO, build_toy, copy_cache, stored

CODE = "import sys; from cli.main import data; sys.argv[0] = 'imkd-data'; data()"


def imkd_data(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("IMKD_", "NUSCENES"))}
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        cwd=cwd or REPO,
        env={**clean, "PYTHONPATH": str(REPO), **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small synthetic nuScenes: two scenes of three keyframes."""
    root = tmp_path_factory.mktemp("w") / "world"
    done = imkd_data("synth", "--out", root, "--scenes", 2, "--keyframes", 3, "--image-size", "90x160", "--quiet")
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def cache(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the user's own sentence, every default filled in from the environment and the split."""
    home = tmp_path_factory.mktemp("home")
    done = imkd_data("build", "--split", "mini", "--executor", "sync", cwd=home, env={"IMKD_NUSCENES": str(world)})
    assert done.returncode == 0, done.stderr
    text = done.stderr
    assert str(world) in text and "v1.0-mini" in text and "caches/nuscenes-mini" in text and "mini_train, mini_val" in text
    assert text.index("dataroot") < text.index("samples in") < text.index("complete:")
    return home / "caches" / "nuscenes-mini"


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_help_imports_nothing_heavy_and_has_examples() -> None:
    """What would make it slow is an import."""
    code = f"{CODE.removesuffix('data()')}\ntry: data()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'pyarrow', 'numba', 'dask', 'zarr') if m in sys.modules])"
    alone = subprocess.run([sys.executable, "-c", code, "--help"], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert alone.stdout.rstrip().endswith("\n[]"), alone.stdout[-200:] + alone.stderr
    done = imkd_data("--help")
    assert done.returncode == 0, done.stderr
    commands = ["plan", "build", "verify", "repair", "doctor", "inspect", "export", "bench", "synth"]
    assert all(f"\n  {c} " in done.stdout for c in commands)
    for command in commands:
        done = imkd_data(command, "--help")
        assert done.returncode == 0 and "imkd-data " + command in done.stdout and "Example" in done.stdout, command


def test_version() -> None:
    assert imkd_data("--version").stdout.startswith("imkd-data, version ")


def test_plan_writes_nothing(world: Path, tmp_path: Path) -> None:
    done = imkd_data("plan", "--split", "mini", "--dataroot", world, "--out", tmp_path / "c", "--json", "--probe", 2)
    assert done.returncode == 0 and not (tmp_path / "c").exists(), done.stderr
    plan = objects(done.stdout)[-1]
    assert plan["kind"] == "plan" and plan["v"] == 1 and plan["samples"] == 6 and plan["shards"] == 2
    assert len(plan["queue"]) == 2 * 15 and {q["reason"] for q in plan["queue"]} == {"new"}
    assert plan["probed"] == 2 and plan["seconds"][0] <= plan["seconds"][1] <= plan["seconds"][2]
    assert plan["bytes"] > 10_000 and plan["files"] == 60 and plan["ms_per_sample"]["read"] > 0
    assert "GB free" in done.stderr and "lidar_bev_sum: new" in done.stderr


def test_build_is_complete_and_repeats_in_no_time(world: Path, cache: Path) -> None:
    before = stored(cache)
    done = imkd_data("build", "--split", "mini", "--dataroot", world, "--out", cache, "--executor", "sync", "--json")
    assert done.returncode == 0 and stored(cache) == before
    last = objects(done.stdout)[-1]
    assert last["kind"] == "built" and last["rebuilt"] == 0 and last["samples"] == 6 and last["quarantined"] == []


def test_rows_keep_their_own_split(cache: Path) -> None:
    from imkd_data import open_cache

    got = open_cache(cache)
    assert len(got.rows("mini_train")) == 3 and len(got.rows("mini_val")) == 3


def test_exit_2_usage(world: Path, tmp_path: Path) -> None:
    base = ("build", "--dataroot", world, "--out", tmp_path / "c")
    for more, words in (
        (("--split", "moon"), "train, val, test, mini_train"),
        ((), "a split is needed"),
        (("--split", "mini", "--set", "typo=1"), "unknown keys"),
        (("--split", "mini", "--set", "grid"), "KEY=VALUE"),
        (("--split", "mini", "--profile", "huge"), "compact, student, standard, full"),
        (("--split", "mini", "--fields", "nothing"), "unknown fields"),
        (("--split", "mini", "--executor", "magic"), "unknown executor"),
        (("--split", "mini", "--memory", "lots"), "2GB"),
        (("--split", "mini", "--sensors", "CAM_FRONT", "--fields", "lidar_bev_sum"), "asked for"),
        (("--split", "mini,train"), "different versions"),
        (("--nonsense",), "No such option"),
    ):
        done = imkd_data(*base, *more)
        assert (done.returncode == 2 and words in done.stderr and "next" in done.stderr) or words in done.stderr, (
            more,
            done.stderr,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == "", more
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_exit_8_source(world: Path, tmp_path: Path) -> None:
    done = imkd_data("build", "--split", "trainval", "--dataroot", world, "--out", tmp_path / "c")
    assert done.returncode == 8 and "v1.0-trainval not found, found v1.0-mini" in done.stderr
    done = imkd_data("build", "--split", "mini", "--out", tmp_path / "c", cwd=tmp_path, env={"NUSCENES": str(tmp_path)})
    assert done.returncode == 8 and not (tmp_path / "c").exists()


def test_exit_4_and_repair(world: Path, cache: Path, tmp_path: Path) -> None:
    path = copy_cache(cache, tmp_path / "c")
    before = stored(path)
    victim = path / "arrays.zarr/depth_points/c/0/0/0/0"
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(data)
    assert imkd_data("verify", path).returncode == 0  # sizes are right
    done = imkd_data("verify", path, "--full", "--json")
    assert done.returncode == 4
    found = objects(done.stdout)
    assert {o["rule"] for o in found if o["kind" if "kind" in o else "level"] == "problem"} == {"data.crc32c", "row.crc32c"}
    assert found[-1]["code"] == 4 and found[-1]["field"] == "depth_points" and "repair" in found[-1]["next"]
    assert done.stderr.index("--dry-run") < done.stderr.index("another folder")  # from harmless to destructive
    done = imkd_data("repair", path, "--dataroot", world, "--dry-run", "--json")
    assert done.returncode == 0 and objects(done.stdout)[-1]["pairs"] == [["depth_points", 0]] and stored(path) != before
    assert imkd_data("repair", path, cwd=tmp_path).returncode == 8
    assert imkd_data("repair", path, "--dataroot", world).returncode == 0 and stored(path) == before
    assert imkd_data("verify", path, "--full").returncode == 0


def test_exit_4_nothing_there(tmp_path: Path) -> None:
    for command in ("verify", "inspect", "repair", "bench"):
        done = imkd_data(command, tmp_path)
        assert done.returncode == 4 and "Traceback" not in done.stderr, (command, done.stderr)


def test_exit_9_other_recipe(world: Path, cache: Path, tmp_path: Path) -> None:
    path = copy_cache(cache, tmp_path / "c")
    base = ("build", "--split", "mini", "--dataroot", world, "--out", path, "--executor", "sync", "--set", "image_hw_px=45x80")
    done = imkd_data(*base, "--json")
    assert done.returncode == 9 and "[495,880] -> [45,80]" in done.stderr and objects(done.stdout)[-1]["code"] == 9
    done = imkd_data("plan", *base[1:7], "--set", "image_hw_px=45x80", "--update", "--probe", 0, "--json")
    assert {(q["field"], q["reason"]) for q in objects(done.stdout)[-1]["queue"]} == {
        ("images", "image_hw_px 495x880 -> 45x80")
    }
    done = imkd_data(*base, "--update", "--json")
    assert done.returncode == 0 and objects(done.stdout)[-1]["rebuilt"] == 2


def test_update_adds_a_field_with_no_other_flag(world: Path, tmp_path: Path) -> None:
    """The command that error messages name."""
    base = ("build", "--dataroot", world, "--out", tmp_path / "c", "--executor", "sync")
    assert imkd_data(*base, "--split", "mini_train", "--fields", "boxes,sample_pose").returncode == 0
    done = imkd_data(*base, "--update", "--fields", "camera_calibration", "--json")
    assert done.returncode == 0 and objects(done.stdout)[-1]["rebuilt"] == 1, done.stderr
    from imkd_data import open_cache

    assert sorted(open_cache(tmp_path / "c").fields) == ["boxes", "camera_calibration", "sample_pose"]


def test_exit_7_locked(world: Path, cache: Path, tmp_path: Path) -> None:
    path = copy_cache(cache, tmp_path / "c")
    (path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "today"}))
    base = ("build", "--split", "mini", "--dataroot", world, "--out", path, "--executor", "sync")
    done = imkd_data(*base)
    assert done.returncode == 7 and "host elsewhere, pid 1" in done.stderr and "--break-lock" in done.stderr
    assert imkd_data(*base, "--break-lock").returncode == 0


def test_exit_5_storage(world: Path, tmp_path: Path) -> None:
    done = imkd_data("build", "--split", "mini", "--dataroot", world, "--out", "/proc/nowhere/c", "--executor", "sync")
    assert done.returncode == 5 and "/proc/nowhere" in done.stderr and "Traceback" not in done.stderr


def test_exit_3_and_quarantine(world: Path, tmp_path: Path) -> None:
    """One bad file among links to the good ones."""
    root = tmp_path / "w"
    for p in world.rglob("*"):
        target = root / p.relative_to(world)
        if p.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(p, target)
    victim = sorted((root / "samples/LIDAR_TOP").iterdir())[1]
    data = victim.read_bytes()[:-17]
    victim.unlink()
    victim.write_bytes(data)
    base = ("build", "--split", "mini", "--dataroot", root, "--out", tmp_path / "c", "--executor", "sync")
    base = (*base, "--fields", "lidar_bev_count,boxes,sample_pose")
    done = imkd_data(*base, "--json", "--log-file", tmp_path / "log.jsonl")
    error = objects(done.stdout)[-1]
    assert (
        done.returncode == 3
        and error["code"] == 3
        and error["file"].endswith(victim.name)
        and error["shard"] == "mini_train 00000"
    )
    assert error["token"] and "20" in error["expected"] and "--on-error quarantine" in error["next"]
    for word in ("error: ", "  expected  ", "  found     ", "  file      ", "  kept      ", "  next      "):
        assert word in done.stderr, done.stderr
    assert objects((tmp_path / "log.jsonl").read_text())[-1]["code"] == 3
    done = imkd_data(*base, "--on-error", "quarantine")
    assert done.returncode == 3 and "quarantined" in done.stderr and "--max-bad" in done.stderr
    assert imkd_data(*base, "--on-error", "quarantine", "--max-bad", 3).returncode == 0


def test_exit_1_bug_leaves_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import click

    from cli.main import run_group

    @click.command()
    @click.option("--json", is_flag=True)
    def broken(json: bool) -> int:
        raise KeyError("secret")

    assert run_group(broken, "imkd-data", ["--json"]) == 1
    out = capsys.readouterr()
    log = Path(json.loads(out.out)["file"])
    assert "Traceback" in log.read_text() and "Traceback" not in out.err
    log.unlink()


def test_a_returned_value_is_no_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    import click

    from cli.main import run_group

    @click.command()
    def returns() -> int:
        return 7

    assert run_group(returns, "imkd-data", []) == 0


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_export(cache: Path, tmp_path: Path, kind: str) -> None:
    done = imkd_data("export", cache, "--to", kind, "--out", tmp_path / "e", "--split", "mini_val", "--json")
    assert done.returncode == 0 and objects(done.stdout)[-1]["samples"] == 3 and (tmp_path / "e" / "NOTICE").exists()
    assert imkd_data("export", cache, "--to", kind, "--out", tmp_path / "e").returncode == 2  # not empty: refused
    from imkd_data import open_cache

    got = open_cache(cache)
    tokens = [got.token(int(r)) for r in got.rows("mini_val")]
    if kind == "parquet":
        import pyarrow.parquet as pq

        assert pq.read_table(tmp_path / "e/samples.parquet")["token"].to_pylist() == tokens
        boxes = pq.read_table(tmp_path / "e/boxes.parquet")
        assert boxes.num_rows == sum(len(got.decode("boxes", int(r))) for r in got.rows("mini_val"))
        return
    import io

    import numpy as np
    import webdataset

    found = {s["__key__"]: s for s in webdataset.WebDataset(str(tmp_path / "e/mini_val-00001.tar"), shardshuffle=False)}
    assert list(found) == tokens
    for token, parts in found.items():
        stored_plane = np.load(io.BytesIO(parts["lidar_bev_sum.npy"]), allow_pickle=False)
        np.testing.assert_array_equal(stored_plane, got.read("lidar_bev_sum", got.row(token)))
        assert parts["cam_front.jpg"] == got.read("images", got.row(token))["CAM_FRONT"]


def test_inspect(cache: Path, tmp_path: Path) -> None:
    from imkd_data import open_cache

    token = open_cache(cache).token(0)
    done = imkd_data("inspect", cache, "--stats", "--sample", token, "--open", tmp_path / "a.png", "--json")
    assert done.returncode == 0, done.stderr
    fields = {o["name"]: o for o in objects(done.stdout) if o["kind"] == "field"}
    assert fields["lidar_intensity"]["statistics"] and fields["boxes"]["attributes"]["frame"] == "ego"
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    done = imkd_data("inspect", cache, "--field", "depth_points")
    assert "uint16 [6, 3, 6144]" in done.stdout
    assert imkd_data("inspect", cache, "--sample", "nothing").returncode == 2
    assert "equal: same identity" in imkd_data("inspect", cache, "--compare", cache).stdout
    page = imkd_data("inspect", cache, "--open", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert page.returncode == 0 and "default-src 'none'" in text and "unsafe" not in text and "https:" not in text
    assert "radar points" in text.split('alt="')[1]
    done = imkd_data("inspect", cache, "--stats")
    assert "LiDAR intensity of occupied cells" in done.stdout and "points per sample, RADAR_FRONT" in done.stdout
    assert imkd_data("inspect", cache, "--open", tmp_path / "a.gif").returncode == 2


def test_doctor(world: Path, tmp_path: Path) -> None:
    done = imkd_data("doctor", "--dataroot", world, "--json")
    assert done.returncode == 0, done.stderr
    names = [o["name"] for o in objects(done.stdout)]
    assert {"python", "packages", "gpu", "disk", "shm", "dataroot", "v1.0-mini"} <= set(names)
    assert imkd_data("doctor", "--dataroot", tmp_path).returncode == 8


def test_verify_lists_its_rules() -> None:
    done = imkd_data("verify", "--rules", "--json")
    rules = objects(done.stdout)
    assert done.returncode == 0 and len(rules) >= 50 and all(r["sentence"].endswith(".") for r in rules)


def test_bench_runs(cache: Path) -> None:
    done = imkd_data("bench", cache, "--seconds", "0.05", "--against", "zarr,webdataset", "--json")
    names = [o["name"] for o in objects(done.stdout)]
    assert done.returncode == 0 and any(n.startswith("zarr read") for n in names) and "imkd read boxes" in names
    assert imkd_data("bench", cache, "--against", "paper").returncode == 2


def test_own_reader_from_python(tmp_path: Path) -> None:
    """A reader that the command line does not know: built and checked from Python, verified by the command."""
    root = write_toy(tmp_path / "toy", scenes=2)
    build_toy(root, tmp_path / "c", reader=open_toy)
    assert imkd_data("verify", tmp_path / "c", "--full").returncode == 0
    assert imkd_data("inspect", tmp_path / "c", "--stats").returncode == 0


def test_progress_is_plain_lines_without_a_terminal(world: Path, tmp_path: Path) -> None:
    done = imkd_data(
        "build", "--split", "mini", "--dataroot", world, "--out", tmp_path / "c", "--fields", "boxes", "--executor", "sync"
    )
    assert "\x1b" not in done.stderr and "\r" not in done.stderr and "build: 6/6 samples" in done.stderr
    assert json.loads((tmp_path / "c/logs/progress.json").read_text())["samples"] == 6
    quiet = imkd_data("verify", tmp_path / "c", "--quiet")
    assert quiet.returncode == 0 and quiet.stderr == "" and quiet.stdout == ""


def test_recipe_file(world: Path, tmp_path: Path, cache: Path) -> None:
    """The recipe of a cache builds the same cache."""
    done = imkd_data(
        "build", "--dataroot", world, "--recipe", cache / "recipe.json", "--out", tmp_path / "c", "--executor", "sync"
    )
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "c") == stored(cache)
    (tmp_path / "bad.json").write_text('{"colour": 1}')
    assert imkd_data("build", "--recipe", tmp_path / "bad.json", "--split", "mini").returncode == 2
