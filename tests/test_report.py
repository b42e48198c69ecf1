import json
import re

import numpy as np
import pytest
from PIL import Image

from qirl.errors import UserError
from qirl.run.folder import RunFolder, write_json
from qirl.run.logs import JsonLines
from qirl.run.plots import compared, grid, smooth
from qirl.run.report import write_report
from qirl.run.stages import stages_of

COMPONENTS = ("attribute", "digit", "ink")
CATEGORIES = ("plain", "colour", "background", "two digits")
EVIL = "a red 7 <script>alert('x')</script> & \"35\" in {{ green }}"
PROMPTS = [EVIL, "a blue 3 on white", "35 in green", "a yellow 0 on black", "81 in red", "a green 4"]
COLORS = ((220, 60, 50), (60, 90, 220), (50, 170, 80), (230, 200, 60), (200, 70, 60), (60, 160, 90))


def digit(rng, index, quality):
    """A coloured blob with strokes that gets sharper with `quality` in [0, 1]; uint8 [16, 16, 3]."""
    y, x = np.mgrid[:16, :16]
    ink = np.exp(-(((np.hypot(x - 7.5, y - 7.5) - 4.5 + (index % 3 - 1) * np.sin(y / 2)) / 1.3) ** 2))
    ink = np.clip(ink + rng.normal(0, 0.35 * (1 - quality), (16, 16)), 0, 1)[..., None]
    background = np.array((235, 232, 225) if index % 2 else (35, 38, 45), dtype=float)
    return (ink * np.array(COLORS[index % 6]) + (1 - ink) * background).astype(np.uint8)


def rl_run(path, steps=120):
    rng = np.random.default_rng(0)
    folder = RunFolder.open(path, {"train": {"lr": 2e-4}, "prompts": {"extra": EVIL}})
    log = JsonLines(folder.metrics)
    for step in range(1, steps + 1):
        done = 1 - np.exp(-step / 50)
        record = {"step": step, "loss": 0.2 - 0.05 * done + rng.normal(0, 0.01), "skipped": int(step == 40)}
        record |= {"grad_norm": None if step == 40 else float(np.exp(rng.normal(-1, 0.5))), "lr": 2e-4}
        record |= {
            "ratio_mean": 1.0,
            "ratio_min": 0.9 - rng.random() / 20,
            "ratio_max": 1.1 + rng.random() / 20,
        }
        record |= {
            "clip_fraction": rng.random() * 0.05,
            "log_ratio_abs": rng.random() / 100,
            "kl": 0.01 * done,
        }
        record |= {
            "advantage_abs": 0.7 + rng.normal(0, 0.03),
            "range": 0.5,
            "valid_pairs": 384,
            "dropped_samples": 0,
        }
        record |= {"zero_signal_groups": int(rng.random() < 0.1), "time/rollout": 0.4, "time/reward": 0.05}
        record |= {"time/update": 0.35, "time/step": 0.84, "images_per_second": 110 + rng.normal(0, 6)}
        for c, component in enumerate(COMPONENTS):
            level = 0.5 + 0.12 * c
            record[f"reward/{component}"] = level + 0.2 * done + rng.normal(0, 0.03)
            for k, category in enumerate(CATEGORIES):
                record[f"reward/{component}/{category}"] = level - 0.05 * k + 0.2 * done + rng.normal(0, 0.06)
        log.append(record)
        if step in (1, steps) or step % 10 == 0:
            name = folder.samples / f"step_{step:06d}"
            row = np.stack([digit(np.random.default_rng(i), i, done) for i in range(len(PROMPTS))])
            grid(row[None], scale=2).save(name.with_suffix(".png"))
            write_json(name.with_suffix(".json"), {"step": step, "prompts": PROMPTS, "guidance": 1.0})
            group(folder, step, rng)
    return folder


