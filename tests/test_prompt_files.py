"""What prompts are read from: text, JSON lines, other systems' records, webdataset; and what is said of bad ones."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from qirl.data import prompts
from qirl.data.images import Pictures, read_image
from qirl.data.prompt_file import PromptFile
from qirl.data.prompts import load_prompts
from qirl.errors import UserError

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def png(image=PICTURE) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_record_says_sizes_metadata_and_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    whole = {
        "text": " a 7 ",
        "category": "c",
        "id": 9,
        "height": 64,
        "width": 96,
        "metadata": {"texts": ["7"]},
        "image": "a.png",
    }
    (found,) = load_prompts(lines(tmp_path / "p.jsonl", whole))
    assert (found.text, found.category, found.id, found.height, found.width) == ("a 7", "c", 9, 64, 96)
    assert found.metadata == {"texts": ["7"]} and np.array_equal(read_image(found.image), PICTURE)


def test_records_of_flow_grpo_are_read_as_they_are(tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
        {"prompt": "a cat", "tag": "single"},
    ]
    found = load_prompts(lines(tmp_path / "metadata.jsonl", *rows))
    assert [p.text for p in found] == ["two dogs", "a cat"] and [p.id for p in found] == [0, 1]
    assert found[0].metadata == {"tag": "counting", "include": [{"class": "dog", "count": 2}]}


def test_sources_are_decoded_once_and_read_again_when_they_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    (prompt,) = load_prompts(lines(tmp_path / "p.jsonl", {"text": "x", "sources": ["a.png"]}))
    assert isinstance(prompt.sources, Pictures) and prompt.task == "edit" and len(prompt.sources) == 1
    assert np.array_equal(prompt.sources[0], PICTURE) and np.array_equal(prompt.sources[-1], PICTURE)
    assert [s.shape for s in prompt.sources] == [PICTURE.shape]


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_webdatasets_samples_are_read_where_they_lie(tmp_path):
    other = PICTURE[::-1]
    tar(
        tmp_path / "s-0.tar",
        {
            "000.png": png(),
            "000.txt": b"a red 7\n",
            "a/001.json": b'{"caption": "a dog", "score": 3}',
            "a/001.png": png(other),
        },
    )
    tar(tmp_path / "s-1.tar", {"000.txt": b"a cat"})
    found = load_prompts(tmp_path / "s-*.tar")
    assert [(p.text, p.id, p.metadata) for p in found] == [
        ("a red 7", 0, {}),
        ("a dog", 1, {"score": 3}),
        ("a cat", 2, {}),
    ]
    assert np.array_equal(read_image(found[0].image), PICTURE) and np.array_equal(read_image(found[1].image), other)
    assert found[2].image is None


def test_all_bad_lines_are_told_at_once_and_may_be_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:200])
    rows = (
        {"text": "good", "sources": ["a.png"]},
        {"text": "x", "sources": ["gone.png"]},
        {"text": "x", "sources": ["cut.png"]},
        "no",
        {"text": "x", "image": 3},
    )
    path = lines(tmp_path / "p.jsonl", *rows)
    with pytest.raises(UserError) as error:
        load_prompts(path)
    said = str(error.value)
    assert said.startswith(f"4 of 5 lines of {path} cannot be used: {path}:2: ") and "gone.png cannot be read" in said
    assert "cut.png is truncated or damaged" in said and f"{path}:4: not JSON" in said and said.endswith("and 1 more")
    with pytest.warns(UserWarning, match="4 of 5 lines .* are left out"):
        assert [p.text for p in load_prompts(path, most_bad=0.8)] == ["good"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.csv", b"x", "a prompt file ends in .txt .* .jsonl .* or .tar"),
        ("p.tar", b"no tar", "p.tar is no plain tar"),
        ("p.jsonl", b'{"text": "x", "height": 3}', '"height" and "width" are 3 and None; give both'),
        ("p.jsonl", b'{"text": "x", "metadata": 3}', '"metadata" is 3; it must be an object'),
        ("p.jsonl", b'{"text": "x", "image": "none.png"}', "\"image\" is 'none.png'; it must be the path of a file"),
        ("p.jsonl", b'{"text": "x", "colour": 3}', "unknown key 'colour'; known: category, height, id, image"),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name)
    with pytest.raises(UserError, match="no file is called"):
        load_prompts(tmp_path / "none-*.tar")


class Square:
    """A family as far as data knows it."""

    pixels = 16

    def check(self, prompt):
        pass

    def size(self, prompt):
        return 4, 2


def test_examples_cover_the_size_of_their_prompt(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    own = PromptFile("t2i", Square())
    own.prompts(
        "train",
        lines(
            tmp_path / "p.jsonl", {"text": "one", "image": "a.png"}, {"text": "none"}, {"text": "two", "image": "a.png"}
        ),
    )
    chosen, images = own.examples(np.array([[0.0], [0.49], [0.5], [0.999]]))
    assert [p.text for p in chosen] == ["one", "one", "two", "two"] and {i.shape for i in images} == {(64, 32, 3)}
    bare = PromptFile("t2i", Square())
    bare.prompts("train", lines(tmp_path / "q.txt", "a", "b"))
    with pytest.raises(UserError, match="no prompt of world.prompts has an image to learn"):
        bare.examples(np.zeros((1, 1)))


def test_prompts_without_a_category_are_sorted_by_the_first_rule_that_they_match(tmp_path):
    (tmp_path / "rules.yaml").write_text("people: [portrait, 'a (man|woman)']\ntext: ['\"']\n")
    rows = (
        '{"text": "A Woman with a sign \\"HI\\""}',
        '{"text": "the word \\"HI\\""}',
        {"text": "a dog"},
        {"text": "a man", "category": "own"},
    )
    own = PromptFile("t2i", Square(), rules=str(tmp_path / "rules.yaml"))
    found = own.prompts("train", lines(tmp_path / "p.jsonl", *rows))
    assert [p.category for p in found] == ["people", "text", "general", "own"]
    for bad in ("- a\n", "people: ['(']\n", "people: 3\n"):
        (tmp_path / "rules.yaml").write_text(bad)
        with pytest.raises(UserError, match="world.categories=.* holds no patterns by category"):
            own.prompts("train", tmp_path / "p.jsonl")


def test_a_prompt_file_is_read_again_where_it_or_a_source_has_changed(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    path = lines(tmp_path / "p.jsonl", {"text": "x", "sources": ["a.png"]})
    (first,) = load_prompts(path)
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "_read", None)  # would fail
        assert load_prompts(path)[0] is first
    assert first.sources[0].shape == (20, 30, 3)
    (tmp_path / "a.png").write_bytes(png(PICTURE[:10]))
    (changed,) = load_prompts(path)
    assert changed.source_sizes == [(10, 30)] and np.array_equal(changed.sources[0], PICTURE[:10])
    lines(path, {"text": "another", "sources": ["a.png"]})
    assert [p.text for p in load_prompts(path)] == ["another"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="a.png cannot be read"):
        load_prompts(path)
    (tmp_path / "a.png").write_bytes(png())
    assert [p.source_sizes for p in load_prompts(path)] == [[(20, 30)]]
