"""From battles to ratings: closed forms, an independent optimiser, and intervals that cover what they claim."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize

from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.evaluation.arena import (
    PRIOR,
    SCALE,
    Battle,
    ahead,
    arena,
    arena_by_task,
    battle,
    pairwise_from_scores,
    play,
    ratings,
    win_share,
)

BASE = [Battle(i, "rl", "base", "a" if i < 30 else "b") for i in range(40)]
IMAGE = np.arange(6, dtype=np.uint8).reshape(1, 6, 1, 1, 1).repeat(3, -1)  # one prompt, six samples of one pixel


def log_odds(won, lost):
    """The closed form for two players, with the half tie that the prior gives each."""
    return SCALE * math.log((won + PRIOR / 2) / (lost + PRIOR / 2))


def random_battles(rng, players, prompts, spread=0.8):
    """Every pair on every prompt; a prompt favours some players over others."""
    names = list(players)
    out = []
    for p in range(prompts):
        strength = {n: players[n] + spread * rng.standard_normal() for n in names}
        for a, b in combinations(names, 2):
            wins = rng.random() < 1 / (1 + math.exp(strength[b] - strength[a]))
            out.append(Battle(p, a, b, "tie" if rng.random() < 0.2 else "ab"[not wins]))
    return out


def test_78_elo_are_61_percent_of_the_battles_and_93_are_63():
    assert win_share(78) == pytest.approx(0.610, abs=5e-4)
    assert win_share(93) == pytest.approx(0.631, abs=5e-4)
    many = [Battle(i, "rl", "base", "a" if i % 1000 < 610 else "b") for i in range(10_000)]
    assert ratings(many, "base", 0.0)["rl"] == pytest.approx(77.7, abs=0.1)


def test_two_players_have_the_log_odds_of_their_wins():
    assert ratings(BASE, "base") == {"rl": pytest.approx(1000 + log_odds(30, 10), abs=1e-6), "base": 1000.0}
    assert log_odds(30, 10) == pytest.approx(190.85, abs=0.1)  # 400 log10(3): the prior takes less than 0.1


def test_a_tie_counts_half_to_each():
    tied = [Battle(i, "a", "b", "tie") for i in range(8)]
    assert ratings(tied, "a")["b"] == pytest.approx(1000)
    halves = [*tied, *(Battle(9 + i, "a", "b", "a") for i in range(4))]  # 4 wins and 8 ties are 8 wins of 12
    assert ratings(halves, "b", 0)["a"] == pytest.approx(log_odds(8, 4), abs=1e-6)


def test_another_anchor_or_rating_shifts_everybody_alike():
    battles = random_battles(np.random.default_rng(0), {"x": 0, "y": 0.6, "z": -0.9}, 50)
    one, other = ratings(battles, "x"), ratings(battles, "z", 1500)
    shifts = [other[n] - one[n] for n in one]
    assert other["z"] == 1500 and np.ptp(shifts) < 1e-6
    value = arena(battles, "x", resamples=200)["differences"]
    for pair, found in arena(battles, "z", 77, resamples=200)["differences"].items():
        assert found == pytest.approx(value[pair], abs=1e-6)


def test_both_orders_must_agree_or_it_is_a_tie():
    assert battle("a", "b") == "a" and battle("b", "a") == "b"
    for said in (("a", "a"), ("b", "b"), ("tie", "tie"), ("a", "tie"), ("tie", "a")):
        assert battle(*said) == "tie", said
    with pytest.raises(UserError, match="'left'"):
        battle("left", "a")


def test_a_judge_that_always_prefers_the_first_image_rates_everybody_equal():
    images = {"x": IMAGE, "y": IMAGE + 50}
    battles = play(images, [Prompt(4, "a 7")], lambda pairs: ["a"] * len(pairs))
    assert battles == [Battle(4, "x", "y", "tie")] * 6
    assert ratings(battles, "x")["y"] == pytest.approx(1000)


def test_a_pointwise_judge_prefers_the_higher_score_and_scores_each_image_once():
    prompts, asked = [Prompt(4, "a 7", "plain")], []

    def brightness(samples):
        asked.extend((s.prompt, s.category) for s in samples)
        return np.array([s.image.mean() for s in samples])

    images = {"dark": IMAGE, "light": IMAGE + 50, "nearly": IMAGE + 51}
    found = {(b.a, b.b): b.outcome for b in play(images, prompts, pairwise_from_scores(brightness, eps=1.0))}
    assert found == {("dark", "light"): "b", ("dark", "nearly"): "b", ("light", "nearly"): "tie"}
    assert len(asked) == 2 * 18 and set(asked) == {("a 7", "plain")}  # once per order: 3 players, 6 samples


def test_a_judge_with_missing_or_failed_answers_is_refused():
    images = {"x": IMAGE, "y": IMAGE}
    with pytest.raises(UserError, match="5 and 5 answers for 6 pairs"):
        play(images, [Prompt(0, "a 7")], lambda pairs: ["a"] * 5)
    with pytest.raises(UserError, match="12 of them not finite"):
        play(images, [Prompt(0, "a 7")], pairwise_from_scores(lambda samples: np.full(len(samples), np.nan)))


def test_ratings_are_those_of_an_independent_optimiser():
    players = {"w": 0.0, "x": 0.7, "y": -0.5, "z": 1.8}
    battles = random_battles(np.random.default_rng(1), players, 60)
    names = list(players)

    def loss(free):
        strength = dict(zip(names, [0.0, *free], strict=True))
        terms = 0.0
        for one in battles:
            lead = strength[one.a] - strength[one.b]
            share = {"a": 1.0, "b": 0.0, "tie": 0.5}[one.outcome]
            terms += share * np.logaddexp(0, -lead) + (1 - share) * np.logaddexp(0, lead)
        return terms

    best = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7}).x
    found = ratings(battles, "w", 0.0)
    # 0.05 points: the prior, which the optimiser does not have, among battles that few
    assert [found[n] for n in names] == pytest.approx([0.0, *SCALE * best], abs=0.05)


def test_a_player_that_won_everything_has_a_finite_rating():
    swept = [Battle(i, "rl", "base", "a") for i in range(540)]
    found = arena(swept, "base", resamples=50)
    assert found["elo"]["rl"]["rating"] == pytest.approx(1000 + log_odds(540, 0), abs=1e-3) and log_odds(540, 0) < 2100
    assert all(math.isfinite(v) for row in found["elo"].values() for v in row.values())
    mixed = [*BASE, *(Battle(i, "rl", "lost", "a") for i in range(40))]
    assert ratings(mixed, "base")["rl"] == pytest.approx(ratings(BASE, "base")["rl"], abs=0.2)


def test_ratings_by_task_are_those_of_the_battles_on_its_prompts():
    source = (IMAGE[0, 0],)
    prompts = [Prompt(i, "a 7") if i < 40 else Prompt(i, "make it red", "recolour", source) for i in range(60)]
    edits = [Battle(40 + i, "rl", "base", "a" if i < 5 else "b") for i in range(20)]  # 30 of 40, then 5 of 20
    found = arena_by_task([*BASE, *edits], prompts, "base", 1000.0, resamples=200)
    assert list(found) == ["t2i", "edit"]
    assert found["t2i"]["elo"]["rl"]["rating"] == pytest.approx(1000 + log_odds(30, 10), abs=1e-6)
    assert found["edit"]["elo"]["rl"]["rating"] == pytest.approx(1000 + log_odds(5, 15), abs=1e-6)
    assert found["t2i"] == arena(BASE, "base", resamples=200) and found["edit"]["prompts"] == 20
    together = arena([*BASE, *edits], "base", resamples=200)["elo"]["rl"]["rating"]
    assert together == pytest.approx(1000 + log_odds(35, 25), abs=1e-6)


def test_a_difference_read_the_other_way_round_changes_its_signs():
    found = arena(BASE, "base", resamples=200)["differences"]
    (value,) = found.values()
    assert list(found) == ["rl - base"] and ahead(found, "rl", "base") == value
    assert ahead(found, "base", "rl") == {"value": -value["value"], "low": -value["high"], "high": -value["low"]}


def test_wins_and_ties_are_counted_per_player():
    battles = [Battle(0, "x", "y", "a"), Battle(1, "y", "x", "a"), Battle(2, "x", "y", "tie"), Battle(3, "x", "y", "a")]
    elo = arena(battles, "x", resamples=20)["elo"]
    assert [(r["games"], r["wins"], r["ties"]) for r in elo.values()] == [(4, 2, 1), (4, 1, 1)]
    assert elo["x"]["low"] == elo["x"]["high"] == elo["x"]["rating"] == 1000


def test_a_seed_fixes_the_intervals():
    one = arena(BASE, "base", resamples=100, seed=5)
    assert one == arena(BASE, "base", resamples=100, seed=5) != arena(BASE, "base", resamples=100, seed=6)


def test_repeating_battles_of_the_same_prompts_does_not_narrow_the_interval():
    """What a bootstrap over battles would get wrong: ten copies of a battle are no further evidence."""
    width = [
        arena(BASE * n, "base", resamples=400)["differences"]["rl - base"]["high"]
        - arena(BASE * n, "base", resamples=400)["differences"]["rl - base"]["low"]
        for n in (1, 10)
    ]
    assert width[1] == pytest.approx(width[0], rel=0.02)  # the prior weighs a tenth


def simulated(rng, prompts, games, spread, lead):
    """Battles of three players whose strength differs from prompt to prompt."""
    names = ["x", "y", "z"]
    own = lead + spread * rng.standard_normal((prompts, 3))
    out = []
    for a, b in combinations(range(3), 2):
        wins = rng.random((prompts, games)) < 1 / (1 + np.exp(own[:, b] - own[:, a]))[:, None]
        tied = rng.random((prompts, games)) < 0.2
        said = np.where(tied, "tie", np.where(wins, "a", "b"))
        out += [Battle(p, names[a], names[b], said[p, g]) for p in range(prompts) for g in range(games)]
    return out


def test_95_percent_intervals_hold_the_truth_95_percent_of_the_time():
    """With strengths that vary by prompt, so that the battles of a prompt agree more than others do."""
    lead, spread = np.array([0.0, 0.5, 1.0]), 0.8
    truth = ratings(simulated(np.random.default_rng(0), 60_000, 1, spread, lead), "x", 0.0)
    truth = {"x - y": -truth["y"], "x - z": -truth["z"], "y - z": truth["y"] - truth["z"]}
    inside, rng = [], np.random.default_rng(1)
    for number in range(200):
        found = arena(simulated(rng, 90, 6, spread, lead), "x", resamples=300, seed=number)["differences"]
        inside.append([found[pair]["low"] <= truth[pair] <= found[pair]["high"] for pair in truth])
    coverage = np.mean(inside, axis=0)
    assert (coverage >= 0.90).all() and (coverage <= 0.98).all(), coverage


def test_what_is_no_arena_is_refused():
    with pytest.raises(UserError, match="needs battles"):
        arena([], "base")
    with pytest.raises(UserError, match="did you mean 'base'"):
        ratings(BASE, "bas")
    with pytest.raises(UserError, match="links p, q to the anchor 'base'"):
        ratings([*BASE, Battle(0, "p", "q", "a")], "base")
    with pytest.raises(UserError, match="no battle"):
        ratings([Battle(0, "p", "p", "a")], "p")
