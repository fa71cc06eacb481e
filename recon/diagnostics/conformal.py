r"""Intervals made to cover by what happened on other cases, and for what they hold.

Intervals ``[q_lo - l s, q_hi + l s]`` with one number ``l`` found on ``n`` calibration cases with known truths.  A
pixel needs ``e = max(q_lo - t, t - q_hi)/s``; a case needs ``E``, the smallest ``l`` that covers a fraction ``level``
of its pixels.

* "case": ``l`` is the ``ceil((n+1)(1-alpha))``-th smallest ``E``.  Of a further exchangeable case, at least a fraction
  ``level`` of the pixels is covered with probability ``1 - alpha`` (split conformal; Vovk et al. 2005).  Needs
  ``n >= 1/alpha - 1``.
* "average": the smallest ``l`` with ``(n R(l) + 1)/(n + 1) <= 1 - level``, ``R`` the mean fraction missed.  A further case
  is covered in a fraction ``level`` of its pixels on average (conformal risk control; Angelopoulos et al., ICLR 2024).
  Needs ``n >= 1/(1-level) - 1``.  The promise counts the next case as missed altogether, so few cases stretch too far:
  coverage lies up to ``1/(n+1)`` above the level.
* "estimate": the smallest ``l`` with ``R(l) <= 1 - level``: no promise, but nothing added to it either; the best guess from few
  cases, whose error is that of ``R``.  Needs 2 cases.

The case is the unit: no law of pixels is assumed.  Both are averages over problems like the calibration ones, and nothing
under another operator, noise, prior, sampler or population: the ``Scope`` goes with the number and refuses others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from recon.diagnostics.given import Array, draws_of, several, truth_of, weights_of
from recon.diagnostics.intervals import intervals
from recon.errors import InputError
from recon.posterior import Posterior
from recon.samplers.base import Sampler

Guarantee = Literal["case", "average", "estimate"]
SLACK = 1e-9  # of rounding


@dataclass(frozen=True)
class Scope:
    """What a calibration holds for, as plain text: made by ``scope_of``, or by hand for other sources.

    operator, noise, prior, sampler: names with a digest of their numbers.  draws: per case.  population: what the cases
    are.
    """

    operator: str
    noise: str
    prior: str
    sampler: str
    draws: int
    population: str

    def differences(self, other: Scope) -> list[str]:
        """In words, where ``other`` is something else."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} against {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def scope_of(posterior: Posterior, sampler: Sampler, draws: int, population: str) -> Scope:
    """The scope of results of ``sampler`` on problems like ``posterior``; the measurement itself does not count.

    population: what the cases were drawn from ("held-out slices of ct_axial").
    """
    likelihood, prior = posterior.likelihood, posterior.prior
    operator = likelihood.operator
    measurement = ("measured", "counts")
    noise = {
        name: value
        for name, value in likelihood.named_buffers()
        if not name.startswith("operator.") and name.split(".")[-1] not in measurement and ".operator." not in name
    }
    text = repr(sampler)
    return Scope(
        operator=f"{operator.describe()} {_digest(dict(operator.named_buffers()))}",
        noise=f"{type(likelihood).__name__} {_digest(noise)}",
        prior=f"{prior.card.name} {_digest(_numbers(prior))}",
        sampler=f"{type(sampler).__name__} {sha256(text.encode()).hexdigest()[:12]}",
        draws=draws,
        population=population,
    )


