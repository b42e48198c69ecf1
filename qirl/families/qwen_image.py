"""Qwen-Image 1.x: Qwen2.5-VL reads the prompt (and sees the sources, smaller); every target carries text and references."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from qirl.config_sections import Model
from qirl.config_sections import World as Options
from qirl.data.prompts import Prompt
from qirl.errors import UserError
from qirl.families.pipelines import INDEX, PipelineFamily, dimensions, read_json, short
from qirl.families.vision_language import TextAndImages
from qirl.packing import Condition

LONGEST = 1024  # tokens of a prompt of QwenImagePipeline
EDIT_AREA = 1024 * 1024  # pixels of a source in QwenImageEditPipeline, whatever is drawn
ONE_THREAD = threading.Lock()  # prompts are checked on several; transformers' imports and tokenizers bear only one
PIPELINES = {  # class: sources at least and at most
    "QwenImagePipeline": (0, 0),
    "QwenImageEditPipeline": (1, 1),
    "QwenImageEditPlusPipeline": (1, 10),
}


class QwenImageFamily(PipelineFamily):
    """The class in model_index.json decides what is conditioned: a prompt, one source, or several."""

    name = "qwen_image"
    encoder, autoencoder = "Qwen2_5_VLForConditionalGeneration", "AutoencoderKLQwenImage"
    planes = ("input_channels", 3)
    patch, shared, rescale = 2, False, True

    def __init__(self, folder: Path, options: Options, model: Model, device: torch.device):
        super().__init__(folder, options, model, device)
        self.pipeline = read_json(folder / INDEX)["_class_name"]
        self.least_sources, self.most_sources = PIPELINES[self.pipeline]

    def _downscale(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])  # as diffusers spells it

    def _readers(self) -> Sequence[str]:
        return ("tokenizer", "processor")

    def _assembled(self, vae):
        import diffusers

        parts = dict(
            scheduler=None, transformer=None, text_encoder=None, vae=vae,
            tokenizer=self._tokenizer(),
        )  # fmt: skip
        if self.most_sources:
            parts["processor"] = TextAndImages.load(self.folder / "processor")
        return getattr(diffusers, self.pipeline)(**parts)

    def encode_condition(self, text: str, sources: Sequence[np.ndarray]) -> Condition:
        pipe, (seen, sizes) = self.pipe(), self._sizes(sources)
        given = {}
        if sources:
            shown = [pipe.image_processor.resize(self.picture(s), *size) for s, size in zip(sources, seen, strict=True)]
            given["image"] = shown if self.pipeline == "QwenImageEditPlusPipeline" else shown[0]
        with self.reading():
            states, _ = pipe.encode_prompt(prompt=text, device=self.device, **given)
        references = tuple(self.encode_image(s, *size) for s, size in zip(sources, sizes, strict=True))
        blocks = [("image", h // self.pixels, w // self.pixels) for h, w in sizes]
        return Condition(states[0].cpu(), references, (("text", states.shape[1]), *blocks), self.shared)

    def check(self, prompt: Prompt) -> None:
        """Raises UserError for text that the pipeline would cut off, too."""
        super().check(prompt)
        if not self.most_sources:
            with ONE_THREAD:
                tokens = len(self._tokenizer()(prompt.text)["input_ids"])
            if tokens > LONGEST:
                raise UserError(
                    f"prompt '{short(prompt.text)}' has {tokens} tokens, {self.pipeline} reads {LONGEST}; shorten it"
                )

    @lru_cache(1)  # noqa: B019 - a family lives as long as its run
    def _tokenizer(self):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder / 'tokenizer'} holds no tokenizer ({error}); copy the pipeline whole"
            ) from None

    def _sizes(self, sources: Sequence[np.ndarray]) -> tuple[list, list]:
        """(height, width) in pixels at which the encoder sees the sources, and at which they become latents."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        ratios = [s.shape[1] / s.shape[0] for s in sources]
        if self.pipeline == "QwenImageEditPlusPipeline":
            return [dimensions(plus.CONDITION_IMAGE_SIZE, r) for r in ratios], [
                dimensions(plus.VAE_IMAGE_SIZE, r) for r in ratios
            ]
        whole = [dimensions(EDIT_AREA, r) for r in ratios]
        return whole, whole
