"""What every training run shares: the model on its ranks, the optimizer, the run folder, and resuming bit for bit."""

from __future__ import annotations

import json
import math
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from qirl.config import DistillConfig, PretrainConfig, TrainConfig, to_dict
from qirl.config_parallel import Parallel
from qirl.config_rewards import Remote
from qirl.config_sections import Section
from qirl.errors import UserError
from qirl.families import Family
from qirl.flow.rollout import DTYPES
from qirl.models.adapters import save_adapter
from qirl.models.architecture import Transformer, recompute
from qirl.models.execution import compute_as, runner_of
from qirl.models.folders import WORLD_FILE, find_model
from qirl.models.graphs import Graphed
from qirl.models.lora import add_lora, merged_state, with_base
from qirl.models.quantised import LARGEST
from qirl.models.weights import Config, load_config, load_model, new_model, read_weights, save_model
from qirl.optim import Optimizer
from qirl.optim import check as check_optimizer
from qirl.parallel.apply import parallelise, sharding_of
from qirl.parallel.data import Ranks, agree, shard, start, world_size
from qirl.parallel.mesh import Degrees
from qirl.parallel.sharding import WHOLE, Sharding
from qirl.policy.weights import Weights
from qirl.run import checkpoint, lock
from qirl.run.folder import RunFolder, write_json
from qirl.run.logs import JsonLines
from qirl.run.progress import Live
from qirl.run.trackers import Trackers


def model_config(config: Section, family: Family) -> Config:
    """The architecture of a run's model, checked against its family."""
    if config.model.path is None:
        return family.architecture(config.model.architecture)
    found = load_config(find_model(config.model.path))
    family.fits(found)
    if hasattr(config, "flow"):
        family.suits(config.flow)
    return found


def build_model(config: Section, family: Family, sharding: Sharding, master: torch.dtype) -> Transformer:
    """The run's model on this rank's device: its parts of every weight."""
    device = sharding.ranks.device
    if config.model.path is not None:
        base, folder = config.model.base if config.model.base in LARGEST else None, find_model(config.model.path)
        return load_model(folder, master, device, variant=config.model.variant, base=base, sharding=sharding)
    model = new_model(model_config(config, family))
    initialise(model, config.run.seed)
    return sharding.cut(model).to(device, master)


def equip(model: Transformer, config: Section, sharding: Sharding = WHOLE) -> Transformer:
    """What a run puts on its model, in place: how it computes, activation checkpointing, the adapters of LoRA, and what
    tensor parallel ranks say to each other."""
    compute_as(model, config.model)
    recompute(model, config.model.checkpointing)
    lora = config.model.lora
    if lora.rank:
        add_lora(model, lora.rank, lora.alpha, lora.targets, config.run.seed)
        sharding.cut(model, adapters=True)
    return parallelise(model, sharding.ranks, parallel_of(config).sequence)


def parallel_of(config: Section) -> Parallel:
    """The layout of a run; runs without the section are data parallel."""
    return getattr(config, "parallel", Parallel())


