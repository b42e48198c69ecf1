"""The transformer's ops in the kernel benchmark, beside what Liger and diffusers have for the same.

diffusers has functions for some; for the others a baseline is the lines of its transformer blocks or of its ring
attention, in the dtype of their inputs.
"""

from __future__ import annotations

import torch
from kernel_ops import ROWS, Baseline, Goal, Model, Op, Work, draw, rows_of

from qirl.kernels import gated_residual, merge_attention, norm_modulate, qk_norm_rope, residual_norm, swiglu

EPS = 1e-6


def _swiglu(tokens: int, model: Model, device: str) -> Work:
    gate, up = draw((tokens, 3 * model.width), (tokens, 3 * model.width), device=device)

    def liger():
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return Baseline(LigerSiLUMulFunction.apply, [gate, up])

    def diffusers():
        from diffusers.models.activations import SwiGLU

        module = SwiGLU(1, 1)
        module.proj = torch.nn.Identity()
        return Baseline(module, [torch.cat([up, gate], -1)])

    size = gate.nbytes
    others = {"liger": liger, "diffusers": diffusers}
    return Work(swiglu.swiglu, swiglu.reference, [gate, up], 3 * size, 5 * size, others)


def _by_sample(x: torch.Tensor) -> torch.Tensor:
    """[N, D] as [ROWS, N / ROWS, D]: diffusers has one modulation row a sample."""
    return x.unflatten(0, (ROWS, -1))


def _gated_residual(tokens: int, model: Model, device: str) -> Work:
    row, shape = rows_of(tokens, device), (tokens, model.width)
    inputs = draw(shape, shape, (ROWS, model.width), device=device)

    def block_lines(x, y, gate):
        gate = gate[:, None]
        return (_by_sample(x) + (gate.tanh() if model.bounded else gate) * _by_sample(y)).flatten(0, 1)

    run, reference = (
        lambda *x, f=f: f(*x, row, model.bounded) for f in (gated_residual.gated_residual, gated_residual.reference)
    )
    size = inputs[0].nbytes
    return Work(run, reference, inputs, 3 * size, 3 * size, {"diffusers": lambda: Baseline(block_lines, inputs)})


def _norm_modulate(tokens: int, model: Model, device: str) -> Work:
    row, width = rows_of(tokens, device), model.width
    inputs = draw((tokens, width), *[(ROWS, width)] * (1 + model.shifted), device=device)

    def diffusers():
        from diffusers.models.normalization import AdaLayerNormContinuous
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AdaLayerNormContinuous

        if model.shifted:
            module = AdaLayerNormContinuous(width, 1, elementwise_affine=False, eps=EPS)
        else:
            module = QwenImage21AdaLayerNormContinuous(width, 1, eps=EPS)
        module.silu = module.linear = torch.nn.Identity()  # the rows are given, not computed
        return Baseline(lambda x, *rows: module(_by_sample(x), torch.cat(rows, 1)).flatten(0, 1), inputs)

    def form(f):
        return lambda x, scale, shift=None: f(x, scale, row, EPS, shift)

    run, reference = form(norm_modulate.norm_modulate), form(norm_modulate.reference)
    size = inputs[0].nbytes
    return Work(run, reference, inputs, 2 * size, 3 * size, {"diffusers": diffusers})


def _residual_norm(tokens: int, model: Model, device: str) -> Work:
    row, width, shape = rows_of(tokens, device), model.width, (tokens, model.width)
    inputs = draw(shape, shape, *[(ROWS, width)] * (2 + model.shifted), device=device)

    def block_lines(x, y, gate, scale, shift=None):
        gate, scale = gate[:, None], scale[:, None]
        out = _by_sample(x) + (gate.tanh() if model.bounded else gate) * _by_sample(y)
        normed = torch.nn.functional.layer_norm(out, (width,), eps=EPS) * (1 + scale)
        normed = normed if shift is None else normed + shift[:, None]
        return out.flatten(0, 1), normed.flatten(0, 1)

    def form(f):
        return lambda x, y, gate, scale, shift=None: f(x, y, gate, scale, row, EPS, shift, model.bounded)

    run, reference = form(residual_norm.residual_norm), form(residual_norm.reference)
    size = inputs[0].nbytes
    return Work(run, reference, inputs, 4 * size, 6 * size, {"diffusers": lambda: Baseline(block_lines, inputs)})


