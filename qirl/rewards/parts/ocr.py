"""Is the text that was asked for written in the image? Read by rapidocr (PP-OCR models, which its package carries).

    edit_distance   1 - Levenshtein distance / length of the text, to the best window of what was read (0 at the least)
    exact           1 where the text stands in what was read, else 0

Texts come from metadata["texts"], or are what the prompt puts in quotes; several are averaged, weighted by their length.
Spaces do not count, so Chinese is compared character by character. Sources: TextDiffuser (2023) and Flow-GRPO (2025) reward
OCR in these two forms.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Sequence

import numpy as np

from qirl.config_parts import OcrOptions
from qirl.errors import UserError
from qirl.rewards.protocol import Sample, Scores

# the outermost pair counts. Straight quotes open at the start of a word and close at its end: 24" and 6'2" are sizes, and an
# apostrophe stands inside a word or, as in the dogs' house and in rock 'n' roll, beside one that no quote has opened.
QUOTES = re.compile(
    r'(?<!\w)"([^"]+)"|“([^“”]+)”|„([^„“”]+)[“”]|«([^«»]+)»|»([^«»]+)«|「([^「」]+)」|『([^『』]+)』|‹([^‹›]+)›|›([^‹›]+)‹'
    r"|‚([^‚‘’]+)[‘’]|(?<!\w)‘((?:[^‘’]|’(?=\w))+)’(?!\w)|(?<!\w)'(?! |n' )((?:[^']|'(?=\w))+?)(?<! )'(?!\w)"
)


def texts_of(sample: Sample) -> list[str]:
    """What is to be written; none where nothing is asked for."""
    given = sample.metadata.get("texts")
    if given is None:
        return [next(filter(None, match.groups())) for match in QUOTES.finditer(sample.prompt)]
    if not isinstance(given, (list, tuple)) or not all(isinstance(text, str) for text in given):
        raise UserError(f"metadata['texts'] of sample {sample.id} is {given!r}; give a list of texts")
    return list(given)


def plain(text: str, case: bool) -> str:
    """Without spaces, in one form of every character, and without capitals unless they count."""
    text = "".join(unicodedata.normalize("NFKC", text).split())
    return text if case else text.casefold()


def edit_similarity(wanted: str, read: str) -> float:
    """1 - distance / len(wanted) to the substring of `read` that is nearest, at least 0; wanted is not empty."""
    row = np.zeros(len(read) + 1, dtype=np.int64)  # a match may begin anywhere
    for letter in wanted:
        before, row = row, np.empty_like(row)
        row[0] = before[0] + 1
        for j, other in enumerate(read):
            row[j + 1] = min(before[j] + (letter != other), before[j + 1] + 1, row[j] + 1)
    return max(0.0, 1 - int(row.min()) / len(wanted))


class Ocr:
    """Applies to samples that ask for a text."""

    def __init__(self, name: str, options: OcrOptions):
        try:
            import rapidocr
        except ImportError as error:
            raise UserError(f"rewards.{name}: kind ocr needs rapidocr ({error}): pip install 'qirl[rewards]'") from None
        self.components, self.options = (name,), options
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": options.threads}
        self.engine = rapidocr.RapidOCR(params={"Global.log_level": "error", **threads})
        self._one = threading.Lock()

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        rows: list[Scores] = []
        for sample in samples:
            wanted = [text for text in (plain(t, self.options.case) for t in texts_of(sample)) if text]
            rows.append({self.components[0]: self.score(wanted, self.read(sample.image))} if wanted else {})
        return rows

    def read(self, image: np.ndarray) -> str:
        """All text of an image, line after line."""
        with self._one:
            found = self.engine(np.ascontiguousarray(image[..., ::-1]))
        return "\n".join(found.txts or ())

    def score(self, wanted: Sequence[str], read: str) -> float:
        read = plain(read, self.options.case)
        each = [float(text in read) if self.options.form == "exact" else edit_similarity(text, read) for text in wanted]
        lengths = [len(text) for text in wanted]
        return float(np.average(each, weights=lengths))
