"""The main job: a small base learns to draw handwriting, RL improves it, a report shows it. No network, no GPU.

    OUT/base        pretraining (cached by the content of its config and of the code that makes it)
    OUT/t2i         RL from that base
    OUT/summary.json, OUT/report.html, OUT/before_after.png

Every stage is a command of its own on configs/digits/; started again, the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qirl import config as configuration
from qirl.errors import UserError
from qirl.paths import configs
from qirl.run.cache import cached_folder, content_key
from qirl.run.cache import folder as cache_folder
from qirl.run.folder import read_config, write_json
from qirl.run.progress import Live

PAIRS = 10  # prompts of the before/after picture


def quickstart(
    out: str = "runs/quickstart",
    seed: int = 0,
    quiet: bool = False,
    overrides: Mapping[str, Sequence[str]] | None = None,
) -> dict:
    """Runs all stages and returns the summary; prints a table and the report's path unless `quiet`.

    overrides: per kind of config ("pretrain", "train", "evaluate") options over those of configs/digits/. Raises UserError if `out` cannot be written or holds the stages of another seed or config.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); choose another --out folder") from None
    clock, given = Clock(folder / "quickstart.json"), overrides or {}
    with clock.stage("readers"):
        train_readers(quiet)
    with clock.stage("base"):
        base, cached = train_base(folder / "base", seed, quiet, given.get("pretrain", ()))
    clock.base_from_cache |= cached
    with clock.stage("t2i"):
        t2i = train_t2i(folder / "t2i", base, seed, quiet, given.get("train", ()))
    with clock.stage("evaluation"):
        summary = {"stages": evaluate_stages({"base": base, "t2i": t2i}, quiet, given.get("evaluate", ()))}
    with clock.stage("report"):
        picture(base, t2i, summary["stages"]["t2i"]["guidance"]).save(folder / "before_after.png")
        facts = {"seed": seed, "base_from_cache": clock.base_from_cache}
        summary = {"seconds": clock.total(), "seconds_by_stage": clock.seconds, **facts, **summary}
        from qirl.run.report import write_report

        report = write_report(folder / "report.html", {"base": base, "t2i": t2i}, summary)
    summary["seconds"] = clock.total()
    write_json(folder / "summary.json", summary)
    if not quiet:
        print_table(summary)
        print(f"report: {report}")
    return summary


class Clock:
    """Seconds per stage, added up over runs that were interrupted (a killed one loses its last stage's)."""

    def __init__(self, path: Path):
        self.path = path
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

    def __exit__(self, *_):
        spent = self.clock.seconds.get(self.name, 0) + time.monotonic() - self.begun
        self.clock.seconds[self.name] = round(spent, 1)
        self.clock.write()


def train_readers(quiet: bool) -> None:
    """The reward's and the judge's reader, each on its own part of the data."""
    from qirl.config_sections import World
    from qirl.data.world import make_world

    world = make_world(World())
    with Live("readers", 2, show=not quiet) as live:
        world.rewards()
        live.update(1, {})
        world.judge()
        live.update(2, {})


def train_base(out: Path, seed: int, quiet: bool, overrides: Sequence[str] = ()) -> tuple[Path, bool]:
    """The base in `out`: continued there, copied from the cache (then True), or trained and put into the cache."""
    from qirl.pretraining import pretrain

    own = [f"run.out={out}", f"run.seed={seed}", *overrides]
    config = configuration.load("pretrain", configs() / "digits/pretrain.yaml", own)
    key = base_key(config)
    found = cache_folder() / f"digits-base-{key[:16]}"
    cached = found.is_dir() and not (out / "config.yaml").exists()
    if cached:
        _copy(found, out)
    pretrain(config, quiet)
    cached_folder("digits-base", key, lambda path: shutil.copytree(out, path, dirs_exist_ok=True))
    return out, cached


def base_key(config: configuration.PretrainConfig) -> str:
    """What decides the base's weights: its config (paths aside), the code that runs, torch and its threads."""
    import torch

    import qirl

    plain = configuration.to_dict(config)
    plain["run"] = {k: v for k, v in plain["run"].items() if k not in ("out", "tracker", "keep")}
    return content_key(plain, qirl, _kernels(), torch.__version__, torch.get_num_threads())


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


def train_t2i(out: Path, base: Path, seed: int, quiet: bool, overrides: Sequence[str] = ()) -> Path:
    from qirl.policy.trainer import train

    own = [f"run.out={out}", f"run.seed={seed}", f"model.path={base / 'model'}", *overrides]
    train(configuration.load("train", configs() / "digits/t2i.yaml", own), quiet=quiet)
    return out


def evaluate_stages(runs: dict[str, Path], quiet: bool, overrides: Sequence[str] = ()) -> dict:
    """Every stage at the guidance RL trained for; the base at all scales, the others also at its best one."""
    trained_at = read_config(runs["t2i"] / "config.yaml")["flow"]["guidance"]
    stages, best = {}, None
    for name, run in runs.items():
        scan = (
            [] if best is None else [f"evaluation.guidance=[{', '.join(f'{g:g}' for g in sorted({trained_at, best}))}]"]
        )
        results = evaluate_run(run, [*overrides, *scan], quiet)
        if best is None:
            best = float(max(results, key=lambda g: results[g]["judge_accuracy"]))
        stages[name] = {
            "guidance": trained_at,
            **results[f"{trained_at:g}"],
            "best_guidance": best,
            "by_guidance": results,
        }
    return stages


def evaluate_run(run: Path, overrides: list[str], quiet: bool) -> dict:
    """The evaluation of a finished run, kept in its folder; done again only if it was of another config."""
    from qirl.evaluation.evaluate import evaluate, known_results

    overrides = [f"run.out={run}", f"model.path={run / 'model'}", *overrides]
    config = configuration.load("evaluate", configs() / "digits/evaluate.yaml", overrides)
    return known_results(config) or evaluate(config, quiet)


def picture(base: Path, t2i: Path, guidance: float):
    """The same held-out prompts and noise before and after RL."""
    from qirl.data.digits import prompts
    from qirl.evaluation.evaluate import balanced, sample
    from qirl.run.plots import before_after

    texts = [p.text for p, _ in balanced(prompts("held_out"), PAIRS, 0)]
    images = [sample(str(run), texts, guidance=guidance, steps=10, seed=1) for run in (base, t2i)]
    return before_after(*images, texts)


def print_table(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['seconds']:.0f} s, held-out prompts and fresh noise")
    for column in ("stage", "guidance", "judge accuracy", "digit", "attribute", "ink", "diversity"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in summary["stages"].items():
        for guidance, row in stage["by_guidance"].items():
            rewards = [f"{row['rewards'][c]:.3f}" for c in ("digit", "attribute", "ink")]
            accuracy = f"{row['judge_accuracy']:.3f} ± {row['judge_accuracy_se']:.3f}"
            table.add_row(name, guidance, accuracy, *rewards, f"{row['diversity']:.3f}")
    Console().print(table)


__all__ = ["quickstart"]
