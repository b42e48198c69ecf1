"""Fine-tuning a judge: data, losses, gradients, ranks, resuming, and the model that comes out."""

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_judges
import torch
from PIL import Image
from scipy import stats

from qirl.config import load
from qirl.config_rewards import JudgeOptions
from qirl.errors import UserError
from qirl.rewards.protocol import Sample
from qirl.rewards.vlm import losses, processor, training
from qirl.rewards.vlm.local_chat import LocalChat
from qirl.rewards.vlm.processor import Processor, load_judge
from qirl.rewards.vlm.reading import Reading
from qirl.rewards.vlm.records import Record, load_records
from qirl.rewards.vlm.reward import JudgeReward
from qirl.rewards.vlm.rubric import load_rubric
from qirl.rewards.vlm.validation import calibration_error, measure

FAMILIES = ("qwen3_vl", "qwen2_5_vl")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """{family: model folder}, tiny."""
    folder = tmp_path_factory.mktemp("judges")
    return {f: tiny_judges.save_judge(folder / f, f, width=48, layers=1) for f in FAMILIES}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_judges.save_records(tmp_path_factory.mktemp("records"), 12, 4)


def config(out, base, records, steps=3, **judge):
    return load(
        "reward",
        {
            "run": {"out": str(out), "steps": steps, "checkpoint_every": 1},
            "judge": {"path": str(base), "records": str(records), "batch": 8, "micro": 4, "pixels": 256} | judge,
            "optimizer": {"lr": 1e-3},
        },
    )


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# losses


def test_losses_are_their_formulas():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(-1)
    score = (p * torch.tensor([1.0, 2, 3, 4, 5])).sum(-1)
    wanted = torch.tensor([1.0, 2.5, 3, 4, 5, 1])
    torch.testing.assert_close(losses.pointwise(logits, wanted), ((score - wanted) ** 2).float(), check_dtype=False)
    raters = torch.tensor([losses.rater_distribution(s, 0.7) for s in wanted.tolist()])
    expected = torch.tensor([stats.entropy(q, p_i) for q, p_i in zip(raters.numpy(), p.numpy(), strict=True)])
    torch.testing.assert_close(losses.soft(logits, raters.float()), expected.float(), rtol=1e-4, atol=1e-5)
    pairs = losses.pairwise(logits, torch.tensor([0, 2]), torch.tensor([1, 5]))
    torch.testing.assert_close(pairs, -torch.log(torch.sigmoid(score[[0, 2]] - score[[1, 5]])), check_dtype=False)


@pytest.mark.parametrize("score,spread", [(1, None), (5, None), (2.25, None), (4.75, 0), (3, 0.5), (3, 1.2)])
def test_the_raters_distribution_has_their_mean(score, spread):
    q = losses.rater_distribution(score, spread)
    assert sum(q) == pytest.approx(1) and min(q) >= 0
    assert sum(d * w for d, w in zip(range(1, 6), q, strict=True)) == pytest.approx(score, abs=1e-9)


def opened(tmp_path, base, records, **judge):
    return training.Judge.open(config(tmp_path / "run", base, records, **judge))


def test_a_steps_loss_is_the_written_out_one(tmp_path, base, records):
    """Example by example, without padding, against the batch; the digit's place has no cross-entropy of its own."""
    judge = opened(tmp_path, base["qwen3_vl"], records)
    prompts = judge.drawn(0)
    model, own = judge.engine.model.eval(), judge.processor
    score, language = [], []
    for record in [r for p in prompts for r in p]:
        e = judge.example(record)
        ids = torch.tensor([e.encoded.ids])
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=e.encoded.pixels,
            image_grid_thw=e.encoded.grids, mm_token_type_ids=(ids == own.image_token).long(),
        ).logits[0].log_softmax(-1)  # fmt: skip
        text = own.tokenizer.decode(e.encoded.ids)
        assert text.endswith(f"<think>{record.reasoning}</think><score>{int(record.score)}</score><|im_end|>")
        digit = len(e.encoded.ids) - 1 - e.after
        p = logits[digit - 1, own.digits].exp()
        score.append((((p / p.sum()) * torch.arange(1, 6)).sum() - record.score) ** 2)
        start = text.index("<think>")
        first = len(own.tokenizer(text[:start], add_special_tokens=False)["input_ids"])
        each = [-logits[i - 1, e.encoded.ids[i]] for i in range(first, len(e.encoded.ids)) if i != digit]
        language.append((sum(each) - p.sum().log()) / (len(each) + 1))
    found = judge.losses(prompts, 8, 1)
    torch.testing.assert_close(found, torch.stack([sum(score) / 8, 0.2 * sum(language) / 8]), rtol=1e-5, atol=1e-6)


