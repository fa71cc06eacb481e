"""The checks of samplers pass what is right and catch what is wrong."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

import recon
from recon.checks import check_resume, check_sampler
from recon.errors import CheckFailed, InputError
from recon.operators import CG, MatrixOperator, ParallelBeam
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.samplers import DPS, METHODS, MMPS, DiffPIR, State
from recon.schedules import LogLinear
from recon.selftest import SamplerFigures, _coverage, check_mixture, mixture_draws, mixture_problem, sliced_wasserstein
from tests.bounds import normal_bound

EXACT = MMPS(steps=200, grid=LogLinear(), cg=CG(10, 1e-8))


def test_mmps_keeps_its_claim_on_a_matrix_and_on_a_scan() -> None:
    for operator in (None, ParallelBeam.half_turn((6, 6), 1e-3, 4)):
        figures = check_sampler(EXACT, operator, draws=1000)
        assert figures.bias < figures.bias_limit < 0.2


def test_a_heuristic_is_measured_not_judged() -> None:
    figures = check_sampler(DPS(steps=300, grid=LogLinear()), draws=1000)
    assert figures.bias > figures.bias_limit


@dataclass(frozen=True)
class Overconfident(MMPS):
    """Trusts the data twice as much as it may."""

    def guide(self, posterior: recon.Posterior, z: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        like = posterior.likelihood.gaussian()
        doubled = recon.Posterior(posterior.prior, type(like)(like.operator, like.y, like.sigma / 2**0.5))
        return super().guide(doubled, z, sigma, sigma_next)


@dataclass(frozen=True)
class Shifted(MMPS):
    """Adds a fifth of a unit to every draw."""

    def finish(self, posterior: recon.Posterior, state: State) -> recon.Ensemble:
        return super().finish(posterior, dataclasses.replace(state, z=state.z + 0.2))


@pytest.mark.parametrize(("wrong", "text"), [(Overconfident, "claims to be exact"), (Shifted, "mean off by 0")])
def test_a_false_claim_is_caught(wrong: type[MMPS], text: str) -> None:
    with pytest.raises(CheckFailed, match=text):
        check_sampler(wrong(steps=200, grid=LogLinear(), cg=CG(10, 1e-8)), draws=2000)


def test_a_large_operator_is_refused() -> None:
    with pytest.raises(InputError, match="<= 1024 values"):
        check_sampler(EXACT, MatrixOperator(torch.ones(1, 2000, dtype=torch.float64)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_same_bits(method: str) -> None:
    assert check_resume(METHODS[method](steps=8)) == 4


@dataclass(frozen=True)
class Forgetful(MMPS):
    """Keeps its previous state on itself instead of in ``State.aux``."""

    memory: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def step(self, posterior: recon.Posterior, state: State, k: int, draws: recon.Draws) -> State:
        after = super().step(posterior, state, k, draws)
        before = self.memory.get(draws.members[0], after.z)
        self.memory[draws.members[0]] = after.z
        return dataclasses.replace(after, z=0.9 * after.z + 0.1 * before)


def test_hidden_state_is_caught() -> None:
    with pytest.raises(CheckFailed, match="not in its State"):
        check_resume(Forgetful(steps=8))


def test_the_figures_say_how_well_intervals_cover_and_what_it_took() -> None:
    """Exact draws cover 50 and 90 % to Monte Carlo and the ancestral deficit; narrowed ones do not."""
    good = check_sampler(EXACT, draws=1000)
    narrow = check_sampler(DPS(steps=100, grid=LogLinear()), draws=1000)
    assert good.verdict == "exact" and narrow.verdict == "biased-as-documented"
    # A quantile of 1000 draws is off by 0.016 in probability; the variance is low by 8 % at most, so widths by 4 %.
    assert abs(good.coverage[0] - 0.5) < 0.03 and abs(good.coverage[1] - 0.9) < 0.03
    assert narrow.coverage[1] < good.coverage[1] - 0.02
    assert good.cost["denoiser"] == 200 * 1000 and good.cost["seconds"] > 0
    limits = (0.9, 1.1)
    assert SamplerFigures(0.5, 0.1, 1.0, limits, 9, claim="exact").verdict == "wrong"
    assert SamplerFigures(0.05, 0.1, 1.0, limits, 9, claim="consistent").verdict == "consistent"
    assert SamplerFigures(0.05, 0.1, 1.3, limits, 9, claim="consistent").verdict == "biased-as-documented"


def test_coverage_is_the_exact_probability_of_the_interval() -> None:
    """Draws at the quantiles of N(2, 9) cover what they say; shrunk to half, Phi(1.645 / 2) on both sides."""
    exact = GaussianPrior(torch.tensor([2.0]).double(), torch.tensor([9.0]).double())
    z = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    for shrink in (1.0, 0.5):
        ensemble = recon.Ensemble(2 + 3 * shrink * z, exact.space)
        expected = math.erf(shrink * 1.6448536 / math.sqrt(2))
        assert _coverage(ensemble, exact, 0.9) == pytest.approx(expected, abs=1e-3)


def test_the_mixture_problem_is_the_published_one() -> None:
    posterior = mixture_problem(unknowns=6, data=3, seed=4)
    prior, like = posterior.prior, posterior.likelihood.gaussian()
    assert isinstance(prior, GaussianMixturePrior)
    assert prior.means.shape == (25, 6)
    assert torch.equal(prior.means[:, 0::2], prior.means[:, :1].expand(25, 3))
    assert set(prior.means[:, 1].tolist()) == {-16.0, -8.0, 0.0, 8.0, 16.0}
    values = torch.linalg.svdvals(like.operator.matrix)
    assert 0 < float(values.min()) and float(values.max()) < 1 and 0 < float(like.sigma) < float(values.max())
    with pytest.raises(InputError, match="1 to 6 data"):
        mixture_problem(6, 7)


def test_exact_draws_of_a_mixture_have_its_moments() -> None:
    narrow = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 2.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    exact = GaussianMixturePrior(means, torch.stack([narrow, 0.25 * narrow]), torch.tensor([0.3, 0.7]).double())
    n = 20_000
    draws, weights = mixture_draws(exact, n), exact.log_weights.exp()
    mean = weights @ exact.means
    spread = sum(
        w * (exact.covariance(k) + torch.outer(m - mean, m - mean))
        for k, (w, m) in enumerate(zip(weights, exact.means, strict=True))
    )
    assert float(((draws.mean(0) - mean) / (spread.diagonal() / n).sqrt()).abs().max()) < normal_bound(3)
    assert float((torch.cov(draws.T) - spread).abs().max() / spread.abs().max()) < 0.05


def test_the_sliced_distance_of_a_shift_is_its_mean_projection() -> None:
    """``|shift| Gamma(d/2) / (sqrt(pi) Gamma((d + 1)/2))``, to the Monte Carlo of the directions."""
    a = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([3.0, 0, -4, 0, 0], dtype=torch.float64)
    expected = 5 * math.gamma(2.5) / (math.sqrt(math.pi) * math.gamma(3))
    deviation = 5 * math.sqrt(1 / 5 - (expected / 5) ** 2)
    assert abs(sliced_wasserstein(a + shift, a, 4000) - expected) < normal_bound() * deviation / math.sqrt(4000)
    with pytest.raises(InputError, match="as many points"):
        sliced_wasserstein(a, a[1:])


def test_a_mixture_tells_an_exact_sampler_from_a_heuristic_one() -> None:
    figures = check_mixture(MMPS(steps=60, cg=CG(3, 1e-8)), 4, 2, draws=400, directions=500)
    other = check_mixture(DiffPIR(steps=60, lam=7.0), 4, 2, draws=400, directions=500)
    print("sliced distance: MMPS", figures, "DiffPIR", other)
    assert 0 < figures.floor < 1.5
    assert figures.distance < other.distance
