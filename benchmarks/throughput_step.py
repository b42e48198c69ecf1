"""One RL step of a setting by the trainer's own functions, phase by phase: what it costs in FLOPs, seconds and memory.

MFU = (FLOPs of the phase) / (seconds x peak of the GPU). FLOPs, by qirl.costs: of a forward, 2 x weights x tokens for every
linear layer and 4 x width for every (query, key) pair of every block; of a backward, twice that where all weights are
trained, once where the base is frozen (gradients of the inputs alone), and for adapters 2 x 3 x weights x tokens of both. What
activation checkpointing runs again is not counted. The peak is that of dense products in 16 bits (989 TFLOP/s on H100 and
H200), for FP8 too, so that rows compare; in float32 that of products without TF32.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from throughput_cases import Drawn, Setting, model_dtype, prompts, random_model

from qirl.config import TrainConfig
from qirl.costs import Flops, forward_flops, training_flops
from qirl.engine import Engine
from qirl.errors import UserError
from qirl.families import targets_of
from qirl.flow.rollout import with_negatives
from qirl.packing import Target, cut, pack
from qirl.parallel.data import gathered
from qirl.policy.packs import Pair, lay_out
from qirl.policy.trainer import Trainer, sample, update
from qirl.policy.update import Experience

PEAKS = {"H100": (989e12, 67e12), "H200": (989e12, 67e12), "A100": (312e12, 19.5e12)}  # 16 bits, float32
GIB = 2**30
CORE = ("rollout", "update")  # the phases that a step consists of
FORWARD = 8  # images of the forward that is measured beside them


def peak_of(gpu: str | None, dtype: str) -> float | None:
    """FLOP/s of a GPU by its name, dense; None where it is not known."""
    for name, (half, single) in PEAKS.items():
        if gpu and name in gpu and "PCIe" not in gpu and "NVL" not in gpu:
            return single if dtype == "float32" else half
    return None


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large product on this machine, what any model here can hope for."""
    side = 8192 if device == "cuda" else 512
    x = torch.randn(side, side, device=device, dtype=dtype)
    spent, _ = timed({"product": lambda: x @ x}, device, 10)
    return 2 * side**3 / statistics.median(spent["product"])


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Gives memory that nothing holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass
class Phase:
    """What one phase runs, and the tokens that it sends through the transformer with their FLOPs."""

    run: Callable[[], object]
    flops: Flops = Flops()
    tokens: int = 0


class Step:
    """The run of a setting, opened: a trainer on a model of random weights. Use as a context: it leaves nothing behind."""

    def __init__(self, setting: Setting, device: str):
        self.setting, self.device = setting, device
        self.folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Step:
        setting = self.setting
        try:
            self.config = config = setting.config(str(Path(self.folder.name, "run")))
            self.architecture = setting.architecture()
            self.family = Drawn(
                setting, self.architecture, torch.bfloat16 if setting.dtype == "bfloat16" else torch.float32
            )

            def build(sharding, master: torch.dtype):
                return random_model(self.architecture, config, sharding.ranks.device, model_dtype(config, master))

            lora, frozen = bool(config.model.lora.rank), config.model.frozen
            self.engine = Engine.around(build, config, config.model.dtype, lora=lora, frozen=frozen)
        except BaseException:
            self.folder.cleanup()
            raise
        self.model = self.engine.model
        self.trainer = Trainer(config, self.engine, self.family, (), None, None, guided=True)
        self.number, self.experience = 0, None
        return self

    def __exit__(self, *_) -> None:
        self.engine.close()
        self.folder.cleanup()
        for name in ("engine", "model", "trainer", "experience", "family"):
            setattr(self, name, None)
        release()

    # phases

    def rollout(self) -> Experience:
        """Draws the step's images and gives them advantages at random, as rewards would."""
        exp, self.slots = sample(self.trainer, prompts(self.setting), self.number)
        generator = torch.Generator().manual_seed(self.number)
        exp.advantage = torch.randn(len(exp.targets), generator=generator)
        exp.valid = torch.ones(len(exp.targets), dtype=torch.bool)
        exp.valid_by_slot = torch.full((self.setting.prompts,), self.setting.group)
        self.experience, self.number = exp, self.number + 1
        return exp

    def update(self) -> dict:
        """Objective, backward and optimizer step on the images of the last rollout."""
        return update(self.trainer, self.experience, self.slots, self.number)

    def forward(self) -> Phase:
        """One pass without gradient over a pack of a prompt with FORWARD images: the transformer alone."""
        count, (prompt, _) = min(FORWARD, self.setting.group), prompts(self.setting)[0]
        conditions, targets = [self.family.condition(prompt)], [Target(0, *self.setting.grid)] * count
        body, device = pack(conditions, targets, device=self.engine.ranks.device), self.engine.ranks.device
        x = torch.randn(body.target_tokens, self.architecture.in_channels).to(device)
        t = torch.linspace(0.1, 0.9, count).to(device)

        @torch.no_grad()
        def run():
            with gathered(self.model):
                self.model(body, x, t)

        return Phase(run, forward_flops(self.architecture, body), body.tokens)

    def phases(self) -> dict[str, Phase]:
        """Those of a step, in their order."""
        shape = self.setting, self.config, self.family
        rollout, update = rollout_cost(*shape), update_cost(*shape, self.model)
        return {"rollout": Phase(self.rollout, *rollout), "update": Phase(self.update, *update)}


