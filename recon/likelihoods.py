r"""log p(y | x) per draw: an operator, a measurement and its noise.

One convention everywhere: ``log p(y | x) = -1/2 |(y - A x) / sigma|^2 + const`` with the constant included, one number per
draw, never a sum or norm over draws.  Complex data (k-space) count as pairs of real ones: ``sigma`` is the standard deviation
of the real and of the imaginary part each, and there are ``m = 2 n`` of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recon.errors import InputError
from recon.operators.base import LinearOperator, Operator
from recon.operators.cg import dot


class Likelihood(nn.Module):
    """An operator, what was measured, and the law of the noise."""

    operator: Operator

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(y | x)``: (n, *domain.shape) -> (n,)."""
        raise TypeError(f"{type(self).__name__} must define log_prob(x)")

    def simulate(self, x: Tensor, normal: Tensor) -> Tensor:
        """A measurement of ``x`` (n, *domain.shape) made with standard normal numbers ``normal`` (n, *range.shape)."""
        raise TypeError(f"{type(self).__name__} must define simulate(x, normal)")

    def gaussian(self) -> GaussianLikelihood:
        """This likelihood as a Gaussian one (itself, or its large-count limit).  Raises InputError where there is none."""
        raise InputError(f"{type(self).__name__} has no Gaussian form; use a sampler that takes any likelihood (DPS)")


def _measured(operator: Operator, values: Tensor, what: str) -> Tensor:
    values = torch.as_tensor(values)
    if values.is_complex() != operator.range.complex:
        kind = "complex" if operator.range.complex else "real"
        raise InputError(f"{what} must be {kind}, as {operator.range.describe()} is; got {values.dtype}")
    if tuple(values.shape) != operator.range.shape:
        raise InputError(
            f"{what} must have the shape of the operator's range {operator.range.describe()}; got {tuple(values.shape)}"
        )
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise InputError(
            f"{what} holds {bad} of {values.numel()} values that are NaN or infinite; "
            "leave them out of the operator and of the data"
        )
    return values


class GaussianLikelihood(Likelihood):
    """``y = A(x) + sigma n``: ``log p = -1/2 |(y - A x)/sigma|^2 - sum log sigma - m/2 log 2 pi``.

    y: *range.shape, in units of the range; complex where the range is.  sigma: standard deviation in the same units, one
    number or one per datum; of a complex datum, that of each of its two parts.
    Raises InputError for shapes that do not fit, non-finite data, or sigma <= 0.
    """

    measured: Tensor
    sigma: Tensor

    def __init__(self, operator: Operator, y: Tensor, sigma: float | Tensor) -> None:
        super().__init__()
        self.operator = operator
        y = _measured(operator, y, "the measurement y")
        sigma = torch.as_tensor(sigma, dtype=y.dtype.to_real())
        if sigma.ndim and tuple(sigma.shape) != operator.range.shape:
            raise InputError(
                f"sigma must be one number or one per datum {operator.range.describe()}; got {tuple(sigma.shape)}"
            )
        if not bool((sigma > 0).all()) or not bool(torch.isfinite(sigma).all()):
            raise InputError("sigma, the standard deviation of the noise, must be positive and finite everywhere")
        # As parts: conversions of a module to another floating type would drop the imaginary one of a complex buffer.
        self.register_buffer("measured", torch.view_as_real(y) if y.is_complex() else y)
        self.register_buffer("sigma", sigma)

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
        return -0.5 * dot(whitened, whitened) - constant

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


class TransmissionLikelihood(Likelihood):
    """Photon counting through an object: ``k_i ~ Poisson(I0_i exp(-(A x)_i) + b_i)``.

    ``log p = sum_i k_i log(lambda_i) - lambda_i - log k_i!``.  counts: *range.shape, >= 0.  blank: counts without the object
    (I0), one number or one per datum.  background: expected counts of scatter and dark current (b).

    Raises InputError for shapes that do not fit, negative counts, or blank <= 0.
    """

    counts: Tensor
    blank: Tensor
    background: Tensor

    def __init__(
        self, operator: Operator, counts: Tensor, blank: float | Tensor, background: float | Tensor = 0.0
    ) -> None:
        super().__init__()
        self.operator = operator
        counts = _measured(operator, counts, "the counts")
        if bool((counts < 0).any()):
            raise InputError("counts must not be negative; subtract no dark field, give it as background instead")
        blank = torch.as_tensor(blank, dtype=counts.dtype)
        background = torch.as_tensor(background, dtype=counts.dtype)
        for name, value in (("blank", blank), ("background", background)):
            if value.ndim and tuple(value.shape) != operator.range.shape:
                raise InputError(
                    f"{name} must be one number or one per datum {operator.range.describe()}; got {tuple(value.shape)}"
                )
        if not bool((blank > 0).all()) or not bool((background >= 0).all()):
            raise InputError("blank (counts without the object) must be positive and background must not be negative")
        self.register_buffer("counts", counts)
        self.register_buffer("blank", blank)
        self.register_buffer("background", background)

    def expected(self, x: Tensor) -> Tensor:
        """Expected counts ``I0 exp(-A x) + b``: (n, *domain.shape) -> (n, *range.shape)."""
        return self.blank * torch.exp(-self.operator.A(x)) + self.background

    def log_prob(self, x: Tensor) -> Tensor:
        rate = self.expected(x)
        terms = torch.special.xlogy(self.counts, rate) - rate - torch.lgamma(self.counts + 1)
        return terms.flatten(1).sum(1)

    def simulate(self, x: Tensor, normal: Tensor) -> Tensor:
        """Counts by inversion: the Poisson quantile at the probability of each normal number, so that keyed noise serves."""
        from scipy.stats import norm, poisson

        rate = self.expected(x).double().cpu().numpy()
        counts = poisson.ppf(norm.cdf(normal.double().cpu().numpy()), rate)
        return torch.from_numpy(counts).to(self.counts)

    def gaussian(self) -> GaussianLikelihood:
        r"""The post-log form: ``y = -log((k - b) / I0)`` with ``sigma = sqrt(k) / (k - b)`` (delta method).

        Counts are taken half a count up, and signal held at one count at least, so that dark rays stay finite with a large
        sigma.  Good for more than about 20 counts per ray; the bias of the logarithm is about 1/(2 k).
        """
        count = self.counts + 0.5
        signal = (count - self.background).clamp(min=1.0)
        return GaussianLikelihood(self.operator, torch.log(self.blank / signal), count.sqrt() / signal)
