"""Rows of activations, gradients or weights in 8-bit floats, with one scale a row for products of torch._scaled_mm.

    scale = max |row| / largest of the 8-bit type (1 for a row of zeros);   values = row / scale, rounded to nearest even

Several tensors of the same rows are written side by side under a common scale: their products with weights laid side by
side add up inside one matrix product. Bytes: one read of the inputs, one write of half of them (from 16 bits).
Source: Micikevicius et al., FP8 Formats for Deep Learning (2022): e4m3 (largest 448) for weights and activations,
e5m2 (largest 57344) for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose
from qirl.kernels.tritons import jit, tl, triton

MOST = 3  # tensors side by side


def reference(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.cat([p.float() for p in parts], 1)
    largest = rows.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / torch.finfo(dtype).max, 1.0)
    return (rows / scale).to(dtype), scale


@jit
def _kernel(
    a, b, c, out, scale, width, stride_a, stride_b, stride_c, LARGEST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    first = tl.load(a + row * stride_a + at, inside, other=0).to(tl.float32)
    largest = tl.max(tl.abs(first))
    if PARTS > 1:
        second = tl.load(b + row * stride_b + at, inside, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(second)))
    if PARTS > 2:
        third = tl.load(c + row * stride_c + at, inside, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(third)))
    unit = tl.where(largest > 0, largest / LARGEST, 1.0)
    tl.store(scale + row, unit)
    own = out + row * width * PARTS + at
    tl.store(own, (first / unit).to(out.dtype.element_ty), inside)
    if PARTS > 1:
        tl.store(own + width, (second / unit).to(out.dtype.element_ty), inside)
    if PARTS > 2:
        tl.store(own + 2 * width, (third / unit).to(out.dtype.element_ty), inside)


@torch.library.custom_op(
    "qirl::quantise_rows", mutates_args=(), schema="(Tensor[] parts, ScalarType dtype) -> (Tensor, Tensor)"
)
def _quantise(parts, dtype):
    parts = [p if p.stride(1) == 1 else p.contiguous() for p in parts]
    rows, width = parts[0].shape
    values, scale = _empty(parts, dtype)
    if rows:
        block = triton.next_power_of_2(width)
        a, b, c = (parts + parts[:1] * MOST)[:MOST]
        _kernel[(rows,)](
            a, b, c, values, scale, width, a.stride(0), b.stride(0), c.stride(0), LARGEST=torch.finfo(dtype).max,
            PARTS=len(parts), BLOCK=block, num_warps=tritons.warps(block * len(parts)),
        )  # fmt: skip
    return values, scale


@_quantise.register_fake
def _empty(parts, dtype):
    rows, width = parts[0].shape
    values = parts[0].new_empty((rows, width * len(parts)), dtype=dtype)
    return values, parts[0].new_empty((rows, 1), dtype=torch.float32)


def quantise_rows(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One to three tensors [N, K] of one shape: (values [N, K * parts] in `dtype`, scale float32 [N, 1]).

    dtype: torch.float8_e4m3fn or torch.float8_e5m2. Not differentiable.
    """
    assert 1 <= len(parts) <= MOST and len({p.shape for p in parts}) == 1, [p.shape for p in parts]
    return choose("quantise_rows", reference=reference, **tritons.on(_quantise, *parts))(list(parts), dtype)
