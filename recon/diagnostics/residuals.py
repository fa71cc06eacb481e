r"""Which data are not fitted, and whether what is left over is noise: by view, coil or station, and by lag.

Whitened residuals of one draw from the exact posterior have the law of the noise (``recon.diagnostics.fit``); those of
the mean image have not, they are smaller and correlated.  So everything here is measured draw by draw.

**Groups.**  chi2 of a group of ``k`` data over k, 1 +- sqrt(2/k) for one draw.  The draws share the measurement, so the
limits are those of one draw at ``false_alarm/(2 e G)`` for G groups.

**Whiteness.**  With ``c_l`` the autocorrelation of the residual at lag l (all lags, no wrap-around) the residual
whiteness ratio

    W = sum_{l != 0} c_l^2 / c_0^2          (Lanza et al., SIAM J. Imaging Sci. 13, 2020)

is near 1 for white noise and large where structure is left that a chi2 averages away.  Its law is that of simulated
white noise on the same data: ``p = (1 + #{simulated W >= W}) / (1 + simulations)``, exact; over dependent draws twice
the mean of the p-values is a p-value again (Rüschendorf 1982).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recon.diagnostics.fit import BLOCK, judged, terms
from recon.draws import Draws
from recon.ensemble import Ensemble
from recon.errors import InputError
from recon.likelihoods import Likelihood
from recon.space import Space


@dataclass(frozen=True, eq=False)
class GroupFit:
    """chi2 over its expectation along one dim of the measurement.

    dim: its name.  labels: of the groups (coordinates, or numbers).  ratio, sd: (group,), mean over draws and the sd of
    one exact draw; NaN where a group has no data.  low, high: limits.  outside: groups beyond them.
    """

    dim: str
    labels: tuple[str, ...]
    ratio: Tensor
    sd: Tensor
    low: Tensor
    high: Tensor
    outside: tuple[int, ...]
    false_alarm: float

    def summary(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""

        def plain(values: Tensor) -> list[float | None]:
            return [v if math.isfinite(v) else None for v in values.tolist()]

        return {
            "dim": self.dim,
            "labels": list(self.labels),
            **{name: plain(getattr(self, name)) for name in ("ratio", "sd", "low", "high")},
            "outside": list(self.outside),
            "false_alarm": self.false_alarm,
        }


def group_fit(likelihood: Likelihood, ensemble: Ensemble, dim: str, false_alarm: float = 1e-3) -> GroupFit:
    """chi2 (or deviance) per datum for every place along ``dim`` of the measurement: per view, coil, station, field.

    A stack of sources is one line of data; ask its sources (``likelihood.sources``) one by one.
    Raises InputError for a dim that the measurement has not, a rate outside (0, 1), or draws off the operator's domain.
    """
    from scipy.special import gammainccinv, gammaincinv

    space = likelihood.operator.range
    if dim not in space.dims:
        raise InputError(f"the measurement {space.describe()} has no dim {dim!r}; it has {', '.join(space.dims)}")
    axis = space.dims.index(dim)
    _require(likelihood, ensemble, false_alarm)
    likelihood, weights = judged(likelihood), ensemble.weights
    totals = torch.zeros(3, space.shape[axis], dtype=torch.float64)
    seen = torch.zeros((*space.shape, 2) if space.complex else space.shape, dtype=torch.bool)
    parts = []
    with torch.no_grad():
        for first in range(0, len(ensemble), BLOCK):
            found = terms(likelihood, ensemble.x[first : first + BLOCK])
            seen |= (found.residual != 0).any(0)
            parts.append(torch.stack([_average(v, weights[first : first + BLOCK]) for v in found.moments()]))
    for total, values in zip(totals, torch.stack(parts).sum(0), strict=True):
        total += torch.where(seen, values, 0.0).movedim(axis, 0).reshape(space.shape[axis], -1).sum(1)
    square, expected, variance = totals
    freedom = 2 * expected**2 / variance
    tail = false_alarm / (2 * math.e * len(square))
    low, high = (
        torch.from_numpy(2 / freedom.numpy() * quantile(freedom.numpy() / 2, tail))
        for quantile in (gammaincinv, gammainccinv)
    )
    ratio = square / expected
    outside = tuple(torch.nonzero((ratio < low) | (ratio > high))[:, 0].tolist())
    return GroupFit(dim, _labels(space, dim), ratio, variance.sqrt() / expected, low, high, outside, false_alarm)


def _average(values: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("d,d...->...", weights, values)


def _labels(space: Space, dim: str) -> tuple[str, ...]:
    values = space.coords.get(dim)
    if values is None:
        return tuple(str(i) for i in range(space.shape[space.dims.index(dim)]))
    return tuple(v if isinstance(v, str) else f"{v:.6g}" for v in values)


def _require(likelihood: Likelihood, ensemble: Ensemble, false_alarm: float) -> None:
    if not 0 < false_alarm < 1:
        raise InputError(f"false_alarm is a probability between 0 and 1; got {false_alarm}")
    difference = likelihood.operator.domain.mismatch(ensemble.space)
    if difference:
        raise InputError(f"the ensemble is not on the operator's domain: {difference}")


@dataclass(frozen=True)
class Whiteness:
    """Whether residuals are white.

    ratio: W averaged over the draws looked at.  expected: of white noise.  p: valid over dependent draws.  white:
    whether p is at least ``false_alarm``; None where it cannot be said, and ``reason`` says why.  draws: how many were
    looked at.
    """

    ratio: float
    expected: float
    p: float
    white: bool | None
    draws: int
    false_alarm: float
    reason: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in self.__dict__.items()}


@dataclass(frozen=True)
class Look:
    """How closely to look: ``draws`` of the ensemble (the heaviest), ``simulations`` of white noise, their ``seed``."""

    draws: int = 8
    simulations: int = 399
    seed: int = 0


def whiteness(
    likelihood: Likelihood, ensemble: Ensemble, false_alarm: float = 0.01, look: Look | None = None
) -> Whiteness:
    """The residual whiteness ratio of the draws against that of white noise on the same data.

    Costs ``look.simulations`` FFTs of twice the measurement's length along each dim.  Residuals of counts are taken for
    normal, as Pearson's are at some counts per datum.
    Raises InputError as ``group_fit`` does, or for too few simulations to reach the rate.
    """
    look = look or Look()
    _require(likelihood, ensemble, false_alarm)
    if 2 / (look.simulations + 1) > false_alarm:
        raise InputError(f"{look.simulations} simulations cannot reach a rate of {false_alarm:g}")
    picks = ensemble.weights.argsort(descending=True, stable=True)[: look.draws]
    with torch.no_grad():
        residual = terms(judged(likelihood), ensemble.x[picks]).residual
    count = len(picks)
    if not bool(torch.isfinite(residual).all()):
        return Whiteness(math.nan, math.nan, math.nan, None, count, false_alarm, "residuals are not finite")
    space = likelihood.operator.range
    seen = (residual != 0).any(0)
    if int(seen.sum()) < 8:
        reason = f"{int(seen.sum())} data are too few to have a correlation"
        return Whiteness(math.nan, math.nan, math.nan, None, count, false_alarm, reason)
    ratios = _ratios(residual, len(space.dims))
    null = []
    for first in range(0, look.simulations, BLOCK):
        members = range(first, min(first + BLOCK, look.simulations))
        noise = Draws(look.seed, members).normal(0, seen.shape, "probe", dtype=torch.float64)
        null.append(_ratios(noise * seen, len(space.dims)))
    simulated = torch.cat(null)
    each = (1 + (simulated[None] >= ratios[:, None]).sum(1)) / (1 + look.simulations)
    p = float(each.mean()) if count == 1 else min(1.0, 2 * float(each.double().mean()))
    return Whiteness(float(ratios.mean()), float(simulated.mean()), p, p >= false_alarm, count, false_alarm)


def _ratios(residual: Tensor, dims: int) -> Tensor:
    """W of residuals (n, *shape[, 2]): (n,); parts of complex data are summed lag by lag."""
    over = tuple(range(1, dims + 1))
    lengths = [2 * residual.shape[axis] for axis in over]
    power = torch.fft.fftn(residual, s=lengths, dim=over).abs().square()
    power = power.sum(-1) if residual.ndim > dims + 1 else power
    # Wiener-Khinchin; Parseval gives the sum over all lags, c_0 is the mean of the power.
    total = power.square().flatten(1).mean(1)
    zero = power.flatten(1).mean(1) ** 2
    return total / zero - 1
