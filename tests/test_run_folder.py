import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qirl.errors import UserError
from qirl.run import cache
from qirl.run.folder import RunFolder, flatten, write_json
from qirl.run.logs import JsonLines, read
from qirl.run.trackers import Trackers

CONFIG = {
    "run": {"out": "a", "seed": 3},
    "train": {"lr": 1e-5, "betas": (0.9, 0.95), "ema": None},
    "name": "ü: x",
}


def changed(key, value):
    config = json.loads(json.dumps(CONFIG))
    part, name = key.split(".")
    config[part][name] = value
    return config


def test_a_new_run_gets_its_config_and_the_same_config_opens_it_again(tmp_path):
    folder = RunFolder.open(tmp_path / "deep" / "run", CONFIG)
    written = folder.config.read_bytes()
    assert yaml.safe_load(written) == json.loads(json.dumps(CONFIG))
    assert folder.samples.is_dir() and folder.checkpoints.is_dir()
    again = RunFolder.open(folder.path, CONFIG, resume="always")
    assert (again.metrics.name, again.summary.name, again.report.name) == (
        "metrics.jsonl",
        "summary.json",
        "report.html",
    )
    assert again.config.read_bytes() == written


def test_another_config_is_refused_with_the_keys_and_both_values(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    JsonLines(folder.metrics).append({"step": 1})
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    other = changed("train.lr", 2e-5)
    other["train"]["new"] = True
    del other["train"]["ema"]
    with pytest.raises(UserError) as error:
        RunFolder.open(folder.path, other)
    message = str(error.value)
    for words in (
        "train.lr (1e-05 there, 2e-05 now)",
        "train.ema (null there, absent now)",
        "train.new (absent there",
    ):
        assert words in message
    assert "another out folder" in message and "\n" not in message and "run.seed" not in message
    assert {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before


def test_a_run_older_than_an_option_had_its_default(tmp_path):
    JsonLines(RunFolder.open(tmp_path / "run", CONFIG).metrics).append({"step": 1})
    newer = changed("run.seed", 3)
    newer["train"]["new"] = "auto"
    defaults = {"run": {"seed": 0, "unknown": 1}, "train": {"new": "auto"}}
    assert newer["run"]["seed"] == CONFIG["run"]["seed"]
    RunFolder.open(tmp_path / "run", newer, defaults=defaults)
    newer["train"]["new"] = "other"
    with pytest.raises(UserError, match=r'config: train.new \("auto" there, "other" now\);'):
        RunFolder.open(tmp_path / "run", newer, defaults=defaults)


def test_free_keys_may_differ_alone_or_as_a_group(tmp_path):
    JsonLines(RunFolder.open(tmp_path / "run", CONFIG).metrics).append({"step": 1})
    RunFolder.open(tmp_path / "run", changed("run.out", "b"), free_keys=("run.out",))
    RunFolder.open(tmp_path / "run", changed("run.seed", 4), free_keys=("run",))
    RunFolder.open(tmp_path / "run", changed("run.seed", 4), free_keys=("*.seed",))
    with pytest.raises(UserError, match="run.seed"):
        RunFolder.open(tmp_path / "run", changed("run.seed", 4), free_keys=("run.out", "ru"))


def test_a_rising_key_may_go_up_and_is_written_but_not_go_down(tmp_path):
    JsonLines(RunFolder.open(tmp_path / "run", CONFIG).metrics).append({"step": 1})
    rising = {"rising_keys": ("run.seed",)}
    folder = RunFolder.open(tmp_path / "run", changed("run.seed", 40), **rising)
    assert folder.risen == {"run.seed": (CONFIG["run"]["seed"], 40)}
    assert yaml.safe_load(folder.config.read_text())["run"]["seed"] == 40
    assert RunFolder.open(tmp_path / "run", changed("run.seed", 40), **rising).risen == {}
    with pytest.raises(UserError, match=r"run.seed \(40 there, 39 now\)"):
        RunFolder.open(tmp_path / "run", changed("run.seed", 39), **rising)


def test_a_run_that_never_began_may_change_its_config(tmp_path):
    """A wrong option that only the first step can find must not make the corrected command "another config"."""
    RunFolder.open(tmp_path / "run", CONFIG)
    folder = RunFolder.open(tmp_path / "run", changed("run.seed", 4))
    assert yaml.safe_load(folder.config.read_text())["run"]["seed"] == 4


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no run folder"):
        RunFolder.open(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_folder_whose_first_write_was_killed_can_be_used(tmp_path):
    (tmp_path / "config.yaml.123.tmp").write_text("tra")
    (tmp_path / "samples").mkdir()
    assert RunFolder.open(tmp_path, CONFIG).config.exists()


def test_resume_never_and_always_are_kept(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder.open(tmp_path / "run", CONFIG, resume="always")
    assert not (tmp_path / "run").exists()
    RunFolder.open(tmp_path / "run", CONFIG, resume="never")
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.open(tmp_path / "run", CONFIG, resume="never")
    with pytest.raises(UserError, match="did you mean 'never'"):
        RunFolder.open(tmp_path / "run", CONFIG, resume="nevr")


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunFolder.open(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(UserError, match="cannot write the run folder"):
        RunFolder.open(tmp_path / "file", CONFIG)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot write the run folder"):
            RunFolder.open(tmp_path / "closed", CONFIG)


def test_a_broken_config_file_is_named(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    folder.config.write_text("a: [1,")
    with pytest.raises(UserError, match="cannot read .*config.yaml"):
        RunFolder.open(folder.path, CONFIG)


def test_other_ranks_write_nothing(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG, writer=False)
    assert not folder.path.exists() and not folder.writer


def test_write_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": np.float32(0.5), "nan": math.nan})
    assert json.loads(path.read_text()) == {"a": 0.5, "nan": None}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 0.5 and os.listdir(tmp_path) == ["summary.json"]


def test_flatten_keeps_lists_and_empty_groups():
    assert flatten({"a": {"b": {"c": [1, {"d": 2}]}, "e": {}}}) == {"a.b.c": [1, {"d": 2}], "a.e": {}}


def log_of(tmp_path, steps=5):
    log = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, steps + 1):
        log.append({"step": step, "loss": step / 2})
    return log


def test_numbers_of_any_library_become_json_and_nan_becomes_null(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl")
    log.append({"a": math.nan, "b": np.float32(0.25), "c": torch.tensor(3), "d": np.int64(4), "e": [math.inf, "x"]})
    log.append([{"step": 1}, {"step": 2}])
    log.append([])
    assert list(read(log.path)) == [
        {"a": None, "b": 0.25, "c": 3, "d": 4, "e": [None, "x"]},
        {"step": 1},
        {"step": 2},
    ]
    assert b"NaN" not in log.path.read_bytes()


def test_cut_keeps_the_steps_up_to_the_checkpoint_byte_for_byte(tmp_path):
    log = log_of(tmp_path)
    kept = b"".join(log.path.read_bytes().splitlines(keepends=True)[:3])
    log.cut(3)
    assert log.path.read_bytes() == kept
    log.cut(3)
    assert log.path.read_bytes() == kept and os.listdir(tmp_path) == ["metrics.jsonl"]
    log.cut(0)
    assert log.path.read_bytes() == b""
    JsonLines(tmp_path / "absent.jsonl").cut(3)


def test_a_log_torn_at_any_byte_reads_cuts_and_goes_on(tmp_path):
    data = log_of(tmp_path).path.read_bytes()
    for end in range(len(data) + 1):
        path = tmp_path / "torn.jsonl"
        torn = data[:end]
        whole = torn.count(b"\n") + torn.rpartition(b"\n")[2].endswith(b"}")
        path.write_bytes(torn)
        assert [record["step"] for record in read(path)] == list(range(1, whole + 1))
        JsonLines(path).append({"step": 9})
        assert [record["step"] for record in read(path)] == [*range(1, whole + 1), 9]
        path.write_bytes(torn)
        JsonLines(path).cut(9)
        assert path.read_bytes() == b"".join(data.splitlines(keepends=True)[:whole])


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    log = log_of(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + lines[1][:6] + b"\n" + lines[2])
    before = log.path.read_bytes()
    for action in (lambda: list(read(log.path)), lambda: log.cut(2)):
        with pytest.raises(UserError, match="metrics.jsonl, line 2 is not a JSON object"):
            action()
    assert log.path.read_bytes() == before
    with pytest.raises(UserError, match="cannot read"):
        list(read(tmp_path / "absent.jsonl"))


def test_the_cache_key_follows_content_and_source(tmp_path, monkeypatch):
    key = cache.content_key({"a": 1, "b": [1, 2]}, cache)
    assert key == cache.content_key({"b": [1, 2], "a": 1}, cache) and len(key) == 64
    assert len({key, cache.content_key({"a": 1, "b": [1, 3]}, cache), cache.content_key({"a": 1, "b": [1, 2]})}) == 3
    assert cache.content_key("ab", "c") != cache.content_key("a", "bc")
    package = tmp_path / "pack_for_key"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import pack_for_key

    first = cache.content_key(pack_for_key)
    (package / "part.py").write_text("x = 2\n")
    assert cache.content_key(pack_for_key) != first


def test_a_cached_folder_is_built_once_and_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("QIRL_CACHE", str(tmp_path / "cache"))
    calls = []

    def build(path):
        calls.append(path)
        (path / "weights").write_text("w")
        if len(calls) == 1:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cache.cached_folder("base", "0" * 64, build)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    stale = tmp_path / "cache" / ("base-" + "0" * 16 + ".1.tmp")
    stale.mkdir()
    for _ in range(2):
        path = cache.cached_folder("base", "0" * 64, build)
        assert (path / "weights").read_text() == "w" and path.parent == tmp_path / "cache"
    assert len(calls) == 2 and not stale.exists()


BUILD_SLOWLY = """
import os, sys, time
from qirl.run.cache import cached_folder
def build(path):
    for name in ("a", "b"):
        (path / name).write_text(str(os.getpid()))
        time.sleep(0.2)
    print("built")
path = cached_folder("base", "k" * 64, build)
assert (path / "a").read_text() == (path / "b").read_text()
"""


def test_two_processes_that_want_the_same_thing_build_it_once(tmp_path):
    environment = {**os.environ, "QIRL_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}

    def start(_):
        command = [sys.executable, "-c", BUILD_SLOWLY]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(3) as pool:
        assert "".join(pool.map(start, range(3))).count("built") == 1


def test_an_unwritable_cache_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QIRL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set QIRL_CACHE"):
        cache.cached_folder("base", "0" * 64, lambda path: None)


def test_trackers_are_optional_and_name_what_is_missing(tmp_path, monkeypatch):
    Trackers([], tmp_path, CONFIG).log(1, {"loss": 1.0})
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        Trackers(["tensorbord"], tmp_path, CONFIG)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Trackers(["wandb"], tmp_path, CONFIG)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Trackers(["tensorboard"], tmp_path, CONFIG)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path, CONFIG)
    for step in (1, 2):
        trackers.log(step, {"step": step, "reward/ink": step / 4, "kl": None})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/ink"]
    assert [(event.step, event.value) for event in events.Scalars("reward/ink")] == [(1, 0.25), (2, 0.5)]
