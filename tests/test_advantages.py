"""Advantages, groups and the formulas around rewards, against oracles written as loops."""

import math
import random

import pytest
import torch

from qirl.config_sections import Advantage
from qirl.errors import UserError
from qirl.kernels.calibrated_weights import calibrated_weights
from qirl.kernels.group_advantage import CONVENTIONS, group_advantage
from qirl.kernels.reward_range import expected_range, reward_range
from qirl.kernels.score_expectation import likert_to_unit, score_expectation
from qirl.parallel.data import Ranks, gather_rows
from qirl.policy.advantages import ABSENT, advantages, check_components, shuffle_inside, table, weights_of

NAN = math.nan
EXACT = 1e-6  # the result is rounded to float32 once


def population_std(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def oracle(scores, applies, group, weights, noise, floor, clip, convention):
    """Section 5 sample by sample, in plain Python."""
    n, k = len(scores), len(noise)
    failed = [any(applies[i][c] and math.isnan(scores[i][c]) for c in range(k)) for i in range(n)]
    valid = [False] * n
    for g in set(group):
        members = [i for i in range(n) if group[i] == g]
        lost = False
        for c in range(k):
            asked = [i for i in members if applies[i][c]]
            lost |= bool(asked) and all(math.isnan(scores[i][c]) for i in asked)
        alive = [i for i in members if not failed[i]]
        if not lost and len(alive) >= 2:
            for i in alive:
                valid[i] = True

    def share(i, c):
        total = sum(weights[i][j] for j in range(k) if applies[i][j])
        return weights[i][c] / total if applies[i][c] and total else 0.0

    def siblings(i):
        return [j for j in range(n) if group[j] == group[i] and valid[j]]

    def z(i, c):
        mean, std = population_std([scores[j][c] for j in siblings(i) if applies[j][c]])
        return 0.0 if std < max(floor, noise[c]) or std == 0 else (scores[i][c] - mean) / std

    def total(i):
        return sum(share(i, c) * scores[i][c] for c in range(k) if applies[i][c])

    inside = [i for i in range(n) if valid[i]]
    out = [0.0] * n
    for i in inside:
        if convention in ("per_reward", "gdpo"):
            out[i] = sum(share(i, c) * z(i, c) for c in range(k) if applies[i][c])
        else:
            mean, std = population_std([total(j) for j in siblings(i)])
            if convention == "global_std":
                std = population_std([total(j) for j in inside])[1]  # of the raw rewards, as Flow-GRPO does
            if convention == "no_std":
                out[i] = total(i) - mean
            else:
                out[i] = 0.0 if std < floor or std == 0 else (total(i) - mean) / std
    if convention == "gdpo" and inside:
        mean, std = population_std([out[i] for i in inside])
        out = [((v - mean) / std if std else 0.0) if ok else 0.0 for v, ok in zip(out, valid, strict=True)]
    return [max(-clip, min(clip, v)) for v in out], valid


def random_table(seed):
    """Groups of 1 to 6 samples in mixed order, 3 components, some absent, some failed, one nearly constant."""
    draw = random.Random(seed)
    group = [g for g in range(9) for _ in range(draw.randint(1, 6))]
    draw.shuffle(group)
    n, k = len(group), 3
    applies = [[c == 0 or draw.random() < 0.8 for c in range(k)] for _ in range(n)]
    scores = [[draw.random(), draw.random(), 0.5 + 0.02 * draw.random()] for _ in range(n)]
    for i in range(n):
        for c in range(k):
            if draw.random() < 0.06:
                scores[i][c] = NAN
    by_group = [[draw.random() for _ in range(k)] for _ in range(9)]  # a category's weights: one row a group
    return scores, applies, group, [by_group[g] for g in group], [0.0, 0.05, 0.006]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("seed", range(12))
def test_advantage_equals_the_loops_on_random_tables(convention, seed):
    scores, applies, group, weights, noise = random_table(seed)
    floor, clip = 0.01, 1.5
    expected, expected_valid = oracle(scores, applies, group, weights, noise, floor, clip, convention)
    got, valid = group_advantage(
        torch.tensor(scores, dtype=torch.float64), torch.tensor(applies), torch.tensor(group),
        torch.tensor(weights, dtype=torch.float64), torch.tensor(noise, dtype=torch.float64), floor, clip, convention,
    )  # fmt: skip
    assert valid.tolist() == expected_valid
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), atol=EXACT, rtol=EXACT)