def _numbers(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


@dataclass(frozen=True)
class Recalibration:
    """The number found on calibration cases, what it promises, and for what.

    stretch: ``l``, in units of the draws' standard deviation; below 0 intervals shrink.  level, alpha, guarantee: see the
    module.  cases: their number.  day: ISO date.  ``None`` as stretch: cannot be calibrated, and ``reason`` says why.
    """

    stretch: float | None
    level: float
    alpha: float
    guarantee: Guarantee
    cases: int
    scope: Scope
    day: str
    reason: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON values; ``recalibration_from`` reads them back."""
        return asdict(self)


def recalibration_from(summary: Mapping[str, Any]) -> Recalibration:
    """What ``Recalibration.summary`` wrote.  Raises InputError for anything else."""
    try:
        values = dict(summary)
        return Recalibration(**{**values, "scope": Scope(**values["scope"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"this is not a stored recalibration: {error}") from error


@dataclass(frozen=True, eq=False)
class Need:
    """What one calibration case needs: sorted excesses ``e`` of its pixels (pixel,); made by ``case_need``."""

    excess: np.ndarray


def case_need(x: Array, truth: Array, level: float = 0.9, log_weights: Array | None = None) -> Need:
    """The excesses of one case against its raw intervals of probability ``level``, in standard deviations of the draws.

    x: (draw, *space).  truth: *space.  Raises InputError where the intervals do not exist, without a truth, or where
    draws do not spread in some pixel (no stretch of zero covers).
    """
    x = draws_of(x, 2, "a conformal calibration")
    truth = truth_of(truth, x).double()
    low, high, std = _raw(x, level, log_weights)
    excess = torch.maximum(low - truth, truth - high) / std
    return Need(np.sort(excess.reshape(-1).numpy()))


def _raw(x: Tensor, level: float, log_weights: Array | None) -> tuple[Tensor, Tensor, Tensor]:
    raw = intervals(x, level, log_weights)
    if raw.low is None or raw.high is None:
        raise InputError(f"there are no intervals to stretch: {raw.reason}")
    w = weights_of(log_weights, len(x)).reshape(-1, *[1] * (x.ndim - 1))
    rows = x.double()
    mean = (w * rows).sum(0)
    std = ((w * (rows - mean) ** 2).sum(0) / several(w.reshape(-1), "a standard deviation")).sqrt()
    if not bool((std > 0).all()):
        raise InputError(f"the draws do not spread in {int((std == 0).sum())} of {std.numel()} pixels: leave those out")
    return raw.low.double(), raw.high.double(), std


def recalibrate(
    needs: Sequence[Need],
    scope: Scope,
    level: float = 0.9,
    alpha: float = 0.1,
    guarantee: Guarantee = "case",
    day: date | None = None,
) -> Recalibration:
    """The stretch that makes intervals cover; without a number (and with its reason) where the cases are too few.

    needs: of the calibration cases, all by the same scope.  day: of the calibration, today's in UTC by default.
    Raises InputError for no cases, or levels outside (0, 1).
    """
    if not needs or not 0 < level < 1 or not 0 < alpha < 1 or guarantee not in ("case", "average", "estimate"):
        raise InputError(
            "a recalibration takes at least one case, level and alpha between 0 and 1, and case, average or estimate"
        )
    n = len(needs)
    stamp = (day or datetime.now(UTC).date()).isoformat()
    miss, least = alpha if guarantee == "case" else 1 - level, least_cases(level, alpha, guarantee)
    if n < least:
        what = "estimate" if guarantee == "estimate" else "promise"
        reason = f"{n} calibration cases cannot {what} a miss rate of {miss:g}: at least {least} are needed"
        return Recalibration(None, level, alpha, guarantee, n, scope, stamp, reason)
    stretch = _by_case(needs, level, alpha) if guarantee == "case" else _on_average(needs, level, guarantee)
    return Recalibration(stretch, level, alpha, guarantee, n, scope, stamp)


def _by_case(needs: Sequence[Need], level: float, alpha: float) -> float:
    scores = sorted(float(need.excess[math.ceil(level * len(need.excess) - 1e-9) - 1]) for need in needs)
    return scores[math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9) - 1]


def least_cases(level: float, alpha: float, guarantee: Guarantee) -> int:
    """The fewest cases that a guarantee can be given from."""
    if guarantee == "estimate":
        return 2
    return math.ceil(1 / (alpha if guarantee == "case" else 1 - level) - 1 - SLACK)


def enough_covered(missed: np.ndarray, n: int, level: float, guarantee: Guarantee) -> np.ndarray:
    """Where ``missed`` (the sum over ``n`` cases of the fractions missed) satisfies "average" or "estimate"."""
    if guarantee == "estimate":
        return missed <= n * (1 - level) + SLACK
    return missed + 1 <= (n + 1) * (1 - level) + SLACK


def _on_average(needs: Sequence[Need], level: float, guarantee: Guarantee) -> float:
    n = len(needs)
    values = np.concatenate([need.excess for need in needs])
    weight = np.concatenate([np.full(len(need.excess), 1 / len(need.excess)) for need in needs])
    order = values.argsort()
    # n R(l) just at l = values[order][i]: the weight of what lies beyond.
    missed = n - weight[order].cumsum()
    return float(values[order][np.flatnonzero(enough_covered(missed, n, level, guarantee))[0]])


def stretched(
    x: Array, recalibration: Recalibration, scope: Scope, log_weights: Array | None = None
) -> tuple[Tensor, Tensor]:
    """Recalibrated intervals of draws (draw, *space): two maps.  Where they would cross they meet in the middle.

    Raises InputError where the recalibration has no number, or ``scope`` is not the one it was made in.
    """
    if recalibration.stretch is None:
        raise InputError(f"this recalibration has no number: {recalibration.reason}")
    differences = recalibration.scope.differences(scope)
    if differences:
        raise InputError(f"the recalibration of {recalibration.day} does not hold here: {'; '.join(differences)}")
    low, high, std = _raw(draws_of(x, 2, "an interval"), recalibration.level, log_weights)
    low, high = low - recalibration.stretch * std, high + recalibration.stretch * std
    middle = (low + high) / 2
    return torch.minimum(low, middle), torch.maximum(high, middle)
