"""Attention over two disjoint key sets from the attention over each, by their log-sum-exp.

    lse = log(exp(lse_a) + exp(lse_b));   share_b = exp(lse_b - lse) = sigmoid(lse_b - lse_a)
    out = out_a + share_b * (out_b - out_a)

Forward only: the backward of each part takes the merged out and lse and is exact (qirl.models.attention).
Bytes: two reads and one write of [N, H, D]. Source: Milakov and Gimelshein (online softmax, 2018).
"""

from __future__ import annotations

import torch

from qirl.kernels import tritons
from qirl.kernels.dispatch import choose
from qirl.kernels.tritons import jit, tl, triton


def reference(out_a, lse_a, out_b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    share_b = torch.sigmoid(lse_b - lse_a)[..., None]
    out = torch.lerp(out_a.to(lse_a.dtype), out_b.to(lse_a.dtype), share_b)
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)


@jit
def _kernel(out_a, lse_a, out_b, lse_b, out, lse, rows, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    at = row[:, None] * dim + column
    inside = (row < rows)[:, None] & (column < dim)
    first = tl.load(lse_a + row, row < rows, other=0)
    second = tl.load(lse_b + row, row < rows, other=0)
    a = tl.load(out_a + at, inside, other=0).to(tl.float32)
    b = tl.load(out_b + at, inside, other=0).to(tl.float32)
    merged = a + tl.sigmoid(second - first)[:, None] * (b - a)
    largest = tl.maximum(first, second)
    tl.store(out + at, merged.to(out.dtype.element_ty), inside)
    tl.store(lse + row, largest + tl.log(1 + tl.exp(tl.minimum(first, second) - largest)), row < rows)


@torch.library.custom_op(
    "qirl::merge_attention",
    mutates_args=(),
    schema="(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
)
def _merge(out_a, lse_a, out_b, lse_b):
    shapes = out_a.shape, lse_a.shape, out_b.shape, lse_b.shape
    assert shapes == 2 * (out_a.shape, out_a.shape[:-1]), shapes
    out_a, lse_a, out_b, lse_b = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    out, lse, dim = torch.empty_like(out_a), torch.empty_like(lse_a), out_a.shape[-1]
    if out.numel():
        width = triton.next_power_of_2(dim)
        some = max(1, tritons.BLOCK // width)
        grid = (triton.cdiv(lse.numel(), some),)
        _kernel[grid](out_a, lse_a, out_b, lse_b, out, lse, lse.numel(), dim, ROWS=some, DIM=width)
    return out, lse


@_merge.register_fake
def _(out_a, lse_a, out_b, lse_b):
    return tritons.contiguous_like(out_a), tritons.contiguous_like(lse_a)


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_* [..., D] in the model's dtype, lse_* [...] in float32 (float64 for float64): merged (out, lse)."""
    tensors = out_a, lse_a, out_b, lse_b
    return choose("merge_attention", reference=reference, **tritons.on(_merge, *tensors))(*tensors)
