"""Problems whose answers are known, also under the prior of a sampler's own chain of steps."""

from __future__ import annotations

import torch

import recon
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.priors import GaussianMixturePrior, GaussianPrior


def gaussian(d: int = 3, m: int = 1, sigma: float = 0.3, white: bool = False) -> recon.Posterior:
    generator = torch.Generator().manual_seed(d)
    factor = torch.randn(d, d, generator=generator, dtype=torch.float64)
    covariance = torch.eye(d, dtype=torch.float64) if white else factor @ factor.T / d + 0.2 * torch.eye(d).double()
    prior = GaussianPrior(torch.randn(d, generator=generator, dtype=torch.float64), covariance)
    operator = MatrixOperator(torch.randn(m, d, generator=generator, dtype=torch.float64))
    y = torch.randn(m, generator=generator, dtype=torch.float64)
    return recon.Posterior(prior, GaussianLikelihood(operator, y, sigma))


def mixture() -> recon.Posterior:
    """Two modes that one datum leaves both possible."""
    means = torch.tensor([[-2.0, 1.0, 0.0], [2.0, 1.5, 0.5]], dtype=torch.float64)
    prior = GaussianMixturePrior(means, torch.full((3,), 0.25).double(), torch.tensor([0.3, 0.7]).double())
    operator = MatrixOperator(torch.tensor([[0.2, 1.0, -0.5]], dtype=torch.float64))
    return recon.Posterior(prior, GaussianLikelihood(operator, torch.tensor([1.0]).double(), 0.4))


def chain_posterior(posterior: recon.Posterior, sigmas: list[float], eta: float = 1.0) -> recon.Posterior:
    """The same data with the law that the chain gives a Gaussian prior: mean and covariance step by step.

    eta: 1 for the ancestral chain, else that of ``DDSMC``.
    """
    prior = posterior.prior
    assert isinstance(prior, GaussianPrior)
    C, mean0, eye = prior.covariance(), prior.mean, torch.eye(len(prior.mean), dtype=torch.float64)
    gain = C @ torch.linalg.inv(C + sigmas[0] ** 2 * eye)
    mean, covariance = mean0 - gain @ mean0, sigmas[0] ** 2 * eye
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        gone, gain = sigma**2 - after**2, C @ torch.linalg.inv(C + sigma**2 * eye)
        tau = gone / (eta * after**2 + gone)
        slope = (1 - tau) * eye + tau * gain
        mean = slope @ mean + tau * (mean0 - gain @ mean0)
        covariance = slope @ covariance @ slope.T + after**2 * tau * eye
    return recon.Posterior(GaussianPrior(mean, covariance), posterior.likelihood)


def log_evidence(posterior: recon.Posterior) -> float:
    prior, like = posterior.prior, posterior.likelihood.gaussian()
    A, noise = like.operator.matrix, float(like.sigma) ** 2 * torch.eye(len(like.y), dtype=torch.float64)

    def of(mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        return torch.distributions.MultivariateNormal(A @ mean, A @ covariance @ A.T + noise).log_prob(like.y)

    if isinstance(prior, GaussianPrior):
        return float(of(prior.mean, prior.covariance()))
    parts = torch.stack([of(m, prior.covariance(k)) for k, m in enumerate(prior.means)])
    return float(torch.logsumexp(prior.log_weights + parts, 0))
