"""Tensor and sequence parallelism put on a transformer from outside: which layers are cut, where tokens enter and leave.

The model files know nothing of it: how many heads there are follows from the weights' shapes. `sharding_of` says how parameters
are cut, `parallelise` adds the collectives. With sequence parallelism every rank has the rows n = ceil(N / size) of the N
tokens between the blocks' parallel regions; embeddings and the output layer see all tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.models.qwen_image_21 import QwenImage21, QwenImage21Config
from qirl.parallel import collectives
from qirl.parallel.data import Ranks
from qirl.parallel.linear import Region
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
    """The transformer of 2.1."""
    blocks = model.transformer_blocks
    for block in blocks:
        attn, mlp = block.attn, block.img_mlp
        attn.register_forward_pre_hook(lambda _, a: (region.enter(a[0], len(a[1][0])), *a[1:]))
        attn.keys_values = _entering(attn.keys_values, region)
        region.row(attn.to_out[0])
        region.feed_forward(mlp, mlp.out)
    if not region.sequence:
        return
    axis = region.axis
    # every block's tokens read the modulation on their own rank: one all-reduce of its gradient for all blocks
    model.modulation.register_forward_hook(lambda _, inputs, out: collectives.copy(out, axis))
    # the prefix goes no further than the last block's keys and values: tokens are whole between the last two blocks
    whole = {0, len(blocks) - 1}, {len(blocks) - 2, len(blocks) - 1}
    for index, block in enumerate(blocks):
        if index in whole[0]:
            block.register_forward_pre_hook(lambda _, a: (collectives.split(a[0], axis), *a[1:]))
        block.register_forward_pre_hook(lambda _, a: (*a[:3], _own_rows_of(a[3], axis), a[4]))
        if index in whole[1]:
            block.register_forward_hook(lambda _, a, out: (collectives.join(out[0], axis, len(a[2][0])), out[1]))
    blocks[-1].keys_values = _splitting(blocks[-1].keys_values, axis)


def _entering(keys_values, region: Region):
    return lambda x, rope: keys_values(region.enter(x, len(rope[0])), rope)


def _splitting(keys_values, axis):
    def run(x, modulation, rope, row):
        return keys_values(collectives.split(x, axis), modulation, rope, collectives.own_rows(row, axis))

    return run


def _own_rows_of(pack, axis):
    """The pack as this rank's tokens are modulated by it; attention reads nothing of `row`."""
    [row] = _own_rows(pack, [pack.row], axis)
    return dataclasses.replace(pack, row=row)  # the memo is shared


def dual_stream(model: QwenImage, region: Region) -> None:
    """The transformer of 1.x. Its modulations hold a third of its weights: they are cut too, and their rows put together."""
    axis, blocks = region.axis, model.transformer_blocks
    for block in blocks:
        attn = block.attn
        block.register_forward_pre_hook(lambda _, a: (*a[:2], collectives.copy(a[2], axis), *a[3:]))  # temb
        attn.register_forward_pre_hook(lambda _, a: (*_streams(a, region), *a[2:]))
        region.whole_column(block.img_mod[1])
        region.whole_column(block.txt_mod[1])
        region.row(attn.to_out[0])
        region.row(attn.to_add_out)
        region.feed_forward(block.img_mlp, block.img_mlp.net[2])
        region.feed_forward(block.txt_mlp, block.txt_mlp.net[2])
        if region.sequence:
            block.register_forward_pre_hook(lambda _, a: (*a[:4], _own_rows(a[5], a[4], axis), *a[5:]))
    if region.sequence:
        blocks[0].register_forward_pre_hook(lambda _, a: (*(collectives.split(x, axis) for x in a[:2]), *a[2:]))
        blocks[-1].register_forward_hook(lambda _, a, out: (collectives.join(out[0], axis, _counts(a[5])[0]), out[1]))


def _streams(inputs, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
    image, text, _, pack = inputs
    images, texts = _counts(pack)
    return region.enter(image, images), region.enter(text, texts)


def _counts(pack) -> tuple[int, int]:
    """Tokens of images and of text."""
    texts = len(pack.text_row)
    return len(pack.order) - texts, texts


def _own_rows(pack, rows, axis) -> tuple[torch.Tensor, ...]:
    if "own rows" not in pack.memo:
        pack.memo["own rows"] = tuple(collectives.own_rows(row, axis) for row in rows)
    return pack.memo["own rows"]
