"""Annealed Langevin dynamics: its stationary bias in closed form, and the posterior as its rate falls."""

from __future__ import annotations

import pytest
import torch

import recon
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, PoissonLikelihood
from recon.operators import MatrixOperator
from recon.priors import GaussianPrior
from recon.samplers import Langevin
from recon.selftest import check_resume
from tests.bounds import chi2_bounds, normal_bound
from tests.samplers.probing import end_law, stationary_law
from tests.samplers.problems import RATIOS, scalars, truth

MILD = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def level_law(
    sigma: float, ratios: torch.Tensor, bound: str = "level"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and precision of a level's target for ``scalars``, and the inverse of the bound on its curvature."""
    beta = 1 / (1 + sigma**2 * ratios.max())
    prior = 1 / (1 + sigma**2)
    precision = prior + beta * ratios
    return (
        3 * beta * ratios / precision,
        precision,
        1 / ((sigma**-2 if bound == "level" else prior) + beta * ratios.max()),
    )


@pytest.mark.parametrize("bound", ["level", "local"])
@pytest.mark.parametrize("rate", [0.1, 0.9])
@pytest.mark.parametrize("k", [0, 10, 19])
def test_the_stationary_bias_is_the_closed_form(k: int, rate: float, bound: str) -> None:
    posterior = scalars()
    sampler = Langevin(steps=20, inner=3, rate=rate, bound=bound)  # type: ignore[arg-type]
    mean, q, unit = level_law(sampler.levels(posterior)[k], RATIOS, bound)
    found = stationary_law(posterior, sampler, k)
    torch.testing.assert_close(found[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].diagonal(), 1 / (q * (1 - rate * unit * q / 2)), rtol=1e-6, atol=0)


def test_it_goes_to_the_posterior_as_rate_and_width_fall() -> None:
    posterior = scalars(bottom=1e-3, ratios=MILD)
    expected = truth(posterior)
    errors = []
    for rate, inner, bottom in ((0.5, 8, 0.3), (0.05, 80, 0.05)):
        sampler = Langevin(steps=8, inner=inner, rate=rate, bound="local", sigma_max=5.0, sigma_min=bottom)
        mean, covariance = end_law(posterior, sampler)
        off = float(((mean - expected[0]) / expected[1].diagonal().sqrt()).abs().max())
        errors.append((off, float((covariance.diagonal() / expected[1].diagonal() - 1).abs().max())))
    print("Langevin: mean (posterior sd) and variance off by", errors)
    # Left: sigma^2 (1 + c) = 1.25 % of the target's precision, and rate / 2 = 2.5 % of variance in the stiffest direction.
    assert errors[1][0] < errors[0][0] / 2 and errors[1][1] < errors[0][1] / 2
    assert errors[1][0] < 0.05 and errors[1][1] < 0.05


def test_metropolis_takes_the_bias_away() -> None:
    """At a rate whose bias is large, and with Gaussian priors exactly: to the target of the last level."""
    posterior, n = scalars(ratios=MILD), 2000
    sampler = Langevin(steps=8, inner=25, rate=0.9, metropolis=True, bound="local")
    mean, q, _ = level_law(0.1, MILD)
    draws = recon.sample(posterior, sampler, draws=n)
    error = (draws.mean() - mean) * (q * n).sqrt()
    assert float(error.abs().max()) < normal_bound(4)
    low, high = chi2_bounds(n - 1)
    ratio = draws.std().square() * q
    assert low < float(ratio.min()) and float(ratio.max()) < high
    plain = recon.sample(posterior, Langevin(steps=8, inner=25, rate=0.9, bound="local"), draws=n)
    assert float((plain.std().square() * q).max()) > 1.5 > high  # 1 / (1 - 0.45) in the stiffest


@pytest.mark.parametrize(
    "sampler",
    [
        Langevin(steps=200, inner=1, rule="snr", predictor=True),
        Langevin(steps=60, inner=4, predictor=True, bound="local"),
    ],
)
def test_as_corrector_it_keeps_near_the_posterior(sampler: Langevin) -> None:
    """Heuristic: measured, to half a posterior standard deviation and half its variance.

    In few dimensions the steps of "snr" have heavy tails (one over a squared gradient), so there are 64.
    """
    posterior = scalars(bottom=0.02, ratios=MILD.repeat(16))
    expected = truth(posterior)
    draws = recon.sample(posterior, sampler, draws=200)
    off = (draws.mean() - expected[0]) / expected[1].diagonal().sqrt()
    ratio = draws.std().square() / expected[1].diagonal()
    print(sampler, "mean off by", float(off.abs().max()), "variance", float(ratio.min()), float(ratio.max()))
    assert float(off.abs().max()) < 0.5
    assert 0.5 < float(ratio.min()) and float(ratio.max()) < 1.5


def test_counts_have_their_posterior() -> None:
    """Against the mean and variance on a grid; the curvature changes from place to place."""
    ones = torch.ones(1, dtype=torch.float64)
    prior = GaussianPrior(4 * ones, ones)
    like = PoissonLikelihood(MatrixOperator(torch.ones(1, 1, dtype=torch.float64)), torch.tensor([30.0]).double(), 5.0)
    x = torch.linspace(0.5, 12, 4001, dtype=torch.float64)[:, None]
    weight = torch.softmax(like.log_prob(x) - 0.5 * (x[:, 0] - 4) ** 2, 0)
    mean = float((weight * x[:, 0]).sum())
    variance = float((weight * (x[:, 0] - mean) ** 2).sum())
    n = 1000
    sampler = Langevin(steps=8, inner=20, rate=0.8, metropolis=True, bound="local", sigma_max=10.0, sigma_min=0.05)
    draws = recon.sample(recon.Posterior(prior, like), sampler, draws=n)
    # sigma_min widens the prior's variance by 0.25 % and the data's by 0.3 %.
    assert abs(float(draws.mean()) - mean) < normal_bound() * (variance / n) ** 0.5 + 0.005
    low, high = chi2_bounds(n - 1)
    assert low - 0.005 < float(draws.std()) ** 2 / variance < high + 0.005


@pytest.mark.parametrize(
    "sampler",
    [
        Langevin(steps=6, inner=3),
        Langevin(steps=6, inner=3, metropolis=True, bound="local"),
        Langevin(steps=6, inner=2, rule="snr", predictor=True),
    ],
)
def test_a_draw_alone_is_the_draw_in_company(sampler: Langevin) -> None:
    posterior = scalars()
    together, alone = (recon.sample(posterior, sampler, draws=5, seed=2, block=b).x for b in (5, 1))
    assert torch.equal(together, alone)
    assert float((together[0] - together[1]).abs().min()) > 0


def test_a_stop_leaves_no_trace() -> None:
    assert check_resume(Langevin(steps=6, inner=2, rule="snr", predictor=True)) == 3
    assert check_resume(Langevin(steps=6, inner=2, metropolis=True)) == 3


def test_it_refuses_what_makes_no_sense() -> None:
    posterior = scalars()
    for sampler in (Langevin(rule="snr"), Langevin(rule="snr", predictor=True, metropolis=True)):
        with pytest.raises(InputError, match="set predictor=True"):
            sampler.check(posterior)
    with pytest.raises(InputError, match="0 < rate < 2"):
        Langevin(rate=2.5).check(posterior)
    with pytest.raises(InputError, match="good for noise levels"):
        Langevin(sigma_min=1e-3).check(posterior)
    assert isinstance(posterior.likelihood, GaussianLikelihood)
