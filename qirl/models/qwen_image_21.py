"""The single-stream transformer of Qwen-Image 2.1 on packed sequences with a shared prefix.

Text, reference images and targets share one token axis and one set of blocks; a shared modulation feeds them all.
Prefix tokens are modulated at t = 0 and never see a target, so they are computed once for all targets of a prompt.
Parameter names, shapes and mathematics are those of diffusers' `QwenImage21Transformer2DModel`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from qirl.errors import UserError
from qirl.kernels.gated_residual import gated_residual
from qirl.kernels.norm_modulate import norm_modulate
from qirl.kernels.qk_norm_rope import qk_norm_rope
from qirl.kernels.residual_norm import residual_norm
from qirl.kernels.swiglu import swiglu
from qirl.models.architecture import Recomputed, check_sizes, from_diffusers
from qirl.models.attention import packed_attention
from qirl.models.linear import together
from qirl.models.rope import Rope
from qirl.packing import PackedBatch

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
MakeLinear = Callable[[int, int], nn.Module]


@dataclasses.dataclass(frozen=True)
class QwenImage21Config:
    """The fields of the diffusers config, with its defaults."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = 64
    num_layers: int = 32
    attention_head_dim: int = 128
    num_attention_heads: int = 32
    context_in_dim: int = 4096
    mlp_ratio: int = 3
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    eps: float = 1e-6
    causal_condition: bool = True

    def __post_init__(self):
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        check_sizes(self)
        if not self.causal_condition:
            raise UserError(
                "causal_condition=false is not supported: the prefix would depend on the noise level; use a model with true"
            )
        if self.patch_size != 1:
            raise UserError(f"patch_size={self.patch_size} is not supported; 2.1 models have patch_size 1")
        if type(self.eps) not in (int, float) or not 0 < self.eps < 1:
            raise UserError(f"model config field eps={self.eps!r} must be a number in (0, 1), such as 1e-6")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the velocity."""
        return self.out_channels or self.in_channels

    @classmethod
    def from_dict(cls, values: dict) -> QwenImage21Config:
        """From a diffusers config.json. Raises UserError for a field that is not supported, by name."""
        return from_diffusers(cls, values)


def plain_linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(Recomputed):
    backend = None  # of qirl.models.attention_backends; None: the fastest that serves

    def __init__(self, config: QwenImage21Config, make_linear: MakeLinear):
        super().__init__()
        self.head_dim, self.eps = config.attention_head_dim, config.eps
        self.to_q = make_linear(config.width, config.width)
        self.to_k = make_linear(config.width, config.width)
        self.to_v = make_linear(config.width, config.width)
        self.to_out = nn.ModuleList([make_linear(config.width, config.width)])
        self.norm_q, self.norm_k = Weight(torch.ones(self.head_dim)), Weight(torch.ones(self.head_dim))

    def keys_values(self, x, rope):
        k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in together(x, self.to_k, self.to_v))
        return qk_norm_rope(k, self.norm_k.weight, *rope, self.eps), v

    def run(self, x, rope, pack: PackedBatch, past):
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in together(x, self.to_q, self.to_k, self.to_v))
        q, k = (qk_norm_rope(y, n.weight, *rope, self.eps) for y, n in ((q, self.norm_q), (k, self.norm_k)))
        out = packed_attention(q, k, v, *(past or (None, None)), pack, self.backend)
        return self.to_out[0](out.flatten(1)), (k, v)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, make_linear: MakeLinear):
        super().__init__()
        self.proj = make_linear(width, hidden)
        self.out = make_linear(hidden, width)
        self.gate_layer = make_linear(width, hidden)

    def forward(self, x):
        return self.out(swiglu(*together(x, self.gate_layer, self.proj)))


class Block(Recomputed):
    def __init__(self, config: QwenImage21Config, make_linear: MakeLinear):
        super().__init__()
        self.eps = config.eps
        self.attn = Attention(config, make_linear)
        self.img_mlp = FeedForward(config.width, config.width * config.mlp_ratio, make_linear)

    def run(self, x, modulation, rope, pack: PackedBatch, past):
        """x [N, W], modulation [rows, 4 W] (scale, gate of attention, then of the MLP): (x, keys and values)."""
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        attended, pair = self.attn(norm_modulate(x, scale1, pack.row, self.eps), rope, pack, past)
        x, normed = residual_norm(x, attended, gate1, scale2, pack.row, self.eps)
        return gated_residual(x, self.img_mlp(normed), gate2, pack.row), pair

    def keys_values(self, x, modulation, rope, row):
        """All that targets need of the last block's prefix."""
        return self.attn.keys_values(norm_modulate(x, modulation.chunk(4, dim=-1)[0], row, self.eps), rope)


