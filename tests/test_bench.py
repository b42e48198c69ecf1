"""Qwen-Image-Bench: aggregation worked out by hand, and judge files that are read, written and refused."""

import json

import pytest

from qirl.errors import UserError
from qirl.evaluation.bench import Judgement, aggregate, read_judgements, write_judgements

# image 1: quality = mean(texture = mean(100, 0, 60) = 53.333, light = 100) = 76.667; text = 0; image = 38.333
# image 2: quality = 60; image = 60
# quality = mean(76.667, 60) = 68.333, text = 0 (one image); overall = mean(38.333, 60) = 49.167
BY_HAND = [
    Judgement("1", "quality", "texture", "skin", 2),
    Judgement("1", "quality", "texture", "cloth", 0),
    Judgement("1", "quality", "texture", "stone", 1),
    Judgement("1", "quality", "light", "shadow", 2),
    Judgement("1", "quality", "light", "glare", None),
    Judgement("1", "text", "spelling", "words", 0),
    Judgement("2", "quality", "light", "shadow", 1),
    Judgement("2", "text", "spelling", "words", None),
]


def test_aggregation_is_that_of_the_paper():
    found = aggregate(BY_HAND)
    assert found["columns"]["quality"]["value"] == pytest.approx((230 / 3 + 60) / 2)
    assert found["columns"]["text"]["value"] == 0 and found["columns"]["text"]["images"] == 1
    assert found["overall"]["value"] == pytest.approx((115 / 3 + 60) / 2)
    assert (found["images"], found["judgements"], found["dropped"]) == (2, 8, 2)


def test_overall_is_not_the_mean_of_the_columns():
    found = aggregate(BY_HAND)
    columns = [column["value"] for column in found["columns"].values()]
    assert found["overall"]["value"] == pytest.approx(49.17, abs=0.01)
    assert sum(columns) / 2 == pytest.approx(34.17, abs=0.01)


def test_levels_average_before_the_next_one():
    """Plain averaging of all points would give 75: three good criteria of one L2 against one bad of another."""
    judged = [Judgement("1", "q", "many", str(i), 2) for i in range(3)] + [Judgement("1", "q", "one", "x", 0)]
    assert aggregate(judged)["overall"]["value"] == 50


def test_an_image_of_only_not_applicable_does_not_count():
    judged = [Judgement("1", "q", "a", "x", 2), Judgement("2", "q", "a", "x", None)]
    assert aggregate(judged)["overall"]["value"] == 100 and aggregate(judged)["images"] == 1
    with pytest.raises(UserError, match="1 judgements and no score"):
        aggregate(judged[1:])


def test_intervals_are_over_images():
    judged = [Judgement(str(i), "q", l2, "x", 2 * (i % 2)) for i in range(10) for l2 in "abc"]
    overall = aggregate(judged)["overall"]
    # t(0.975, 9) = 2.262 times sqrt(10/9 * 50^2 / 10)
    assert overall["high"] - 50 == pytest.approx(2.262 * (2500 / 9) ** 0.5, abs=0.01)


def test_a_judge_file_comes_back_as_it_was_written(tmp_path):
    write_judgements(tmp_path / "judge.jsonl", BY_HAND)
    assert read_judgements(tmp_path / "judge.jsonl") == BY_HAND
    assert '"score": "N/A"' in (tmp_path / "judge.jsonl").read_text()


GOOD = {"image": "1", "L1": "q", "L2": "a", "L3": "x", "score": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, not an object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "L2"}), "the key 'L2' is missing"),
        (json.dumps(GOOD | {"judge": "x"}), "the key 'judge' is unknown"),
        (json.dumps(GOOD | {"score": 3}), "has the score 3; a score is 0, 1, 2 or N/A"),
        (json.dumps(GOOD | {"score": True}), "has the score True"),
        (json.dumps(GOOD | {"score": [1]}), "has the score"),
        (json.dumps(GOOD | {"image": 7}), '"image" is 7; it must be text'),
        (json.dumps(GOOD), "was judged on line 1"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "judge.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError, match="judge.jsonl:3: ") as error:
        read_judgements(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="judge file .*none.jsonl does not exist"):
        read_judgements(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no judgement"):
        read_judgements(tmp_path / "empty.jsonl")


def test_a_criterion_given_twice_is_refused():
    with pytest.raises(UserError, match="judged twice"):
        aggregate([BY_HAND[0], BY_HAND[0]])
