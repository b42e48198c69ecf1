"""How fast are rollout and update against diffusers' own module? Ratios inside one run, one JSON row.

    python benchmarks/throughput.py                                                     on a GPU
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/throughput.py --cpu     on a CPU

update   8 samples x 4 trained nodes of one prompt with R reference images of the target's size, forward and backward.
         qirl: packs with the shared prefix under a token budget. diffusers: batches of samples, each with its own
         prefix, at most as many targets in one backward; the fastest of the batch sizes that this allows.
         The gradients of both must agree before anything is timed.
rollout  8 samples of one prompt. qirl: prefill, cached steps, noise and sampler step. diffusers: its key-value cache,
         filled once for the prompt and shared by the batch (`ratio`), or per sample as its pipeline does
         (`ratio_batch`), and a bare Euler step.
phases   shares of rollout, reward and update in one step of the digits configuration.

A ratio is diffusers' time / qirl's time: the median over repetitions in which both run one after the other. With one
thread of a CPU it is taken from the CPU time of the process, which others on the machine disturb least; else from wall time,
until the GPU is done. On a CPU a small model computes in float32, in which both must agree to rounding. On a GPU one computes
in float32 for that, and one of the real width, heads and channels, six blocks deep, in bfloat16 for the times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache, QwenImage21Transformer2DModel

from qirl import config as configuration
from qirl.config_sections import Flow
from qirl.engine import initialise, model_config
from qirl.flow.grid import sigmas
from qirl.flow.rollout import rollout
from qirl.kernels.philox import INITIAL, normal, stream
from qirl.models.folders import WORLD_FILE
from qirl.models.qwen_image_21 import QwenImage21, model_time
from qirl.models.weights import load_model, save_model
from qirl.packing import Condition, Target
from qirl.paths import configs
from qirl.policy.packs import Pair, Prefix, lay_out
from qirl.policy.trainer import open_trainer, train_step
from qirl.run.folder import write_json
from qirl.run.machine import machine
from qirl.world import make_world

# The shape ratios of the 20B model, small: heads x head_dim = width, mlp_ratio 3, rotary axes 1 : 3.5 : 3.5.
CONFIG = dict(
    in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32, num_attention_heads=4, context_in_dim=128,
    mlp_ratio=3, axes_dims_rope=(4, 14, 14),
)  # fmt: skip
# what a GPU is timed with: 2.1's own block and channels, 512 x 512 pixels
LARGE = dict(
    in_channels=64, out_channels=64, num_layers=6, attention_head_dim=128, num_attention_heads=32, context_in_dim=3584,
    mlp_ratio=3, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
# (part, reference images), the most telling first
CASES = (
    ("update", 1), ("rollout", 1), ("update", 0), ("rollout", 0), ("update", 4), ("rollout", 4), ("update", 8),
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
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.side * self.side

    @property
    def layout(self) -> tuple[tuple, ...]:
        before = self.text // 4
        return (("text", before), *[("image", self.side, self.side)] * self.references, ("text", self.text - before))

    def draw(self, model: QwenImage21) -> tuple[Condition, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The condition, latents and loss weights [pairs, tokens, C] in the model's dtype, t float32 [pairs]."""
        generator = torch.Generator().manual_seed(self.seed)
        gauss = lambda *shape: torch.randn(*shape, generator=generator).to(self.device, model.dtype)  # noqa: E731
        channels = model.config.in_channels
        images = tuple(gauss(self.tokens, channels) for _ in range(self.references))
        condition = Condition(gauss(self.text, model.config.context_in_dim), images, self.layout)
        latents, weights = gauss(self.pairs, self.tokens, channels), gauss(self.pairs, self.tokens, channels)
        return condition, latents, weights, torch.rand(self.pairs, generator=generator).to(self.device)


