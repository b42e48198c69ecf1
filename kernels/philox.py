"""Philox4x32-10: every random draw is a pure function of a key and a counter (algorithm page, section 1b).

    key     = low and high word of the 64-bit seed
    counter = (element // 4, step | purpose << 16, sample | iteration << 12, prompt)
    z       = sqrt(-2 ln u) * (cos 2 pi phi, sin 2 pi phi),  u = ((w0 >> 8) + 1) / 2^24,  phi = (w1 >> 8) / 2^24

so a draw does not depend on the batch, rank, layout or order it is made in. The kernels evaluate z in float32: ln u and the
sine and cosine of a turn by series on reduced arguments, within 2e-6 of the reference. Constants: Salmon et al., "Parallel
Random Numbers: As Easy as 1, 2, 3" (2011), Random123. Bytes: 4 written per normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qirl.kernels import _native, tritons
from qirl.kernels.dispatch import choose
from qirl.kernels.tritons import jit, tl, triton

INITIAL, TRANSITION, LOSS, NODES, DATA = range(5)  # purposes

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Stream:
    """The draws of R samples: one row per sample, the same key for all. Build it with `stream`."""

    seed: int
    prompt: torch.Tensor  # int64 [R]
    sample: torch.Tensor  # int64 [R], sample | iteration << 12

    def rows(self, index: torch.Tensor) -> Stream:
        """The stream of the samples `index` (int64 [r])."""
        return Stream(self.seed, self.prompt[index], self.sample[index])

    def to(self, device: torch.device) -> Stream:
        return Stream(self.seed, *(t.to(device, non_blocking=True) for t in (self.prompt, self.sample)))


def stream(seed: int, prompt: list[int], sample: list[int], iteration: int, device="cpu") -> Stream:
    """Checks the ranges of section 1b once, on the host, and moves the counters to `device`.

    seed in [0, 2^64), prompt ids in [0, 2^32), sample indices in [0, 2^12), iteration in [0, 2^20).
    Raises ValueError outside of them: a wrapped counter would repeat noise silently.
    """
    _check("seed", seed, 64)
    _check("iteration", iteration, 20)
    for p, s in zip(prompt, sample, strict=True):
        _check("prompt id", p, 32)
        _check("sample index", s, 12)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)  # noqa: E731
    return Stream(seed, as_tensor(prompt), as_tensor([s | iteration << 12 for s in sample]))


def _check(name: str, value: int, bits: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise ValueError(f"{name}={value!r} must be an integer in [0, 2^{bits})")


def step_word(step: int, purpose: int) -> int:
    """The second counter word: denoising step (below 2^16) and purpose (0 to 4)."""
    _check("step", step, 16)
    return step | purpose << 16


def words(counter: torch.Tensor, seed: int) -> torch.Tensor:
    """Philox4x32-10 of int64 counters [..., 4] holding uint32 values: int64 words [..., 4]."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 wraps: all 64 bits of the product are right
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def reference(seed, prompt, sample, word, row, token, channels) -> torch.Tensor:
    """Normals float32 [N, channels] of the N tokens; see `normal`. Evaluated in float64, then rounded.

    word int64 [R]: step and purpose of each row, as `step_words` gives them.
    """
    quad = token[:, None] * (channels // 4) + torch.arange(channels // 4, device=token.device)
    counter = torch.stack([quad, *(c[row, None].expand_as(quad) for c in (word, sample, prompt))], -1)
    w = words(counter, seed).view(*quad.shape, 2, 2)
    u = ((w[..., 0] >> 8) + 1).double() * 2.0**-24
    phi = (w[..., 1] >> 8).double() * (2.0**-24 * 2 * math.pi)
    z = torch.sqrt(-2 * torch.log(u))[..., None] * torch.stack([torch.cos(phi), torch.sin(phi)], -1)
    return z.float().reshape(token.shape[0], channels)


def step_words(stream: Stream, step: int | torch.Tensor, purpose: int) -> torch.Tensor:
    """int64 [R]: the second counter word of every row. step: one for all, or int64 [R], each below 2^16."""
    if isinstance(step, torch.Tensor):
        return step | purpose << 16
    return torch.full_like(stream.prompt, step_word(step, purpose))


def normal(
    stream: Stream, row: torch.Tensor, token: torch.Tensor, channels: int, step: int | torch.Tensor, purpose: int
) -> torch.Tensor:
    """Standard normals for latent tokens.

    row, token: int64 [N], the sample of each token and its index inside that sample's target (element =
    token * channels + channel, whatever pack it is in); step: one for all rows, or int64 [R]. Returns float32 [N, channels].
    Section 1b. Raises ValueError if channels is not a multiple of 4 (one Philox call serves four elements).
    """
    check_channels(channels)
    native = _native.on("philox_normal", row, stream.prompt)
    run = choose("philox", reference=reference, **tritons.on(_triton, row), **native)
    seed = stream.seed if run is reference else _native.signed(stream.seed)
    return run(seed, stream.prompt, stream.sample, step_words(stream, step, purpose), row, token, channels)


def check_channels(channels: int) -> None:
    if channels % 4:
        raise ValueError(f"channels={channels} is not a multiple of 4: one Philox call makes four elements")


def uniform(stream: Stream, count: int, step: int, purpose: int) -> torch.Tensor:
    """Uniforms in (0, 1], float64 [R, count]: ((w >> 8) + 1) / 2^24 of the elements 0 .. count-1 of each sample."""
    quads = -(-count // 4)
    rows = stream.prompt.shape[0]
    quad = torch.arange(quads, device=stream.prompt.device).expand(rows, quads)
    counter = torch.stack(
        [
            quad,
            torch.full_like(quad, step_word(step, purpose)),
            stream.sample[:, None].expand_as(quad),
            stream.prompt[:, None].expand_as(quad),
        ],
        -1,
    )
    return ((words(counter, stream.seed).view(rows, quads * 4)[:, :count] >> 8) + 1).double() * 2.0**-24


@jit
def triton_normals(seed, prompt, sample, word, quad):
    """Four normals of the counters (quad, word, sample, prompt), uint32 blocks that broadcast; seed: its 64 bits, signed."""
    w0, w1, w2, w3 = tl.philox(seed, quad, word, sample, prompt)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return z0, z1, z2, z3


@jit
def _normal_pair(w0, w1):
    u = ((w0 >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    turn = (w1 >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    bits = u.to(tl.int32, bitcast=True)  # ln u = e ln 2 + 2 (s + s^3/3 + ...), u = m 2^e, s = (m - 1) / (m + 1)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - exponent * 8388608).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1, m + 1)
    q = s * s
    tail = q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11)))))
    squared = -2 * (exponent.to(tl.float32) * 0.69314718 + (2 * s + 2 * s * tail))
    radius = tl.sqrt_rn(tl.maximum(squared, 0.0))
    quarter = (turn * 4 + 0.5).to(tl.int32)  # exactly, to the nearest quarter turn; then the series on +-pi/4
    x = (turn - quarter.to(tl.float32) * 0.25) * 6.2831853
    q = x * x
    sine = x + x * q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * (1 / 362880))))
    cosine = 1 + q * (-0.5 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320 + q * (-1 / 3628800)))))
    swap = (quarter & 1) == 1
    signed = tl.where((quarter & 2) == 2, -1.0, 1.0) * tl.where(swap, cosine, sine)
    return radius * tl.where(((quarter + 1) & 2) == 2, -1.0, 1.0) * tl.where(swap, sine, cosine), radius * signed


