"""Groups without signal are drawn anew with other prompts: which, when, and that nothing else changes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import SDE, colours, merge, moody, train_config, uncertain

from qirl.data.prompts import Prompt
from qirl.data.sampler import PromptSampler
from qirl.errors import UserError
from qirl.policy import trainer as training
from qirl.policy.advantages import ABSENT
from qirl.policy.refill import Drawn, fresh_prompts, refill, widened, with_groups
from qirl.policy.scoring import StepScores, gather_scores
from qirl.policy.trainer import train
from qirl.run.logs import read

REFILL = {"policy": {"prompts": 4, "refill": 3}}


def drawn_step(trainer, step=0):
    """A step as it is before the refill."""
    chosen = trainer.prompts.step(step, trainer.config.policy.prompts)
    scoring = StepScores(trainer, chosen, step)
    exp, slots = training.sample(trainer, chosen, step, scoring.submit)
    scores, images, _ = scoring.collect(exp.ids)
    return Drawn(list(chosen), slots, exp, scores, images, gather_scores(trainer, exp.ids, scores, chosen, step))


def test_silent_groups_are_replaced_by_the_next_prompts_in_order(opened):
    trainer = opened(REFILL, reward=moody)
    before = [p.id for p, _ in trainer.prompts.step(0, 4)]
    drawn = drawn_step(trainer)
    record = refill(trainer, drawn, 0, training.sample)
    silent = [slot for slot, number in enumerate(before) if number % 3]
    # by hand: every round draws as many of the following prompts as slots are silent, in order, and keeps the good ones
    following = [p.id for p, _ in trainer.prompts.step(1, 4) + trainer.prompts.step(2, 4) + trainer.prompts.step(3, 4)]
    following = [number for number in dict.fromkeys(following) if number not in before]
    expected, left, used = list(before), list(silent), 0
    for _ in range(3):
        fresh = dict(zip(left, following[used:], strict=False))
        used += len(fresh)
        expected = [number if fresh.get(s, 1) % 3 else fresh[s] for s, number in enumerate(expected)]
        left = [s for s in left if fresh[s] % 3]
    assert [p.id for p, _ in drawn.chosen] == expected and len(silent) > 0
    assert record == {"refill/silent": len(silent), "refill/drawn": used, "refill/left": len(left)}
    training.assign_advantages(trainer, drawn.exp, drawn.table, drawn.chosen, 0)
    signal = drawn.exp.advantage.view(4, 3).abs().amax(1) > 0
    assert signal.tolist() == [number % 3 == 0 for number in expected]


@pytest.mark.parametrize("parts", [{}, SDE, {"flow": {"guidance": 2.0}, "guidance": {"scope": "both"}}])
def test_a_refilled_group_is_what_its_prompt_gives_when_it_is_drawn_at_once(opened, parts):
    trainer = opened(parts, REFILL, reward=moody)
    drawn = drawn_step(trainer)
    refill(trainer, drawn, 0, training.sample)
    exp, chosen = drawn.exp, drawn.chosen
    fresh, slots = training.sample(trainer, [(p, 0) for p, _ in chosen], 0)
    assert slots == drawn.slots and torch.equal(fresh.ids, exp.ids) and fresh.nodes == list(exp.nodes)
    assert torch.equal(fresh.stream.sample, exp.stream.sample) and torch.equal(fresh.stream.prompt, exp.stream.prompt)
    assert torch.equal(fresh.grid, exp.grid) and fresh.targets == exp.targets
    for a, b in zip(fresh.x0, exp.x0, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # another batch: products round differently
    assert fresh.kept.keys() == exp.kept.keys()
    for key, kept in fresh.kept.items():
        torch.testing.assert_close(kept.x_next, exp.kept[key].x_next, atol=1e-5, rtol=1e-5)
    for side in ("conditions", "negatives"):
        pairs = zip(getattr(fresh, side), getattr(exp, side), strict=True)
        assert all(a is b or torch.equal(a.text, b.text) for a, b in pairs)
    training.assign_advantages(trainer, exp, drawn.table, chosen, 0)
    assert math.isfinite(training.update(trainer, exp, slots, 0)["loss"])


def test_without_silent_groups_nothing_changes(tmp_path, tiny_model):
    for name, more in (("plain", {}), ("refill", REFILL)):
        train(train_config(tmp_path / name, tiny_model, {"policy": {"prompts": 4}}, more), [colours], quiet=True)
    weights = [(tmp_path / n / "model/diffusion_pytorch_model.safetensors").read_bytes() for n in ("plain", "refill")]
    assert weights[0] == weights[1]
    assert next(iter(read(tmp_path / "refill/metrics.jsonl")))["refill/drawn"] == 0


def test_fresh_prompts_are_the_next_places_without_those_of_the_step():
    sampler = PromptSampler([Prompt(i, str(i), "ab"[i % 2]) for i in range(10)], 5)
    order = [p.id for p, _ in sampler.step(1, 6)]
    found, place = fresh_prompts(sampler, {order[1], 99}, 6, 3)
    assert [p.id for p, _ in found] == [order[0], order[2], order[3]] and place == 10
    again, _ = fresh_prompts(sampler, {order[1], 99}, 6, 3)
    assert again == found
    few, _ = fresh_prompts(sampler, set(range(9)), 6, 3)  # all but one are seen: it ends
    assert [p.id for p, _ in few] == [9]


def test_a_set_without_other_prompts_keeps_its_silent_groups(tmp_path, opened):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": f"a {i}", "id": i + 1}) + "\n" for i in range(2)))
    trainer = opened({"world": {"prompts": str(tmp_path / "p.jsonl")}, "policy": {"prompts": 2}}, REFILL, reward=moody)
    drawn = drawn_step(trainer)
    assert refill(trainer, drawn, 0, training.sample) == {"refill/silent": 4, "refill/drawn": 0, "refill/left": 4}


def test_a_component_that_comes_first_with_a_fresh_prompt_widens_the_table(opened):
    def late(samples):
        return [
            row | ({} if s.prompt_id % 3 else {"blue": 0.5}) for s, row in zip(samples, moody(samples), strict=True)
        ]

    trainer = opened({"policy": {"prompts": 2}}, {"policy": {"refill": 8}}, reward=late)
    step = next(s for s in range(50) if all(p.id % 3 for p, _ in trainer.prompts.step(s, 2)))
    drawn = drawn_step(trainer, step)
    assert drawn.table.shape[1] == 1
    assert refill(trainer, drawn, step, training.sample)["refill/left"] == 0
    assert drawn.table.shape == (6, 2) and (drawn.table >= 0).all()
    wide = widened(torch.tensor([[0.1, 0.2]]), ["a", "c"], ["a", "b", "c"])
    assert wide.tolist() == [[pytest.approx(0.1), ABSENT, pytest.approx(0.2)]]


def test_every_drawn_image_is_in_the_scores_under_an_id_of_its_own(tmp_path, tiny_model):
    train(train_config(tmp_path / "run", tiny_model, REFILL), [moody], quiet=True)
    rows = list(read(tmp_path / "run/scores.jsonl"))
    records = list(read(tmp_path / "run/metrics.jsonl"))
    assert len({row["id"] for row in rows}) == len(rows)
    for record in records:
        own = [row for row in rows if row["step"] == record["step"]]
        assert len(own) == 3 * (4 + record["refill/drawn"]) and len({r["prompt_id"] for r in own}) == len(own) // 3
    assert sum(r["refill/silent"] for r in records) > 0
    assert all(r["zero_signal_groups"] == r["refill/left"] for r in records)


def start(folder: Path, values: dict, ranks: int, reward: str = "moody") -> None:
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(merge(values, {"run": {"out": str(folder / "out")}})))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, tiny_runs.__file__, "train", str(folder / "c.json"), reward]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)


@pytest.mark.parametrize("reward", [moody, uncertain])
def test_two_ranks_and_a_continued_run_refill_alike(tmp_path, tiny_model, reward):
    """With `uncertain` what is silent depends on the noise of all readings so far, on all ranks."""
    values = train_config(tmp_path / "x", tiny_model, REFILL).model_dump(mode="json", exclude_unset=True)
    config = train_config(tmp_path / "one", tiny_model, REFILL)
    train(config, [reward], quiet=True)

    class Stopped(Exception):
        pass

    def stopping(samples):
        if samples[0].id >= 3 * 4 * 4 * 3:  # in step 4, after the checkpoint of step 2
            raise Stopped
        return reward(samples)

    stopped = train_config(
        tmp_path / "again", tiny_model, REFILL, {"scoring": {"retries": 0}, "advantage": {"max_failed": 0.5}}
    )
    with pytest.raises(UserError, match="could not be scored"):
        train(stopped, [stopping], quiet=True)
    train(stopped, [reward], quiet=True)
    start(tmp_path / "two", values, 2, reward.__name__)
    shared = ("refill/silent", "refill/drawn", "refill/left", "step")
    runs = [tmp_path / "one", tmp_path / "again", tmp_path / "two/out"]
    metrics = [[{k: r[k] for k in shared} for r in read(run / "metrics.jsonl")] for run in runs]
    assert metrics[0] == metrics[1] == metrics[2] and 0 < sum(own["refill/silent"] for own in metrics[0])
    scores = [[(r["step"], r["id"], r["prompt_id"]) for r in read(run / "scores.jsonl")] for run in runs]
    assert scores[0] == scores[1] == scores[2]
    weights = [(run / "model/diffusion_pytorch_model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_groups_are_exchanged_with_all_that_belongs_to_them(opened):
    trainer = opened(SDE, {"policy": {"prompts": 4}})
    one, _ = training.sample(trainer, trainer.prompts.step(0, 4), 0)
    other, _ = training.sample(trainer, trainer.prompts.step(1, 4), 0)
    both = with_groups(one, other, [(1, 3), (2, 0)], 3)
    origin = [(one, i) for i in range(3)] + [(other, i) for i in (9, 10, 11, 0, 1, 2)] + [(one, i) for i in (9, 10, 11)]
    for place, (source, i) in enumerate(origin):
        assert both.x0[place] is source.x0[i] and both.nodes[place] == source.nodes[i]
        assert int(both.stream.prompt[place]) == int(source.stream.prompt[i])
        own = {n: k for (s, n), k in both.kept.items() if s == place}
        assert own.keys() == set(source.nodes[i]) and all(k is source.kept[i, n] for n, k in own.items())
    assert torch.equal(both.ids, one.ids) and with_groups(one, other, [], 3) is one
