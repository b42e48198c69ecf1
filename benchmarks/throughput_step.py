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
from qirl.policy.packs import Pair, lay_out
from qirl.policy.trainer import Trainer, sample, update
from qirl.policy.update import Experience

PEAKS = {"H100": (989e12, 67e12), "H200": (989e12, 67e12), "A100": (312e12, 19.5e12)}  # 16 bits, float32
GIB = 2**30


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
    return 2 * side**3 / statistics.median(seconds_of(lambda: x @ x, device, 10))


def seconds_of(run: Callable[[], object], device: str, times: int) -> list[float]:
    """Wall time of each run but a first one, until the device is done."""
    spent = []
    for repetition in range(times + 1):
        finish(device)
        begun = time.perf_counter()
        run()
        finish(device)
        if repetition:
            spent.append(time.perf_counter() - begun)
    return spent


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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

            def build(device, master: torch.dtype):
                return random_model(self.architecture, config, device, model_dtype(config, master))

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
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

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

    def phases(self) -> dict[str, Phase]:
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


def measure(setting: Setting, device: str, repetitions: int, peak: float | None) -> dict:
    """The row of a setting, measured; see the module's docstring. Raises UserError for what it cannot be run with."""
    begun = time.perf_counter()
    with Step(setting, device) as step:
        built = time.perf_counter() - begun
        phases = step.phases()
        spent: dict[str, list[float]] = {name: [] for name in phases}
        memory = dict.fromkeys(phases, 0)
        for repetition in range(repetitions + 1):
            for name, phase in phases.items():
                seconds, bytes_ = _once(phase.run, device)
                memory[name] = max(memory[name], bytes_)
                if repetition:
                    spent[name].append(seconds)
        parameters = [p.numel() for p in step.model.parameters()]
        trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    return {"build_s": built, "parameters": sum(parameters), "trained_parameters": trained} | numbers(
        setting, phases, spent, memory, peak
    )


def _once(run: Callable[[], object], device: str) -> tuple[float, int]:
    """Seconds of one run, and the most bytes that were allocated in it."""
    finish(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def numbers(setting: Setting, phases: dict[str, Phase], spent: dict, memory: dict, peak: float | None) -> dict:
    """What a row says of measured seconds (a list a phase) and bytes."""
    middle = {name: statistics.median(own) for name, own in spent.items()}
    core = middle["rollout"] + middle["update"]
    rate = {name: phases[name].flops.as_dict()["total"] / middle[name] for name in ("rollout", "update")}
    return {
        "images_per_s": setting.images / core,
        "images_per_s_whole": setting.images / sum(middle.values()),
        "tokens_per_s": sum(p.tokens for p in phases.values()) / core,
        "pairs_per_s": setting.images * setting.nodes / middle["update"],
        "tflops": {name: value / 1e12 for name, value in rate.items()},
        "mfu": {name: value / peak for name, value in rate.items()} if peak else None,
        "share": {name: value / sum(middle.values()) for name, value in middle.items()},
        "peak_gib": {name: value / GIB for name, value in memory.items()} if any(memory.values()) else None,
        "seconds": spent,
    }


def refused(problem: Exception) -> str:
    """One line on why a setting has no numbers."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory; use a smaller micro or batch, checkpointing=block, base=int8 or fewer layers"
    return str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}".splitlines()[0]
