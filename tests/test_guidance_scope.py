"""The arms of hybrid CFG: where guidance acts, in which form, and what it costs (algorithm page, section 4)."""

import pytest
import torch
from oracle import oracle_loss, step_gradients
from tiny_runs import FLOAT64, GUARD, SDE, experience, merge, patchy, perturb, train_config

from qirl.errors import UserError
from qirl.models.weights import load_model
from qirl.policy import trainer as training

LOSSES = {"nft": {}, "grpo": SDE, "guard": GUARD}
ARMS = {
    "unguided": {},
    "none": {"guidance": {"scope": "none"}},
    "rollout residual": {"flow": {"guidance": 2.0}},
    "rollout literal": {"flow": {"guidance": 2.0}, "guidance": {"form": "literal"}},
    "both": {"flow": {"guidance": 2.0}, "guidance": {"scope": "both"}},
}
BUDGETS = {"seam": 50, "a prompt a pack": 225}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_a_loop_over_single_samples(opened, tiny_model, loss, arm, budget):
    """Dropped samples and the distance to the base included."""
    policy = {"policy": {"kl": 0.3, "micro_tokens": BUDGETS[budget]}}
    trainer = opened(LOSSES[loss], ARMS[arm], FLOAT64, policy, reward=patchy)
    perturb(trainer)
    exp, chosen, slots = experience(trainer)
    assert 0 < exp.valid.sum() < len(exp.valid)
    got, _, parts = step_gradients(trainer, exp, slots)
    assert {layout.seam for layout, _ in parts[0]} == {budget == "seam"}
    base = load_model(tiny_model, torch.float64)
    oracle_loss(trainer, exp, chosen, slots, 0, None, base).backward()
    expected = {n: p.grad for n, p in trainer.engine.model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert error < 1e-11, f"{name}: {error:.1e}"  # sums in another order; small gradients cancel


@pytest.mark.parametrize("arm, branches", [("none", 1), ("rollout residual", 1), ("rollout literal", 1), ("both", 2)])
@pytest.mark.parametrize("old, passes", [("detach", 1), ("recompute", 2)])
def test_unconditional_passes_run_in_the_update_only_where_the_objective_is_guided(opened, arm, branches, old, passes):
    trainer = opened(SDE, ARMS[arm], {"policy": {"old": old}})
    exp, chosen, slots = experience(trainer)
    null = trainer.family.negative(chosen[0][0]).text
    seen = {"targets": 0, "twins": False}

    def watch(_, inputs):
        seen["targets"] += len(inputs[0].lengths)
        seen["twins"] |= bool((inputs[0].text == null).all(1).any())

    trainer.engine.model.register_forward_pre_hook(watch)
    training.update(trainer, exp, slots, 0)
    assert seen == {"targets": 12 * 2 * passes * branches, "twins": branches == 2}  # samples, nodes


@pytest.mark.parametrize("arm", ["rollout residual", "rollout literal", "both"])
@pytest.mark.parametrize("loss", ["grpo", "guard"])
def test_every_arm_starts_at_a_ratio_of_exactly_one(opened, loss, arm):
    record = training.train_step(opened(LOSSES[loss], ARMS[arm]), 0)
    assert record["ratio_min"] == record["ratio_max"] == 1 and record["grad_norm"] > 0


def test_literal_and_residual_train_different_transitions(opened):
    found = []
    for arm in ("rollout residual", "rollout literal"):
        trainer = opened(SDE, ARMS[arm], FLOAT64)
        exp, _, slots = experience(trainer)
        found.append(step_gradients(trainer, exp, slots)[0])
    assert any(not torch.allclose(found[0][name], found[1][name]) for name in found[0])


def test_guidance_that_acts_nowhere_is_refused(tmp_path, tiny_model):
    with pytest.raises(UserError, match="flow.guidance=1"):
        train_config(tmp_path, tiny_model, merge({"flow": {"guidance": 4.0}}, ARMS["none"]))
