"""Prompts of the user's own: a file, for whichever family the model belongs to."""

from __future__ import annotations

from collections.abc import Callable

from qirl.data.digit_set import of_task
from qirl.data.prompts import Prompt, load_prompts
from qirl.errors import UserError


class PromptFile:
    """Prompts of a task ("t2i", "edit" or "mixed"). check: refuses a prompt, as `Family.check` does."""

    name = "prompts"

    def __init__(self, task: str, check: Callable[[Prompt], None]):
        self.task, self.check = task, check

    def prompts(self, split: str, path: str | None = None) -> list[Prompt]:
        """The file's prompts of self.task; every split is what the file holds.

        Raises UserError without a file, for a prompt that the family cannot take, and for a file that has none of self.task.
        """
        if path is None:
            raise UserError(
                "world.prompts is missing: name a file of prompts (.txt one a line, .jsonl with sources and sizes)"
            )
        return of_task(load_prompts(path, self.check), self.task, path)
