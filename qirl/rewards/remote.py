"""Asking a list of replicas over HTTP: in turn, with time-outs and further tries; one that failed rests for a while.

A pause doubles with every try and is jittered, or is what Retry-After says.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import to_json

from qirl.config_rewards import Remote
from qirl.errors import UserError

PATIENCE = 60.0  # longest pause, in seconds, whatever Retry-After says
REFUSED = (400, 413, 422)  # this request: another try would be refused as well, another request may not
MISTAKEN = (401, 403, 404, 405, 415)  # every request: the user's options are wrong


class ServerError(Exception):
    """What a server did wrong; worth another try, after `pause` seconds where it said so."""

    def __init__(self, text: str, pause: float | None = None):
        super().__init__(text)
        self.pause = pause


class Refused(ServerError):
    """A server will not take this one request, however often it is sent."""


class Replicas:
    """The servers of `options`, from any event loop: connections belong to one, so each has its own."""

    def __init__(self, options: Remote):
        self.options, self.turn, self.rested = options, itertools.count(), {}
        self._by_loop = weakref.WeakKeyDictionary()

    def _here(self):
        """The client and the places of the running loop."""
        import httpx2

        loop, most = asyncio.get_running_loop(), self.options.concurrency
        if loop not in self._by_loop:
            limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
            headers = bearer(self.options.token_variable)
            client = httpx2.AsyncClient(timeout=self.options.timeout, limits=limits, headers=headers)
            self._by_loop[loop] = client, asyncio.Semaphore(most)
        return self._by_loop[loop]

    async def post(self, path: str, body: Callable[[], dict], take: Callable[[Any], Any]) -> Any:
        """take(the answer's JSON) of the first answer that `take` accepts; it raises ServerError for one it does not.

        body(): the request, made in a thread once there is a place for it, so that no more of them exist than are under
        way. Raises ServerError after the last try, Refused at once for a request that the server does not take, and
        UserError for options with which it takes none.
        """
        client, places = self._here()
        async with places:
            content = await asyncio.to_thread(lambda: to_json(body()))
            for attempt in itertools.count():
                server = self._next()
                try:
                    return take(await _ask(client, f"{server.rstrip('/')}{path}", content))
                except Refused:
                    raise
                except ServerError as error:
                    pause = error.pause if error.pause is not None else self.pause(attempt)
                    self.rested[server] = time.monotonic() + pause
                    if attempt >= self.options.retries:
                        raise
                    if self._resting(self._peek()):
                        await asyncio.sleep(pause)

    def pause(self, attempt: int) -> float:
        return min(PATIENCE, self.options.backoff * 2**attempt * random.uniform(0.5, 1.5))

    def _next(self) -> str:
        """The next server in turn, one that does not rest if there is one."""
        servers = self.options.servers
        order = [servers[next(self.turn) % len(servers)]]
        order += [s for s in servers if s != order[0]]
        return next((s for s in order if not self._resting(s)), order[0])

    def _peek(self) -> str:
        return min(self.options.servers, key=lambda s: self.rested.get(s, 0.0))

    def _resting(self, server: str) -> bool:
        return self.rested.get(server, 0.0) > time.monotonic()


async def _ask(client, address: str, content: bytes) -> Any:
    """The JSON of one answer."""
    import httpx2

    try:
        answer = await client.post(address, content=content, headers={"Content-Type": "application/json"})
    except httpx2.HTTPError as error:
        raise ServerError(f"{address}: {type(error).__name__} {error}") from error
    said = f"{address} refused a request ({answer.status_code}: {answer.text[:300]})"
    if answer.status_code in MISTAKEN:
        raise UserError(f"{said}; check its options")
    if answer.status_code in REFUSED:
        raise Refused(said)
    if answer.status_code != 200:
        raise ServerError(f"{address} answered {answer.status_code}", _seconds(answer.headers.get("retry-after")))
    try:
        return answer.json()
    except ValueError as error:
        raise ServerError(f"{address} answered what is no JSON: {error}") from error


def get(address: str, options: Remote) -> Any:
    """The JSON that a server answers at start-up. Raises UserError where it does not."""
    import httpx2

    headers = bearer(options.token_variable)
    try:
        answer = httpx2.get(address, headers=headers, timeout=min(10.0, options.timeout))
        answer.raise_for_status()
    except httpx2.HTTPError as error:
        raise UserError(
            f"{address} does not answer ({error or type(error).__name__}); start that server, or remove it from `servers`"
        ) from None
    try:
        return answer.json()
    except ValueError:
        raise UserError(f"{address} answers what is no JSON; is it the right server?") from None


def bearer(variable: str | None) -> dict[str, str]:
    """The header with the servers' token. Raises UserError if its environment variable is not set."""
    return {} if variable is None else {"Authorization": f"Bearer {token(variable)}"}


def token(variable: str) -> str:
    found = os.environ.get(variable)
    if not found:
        raise UserError(f"token_variable={variable}: this environment variable is not set")
    return found


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _seconds(text: str | None) -> float | None:
    try:
        return min(PATIENCE, max(0.0, float(text)))
    except (TypeError, ValueError):
        return None
