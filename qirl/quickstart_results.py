"""What `qirl quickstart` finds at its end: every stage on both tasks, ratings, a picture and a table."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import numpy as np

from qirl.config import EvaluateConfig, Section
from qirl.evaluation.arena import ahead

TASKS = ("t2i", "edit")
STUDENT = "student"
DRAWN = 6  # prompts of each task in the picture


def evaluate_stages(recipes: Mapping[str, Section], quiet: bool) -> dict:
    """{"stages": {name: results at what it is for, "guidance", "by_guidance", "best_guidance"}, "elo", "elo_differences"}.

    The base is measured at all scales of the arena's config and plays at its best one; the others are measured at 1 and
    at the scale that they were made for, and play at that. Nothing that was found before is drawn again.
    """
    from qirl.evaluation.compare import compare, config_of
    from qirl.evaluation.evaluate import evaluate, known_results

    scales = {"base": 1.0, **made_for(recipes)}
    alone = config_of(at_scales(recipes["arena"], recipes["arena"].evaluation.guidance, scales), "base")
    scanned = known_results(alone) or evaluate(alone, quiet=quiet)
    scales["base"] = float(best_of(scanned))
    found = compare(at_scales(recipes["arena"], (1.0,), scales), quiet=quiet)
    stages = {}
    for name, own in found["models"].items():
        own = {scale: row for scale, row in sorted({**scanned, **own}.items(), key=_scale)} if name == "base" else own
        best = float(best_of(own))
        own = {scale: {k: v for k, v in row.items() if k != "by_prompt"} for scale, row in own.items()}
        stages[name] = own[f"{scales[name]:g}"] | {"guidance": scales[name], "best_guidance": best, "by_guidance": own}
    return {"stages": stages, **elo_of(found["arena"])}


def _scale(item: tuple[str, dict]) -> float:
    return float(item[0])


def best_of(results: Mapping[str, dict]) -> str:
    """The scale at which the judge accepts most images."""
    return max(results, key=lambda scale: results[scale]["judge_accuracy"])


def made_for(recipes: Mapping[str, Section]) -> dict[str, float]:
    """The guidance scale of each trained model: what distillation takes a teacher at, what RL drew with, none."""
    teachers = recipes[STUDENT].distill.teachers
    return {**{name: teachers[name].guidance for name in TASKS}, "mix": recipes["mix"].flow.guidance, STUDENT: 1.0}


def at_scales(arena: EvaluateConfig, guidance: tuple[float, ...], scales: Mapping[str, float]) -> EvaluateConfig:
    """The arena's config with every model measured at `guidance` and playing at `scales`."""
    evaluation = arena.evaluation.model_copy(update={"guidance": tuple(guidance)})
    options = arena.arena.model_copy(update={"guidance": dict(scales)})
    return arena.model_copy(update={"evaluation": evaluation, "arena": options})


def elo_of(arena: Mapping) -> dict:
    """{"elo": {"overall" or task: {model: {"rating", "low", "high", "guidance"}}}, "elo_differences": {"overall" or task:
    {"student - OTHER": {"value", "low", "high"}}}}, intervals of 95 %, of what `compare` found."""
    scopes = {"overall": arena, **{task: arena["by_task"][task] for task in TASKS if task in arena["by_task"]}}
    ratings = {
        scope: {
            name: {key: row[key] for key in ("rating", "low", "high")} | {"guidance": arena["guidance"][name]}
            for name, row in own["elo"].items()
        }
        for scope, own in scopes.items()
    }
    differences = {
        scope: {
            f"{STUDENT} - {name}": ahead(own["differences"], STUDENT, name) for name in own["elo"] if name != STUDENT
        }
        for scope, own in scopes.items()
    }
    return {"elo": ratings, "elo_differences": differences}


def picture(recipes: Mapping[str, Section], stages: Mapping[str, dict]):
    """Held-out prompts of both tasks: the sources of edits, then what base, teachers and student make of the same noise."""
    from qirl.evaluation.evaluate import balanced
    from qirl.run.plots import compared
    from qirl.world import make_world

    arena = recipes["arena"]
    everything = make_world(arena.world).data.prompts("held_out")
    own = {
        task: [p for p, _ in balanced([p for p in everything if p.task == task and len(p.sources) < 2], DRAWN, 0)]
        for task in TASKS
    }
    prompts = own["t2i"] + own["edit"]
    best = stages["base"]["guidance"]
    teachers = np.concatenate([drawn(arena, task, own[task], stages[task]["guidance"]) for task in TASKS])
    blocks = {"base\nno guidance": drawn(arena, "base", prompts, 1.0)}
    blocks |= {f"base\nguidance {best:g}": drawn(arena, "base", prompts, best)} if best != 1 else {}
    guided = {f"{stages[task]['guidance']:g}" for task in TASKS} - {"1"}
    blocks["teachers" + (f"\nguidance {' and '.join(sorted(guided))}" if guided else "")] = teachers
    blocks[f"{STUDENT}\nno guidance"] = drawn(arena, STUDENT, prompts, 1.0)
    blank = np.full_like(teachers[0], 255)
    sources = np.stack([p.sources[0] if p.sources else blank for p in prompts])
    return compared({"source": sources, **blocks}, [p.text for p in prompts])


def drawn(arena: EvaluateConfig, name: str, prompts, guidance: float) -> np.ndarray:
    """One image per prompt, uint8 [n, H, W, 3], of a model of the arena; the noise is the same for all of them."""
    from qirl.evaluation.compare import config_of
    from qirl.evaluation.evaluate import draw, open_model
    from qirl.world import make_world

    config, family = config_of(arena, name), make_world(arena.world, device=arena.run.device).family
    flow = config.flow.model_copy(update={"steps": config.evaluation.steps, "guidance": guidance})
    model, listed = open_model(config, family, [guidance]), [(p, 0) for p in prompts]
    images = draw(model, family, listed, 1, flow, 1, config.evaluation.batch_tokens)
    return np.stack([image for (image,) in images])


def print_table(summary: Mapping) -> None:
    """A row per model, two for a base that guidance makes better; within 100 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{summary['seconds']:.0f} s; held-out prompts and fresh noise; ± and ranges are 95 % intervals"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    columns = ("guidance", *(f"judge {task}" for task in TASKS), *(f"Elo {task}" for task in TASKS), "diversity")
    for column in ("stage", *columns):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for name, stage in summary["stages"].items():
        for guidance in sorted({1.0, stage["guidance"]} if name == "base" else {stage["guidance"]}):
            row, plays = stage["by_guidance"][f"{guidance:g}"], guidance == stage["guidance"]
            judged = [_share(row["by_task"][task]["judge_accuracy"]) for task in TASKS]
            rated = [_rating(summary["elo"][task][name]) if plays else "" for task in TASKS]
            table.add_row(name, f"{guidance:g}", *judged, *rated, f"{row['diversity']:.3f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _share(value: Mapping) -> str:
    half = math.nan if value["low"] is None else (value["high"] - value["low"]) / 2
    return f"{value['value']:.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")


def _rating(row: Mapping) -> str:
    interval = "" if row["low"] == row["high"] else f" ({row['low']:.0f}–{row['high']:.0f})"
    return f"{row['rating']:.0f}{interval}"
