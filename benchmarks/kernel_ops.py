"""What the kernel benchmark times: an op's work at one shape, the baselines that compute the same, and the op's goals.

A file that registers ops (kernel_glue.py, kernel_sampler.py) holds a builder per op, and `OPS`: the builders with their goals by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

TOKENS = (1024, 4096, 16384)
ROWS = 8  # noise levels in a pack: equal parts of its tokens
TRANSFORMER_TESTS, SAMPLER_TESTS = "tests/test_triton_ops.py", "tests/test_fused_ops.py"
LARGE = 64 << 20  # bytes from which an op is measured by its bandwidth


@dataclass(frozen=True)
class Model:
    """What shapes depend on; shifted and plain: the form of the modulation."""

    name: str
    width: int
    heads: int
    shifted: bool = False
    bounded: bool = True


MODELS = (Model("Qwen-Image 2.1", 4096, 32), Model("Qwen-Image 1.x", 3072, 24, shifted=True, bounded=False))


@dataclass(frozen=True)
class Baseline:
    """Another project's way to compute an op: run(*inputs) in its own layout; ours: its outputs in the op's layout."""

    run: Callable
    inputs: list[torch.Tensor]
    ours: Callable = staticmethod(lambda outputs: outputs)


@dataclass(frozen=True)
class Work:
    """One op at one shape.

    run and reference take `inputs`, the floating tensors with a gradient if there is a backward, and close over the rest;
    constants: what else they read that is large.
    forward and backward: bytes they must move, 0 for none. others: baselines by name, built when they are asked for (an
    ImportError says that one is not installed).
    """

    run: Callable
    reference: Callable
    inputs: list[torch.Tensor]
    forward: int
    backward: int = 0
    others: Mapping[str, Callable[[], Baseline]] = field(default_factory=dict)
    constants: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Goal:
    """The least share of the copy bandwidth where at least LARGE bytes move."""

    forward: float
    backward: float = 0.70


@dataclass(frozen=True)
class Op:
    """build(tokens, model, device); tests: the file whose tests with the op's name must pass before it is timed; models:
    at whose shapes."""

    build: Callable[[int, Model, str], Work]
    goal: Goal
    tests: str = TRANSFORMER_TESTS
    models: tuple[Model, ...] = MODELS


# goals of every op, whatever its size
OF_FLOOR = 1.3  # smaller work: at most so many times (a launch + its bytes at the copy bandwidth)
OF_COMPILE = 1.05  # at most so many times the time of torch.compile, at every shape
OVER_EAGER = 3.0  # geometric mean of eager's time over ours


def gradients(function: Callable, inputs: Sequence[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that runs the backward of function(*inputs) alone, on copies: some backwards write over their inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = torch.utils._pytree.tree_leaves(function(*leaves))
    douts = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, douts, retain_graph=True)


def disagreement(work: Work, baseline: Baseline) -> float:
    """The largest |theirs - reference| / |reference| over the outputs."""
    theirs = torch.utils._pytree.tree_leaves(baseline.ours(baseline.run(*baseline.inputs)))
    wanted = torch.utils._pytree.tree_leaves(work.reference(*work.inputs))
    pairs = zip(theirs, wanted, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def draw(*shapes: Sequence[int], device: str, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def rows_of(tokens: int, device: str) -> torch.Tensor:
    """int64 [tokens]: each row's tokens one after another."""
    return torch.arange(tokens, device=device) * ROWS // tokens
