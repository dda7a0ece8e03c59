"""Pictures and the report page: contents, escaping, policy, and behaviour in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imkd_data import open_cache
from imkd_data.errors import InputDataError, SourceMissingError
from imkd_data.geometry import EGO, Camera, Pose
from imkd_data.sample import Boxes
from pipelines import plots
from pipelines.commandline import record_command
from pipelines.evaluate import evaluate_checkpoint
from pipelines.report import make_report
from pipelines.report_data import boxes_of_samples, chosen_samples, paired_intervals, read_run
from pipelines.report_html import Page, chart, number, table
from pipelines.sample_view import box_corners, box_lines, match_boxes, read_view
from pipelines.view import box_errors, view_sample

CHROMIUM = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)


def boxes(centre, size=((4.0, 2.0, 1.5),), yaw=(0.0,), label=(0,), score=(1.0,)) -> Boxes:
    n = len(centre)
    one = np.ones(n, dtype=np.int64)
    return Boxes(
        frame=EGO,
        centre_m=np.array(centre, float),
        size_lwh_m=np.array(list(size) * n if len(size) == 1 else size, float),
        yaw_rad=np.array(list(yaw) * n if len(yaw) == 1 else yaw, float),
        velocity_mps=np.zeros((n, 2)),
        label=np.array(list(label) * n if len(label) == 1 else label),
        score=np.array(list(score) * n if len(score) == 1 else score, float),
        num_lidar=one,
        num_radar=one,
        attribute=-one,
        visibility=one,
    )


def forward_camera() -> Camera:
    """Looks along ego x from the origin; 200 x 100 px."""
    rotation = np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]])
    return Camera(
        name="C",
        image_from_camera=np.array([[100, 0, 100], [0, 100, 40], [0, 0, 1.0]]),
        ego_from_camera=Pose(dst=EGO, src="C@0", rotation=rotation, translation_m=np.zeros(3)),
        width_px=200,
        height_px=100,
        timestamp_us=0,
    )


def test_box_corners_keep_size_and_heading() -> None:
    b = boxes([[10, 3, 1]], yaw=[np.pi / 2])
    c = box_corners(b)[0]
    assert np.allclose(c.mean(0), [10, 3, 1])
    assert np.allclose(np.ptp(c, axis=0), [2, 4, 1.5])  # turned by 90 degrees: length lies along y
    assert np.allclose(c[:2, 1], 5)  # the first two corners are the front


def test_box_lines_project_cut_and_leave_out() -> None:
    camera = forward_camera()
    seen = box_lines(boxes([[10, 0, 0], [-10, 0, 0], [10, 90, 0]]), camera)
    assert [m for m, _ in seen] == [0]
    lines = seen[0][1]
    assert lines.shape == (12, 2, 2)
    assert np.isclose(lines[..., 0].max(), 100 + 100 * 1 / 8) and np.isclose(lines[..., 1].min(), 40 - 100 * 0.75 / 8)
    (around,) = box_lines(boxes([[1, 0, 0]]), camera)  # reaches behind the camera: cut, finite
    assert np.isfinite(around[1]).all() and len(around[1]) < 12
    order = [m for m, _ in box_lines(boxes([[10, 0, 0], [30, 0, 0]]), camera)]
    assert order == [1, 0]  # the nearest is drawn last


def test_match_boxes_takes_the_best_score_once() -> None:
    truth = boxes([[10, 0, 0], [12, 0, 0]])
    found = boxes([[10.5, 0, 0], [10.4, 0, 0], [40, 0, 0]], score=[0.5, 0.9, 0.8])
    assert match_boxes(truth, found).tolist() == [1, 0]
    assert match_boxes(truth, boxes([[10, 0, 0]], label=[3])).tolist() == [-1, -1]
    rows = box_errors(truth, found)
    assert rows[0][0] == "car" and rows[0][3] == 0.9 and rows[0][4] == pytest.approx(0.4)


def test_pictures_of_a_sample(line, tmp_path: Path) -> None:
    cache = open_cache(line.cache)
    view = read_view(cache, int(cache.rows()[1]))
    assert len(view.cameras) == 6 and view.cameras[0].image.shape == (90, 160, 3)
    depth = view.cameras[0].depth
    assert depth is not None and depth[:, 0].max() < 160 and depth[:, 1].max() < 90 and len(depth) > 50
    picture = plots.save(plots.sample_picture(view, summary=["one", "two"]), tmp_path / "p.png")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    green = (pixels[..., 1] > 140) & (pixels[..., 0] < 110) & (pixels[..., 2] < 130)
    assert pixels.shape[1] == 1700 and green.sum() > 200  # truth boxes are there
    only = plots.encode(plots.bev_picture(view), "webp")
    assert only[:4] == b"RIFF" and len(only) < 200_000


def test_bev_picture_has_forward_up_and_left_left(line) -> None:
    """A box ahead and to the left must be drawn up and left of the middle."""
    from dataclasses import replace

    cache = open_cache(line.cache)
    view = replace(read_view(cache, int(cache.rows()[0])), radar=None, intensity=None, truth=boxes([[30, 20, 0]]))
    image = np.asarray(Image.open(__import__("io").BytesIO(plots.encode(plots.bev_picture(view)))).convert("RGB")).astype(int)
    green = (image[..., 1] > 150) & (image[..., 0] < 110) & (image[..., 2] < 130)
    green[-60:] = False  # the legend
    row, column = np.argwhere(green).mean(0)
    assert row < image.shape[0] * 0.35 and column < image.shape[1] * 0.4


class Outline(HTMLParser):
    """Tags that matter: ids, links, images without alternative text, remote addresses, unclosed structure."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.problems: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = dict(attrs)
        if a.get("id"):
            self.ids.append(str(a["id"]))
        if tag == "a":
            self.links.append(str(a["href"]))
        if tag == "img":
            self.images += 1
            if not a.get("alt"):
                self.problems.append("image without alt")
        for name in ("src", "href"):
            if re.match(r"(https?:)?//", str(a.get(name) or "")):
                self.problems.append(f"remote {name}")
        if any(k.startswith("on") for k in a) or a.get("style"):
            self.problems.append(f"inline handler or style on {tag}")