def run(scores, group=None, applies=None, weights=None, **options):
    scores = torch.tensor(scores, dtype=torch.float64)
    group = torch.tensor(group or [0] * len(scores))
    applies = torch.ones_like(scores, dtype=torch.bool) if applies is None else torch.tensor(applies)
    weights = torch.ones_like(scores) if weights is None else torch.tensor(weights, dtype=torch.float64)
    return group_advantage(scores, applies, group, weights, **options)


def test_std_is_the_population_std():
    advantage, _ = run([[0.0], [1.0]])
    assert advantage.tolist() == [-1.0, 1.0]  # ddof 1 gives 0.707


def test_no_epsilon_shrinks_the_advantage():
    advantage, _ = run([[0.0], [0.02]])
    torch.testing.assert_close(advantage, torch.tensor([-1.0, 1.0]), atol=EXACT, rtol=0)


def test_zero_variance_gives_zero_and_stays_in_the_loss():
    advantage, valid = run([[0.4], [0.4], [0.4]])
    assert advantage.tolist() == [0, 0, 0] and valid.all()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("size", [3, 6, 7, 12])
def test_equal_scores_give_no_signal_without_a_floor(size, convention):
    """Their mean is off by rounding; divided by its own size that would be an advantage of one."""
    advantage, _ = run([[0.4, 0.7]] * size, weights=[[0.3, 0.7]] * size, floor=0.0, convention=convention)
    assert advantage.abs().max() < 1e-12


def test_spread_under_the_floor_gives_zero():
    assert run([[0.4], [0.405]], floor=0.005)[0].tolist() == [0, 0]


def test_spread_under_the_read_noise_gives_zero_for_that_component_only():
    advantage, _ = run([[0.4, 0.0], [0.5, 1.0]], noise=torch.tensor([0.06, 0.06]))
    assert advantage.tolist() == [-0.5, 0.5]


def test_singleton_group_is_dropped():
    advantage, valid = run([[0.1], [0.9], [0.5]], group=[0, 0, 1])
    assert valid.tolist() == [True, True, False] and advantage[2] == 0


def test_group_with_one_sample_left_is_dropped():
    assert not run([[0.1], [NAN]])[1].any()


def test_component_failed_for_a_whole_group_drops_the_group_and_no_other():
    advantage, valid = run([[0.1, NAN], [0.9, NAN], [0.1, 0.2], [0.9, 0.3]], group=[0, 0, 1, 1])
    assert valid.tolist() == [False, False, True, True]
    assert advantage[:2].tolist() == [0, 0] and advantage[2:].abs().min() > 0


def test_failed_sample_leaves_mean_std_and_loss_of_every_component():
    with_failure, valid = run([[0.1, 0.3], [0.5, 0.2], [0.4, 0.9], [0.99, NAN]])
    without, _ = run([[0.1, 0.3], [0.5, 0.2], [0.4, 0.9]])
    assert valid.tolist() == [True, True, True, False]
    assert torch.equal(with_failure[:3], without) and with_failure[3] == 0


def test_absent_component_gives_its_weight_away():
    scores = [[0.0, 0.2], [1.0, 0.8], [1.0, 0.0]]
    applies = [[True, True], [True, True], [True, False]]
    advantage, valid = run(scores, applies=applies, weights=[[3.0, 1.0]] * 3)
    mean, std = population_std([0.0, 1.0, 1.0])
    assert valid.all()
    torch.testing.assert_close(advantage[2].item(), (1 - mean) / std, atol=EXACT, rtol=0)  # all weight on the first
    torch.testing.assert_close(advantage[1].item(), 0.75 * (1 - mean) / std + 0.25, atol=EXACT, rtol=0)


def test_nan_of_an_absent_component_is_no_failure():
    advantage, valid = run([[0.0, NAN], [1.0, NAN]], applies=[[True, False]] * 2)
    assert valid.all() and advantage.tolist() == [-1.0, 1.0]


def test_weights_count_by_their_share_only():
    scores = [[0.1, 0.7], [0.5, 0.2], [0.3, 0.3]]
    torch.testing.assert_close(run(scores, weights=[[1.0, 3.0]] * 3)[0], run(scores, weights=[[10.0, 30.0]] * 3)[0])


def test_advantage_is_clipped():
    advantage, _ = run([[0.0]] * 49 + [[1.0]], clip=5.0)  # z of the odd one is 7
    assert advantage[-1] == 5.0


