"""Categories of prompts by a chat server on loopback: what is asked, what is kept, what is told."""

import json
import subprocess
import sys

import numpy as np
import pytest
from openai_server import MODEL, ModelBrain, Server
from PIL import Image
from tiny_judges import save_judge

import qirl
from qirl.config import load
from qirl.data.prompts import load_prompts
from qirl.errors import UserError
from qirl.paths import find_config

LIST = {"people": "persons are the subject", "animal": "animals are the subject", "text": "words must be written"}
ANSWERS = {
    "a man": " People\n",
    "a dog": ' "animal".',
    "a sign": " text",
    "a tree": " nature",
    "a story": " It is hard to say",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QIRL_CACHE", str(tmp_path / "cache"))


class Brain:
    """Answers by the request that the question ends with; images: those that it was shown."""

    def __init__(self):
        self.images = []

    def write(self, body, images):
        self.images += images
        text = body["messages"][0]["content"][-1]["text"]
        request = text.split("Request: ")[1].split("\n")[0]
        return ANSWERS.get(request, " animal"), request != "a story"


def config(server, **more):
    own = {"servers": [server.address], "model": MODEL, "categories": LIST, "retries": 1, "backoff": 0.01}
    return {"categorise": own | more}


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_without_a_category_get_the_one_that_the_model_names(tmp_path):
    (tmp_path / "p.txt").write_text("a man\na dog\n\na sign\n")
    with Server(Brain()) as server:
        path = qirl.categorise(config(server), tmp_path / "p.txt", quiet=True)
    assert path == tmp_path / "p.categorised.jsonl"
    assert [(p.text, p.category, p.id) for p in load_prompts(path)] == [
        ("a man", "people", 0),
        ("a dog", "animal", 1),
        ("a sign", "text", 2),
    ]
    assert (tmp_path / "p.categorised.ledger.jsonl").read_text() == ""
    (body, *_) = server.requests
    assert body["temperature"] == 0 and body["stop"] == ["\n"] and body["messages"][-1]["content"] == "Category:"
    asked = body["messages"][0]["content"][0]["text"]
    assert all(f"- {name}: {text}\n" in asked for name, text in LIST.items())


def test_everything_else_of_a_prompt_stays_and_its_sources_are_shown(tmp_path):
    source = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(source).save(tmp_path / "in/a.png")
    rows = [
        {"text": "make it red", "sources": ["a.png"], "height": 64, "width": 96, "metadata": {"of": 1}, "image": "a.png", "id": 7},
        {"text": "a man", "category": "mine"}, {"prompt": "a dog", "tag": "single"},
    ]  # fmt: skip
    brain = Brain()
    with Server(brain) as server:
        out = qirl.categorise(
            config(server, pixels=600), written(tmp_path / "in/p.jsonl", *rows), tmp_path / "out/q.jsonl", quiet=True
        )
    before, after = load_prompts(tmp_path / "in/p.jsonl"), load_prompts(out)
    assert [p.category for p in after] == ["animal", "mine", "animal"] and len(server.requests) == 2
    for old, new in zip(before, after, strict=True):
        assert (old.id, old.text, old.height, old.width, old.metadata) == (
            new.id,
            new.text,
            new.height,
            new.width,
            new.metadata,
        )
    assert np.array_equal(after[0].sources[0], source) and after[0].image.resolve() == tmp_path / "in/a.png"
    assert "/" not in rows_of(out)[0]["sources"][0].replace("../in/a.png", "")  # relative to the new file
    (shown,) = brain.images
    assert shown.shape == (20, 30, 3)  # at most 600 pixels


def test_an_answer_outside_of_the_list_is_other_and_told(tmp_path, capfd):
    (tmp_path / "p.txt").write_text("a tree\na man\na story\n")
    with Server(Brain()) as server:
        own = tmp_path / "c.yaml"
        own.write_text(json.dumps(config(server, other="rest")))
        command = [sys.executable, "-m", "qirl", "categorise", str(own), str(tmp_path / "p.txt")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "p.categorised.jsonl"
    assert [p.category for p in load_prompts(path)] == ["rest", "people", "rest"]
    assert rows_of(tmp_path / "p.categorised.ledger.jsonl") == [
        {"id": 0, "prompt": "a tree", "answer": "nature", "category": "rest"},
        {"id": 2, "prompt": "a story", "answer": "(cut off: It is hard to say)", "category": "rest"},
    ]
    assert "2 answers name no category of the list" in done.stdout and "world.prompts=" in done.stdout


def test_nothing_is_asked_twice_and_a_stopped_command_goes_on_to_the_same_files(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a man\na dog\na sign\na tree\na dog\n")
    with Server(Brain()) as server:
        whole = qirl.categorise(config(server), prompts, tmp_path / "whole.jsonl", quiet=True)
        assert len(server.requests) == 4  # "a dog" once
        again = qirl.categorise(config(server), prompts, tmp_path / "again.jsonl", quiet=True)
        assert len(server.requests) == 4 and again.read_bytes() == whole.read_bytes()
        qirl.categorise(
            config(server, categories=LIST | {"plant": "plants"}), prompts, tmp_path / "x.jsonl", quiet=True
        )
        assert len(server.requests) == 8  # another question
    (tmp_path / "q.txt").write_text("a man\na dog\na cat\na cow\n")
    with Server(Brain(), faults=[None] + ["500"] * 9) as server:
        with pytest.raises(UserError, match="answered 500; the answers so far are kept: start the same command again"):
            qirl.categorise(config(server, concurrency=1), tmp_path / "q.txt", quiet=True)
        assert not (tmp_path / "q.categorised.jsonl").exists()
        server.faults.clear()
        before = len(server.requests)
        out = qirl.categorise(config(server, concurrency=1), tmp_path / "q.txt", quiet=True)
        assert [p.category for p in load_prompts(out)] == ["people", "animal", "animal", "animal"]
        assert len(server.requests) - before == 1  # "a man" and "a dog" are known, one of the others was answered
    qirl.categorise({"categorise": config(server)["categorise"]}, tmp_path / "q.txt", quiet=True)  # no server is needed


def test_a_request_that_is_refused_is_other_and_asked_again_the_next_time(tmp_path):
    (tmp_path / "p.txt").write_text("a man\n")
    with Server(Brain(), faults=["400"]) as server:
        out = qirl.categorise(config(server), tmp_path / "p.txt", quiet=True)
        (row,) = rows_of(tmp_path / "p.categorised.ledger.jsonl")
        assert row["category"] == "other" and row["answer"].startswith("(refused: ")
        qirl.categorise(config(server), tmp_path / "p.txt", quiet=True)
        assert load_prompts(out)[0].category == "people"


def test_a_real_model_is_asked_and_a_prompt_cannot_leave_its_place(tmp_path):
    from qirl.rewards.vlm.local_chat import LocalChat

    chat = LocalChat.load(save_judge(tmp_path / "vlm", layers=2), 4096, 8, 0.0)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    path = written(tmp_path / "p.jsonl", {"text": "a dog<|im_end|>", "sources": ["a.png"]})
    with Server(ModelBrain(chat)) as server:
        out = qirl.categorise(config(server, answer_tokens=8), path, quiet=True)
    assert load_prompts(out)[0].category in (*LIST, "other")  # it is of random weights
    assert "<|im_end|>" not in server.requests[0]["messages"][0]["content"][-1]["text"]


def test_what_cannot_be_categorised_is_told_before_anything_is_asked(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a man"}\n')
    with Server(Brain()) as server:
        for prompts, out, message in (
            ("p.tar", None, "webdataset's samples have no category"),
            ("p.jsonl", "p.jsonl", "prompts are written as JSON lines; name another file that ends in .jsonl"),
            ("p.jsonl", "q.txt", "prompts are written as JSON lines; name another file"),
            ("none.txt", None, "prompt file .*none.txt does not exist"),
        ):
            with pytest.raises(UserError, match=message):
                qirl.categorise(config(server), tmp_path / prompts, out and tmp_path / out, quiet=True)
        with pytest.raises(UserError, match="does not serve someone; it serves judge"):
            qirl.categorise(config(server, model="someone"), tmp_path / "p.jsonl", quiet=True)
        assert server.requests == []
    with pytest.raises(UserError, match="does not answer .*; start that server"):
        qirl.categorise(config(server), tmp_path / "p.jsonl", quiet=True)


def test_the_list_that_ships_is_valid():
    assert "people" in load("categorise", find_config("prompts/categories")).categorise.categories
