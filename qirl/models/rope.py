"""3-axis rotary tables (frame, height, width), as in Qwen-Image 2.1."""

from __future__ import annotations

import torch

POSITIVE, NEGATIVE = 8192, 1024


class Rope:
    """cos and sin of every position of the three axes.

    Tables are built once on the CPU in float32, then copied: built on another device they would differ in the last
    bits, and as a module's buffers they would be rounded by `model.to(bfloat16)`. Source: RoFormer (2021).
    """

    def __init__(self, axes: tuple[int, int, int], theta: float = 10000.0):
        with torch.device("cpu"):  # also inside `with torch.device("meta")`
            index = torch.cat([torch.arange(POSITIVE), torch.arange(-NEGATIVE, 0)])
            rates = [1.0 / torch.pow(theta, torch.arange(0, d, 2).to(torch.float32).div(d)) for d in axes]
            angles = [torch.outer(index, rate) for rate in rates]
        self.tables = {torch.device("cpu"): [(a.cos(), a.sin()) for a in angles]}

    def __call__(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position int64 [N, 3] in [-1024, 8192): cos and sin, float32 [N, head_dim / 2] each."""
        device = position.device
        if device not in self.tables:
            cpu = self.tables[torch.device("cpu")]
            self.tables[device] = [(c.to(device), s.to(device)) for c, s in cpu]
        rows = torch.where(position < 0, position + POSITIVE + NEGATIVE, position).unbind(-1)
        parts = [(c[r], s[r]) for (c, s), r in zip(self.tables[device], rows, strict=True)]
        return torch.cat([c for c, _ in parts], -1), torch.cat([s for _, s in parts], -1)
