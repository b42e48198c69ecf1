"""The miniature family: word vectors for a text encoder, strokes and colours for an autoencoder, 2.1's transformer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from qirl.data import digits, latents
from qirl.data.edits import parse_instruction
from qirl.data.prompts import Prompt
from qirl.data.words import WordVectors, parse
from qirl.errors import UserError
from qirl.models.qwen_image_21 import QwenImage21Config
from qirl.packing import Condition


class Digits:
    """See `qirl.families.Family`. text_dim: width of the word vectors."""

    name, channels, pixels = "digits", latents.CHANNELS, latents.PATCH
    shared, rescale = True, False

    def __init__(self, text_dim: int):
        self.text_dim, self.words = text_dim, WordVectors(text_dim)
        self._text = lru_cache(maxsize=None)(lambda text: Condition(self.words.encode(text)))

    def size(self, prompt: Prompt) -> tuple[int, int]:
        return latents.SIDE, latents.SIDE

    def check(self, prompt: Prompt) -> None:
        """Raises UserError if a prompt of either task is not understood, or has sources of another number or size."""
        if not prompt.sources:
            parse(prompt.text)
            return
        edit = parse_instruction(prompt.text)
        if len(prompt.sources) != edit.sources:
            raise UserError(f"instruction '{prompt.text}' needs {edit.sources} source image{'s' * (edit.sources - 1)}, "
                            f"not {len(prompt.sources)}; name {edit.sources}")  # fmt: skip
        for number, source in enumerate(prompt.sources, start=1):
            if source.shape != (digits.SIZE, digits.SIZE, 3):
                raise UserError(f"source {number} of '{prompt.text}' has {source.shape[1]} x {source.shape[0]} pixels; "
                                f"the digits world edits {digits.SIZE} x {digits.SIZE}: resize it")  # fmt: skip

    def condition(self, prompt: Prompt) -> Condition:
        """The words of a prompt, for an edit after its sources (see `_with_sources`)."""
        return self._with_sources(prompt, prompt.text) if prompt.sources else self._text(prompt.text)

    def sketch(self, prompt: Prompt, negative: bool = False) -> Condition:
        return self.negative(prompt) if negative else self.condition(prompt)

    def condition_tokens(self, prompt: Prompt) -> int:
        return self.condition(prompt).tokens

    def negative(self, prompt: Prompt) -> Condition:
        """For text-to-image always the same object, for an edit its sources stay."""
        return self._with_sources(prompt, "") if prompt.sources else self._text("")

    def _with_sources(self, prompt: Prompt, text: str) -> Condition:
        """For each source one word "image:1" (":2") and its latents, then the words of `text`."""
        words = [self._text(f"image {number}").text for number in range(1, len(prompt.sources) + 1)]
        words.append(self._text(text).text)
        pictures = (("text", 1), ("image", *self.size(prompt))) * len(prompt.sources)
        references = tuple(self.encode(prompt.sources))
        return Condition(torch.cat(words), references, (*pictures, ("text", len(words[-1]))))

    def encode(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        return list(latents.encode(np.stack(images)))

    def decode(self, pictures: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        return list(latents.decode(torch.stack([x.float() for x in pictures])))

    def architecture(self, options) -> QwenImage21Config:
        return QwenImage21Config(
            in_channels=self.channels, out_channels=self.channels, num_layers=options.layers,
            attention_head_dim=options.head_dim, num_attention_heads=options.heads, context_in_dim=self.text_dim,
            mlp_ratio=options.mlp_ratio, axes_dims_rope=options.rope_axes,
        )  # fmt: skip

    def fits(self, config: Any) -> None:
        if not isinstance(config, QwenImage21Config):
            raise UserError(
                f"the digits world trains Qwen-Image 2.1's transformer, not {type(config).__name__.removesuffix('Config')}; set "
                "world.name=prompts for a model of Qwen-Image"
            )
        if (config.in_channels, config.context_in_dim) != (self.channels, self.text_dim):
            raise UserError(
                f"the model takes {config.in_channels} channels and text of width {config.context_in_dim}, the {self.name} "
                f"world gives {self.channels} and {self.text_dim}; set world.text_dim={config.context_in_dim}, take another "
                "model, or set world.name=prompts for a pipeline"
            )

    def suits(self, flow) -> None:
        """Any grid: models of digits are trained from nothing."""

    def prepare(self, prompts: Sequence[Prompt], negatives: bool) -> None:
        """Nothing to do: words are looked up."""

    def encoder_bytes(self) -> int:
        return 0

    def autoencoder_bytes(self, size: tuple[int, int], encoding: bool = False) -> int:
        return 0

    def facts(self) -> dict[str, Any]:
        return {"world": self.name, "text_dim": self.text_dim}
