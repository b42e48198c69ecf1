"""A world: prompts, condition encoder and autoencoder that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from qirl.config_sections import World
from qirl.data import digits, edits, latents
from qirl.data.prompts import Prompt, load_prompts
from qirl.data.words import WordVectors, parse
from qirl.errors import UserError
from qirl.packing import Condition

EDITED = 0.4  # share of edits among the examples of both tasks


class DigitsWorld:
    """Handwritten digits: word vectors for a text encoder, strokes and colours for an autoencoder."""

    name = "digits"
    channels = latents.CHANNELS
    height = width = latents.SIDE  # latent tokens

    def __init__(self, options: World):
        self.task, self.text_dim = options.task, options.text_dim
        self.words = WordVectors(options.text_dim)
        self._text = lru_cache(maxsize=None)(lambda text: Condition(self.words.encode(text)))

    def condition(self, prompt: Prompt) -> Condition:
        """What the transformer is given of a prompt: its words, for an edit after its sources (see `_with_sources`)."""
        return self._with_sources(prompt, prompt.text) if prompt.sources else self._text(prompt.text)

    def negative(self, prompt: Prompt) -> Condition:
        """The unconditional twin of a prompt; for text-to-image always the same object, for an edit its sources stay."""
        return self._with_sources(prompt, "") if prompt.sources else self._text("")

    def _with_sources(self, prompt: Prompt, text: str) -> Condition:
        """For each source one word "image:1" (":2") and its latents, then the words of `text`."""
        words = [self._text(f"image {number}").text for number in range(1, len(prompt.sources) + 1)]
        words.append(self._text(text).text)
        pictures = (("text", 1), ("image", self.height, self.width)) * len(prompt.sources)
        references = tuple(latents.encode(np.stack(prompt.sources)))
        return Condition(torch.cat(words), references, (*pictures, ("text", len(words[-1]))))

    def parse(self, prompt: Prompt) -> None:
        """Raises UserError if a prompt of either task is not understood, or has sources of another number or size."""
        if not prompt.sources:
            parse(prompt.text)
            return
        edit = edits.parse_instruction(prompt.text)
        if len(prompt.sources) != edit.sources:
            raise UserError(f"instruction '{prompt.text}' needs {edit.sources} source image{'s' * (edit.sources - 1)}, "
                            f"not {len(prompt.sources)}; name {edit.sources}")  # fmt: skip
        for number, source in enumerate(prompt.sources, start=1):
            if source.shape != (digits.SIZE, digits.SIZE, 3):
                raise UserError(f"source {number} of '{prompt.text}' has {source.shape[1]} x {source.shape[0]} pixels; "
                                f"the digits world edits {digits.SIZE} x {digits.SIZE}: resize it")  # fmt: skip

    def prompts(self, split: str, path: str | None = None) -> list[Prompt]:
        """The prompts of self.task's tasks: the built-in ones of a split ("train" or "held_out"), or those of a file.

        Raises UserError for a prompt of a file that is not understood, whatever its task, and for a file that has none
        of self.task.
        """
        if path is not None:
            return self._of_task(load_prompts(path, self._check), path)
        drawn = digits.prompts(split) if self.task != "edit" else []
        return drawn + (edits.prompts(split) if self.task != "t2i" else [])

    def _check(self, prompt: Prompt) -> None:
        if not prompt.sources and _is_instruction(prompt.text):
            raise UserError(f"instruction '{prompt.text}' has no sources; write a .jsonl file, with "
                            '"sources": ["picture.png"] in this line')  # fmt: skip
        self.parse(prompt)

    def _of_task(self, prompts: list[Prompt], path: str) -> list[Prompt]:
        own = [p for p in prompts if self.task in ("mixed", p.task)]
        if not own:
            raise UserError(
                f"prompt file {path} holds {len(prompts)} prompts of task {prompts[0].task} and none of world.task="
                f"{self.task}; set world.task={prompts[0].task}, or name a file with such prompts"
            )
        return own

    def decode(self, pictures: Sequence[torch.Tensor]) -> np.ndarray:
        """Latents [tokens, channels] each: uint8 images [n, H, W, 3]."""
        return latents.decode(torch.stack([x.float() for x in pictures]))

    def training_examples(self, u: np.ndarray) -> tuple[list[Prompt], torch.Tensor]:
        """Prompts and latents [n, tokens, channels] of n examples, a pure function of uniforms [n, digits.UNIFORMS].

        Row by row; the first uniform picks the category among those of self.task, all alike; with both tasks EDITED of the
        examples are edits, which are learned sooner. Some edits are flawed (edits.FLAWS).
        """
        u = np.array(u, dtype=np.float64)
        if self.task == "mixed":
            edit = u[:, 0] < EDITED
            u[:, 0] = np.where(edit, u[:, 0] / EDITED, (u[:, 0] - EDITED) / (1 - EDITED))
        else:
            edit = np.full(len(u), self.task == "edit")
        prompts: list[Prompt] = [None] * len(u)
        images = np.empty((len(u), digits.SIZE, digits.SIZE, 3), np.uint8)
        for rows, make in ((np.flatnonzero(~edit), _drawn), (np.flatnonzero(edit), _edited)):
            if len(rows):
                own, images[rows] = make(u[rows])
                for row, prompt in zip(rows, own, strict=True):
                    prompts[row] = prompt
        return prompts, latents.encode(images)


def _drawn(u: np.ndarray) -> tuple[list[Prompt], np.ndarray]:
    texts, images = digits.examples(u)
    return [Prompt(0, text) for text in texts], images


def _edited(u: np.ndarray) -> tuple[list[Prompt], np.ndarray]:
    return edits.examples(u, flaws=True)


def _is_instruction(text: str) -> bool:
    try:
        edits.parse_instruction(text)
    except UserError:
        return False
    return True


WORLDS = {"digits": DigitsWorld}


def make_world(options: World) -> DigitsWorld:
    return WORLDS[options.name](options)