def group(folder, step, rng, size=12):
    names = [f"group_{step:06d}_{rank}.png" for rank in range(size)]
    for rank, name in enumerate(names):
        Image.fromarray(digit(rng, 0, 1 - rank / size)).save(folder.samples / name)
    scores = [{c: 1 - rank / size - 0.1 * i for i, c in enumerate(COMPONENTS)} for rank in range(size)]
    scores[-1]["ink"] = None
    about = {"step": step, "prompt": EVIL, "images": names, "scores": scores}
    advantages = [1.6 - 3.2 * rank / (size - 1) for rank in range(size)]
    write_json(folder.samples / f"group_{step:06d}.json", {**about, "advantages": advantages})


def base_run(path, steps=2000):
    rng = np.random.default_rng(1)
    folder = RunFolder.open(path, {"pretrain": {"steps": steps}})
    records = [
        {"step": s, "loss": 0.2 + np.exp(-s / 200) + rng.normal(0, 0.02), "grad_norm": 0.5 + rng.random() / 5,
         "lr": 1e-3 * min(1, s / 100), "images_per_second": 900 + rng.normal(0, 30)}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    JsonLines(folder.metrics).append(records)
    return folder


def evaluation(guidance, judge):
    rewards = {c: judge + 0.05 * i for i, c in enumerate(COMPONENTS)}
    entry = {
        "guidance": guidance,
        "judge_accuracy": judge,
        "judge_accuracy_se": 0.014,
        "diversity": 0.31,
        "pairs": 512,
    }
    return {**entry, "rewards": rewards, "rewards_se": dict.fromkeys(COMPONENTS, 0.009)}


def summary():
    base = {str(g): evaluation(g, judge) for g, judge in ((1, 0.481), (2, 0.702), (4, 0.83), (6, 0.81))}
    tuned = {str(g): evaluation(g, judge) for g, judge in ((1, 0.655), (4, 0.842))}
    stages = {"base": {**base["4"], "by_guidance": base}, "t2i": {**tuned["1"], "by_guidance": tuned}}
    return {"seconds": 521.0, "stages": stages}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {"base": base_run(root / "base").path, "t2i": rl_run(root / "t2i").path}


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = write_report(tmp_path_factory.mktemp("out") / "report.html", runs, summary())
    return path.read_text(encoding="utf-8")


def test_what_users_wrote_is_escaped_everywhere(page):
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "{{ green }}" in page
    assert page.count("<script>") == 1  # the page's own


def test_the_page_needs_nothing_from_anywhere(page):
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    assert len(page) < 5_000_000


def test_every_component_and_category_has_its_panel(page):
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page)
    for name in (
        *COMPONENTS,
        *CATEGORIES,
        "Ratio",
        "Clip fraction",
        "Gradient norm",
        "Loss",
        "Images per second",
    ):
        assert name in titles, name
    figures = dict(zip(titles, page.split("<figure>")[1:], strict=True))
    for category in CATEGORIES:
        svg = figures[category].split("</svg>")[0]
        assert all(f"stroke: var(--c{i})" in svg for i in range(len(COMPONENTS))), category
    for i, component in enumerate(COMPONENTS):
        assert f"stroke: var(--c{i})" in figures[component].split("</svg>")[0]


def test_panels_follow_the_colours_of_the_page_and_do_not_share_ids(page):
    assert "#0102" not in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 10


def test_images_of_the_first_and_last_step_and_of_groups_are_embedded(page):
    steps = [int(step) for step in re.findall(r'<tr data-step="(\d+)"', page)]
    assert steps[0] == 1 and steps[-1] == 120 and steps == sorted(steps) and len(steps) == 8
    assert page.count('<img class="pixelated" src="data:image/png') == len(steps) * len(PROMPTS) + 2 * 6
    assert "+1.60" in page and "-1.60" in page


def test_the_summary_table_and_cards_show_values_with_their_errors(page):
    for words in ("0.481", "0.655", "± 0.014", "+0.174", "512", "8.7 minutes"):
        assert words in page, words
    assert page.count('<tr class="own">') == 2


def test_the_config_is_shown_folded(page):
    assert "<details>" in page and "lr: 0.0002" in page