def make_models(device: str = "cpu", dtype: torch.dtype = torch.float32, **changes):
    """diffusers' module with random weights, and qirl's with the same ones."""
    torch.manual_seed(0)
    theirs = QwenImage21Transformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms away from their trivial start
            parameter.add_(0.05 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        theirs = QwenImage21Transformer2DModel.from_pretrained(folder, torch_dtype=dtype)
        return theirs.to(device), load_model(folder).to(device, dtype)


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
        hidden_states=torch.cat([*references, latents.to(condition.text.dtype)], 1),
        encoder_hidden_states=torch.cat(states).expand(batch, -1, -1),
        timestep=model_time(t, condition.text.dtype),
        img_shapes=[[(1, case.side, case.side)] * (case.references + 1)] * batch,
        img_mask=torch.tensor([mask + [True] * slots], device=case.device).expand(batch, -1),
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
    prefix = Prefix(model, layout, case.device)
    for members in layout.packs:
        body, members = layout.body(members, case.device), torch.tensor(members, device=case.device)
        v = model(body, latents[members].flatten(0, 1), t[members], prefix.leaves)
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
    grid = torch.from_numpy(sigmas(case.tokens, Flow(steps=steps))).to(case.device)
    cache = QwenImage21KVCache(len(model.transformer_blocks))
    for node in range(steps):
        mode = "cached" if node or shared else "extract"
        if shared and node == 0:
            model(**their_call(case, condition, x[:1], grid[:1]), kv_cache=cache, kv_cache_mode="extract")
            for layer in cache.layer_caches:
                layer.store(*(part.expand(len(x), -1, -1, -1) for part in layer.get()))
        call = their_call(case, condition, x, grid[node].expand(len(x)))
        v = model(**call, kv_cache=cache, kv_cache_mode=mode)[0][:, -case.tokens :]
        x = x + v.float() * (grid[node + 1] - grid[node])  # the state stays in float32
    return x


def draws_of(case: Case):
    return stream(case.seed, [0] * case.pairs, list(range(case.pairs)), 0, case.device)


def our_rollout(model, case: Case, data, steps: int) -> torch.Tensor:
    targets = [Target(0, case.side, case.side)] * case.pairs
    return rollout(model, [data[0]], targets, draws_of(case), Flow(steps=steps)).x0.view(case.pairs, case.tokens, -1)


def measure(repetitions: int, device: str, **runs: Callable) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, interleaved so that what disturbs one disturbs all; the first round is not counted."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = {name: {"wall": [], "cpu": []} for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            finish()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            finish()
            if repetition:
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["cpu"].append(time.process_time() - cpu)
    return seconds


def ratio(seconds: dict, device: str, over: str, under: str = "qirl") -> float:
    clock = "cpu" if device == "cpu" and torch.get_num_threads() == 1 else "wall"
    pairs = zip(seconds[over][clock], seconds[under][clock], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def check_update(models, case: Case) -> float:
    """The error of the gradients. Raises AssertionError if they differ."""
    (theirs, ours), data = models, case.draw(models[1])
    their_update(theirs, case, data, case.micro)
    our_update(ours, case, data)
    error = gradient_error(ours, theirs)
    assert error <= GRADIENT, f"gradients differ by {error:.1e} from diffusers'"
    return error


def bench_update(models, case: Case, repetitions: int) -> dict:
    (theirs, ours), data = models, case.draw(models[1])
    sizes = [b for b in (1, 2, 4, 8, 16, 32) if b <= case.micro and case.pairs % b == 0]
    trial = measure(1, case.device, **{str(b): lambda b=b: their_update(theirs, case, data, b) for b in sizes})
    batch = min(sizes, key=lambda b: trial[str(b)]["cpu" if case.device == "cpu" else "wall"][0])
    seconds = measure(
        repetitions,
        case.device,
        qirl=lambda: our_update(ours, case, data),
        diffusers=lambda: their_update(theirs, case, data, batch),
    )
    facts = {"references": case.references, "targets_per_backward": case.micro, "diffusers_batch": batch}
    return {**facts, "ratio": ratio(seconds, case.device, "diffusers"), "seconds": seconds}


def check_rollout(models, case: Case, steps: int) -> float:
    """The error of the finished latents. Raises AssertionError if they differ."""
    (theirs, ours), data = models, with_our_noise(models[1], case)
    got, expected = our_rollout(ours, case, data, steps), their_rollout(theirs, case, data, steps, shared=True)
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= LATENTS, f"latents differ by {error:.1e} from diffusers'"
    return error


def bench_rollout(models, case: Case, steps: int, repetitions: int) -> dict:
    (theirs, ours), data = models, with_our_noise(models[1], case)
    seconds = measure(
        repetitions,
        case.device,
        qirl=lambda: our_rollout(ours, case, data, steps),
        diffusers=lambda: their_rollout(theirs, case, data, steps, shared=True),
        diffusers_batch=lambda: their_rollout(theirs, case, data, steps, shared=False),
    )
    ratios = {f"ratio{end}": ratio(seconds, case.device, f"diffusers{end}") for end in ("", "_batch")}
    return {"references": case.references, "samples": case.pairs, "steps": steps, **ratios, "seconds": seconds}


def with_our_noise(model, case: Case) -> tuple:
    """The case's data, its latents the noise that our rollout starts from."""
    condition, latents, weights, t = case.draw(model)
    row = torch.arange(case.pairs, device=case.device).repeat_interleave(case.tokens)
    token = torch.arange(case.tokens, device=case.device).repeat(case.pairs)
    noise = normal(draws_of(case), row, token, latents.shape[-1], 0, INITIAL)
    return condition, noise.view(latents.shape), weights, t


def bench_phases(steps: int, overrides: list[str]) -> dict:
    """Shares of one training step of configs/digits/t2i.yaml, on a model of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        start = configuration.load("pretrain", {})
        family = make_world(start.world).family
        model = QwenImage21(model_config(start, family))
        initialise(model, 0)
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        save_model(model.config, model.state_dict(), f"{folder}/model")
        facts = {**family.facts(), "unconditional": True}
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no case that would end later; the first always runs"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions: does it run?")
    parser.add_argument(
        "--out", type=Path, help="JSON file; default benchmarks/results/throughput_cpu.json or _GPU.json"
    )
    parser.add_argument("overrides", nargs="*", help="for the phases: policy.micro_tokens=4096 ...")
    args = parser.parse_args(arguments)
    if not args.cpu and not torch.cuda.is_available():
        print("throughput: no CUDA device here; --cpu measures on the CPU", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    facts = machine(diffusers=diffusers.__version__)
    device, name = ("cpu", "cpu") if args.cpu else ("cuda", facts["gpu"].replace(" ", "_"))
    out = args.out or Path(__file__).parent / f"results/throughput_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    row = {"machine": facts, "model": CONFIG if args.cpu else LARGE}
    budget = Budget(args.seconds)
    compare(row, device, args.quick, args.repetitions, budget, lambda: write_json(out, row))
    # one process has one device, and the trainer takes the GPU where there is one
    if args.cpu != torch.cuda.is_available() and budget.allows():
        row["phases"] = bench_phases(1 if args.quick else 3, args.overrides)
        print("phases   " + "  ".join(f"{n} {share:.0%}" for n, share in row["phases"]["shares"].items()))
    missed = [
        f"update {u['references']}: {u['ratio']:.2f}x" for u in row["update"] if u["ratio"] < WANTED[u["references"]]
    ]
    missed += [f"rollout {r['references']}: {r['ratio']:.2f}x" for r in row["rollout"] if r["ratio"] < 1]
    if row["left_out"]:
        print(f"left out for want of time: {', '.join(row['left_out'])}")
    print(
        f"below the goal (by reference images): {', '.join(missed)}"
        if missed
        else "every goal is met by what was measured"
    )
    write_json(out, row)
    print(out)
    return 0


class Budget:
    """Seconds that cases may take: one is begun only if it ends in time, taking as long as the longest before it."""

    def __init__(self, seconds: float):
        self.end, self.longest = time.monotonic() + seconds, 0.0

    def allows(self) -> bool:
        return time.monotonic() + self.longest <= self.end or not self.longest

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.longest = max(self.longest, time.monotonic() - begun)


def compare(row: dict, device: str, quick: bool, repetitions: int, budget: Budget, write: Callable[[], None]) -> None:
    """Adds to row["update"] and ["rollout"], the most telling cases first, each checked before it is timed.

    Writes after every case; what the budget does not allow is named in row["left_out"].
    """
    exact = make_models(device)
    timed, side = (exact, 16) if device == "cpu" else (make_models(device, torch.bfloat16, **LARGE), 32)
    repetitions = 1 if quick else repetitions
    row.update(update=[], rollout=[], left_out=[])
    for part, references in CASES:
        if quick and references > 1:
            continue
        if not budget.allows():
            row["left_out"].append(f"{part} {references}")
            continue
        with budget.case():
            row[part].append(TIMED[part](exact, timed, references, side, device, repetitions))
        write()


def time_update(exact, timed, references: int, side: int, device: str, repetitions: int) -> dict:
    error = check_update(exact, Case(references, device=device))
    row = bench_update(timed, Case(references, side, device=device), repetitions) | {"gradient_error": error}
    print(
        "update   R={references}  {ratio:5.2f}x  (diffusers in batches of {diffusers_batch})".format(**row), flush=True
    )
    return row


def time_rollout(exact, timed, references: int, side: int, device: str, repetitions: int) -> dict:
    error = check_rollout(exact, Case(references, pairs=8, device=device), 10)
    row = bench_rollout(timed, Case(references, side, pairs=8, device=device), 10, repetitions)
    print(
        "rollout  R={references}  {ratio:5.2f}x  (filling its cache per sample: {ratio_batch:.2f}x)".format(**row),
        flush=True,
    )
    return row | {"latents_error": error}


TIMED = {"update": time_update, "rollout": time_rollout}


if __name__ == "__main__":
    raise SystemExit(main())
