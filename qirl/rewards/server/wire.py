"""What scorer server and client say to each other: JSON, images as base64 PNG or lossless WebP; never pickle.

    POST /v1/score   {"samples": [{"id", "prompt", "prompt_id"?, "category"?, "image", "sources"?, "metadata"?}]}
                  -> {"results": [{"id", "scores": {component: number or null}, "noise"?: {component: number},
                                   "errors": {component or reward: text}}]}
    GET /v1/components -> {"components": [...], "read_noise": {component: number}}

An id comes back with its result, and is all that matches them. null: scoring failed. A component that is missing does not
apply to the sample. noise: the standard errors of noisy scores; read_noise: what rewards declare.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qirl.data.images import decode, encode
from qirl.errors import UserError
from qirl.rewards.protocol import NoisyScore, Sample, Scores, noise_of
from qirl.rewards.remote import ServerError

TEXT = 100_000  # characters of a prompt at most
SOURCES = 16  # images of an edit at most


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class WireSample(_Wire):
    id: int
    prompt: Annotated[str, Field(max_length=TEXT)]
    prompt_id: int = 0
    category: Annotated[str, Field(max_length=1000)] = "general"
    image: str
    sources: Annotated[list[str], Field(max_length=SOURCES)] = []
    metadata: dict[str, Any] = {}

    def sample(self, pixels: int) -> Sample:
        """Decodes the images. Raises UserError for one that is none, or of more pixels."""
        read = [
            _image(text, f"sample {self.id}: image {i}", pixels) for i, text in enumerate([self.image, *self.sources])
        ]
        return Sample(self.id, self.prompt_id, self.prompt, read[0], self.category, tuple(read[1:]), self.metadata)


class WireRequest(_Wire):
    samples: Annotated[list[WireSample], Field(min_length=1)]


def _image(text: str, what: str, pixels: int):
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{what} is no base64; send PNG or lossless WebP as base64") from None
    return decode(data, what, pixels)


def request_of(samples: Sequence[Sample], ids: Sequence[int]) -> dict:
    """The body that asks for the scores of samples, by the ids of this request."""

    def text(image) -> str:
        return base64.b64encode(encode(image)).decode()

    return {
        "samples": [
            {"id": i, "prompt": s.prompt, "prompt_id": s.prompt_id, "category": s.category, "image": text(s.image),
             "sources": [text(image) for image in s.sources], "metadata": s.metadata}
            for i, s in zip(ids, samples, strict=True)
        ]
    }  # fmt: skip


def result(number: int, scores: Scores, errors: dict[str, str]) -> dict:
    plain = {name: None if math.isnan(value) else float(value) for name, value in scores.items()}
    noise = {name: noise_of(v) for name, v in scores.items() if not math.isnan(noise_of(v)) and not math.isnan(v)}
    return {"id": number, "scores": plain, **({"noise": noise} if noise else {}), "errors": errors}


def scores_of(answer: Any, ids: Sequence[int]) -> dict[int, Scores]:
    """{id: scores} of an answer to a request of `ids`. Raises ServerError for anything but one good result for each."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != len(ids):
        raise ServerError(
            f"{len(results) if isinstance(results, list) else 'no'} results to a request of {len(ids)} samples"
        )
    found: dict[int, Scores] = {}
    for own in results:
        try:
            number, scores, noise = own["id"], own["scores"], own.get("noise", {})
            found[number] = {str(name): math.nan if v is None else float(v) for name, v in scores.items()}
            found[number] |= {name: NoisyScore(found[number][name], v) for name, v in noise.items()}
            if not all(0 <= noise_of(found[number][name]) < math.inf for name in noise):
                raise ValueError("noise must be at least 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(f"a result is not what was asked for ({error!r})") from None
        if bad := [v for v in found[number].values() if math.isinf(v)]:
            raise ServerError(f"a score of {bad[0]} is not finite")
        if any(isinstance(v, bool) or v is not None and v != v for v in scores.values()):
            raise ServerError("a score is no number")
    if found.keys() != set(ids):
        raise ServerError("the results are of other samples than were asked for")
    return found
