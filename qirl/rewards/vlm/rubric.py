"""What a judge is asked: rubrics are plain text files, and what users write cannot leave its place in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qirl.errors import UserError, nearest
from qirl.paths import configs

THINK, END_THINK, SCORE, END_SCORE = "<think>", "</think>", "<score>", "</score>"


def escape(text: str) -> str:
    """A user's text without angle brackets of its own: it can hold neither a score nor a control token of the model."""
    return text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}").replace(
        ">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
    )


def begun_answer(reasoning: str = "") -> str:
    """A judge's answer up to where its digit goes."""
    return THINK + escape(reasoning) + END_THINK + SCORE


@dataclass(frozen=True)
class Rubric:
    """name, text and the names of its optional lines; {request} in the text is where the prompt or the instruction goes."""

    name: str
    text: str
    optional: tuple[str, ...] = ()

    def messages(self, request: str, sources: int = 0) -> list[dict]:
        """The chat that asks for a score: the `sources` source images, the image to judge, the rubric.

        An entry {"type": "image"} stands for the next image.
        """
        content: list[dict] = []
        for i in range(sources):
            content += [{"type": "text", "text": f"Source image {i + 1}:"}, {"type": "image"}]
        content += [{"type": "text", "text": "Edited image:" if sources else "Image:"}, {"type": "image"}]
        content.append({"type": "text", "text": self.text.replace("{request}", escape(request))})
        return [{"role": "user", "content": content}]


def load_rubric(name: str, omit: Sequence[str] = ()) -> Rubric:
    """A rubric that ships with qirl (alignment, aesthetic, portrait, ...), or a text file.

    A line that begins with [name] is optional: it goes where `omit` holds the name, else the tag alone goes. Raises
    UserError for a file that is not there, for one that does not say how to answer or where the request goes, and for an
    optional line that it does not have.
    """
    path = Path(name)
    if not path.is_file():
        shipped = {p.stem: p for p in (configs() / "rubrics").glob("*.txt")}
        if name not in shipped:
            raise UserError(f"rubric {name} is no file, nor one that ships with qirl{nearest(name, shipped)}")
        path = shipped[name]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rubric {path} cannot be read ({error}); it is a text file in UTF-8") from None
    for needed, what in (
        (SCORE, "say how to answer (one digit as <score>digit</score>)"),
        ("{request}", "hold {request}"),
    ):
        if needed not in text:
            raise UserError(f"rubric {path} does not {what}; add it")
    tags = re.findall(r"^\[(\w+)\] ", text, re.M)
    if unknown := [tag for tag in omit if tag not in tags]:
        raise UserError(f"rubric {path} has no optional line [{unknown[0]}]; it has {', '.join(tags) or 'none'}")
    for tag in tags:
        text = re.sub(rf"^\[{tag}\] (.*\n)", "" if tag in omit else r"\1", text, flags=re.M)
    return Rubric(path.stem, text.strip(), tuple(tags))


def load_rubrics(names: Iterable[str], omit: Sequence[str] = ()) -> dict[str, Rubric]:
    """Several rubrics, each without those lines of `omit` that it has. Raises UserError where none of them has one."""
    whole = {name: load_rubric(name) for name in sorted(names)}
    for tag in omit:
        if not any(tag in rubric.optional for rubric in whole.values()):
            raise UserError(f"no rubric has an optional line [{tag}]; the rubrics are {', '.join(whole)}")
    return {name: load_rubric(name, [tag for tag in omit if tag in own.optional]) for name, own in whole.items()}