@jit
def _kernel(row, token, prompt, sample, word, out, seed, calls, quads, BLOCK: tl.constexpr):
    call = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = call < calls
    own = tl.load(row + call // quads, inside, other=0)
    quad = tl.load(token + call // quads, inside, other=0) * quads + call % quads
    c1, c2 = tl.load(word + own).to(tl.uint32), tl.load(sample + own).to(tl.uint32)
    z0, z1, z2, z3 = triton_normals(seed, tl.load(prompt + own).to(tl.uint32), c2, c1, quad.to(tl.uint32))
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK * 4])
    element = tl.program_id(0).to(tl.int64) * BLOCK * 4 + tl.arange(0, BLOCK * 4)
    tl.store(out + element, z, element < calls * 4)


@torch.library.custom_op(
    "qirl::philox_normal_triton",
    mutates_args=(),
    schema="(int seed, Tensor prompt, Tensor sample_word, Tensor step_word, Tensor row, Tensor token, int channels) -> Tensor",
)
def _triton(seed, prompt, sample, word, row, token, channels):
    out = _fake(seed, prompt, sample, word, row, token, channels)
    if calls := out.numel() // 4:
        grid = (triton.cdiv(calls, 512),)
        _kernel[grid](row, token, prompt, sample, word, out, seed, calls, channels // 4, BLOCK=512)
    return out


def _fake(seed, prompt, sample, word, row, token, channels):
    return row.new_empty(len(row), channels, dtype=torch.float32)


_triton.register_fake(_fake)
_native.register("philox_normal", _fake)
_native.register("philox_words", lambda counter, seed: torch.empty_like(counter))
