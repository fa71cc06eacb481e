r"""Counted quanta: emission (``PoissonLikelihood``) and transmission through an attenuating object.

``log p(k | x) = sum_i k_i log lambda_i - lambda_i - log k_i!`` with the expected counts ``lambda(x)``.  Data are counts, not
rates or normalised images: what scales them (activity, time, sensitivity, flat field) belongs into ``gain`` or ``blank``, and
what adds to them (scatter, randoms, dark current) into ``background``.  A datum without a count is a measurement like others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recon.errors import InputError
from recon.likelihoods.base import Likelihood, measured, per_datum
from recon.likelihoods.gaussian import GaussianLikelihood
from recon.operators.base import Operator


class _Counts(Likelihood):
    """What both laws share: counts and background, and quantiles as noise."""

    counts: Tensor
    background: Tensor

    def __init__(self, operator: Operator, counts: Tensor, background: float | Tensor) -> None:
        super().__init__()
        self.operator = operator
        if operator.range.complex:
            raise InputError(f"counts are real numbers; {operator.describe()} measures complex ones")
        counts = measured(operator, counts, "the counts")
        if bool((counts < 0).any()):
            raise InputError("counts must not be negative; subtract no dark field, give it as background instead")
        background = per_datum(operator, background, "background", counts.dtype)
        if not bool((background >= 0).all()) or not bool(torch.isfinite(background).all()):
            raise InputError(
                "background must not be negative: it is the expected counts that the object does not cause"
            )
        self.register_buffer("counts", counts)
        self.register_buffer("background", background)

    def _positive(self, value: float | Tensor, name: str, what: str) -> Tensor:
        value = per_datum(self.operator, value, name, self.counts.dtype)
        if not bool((value > 0).all()) or not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} ({what}) must be positive and finite everywhere")
        return value

    def expected(self, x: Tensor) -> Tensor:
        """Expected counts: (n, *domain.shape) -> (n, *range.shape)."""
        raise TypeError(f"{type(self).__name__} must define expected(x)")

    def simulate(self, x: Tensor, normal: Tensor) -> Tensor:
        """Counts by inversion: the Poisson quantile at the probability of each normal number, so that keyed noise serves.

        Negative rates, which no object has, count as zero.
        """
        from scipy.stats import norm, poisson

        rate = self.expected(x).clamp(min=0.0).detach().double().cpu().numpy()
        counts = poisson.ppf(norm.cdf(normal.double().cpu().numpy()), rate)
        return torch.from_numpy(counts).to(self.counts)


class PoissonLikelihood(_Counts):
    r"""Counting what an object emits: ``k_i ~ Poisson(gain_i (A x)_i + b_i)``.

    counts: *range.shape, >= 0, as they were counted.  gain: expected counts per unit of ``A x``, one number or one per datum.
    background: expected counts b that the object does not cause.

    Iterates of a sampler may have ``A x < 0``.  Below ``floor`` expected counts (never reached where ``b >= floor`` and
    ``A x >= 0``) the logarithm is continued by the concave parabola with its value and slope at the floor ``f``,

        log p = (that at f) + (k/f - 1) (lambda - f) - 1/2 (k/f^2 + 1/f) (lambda - f)^2,

    whose maximum never lies below zero, not even for ``k = 0``: its gradient leads back to rates that exist.  It changes
    ``log p`` of a rate in [0, f] with no count by f/2 at most, and is no normalised law.  A larger floor is less stiff.

    Raises InputError for shapes that do not fit, negative counts or background, or gain or floor <= 0.
    """

    gain: Tensor

    def __init__(
        self,
        operator: Operator,
        counts: Tensor,
        gain: float | Tensor = 1.0,
        background: float | Tensor = 0.0,
        floor: float = 0.01,
    ) -> None:
        super().__init__(operator, counts, background)
        self.register_buffer("gain", self._positive(gain, "gain", "expected counts per unit of A x"))
        if not 0 < floor < float("inf"):
            raise InputError(
                f"floor, the expected counts below which the logarithm is continued, is positive; got {floor}"
            )
        self.floor = float(floor)

    def expected(self, x: Tensor) -> Tensor:
        """``gain A x + b``, negative where ``A x`` is: (n, *domain.shape) -> (n, *range.shape)."""
        return self.gain * self.operator.A(x) + self.background

    def log_prob(self, x: Tensor) -> Tensor:
        rate, f, k = self.expected(x), self.floor, self.counts
        below = rate < f
        there = torch.where(below, f, rate)
        short = torch.where(below, rate - f, 0.0)
        exact = torch.special.xlogy(k, there) - there - torch.lgamma(k + 1)
        continued = (k / f - 1) * short - 0.5 * (k / f**2 + 1 / f) * short**2
        return (exact + continued).flatten(1).sum(1)

    def gaussian(self) -> GaussianLikelihood:
        """``y = (k + min(k, 1) - b) / gain`` with ``sigma = sqrt(k + 1) / gain``: the large-count limit.

        For ``k >= 1`` these are the mean and variance of the likelihood as a function of the rate.  Weighing data by ``1/k``
        instead pulls a rate that many data share down by one count; these weights leave it unbiased at any rate (Mighell
        1999, Astrophysical Journal 518, 380).  One datum by itself is one count high: good from about 20 counts.
        """
        y = (self.counts + self.counts.clamp(max=1.0) - self.background) / self.gain
        return GaussianLikelihood(self.operator, y, (self.counts + 1).sqrt() / self.gain)


class TransmissionLikelihood(_Counts):
    """Photon counting through an object: ``k_i ~ Poisson(I0_i exp(-(A x)_i) + b_i)``.

    ``log p = sum_i k_i log(lambda_i) - lambda_i - log k_i!``, its logarithm taken of ``log I0 - A x`` and so finite however
    little comes through.  counts: *range.shape, >= 0.  blank: counts without the object (I0), one number or one per datum.
    background: expected counts of scatter and dark current (b).

    Raises InputError for shapes that do not fit, negative counts or background, or blank <= 0.
    """

    blank: Tensor

    def __init__(
        self, operator: Operator, counts: Tensor, blank: float | Tensor, background: float | Tensor = 0.0
    ) -> None:
        super().__init__(operator, counts, background)
        self.register_buffer("blank", self._positive(blank, "blank", "counts without the object"))

    def expected(self, x: Tensor) -> Tensor:
        """Expected counts ``I0 exp(-A x) + b``: (n, *domain.shape) -> (n, *range.shape)."""
        return self.blank * torch.exp(-self.operator.A(x)) + self.background

    def log_prob(self, x: Tensor) -> Tensor:
        line = self.operator.A(x)
        through = self.blank.log() - line
        log_rate = torch.logaddexp(through, self.background.log().expand_as(through))
        rate = self.blank * torch.exp(-line) + self.background
        terms = self.counts * log_rate - rate - torch.lgamma(self.counts + 1)
        return terms.flatten(1).sum(1)

    def gaussian(self) -> GaussianLikelihood:
        r"""The post-log form: ``y = -log((k - b) / I0)`` with ``sigma = sqrt(k) / (k - b)`` (delta method).

        Counts are taken half a count up, and signal held at one count at least, so that dark rays stay finite with a large
        sigma.  Good for more than about 20 counts per ray; the bias of the logarithm is about 1/(2 k).
        """
        count = self.counts + 0.5
        signal = (count - self.background).clamp(min=1.0)
        return GaussianLikelihood(self.operator, torch.log(self.blank / signal), count.sqrt() / signal)
