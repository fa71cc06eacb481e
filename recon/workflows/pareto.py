"""Which of several ways to do a thing are worth having: better against cheaper, with ties told from differences.

Every way is tried on the same cases, so two are compared by their difference case by case.  What a case has to itself falls
out; what is left has, for a pair (a, b) and J cases, the variance

    v_ab = var_j (q_aj - q_bj) / J

The variances are pooled by their median over all pairs (over that of ``chi2 / (J - 1)``, which the median falls short of), so
that one way that fails wildly does not make ties of all others.  Two means differ when they are further apart than
``t sqrt(v)``, t Student's quantile with the ``(I - 1)(J - 1)`` degrees of an analysis of variance of I ways.  One threshold for
all pairs also makes the order consistent: with a threshold of its own for every pair, three could each be worse than the next.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95  # of calling a difference one, pair by pair


def resolution(
    values: Sequence[Sequence[float]], errors: Sequence[float] | None = None, confidence: float = CONFIDENCE
) -> float:
    """Smallest difference of two means over cases that is none of chance.

    values: (way, case), the same cases for all.  errors: standard error of each way's number, used where there is one case only
    (its cases cannot tell); without them a single case gives 0.
    """
    cases = min((len(row) for row in values), default=0)
    if len(values) < 2 or cases == 0:
        return 0.0
    if cases == 1:
        finite = [e for e in errors or () if math.isfinite(e)]
        return _student(confidence, math.inf) * math.sqrt(2) * statistics.median(finite) if finite else 0.0
    from scipy.stats import chi2

    freedom = cases - 1
    spreads = [
        statistics.variance([a - b for a, b in zip(one, other, strict=True)])
        for one, other in itertools.combinations(values, 2)
    ]
    # The median of one pair is unbiased as it is: there is nothing to be robust against.
    shrunk = float(chi2.median(freedom)) / freedom if len(spreads) > 1 else 1.0
    pooled = statistics.median(spreads) / shrunk
    return _student(confidence, (len(values) - 1) * freedom) * math.sqrt(pooled / cases)


def dominates(one: tuple[float, float], other: tuple[float, float], better: float, cheaper: float) -> bool:
    """Whether ``one`` (quality, cost) is clearly better or clearly cheaper than ``other``, and clearly worse in neither.

    better, cheaper: differences up to which two qualities, two costs, are ties.  Never true in a circle: its gains and its
    savings sum to nothing, so the steps won by quality would have to be fewer than those won by cost, and the other way round.
    """
    gain, saving = one[0] - other[0], other[1] - one[1]
    return gain >= -better and saving >= -cheaper and (gain > better or saving > cheaper)


def front(points: Sequence[tuple[float, float]], better: float = 0.0, cheaper: float = 0.0) -> list[bool]:
    """Which (quality, cost) no other dominates; ties stand together.  At least one does."""
    return [not any(dominates(other, one, better, cheaper) for other in points) for one in points]


def _student(confidence: float, freedom: float) -> float:
    from scipy.stats import norm, t

    tail = (1 - confidence) / 2
    return float(norm.isf(tail) if math.isinf(freedom) else t.isf(tail, freedom))
