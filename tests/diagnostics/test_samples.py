"""Two-sample statistics against closed forms and against sets that share a law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recon.diagnostics.samples import distances, floor, spectrum
from recon.draws import Draws
from recon.errors import InputError


def white(n, *shape, seed=0):
    return Draws(seed, range(n)).normal(0, shape, "user", dtype=torch.float64)


def test_nothing_differs_from_itself():
    x = white(5, 12, 10)
    assert vars(distances(x, x)) == {"spectrum": 0.0, "histogram": 0.0, "sliced": 0.0}
    turned = distances(x.flip(0), x)  # a set has no order
    assert max(vars(turned).values()) < 1e-12


def test_a_gain_is_seen_in_decibels():
    """Twice the amplitude about a zero mean is 6.02 dB in every band, and |2 - 1| E|n| = sqrt(2 / pi) in the histogram."""
    x = white(400, 8, 8)
    x = torch.cat([x, -x])  # the common mean is zero exactly
    found = distances(2 * x, x)
    assert found.spectrum == pytest.approx(20 * math.log10(2), rel=1e-12)
    assert found.histogram == pytest.approx(math.sqrt(2 / math.pi), rel=4 / math.sqrt(2 * 400 * 64))
    # Projections are standard normal too: the same number, with the sampling error of 800 images.
    assert found.sliced == pytest.approx(math.sqrt(2 / math.pi), rel=4 / math.sqrt(800))


def test_a_shift_is_seen_in_histogram_and_projections():
    """Adding c everywhere moves every value by c, and the projection on u by c sum(u), whose mean size is c sqrt(2 / pi)."""
    x = white(50, 8, 8)
    found = distances(x + 3.0, x)
    assert found.histogram == pytest.approx(3.0 / float(x.std()), rel=1e-12)
    spread = float((x.flatten(1) - x.flatten(1).mean(0)).square().sum(1).sum() / 49 / 64) ** 0.5
    expected = 3.0 * math.sqrt(2 / math.pi) / spread
    # 512 directions: the mean of |N(0, 1)| is known to sqrt((1 - 2 / pi) / 512) = 0.027; five of them.
    assert found.sliced == pytest.approx(expected, rel=5 * math.sqrt((1 - 2 / math.pi) / 512) / math.sqrt(2 / math.pi) + 0.02)


def test_rings_of_a_plane_wave():
    """Rings are cycles per shorter side, up to its half: 3 along 16 rows lie in ring 3, 6 along 24 columns in ring 4."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    for wave, ring in ((torch.cos(2 * math.pi * 3 * y / 16), 3), (torch.cos(2 * math.pi * 6 * x / 24), 4)):
        bands = spectrum(wave[None].double())
        assert bands.shape == (8,)
        assert float(bands[ring - 1] / bands.sum()) == pytest.approx(1.0, abs=1e-12)


def test_the_spectrum_of_white_noise_is_flat():
    bands = spectrum(white(2000, 12, 12))
    ring = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(12) * 12] * 2, indexing="ij")).round().flatten().long()
    counts = torch.bincount(ring)[1:7].double()
    # |FFT|^2 of white noise has mean 1 and, over independent pairs of frequencies, a relative error of sqrt(2 / n).
    assert bool(((bands - 1).abs() < 5 * torch.sqrt(2 / (2000 * counts / 2))).all())


def test_a_shared_law_stays_at_the_floor_and_another_does_not():
    pool, held_out = white(256, 8, 8), white(64, 8, 8, seed=1)
    rows = floor(pool, held_out, sets=20, seed=3)
    same, other = distances(white(64, 8, 8, seed=2), held_out), distances(1.3 * white(64, 8, 8, seed=2), held_out)
    for key in ("spectrum", "histogram", "sliced"):
        values = np.array([getattr(row, key) for row in rows])
        # Five standard deviations: one false alarm in a million for a normal law.
        assert abs(getattr(same, key) - values.mean()) < 5 * values.std(ddof=1) * math.sqrt(1 + 1 / 20)
        assert getattr(other, key) > values.mean() + 5 * values.std(ddof=1)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (white(4, 8, 8), white(3, 8, 8), "at least two images .* of one shape"),
        (white(1, 8, 8), white(1, 8, 8), "at least two images"),
        (white(4, 8), white(4, 8), r"\(n, \.\.\., ny, nx\)"),
        (white(4, 8, 8) * math.nan, white(4, 8, 8), "must be finite"),
    ],
)
def test_refusals(a, b, text):
    with pytest.raises(InputError, match=text):
        distances(a, b)


def test_a_pool_that_is_too_small():
    with pytest.raises(InputError, match="at least as many images as are compared; got 4 for 5"):
        floor(white(4, 8, 8), white(5, 8, 8))
