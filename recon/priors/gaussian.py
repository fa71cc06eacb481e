"""A Gaussian prior: the denoiser, and every posterior under a linear Gaussian likelihood, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.schedules import Schedule
from recon.space import Space


def eigen(covariance: Tensor, d: int) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors (None: the axes) of a diagonal (d,) or full (d, d) covariance.

    Raises InputError when it is not one of the two shapes, not symmetric, or not positive definite.
    """
    if tuple(covariance.shape) == (d,):
        values, vectors = covariance, None
    elif tuple(covariance.shape) == (d, d):
        if not torch.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-10):
            raise InputError("a covariance matrix must be symmetric")
        values, vectors = torch.linalg.eigh(covariance)
    else:
        raise InputError(f"a covariance for {d} numbers has shape ({d},) or ({d}, {d}); got {tuple(covariance.shape)}")
    if not bool((values > 0).all()):
        raise InputError(
            f"a covariance must be positive definite; its smallest eigenvalue is {float(values.min()):.3g}"
        )
    return values, vectors


def covering_schedule(smallest: float, largest: float) -> Schedule:
    """From 1e-3 of the smallest to 1e2 of the largest standard deviation: start and end errors below 1e-4 in variance."""
    return Schedule(1e-3 * smallest, 1e2 * largest)


class GaussianPrior(Prior):
    """``x ~ N(mean, C)``: ``denoise(z, sigma) = mean + C (C + sigma^2 I)^{-1} (z - mean)``.

    mean: *space.shape (or (d,)).  covariance: (d,) diagonal or (d, d), d = space.size.  The latent is the space itself.
    Raises InputError for shapes that do not fit or a covariance that is not positive definite.
    """

    mean: Tensor
    variances: Tensor
    vectors: Tensor | None

    def __init__(
        self, mean: Tensor, covariance: Tensor, space: Space | None = None, schedule: Schedule | None = None
    ) -> None:
        mean, covariance = torch.as_tensor(mean), torch.as_tensor(covariance)
        space = space or Space.vector(mean.numel())
        if mean.numel() != space.size:
            raise InputError(f"the mean has {mean.numel()} values; {space.describe()} has {space.size}")
        values, vectors = eigen(covariance, space.size)
        schedule = schedule or covering_schedule(float(values.min().sqrt()), float(values.max().sqrt()))
        super().__init__(space, schedule, Card("gaussian", "closed-form Gaussian"))
        self.register_buffer("mean", mean.reshape(-1).to(values.dtype))
        self.register_buffer("variances", values)
        self.register_buffer("vectors", vectors)

    @property
    def dtype(self) -> torch.dtype:
        return self.variances.dtype

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        centred = z.flatten(1) - self.mean
        gain = self.variances / (self.variances + sigma[:, None] ** 2)
        vectors = self.vectors
        shrunk = centred * gain if vectors is None else ((centred @ vectors) * gain) @ vectors.T
        return (self.mean + shrunk).reshape(z.shape)

    def covariance(self) -> Tensor:
        """The covariance as a matrix (d, d)."""
        vectors = self.vectors
        return torch.diag(self.variances) if vectors is None else (vectors * self.variances) @ vectors.T
