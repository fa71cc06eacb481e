r"""Do the draws explain the measurement, no worse and no better than its noise allows?

Let ``r = (y - A x) / sigma`` be the whitened residual of a draw and ``m`` the number of data.  A draw from the exact posterior
and the measurement have the same joint law as the truth and the measurement, so ``chi2 = |r|^2`` of a draw is chi-squared with
``m`` degrees of freedom (over repeated problems), and ``chi2/m`` is ``1 +- sqrt(2/m)``.  Much more: the data are not fitted, or
sigma is too small.  Much less: the noise is fitted, or sigma is too large.

**The posterior mean must not be judged against 1.**  Its chi2 is ``m - d_eff`` on average, ``d_eff = tr(A C A^T) / sigma^2``
with the posterior covariance ``C``: the number of data directions that the draws spend on signal (the degrees of freedom for
signal of Rodgers 2000 in the linear Gaussian case).  The difference of the two is how ``signal_freedom`` is measured.

The draws share one measurement, so their chi2 are dependent and averaging them does not sharpen the test.  Their mean ``S``
is dominated in convex order by one of them, ``X``; log-concave tails (chi2 with ``m >= 2``) then give
``P(S >= t) <= e P(X >= t)``, and likewise below.  The limits of the verdict are the chi2 quantiles at ``false_alarm / (2 e)``.

Counts: chi2 is the Poisson deviance ``2 sum k log(k/lambda) - (k - lambda)``, whose mean and variance at each rate are
computed, not assumed to be 1 and 2 (at one count they are 1.15 and 1.36); its law is taken as a scaled chi2 with those moments.
Residuals are Pearson's ``(k - lambda)/sqrt(lambda)``: mean 0 and variance 1 at any rate.

Data whose Gaussian residual is exactly zero in every draw were not measured (samples outside a mask) and are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor

from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import GaussianLikelihood, Likelihood, StackedLikelihood
from recon.operators.base import LinearOperator
from recon.space import Space

BLOCK = 8  # draws projected at a time
Verdict = Literal["fits", "data not fitted", "noise fitted", "undefined"]


@dataclass(frozen=True, eq=False)
class DataFit:
    """How the draws of an ensemble fit the data; made by ``data_fit``.

    statistic: "chi2", "Poisson deviance", or "chi2 + Poisson deviance".  chi2: (draw,).  data: the number m of data.
    expected, variance: of the statistic of one exact draw (chi2: m, 2 m).  ratio: weighted mean of chi2 over ``expected``.
    mean_chi2: of the posterior mean; expect ``m - d_eff``, not m.  view_dim, per_view, per_view_sd: the ratio along the first
    dim of the measurement, averaged over draws, and the sd of one exact draw.  residual: whitened, averaged over draws,
    *range.shape.  autocorrelation and its sd: lag 1, per dim.  signal_freedom: d_eff estimated from the draws (linear
    operator, Gaussian noise).
    """

    statistic: str
    chi2: Tensor
    data: int
    expected: float
    variance: float
    ratio: float
    mean_chi2: float
    view_dim: str
    per_view: Tensor
    per_view_sd: Tensor
    residual: Tensor
    autocorrelation: Mapping[str, float]
    autocorrelation_sd: Mapping[str, float]
    signal_freedom: float | None
    false_alarm: float

    @property
    def ratio_sd(self) -> float:
        """Standard deviation of chi2/m of one exact draw (``sqrt(2/m)`` for Gaussian noise)."""
        return math.sqrt(self.variance) / self.expected if self.expected > 0 else math.nan

    @property
    def limits(self) -> tuple[float, float]:
        """Between which the mean chi2/m of exact draws lies, but for a probability of at most ``false_alarm``."""
        from scipy.special import gammainccinv, gammaincinv

        if not (self.expected > 0 and self.variance > 0):
            return math.nan, math.nan
        freedom = 2 * self.expected**2 / self.variance
        tail = self.false_alarm / (2 * math.e)
        low, high = (2 / freedom * quantile(freedom / 2, tail) for quantile in (gammaincinv, gammainccinv))
        return float(low), float(high)

    @property
    def verdict(self) -> Verdict:
        """``fits``, ``data not fitted`` (chi2 too large), ``noise fitted`` (too small), ``undefined`` (not finite)."""
        low, high = self.limits
        if not math.isfinite(self.ratio) or not math.isfinite(low):
            return "undefined"
        if self.ratio > high:
            return "data not fitted"
        return "noise fitted" if self.ratio < low else "fits"

    @property
    def coloured(self) -> tuple[str, ...]:
        """Dims along which the residual is correlated beyond the false-alarm rate (shared between the dims)."""
        from scipy.special import ndtri

        n = max(1, len(self.autocorrelation))
        bound = -float(ndtri(self.false_alarm / (2 * math.e * n)))
        return tuple(d for d, r in self.autocorrelation.items() if abs(r) > bound * self.autocorrelation_sd[d])

    def summary(self) -> dict[str, Any]:
        """The scalars, as JSON values."""
        low, high = self.limits
        names = ("statistic", "data", "expected", "variance", "ratio", "ratio_sd", "mean_chi2", "verdict", "view_dim")
        more = ("signal_freedom", "false_alarm")
        return {
            **{name: getattr(self, name) for name in (*names, *more)},
            "limits": [low, high],
            "autocorrelation": dict(self.autocorrelation),
            "autocorrelation_sd": dict(self.autocorrelation_sd),
            "coloured": list(self.coloured),
        }


def data_fit(likelihood: Likelihood, ensemble: Ensemble, false_alarm: float = 1e-3) -> DataFit:
    """Compare the residuals of an ensemble with the noise they should look like.

    likelihood: Gaussian, counts (``counts`` and ``expected(x)``), or a stack of such; any other through its ``gaussian()``
    form.  A stack is judged as a whole, datum by datum in one line (``source_fits`` judges each source).
    false_alarm: probability, per verdict, of blaming an exact sampler.  Raises InputError when the likelihood's operator does
    not take the ensemble's arrays, the rate is outside (0, 1), or the likelihood has no residual.
    """
    if not 0 < false_alarm < 1:
        raise InputError(f"false_alarm is a probability between 0 and 1; got {false_alarm}")
    operator = likelihood.operator
    difference = operator.domain.mismatch(ensemble.space)
    if difference:
        raise InputError(f"the ensemble is not on the operator's domain: {difference}")
    likelihood = judged(likelihood)
    x, weights = ensemble.x.detach(), ensemble.weights
    sums = _Sums(operator.range)
    with torch.no_grad():
        for first in range(0, len(x), BLOCK):
            block = slice(first, first + BLOCK)
            sums.add(terms(likelihood, x[block]), weights[block])
        mean_chi2 = float(terms(likelihood, ensemble.mean().detach()[None]).square.sum())
    found = _collect(likelihood, sums, weights, mean_chi2, false_alarm)
    if ensemble.antithetic:  # how far draws are from their mean is known of independent ones
        found = replace(found, signal_freedom=data_fit(likelihood, ensemble.independent(), false_alarm).signal_freedom)
    return found


def source_fits(likelihood: StackedLikelihood, ensemble: Ensemble, false_alarm: float = 1e-3) -> tuple[DataFit, ...]:
    """The fit of every source of a stack, in its order; ``false_alarm`` is shared between them.

    Raises InputError as ``data_fit`` does.
    """
    sources = likelihood.sources
    return tuple(data_fit(source, ensemble, false_alarm / len(sources)) for source in sources)


@dataclass(frozen=True)
class Terms:
    """Per datum of some draws, (n, *range.shape), float64: residual, its part of chi2, and that part's two moments.

    Complex data have one more axis at the end, their real and imaginary parts.
    """

    residual: Tensor
    square: Tensor
    expected: Tensor
    variance: Tensor

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Part of chi2, and its mean and variance for an exact draw."""
        return self.square, self.expected, self.variance


