"""Groups and lags of residuals: right for exact draws, and they name what is wrong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from recon.diagnostics import data_fit
from recon.diagnostics.residuals import Look, group_fit, whiteness
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import MatrixOperator
from recon.space import Space

COILS, KY, KX, D = 4, 6, 8, 10
RANGE = Space(("coil", "ky", "kx"), (COILS, KY, KX), {"coil": ("a", "b", "c", "d")})
SIZE = COILS * KY * KX
MATRIX = np.random.default_rng(0).normal(size=(SIZE, D)) / math.sqrt(D)
SIGMA = 0.3
COVARIANCE = np.linalg.inv(np.eye(D) + MATRIX.T @ MATRIX / SIGMA**2)


def problem(seed, draws=4, add=0.0):
    """A likelihood and draws of its exact posterior; ``add`` goes into the data unknown to the model."""
    rng = np.random.default_rng(seed)
    y = MATRIX @ rng.normal(size=D) + SIGMA * rng.normal(size=SIZE)
    x = rng.multivariate_normal(COVARIANCE @ MATRIX.T @ y / SIGMA**2, COVARIANCE, size=draws)
    data = torch.tensor(y).reshape(RANGE.shape) + add
    like = GaussianLikelihood(MatrixOperator(torch.tensor(MATRIX), range=RANGE), data, SIGMA)
    return like, Ensemble(torch.tensor(x), Space.vector(D))


@pytest.mark.parametrize("dim", ["coil", "ky", "kx"])
def test_groups_add_up_to_the_whole(dim):
    like, ensemble = problem(0)
    found, whole = group_fit(like, ensemble, dim), data_fit(like, ensemble)
    assert float(found.ratio.mean()) == pytest.approx(whole.ratio, rel=1e-9)
    k = SIZE / len(found.ratio)
    assert torch.allclose(found.sd, torch.full_like(found.sd, math.sqrt(2 / k)))
    assert float(found.high[0]) == pytest.approx(
        stats.chi2.isf(1e-3 / (2 * math.e * len(found.ratio)), k) / k, rel=1e-6
    )
    if dim == "coil":
        assert torch.allclose(found.ratio, whole.per_view)
        assert found.labels == ("a", "b", "c", "d")
    assert json.loads(json.dumps(found.summary()))["dim"] == dim


def test_exact_draws_are_blamed_as_rarely_as_stated():
    groups = [group_fit(*problem(seed), "coil", 0.05).outside for seed in range(100)]
    assert sum(g != () for g in groups) <= stats.binom.isf(1e-5, 100, 0.05)
    p = [whiteness(*problem(seed, 1), look=Look(1, 199, seed)).p for seed in range(60)]
    assert stats.kstest(p, "uniform").pvalue > 1e-5
    several = [whiteness(*problem(seed), 0.05, Look(4, 199, seed)).white for seed in range(25)]
    assert several.count(False) <= stats.binom.isf(1e-5, 25, 0.05)


def test_a_bad_coil_is_named():
    add = torch.zeros(RANGE.shape).double()
    add[2] = 2 * SIGMA * torch.tensor(np.random.default_rng(1).normal(size=(KY, KX)))
    assert group_fit(*problem(1, add=add), "coil").outside == (2,)


def test_structure_is_noticed_that_chi2_averages_away():
    wave = torch.cos(torch.arange(KX) * math.pi / 3).double().expand(RANGE.shape)
    like, ensemble = problem(2, add=0.6 * SIGMA * wave)
    found = whiteness(like, ensemble)
    assert data_fit(like, ensemble).verdict == "fits"
    assert found.white is False
    assert found.p < 0.01
    assert found.ratio > 1.2 * found.expected
    clean = whiteness(*problem(2))
    assert clean.white is True
    assert clean.ratio == pytest.approx(clean.expected, rel=0.3)


def test_the_ratio_is_the_sum_over_lags_by_hand():
    from recon.diagnostics.residuals import _ratios

    r = np.random.default_rng(3).normal(size=(5, 6))
    c = np.array(
        [
            (
                r[max(0, a) : 5 + min(0, a), max(0, b) : 6 + min(0, b)]
                * r[max(0, -a) : 5 - max(0, a), max(0, -b) : 6 - max(0, b)]
            ).sum()
            for a in range(-4, 5)
            for b in range(-5, 6)
        ]
    )
    expected = ((c**2).sum() - (r**2).sum() ** 2) / (r**2).sum() ** 2
    assert float(_ratios(torch.tensor(r)[None], 2)[0]) == pytest.approx(expected, rel=1e-10)


def test_data_that_were_not_measured_do_not_count():
    like, ensemble = problem(4)
    matrix, y = MATRIX.copy().reshape(*RANGE.shape, D), like.y.clone()
    matrix[:, ::2], y[:, ::2] = 0.0, 0.0
    matrix[1], y[1] = 0.0, 0.0
    half = GaussianLikelihood(MatrixOperator(torch.tensor(matrix.reshape(SIZE, D)), range=RANGE), y, SIGMA)
    found = group_fit(half, ensemble, "coil")
    assert math.isnan(float(found.ratio[1]))
    assert found.summary()["ratio"][1] is None
    assert float(found.sd[0]) == pytest.approx(math.sqrt(2 / (KY * KX / 2)))
    assert found.outside == ()
    assert whiteness(half, ensemble).white is True


def test_complex_data_and_counts():
    rng = np.random.default_rng(5)
    space = Space(("coil", "k"), (3, 16), {}, "1", True)
    matrix = torch.complex(*torch.tensor(rng.normal(size=(2, 48, 2))))
    x = torch.tensor(rng.normal(size=2))
    noise = torch.complex(*torch.tensor(rng.normal(size=(2, 3, 16))))
    operator = MatrixOperator(matrix, None, space)
    like = GaussianLikelihood(operator, operator.A(x) + 0.1 * noise, 0.1)
    found = group_fit(like, Ensemble(x[None], Space.vector(2)), "coil")
    assert float(found.sd[0]) == pytest.approx(math.sqrt(2 / 32))
    assert found.outside == ()
    assert whiteness(like, Ensemble(x[None], Space.vector(2))).white is True
    rates = torch.tensor(rng.uniform(5, 20, size=(48, 2)))
    counts = torch.tensor(rng.poisson((rates @ x.abs()).numpy())).double().reshape(3, 16)
    counted = PoissonLikelihood(MatrixOperator(rates, range=Space(("view", "bin"), (3, 16))), counts)
    views = group_fit(counted, Ensemble(x.abs()[None], Space.vector(2)), "view")
    assert views.outside == ()


def test_weights_and_blocks(monkeypatch):
    like, ensemble = problem(6, 9)
    weighted = Ensemble(ensemble.x, ensemble.space, torch.linspace(0, 3, 9))
    whole = group_fit(like, weighted, "ky")
    monkeypatch.setattr("recon.diagnostics.residuals.BLOCK", 2)
    assert torch.allclose(group_fit(like, weighted, "ky").ratio, whole.ratio, rtol=1e-12)
    alone = Ensemble(ensemble.x, ensemble.space, torch.where(torch.arange(9) == 4, 0.0, -torch.inf))
    assert torch.allclose(
        group_fit(like, alone, "ky").ratio, group_fit(like, Ensemble(ensemble.x[4:5], ensemble.space), "ky").ratio
    )


def test_bad_input_is_said_in_words():
    like, ensemble = problem(7)
    with pytest.raises(InputError, match="no dim 'view'; it has coil, ky, kx"):
        group_fit(like, ensemble, "view")
    with pytest.raises(InputError, match="false_alarm"):
        group_fit(like, ensemble, "ky", 0.0)
    with pytest.raises(InputError, match="not on the operator's domain"):
        whiteness(like, Ensemble(torch.zeros(2, D + 1).double(), Space.vector(D + 1)))
    with pytest.raises(InputError, match="cannot reach a rate"):
        whiteness(like, ensemble, 0.001)
    broken = whiteness(like, Ensemble(ensemble.x * torch.nan, ensemble.space))
    assert broken.white is None
    assert "not finite" in broken.reason
    assert broken.summary()["p"] is None
    tiny = GaussianLikelihood(MatrixOperator(torch.ones(2, 1).double()), torch.zeros(2).double(), 1.0)
    assert "too few" in whiteness(tiny, Ensemble(torch.ones(2, 1).double(), Space.vector(1))).reason


def test_a_list_of_data_is_its_own_groups():
    like, ensemble = problem(0)
    flat = GaussianLikelihood(MatrixOperator(torch.tensor(MATRIX)), like.y.flatten(), SIGMA)
    space = flat.operator.range
    found = group_fit(flat, ensemble, space.dims[0])
    r = (flat.y - ensemble.x @ torch.tensor(MATRIX).T) / SIGMA
    assert torch.allclose(found.ratio, r.square().mean(0), rtol=1e-9)
