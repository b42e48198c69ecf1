"""Tensor and sequence parallelism put on a transformer from outside: which layers are cut, where tokens enter and leave.

The model files know nothing of it: how many heads there are follows from the weights' shapes. `sharding_of` says how parameters
are cut, `parallelise` adds the collectives. With sequence parallelism every rank has the rows n = ceil(N / size) of the N
tokens between the blocks' parallel regions; embeddings and the output layer see all tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.packing import JointPack, Pack
from qirl.parallel import collectives
from qirl.parallel.data import Ranks
from qirl.parallel.linear import Region
from qirl.parallel.mesh import Axis
from qirl.parallel.sharding import Plan, Sharding

SINGLE_STREAM = Plan(
    column=("attn.to_q", "attn.to_k", "attn.to_v", "img_mlp.proj", "img_mlp.gate_layer"),
    row=("attn.to_out.0", "img_mlp.out"),
    heads=("attn.norm_q", "attn.norm_k"),
)
DUAL_STREAM = Plan(
    column=(
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
        *("img_mlp.net.0.proj", "txt_mlp.net.0.proj", "img_mod.1", "txt_mod.1"),
    ),
    row=("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2"),
    heads=("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
)
PLANS = {QwenImage21Config: SINGLE_STREAM, QwenImageConfig: DUAL_STREAM}


def sharding_of(config: Any, ranks: Ranks) -> Sharding:
    """How the parameters of a transformer of this config lie on `ranks`."""
    return Sharding(PLANS[type(config)] if ranks.tp.size > 1 else Plan(), ranks)


def parallelise(model: nn.Module, ranks: Ranks, sequence: bool) -> nn.Module:
    """Adds the collectives to a model whose parameters are cut by `sharding_of`, in place: after adapters, before FSDP."""
    if ranks.tp.size > 1:
        own = {QwenImage21Config: single_stream, QwenImageConfig: dual_stream}[type(model.config)]
        own(model, Region(ranks.tp, sequence))
    return model


def single_stream(model: QwenImage21, region: Region) -> None:
    """The transformer of 2.1: a block takes (x, modulation, rope, pack, past), its attention (x, rope, pack, past)."""

    def enter(_, inputs):
        x, rope, *rest = inputs
        return region.enter(x, len(rope[0])), rope, *rest

    for block in model.transformer_blocks:
        block.attn.register_forward_pre_hook(enter)
        block.attn.keys_values = _entering(block.attn.keys_values, region)
        region.row(block.attn.to_out[0])
        region.feed_forward(block.img_mlp, block.img_mlp.out)
    if region.sequence:
        _cut_tokens_single(model, region.axis)


def _entering(keys_values, region: Region):
    return lambda x, rope: keys_values(region.enter(x, len(rope[0])), rope)


def _cut_tokens_single(model: QwenImage21, axis: Axis) -> None:
    """Tokens are cut in the blocks. Between the last two they are whole: the prefix goes no further than the last block's keys
    and values."""

    def split(_, inputs):
        return collectives.split(inputs[0], axis), *inputs[1:]

    def own_rows(_, inputs):
        x, modulation, rope, pack, past = inputs
        [row] = _own_rows(pack, [pack.row], axis)
        return x, modulation, rope, dataclasses.replace(pack, row=row), past  # attention reads nothing of `row`

    def join(_, inputs, out):
        x, pair = out
        return collectives.join(x, axis, len(inputs[2][0])), pair

    def keys_values(x, modulation, rope, row, own=model.transformer_blocks[-1].keys_values):
        return own(collectives.split(x, axis), modulation, rope, collectives.own_rows(row, axis))

    # each rank's tokens read the modulation: one all-reduce of its gradient, for all blocks
    model.modulation.register_forward_hook(lambda _, inputs, out: collectives.copy(out, axis))
    blocks = model.transformer_blocks
    for index, block in enumerate(blocks):
        if index in (0, len(blocks) - 1):
            block.register_forward_pre_hook(split)
        block.register_forward_pre_hook(own_rows)
        if index >= len(blocks) - 2:
            block.register_forward_hook(join)
    blocks[-1].keys_values = keys_values


def dual_stream(model: QwenImage, region: Region) -> None:
    """The transformer of 1.x: a block takes (image, text, temb, rope, rows, pack, last), its attention (image, text, rope, pack).

    The blocks' modulations hold a third of the weights: they are cut too, and their rows put together on every rank.
    """

    def enter(_, inputs):
        image, text, rope, pack = inputs
        images, texts = _counts(pack)
        return region.enter(image, images), region.enter(text, texts), rope, pack

    def copy_time(_, inputs):
        image, text, temb, *rest = inputs
        return image, text, collectives.copy(temb, region.axis), *rest

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(copy_time)
        for modulation in (block.img_mod, block.txt_mod):
            region.whole_column(modulation[1])
        block.attn.register_forward_pre_hook(enter)
        for row in (block.attn.to_out[0], block.attn.to_add_out):
            region.row(row)
        for mlp in (block.img_mlp, block.txt_mlp):
            region.feed_forward(mlp, mlp.net[2])
    if region.sequence:
        _cut_tokens_dual(model, region.axis)


def _cut_tokens_dual(model: QwenImage, axis: Axis) -> None:
    """Tokens of both streams are cut from the first block to the last."""

    def split(_, inputs):
        image, text, *rest = inputs
        return collectives.split(image, axis), collectives.split(text, axis), *rest

    def own_rows(_, inputs):
        image, text, temb, rope, rows, pack, last = inputs
        return image, text, temb, rope, _own_rows(pack, rows, axis), pack, last

    def join(_, inputs, out):
        image, text = out
        return collectives.join(image, axis, _counts(inputs[5])[0]), text

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(own_rows)
    model.transformer_blocks[0].register_forward_pre_hook(split)
    model.transformer_blocks[-1].register_forward_hook(join)


def _counts(pack: JointPack) -> tuple[int, int]:
    """Tokens of images and of text."""
    texts = len(pack.text_row)
    return len(pack.order) - texts, texts


def _own_rows(pack: Pack, rows: Sequence[torch.Tensor], axis: Axis) -> tuple[torch.Tensor, ...]:
    """The rows of modulation of this rank's tokens, made once for a pack."""
    if "own rows" not in pack.memo:
        pack.memo["own rows"] = tuple(collectives.own_rows(row, axis) for row in rows)
    return pack.memo["own rows"]
