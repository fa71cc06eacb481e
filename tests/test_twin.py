"""The Gaussian twin of a problem: drawn from exactly, whatever its size, and used to measure samplers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from recon.draws import Draws
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.priors import Card, GaussianPrior
from recon.priors.base import Prior
from recon.priors.stationary import InLatentOf, StationaryPrior, spectrum_of
from recon.samplers import DPS, MMPS, DiffPIR, SASolver
from recon.samplers.base import Claim
from recon.schedules import LogLinear, Schedule
from recon.space import Space
from recon.twin import check_twin, exact_draws, exact_mean, gaussian_twin
from tests.bounds import chi2_bounds, normal_bound

SPACE = Space.grid((6, 8), 1.0, "1/m")
SHIFT, SCALE = 3.0, 2.0


class Pixels(Prior):
    """Any prior with an affine decoder; the twin takes its space and units."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64


def stationary() -> StationaryPrior:
    y, x = torch.fft.fftfreq(6, dtype=torch.float64), torch.fft.fftfreq(8, dtype=torch.float64)
    spectrum = 1 / (0.02 + y[:, None] ** 2 + x[None] ** 2)
    return StationaryPrior(torch.full((6, 8), 0.3, dtype=torch.float64), spectrum / spectrum.mean(), SPACE)


def problem(sigma: float = 0.8) -> Posterior:
    generator = torch.Generator().manual_seed(0)
    operator = MatrixOperator(torch.randn(20, 48, generator=generator, dtype=torch.float64), SPACE)
    prior = Pixels(SPACE, Schedule(1e-3, 300.0), Card("pixels"), shift=SHIFT, scale=SCALE)
    return Posterior(prior, GaussianLikelihood(operator, torch.zeros(20, dtype=torch.float64), sigma))


def dense_prior(prior: StationaryPrior) -> GaussianPrior:
    covariance = prior.spread(torch.eye(48, dtype=torch.float64).reshape(48, 6, 8)).flatten(1)
    return GaussianPrior(SHIFT + SCALE * prior.mean.flatten(), SCALE**2 * covariance, SPACE)


def test_the_denoiser_is_that_of_the_dense_gaussian() -> None:
    prior = stationary()
    covariance = prior.spread(torch.eye(48, dtype=torch.float64).reshape(48, 6, 8)).flatten(1)
    dense = GaussianPrior(prior.mean.flatten(), covariance, SPACE)
    z = torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    assert torch.allclose(prior.denoise(z, sigma), dense.denoise(z, sigma), atol=1e-12)


def test_mean_and_draws_are_those_of_the_closed_form() -> None:
    twin, prior = gaussian_twin(problem(), stationary()), stationary()
    exact = Posterior(dense_prior(prior), twin.likelihood).exact()
    assert isinstance(exact, GaussianPrior)
    tight, n = CG(200, 1e-12), 400
    assert torch.allclose(exact_mean(twin, tight).flatten(), exact.mean, atol=1e-9)
    away = exact_draws(twin, n, cg=tight).flatten(1) - exact.mean
    covariance = exact.covariance()
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), away.T, upper=False)
    low, high = chi2_bounds(n * 48)
    assert low < float(white.square().mean()) < high
    assert float(white.mean(1).abs().max()) * n**0.5 < normal_bound(48)
    # Each direction by itself: a draw that is too wide in one and too narrow in another has the right total.
    low, high = chi2_bounds(n)
    assert low < float(white.square().mean(1).min()) and float(white.square().mean(1).max()) < high


def test_data_are_simulated_from_the_twin_itself() -> None:
    """The truth of the twin lies within its posterior: ``(y - B m)^T (B C B^T + I)^-1 (y - B m)`` is chi-squared."""
    total = 0.0
    for seed in range(30):
        twin = gaussian_twin(problem(), stationary(), seed)
        prior = dense_prior(stationary())
        operator = twin.likelihood.operator
        assert isinstance(operator, MatrixOperator)
        spread = operator.matrix @ prior.covariance() @ operator.matrix.T + 0.64 * torch.eye(20, dtype=torch.float64)
        gap = twin.likelihood.gaussian().y - operator.matrix @ prior.mean
        total += float(gap @ torch.linalg.solve(spread, gap))
    low, high = chi2_bounds(30 * 20)
    assert low < total / 600 < high


FINE = MMPS(steps=80, cg=CG(60, 1e-8), transition=SASolver(), grid=LogLinear())


