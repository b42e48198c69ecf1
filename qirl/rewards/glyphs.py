"""Is it still the very same glyph? Handwriting as strokes without colours, compared by an embedding of instances.

The miniature of face identity: the embedding puts renderings of one image of a digit close together, and other images
of the same digit apart (InfoNCE, van den Oord et al., 2018). It sees the "reward" part of the handwriting, and
further instances made from it by bending and blending.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from qirl.data import digits
from qirl.data.digits import SIZE, bank, glyphs
from qirl.errors import UserError
from qirl.rewards.networks import trained_once

REWARD = {"part": "reward", "seed": 3, "steps": 300}
FORMAT = "qirl glyph embedding 1"
WIDTH, DIM = 16, 32  # channels of the first layer, length of an embedding
DIGITS, EACH = 2, 32  # a batch: so many images of each of so many digits, two renderings of every image
TEMPERATURE = 0.1
MIDDLE, SPREAD = 0.65, 0.1  # cosine at which identity is a half, and the width of its rise


def plane(images: np.ndarray) -> np.ndarray:
    """Strokes without colours: uint8 [B, 16, 16, 3] -> float32 [B, 16, 16] from 0 (paper) to 1 (ink).

    Paper is the median of the border; ink is the mean of the other pixels, weighted towards those that are far from
    the paper. Nothing here is learned, and every picture has a plane: an empty one has no ink.
    """
    given = images.dtype, images.shape[1:]
    assert given == (np.uint8, (SIZE, SIZE, 3)), f"pictures of {given}"
    pixels = images.astype(np.float32) / 255
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    away = pixels - np.median(border, axis=1)[:, None, None]
    weight = np.square((away**2).sum(-1, keepdims=True)) + 1e-6
    axis = (weight * away).sum((1, 2), keepdims=True) / weight.sum((1, 2), keepdims=True)
    along = (away * axis).sum(-1) / ((axis**2).sum(-1) + 0.005)
    return np.clip(along, 0, 1).astype(np.float32)


def places(planes: np.ndarray, count: int) -> np.ndarray:
    """The glyphs' own places: float32 [B, 16, 16] -> [count, B, 16, 16 // count], from left to right."""
    return np.stack(np.split(planes, count, axis=-1))


def _canonical(covers: Tensor) -> Tensor:
    """A glyph's place to the embedding's input: [B, 16, 16] or [B, 16, 8] -> [B, 1, 16, 16], half-size ones enlarged."""
    covers = covers[:, None]
    if covers.shape[-1] == SIZE:
        return covers
    return F.interpolate(covers[:, :, 1:-1], (SIZE, SIZE), mode="bilinear", align_corners=False)


