"""Prompts of the user's own: a file, for whichever family the model belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from qirl.data.dali import check_installed
from qirl.data.digit_set import of_task
from qirl.data.images import read_images
from qirl.data.prompts import GENERAL, Prompt, load_prompts
from qirl.errors import UserError


class PromptFile:
    """Prompts of a task ("t2i", "edit" or "mixed"), as far as a `qirl.families.Family` takes them."""

    name, uniforms = "prompts", 1

    def __init__(self, task: str, family, most_bad: float = 0.0, rules: str | None = None, decoder: str = "pil"):
        self.task, self.family, self.most_bad, self.rules, self.decoder = task, family, most_bad, rules, decoder
        if decoder == "dali":
            check_installed()
        self._examples: list[Prompt] = []

    def prompts(self, split: str, path: str | None = None) -> list[Prompt]:
        """The file's prompts of self.task; every split is what the file holds.

        Raises UserError without a file, for a prompt that the family cannot take, and for a file that has none of self.task.
        """
        if path is None:
            raise UserError(
                "world.prompts is missing: name a file of prompts (.txt one a line, .jsonl with sources and sizes)"
            )
        found = of_task(load_prompts(path, self.family.check, self.most_bad, self.decoder), self.task, path)
        if self.rules is not None:
            found = categorised(found, self.rules)
        self._examples = [prompt for prompt in found if prompt.image is not None]
        return found

    def examples(self, u: np.ndarray) -> tuple[list[Prompt], list[np.ndarray]]:
        """Prompts and images uint8 [H, W, 3] of n examples, of those that have one; u: [n, 1] in [0, 1).

        Images are scaled to cover the prompt's size and cut to its middle. Raises UserError where no prompt has an image.
        """
        if not self._examples:
            raise UserError(
                'no prompt of world.prompts has an image to learn: give every line an "image", a path to it'
            )
        chosen = [self._examples[int(x * len(self._examples))] for x in u[:, 0]]
        side = self.family.pixels
        sizes = [tuple(tokens * side for tokens in self.family.size(prompt)) for prompt in chosen]
        images = read_images([p.image for p in chosen], self.decoder)
        return chosen, [cover(image, *size) for image, size in zip(map(_image, images), sizes, strict=True)]


def _image(read: np.ndarray | UserError) -> np.ndarray:
    if isinstance(read, UserError):
        raise read
    return read


def categorised(prompts: Sequence[Prompt], path: str) -> list[Prompt]:
    """Prompts without a category of their own in that of the first rule that their text matches.

    path: YAML, {category: [regular expression, ...]}, read in its order, without regard to case. Raises UserError for a file that
    is none.
    """
    try:
        rules = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        compiled = {str(name): [re.compile(own, re.IGNORECASE) for own in patterns] for name, patterns in rules.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, re.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"world.categories={path} holds no patterns by category ({reason}), as in people: ['portrait', 'a (man|woman)']"
        ) from None

    def category(prompt: Prompt) -> str:
        return next((name for name, own in compiled.items() if any(p.search(prompt.text) for p in own)), GENERAL)

    return [replace(p, category=category(p)) if p.category == GENERAL else p for p in prompts]


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: the image scaled (Lanczos) to cover that size, cut to its middle."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS))
