"""Which teacher a step has: a pure function of the step, so that a continued run goes on with the right one."""

from __future__ import annotations

from collections.abc import Mapping


def order(shares: Mapping[str, int]) -> list[str]:
    """One period of teachers: each as often as its share says, spread evenly (smooth weighted round robin)."""
    total = sum(shares.values())
    credit = dict.fromkeys(shares, 0)
    period = []
    for _ in range(total):
        credit = {name: value + shares[name] for name, value in credit.items()}
        chosen = max(credit, key=credit.get)  # the first of equals
        credit[chosen] -= total
        period.append(chosen)
    return period


def teacher_of(step: int, shares: Mapping[str, int]) -> str:
    """The teacher of training step `step` (from 0). shares: steps of each teacher in a period of their sum, in order."""
    period = order(shares)
    return period[step % len(period)]


def turn_of(step: int, shares: Mapping[str, int]) -> int:
    """How many earlier steps had the teacher of `step`: its own step count, which goes through its prompts."""
    period = order(shares)
    rounds, place = divmod(step, len(period))
    name = period[place]
    return rounds * shares[name] + period[:place].count(name)
