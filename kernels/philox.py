"""Philox4x32-10: every random draw is a pure function of a key and a counter (algorithm page, section 1b).

    key     = low and high word of the 64-bit seed
    counter = (element // 4, step | purpose << 16, sample | iteration << 12, prompt)
    z       = sqrt(-2 ln u) * (cos 2 pi phi, sin 2 pi phi),  u = ((w0 >> 8) + 1) / 2^24,  phi = (w1 >> 8) / 2^24

so a draw does not depend on the batch, rank, layout or order it is made in. Constants: Salmon et al., "Parallel
Random Numbers: As Easy as 1, 2, 3" (2011), Random123. Bytes: 4 written per normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qirl.kernels import _native
from qirl.kernels.dispatch import choose

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
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=device)  # noqa: E731
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


def reference(seed, prompt, sample, row, token, channels, step) -> torch.Tensor:
    """Normals float32 [N, channels] of the N tokens; see `normal`. Evaluated in float64, then rounded."""
    quad = token[:, None] * (channels // 4) + torch.arange(channels // 4, device=token.device)
    counter = torch.stack(
        [quad, torch.full_like(quad, step), sample[row, None].expand_as(quad), prompt[row, None].expand_as(quad)], -1
    )
    w = words(counter, seed).view(*quad.shape, 2, 2)
    u = ((w[..., 0] >> 8) + 1).double() * 2.0**-24
    phi = (w[..., 1] >> 8).double() * (2.0**-24 * 2 * math.pi)
    z = torch.sqrt(-2 * torch.log(u))[..., None] * torch.stack([torch.cos(phi), torch.sin(phi)], -1)
    return z.float().reshape(token.shape[0], channels)


def normal(
    stream: Stream, row: torch.Tensor, token: torch.Tensor, channels: int, step: int, purpose: int
) -> torch.Tensor:
    """Standard normals for latent tokens.

    row, token: int64 [N], the sample of each token and its index inside that sample's target (element =
    token * channels + channel, whatever pack it is in). Returns float32 [N, channels]. Section 1b.
    Raises ValueError if channels is not a multiple of 4 (one Philox call serves four elements).
    """
    if channels % 4:
        raise ValueError(f"channels={channels} is not a multiple of 4: one Philox call makes four elements")
    native = {"native": _native.philox_normal} if _native.has(token.device) else {}
    run = choose("philox", reference=reference, **native)
    return run(stream.seed, stream.prompt, stream.sample, row, token, channels, step_word(step, purpose))


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