def _counts(likelihood: Likelihood) -> bool:
    return hasattr(likelihood, "counts") and hasattr(likelihood, "expected")


def _mixed(likelihood: Likelihood) -> TypeGuard[StackedLikelihood]:
    """Whether the sources differ in law, so that each has its own terms."""
    return isinstance(likelihood, StackedLikelihood) and not isinstance(likelihood, GaussianLikelihood)


def judged(likelihood: Likelihood) -> Likelihood:
    """``likelihood`` in the form whose residuals are judged: counts as they are, any other through ``gaussian()``."""
    if _mixed(likelihood):
        return StackedLikelihood([judged(source) for source in likelihood.sources])
    return likelihood if _counts(likelihood) else likelihood.gaussian()


def _statistic(likelihood: Likelihood) -> str:
    if _mixed(likelihood):
        return " + ".join(sorted({_statistic(source) for source in likelihood.sources}, reverse=True))
    return "Poisson deviance" if _counts(likelihood) else "chi2"


def _stacked_terms(likelihood: StackedLikelihood, x: Tensor) -> Terms:
    parts = [terms(source, x) for source in likelihood.sources]
    ends = (-1, 2) if likelihood.operator.range.complex else (-1,)

    def line(name: str) -> Tensor:
        return torch.cat([getattr(part, name).reshape(len(x), *ends) for part in parts], dim=1)

    return Terms(line("residual"), line("square"), line("expected"), line("variance"))


