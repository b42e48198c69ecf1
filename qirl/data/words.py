"""The language of the digits world: its colours, what a prompt asks for, and one frozen vector per word."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from qirl.errors import UserError, nearest

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (220, 30, 40),
    "green": (40, 190, 70),
    "blue": (40, 70, 230),
    "yellow": (255, 205, 0),
    "cyan": (50, 215, 235),
    "magenta": (225, 60, 210),
}
INKS = {name: COLOURS[name] for name in ("white", "red", "green", "blue", "yellow", "cyan", "magenta")}
PAPERS = {name: COLOURS[name] for name in ("black", "white", "red", "green", "blue", "yellow")}
CONTRAST = 0.7  # least distance of ink and paper in RGB scaled to [0, 1]
FILLERS = {"a", "an", "the", "in"}
NULL = "<null>"


@dataclass(frozen=True)
class DigitSpec:
    """What a prompt asks for: one or two digits, colour names of ink and paper, and its category."""

    digits: tuple[int, ...]
    ink: str = "white"
    paper: str = "black"
    category: str = "plain"


def contrasting(ink: str, paper: str) -> bool:
    """Whether ink and paper differ enough to be told apart."""
    return float(np.linalg.norm(np.subtract(INKS[ink], PAPERS[paper]) / 255)) >= CONTRAST


def parse(text: str) -> DigitSpec:
    """What `text` asks for. Ink defaults to white, paper to black; "on" names the paper.

    Raises UserError for an unknown word or colour, for no digit, more than two digits or a second number, for
    a second ink or paper, and for an ink that cannot be told from its paper.
    """
    words = text.lower().split()
    numbers, inks, papers = [], [], []
    for previous, word in zip(["", *words], words, strict=False):
        if word.isascii() and word.isdigit():
            numbers.append(word)
        elif previous == "on":
            papers.append(colour_of(word, PAPERS, "paper", text))
        elif word not in FILLERS and word != "on":
            inks.append(colour_of(word, INKS, "ink", text))
    example = "write a prompt such as 'a red 7 on blue' or '35 in green'"
    if len(numbers) != 1 or len(numbers[0]) > 2:
        found = " and ".join(numbers) or "no digit"
        raise UserError(f"prompt '{text}' has {found}, not one number of 1 or 2 digits; {example}")
    if len(inks) > 1 or len(papers) > 1:
        raise UserError(f"prompt '{text}' names two colours for one thing; {example}")
    if words[-1] in ("on", "in"):
        raise UserError(f"prompt '{text}' ends in '{words[-1]}' with no colour after it; {example}")
    digits = tuple(int(digit) for digit in numbers[0])
    category = "two_digits" if len(digits) == 2 else "background" if papers else "colour" if inks else "plain"
    ink, paper = (inks or ["white"])[0], (papers or ["black"])[0]
    if not contrasting(ink, paper):
        others = ", ".join(other for other in INKS if contrasting(other, paper))
        raise UserError(f"prompt '{text}': {ink} ink cannot be told from {paper} paper; use {others}")
    return DigitSpec(digits, ink, paper, category)


def colour_of(word: str, options: dict, role: str, text: str) -> str:
    """`word` if it is one of the colours `options` of a role. Raises UserError, which quotes the prompt `text`."""
    if word in options:
        return word
    if word in COLOURS:
        raise UserError(f"prompt '{text}': {word} is no {role}; known: {', '.join(options)}")
    raise UserError(f"prompt '{text}': the word '{word}' is unknown{nearest(word, options)}")


def describe(spec: DigitSpec) -> str:
    """The prompt that asks for `spec`: `parse(describe(spec)) == spec`."""
    number = "".join(map(str, spec.digits))
    if spec.category == "plain":
        return f"a {number}"
    if spec.category == "two_digits":
        return f"{number} in {spec.ink}" + (f" on {spec.paper}" if spec.paper != "black" else "")
    return f"a {spec.ink} {number}" + (f" on {spec.paper}" if spec.category == "background" else "")


def tokens(text: str) -> list[str]:
    """The words of a prompt or an instruction, each tagged with its role so that their order carries no meaning.

    "a red 7 on blue" -> a, red, digit:7, on:blue; "35 in green" -> tens:3, units:5, in, green; "" -> <null>;
    "turn the background white" -> turn, the, on:white; "image 1", also the mark of a source image -> image:1.
    """
    words: list[str] = []
    for word in text.lower().split():
        if words and words[-1] == "image":
            words[-1] = f"image:{word}"
        elif word.isascii() and word.isdigit() and len(word) <= 2:
            words += [f"digit:{word}"] if len(word) == 1 else [f"tens:{word[0]}", f"units:{word[1]}"]
        elif words and words[-1] in ("on", "background") and word in COLOURS:
            words[-1] = f"on:{word}"
        else:
            words.append(word)
    return words or [NULL]


class WordVectors:
    """Frozen word vectors of unit RMS; each depends on (seed, word, dim) only: no vocabulary, no state."""

    def __init__(self, dim: int, seed: int = 0):
        self.dim, self.seed = dim, seed
        self._known: dict[str, torch.Tensor] = {}

    def encode(self, text: str) -> torch.Tensor:
        """float32 [n_words, dim] on the CPU; "" gives one null word, the unconditional embedding."""
        return torch.stack([self._vector(word) for word in tokens(text)])

    def _vector(self, word: str) -> torch.Tensor:
        if word not in self._known:
            digest = hashlib.sha256(f"{self.seed}|{self.dim}|{word}".encode()).digest()
            draw = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
            # Box-Muller from raw words: Philox is fixed, numpy may change standard_normal between versions.
            u = (draw.bit_generator.random_raw((2, self.dim)) >> np.uint64(11)).astype(np.float64) / 2**53
            vector = np.sqrt(-2 * np.log1p(-u[0])) * np.cos(2 * np.pi * u[1])
            self._known[word] = torch.from_numpy((vector / np.sqrt((vector**2).mean())).astype(np.float32))
        return self._known[word]
