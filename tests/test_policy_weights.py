"""Trained nodes, copies of the weights, LoRA and the known traps of the RL trainer, with a real, tiny model."""

import importlib
import itertools
import json
import math
import signal
import warnings

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from tiny_runs import CHANNELS, SDE, colours, experience, pretrain_config, train_config

from qirl.config_sections import Timesteps
from qirl.data.prompts import Prompt
from qirl.engine import Stop
from qirl.errors import UserError
from qirl.kernels.philox import INITIAL, normal, stream
from qirl.models.weights import load_model
from qirl.packing import Target, pack
from qirl.policy import trainer as training
from qirl.policy.nodes import draw_nodes
from qirl.policy.update import velocities

# trained nodes


def draws(samples, iteration=0, seed=0):
    return stream(seed, [i // 4000 for i in range(samples)], [i % 4000 for i in range(samples)], iteration)


def test_nodes_of_the_last_fraction_are_never_trained():
    grid = torch.linspace(1, 0, 21).expand(500, -1)
    nodes = draw_nodes(draws(500), grid, Timesteps(count=6, power=0.0, skip_last=0.25), last_step=True)
    assert {n for own in nodes for n in own} == set(range(15))
    assert all(len(set(own)) == 6 and list(own) == sorted(own) for own in nodes)  # without replacement


def test_final_step_is_trained_by_nft_only():
    grid = torch.linspace(1, 0, 6).expand(200, -1)
    options = Timesteps(count=1, power=0.0, skip_last=0.0)
    seen = [{n for own in draw_nodes(draws(200), grid, options, last) for n in own} for last in (True, False)]
    assert seen == [set(range(5)), set(range(4))]


def test_nodes_are_drawn_in_proportion_to_a_power_of_t():
    n, power = 20000, 2.0
    grid = torch.linspace(1, 0, 11).expand(n, -1)
    nodes = draw_nodes(draws(n), grid, Timesteps(count=1, power=power, skip_last=0.25), last_step=True)
    counts = torch.bincount(torch.tensor(nodes)[:, 0], minlength=7).double()
    weights = grid[0, :7].double() ** power
    expected = n * weights / weights.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees, p = 0.001


def test_nodes_are_pure_and_new_for_every_sample_and_iteration():
    grid = torch.linspace(1, 0, 11).expand(64, -1)
    options = Timesteps(count=3)
    one = draw_nodes(draws(64, iteration=1), grid, options, True)
    assert one == draw_nodes(draws(64, iteration=1), grid, options, True)
    assert draw_nodes(draws(64, iteration=1).rows(torch.arange(40, 64)), grid[40:], options, True) == one[40:]
    two = draw_nodes(draws(64, iteration=2), grid, options, True)
    assert sum(a != b for a, b in zip(one, two, strict=True)) > 32 and len(set(one)) > 10


# copies of the weights


def test_average_follows_its_formula(opened):
    trainer = opened({"optimizer": {"ema": 0.3}})
    current = {n: p.detach().clone() for n, p in trainer.engine.weights.current.items()}
    for step in range(4):
        training.train_step(trainer, step)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, p in trainer.engine.weights.current.items():
            current[name] = decay * current[name] + (1 - decay) * p.detach()
            torch.testing.assert_close(trainer.engine.weights.copies["ema"][name], current[name], atol=1e-7, rtol=1e-6)


def test_sampling_policy_of_nft_is_an_average_that_samples_and_serves_as_old(opened):
    trainer = opened({"policy": {"nft": {"old_decay": 0.5, "old_ramp": 0.2}}})
    engine = trainer.engine
    expected = {n: p.detach().clone() for n, p in engine.weights.current.items()}
    for step in range(4):
        training.train_step(trainer, step)
        decay = min(0.5, 0.2 * step)
        for name, p in engine.weights.current.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
            torch.testing.assert_close(engine.weights.copies["old"][name], expected[name], atol=1e-7, rtol=1e-6)
    exp, chosen, slots = experience(trainer, 4)
    parts = training.prepare(trainer, exp, slots)
    with engine.weights.using("old"):
        again, _ = training.sample(trainer, chosen, 4)
        for layout, batches in itertools.chain(*parts):
            for batch, v in zip(batches, velocities(engine.model, layout, batches, trainer.config), strict=True):
                assert torch.equal(batch.v_old, v)
    # sample() itself exchanged the copy for the weights there: inside the block it sampled with the weights
    assert not torch.equal(again.x0[0], exp.x0[0])


def test_exchanging_weights_twice_restores_every_bit(opened):
    weights = opened({"optimizer": {"ema": 0.5}}).engine.weights
    with torch.no_grad():
        for p in weights.current.values():
            p.mul_(1.1)
    before = {n: p.detach().clone() for n, p in weights.current.items()}
    copy = {n: p.clone() for n, p in weights.copies["ema"].items()}
    with weights.using("ema"):
        assert all(torch.equal(p, copy[n]) for n, p in weights.current.items())
    assert all(torch.equal(p, before[n]) for n, p in weights.current.items())
    assert all(torch.equal(p, copy[n]) for n, p in weights.copies["ema"].items())
    with pytest.raises(RuntimeError), weights.using("ema"):
        raise RuntimeError
    assert all(torch.equal(p, before[n]) for n, p in weights.current.items())


def test_update_that_is_not_finite_is_skipped_aloud_and_changes_nothing(opened):
    trainer = opened({"optimizer": {"ema": 0.5, "weight_decay": 0.1}})
    training.train_step(trainer, 0)
    engine = trainer.engine
    state = {k: v.clone() for k, v in _flat(engine.tensors()).items()}
    for value in (math.nan, math.inf):
        next(iter(engine.weights.current.values())).grad = torch.full_like(
            next(iter(engine.weights.current.values())), value
        )
        with pytest.warns(UserWarning, match="step 1: the gradient norm is .* skipped"):
            outcome = engine.outcome(1, [engine.update(1)])
        assert outcome["skipped"] == 1 and not math.isfinite(outcome["grad_norm"])
        assert all(torch.equal(v, state[k]) for k, v in _flat(engine.tensors()).items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not training.train_step(trainer, 1)["skipped"]


def _flat(tensors):
    from qirl.run.checkpoint import flatten

    return flatten(tensors)


# LoRA


LORA = {"model": {"lora": {"rank": 4, "alpha": 8.0}}, "optimizer": {"lr": 1e-2}}


def test_lora_trains_adapters_only_and_its_reference_is_the_base_bit_for_bit(opened, tiny_model):
    trainer = opened(LORA, SDE, {"policy": {"kl": 0.1}})
    model, base = trainer.engine.model, load_model(tiny_model)
    assert all("lora_" in n for n in trainer.engine.weights.current)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    first = training.train_step(trainer, 0)
    second = training.train_step(trainer, 1)
    assert first["kl"] == 0 and second["kl"] > 0 and "reference" not in trainer.engine.weights.copies
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if "lora_" not in n)
    body = pack([trainer.family.condition(Prompt(0, "a red 7"))], [Target(0, 4, 4)])
    x, t = torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    with torch.no_grad():
        with trainer.engine.weights.reference():
            assert torch.equal(model(body, x, t), base(body, x, t))
        assert not torch.equal(model(body, x, t), base(body, x, t))


def test_lora_export_is_merged_and_runs_in_diffusers(opened):
    trainer = opened(LORA)
    for step in range(2):
        training.train_step(trainer, step)
    folder = trainer.engine.export({"world": "digits"})
    theirs = QwenImage21Transformer2DModel.from_pretrained(folder)
    assert not any("lora" in n for n in theirs.state_dict())
    ours = load_model(folder)
    body = pack([trainer.family.condition(Prompt(0, "a red 7"))], [Target(0, 4, 4)])
    x, t = torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    with torch.no_grad():
        adapted = trainer.engine.model(body, x, t)
        torch.testing.assert_close(ours(body, x, t), adapted, atol=1e-5, rtol=1e-5)  # W + BA rounded once to float32
    merged = {n: p for n, p in ours.state_dict().items()}
    assert all(torch.equal(merged[n], p) for n, p in theirs.state_dict().items() if n in merged)


# traps


def write_prompts(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"world": {"prompts": str(path)}}


def test_groups_are_keyed_by_id_so_equal_texts_stay_apart(opened, tmp_path):
    def by_id(samples):
        return [{"id": s.prompt_id / 10} for s in samples]  # constant inside a group, so no signal

    prompts = write_prompts(tmp_path / "p.jsonl", [{"text": "a red 7", "id": i} for i in (1, 5)])
    trainer = opened(prompts, {"policy": {"prompts": 2}}, reward=by_id)
    exp, chosen, _ = experience(trainer)
    assert {p.id for p, _ in chosen} == {1, 5}
    assert (exp.advantage == 0).all() and exp.valid.all()
    assert not torch.equal(exp.x0[0], exp.x0[3])  # other ids, other noise


def test_prompt_that_comes_twice_in_a_step_or_returns_later_gets_other_noise(opened, tmp_path):
    trainer = opened(write_prompts(tmp_path / "p.jsonl", [{"text": "a red 7"}]), {"policy": {"prompts": 2}})
    rollouts = [experience(trainer, step)[0] for step in (0, 1)]
    images = [x for exp in rollouts for x in exp.x0]
    assert len(images) == 12
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_prompt_twice_in_a_step_makes_two_groups(opened, tmp_path):
    def by_half(samples):
        return [{"half": float(i >= 3)} for i, _ in enumerate(samples)]

    trainer = opened(
        write_prompts(tmp_path / "p.jsonl", [{"text": "a red 7"}]), {"policy": {"prompts": 2}}, reward=by_half
    )
    assert (experience(trainer)[0].advantage == 0).all()


def test_seed_zero_is_a_seed_and_none_is_refused(opened):
    zero, again, one = (experience(opened({"run": {"seed": s}}))[0].x0[0] for s in (0, 0, 1))
    assert torch.equal(zero, again) and not torch.equal(zero, one)
    with pytest.raises(UserError, match="seed"):
        opened({"run": {"seed": None}})
    with pytest.raises(ValueError, match="seed=None"):
        stream(None, [0], [0], 0)


def test_rollout_starts_from_the_noise_of_its_own_key(opened):
    """Prompt id, sample and iteration, whatever the batch: a rollout cut into other batches draws the same."""
    big, small = opened(), opened({"flow": {"rollout_tokens": 16}})
    a, b = (experience(t)[0] for t in (big, small))
    for x, y in zip(a.x0, b.x0, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)  # matrix products of other sizes
    chosen = big.prompts.step(0, 4)
    own = stream(3, [chosen[1][0].id], [2], 0)
    expected = normal(own, torch.zeros(16, dtype=torch.int64), torch.arange(16), CHANNELS, 0, INITIAL)
    assert torch.equal(normal(a.stream, torch.full((16,), 5), torch.arange(16), CHANNELS, 0, INITIAL), expected)


def test_component_that_applies_to_later_prompts_only_joins_the_run(opened):
    def sometimes(samples):
        return [{"red": 0.5, "late": 0.1} if s.id >= 12 else {"red": float(s.id % 3) / 2} for s in samples]

    trainer = opened(reward=sometimes)
    assert "reward/late" not in training.train_step(trainer, 0)
    assert trainer.components == ["red"]
    assert training.train_step(trainer, 1)["reward/late"] == pytest.approx(0.1)
    assert trainer.components == ["late", "red"]


def test_signal_handler_is_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Stop():
        assert signal.getsignal(signal.SIGTERM) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_refused_number_of_ranks_leaves_no_run_folder(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="multiple of the 3 ranks"):
        training.open_trainer(train_config(tmp_path / "out", tiny_model), [colours])
    assert not (tmp_path / "out").exists()


def test_token_budget_smaller_than_one_sample_is_refused(opened):
    with pytest.raises(UserError, match="policy.micro_tokens=15 .* 16 or more"):
        opened({"policy": {"micro_tokens": 15}})
    with pytest.raises(UserError, match="flow.rollout_tokens=16 .* 32 or more"):
        opened({"flow": {"rollout_tokens": 16, "guidance": 2.0}})


def test_pretrain_batch_smaller_than_the_ranks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="pretrain.batch=6 is smaller than the 8 ranks"):
        importlib.import_module("qirl.pretraining").pretrain(pretrain_config(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
