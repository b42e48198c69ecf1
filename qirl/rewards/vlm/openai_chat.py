"""A judge behind OpenAI-compatible servers (vLLM, SGLang): POST /chat/completions with images as PNG data addresses.

The answer is begun for the model: the last message is the assistant's, with `continue_final_message` and without
`add_generation_prompt`, which both servers take. Source: vLLM's documentation of its OpenAI-compatible server.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence

import numpy as np

from qirl.config_rewards import Categorise, JudgeOptions
from qirl.data.images import encode
from qirl.errors import UserError
from qirl.rewards.remote import Replicas, ServerError, get
from qirl.rewards.vlm.reading import DIGITS, Written

TOP = 20  # log-probabilities asked for: the most that vLLM gives by default


def with_images(messages: list[dict], images: Sequence[np.ndarray]) -> list[dict]:
    """The messages with every {"type": "image"} replaced by the next image, as OpenAI's schema has it."""
    addresses = iter(["data:image/png;base64," + base64.b64encode(encode(image, 1)).decode() for image in images])

    def part(entry: dict) -> dict:
        if entry["type"] != "image":
            return entry
        return {"type": "image_url", "image_url": {"url": next(addresses)}}

    return [message | {"content": [part(entry) for entry in message["content"]]} for message in messages]


class OpenAIChat:
    """`reading.Chat` over HTTP."""

    def __init__(self, options: JudgeOptions | Categorise):
        self.options, self.replicas = options, Replicas(options)

    async def write(self, messages, images, prefix: str, stop: str, seed: int) -> Written:
        options = self.options
        return await self.say(messages, images, prefix, stop, seed, options.reasoning_tokens, options.temperature)

    async def say(
        self, messages, images, prefix: str, stop: str, seed: int, tokens: int, temperature: float = 0.0
    ) -> Written:
        """As `write`, of at most `tokens` tokens."""
        body = {"stop": [stop], "max_tokens": tokens, "temperature": temperature, "seed": seed}
        return await self._ask(messages, images, prefix, body, _written)

    async def digits(self, messages, images, prefix: str) -> list[float]:
        body = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": TOP}
        return await self._ask(messages, images, prefix, body, _digits)

    async def _ask(self, messages, images, prefix: str, options: dict, take: Callable[[dict], object]):
        begun = {"role": "assistant", "content": prefix}
        options = options | {
            "model": self.options.model, "n": 1, "continue_final_message": True, "add_generation_prompt": False
        }  # fmt: skip
        body = lambda: options | {"messages": [*with_images(messages, images), begun]}  # noqa: E731
        return await self.replicas.post("/chat/completions", body, lambda answer: take(_only_choice(answer)))


def check_servers(options: JudgeOptions | Categorise) -> None:
    """Raises UserError for a server that does not answer, or that does not serve the model: before anything is drawn."""
    for server in options.servers:
        listed = get(f"{server.rstrip('/')}/models", options)
        try:
            names = [entry["id"] for entry in listed["data"]]
        except (KeyError, TypeError):
            raise UserError(f"{server} is no OpenAI-compatible server: {server}/models lists no models") from None
        if options.model not in names:
            raise UserError(
                f"server {server} does not serve {options.model}; it serves {', '.join(names) or 'nothing'}"
            )


def _only_choice(answer: object) -> dict:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise ServerError(f"the server answered {count} choices to a request of one")
    return choices[0]


def _written(choice: dict) -> Written:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise ServerError("the server's answer has no text")
    return Written(text, choice.get("finish_reason") == "stop")


def _digits(choice: dict) -> list[float]:
    """Log-probabilities of the five digits; those that are not among the most probable have none."""
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {entry["token"]: float(entry["logprob"]) for entry in entries}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(f"the server's answer has no log-probabilities ({error!r})") from None
    if any(math.isnan(value) or value > 1e-3 for value in found.values()):
        raise ServerError("the server's answer holds what is no log-probability")
    return [found.get(digit, -math.inf) for digit in DIGITS]
