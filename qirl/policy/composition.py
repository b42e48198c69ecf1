"""How rewards bear on one another before they become advantages (algorithm page, section 5).

layers   components from the lowest up, such as alignment, aesthetic: where one fails, those above it get at most the cap
gates    components that must be passed, such as safety: where one is not, every component of the sample is 0, or the sample is
         dropped as a failed one is

Raw scores stay what they are in scores.jsonl and in the ledger.
"""

from __future__ import annotations

import torch

from qirl.config_sections import Composition
from qirl.policy.advantages import ABSENT
from qirl.rewards.protocol import unit


def compose(scores: torch.Tensor, components: list[str], options: Composition) -> torch.Tensor:
    """Scores float64 [N, K] in [0, 1], ABSENT or NaN, of `components`: the same after caps and gates.

    Raises UserError for a component of a layer or a gate with a score outside [0, 1].

    A component that a sample lacks, or that failed, caps nothing and passes its gate; names that no reward returns do
    nothing.
    """
    place = {name: k for k, name in enumerate(components)}
    for name in {*options.layers, *options.gates} & place.keys():
        for value in scores[scores[:, place[name]] != ABSENT, place[name]].tolist():
            unit(name, value, "composition")
    out, layers = scores.clone(), [place[name] for name in options.layers if name in place]
    for i, low in enumerate(layers):
        fails = _below(scores[:, low], options.failing)
        for high in layers[i + 1 :]:
            over = fails & (out[:, high] != ABSENT) & (out[:, high] > options.cap)
            out[over, high] = options.cap
    for name, limit in options.gates.items():
        if name in place:
            fails = _below(scores[:, place[name]], limit)
            out[fails[:, None] & (out != ABSENT)] = 0.0 if options.gated == "zero" else torch.nan
    return out


def _below(column: torch.Tensor, limit: float) -> torch.Tensor:
    return (column != ABSENT) & (column < limit)  # NaN is below nothing
