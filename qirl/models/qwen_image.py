"""The dual-stream transformer (MMDiT) of Qwen-Image 1.x on joint packs.

Text and images have weights of their own and meet in attention; both are modulated at the target's time, references at
t = 0 where the config says zero_cond_t (the Edit-Plus models of 2511). Parameter names, shapes and mathematics are those of
diffusers' `QwenImageTransformer2DModel`.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from qirl.errors import UserError
from qirl.kernels.gated_residual import gated_residual
from qirl.kernels.norm_modulate import norm_modulate
from qirl.kernels.qk_norm_rope import qk_norm_rope
from qirl.kernels.residual_norm import residual_norm
from qirl.models import qwen_image_21
from qirl.models.architecture import Recomputed, check_sizes, from_diffusers
from qirl.models.attention import packed_attention
from qirl.models.linear import together
from qirl.models.qwen_image_21 import MakeLinear, Weight, model_time
from qirl.models.rope import Rope
from qirl.packing import JointPack

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
    """The fields of the diffusers config, with its defaults."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    def __post_init__(self):
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        check_sizes(self)
        for name in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if getattr(self, name):
                raise UserError(f"model config field {name}=true is not supported; use a Qwen-Image or Edit model")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the velocity: a patch of patch_size x patch_size latents is one token."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)

    @classmethod
    def from_dict(cls, values: dict) -> QwenImageConfig:
        """From a diffusers config.json. Raises UserError for a field that is not supported, by name."""
        return from_diffusers(cls, values)


def biased_linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


class FeedForward(nn.Module):
    def __init__(self, width: int, make_linear: MakeLinear):
        super().__init__()
        self.net = nn.ModuleList([nn.Module(), nn.Identity(), make_linear(4 * width, width)])
        self.net[0].proj = make_linear(width, 4 * width)

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class JointAttention(Recomputed):
    backend = None  # of qirl.models.attention_backends; None: the fastest that serves

    def __init__(self, config: QwenImageConfig, make_linear: MakeLinear):
        super().__init__()
        width, self.head_dim = config.width, config.attention_head_dim
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            setattr(self, name, make_linear(width, width))
        self.to_out = nn.ModuleList([make_linear(width, width)])
        self.to_add_out = make_linear(width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, Weight(torch.ones(self.head_dim)))

    def run(self, image, text, rope, pack: JointPack):
        """Both streams' outputs of joint attention, before their output projections; [I + F, W] and [T, W]."""
        (cos, sin), heads = rope, (-1, self.head_dim)
        of_text, of_image = (cos[: len(text)], sin[: len(text)]), (cos[len(text) :], sin[len(text) :])
        norm = lambda x, weight, turn: qk_norm_rope(x, weight.weight, *turn, EPS)  # noqa: E731
        streams = (image, self.to_q, self.to_k, self.to_v), (text, self.add_q_proj, self.add_k_proj, self.add_v_proj)
        (q, k, v), (text_q, text_k, text_v) = ((y.unflatten(-1, heads) for y in together(*each)) for each in streams)
        q = norm(text_q, self.norm_added_q, of_text), norm(q, self.norm_q, of_image)
        k = norm(text_k, self.norm_added_k, of_text), norm(k, self.norm_k, of_image)
        q, k, v = (torch.cat(streams).index_select(0, pack.order) for streams in (q, k, (text_v, v)))
        out = packed_attention(q, k, v, None, None, pack, self.backend)
        out = out.flatten(1).index_select(0, pack.back)
        return out[len(text) :], out[: len(text)]


