"""Reads pictures of the digits world: an ensemble of small CNNs trained on one part of the handwriting.

It answers five questions about a picture, each with a probability per answer: how many digits (1 or 2), the
first digit, the second digit (means nothing for one digit), the ink and the paper. A reward that a policy is
trained against gets exploited, so training pictures are distorted far beyond real renders, colours between
two names get soft targets, and garbage is to be answered by all answers alike.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from qirl.data.digits import INKS, PAPERS, SIZE, contrasting, coverage, glyphs
from qirl.errors import UserError

HEADS = {"count": 2, "first": 10, "second": 10, "ink": len(INKS), "paper": len(PAPERS)}
BATCH = 64
FORMAT = "qirl digit reader 1"


class _Net(nn.Module):
    """Pixels float32 [B, 3, 16, 16] in [-1, 1] -> logits [B, sum of HEADS]."""

    def __init__(self, width: int, kernel: int, generator: torch.Generator):
        super().__init__()

        def layer(before: int, after: int, size: int, stride: int) -> list[nn.Module]:
            conv = skip_init(nn.Conv2d, before, after, size, stride, padding=size // 2, bias=False)
            return [conv, nn.BatchNorm2d(after), nn.ReLU()]

        self.layers = nn.Sequential(
            *layer(4, width, kernel, 2),
            *layer(width, 2 * width, 3, 1),
            *layer(2 * width, 4 * width, 3, 2),
            nn.Flatten(),
            skip_init(nn.Linear, 4 * width * (SIZE // 4) ** 2, sum(HEADS.values())),
        )
        # torch's own initialisation is skipped: it would draw from the global generator.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = torch.cat([pixels, _strokes_of(pixels)], 1)
        return self.layers(pixels.contiguous(memory_format=torch.channels_last))


def _strokes_of(pixels: Tensor) -> Tensor:
    """Where the ink is, whatever its colour: [B, 3, 16, 16] -> [B, 1, 16, 16], about -1 on paper, 1 on ink.

    Paper is the median of the left and right edge, ink the mean of the pixels far from it. Without this a few
    seconds of training go into learning that a shape means the same in every colour.
    """
    paper = torch.cat([pixels[..., 0], pixels[..., -1]], -1).median(-1).values[..., None, None]
    away = pixels - paper
    weight = away.square().sum(1, keepdim=True).square() + 1e-6
    axis = (weight * away).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True)
    along = (away * axis).sum(1, keepdim=True) / (axis.square().sum(1, keepdim=True) + 0.02)
    return along.clamp(-0.5, 1.5) * 2 - 1


class DigitReader:
    """The trained ensemble; `read` averages the members' probabilities."""

    def __init__(self, nets: list[_Net], width: int, kernel: int):
        self.nets, self.width, self.kernel = [net.eval().requires_grad_(False) for net in nets], width, kernel

    @torch.inference_mode()
    def read(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [B, 16, 16, 3] -> float32 probabilities [B, HEADS[name]] by name, the members' mean."""
        given = images.dtype, images.shape[1:]
        assert given == (np.uint8, (SIZE, SIZE, 3)), f"pictures of {given}"
        chunks = []
        for start in range(0, len(images), 256):
            pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + 256])).permute(0, 3, 1, 2)
            pixels = pixels.float() / 127.5 - 1
            members = [[part.softmax(-1) for part in _by_head(net(pixels))] for net in self.nets]
            chunks.append([torch.stack(head).mean(0) for head in zip(*members, strict=True)])
        if not chunks:
            return {name: np.zeros((0, size), np.float32) for name, size in HEADS.items()}
        return {name: torch.cat(head).numpy() for name, head in zip(HEADS, zip(*chunks, strict=True), strict=True)}

    def save(self, path: str | Path) -> None:
        """Writes all members as one safetensors file."""
        tensors = {
            f"{place}.{name}": tensor.contiguous()
            for place, net in enumerate(self.nets)
            for name, tensor in net.state_dict().items()
        }
        shape = {"members": str(len(self.nets)), "width": str(self.width), "kernel": str(self.kernel)}
        save_file(tensors, str(path), metadata={"kind": FORMAT, **shape})

    @classmethod
    def load(cls, path: str | Path) -> DigitReader:
        """Reads what `save` wrote. Raises UserError for a file that is missing, damaged or something else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                shape = file.metadata() or {}
                if shape.get("kind") != FORMAT:
                    raise UserError(f"{path} is no '{FORMAT}' file; delete it or give another path")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            members, width, kernel = (int(shape[name]) for name in ("members", "width", "kernel"))
            nets = [_Net(width, kernel, torch.Generator()) for _ in range(members)]
            for place, net in enumerate(nets):
                net.load_state_dict({name: tensors[f"{place}.{name}"] for name in net.state_dict()})
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            reason = f"digit reader {path} cannot be loaded ({str(error).splitlines()[0]})"
            raise UserError(f"{reason}; delete it to train it anew") from None
        return cls(nets, width, kernel)


def train_reader(
    part: str, seed: int, members: int = 3, steps: int = 500, width: int = 20, kernel: int = 3
) -> DigitReader:
    """Trains an ensemble on one part of the handwriting, "generator", "reward" or "judge".

    `width`: channels of the first layer, `kernel`: its odd size. All randomness comes from one generator
    seeded with `seed`, on one thread, so the same call gives the same weights on one machine.
    Raises UserError for another part.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = _Pictures(part, generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other counts sum in another order, and are slower at this size
    try:
        nets = [_train_net(_Net(width, kernel, generator), pictures, steps) for _ in range(members)]
    finally:
        torch.set_num_threads(threads)
    return DigitReader(nets, width, kernel)


def _train_net(net: _Net, pictures: _Pictures, steps: int) -> _Net:
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=0.0, weight_decay=0.02, fused=True)
    for step in range(steps):
        warm, left = (step + 1) / (0.1 * steps), 1 - step / steps
        optimizer.param_groups[0]["lr"] = 6e-3 * min(warm, 1.0) * left
        pixels, targets, weights = pictures.draw(BATCH)
        heads = zip(_by_head(net(pixels)), targets, strict=True)
        losses = torch.stack([F.cross_entropy(*head, reduction="none") for head in heads], 1)
        optimizer.zero_grad()
        ((losses * weights).sum() / BATCH).backward()
        optimizer.step()
    return net


