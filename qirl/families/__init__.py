"""A family: how text and images become what one kind of transformer takes, and its latents images again.

Nothing outside this folder knows a family's name: `qirl.world.make_world` takes the one of the run's data or model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from qirl.data.prompts import Prompt
from qirl.packing import Condition, Target


class Family(Protocol):
    """What training, sampling and evaluation ask of a family."""

    name: str
    channels: int  # of a latent token
    pixels: int  # of a token's side
    shared: bool  # whether the targets of a prompt share its condition, or each carries a copy
    rescale: bool  # whether its pipeline keeps the norm of the conditional velocity under guidance

    def size(self, prompt: Prompt) -> tuple[int, int]:
        """(height, width) of a prompt's target, in latent tokens."""

    def check(self, prompt: Prompt) -> None:
        """Raises UserError for a prompt that the family cannot take."""

    def condition(self, prompt: Prompt) -> Condition:
        """What the transformer is given of a prompt."""

    def sketch(self, prompt: Prompt, negative: bool = False) -> Condition:
        """A condition (or its twin's) of the right sizes, whose values mean nothing: for plans, which run no encoder."""

    def condition_tokens(self, prompt: Prompt) -> int:
        """How many tokens `condition` has, without its tensors."""

    def negative(self, prompt: Prompt) -> Condition:
        """The unconditional twin of a prompt; the same object for prompts that share it."""

    def encode(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Images uint8 [H, W, 3] to latents, float32 [tokens, channels], row by row. Sides are multiples of a token's."""

    def decode(self, latents: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Latents [tokens, channels] of these sizes to images, uint8 [H, W, 3]. A NaN gives a bad picture and no crash."""

    def architecture(self, options) -> Any:
        """The transformer's config for a model that starts from nothing, of the run's model.architecture.

        Raises UserError where the family trains published models only.
        """

    def fits(self, config) -> None:
        """Raises UserError for a transformer that takes other channels or texts than the family gives."""

    def suits(self, flow) -> None:
        """Raises UserError for a time grid that the family's models were not trained with."""

    def prepare(self, prompts: Sequence[Prompt], negatives: bool) -> None:
        """Makes the conditions of prompts, and with `negatives` of their twins, before a transformer needs the memory."""

    def encoder_bytes(self) -> int:
        """Bytes of the text encoder, which is on the device before the transformer is; 0 where there is none."""

    def autoencoder_bytes(self, size: tuple[int, int], encoding: bool = False) -> int:
        """Bytes of the autoencoder and of what it holds at most while it decodes, or encodes, an image of this size in latent
        tokens; it is on the device for that only. 0 where there is none."""

    def facts(self) -> dict[str, Any]:
        """What a model folder must say for the family to be found again."""


class Sketched:
    """A family whose conditions are sketches."""

    def __init__(self, family: Family):
        self.family = family

    def __getattr__(self, name: str):
        return getattr(self.family, name)

    def condition(self, prompt: Prompt) -> Condition:
        return self.family.sketch(prompt)

    def negative(self, prompt: Prompt) -> Condition:
        return self.family.sketch(prompt, negative=True)


def targets_of(family: Family, prompts: Sequence[Prompt], group: int = 1) -> list[Target]:
    """`group` images of every prompt, in their order."""
    return [Target(i, *family.size(prompt)) for i, prompt in enumerate(prompts) for _ in range(group)]


def largest_target(family: Family, prompts: Sequence[Prompt]) -> int:
    """Tokens of the largest image of these prompts."""
    return max(height * width for height, width in map(family.size, prompts))


def largest_sample(family: Family, prompts: Sequence[Prompt]) -> int:
    """Tokens of the largest image of these prompts with what it carries along: what a pack must hold at least."""
    carried = (0 if family.shared else family.condition_tokens(prompt) for prompt in prompts)
    return max(t.tokens + own for t, own in zip(targets_of(family, prompts), carried, strict=True))


def images_of(family: Family, latents: Sequence[torch.Tensor], targets: Sequence[Target]) -> list[np.ndarray]:
    """The images of finished latents, as `Family.decode` gives them."""
    return family.decode(latents, [(t.height, t.width) for t in targets])
