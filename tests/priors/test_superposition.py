"""Mixtures are exact; sums of scores have the bias that is stated."""

from __future__ import annotations

import pytest
import torch

from recon.errors import InputError
from recon.priors import Card, GaussianMixturePrior, GaussianPrior, NetworkPrior
from recon.priors.superposition import Mixture, ScoreSum, log_density
from recon.schedules import LogLinear, Schedule
from recon.space import Space

SPACE, LEVELS = Space(("y", "x"), (2, 3)), Schedule(0.01, 50.0)


def covariance(seed):
    factor = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / 6 + 0.2 * torch.eye(6, dtype=torch.float64)


def mean(seed):
    return torch.randn(6, generator=torch.Generator().manual_seed(50 + seed), dtype=torch.float64)


def gaussian(seed, schedule=LEVELS):
    return GaussianPrior(mean(seed), covariance(seed), SPACE, schedule)


def several(seeds, weights):
    weights = torch.tensor(weights, dtype=torch.float64)
    means, matrices = torch.stack([mean(s) for s in seeds]), torch.stack([covariance(s) for s in seeds])
    return GaussianMixturePrior(means, matrices, weights / weights.sum(), SPACE, LEVELS)


def states(n=5):
    return 1.5 * torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


SIGMAS = torch.tensor([0.02, 0.3, 1.0, 4.0, 45.0], dtype=torch.float64)
CASES = {
    "two": (lambda: Mixture([gaussian(1), gaussian(2)], [0.3, 0.7]), lambda: several((1, 2), (0.3, 0.7))),
    "equal": (lambda: Mixture([gaussian(s) for s in range(4)]), lambda: several(range(4), (1.0,) * 4)),
    "nested": (
        lambda: Mixture([several((1, 2), (0.5, 0.5)), Mixture([gaussian(3), gaussian(4)], [0.1, 0.9])], [0.2, 0.8]),
        lambda: several((1, 2, 3, 4), (0.1, 0.1, 0.08, 0.72)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_mixture_of_gaussians_is_the_gaussian_mixture(case):
    made, exact = (make() for make in CASES[case])
    z = states()
    # Sums of 36 products and exponentials of numbers below 1e4 (at the lowest level), whose last bits move the shares.
    torch.testing.assert_close(made.denoise(z, SIGMAS), exact.denoise(z, SIGMAS), rtol=0, atol=1e-11)
    torch.testing.assert_close(log_density(made, z, SIGMAS), log_density(exact, z, SIGMAS), rtol=1e-12, atol=1e-11)
    shares = made.shares(z, SIGMAS)
    torch.testing.assert_close(shares.sum(1), torch.ones(5).double())


@pytest.mark.parametrize("make", [lambda: gaussian(1), lambda: several((1, 2), (0.4, 0.6)), CASES["two"][0]])
def test_log_densities_are_those_of_the_blurred_prior(make):
    """Tweedie: ``D = z + sigma^2 grad log q``; and the density itself against torch.distributions."""
    prior, z = make(), states().requires_grad_()
    log_q = log_density(prior, z, SIGMAS)
    (score,) = torch.autograd.grad(log_q.sum(), z)
    expected = z + SIGMAS[:, None, None] ** 2 * score
    torch.testing.assert_close(prior.denoise(z, SIGMAS), expected, rtol=1e-9, atol=1e-9)
    if isinstance(prior, GaussianPrior):
        blurred = [covariance(1) + s**2 * torch.eye(6).double() for s in SIGMAS]
        exact = [
            torch.distributions.MultivariateNormal(mean(1), c).log_prob(row.flatten())
            for c, row in zip(blurred, z, strict=True)
        ]
        torch.testing.assert_close(log_q, torch.stack(exact))


def test_shares_far_away_are_still_shares():
    prior = Mixture([gaussian(1), gaussian(2)]).float()
    z = 1e4 * states().float()
    shares = prior.shares(z, torch.full((5,), 0.01))
    assert bool(shares.isfinite().all())
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    assert bool(prior.denoise(z, 0.01).isfinite().all())


def test_a_gate_stands_in_for_densities():
    parts, z = [gaussian(1), gaussian(2)], states()

    def gate(z, sigma):  # a number common to both cancels
        told = torch.stack([log_density(part, z, sigma) for part in parts], 1)
        return told + 17.0 * z.flatten(1).sum(1, keepdim=True)

    made = Mixture(parts, [0.3, 0.7], gate)
    exact = Mixture(parts, [0.3, 0.7])
    torch.testing.assert_close(made.denoise(z, SIGMAS), exact.denoise(z, SIGMAS), rtol=0, atol=1e-11)
    with pytest.raises(InputError, match="knows ratios of densities"):
        log_density(made, z, SIGMAS)
    wrong = Mixture(parts, [0.3, 0.7], lambda z, sigma: z[:, 0])
    with pytest.raises(InputError, match=r"must answer \(5, 2\); it gave \(5, 3\)"):
        wrong.denoise(z, SIGMAS)


def test_a_gate_admits_networks():
    network = torch.nn.Identity()
    network.forward = lambda z, c_noise: 0.5 * z
    parts = [NetworkPrior(SPACE, LEVELS, Card(n), network, sigma_data=s) for n, s in (("one", 0.5), ("two", 1.0))]
    z = states().float()
    made = Mixture(parts, None, lambda z, sigma: torch.zeros(len(z), 2))
    expected = (parts[0].denoise(z, 0.7) + parts[1].denoise(z, 0.7)) / 2
    torch.testing.assert_close(made.denoise(z, 0.7), expected)


@pytest.mark.parametrize("weights", [None, (0.25, 0.75), (1.0, 1.0), (2.0, -0.5)])
def test_a_sum_of_scores_is_the_score_of_the_product_at_each_level(weights):
    made = ScoreSum([gaussian(1), gaussian(2)], weights)
    z = states().requires_grad_()
    log_q = sum(w * log_density(gaussian(s), z, SIGMAS) for w, s in zip(weights or (0.5, 0.5), (1, 2), strict=True))
    (score,) = torch.autograd.grad(log_q.sum(), z)
    expected = z + SIGMAS[:, None, None] ** 2 * score
    torch.testing.assert_close(made.denoise(z, SIGMAS), expected, rtol=1e-9, atol=1e-9)
    assert made.card.facts["claim"].startswith("heuristic")


def test_a_sum_of_one_prior_with_itself_is_exact():
    z = states()
    made = ScoreSum([gaussian(1)] * 3)
    torch.testing.assert_close(made.denoise(z, SIGMAS), gaussian(1).denoise(z, SIGMAS), rtol=1e-13, atol=1e-13)


def test_the_stated_bias_of_a_product_of_gaussians():
    """``-2 z / (c + sigma^2)`` where the product ``N(0, c/2)`` has ``-z / (c/2 + sigma^2)``."""
    c, z = 3.0, torch.tensor([[1.7]], dtype=torch.float64)
    one = GaussianPrior(torch.zeros(1).double(), torch.tensor([c]).double(), None, LEVELS)
    product = GaussianPrior(torch.zeros(1).double(), torch.tensor([c / 2]).double(), None, LEVELS)
    for sigma in (0.01, 1.0, 50.0):
        score = (ScoreSum([one, one], (1.0, 1.0)).denoise(z, sigma) - z) / sigma**2
        true = (product.denoise(z, sigma) - z) / sigma**2
        assert float(score / true) == pytest.approx((c + 2 * sigma**2) / (c + sigma**2), rel=1e-9)


def test_probability_flow_draws_the_geometric_mean_of_covariances():
    """Diagonal covariances commute; Heun's error is that of halving its steps, up to a factor."""
    c = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.2, 1.0]], dtype=torch.float64)
    weights = (0.3, 0.7)
    parts = [GaussianPrior(torch.zeros(3).double(), row, None, Schedule(1e-3, 200.0)) for row in c]
    made = ScoreSum(parts, weights)

    def flow(steps):
        z = torch.full((1, 3), 200.0, dtype=torch.float64)
        sigmas = LogLinear().sigmas(made.schedule, steps).tolist()
        for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
            slope = (z - made.denoise(z, sigma)) / sigma
            guess = z + (lower - sigma) * slope
            if lower > 0:
                slope = (slope + (guess - made.denoise(guess, lower)) / lower) / 2
            z = z + (lower - sigma) * slope
        return z[0].square()

    coarse, fine = flow(200), flow(400)
    expected = c[0] ** weights[0] * c[1] ** weights[1]
    # The start leaves out a share c / 200^2 < 1e-4 of the variance.
    assert bool(((fine - expected).abs() < (fine - coarse).abs() + 2e-4 * expected).all())
    harmonic = 1 / (weights[0] / c[0] + weights[1] / c[1])
    assert bool(((fine - harmonic).abs()[:2] > 0.1 * harmonic[:2]).all())


def network_prior():
    return NetworkPrior(SPACE, LEVELS, Card("ct_axial"), torch.nn.Identity(), sigma_data=0.5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mixture([network_prior(), network_prior()]), r"'ct_axial' \(NetworkPrior\) has no log-density"),
        (lambda: Mixture([gaussian(1), gaussian(2)], [0.5, 0.6]), r"sum to 1; got \[0.5, 0.6\]"),
        (lambda: Mixture([gaussian(1), gaussian(2)], [1.5, -0.5]), "positive and sum to 1"),
        (lambda: Mixture([gaussian(1), gaussian(2)], [1.0]), r"one finite weight per prior, 2; got \[1.0\]"),
        (lambda: ScoreSum([gaussian(1), gaussian(2)], [1.0]), "one finite weight per prior, 2"),
        (lambda: ScoreSum([gaussian(1)], [float("inf")]), "one finite weight per prior"),
        (lambda: Mixture([]), "Mixture needs at least one prior"),
        (lambda: ScoreSum([gaussian(1), gaussian(2, Schedule(60, 70))]), "no noise level suits"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()