@pytest.fixture(scope="module")
def evaluated(line, tmp_path_factory):
    """Two untrained students scored, one with a hostile name in its log."""
    root = tmp_path_factory.mktemp("runs")
    for name, checkpoint in line.students.items():
        shutil.copytree(checkpoint.parent, root / name, symlinks=True)
        evaluate_checkpoint(root / name / "last.ckpt", line.cache, line.tree, root / name / "eval", engine="fast")
        for words, folder in ((["imkd", "train", "<t>"], root / name), (["imkd", "evaluate", name], root / name / "eval")):
            record_command(folder, words)
            record_command(folder, words)
        lines = [
            {"step": s, "loss": 9.0 / s, "l2r<script>": 1.0 / s, "lr": 1e-3, "data_wait": 0.1, "samples_per_s": 2.0, "time": s}
            for s in range(1, 6)
        ]
        (root / name / "log.jsonl").write_text("\n".join(json.dumps(v) for v in lines) + '\n{"step": 6, "lo')
    return root


@pytest.fixture(scope="module")
def report(line, evaluated):
    runs = [("plain <b>student</b>", evaluated / "student0"), ("imkd", evaluated / "student1")]
    return make_report(
        runs,
        evaluated / "report.html",
        cache=line.cache,
        title='A "title" & <more>',
        worst=1,
        random=1,
        commands=["imkd report <x>"],
    )


def test_report_is_complete_escaped_and_self_contained(report: Path) -> None:
    text = report.read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.problems == []
    sections = {"summary", "classes", "comparison", "curves", "range", "samples", "confusion", "training", "cost", "identity"}
    assert sections <= set(outline.ids)
    assert len(set(outline.ids)) == len(outline.ids) and {link[1:] for link in outline.links} <= set(outline.ids)
    assert outline.images == 6  # of two samples: both runs, and the cameras
    assert "<b>student" not in text and "plain &lt;b&gt;student&lt;/b&gt;" in text and "l2r<script>" not in text
    assert "A &quot;title&quot; &amp; &lt;more&gt;" in text and "nuscenes v1.0-mini (synthetic scenes)" in text
    assert len(text) < 3_000_000
    shown = text[text.index('id="identity"') :]
    trained = "imkd train &#x27;&lt;t&gt;&#x27;"
    places = [shown.index(c) for c in (trained, "imkd evaluate student0", "imkd report &lt;x&gt;")]
    assert places == sorted(places) and shown.count(trained) == 1  # given four times


