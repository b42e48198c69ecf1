"""Rewards by image and text embeddings of transformers models: CLIPScore, PickScore, an aesthetic head, similarity of edits.

clip_score   cosine of image and prompt (Hessel et al. 2021 multiply by 2.5)
pick_score   logit scale times the cosine, in a CLIP trained on people's picks (Kirstain et al. 2023)
aesthetic    linear layers on the normalised CLIP embedding (LAION aesthetic predictor): a rating of 1 to 10
similarity   cosine of the output's and the first source's embedding; DINO: the class token (Oquab et al. 2023)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qirl.config_parts import AestheticOptions, ClipScoreOptions, PickScoreOptions, SimilarityOptions, Weights
from qirl.errors import UserError
from qirl.rewards.protocol import Sample, Scores


class Embedder:
    """Unit vectors float32 [n, D] of images and texts. One call at a time: the scorer's threads share the network."""

    def __init__(self, options: Weights):
        try:
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(f"kind {options.kind} needs transformers ({error}): pip install 'qirl[rewards]'") from None
        cuda = torch.cuda.is_available()
        self.device = torch.device(("cuda" if cuda else "cpu") if options.device == "auto" else options.device)
        try:
            self.images = AutoImageProcessor.from_pretrained(options.model, backend="pil")
            self.model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval().to(self.device)
            self.clip = hasattr(self.model, "get_image_features")
            self.tokens = AutoTokenizer.from_pretrained(options.model) if self.clip else None
        except (OSError, ValueError) as error:
            raise UserError(f"{options.model} has no weights that transformers can load: {error}") from None
        self.batch, self._one = options.batch, threading.Lock()

    @torch.no_grad()
    def of_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        parts = []
        for i in range(0, len(images), self.batch):
            pixels = self.images(list(images[i : i + self.batch]), return_tensors="pt")["pixel_values"].to(self.device)
            with self._one:
                if self.clip:
                    out = self.model.get_image_features(pixel_values=pixels)
                else:
                    out = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            parts.append(_unit(out))
        return torch.cat(parts)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        parts = []
        for i in range(0, len(texts), self.batch):
            given = self.tokens(list(texts[i : i + self.batch]), padding=True, truncation=True, return_tensors="pt")
            with self._one:
                parts.append(_unit(self.model.get_text_features(**given.to(self.device))))
        return torch.cat(parts)


def _unit(out) -> torch.Tensor:
    vectors = out if isinstance(out, torch.Tensor) else out.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


class _ByEmbedding:
    needs_clip = False

    def __init__(self, name: str, options: Weights):
        self.components, self.options, self.embed = (name,), options, Embedder(options)
        if self.needs_clip and not self.embed.clip:
            raise UserError(f"rewards.{name}: {options.model} is no CLIP model; kind {options.kind} needs one")

    def __call__(self, samples: Sequence[Sample]) -> list[Scores]:
        rows: list[Scores] = [{} for _ in samples]
        places = [i for i, sample in enumerate(samples) if self.applies(sample)]
        if places:
            for i, value in zip(places, self.measure([samples[i] for i in places]).tolist(), strict=True):
                rows[i][self.components[0]] = self.options.score(value)
        return rows

    def applies(self, sample: Sample) -> bool:
        return True

    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [n]."""
        raise NotImplementedError


class ClipScore(_ByEmbedding):
    """Applies to samples with a prompt."""

    options: ClipScoreOptions
    needs_clip = True

    def applies(self, sample: Sample) -> bool:
        return bool(sample.prompt.strip())

    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        return (
            self.embed.of_images([s.image for s in samples]) * self.embed.of_texts([s.prompt for s in samples])
        ).sum(1)


class PickScore(ClipScore):
    options: PickScoreOptions

    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        return super().measure(samples) * self.embed.model.logit_scale.exp().item()


class Aesthetic(_ByEmbedding):
    options: AestheticOptions
    needs_clip = True

    def __init__(self, name: str, options: AestheticOptions):
        super().__init__(name, options)
        self.head = load_head(options.head)
        width, wanted = self.embed.model.config.projection_dim, self.head[0][0].shape[1]
        if width != wanted:
            raise UserError(
                f"rewards.{name}: {options.head} takes embeddings of width {wanted}, {options.model} gives {width}"
            )

    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        out = self.embed.of_images([s.image for s in samples])
        for weight, bias in self.head:
            out = out @ weight.T + bias
        return out[:, 0]


def load_head(path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (weight, bias) of every linear layer of a head, in the order of their names. Raises UserError for another file."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        names = [name for name, tensor in state.items() if tensor.ndim == 2]
        layers = [(state[name].float(), state[name.removesuffix("weight") + "bias"].float()) for name in names]
    except (OSError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no linear layers ({error!r}); give the head of an aesthetic predictor") from None
    fits = all(a.shape[0] == b.shape[1] for (a, _), (b, _) in zip(layers, layers[1:], strict=False))
    if not layers or not fits or layers[-1][0].shape[0] != 1:
        raise UserError(f"the layers of {path} do not lead to one rating: {[tuple(w.shape) for w, _ in layers]}")
    return layers


class Similarity(_ByEmbedding):
    """Applies to edits."""

    options: SimilarityOptions

    def applies(self, sample: Sample) -> bool:
        return bool(sample.sources)

    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        both = self.embed.of_images([s.image for s in samples] + [s.sources[0] for s in samples])
        return (both[: len(samples)] * both[len(samples) :]).sum(1)
