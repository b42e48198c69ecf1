"""The main job: a small base learns to draw and edit handwriting, RL improves it, one student learns it all. No GPU, no network.

    OUT/base        pretraining (cached by the content of its config and of the code that makes it)
    OUT/curate      which prompts of both tasks the base can learn from; OUT/calibrate: what each reward is to weigh
    OUT/t2i, edit   RL of one teacher per task; OUT/mix: of one model on both tasks, to compare with
    OUT/student     both teachers distilled into one model that needs no guidance
    OUT/arena       all of them on the same held-out prompts and noise, with Elo ratings
    OUT/summary.json, OUT/report.html, OUT/before_after.png

Every stage is a command of its own on configs/digits/; started again, the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qirl import api
from qirl import config as configuration
from qirl.errors import UserError, nearest
from qirl.parallel.data import run_device
from qirl.paths import configs
from qirl.run.cache import cached_folder, content_key
from qirl.run.cache import folder as cache_folder
from qirl.run.folder import write_bytes, write_json
from qirl.run.progress import Live

STAGES = {  # folder: command and config, in the order in which they run
    "base": ("pretrain", "pretrain"),
    "curate": ("curate", "curate"),
    "calibrate": ("calibrate", "calibrate"),
    "t2i": ("train", "t2i"),
    "edit": ("train", "edit"),
    "mix": ("train", "mix"),
    "student": ("distill", "distill"),
    "arena": ("evaluate", "arena"),
}


def quickstart(
    out: str = "runs/quickstart",
    seed: int = 0,
    quiet: bool = False,
    overrides: Mapping[str, Sequence[str]] | None = None,
    device: str = "auto",
) -> dict:
    """Runs all stages and returns the summary; prints a table and the report's path unless `quiet`.

    overrides: per stage (a key of STAGES) options over those of its config. device: `run.device` of every stage. Raises
    UserError for an option or a device that does not fit, before the first stage, and if `out` cannot be written or holds the stages of another seed or config.
    """
    from qirl import quickstart_results as results
    from qirl.run.report import write_report

    folder = Path(out)
    recipes = load_recipes(folder, seed, overrides or {}, device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); choose another --out folder") from None
    clock = Clock(folder / "quickstart.json", quiet)
    with clock.stage("readers"):
        train_readers(quiet)
    with clock.stage("base"):
        clock.base_from_cache |= train_base(recipes["base"], quiet)
    for name in ("curate", "calibrate", "t2i", "edit", "mix", "student"):
        with clock.stage(name):
            getattr(api, STAGES[name][0])(recipes[name], quiet=quiet)
    with clock.stage("arena"):
        summary = results.evaluate_stages(recipes, quiet)
    with clock.stage("report"):
        results.picture(recipes, summary["stages"]).save(folder / "before_after.png")
        facts = {"seed": seed, "base_from_cache": clock.base_from_cache}
        summary = {"seconds": clock.total(), "seconds_by_stage": clock.seconds, **facts, **summary}
        report = write_report(folder / "report.html", {n: folder / n for n in STAGES if n != "arena"}, summary)
    summary["seconds"] = clock.total()
    write_json(folder / "summary.json", summary)
    if not quiet:
        results.print_table(summary)
        print(f"report: {report}\n{summary['seconds'] / 60:.1f} minutes in all")
    return summary


def load_recipes(
    folder: Path, seed: int, overrides: Mapping[str, Sequence[str]], device: str = "auto"
) -> dict[str, configuration.Section]:
    """The config of every stage: configs/digits/, wired to the folders of the stages before, then `overrides`."""
    for name in overrides:
        if name not in STAGES:
            raise UserError(f"overrides of '{name}', which is no stage{nearest(name, STAGES)}")
    base = f"model.path={folder / 'base'}"
    learns = [
        base,
        f"world.prompts={folder / 'curate/curated.jsonl'}",
        f"advantage.calibration={folder / 'calibrate/calibration.json'}",
        "advantage.weights={}",  # a calibration replaces them
    ]
    wired = {
        "base": ["world.task=mixed"],
        "curate": [base],
        "calibrate": [base, f"calibrate.ledger={folder / 'curate'}"],
        **dict.fromkeys(("t2i", "edit", "mix"), learns),
        "student": [base, *(f"distill.teachers.{name}.path={folder / name}" for name in ("t2i", "edit"))],
        "arena": [f"evaluation.models.{name}={folder / name}" for name in ("base", "t2i", "edit", "mix", "student")],
    }
    graphs = f"run.graphs={'true' if run_device(device).type == 'cuda' else 'false'}"
    common = [f"run.seed={seed}", f"run.device={device}", graphs]
    return {
        stage: configuration.load(
            STAGES[stage][0],
            configs() / f"digits/{STAGES[stage][1]}.yaml",
            [f"run.out={folder / stage}", *common, *own, *overrides.get(stage, ())],
        )
        for stage, own in wired.items()
    }


class Clock:
    """Seconds per stage, added up over runs that were interrupted (a killed one loses its last stage's)."""

    def __init__(self, path: Path, quiet: bool = True):
        self.path, self.quiet = path, quiet
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.base_from_cache: bool = known.get("base_from_cache", False)

    def write(self) -> None:
        write_json(self.path, {"seconds": self.seconds, "base_from_cache": self.base_from_cache})

    def stage(self, name: str):
        return _Stage(self, name)

    def total(self) -> float:
        return round(sum(self.seconds.values()), 1)


class _Stage:
    def __init__(self, clock: Clock, name: str):
        self.clock, self.name = clock, name

    def __enter__(self):
        self.begun = time.monotonic()
        if not self.clock.quiet:
            print(f"{self.name}:", flush=True)

    def __exit__(self, *_):
        spent = self.clock.seconds.get(self.name, 0) + time.monotonic() - self.begun
        self.clock.seconds[self.name] = round(spent, 1)
        self.clock.write()


def train_readers(quiet: bool) -> None:
    """The rewards' and the judge's networks, each on its own part of the data."""
    from qirl.rewards.judge import held_out_judge
    from qirl.rewards.registry import own_rewards

    with Live("readers", 2, show=not quiet) as live:
        own_rewards("mixed")
        live.update(1, {})
        held_out_judge()
        live.update(2, {})


def train_base(config: configuration.PretrainConfig, quiet: bool) -> bool:
    """The base in config.run.out: continued there, copied from the cache (then True), or trained and put into the cache."""
    out, key = Path(config.run.out), base_key(config)
    found, begun = cache_folder() / f"digits-base-{key[:16]}", (out / "config.yaml").exists()
    mark = out.with_name(f"{out.name}.key")
    cached = found.is_dir() and not begun
    if cached:
        _copy(found, out)
    elif not begun:
        write_bytes(mark, key.encode())
    api.pretrain(config, quiet)
    if mark.exists() and mark.read_text() == key:  # one begun by other code is not what this code makes
        cached_folder("digits-base", key, lambda path: shutil.copytree(out, path, dirs_exist_ok=True))
    return cached


def base_key(config: configuration.PretrainConfig) -> str:
    """What decides the base's weights: its config (paths aside), the code that runs, built parts too, torch and its threads."""
    import torch

    import qirl
    from qirl.kernels import _native

    built = _native.library("cpu")
    native = hashlib.sha256(built.read_bytes()).hexdigest() if built.is_file() else ""

    plain = configuration.to_dict(config)
    plain["run"] = {k: v for k, v in plain["run"].items() if k not in ("out", "tracker", "keep")}
    return content_key(plain, qirl, _kernels(), native, torch.__version__, torch.get_num_threads())


def _kernels():
    import qirl.kernels

    return qirl.kernels


def _copy(source: Path, target: Path) -> None:
    """A whole folder or nothing."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)  # at most what a start before the first step left
    os.rename(temporary, target)


__all__ = ["quickstart"]