def test_presets_are_the_formulas_of_their_trainers():
    scores, group = [[0.0, 0.2], [1.0, 0.4], [0.0, 0.5], [0.4, 0.9]], [0, 0, 1, 1]
    total = torch.tensor([0.1, 0.7, 0.25, 0.65], dtype=torch.float64)
    centred = total - torch.tensor([0.4, 0.4, 0.45, 0.45], dtype=torch.float64)
    expected = {
        "no_std": centred,
        "global_std": centred / total.std(correction=0),
        "sum_then_normalise": torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64),
        "gdpo": torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64),
    }
    for convention, value in expected.items():
        got = run(scores, group=group, convention=convention)[0].double()
        torch.testing.assert_close(got, value, atol=EXACT, rtol=0)


def test_float_group_ids_are_refused():
    with pytest.raises(ValueError, match="integer ids"):
        group_advantage(torch.zeros(2, 1), torch.ones(2, 1).bool(), torch.zeros(2), torch.ones(2, 1))


def test_unknown_convention_and_misfit_shapes_are_refused():
    with pytest.raises(ValueError, match="per_reward"):
        run([[0.1], [0.2]], convention="ddof1")
    with pytest.raises(ValueError, match="do not fit"):
        group_advantage(torch.zeros(2, 1), torch.ones(2, 2).bool(), torch.zeros(2).long(), torch.ones(2, 1))


def test_ids_beyond_float32_integers_do_not_merge_when_gathered():
    ids = torch.tensor([2**24 + 1, 2**24, 2**53 + 1, 2**53])
    values = torch.tensor([[1.0, NAN], [2.0, -1.0], [3.0, 0.1], [4.0, 1 / 3]], dtype=torch.float64)
    got_ids, got = gather_rows(ids, values, Ranks())
    assert got_ids.tolist() == [2**24, 2**24 + 1, 2**53, 2**53 + 1]
    assert torch.equal(got.nan_to_num(7), values[[1, 0, 3, 2]].nan_to_num(7))  # bit for bit, NaN kept


def test_table_tells_failed_from_absent():
    got = table([{"a": 0.5}, {"a": NAN, "b": 0.0}], ["a", "b"])
    assert got[0].tolist() == [0.5, ABSENT] and got[0, 1] == ABSENT
    assert got[1, 0].isnan() and got[1, 1] == 0


def test_category_weights_replace_the_common_ones():
    options = Advantage(weights={"a": 2.0}, category_weights={"plain": {"b": 0.25}})
    assert weights_of(options, "plain", ["a", "b"]) == [2.0, 0.25]
    assert weights_of(options, "other", ["a", "b"]) == [2.0, 1.0]


@pytest.mark.parametrize(
    "options, name",
    [
        ({"weights": {"alignmet": 1}}, "alignment"),
        ({"category_weights": {"plian": {}}}, "plain"),
        ({"category_weights": {"plain": {"inc": 1}}}, "ink"),
        ({"weights": {"alignment": 0, "ink": 0}}, "is 0"),
    ],
)
def test_weights_of_unknown_names_are_refused_with_the_nearest(options, name):
    with pytest.raises(UserError, match=name):
        check_components(Advantage(**options), ["alignment", "ink"], ["plain", "colour"])


def test_group_advantage_does_not_depend_on_the_order_of_samples():
    scores, applies, group, weights, noise = random_table(5)
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(0))
    rows = [torch.tensor(p) for p in (scores, applies, group, weights)]
    a, valid = group_advantage(*rows, noise=torch.tensor(noise))
    b, valid_b = group_advantage(*(p[order] for p in rows), noise=torch.tensor(noise))
    assert torch.equal(valid[order], valid_b)
    torch.testing.assert_close(a[order], b, atol=EXACT, rtol=EXACT)  # sums in another order


def test_shuffle_is_a_permutation_inside_groups_pure_and_new_each_step():
    group = torch.tensor([4, 0, 0, 4, 2, 2, 2, 0, 4, 4, 7])
    one = shuffle_inside(group, 3, 11)
    assert sorted(one.tolist()) == list(range(len(group)))
    assert torch.equal(group[one], group)
    assert torch.equal(one, shuffle_inside(group, 3, 11))
    assert any(not torch.equal(one, shuffle_inside(group, step, 11)) for step in (4, 5))


