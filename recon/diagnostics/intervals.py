"""Interval maps that cover for finite ensembles, and how often they do: by case, by region, over cases.

The central interval of probability ``p`` runs between the order statistics at ``k/(M+1)`` (interpolated; see
``recon.order`` for weights), between which a further exchangeable draw lies with probability ``p`` for any M.  It
exists when ``1/(M+1) <= (1-p)/2``: from 3 draws for 50 %, 19 for 90 %, 39 for 95 %.  (The usual rule, linear in
``k/(M-1)``, covers 82 % of nominal 90 % at 20 draws.)

Over cases the unit is the case: each gives one fraction per region, and the interval of their mean is a betting one
(``recon.diagnostics.betting``), right for skewed fractions and few cases.  A region counts twice: as the fraction of
its pixels that are covered, and as one interval of its mean, which notices wrong correlations that single pixels cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recon.diagnostics.given import Array, draws_of, effective, truth_of, weights_of
from recon.diagnostics.verdicts import FALSE_ALARM, Verdict, judge_coverage
from recon.errors import InputError
from recon.order import quantiles

ANCESTORS = 20  # distinct ancestors of particles below which no interval is drawn
WHOLE = "all"


def draws_needed(level: float) -> int:
    """Draws from which a central interval of probability ``level`` exists: ``2/(1 - level) - 1``."""
    if not 0 < level < 1:
        raise InputError(f"the level of an interval lies between 0 and 1; got {level}")
    return math.ceil(2 / (1 - level) - 1 - 1e-9)


@dataclass(frozen=True, eq=False)
class Intervals:
    """Central intervals per pixel, or why there are none.

    level: their probability.  low, high: *space, in data units; None where they do not exist, and then ``reason`` says why.
    ess: effective number of draws.
    """

    level: float
    low: Tensor | None
    high: Tensor | None
    ess: float
    reason: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON values: level, ess, reason, and the mean width."""
        width = None if self.low is None or self.high is None else float((self.high - self.low).double().mean())
        return {"level": self.level, "ess": self.ess, "mean_width": width, "reason": self.reason}


def intervals(
    x: Array, level: float = 0.9, log_weights: Array | None = None, ancestors: int | None = None
) -> Intervals:
    """Central intervals of probability ``level`` of every pixel.

    x: (draw, *space).  ancestors: number of distinct ancestors of resampled particles, where there are such; fewer than 20
    give no map.  Too few draws, or draws that are all the same, give a result without maps and its reason.
    Raises InputError for values that are no numbers or a level outside (0, 1).
    """
    return intervals_at(x, (level,), log_weights, ancestors)[0]


def intervals_at(
    x: Array, levels: Sequence[float], log_weights: Array | None = None, ancestors: int | None = None
) -> tuple[Intervals, ...]:
    """``intervals`` of several probabilities, from one sort of the draws."""
    needs = [draws_needed(level) for level in levels]
    x = draws_of(x)
    ess = effective(weights_of(log_weights, len(x)))
    refused = {level: _refusal(x, level, need, ess, ancestors) for level, need in zip(levels, needs, strict=True)}
    drawn = [level for level in refused if not refused[level]]
    tails = [tail for level in drawn for tail in ((1 - level) / 2, (1 + level) / 2)]
    ends = quantiles(x, tails, weights_of(log_weights, len(x))) if drawn else None
    found = []
    for level in levels:
        if refused[level] or ends is None:
            found.append(Intervals(level, None, None, ess, refused[level]))
        else:
            at = 2 * drawn.index(level)
            found.append(Intervals(level, ends[at], ends[at + 1], ess))
    return tuple(found)


def _refusal(x: Tensor, level: float, need: int, ess: float, ancestors: int | None) -> str:
    if ess < need - 1e-6:
        return f"{level:.0%} intervals need {need} effective draws; there are {ess:.3g}"
    if ancestors is not None and ancestors < ANCESTORS:
        return f"the draws descend from {ancestors} ancestors, fewer than {ANCESTORS}"
    if bool((x == x[:1]).all()):
        return "the ensemble has collapsed: all draws are the same"
    return ""


@dataclass(frozen=True)
class Hit:
    """Of one region in one case: fraction of its pixels below, inside and above their intervals; of a mean, 0 or 1."""

    below: float
    inside: float
    above: float


