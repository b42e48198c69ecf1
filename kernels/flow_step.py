"""One sampler step: guidance, transition, its noise and its log-probability (algorithm page, section 2).

With dt = s - t < 0, x0 = x - t v, x1 = x + (1 - t) v, z ~ N(0, 1) and t~ = t, but `cap` where t = 1:

    ode    x' = x + v dt
    sde    q = a sqrt(t / (1 - t~));  mean = x (1 + q^2 / (2t) dt) + v (1 + q^2 (1 - t) / (2t)) dt;  std = q sqrt(-dt)
    cps    q = s sin(a pi / 2);       mean = (1 - s) x0 + sqrt(s^2 - q^2) x1;                      std = q
    dance  mean = x + v dt + a^2 / 2 (x - (1 - t) x0) / t^2 dt;                                    std = a sqrt(-dt)

    guided = v- + g (v+ - v-), with norm rescale times |v+| / |guided| per token
    logp   = mean of -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2;  cps: mean of -(x' - mean)^2

Everything in float32 (float64 for float64 inputs). Bytes: x, v+, v- read and x' written once; the noise is drawn inside.
Sources: Flow-GRPO (arXiv 2505.05470), CPS (arXiv 2509.05952), DanceGRPO (arXiv 2505.07818), Qwen-Image for the rescale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qirl.kernels import _native, philox, tritons
from qirl.kernels.dispatch import choose, compute_dtype
from qirl.kernels.philox import triton_normals
from qirl.kernels.rows import row_mean
from qirl.kernels.tritons import jit, tl

MODES = ("ode", "sde", "cps", "dance")
ODE, SDE, CPS, DANCE = range(4)


@dataclass(frozen=True)
class Step:
    """One transition of R samples: float32 [R] t, s < t and cap (the node that replaces t = 1), int64 [R] mode.

    level: the noise level a (sde, cps) or eta (dance).
    """

    t: torch.Tensor
    s: torch.Tensor
    cap: torch.Tensor
    mode: torch.Tensor
    level: float

    def rows(self, index: torch.Tensor) -> Step:
        return replace(self, t=self.t[index], s=self.s[index], cap=self.cap[index], mode=self.mode[index])

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """t, s, cap and mode as the kernels take them."""
        return *(p.float().contiguous() for p in (self.t, self.s, self.cap)), self.mode.contiguous()

    @property
    def sine(self) -> float:
        """sin(a pi / 2) of cps."""
        return math.sin(self.level * math.pi / 2)


@dataclass(frozen=True)
class Noise:
    """The draws of a transition: the samples' stream, each token's index in its target (int64 [N]), and the node, one for
    all samples or int64 [R]."""

    stream: philox.Stream
    token: torch.Tensor
    node: int | torch.Tensor

    @property
    def word(self) -> tuple[torch.Tensor | None, int]:
        """The second counter word: of every row, int64 [R], or None and the one of all rows."""
        if isinstance(self.node, torch.Tensor):
            return philox.step_words(self.stream, self.node, philox.TRANSITION), 0
        return None, philox.step_word(self.node, philox.TRANSITION)

    def draw(self, row: torch.Tensor, channels: int) -> torch.Tensor:
        """Standard normals float32 [N, channels]."""
        return philox.normal(self.stream, row, self.token, channels, self.node, philox.TRANSITION)


def guide(v_cond: torch.Tensor, v_uncond: torch.Tensor, guidance: float, rescale: bool) -> torch.Tensor:
    """Classifier-free guidance of [N, C] velocities, in float32."""
    dtype = compute_dtype(v_cond)
    v_cond, v_uncond = v_cond.to(dtype), v_uncond.to(dtype)
    guided = v_uncond + guidance * (v_cond - v_uncond)
    if rescale:
        guided = guided * (v_cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return guided


def coefficients(step: Step, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(on_x, on_v, std) [R] of every transition: mean = on_x x + on_v v; std is 0 for ode."""
    t, s, cap = (p.to(dtype) for p in (step.t, step.s, step.cap))
    dt, a = s - t, step.level
    q2 = a * a * t / (1 - torch.where(t < 1, t, cap))
    kept = torch.sqrt(s * s - (s * step.sine) ** 2)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    # for cps and dance x0 and x1 are written out in x and v
    on_x = [one, 1 + q2 / (2 * t) * dt, (1 - s) + kept, 1 + a * a / (2 * t) * dt]
    on_v = [dt, (1 + q2 * (1 - t) / (2 * t)) * dt, kept * (1 - t) - (1 - s) * t, (1 + a * a * (1 - t) / (2 * t)) * dt]
    std = [zero, torch.sqrt(q2 * -dt), s * step.sine, a * torch.sqrt(-dt)]
    return tuple(torch.stack(options).gather(0, step.mode[None])[0] for options in (on_x, on_v, std))