def test_a_reader_asks_for_exactly_the_tokens_that_were_trained(base, records):
    own = Processor.load(base["qwen3_vl"], 256)
    record = load_records(records)[0][0]
    messages = load_rubric(record.rubric).messages(record.request)
    written = own.tokenizer.decode(own.tokenizer(f"<think>{record.reasoning}</think>")["input_ids"])
    asked = own.encode(messages, record.load(), written + "<score>").ids
    trained = own.encode(messages, record.load(), f"<think>{record.reasoning}</think><score>").ids
    assert asked == trained


# runs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss,rank", [("pointwise", 0), ("soft", 0), ("pairwise", 4)])
def test_training_moves_the_loss_down_and_leaves_a_model_that_reads_alike(tmp_path, base, records, family, loss, rank):
    out = tmp_path / "run"
    engine = training.train_judge(config(out, base[family], records, 8, loss=loss, rank=rank, language=1.0), quiet=True)
    rows = metrics(out)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["loss/language"] < rows[0]["loss/language"]
    trained = {name for name in engine.weights.current}
    assert (rank > 0) == all("lora_" in name for name in trained)
    assert not rank or not any("visual" in name for name in trained)
    own = Processor.load(out / "model", 256)
    kept = load_records(records)[0][:3]
    rubrics = {r.rubric: load_rubric(r.rubric) for r in kept}
    options = engine.config.judge
    before = training.readings(engine.model.eval(), own, rubrics, kept, options)
    after = training.readings(load_judge(out / "model").eval(), own, rubrics, kept, options)
    for a, b in zip(before, after, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-4, nan_ok=True)
    measures = json.loads((out / "validation.json").read_text())
    assert list(measures.values())[0]["records"] == 16
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (out / "model" / name).read_bytes() == (base[family] / name).read_bytes()


def test_without_vision_the_image_encoder_stays(tmp_path, base, records):
    out = tmp_path / "run"
    training.train_judge(config(out, base["qwen3_vl"], records, 2, vision=False), quiet=True)
    old, new = (load_judge(f).state_dict() for f in (base["qwen3_vl"], out / "model"))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and not any(".visual." in name for name in moved)