def case_coverage(
    x: Array,
    truth: Array,
    level: float = 0.9,
    regions: Mapping[str, Array] | None = None,
    log_weights: Array | None = None,
) -> dict[str, Hit] | None:
    """How one case fares: name of a region -> ``Hit``; None where the intervals do not exist.

    x: (draw, *space).  truth: *space.  regions: name -> mask of *space.  Every pixel counts under "all"; each region
    under its own name (its pixels) and as "mean of NAME" (its average).
    Raises InputError without a truth, for masks that do not fit or are empty, or values that are no numbers.
    """
    x = draws_of(x)
    truth = truth_of(truth, x).to(x)
    need, w = draws_needed(level), weights_of(log_weights, len(x))
    masks = {name: _mask(name, mask, truth) for name, mask in (regions or {}).items()}
    if effective(w) < need - 1e-6:
        return None
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = quantiles(x, tails, w)
    under, over = (truth < low), (truth > high)
    hits = {WHOLE: _hit(under, over)}
    means = {WHOLE: torch.ones_like(under)} | masks
    for name, mask in masks.items():
        hits[name] = _hit(under[mask], over[mask])
    averages = torch.stack([torch.cat([x, truth[None]])[:, mask].double().mean(1) for mask in means.values()], 1)
    low, high = quantiles(averages[:-1], tails, w)
    for i, name in enumerate(means):
        hits[f"mean of {name}"] = _hit(averages[-1:, i] < low[i], averages[-1:, i] > high[i])
    return hits


def _hit(under: Tensor, over: Tensor) -> Hit:
    below, above = float(under.double().mean()), float(over.double().mean())
    return Hit(below, 1 - below - above, above)


def _mask(name: str, mask: Array, truth: Tensor) -> Tensor:
    mask = torch.as_tensor(mask).cpu()
    if mask.dtype != torch.bool or mask.shape != truth.shape or not bool(mask.any()):
        raise InputError(
            f"region {name!r} must be a mask (bool) of {tuple(truth.shape)} with at least one pixel; got {mask.dtype} "
            f"{tuple(mask.shape)} with {int((mask != 0).sum())}"
        )
    return mask


@dataclass(frozen=True)
class Coverage:
    """Coverage of one region over cases, with the case as the unit.

    inside: mean fraction.  error: its standard error over cases (NaN for one).  low, high: bounds of the mean at the
    verdict's false-alarm rate.  below, above: mean fractions outside on either side.
    """

    level: float
    cases: int
    inside: float
    error: float
    low: float
    high: float
    below: float
    above: float
    verdict: Verdict

    @property
    def finding(
        self,
    ) -> Literal["calibrated", "biased", "over-dispersed", "under-dispersed", "misshapen", "cannot say"]:
        """The verdict's word."""
        return self.verdict.finding

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        names = ("level", "cases", "inside", "low", "high", "below", "above")
        error = self.error if math.isfinite(self.error) else None
        return {**{n: getattr(self, n) for n in names}, "error": error, "verdict": self.verdict.summary()}


def coverage_over_cases(
    cases: Sequence[Mapping[str, Hit] | None], level: float = 0.9, false_alarm: float = FALSE_ALARM
) -> dict[str, Coverage]:
    """Name of a region -> its coverage over cases, each with its verdict; the rate is shared between the regions.

    cases: as ``case_coverage`` gives them; those without intervals (None) are left out, and a region counts in the
    cases that have it.  Raises InputError where no case has intervals.
    """
    present = [case for case in cases if case is not None]
    if not present:
        raise InputError(f"no case has {level:.0%} intervals: each needs {draws_needed(level)} effective draws")
    names = list(dict.fromkeys(name for case in present for name in case))
    return {name: _over([c[name] for c in present if name in c], level, false_alarm / len(names)) for name in names}


def _over(hits: list[Hit], level: float, false_alarm: float) -> Coverage:
    inside = np.array([h.inside for h in hits]).clip(0, 1)
    below = np.array([h.below for h in hits])
    verdict = judge_coverage(inside, level, below, false_alarm)
    error = float(inside.std(ddof=1) / math.sqrt(len(hits))) if len(hits) > 1 else math.nan
    low, high = verdict.figures.get("low", 0.0), verdict.figures.get("high", 1.0)
    mean = float(inside.mean())
    return Coverage(
        level, len(hits), mean, error, low, high, float(below.mean()), 1 - mean - float(below.mean()), verdict
    )