def rollout_cost(setting: Setting, config: TrainConfig, family: Drawn) -> tuple[Flops, int]:
    """FLOPs and tokens of all prefills and steps, unconditional ones included."""
    flow, everyone = config.flow, [prompt for prompt, _ in prompts(setting)]
    guided, targets = flow.guidance != 1, targets_of(family, everyone, setting.group)
    flops, tokens = Flops(), 0
    for run in cut([t.tokens * (1 + guided) for t in targets], flow.rollout_tokens, "flow.rollout_tokens"):
        used = sorted({targets[i].prompt for i in run})
        own = [Target(used.index(targets[i].prompt), *setting.grid) for i in run]
        conditions, twins = [family.condition(everyone[i]) for i in used], []
        if guided:
            conditions, twins = with_negatives(conditions, own, [family.negative(everyone[i]) for i in used])
        body, prefill = pack(conditions, [*own, *twins]), pack(conditions, [])
        steps = body.without_prefix()
        flops += forward_flops(family.architecture, prefill) + forward_flops(family.architecture, steps) * flow.steps
        tokens += (prefill.tokens if prefill else 0) + steps.tokens * flow.steps
    return flops, tokens


def update_cost(setting: Setting, config: TrainConfig, family: Drawn, model) -> tuple[Flops, int]:
    """FLOPs of forward and backward of all packs, and their tokens; checkpointing's second forward not counted.

    model: the run's, with its adapters; None leaves those out.
    """
    everyone = [prompt for prompt, _ in prompts(setting)]
    targets = targets_of(family, everyone, setting.group)
    pairs = [Pair(i, node, t.prompt, t.height, t.width) for i, t in enumerate(targets) for node in range(setting.nodes)]
    guided = config.guidance.scope == "both" and config.flow.guidance != 1
    layouts = lay_out(
        [family.condition(p) for p in everyone], pairs, config.policy.micro_tokens, lambda seam, packs: (seam, packs),
        [family.negative(p) for p in everyone] if guided else (),
    )  # fmt: skip
    flops, tokens = Flops(), 0
    for layout in layouts:
        bodies = [layout.body(members, "cpu") for members in layout.packs]
        bodies += [layout.prefix("cpu")] if layout.seam else []
        flops += sum((forward_flops(family.architecture, body) for body in bodies), Flops())
        tokens += sum(body.tokens for body in bodies)
    whole = flops * 3 if model is None else training_flops(config, model, flops, tokens)
    return whole * config.policy.epochs, tokens


def step_flops(setting: Setting) -> int:
    """About how many FLOPs one step takes, for a guess of its time: nothing is made on the device."""
    config, family = setting.config("unused"), Drawn(setting, setting.architecture(), torch.float32)
    costs = rollout_cost(setting, config, family), update_cost(setting, config, family, None)
    return sum(flops.as_dict()["total"] for flops, _ in costs)


def measure(setting: Setting, device: str, repetitions: int, peak: float | None, look: Callable | None = None) -> dict:
    """The row of a setting, measured; see the module's docstring. look(step, phases, medians): adds to it while all is open.

    Raises UserError for what the setting cannot be run with.
    """
    begun = time.perf_counter()
    with Step(setting, device) as step:
        built = time.perf_counter() - begun
        phases = step.phases() | {"forward": step.forward()}
        spent, memory = timed({name: phase.run for name, phase in phases.items()}, device, repetitions)
        trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        row = {
            "build_s": built, "clock": clock(device).__name__, "parameters": sum(p.numel() for p in step.model.parameters()),
            "trained_parameters": trained,
        }  # fmt: skip
        row |= numbers(setting, phases, spent, memory, peak)
        if look:
            row |= look(step, phases, row["median_s"])
    return row


def clock(device: str) -> Callable[[], float]:
    """Wall time; with one thread of a CPU the process's own time, which others on the machine disturb least."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def timed(runs: dict[str, Callable], device: str, repetitions: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every run, by turns so that what disturbs one disturbs all, and the most bytes that each allocated.

    The first round is not counted.
    """
    now, spent, memory = clock(device), {name: [] for name in runs}, dict.fromkeys(runs, 0)
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            finish(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun = now()
            run()
            finish(device)
            if repetition:
                spent[name].append(now() - begun)
            if device == "cuda":
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated())
    return spent, memory


def numbers(setting: Setting, phases: dict[str, Phase], spent: dict, memory: dict, peak: float | None) -> dict:
    """What a row says of measured seconds (a list a phase) and bytes."""
    middle = {name: statistics.median(own) for name, own in spent.items()}
    core = {name: middle[name] for name in CORE}
    rate = {name: phase.flops.as_dict()["total"] / middle[name] for name, phase in phases.items()}
    return {
        "images_per_s": setting.images / sum(core.values()),
        "tokens_per_s": sum(phases[name].tokens for name in CORE) / sum(core.values()),
        "pairs_per_s": setting.images * setting.nodes / middle["update"],
        "tflops": {name: value / 1e12 for name, value in rate.items()},
        "mfu": {name: value / peak for name, value in rate.items()} if peak else None,
        "share": {name: value / sum(core.values()) for name, value in core.items()},
        "peak_gib": {name: value / GIB for name, value in memory.items()} if any(memory.values()) else None,
        "median_s": middle,
        "seconds": spent,
    }


def refused(problem: Exception) -> str:
    """One line on why a setting has no numbers."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory; use a smaller micro or batch, checkpointing=block, base=int8 or fewer layers"
    return str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}".splitlines()[0]
