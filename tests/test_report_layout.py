"""The report fits its window: nothing is cut off where the reader cannot scroll to it."""

import json
import os
import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from qirl.run.folder import RunFolder, write_json
from qirl.run.logs import JsonLines
from qirl.run.plots import grid
from qirl.run.report import write_report

COMPONENTS = ("attribute", "digit", "identity", "ink", "instruction")
MODELS = {"base": 4.0, "t2i": 3.0, "edit": 2.0, "mix": 2.0, "student": 1.0}
BROWSER = os.environ.get("QIRL_TEST_BROWSER")  # the path of a Chromium


def evaluation(guidance):
    interval = {"value": 0.812, "low": 0.776, "high": 0.848}
    return {
        "guidance": guidance,
        "judge_accuracy": 0.812,
        "judge_accuracy_se": 0.014,
        "by_task": dict.fromkeys(("t2i", "edit"), {"judge_accuracy": interval}),
        "rewards": dict.fromkeys(COMPONENTS, 0.712),
        "rewards_se": dict.fromkeys(COMPONENTS, 0.009),
        "gap": -0.041,
        "diversity": 0.31,
        "pairs": 576,
    }


def summary():
    """As of the quickstart: five models, two tasks, five rewards, ratings."""
    stages = {m: evaluation(g) | {"by_guidance": {"1": evaluation(1.0)}} for m, g in MODELS.items()}
    elo = {m: {"rating": 1234.5, "low": 1111.1, "high": 1357.9, "guidance": g} for m, g in MODELS.items()}
    ahead = {f"student - {m}": {"value": -123.4, "low": -160.2, "high": -87.6} for m in MODELS if m != "student"}
    scopes = ("overall", "t2i", "edit")
    return {"stages": stages, "elo": dict.fromkeys(scopes, elo), "elo_differences": dict.fromkeys(scopes, ahead)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("layout")
    folder = RunFolder.open(root / "student", {"train": {"lr": 2e-4}})
    rewards = {f"reward/{c}": 0.5 for c in COMPONENTS}
    JsonLines(folder.metrics).append([{"step": step, "loss": 0.1, **rewards} for step in (1, 2)])
    for step in (1, 2):
        name = folder.samples / f"step_{step:06d}"
        grid(np.zeros((1, 12, 16, 16, 3), np.uint8)).save(name.with_suffix(".png"))
        write_json(name.with_suffix(".json"), {"step": step, "prompts": ["a red 7 on blue"] * 12, "guidance": 1.0})
    (root / "curate").mkdir()
    row = {"category": "plain", "decision": "keep", "reason": None, "range": 0.3}
    JsonLines(root / "curate/ledger.jsonl").append([{"ledger": 1}, row])
    (root / "calibrate").mkdir()
    part = dict.fromkeys(COMPONENTS, {"weight": 0.6543, "wanted": 0.5, "realised": 0.512})
    category = {"scale": 1.234, "groups": 7, "notes": [], "components": part}
    write_json(root / "calibrate/calibration.json", {"method": "calibrated", "categories": {"plain": category}})
    stages = {name: root / name for name in ("student", "curate", "calibrate")}
    return write_report(root / "report.html", stages, summary())


class Tables(HTMLParser):
    """Collects the classes of each table's parent, and per table and row the lines of text of each cell."""

    def __init__(self, page):
        super().__init__()
        self.open, self.parents, self.tables = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        if tag in ("meta", "img", "input"):
            return
        if tag == "table":
            self.parents.append(self.open[-1][1])
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([""])
        elif "se" in self.class_of(about) and self.in_cell():  # the error stands below its value
            self.tables[-1][-1][-1].append("")
        self.open.append((tag, self.class_of(about)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.in_cell():
            self.tables[-1][-1][-1][-1] += data

    def in_cell(self):
        return any(tag in ("td", "th") for tag, _ in self.open)

    @staticmethod
    def class_of(about):
        return (about.get("class") or "").split()


def style(page):
    return re.search(r"<style>(.*?)</style>", page, re.S)[1]


def test_every_table_scrolls_in_its_own_container(report):
    page = report.read_text()
    assert re.search(r"\.wide \{ overflow-x: auto;", style(page))
    parents = Tables(page).parents
    assert len(parents) == 5 and all("wide" in parent for parent in parents)


def test_the_page_is_as_wide_as_its_window_and_no_element_wider(report):
    page = report.read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    for text in (style(page), *re.findall(r'style="([^"]*)"', page)):
        for name, value in re.findall(r"([\w-]+):\s*([^;{}]*)", text):
            if name in ("width", "min-width", "flex-basis"):
                assert all(float(px) <= 360 for px in re.findall(r"([\d.]+)px", value)), (name, value)
            if name == "grid-template-columns":  # a column never keeps a width that a small window has not
                assert not re.search(r"minmax\(\s*[\d.]+px", value), value


def test_the_tables_of_a_quickstart_fit_a_window_of_1300_pixels(report):
    """By their letters: 8 px each (DejaVu Sans, wider than most, at 14 px has 7.7 on average) and 16 px of padding."""
    page = report.read_text()
    assert re.search(r"td \.se \{ display: block;", style(page))
    width = float(re.search(r"main \{ max-width: (\d+)px", style(page))[1])
    room = min(width, 1300) - 2 * 20 - 2 * 17  # the padding of the page; padding and border of the container
    for table in Tables(page).tables[:2]:
        head, rows = table[0], table[1:]
        assert len(head) in (8, 12) and len(rows) >= len(MODELS)
        rows = [[[""]] * (len(head) - len(row)) + row for row in rows]  # below a name that spans rows
        lines = [
            [*max(head[i], key=len).split(), *(line.strip() for row in rows for line in row[i])]
            for i in range(len(head))
        ]
        assert sum(8 * max(map(len, column)) + 16 for column in lines) <= room


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="QIRL_TEST_BROWSER names no Chromium")
def test_a_browser_shows_the_whole_tables_at_1300_pixels_and_a_page_without_side_scrolling_at_500(report, tmp_path):
    """500 px is the narrowest window that a headless Chromium has."""
    measure = """<script>addEventListener("load", () => { document.title = JSON.stringify([
      document.documentElement.scrollWidth, ...[...document.querySelectorAll(".wide")].slice(0, 2).map(
      box => box.scrollWidth - box.clientWidth)]); });</script></body>"""
    page = tmp_path / "page.html"
    page.write_text(report.read_text().replace("</body>", measure))
    found = {}
    for width in (1300, 500):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        found[width] = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert found[1300] == [1300, 0, 0] and found[500][0] == 500