def terms(likelihood: Any, x: Tensor) -> Terms:  # noqa: ANN401  (a Gaussian likelihood, one of counts, or a stack)
    """Residuals of draws (n, *domain.shape) under a likelihood that ``judged`` answered, datum by datum."""
    if _mixed(likelihood):
        return _stacked_terms(likelihood, x)
    if not _counts(likelihood):
        r = likelihood.residual(x.to(likelihood.measured)) / likelihood.sigma
        r = (torch.view_as_real(r) if r.is_complex() else r).double().cpu()
        one = torch.ones((), dtype=torch.float64).expand_as(r)
        return Terms(r, r.square(), one, 2 * one)
    k = likelihood.counts.double().cpu()
    # Draws may have rates that no object has; they are judged at the lowest that their likelihood takes as it is.
    lowest = getattr(likelihood, "floor", 1e-12)
    rate = likelihood.expected(x.to(likelihood.counts)).double().cpu().clamp(min=lowest)
    deviance = (2 * (torch.special.xlogy(k, k / rate) - (k - rate))).clamp(min=0.0)
    expected, variance = (torch.from_numpy(v) for v in _deviance_moments(rate.numpy()))
    return Terms((k - rate) / rate.sqrt(), deviance, expected, variance)


@lru_cache(maxsize=1)
def _deviance_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log rate, and mean and variance of the Poisson deviance of one count, by summation over the counts."""
    from scipy.special import gammaln, xlogy

    rates = np.geomspace(1e-6, 1e3, 900)
    k = np.arange(1600.0)
    p = np.exp(xlogy(k, rates[:, None]) - rates[:, None] - gammaln(k + 1))
    deviance = 2 * (xlogy(k, k / rates[:, None]) - (k - rates[:, None]))
    mean = (p * deviance).sum(1)
    return np.log(rates), mean, (p * deviance**2).sum(1) - mean**2


def _deviance_moments(rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logs, mean, variance = _deviance_table()
    return np.interp(np.log(rate), logs, mean), np.interp(np.log(rate), logs, variance)


class _Sums:
    """Weighted sums over draws of what the fit needs, so that only a block of residuals is ever held."""

    def __init__(self, space: Space) -> None:
        shape = (*space.shape, 2) if space.complex else space.shape
        self.chi2: list[Tensor] = []
        self.residual, self.square, self.expected, self.variance = (torch.zeros(shape).double() for _ in range(4))
        self.measured = torch.zeros(shape, dtype=torch.bool)
        self.lagged: list[list[Tensor]] = [[] for _ in space.dims]

    def add(self, terms: Terms, weights: Tensor) -> None:
        self.chi2.append(terms.square.flatten(1).sum(1))
        for name in ("residual", "square", "expected", "variance"):
            getattr(self, name).add_(torch.einsum("n,n...->...", weights, getattr(terms, name)))
        self.measured |= (terms.residual != 0).any(0)
        energy = terms.residual.square().flatten(1).sum(1)
        for axis, products in enumerate(self.lagged):
            n = terms.residual.shape[axis + 1]
            pair = terms.residual.narrow(axis + 1, 0, n - 1) * terms.residual.narrow(axis + 1, 1, n - 1)
            products.append(pair.flatten(1).sum(1) / energy)


def _collect(likelihood: Likelihood, sums: _Sums, weights: Tensor, mean_chi2: float, false_alarm: float) -> DataFit:
    space, measured, chi2 = likelihood.operator.range, sums.measured, torch.cat(sums.chi2)
    data = int(measured.sum())
    square, expected, variance = (
        torch.where(measured, v, 0.0).flatten(1) if v.ndim > 1 else torch.where(measured, v, 0.0)[:, None]
        for v in (sums.square, sums.expected, sums.variance)
    )
    total = float(expected.sum())
    lag: dict[str, float] = {}
    lag_sd: dict[str, float] = {}
    for axis, dim in enumerate(space.dims):
        n = space.shape[axis]
        pairs = int((measured.narrow(axis, 0, n - 1) & measured.narrow(axis, 1, n - 1)).sum())
        if pairs:
            lag[dim] = float((weights * torch.cat(sums.lagged[axis])).sum()) * data / pairs
            lag_sd[dim] = 1 / math.sqrt(pairs)
    freedom, distinct = None, float(1 - weights.square().sum())
    linear = isinstance(likelihood, GaussianLikelihood) and isinstance(likelihood.operator, LinearOperator)
    if linear and distinct > 1e-6:  # 0 where one draw has all the weight
        freedom = (float((weights * chi2).sum()) - mean_chi2) / distinct
    return DataFit(
        statistic=_statistic(likelihood),
        chi2=chi2,
        data=data,
        expected=total,
        variance=float(variance.sum()),
        ratio=float((weights * chi2).sum()) / total if total > 0 else math.nan,
        mean_chi2=mean_chi2,
        view_dim=space.dims[0],
        per_view=square.sum(1) / expected.sum(1),
        per_view_sd=variance.sum(1).sqrt() / expected.sum(1),
        residual=torch.view_as_complex(sums.residual) if space.complex else sums.residual,
        autocorrelation=lag,
        autocorrelation_sd=lag_sd,
        signal_freedom=freedom,
        false_alarm=false_alarm,
    )
