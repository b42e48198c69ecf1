"""Attention over two disjoint key sets from the attention over each, by their log-sum-exp.

    lse = log(exp(lse_a) + exp(lse_b));   share_b = exp(lse_b - lse) = sigmoid(lse_b - lse_a)
    out = out_a + share_b * (out_b - out_a)

Forward only: the backward of each part takes the merged out and lse and is exact (qirl.models.attention).
Bytes: two reads and one write of [N, H, D]. Source: Milakov and Gimelshein (online softmax, 2018).
"""

from __future__ import annotations

import torch

from qirl.kernels.dispatch import choose


def reference(out_a, lse_a, out_b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    share_b = torch.sigmoid(lse_b - lse_a)[..., None]
    out = torch.lerp(out_a.to(lse_a.dtype), out_b.to(lse_a.dtype), share_b)
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_* [..., D] in the model's dtype, lse_* [...] in float32 (float64 for float64): merged (out, lse)."""
    return choose("merge_attention", reference=reference)(out_a, lse_a, out_b, lse_b)
