"""A judge behind OpenAI-compatible servers (vLLM, SGLang): POST /chat/completions with images as PNG data addresses.

The answer is begun for the model: the last message is the assistant's, with `continue_final_message` and without
`add_generation_prompt`, which both servers take. A request that fails is tried again on the next server, after a pause
that doubles and is jittered, or as long as Retry-After says. Source: vLLM's documentation of its OpenAI-compatible server.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import math
import os
import random
from collections.abc import Sequence

import numpy as np

from qirl.errors import UserError
from qirl.rewards.vlm.options import JudgeOptions
from qirl.rewards.vlm.reading import DIGITS, Written

PATIENCE = 60.0  # longest pause, in seconds, whatever Retry-After says
TOP = 20  # log-probabilities asked for: the most that vLLM gives by default


class JudgeError(Exception):
    """What a server did wrong; worth another try."""


def png_address(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as data:image/png;base64,..."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_images(messages: list[dict], images: Sequence[np.ndarray]) -> list[dict]:
    """The messages with every {"type": "image"} replaced by the next image, as OpenAI's schema has it."""
    addresses = iter([png_address(image) for image in images])

    def part(entry: dict) -> dict:
        if entry["type"] != "image":
            return entry
        return {"type": "image_url", "image_url": {"url": next(addresses)}}

    return [message | {"content": [part(entry) for entry in message["content"]]} for message in messages]


class OpenAIChat:
    """`reading.Chat` over HTTP. Use `close` when done; one instance serves one event loop."""

    def __init__(self, options: JudgeOptions):
        import httpx2

        self.options, self.turn = options, itertools.count()
        limits = httpx2.Limits(max_connections=options.concurrency, max_keepalive_connections=options.concurrency)
        self.client = httpx2.AsyncClient(timeout=options.timeout, limits=limits, headers=bearer(options))
        self.places = asyncio.Semaphore(options.concurrency)

    async def close(self) -> None:
        await self.client.aclose()

    async def write(self, messages, images, prefix: str, stop: str, seed: int) -> Written:
        body = {"stop": [stop], "max_tokens": self.options.reasoning_tokens, "temperature": self.options.temperature}
        choice = await self._ask(messages, images, prefix, body | {"seed": seed}, _written)
        return choice

    async def digits(self, messages, images, prefix: str) -> list[float]:
        body = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": TOP}
        return await self._ask(messages, images, prefix, body, _digits)

    async def _ask(self, messages, images, prefix: str, body: dict, take):
        """take(the one choice of the answer), after as many tries as the options allow."""
        begun = {"role": "assistant", "content": prefix}
        body = body | {
            "model": self.options.model, "messages": [*with_images(messages, images), begun], "n": 1,
            "continue_final_message": True, "add_generation_prompt": False,
        }  # fmt: skip
        async with self.places:
            for attempt in itertools.count():
                server = self.options.servers[next(self.turn) % len(self.options.servers)]
                try:
                    return take(_only_choice(await self._post(server, body)))
                except JudgeError as error:
                    if attempt >= self.options.retries:
                        raise
                    await asyncio.sleep(getattr(error, "pause", None) or self._pause(attempt))

    def _pause(self, attempt: int) -> float:
        return min(PATIENCE, self.options.backoff * 2**attempt * random.uniform(0.5, 1.5))

    async def _post(self, server: str, body: dict) -> dict:
        import httpx2

        try:
            answer = await self.client.post(f"{server.rstrip('/')}/chat/completions", json=body)
        except httpx2.HTTPError as error:
            raise JudgeError(f"{server}: {type(error).__name__} {error}") from error
        if answer.status_code != 200:
            text = f"{server} answered {answer.status_code}: {answer.text[:300]}"
            if answer.status_code in (400, 401, 403, 404, 422):  # another try would be refused as well
                raise UserError(f"judge server {text}; check the judge's model, token and servers")
            error = JudgeError(text)
            error.pause = _seconds(answer.headers.get("retry-after"))
            raise error
        try:
            return answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise JudgeError(f"{server} answered what is no JSON: {error}") from error


def bearer(options: JudgeOptions) -> dict[str, str]:
    """The header with the servers' token. Raises UserError if its environment variable is not set."""
    if options.token_variable is None:
        return {}
    token = os.environ.get(options.token_variable)
    if not token:
        raise UserError(f"token_variable={options.token_variable}: this environment variable is not set")
    return {"Authorization": f"Bearer {token}"}


def check_servers(options: JudgeOptions) -> None:
    """Raises UserError for a server that does not answer, or that does not serve the model: before anything is drawn."""
    import httpx2

    headers = bearer(options)
    for server in options.servers:
        try:
            answer = httpx2.get(f"{server.rstrip('/')}/models", headers=headers, timeout=min(10.0, options.timeout))
            answer.raise_for_status()
            names = [entry["id"] for entry in answer.json()["data"]]
        except httpx2.HTTPError as error:
            raise UserError(
                f"judge server {server} does not answer ({error or type(error).__name__}); start it, or remove it from `servers`"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{server} is no OpenAI-compatible server: {server}/models lists no models") from None
        if options.model not in names:
            raise UserError(
                f"judge server {server} does not serve {options.model}; it serves {', '.join(names) or 'nothing'}"
            )


def _seconds(text: str | None) -> float | None:
    try:
        return min(PATIENCE, max(0.0, float(text)))
    except (TypeError, ValueError):
        return None


def _only_choice(answer: object) -> dict:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise JudgeError(f"the server answered {count} choices to a request of one")
    return choices[0]


def _written(choice: dict) -> Written:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise JudgeError("the server's answer has no text")
    return Written(text, choice.get("finish_reason") == "stop")


def _digits(choice: dict) -> list[float]:
    """Log-probabilities of the five digits; those that are not among the most probable have none."""
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {entry["token"]: float(entry["logprob"]) for entry in entries}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise JudgeError(f"the server's answer has no log-probabilities ({error!r})") from None
    if any(math.isnan(value) or value > 1e-3 for value in found.values()):
        raise JudgeError("the server's answer holds what is no log-probability")
    return [found.get(digit, -math.inf) for digit in DIGITS]
