"""A mixture of Gaussians: several modes, and still a closed-form denoiser and closed-form linear Gaussian posteriors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.gaussian import covering_schedule, eigen
from recon.schedules import Schedule
from recon.space import Space


class GaussianMixturePrior(Prior):
    """``x ~ sum_k w_k N(m_k, C_k)``.

    ``denoise(z, sigma) = sum_k r_k(z) [m_k + C_k (C_k + sigma^2)^{-1} (z - m_k)]`` with responsibilities
    ``r_k ~ w_k N(z; m_k, C_k + sigma^2 I)``.

    means: (k, d).  covariances: (d,) or (d, d), shared, or (k, d, d).  weights: (k,), positive, summing to one (equal when
    left out).  Raises InputError for shapes or weights that do not fit.
    """

    means: Tensor
    variances: Tensor
    vectors: Tensor | None
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor,
        weights: Tensor | None = None,
        space: Space | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        means, covariances = torch.as_tensor(means), torch.as_tensor(covariances)
        if means.ndim != 2:
            raise InputError(f"means must have shape (components, d); got {tuple(means.shape)}")
        k, d = means.shape
        weights = torch.full((k,), 1.0 / k, dtype=means.dtype) if weights is None else torch.as_tensor(weights)
        if tuple(weights.shape) != (k,) or not bool((weights > 0).all()) or abs(float(weights.sum()) - 1) > 1e-5:
            raise InputError(f"weights must be {k} positive numbers with sum 1; got {weights.tolist()}")
        space = space or Space.vector(d)
        if space.size != d:
            raise InputError(f"means have {d} values; {space.describe()} has {space.size}")
        each = covariances if covariances.ndim == 3 else covariances[None]
        if len(each) not in (1, k):
            raise InputError(f"{len(each)} covariances for {k} components; give one, or one each")
        pairs = [eigen(c, d) for c in each]
        variances = torch.stack([values for values, _ in pairs]).expand(k, d)
        vectors = None if pairs[0][1] is None else torch.stack([v for _, v in pairs if v is not None]).expand(k, d, d)
        spread = means.std(0, unbiased=False).max() if k > 1 else means.new_zeros(())
        top = float((variances.max() + spread**2).sqrt())
        schedule = schedule or covering_schedule(float(variances.min().sqrt()), top)
        super().__init__(space, schedule, Card("gaussian_mixture", f"{k} Gaussians in closed form"))
        self.register_buffer("means", means)
        self.register_buffer("variances", variances.clone())
        self.register_buffer("vectors", None if vectors is None else vectors.clone())
        self.register_buffer("log_weights", weights.log())

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    def _rotate(self, centred: Tensor) -> Tensor:
        """(n, k, d) into each component's eigenvectors."""
        return centred if self.vectors is None else torch.einsum("nkd,kde->nke", centred, self.vectors)

    def _log_terms(self, rotated: Tensor, sigma: Tensor) -> Tensor:
        """log w_k + log N(z; m_k, C_k + sigma^2 I): (n, k)."""
        total = self.variances + sigma[:, None, None] ** 2
        log_det = (2 * math.pi * total).log().sum(-1)
        return self.log_weights - 0.5 * (rotated**2 / total).sum(-1) - 0.5 * log_det

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        rotated = self._rotate(z.flatten(1)[:, None, :] - self.means)
        share = torch.softmax(self._log_terms(rotated, sigma), dim=1)
        shrunk = rotated * self.variances / (self.variances + sigma[:, None, None] ** 2)
        if self.vectors is not None:
            shrunk = torch.einsum("nke,kde->nkd", shrunk, self.vectors)
        return (share[:, :, None] * (self.means + shrunk)).sum(1).reshape(z.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x): (n, *space.shape) -> (n,)."""
        rotated = self._rotate(x.flatten(1)[:, None, :] - self.means)
        return torch.logsumexp(self._log_terms(rotated, x.new_zeros(len(x))), dim=1)

    def covariance(self, k: int) -> Tensor:
        """The covariance of component ``k`` as a matrix (d, d)."""
        if self.vectors is None:
            return torch.diag(self.variances[k])
        return (self.vectors[k] * self.variances[k]) @ self.vectors[k].T