def test_a_run_continues_where_it_stopped_bit_for_bit(tmp_path, base, records):
    whole = config(tmp_path / "whole", base["qwen3_vl"], records, 4)
    training.train_judge(whole, quiet=True)
    cut = config(tmp_path / "cut", base["qwen3_vl"], records, 4)
    judge = training.Judge.open(cut)
    with pytest.raises(KeyboardInterrupt):

        def interrupted(step):
            if step == 2:
                raise KeyboardInterrupt
            return judge.train_step(step)

        judge.engine.run("judge", interrupted, lambda r: {}, quiet=True)
    training.train_judge(cut, quiet=True)
    a, b = (load_judge(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["step"] for r in metrics(tmp_path / "cut")] == [1, 2, 3, 4]


RANKS = """
import sys
from test_judge_training import config
from qirl.rewards.vlm.training import train_judge
train_judge(config(sys.argv[1], sys.argv[2], sys.argv[3], 2, loss=sys.argv[4], per_prompt=2), quiet=True)
"""


@pytest.mark.parametrize("loss", ["pointwise", "pairwise"])
def test_two_processes_learn_what_one_does(tmp_path, base, records, loss):
    (tmp_path / "run.py").write_text(RANKS)
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
                   str(tmp_path / "run.py"), str(tmp_path / f"{ranks}"), str(base["qwen3_vl"]), str(records), loss]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
    a, b = (load_judge(tmp_path / name / "model").state_dict() for name in ("1", "2"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3


def test_steps_are_a_function_of_the_seed_and_cover_every_prompt(tmp_path, base, records):
    judge = opened(tmp_path, base["qwen3_vl"], records)
    first = [judge.drawn(step) for step in range(9)]
    assert first == [judge.drawn(step) for step in range(9)]
    seen = [own[0].prompt for step in first for own in step]
    count = len(judge.prompts)
    assert len(set(seen[:count])) == count and all(len(own) <= 2 for step in first for own in step)


# reading with what was trained


@pytest.mark.parametrize("family", FAMILIES)
def test_a_judge_reads_in_process_as_a_batch_does(base, records, family):
    reward = JudgeReward("alignment", JudgeOptions(model=str(base[family]), mode="expected_direct", pixels=256))
    assert isinstance(reward.chat, LocalChat)
    reward.rubric = load_rubric(str(records.parent / "rubric.txt"))
    kept = load_records(records)[0][:4]
    given = [Sample(i, i, r.request, r.load()[0]) for i, r in enumerate(kept)]
    alone = asyncio.run(reward(given))
    for row, record in zip(alone, kept, strict=True):  # random weights: the five digits hold little of the probability
        log_probs = reward.chat.next_digits(
            reward.rubric.messages(record.request), record.load(), "<think></think><score>"
        )
        assert math.isnan(row["alignment"]) == (np.exp(log_probs).sum() < 0.5)


def test_a_written_reasoning_repeats_by_its_seed(base, records):
    chat = LocalChat.load(base["qwen3_vl"], 256, 12, 1.0)
    messages = load_rubric(str(records.parent / "rubric.txt")).messages("a red 7")
    image = [tiny_judges.picture(7, "red", "judge", 0.3)]
    texts = [chat._write(messages, image, "<think>", "<score>", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and not texts[0].finished


# validation


def test_measures_on_a_hand_computed_case():
    def record(request, score):
        return Record((Path("x.png"),), "alignment", request, score)

    given = [record("a", 5), record("a", 3), record("a", 1), record("b", 4), record("b", 2), record("c", 3)]
    read = [Reading(s, (s,)) for s in (4.0, 4.0, 1.0, 2.0, 3.0, math.nan)]
    found = measure(given, read)["alignment"]
    # pairs: 5>3 tie, 5>1 right, 3>1 right, 4>2 wrong
    assert found["pair_accuracy"] == pytest.approx(2.5 / 4) and found["ties"] == pytest.approx(1 / 4)
    assert found["failed"] == pytest.approx(1 / 6) and found["records"] == 6 and math.isnan(found["noise"])
    scores, wanted = [4.0, 4.0, 1.0, 2.0, 3.0], [5, 3, 1, 4, 2]
    assert found["srcc"] == pytest.approx(stats.spearmanr(scores, wanted).statistic)
    assert found["plcc"] == pytest.approx(np.corrcoef(scores, wanted)[0, 1])
    assert found["calibration"] == pytest.approx((2 * 0 + 0 + 2 + 1) / 5)


def test_calibration_error_is_zero_where_bins_agree():
    score = np.array([1.1, 1.2, 3.0, 3.1])
    assert calibration_error(score, np.array([1.0, 1.3, 3.05, 3.05])) == pytest.approx(0, abs=1e-9)


# bad input


def write_records(folder, *lines):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / "r.jsonl"
    path.write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))
    return path


GOOD = {"images": ["a.png"], "rubric": "alignment", "prompt": "a cat", "score": 3}


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "r.jsonl:2: not JSON"),
        ("[1]", "not an object"),
        (GOOD | {"score": 6}, "score=6 must be a number from 1 to 5"),
        (GOOD | {"score": True}, "score=True"),
        (GOOD | {"spread": -1}, "spread=-1"),
        (GOOD | {"images": []}, "images must list paths"),
        (GOOD | {"split": "test"}, "split=test must be one of train, validation"),
        (GOOD | {"scores": 3}, "'scores' is no field"),
        ({k: v for k, v in GOOD.items() if k != "prompt"}, "a prompt or an instruction"),
        (
            GOOD | {"images": ["b.png"]},
            "1 of 2 records lack images they could learn from, more than judge.max_missing=0 allows",
        ),
    ],
)
def test_bad_records_are_told_with_their_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        load_records(write_records(tmp_path / "d", GOOD, line))


