r"""Do events happen as often as forecast?  Reliability of exceedance probabilities, over cases.

Event: the truth exceeds a threshold.  Forecast: the share p of draws that do.  The reliability curve is the isotonic
regression of events on forecasts (CORP: Dimitriadis, Gneiting & Jordan, PNAS 118, 2021; pool-adjacent-violators), which
needs no bins, and splits the Brier score exactly:

    mean (p - e)^2 = MCB - DSC + UNC,     MCB = S(p) - S(curve),  DSC = S(mean) - S(curve),  UNC = S(mean).

With M draws p is a noisy forecast: even a perfect ensemble's curve is flatter than the diagonal, and its MCB may come
to the sampling variance of p, ``mean p(1-p)/(M-1)``.  What is exactly true for a calibrated ensemble of any M is
``E[e - p] = 0``; that is judged, with the case as the unit, and the curve's band resamples whole cases, since pixels of
one case are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recon.diagnostics.betting import evidence, interval
from recon.diagnostics.given import Array, draws_of, truth_of, weights_of
from recon.diagnostics.verdicts import FALSE_ALARM, FEWEST
from recon.errors import InputError

REPEATS = 200
POINTS = 21


@dataclass(frozen=True)
class Events:
    """Forecasts and outcomes of one case: probability (pixel,) and whether it happened (pixel,)."""

    probability: np.ndarray
    happened: np.ndarray


def case_events(x: Array, truth: Array, threshold: float | Array, log_weights: Array | None = None) -> Events:
    """Share of the draws (draw, *space) above ``threshold`` (a number or *space), and whether the truth is.

    Raises InputError without a truth, for values that are no numbers, or a threshold that does not fit.
    """
    import torch

    x = draws_of(x)
    truth = truth_of(truth, x)
    w, limit = weights_of(log_weights, len(x)), torch.as_tensor(threshold).cpu()
    if limit.ndim and limit.shape != truth.shape:
        raise InputError(f"a threshold is a number or {tuple(truth.shape)}; got {tuple(limit.shape)}")
    share = torch.einsum("d,d...->...", w, (x > limit).double()).clamp(0, 1)
    return Events(share.reshape(-1).numpy(), (truth > limit).reshape(-1).numpy())


@dataclass(frozen=True)
class Reliability:
    """The curve and what it comes to.

    grid, curve, low, high: the isotonic curve at forecasts 0, 0.05, ... 1 (NaN outside the forecasts) and its band over
    resampled cases (NaN with fewer than 8).  brier = miscalibration - discrimination + uncertainty.  sampling_variance:
    ``mean p(1-p)/(M-1)``, to which the miscalibration of a perfect ensemble of so many draws may come.  excess: mean of
    event - forecast, between excess_low and excess_high but for ``false_alarm``.  finding: "reliable", "too rarely
    forecast", "too often forecast", "cannot say".
    """

    grid: tuple[float, ...]
    curve: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    brier: float
    miscalibration: float
    discrimination: float
    uncertainty: float
    sampling_variance: float
    excess: float
    excess_low: float
    excess_high: float
    cases: int
    false_alarm: float
    finding: str
    reason: str

    def summary(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""

        def plain(value: Any) -> Any:  # noqa: ANN401
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {name: plain(value) for name, value in self.__dict__.items()}


def isotonic(probability: np.ndarray, happened: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression of events on forecasts: the distinct forecasts, increasing, and the curve there.

    Equal forecasts are pooled first, so that the curve is a function of the forecast.
    """
    from scipy.optimize import isotonic_regression

    levels, place, count = np.unique(probability, return_inverse=True, return_counts=True)
    mean = np.bincount(place, weights=happened.astype(np.float64)) / count
    return levels, np.asarray(isotonic_regression(mean, weights=count.astype(np.float64)).x)


