"""Closed-form priors: their denoisers are conditional means, their Jacobians conditional covariances."""

from __future__ import annotations

import pytest
import torch

from recon.errors import InputError
from recon.priors import GaussianMixturePrior, GaussianPrior
from recon.space import Space


def covariance(d: int, seed: int) -> torch.Tensor:
    factor = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / d + 0.2 * torch.eye(d, dtype=torch.float64)


def mixture() -> GaussianMixturePrior:
    means = torch.tensor([[-2.0, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    return GaussianMixturePrior(means, torch.stack([covariance(3, 1), covariance(3, 2)]), weights)


@pytest.mark.parametrize("full", [False, True])
def test_gaussian_denoiser_is_the_conditional_mean(full: bool) -> None:
    mean, matrix = torch.arange(3.0).double(), covariance(3, 0)
    matrix = matrix if full else torch.diag(matrix.diagonal())
    prior = GaussianPrior(mean, matrix if full else matrix.diagonal())
    z = torch.randn(4, 3, dtype=torch.float64)
    gain = matrix @ torch.linalg.inv(matrix + 0.49 * torch.eye(3).double())
    torch.testing.assert_close(prior.denoise(z, 0.7), mean + (z - mean) @ gain.T)
    torch.testing.assert_close(prior.covariance(), matrix)


def test_mixture_denoiser_is_tweedies() -> None:
    """``D = z + sigma^2 grad log p_sigma(z)``, with the density of the blurred mixture from torch.distributions."""
    prior, sigma = mixture(), 0.8
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    parts = [
        torch.distributions.MultivariateNormal(m, prior.covariance(k) + sigma**2 * torch.eye(3).double()).log_prob(z)
        for k, m in enumerate(prior.means)
    ]
    log_p = torch.logsumexp(torch.stack(parts) + prior.log_weights[:, None], 0)
    (score,) = torch.autograd.grad(log_p.sum(), z)
    torch.testing.assert_close(prior.denoise(z, sigma), z + sigma**2 * score)
    torch.testing.assert_close(prior.log_prob(z), torch.logsumexp(torch.stack([
        torch.distributions.MultivariateNormal(m, prior.covariance(k)).log_prob(z) for k, m in enumerate(prior.means)
    ]) + prior.log_weights[:, None], 0))  # fmt: skip


def test_jacobian_is_symmetric_and_positive() -> None:
    prior = mixture()
    jacobian = torch.autograd.functional.jacobian(lambda z: prior.denoise(z[None], 0.5)[0], torch.randn(3).double())
    torch.testing.assert_close(jacobian, jacobian.T)
    assert float(torch.linalg.eigvalsh(jacobian).min()) > 0


def test_one_component_is_the_gaussian() -> None:
    z = torch.randn(4, 3, dtype=torch.float64)
    mean = torch.randn(3, dtype=torch.float64)
    one = GaussianMixturePrior(mean[None], covariance(3, 0))
    torch.testing.assert_close(one.denoise(z, 0.3), GaussianPrior(mean, covariance(3, 0)).denoise(z, 0.3))


def test_each_draw_has_its_own_noise_level() -> None:
    prior, z = mixture(), torch.randn(2, 3, dtype=torch.float64)
    both = prior.denoise(z, torch.tensor([0.1, 3.0]).double())
    torch.testing.assert_close(both[1:], prior.denoise(z[1:], 3.0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GaussianPrior(torch.zeros(3), torch.zeros(3)), "must be positive definite"),
        (lambda: GaussianPrior(torch.zeros(3), torch.ones(4)), r"shape \(3,\) or \(3, 3\); got \(4,\)"),
        (lambda: GaussianPrior(torch.zeros(3), torch.ones(3), Space.vector(4)), "the mean has 3 values"),
        (lambda: GaussianPrior(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "must be symmetric"),
        (lambda: GaussianMixturePrior(torch.zeros(2, 3), torch.ones(3), torch.tensor([0.5, 0.6])), "with sum 1"),
        (lambda: GaussianMixturePrior(torch.zeros(3), torch.ones(3)), r"means must have shape \(components, d\)"),
        (lambda: mixture().denoise(torch.zeros(3).double(), 1.0), r"takes \(n, "),
        (lambda: mixture().denoise(torch.zeros(2, 3).double(), 0.0), "needs sigma > 0"),
        (lambda: mixture().denoise(torch.zeros(2, 4).double(), 1.0), r"got shape \(2, 4\)"),
    ],
)
def test_refusals(make, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()
