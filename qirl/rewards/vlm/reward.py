"""A judge as a reward: one component, (R - 1) / 4 in [0, 1]."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from qirl.config_rewards import JudgeOptions
from qirl.kernels.score_expectation import likert_to_unit
from qirl.rewards.protocol import Sample, Scores
from qirl.rewards.remote import ServerError
from qirl.rewards.vlm.openai_chat import OpenAIChat, check_servers
from qirl.rewards.vlm.reading import Reading, read
from qirl.rewards.vlm.rubric import load_rubric


class JudgeReward:
    """Scores every sample by itself: its sources, its image, its prompt. A reading that fails is NaN.

    read_noise: {name: pooled standard error of the K chains on the [0, 1] scale}, as far as it is known.
    Raises UserError at once for a rubric, a model folder or a server that does not serve.
    """

    def __init__(self, name: str, options: JudgeOptions):
        self.components, self.options = (name,), options
        self.rubric = load_rubric(options.rubric, options.omit)
        self.failures = Counter()  # what went wrong, and how often
        self._noise = [0.0, 0]
        if options.servers:
            check_servers(options)
            self.chat = OpenAIChat(options)
        else:
            from qirl.rewards.vlm.local_chat import LocalChat

            self.chat = LocalChat.load(options.model, options.pixels, options.reasoning_tokens, options.temperature)

    @property
    def read_noise(self) -> dict[str, float]:
        squares, count = self._noise
        return {self.components[0]: math.sqrt(squares / count)} if count else {}

    async def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        readings = await asyncio.gather(*(self.reading(sample) for sample in samples))
        return [{self.components[0]: likert_to_unit(reading.score)} for reading in readings]

    async def reading(self, sample: Sample) -> Reading:
        """What the judge says of one sample; NaN, and a count in `failures`, where its servers do not answer."""
        images = [fit(image, self.options.pixels) for image in (*sample.sources, sample.image)]
        messages = self.rubric.messages(sample.prompt, len(sample.sources))
        try:
            found = await read(self.chat, messages, images, self.options.mode, self.options.chains, seed=sample.id)
        except ServerError as error:
            self.failures[str(error)] += 1
            return Reading(math.nan, ())
        if not math.isnan(found.noise):
            self._noise[0] += (found.noise / 4) ** 2
            self._noise[1] += 1
        return found


def fit(image: np.ndarray, pixels: int) -> np.ndarray:
    """uint8 [H, W, 3], scaled down (Lanczos) to at most `pixels` pixels; as it is where it fits."""
    from PIL import Image

    height, width = image.shape[:2]
    if height * width <= pixels:
        return image
    factor = math.sqrt(pixels / (height * width))
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
