"""What a setting's RL step costs with diffusers' own module: at its best (`same`), and as current trainers run it (`peers`).

same    diffusers' transformer, LoRA by peft, the same objective, optimizer and noise. Rollout: for 2.1 its key-value cache, filled
        once for a prompt and shared by the batch; Euler steps. Update: whole samples, each with its own prefix, in the batch size
        (and with or without gradient checkpointing) that is fastest per pair in no more memory than qirl's update took.
peers   The same module and memory. Rollout: every sample fills a cache of its own, as diffusers' pipelines do; without one (1.x)
        its prefix is run at every step. Update: Flow-GRPO's objective with these choices of current trainers:
        - guidance in the update, two forwards a pair: flow_grpo (scripts/train_qwenimage_edit_plus.py at 9dcdc35,
          compute_log_prob); verl-omni (verl_omni/pipelines/qwen_image_flow_grpo/diffusers_training_adapter.py at 3f27f75,
          forward_and_sample_previous_step). DanceGRPO trains without guidance (fastvideo/train_grpo_flux.py at 22b85ef).
        - old log-probabilities from a forward of their own: verl-omni unless bypass_mode is set
          (verl_omni/trainer/diffusion/ray_diffusion_trainer.py at 0324b39, fit and _compute_old_log_prob). flow_grpo and
          DanceGRPO keep those of the rollout.
        - one node at a time: flow_grpo ("for j in train_timesteps"), verl-omni
          (verl_omni/workers/engine/fsdp/diffusers_impl.py at 04e7572, _run_forward_backward_batch), DanceGRPO (train_one_step).
        - each sample with its own prefix: the three of them; their models are called on batches of whole samples.
        - gradient checkpointing of blocks, on a GPU: on by default in verl-omni
          (verl_omni/trainer/config/diffusion/model/diffusion_model.yaml at 0afdb05), an option of the other two
          (activation_checkpointing, gradient_checkpointing).

What favours a baseline: its inputs are laid out before the clock runs, adapters are in the model's dtype (peft would keep them
in float32), the loss is qirl's fused op, an unconditional text is not padded to the length of the other. Weights that are all
trained are float32 and computed with in bfloat16 by FSDP, as qirl's are. The base is never in 8 bits. Before it is timed,
gradients and finished latents of a small float32 model must equal qirl's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from throughput_cases import Drawn, Setting, draw_weights, prompts
from throughput_step import Step, finish, release

from qirl.config import TrainConfig
from qirl.engine import DTYPES
from qirl.errors import UserError
from qirl.families import targets_of
from qirl.flow.rollout import Kept, grids
from qirl.kernels.flow_step import guide
from qirl.kernels.philox import INITIAL, normal, stream
from qirl.models.lora import target_pattern
from qirl.models.qwen_image_21 import model_time
from qirl.optim import Optimizer
from qirl.packing import Condition
from qirl.parallel.data import gathered, shard, start
from qirl.policy.nodes import draw_nodes
from qirl.policy.packs import Layout, Pair
from qirl.policy.trainer import prepare
from qirl.policy.update import Batch, Experience, accumulate, loss_and_stats, make_batch

CLASSES = {"qwen_image_21": "QwenImage21Transformer2DModel", "qwen_image": "QwenImageTransformer2DModel"}
# what `peers` train with: Flow-GRPO
PEERS = ("policy.loss=grpo", "flow.sampler=sde", "guidance.scope=both", "policy.old=recompute")
SMALL = dict(
    size="tiny", layers=2, height=64, width=96, text=9, prompts=2, group=2, steps=5, nodes=2, dtype="float32", base="dtype",
    checkpointing="none", micro=2, batch=2,
)  # fmt: skip
AGREE = 1e-4  # relative error: float32 sums in another order
BATCHES = (1, 2, 4, 8, 16, 32)


def own_setting(setting: Setting, kind: str) -> Setting:
    """The setting that a baseline runs: its base as it computes, none of qirl's options, for `peers` their objective."""
    return dataclasses.replace(setting, base="dtype", overrides=PEERS if kind == "peers" else ())