class _Net(nn.Module):
    """[B, 1, 16, 16] in [0, 1] -> unit vectors [B, DIM]."""

    def __init__(self, generator: torch.Generator):
        super().__init__()

        def layer(before: int, after: int, stride: int) -> list[nn.Module]:
            conv = skip_init(nn.Conv2d, before, after, 3, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(after), nn.ReLU()]

        self.layers = nn.Sequential(
            *layer(1, WIDTH, 1),
            *layer(WIDTH, 2 * WIDTH, 2),
            *layer(2 * WIDTH, 4 * WIDTH, 2),
            nn.Flatten(),
            skip_init(nn.Linear, 4 * WIDTH * (SIZE // 4) ** 2, DIM),
        )
        for module in self.modules():  # torch's own initialisation would draw from the global generator
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, covers: Tensor) -> Tensor:
        return F.normalize(self.layers(2 * covers - 1), dim=-1)


class GlyphEmbedding:
    """The trained network."""

    def __init__(self, net: _Net):
        self.net = net.eval().requires_grad_(False)

    @torch.inference_mode()
    def embed(self, covers: np.ndarray) -> np.ndarray:
        """Glyphs in their places, float32 [B, 16, 16] or [B, 16, 8] in [0, 1] -> unit vectors float32 [B, DIM]."""
        parts = torch.from_numpy(np.ascontiguousarray(covers)).split(256)
        return torch.cat([self.net(_canonical(part)) for part in parts]).numpy()

    def identity(self, covers: np.ndarray, originals: np.ndarray) -> np.ndarray:
        """How surely `covers` are renderings of the very glyphs `originals`, both as for `embed`: float64 [B] in [0, 1].

        A logistic function of the cosine: about 1 for another rendering of the same image, low for another image of
        the same digit, lower for another digit, and never flat.
        """
        cosine = (self.embed(covers).astype(np.float64) * self.embed(originals)).sum(-1)
        return 1 / (1 + np.exp((MIDDLE - cosine) / SPREAD))

    def save(self, path: str | Path) -> None:
        save_file(self.net.state_dict(), str(path), metadata={"kind": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> GlyphEmbedding:
        """Reads what `save` wrote. Raises UserError for a file that is missing, damaged or something else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("kind") != FORMAT:
                    raise UserError(f"{path} is no '{FORMAT}' file; delete it or give another path")
                net = _Net(torch.Generator())
                net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = f"glyph embedding {path} cannot be loaded ({str(error).splitlines()[0]})"
            raise UserError(f"{reason}; delete it to train it anew") from None
        return cls(net)


def train_embedding(part: str, seed: int, steps: int) -> GlyphEmbedding:
    """Trains the embedding on one part of the handwriting (`digits.PARTS`), on one thread, from one generator.

    Raises UserError for another part.
    """
    generator = torch.Generator().manual_seed(seed)
    renderings = _Renderings(part, generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other counts sum in another order, and are slower at this size
    try:
        net = _Net(generator).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.02, fused=True)
        own = torch.arange(DIGITS * EACH)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / (0.1 * steps), 1.0) * (1 - step / steps)
            first, second = net(renderings.draw()).chunk(2)
            logits = first @ second.T / TEMPERATURE
            optimizer.zero_grad()
            (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)).backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return GlyphEmbedding(net)


def reward_embedding(cache_dir: str | Path) -> GlyphEmbedding:
    """The embedding behind the rewards: trained once (6 s on one core), then loaded from `cache_dir`."""
    modules = (sys.modules[__name__], digits)
    return trained_once(cache_dir, "glyph_embedding", REWARD, modules, train_embedding, GlyphEmbedding.load)


class _Renderings:
    """Endless pairs of distorted renderings of one part's glyphs, most of them bent or blended into new ones first."""

    def __init__(self, part: str, generator: torch.Generator):
        labels = glyphs(part)[1]
        covers = bank(part)
        self.generator = generator
        self.single, half = torch.from_numpy(covers.single)[:, None], torch.from_numpy(covers.half)
        self.half = _canonical(half)
        self.by_digit = [torch.from_numpy(np.flatnonzero(labels == digit)) for digit in range(10)]

    def draw(self) -> torch.Tensor:
        """[2 * DIGITS * EACH, 1, 16, 16]: one rendering of every image, then another one of each in the same order."""
        chosen = []
        for digit in torch.randperm(10, generator=self.generator)[:DIGITS].tolist():
            options = self.by_digit[digit]
            chosen.append(options[torch.randperm(len(options), generator=self.generator)[:EACH]])
        chosen = torch.cat(chosen)
        small = self._uniform(len(chosen), 1, 1, 1) < 0.5
        covers = torch.where(small, self.half[chosen], self.single[chosen])
        # A blend of two images of a digit, bent at random, is one more instance.
        other = covers.roll(1, 0)
        share = self._uniform(len(covers), 1, 1, 1, high=0.5) * (self._uniform(len(covers), 1, 1, 1) < 0.4)
        covers = (2 * torch.lerp(covers, other, share) - 0.5).clamp(0, 1)
        covers = self._bend(covers, self._uniform(len(covers), 1, 1, 1, high=0.16))
        return torch.cat([self._render(covers, small), self._render(covers, small)])

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def _bend(self, covers: Tensor, strength: Tensor | float) -> Tensor:
        """Moves pixels along a smooth random field; the picture is 2 wide, strength is the field's spread."""
        n = len(covers)
        field = F.interpolate(torch.randn(n, 2, 4, 4, generator=self.generator), SIZE, mode="bilinear")
        grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, SIZE, SIZE], align_corners=False)
        return F.grid_sample(covers, grid + (strength * field).permute(0, 2, 3, 1), align_corners=False)

    def _render(self, covers: Tensor, small: Tensor) -> Tensor:
        """Small shift, thicker or thinner, softer, fainter, noisy. What was small was enlarged twofold in width."""
        n = len(covers)
        move = torch.eye(2, 3).expand(n, 2, 3).clone()
        move[:, :, 2] = self._uniform(n, 2, low=-0.09, high=0.09)
        move[:, 0, 2] *= 1 + small.view(n)
        grid = F.affine_grid(move, [n, 1, SIZE, SIZE], align_corners=False)
        covers = F.grid_sample(covers, grid, align_corners=False)
        covers = covers.clamp(0, 1) ** torch.exp(self._uniform(n, 1, 1, 1, low=-0.6, high=0.6))
        soft = F.avg_pool2d(covers, 3, 1, 1, count_include_pad=False)
        softer = F.avg_pool2d(soft, (1, 5), 1, (0, 2), count_include_pad=False)
        soft = torch.where(small, softer, soft)
        covers = torch.lerp(covers, soft, self._uniform(n, 1, 1, 1) ** 2)
        covers = covers * self._uniform(n, 1, 1, 1, low=0.8)
        grain = torch.randn(covers.shape, generator=self.generator)
        return (covers + self._uniform(n, 1, 1, 1, high=0.12) * grain).clamp(0, 1)
