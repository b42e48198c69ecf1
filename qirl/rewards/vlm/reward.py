"""A judge as a reward: one component, (R - 1) / 4 in [0, 1]."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from qirl.config_rewards import JudgeOptions
from qirl.data.images import content_hash
from qirl.errors import UserError
from qirl.kernels.score_expectation import likert_to_unit
from qirl.rewards.protocol import NoisyScore, Sample, Scores
from qirl.rewards.remote import Refused, ServerError
from qirl.rewards.vlm.openai_chat import OpenAIChat, check_servers
from qirl.rewards.vlm.processor import check_aspect
from qirl.rewards.vlm.reading import Reading, read
from qirl.rewards.vlm.rubric import load_rubric


class JudgeReward:
    """Scores every sample by itself: its sources, its image, its prompt, which also seed the judge's reasoning.

    A score of several chains is `NoisyScore`, by their standard error. A reading that fails is NaN; refusal: the first that
    a server refused. Raises UserError at once for a rubric, a model folder or a server that does not serve.
    """

    def __init__(self, name: str, options: JudgeOptions):
        self.components, self.options = (name,), options
        self.rubric = load_rubric(options.rubric, options.omit)
        self.failures = Counter()  # what went wrong, and how often
        self.refusal: str | None = None
        if options.servers:
            check_servers(options)
            self.chat = OpenAIChat(options)
        else:
            from qirl.rewards.vlm.local_chat import LocalChat

            self.chat = LocalChat.load(
                options.model, options.pixels, options.reasoning_tokens, options.temperature, options.device
            )

    async def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        readings = await asyncio.gather(*(self.reading(sample) for sample in samples))
        scores = [(likert_to_unit(reading.score), reading.noise / 4) for reading in readings]
        return [{self.components[0]: s if math.isnan(noise) else NoisyScore(s, noise)} for s, noise in scores]

    async def reading(self, sample: Sample) -> Reading:
        """What the judge says of one sample; NaN, and a count in `failures`, where its servers do not answer or an image is
        thinner than a judge takes."""
        images = [fit(image, self.options.pixels) for image in (*sample.sources, sample.image)]
        try:
            for place, image in enumerate(images):
                check_aspect(image, "the image" if place == len(sample.sources) else "a source")
        except UserError as error:
            self.failures[str(error)] += 1
            return Reading(math.nan, ())
        messages = self.rubric.messages(sample.prompt, len(sample.sources))
        seed = int(content_hash(*images, text=sample.prompt)[:8], 16)  # not a number that depends on who asks, and when
        try:
            return await read(self.chat, messages, images, self.options.mode, self.options.chains, seed)
        except ServerError as error:
            self.failures[str(error)] += 1
            if isinstance(error, Refused):
                self.refusal = self.refusal or str(error)
            return Reading(math.nan, ())


def fit(image: np.ndarray, pixels: int) -> np.ndarray:
    """uint8 [H, W, 3], scaled down (Lanczos) to at most `pixels` pixels; as it is where it fits."""
    from PIL import Image

    height, width = image.shape[:2]
    if height * width <= pixels:
        return image
    factor = math.sqrt(pixels / (height * width))
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
