"""Qwen-Image 2.1: text and references read together by Qwen3-VL, each reference's latents in its place in the text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from qirl.errors import UserError
from qirl.families.pipelines import PipelineFamily, dimensions
from qirl.families.vision_language import TextAndImages
from qirl.packing import Condition

SLOT = 2  # latents of the side of one image token of the text


class QwenImage21Family(PipelineFamily):
    name = "qwen_image_21"
    encoder, autoencoder = "Qwen3VLForConditionalGeneration", "AutoencoderKLQwenImage21"
    planes = ("in_channels", 4)
    patch, shared, rescale, most_sources = 1, True, False, 10

    def _downscale(self) -> int:
        return 16

    def _floor(self, side: int) -> int:
        return side // (SLOT * self.pixels) * SLOT * self.pixels

    def _readers(self) -> Sequence[str]:
        return ("processor",)

    def _assembled(self, vae):
        from diffusers import QwenImage21Pipeline

        return QwenImage21Pipeline(
            scheduler=None, transformer=None, text_encoder=None, vae=vae,
            processor=TextAndImages.load(self.folder / "processor"),
        )  # fmt: skip

    def picture(self, image):
        return super().picture(image).convert("RGBA")

    def encode_condition(self, text: str, sources: Sequence[np.ndarray]) -> Condition:
        pipe = self.pipe()
        sizes = [dimensions(self.resolution**2, s.shape[1] / s.shape[0]) for s in sources]
        images = [
            pipe.image_processor.resize(self.picture(s), width=w, height=h)
            for s, (h, w) in zip(sources, sizes, strict=True)
        ]
        with self.reading():
            states, _, slots = pipe.encode_prompt(prompt=text, image=images or None, device=self.device)
        states, slots = states[0].cpu(), slots[0].bool().cpu().tolist()
        references = [self.encode_image(s, h, w) for s, (h, w) in zip(sources, sizes, strict=True)]
        grids = [(h // self.pixels, w // self.pixels) for h, w in sizes]
        return Condition(states[~torch.tensor(slots)], tuple(references), _layout(slots, grids, text))


def _layout(slots: Sequence[bool], grids: Sequence[tuple[int, int]], text: str) -> tuple[tuple, ...]:
    """Runs of text tokens, and an image wherever the encoder kept slots for one; text stands between any two of them."""
    layout, images = [], iter(grids)
    for is_slot, run in groupby(slots):
        length = len(list(run))
        if is_slot:
            height, width = next(images)
            if height * width != length * SLOT**2:
                raise UserError(
                    f"the encoder keeps {length} places for a source of {height} x {width} latents ('{text[:60]}'), which needs "
                    f"{height * width // SLOT**2}: its image processor scales it; set world.resolution to what it takes"
                )
            layout.append(("image", height, width))
        else:
            layout.append(("text", length))
    return tuple(layout)