def _by_head(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(list(HEADS.values()), dim=-1)


class _Pictures:
    """Endless distorted pictures of one part's glyphs, with soft targets."""

    def __init__(self, part: str, generator: torch.Generator):
        images, labels, _ = glyphs(part)
        self.generator = generator
        self.single = torch.from_numpy(coverage(images, 1))
        self.half = torch.from_numpy(coverage(images, 2))
        self.labels = torch.from_numpy(labels.copy())
        pairs = [(i, p) for i, ink in enumerate(INKS) for p, paper in enumerate(PAPERS) if contrasting(ink, paper)]
        self.pairs = torch.tensor(pairs)
        self.inks, self.papers = (torch.tensor(list(table.values())) / 255 for table in (INKS, PAPERS))

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def _chance(self, size: int, probability: float) -> Tensor:
        return self._uniform(size) < probability

    def _integers(self, size: int, high: int) -> Tensor:
        return torch.randint(high, (size,), generator=self.generator)

    def draw(self, size: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Pixels [size, 3, 16, 16] in [-1, 1], targets [size, n] per head, weights [size, heads]."""
        cover, digits = self._strokes(size)
        pairs = self.pairs[self._integers(size, len(self.pairs))]
        ink, ink_rgb = self._colour(self.inks, pairs[:, 0])
        paper, paper_rgb = self._colour(self.papers, pairs[:, 1])
        pixels = paper_rgb[:, :, None, None] + cover[:, None] * (ink_rgb - paper_rgb)[:, :, None, None]
        cloud = F.interpolate(torch.randn(size, 3, 4, 4, generator=self.generator), SIZE, mode="bilinear")
        grain = torch.randn(size, 3, SIZE, SIZE, generator=self.generator)
        cloudy, grainy = (self._uniform(size, 1, 1, 1, high=0.12) for _ in range(2))
        pixels = pixels + cloudy * cloud + grainy * grain
        garbage = self._chance(size, 0.04)
        pixels[garbage] = 0.5 + self._uniform(1, high=0.3) * (cloud + grain)[garbage]
        targets = [*digits, ink, paper]
        for target in targets:
            target[garbage] = 1 / target.shape[1]
        targets = [0.98 * target + 0.02 / target.shape[1] for target in targets]
        weights = torch.ones(size, len(HEADS))
        weights[:, 2] = 2 * digits[0][:, 1]  # one digit: the second is not asked for
        return pixels.clamp(0, 1) * 2 - 1, targets, weights

    def _strokes(self, size: int) -> tuple[Tensor, list[Tensor]]:
        """Distorted coverage [size, 16, 16] in [0, 1] and the targets of count, first and second."""
        a, b = (self._integers(size, len(self.labels)) for _ in range(2))
        two = self._chance(size, 0.58)
        cover = torch.where(two[:, None, None], torch.cat([self.half[a], self.half[b]], 2), self.single[a])
        turn = self._uniform(size, 2, 2, low=-0.12, high=0.12) + torch.eye(2)
        move = self._uniform(size, 2, 1, low=-0.1, high=0.1)
        grid = F.affine_grid(torch.cat([turn, move], 2), [size, 1, SIZE, SIZE], align_corners=False)
        cover = F.grid_sample(cover[:, None], grid, align_corners=False)
        cover = cover ** torch.exp(self._uniform(size, 1, 1, 1, low=-0.5, high=0.5))
        soft = F.avg_pool2d(cover, 3, 1, 1, count_include_pad=False)
        softness = self._uniform(size, 1, 1, 1) * self._chance(size, 0.6)[:, None, None, None]
        cover = torch.lerp(cover, soft, softness)[:, 0]
        targets = [F.one_hot(two.long(), 2), F.one_hot(self.labels[a], 10), F.one_hot(self.labels[b], 10)]
        targets = [target.float() for target in targets]

        # Another picture laid over this one: what it says is mostly unsure.
        mixed = self._chance(size, 0.1)
        cover[mixed] = torch.maximum(cover, cover.roll(1, 0))[mixed]
        for target in targets:
            target[mixed] = (0.35 * target + 0.15 * target.roll(1, 0) + 0.5 / target.shape[1])[mixed]

        # A hole, some filled with ink; the more strokes it takes, the more doubt about the digits.
        high, wide = (self._uniform(size, low=2, high=9) for _ in range(2))
        top, left = (self._uniform(size, low=-1, high=12) for _ in range(2))
        place = torch.arange(SIZE)
        hole = ((place >= top[:, None]) & (place < (top + high)[:, None]))[:, :, None]
        hole = hole & ((place >= left[:, None]) & (place < (left + wide)[:, None]))[:, None, :]
        hole &= self._chance(size, 0.3)[:, None, None]
        lost = (cover * hole).sum((1, 2)) / cover.sum((1, 2)).clamp(min=1.0)
        cover = torch.where(hole, self._chance(size, 0.2)[:, None, None].float(), cover)
        doubt = (1.5 * lost - 0.2).clamp(0, 1)[:, None]
        targets = [torch.lerp(target, torch.full_like(target, 1 / target.shape[1]), doubt) for target in targets]
        return cover * self._uniform(size, 1, 1, low=0.7, high=1.0), targets

    def _colour(self, table: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and RGB near the chosen names; a quarter lies between two names and has shared targets."""
        other = self._integers(len(chosen), len(table))
        share = (self._uniform(len(chosen), high=0.6) * self._chance(len(chosen), 0.25))[:, None]
        target = (1 - share) * F.one_hot(chosen, len(table)) + share * F.one_hot(other, len(table))
        rgb = (1 - share) * table[chosen] + share * table[other]
        return target, rgb + 0.05 * torch.randn(rgb.shape, generator=self.generator)
