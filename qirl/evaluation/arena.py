"""Arena: from battles between models to ratings on the Elo scale, every number with its 95 % interval.

A judge sees two images of one prompt, in both orders. Bradley-Terry says that a beats b with probability
1 / (1 + 10^((R_b - R_a) / 400)): the log-odds of a win are the difference of ratings over 400 / ln 10. The ratings maximise
the likelihood with the anchor's fixed; a tie is half a win for each side. Intervals come from a bootstrap that draws whole
prompts: battles of one prompt are not independent, and pretending so makes intervals too narrow. Section 7 of the algorithm
page; Bradley and Terry 1952; Hunter 2004.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from qirl.data.prompts import Prompt
from qirl.errors import UserError, nearest
from qirl.rewards.protocol import Sample

SCALE = 400 / math.log(10)  # Elo points per unit of log-odds
RATING = 1000.0

# Ties that were never played, between each two players: with them a player that won or lost everything has a finite
# rating (540 wins of 540: about 2,000 points ahead) and every resample one maximum. Among players that each win some of
# a few hundred battles they move a rating by a few hundredths of a point.
PRIOR = 0.01

Pair = tuple[Prompt, np.ndarray, np.ndarray]
PairwiseJudge = Callable[[Sequence[Pair]], Sequence[str]]  # for each pair "a" (the first image is better), "b" or "tie"


class Battle(NamedTuple):
    """What came of a against b on one prompt: "a", "b" or "tie"."""

    prompt_id: int
    a: str
    b: str
    outcome: str


def win_share(difference: float) -> float:
    """The share of battles won by a player that is `difference` Elo points ahead, ties counted half."""
    return 1 / (1 + math.exp(-difference / SCALE))


def battle(first_says: str, second_says: str) -> str:
    """The outcome of a against b from the two answers of a judge that saw them in both orders.

    first_says: shown (a, b); second_says: shown (b, a), so that its "a" means b. A side wins if both answers name it;
    answers that contradict each other, or a "tie" in one of them, are a tie. Raises UserError for another answer.
    """
    for said in (first_says, second_says):
        if said not in ("a", "b", "tie"):
            raise UserError(f"the judge answered {said!r}; a pairwise judge answers 'a', 'b' or 'tie'")
    if (first_says, second_says) == ("a", "b"):
        return "a"
    return "b" if (first_says, second_says) == ("b", "a") else "tie"


def play(images: Mapping[str, np.ndarray], prompts: Sequence[Prompt], judge: PairwiseJudge) -> list[Battle]:
    """Every two players battle with every sample: images {player: uint8 [P, G, H, W, 3]}, sample g against sample g."""
    places = [(p, g) for p in range(len(prompts)) for g in range(min(len(own[p]) for own in images.values()))]
    views = {name: {(p, g): own[p][g] for p, g in places} for name, own in images.items()}
    asked = [(place, a, b) for a, b in combinations(images, 2) for place in places]
    forth = judge([(prompts[place[0]], views[a][place], views[b][place]) for place, a, b in asked])
    back = judge([(prompts[place[0]], views[b][place], views[a][place]) for place, a, b in asked])
    if not len(forth) == len(back) == len(asked):
        raise UserError(f"the judge gave {len(forth)} and {len(back)} answers for {len(asked)} pairs; give one each")
    answers = zip(asked, forth, back, strict=True)
    return [Battle(prompts[p].id, a, b, battle(first, second)) for ((p, _), a, b), first, second in answers]


def pairwise_from_scores(score: Callable[[Sequence[Sample]], np.ndarray], eps: float = 0.0) -> PairwiseJudge:
    """A pairwise judge of a pointwise one: the higher score wins, scores within `eps` of each other tie.

    score: samples -> float or bool [n]. Every image is scored once per call, whatever it is paired with, so the
    answer cannot depend on the order. Raises UserError for scores that are not finite or not one per sample.
    """

    def judge(pairs: Sequence[Pair]) -> list[str]:
        keys = [[(prompt.id, id(image)) for image in two] for prompt, *two in pairs]
        shown = {key: (prompt, image) for own, (prompt, *two) in zip(keys, pairs, strict=True)
                 for key, image in zip(own, two, strict=True)}  # fmt: skip
        samples = [Sample.of(i, p, image) for i, (p, image) in enumerate(shown.values())]
        values = np.asarray(score(samples), dtype=float)
        if values.shape != (len(samples),) or not np.isfinite(values).all():
            raise UserError(
                f"the judge gave scores of shape {list(values.shape)}, {int((~np.isfinite(values)).sum())} of them not "
                f"finite, for {len(samples)} samples; give one number each"
            )
        value = dict(zip(shown, values.tolist(), strict=True))
        return [_higher(value[a] - value[b], eps) for a, b in keys]

    return judge


def _higher(lead: float, eps: float) -> str:
    return "tie" if abs(lead) <= eps else ("a" if lead > 0 else "b")


def ratings(battles: Sequence[Battle], anchor: str, rating: float = RATING) -> dict[str, float]:
    """The Bradley-Terry rating of every player, on the Elo scale with anchor = rating; players in order of appearance.

    Raises UserError for no battles, an unknown anchor, or players that no chain of battles links to the anchor.
    """
    players, wins = _tables(battles, anchor)
    found = _solve(wins.sum(0)[None], players.index(anchor))[0]
    return {name: rating + SCALE * float(x) for name, x in zip(players, found, strict=True)}


def arena(battles: Sequence[Battle], anchor: str, rating: float = RATING, resamples: int = 1000, seed: int = 0) -> dict:
    """Ratings, their pairwise differences, and 95 % intervals of both: percentiles of a bootstrap over prompts.

    Returns {"elo": {name: {"rating", "low", "high", "games", "wins", "ties"}}, "differences": {"a - b": {"value", "low",
    "high"}}, "anchor", "prompts", "battles", "resamples"}. The interval of a player that won or lost every battle says
    little: its resamples agree. Raises UserError as `ratings` does.
    """
    players, wins = _tables(battles, anchor)
    place = players.index(anchor)
    n = len(wins)
    # n - 1 of the n prompts: their spread is that of n prompts without the bias by (n - 1) / n that n draws have
    drawn = np.random.default_rng(seed).multinomial(max(1, n - 1), np.full(n, 1 / n), size=resamples)
    tables = np.tensordot(drawn.astype(float), wins, 1)
    found = rating + SCALE * _solve(np.concatenate([wins.sum(0)[None], tables]), place)
    value, spread = found[0], found[1:]
    elo = {}
    for i, name in enumerate(players):
        own = [one for one in battles if name in (one.a, one.b)]
        won = sum(one.outcome == ("a" if one.a == name else "b") for one in own)
        ties = sum(one.outcome == "tie" for one in own)
        entry = {"rating": float(value[i]), **_interval(spread[:, i])}
        elo[name] = entry | {"games": len(own), "wins": won, "ties": ties}
    differences = {
        f"{players[i]} - {players[j]}": {"value": float(value[i] - value[j]), **_interval(spread[:, i] - spread[:, j])}
        for i, j in combinations(range(len(players)), 2)
    }
    counts = {"prompts": n, "battles": len(battles), "resamples": resamples}
    return {"elo": elo, "differences": differences, "anchor": anchor, **counts}


def arena_by_task(battles: Sequence[Battle], prompts: Sequence[Prompt], *options, **more) -> dict[str, dict]:
    """What `arena` finds in the battles on the prompts of each task alone: {"t2i": ..., "edit": ...}."""
    task = {prompt.id: prompt.task for prompt in prompts}
    chosen = {name: [one for one in battles if task[one.prompt_id] == name] for name in dict.fromkeys(task.values())}
    return {name: arena(own, *options, **more) for name, own in chosen.items()}


def ahead(differences: Mapping[str, Mapping[str, float]], a: str, b: str) -> dict[str, float]:
    """By how much `a` is ahead of `b`, {"value", "low", "high"}, from the differences that `arena` found."""
    if found := differences.get(f"{a} - {b}"):
        return dict(found)
    found = differences[f"{b} - {a}"]
    return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def _tables(battles: Sequence[Battle], anchor: str) -> tuple[list[str], np.ndarray]:
    """Players and wins [prompts, n, n]: how often the row beat the column, ties half to each."""
    if not battles:
        raise UserError("an arena needs battles and got none; evaluate two models or more")
    for one in battles:
        if one.outcome not in ("a", "b", "tie") or one.a == one.b:
            raise UserError(f"{tuple(one)} is no battle; give two different players and 'a', 'b' or 'tie'")
    players = list(dict.fromkeys(name for one in battles for name in (one.a, one.b)))
    if anchor not in players:
        raise UserError(f"the anchor '{anchor}' played no battle{nearest(anchor, players)}")
    prompts = {number: i for i, number in enumerate(dict.fromkeys(one.prompt_id for one in battles))}
    wins = np.zeros((len(prompts), len(players), len(players)))
    for one in battles:
        at, a, b = prompts[one.prompt_id], players.index(one.a), players.index(one.b)
        share = {"a": 1.0, "b": 0.0, "tie": 0.5}[one.outcome]
        wins[at, a, b] += share
        wins[at, b, a] += 1 - share
    _require_one_league(players, anchor, (wins + wins.transpose(0, 2, 1)).sum(0) > 0)
    return players, wins


def _require_one_league(players: Sequence[str], anchor: str, met: np.ndarray) -> None:
    linked = np.arange(len(players)) == players.index(anchor)
    for _ in players:
        linked = linked | met[linked].any(0)
    if not linked.all():
        apart = ", ".join(name for name, reached in zip(players, linked, strict=True) if not reached)
        raise UserError(
            f"no chain of battles links {apart} to the anchor '{anchor}'; rate them apart, or let them meet"
        )


def _solve(wins: np.ndarray, anchor: int) -> np.ndarray:
    """Log-odds ratings [R, n] of R tables of wins [R, n, n], 0 for the anchor: Newton's method, halved where it overshoots."""
    n = wins.shape[-1]
    wins = wins + PRIOR / 2 * (1 - np.eye(n))
    games = wins + wins.transpose(0, 2, 1)
    free = np.delete(np.arange(n), anchor)
    ratings = np.zeros(wins.shape[:2])
    value = _likelihood(wins, ratings)
    for _ in range(100):
        share = 1 / (1 + np.exp(ratings[:, None, :] - ratings[:, :, None]))  # of the row against the column
        gradient = (wins - games * share).sum(-1)[:, free]
        weight = games * share * (1 - share)
        curvature = weight.sum(-1)[:, :, None] * np.eye(n) - weight
        step = np.zeros_like(ratings)
        step[:, free] = np.linalg.solve(curvature[:, free[:, None], free], gradient[..., None])[..., 0]
        if np.abs(step).max() < 1e-9:
            break
        for _ in range(30):
            tried = _likelihood(wins, ratings + step)
            worse = tried < value - 1e-9 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
        ratings, value = ratings + step, tried
    return ratings


def _likelihood(wins: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    return -(wins * np.logaddexp(0, ratings[:, None, :] - ratings[:, :, None])).sum((1, 2))