class Weight(nn.Module):
    """A bare `weight` parameter under its own name."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(value)


class TextProjection(nn.Module):
    """RMSNorm with a zero-centred weight, then a two-layer MLP."""

    def __init__(self, config: QwenImage21Config, make_linear: MakeLinear):
        super().__init__()
        self.eps = config.eps
        self.text_norm = Weight(torch.zeros(config.context_in_dim))
        self.in_layer = make_linear(config.context_in_dim, config.width)
        self.out_layer = make_linear(config.width, config.width)

    def forward(self, x):
        normed = F.rms_norm(x.double() if x.dtype == torch.float64 else x.float(), x.shape[-1:], eps=self.eps)
        normed = (normed * (self.text_norm.weight.to(normed.dtype) + 1)).to(x.dtype)
        return self.out_layer(F.gelu(self.in_layer(normed), approximate="tanh"))


def model_time(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t [targets] in [0, 1] as diffusers' pipelines hand it to a model of `dtype`.

    In 16 bits they round 1000 t, and then its quotient by 1000; exported weights are sampled with that time.
    Source: section 1 of the algorithm page; QwenImage21Pipeline of diffusers 0.42.1.
    """
    return (1000 * t).to(dtype) / 1000 if dtype.itemsize < 4 else t.to(dtype)


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t (cosines first), then a two-layer MLP."""

    def __init__(self, width: int, make_linear: MakeLinear = plain_linear):
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = make_linear(256, width)
        self.timestep_embedder.linear_2 = make_linear(width, width)
        with torch.device("cpu"):  # a table as in Rope: never rounded by model.to(), copied to each device once
            rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        self.rates = {torch.device("cpu"): rates}

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        if t.device not in self.rates:
            self.rates[t.device] = self.rates[torch.device("cpu")].to(t.device)
        angles = self.angles(t.float()[:, None], self.rates[t.device])
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(t.dtype)
        return self.timestep_embedder.linear_2(F.silu(self.timestep_embedder.linear_1(waves)))

    @staticmethod
    def angles(t: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        """1000 t * rates, in diffusers' order of rounding."""
        return 1000.0 * t * rates


class QwenImage21(nn.Module):
    """See the module's docstring. `make_linear(inputs, outputs)` makes the linears of the blocks."""

    pad = 1

    def __init__(self, config: QwenImage21Config, make_linear: MakeLinear = plain_linear):
        super().__init__()
        self.config = config
        width, channels = config.width, config.latent_channels
        self.rope = Rope(config.axes_dims_rope)
        self.time_text_embed = TimeEmbedding(width)
        self.txt_in = TextProjection(config, plain_linear)
        self.img_in = plain_linear(config.in_channels, width)
        self.modulation = nn.Sequential(nn.SiLU(), plain_linear(width, 4 * width))
        self.transformer_blocks = nn.ModuleList(Block(config, make_linear) for _ in range(config.num_layers))
        self.norm_out = nn.Module()
        self.norm_out.linear = plain_linear(width, width)
        self.proj_out = plain_linear(width, channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype

    def forward(
        self,
        pack: PackedBatch,
        latents: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        past: KeysValues | None = None,
    ) -> torch.Tensor | KeysValues:
        """Velocity of the targets, or the prefix's keys and values.

        latents [target_tokens, C] and t float [targets] in [0, 1] (rounded as `model_time` says):
        returns the velocity [target_tokens, C_out] in the model's dtype. `past` is the result of a prefill of the
        same conditions, for a pack made with prefix=False. Without latents: the prefill, [P, H, D] pairs per layer.
        """
        if latents is None:
            return self._prefill(pack)
        if (past is None) != (pack.prefix_tokens > 0 or not pack.past):
            raise UserError(
                "a pack without its prefix needs `past` from a prefill, and a pack with its prefix takes none"
            )
        x = self._embed(pack, latents)
        modulation, temb = self._modulation(t, len(pack.lengths), x.device)
        rope = self._rotary(pack)
        for index, block in enumerate(self.transformer_blocks):
            kept = past[index] if past is not None else None
            if pack.prefix_tokens and index == len(self.transformer_blocks) - 1:  # its prefix output is never needed
                prefix, x = x.split([pack.prefix_tokens, pack.target_tokens])
                kept = self._prefill_block(block, prefix, modulation, pack)
                pack = pack.without_prefix()
                rope = self._rotary(pack)
            x, _ = block(x, modulation, rope, pack, kept)
        scale = self.norm_out.linear(F.silu(temb))
        return self.proj_out(norm_modulate(x, scale, pack.row, self.config.eps))

    def _prefill(self, pack: PackedBatch) -> KeysValues:
        x = self._embed(pack, None)
        modulation, _ = self._modulation(None, 0, x.device)
        rope = self._rotary(pack)
        kept = []
        for block in self.transformer_blocks[:-1]:
            x, pair = block(x, modulation, rope, pack, None)
            kept.append(pair)
        return [*kept, self._prefill_block(self.transformer_blocks[-1], x, modulation, pack)]

    def _prefill_block(self, block: Block, x, modulation, pack: PackedBatch):
        n = pack.prefix_tokens
        cos, sin = self._rotary(pack)
        return block.keys_values(x, modulation, (cos[:n], sin[:n]), pack.row[:n])

    def _embed(self, pack: PackedBatch, latents: torch.Tensor | None) -> torch.Tensor:
        """[N, W]: text states and reference latents in their places, then the targets."""
        parts, places = [], []
        if pack.prefix_tokens:
            parts.append(self.txt_in(pack.text.to(self.dtype)))
            places.append(pack.text_index)
            if pack.references is not None:
                parts.append(self.img_in(pack.references.to(self.dtype)))
                places.append(pack.reference_index)
        if len(parts) == 2:
            parts = [torch.cat(parts)[torch.argsort(torch.cat(places))]]
        if latents is not None:
            parts.append(self.img_in(latents.to(self.dtype)))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _modulation(self, t: torch.Tensor | None, targets: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows 0 (t = 0, prefix) and 1 .. targets."""
        zero = torch.zeros(1, dtype=self.dtype, device=device)
        if t is not None and t.shape != (targets,):
            raise UserError(f"t has shape {tuple(t.shape)}, the pack holds {targets} targets; give one t per target")
        temb = self.time_text_embed(zero if t is None else torch.cat([zero, model_time(t, self.dtype)]))
        return self.modulation(temb), temb

    def _rotary(self, pack: PackedBatch):
        if "rope" not in pack.memo:
            pack.memo["rope"] = self.rope(pack.position)
        return pack.memo["rope"]
