"""From a chat and its images to what a Qwen2.5-VL or Qwen3-VL model takes, and the model itself.

Tokenizer, chat template and image processor are the model folder's own. The processor class of transformers is not used:
it wants torchvision for videos.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qirl.data.images import MOST_ASPECT
from qirl.errors import UserError
from qirl.rewards.vlm.reading import DIGITS
from qirl.rewards.vlm.rubric import SCORE

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
IMAGE = "<|image_pad|>"


@dataclass(frozen=True)
class Encoded:
    """ids: tokens of the chat and of the begun answer. pixels [patches, channels] and grids int64 [images, 3]."""

    ids: list[int]
    pixels: torch.Tensor
    grids: torch.Tensor


class Processor:
    """Use `load`."""

    def __init__(self, tokenizer, image_processor):
        self.tokenizer, self.images = tokenizer, image_processor
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE)

    @functools.cached_property
    def digits(self) -> list[int]:
        """The ids of the tokens 1 to 5."""
        return digit_tokens(self.tokenizer)

    @classmethod
    def load(
        cls, folder: str | Path, pixels: int, families: Sequence[str] = FAMILIES, least: int | None = None
    ) -> Processor:
        """pixels: the most that an image keeps; least: the fewest that it gets, if the folder is not to say so.

        Raises UserError for a folder of another family, or without its parts.
        """
        family(folder, families)
        from transformers import AutoImageProcessor, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} has no tokenizer or image processor of its own: {error}") from None
        if tokenizer.chat_template is None:
            raise UserError(f"{folder} has no chat template (chat_template.jinja); copy the model folder whole")
        least = least or min(images.size["shortest_edge"], pixels)
        images.size = type(images.size)(shortest_edge=least, longest_edge=pixels)
        return cls(tokenizer, images)

    def encode(self, messages: list[dict], images: Sequence[np.ndarray], prefix: str = "") -> Encoded:
        """messages as `Rubric.messages` makes them, images uint8 [H, W, 3] in their order, prefix: the begun answer."""
        out = self.images(images=list(images), return_tensors="pt")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + prefix
        parts = text.split(IMAGE)
        assert len(parts) == len(images) + 1, f"the chat template wrote {len(parts) - 1} images of {len(images)}"
        counts = (out["image_grid_thw"].prod(1) // self.images.merge_size**2).tolist()
        text = parts[0] + "".join(IMAGE * n + part for n, part in zip(counts, parts[1:], strict=True))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Encoded(ids, out["pixel_values"], out["image_grid_thw"])

    def batch(self, encoded: Sequence[Encoded], device, left: bool = False) -> dict[str, torch.Tensor]:
        """Model inputs of several chats, padded to the longest on the right (or left) side."""
        longest = max(len(e.ids) for e in encoded)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(encoded), longest), pad)
        mask = torch.zeros_like(ids)
        for i, own in enumerate(encoded):
            place = slice(longest - len(own.ids), None) if left else slice(0, len(own.ids))
            ids[i, place], mask[i, place] = torch.tensor(own.ids), 1
        pixels, grids = (torch.cat([getattr(e, name) for e in encoded]) for name in ("pixels", "grids"))
        tensors = dict(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids,
            mm_token_type_ids=((ids == self.image_token) & (mask == 1)).long(),
        )  # fmt: skip
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def check_aspect(image: np.ndarray, what: str) -> None:
    """Raises UserError for an image [H, W, 3] that is thinner than a judge takes."""
    height, width = image.shape[:2]
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise UserError(
            f"{what} has {width} x {height} pixels; a judge takes up to {MOST_ASPECT} : 1, so crop or leave it out"
        )


def family(folder: str | Path, families: Sequence[str] = FAMILIES) -> str:
    """The model_type of a model folder. Raises UserError if there is none, or one that is none of `families`."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder} is no model folder: {path} cannot be read; give one of {', '.join(families)}"
        ) from None
    if found not in families:
        raise UserError(f"{folder} is a {found} model; it must be one of {', '.join(families)}")
    return found


def digit_tokens(tokenizer) -> list[int]:
    """The ids of the tokens 1 to 5 after `<score>`. Raises UserError if one of them is not a token of its own there."""
    before = tokenizer(SCORE, add_special_tokens=False)["input_ids"]
    ids = []
    for digit in DIGITS:
        after = tokenizer(SCORE + digit, add_special_tokens=False)["input_ids"]
        if after[: len(before)] != before or len(after) != len(before) + 1:
            raise UserError(
                f"the tokenizer makes no single token of {digit} after {SCORE} ({after} after {before}); a judge needs one "
                "token for each of 1 to 5, as the Qwen tokenizers have"
            )
        ids.append(after[-1])
    return ids


def load_judge(folder: str | Path, dtype: torch.dtype = torch.float32):
    """The model of a folder, for training or reading. Raises UserError where transformers cannot load it."""
    family(folder)
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from None