class Block(Recomputed):
    def __init__(self, config: QwenImageConfig, make_linear: MakeLinear):
        super().__init__()
        width = config.width
        self.attn = JointAttention(config, make_linear)
        self.img_mod, self.txt_mod = (nn.Sequential(nn.SiLU(), biased_linear(width, 6 * width)) for _ in range(2))
        self.img_mlp, self.txt_mlp = FeedForward(width, make_linear), FeedForward(width, make_linear)

    def run(self, image, text, temb, rope, rows, pack: JointPack, last: bool):
        """image [I + F, W], text [T, W]; rows: the row of temb of each token of (image, text). The last block's text
        is never read, and None is returned for it."""
        of_image, of_text = (m(temb).chunk(6, dim=-1) for m in (self.img_mod, self.txt_mod))
        image_row, text_row = rows
        seen = [
            norm_modulate(x, m[1], row, EPS, m[0])
            for x, m, row in ((image, of_image, image_row), (text, of_text, text_row))
        ]
        attended, attended_text = self.attn(*seen, rope, pack)
        image = self._rest(image, self.attn.to_out[0](attended), of_image, image_row, self.img_mlp)
        if last:
            return image, None
        return image, self._rest(text, self.attn.to_add_out(attended_text), of_text, text_row, self.txt_mlp)

    @staticmethod
    def _rest(x, attended, modulation, row, mlp):
        _, _, gate1, shift2, scale2, gate2 = modulation
        x, normed = residual_norm(x, attended, gate1, scale2, row, EPS, shift2, bounded=False)
        return gated_residual(x, mlp(normed), gate2, row, bounded=False)


class TimeEmbedding(qwen_image_21.TimeEmbedding):
    """That of 2.1 with biases; diffusers rounds in another order."""

    @staticmethod
    def angles(t: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        return 1000.0 * (t * rates)


class QwenImage(nn.Module):
    """See the module's docstring. `make_linear(inputs, outputs)` makes the linears of the blocks, with bias."""

    pad = 1

    def __init__(self, config: QwenImageConfig, make_linear: MakeLinear = biased_linear):
        super().__init__()
        self.config, width = config, config.width
        self.rope = Rope(config.axes_dims_rope)
        self.time_text_embed = TimeEmbedding(width, biased_linear)
        self.txt_norm = Weight(torch.ones(config.joint_attention_dim))
        self.img_in = biased_linear(config.in_channels, width)
        self.txt_in = biased_linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(Block(config, make_linear) for _ in range(config.num_layers))
        self.norm_out = nn.Module()
        self.norm_out.linear = biased_linear(width, 2 * width)
        self.proj_out = biased_linear(width, config.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype

    def forward(
        self,
        pack: JointPack | None,
        latents: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        past: None = None,
    ) -> torch.Tensor | None:
        """Velocity [target_tokens, patch_size^2 * out_channels] of the targets, in the model's dtype.

        latents [target_tokens, in_channels], t float [targets] in [0, 1] (rounded as `model_time` says). Without a pack there
        is nothing to prefill: None.
        """
        if pack is None:
            return None
        if t.shape != (len(pack.lengths),):
            raise UserError(
                f"t has shape {tuple(t.shape)}, the pack holds {len(pack.lengths)} targets; give one t per target"
            )
        images = latents if pack.references is None else torch.cat([latents, pack.references.to(latents.dtype)])
        image = self.img_in(images.to(self.dtype))
        text = self.txt_in(self._text_norm(pack.text.to(self.dtype)))
        t = model_time(t, self.dtype)
        temb = self.time_text_embed(torch.cat([t.new_zeros(1), t]))
        rows, rope = self._rows(pack), self._rotary(pack)
        for index, block in enumerate(self.transformer_blocks):
            image, text = block(image, text, temb, rope, rows, pack, index == self.config.num_layers - 1)
        scale, shift = self.norm_out.linear(F.silu(temb)).chunk(2, dim=-1)
        return self.proj_out(norm_modulate(image[: pack.target_tokens], scale, pack.image_row, EPS, shift))

    def _text_norm(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.double() if x.dtype == torch.float64 else x.float()
        return F.rms_norm(exact, x.shape[-1:], eps=EPS).to(x.dtype) * self.txt_norm.weight

    def _rows(self, pack: JointPack) -> tuple[torch.Tensor, torch.Tensor]:
        reference = pack.reference_row * (not self.config.zero_cond_t)  # row 0 is t = 0
        return torch.cat([pack.image_row, reference]), pack.text_row

    def _rotary(self, pack: JointPack) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin in the order of the streams."""
        if "rope" not in pack.memo:
            pack.memo["rope"] = tuple(part[pack.back] for part in self.rope(pack.position))
        return pack.memo["rope"]