def test_the_same_run_gives_the_same_page(runs, tmp_path, page):
    assert write_report(tmp_path, runs, summary()) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_a_run_of_few_steps_without_summary_samples_or_config_is_reported(tmp_path, steps):
    path = tmp_path / "run"
    path.mkdir()
    (path / "metrics.jsonl").write_text("")
    for step in range(steps):
        JsonLines(path / "metrics.jsonl").append({"step": step, "loss": 1.0, "reward/ink": 0.5, "kl": float("nan")})
    page = write_report(tmp_path / "report.html", {"t2i": path}).read_text()
    assert ("No step is finished" in page) == (steps == 0) and ("<b>ink</b>" in page) == (steps > 0)


def test_half_written_samples_are_left_out(tmp_path):
    folder = rl_run(tmp_path / "run", steps=12)
    last = folder.samples / "step_000012.png"
    last.write_bytes(last.read_bytes()[:60])
    (folder.samples / "group_000012.json").write_text('{"step": 12, "pro')
    page = write_report(tmp_path / "report.html", {"t2i": folder.path}).read_text()
    assert re.findall(r'<tr data-step="(\d+)"', page) == ["1", "10"]


def test_large_samples_stay_within_the_size_of_a_page(tmp_path):
    folder = rl_run(tmp_path / "run", steps=2)
    noise = np.random.default_rng(0).integers(0, 256, (1, 8, 256, 256, 3), dtype=np.uint8)
    for step in range(3, 15):
        grid(noise).save(folder.samples / f"step_{step:06d}.png", compress_level=1)
        about = {"step": step, "prompts": ["noise"] * 8}
        (folder.samples / f"step_{step:06d}.json").write_text(json.dumps(about))
    path = write_report(tmp_path / "report.html", {"t2i": folder.path})
    assert path.stat().st_size < 5_000_000 and 'data-step="14"' in path.read_text()


def test_missing_and_corrupt_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl"):
        write_report(tmp_path / "report.html", {"t2i": tmp_path / "absent"})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        write_report(tmp_path / "report.html", {"t2i": tmp_path})
    assert not (tmp_path / "report.html").exists()


def test_a_grid_can_be_cut_up_again():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    picture = np.asarray(grid(images, scale=3))
    assert picture.shape == (24, 45, 3)
    cells = picture.reshape(2, 4, 3, 3, 5, 3, 3)[:, :, 0, :, :, 0].transpose(0, 2, 1, 3, 4)
    assert np.array_equal(cells, images)
    assert grid(images, 3, ["a b c", "d", "e"], gap=2).height > 24
    with pytest.raises(ValueError, match="2 captions for 3 columns"):
        grid(images, captions=["a", "b"])
    with pytest.raises(ValueError, match=r"uint8 \[rows, columns, H, W, 3\]"):
        grid(images.astype(float))


def test_a_comparison_holds_the_rows_of_every_model():
    blocks = {
        name: np.full((2, 4, 16, 16, 3), level, np.uint8) for name, level in zip("abc", (0, 100, 200), strict=True)
    }
    picture = np.asarray(compared(blocks, ["a red 7 on blue"] * 4))
    for images in blocks.values():
        assert (picture == images[0, 0, 0, 0]).all(-1).sum() >= images[..., 0].size * 36
    first = {name: images[0] for name, images in blocks.items()}
    assert compared(first, ["x"] * 4, scale=2).width < picture.shape[1]
    assert compared({"a": first["a"]}, ["x"] * 4).height < picture.shape[0]
    with pytest.raises(ValueError, match="must be equal"):
        compared(first | {"b": first["b"][:1]}, ["x"] * 4)


# --- a summary of both tasks, with ratings, and the folders of probes -------------------------------------------------


def judged(value):
    return {"judge_accuracy": {"value": value, "low": value - 0.04, "high": value + 0.04}}


