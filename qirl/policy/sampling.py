"""Rolling out many targets within the rollout's token budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qirl.data.prompts import Prompt
from qirl.flow.rollout import Rollout, rollout
from qirl.kernels.philox import Stream
from qirl.models.execution import at_rest
from qirl.packing import Target, cut, send
from qirl.parallel.data import agree


def sample_in_batches(trainer, prompts: Sequence[Prompt], targets, draws: Stream, nodes=None, flow=None, done=None):
    """Rolls out all targets, at most flow.rollout_tokens at a time: latents per sample, kept transitions.

    done(indices, latents) is called for every such micro-group.
    """
    flow = flow or trainer.config.flow
    twice = 2 if flow.guidance != 1 else 1
    runs = cut([t.tokens * twice for t in targets], flow.rollout_tokens, "flow.rollout_tokens")
    _, count = agree(False, len(runs), trainer.engine.ranks)
    keep_states = trainer.config.policy.loss != "nft" and nodes is not None
    x0, kept = [None] * len(targets), {}
    with at_rest(trainer.engine.model):
        for place in range(count):
            run = runs[place % len(runs)]
            out = _roll(trainer, prompts, targets, draws, nodes if keep_states else None, flow, run)
            if place >= len(runs):  # a repeat: another rank has more
                continue
            for index, latents in zip(run, out.latents(), strict=True):
                x0[index] = latents
            if done:
                done(run, out.latents())
            kept |= {(run[i], node): k for (i, node), k in out.kept.items()}
    return x0, kept


def _roll(trainer, prompts, targets, draws: Stream, nodes, flow, run: list[int]) -> Rollout:
    used = sorted({targets[i].prompt for i in run})
    place = {prompt: index for index, prompt in enumerate(used)}
    own = [Target(place[targets[i].prompt], targets[i].height, targets[i].width) for i in run]
    conditions = [trainer.family.condition(prompts[i]) for i in used]
    negatives = [trainer.family.negative(prompts[i]) for i in used] if trainer.guided else None
    rows = draws.rows(send(torch.tensor(run), draws.prompt.device))
    own_nodes = [nodes[i] for i in run] if nodes else None
    return rollout(trainer.engine.runner, conditions, own, rows, flow, own_nodes, negatives)
