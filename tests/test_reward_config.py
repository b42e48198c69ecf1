"""Rewards named in a config, and how they bear on one another."""

import json
import math

import pytest
import torch
import yaml
from openai_server import MODEL, Server
from tiny_runs import train_config

from qirl.config import KINDS, describe, load, to_dict
from qirl.config_sections import Composition
from qirl.errors import UserError
from qirl.policy import trainer as training
from qirl.policy.advantages import ABSENT
from qirl.policy.composition import compose
from qirl.rewards.registry import build, identity

NAN = math.nan


def redness(samples):
    return [{"redness": float(s.image[..., 0].mean() / 255)} for s in samples]


def safe(samples):
    return [{"safety": float(s.id % 2)} for s in samples]


redness.components, safe.components = ("redness",), ("safety",)
HERE = {"kind": "python", "target": "test_reward_config:redness"}


# config


def test_rewards_of_a_config_are_built_in_its_order():
    config = load(
        "train", {"model": {"path": "m"}, "rewards": {"a": HERE, "b": HERE | {"target": "test_reward_config:safe"}}}
    )
    assert [reward.__name__ for reward in build(config.rewards)] == ["redness", "safe"]


@pytest.mark.parametrize("kind", [k for k in KINDS if "rewards" in KINDS[k].model_fields])
def test_rewards_read_back_from_a_resolved_config(kind, tmp_path):
    judge = {"kind": "judge", "model": "m", "omit": ["attractiveness"], "rubric": "portrait"}
    given = {} if kind == "serve" else {"model": {"path": "m"}}
    config = load(kind, given | {"rewards": {"j": judge, "p": HERE}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load(kind, tmp_path / "c.yaml") == config
    names = [name for name, *_ in describe(kind)]
    assert "rewards.NAME(judge).rubric" in names and "rewards.NAME(python).target" in names


def test_an_override_reaches_an_option_of_a_reward():
    given = {"model": {"path": "m"}, "rewards": {"j": {"kind": "judge", "model": "m"}}}
    config = load("train", given, ["rewards.j.chains=3", "rewards.j.model=2024"])
    assert config.rewards["j"].chains == 3 and config.rewards["j"].model == "2024"


@pytest.mark.parametrize(
    "rewards,message",
    [
        ({"a": {"kind": "jugde"}}, "face_identity; did you mean 'judge'"),
        ({"a": {"model": "m"}}, "rewards.a.kind=None is none of"),
        (
            {"a": {"kind": "judge", "model": "m", "chain": 3}},
            "unknown option 'rewards.a.chain'; did you mean 'rewards.a.chains'",
        ),
        ({"a": 3}, "'rewards.a' is a section"),
        ({"a": {"kind": "judge", "model": "m", "chains": 0}}, "rewards.a.judge.chains=0"),
        ({"a": {"kind": "judge"}}, "a judge needs `model`"),
        ({"a": {"kind": "python", "target": "no colon"}}, "rewards.a.python.target"),
    ],
)
def test_bad_rewards_are_told(rewards, message):
    with pytest.raises(UserError) as caught:
        load("train", {"model": {"path": "m"}, "rewards": rewards})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "target,message",
    [("no_such_module:f", "cannot be imported"), ("test_reward_config:nothing", "test_reward_config has no nothing")],
)
def test_a_function_that_is_not_there_is_told(target, message):
    config = load("train", {"model": {"path": "m"}, "rewards": {"a": HERE | {"target": target}}})
    with pytest.raises(UserError, match=message):
        build(config.rewards)


def test_two_components_of_one_name_are_refused():
    config = load("train", {"model": {"path": "m"}, "rewards": {"a": HERE, "b": HERE}})
    with pytest.raises(UserError, match="rewards.a and rewards.b both return the component 'redness'"):
        build(config.rewards)


# composition


def composed(rows, **options):
    return compose(torch.tensor(rows, dtype=torch.float64), ["a", "b", "c"], Composition(**options)).tolist()


def test_a_failed_layer_caps_those_above_it_and_no_other():
    rows = [[0.1, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.1], [0.1, 0.2, ABSENT]]
    found = composed(rows, layers=("a", "b", "c"), failing=0.25, cap=0.3)
    assert found == [[0.1, 0.3, 0.3], [0.9, 0.1, 0.3], [0.9, 0.9, 0.1], [0.1, 0.2, ABSENT]]


def test_what_is_absent_or_failed_caps_nothing():
    rows = [[ABSENT, 0.9, 0.9], [NAN, 0.9, 0.9]]
    found = composed(rows, layers=("a", "c"), gates={"a": 0.5})
    assert found[0] == rows[0] and math.isnan(found[1][0]) and found[1][1:] == rows[1][1:]


@pytest.mark.parametrize("gated,expected", [("zero", 0.0), ("drop", NAN)])
def test_a_gate_that_is_not_passed_takes_every_component(gated, expected):
    found = composed([[0.4, 0.9, ABSENT], [0.5, 0.9, 0.2]], gates={"a": 0.5}, gated=gated)
    assert found[1] == [0.5, 0.9, 0.2] and found[0][2] == ABSENT
    assert all(v == expected or (math.isnan(v) and math.isnan(expected)) for v in found[0][:2])


def test_names_that_nobody_returns_do_nothing():
    assert composed([[0.1, 0.9, 0.9]], layers=("x", "c"), gates={"y": 1.0}) == [[0.1, 0.9, 0.9]]


# runs


def test_a_run_takes_its_rewards_and_gates_from_its_config(tmp_path, tiny_model):
    config = train_config(
        tmp_path / "run", tiny_model,
        {"rewards": {"a": HERE, "b": HERE | {"target": "test_reward_config:safe"}},
         "composition": {"gates": {"safety": 0.5}}, "advantage": {"weights": {"redness": 1.0, "safety": 0.0}}},
    )  # fmt: skip
    training.train(config, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run/scores.jsonl").read_text().splitlines()]
    assert rows and all(set(row["scores"]) == {"redness", "safety"} and row["scores"]["redness"] > 0 for row in rows)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    raw = sum(row["scores"]["redness"] for row in rows if row["step"] == 1) / sum(row["step"] == 1 for row in rows)
    assert metrics[0]["reward/redness"] < 0.75 * raw  # half of the samples are gated to 0


def test_a_ledger_knows_its_rewards_but_not_where_they_are_asked():
    judge = {"kind": "judge", "model": "m", "servers": ["http://a"], "timeout": 3.0}
    facts = [
        identity(load("curate", {"model": {"path": "m"}, "rewards": {"j": judge | change}}).rewards)
        for change in ({}, {"servers": ["http://b"], "timeout": 9.0}, {"rubric": "portrait"})
    ]
    assert facts[0] == facts[1] != facts[2]


class Reddish:
    """A judge that answers by the picture's red."""

    def write(self, body, images):
        return "red?</think>", True

    def tokens(self, body, images):
        return {str(1 + int(images[-1][..., 0].mean() * 5 // 256)): 0.0}


def judged(server, **options):
    quick = {"retries": 1, "backoff": 0.01, "timeout": 0.5, "concurrency": 4}
    return {"rewards": {"j": {"kind": "judge", "model": MODEL, "servers": [server.address], **quick, **options}}}


def test_a_run_goes_on_through_faults_and_counts_what_failed(tmp_path, tiny_model):
    faults = ["500", None, "hang", "truncated", None, "count", "nan"] * 6
    with Server(Reddish(), faults=faults, hang=0.8) as server:
        config = train_config(tmp_path / "run", tiny_model, judged(server), {"advantage": {"max_failed": 1.0}})
        engine = training.train(config, quiet=True)
        assert not server.faults
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == engine.config.run.steps
    rows = [json.loads(line) for line in (tmp_path / "run/scores.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["scores"]["j"] is None]
    assert len(rows) > len(failed) > 0 and all(row["scores"]["j"] in (None, 0, 0.25, 0.5, 0.75, 1) for row in rows)


def test_a_run_stops_where_too_many_fail_and_trains_on_nothing(tmp_path, tiny_model):
    with Server(Reddish(), faults=["500"] * 10_000) as server:
        config = train_config(tmp_path / "run", tiny_model, judged(server), {"advantage": {"max_failed": 0.2}})
        with pytest.raises(UserError, match="100% of the samples could not be scored"):
            training.train(config, quiet=True)
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()


def test_a_server_that_is_not_there_stops_a_run_before_its_folder_is_made(tmp_path, tiny_model):
    with Server(Reddish()) as server:
        parts = judged(server)
    config = train_config(tmp_path / "run", tiny_model, parts)
    with pytest.raises(UserError, match="does not answer"):
        training.train(config, quiet=True)
    assert not (tmp_path / "run").exists()
