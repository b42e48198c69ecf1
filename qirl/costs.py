"""FLOPs and activation memory of the transformer on a pack, by formula and on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qirl.config_sections import Section
from qirl.models.architecture import Transformer, recompute
from qirl.models.qwen_image import QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21Config
from qirl.models.weights import Config
from qirl.packing import JointPack, Pack, PackedBatch
from qirl.policy.packs import Layout, Prefix


@dataclass(frozen=True)
class Flops:
    """matmul: 2 x weights x tokens of every linear layer; attention: 4 x width x (query, key) pairs of every block.

    inputs: the part of matmul that embeds tokens and noise levels, where gradients end.
    """

    matmul: int = 0
    attention: int = 0
    inputs: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.attention + other.attention, self.inputs + other.inputs)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.matmul * times, self.attention * times, self.inputs * times)

    def as_dict(self) -> dict[str, int]:
        return {"matmul": self.matmul, "attention": self.attention, "total": self.matmul + self.attention}


def forward_flops(c: Config, body: Pack | None) -> Flops:
    """One forward of a pack: with its prefix, of targets only (`without_prefix`), or a prefill (no targets, or no pack)."""
    if body is None:
        return Flops()
    return _joint_flops(c, body) if isinstance(body, JointPack) else _shared_flops(c, body)


def _joint_flops(c: QwenImageConfig, body: JointPack) -> Flops:
    """The last block computes nothing but queries, keys and values for text."""
    w, targets, text = c.width, body.target_tokens, len(body.text_row)
    images, rows = targets + len(body.reference_row), len(body.lengths) + 1
    weights = c.num_layers * (12 * w * w * (images + text) + 12 * w * w * rows) - 9 * w * w * text
    inputs = (images * c.in_channels + text * c.joint_attention_dim + rows * (256 + w)) * w
    outputs = (rows * 2 * w + targets * c.latent_channels) * w
    return Flops(2 * (weights + inputs + outputs), 4 * w * c.num_layers * _pairs(body), 2 * inputs)


def _shared_flops(c: QwenImage21Config, body: PackedBatch) -> Flops:
    """The last block computes nothing but keys and values for prefix tokens. A causal text block counts as whole."""
    w, channels = c.width, c.latent_channels
    prefix, targets, text = body.prefix_tokens, body.target_tokens, body.text.shape[0]
    block = 4 * w * w + 3 * c.mlp_ratio * w * w
    weights = c.num_layers * (prefix + targets) * block - prefix * (block - 2 * w * w)
    rows = len(body.lengths) + 1  # noise levels: each target's, and 0 for prefixes
    inputs = text * (c.context_in_dim + w) * w + (prefix - text + targets) * c.in_channels * w
    inputs += rows * (256 + w + 4 * w) * w
    outputs = (rows * w + targets * channels) * w if targets else 0
    last = _pairs(body.without_prefix()) if targets else 0
    attention = 4 * w * ((c.num_layers - 1) * _pairs(body) + last)
    return Flops(2 * (weights + inputs + outputs), attention, 2 * inputs)


def _pairs(body: Pack) -> int:
    return sum(s.count * s.q_len * s.k_len for s in (*body.own, *getattr(body, "past", ())))


def training_flops(config: Section, model: Transformer, forward: Flops, tokens: int) -> Flops:
    """Forward and backward: 3 x forward. Frozen weights need no gradients of their own: 2 x (1 x where no adapter stands
    before them), plus the adapters' 3 x."""
    if not config.model.lora.rank:
        return forward * 3
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return forward * 2 + Flops(3 * 2 * adapters * tokens - forward.inputs)


def describe_packs(bodies: Sequence[Pack], prefix: int | None = None) -> dict[str, int]:
    """The number of packs and the size of the largest; prefix: that of the seam, where each prompt's runs on its own."""
    largest = max(bodies, key=lambda b: b.tokens)
    own = largest.prefix_tokens if prefix is None else prefix
    return {
        "packs": len(bodies), "prefix": own, "targets": largest.target_tokens, "seam": int(prefix is not None),
        "samples": len(largest.lengths), "tokens": sum(b.tokens for b in bodies) + (prefix or 0),
    }  # fmt: skip


def activation_bytes(model: Transformer, layout: Layout, body: Pack) -> int:
    """Bytes that are kept for the backward of one pack, counted by a forward on the meta device.

    With activation checkpointing: what is kept outside of the parts that run again, and the input of each of them; for whole
    blocks also what one keeps while it runs again (an attention's is less than what its block has freed by then).
    """
    blocks = list(model.transformer_blocks)
    what = next((name for name, on in _recomputed(blocks[0]).items() if on), "none")
    kept = _kept_bytes(model, layout, body)
    if what == "none":
        return kept
    recompute(model, "none")
    everything = _kept_bytes(model, layout, body)
    recompute(model, what)
    inputs = len(blocks) * body.tokens * model.config.width * next(model.parameters()).element_size()
    return kept + inputs + ((everything - kept) // len(blocks) if what == "block" else 0)


def _recomputed(block) -> dict[str, bool]:
    return {"block": block.recompute, "attention": block.attn.recompute}


def _kept_bytes(model: Transformer, layout: Layout, body: Pack) -> int:
    """Bytes that autograd saves in a forward of one pack."""
    device = torch.device("meta")
    fields = {f.name: getattr(body, f.name) for f in dataclasses.fields(body) if f.name != "memo"}
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    body = type(body)(**moved)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    x = torch.empty(body.target_tokens, model.config.in_channels, device=device)
    t = torch.empty(len(body.lengths), device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prefix = Prefix(model, layout, device)
        model(body, x, t, prefix.leaves)
    return sum(storage.nbytes() for storage in kept.values())