def _qk_norm_rope(tokens: int, model: Model, device: str) -> Work:
    heads, dim = model.heads, model.width // model.heads
    x, weight = draw((tokens, heads, dim), (dim,), device=device)
    (angle,) = draw((tokens, dim // 2), device=device, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()

    def diffusers():
        from diffusers.models.normalization import RMSNorm
        from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen

        norm, turn = RMSNorm(dim, eps=EPS), torch.complex(cos, sin)

        def run(x, weight):
            normed = torch.func.functional_call(norm, {"weight": weight}, x[None])
            return apply_rotary_emb_qwen(normed, turn, use_real=False)[0]

        return Baseline(run, [x, weight])

    def liger():
        """Half of the heads as queries and half as keys, each head's even channels before its odd ones."""
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction

        apart = torch.arange(dim, device=device).view(-1, 2).T.reshape(-1)
        turn = cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]
        parts = [part[..., apart].contiguous() for part in x.chunk(2, dim=1)]

        def run(q, k, weight):
            normed = [LigerRMSNormFunction.apply(p.flatten(0, 1), weight, EPS, 0.0, "llama", False) for p in (q, k)]
            pair = [n.view(1, tokens, -1, dim).transpose(1, 2) for n in normed]
            return LigerRopeFunction.apply(*pair, *turn)

        def ours(pair):
            turned = torch.cat(pair, 1)[0].transpose(0, 1)
            return torch.empty_like(turned).index_copy_(-1, apart, turned)

        return Baseline(run, [*parts, weight[apart]], ours)

    run, reference = (lambda *t, f=f: f(*t, cos, sin, EPS) for f in (qk_norm_rope.qk_norm_rope, qk_norm_rope.reference))
    angles, size = 2 * angle.nbytes, x.nbytes
    others = {"liger": liger, "diffusers": diffusers}
    return Work(run, reference, [x, weight], 2 * size + angles, 3 * size + angles, others)


def _merge_attention(tokens: int, model: Model, device: str) -> Work:
    shape = tokens, model.heads, model.width // model.heads
    out_a, out_b = draw(shape, shape, device=device)
    lse_a, lse_b = draw(shape[:-1], shape[:-1], device=device, dtype=torch.float32)

    def ring_lines(out_a, lse_a, out_b, lse_b):
        out_a, out_b = out_a.float(), out_b.float()
        out = out_a - torch.sigmoid(lse_b - lse_a)[..., None] * (out_a - out_b)
        return out.bfloat16(), lse_a - torch.nn.functional.logsigmoid(lse_a - lse_b)

    def in_place(*tensors):
        merge_attention.merge_attention_(*tensors)
        return tensors[:2]

    inputs = [out_a, lse_a, out_b, lse_b]
    moved = 3 * out_a.nbytes + 3 * lse_a.nbytes
    others = {"diffusers": lambda: Baseline(ring_lines, inputs)}
    return Work(in_place, merge_attention.reference, inputs, moved, others=others)


OPS: dict[str, Op] = {
    "swiglu": Op(_swiglu, Goal(forward=0.85)),
    "gated_residual": Op(_gated_residual, Goal(forward=0.85)),
    "norm_modulate": Op(_norm_modulate, Goal(forward=0.80, backward=0.65)),
    "residual_norm": Op(_residual_norm, Goal(forward=0.85)),
    "qk_norm_rope": Op(_qk_norm_rope, Goal(forward=0.80)),
    "merge_attention": Op(_merge_attention, Goal(forward=0.85)),
}
