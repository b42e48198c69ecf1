"""A world: prompts, condition encoder, autoencoder and built-in rewards that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from qirl.config import World
from qirl.data import digits
from qirl.data.prompts import Prompt, load_prompts
from qirl.data.words import WordVectors, parse
from qirl.packing import Condition
from qirl.rewards.protocol import Reward


class DigitsWorld:
    """Handwritten digits: word vectors for a text encoder, folded pixels for an autoencoder."""

    name = "digits"
    channels = digits.CHANNELS
    height = width = digits.SIZE // 2  # latent tokens

    def __init__(self, options: World):
        self.text_dim = options.text_dim
        self.words = WordVectors(options.text_dim)
        self._text = lru_cache(maxsize=None)(lambda text: Condition(self.words.encode(text)))

    def condition(self, prompt: Prompt) -> Condition:
        """What the transformer is given of a prompt."""
        return self._text(prompt.text)

    def negative(self, prompt: Prompt) -> Condition:
        """The unconditional twin of a prompt; for text-to-image always the same object."""
        return self._text("")

    def prompts(self, split: str, path: str | None = None) -> list[Prompt]:
        """The built-in prompts of a split ("train" or "held_out"), or those of a file, each naming a known digit."""
        if path is None:
            return digits.prompts(split)
        prompts = load_prompts(path)
        for prompt in prompts:
            parse(prompt.text)
        return prompts

    def decode(self, latents: Sequence[torch.Tensor]) -> np.ndarray:
        """Latents [tokens, channels] each: uint8 images [n, H, W, 3]."""
        return digits.unfold(torch.stack([x.float() for x in latents]))

    def training_examples(self, u: np.ndarray) -> tuple[list[Prompt], torch.Tensor]:
        """Prompts and latents [n, tokens, channels] of n examples, a pure function of uniforms [n, digits.UNIFORMS]."""
        texts, images = digits.examples(u)
        return [Prompt(0, text) for text in texts], digits.fold(images)

    def rewards(self) -> list[Reward]:
        """The built-in rewards, trained on their own part of the data on first use and cached."""
        from qirl.rewards.digits import DigitRewards, reward_reader
        from qirl.run.cache import folder

        return [DigitRewards(reward_reader(folder()))]

    def judge(self):
        """The held-out judge: another part of the data, another network. Training never asks for it."""
        from qirl.rewards.digits import Judge, judge_reader
        from qirl.run.cache import folder

        return Judge(judge_reader(folder()))


WORLDS = {"digits": DigitsWorld}


def make_world(options: World) -> DigitsWorld:
    return WORLDS[options.name](options)
