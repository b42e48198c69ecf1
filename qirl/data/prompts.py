"""Prompts: what to draw or to edit, with a stable integer id and the category its scores are reported under."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from qirl.data.images import Pictures, Slice, as_uint8, content_hash, read_images, written
from qirl.data.lines import parse_object, read_lines, told_at
from qirl.data.tars import samples
from qirl.errors import UserError

EXAMPLE = '{"text": "a red 7"}'
KEYS = {"text", "category", "id", "sources", "height", "width", "metadata", "image"}
GENERAL = "general"  # category of prompts that name none
SHOWN = 3  # bad lines that a message names
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
    category: str = GENERAL
    sources: Sequence[np.ndarray] = field(default=(), compare=False, repr=False)
    height: int | None = None
    width: int | None = None
    metadata: dict = field(default_factory=dict, compare=False, repr=False)
    image: Path | Slice | None = None

    def __post_init__(self):
        if not isinstance(self.sources, Pictures):
            sources = tuple(as_uint8(image, f"source {i} of prompt {self.id}") for i, image in enumerate(self.sources))
            object.__setattr__(self, "sources", sources)

    @property
    def task(self) -> str:
        """t2i, or edit where there are source images."""
        return "edit" if self.sources else "t2i"

    @cached_property
    def source_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every source in pixels; those of files were found when the prompts were loaded."""
        return self.sources.sizes if isinstance(self.sources, Pictures) else [image.shape[:2] for image in self.sources]

    @cached_property
    def source_hash(self) -> str:
        """Of the sources' content."""
        return content_hash(*self.sources)


Lines = list[tuple[int | str, Prompt | UserError]]  # number (or key) and prompt of every line
# the last file that had no fault, from where: a run's plan and its start read the same one
LAST: dict[tuple[Path, Path], tuple[Lines, list, Sequence[Path | Slice]]] = {}


