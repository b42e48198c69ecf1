"""The probe: the base draws a group of images per candidate prompt with the training sampler, and rewards score them.

Its noise has an iteration of its own, so no training step repeats it. Prompts are drawn in fixed batches, whatever was
done before and on however many ranks: the ledger of a killed and continued probe is the same to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from qirl.config import CalibrateConfig, CurateConfig, to_dict
from qirl.curation.ledger import NAME, NOISE, RAW, VERSION, Ledger
from qirl.data.prompts import Prompt
from qirl.data.sampler import PromptSampler
from qirl.engine import DTYPES, Stop, model_config
from qirl.errors import UserError
from qirl.families import Family, images_of, largest_target, targets_of
from qirl.flow.rollout import grids, not_finite, rollout
from qirl.kernels.philox import stream
from qirl.models.architecture import Transformer
from qirl.models.folders import find_model, world_facts
from qirl.models.weight_files import weight_files
from qirl.models.weights import check_values, check_weights, load_model, new_model
from qirl.packing import cut
from qirl.parallel.data import Ranks, start
from qirl.policy.monitor import MONITOR_ITERATION
from qirl.policy.nodes import draw_nodes
from qirl.rewards.protocol import Reward, Sample, declared_noise, name_of, noise_of, unit
from qirl.rewards.registry import identity, rewards_of
from qirl.rewards.scorer import Scorer
from qirl.run import lock
from qirl.run.folder import RunFolder, write_bytes
from qirl.run.progress import Live
from qirl.world import World, make_world

PROBE_ITERATION = MONITOR_ITERATION - 1  # run.steps stays below it
_SEEN = {
    "digits": ("name", "text_dim"),
    "prompts": ("name", "resolution", "negative"),
}  # options of `world` that images show
_NOT_SEEN = ("rollout_tokens", "storage")  # options of `flow` that no image depends on


@dataclass
class Probe:
    """What a probe needs to draw; the model is loaded when the first image is asked for."""

    config: CurateConfig | CalibrateConfig
    family: Family
    prompts: list[Prompt]
    rewards: Sequence[Reward]
    ranks: Ranks
    model: Transformer | None = None

    def load(self) -> None:
        config = self.config
        if self.model is None:
            folder, dtype = find_model(config.model.path), DTYPES[config.model.dtype]
            self.model = load_model(folder, dtype, self.ranks.device, variant=config.model.variant).eval()


def collect(probe: Probe, quiet: bool = False) -> Ledger:
    """Draws and scores every candidate prompt that the ledger in config.run.out lacks; returns the complete ledger.

    Raises UserError for a run folder or ledger that does not fit and where too many images cannot be scored;
    SystemExit 143 after a SIGTERM, between two batches.
    """
    ranks, ledger = probe.ranks, Ledger(Path(probe.config.run.out) / NAME)
    done = [begin(probe, ledger) if ranks.first else 0]
    if ranks.world > 1:
        torch.distributed.broadcast_object_list(done)
    todo = [run for run in batches(probe.config, probe.family, probe.prompts) if run[-1] >= done[0]]
    try:
        if todo:
            _collect(probe, ledger, todo, done[0], quiet)
        ranks.barrier()
    finally:
        lock.release(probe.config.run.out)
    return ledger


def open_probe(config: CurateConfig | CalibrateConfig, rewards: Sequence[Reward] = ()) -> Probe:
    """Everything that can be refused without weights is refused here, before anything is written.

    rewards: callables of qirl.rewards.protocol; none: the world's own. Raises UserError for a model, prompt file or
    budget that does not fit.
    """
    world = make_world(config.world, config.model, config.run.device)
    prompts = candidates(config, world)
    need = largest_target(world.family, prompts) * _twice(config)
    if config.flow.rollout_tokens < need:
        raise UserError(
            f"flow.rollout_tokens={config.flow.rollout_tokens} tokens is smaller than one sample of {need} tokens; "
            f"set it to {need} or more"
        )
    folder = find_model(config.model.path)
    with torch.device("meta"):
        check_weights(new_model(model_config(config, world.family)), folder, config.model.variant)
    if config.flow.guidance != 1 and not world_facts(folder).get("unconditional", True):
        raise UserError(
            f"flow.guidance={config.flow.guidance} needs an unconditional embedding and {config.model.path} was trained "
            "without one (pretrain.drop_condition=0); set flow.guidance=1"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    world.family.prepare(prompts, config.flow.guidance != 1)
    return Probe(
        config, world.family, prompts, rewards_of(config, world.data, rewards), start(device=config.run.device)
    )


def candidates(config: CurateConfig | CalibrateConfig, world: World) -> list[Prompt]:
    """The training prompts in their order; with probe.prompts that many of them, the categories in turn."""
    prompts = world.data.prompts("train", config.world.prompts)
    count = config.probe.prompts
    if not 0 < count < len(prompts):
        return prompts
    chosen, turns = {}, 0
    sampler = PromptSampler(prompts, config.run.seed)
    while len(chosen) < count:  # a small category comes again before a large one ends
        chosen |= {p.id: p for p, _ in sampler.step(turns, count)}
        turns += 1
    return list(chosen.values())[:count]


def begin(probe: Probe, ledger: Ledger) -> int:
    """Opens the run folder and the ledger on the first rank; the number of prompts that are done."""
    config = probe.config
    RunFolder.check(config.run.out, to_dict(config))
    header = facts(probe)
    folder = RunFolder(config.run.out)
    done = ledger.open(header, probe.prompts) if ledger.path.exists() else 0
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.hold(folder.path)
        write_bytes(folder.config, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).encode())
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder.path} ({error.strerror}); choose another run.out"
        ) from None
    return done or ledger.open(header, probe.prompts)


def facts(probe: Probe) -> dict:
    """The header of the ledger: everything that decides its scores, and what the rewards say of themselves."""
    config, rewards = probe.config, probe.rewards
    return {
        "ledger": VERSION, "policy": policy_hash(find_model(config.model.path), config.model.variant),
        **sampler_facts(config),
        "group": config.probe.group, "seed": config.run.seed, "prompts": len(probe.prompts),
        "rewards": [name_of(reward) for reward in rewards], "read_noise": declared_noise(rewards),
        **({"reward_options": identity(config.rewards)} if config.rewards else {}),
    }  # fmt: skip


def sampler_facts(config: CurateConfig | CalibrateConfig) -> dict:
    """dtype, world, flow and trained nodes: how images are drawn, apart from the weights and the noise."""
    world = {k: v for k, v in to_dict(config)["world"].items() if k in _SEEN[config.world.name]}
    flow = {k: v for k, v in to_dict(config)["flow"].items() if k not in _NOT_SEEN}
    timesteps = to_dict(config)["probe"]["timesteps"] if _nodes_matter(config) else None
    return {"dtype": config.model.dtype, "world": world, "flow": flow, "timesteps": timesteps}


def policy_hash(folder: Path, variant: str | None = None) -> str:
    """sha256 (hex) of a model folder's config and of its tensors by name, however they are split into files.

    Raises UserError for weights that are not finite.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with contextlib.ExitStack() as stack:
        files = [(path, stack.enter_context(safe_open(path, "pt"))) for path in weight_files(folder, variant)]
        holder = {name: (path, file) for path, file in files for name in file.keys()}  # noqa: SIM118
        for name in sorted(holder):
            path, file = holder[name]
            tensor = file.get_tensor(name)
            check_values(path, name, tensor)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def batches(config: CurateConfig | CalibrateConfig, family: Family, prompts: Sequence[Prompt]) -> list[range]:
    """Which prompts are drawn together: as many as flow.rollout_tokens holds, at least one."""
    costs = [t.tokens * _twice(config) * config.probe.group for t in targets_of(family, prompts)]
    runs = cut(costs, max(config.flow.rollout_tokens, *costs), "flow.rollout_tokens")
    return [range(run[0], run[-1] + 1) for run in runs]


