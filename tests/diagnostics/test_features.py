"""The feature test against its normal law, with and without a background that may compensate."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics.features import feature_test, filled
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.operators.base import Operator
from recon.space import Space

SPACE = Space(("y", "x"), (5, 6))
RANGE = Space(("datum",), (20,))
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(20, 30)) / 5
BASE = RNG.normal(size=(5, 6))
SPOT = np.zeros((5, 6))
SPOT[2, 2:4] = 1.0
SIGMA = 0.2


def measured(truth, rng, sigma=SIGMA):
    y = MATRIX @ truth.ravel() + sigma * rng.normal(size=20)
    return GaussianLikelihood(MatrixOperator(torch.tensor(MATRIX), SPACE, RANGE), torch.tensor(y), sigma)


@pytest.mark.parametrize("background", [0.0, 0.3])
@pytest.mark.parametrize(
    "present", [pytest.param(0.0, marks=pytest.mark.slow), 1.0, pytest.param(0.5, marks=pytest.mark.slow)]
)
def test_z_has_its_law(background, present):
    rng = np.random.default_rng(1)
    found = []
    for _ in range(100):
        rest = background * rng.normal(size=(5, 6)) * (SPOT == 0)
        like = measured(BASE + present * SPOT + rest, rng)
        found.append(feature_test(like, BASE + SPOT, BASE, background))
    z, d = np.array([f.z for f in found]), found[0].visibility
    assert abs(z.mean() - present * d) < stats.norm.isf(1e-5 / 24) / math.sqrt(100)
    low, high = stats.chi2.ppf([1e-5 / 24, 1 - 1e-5 / 24], 99) / 99
    assert low < z.var(ddof=1) < high
    amplitude = np.array([f.amplitude for f in found])
    assert amplitude.std(ddof=1) == pytest.approx(found[0].amplitude_error, rel=0.25)


def test_visibility_is_the_closed_form_and_a_free_background_lowers_it():
    like = measured(BASE, np.random.default_rng(2))
    a = MATRIX @ SPOT.ravel()
    outside = MATRIX[:, SPOT.ravel() == 0]
    seen = []
    for tau in (0.0, 0.5):
        s = SIGMA**2 * np.eye(20) + tau**2 * outside @ outside.T
        expected = math.sqrt(a @ np.linalg.solve(s, a))
        found = feature_test(like, BASE + SPOT, BASE, tau)
        residual = like.y.numpy() - MATRIX @ BASE.ravel()
        assert found.visibility == pytest.approx(expected, rel=1e-6)
        assert found.z == pytest.approx(a @ np.linalg.solve(s, residual) / expected, rel=1e-6)
        seen.append(found)
    assert seen[1].visibility < 0.7 * seen[0].visibility
    # With the background fixed the statistic is the change of the misfit.
    d, z = seen[0].visibility, seen[0].z
    assert seen[0].misfit_change == pytest.approx(2 * d * z - d**2, rel=1e-9)


def test_words():
    class Silent:
        def normal(self, size):
            return np.zeros(size)

    def support(truth, sigma=SIGMA):
        return feature_test(measured(truth, Silent(), sigma), BASE + SPOT, BASE).support

    assert support(BASE + SPOT) == "supported"
    assert support(BASE) == "contradicted"
    assert support(BASE - SPOT) == "contradicted"
    assert support(BASE + 3 * SPOT, 0.05) == "partly supported"
    assert support(BASE + 0.5 * SPOT, 0.05) == "partly supported"
    assert support(BASE + SPOT, 5.0) == "not visible"


def test_a_feature_in_the_null_space_is_not_visible():
    direction = np.linalg.svd(MATRIX)[2][-1].reshape(5, 6)
    like = measured(BASE, np.random.default_rng(4))
    found = feature_test(like, BASE + direction, BASE)
    assert found.support == "not visible"
    assert found.visibility < 1e-10
    nothing = GaussianLikelihood(MatrixOperator(torch.zeros(2, 30).double(), SPACE), torch.zeros(2).double(), 1.0)
    blind = feature_test(nothing, BASE + SPOT, BASE)
    assert (blind.support, blind.visibility, blind.z) == ("not visible", 0.0, 0.0)
    assert json.loads(json.dumps(blind.summary(), allow_nan=False))["amplitude"] is None


def test_draws_are_asked_whether_they_have_it():
    like = measured(BASE + SPOT, np.random.default_rng(5))
    draws = np.stack([BASE + SPOT, BASE + 0.9 * SPOT, BASE, BASE - SPOT])
    assert feature_test(like, BASE + SPOT, BASE, draws=draws).draws_with == 0.5
    assert feature_test(like, BASE + SPOT, BASE).draws_with is None


def test_filling_continues_the_surroundings():
    y, x = np.meshgrid(np.arange(8.0), np.arange(9.0), indexing="ij")
    plane = 3 + 2 * y - x
    mask = np.zeros((8, 9), dtype=bool)
    mask[3:6, 2:5] = True
    hole = np.where(mask, 100.0, plane)
    assert np.allclose(filled(hole, mask), plane, atol=1e-6)  # a plane is harmonic
    assert np.array_equal(filled(hole, mask)[~mask], plane[~mask])
    line = filled(np.array([1.0, 9.0, 9.0, 4.0]), np.array([False, True, True, False]))
    assert np.allclose(line, [1, 2, 3, 4], atol=1e-8)
    edge = filled(np.array([9.0, 9.0, 4.0]), np.array([True, True, False]))
    assert np.allclose(edge, 4, atol=1e-8)
    assert filled(torch.zeros(3), torch.tensor([True, False, False])).dtype == torch.float32


def test_bad_input_is_refused_in_words():
    like = measured(BASE, np.random.default_rng(6))
    with pytest.raises(InputError, match="no feature to test"):
        feature_test(like, BASE, BASE)
    with pytest.raises(InputError, match="images are finite and of"):
        feature_test(like, BASE[:2], BASE)
    with pytest.raises(InputError, match="images are finite and of"):
        feature_test(like, BASE * np.nan, BASE)
    with pytest.raises(InputError, match="background is >= 0"):
        feature_test(like, BASE + SPOT, BASE, -1.0)
    for mask in (np.zeros(3, dtype=bool), np.ones(3, dtype=bool), np.zeros(2, dtype=bool), np.array([1, 0, 0])):
        with pytest.raises(InputError, match="a feature is a mask"):
            filled(np.zeros(3), mask)

    class Square(Operator):
        def apply(self, x):
            return x**2

    curved = GaussianLikelihood(Square(SPACE, SPACE), torch.zeros(5, 6).double(), 1.0)
    assert feature_test(curved, BASE + SPOT, BASE).visibility > 0
    with pytest.raises(InputError, match="needs a LinearOperator"):
        feature_test(curved, BASE + SPOT, BASE, 1.0)
