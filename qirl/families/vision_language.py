"""What the encoders of Qwen-Image read: texts and images through a Qwen-VL tokenizer and image processor.

transformers' combined processor does the same, and wants torchvision for videos that nobody shows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qirl.errors import UserError

IMAGE = "<|image_pad|>"


class TextAndImages:
    """Stands in for `Qwen3VLProcessor` and `Qwen2VLProcessor` in diffusers' pipelines."""

    def __init__(self, tokenizer, images):
        self.tokenizer, self.image_processor = tokenizer, images
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE)

    @classmethod
    def load(cls, folder: Path) -> TextAndImages:
        """Raises UserError for a folder without a tokenizer or an image processor."""
        from transformers import AutoImageProcessor, AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} holds no tokenizer and image processor ({error}); copy the pipeline whole"
            ) from None

    def apply_chat_template(
        self, messages: list[dict], tokenize: bool = True, return_dict: bool = False
    ) -> list[list[int]]:
        """The token ids of one conversation, as a batch of one."""
        return [self.tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=return_dict)]

    def __call__(
        self, text: Sequence[str], images: Sequence | None = None, padding: bool = True, padding_side: str | None = None,
        return_tensors: str = "pt",
    ):  # fmt: skip
        """input_ids, attention_mask, mm_token_type_ids; with images pixel_values and image_grid_thw, and as many IMAGE
        tokens for each of them as its patches make after merging."""
        from transformers import BatchFeature

        found, counts = {}, iter(())
        if images is not None:
            found = dict(self.image_processor(images=images, return_tensors=return_tensors))
            counts = iter((found["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist())
        filled = []
        for one in text:
            first, *rest = one.split(IMAGE)
            filled.append(first + "".join(IMAGE * next(counts) + part for part in rest))
        side = {"padding_side": padding_side} if padding_side else {}
        tokens = self.tokenizer(filled, padding=padding, return_tensors=return_tensors, **side)
        ids = tokens["input_ids"]
        found |= {"input_ids": ids, "attention_mask": tokens["attention_mask"]}
        return BatchFeature({**found, "mm_token_type_ids": (ids == self.image_token).to(torch.int64)})