def initialise(model: Transformer, seed: int) -> None:
    """Xavier weights from one seeded generator; blocks start as the identity (zero gates), the output at zero."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for name, parameter in model.named_parameters():
        if name in ("modulation.1.weight", "norm_out.linear.weight", "proj_out.weight"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter, generator=generator)


@dataclass
class Engine:
    """One training run on this rank."""

    config: PretrainConfig | TrainConfig | DistillConfig
    ranks: Ranks
    folder: RunFolder
    model: Transformer
    weights: Weights
    optimizer: Optimizer
    metrics: JsonLines
    scores: JsonLines
    trackers: Trackers | None = None  # opened by `resume`, which knows the step they go on from
    notes: dict = field(default_factory=dict)  # JSON-able facts that a run learns and a checkpoint keeps
    runner: Transformer | Graphed | None = None  # what is called as the model: itself, or its graphs
    sharding: Sharding = WHOLE

    def __post_init__(self):
        self.runner = self.runner or runner_of(self.model, self.config, self.ranks.grid is not None)

    @classmethod
    def open(cls, config: PretrainConfig | TrainConfig | DistillConfig, family: Family) -> Engine:
        """Checks what can be checked, then builds the model and opens (or re-opens) the run folder."""
        architecture, frozen = model_config(config, family), config.model.frozen
        Degrees.of(parallel_of(config), world_size()).check(architecture)

        def build(sharding: Sharding, master: torch.dtype) -> Transformer:
            model = build_model(config, family, sharding, DTYPES[config.model.dtype] if frozen else master)
            return equip(model, config, sharding)

        cut = partial(sharding_of, architecture)
        return cls.around(build, config, config.model.dtype, lora=bool(config.model.lora.rank), frozen=frozen, cut=cut)

    @classmethod
    def around(
        cls, build: Callable, config: Section, dtype: str, lora: bool = False, blocks: Callable | None = None,
        frozen: bool = False, cut: Callable | None = None,
    ):  # fmt: skip
        """The engine of the model that build(sharding, dtype of the weights) makes, sharded and in its run folder.

        dtype: a key of DTYPES, which it computes in. blocks(model): as `shard` takes them. frozen: the weights are in `dtype`
        already, apart from float32 adapters: one rank then needs no FSDP, which would keep a second copy of them. cut(ranks):
        the Sharding of tensor parallelism, None for a model that has none.
        """
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        half = DTYPES[dtype] == torch.bfloat16
        ranks = start(always_mesh=half and not frozen, device=config.run.device, parallel=parallel_of(config))
        sharding = cut(ranks) if cut else Sharding(ranks=ranks)
        check_optimizer(config.optimizer, ranks.device)
        values, out = to_dict(config), config.run.out
        fix = f"cannot write the run folder {out}; choose another out folder"
        rules = dict(free_keys=FREE_KEYS, rising_keys=RISING_KEYS, defaults=to_dict(type(config).model_construct()))
        check = partial(RunFolder.check, out, values, **rules)
        checkpoint.together(lambda: check() if ranks.first else None, fix)  # a refusal ends every rank
        model = build(sharding, torch.float32 if half else DTYPES[dtype])
        folders = []
        open_folder = partial(RunFolder.open, out, values, **rules)
        checkpoint.together(lambda: folders.append(open_folder(writer=ranks.first)), fix)
        folder = folders[0]
        shard(model, ranks, DTYPES[dtype], blocks(model) if blocks else None)
        weights = Weights(model, lora)
        optimizer = Optimizer(model, config.optimizer, config.run.steps, sharding=sharding)
        if config.optimizer.ema:
            weights.keep("ema")
        return cls(
            config,
            ranks,
            folder,
            model,
            weights,
            optimizer,
            JsonLines(folder.metrics),
            JsonLines(folder.scores),
            sharding=sharding,
        )

    def tensors(self) -> dict:
        """Everything of the run that a checkpoint must hold."""
        views = self.sharding.views
        copies = {name: views(copy) for name, copy in self.weights.copies.items() if name != "reference"}
        return {"weights": views(self.weights.current), "copies": copies, "adam": self.optimizer.tensors()}

    def save(self, step: int) -> None:
        extra = {"step": step, "notes": self.notes}
        checkpoint.save(self.folder.checkpoints, step, self.tensors(), extra, self.config.run.keep)

    def resume(self) -> int:
        """Loads the newest checkpoint, cuts the logs back to it, and returns its step (0 for a new run)."""
        newest = checkpoint.latest(self.folder.checkpoints)
        try:
            extra = checkpoint.load(newest, self.tensors()) if newest else {"step": 0, "notes": {}}
        except UserError:  # refused: the folder is left as it was
            lock.release(self.folder.path)
            raise
        step, self.notes = extra["step"], extra.get("notes", {})
        if self.ranks.first:
            self.metrics.cut(step)
            self.scores.cut(step)
        tracker = self.config.run.tracker
        names = (tracker,) if tracker != "none" and self.ranks.first else ()
        self.trackers = Trackers(names, self.folder.path, to_dict(self.config), step)
        self.ranks.barrier()
        return step

    def run(
        self,
        name: str,
        train_step: Callable[[int], dict],
        shown: Callable[[dict], dict],
        write_samples: Callable[[int], None] | None = None,
        quiet: bool = False,
    ) -> None:
        """Runs (or continues) the steps: metrics, sample grids, checkpoints, and SIGTERM, which ends on a checkpoint.

        train_step(step) returns the record of step + 1; shown(record) is what the progress line says of it. Raises
        SystemExit 143 after a SIGTERM.
        """
        run, done = self.config.run, self.resume()
        if "run.steps" in self.folder.risen:
            print(self._longer(done), file=sys.stderr)
        every = run.samples_every if write_samples else 0
        with Stop() as stop, Live(name, run.steps, done, show=self.ranks.first and not quiet) as live:
            if every and done == 0:
                write_samples(0)
            for step in range(done, run.steps):
                record = train_step(step)
                self.log(record)
                live.update(step + 1, shown(record))
                last = step + 1 == run.steps
                if every and ((step + 1) % every == 0 or last):
                    write_samples(step + 1)
                stopping = stop.agreed(self.ranks)
                if (step + 1) % run.checkpoint_every == 0 or last or stopping:
                    self.save(step + 1)
                if stopping and not last:
                    raise SystemExit(143)

    def _longer(self, done: int) -> str:
        """What a higher run.steps means for the run that goes on from step `done`."""
        before, now = self.folder.risen["run.steps"]
        if self.config.optimizer.decay == "none":
            schedule = "the constant learning rate stays as it is"
        else:
            schedule = (
                f"the {self.config.optimizer.decay} schedule of the learning rate now decays to step {now} "
                f"(it ended at step {before} for the steps that are done)"
            )
        return f"run.steps was {before} and is {now} now: the run goes on from step {done}, {schedule}"

    def update(self, step: int) -> torch.Tensor:
        """One optimizer step of training step `step` (from 0) and the moving average; returns the gradient's norm.

        A norm that is not finite has changed nothing. It is on the device, like all of this on a GPU: `outcome` reads it.
        """
        self.sharding.reduce(self.weights.current)
        norm = self.optimizer.step(step)
        if self.config.optimizer.ema:
            decay = min(self.config.optimizer.ema, (1 + step) / (10 + step))
            self.weights.blend("ema", decay, stay=norm.isfinite().logical_not())
        return norm

    def outcome(self, step: int, norms: Sequence[torch.Tensor]) -> dict[str, float]:
        """{"grad_norm": mean, "skipped": number of skipped} of a training step's updates; here the host waits for them.

        Warns of skipped ones. Raises UserError after optimizer.max_skipped of them in a row, on all ranks: a norm is that of
        all. The checkpoint keeps their number, so a run that continues counts on.
        """
        values = torch.stack(list(norms)).tolist()
        skipped = [not math.isfinite(norm) for norm in values]
        for norm, out in zip(values, skipped, strict=True):
            if out:
                warnings.warn(f"step {step}: the gradient norm is {norm}; this update is skipped", stacklevel=2)
            self._count_skipped(step, norm, out)
        return {"grad_norm": sum(values) / len(values), "skipped": sum(skipped)}

    def _count_skipped(self, step: int, norm: float, skipped: bool) -> None:
        count = self.notes["skipped_in_row"] = self.notes.get("skipped_in_row", 0) + 1 if skipped else 0
        if not 0 < self.config.optimizer.max_skipped <= count:
            return
        newest = checkpoint.latest(self.folder.checkpoints)
        raise UserError(
            f"step {step + 1}: {count} updates in a row were skipped because the gradient is not finite (its norm is "
            f"{norm}); no skipped update changed the weights, "
            f"{f'{newest} stays' if newest else 'no checkpoint was written'}; lower optimizer.lr, look at the data, or "
            "raise optimizer.max_skipped (0: never end)"
        )

    def log(self, record: dict) -> None:
        if self.ranks.first:
            self.metrics.append(record)
            if self.trackers:
                self.trackers.log(record["step"], {k: v for k, v in record.items() if k != "step"})

    def finish(self, facts: dict) -> None:
        """Exports the model, writes summary.json and report.html, closes the trackers."""
        self.export(facts)
        if self.ranks.first and self.config.run.report:
            from qirl.run.report import write_report

            write_report(self.folder.report, {self.folder.path.resolve().name: self.folder.path}, self.summarise())
        self.close()

    def summarise(self) -> dict:
        """Writes summary.json; what it says."""
        summary = summary_of_metrics(self.folder.path.resolve().name, list(self.metrics.read()))
        write_json(self.folder.summary, summary)
        return summary

    def close(self) -> None:
        """Closes the trackers and waits for the other ranks."""
        if self.trackers:
            self.trackers.close()
        self.ranks.barrier()
        lock.release(self.folder.path)

    def export(self, facts: dict) -> Path:
        """Writes model/ (a diffusers folder, adapters merged, averaged weights where the run keeps them) and, for a LoRA
        run, adapter/ (the adapters alone, as peft and diffusers read them)."""
        target = self.folder.path / "model"
        of_8_bits = self.config.model.base in LARGEST  # its weights are those of the file
        with self.weights.using("ema" if "ema" in self.weights.copies else None):
            wholes = self.sharding.wholes(self.model.state_dict(), ".lora_" if of_8_bits else "")
            state = {name: tensor.cpu().clone() for name, tensor in wholes if self.ranks.first}
        if self.ranks.first:
            lora = self.config.model.lora
            if of_8_bits:
                state = with_base(state, read_weights(find_model(self.config.model.path), self.config.model.variant))
            if lora.rank:
                adapter = self.folder.path / "adapter"
                save_adapter(state, lora, self.config.model.path, adapter)
                write_json(adapter / WORLD_FILE, facts)
                state = merged_state(state, lora.alpha / lora.rank)
            save_model(self.model.config, state, target)
            (target / WORLD_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        self.ranks.barrier()
        return target


# what a run that is continued may change: nothing that a step's numbers depend on (optimizer.impl: by more than rounding)
FREE_KEYS = (
    "run.out", "run.keep", "run.tracker", "run.report", "run.checkpoint_every", "run.samples_every", "optimizer.max_skipped",
    "optimizer.impl", "parallel", "advantage.max_failed", "scoring", *(f"rewards.*.{name}" for name in (*Remote.model_fields, "device")),
)  # fmt: skip
RISING_KEYS = ("run.steps",)


def summary_of_metrics(name: str, records: list[dict]) -> dict:
    """A run's own summary.json: steps, seconds, and the mean of its last ten steps' loss and rewards."""
    last = records[-10:]

    def mean(key: str) -> float:
        return sum(r[key] for r in last if key in r) / sum(key in r for r in last)

    rewards = sorted({k for r in last for k in r if k.startswith("reward/") and k.count("/") == 1})
    stage = {"steps": len(records), "loss": mean("loss"), "rewards": {k.split("/")[1]: mean(k) for k in rewards}}
    return {"seconds": round(sum(r["time/step"] for r in records), 1), "stages": {name: stage}}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor, on the host; called on every rank."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


class Stop:
    """Inside the block SIGTERM is a flag that is read between steps, so the run ends on a checkpoint."""

    asked, before = False, None

    def __enter__(self) -> Stop:
        try:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            pass
        return self

    def _ask(self, *_):
        self.asked = True

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked: the signal reaches them in different steps, the checkpoint needs them in one."""
        return agree(self.asked, 0, ranks)[0]

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
