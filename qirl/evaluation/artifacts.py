"""Spectral probe for periodic artifacts: the grid a decoder or a patch layout leaves on images, an early sign of hacking.

A pattern that repeats every few pixels puts all its power into single frequencies; pictures spread theirs and fall off
smoothly. The probe is how far the strongest frequency stands over others of about the same size (a ring around zero).
"""

from __future__ import annotations

import numpy as np

from qirl.errors import UserError

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709
ROUNDING = (1 / 255) ** 2 / 12  # variance that storing 8 bits adds to a pixel


def periodic_peak(images: np.ndarray) -> float:
    """Decibels of the strongest spectral peak over the median of its ring: uint8 [H, W, 3] or [n, H, W, 3] -> 0 and up.

    Several images are one sample: their power spectra are averaged, which lifts what they share over what they show.
    Frequencies along the axes count (a grid of patches lies on them); slow ones, of periods longer than about 30 pixels
    (or a third of a small image), do not: pictures live there. A constant image gives 0, white noise and photographs about
    10 to 20. Pictures of stripes or text peak as well, so compare models on the same prompts. Raises UserError below 8 x 8.
    """
    images = images[None] if images.ndim == 3 else images
    height, width = images.shape[1:3]
    if min(height, width) < 8:
        raise UserError(f"the artifact probe needs images of 8 x 8 pixels or more, not {height} x {width}")
    power = np.mean([_power(image @ LUMINANCE / 255) for image in images], 0) + ROUNDING
    ring = np.rint(_radius(height, width)).astype(int).ravel()
    by_ring = power.ravel()[np.argsort(ring, kind="stable")]
    start = np.searchsorted(np.sort(ring), np.arange(ring.max() + 3))
    slowest = round(min(height, width) / 32 + 2) + 1
    peaks = [
        by_ring[start[r] : start[r + 1]].max() / np.median(by_ring[start[r - 1] : start[r + 2]])
        for r in range(slowest, ring.max() + 1)
    ]
    return float(10 * np.log10(max(peaks)))


def _radius(height: int, width: int) -> np.ndarray:
    """Distance of every frequency from zero, in periods per short side: [H, W]."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    return np.hypot(y, x) * min(height, width)


def _power(luminance: np.ndarray) -> np.ndarray:
    """Power spectrum [H, W] of the periodic part of an image [H, W], per pixel.

    The Fourier transform takes an image for periodic, so its opposite edges, which do not match, would add a cross along
    the axes. The periodic plus smooth decomposition (Moisan 2011) takes that jump out; unlike a window it leaves a
    periodic pattern in one frequency.
    """
    jump = np.zeros_like(luminance)
    jump[0] += luminance[-1] - luminance[0]
    jump[-1] += luminance[0] - luminance[-1]
    jump[:, 0] += luminance[:, -1] - luminance[:, 0]
    jump[:, -1] += luminance[:, 0] - luminance[:, -1]
    y, x = (2 * np.cos(2 * np.pi * np.fft.fftfreq(n)) for n in luminance.shape)
    laplace = y[:, None] + x - 4
    laplace[0, 0] = 1
    smooth = np.fft.fft2(jump) / laplace
    smooth[0, 0] = 0
    return np.abs(np.fft.fft2(luminance) - smooth) ** 2 / luminance.size
