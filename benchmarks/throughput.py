"""How fast are rollout and update against diffusers' own module? Ratios inside one run, one JSON row.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/throughput.py --cpu

update   8 samples x 4 trained nodes of one prompt with R reference images of the target's size, forward and backward.
         qirl: packs with the shared prefix under a token budget. diffusers: batches of samples, each with its own
         prefix, at most as many targets in one backward; the fastest of the batch sizes that this allows.
         The gradients of both must agree before anything is timed.
rollout  8 samples of one prompt. qirl: prefill, cached steps, noise and sampler step. diffusers: its key-value cache,
         filled once for the prompt and shared by the batch (`ratio`), or per sample as its pipeline does
         (`ratio_batch`), and a bare Euler step.
phases   shares of rollout, reward and update in one step of the digits configuration.

A ratio is diffusers' time / qirl's time: the median over repetitions in which both run one after the other. With one
thread it is taken from the CPU time of the process, which others on the machine disturb least; else from wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache, QwenImage21Transformer2DModel

from qirl import config as configuration
from qirl.config_sections import Flow
from qirl.data.world import make_world
from qirl.engine import WORLD_FILE, initialise, model_config
from qirl.flow.grid import sigmas
from qirl.flow.rollout import rollout
from qirl.kernels.philox import INITIAL, normal, stream
from qirl.models.qwen_image_21 import QwenImage21
from qirl.models.weights import load_model, save_model
from qirl.packing import Condition, Target
from qirl.paths import configs
from qirl.policy.packs import Pair, Prefix, lay_out
from qirl.policy.trainer import open_trainer, train_step
from qirl.run.machine import machine

# The shape ratios of the 20B model, small: heads x head_dim = width, mlp_ratio 3, rotary axes 1 : 3.5 : 3.5.
CONFIG = dict(
    in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32, num_attention_heads=4, context_in_dim=128,
    mlp_ratio=3, axes_dims_rope=(4, 14, 14),
)  # fmt: skip
WANTED = {0: 1.0, 1: 1.8, 4: 3.5, 8: 5.0}  # update ratio by number of reference images; rollout: 1 always
GRADIENT, LATENTS = 1e-4, 1e-4  # float32 sums in another order


@dataclass(frozen=True)
class Case:
    """One prompt with `references` images of side x side latent tokens, `pairs` targets of that size."""

    references: int
    side: int = 16
    text: int = 32
    pairs: int = 32
    micro: int = 8  # targets in one backward
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.side * self.side

    @property
    def layout(self) -> tuple[tuple, ...]:
        before = self.text // 4
        return (("text", before), *[("image", self.side, self.side)] * self.references, ("text", self.text - before))

    def draw(self) -> tuple[Condition, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The condition, latents and loss weights [pairs, tokens, C], t [pairs]."""
        gauss = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        generator = torch.Generator().manual_seed(self.seed)
        channels = CONFIG["in_channels"]
        images = tuple(gauss(self.tokens, channels) for _ in range(self.references))
        condition = Condition(gauss(self.text, CONFIG["context_in_dim"]), images, self.layout)
        latents, weights = gauss(self.pairs, self.tokens, channels), gauss(self.pairs, self.tokens, channels)
        return condition, latents, weights, torch.rand(self.pairs, generator=generator)