def test_an_exact_sampler_is_found_exact() -> None:
    figures = check_twin(problem(), stationary(), FINE, draws=300)
    assert figures.verdict == "exact"
    assert figures.coverage[0] == pytest.approx(0.5, abs=0.03) and figures.coverage[1] == pytest.approx(0.9, abs=0.02)
    assert figures.cost["denoiser"] == 300 * 80


@dataclass(frozen=True)
class Narrow(MMPS):
    """Draws with nine tenths of the standard deviation."""

    def finish(self, posterior, state):
        ensemble = super().finish(posterior, state)
        mean = ensemble.x.mean(0)
        return type(ensemble)(mean + 0.8 * (ensemble.x - mean), ensemble.space, ensemble.log_weights)


@dataclass(frozen=True)
class Off(MMPS):
    """Draws half a standard deviation away in one direction that the data see."""

    amount: float = 0.5

    def finish(self, posterior, state):
        ensemble = super().finish(posterior, state)
        direction = posterior.likelihood.operator.A_adjoint(torch.ones(1, 20, dtype=torch.float64))
        return type(ensemble)(
            ensemble.x + self.amount * direction / direction.norm(), ensemble.space, ensemble.log_weights
        )


@dataclass(frozen=True)
class Modest(Narrow):
    claim: ClassVar[Claim] = "heuristic"


@pytest.mark.parametrize("sampler", [Narrow, Off])
def test_a_false_claim_is_found_out(sampler: type[MMPS]) -> None:
    fields = {"steps": 80, "cg": CG(60, 1e-8), "transition": SASolver(), "grid": LogLinear()}
    figures = check_twin(problem(), stationary(), sampler(**fields), draws=150)
    assert figures.verdict == "wrong"
    if sampler is Narrow:
        assert figures.variance_ratio == pytest.approx(0.64, rel=0.15)
        assert figures.coverage[1] < 0.87
        assert check_twin(problem(), stationary(), Modest(**fields), draws=150).verdict == "biased-as-documented"
    else:
        assert figures.bias_data > figures.bias_data_limit


def test_heuristics_are_measured() -> None:
    assert check_twin(problem(3.0), stationary(), DPS(steps=300), draws=64).verdict == "biased-as-documented"
    assert check_twin(problem(), stationary(), DiffPIR(steps=40), draws=64).bias > 0


def test_the_spectrum_of_draws_is_found_again() -> None:
    white = StationaryPrior(torch.full((6, 8), 0.3, dtype=torch.float64), torch.ones(6, 8, dtype=torch.float64), SPACE)
    found = spectrum_of(white.exact(Draws(0, range(600))), SPACE)
    low, high = chi2_bounds(600)  # the smallest ring holds one coefficient of 600 images
    assert low < float(found.spectrum.min()) and float(found.spectrum.max()) < high
    assert float(found.mean[0, 0]) == pytest.approx(0.3, abs=normal_bound() / (48 * 600) ** 0.5)
    coloured = spectrum_of(stationary().exact(Draws(0, range(600))), SPACE).spectrum
    assert bool((coloured[0, :4] > coloured[0, 1:5]).all())  # falls with frequency, as it should


def test_it_refuses() -> None:
    with pytest.raises(InputError, match="a spectrum must be positive"):
        StationaryPrior(torch.zeros(6, 8), torch.zeros(6, 8), SPACE)
    lopsided = torch.ones(6, 8)
    lopsided[1, 0] = 2
    with pytest.raises(InputError, match="equal at opposite frequencies"):
        StationaryPrior(torch.zeros(6, 8), lopsided, SPACE)
    with pytest.raises(InputError, match="mean must be an image"):
        StationaryPrior(torch.zeros(5, 8), torch.ones(6, 8), SPACE)
    with pytest.raises(InputError, match="two or more images"):
        spectrum_of(torch.zeros(1, 6, 8), SPACE)
    other = Space.grid((4, 4), 1.0, "1/m")
    small = StationaryPrior(torch.zeros(4, 4), torch.ones(4, 4), other)
    with pytest.raises(InputError, match="are \\(6, 8\\); got a prior of \\(4, 4\\)"):
        InLatentOf(small, problem().prior)


def test_a_batch_changes_nothing() -> None:
    prior, z = stationary(), torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone: Tensor = prior.denoise(z[1:2], 0.7)
    assert torch.equal(prior.denoise(z, 0.7)[1:2], alone)