class Baseline:
    """diffusers' module of a setting on the device. state: weights of qirl's model to take; None: random ones.

    Raises ImportError where diffusers or peft is missing.
    """

    def __init__(self, setting: Setting, kind: str, device: str, state: dict | None = None):
        self.setting, self.kind, self.device = own_setting(setting, kind), kind, device
        self.config = self.setting.config("unused")
        architecture, self.dtype = self.setting.architecture(), DTYPES[setting.dtype]
        masters = not setting.lora and self.dtype == torch.bfloat16
        self.model = _module(self.setting, self.config, architecture)
        torch.nn.Module.to(self.model, torch.float32 if masters else self.dtype).to_empty(device=device)
        _place_tables(self.model, setting.family, architecture, device)
        if state is None:
            draw_weights(self.model, self.config.run.seed)
        else:
            self.model.load_state_dict(state)
        if masters:  # computes in bfloat16 over float32 weights, as qirl does
            shard(self.model, start(always_mesh=True), self.dtype)
        self.family = Drawn(self.setting, architecture, self.dtype)
        self.optimizer = Optimizer(self.model, self.config.optimizer, self.config.run.steps)
        self.number, self.parts = 0, []

    # the module's calls

    def velocity(self, condition: Condition, x: torch.Tensor, t: torch.Tensor, **cache) -> torch.Tensor:
        """x [B, tokens, C], t [B]: the velocity [B, tokens, C] of a batch of targets of one condition."""
        call = self._call_21 if self.setting.family == "qwen_image_21" else self._call_1
        return call(condition, x.to(self.dtype), t, **cache)

    def _call_21(self, condition: Condition, x, t, **cache) -> torch.Tensor:
        """References before the target; the text has a place for every four latents of an image."""
        batch, (height, width), rest = len(x), self.setting.grid, condition.text
        slots, states, mask = height * width // 4, [], []
        for kind, *size in condition.layout:
            count = size[0] if kind == "text" else slots
            states.append(rest[:count] if kind == "text" else rest.new_zeros(count, rest.shape[1]))
            rest = rest[count:] if kind == "text" else rest
            mask += [kind == "image"] * count
        references = [r.expand(batch, -1, -1) for r in condition.references]
        out = self.model(
            hidden_states=torch.cat([*references, x], 1),
            encoder_hidden_states=torch.cat(states).expand(batch, -1, -1),
            timestep=model_time(t, self.dtype),
            img_shapes=[[(1, height, width)] * (len(references) + 1)] * batch,
            img_mask=torch.tensor([mask + [True] * slots], device=self.device).expand(batch, -1),
            return_dict=False,
            **cache,
        )
        return out[0][:, -self.setting.tokens :]

    def _call_1(self, condition: Condition, x, t) -> torch.Tensor:
        """The target before its references."""
        batch = len(x)
        references = [r.expand(batch, -1, -1) for r in condition.references]
        out = self.model(
            hidden_states=torch.cat([x, *references], 1),
            encoder_hidden_states=condition.text.expand(batch, -1, -1),
            timestep=model_time(t, self.dtype),
            img_shapes=[[(1, *self.setting.grid)] * (len(references) + 1)] * batch,
            return_dict=False,
        )
        return out[0][:, : self.setting.tokens]

    def conditions(self, prompt) -> list[Condition]:
        """The condition of a prompt, and under guidance its unconditional twin, on the device."""
        both = [self.family.condition(prompt), self.family.negative(prompt)][
            : 2 if self.config.flow.guidance != 1 else 1
        ]
        place = lambda value: value.to(self.device, self.dtype)  # noqa: E731
        return [Condition(place(c.text), tuple(map(place, c.references)), c.layout, c.shared) for c in both]

    def _guided(self, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(velocities) == 1:
            return velocities[0]
        flat = [v.flatten(0, 1) for v in velocities]
        return guide(*flat, self.config.flow.guidance, self.config.flow.rescale).view(velocities[0].shape)

    # phases

    @torch.no_grad()
    def rollout(self) -> torch.Tensor:
        """Finished latents [samples, tokens, C], from the noise that qirl begins with."""
        drawn = experience(self.setting, self.config, self.family, self.device, self.number, states=False)
        self.number += 1
        finished, group = [], self.setting.group
        with gathered(self.model):
            for place, (prompt, _) in enumerate(prompts(self.setting)):
                conditions = self.conditions(prompt)
                for rows in torch.arange(place * group, (place + 1) * group, device=self.device).split(
                    self.setting.batch
                ):
                    finished.append(self._sample(conditions, drawn.stream.rows(rows), drawn.grid[rows]))
        return torch.cat(finished)

    def _sample(self, conditions: Sequence[Condition], draws, grid: torch.Tensor) -> torch.Tensor:
        count, tokens = len(grid), self.setting.tokens
        row = torch.arange(count, device=self.device).repeat_interleave(tokens)
        token = torch.arange(tokens, device=self.device).repeat(count)
        x = normal(draws, row, token, self.family.latent_channels, 0, INITIAL).view(count, tokens, -1)
        caches = self._caches(len(conditions))
        for node in range(self.config.flow.steps):
            t, s = grid[:, node], grid[:, node + 1]
            call = self._fill if node == 0 else self._cached
            v = self._guided([call(c, x, t, cache) for c, cache in zip(conditions, caches, strict=True)])
            x = x + v.float() * (s - t)[:, None, None]  # the state stays in float32
        return x

    def _caches(self, count: int) -> list:
        """Empty ones for 2.1, none for 1.x, whose text sees the target."""
        if self.setting.family != "qwen_image_21":
            return [None] * count
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        return [QwenImage21KVCache(len(self.model.transformer_blocks)) for _ in range(count)]

    def _cached(self, condition: Condition, x, t, cache) -> torch.Tensor:
        return self.velocity(condition, x, t, **(dict(kv_cache=cache, kv_cache_mode="cached") if cache else {}))

    def _fill(self, condition: Condition, x, t, cache) -> torch.Tensor:
        """The first step, which fills the cache: by every sample for `peers`, by the first one for all of them else."""
        if cache is None:
            return self.velocity(condition, x, t)
        filled = x[:1] if self.kind == "same" else x
        v = self.velocity(condition, filled, t[: len(filled)], kv_cache=cache, kv_cache_mode="extract")
        if len(filled) == len(x):
            return v
        _spread(cache, len(x) - 1)
        v = torch.cat([v, self._cached(condition, x[1:], t[1:], cache)])
        _spread(cache, len(x))
        return v

    def lay_out(self, exp: Experience, size: int) -> None:
        """The update's batches of at most `size` pairs of one prompt; `peers`: of one node of each sample."""
        group, everyone, nodes = self.setting.group, prompts(self.setting), range(self.setting.nodes)
        weight, self.parts = 1.0 / (self.setting.images * self.setting.nodes), []
        for place, (prompt, _) in enumerate(everyone):
            samples = range(place * group, (place + 1) * group)
            runs = (
                [[(i, j) for i in samples] for j in nodes]
                if self.kind == "peers"
                else [[(i, j) for i in samples for j in nodes]]
            )
            for run in runs:
                pairs = [Pair(i, exp.nodes[i][j], 0, *self.setting.grid) for i, j in run]
                conditions = self.conditions(prompt)
                layout = Layout(conditions[:1], pairs, [], 1, True, conditions[1:] if self.kind == "peers" else ())
                for first in range(0, len(pairs), size):
                    members = list(range(first, min(first + size, len(pairs))))
                    batch = make_batch(exp, layout, members, self.config, weight, live=True)
                    self.parts.append((conditions if batch.guided else conditions[:1], batch))

    def _objective(self, conditions: Sequence[Condition], batch: Batch) -> torch.Tensor:
        """The velocity that the objective compares, [N, C]."""
        x = batch.x.view(len(batch.lengths), self.setting.tokens, -1)
        return self._guided([self.velocity(c, x, batch.t) for c in conditions]).flatten(0, 1)

    def backward(self) -> None:
        """Adds the gradients of all batches."""
        if self.kind == "peers":
            with torch.no_grad():
                for conditions, batch in self.parts:
                    batch.v_old = self._objective(conditions, batch)
        for conditions, batch in self.parts:
            loss_and_stats(self._objective(conditions, batch), batch, self.config)[0].backward()

    def update(self) -> None:
        self.backward()
        self.optimizer.step(self.number)

    def settle(self, most_bytes: float) -> dict:
        """Lays the update out in the fastest batch size, with checkpointing or without, that takes no more memory.

        On a CPU, which counts none: at most the setting's micro, checkpointing as the setting has it. Raises UserError where
        nothing fits.
        """
        exp = experience(self.setting, self.config, self.family, self.device, 0)
        on_cpu, asked = self.device != "cuda", self.setting.checkpointing != "none"
        found: dict[tuple[int, bool], float] = {}
        for recompute in [asked] if on_cpu else [True] if self.kind == "peers" else [False, True]:
            self.checkpoint(recompute)
            for size in (b for b in BATCHES if b <= (self.setting.micro if on_cpu else self.setting.group)):
                try:
                    seconds, peak = self._try(exp, size)
                except torch.OutOfMemoryError:
                    break
                finally:
                    self.optimizer.adam.zero_grad(set_to_none=True)
                    release()
                if peak > most_bytes:
                    break
                found[size, recompute] = seconds / size
        if not found:
            raise UserError(f"not one pair fits the {most_bytes / 2**30:.1f} GiB that qirl's update takes")
        size, recompute = min(found, key=found.get)
        self.checkpoint(recompute)
        self.lay_out(exp, size)
        return {"batch": size, "checkpointing": "block" if recompute else "none"}

    def _try(self, exp: Experience, size: int) -> tuple[float, int]:
        """Seconds and peak bytes of one batch of the update; the first of two runs is not counted."""
        self.lay_out(exp, size)
        self.parts = self.parts[:1]
        for _ in range(2):
            finish(self.device)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            self.backward()
            finish(self.device)
        return time.perf_counter() - begun, torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def close(self) -> None:
        """Gives its memory back."""
        self.model = self.optimizer = None
        self.parts = []
        release()

    def checkpoint(self, on: bool) -> None:
        (self.model.enable_gradient_checkpointing if on else self.model.disable_gradient_checkpointing)()


def _spread(cache, count: int) -> None:
    """One sample's keys and values, for `count` samples."""
    for layer in cache.layer_caches:
        layer.store(*(part[:1].expand(count, -1, -1, -1) for part in layer.get()))


def _module(setting: Setting, config: TrainConfig, architecture):
    """diffusers' module, with adapters, on the meta device."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, CLASSES[setting.family])(**dataclasses.asdict(architecture))
        lora = config.model.lora
        if lora.rank:
            from peft import LoraConfig

            pattern = target_pattern(lora.targets)
            model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=pattern))
    return model


def _place_tables(model, family: str, architecture, device: str) -> None:
    """Tables of positions and times are no weights: they are computed again, since the meta device has no values."""
    axes = dict(theta=10000, axes_dim=list(architecture.axes_dims_rope))
    if family == "qwen_image_21":
        from diffusers.models.transformers import transformer_qwenimage21 as own

        model.pos_embed = own.QwenImage21Rope(**axes)
        model.time_text_embed.time_proj = own.QwenImage21TemporalTimesteps(timestep_dim=256).to(device)
    else:
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        model.pos_embed = QwenEmbedRope(**axes, scale_rope=True)


def experience(
    setting: Setting, config: TrainConfig, family: Drawn, device: str, iteration: int, states: bool = True
) -> Experience:
    """What a rollout leaves for the update, but for latents and transitions, which are noise (states=False: none)."""
    everyone, group = prompts(setting), setting.group
    targets = targets_of(family, [p for p, _ in everyone], group)
    ids = [p.id for p, _ in everyone for _ in range(group)]
    draws = stream(config.run.seed, ids, list(range(group)) * len(everyone), iteration, device)
    grid = grids(targets, config.flow, device)
    nodes = draw_nodes(draws, grid, config.policy.timesteps, last_step=config.policy.loss == "nft")
    count = len(targets)
    generator = torch.Generator(device if device == "cuda" else "cpu").manual_seed(iteration)
    gauss = lambda: torch.randn(  # noqa: E731
        setting.tokens, family.latent_channels, generator=generator, device=generator.device
    ).to(device)
    x0, kept = [], {}
    if states and config.policy.loss == "nft":
        x0 = [gauss() for _ in range(count)]
    elif states:
        kept = {(i, node): Kept(gauss(), gauss(), gauss()) for i in range(count) for node in nodes[i]}
    valid, advantage = torch.ones(count, dtype=torch.bool), torch.linspace(-1, 1, count)
    conditions = [family.condition(p) for p, _ in everyone]
    return Experience(conditions, [], targets, draws, grid, nodes, x0, kept, torch.arange(count), advantage, valid)


@dataclass
class Agreement:
    """Largest relative errors (norm) against qirl: of any parameter's gradient, and of finished latents."""

    gradients: float
    latents: float


def agreement(setting: Setting, kind: str, device: str) -> Agreement:
    """A baseline against qirl on a small float32 model with the setting's family, references, guidance and LoRA.

    Raises AssertionError where they differ by more than AGREE.
    """
    small = dict(SMALL, references=min(2, setting.references), lora=min(4, setting.lora))
    tiny = own_setting(dataclasses.replace(setting, **small), kind)
    with Step(tiny, device) as ours:
        with torch.no_grad():  # norms and adapters away from their trivial start
            for parameter in ours.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        exp = ours.rollout()
        theirs = Baseline(tiny, kind, device, state=ours.model.state_dict())
        steps = [pair for part in prepare(ours.trainer, exp, ours.slots) for pair in part]
        for layout, batches in steps:
            accumulate(ours.model, layout, batches, ours.config)
        theirs.lay_out(exp, 2)
        theirs.backward()
        reference = dict(theirs.model.named_parameters())
        trained = [(p, reference[name]) for name, p in ours.model.named_parameters() if p.requires_grad]
        gradients = max(_error(*(torch.zeros_like(p) if p.grad is None else p.grad for p in pair)) for pair in trained)
        ode = dataclasses.replace(tiny, overrides=())
    with Step(ode, device) as ours:
        ours.model.load_state_dict(theirs.model.state_dict())
        expected = torch.stack(list(ours.rollout().x0))
        latents = _error(theirs.rollout(), expected)
    found = Agreement(gradients, latents)
    for name, value in dataclasses.asdict(found).items():
        assert value <= AGREE, f"{name} differ by {value:.1e} from qirl's"
    return found


def _error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp_min(1e-30)).item()