def make_models(**changes):
    """diffusers' module with random weights, and qirl's with the same ones."""
    torch.manual_seed(0)
    theirs = QwenImage21Transformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms away from their trivial start
            parameter.add_(0.05 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_model(folder)


def their_call(case: Case, condition: Condition, latents: torch.Tensor, t: torch.Tensor) -> dict:
    """Arguments of diffusers' forward for a batch of targets [B, tokens, C] of one condition."""
    batch, slots = len(latents), case.tokens // 4
    states, mask, rest = [], [], condition.text
    for kind, *size in case.layout:
        if kind == "text":
            states, rest = [*states, rest[: size[0]]], rest[size[0] :]
            mask += [False] * size[0]
        else:
            states.append(condition.text.new_zeros(slots, condition.text.shape[1]))
            mask += [True] * slots
    references = [r.expand(batch, -1, -1) for r in condition.references]
    return dict(
        hidden_states=torch.cat([*references, latents], 1),
        encoder_hidden_states=torch.cat(states).expand(batch, -1, -1),
        timestep=t,
        img_shapes=[[(1, case.side, case.side)] * (case.references + 1)] * batch,
        img_mask=torch.tensor([mask + [True] * slots]).expand(batch, -1),
        return_dict=False,
    )


def their_update(model, case: Case, data, batch: int) -> None:
    condition, latents, weights, t = data
    model.zero_grad()
    for x, w, s in zip(latents.split(batch), weights.split(batch), t.split(batch), strict=True):
        v = model(**their_call(case, condition, x, s))[0][:, -case.tokens :]
        (v * w).sum().backward()


def our_update(model, case: Case, data) -> None:
    condition, latents, weights, t = data
    model.zero_grad()
    pairs = [Pair(i, 0, 0, case.side, case.side) for i in range(case.pairs)]
    [layout] = lay_out([condition], pairs, case.micro * case.tokens, lambda seam, count: (seam, count))
    prefix = Prefix(model, layout, "cpu")
    for members in layout.packs:
        v = model(layout.body(members, "cpu"), latents[members].flatten(0, 1), t[members], prefix.leaves)
        (v * weights[members].flatten(0, 1)).sum().backward()
    prefix.backward()


def gradient_error(ours, theirs) -> float:
    """The largest relative error (norm) over the parameters."""
    reference = dict(theirs.named_parameters())
    return max(
        ((p.grad - reference[name].grad).norm() / reference[name].grad.norm().clamp_min(1e-30)).item()
        for name, p in ours.named_parameters()
    )


@torch.no_grad()
def their_rollout(model, case: Case, data, steps: int, shared: bool) -> torch.Tensor:
    """Euler steps with diffusers' cache; shared: the prefix is run once and its keys and values expanded."""
    condition, x, _, _ = data
    grid = torch.from_numpy(sigmas(case.tokens, Flow(steps=steps)))
    cache = QwenImage21KVCache(len(model.transformer_blocks))
    for node in range(steps):
        mode = "cached" if node or shared else "extract"
        if shared and node == 0:
            model(**their_call(case, condition, x[:1], grid[:1]), kv_cache=cache, kv_cache_mode="extract")
            for layer in cache.layer_caches:
                layer.store(*(part.expand(len(x), -1, -1, -1) for part in layer.get()))
        call = their_call(case, condition, x, grid[node].expand(len(x)))
        v = model(**call, kv_cache=cache, kv_cache_mode=mode)[0][:, -case.tokens :]
        x = x + v * (grid[node + 1] - grid[node])
    return x


def our_rollout(model, case: Case, data, steps: int) -> torch.Tensor:
    draws = stream(case.seed, [0] * case.pairs, list(range(case.pairs)), 0)
    targets = [Target(0, case.side, case.side)] * case.pairs
    return rollout(model, [data[0]], targets, draws, Flow(steps=steps)).x0.view(case.pairs, case.tokens, -1)


def measure(repetitions: int, **runs: Callable) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, interleaved so that what disturbs one disturbs all; the first round is not counted."""
    seconds = {name: {"wall": [], "cpu": []} for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if repetition:
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["cpu"].append(time.process_time() - cpu)
    return seconds


def ratio(seconds: dict, over: str, under: str = "qirl") -> float:
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    pairs = zip(seconds[over][clock], seconds[under][clock], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def bench_update(models, case: Case, repetitions: int) -> dict:
    """Raises AssertionError if the gradients differ."""
    theirs, ours = models
    data = case.draw()
    sizes = [b for b in (1, 2, 4, 8, 16, 32) if b <= case.micro and case.pairs % b == 0]
    trial = measure(1, **{str(b): lambda b=b: their_update(theirs, case, data, b) for b in sizes})
    batch = min(sizes, key=lambda b: trial[str(b)]["cpu"][0])
    our_update(ours, case, data)
    error = gradient_error(ours, theirs)
    assert error <= GRADIENT, f"gradients differ by {error:.1e} from diffusers'"
    seconds = measure(
        repetitions,
        qirl=lambda: our_update(ours, case, data),
        diffusers=lambda: their_update(theirs, case, data, batch),
    )
    facts = {"references": case.references, "targets_per_backward": case.micro, "diffusers_batch": batch}
    return {**facts, "ratio": ratio(seconds, "diffusers"), "gradient_error": error, "seconds": seconds}


def bench_rollout(models, case: Case, steps: int, repetitions: int) -> dict:
    """Raises AssertionError if the finished latents differ."""
    theirs, ours = models
    condition, _, weights, t = case.draw()
    draws = stream(case.seed, [0] * case.pairs, list(range(case.pairs)), 0)
    noise = initial_noise(draws, case)
    data = (condition, noise, weights, t)
    got, expected = our_rollout(ours, case, data, steps), their_rollout(theirs, case, data, steps, shared=True)
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= LATENTS, f"latents differ by {error:.1e} from diffusers'"
    seconds = measure(
        repetitions,
        qirl=lambda: our_rollout(ours, case, data, steps),
        diffusers=lambda: their_rollout(theirs, case, data, steps, shared=True),
        diffusers_batch=lambda: their_rollout(theirs, case, data, steps, shared=False),
    )
    return {
        "references": case.references, "samples": case.pairs, "steps": steps, "ratio": ratio(seconds, "diffusers"),
        "ratio_batch": ratio(seconds, "diffusers_batch"), "latents_error": error, "seconds": seconds,
    }  # fmt: skip


def initial_noise(draws, case: Case) -> torch.Tensor:
    row = torch.arange(case.pairs).repeat_interleave(case.tokens)
    token = torch.arange(case.tokens).repeat(case.pairs)
    return normal(draws, row, token, CONFIG["in_channels"], 0, INITIAL).view(case.pairs, case.tokens, -1)


def bench_phases(steps: int, overrides: list[str]) -> dict:
    """Shares of one training step of configs/digits/t2i.yaml, on a model of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        start = configuration.load("pretrain", {})
        world = make_world(start.world)
        model = QwenImage21(model_config(start, world))
        initialise(model, 0)
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        save_model(model.config, model.state_dict(), f"{folder}/model")
        facts = {"world": world.name, "text_dim": world.text_dim, "unconditional": True}
        Path(folder, "model", WORLD_FILE).write_text(json.dumps(facts))
        places = [f"model.path={folder}/model", f"run.out={folder}/run", f"run.threads={torch.get_num_threads()}"]
        config = configuration.load("train", configs() / "digits/t2i.yaml", [*places, *overrides])
        trainer = open_trainer(config, ())
        records = [train_step(trainer, step) for step in range(steps + 1)][1:]  # the first trains the reward readers
    names = ("rollout", "reward", "update")
    medians = {name: statistics.median(r[f"time/{name}"] for r in records) for name in names}
    total = sum(medians.values())
    shares = {name: round(seconds / total, 3) for name, seconds in medians.items()}
    return {"shares": shares, "seconds": {name: [r[f"time/{name}"] for r in records] for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", required=True, help="measure on the CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/throughput_cpu.json")
    parser.add_argument("overrides", nargs="*", help="for the phases: policy.micro_tokens=4096 ...")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repetitions = 1 if args.quick else args.repetitions
    models = make_models()
    phases = bench_phases(1 if args.quick else 3, args.overrides)
    print("phases   " + "  ".join(f"{name} {share:.0%}" for name, share in phases["shares"].items()))
    updates, rollouts = [], []
    for references in (0, 1) if args.quick else (0, 1, 4, 8):
        updates.append(bench_update(models, Case(references), repetitions))
        print(
            "update   R={references}  {ratio:5.2f}x  (diffusers in batches of {diffusers_batch})".format(**updates[-1])
        )
    for references in (0, 1) if args.quick else (0, 1, 4):
        rollouts.append(bench_rollout(models, Case(references, pairs=8), 10, repetitions))
        print(
            "rollout  R={references}  {ratio:5.2f}x  (filling its cache per sample: {ratio_batch:.2f}x)".format(
                **rollouts[-1]
            )
        )
    missed = [f"update {u['references']}: {u['ratio']:.2f}x" for u in updates if u["ratio"] < WANTED[u["references"]]]
    missed += [f"rollout {r['references']}: {r['ratio']:.2f}x" for r in rollouts if r["ratio"] < 1]
    print(f"below the goal (by reference images): {', '.join(missed)}" if missed else "every goal is met")
    row = {
        "machine": machine(diffusers=diffusers.__version__),
        "model": CONFIG,
        "update": updates,
        "rollout": rollouts,
        "phases": phases,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(row) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