def test_content_policy_names_the_hashes_of_what_is_inside(report: Path) -> None:
    text = report.read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inside
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]


def test_report_without_cache_or_scores(evaluated: Path, tmp_path: Path) -> None:
    text = make_report([evaluated / "student0"], tmp_path / "a.html").read_text()
    assert "Pictures need" in text and "<img" not in text and 'id="comparison"' not in text
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(SourceMissingError, match="nothing to report"):
        make_report([bare], tmp_path / "b.html")
    (bare / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert "No evaluation yet" in make_report([bare], tmp_path / "b.html").read_text()


@pytest.mark.parametrize("entry", [{"step": "x"}, {"step": None}, {"step": 2, "loss": "nan"}, {"step": 2, "lr": [1]}])
def test_a_log_line_of_another_form(tmp_path: Path, entry: dict) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + json.dumps(entry) + "\n")
    with pytest.raises(InputDataError, match="line 2") as caught:
        make_report([tmp_path], tmp_path / "r.html")
    assert caught.value.code == 3 and str(caught.value.details["file"]).endswith("log.jsonl")
    assert not (tmp_path / "r.html").exists()


def test_a_loss_term_that_is_no_number_is_a_gap(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0, "a": "off", "b": 1.0}, {"step": 2, "loss": 1.0, "a": 1.0, "b": 1.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "loss terms" in make_report([tmp_path], tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("nd_score",), None),
        (("mean_ap",), "high"),
        (("eval_time",), None),
        (("tp_errors",), []),
        (("tp_errors", "vel_err"), None),
        (("mean_dist_aps",), 0.3),
        (("mean_dist_aps", "car"), "x"),
        (("label_tp_errors", "car"), None),
        (("label_tp_errors", "car", "attr_err"), None),
        (("truth_boxes",), [1]),
        (("mAP_occurring",), "x"),
    ],
    ids=lambda v: ".".join(v) if isinstance(v, tuple) else None,
)
def test_scores_of_another_form(evaluated: Path, tmp_path: Path, path: tuple[str, ...], value: object) -> None:
    """None: the entry is not there."""
    scores = json.loads((evaluated / "student0" / "eval" / "metrics_summary.json").read_text())
    at = scores
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    if value is None:
        del at[path[-1]]
    (tmp_path / "metrics_summary.json").write_text(json.dumps(scores))
    with pytest.raises(InputDataError, match="not the scores") as caught:
        make_report([tmp_path], tmp_path / "r.html")
    assert ".".join(path) in caught.value.details["expected"] and not (tmp_path / "r.html").exists()


def test_curves_of_another_form(evaluated: Path, tmp_path: Path) -> None:
    shutil.copy(evaluated / "student0" / "eval" / "metrics_summary.json", tmp_path)
    (tmp_path / "metrics_details.json").write_text('{"car:2.0": {"recall": 5}}')
    with pytest.raises(InputDataError, match=r"no curve of car:2\.0"):
        make_report([tmp_path], tmp_path / "r.html")


def test_report_data_pairs_runs(line, evaluated: Path) -> None:
    runs = [read_run(evaluated / n, n) for n in ("student0", "student1")]
    assert runs[0].meta["step"] == 7 and len(runs[0].log) == 5 and runs[0].scores["num_samples"] == 3
    rows = paired_intervals(runs, None, draws=20)
    assert rows[0][4] == rows[0][5] == 0  # the first run against itself
    assert rows[1][2] <= rows[1][3]
    chosen = chosen_samples(runs, 2, 1)
    assert [k for _, k in chosen] == ["worst", "worst", "random"] and len({t for t, _ in chosen}) == 3
    cache = open_cache(line.cache)
    token = chosen[0][0]
    pose = read_view(cache, cache.row(token)).global_from_ego
    found = boxes_of_samples(runs[0], {token: pose})[token]
    assert found.frame == EGO and len(found) > 0 and np.abs(found.centre_m[:, :2]).max() < 62  # back in the car's frame


def test_view_page_shows_maps_and_errors(line, tmp_path: Path) -> None:
    text = view_sample(line.students["student0"], line.cache, tmp_path / "v.html", others={"lidar": line.lidar}).read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.problems == [] and {"boxes", "cameras", "errors", "maps-lidar"} <= set(outline.ids)
    assert "bev_fused" in text and "best class score" in text


