"""Rewards by image and text embeddings of transformers models: CLIPScore, PickScore, an aesthetic head, similarity of edits.

clip_score   cosine of image and prompt (Hessel et al. 2021 multiply by 2.5)
pick_score   logit scale times the cosine, in a CLIP trained on people's picks (Kirstain et al. 2023)
aesthetic    linear layers on the normalised CLIP embedding (LAION aesthetic predictor): a rating of 1 to 10
similarity   cosine of the output's and the first source's embedding; DINO: the class token (Oquab et al. 2023)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from qirl.config_parts import AestheticOptions, ClipScoreOptions, PickScoreOptions, SimilarityOptions, Weights
from qirl.errors import UserError
from qirl.parallel.data import device_of
from qirl.rewards.protocol import Sample, Scores


class Embedder:
    """Unit vectors float32 [n, D] of images and texts. One call at a time: the scorer's threads share the network."""

    def __init__(self, options: Weights):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(f"kind {options.kind} needs transformers ({error}): pip install 'qirl[rewards]'") from None
        self.device = device_of(options.device, "device")
        try:
            self.model = self._load(options).eval().to(self.device)
            self.clip = hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")
            self.texts = Texts(AutoTokenizer.from_pretrained(options.model), self.model) if self.clip else None
        except UserError:  # a ValueError, too
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{options.model} has no weights that transformers can load: {error}") from None
        self.batch, self._one = options.batch, threading.Lock()

    def _load(self, options: Weights) -> torch.nn.Module:
        from transformers import AutoImageProcessor, AutoModel

        self.images = AutoImageProcessor.from_pretrained(options.model, backend="pil")
        return AutoModel.from_pretrained(options.model, dtype=torch.float32)

    @torch.no_grad()
    def of_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """images: uint8 [H, W, 3] of any sizes. Those that the processor leaves at different sizes run apart."""
        parts = []
        for i in range(0, len(images), self.batch):
            given = [self._prepared(image) for image in images[i : i + self.batch]]
            for _, alike in groupby(given, key=lambda one: one["pixel_values"].shape):
                parts.append(self._of_prepared(list(alike)))
        return torch.cat(parts)

    def _prepared(self, image: np.ndarray):
        return self.images([image], input_data_format="channels_last", return_tensors="pt")

    def _of_prepared(self, given: Sequence) -> torch.Tensor:
        batch = {name: torch.cat([one[name] for one in given]).to(self.device) for name in given[0]}
        with self._one:
            if self.clip:
                return _unit(self.model.get_image_features(**batch))
            return _unit(self.model(**batch).last_hidden_state[:, 0])

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        parts = []
        for i in range(0, len(texts), self.batch):
            given = self.texts.tokens(texts[i : i + self.batch])
            with self._one:
                parts.append(_unit(self.model.get_text_features(**given.to(self.device))))
        return torch.cat(parts)


class Texts:
    """Prompts as a text model was trained on them, whatever else is in the batch.

    Longer prompts are cut to the positions that the model has, whether or not the tokenizer knows them. SigLIP (Zhai et al. 2023)
    reads the last of all its positions and was trained without an attention mask: its prompts are padded to the full length.
    """

    def __init__(self, tokenizer, model: torch.nn.Module):
        self.tokenizer, self.full = tokenizer, model.config.model_type in ("siglip", "siglip2")
        self.length = positions(model) if self.full else min(tokenizer.model_max_length, positions(model))

    def tokens(self, texts: Sequence[str]):
        """input_ids int64 [n, T] (and attention_mask, save for SigLIP), T at most the model's positions."""
        return self.tokenizer(
            list(texts), padding="max_length" if self.full else True, max_length=self.length, truncation=True,
            padding_side="right", return_attention_mask=not self.full, return_token_type_ids=False, return_tensors="pt",
        )  # fmt: skip


def positions(model: torch.nn.Module) -> int:
    """How many tokens of text a model can take. RoBERTa's first positions are those of padding."""
    text = model.config.get_text_config()
    table = next((m for name, m in model.named_modules() if name.endswith("embeddings.position_embeddings")), None)
    before = getattr(table, "padding_idx", None)
    return text.max_position_embeddings - (0 if before is None else before + 1)


def _unit(out) -> torch.Tensor:
    vectors = out if isinstance(out, torch.Tensor) else out.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


class Measured:
    """One component: a measure of the samples that it applies to, mapped to a score by the options."""

    def __init__(self, name: str, options: Weights):
        self.components, self.options = (name,), options

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


class MeasuredInBatches(Measured):
    """Applies to samples with a prompt; `_batch` measures at most `options.batch` of them at once."""

    def applies(self, sample: Sample) -> bool:
        return bool(sample.prompt.strip())

    @torch.no_grad()
    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        step = self.options.batch
        return torch.cat([self._batch(samples[i : i + step]) for i in range(0, len(samples), step)])

    def _batch(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [n], on the CPU."""
        raise NotImplementedError


class _ByEmbedding(Measured):
    needs_clip, embedder = False, Embedder

    def __init__(self, name: str, options: Weights):
        super().__init__(name, options)
        self.embed = self.embedder(options)
        if self.needs_clip and not self.embed.clip:
            raise UserError(f"rewards.{name}: {options.model} is no CLIP model; kind {options.kind} needs one")


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
