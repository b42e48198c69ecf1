"""Rewards that another process computes: the client of `qirl reward serve`."""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence

from qirl.config_rewards import ServerOptions
from qirl.data.images import content_hash
from qirl.errors import UserError
from qirl.rewards.protocol import Sample, Scores
from qirl.rewards.remote import Refused, Replicas, ServerError, chunks, get
from qirl.rewards.server.wire import request_of, scores_of


class ServerReward:
    """The scores of the servers' components; those of a request that never succeeds are NaN, with the reason in
    `failures`; refusal: the first that a server refused.

    Raises UserError at once for a server that does not answer, or that lacks a component.
    """

    def __init__(self, name: str, options: ServerOptions):
        self.options, self.failures = options, Counter()
        self.refusal: str | None = None
        self.read_noise: dict[str, float] = {}  # as the servers' rewards declare it
        has: set[str] = set()
        for server in options.servers:
            listed = get(f"{server.rstrip('/')}/v1/components", options)
            if not isinstance(listed, dict) or not isinstance(listed.get("components"), list):
                raise UserError(f"rewards.{name}: {server} is no scorer server (its /v1/components lists none)")
            if missing := [c for c in options.components if c not in listed["components"]]:
                raise UserError(
                    f"rewards.{name}: {server} has no component '{missing[0]}'; it has {', '.join(listed['components'])}"
                )
            has.update(listed["components"])
            self.read_noise |= listed.get("read_noise", {})
        self.components = options.components or tuple(sorted(has))  # none while the servers' rewards have told none
        self.read_noise = {k: v for k, v in self.read_noise.items() if k in self.components}
        self._kept: OrderedDict[str, Scores] = OrderedDict()
        self._replicas = Replicas(options)

    async def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        keys = [_key(sample) for sample in samples] if self.options.cache else list(range(len(samples)))
        known = {key: self._kept[key] for key in keys if key in self._kept} if self.options.cache else {}
        asked = [place for place, key in enumerate(keys) if key not in known]
        parts = chunks(asked, self.options.batch)
        answers = await asyncio.gather(*(self._ask([samples[i] for i in part]) for part in parts))
        for part, rows in zip(parts, answers, strict=True):
            for place, row in zip(part, rows, strict=True):
                known[keys[place]] = row
                if self.options.cache and not any(map(math.isnan, row.values())):
                    self._keep(keys[place], row)
        return [known[key] for key in keys]

    async def _ask(self, samples: Sequence[Sample]) -> list[Scores]:
        ids = list(range(len(samples)))
        body = functools.partial(request_of, samples, ids)
        try:
            found = await self._replicas.post("/v1/score", body, lambda answer: scores_of(answer, ids))
        except ServerError as error:
            if isinstance(error, Refused) and len(samples) > 1:  # one of them is to blame
                return [row for sample in samples for row in await self._ask([sample])]
            self.failures[str(error)] += len(samples)
            if isinstance(error, Refused):
                self.refusal = self.refusal or str(error)
            if not self.components:  # nobody knows yet what failed: no component at all would mean that none applies
                raise
            return [dict.fromkeys(self.components, math.nan) for _ in samples]
        wanted = self.options.components
        return [{name: v for name, v in found[i].items() if not wanted or name in wanted} for i in ids]

    def _keep(self, key: str, row: Scores) -> None:
        self._kept[key] = row
        while len(self._kept) > self.options.cache:
            self._kept.popitem(last=False)


def _key(sample: Sample) -> str:
    about = json.dumps([sample.prompt, sample.category, sample.metadata], sort_keys=True, default=str)
    return content_hash(sample.image, *sample.sources, text=about)