def test_pieces_of_a_page() -> None:
    assert number(float("nan")) == "–" and number(0.12345) == "0.123" and number(12345) == "12,345"
    marked = table(["a", "b"], [["x", 0.5], ["y", 0.9]], caption="<c>", best={1: "max"})
    assert '<td class="best" data-value="0.9">0.900</td>' in marked and "&lt;c&gt;" in marked
    drawn = chart("t", {"n<": ([0, 1, 2], [1.0, float("nan"), 3.0])}, x="s")
    assert drawn.count("<circle") == 2 and "n&lt;" in drawn and "nan" not in drawn
    assert chart("t", {"n": ([0.0], [float("nan")])}) == ""
    page = Page("@body@ @style@")
    page.add("a", "A", "<p>@script@</p>")
    page.add("empty", "E", "")
    text = page.render()
    assert "<p>@script@</p>" in text and 'id="empty"' not in text and "<h1>@body@ @style@</h1>" in text


PROBE = """
<script>
addEventListener("error", (e) => document.title += " ERROR " + e.message);
addEventListener("securitypolicyviolation", (e) => document.title += " POLICY " + e.violatedDirective);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_report_in_a_browser(report: Path, tmp_path: Path) -> None:
    """At 400 px (in a frame: a headless window is at least 500 wide): loads without console errors or requests; sorting, sample
    switching by keys and the theme work; every picture is shown; nothing is wider."""
    text = report.read_text()
    driver = """
      addEventListener("load", () => {
      const out = {};
      const table = document.querySelector("#classes ~ div table.sortable");
      const head = table.tHead.rows[0].cells[1].querySelector("button");
      const column = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[1].dataset.value));
      head.click();
      const down = column();
      head.click();
      const up = column();
      out.sorted = down.every((v, i) => i === 0 || down[i - 1] >= v) && up.every((v, i) => i === 0 || up[i - 1] <= v);
      const tabs = [...document.querySelectorAll("[role=tab]")];
      const open = () => [...document.querySelectorAll("[role=tabpanel]")].map((p) => getComputedStyle(p).display !== "none");
      out.before = open();
      tabs[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
      out.after = open();
      out.focused = document.activeElement === tabs[1];
      tabs[1].dispatchEvent(new KeyboardEvent("keydown", { key: "Home", bubbles: true }));
      out.home = open();
      tabs[0].dispatchEvent(new KeyboardEvent("keydown", { key: "End", bubbles: true }));
      out.selected = tabs.map((t) => t.getAttribute("aria-selected"));
      const paper = () => getComputedStyle(document.body).backgroundColor;
      const first = paper();
      document.getElementById("theme").click();
      out.themes = first !== paper();
      out.wide = document.documentElement.scrollWidth;
      out.requests = performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length;
      out.ready = document.documentElement.dataset.ready;
      out.title = document.title;
      out.width = innerWidth;
      out.pictures = [...document.images].map((i) => i.complete && i.naturalWidth > 0);
      const reached = [...document.querySelectorAll("a[href], button, [tabindex='0']")];
      out.first = reached[0].className;
      out.inOrder = reached.every((e) => e.tabIndex <= 0);
      out.scrolls = [...document.querySelectorAll("*")].filter(
        (e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX === "auto" && e.closest("main")
      ).every((e) => e.tabIndex === 0);
      parent.postMessage(JSON.stringify(out), "*");
      });
    """
    digest = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
    listen = PROBE.strip()[len("<script>") : -len("</script>")]
    heard = base64.b64encode(hashlib.sha256(listen.encode()).digest()).decode()
    text = text.replace("script-src 'sha256-", f"script-src 'sha256-{digest}' 'sha256-{heard}' 'sha256-")
    text = text.replace("<title>", f"<script>{listen}</script><title>").replace("</body>", f"<script>{driver}</script></body>")
    page = tmp_path / "probe.html"
    page.write_text(text)
    listener = 'addEventListener("message", (e) => { document.getElementById("probe").textContent = e.data; });'
    frame = tmp_path / "frame.html"
    shown = '<iframe src="probe.html" width="400" height="900"></iframe>'
    frame.write_text(f'<!doctype html><pre id="probe"></pre><script>{listener}</script>{shown}')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=500,950"]
    flags += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([str(CHROMIUM), *flags, frame.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in done.stderr
    found = re.findall(r'<pre id="probe">(\{.*?\})</pre>', done.stdout)
    assert found, done.stdout[-500:]
    value = json.loads(found[-1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert value["sorted"] and value["themes"] and value["ready"] == "yes" and value["requests"] == 0
    assert value["before"] == value["home"] == [True, False] and value["after"] == [False, True] and value["focused"]
    assert value["selected"] == ["false", "true"] and value["first"] == "skip" and value["inOrder"] and value["scrolls"]
    assert "ERROR" not in value["title"] and "POLICY" not in value["title"]
    assert value["pictures"] == [True] * 6 and value["wide"] <= value["width"] == 400


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_screenshots_are_taken_by_the_script(tmp_path: Path) -> None:
    """`docs/take_pictures.py screens`: wide and narrow, light and dark, small enough for a README."""
    import runpy

    page = Page("A page", "with a table")
    page.add("a", "A", table(["x", "y"], [["one", 0.5]], caption="c"))
    (tmp_path / "p.html").write_text(page.render())
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "take_pictures.py"))
    made = script["screens"](tmp_path / "p.html", tmp_path)
    assert [p.name for p in made] == [f"p-{n}.webp" for n in ("wide", "dark", "narrow", "narrow-dark")]
    shots = [np.asarray(Image.open(p).convert("L")) for p in made]
    assert [s.shape[1] for s in shots] == [1280, 1280, 400, 400] and all(p.stat().st_size < 150_000 for p in made)
    assert [bool(s[-40:, :40].mean() > 128) for s in shots] == [True, False, True, False]  # the page's own paper
    assert all(s.std() > 2 for s in shots)  # and something on it


def test_statistics_as_table_and_page(line, tmp_path: Path) -> None:
    from pipelines.inspect_stats import cache_histograms, statistics_lines, write_statistics

    cache = open_cache(line.cache)
    counted = cache_histograms(cache, cache.rows())
    found = {h.title: h for h in counted}
    points = sum(len(p) for row in cache.rows().tolist() for p in cache.decode("depth_points", row))
    assert found["LiDAR depth in images"].counts.sum() == points
    boxes = [cache.decode("boxes", row) for row in cache.rows().tolist()]
    assert found["box classes"].counts.sum() == sum(int((b.label >= 0).sum()) for b in boxes)
    assert found["points per sample, RADAR_BACK_LEFT"].counts.sum() == len(cache)
    write_statistics(cache, cache.rows(), counted, tmp_path / "new" / "s.html")
    text = (tmp_path / "new" / "s.html").read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.problems == [] and outline.images == 1 and {"histograms", "table", "sizes"} <= set(outline.ids)
    assert any(line.split()[:1] == ["car"] for line in statistics_lines(counted))
    assert re.search(r"images +\d+\.\d KB a sample", text)
    write_statistics(cache, cache.rows(), counted, tmp_path / "s.png")
    panels = -(-(len(counted) + 1) // 3)  # sizes per field are one more
    assert Image.open(tmp_path / "s.png").size == (1260, 280 * panels)


def test_page_of_a_sample_says_what_its_picture_shows(line, tmp_path: Path) -> None:
    from pipelines.inspect import write_picture

    cache = open_cache(line.cache)
    row = int(cache.rows()[1])
    write_picture(cache, row, tmp_path / "new" / "x.html")
    text = (tmp_path / "new" / "x.html").read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.problems == [] and outline.images == 1 and {"picture", "calibration", "facts"} <= set(outline.ids)
    truth = int((cache.decode("boxes", row).label >= 0).sum())
    assert f"{truth} truth boxes" in text and "CAM_BACK_LEFT" in text and cache.token(row) in text
    write_picture(cache, row, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (1700, 760)


def test_calibration_summary_names_every_camera(line) -> None:
    from pipelines.sample_view import calibration_lines

    cache = open_cache(line.cache)
    lines = calibration_lines(read_view(cache, int(cache.rows()[0])))
    assert len(lines) == 7
    back = next(text for text in lines if text.startswith("CAM_BACK "))
    assert abs(abs(float(back.split(" deg")[0].split()[-1])) - 180) < 10  # looks backwards
