"""`qirl reward train`: a Qwen2.5-VL or Qwen3-VL model learns to judge from rated images (algorithm page, section 5).

The chat of a record is what the judge will be asked; the answer is its reasoning and its score. A step's records are a pure
function of (seed, step), and losses are divided by the step's counts over all ranks, so neither the ranks nor the cut into
forward passes change the result.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qirl.config import RewardConfig
from qirl.engine import Engine, whole
from qirl.errors import UserError
from qirl.parallel.data import agree, world_size
from qirl.rewards.vlm import losses
from qirl.rewards.vlm.local_chat import LocalChat
from qirl.rewards.vlm.processor import Encoded, Processor, load_judge
from qirl.rewards.vlm.reading import Reading, expectation, read
from qirl.rewards.vlm.records import Record, by_prompt, load_records
from qirl.rewards.vlm.rubric import END_SCORE, Rubric, begun_answer, load_rubrics
from qirl.rewards.vlm.validation import measure
from qirl.run.folder import write_json

LANGUAGE = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def train_judge(config: RewardConfig, quiet: bool = False) -> Engine:
    """Trains (or continues) the judge in config.run.out; model/ is a folder that transformers and vLLM load.

    validation.json has the measures of `validation.measure`. Raises UserError for a config, records or a folder that do not
    fit; SystemExit 143 after a SIGTERM, on a checkpoint.
    """
    judge = Judge.open(config)
    engine, options = judge.engine, config.judge
    measures: dict = {}

    def step_and_validate(step: int) -> dict:
        record = judge.train_step(step)
        last = step + 1 == config.run.steps
        if judge.validation and (last or (options.validate_every and (step + 1) % options.validate_every == 0)):
            measures.update(judge.validate())
            for name, own in measures.items():
                record |= {f"validation/{name}/{k}": v for k, v in own.items() if k != "records" and v == v}
            if engine.ranks.first:
                write_json(engine.folder.path / "validation.json", measures)
        return record

    engine.run("judge", step_and_validate, lambda r: {"loss": r["loss"], "score": r["loss/score"]}, quiet=quiet)
    judge.export()
    if engine.ranks.first:
        engine.summarise()
    engine.close()
    return engine


@dataclass
class Example:
    """One record as tokens: the chat with the answer; `answer` and `after`: tokens of the answer, and behind the digit."""

    record: Record
    encoded: Encoded
    answer: int
    after: int


@dataclass
class Judge:
    engine: Engine
    processor: Processor
    rubrics: dict[str, Rubric]
    prompts: list[list[Record]]  # what it learns from, by prompt
    validation: list[Record]

    @classmethod
    def open(cls, config: RewardConfig) -> Judge:
        """Checks what can be checked, then loads the model and opens (or re-opens) the run folder."""
        options = config.judge
        if options.batch // options.per_prompt < world_size():
            raise UserError(
                f"judge.batch={options.batch} holds {options.batch // options.per_prompt} prompts of judge.per_prompt="
                f"{options.per_prompt}, fewer than the {world_size()} ranks; use {world_size() * options.per_prompt} or more"
            )
        processor = Processor.load(options.path, options.pixels)
        records, missing = load_records(options.records, options.max_missing)
        rubrics = load_rubrics({r.rubric for r in records}, options.omit)
        learned = by_prompt([r for r in records if r.split == "train"])
        if not learned:
            raise UserError(f"{options.records} has no record of split train")
        if options.loss == "pairwise" and not any(len({r.score for r in own}) > 1 for own in learned):
            raise UserError(f"{options.records}: no prompt has two scores to compare; use judge.loss=pointwise")
        model = lambda sharding, master: build(options, config.run.seed).to(sharding.ranks.device, master)  # noqa: E731
        engine = Engine.around(model, config, options.dtype, blocks=blocks_of)
        if engine.ranks.first and missing:
            (engine.folder.path / "missing.txt").write_text("\n".join(missing) + "\n")
        return cls(engine, processor, rubrics, learned, [r for r in records if r.split == "validation"])

    def drawn(self, step: int) -> list[list[Record]]:
        """The step's records by prompt: prompts in an order of their own every epoch, judge.per_prompt records of each."""
        options, seed = self.engine.config.judge, self.engine.config.run.seed
        order = functools.cache(lambda epoch: _order(len(self.prompts), seed, epoch))
        chosen = []
        for place in range(step * self._prompts, (step + 1) * self._prompts):
            epoch, index = divmod(place, len(self.prompts))
            own = self.prompts[order(epoch)[index]]
            chosen.append([own[i] for i in _order(len(own), seed, place, 1)[: options.per_prompt]])
        return chosen

    @property
    def _prompts(self) -> int:
        return self.engine.config.judge.batch // self.engine.config.judge.per_prompt

    def train_step(self, step: int) -> dict:
        """One update; its loss is a mean over the step's records (pairs for pairwise)."""
        options, ranks, begun = self.engine.config.judge, self.engine.ranks, time.monotonic()
        everything = self.drawn(step)
        counts = sum(map(len, everything)), max(1, sum(len(_ranked(own)) for own in everything))
        mine = everything[ranks.rank :: ranks.world]
        per_pass = max(1, options.micro // options.per_prompt)
        passes = [mine[i : i + per_pass] for i in range(0, len(mine), per_pass)]
        _, most = agree(False, len(passes), ranks)
        total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        self.engine.model.train()
        for place in range(most):
            parts = self.losses(passes[place % len(passes)], *counts) * (1.0 if place < len(passes) else 0.0)
            parts.sum().backward()
            total += parts.detach().double()
        ranks.data.all_reduce(total)
        outcome = self.engine.outcome(step, [self.engine.update(step)])
        score, language = total.tolist()
        return {
            "step": step + 1, "loss": score + language, "loss/score": score, "loss/language": language, **outcome,
            "lr": self.engine.optimizer.lr(step), "time/step": time.monotonic() - begun,
            "images_per_second": counts[0] / (time.monotonic() - begun),
        }  # fmt: skip

    def losses(self, prompts: Sequence[Sequence[Record]], records: int, pairs: int) -> torch.Tensor:
        """[2]: score loss and weighted language loss of these records, over the step's counts."""
        options, device = self.engine.config.judge, self.engine.ranks.device
        examples = [self.example(record) for own in prompts for record in own]
        inputs = self.processor.batch([e.encoded for e in examples], device, left=True)
        kept = max(e.answer for e in examples) + 1
        logits = self.engine.model(**inputs, logits_to_keep=kept).logits.float()
        score = torch.stack([row[kept - 2 - e.after] for row, e in zip(logits, examples, strict=True)])
        digits = score[:, self.processor.digits]
        if options.loss == "pairwise":
            starts = itertools.accumulate(map(len, prompts), initial=0)
            ranked = [(a + i, a + j) for a, own in zip(starts, prompts, strict=False) for i, j in _ranked(own)]
            winner, loser = torch.tensor(ranked, dtype=torch.int64, device=device).reshape(-1, 2).T
            own = losses.pairwise(digits, winner, loser).sum() / pairs
        elif options.loss == "soft":
            raters = [losses.rater_distribution(e.record.score, e.record.spread) for e in examples]
            own = losses.soft(digits, torch.tensor(raters, dtype=torch.float32, device=device)).sum() / records
        else:
            own = (
                losses.pointwise(digits, torch.tensor([e.record.score for e in examples], device=device)).sum()
                / records
            )
        language = [self.language(row, e, kept) for row, e in zip(logits, examples, strict=True)]
        return torch.stack([own, options.language * torch.stack(language).sum() / records])

    def language(self, logits: torch.Tensor, example: Example, kept: int) -> torch.Tensor:
        """Mean cross-entropy of an answer's tokens; in the digit's place -log of the five digits' probability.

        That one lowers the other tokens only: it would else favour the digit that is ahead, and the score could not move
        any more.
        """
        answer = torch.tensor(example.encoded.ids[-example.answer :], device=logits.device)
        rows = logits[kept - 1 - example.answer : kept - 1]
        each = F.cross_entropy(rows, answer, reduction="none")
        place = example.answer - 1 - example.after
        digits = rows[place, self.processor.digits].detach()
        others = rows[place].index_fill(0, torch.tensor(self.processor.digits, device=rows.device), -torch.inf)
        mass = torch.cat([others, digits]).logsumexp(-1) - digits.logsumexp(-1)
        return (each.sum() - each[place] + mass) / example.answer

    def example(self, record: Record) -> Example:
        """The tokens up to `<score>` are those of the reader's second call."""
        messages, images = self.rubrics[record.rubric].messages(record.request, len(record.images) - 1), record.load()
        tokenizer, prefix = self.processor.tokenizer, begun_answer(record.reasoning)
        begun = self.processor.encode(messages, images, prefix)
        own = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        pairs = zip(reversed(begun.ids), reversed(own), strict=False)
        answer = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        end = tokenizer(END_SCORE + (tokenizer.eos_token or ""), add_special_tokens=False)["input_ids"]
        ids = [*begun.ids, self.processor.digits[min(4, int(record.score + 0.5) - 1)], *end]
        return Example(record, Encoded(ids, begun.pixels, begun.grids), answer + 1 + len(end), len(end))

    def validate(self) -> dict[str, dict[str, float]]:
        """The measures of every dimension. Every rank reads every record: generating takes the same steps on all."""
        model = self.engine.model.eval()
        options = self.engine.config.judge
        return measure(self.validation, readings(model, self.processor, self.rubrics, self.validation, options))

    def export(self) -> Path:
        """Writes model/: weights (adapters merged), tokenizer, chat template and image processor of the folder it began with."""
        target, options = self.engine.folder.path / "model", self.engine.config.judge
        state = {k: whole(v) for k, v in self.engine.weights.current.items()}
        if self.engine.ranks.first:
            model = build(options, self.engine.config.run.seed)
            model.load_state_dict(state, strict=False)
            if options.rank:
                model = model.merge_and_unload()
            model.save_pretrained(target)
            for path in Path(options.path).iterdir():
                if path.is_file() and not re.search(r"\.(safetensors|bin|pt|index\.json)$|^config\.json$", path.name):
                    shutil.copy2(path, target / path.name)
        self.engine.ranks.barrier()
        return target


@torch.no_grad()
def readings(model, processor: Processor, rubrics, records: Sequence[Record], options) -> list[Reading]:
    """What the model says of every record: in batches without reasoning, one by one with it."""
    asked = [(rubrics[r.rubric].messages(r.request, len(r.images) - 1), r) for r in records]
    if options.mode == "expected_cot":
        chat = LocalChat(model, processor)
        return [
            asyncio.run(read(chat, messages, r.load(), options.mode, options.chains, seed))
            for seed, (messages, r) in enumerate(asked)
        ]
    found, device = [], next(model.parameters()).device
    for begin in range(0, len(asked), options.micro):
        encoded = [processor.encode(m, r.load(), begun_answer()) for m, r in asked[begin : begin + options.micro]]
        logits = model(**processor.batch(encoded, device, left=True), logits_to_keep=1).logits[:, -1]
        for row in logits.float().log_softmax(-1)[:, processor.digits].tolist():
            score = expectation(row)
            found.append(Reading(score, (score,)))
    return found


def build(options, seed: int) -> torch.nn.Module:
    """The model with its trainable part: all of it, its language part, or adapters there; float32 weights."""
    model = load_judge(options.path)
    if options.rank:
        import peft

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            adapters = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=LANGUAGE)
            return peft.get_peft_model(model, adapters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(options.vision or ".visual." not in f".{name}")
    return model


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of the language model and the blocks of the image encoder."""
    return [m for name, m in model.named_modules() if re.search(r"(language_model\.layers|visual\.blocks)\.\d+$", name)]


def _ranked(records: Sequence[Record]) -> list[tuple[int, int]]:
    """(better, worse) places of the records that differ in score."""
    pairs = itertools.permutations(range(len(records)), 2)
    return [(i, j) for i, j in pairs if records[i].score > records[j].score]


def _order(count: int, *key: int) -> list[int]:
    """A permutation that is a pure function of `key`."""
    return np.random.default_rng([k % 2**64 for k in key]).permutation(count).tolist()