def summary_of_both():
    """The base is for guidance 4, the student for 1."""
    base = {str(g): evaluation(g, judge) | {"by_task": {"edit": judged(0.2), "t2i": judged(judge)}}
            for g, judge in ((1, 0.481), (4, 0.83))}  # fmt: skip
    student = evaluation(1, 0.9) | {"by_task": {"edit": judged(0.77), "t2i": judged(0.91)}}
    rated = lambda r, low, high, g: {"rating": r, "low": low, "high": high, "guidance": g}  # noqa: E731
    elo = {"base": rated(1000.0, 1000.0, 1000.0, 4.0), "student": rated(1123.4, 1087.6, 1160.2, 1.0)}
    ahead = {"student - base": {"value": 123.4, "low": 87.6, "high": 160.2}}
    stages = {"base": {**base["4"], "by_guidance": base}, "student": {**student, "by_guidance": {"1": student}}}
    scopes = ("overall", "t2i", "edit")
    return {"stages": stages, "elo": dict.fromkeys(scopes, elo), "elo_differences": dict.fromkeys(scopes, ahead)}


@pytest.fixture(scope="module")
def page_of_both(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("both")
    probes(root)
    runs = {"base": runs["base"], "student": runs["t2i"], "curate": root / "curate", "calibrate": root / "calibrate"}
    return write_report(root / "report.html", runs, summary_of_both()).read_text(encoding="utf-8")


def probes(root):
    (root / "curate").mkdir()
    rows = [
        {"category": "plain", "decision": "drop", "reason": "saturated", "range": 0.1},
        {"category": "plain", "decision": "keep", "reason": None, "range": 0.3},
        {"category": "swap", "decision": "drop", "reason": "range", "range": 0.02},
        {"category": "swap", "decision": "keep", "reason": None, "range": 0.456},
    ]
    JsonLines(root / "curate/ledger.jsonl").append([{"ledger": 1}, *rows])
    (root / "calibrate").mkdir()
    part = {"weight": 0.6543, "wanted": 0.5, "realised": 0.512}
    swap = {"scale": 1.234, "groups": 7, "notes": ["ink never varies"], "components": {"ink": part}}
    write_json(root / "calibrate/calibration.json", {"method": "calibrated", "categories": {"swap": swap}})


def text_of(page):
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_both_tasks_have_their_judge_in_table_and_cards(page_of_both):
    text = text_of(page_of_both)
    assert "judge t2i judge edit" in text and "0.770 0.73 to 0.81" in text
    assert "judge, edit 0.20 → 0.77 +0.570 base at guidance 4: 0.20" in text
    assert "held-out judge 0.48 → 0.90 +0.419 ± 0.020 base at guidance 4: 0.83" in text
    assert "base → student, both at guidance 1" in text


def test_ratings_are_shown_with_their_intervals(page_of_both):
    text = text_of(page_of_both)
    assert "Elo overall Elo t2i Elo edit student ahead, overall" in text
    assert "base 4 1000 1000 1000 +123 +88 to +160" in text and "student 1 1123 1088 to 1160" in text
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page_of_both)
    assert titles[:3] == ["overall", "t2i", "edit"]


def test_curation_and_calibration_are_tables_without_a_training_log(page_of_both):
    text = text_of(page_of_both)
    assert "category kept range saturated median range" in text and "swap 1 1 0 0.456" in text and "all 2 1 1" in text
    assert "swap 7 1.234 ink 0.654 0.500 0.512" in text and "swap: ink never varies" in text


def test_a_folder_of_runs_and_probes_is_found_and_a_damaged_probe_is_named(tmp_path):
    probes(tmp_path)
    base_run(tmp_path / "base", steps=2)
    assert list(stages_of([tmp_path])) == ["calibrate", "curate", "base"]
    assert list(stages_of([tmp_path / "curate"])) == ["curate"]
    page = write_report(tmp_path / "only.html", stages_of([tmp_path / "curate"])).read_text()
    assert "4 candidate prompts" in page
    (tmp_path / "calibrate/calibration.json").write_text('{"categories": ')
    with pytest.raises(UserError, match="calibration.json is damaged"):
        write_report(tmp_path / "report.html", stages_of([tmp_path]))


def test_smoothing_keeps_constants_and_straight_means():
    np.testing.assert_allclose(smooth(np.full(100, 0.7)), 0.7)
    assert smooth(np.arange(5.0)).tolist() == [0, 1, 2, 3, 4] and smooth(np.arange(8.0)).shape == (8,)
