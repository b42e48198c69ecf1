"""The RL trainer with a real, tiny model: ratios, packs, gradients, copies of the weights, LoRA, traps."""

import math

import pytest
import torch
from oracle import oracle_loss, step_gradients
from tiny_runs import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    GUARD,
    GUIDED,
    SDE,
    experience,
    patchy,
    perturb,
)

from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.models.weights import load_model
from qirl.policy import trainer as training

# the ratio before the first update


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("old", ["detach", "recompute"])
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("loss", [SDE, GUARD], ids=["grpo", "guard"])
def test_ratio_is_bitwise_one_before_the_first_update(opened, loss, precision, old, guidance):
    trainer = opened(loss, precision, {"policy": {"old": old, "micro_tokens": 75}, "flow": {"guidance": guidance}})
    record = training.train_step(trainer, 0)
    assert record["ratio_min"] == record["ratio_max"] == 1.0
    assert record["log_ratio_abs"] == 0 and record["clip_fraction"] == 0
    assert record["grad_norm"] > 0 and not record["skipped"]


@pytest.mark.parametrize("sampler", ["cps", "dance"])
def test_ratio_is_bitwise_one_with_the_other_samplers(opened, sampler):
    record = training.train_step(opened(SDE, {"flow": {"sampler": sampler, "guidance": 2.0}}), 0)
    assert record["ratio_min"] == record["ratio_max"] == 1.0 and record["grad_norm"] > 0


def test_old_from_the_rollout_starts_within_rounding_of_one_in_float32(opened):
    record = training.train_step(opened(SDE, {"policy": {"old": "rollout", "micro_tokens": 75}}), 0)
    assert abs(record["ratio_min"] - 1) < 1e-5 and abs(record["ratio_max"] - 1) < 1e-5


def test_old_from_the_rollout_is_refused_where_it_drifts(opened):
    trainer = opened(SDE, {"policy": {"old": "rollout"}})
    exp, _, slots = experience(trainer)
    for kept in exp.kept.values():
        kept.v = kept.v + 1e-2
    with pytest.raises(UserError, match="use recompute"):
        training.prepare(trainer, exp, slots)


def test_drift_is_measured_before_the_first_update_only(opened):
    """Later the stored velocity is still that of the rollout, but a run must not stop in its middle."""
    trainer = opened(SDE, {"policy": {"old": "rollout"}})
    training.train_step(trainer, 0)
    exp, _, slots = experience(trainer, 1)
    for kept in exp.kept.values():
        kept.v = kept.v + 1e-2
    training.prepare(trainer, exp, slots)


def test_several_updates_recompute_the_old_policy_by_default(opened):
    trainer = opened(SDE, {"policy": {"minibatches": 2}})
    exp, _, slots = experience(trainer)
    assert all(b.v_old is not None for part in training.prepare(trainer, exp, slots) for _, own in part for b in own)


# packs and gradients


# one pair under the seam, several under the seam, a prompt a pack, two prompts a pack; a prompt is 6 pairs of 16 tokens
BUDGETS = [16, 50, 105, 210]


@pytest.mark.parametrize("precision, tolerance", [(FLOAT32, 1e-5), (FLOAT64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "kind",
    [FLOAT32, SDE, {**GUARD, **GUIDED, "flow": {"sampler": "sde", "guidance": 2.0}}],
    ids=["nft", "grpo", "guided guard"],
)
def test_gradients_do_not_depend_on_how_the_packs_are_cut(opened, kind, precision, tolerance):
    trainer = opened(kind, precision, {"policy": {"old": "auto", "kl": 0.1}}, reward=patchy)
    perturb(trainer)
    exp, _, slots = experience(trainer)
    whole, stats, parts = step_gradients(trainer, exp, slots)
    [(layout, batches)] = parts[0]
    assert not layout.seam and len(batches) == 1
    for budget in BUDGETS:
        cut, cut_stats, parts = step_gradients(trainer, exp, slots, micro_tokens=budget)
        layouts = [layout for layout, _ in parts[0]]
        assert all(layout.seam == (budget < 100) for layout in layouts) and sum(len(own) for _, own in parts[0]) > 1
        assert len(layouts) == (len(exp.conditions) if layouts[0].seam else 1)
        torch.testing.assert_close(cut_stats, stats, atol=tolerance * 10, rtol=tolerance)
        assert cut.keys() == whole.keys()
        for name, value in whole.items():
            error = (cut[name] - value).norm() / value.norm().clamp_min(1e-30)
            assert error < tolerance, f"{name} at {budget} tokens: {error:.1e}"


def test_inner_updates_keep_one_old_policy_and_equal_a_loop_with_adamw(opened, tiny_model):
    trainer = opened(SDE, FLOAT64, {"policy": {"epochs": 2, "minibatches": 2}, "optimizer": {"clip": 1e6, "eps": 1e-3}})
    exp, chosen, slots = experience(trainer)
    before = {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}
    record = training.update(trainer, exp, slots, 0)
    after = {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}
    assert record["ratio_min"] < 1 < record["ratio_max"]

    model = trainer.engine.model
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])
    old = load_model(tiny_model, torch.float64)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0)
    for _ in range(2):
        for half in ((0, 1), (2, 3)):
            oracle_loss(trainer, exp, chosen, slots, 0, old, None, half).backward()
            adam.step()
            adam.zero_grad()
    for n, p in model.named_parameters():
        torch.testing.assert_close(after[n], p.detach(), atol=1e-11, rtol=0)


