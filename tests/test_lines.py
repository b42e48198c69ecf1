"""Files of one thing a line, as other people's programs write them."""

import json

import numpy as np
import pytest
from PIL import Image

from qirl.data.lines import parse_object, read_lines
from qirl.data.prompts import load_prompts
from qirl.errors import UserError
from qirl.evaluation.bench import read_judgements
from qirl.rewards.shell import read_samples
from qirl.rewards.vlm.records import load_records

SEPARATORS = "one\u2028two\x85three\x0bfour"  # str.splitlines would cut here


def test_a_mark_blank_lines_and_windows_ends_are_taken_and_numbers_are_those_of_the_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa red 7\r\n\r\n  a blue 8\r\n")
    assert read_lines(path, "prompt file") == [(1, "a red 7"), (3, "a blue 8")]


def test_only_a_newline_ends_a_line_in_every_file(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"

    def written(**row):
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8-sig")
        return path

    (record,), _ = load_records(
        written(images=["a.png"], rubric="alignment", prompt="p", score=3, reasoning=SEPARATORS)
    )
    assert record.reasoning == SEPARATORS
    (sample,), _ = read_samples(written(image="a.png", prompt=SEPARATORS))
    assert sample.prompt == SEPARATORS
    (prompt,) = load_prompts(written(text=SEPARATORS))
    assert prompt.text == SEPARATORS
    (judgement,) = read_judgements(written(image=SEPARATORS, L1="a", L2="b", L3="c", score=1))
    assert judgement.image == SEPARATORS


@pytest.mark.parametrize("read", [load_prompts, load_records, read_judgements, read_samples])
def test_what_is_no_text_is_one_line(tmp_path, read):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="must be UTF-8 text"):
        read(path)


@pytest.mark.parametrize("line", ["{", "[1]", "7", "[" * 100_000])
def test_what_is_no_object_shows_one(line):
    with pytest.raises(UserError, match="such as EXAMPLE"):
        parse_object(line, "EXAMPLE")


def test_a_transparent_source_of_an_edit_lies_on_white(tmp_path):
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"text": "make it red", "sources": ["a.png"]}\n')
    assert (load_prompts(tmp_path / "rows.jsonl")[0].sources[0] == 255).all()