def test_shuffle_reaches_every_order_equally_often():
    group = torch.tensor([0, 0, 0, 1])
    counts: dict = {}
    for step in range(1200):
        key = tuple(shuffle_inside(group, step, 0).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 20.5  # chi-square, 5 degrees, p = 0.001


def test_shuffled_control_moves_rewards_only():
    scores = torch.tensor([[0.1], [0.5], [0.9], [0.2], [0.4], [0.3]], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    control = shuffle_inside(group, 1, 1)
    plain, _ = advantages(scores, group, torch.ones(6, 1), Advantage())
    shuffled, _ = advantages(scores, group, torch.ones(6, 1), Advantage(), control=control)
    torch.testing.assert_close(shuffled, plain[control], atol=EXACT, rtol=0)  # sums in another order


def test_score_is_the_expectation_over_the_five_tokens():
    p = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.15], dtype=torch.float64)  # mass 0.8, renormalised
    expected = (1 * 0.05 + 2 * 0.1 + 3 * 0.2 + 4 * 0.3 + 5 * 0.15) / 0.8
    got = score_expectation(p.log())
    assert got.item() == pytest.approx(expected, abs=EXACT)
    assert likert_to_unit(got).item() == pytest.approx((expected - 1) / 4, abs=EXACT)


def test_score_without_enough_mass_is_nan_and_never_zero():
    log_probs = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.05], [0.1, 0.1, 0.1, 0.1, 0.1001], [0.0] * 5]).log()
    got = score_expectation(log_probs)
    assert got.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("rho", [-0.8, -0.3, 0.0, 0.6, 0.95])
def test_calibrated_weights_solve_their_equations(rho):
    correlation = torch.tensor([[1, rho, 0.1], [rho, 1, -0.2], [0.1, -0.2, 1]], dtype=torch.float64)
    wanted = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    variance, noise = torch.tensor([0.04, 0.01, 0.09]), torch.tensor([0.0, 0.05, 0.1])
    w, scale, shares = calibrated_weights(wanted, variance, noise, correlation)
    reliable = wanted * (1 - noise.double() ** 2 / variance.double())
    torch.testing.assert_close(shares, reliable / reliable.sum(), atol=1e-12, rtol=0)
    g = 0.95 * correlation + 0.05 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(w * (g @ w) / (w @ g @ w), shares, atol=1e-9, rtol=0)  # converged
    assert w.sum().item() == pytest.approx(1, abs=1e-12) and (w > 0).all()
    assert (scale**2 * (w @ g @ w)).item() == pytest.approx(1, abs=1e-12)  # unit-RMS advantages


def test_calibrated_weights_converge_for_opposed_rewards():
    correlation = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    one = torch.ones(2)
    w, _, shares = calibrated_weights(torch.tensor([0.8, 0.2]), one, 0 * one, correlation)
    g = 0.95 * correlation.double() + 0.05 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(w * (g @ w) / (w @ g @ w), shares, atol=1e-6, rtol=0)


def test_component_of_noise_only_gets_no_weight():
    one = torch.ones(2)
    w, _, shares = calibrated_weights(one, 0.01 * one, torch.tensor([0.0, 0.2]), torch.eye(2))
    assert shares.tolist() == [1, 0] and w[1].abs() < 1e-12
    with pytest.raises(ValueError, match="read noise"):
        calibrated_weights(one, 0.01 * one, 0.2 * one, torch.eye(2))


@pytest.mark.parametrize("size, value", [(4, 2.059), (8, 2.847), (16, 3.532), (24, 3.895), (32, 4.139)])
def test_expected_range_of_normals_is_the_tabled_one(size, value):
    assert expected_range(size) == pytest.approx(value, abs=5e-4)  # the table has three decimals


def test_prompts_are_kept_by_a_range_that_does_not_depend_on_the_group():
    composite = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.1, 0.12]])
    spread, keep = reward_range(composite, tau=0.1)
    torch.testing.assert_close(spread, torch.tensor([0.3, 0.02]))
    assert keep.tolist() == [True, False]
    d2 = expected_range(4)
    spread, keep = reward_range(torch.tensor([[0.0, 0.1, 0.1, 1.0]] * 2), 1 / d2 + 1e-6)
    assert not keep.any() and reward_range(torch.tensor([[0.0, 0.1, 0.1, 1.0]]), 1 / d2 - 1e-6)[1].all()
    with pytest.raises(ValueError, match="2 images"):
        reward_range(composite[:, :1], 0.1)
    with pytest.raises(ValueError, match="read noise"):
        reward_range(composite, 0.1, read_noise=0.06)
