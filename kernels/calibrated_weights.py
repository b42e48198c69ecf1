"""Reward weights that give each component a wanted share of the advantage's variance (algorithm page, section 5).

    rho_k = clip(1 - n_k^2 / s_k^2, 0, 1);   shares t_k ~ d_k rho_k;   solve w_k (G w)_k / (w' G w) = t_k

with G the correlation of the components inside groups, shrunk 5 % to the identity; solved by cyclic updates
b = sum_{j != k} G_kj e_j, e_k = (-b + sqrt(b^2 + 4 t_k)) / 2, then w = e / sum(e); scale = 1 / sqrt(w' G w) gives unit-RMS
advantages. The equations are those of risk-budgeting portfolios (Spinu 2013).
"""

from __future__ import annotations

import torch

from qirl.kernels.dispatch import choose


def reference(wanted, variance, noise, correlation, shrink, sweeps):
    reliability = (1 - noise.double() ** 2 / variance.double().clamp_min(1e-30)).clamp(0, 1)
    shares = wanted.double() * reliability
    shares = shares / shares.sum()
    k = len(shares)
    g = (1 - shrink) * correlation.double() + shrink * torch.eye(k, dtype=torch.float64)
    e = shares.sqrt()
    for _ in range(sweeps):
        for i in range(k):
            b = g[i] @ e - g[i, i] * e[i]
            e[i] = (-b + torch.sqrt(b * b + 4 * shares[i])) / 2
    w = e / e.sum()
    return w, 1 / torch.sqrt(w @ g @ w), shares


def calibrated_weights(
    wanted: torch.Tensor, variance: torch.Tensor, noise: torch.Tensor, correlation: torch.Tensor, shrink: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights float64 [K] that sum to 1, the scale, and the shares [K] they realise under the shrunk correlation.

    wanted [K] >= 0; variance, noise [K]: pooled within-group variance and read noise; correlation [K, K].
    Raises ValueError if no component is reliable.
    """
    if not ((variance > noise**2) & (wanted > 0)).any():
        raise ValueError("no component varies more than its read noise; probe with more images or better judges")
    run = choose("calibrated_weights", reference=reference)
    return run(wanted, variance, noise, correlation, shrink, 200)