def reliability_over_cases(
    events: Sequence[Events],
    draws: float,
    false_alarm: float = FALSE_ALARM,
    tolerance: float = 0.1,
    seed: int = 0,
) -> Reliability:
    """The reliability curve of cases pooled, its band over cases, and the verdict on the frequency.

    events: of each case, by ``case_events``.  draws: M.  tolerance: "reliable" is said where the excess is known (at 1 -
    false_alarm) to be that small.  seed: of the resampling of the band.
    Raises InputError for no cases, or fewer than 2 draws.
    """
    if not events or draws < 2 or not 0 < false_alarm < 1:
        raise InputError("reliability takes at least one case, 2 draws, and a false-alarm rate between 0 and 1")
    p = np.concatenate([e.probability for e in events])
    e = np.concatenate([e.happened for e in events]).astype(np.float64)
    levels, curve = isotonic(p, e)
    fitted = curve[np.searchsorted(levels, p)]
    brier, best, base = (float(((f - e) ** 2).mean()) for f in (p, fitted, np.full_like(e, e.mean())))
    grid = np.linspace(0, 1, POINTS)
    low, high = _band(events, grid, false_alarm, seed)
    # (1 + e - p) / 2 lies in [0, 1] and has mean 1/2 for any law of the pixels.
    half = np.array([(1 + case.happened.mean() - case.probability.mean()) / 2 for case in events])
    found, why, bounds = _judge(half, false_alarm, tolerance)
    return Reliability(
        grid=tuple(grid.tolist()),
        curve=tuple(_at(levels, curve, grid).tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        brier=brier,
        miscalibration=brier - best,
        discrimination=base - best,
        uncertainty=base,
        sampling_variance=float((p * (1 - p)).mean()) / (draws - 1),
        excess=float(2 * half.mean() - 1),
        excess_low=bounds[0],
        excess_high=bounds[1],
        cases=len(events),
        false_alarm=false_alarm,
        finding=found,
        reason=why,
    )


def _judge(half: np.ndarray, false_alarm: float, tolerance: float) -> tuple[str, str, tuple[float, float]]:
    n = len(half)
    if n < FEWEST:
        return "cannot say", f"{n} cases are too few: at least {FEWEST} are needed", (-1.0, 1.0)
    low, high = (2 * v - 1 for v in interval(half, false_alarm))
    where = f"events less forecasts {2 * half.mean() - 1:+.3f}, between {low:+.3f} and {high:+.3f} ({n} cases)"
    more, less = evidence(half, 0.5, false_alarm / 2)
    if max(more, less) >= math.log(2 / false_alarm):
        return ("too rarely forecast" if more > less else "too often forecast"), where, (low, high)
    if max(high, -low) > tolerance:
        return "cannot say", f"{where}: not known to {tolerance:g}; more cases are needed", (low, high)
    return "reliable", where, (low, high)


def _at(levels: np.ndarray, curve: np.ndarray, grid: np.ndarray) -> np.ndarray:
    inside = (grid >= levels[0] - 1e-12) & (grid <= levels[-1] + 1e-12)
    return np.where(inside, np.interp(grid, levels, curve), np.nan)


def _band(events: Sequence[Events], grid: np.ndarray, rate: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise band of the curve over resampled cases; NaN where there are too few."""
    none = np.full(len(grid), np.nan)
    if len(events) < FEWEST:
        return none, none
    random = np.random.Generator(np.random.Philox(key=np.array([seed, len(events)], dtype=np.uint64)))
    curves = []
    for _ in range(REPEATS):
        picked = [events[i] for i in random.integers(len(events), size=len(events))]
        curves.append(
            _at(
                *isotonic(
                    np.concatenate([e.probability for e in picked]), np.concatenate([e.happened for e in picked])
                ),
                grid,
            )
        )
    stack = np.stack(curves)
    low, high = none.copy(), none.copy()
    known = np.isfinite(stack).mean(0) > 0.5
    if known.any():
        low[known], high[known] = np.nanquantile(stack[:, known], [rate / 2, 1 - rate / 2], axis=0)
    return low, high