def test_learning_rate_follows_training_steps_not_inner_updates(opened):
    """A cosine counted in inner updates would be back at its start half way."""
    trainer = opened(SDE, {"policy": {"epochs": 2, "minibatches": 2}, "optimizer": {"decay": "cosine"}})
    used = []
    for step in range(4):
        record = training.train_step(trainer, step)
        used.append(trainer.engine.optimizer.adam.param_groups[0]["lr"])
        assert used[-1] == record["lr"]
    assert used == sorted(used, reverse=True) and used[-1] < 0.2 * used[0]


@pytest.mark.parametrize("old, passes", [("detach", 1), ("recompute", 2)])
def test_no_unconditional_pass_runs_in_the_update_under_guidance(opened, old, passes):
    trainer = opened(SDE, GUIDED, {"policy": {"old": old}, "flow": {"sampler": "sde", "guidance": 2.0}})
    seen = {"targets": 0, "texts": []}

    def watch(_, inputs):
        seen["targets"] += len(inputs[0].lengths)
        seen["texts"].append(inputs[0].text)

    handle = trainer.engine.model.register_forward_pre_hook(watch)
    exp, _, slots = experience(trainer)
    null = trainer.family.negative(Prompt(0, "")).text
    assert seen["targets"] == 12 * 2 * 4  # samples, both branches, steps
    assert any((text == null).all(1).any() for text in seen["texts"])
    seen.update(targets=0, texts=[])
    training.update(trainer, exp, slots, 0)
    handle.remove()
    assert seen["targets"] == 12 * 2 * passes  # samples, nodes
    assert not any((text == null).all(1).any() for text in seen["texts"])


def test_kl_has_a_gradient(opened):
    """Computed under no_grad it would be a number in the log and nothing more."""

    def constant(samples):
        return [{"same": 0.5} for _ in samples]

    trainer = opened(SDE, {"policy": {"kl": 1.0}}, reward=constant)
    exp, _, slots = experience(trainer)
    assert all(g.abs().max() == 0 for g in step_gradients(trainer, exp, slots)[0].values())  # no signal, at the base
    perturb(trainer)
    moved, stats, _ = step_gradients(trainer, exp, slots)
    assert stats[:, training.STATS.index("kl")].min() > 0
    assert max(g.abs().max() for g in moved.values()) > 0


def test_loss_metric_leaves_dropped_samples_out(opened):
    trainer = opened(FLOAT64, reward=patchy)
    exp, chosen, slots = experience(trainer)
    expected = float(oracle_loss(trainer, exp, chosen, slots, 0, None, None).detach())
    record = training.update(trainer, exp, slots, 0)
    assert record["valid_pairs"] == int(exp.valid.sum()) * 2
    assert record["loss"] == pytest.approx(expected, rel=1e-9)  # sums in another order


def test_step_without_any_valid_group_changes_no_weight(opened):
    def broken(samples):
        return [{"red": math.nan} for _ in samples]

    trainer = opened({"advantage": {"max_failed": 1.0}}, reward=broken)
    before = {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}
    record = training.train_step(trainer, 0)
    assert record["valid_pairs"] == 0 and record["dropped_samples"] == 12
    assert all(torch.equal(before[n], p) for n, p in trainer.engine.model.named_parameters())


def test_too_many_failed_samples_stop_the_run(opened):
    def half(samples):
        return [{"red": math.nan if i % 2 else 0.5} for i, _ in enumerate(samples)]

    with pytest.raises(UserError, match="50% of the samples could not be scored"):
        training.train_step(opened(reward=half), 0)
