"""A prior and a likelihood, checked against each other before anything runs; and the exact answer where there is one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from recon.errors import InputError
from recon.likelihoods import Likelihood
from recon.operators.base import LinearOperator
from recon.priors.base import Prior
from recon.priors.closed import closed_form, components
from recon.priors.gaussian import GaussianPrior
from recon.priors.mixture import GaussianMixturePrior
from recon.space import Space


class Posterior:
    """``p(x | y)`` from ``prior`` p(x) and ``likelihood`` p(y | x).

    Its ``space`` carries the coordinates of the operator's domain where the prior has none.
    Raises InputError when shape, dims, unit, coordinates, floating type or device of the two cannot fit.
    """

    def __init__(self, prior: Prior, likelihood: Likelihood) -> None:
        domain = likelihood.operator.domain
        difference = prior.space.mismatch(domain)
        if difference:
            raise InputError(
                f"prior {prior.card.name!r} and {type(likelihood.operator).__name__} speak of different arrays: "
                f"{difference}. Choose a prior for this grid and unit, or define the operator on the prior's."
            )
        for name, value in likelihood.named_buffers():
            if value.is_floating_point() and value.device != prior.device:
                raise InputError(f"{name} is on {value.device} and the prior on {prior.device}; move one of them")
            if value.dtype == torch.float64 and prior.dtype == torch.float32 and value.ndim:
                raise InputError(
                    f"{name} of the likelihood is float64 and prior {prior.card.name!r} computes in float32; "
                    "call likelihood.float() (states are kept in the prior's type)"
                )
            if value.dtype == torch.float32 and prior.dtype == torch.float64 and value.ndim:
                raise InputError(
                    f"{name} of the likelihood is float32 and prior {prior.card.name!r} computes in float64; "
                    "call likelihood.double()"
                )
        self.prior, self.likelihood = prior, likelihood
        self.space = Space(domain.dims, domain.shape, {**prior.space.coords, **domain.coords}, domain.unit)
        self.evaluations: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, what: str, n: int) -> None:
        """Note ``n`` evaluations (one per draw) of "denoiser", "vjp", "forward" or "adjoint"."""
        with self._lock:
            self.evaluations[what] += n

    def count_normal(self, n: int) -> None:
        """Note one use of ``A`` and ``A^T`` each for ``n`` draws, as a solver reports it."""
        self.count("forward", n)
        self.count("adjoint", n)

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        """``D(z; sigma)`` without a graph, counted: (n, *latent.shape)."""
        self.count("denoiser", len(z))
        with torch.no_grad():
            return self.prior.denoise(z, sigma)

    def linearize(self, z: Tensor, sigma: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``D(z; sigma)`` and ``u -> J^T u`` with ``J = dD/dz``, both (n, *latent.shape), counted.

        One evaluation with its graph kept, so each further vjp costs one backward pass.
        """
        self.count("denoiser", len(z))
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            denoised = self.prior.denoise(point, sigma)

        def pull(u: Tensor) -> Tensor:
            self.count("vjp", len(u))
            (gradient,) = torch.autograd.grad(denoised, point, u, retain_graph=True)
            return gradient

        return denoised.detach(), pull

    def forward(self, x: Tensor) -> Tensor:
        """``A(x)``, counted."""
        self.count("forward", len(x))
        return self.likelihood.operator.A(x)

    def adjoint(self, operator: LinearOperator, y: Tensor) -> Tensor:
        """``A^T y``, counted."""
        self.count("adjoint", len(y))
        return operator.A_adjoint(y)

    def exact(self) -> GaussianPrior | GaussianMixturePrior:
        """The posterior itself, for a closed-form prior with a linear Gaussian likelihood; over physical arrays.

        Gaussian: ``C' = (C^-1 + A^T S^-1 A)^-1``, ``m' = m + C' A^T S^-1 (y - A m)``; a mixture is reweighted by each
        component's evidence ``N(y; A m_k, A C_k A^T + S)``.  Closed forms: Gaussians and their mixtures, stationary ones, and
        volumes of independent slices of them (``priors.closed``), small enough for dense matrices.
        Raises InputError where there is none.
        """
        gaussian = self.likelihood.gaussian()
        operator = gaussian.linear("Posterior.exact")
        prior = self.prior
        law = closed_form(prior)
        if law is None or not prior.affine:
            raise InputError(
                f"prior {prior.card.name!r} has no closed-form posterior; only Gaussians, their mixtures and volumes of such "
                "slices do"
            )
        matrix = dense(operator).double()
        noise = _parts(gaussian.sigma.double().expand(operator.range.shape) ** 2, operator.range)
        y = gaussian.measured.double().reshape(-1)
        # x = b + s z, entry by entry.
        ones = torch.ones(1, *prior.latent.shape, dtype=torch.float64, device=prior.device)
        b, s = (f.reshape(-1) for f in (prior.decode(0 * ones), prior.decode_linear(ones)))
        parts = [
            (
                log_weight.double(),
                *_condition(b + s * mean.double(), s[:, None] * covariance.double() * s, matrix, noise, y),
            )
            for log_weight, mean, covariance in components(law)
        ]
        if isinstance(law, GaussianPrior):
            return GaussianPrior(parts[0][1], parts[0][2], self.space)
        weights = torch.softmax(torch.stack([part[0] + part[3] for part in parts]), 0).clamp(min=1e-300)
        means, covariances = torch.stack([p[1] for p in parts]), torch.stack([p[2] for p in parts])
        return GaussianMixturePrior(means, covariances, weights / weights.sum(), self.space)


def dense(operator: LinearOperator) -> Tensor:
    """The matrix (range.size, domain.size) of a small linear operator, column by column.

    A complex datum gives two rows, those of its real and imaginary parts.
    """
    eye = torch.eye(operator.domain.size, dtype=operator.dtype, device=operator.device)
    columns = operator.A(eye.reshape(-1, *operator.domain.shape))
    return (torch.view_as_real(columns) if columns.is_complex() else columns).flatten(1).T


def _parts(values: Tensor, space: Space) -> Tensor:
    """One real number per datum as the list of those of its parts."""
    return values.reshape(-1).repeat_interleave(2 if space.complex else 1)


def _condition(
    mean: Tensor, covariance: Tensor, matrix: Tensor, noise: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean, covariance and log evidence of one Gaussian."""
    cross = covariance @ matrix.T
    total = matrix @ cross + torch.diag(noise)
    factor = torch.linalg.cholesky(total)
    residual = y - matrix @ mean
    new_mean = mean + cross @ torch.cholesky_solve(residual[:, None], factor)[:, 0]
    new_covariance = covariance - cross @ torch.cholesky_solve(cross.T, factor)
    evidence = torch.distributions.MultivariateNormal(matrix @ mean, scale_tril=factor).log_prob(y)
    return new_mean, 0.5 * (new_covariance + new_covariance.T), evidence
