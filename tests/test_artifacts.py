"""The spectral probe finds patterns that the eye would miss, and not the pictures they lie on."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from qirl.data import digits
from qirl.errors import UserError
from qirl.evaluation.artifacts import periodic_peak


def gridded(images, amplitude, period):
    """With the first row and column of every patch of `period` pixels brighter by `amplitude`, the others darker."""
    y, x = np.mgrid[: images.shape[-3], : images.shape[-2]]
    pattern = np.where((x % period == 0) | (y % period == 0), 0.5, -0.5)[..., None]
    return np.clip(images + amplitude * pattern, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def handwriting():
    """40 groups of 6 renders of 16 x 16 pixels."""
    images = digits.examples(np.random.default_rng(0).random((240, digits.UNIFORMS)))[1]
    return images.reshape(40, 6, 16, 16, 3)


def test_a_faint_grid_on_handwriting_raises_the_peak(handwriting):
    clean, faint, strong = (
        np.mean([periodic_peak(own) for own in gridded(handwriting, amplitude, 2)]) for amplitude in (0, 16, 32)
    )
    assert clean < 11 and faint > clean + 2.5 and strong > faint + 3


def test_the_peak_grows_with_the_amplitude(handwriting):
    for own in handwriting[:10]:
        peaks = [periodic_peak(gridded(own, amplitude, 2)) for amplitude in (16, 24, 32, 48, 64)]
        assert (np.diff(peaks) > 0).all(), peaks


@pytest.mark.parametrize("period", [2, 8, 16])
def test_a_grid_of_four_grey_levels_stands_out_of_a_photograph(period):
    photo = load_sample_image("flower.jpg")[80:336, 100:356]
    assert photo.shape == (256, 256, 3)
    clean, grid = periodic_peak(photo), periodic_peak(gridded(photo, 4, period))
    assert clean < 15 and grid > clean + 8


@pytest.mark.parametrize("pattern", ["columns", "rows", "chequers"])
def test_patterns_along_and_across_the_axes_are_found_at_the_highest_frequency(pattern):
    y, x = np.mgrid[:33, :48]  # odd and oblong
    sign = {"columns": x, "rows": y, "chequers": x + y}[pattern] % 2 * 2 - 1
    noise = np.random.default_rng(0).normal(128, 3, (33, 48, 3))
    assert periodic_peak(np.uint8(noise)) < 15
    assert periodic_peak(np.uint8(noise + 5 * sign[..., None])) > 20


def test_a_jump_between_opposite_edges_is_no_artifact():
    noise = np.random.default_rng(0).normal(0, 2, (64, 64, 3))
    ramp = np.linspace(20, 230, 64)[:, None, None]
    assert periodic_peak(np.uint8(ramp + noise)) < 20  # 51 for the plain Fourier transform


def test_a_constant_image_has_no_peak():
    assert periodic_peak(np.full((16, 16, 3), 200, np.uint8)) == pytest.approx(0)
    assert periodic_peak(np.zeros((2, 20, 9, 3), np.uint8)) == pytest.approx(0)


def test_images_too_small_for_a_spectrum_are_refused():
    with pytest.raises(UserError, match="not 4 x 16"):
        periodic_peak(np.zeros((4, 16, 3), np.uint8))