def draw(probe: Probe, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Finished latents [tokens, C] of prompts * group samples, those of a prompt together, by the training sampler."""
    config, family = probe.config, probe.family
    flow, group, device = config.flow, config.probe.group, probe.ranks.device
    targets = targets_of(family, prompts, group)
    ids, samples = [p.id for p in prompts for _ in range(group)], [*range(group)] * len(prompts)
    draws = stream(config.run.seed, ids, samples, PROBE_ITERATION, device)
    grid = grids(targets, flow, device)
    nodes = draw_nodes(draws, grid, config.probe.timesteps, last_step=False) if _nodes_matter(config) else None
    latents = []
    for run in cut([t.tokens * _twice(config) for t in targets], flow.rollout_tokens, "flow.rollout_tokens"):
        used = sorted({targets[i].prompt for i in run})
        own = [replace(targets[i], prompt=used.index(targets[i].prompt)) for i in run]
        conditions = [family.condition(prompts[i]) for i in used]
        negatives = [family.negative(prompts[i]) for i in used] if flow.guidance != 1 else None
        rows = draws.rows(torch.tensor(run, device=device))
        out = rollout(probe.model, conditions, own, rows, flow, nodes and [nodes[i] for i in run], negatives)
        latents += out.latents()
    return latents


def _twice(config: CurateConfig | CalibrateConfig) -> int:
    return 2 if config.flow.guidance != 1 else 1


def _nodes_matter(config: CurateConfig | CalibrateConfig) -> bool:
    return config.flow.sampler != "ode" and config.flow.stochastic == "trained"


def _collect(probe: Probe, ledger: Ledger, todo: Sequence[range], done: int, quiet: bool) -> None:
    """Batch r, r + world, ... is rank r's. While a batch is scored the next one is drawn; the first rank writes."""
    ranks, total = probe.ranks, len(probe.prompts)
    probe.load()
    own = [todo[i] if i < len(todo) else range(0) for i in range(ranks.rank, len(todo) + ranks.rank, ranks.world)]
    with (
        Scorer(probe.rewards, probe.config.scoring) as scorer,
        Stop() as stop,
        Live("probe", total, done, ranks.first and not quiet) as live,
    ):
        if done:  # a reward that has scored before is not mistaken because it is refused now
            _, *lines = ledger.lines.read()
            scorer.scored.update(
                name for line in lines for own in line["scores"] for name, v in own.items() if v is not None
            )
        before = range(0)
        for run in [*own, range(0)]:
            samples = _samples(probe, run) if run else []
            done = _write(probe, ledger, _rows(probe, before, scorer), done)
            live.update(done, {})
            if stop.agreed(ranks) and done < total:
                raise SystemExit(143)
            if samples:
                scorer.submit(samples)
            before = run


def _samples(probe: Probe, run: range) -> list[Sample]:
    group, prompts, samples = probe.config.probe.group, [probe.prompts[i] for i in run], []
    latents = draw(probe, prompts)
    images = images_of(probe.family, latents, targets_of(probe.family, prompts, group))
    for i, (image, bad) in enumerate(zip(images, not_finite(latents), strict=True)):
        samples.append(Sample.of(run[0] * group + i, prompts[i // group], image, failed=bad))
    return samples


def _rows(probe: Probe, run: range, scorer: Scorer) -> list[tuple[int, dict]] | UserError:
    """This rank's ledger lines with their places, or the error that every rank is to raise."""
    try:
        scores, _ = scorer.collect()
        scores = [{name: unit(name, value, "a probe") for name, value in row.items()} for row in scores]
    except UserError as error:
        return error
    group, rows = probe.config.probe.group, []
    for place, i in enumerate(run):
        p = probe.prompts[i]
        images = scores[place * group : (place + 1) * group]
        line = dict(zip(RAW, (p.id, p.text, p.category, p.task, images), strict=True))
        noise = [{name: noise_of(v) for name, v in own.items() if noise_of(v) >= 0} for own in images]
        rows.append((i, line | ({NOISE: noise} if any(noise) else {})))
    return rows


def _write(probe: Probe, ledger: Ledger, rows: list[tuple[int, dict]] | UserError, done: int) -> int:
    """All ranks' lines of one round into the ledger, in the order of the prompts; how many it holds then."""
    parts = [rows]
    if probe.ranks.world > 1:
        parts = [None] * probe.ranks.world
        torch.distributed.all_gather_object(parts, rows)
    for part in parts:
        if isinstance(part, UserError):
            raise UserError(str(part))
    lines = sorted((line for part in parts for line in part), key=lambda line: line[0])
    images = [own for _, line in lines for own in line["scores"]]
    failed = sum(any(v != v for v in own.values()) for own in images) / max(1, len(images))
    limit = probe.config.advantage.max_failed
    if failed > limit:
        raise UserError(
            f"{failed:.0%} of {len(images)} images could not be scored, more than advantage.max_failed={limit:.0%}; "
            "mend the reward (or, if latents are not finite, the model), then start the same command again"
        )
    new = [line for place, line in lines if place >= done]
    if probe.ranks.first:
        ledger.append(new)
    return done + len(new)
