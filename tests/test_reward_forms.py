"""Rewards as people write them: what they may return, on which scale, and what is refused."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from cli_runs import qirl
from tiny_runs import train_config

from qirl.config_sections import Composition
from qirl.errors import UserError
from qirl.policy.advantages import ABSENT
from qirl.policy.composition import compose
from qirl.policy.trainer import train
from qirl.rewards.protocol import Sample, is_async, name_of, rows_of
from qirl.rewards.registry import _ranged
from qirl.rewards.scorer import score

SAMPLES = [Sample(i, 0, "p", np.full((2, 2, 3), 40 * i, np.uint8)) for i in range(3)]
NAN = float("nan")


def pick(samples):
    """About 20, as PickScore has it."""
    return np.array([20 + s.image.mean() / 255 for s in samples], np.float32)


async def later(samples):
    return torch.tensor([float(len(s.prompt)) for s in samples])


class Judge:
    def __call__(self, samples):
        return [1, 0.5, True]


@pytest.mark.parametrize(
    "reward, name",
    [(pick, "pick"), (later, "later"), (Judge(), "Judge"), (functools.partial(pick), "pick"),
     (lambda samples: [{"own": 1} for _ in samples], "own")],
)  # fmt: skip
def test_numbers_are_one_component_of_the_functions_name(reward, name):
    rows = score([reward], SAMPLES)
    assert [set(row) for row in rows] == [{name}] * 3 and all(type(v) is float for row in rows for v in row.values())


@pytest.mark.parametrize(
    "results",
    [[0.1, 0.2, 0.3], (0.1, 0.2, 0.3), np.array([0.1, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.3], requires_grad=True),
     [np.float32(0.1), torch.tensor(0.2), 0.3], [{"pick": 0.1}, 0.2, {"pick": np.float64(0.3)}]],
)  # fmt: skip
def test_lists_tensors_and_arrays_read_alike(results):
    assert [row["pick"] for row in rows_of(pick, SAMPLES, results)] == pytest.approx([0.1, 0.2, 0.3])


def test_none_is_a_failed_sample():
    found = rows_of(pick, SAMPLES, [None, 0.5, {"pick": None}])
    assert math.isnan(found[0]["pick"]) and found[1] == {"pick": 0.5} and math.isnan(found[2]["pick"])
    found = rows_of(pick, SAMPLES, [None, {"a": 1.0, "b": 2.0}, {"a": 3.0}])
    assert found[0].keys() == {"a", "b"} and all(map(math.isnan, found[0].values())) and found[2] == {"a": 3.0}


@pytest.mark.parametrize(
    "results, message",
    [
        (["0.5", 1, 2], "reward pick, sample 0: pick='0.5' is no number; return one number"),
        ([1, {"a": "good"}, 2], "sample 1: a='good' is no number"),
        ([1, [2], 3], "sample 1: pick=\\[2\\] is no number"),
        ([1, torch.ones(2), 3], "sample 1: pick=tensor"),
        (np.ones((3, 1)), "array of shape \\(3, 1\\)"),
        ("abc", "returned 'abc'"),
        (None, "returned None"),
        ([1, 2], "returned 2 results for 3 samples"),
        ([1, math.inf, 2], "sample 1: pick=inf is not finite"),
    ],
)
def test_other_forms_are_refused_with_the_sample_and_the_value(results, message):
    with pytest.raises(UserError, match=message):
        rows_of(pick, SAMPLES, results)


def test_a_lambda_of_numbers_has_no_name():
    with pytest.raises(UserError, match="a lambda has no name"):
        score([lambda samples: [1.0] * len(samples)], SAMPLES)


def test_a_declared_range_maps_to_zero_and_one_and_clips():
    ranged = _ranged(pick, (19.0, 21.0))
    assert name_of(ranged) == "pick" and not hasattr(pick, "range")
    assert rows_of(ranged, SAMPLES, [18.0, 20.0, 20.5]) == [{"pick": 0.0}, {"pick": 0.5}, {"pick": 0.75}]
    assert math.isnan(rows_of(ranged, SAMPLES, [NAN, 20, 20])[0]["pick"]) and is_async(_ranged(later, (0, 1)))
    judge = Judge()
    judge.range = {"Judge": (0, 2)}
    assert [row["Judge"] for row in rows_of(judge, SAMPLES, judge(SAMPLES))] == [0.5, 0.25, 0.5]


def test_scores_of_any_scale_train(tmp_path, tiny_model):
    """Normalised inside the group, so that 20 + s and s give the same weights."""

    def plain(samples):
        return [{"pick": float(s.image.mean() / 255)} for s in samples]

    def far(samples):
        return [{"pick": 64 * row["pick"] - 1000} for row in plain(samples)]  # exact in float64

    floor = {"advantage": {"floor": 0.0}}
    models = [
        train(train_config(tmp_path / reward.__name__, tiny_model, floor), [reward], quiet=True)
        for reward in (plain, far, pick)
    ]
    records = [[json.loads(x) for x in (m.folder.path / "metrics.jsonl").read_text().splitlines()] for m in models]
    assert records[1][0]["reward/pick"] < -900 and records[2][0]["reward/pick"] > 19
    for plain_one, far_one in zip(records[0], records[1], strict=True):
        assert far_one["loss"] == pytest.approx(plain_one["loss"], rel=1e-4)
        assert far_one["advantage_abs"] > 0


def test_caps_and_gates_refuse_other_scales_and_take_rounding():
    composed = lambda rows, **options: compose(  # noqa: E731
        torch.tensor(rows, dtype=torch.float64), ["a", "b"], Composition(**options)
    ).tolist()
    with pytest.raises(UserError, match=r"composition needs scores in \[0, 1\], and a=20;.*range=\[low, high\]"):
        composed([[20.0, 0.5]], gates={"a": 0.5})
    assert composed([[1.0000001, 20.0], [ABSENT, 20.0]], gates={"a": 0.5})[1] == [ABSENT, 20.0]


def test_curation_names_the_range_that_it_needs(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "far.py").write_text(
        "def far(samples):\n    return [20 + float(s.image.mean()) / 255 for s in samples]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    common = [
        "curate", "digits/curate", f"model.path={tiny_model}", "world.text_dim=8", "rewards.far.kind=python", "rewards.far.target=far:far",
        "probe.group=2", "probe.prompts=2", "flow.steps=4", "probe.timesteps.count=1", "curate.tau=0.0001",
        "advantage.weights={}",
    ]  # fmt: skip
    code, _, err = qirl(*common, f"run.out={tmp_path / 'a'}")
    assert code == 2 and "a probe needs scores in [0, 1], and far=20" in err and "range=[low, high]" in err
    code, _, err = qirl(*common, f"run.out={tmp_path / 'b'}", "rewards.far.range=[20, 21]")
    assert code == 0, err
    code, _, err = qirl(*common, f"run.out={tmp_path / 'c'}", "rewards.far.range=[21, 20]")
    assert code == 2 and "the first number must be below the second" in err
