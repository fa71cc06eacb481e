"""Small posteriors that are known exactly, for the tests of samplers."""

from __future__ import annotations

import torch
from torch import Tensor

import recon
from recon.likelihoods import GaussianLikelihood
from recon.operators import MatrixOperator
from recon.operators.algebra import Diagonal
from recon.priors import GaussianPrior
from recon.schedules import Schedule
from recon.space import Space

RATIOS = torch.tensor([0.25, 1.0, 4.0, 100.0], dtype=torch.float64)
"""Signal-to-noise ratios ``a^2 s^2 / sigma_y^2`` of ``scalars``."""


def scalars(top: float = 100.0, bottom: float = 0.1, ratios: Tensor = RATIOS) -> recon.Posterior:
    """Scalar problems side by side: prior N(0, 1), ``y = x + n`` with ``y = 3``; elementwise."""
    space = Space.vector(len(ratios))
    ones = torch.ones(len(ratios), dtype=torch.float64)
    prior = GaussianPrior(0 * ones, ones, space, Schedule(bottom, top))
    return recon.Posterior(prior, GaussianLikelihood(Diagonal(ones, space), 3 * ones, ratios.rsqrt()))


def random_problem(d: int = 3, m: int = 2, sigma: float = 0.3, seed: int = 0) -> recon.Posterior:
    """A correlated Gaussian prior with a mean, seen through a random matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = normal(d, d)
    prior = GaussianPrior(normal(d), factor @ factor.T / d + 0.1 * torch.eye(d, dtype=torch.float64))
    return recon.Posterior(prior, GaussianLikelihood(MatrixOperator(normal(m, d)), normal(m), sigma))


def truth(posterior: recon.Posterior) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a Gaussian posterior."""
    exact = posterior.exact()
    assert isinstance(exact, GaussianPrior)
    return exact.mean, exact.covariance()