def load_prompts(
    path: str | Path, check: Callable[[Prompt], None] | None = None, most_bad: float = 0.0, decoder: str = "pil"
) -> list[Prompt]:
    """A user's prompts: `.txt` holds one a line, `.jsonl` one object a line: {"text", "category"?, "id"?, "sources"?,
    "height"?, "width"?, "metadata"?, "image"?}; `.tar` (or a pattern, "shards/*.tar") webdataset's samples.

    Blank lines are skipped. "sources": the images of an edit, paths relative to the file. Without "id" a prompt's id
    is its place among the prompts, from 0 (for an edit from FIRST_EDIT). A record with "prompt" in place of "text" is another
    system's: what else it has becomes metadata. Every source is decoded once here, on all cores, by `decoder` as
    `read_images` has it. The last file that had no fault is remembered, as long as neither it nor a source changes.
    `check` may refuse a prompt by a UserError. most_bad: share of the lines that may be left out, with a warning.
    Raises UserError for a file that is missing, unreadable or empty, for bad lines (with their numbers) and for an id used
    twice.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl", ".tar"):
        raise UserError(
            f"{path}: a prompt file ends in .txt (one a line), .jsonl (one object a line) or .tar (webdataset); rename it"
        )
    found = _checked(path, _remembered(path, decoder), check or (lambda prompt: None))
    bad = [own for _, own in found if isinstance(own, UserError)]
    prompts, seen = [], {}
    for number, prompt in found:
        if isinstance(prompt, UserError):
            continue
        if prompt.id in seen:
            problem = f"id {prompt.id} is taken by line {seen[prompt.id]}; give every prompt its own id, or none at all"
            bad.append(UserError(f"{path}:{number}: {problem}"))
            continue
        seen[prompt.id] = number
        prompts.append(prompt)
    _tell(path, bad, len(found), most_bad)
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def _remembered(path: Path, decoder: str) -> Lines:
    """What `_read` finds in a file, read again only where it or a source is not what it was."""
    known, stamp, files = LAST.get((Path.cwd(), path), (None, None, ()))
    if known is not None and stamp == _stamp(path, files):
        return known
    LAST.clear()
    found = _read(path, decoder)
    if not any(isinstance(own, UserError) for _, own in found):
        files = [file for _, prompt in found for file in (*getattr(prompt.sources, "files", ()), prompt.image) if file]
        LAST[Path.cwd(), path] = found, _stamp(path, files), files
    return found


def _stamp(path: Path, files: Sequence[Path | Slice]) -> list:
    """When the prompt file (or the tars of a pattern) and its images were written, and their sizes."""
    own = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    return [(str(file), written(file)) for file in (*own, *files)]


def _read(path: Path, decoder: str) -> Lines:
    """The prompt of every line, or what is wrong with it; every source was decoded."""
    found: Lines = []
    for place, (number, line) in enumerate(samples(path) if path.suffix == ".tar" else read_lines(path, "prompt file")):
        try:
            with told_at(path, number):
                found.append((number, MAKERS[path.suffix](line, place, path.parent)))
        except UserError as error:
            found.append((number, error))
    edits = [p.sources for _, p in found if isinstance(p, Prompt) and p.sources]
    files = list(dict.fromkeys(file for sources in edits for file in sources.files))
    sizes = {
        f: x if isinstance(x, UserError) else x.shape[:2]
        for f, x in zip(files, read_images(files, decoder), strict=True)
    }
    for sources in edits:
        sources.sizes = [sizes[file] for file in sources.files]
    return _checked(path, found, _sources_are_images)


def _sources_are_images(prompt: Prompt) -> None:
    for size in prompt.source_sizes:
        if isinstance(size, UserError):
            raise size


def _checked(path: Path, found: Lines, check: Callable[[Prompt], None]) -> Lines:
    """`found` with what `check` raises in place of the prompts that it refuses."""

    def checked(line: tuple[int | str, Prompt | UserError]) -> tuple[int | str, Prompt | UserError]:
        number, prompt = line
        try:
            with told_at(path, number):
                if isinstance(prompt, Prompt):
                    check(prompt)
                return line
        except UserError as error:
            return number, error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(checked, found))


def _tell(path: Path, bad: Sequence[UserError], count: int, most: float) -> None:
    """Raises UserError, or warns, of the lines that cannot be used."""
    if not bad:
        return
    shown = "; ".join(map(str, bad[:SHOWN])) + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
    if len(bad) > most * count:
        raise UserError(shown if len(bad) == 1 else f"{len(bad)} of {count} lines of {path} cannot be used: {shown}")
    warnings.warn(f"{len(bad)} of {count} lines of {path} are left out: {shown}", stacklevel=3)


def _from_text(line: str, place: int, folder: Path) -> Prompt:
    return Prompt(place, line)


def _from_json(line: str, place: int, folder: Path) -> Prompt:
    row = parse_object(line, EXAMPLE)
    if "text" not in row and isinstance(row.get("prompt"), str):
        row = {"text": row["prompt"], "metadata": {k: v for k, v in row.items() if k != "prompt"}}
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise UserError(f'no "text"; write one object a line, such as {EXAMPLE}')
    if unknown := sorted(row.keys() - KEYS):
        raise UserError(f"unknown key '{unknown[0]}'; known: {', '.join(sorted(KEYS))}")
    paths = row.get("sources", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise UserError(f'"sources" is {paths!r}; it must be a list of image paths, relative to the prompt file')
    number, category = row.get("id", place + FIRST_EDIT if paths else place), row.get("category", GENERAL)
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
    sources = Pictures([folder / path for path in paths])
    return Prompt(number, row["text"].strip(), category, sources, *sides, metadata, image and folder / image)


def _from_sample(row: dict, place: int, folder: Path) -> Prompt:
    """A prompt of `qirl.data.tars.samples`."""
    if not row["text"].strip():
        raise UserError("no text: a sample has a .txt, or a .json with text, prompt or caption")
    return Prompt(place, row["text"].strip(), metadata=row["metadata"], image=row["image"])


MAKERS = {".txt": _from_text, ".jsonl": _from_json, ".tar": _from_sample}
