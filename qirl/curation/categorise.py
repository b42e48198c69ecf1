"""Categories of prompts named by a vision-language model: it reads a prompt, its sources and a list, and answers one name.

    prompts.jsonl -> prompts.categorised.jsonl           every prompt with its category, for world.prompts
                     prompts.categorised.ledger.jsonl    a line per answer that is none of the names: {"id", "prompt", "answer", "category"}

Prompts that have a category keep it. An answer lies in the cache under the hash of the question, the sources and the model, so
nothing is asked twice, also after a run that was stopped, and the same files come out.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path

from qirl.config import CategoriseConfig
from qirl.config_rewards import Categorise
from qirl.curation.curate import record_of
from qirl.data.prompts import GENERAL, Prompt, load_prompts
from qirl.errors import UserError
from qirl.rewards.remote import Refused, ServerError
from qirl.rewards.vlm.openai_chat import OpenAIChat, check_servers
from qirl.rewards.vlm.reward import fit
from qirl.rewards.vlm.rubric import escape
from qirl.run import cache
from qirl.run.folder import check_writable, write_bytes
from qirl.run.progress import Live

BEGUN = "Category:"  # how its answer begins
FILE = "answer.json"


def categorise(
    config: CategoriseConfig, prompts: str | Path, out: str | Path | None = None, quiet: bool = False
) -> Path:
    """Writes `prompts` with categories to `out`, a .jsonl file (none: beside it), and the ledger beside that; returns it.

    Raises UserError for prompts that `load_prompts` refuses or that are no .txt or .jsonl, and for servers that do not serve
    the model or stop answering; what they have answered is kept.
    """
    options, path = config.categorise, Path(prompts)
    target = Path(out) if out is not None else path.with_suffix(".categorised.jsonl")
    if path.suffix == ".tar":
        raise UserError(f"{path}: webdataset's samples have no category; give a .txt or .jsonl file")
    if target.suffix != ".jsonl" or target.is_dir() or target.resolve() == path.resolve():
        raise UserError(f"--out {target}: prompts are written as JSON lines; name another file that ends in .jsonl")
    check_writable(target.parent)
    found = load_prompts(path)
    open_ones = [prompt for prompt in found if prompt.category == GENERAL]
    answers = dict(zip([p.id for p in open_ones], ask(options, open_ones, quiet), strict=True))
    names = {prompt.id: category_of(answers[prompt.id], options) for prompt in open_ones}
    target.parent.mkdir(parents=True, exist_ok=True)
    outside = [p for p in open_ones if names[p.id] is None]
    rows = [{"id": p.id, "prompt": p.text, "answer": answers[p.id], "category": options.other} for p in outside]
    _write(ledger_of(target), rows)
    _write(target, [_record(p, names.get(p.id, p.category) or options.other, target) for p in found])
    return target


def ledger_of(path: Path) -> Path:
    """The ledger of a categorised file."""
    return path.with_suffix(".ledger.jsonl")


def ask(options: Categorise, prompts: Sequence[Prompt], quiet: bool = False) -> list[str]:
    """What the model writes of every prompt, from the cache where it has been asked; of a request that a server refuses, why.

    Raises UserError as `categorise` does.
    """
    keys = [_key(options, prompt) for prompt in prompts]
    missing = {key: p for key, p in zip(keys, prompts, strict=True) if cache.find("category", key) is None}
    refused: dict[str, str] = {}
    if missing:
        check_servers(options)
        refused = asyncio.run(_ask_all(options, missing, quiet))
    return [refused[key] if key in refused else _kept(key) for key in keys]


def _kept(key: str) -> str:
    return json.loads((cache.find("category", key) / FILE).read_text())["answer"]


async def _ask_all(options: Categorise, prompts: dict[str, Prompt], quiet: bool) -> dict[str, str]:
    """Brings the answers into the cache; those that are refused, and why."""
    chat, done, refused = OpenAIChat(options), 0, {}

    async def one(key: str, prompt: Prompt) -> None:
        nonlocal done
        try:
            text = json.dumps({"prompt": prompt.text, "answer": await _ask(chat, options, prompt, key)})
            await asyncio.to_thread(cache.cached_folder, "category", key, lambda path: (path / FILE).write_text(text))
        except Refused as error:
            refused[key] = f"(refused: {error})"
        except ServerError as error:
            raise UserError(f"{error}; the answers so far are kept: start the same command again") from None
        done += 1
        live.update(done, {})

    with Live("categorise", len(prompts), show=not quiet) as live:
        await asyncio.gather(*(one(key, prompt) for key, prompt in prompts.items()))
    return refused


async def _ask(chat: OpenAIChat, options: Categorise, prompt: Prompt, key: str) -> str:
    """The answer of one line; what there is of it where it is cut off."""
    images = [fit(image, options.pixels) for image in prompt.sources]
    seed, tokens = int(key[:7], 16), options.answer_tokens
    said = await chat.say(question(options, prompt), images, BEGUN, "\n", seed, tokens)
    return said.text.strip() if said.finished else f"(cut off: {said.text.strip()})"


def question(options: Categorise, prompt: Prompt) -> list[dict]:
    """The chat that asks for the category of a prompt; an entry {"type": "image"} stands for its next source."""
    content: list[dict] = []
    for number in range(1, len(prompt.sources) + 1):
        content += [{"type": "text", "text": f"Source image {number}:"}, {"type": "image"}]
    what = "an edit of the source images" if prompt.sources else "an image"
    names = "\n".join(f"- {name}: {text}" for name, text in options.categories.items())
    content.append({"type": "text", "text": (
        f"Below is a request for {what}. Which one of these categories does it belong to?\n\n{names}\n\n"
        f"Request: {escape(prompt.text)}\n\nAnswer with the name of one category and nothing else."
    )})  # fmt: skip
    return [{"role": "user", "content": content}]


def _key(options: Categorise, prompt: Prompt) -> str:
    """Of everything that the answer depends on."""
    return cache.content_key(
        question(options, prompt), BEGUN, options.model, options.answer_tokens, prompt.source_hash,
        options.pixels if prompt.sources else 0,
    )  # fmt: skip


def category_of(answer: str, options: Categorise) -> str | None:
    """The category that an answer names, whatever its case and the marks around it; None for anything else."""
    said = answer.strip().strip("\"'`*.").strip().casefold()
    return next((name for name in options.categories if name.casefold() == said), None)


def _record(prompt: Prompt, category: str, target: Path) -> dict:
    def place(file: Path) -> str:
        return os.path.relpath(file.resolve(), target.resolve().parent)

    record = record_of(prompt, place) | {"category": category}
    return record | ({"sources": [place(file) for file in prompt.sources.files]} if prompt.sources else {})


def _write(path: Path, rows: Sequence[dict]) -> None:
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
