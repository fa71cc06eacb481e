"""Raw projections as photon counts, and the axis of rotation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recon.datasets.projections import photon_counts, rotation_axis
from recon.errors import InputError
from recon.operators import ParallelBeam
from recon.space import Space
from tests.bounds import normal_bound


def raw(gain: float, flats: int, seed: int = 0, pixels: int = 400):
    """A detector with that gain: projections behind a wedge, flats, darks, and the true line integrals."""
    random = np.random.default_rng(seed)
    blank, dark = random.uniform(800, 1200, pixels), random.uniform(5, 15, pixels)
    integrals = np.linspace(0.0, 2.0, pixels)

    def detect(photons):
        return gain * random.poisson(photons) + dark

    projections = np.stack([detect(blank * np.exp(-integrals)) for _ in range(20)])
    return projections, np.stack([detect(blank) for _ in range(flats)]), np.stack([dark, dark]), integrals


@pytest.mark.parametrize("gain", [0.4, 1.0, 7.0])
def test_the_gain_is_found(gain):
    projections, flats, darks, _ = raw(gain, 12)
    found = photon_counts(projections, flats, darks).gain
    # A sample variance with 11 degrees of freedom has relative sd sqrt(2/11); a median of 400 is worse by sqrt(pi/2).
    sd = math.sqrt(2 / 11) * math.sqrt(math.pi / 2 / 400)
    assert abs(found / gain - 1) < normal_bound(1) * sd


def test_whitened_residuals_have_unit_variance_at_any_gain():
    for gain in (0.4, 7.0):
        projections, flats, darks, integrals = raw(gain, 400)
        y, sigma = photon_counts(projections, flats, darks, gain).line_integrals()
        z = ((y - torch.from_numpy(integrals)) / sigma).flatten()
        n = len(z)
        # Flats are known to 1/400 of the variance, the delta method to some 1/counts (counts >= 100).
        assert abs(float(z.square().mean()) - 1) < normal_bound(1) * math.sqrt(2 / n) + 1 / 400 + 0.01


def test_dead_pixels_are_named_and_carry_no_weight():
    projections, flats, darks, _ = raw(1.0, 8)
    flats[:, 3], projections[:, 3] = darks[0, 3], darks[0, 3]
    counts = photon_counts(projections, flats, darks)
    y, sigma = counts.line_integrals()
    assert counts.dead.nonzero().flatten().tolist() == [3]
    assert torch.isinf(sigma[:, 3]).all() and torch.isfinite(sigma[:, 2]).all() and (y[:, 3] == 0).all()


def test_one_averaged_field_needs_the_gain():
    projections, flats, darks, _ = raw(1.0, 8)
    with pytest.raises(InputError, match="at least 5 flat fields"):
        photon_counts(projections, flats.mean(0), darks.mean(0))
    assert photon_counts(projections, flats.mean(0), darks.mean(0), gain=1.0).blank.shape == (400,)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p, f, d: (p, f[:, 1:], d), "flats must be"),
        (lambda p, f, d: (p, f, d[:, 1:]), "darks must be"),
        (lambda p, f, d: (np.where(p > 900, np.nan, p), f, d), "finite"),
        (lambda p, f, d: (p, d, f), "exchanged"),
        (lambda p, f, d: (p, np.tile(f[:1], (6, 1)), d), "no noise to measure"),
    ],
)
def test_what_is_refused(change, text):
    projections, flats, darks, _ = raw(1.0, 8)
    with pytest.raises(InputError, match=text):
        photon_counts(*change(projections, flats, darks))


def scan(axis: float, angles: np.ndarray, columns: int = 61) -> torch.Tensor:
    """Two off-centre discs, seen by a detector whose column ``axis`` lies on the axis of rotation."""
    n, pixel = 48, 1e-3
    space = Space.grid((n, n), pixel, "1/m")
    y, x = np.meshgrid(space.coords["y"], space.coords["x"], indexing="ij")
    image = 20.0 * (np.hypot(x - 8e-3, y - 3e-3) < 7e-3) + 35.0 * (np.hypot(x + 9e-3, y + 8e-3) < 4e-3)
    offset = ((columns - 1) / 2 - axis) * pixel
    operator = ParallelBeam(space, angles, columns, pixel, offset, "strip")
    return operator.A(torch.from_numpy(image.astype(np.float32)))


@pytest.mark.parametrize("axis", [30.0, 27.3, 33.65])
def test_the_axis_is_found_to_a_tenth_of_a_column(axis):
    turn = np.arange(120) * (2 * math.pi / 120)
    assert rotation_axis(scan(axis, turn), turn) == pytest.approx(axis, abs=0.1)
    half = np.linspace(0, math.pi, 61)
    assert rotation_axis(scan(axis, half), half) == pytest.approx(axis, abs=0.1)


def test_rows_are_taken_together():
    half = np.linspace(0, math.pi, 31)
    y = scan(28.4, half)
    rows = torch.stack([torch.zeros_like(y), y, 0.3 * y], dim=1)
    assert rotation_axis(rows, half) == pytest.approx(28.4, abs=0.1)


def test_without_opposite_views_there_is_no_answer():
    wedge = np.linspace(0, 2.0, 41)
    with pytest.raises(InputError, match="half a turn apart"):
        rotation_axis(scan(30.0, wedge), wedge)
