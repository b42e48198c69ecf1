"""The scorer server: rewards of a config over HTTP, for any number of trainers. Starlette on uvicorn.

POST /v1/score and GET /v1/components as server/wire.py has them; GET /health/live, /health/ready (200 once rewards can
score) and /metrics (Prometheus). A bad request is 400 or 413 with the reason, a full queue 429 with Retry-After, a wrong
token 401.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Mapping

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from qirl.config_rewards import Serve
from qirl.errors import UserError
from qirl.rewards.protocol import Reward, declared_noise
from qirl.rewards.remote import token
from qirl.rewards.server.batching import Batcher, Full
from qirl.rewards.server.wire import WireRequest, result


class Metrics:
    """In a registry of its own, so that several servers can live in one process."""

    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("qirl_requests", "requests by answer", ["status"], **own)
        self.samples = Counter("qirl_samples", "samples scored", **own)
        self.failures = Counter("qirl_failures", "samples that a component failed for", ["component"], **own)
        self.seconds = Histogram("qirl_request_seconds", "seconds from request to answer", **own)
        self.waiting = Gauge("qirl_waiting", "samples in the queue", **own)


class Problem(Exception):
    """An answer other than the result."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None):
        super().__init__(text)
        self.status, self.headers = status, dict(headers or {})


def make_app(rewards: list[Reward], options: Serve) -> Starlette:
    """The ASGI application. Raises UserError if the token's environment variable is not set."""
    secret = token(options.token_variable) if options.token_variable else None
    metrics, state = Metrics(), {}

    @contextlib.asynccontextmanager
    async def lifespan(_):
        state["batcher"] = Batcher(rewards, options.batch, options.wait, options.queue, options.timeout)
        metrics.waiting.set_function(lambda: len(state["batcher"].waiting))
        yield
        await state["batcher"].close()

    def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if secret is not None and not hmac.compare_digest(given.encode(), f"Bearer {secret}".encode()):
            raise Problem(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    async def body(request: Request) -> bytes:
        """The whole body, read no further than it may be long."""
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > options.max_body:
                raise Problem(413, f"the body is longer than {options.max_body} bytes; send fewer samples a request")
        return bytes(data)

    async def score(request: Request) -> Response:
        authorise(request)
        asked = await asyncio.to_thread(_parse, await body(request), options)
        try:
            scored = await state["batcher"].score(asked)
        except Full as full:
            raise Problem(429, str(full), {"Retry-After": str(math.ceil(full.seconds))}) from None
        for own in scored:
            for name, value in own.scores.items():
                if math.isnan(value):
                    metrics.failures.labels(name).inc()
        metrics.samples.inc(len(asked))
        pairs = zip(asked, scored, strict=True)
        return JSONResponse({"results": [result(s.id, own.scores, own.errors) for s, own in pairs]})

    async def answered(request: Request) -> Response:
        begun = time.monotonic()
        try:
            response = await score(request)
        except Problem as problem:
            response = JSONResponse({"error": str(problem)}, problem.status, problem.headers)
        except ClientDisconnect:
            response = Response(status_code=499)
        metrics.requests.labels(response.status_code).inc()
        metrics.seconds.observe(time.monotonic() - begun)
        return response

    async def components(request: Request) -> Response:
        try:
            authorise(request)
        except Problem as problem:
            return JSONResponse({"error": str(problem)}, problem.status, problem.headers)
        names = sorted({name for known in state["batcher"].known for name in known})
        return JSONResponse({"components": names, "read_noise": declared_noise(rewards)})

    async def ready(_: Request) -> Response:
        alive = "batcher" in state and not state["batcher"].task.done()
        return PlainTextResponse("ready" if alive else "not ready", 200 if alive else 503)

    async def shown(_: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def live(_: Request) -> Response:
        return PlainTextResponse("live")

    routes = [
        Route("/v1/score", answered, methods=["POST"]), Route("/v1/components", components),
        Route("/health/live", live), Route("/health/ready", ready), Route("/metrics", shown),
    ]  # fmt: skip
    return Starlette(routes=routes, lifespan=lifespan)


def _parse(data: bytes, options: Serve):
    """The samples of a body. Raises Problem for anything that is no request."""
    try:
        asked = WireRequest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Problem(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None
    images = sum(1 + len(sample.sources) for sample in asked.samples)
    if images > options.max_images:
        raise Problem(413, f"{images} images in a request, more than the {options.max_images} that are allowed")
    if len({sample.id for sample in asked.samples}) < len(asked.samples):
        raise Problem(400, "two samples of a request have the same id")
    try:
        return [sample.sample(options.max_pixels) for sample in asked.samples]
    except UserError as error:
        raise Problem(400, str(error)) from None


def serve(rewards: list[Reward], options: Serve) -> None:
    """Answers until it is told to stop (SIGINT, SIGTERM); then what is under way is finished."""
    import uvicorn

    uvicorn.run(
        make_app(rewards, options), host=options.host, port=options.port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=30, limit_concurrency=None, h11_max_incomplete_event_size=65536,
    )  # fmt: skip
