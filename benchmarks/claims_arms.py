"""The arms behind the claims: which run differs from the recipes of configs/digits/ in what, and for how many steps.

Everything comes from those configs; an arm says only what defines it. Compute is equal: an arm may spend the FLOPs that
`qirl.plan` counts for its reference (a teacher, both teachers for Mix-RL, the student for students).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from arms import Arm, Job

from qirl import config as configuration
from qirl.config import DistillConfig
from qirl.config_sections import Section
from qirl.paths import find_config
from qirl.plan import plan
from qirl.quickstart_results import best_of, made_for

GUIDANCE = 2.0  # of the arms on the scope of guidance, where the recipe itself has none
BASE_SCALES = (1.0, 2.0, 3.0, 4.0)  # at one of these the base is taken to be best
QUARTERS = (1, 2, 3)  # of a run, at which its checkpoint is evaluated
GROUPS = {"t2i": 88, "edit": 88, "mixed": 176}  # evaluated prompts: x 6 images, 528 of each task

COMMANDS = {"base": "pretrain", "curate": "curate", "calibrate": "calibrate"}
STUDENTS = {
    "student": (),
    "student_of_base": (),
    "student_one_node": ("distill.nodes=1", "distill.power=0"),  # any node alike, as the dense student's
}
RL = {  # arm: the config it varies, and how
    "t2i": ("t2i", ()),
    "edit": ("edit", ()),
    "mix": ("mix", ()),
    "t2i_shuffled": ("t2i", ("advantage.shuffle=true",)),
    "edit_shuffled": ("edit", ("advantage.shuffle=true",)),
    "scope_rollout": ("t2i", ("guidance.scope=rollout",)),
    "scope_both": ("t2i", ("guidance.scope=both",)),
    "scope_none": ("t2i", ("guidance.scope=none", "flow.guidance=1")),
    "all_nodes": ("t2i", ("policy.timesteps.power=0", "policy.timesteps.skip_last=0")),
    "unfiltered": ("t2i", ()),
    "one_vector": ("t2i", ()),
}
BUDGET = {"edit": ("edit",), "mix": ("t2i", "edit"), "t2i": ("t2i",)}  # the references of an RL config
TRACKED = ("t2i", "all_nodes")  # whose checkpoints are evaluated
SCOPES = ("scope_rollout", "scope_both", "scope_none")
PLAYERS = ("base", "t2i", "edit", "mix", "student", "student_of_base")

CLAIMS = {  # what is evaluated for each claim
    1: ("base", "t2i", "t2i_shuffled", *SCOPES),
    2: ("base", "t2i_shuffled", *TRACKED, *(f"{name}_quarter_{k}" for name in TRACKED for k in QUARTERS)),
    3: ("base", "t2i", "t2i_shuffled", "unfiltered"),
    4: ("base", "t2i", "t2i_shuffled", "one_vector"),
    5: (*PLAYERS, "t2i_shuffled", "edit_shuffled"),
    6: ("base", "student_of_base", "student", "student_one_node"),
}


@dataclass(frozen=True)
class Study:
    """Where the arms lie and what all of them share; overrides: options over those of a config, by its name."""

    out: Path
    scale: float = 1.0
    threads: int = 1
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)


def step_flops(config: Section) -> float:
    """FLOPs of a training step by `qirl.plan`; of a distillation, of a step with the average teacher."""
    total = {name: own["total"] for name, own in plan(config)["flops"].items()}
    if not isinstance(config, DistillConfig):
        return float(sum(total.values()))
    teachers = config.distill.teachers
    cost = sum(
        own.share * (total[f"student, teacher {name}"] + total[f"teacher {name}"]) for name, own in teachers.items()
    )
    return cost / sum(own.share for own in teachers.values())


def scope_of(recipe: Section) -> str:
    """Where the guidance of an RL recipe acts."""
    return "none" if recipe.flow.guidance == 1 else recipe.guidance.scope


def scope_guidance(recipe: Section) -> float:
    return recipe.flow.guidance if recipe.flow.guidance > 1 else GUIDANCE


class Seed:
    """All arms of one seed. Methods that load a config work before anything ran; those that count FLOPs do not."""

    def __init__(self, study: Study, seed: int):
        self.study, self.seed = study, seed
        self.folder = study.out / f"seed_{seed}"
        self.recipe = cache(self._recipe)
        self.steps = cache(self._steps)
        self.flops = cache(lambda name: step_flops(self._load(name)))

    def _recipe(self, config: str) -> Section:
        """configs/digits/CONFIG.yaml of an RL or distillation command with the study's options."""
        kind = "distill" if config == "distill" else "train"
        return configuration.load(kind, find_config(f"digits/{config}"), self._options(config))

    def _options(self, config: str) -> list[str]:
        return list(self.study.overrides.get(config, ()))

    def alias(self, name: str) -> str:
        """The arm that `name` is: the recipe's own scope of guidance needs no second run."""
        return "t2i" if name == f"scope_{scope_of(self.recipe('t2i'))}" else name

    def path(self, name: str) -> Path:
        return self.folder / self.alias(name)

    def guidance(self, name: str) -> float:
        """The scale that an arm draws with in training; of a student 1."""
        if name in ("scope_rollout", "scope_both"):
            return scope_guidance(self.recipe("t2i"))
        return self.recipe(RL[name][0]).flow.guidance if name in RL and name != "scope_none" else 1.0

    def taught(self, task: str) -> float:
        """The scale at which the task's teacher is distilled."""
        return self.recipe("distill").distill.teachers[task].guidance

    def task(self, name: str) -> str:
        """The task of an arm's evaluation. The players of the arena answer both."""
        if name in PLAYERS or name in STUDENTS:
            return "mixed"
        return "edit" if name in RL and RL[name][0] == "edit" else "t2i"

    def scales(self, name: str) -> list[float]:
        """The guidance scales at which an arm is evaluated."""
        scope = scope_guidance(self.recipe("t2i"))
        if name == "base":
            rolled = [self.guidance(teacher) for teacher in ("t2i", "edit", "mix")]
            return sorted({*BASE_SCALES, scope, *rolled})
        if "_quarter_" in name:
            return [self.guidance(name.split("_quarter_")[0])]
        wanted = {1.0, self.guidance(name)}
        wanted |= {scope} if name in ("t2i", "t2i_shuffled", *SCOPES) else set()
        wanted |= {self.taught(name)} if name in ("t2i", "edit") else set()
        return sorted(wanted)

    def command(self, name: str) -> tuple[str, str, list[str]]:
        """Kind, config and overrides of a run, without its number of steps."""
        base = f"model.path={self.path('base')}"
        shared = [f"run.out={self.path(name)}", f"run.seed={self.seed}", f"run.threads={self.study.threads}"]
        if name in STUDENTS:
            teachers = {task: self.path("base" if name == "student_of_base" else task) for task in ("t2i", "edit")}
            own = [base, *(f"distill.teachers.{task}.path={path}" for task, path in teachers.items()), *STUDENTS[name]]
            return "distill", "distill", [*shared, *own, *self._options("distill")]
        if name not in RL:
            own = {"base": [], "curate": [base], "calibrate": [base, f"calibrate.ledger={self.path('curate')}"]}[name]
            config = "pretrain" if name == "base" else name
            return COMMANDS[name], config, [*shared, "world.task=mixed", *own, *self._options(config)]
        config, sets = RL[name]
        own = [base]
        curated = "everything" if name == "unfiltered" else "curate"
        weighed = "one_vector_weights" if name == "one_vector" else "calibrate"
        own += [
            f"world.prompts={self.path(curated) / 'curated.jsonl'}",
            f"advantage.calibration={self.path(weighed) / 'calibration.json'}",
            "advantage.weights={}",
        ]
        if name in ("scope_rollout", "scope_both"):
            own.append(f"flow.guidance={self.guidance(name)}")
        return "train", config, [*shared, *own, *self._options(config), *sets]

    def _load(self, name: str) -> Section:
        kind, config, overrides = self.command(name)
        return configuration.load(kind, find_config(f"digits/{config}"), overrides)

    def _steps(self, name: str) -> int:
        """Steps of an arm at equal compute; base, teachers and student take their config's, times the scale."""
        if name in ("base", "t2i", "edit", "student"):
            return max(1, round(self._load(name).run.steps * self.study.scale))
        references = ("student",) if name in STUDENTS else BUDGET[RL[name][0]]
        budget = sum(self.steps(own) * self.flops(own) for own in references)
        return max(1, round(budget / self.flops(name)))

    def quarter(self, name: str, k: int) -> int:
        """The step of the k-th checkpoint that is evaluated."""
        return min(k * self._between(name), self.steps(name))

    def _between(self, name: str) -> int:
        return max(1, round(self.steps(name) / 4))

    def _job(self, kind: str, config: str, overrides: Sequence[str], product: Path, repeats=False, **facts) -> Job:
        resolved = configuration.to_dict(configuration.load(kind, find_config(f"digits/{config}"), list(overrides)))
        resolved["run"] = {k: v for k, v in resolved["run"].items() if k not in ("out", "threads", "keep")}
        recipe = json.dumps([kind, resolved]).replace(str(self.study.out), "OUT")
        command = [sys.executable, "-m", "qirl", kind, f"digits/{config}", *overrides]
        return Job(command, product, recipe, facts, repeats)

    def run_job(self, name: str) -> Job:
        kind, config, overrides = self.command(name)
        if kind in ("curate", "calibrate"):
            product = {"curate": "curated.jsonl", "calibrate": "calibration.json"}[kind]
            return self._job(kind, config, overrides, self.path(name) / product)
        steps = self.steps(name)
        overrides = [*overrides, f"run.steps={steps}"]
        if name in TRACKED:
            overrides += [f"run.checkpoint_every={self._between(name)}", "run.keep=100"]
        product = self.path(name) / "model/config.json"
        return self._job(kind, config, overrides, product, steps=steps, flops=steps * self.flops(name))

    def evaluation(self, task: str) -> list[str]:
        """What all evaluations share, so that the arena knows those of its players."""
        shared = [f"run.threads={self.study.threads}", f"world.task={task}", f"evaluation.prompts={GROUPS[task]}"]
        return shared + self._options("evaluate")

    def evaluate_job(self, name: str) -> Job:
        scales = f"evaluation.guidance={self.scales(name)}"
        overrides = [*self.evaluation(self.task(name)), f"model.path={self.path(name)}", scales]
        return self._job("evaluate", "evaluate", overrides, self.path(name) / "evaluation.json", repeats=True)

    def playing(self) -> dict[str, float]:
        """The scale at which each player is in the arena: the base's best one, what teachers are distilled at."""
        found = json.loads((self.path("base") / "evaluation.json").read_text())["guidance"]
        others = made_for({"student": self.recipe("distill"), "mix": self.recipe("mix")})
        return {"base": float(best_of(found)), **others, "student_of_base": 1.0}

    def arena_job(self) -> Job:
        paths = {name: str(self.path(name)) for name in PLAYERS}
        alone = configuration.load("evaluate", find_config("digits/evaluate"), self.evaluation("mixed")).evaluation
        overrides = [
            f"run.out={self.path('arena')}",
            *self.evaluation("mixed"),
            *(f"evaluation.{name}={getattr(alone, name)}" for name in ("group", "steps", "seed", "batch_tokens")),
            "evaluation.guidance=[1.0]",
            f"evaluation.models={json.dumps(paths)}",
            f"arena.guidance={json.dumps(self.playing())}",
            *self._options("arena"),
        ]
        return self._job("evaluate", "arena", overrides, self.path("arena") / "arena.json", repeats=True)

    def tool_job(self, product: Path, *arguments) -> Job:
        words = [str(word) for word in arguments]
        command = [sys.executable, str(Path(__file__).with_name("claims_models.py")), *words]
        return Job(command, product, [word.replace(str(self.study.out), "OUT") for word in words], repeats=True)

    def export_job(self, name: str, k: int) -> Job:
        out = self.path(f"{name}_quarter_{k}")
        step = self.quarter(name, k)
        job = self.tool_job(out / "model/config.json", "export", self.path(name), step, out)
        return Job(job.command, job.product, job.recipe, {"steps": step}, True)

    def arms(self) -> dict[str, Arm]:
        """Every arm of this seed by its name, seed_S/NAME: runs, their evaluations (eval_NAME), drifts, the arena."""
        needs = {"base": (), "curate": ("base",), "calibrate": ("base", "curate")}
        needs |= {name: ("base", "curate", "calibrate") for name in RL if self.alias(name) == name}
        needs["unfiltered"] += ("everything",)
        needs["one_vector"] += ("one_vector_weights",)
        needs |= {name: ("base", "curate", "calibrate", "t2i", "edit") for name in STUDENTS}
        made = {name: (own, lambda name=name: self.run_job(name)) for name, own in needs.items()}
        tools = {"everything": ("curate", "curated.jsonl"), "one_vector_weights": ("calibrate", "calibration.json")}
        for name in TRACKED:
            for k in QUARTERS:
                made[f"{name}_quarter_{k}"] = ((name,), lambda name=name, k=k: self.export_job(name, k))
        for name in list(made):
            if name not in ("curate", "calibrate"):
                made[f"eval_{name}"] = ((name,), lambda name=name: self.evaluate_job(name))
        for name in dict.fromkeys(map(self.alias, (*SCOPES, "t2i_shuffled"))):
            out = self.path(name) / "drift.json"
            tool = lambda name=name, out=out: self.tool_job(out, "drift", self.path("base"), self.path(name), out)  # noqa: E731
            made[f"drift_{name}"] = (("base", name), tool)
        for name, (need, product) in tools.items():
            tool = lambda name=name, need=need, product=product: self.tool_job(  # noqa: E731
                self.path(name) / product, name, self.path(need), self.path(name) / product
            )
            made[name] = ((need,), tool)
        made["arena"] = (tuple(f"eval_{name}" for name in PLAYERS), self.arena_job)
        own = self.folder.name
        return {
            f"{own}/{name}": Arm(f"{own}/{name}", tuple(f"{own}/{need}" for need in needs), make)
            for name, (needs, make) in made.items()
        }

    def wanted(self, claims: Sequence[int]) -> list[str]:
        """The arms whose results these claims are about, in the order in which they should run."""
        names = [f"eval_{self.alias(name)}" for claim in claims for name in CLAIMS[claim]]
        names += [f"drift_{self.alias(name)}" for name in (*SCOPES, "t2i_shuffled") if 1 in claims]
        names += ["arena"] if 5 in claims else []
        return [f"{self.folder.name}/{name}" for name in dict.fromkeys(names)]
