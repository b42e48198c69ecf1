"""Ops and whole runs on the simulated device, beside the same on the host: python placed_runs.py OUT.

Prints one JSON object a line: the check's name and its problem, null where there is none.
"""

import dataclasses
import json
import sys
import traceback
from pathlib import Path

import simulated_gpu
import torch
from distill_runs import config as distill_config
from distill_runs import save_teacher
from simulated_gpu import OnDevice, copies, waits
from tiny_runs import GUARD, GUIDED, SDE, pretrain_config, save_random_model, train_config
from torch.utils._pytree import tree_leaves

from qirl import engine
from qirl.distillation.trainer import distill
from qirl.kernels.group_advantage import CONVENTIONS, group_advantage
from qirl.parallel.data import Ranks
from qirl.policy.trainer import train
from qirl.pretraining import pretrain

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import kernel_times  # noqa: E402
import throughput  # noqa: E402
import throughput_baselines  # noqa: E402
from kernel_ops import Model, gradients  # noqa: E402

SHAPES = (Model("2.1", 64, 4), Model("1.x", 48, 3, shifted=True, bounded=False))
LORA = {"model": {"lora": {"rank": 2}}, "policy": {"kl": 0.1}, "optimizer": {"ema": 0.5}}
OFTEN = {"policy": {"epochs": 2, "minibatches": 2}}  # four updates a step
RUNS = {"nft": (), "nft, guided": (GUIDED,), "grpo": (SDE, OFTEN), "guard, lora": (GUARD, LORA)}
LONGER = {"flow": {"steps": 8}}
SMALL_PACKS = {"micro_tokens": 64}  # one target in each


def rules(device) -> None:
    """What every other check stands on: tensors apart do not meet, a mask is read, a number may come from anywhere."""
    here, there = torch.ones(3, device=device), torch.ones(3)
    for together in (lambda: here + there, lambda: here.add_(there), lambda: torch.stack([here, there])):
        try:
            together()
        except RuntimeError as problem:
            assert "on the host" in str(problem)
        else:
            raise AssertionError("the host's tensor was taken")
    waits.clear()
    assert (here * torch.tensor(2.0)).sum() == 6 and len(here[here > 0]) == 3 and sum(waits.values()) == 2


def op(name: str, model: Model, device) -> None:
    """Ours and the reference agree, outputs and gradients, and after a first call no other needs the host."""
    work = kernel_times.OPS[name].build(24, model, device)
    results = [_everything(function, work) for function in (work.run, work.reference)]
    assert all(isinstance(t, OnDevice) for found in results for t in found)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2**-6, atol=2**-6)
    waits.clear(), copies.clear()
    for function in (work.run, work.reference):
        _everything(function, work)
    assert not waits and not copies, f"no graph can be captured: {dict(waits)}, {dict(copies)}"


def _everything(function, work) -> list[torch.Tensor]:
    torch.manual_seed(1)
    outputs = tree_leaves(function(*(x.clone() for x in work.inputs)))  # an op may work in place
    return [*outputs, *(gradients(function, work.inputs)() if work.backward else ())]


def advantages(convention: str, device) -> None:
    """The op and the reference (of float64 tensors on a device without csrc)."""
    scores = torch.rand(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = scores, torch.ones(12, 2, dtype=torch.bool), torch.arange(12) // 4 * 10**12, torch.ones_like(scores)
    expected, valid = group_advantage(*tensors, convention=convention)
    placed = [t.to(device) for t in tensors]
    scale, floors = torch.ones_like(placed[0][:, 0]), torch.full_like(placed[0][0], 0.005)
    found = [
        group_advantage(*placed, convention=convention),
        kernel_times.kernel_sampler.group_advantage.reference(*placed, floors, 0.005, 5.0, convention, scale),
    ]
    for advantage, alive in found:
        torch.testing.assert_close(advantage.cpu(), expected)
        assert torch.equal(alive.cpu(), valid)


def against_diffusers(device) -> None:
    """What is timed on a GPU, but for the backward of diffusers' attention, which the simulated device does not have."""
    engine.start = lambda *_, **__: Ranks(device=torch.device(device))
    setting = dataclasses.replace(throughput.HEADLINE, references=1, **throughput_baselines.SMALL, lora=2)
    with throughput.Step(setting, str(device)) as ours:
        theirs = throughput_baselines.Baseline(setting, "same", str(device), ours.model.state_dict())
        expected, found = torch.stack([x.cpu() for x in ours.rollout().x0]), theirs.rollout().cpu()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert ours.update()["valid_pairs"] == setting.images * setting.nodes
        assert all(isinstance(p, OnDevice) for p in ours.model.parameters())


def run(name: str, start, device, out: Path) -> None:
    """start(folder, *parts) of a run: losses as on the host, as many waits with twice the steps and many packs, and one a
    training step for all its updates."""
    losses, counts = [], []
    longer = LONGER | {"distill" if name == "distill" else "policy": SMALL_PACKS}
    for place, parts in (("cpu", ()), (device, ()), (device, (longer,))):
        engine.start = lambda *_, place=place, **__: Ranks(device=torch.device(place))
        waits.clear()
        folder = out / f"{name} {len(counts)}"
        start(folder, *parts)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        counts.append(sum(waits.values()))
        assert place == "cpu" or waits_of_updates() == len(losses[-1]), f"an update waits: {dict(waits)}"
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-7)
    assert counts[0] == 0 < counts[1] == counts[2], f"{counts} waits; those of the last run: {dict(waits)}"


def waits_of_updates() -> int:
    """How often the host waited for optimizer, average, or the norms of a training step."""
    own = ("qirl/optim.py", "qirl/policy/weights.py", "torch.stack(list(norms))")
    return sum(count for line, count in waits.items() if any(part in line for part in own))


def main(out: Path) -> None:
    device = simulated_gpu.install()
    checks = {"rules": (rules, device)}
    checks |= {f"{name}, {m.name}": (op, name, m, device) for name in kernel_times.OPS for m in SHAPES}
    checks |= {f"advantages, {c}": (advantages, c, device) for c in CONVENTIONS}
    checks["throughput"] = against_diffusers, device
    base = save_random_model(out / "model")
    teachers = {n: {"path": str(save_teacher(base, out / n, i)), "guidance": 2} for i, n in enumerate("ab")}
    starts = {
        n: lambda folder, *parts, own=own: train(train_config(folder, base, *own, *parts), quiet=True)
        for n, own in RUNS.items()
    }
    starts["pretrain"] = lambda folder, *parts: pretrain(pretrain_config(folder), quiet=True)
    nodes = {"distill": {"nodes": 2}}
    starts["distill"] = lambda folder, *parts: distill(
        distill_config(folder, base, teachers, nodes, *parts), quiet=True
    )
    checks |= {name: (run, name, start, device, out) for name, start in starts.items()}
    for name, (check, *given) in checks.items():
        try:
            check(*given)
            problem = None
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps({"check": name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
