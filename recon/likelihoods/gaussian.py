r"""Gaussian noise: independent with one standard deviation or one per datum, or correlated with a known covariance.

``log p(y | x) = -1/2 |(y - A x) / sigma|^2 - sum log sigma - m/2 log 2 pi``.  Complex data (k-space) count as pairs of real
ones: ``sigma`` is the standard deviation of the real and of the imaginary part each, and there are ``m = 2 n`` of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon.errors import InputError
from recon.likelihoods.base import Likelihood, measured, per_datum
from recon.operators.base import LinearOperator, Operator
from recon.operators.cg import dot
from recon.operators.whitening import Whitening


class GaussianLikelihood(Likelihood):
    """``y = A(x) + sigma n``: ``log p = -1/2 |(y - A x)/sigma|^2 - sum log sigma - m/2 log 2 pi``.

    y: *range.shape, in units of the range; complex where the range is.  sigma: standard deviation in the same units, one
    number or one per datum; of a complex datum, that of each of its two parts.
    Raises InputError for shapes that do not fit, non-finite data, or sigma <= 0.
    """

    measured: Tensor
    sigma: Tensor
    log_volume: Tensor

    def __init__(self, operator: Operator, y: Tensor, sigma: float | Tensor) -> None:
        super().__init__()
        self.operator = operator
        y = measured(operator, y, "the measurement y")
        sigma = per_datum(operator, sigma, "sigma", y.dtype.to_real())
        if not bool((sigma > 0).all()) or not bool(torch.isfinite(sigma).all()):
            raise InputError("sigma, the standard deviation of the noise, must be positive and finite everywhere")
        # As parts: conversions of a module to another floating type would drop the imaginary one of a complex buffer.
        self.register_buffer("measured", torch.view_as_real(y) if y.is_complex() else y)
        self.register_buffer("sigma", sigma)
        # log of the volume that one unit of ``y`` has in the data as they came; not zero where those were whitened.
        self.register_buffer("log_volume", sigma.new_zeros(()))

    @classmethod
    def correlated(
        cls, operator: Operator, y: Tensor, covariance: Tensor, dim: str | None = None
    ) -> GaussianLikelihood:
        """``y = A(x) + n`` with ``n`` of a known covariance, as unit white noise of ``W A`` and ``W y`` (``Whitening``).

        covariance: (m, m) over the flattened range, or (k, k) along its dimension ``dim``, the same for every place on the
        others and independent between them.  Of complex data it is ``E[n n^H]`` with ``E[n n^T] = 0`` (circular noise), so
        independent data of ``sigma`` have ``2 sigma^2`` on the diagonal.
        Answers an ordinary GaussianLikelihood whose ``y``, ``residual`` and ``simulate`` are of whitened data and whose
        ``log_prob`` is that of the data as given; its operator is linear where ``operator`` is.

        Raises InputError for shapes that do not fit, or a covariance that is not Hermitian and positive definite.
        """
        y = measured(operator, y, "the measurement y")
        covariance = torch.as_tensor(covariance, device=y.device)
        whitening = Whitening(operator.range, covariance, dim, y.dtype.to_real())
        like = cls(whitening.of(operator), whitening.A(y), 1.0)
        like.log_volume.fill_(whitening.log_volume)
        return like

    @property
    def y(self) -> Tensor:
        """The measurement: *range.shape."""
        return torch.view_as_complex(self.measured) if self.operator.range.complex else self.measured

    def residual(self, x: Tensor) -> Tensor:
        """``y - A(x)``: (n, *domain.shape) -> (n, *range.shape), in units of the range."""
        return self.y - self.operator.A(x)

    def log_prob(self, x: Tensor) -> Tensor:
        whitened = self.residual(x) / self.sigma
        sigma = self.sigma.expand(self.operator.range.shape)
        parts = 2 if self.operator.range.complex else 1
        constant = parts * (sigma.log().sum() + 0.5 * self.operator.range.size * math.log(2 * math.pi))
        return -0.5 * dot(whitened, whitened) - constant - self.log_volume

    def simulate(self, x: Tensor, normal: Tensor) -> Tensor:
        return self.operator.A(x) + self.sigma * normal

    def gaussian(self) -> GaussianLikelihood:
        return self

    def linear(self, user: str) -> LinearOperator:
        """The operator, known to be linear with a matched transpose; InputError naming ``user`` otherwise."""
        operator = self.operator
        if not isinstance(operator, LinearOperator):
            raise InputError(
                f"{user} solves with the operator and its transpose and needs a LinearOperator; got {operator.describe()}. "
                "DPS takes any differentiable operator."
            )
        if not operator.matched:
            raise InputError(
                f"{user} needs an exact transpose; {operator.describe()} declares matched=False. "
                "Use its matched projector pair, or DPS."
            )
        return operator
