"""The data of the miniature: prompts and edits of real handwriting, and labelled examples for pretraining."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qirl.data import digits, edits
from qirl.data.prompts import Prompt, load_prompts
from qirl.errors import UserError

EDITED = 0.4  # share of edits among the examples of both tasks


class DigitSet:
    """Prompts of a task ("t2i", "edit" or "mixed"). check: refuses a prompt of a file, as `Family.check` does."""

    name = "digits"
    uniforms = digits.UNIFORMS  # that an example is made of

    def __init__(self, task: str, check: Callable[[Prompt], None]):
        self.task, self.check = task, check

    def prompts(self, split: str, path: str | None = None) -> list[Prompt]:
        """The prompts of self.task's tasks: the built-in ones of a split ("train" or "held_out"), or those of a file.

        Raises UserError for a prompt of a file that is not understood, whatever its task, and for a file that has none
        of self.task.
        """
        if path is not None:
            return of_task(load_prompts(path, self._check), self.task, path)
        drawn = digits.prompts(split) if self.task != "edit" else []
        return drawn + (edits.prompts(split) if self.task != "t2i" else [])

    def _check(self, prompt: Prompt) -> None:
        if not prompt.sources and _is_instruction(prompt.text):
            raise UserError(f"instruction '{prompt.text}' has no sources; write a .jsonl file, with "
                            '"sources": ["picture.png"] in this line')  # fmt: skip
        self.check(prompt)

    def examples(self, u: np.ndarray) -> tuple[list[Prompt], np.ndarray]:
        """Prompts and images uint8 [n, H, W, 3] of n examples, a pure function of numbers [n, self.uniforms] in [0, 1).

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
        return prompts, images


def of_task(prompts: list[Prompt], task: str, path: str) -> list[Prompt]:
    """The prompts of world.task. Raises UserError where a file has none."""
    own = [p for p in prompts if task in ("mixed", p.task)]
    if not own:
        raise UserError(
            f"prompt file {path} holds {len(prompts)} prompts of task {prompts[0].task} and none of world.task={task}; "
            f"set world.task={prompts[0].task}, or name a file with such prompts"
        )
    return own


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
