"""Attention over two disjoint key sets from the attention over each, by their log-sum-exp, in place of the first.

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


def _reference_(out, lse, part, part_lse) -> None:
    merged = reference(out, lse, part, part_lse)
    out.copy_(merged[0])
    lse.copy_(merged[1])


@jit
def _kernel(
    out, lse, part, part_lse, rows, heads, dim, out_token, out_head, lse_token, lse_head, part_token, part_head,
    part_lse_token, part_lse_head, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head, column = row // heads, row % heads, tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (column < dim)
    of_lse, of_part_lse = token * lse_token + head * lse_head, token * part_lse_token + head * part_lse_head
    of_out = (token * out_token + head * out_head)[:, None] + column
    of_part = (token * part_token + head * part_head)[:, None] + column
    first = tl.load(lse + of_lse, row < rows, other=0)
    second = tl.load(part_lse + of_part_lse, row < rows, other=0)
    a = tl.load(out + of_out, inside, other=0).to(tl.float32)
    b = tl.load(part + of_part, inside, other=0).to(tl.float32)
    merged = a + tl.sigmoid(second - first)[:, None] * (b - a)
    largest = tl.maximum(first, second)
    tl.store(out + of_out, merged.to(out.dtype.element_ty), inside)
    tl.store(lse + of_lse, largest + tl.log(1 + tl.exp(tl.minimum(first, second) - largest)), row < rows)


@torch.library.custom_op(
    "qirl::merge_attention_",
    mutates_args=("out", "lse"),
    schema="(Tensor(a!) out, Tensor(b!) lse, Tensor part, Tensor part_lse) -> ()",
)
def _merge_(out, lse, part, part_lse):
    shapes = out.shape, lse.shape, part.shape, part_lse.shape
    assert shapes == 2 * (out.shape, out.shape[:-1]), shapes
    part = part if part.stride(-1) == 1 else part.contiguous()
    assert out.stride(-1) == 1, out.stride()
    tokens, heads, dim = out.shape
    if out.numel():
        width = triton.next_power_of_2(dim)
        some = max(1, tritons.BLOCK // width)
        strides = [s for x in (out, lse, part, part_lse) for s in x.stride()[:2]]
        grid = (triton.cdiv(tokens * heads, some),)
        _kernel[grid](out, lse, part, part_lse, tokens * heads, heads, dim, *strides, ROWS=some, DIM=width)


@_merge_.register_fake
def _(out, lse, part, part_lse):
    return None


def merge_attention_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merges part [N, H, D], part_lse [N, H] into out and lse of the same shapes, views or not.

    out and part are in the model's dtype and lie with D contiguous, lse and part_lse in float32 (float64 for float64).
    """
    tensors = out, lse, part, part_lse
    choose("merge_attention", reference=_reference_, **tritons.on(_merge_, *tensors))(*tensors)