def test_missing_images_within_the_share_are_left_out_and_listed(tmp_path):
    path = write_records(tmp_path / "d", GOOD, GOOD | {"images": ["b.png"]}, GOOD)
    kept, missing = load_records(path, 0.4)
    assert len(kept) == 2 and missing == [
        f"{path}:2: {tmp_path / 'd/b.png'} cannot be read (No such file or directory); check the path"
    ]


def test_what_no_judge_can_learn_from_is_left_out_before_training(tmp_path):
    """A JPEG that breaks off among its pixels, a banner thinner than the image processor takes."""
    path = write_records(tmp_path / "d", GOOD, GOOD | {"images": ["cut.jpg"]}, GOOD | {"images": ["a.png", "thin.png"]})
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "d/cut.jpg")
    (tmp_path / "d/cut.jpg").write_bytes((tmp_path / "d/cut.jpg").read_bytes()[:20000])
    Image.new("RGB", (402, 2)).save(tmp_path / "d/thin.png")
    kept, missing = load_records(path, 0.7)
    assert len(kept) == 1 and "cut.jpg is truncated or damaged" in missing[0]
    assert "thin.png has 402 x 2 pixels; a judge takes up to 200 : 1" in missing[1]
    with pytest.raises(UserError, match="2 of 3 records lack images they could learn from"):
        load_records(path, 0.5)
    Image.new("RGB", (400, 2)).save(tmp_path / "d/thin.png")
    assert len(load_records(path, 0.7)[0]) == 2


def test_an_unreadable_image_is_named(tmp_path):
    path = write_records(tmp_path / "d", GOOD)
    whole = (tmp_path / "d/a.png").read_bytes()
    (tmp_path / "d/a.png").write_bytes(whole[:45])
    with pytest.raises(UserError, match="a.png is truncated or damaged"):
        load_records(path)
    for none in (b"no image", b"", whole[:20]):
        (tmp_path / "d/a.png").write_bytes(none)
        with pytest.raises(UserError, match="a.png is (no image of format|truncated)"):
            load_records(path)
    (tmp_path / "d/a.png").unlink()
    (tmp_path / "d/a.png").mkdir()
    with pytest.raises(UserError, match=r"a.png cannot be read \(Is a directory\)"):
        load_records(path)


def test_another_family_is_refused(tmp_path, tiny_model):
    with pytest.raises(UserError, match="is no model folder|must be one of"):
        Processor.load(tiny_model, 256)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a llama model; it must be one of qwen2_5_vl, qwen3_vl"):
        Processor.load(tmp_path, 256)


def test_digits_that_are_no_single_tokens_are_refused():
    class Merging:
        def __call__(self, text, add_special_tokens):
            return {
                "input_ids": [ord(c) for c in text] if not text.endswith("3") else [ord(c) for c in text[:-2]] + [999]
            }

    with pytest.raises(UserError, match="no single token of 3"):
        processor.digit_tokens(Merging())


@pytest.mark.parametrize(
    "judge,message",
    [
        (dict(per_prompt=9), "do not fit judge.micro=4"),
        (dict(loss="pairwise", per_prompt=1), "set judge.per_prompt to 2 or more"),
        (dict(records=None), "judge.records is missing"),
        (dict(los="soft"), "judge.loss"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, base, records, judge, message):
    given = {"path": str(base["qwen3_vl"]), "records": str(records), "batch": 8, "micro": 4} | judge
    with pytest.raises(UserError, match=message):
        load("reward", {"judge": given})


def test_pairs_need_scores_that_differ(tmp_path, base):
    path = write_records(tmp_path / "d", GOOD, GOOD)
    with pytest.raises(UserError, match="no prompt has two scores"):
        training.Judge.open(config(tmp_path / "run", base["qwen3_vl"], path, loss="pairwise"))
