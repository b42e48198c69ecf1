"""Prompts: what to draw or to edit, with a stable integer id and the category its scores are reported under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qirl.data.images import as_uint8, read_image
from qirl.data.lines import parse_object, read_lines, told_at
from qirl.errors import UserError

EXAMPLE = '{"text": "a red 7"}'
KEYS = {"text", "category", "id", "sources", "height", "width", "metadata", "image"}
FIRST_EDIT = 2**20  # ids of edits begin here, those of text-to-image at 0


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` (0 to 2**32 - 1) keys the noise and the advantage group: it stays with its text.

    height, width: of its images in pixels, where it has its own. metadata: for rewards. image: the file of one to learn from.
    sources: the images of an edit, uint8 [H, W, 3] each; none for text-to-image. uint16 is scaled to uint8; raises UserError for
    other dtypes and shapes.
    """

    id: int
    text: str
    category: str = "general"
    sources: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)
    height: int | None = None
    width: int | None = None
    metadata: dict = field(default_factory=dict, compare=False, repr=False)
    image: Path | None = None

    def __post_init__(self):
        sources = tuple(as_uint8(image, f"source {i} of prompt {self.id}") for i, image in enumerate(self.sources))
        object.__setattr__(self, "sources", sources)

    @property
    def task(self) -> str:
        """t2i, or edit where there are source images."""
        return "edit" if self.sources else "t2i"


def load_prompts(path: str | Path, check: Callable[[Prompt], None] | None = None) -> list[Prompt]:
    """A user's prompts: `.txt` holds one a line, `.jsonl` one object a line: {"text", "category"?, "id"?, "sources"?,
    "height"?, "width"?, "metadata"?, "image"?}.

    Blank lines are skipped. "sources": the images of an edit, paths relative to the file. Without "id" a prompt's id
    is its place among the prompts, from 0 (for an edit from FIRST_EDIT). `check` may refuse a prompt by a UserError.
    Raises UserError for a file that is missing, unreadable or empty, for a bad line (with its number) and
    for an id used twice.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: a prompt file ends in .txt (one a line) or .jsonl (one object a line); rename it")
    prompts: list[Prompt] = []
    seen: dict[int, int] = {}
    for number, line in read_lines(path, "prompt file"):
        place = len(prompts)
        with told_at(path, number):
            prompt = Prompt(place, line) if path.suffix == ".txt" else _from_json(line, place, path.parent)
            if check:
                check(prompt)
            if prompt.id in seen:
                raise UserError(
                    f"id {prompt.id} is taken by line {seen[prompt.id]}; give every prompt its own id, or none at all"
                )
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def _from_json(line: str, place: int, folder: Path) -> Prompt:
    row = parse_object(line, EXAMPLE)
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise UserError(f'no "text"; write one object a line, such as {EXAMPLE}')
    if unknown := sorted(row.keys() - KEYS):
        raise UserError(f"unknown key '{unknown[0]}'; known: {', '.join(sorted(KEYS))}")
    paths = row.get("sources", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise UserError(f'"sources" is {paths!r}; it must be a list of image paths, relative to the prompt file')
    number, category = row.get("id", place + FIRST_EDIT if paths else place), row.get("category", "general")
    if type(number) is not int or not 0 <= number < 2**32:
        raise UserError(f'"id" is {number!r}; it must be an integer from 0 to {2**32 - 1}')
    if not isinstance(category, str) or not category:
        raise UserError(f'"category" is {category!r}; it must be a word')
    sides, metadata = [row.get(name) for name in ("height", "width")], row.get("metadata", {})
    if not (sides == [None, None] or all(type(side) is int and side > 0 for side in sides)):
        raise UserError(f'"height" and "width" are {sides[0]!r} and {sides[1]!r}; give both in pixels, or neither')
    if not isinstance(metadata, dict):
        raise UserError(f'"metadata" is {metadata!r}; it must be an object')
    image = row.get("image")
    if image is not None and not (isinstance(image, str) and (folder / image).is_file()):
        raise UserError(f'"image" is {image!r}; it must be the path of a file, relative to the prompt file')
    images = tuple(read_image(folder / path) for path in paths)
    return Prompt(number, row["text"].strip(), category, images, *sides, metadata, image and folder / image)