def mean_std(x: torch.Tensor, v: torch.Tensor, row: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [N, C] and std [R] (0 for ode) of the transition of tokens x, v [N, C]; row int64 [N] names the sample."""
    dtype = compute_dtype(x, v)
    on_x, on_v, std = coefficients(step, dtype)
    return x.to(dtype) * on_x[row, None] + v.to(dtype) * on_v[row, None], std


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mode: torch.Tensor, lengths: Sequence[int]):
    """Log-probability [R] of x_next [N, C] under a transition's mean [N, C] and std [R]; a mean over elements."""
    return _log_prob(row_mean((x_next.to(mean.dtype) - mean) ** 2, lengths), std, mode)


def _log_prob(squared: torch.Tensor, std: torch.Tensor, mode: torch.Tensor) -> torch.Tensor:
    normal = -squared / (2 * std * std) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return torch.where(mode == CPS, -squared, normal)


def reference(x, v_cond, v_uncond, row, step, guidance, rescale, noise, lengths, storage):
    v = v_cond.to(compute_dtype(v_cond)) if v_uncond is None else guide(v_cond, v_uncond, guidance, rescale)
    mean, std = mean_std(x, v, row, step)
    x_next = mean if noise is None else mean + std[row, None] * noise.draw(row, x.shape[1])
    if lengths is None:
        return x_next, None
    mean, _ = mean_std(x.to(storage), v, row, step)
    return x_next, log_prob(x_next.to(storage), mean, std, step.mode, lengths)


def _fused(op, x, v_cond, v_uncond, row, step, guidance, rescale, noise, lengths, storage):
    """The same by one of the ops below, which give the sum of squares of every token."""
    words, word = (None, 0) if noise is None else noise.word
    drawn = (None,) * 4 if noise is None else (noise.stream.prompt, noise.stream.sample, words, noise.token)
    seed = 0 if noise is None else _native.signed(noise.stream.seed)
    x, v_cond, v_uncond = tritons.contiguous(x, v_cond, v_uncond)
    x_next, squares = op(
        x, v_cond, v_uncond, row, *step.tensors, *drawn, step.level, step.sine, guidance, rescale,
        seed, lengths is not None, storage == torch.bfloat16, word,
    )  # fmt: skip
    if lengths is None:
        return x_next, None
    squared = row_mean(squares[:, None], lengths) / x.shape[1]
    return x_next, _log_prob(squared, coefficients(step, torch.float32)[2], step.mode)


@jit
def transition(t, s, cap, mode, level, sine):
    """(on_x, on_v, std) of transitions, in float32; see `coefficients`."""
    dt, q2 = s - t, level * level * t / (1 - tl.where(t < 1, t, cap))
    sde, dance = q2 / (2 * t), level * level / (2 * t)
    kept = tl.sqrt_rn(s * s - (s * sine) * (s * sine))
    root = tl.sqrt_rn(-dt)
    half = tl.where(mode == 1, sde, tl.where(mode == 3, dance, 0.0))
    on_x = tl.where(mode == 2, (1 - s) + kept, 1 + half * dt)
    on_v = tl.where(mode == 2, kept * (1 - t) - (1 - s) * t, (1 + half * (1 - t)) * dt)
    std = tl.where(
        mode == 1, tl.sqrt_rn(q2 * -dt), tl.where(mode == 2, s * sine, tl.where(mode == 3, level * root, 0.0))
    )
    return on_x, on_v, std


@jit
def transition_of(own, t, s, cap, mode, level, sine):
    """`transition` of the rows `own`."""
    return transition(tl.load(t + own), tl.load(s + own), tl.load(cap + own), tl.load(mode + own), level, sine)


@jit
def guided(cond, uncond, at, inside, guidance, GUIDED: tl.constexpr, RESCALE: tl.constexpr):
    """The velocities [tokens, channels] at `at`, in float32; see `guide`."""
    v = tl.load(cond + at, inside, other=0).to(tl.float32)
    if GUIDED:
        u = tl.load(uncond + at, inside, other=0).to(tl.float32)
        combined = u + guidance * (v - u)
        if RESCALE:
            before, after = tl.sum(v * v, 1), tl.sum(tl.where(inside, combined * combined, 0), 1)
            combined *= (tl.sqrt_rn(before) / tl.sqrt_rn(after))[:, None]
        v = combined
    return v


@jit
def tile(tokens, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's tokens [TOKENS] (past the end: the last one again) and which are there; its elements [TOKENS, CHANNELS]
    and which are there."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, CHANNELS)
    there = token < tokens
    inside = there[:, None] & (column < channels)[None, :]
    token = tl.minimum(token, tokens - 1)
    return token, there, token[:, None] * channels + column[None, :], inside


@jit
def bfloat16(x):
    """x rounded to bfloat16 and back (to the nearest, ties to even)."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@jit
def _kernel(
    x, cond, uncond, row, t, s, cap, mode, prompt, sample, word, index, x_next, squares, tokens, channels, level, sine,
    guidance, seed,
    GUIDED: tl.constexpr, RESCALE: tl.constexpr, NOISY: tl.constexpr, SQUARES: tl.constexpr, ROUNDS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, there, at, inside = tile(tokens, channels, TOKENS, CHANNELS)
    own = tl.load(row + token)
    on_x, on_v, std = transition_of(own, t, s, cap, mode, level, sine)
    v = guided(cond, uncond, at, inside, guidance, GUIDED, RESCALE)
    start = tl.load(x + at, inside, other=0).to(tl.float32)
    value = on_x[:, None] * start + on_v[:, None] * v
    if NOISY:
        quad = (tl.load(index + token) * (channels // 4))[:, None] + tl.arange(0, CHANNELS // 4)[None, :]
        c1 = tl.load(word + own).to(tl.uint32)[:, None]
        c2 = tl.load(sample + own).to(tl.uint32)[:, None]
        c3 = tl.load(prompt + own).to(tl.uint32)[:, None]
        z0, z1, z2, z3 = triton_normals(seed, c3, c2, c1, quad.to(tl.uint32))
        z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [TOKENS, CHANNELS])
        value += std[:, None] * z
    tl.store(x_next + at, value, inside)
    if SQUARES:
        if ROUNDS:
            start, value = bfloat16(start), bfloat16(value)
        error = tl.where(inside, value - (on_x[:, None] * start + on_v[:, None] * v), 0)
        tl.store(squares + token, tl.sum(error * error, 1), there)


@torch.library.custom_op(
    "qirl::flow_step_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor row, Tensor t, Tensor s, Tensor cap, Tensor mode, "
    "Tensor? prompt, Tensor? sample_word, Tensor? step_word, Tensor? token, float level, float sine, float guidance, "
    "bool rescale, int seed, bool squares, bool rounds, int word=0) -> (Tensor, Tensor)",
)
def _triton(
    x, v, uncond, row, t, s, cap, mode, prompt, sample, words, token, level, sine, guidance, rescale, seed, squares, rounds,
    word=0,
):  # fmt: skip
    x_next, sums = _outputs(x, v, squares)
    if x_next.numel():
        if prompt is not None and words is None:
            words = torch.full_like(prompt, word)
        counters = [row if c is None else c for c in (prompt, sample, words, token)]  # unread without noise
        grid, sizes = tritons.tiles(*x.shape)
        _kernel[grid](
            x, v, v if uncond is None else uncond, row, t, s, cap, mode, *counters, x_next, sums, *x.shape, level, sine,
            guidance, seed, GUIDED=uncond is not None, RESCALE=rescale, NOISY=prompt is not None, SQUARES=squares,
            ROUNDS=rounds, **sizes,
        )  # fmt: skip
    return x_next, sums


def _outputs(x, v, squares):
    return v.new_empty(v.shape, dtype=torch.float32), v.new_empty(len(v) if squares else 0, dtype=torch.float32)


def _fake(x, v, uncond, row, t, s, cap, mode, prompt, sample, words, token, level, sine, guidance, rescale, seed, squares,
          *rest):  # fmt: skip
    return _outputs(x, v, squares)


_triton.register_fake(_fake)
_native.register("flow_step", _fake)


def flow_step(
    x: torch.Tensor,
    v_cond: torch.Tensor,
    row: torch.Tensor,
    step: Step,
    v_uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    rescale: bool = False,
    noise: Noise | None = None,
    lengths: Sequence[int] | None = None,
    storage: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next state, float32 [N, C], and its log-probability [R] where `lengths` are given. Section 2.

    x, v_cond, v_uncond [N, C]; row int64 [N]. noise: of the transitions with a std; None where all are ode. lengths: tokens
    of every row (then rows are neighbours); the log-probability is of x and x' as rounded to `storage`.
    Raises ValueError for noise in channels that are not a multiple of 4.
    """
    if noise is not None:
        philox.check_channels(x.shape[1])
    fused = {}
    if _native.same(v_cond, v_uncond) and _native.same(x) and storage in (torch.float32, torch.bfloat16):
        fused = tritons.on(_triton, x, v_cond) | _native.on("flow_step", x, v_cond, row, step.t)
    fused = {name: functools.partial(_fused, op) for name, op in fused.items()}
    run = choose("flow_step", reference=reference, **fused)
    return run(x, v_cond, v_uncond, row, step, guidance, rescale, noise, lengths, storage)
